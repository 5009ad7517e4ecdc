// The model live: prompts in, tokens out by server-sent events, features watched and steered.
import { all, ask, featureAddress, figures, make, one, send, toast } from "./studio.js";
import { drawStrip } from "./strip.js";

const STEPS = 9;
const MOST = 8;
const MODES = {
  watch: { name: "watch only" },
  add: { name: "add", low: -8, high: 8, step: 0.25, start: 2 },
  scale: { name: "scale by", low: 0, high: 5, step: 0.1, start: 2 },
  clamp: { name: "clamp to", low: -4, high: 8, step: 0.25, start: 1 },
  off: { name: "off" },
};
const form = one("#ask");
if (form) {
  const moves = []; // {id, mode, amount, element}
  let job = "";
  let asked = false; // from then on the line under the buttons is about what was asked
  let aborter = null;
  let poll = 0;
  let scales = {};
  const runs = new Map(); // name of a run -> {tokens, box, strips}

  // --- the model ---
  async function state() {
    const now = await ask("/live/state.json").catch((error) => ({ phase: "failed", said: error.message, queue: [] }));
    one("#loading").hidden = now.phase !== "loading";
    if (!asked) one("#said").textContent = now.phase === "loading" ? `${now.said}: ${now.seconds.toFixed(0)} s` : now.phase === "failed" ? now.said : now.phase === "ready" ? "The model is loaded." : "The model is loaded when you generate.";
    showQueue(now.queue);
    clearTimeout(poll);
    if (now.phase === "loading" || now.queue.length) poll = setTimeout(state, 1000);
  }
  function showQueue(jobs) {
    one("#queue").replaceChildren(...(jobs.length > 1 || (jobs.length && !job) ? jobs.map((other) => {
      const stop = make("button", { type: "button", textContent: "Stop" });
      stop.addEventListener("click", () => ask("/live/stop", { method: "POST", body: JSON.stringify({ id: other.id }) }).then(state).catch((error) => toast(error.message)));
      return make("p", {}, `${other.state}: “${other.prompt}” `, stop);
    }) : []));
  }
  ask("/live/open", { method: "POST", body: "{}" }).then(state).catch((error) => { one("#said").textContent = error.message; });

  // --- features ---
  function addFeature(id) {
    if (!id || moves.some((move) => move.id === id)) return;
    if (moves.length >= MOST) { toast(`At most ${MOST} features at once.`); return; }
    const move = { id, mode: "watch", amount: 0 };
    const mode = make("select", { "aria-label": `What to do to ${id}` }, ...Object.entries(MODES).map(([key, { name }]) => make("option", { value: key, textContent: name })));
    const slider = make("input", { type: "range", "aria-label": `Amount for ${id}`, disabled: true });
    const shown = make("output", { textContent: "" });
    const remove = make("button", { type: "button", textContent: "×", "aria-label": `Remove ${id}` });
    const show = () => { shown.textContent = slider.disabled ? "" : String(move.amount).replace("-", "−"); };
    mode.addEventListener("change", () => {
      move.mode = mode.value;
      const { low, high, step, start } = MODES[move.mode];
      slider.disabled = low === undefined;
      if (!slider.disabled) { Object.assign(slider, { min: low, max: high, step, value: start }); move.amount = start; }
      show();
      const steered = one('[name="run"][value="steered"]');
      if (move.mode !== "watch") steered.checked = true;
      else if (moves.every((other) => other.mode === "watch")) all('[value="steered"], [value="control"]', form).forEach((tick) => { tick.checked = false; });
    });
    slider.addEventListener("input", () => { move.amount = Number(slider.value); show(); });
    remove.addEventListener("click", () => { moves.splice(moves.indexOf(move), 1); move.element.remove(); one("#none").hidden = moves.length > 0; });
    move.element = make("li", {}, make("a", { href: featureAddress(id), textContent: id.replace(/-$/, "−") }), mode, slider, shown, remove);
    moves.push(move);
    one("#moves").append(move.element);
    one("#none").hidden = true;
  }
  const input = one("#add");
  let known = [];
  let timer = 0;
  const take = () => { addFeature(input.value.trim()); input.value = ""; };
  input.addEventListener("input", () => {
    clearTimeout(timer);
    if (known.includes(input.value)) { take(); return; }
    timer = setTimeout(async () => {
      const found = await ask(`/features.json?size=12&q=${encodeURIComponent(input.value)}`).catch(() => ({}));
      const rows = (found.rows || []).filter((row) => row.kind === "direction" || row.kind === "latent");
      known = rows.map((row) => row.id);
      one("#suggested").replaceChildren(...rows.map((row) => make("option", { value: row.id, label: row.text ? `${row.id} · ${row.text.slice(0, 70)}` : row.id })));
    }, 150);
  });
  input.addEventListener("keydown", (event) => { if (event.key === "Enter") { event.preventDefault(); take(); } });
  form.dataset.features.split(",").forEach(addFeature);
  const samples = one("#samples");
  if (samples) samples.addEventListener("change", () => { one("#prompt").value = samples.value; });

  // --- panels ---
  function openPanels(names, watched) {
    runs.clear();
    const colour = one("#colour");
    const chosen = colour.value;
    colour.replaceChildren(...watched.map((id) => make("option", { value: id, textContent: id })));
    if (watched.includes(chosen)) colour.value = chosen;
    one("#colour-by").hidden = watched.length === 0;
    one("#panels").replaceChildren(...Object.entries(names).map(([run, name]) => {
      const box = make("div", { className: "whole tokens output", tabIndex: 0, role: "region", "aria-label": name });
      const strips = watched.map((id) => {
        const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
        for (const [key, value] of [["class", "strip"], ["width", "100%"], ["height", "44"], ["role", "img"], ["aria-label", `Activation of ${id} over the response`]]) svg.setAttribute(key, value);
        return { id, svg, row: make("div", { className: "live-strip" }, make("span", { textContent: id.replace(/-$/, "−") }), svg) };
      });
      const note = make("p", { className: "facts" });
      runs.set(run, { tokens: [], box, strips, note });
      return make("section", { className: `panel-run run-${run}` }, make("h2", { className: "small", textContent: name }), box, ...strips.map((strip) => strip.row), note);
    }));
  }
  const typical = (id) => (scales[id] ?? Math.max(...[...runs.values()].flatMap((run) => run.tokens.map((token) => token.activations[id])), 1e-9));
  function shade(element, token) {
    const id = one("#colour").value;
    if (!id) return;
    const value = token.activations[id];
    const step = value > 0 ? Math.min(STEPS, 1 + Math.floor(STEPS * Math.min(1, value / typical(id)) * 0.9999)) : 0;
    for (let i = 1; i <= STEPS; i++) element.classList.toggle(`h${i}`, i === step);
    element.dataset.v = `${id}: ${figures(value)}`;
  }
  one("#colour").addEventListener("change", () => {
    for (const { tokens } of runs.values()) tokens.forEach((token) => token.element && shade(token.element, token));
  });
  function addToken(run, token) {
    const { tokens, box } = runs.get(run);
    tokens.push(token);
    const text = token.text.replaceAll("\n", "↵");
    token.element = make("span", { textContent: text });
    shade(token.element, token);
    box.append(token.element, ...Array.from(token.text.matchAll(/\n/g), () => make("br")).slice(0, 2));
    box.scrollTop = box.scrollHeight;
    markDifference(run === "plain" ? [...runs.keys()] : [run]);
  }
  function markDifference(names) {
    const plain = runs.get("plain");
    if (!plain) return;
    for (const name of names) {
      const run = runs.get(name);
      if (name === "plain" || run.differs !== undefined) continue;
      const shared = Math.min(plain.tokens.length, run.tokens.length);
      const at = run.tokens.slice(0, shared).findIndex((token, i) => token.token_id !== plain.tokens[i].token_id);
      if (at < 0) continue;
      run.differs = at;
      run.tokens[at].element.before(make("b", { className: "parts", textContent: "≠", title: "parts from the unsteered run here" }));
    }
  }
  function drawStrips() {
    for (const { tokens, strips } of runs.values()) {
      for (const { id, svg } of strips) drawStrip(svg, tokens.map((token) => token.activations[id]), 0, Math.max(typical(id), ...tokens.map((token) => token.activations[id])));
    }
  }

  // --- generating ---
  const running = (on) => { one("#go").disabled = on; one("#stop").disabled = !on; };
  function hear(event, watched) {
    if (event.event === "queued") { job = event.id; state(); }
    else if (event.event === "waiting") one("#said").textContent = event.phase === "loading" ? `${event.said}: ${event.seconds.toFixed(0)} s` : event.before ? `${event.before} before this one` : "Working…";
    else if (event.event === "start") { scales = event.scales; openPanels(event.runs, watched); one("#said").textContent = "Generating…"; one("#loading").hidden = true; }
    else if (event.event === "token") addToken(event.run, event);
    else if (event.event === "done") {
      for (const [run, ended] of Object.entries(event.ended)) if (runs.has(run)) runs.get(run).note.textContent = `${runs.get(run).tokens.length} tokens, ${ended ? "ended by the model" : event.stopped ? "stopped" : "cut at the limit"}${runs.get(run).differs !== undefined ? `; parts at token ${runs.get(run).differs}` : runs.has("plain") && run !== "plain" ? "; the same as unsteered" : ""}`;
      one("#said").textContent = event.stopped ? "Stopped." : `Done, ${figures(event.tokens_per_second)} tokens per second.`;
    } else if (event.event === "failed") one("#said").textContent = event.error;
  }
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const watched = moves.map((move) => move.id);
    const steers = moves.filter((move) => move.mode !== "watch").map(({ id, mode, amount }) => ({ feature: id, mode, amount: mode === "off" ? 0 : amount }));
    const body = {
      prompt: one("#prompt").value, watch: watched, steers, runs: all('[name="run"]:checked', form).map((tick) => tick.value), where: one("#where").value,
      max_new_tokens: Number(one("#tokens").value), temperature: Number(one("#temperature").value), seed: Number(one("#seed").value),
    };
    running(true);
    asked = true;
    one("#said").textContent = "Asking…";
    aborter = new AbortController();
    const draw = setInterval(drawStrips, 300);
    try {
      const response = await send("/live/generate", { method: "POST", body: JSON.stringify(body), signal: aborter.signal });
      if (!response.ok) throw new Error((await response.json()).error);
      const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
      let rest = "";
      for (;;) {
        const { done, value } = await reader.read();
        if (done) break;
        const parts = (rest + value).split("\n\n");
        rest = parts.pop();
        for (const part of parts) if (part.startsWith("data: ")) hear(JSON.parse(part.slice(6)), watched);
      }
    } catch (error) {
      one("#said").textContent = error.name === "AbortError" ? "Stopped." : error.message;
    } finally {
      clearInterval(draw);
      drawStrips();
      job = "";
      running(false);
      state();
      one("#loading").hidden = true;
    }
  });
  one("#stop").addEventListener("click", () => {
    if (job) ask("/live/stop", { method: "POST", body: JSON.stringify({ id: job }) }).catch((error) => { toast(error.message); aborter.abort(); });
    else aborter?.abort();
  });
  document.addEventListener("keydown", (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !one("#go").disabled) form.requestSubmit(); });
}

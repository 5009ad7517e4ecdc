// The model live: prompts in, tokens out by server-sent events, features watched and steered.
import { all, drawStrip, one } from "./shared.js";
import { ask, featureAddress, figures, make, named, send, toast } from "./studio.js";
import { featureBox, foundBy } from "./choosing.js";
import { huesOf } from "./painting.js";

const STEPS = 9;
const HUES = 4;
const MOST = 8;
const MODES = {
  watch: { name: "watch only" },
  add: { name: "add", low: -8, high: 8, step: 0.25, start: 2, unit: "× p99" },
  scale: { name: "scale by", low: 0, high: 5, step: 0.1, start: 2, unit: "×" },
  clamp: { name: "clamp to", low: -4, high: 8, step: 0.25, start: 1, unit: "× p99" },
  off: { name: "off" },
};
const LIMIT = 1e6; // of an amount, either way, as the engine has it
const NUMBERS = ["tokens", "temperature", "seed"];
const LONGEST_SHARED = 2000; // characters of a prompt in the address; mail programs cut longer ones
const BROKEN = "The answer broke off; is lorascope studio still running?";
const form = one("#ask");
if (form) {
  const moves = []; // {id, mode, amount, element}
  let job = "";
  let asked = false; // from then on the line under the buttons is about what was asked
  let over = true; // the answer has come to its end
  let aborter = null;
  let poll = 0;
  let scales = {};
  let levels = {};
  let tops = {}; // largest activation of each feature so far, the scale of one whose usual strength is not known
  let picked = false; // the feature to shade by was chosen by hand
  let hues = []; // of the features that are watched
  let moved = false; // a scale has moved since the tokens were shaded
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
  function addFeature(id, wanted = "watch", given = "") {
    if (!id || moves.some((move) => move.id === id)) return;
    if (moves.length >= MOST) { toast(`At most ${MOST} features at once.`); return; }
    const move = { id, mode: "watch", amount: 0 };
    const mode = make("select", { "aria-label": `What to do to ${id}` }, ...Object.entries(MODES).map(([key, { name }]) => make("option", { value: key, textContent: name })));
    const slider = make("input", { type: "range", "aria-label": `Amount for ${id}, roughly` });
    const exact = make("input", { type: "number", "aria-label": `Amount for ${id}`, min: -LIMIT, max: LIMIT, step: "any", required: true });
    const unit = make("span", {});
    const amount = make("span", { className: "amount" }, exact, unit);
    const remove = make("button", { type: "button", textContent: "×", "aria-label": `Remove ${id}` });
    function choose(name, wanted) {
      const { low, high, step, start, unit: words } = MODES[name];
      [move.mode, move.amount, mode.value] = [name, wanted ?? start ?? 0, name];
      const none = low === undefined;
      slider.hidden = amount.hidden = slider.disabled = exact.disabled = none;
      if (none) return;
      Object.assign(slider, { min: low, max: high, step, value: move.amount }); // beyond its ends it stands at one
      [exact.value, unit.textContent] = [move.amount, words];
    }
    choose("watch");
    mode.addEventListener("change", () => {
      choose(mode.value);
      const steered = one('[name="run"][value="steered"]');
      if (move.mode !== "watch") steered.checked = true;
      else if (moves.every((other) => other.mode === "watch")) all('[value="steered"], [value="control"], [value="base_steered"]', form).forEach((tick) => { tick.checked = false; });
      keep();
    });
    slider.addEventListener("input", () => { move.amount = Number(slider.value); exact.value = slider.value; keep(); });
    exact.addEventListener("input", () => {
      if (!exact.validity.valid) return; // the browser says so when it is to be sent
      move.amount = Number(exact.value);
      slider.value = exact.value;
      keep();
    });
    remove.addEventListener("click", () => { moves.splice(moves.indexOf(move), 1); move.element.remove(); one("#none").hidden = moves.length > 0; keep(); });
    move.element = make("li", {}, make("a", { href: featureAddress(id), textContent: named(id) }), mode, slider, amount, remove);
    moves.push(move);
    one("#moves").append(move.element);
    one("#none").hidden = true;
    if (Object.hasOwn(MODES, wanted)) choose(wanted, given !== "" && Number.isFinite(Number(given)) ? Math.min(LIMIT, Math.max(-LIMIT, Number(given))) : undefined);
  }
  const input = one("#add");
  featureBox(input, {
    search: async (words) => (await foundBy(words)).filter((row) => row.kind === "direction" || row.kind === "latent"),
    exact: async (name) => !name.includes(",") && (await ask(`/live.json?features=${encodeURIComponent(name)}`)).features.includes(name),
    take: (id) => { addFeature(id); keep(); },
  });
  const samples = one("#samples");
  if (samples) samples.addEventListener("change", () => { one("#prompt").value = samples.value; });

  // --- what is asked for, in the address: to be shared, and kept over a reload ---
  const chosenRuns = () => all('[name="run"]:checked', form).map((tick) => tick.value);
  function writeAddress() {
    clearTimeout(keeping);
    const wanted = new URLSearchParams();
    if (moves.length) wanted.set("features", moves.map((move) => move.id).join(","));
    if (moves.some((move) => move.mode !== "watch")) wanted.set("moves", moves.map(({ mode, amount }) => (MODES[mode].low === undefined ? mode : `${mode}:${amount}`)).join(","));
    wanted.set("runs", chosenRuns().join(","));
    for (const name of NUMBERS) if (one(`#${name}`).value !== one(`#${name}`).defaultValue) wanted.set(name, one(`#${name}`).value);
    if (one("#where").value !== "generated") wanted.set("where", one("#where").value);
    const prompt = one("#prompt").value;
    one("#unshared").hidden = prompt.length <= LONGEST_SHARED;
    if (prompt.length <= LONGEST_SHARED) wanted.set("prompt", prompt);
    history.replaceState(null, "", `${location.pathname}?${wanted}`);
  }
  let keeping = 0;
  function keep() { clearTimeout(keeping); keeping = setTimeout(writeAddress, 300); }
  function readAddress() {
    const given = new URLSearchParams(location.search);
    const steps = (given.get("moves") ?? "").split(",");
    const there = form.dataset.features.split(","); // of those in the address, to which the moves belong
    (given.get("features") ?? "").split(",").forEach((id, i) => { if (there.includes(id)) addFeature(id, ...(steps[i] || "watch").split(":")); });
    if (given.has("runs")) for (const tick of all('[name="run"]', form)) tick.checked = given.get("runs").split(",").includes(tick.value);
    for (const name of [...NUMBERS, "prompt"]) if (given.has(name)) one(`#${name}`).value = given.get(name);
    if (given.get("where") === "all") one("#where").value = "all";
  }
  readAddress();
  form.addEventListener("input", (event) => { if (event.target !== input) keep(); });
  form.addEventListener("change", (event) => { if (event.target !== input) keep(); });

  // --- panels ---
  function openPanels(names, watched) {
    runs.clear();
    tops = Object.fromEntries(watched.map((id) => [id, 0]));
    const colour = one("#colour");
    const steered = moves.find(({ id, mode }) => mode !== "watch" && watched.includes(id));
    const chosen = picked && watched.includes(colour.value) ? colour.value : (steered?.id ?? watched[0]);
    colour.replaceChildren(...watched.map((id) => make("option", { value: id, textContent: named(id), selected: id === chosen })));
    one("#colour-by").hidden = watched.length === 0;
    hues = huesOf(watched);
    one("#panels").replaceChildren(...Object.entries(names).map(([run, name]) => {
      const box = make("div", { className: "whole tokens output", tabIndex: 0, role: "region", "aria-label": watched.length ? `${name}; arrow keys tell activations` : name });
      const strips = watched.map((id, k) => {
        const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
        for (const [key, value] of [["class", `strip hue${hues[k]}`], ["width", "100%"], ["height", "44"], ["role", "img"], ["aria-label", `Activation of ${id} over the response`]]) svg.setAttribute(key, value);
        const scale = make("span", { className: "scale" });
        return { id, svg, scale, row: make("div", { className: "live-strip" }, make("span", { textContent: named(id) }), svg, scale) };
      });
      const note = make("p", { className: "facts" });
      runs.set(run, { tokens: [], box, strips, note });
      const panel = make("section", { className: `panel-run run-${run}` }, make("h2", { className: "small", textContent: name }), box, ...strips.map((strip) => strip.row), note);
      panel.style.gridRow = `span ${panel.children.length}`;
      return panel;
    }));
    shadeAll();
  }
  const scaleOf = (id) => scales[id] || tops[id] || 1e-9;
  const firesHere = (id, value) => (levels[id] ?? null) !== null && value > levels[id];
  function shade({ element, activations }) {
    const id = one("#colour").value;
    if (!id) return;
    const value = activations[id];
    const step = value > 0 ? Math.min(STEPS, 1 + Math.floor(STEPS * Math.min(1, value / scaleOf(id)) * 0.9999)) : 0;
    for (let i = 1; i <= STEPS; i++) element.classList.toggle(`h${i}`, i === step);
    element.classList.toggle("f", firesHere(id, value));
    element.dataset.v = `${named(id)}: ${figures(value)}`;
  }
  function shadeAll() {
    moved = false;
    const hue = hues[one("#colour").selectedIndex]; // that of its strips
    for (const { tokens, box } of runs.values()) {
      for (let k = 0; k < HUES; k++) box.classList.toggle(`hue${k}`, k === hue);
      tokens.forEach(shade);
    }
  }
  one("#colour").addEventListener("change", () => { picked = true; shadeAll(); });
  function addToken(name, token) {
    const { tokens, box } = runs.get(name);
    for (const [id, value] of Object.entries(token.activations)) {
      if (!(value > tops[id])) continue;
      tops[id] = value;
      moved ||= !scales[id];
    }
    token.element = make("span", { textContent: token.shown });
    tokens.push(token);
    shade(token);
    if (/^[ \u00a0]/.test(token.text) || tokens.at(-2)?.text.endsWith("\n")) box.append(make("wbr"));
    box.append(token.element, ...Array.from(token.text.matchAll(/\n/g), () => make("br")).slice(0, 2));
    box.scrollTop = box.scrollHeight;
    for (const other of name === "plain" ? runs.keys() : [name]) compare(other, tokens.length - 1);
  }

  // --- where runs part from the unsteered one ---
  function part(run, at) {
    run.differs = at;
    const sign = make("b", { className: "parts", textContent: "≠", title: "parts from the unsteered run here" });
    if (run.tokens[at]) run.tokens[at].element.before(sign);
    else run.box.append(sign);
  }
  function compare(name, at) {
    const [run, plain] = [runs.get(name), runs.get("plain")];
    if (!plain || run === plain || !run.tokens[at] || !plain.tokens[at] || run.tokens[at].token_id === plain.tokens[at].token_id) return;
    if (run.differs === undefined) part(run, at);
    run.tokens[at].element.classList.add("differs");
  }
  /** What is said of a run at its end; a run that ended while the other went on parts from it there. */
  function conclude(name, { ended, stopped }) {
    const [run, plain] = [runs.get(name), runs.get("plain")];
    if (plain && run !== plain) {
      const length = (of) => runs.get(of).tokens.length + (ended[of] ? 1 : 0);
      const at = Math.min(run.tokens.length, plain.tokens.length);
      const parts = at < Math.min(length(name), length("plain")) && run.tokens.length !== plain.tokens.length;
      if (parts && run.differs === undefined) part(run, at);
      if (ended.plain) run.tokens.slice(plain.tokens.length).forEach((token) => token.element.classList.add("differs"));
    }
    const how = ended[name] ? "ended by the model" : stopped ? "stopped" : "cut at the limit";
    const beside = run.differs !== undefined ? `; parts at token ${run.differs}` : plain && run !== plain ? `; the same as unsteered${stopped ? " so far" : ""}` : "";
    run.note.textContent = `${run.tokens.length} tokens, ${how}${beside}`;
  }
  function redraw() {
    if (moved) shadeAll();
    for (const { tokens, strips } of runs.values()) {
      for (const { id, svg, scale } of strips) {
        const values = tokens.map((token) => token.activations[id]);
        const [most, top] = [Math.max(0, ...values), Math.max(scaleOf(id), tops[id])];
        drawStrip(svg, values, 0, top);
        const silent = most === 0 || ((levels[id] ?? null) !== null && !firesHere(id, most));
        scale.textContent = [silent ? "does not fire" : "", most > 0 ? `largest ${figures(most)}, scale to ${figures(top)}` : ""].filter(Boolean).join("; ");
      }
    }
  }

  // --- generating ---
  const running = (on) => { one("#go").disabled = on; one("#stop").disabled = !on; };
  function hear(event, watched) {
    over = event.event === "done" || event.event === "failed";
    if (event.event === "queued") { job = event.id; state(); }
    else if (event.event === "waiting") one("#said").textContent = event.phase === "loading" ? `${event.said}: ${event.seconds.toFixed(0)} s` : event.before ? `${event.before} before this one` : "Working…";
    else if (event.event === "start") { ({ scales, levels } = event); openPanels(event.runs, watched); one("#said").textContent = "Generating…"; one("#loading").hidden = true; }
    else if (event.event === "token") addToken(event.run, event);
    else if (event.event === "done") {
      for (const run of Object.keys(event.ended)) if (runs.has(run)) conclude(run, event);
      one("#said").textContent = event.stopped ? "Stopped." : `Done, ${figures(event.tokens_per_second)} tokens per second.`;
    } else if (event.event === "failed") one("#said").textContent = event.error;
  }
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    writeAddress();
    const watched = moves.map((move) => move.id);
    const steers = moves.filter((move) => move.mode !== "watch").map(({ id, mode, amount }) => ({ feature: id, mode, amount: mode === "off" ? 0 : amount }));
    const body = {
      prompt: one("#prompt").value, watch: watched, steers, runs: chosenRuns(), where: one("#where").value,
      max_new_tokens: Number(one("#tokens").value), temperature: Number(one("#temperature").value), seed: Number(one("#seed").value),
    };
    running(true);
    asked = true;
    over = false;
    one("#said").textContent = "Asking…";
    aborter = new AbortController();
    const draw = setInterval(redraw, 300);
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
      if (!over) throw new Error(BROKEN);
    } catch (error) {
      one("#said").textContent = error.name === "AbortError" ? "Stopped." : error instanceof TypeError ? BROKEN : error.message;
    } finally {
      clearInterval(draw);
      redraw();
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

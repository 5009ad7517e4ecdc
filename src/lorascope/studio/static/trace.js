// A whole trace: coloured by one or several features, jumps between firings, what fires on a token.
import { all, drawStrip, one, withModifier } from "./shared.js";
import { ask, featureAddress, figures, make, named, toast, wireEditor } from "./studio.js";
import { featureBox, foundBy } from "./choosing.js";
import { fires, huesOf, paint, uncountedOf } from "./painting.js";

const MOST = 4;
const ORDER = {
  direction: "By activation relative to the firing level; those whose level is 0 last, with the activation itself.",
  latent: "By the length of what they write; the number is the activation.",
};
const box = one("#trace");
if (box) {
  const { corpus, index } = box.dataset;
  const tokens = all(":scope > span", box);
  const uncounted = uncountedOf(tokens);
  const here = one("#here");
  let features = [];
  let hues = []; // that of each feature
  let firings = [];
  let at = -1;
  let telling = 0;
  let asked = 0; // counts what was asked of tokens: an answer that comes after the next question is of no use

  const address = (names) => `/trace/${encodeURIComponent(corpus)}/${index}${names.length ? `?features=${encodeURIComponent(names.join(","))}` : ""}`;

  function show() {
    for (const n of [2, 3, 4]) box.classList.toggle(`lanes${n}`, features.length === n);
    for (let k = 0; k < MOST; k++) box.style.setProperty(`--c${k + 1}`, `var(--line${hues[k] ?? k})`);
    one("#lines").hidden = features.length < 2;
    firings = paint(tokens, uncounted, features);
    if (at >= 0) tokens[at].classList.add("cursor");
    const gone = features.find((feature) => feature.missing)?.missing;
    const count = features.length ? `${firings.length} of ${tokens.length} tokens fire` : "No feature chosen";
    one("#counted").textContent = gone ? `Not computed yet: ${gone.what}. Run ${gone.run}` : count;
    for (const id of ["#next-firing", "#prev-firing"]) one(id).disabled = firings.length === 0;
  }

  function showChips() {
    one("#chips").replaceChildren(...features.map((feature, k) => {
      const remove = make("button", { type: "button", textContent: "×", "aria-label": `Remove ${feature.id}` });
      remove.addEventListener("click", () => choose(features.map((f) => f.id).filter((id) => id !== feature.id)));
      const count = feature.level === null ? "no firing level yet" : `fires on ${feature.values.filter((_, t) => fires(feature, t, uncounted)).length}`;
      return make("li", { className: `hue${hues[k]}` }, make("span", { className: "swatch" }), `${features.length > 1 ? `${k + 1} ` : ""}`,
        make("a", { href: featureAddress(feature.id, corpus), textContent: named(feature.id) }), make("span", { className: "count", textContent: count }), remove);
    }));
    one("#strips").replaceChildren(...features.map((feature, k) => {
      const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
      svg.setAttribute("class", `strip hue${hues[k]}`);
      svg.setAttribute("width", "100%");
      svg.setAttribute("height", "44");
      svg.setAttribute("role", "img");
      svg.setAttribute("aria-label", `Activation of ${feature.id} over the trace`);
      drawStrip(svg, feature.values, feature.typical, feature.max, (t) => !uncounted[t]);
      svg.addEventListener("click", (event) => { const area = svg.getBoundingClientRect(); tell(Math.min(tokens.length - 1, Math.floor((tokens.length * (event.clientX - area.left)) / area.width))); });
      const name = `${features.length > 1 ? `${k + 1} ` : ""}${named(feature.id)}`;
      return make("div", { className: "striprow" }, make("span", { textContent: `${name}, ${figures(feature.typical)} to ${figures(feature.max)}` }), svg);
    }));
  }

  function colour(chosen) {
    features = chosen;
    hues = huesOf(features.map((feature) => feature.id));
    showChips();
    show();
    const names = features.map((feature) => feature.id);
    for (const link of all(".steps a")) link.search = names.length ? `?features=${encodeURIComponent(names.join(","))}` : "";
  }

  const shown = (names) => ask(address(names).replace(/(\?|$)/, ".json$1"));
  async function choose(names) {
    if (names.length > MOST) { toast(`At most ${MOST} features at once.`); return; }
    try {
      const page = names.length ? await shown(names) : { features: [] };
      history.replaceState(null, "", address(page.features.map((feature) => feature.id)) + location.hash);
      colour(page.features);
    } catch (error) {
      toast(error.message);
    }
  }

  const titleOf = (t) => make("h2", { className: "small" }, `Token ${t}: `, make("code", { textContent: tokens[t].textContent.replace(/^\u00a0+/, (spaces) => "·".repeat(spaces.length)) }));
  function move(t) {
    if (t < 0 || t >= tokens.length || t === at) return;
    if (at >= 0) tokens[at].classList.remove("cursor");
    at = t;
    tokens[at].classList.add("cursor");
    clearTimeout(telling);
    asked += 1; // what is on its way is of another token
    const values = features.length ? [make("p", { className: "facts", textContent: features.map((feature) => `${named(feature.id)} ${figures(feature.values[t])}`).join(" · ") })] : [];
    here.replaceChildren(titleOf(t), ...values, make("p", { className: "empty", textContent: "Press Enter to see what fires here." }));
    const top = tokens[at].offsetTop;
    if (top < box.scrollTop + 20 || top > box.scrollTop + box.clientHeight - 40) box.scrollTo({ top: top - box.clientHeight / 3 });
  }
  function jump(by) {
    if (!firings.length) return;
    const next = by > 0 ? firings.find((t) => t > at) ?? firings[0] : firings.findLast((t) => t < at) ?? firings.at(-1);
    move(next);
    telling = setTimeout(() => tell(next), 150); // a key that is held down asks once
    one("#counted").textContent = `firing ${firings.indexOf(next) + 1} of ${firings.length}, token ${next}`;
  }

  // a note on one token; tokens that have one carry a mark
  const noted = new Set(box.dataset.noted.split(",").filter(Boolean).map(Number));
  const markNoted = (t) => { if (noted.has(t)) tokens[t].dataset.note = "✎"; else delete tokens[t].dataset.note; };
  noted.forEach(markNoted);
  const notes = new Map(); // token -> its form that was last on the page, of which something may still be on its way
  function noteOn(t, { text, label, star, tags, earlier, moved }) {
    if (notes.get(t)?.pending()) return notes.get(t).form;
    const form = one("#token-note").content.firstElementChild.cloneNode(true); // as the macro for all places made it
    form.dataset.place = `token:${corpus}:${index}:${t}`;
    form.setAttribute("aria-label", `Notes on token ${t}`);
    for (const [name, value] of [["label", label], ["tags", tags.join(", ")], ["text", text]]) one(`.${name}`, form).value = value;
    one(".text", form).setAttribute("aria-label", `Note on token ${t}`);
    one(".star", form).setAttribute("aria-pressed", String(star));
    one(".star span", form).textContent = star ? "★" : "☆";
    one(".star .word", form).textContent = star ? "Starred" : "Star";
    one(".fields", form).open = Boolean(label || tags.length);
    if (moved) one(".saved", form).before(make("p", { className: "moved", textContent: `Written, at least in part, about ${moved}.` }));
    if (earlier.length) {
      const texts = earlier.map((event) => make("li", {}, make("b", { textContent: event.author }), `: ${event.value}`));
      form.append(make("details", { className: "earlier" }, make("summary", { textContent: `${earlier.length} earlier ${earlier.length === 1 ? "version" : "versions"}` }), make("ol", {}, ...texts)));
    }
    const { pending } = wireEditor(form, (some) => { noted[some ? "add" : "delete"](t); markNoted(t); });
    notes.set(t, { form, pending });
    return form;
  }

  async function tell(t) {
    move(t);
    history.replaceState(null, "", `${location.pathname}${location.search}#t${t}`);
    const turn = ++asked;
    const title = titleOf(t);
    here.replaceChildren(title, make("p", { className: "empty", textContent: "Loading…" }));
    try {
      const found = await ask(`/fires/${encodeURIComponent(corpus)}/${index}/${t}.json`);
      if (turn !== asked) return;
      const parts = Object.entries(found.kinds).map(([kind, { firing, rows, missing }]) => {
        const items = rows.map((row) => {
          const add = make("button", { type: "button", textContent: "colour", "aria-label": `Colour by ${row.id}` });
          add.addEventListener("click", () => choose([...new Set([...features.map((f) => f.id), row.id])]));
          const value = row.ratio === null ? figures(row.activation) : `${figures(row.ratio)} × level`;
          return make("li", {}, make("a", { href: featureAddress(row.id, corpus), textContent: named(row.id) }), make("span", { textContent: value }), add, ...(row.text ? [make("p", { textContent: row.text, title: row.text })] : []));
        });
        if (missing) return make("div", {}, make("h3", { textContent: `${kind}s` }), make("p", { className: "absent", textContent: `Not computed yet: ${missing.what}. Run ` }, make("code", { textContent: missing.run })));
        const shown = rows.length < firing ? `, the strongest ${rows.length}` : "";
        const does = found.ordinary ? (firing === 1 ? " fires" : "s fire") : `${firing === 1 ? "" : "s"} above the firing level, uncounted`;
        return make("div", {}, make("h3", { textContent: `${firing} ${kind}${does}${shown}` }),
          ...(rows.length ? [make("p", { className: "caption", textContent: ORDER[kind] })] : []), make("ol", {}, ...items));
      });
      if (!found.ordinary) parts.unshift(make("p", { className: "caption", textContent: "Template, markup or an attention sink: nothing fires here, whatever its activation; it is left out of firings, examples and scales." }));
      here.replaceChildren(title, noteOn(t, found.note), ...parts);
    } catch (error) {
      if (turn !== asked) return;
      here.replaceChildren(title, make("p", { className: "absent", textContent: error.message }));
    }
  }

  // below the trace, on a narrow screen, it would go unseen
  const showPanel = () => { if ((one("h3", here) ?? here).getBoundingClientRect().top > innerHeight - 120) here.scrollIntoView({ block: "nearest" }); };
  box.addEventListener("click", (event) => { const t = tokens.indexOf(event.target.closest(".whole > span")); if (t >= 0) tell(t).then(showPanel); });
  box.addEventListener("keydown", (event) => {
    if (withModifier(event)) return;
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (by) { event.preventDefault(); move(at < 0 ? 0 : at + by); }
    if (event.key === "Enter" && at >= 0) tell(at).then(showPanel);
  });
  one("#next-firing").addEventListener("click", () => jump(1));
  one("#prev-firing").addEventListener("click", () => jump(-1));
  document.addEventListener("keydown", (event) => {
    if (withModifier(event) || event.target.closest("input, select, textarea")) return;
    if (event.key === "n") jump(1);
    if (event.key === "p") jump(-1);
  });

  featureBox(one("#add"), {
    search: async (words) => {
      const rows = await foundBy(words, corpus);
      return rows.length || corpus === "train" ? rows : foundBy(words); // examples of this corpus were not searched for
    },
    exact: async (name) => !name.includes(",") && (await shown([name])).features.length === 1,
    take: (id) => choose([...new Set([...features.map((f) => f.id), id])]),
  });

  colour(JSON.parse(box.dataset.features)); // they came with the page
  const start = /^#t(\d+)$/.exec(location.hash);
  if (start && Number(start[1]) < tokens.length) { move(Number(start[1])); tokens[at].scrollIntoView({ block: "nearest" }); tell(at); }
  else if (start) toast(`This trace has tokens 0 to ${tokens.length - 1}; there is no token ${start[1]}.`);
}

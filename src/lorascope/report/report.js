// The report works without this; it adds the theme button, the map's switch and read-out, keys, the filter and the
// colouring of whole traces.
"use strict";

const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const one = (selector, root = document) => root.querySelector(selector);

// --- theme ---
const root = document.documentElement;
const themeButton = one("#theme");
const isDark = () => (root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
const nameTheme = () => { themeButton.textContent = isDark() ? "Light theme" : "Dark theme"; };
function switchTheme() {
  root.dataset.theme = isDark() ? "light" : "dark";
  try { localStorage.setItem("lorascope-theme", root.dataset.theme); } catch { /* files may have no storage */ }
  nameTheme();
}
try {
  const kept = localStorage.getItem("lorascope-theme");
  if (kept === "light" || kept === "dark") root.dataset.theme = kept;
} catch { /* as above */ }
themeButton.addEventListener("click", switchTheme);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", nameTheme);
nameTheme();

// --- which section is in view ---
const links = all(".contents li a");
const spy = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (entry.isIntersecting) links.forEach((a) => a.classList.toggle("here", a.hash === `#${entry.target.id}`));
  }
}, { rootMargin: "-10% 0px -80% 0px" });
links.forEach((a) => { const target = one(a.hash); if (target) spy.observe(target); });

// --- maps: switch, read-out, arrow keys, links to cards ---
const tabs = all('[role="tab"]');
function showMap(tab, focus = false) {
  for (const other of tabs) {
    const chosen = other === tab;
    other.setAttribute("aria-selected", String(chosen));
    other.tabIndex = chosen ? 0 : -1;
    one(`#${other.getAttribute("aria-controls")}`).hidden = !chosen;
  }
  if (focus) tab.focus();
}
tabs.forEach((tab, i) => {
  tab.addEventListener("click", () => showMap(tab));
  tab.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step) { event.preventDefault(); showMap(tabs[(i + step + tabs.length) % tabs.length], true); }
  });
});
if (tabs.length) showMap(one('[role="tab"][aria-selected="true"]') || tabs[0]);

const cardOf = (name) => document.getElementById(`card-${name}`);
function openCard(card) {
  card.open = true;
  card.scrollIntoView({ block: "start" });
  one("summary", card).focus({ preventScroll: true });
}
for (const link of all('a[href^="#card-"]')) {
  link.addEventListener("click", (event) => {
    const hash = link.getAttribute("href"); // a link inside a drawing has no .hash
    const card = document.getElementById(hash.slice(1));
    if (!card) return;
    event.preventDefault(); // following the link would take the focus off the card
    history.pushState(null, "", hash);
    openCard(card);
  });
}
for (const map of all("svg.map:not(.small)")) {
  const readout = one(".readout", map.closest("figure"));
  const cells = all("rect[data-a]", map);
  let at = -1;
  const show = (i) => {
    if (i < 0 || i >= cells.length) return;
    if (at >= 0) cells[at].classList.remove("at");
    at = i;
    cells[at].classList.add("at");
    const more = cells[at].dataset.card ? " · has a card: click or press Enter" : "";
    readout.textContent = `${cells[at].dataset.a}: ${cells[at].dataset.s}${more}`;
  };
  const follow = () => { const card = at >= 0 && cells[at].dataset.card && cardOf(cells[at].dataset.a); if (card) openCard(card); };
  // hatched cells lie on top of the ones that carry the values
  const under = (event) => cells.indexOf(document.elementsFromPoint(event.clientX, event.clientY).find((e) => e.dataset && e.dataset.a && map.contains(e)));
  map.addEventListener("pointermove", (event) => show(under(event)));
  map.addEventListener("click", (event) => { show(under(event)); follow(); });
  map.addEventListener("focus", () => { if (at < 0) show(0); });
  map.addEventListener("keydown", (event) => {
    if (event.key === "Enter") return follow();
    const move = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] }[event.key];
    if (!move || at < 0) return;
    event.preventDefault();
    const [x, y] = ["x", "y"].map((name) => parseFloat(cells[at].getAttribute(name)));
    const ahead = cells.map((cell, i) => [parseFloat(cell.getAttribute("x")) - x, parseFloat(cell.getAttribute("y")) - y, i])
      .filter(([dx, dy]) => (move[0] ? Math.abs(dy) < 0.01 && dx * move[0] > 0.001 : Math.abs(dx) < 0.001 && dy * move[1] > 0.01))
      .sort((a, b) => Math.abs(a[0]) + Math.abs(a[1]) - Math.abs(b[0]) - Math.abs(b[1]));
    if (ahead.length) show(ahead[0][2]);
  });
}

// --- a link into something folded unfolds it ---
document.addEventListener("click", (event) => {
  const link = event.target.closest && event.target.closest('a[href^="#"]');
  const target = link && document.getElementById(link.getAttribute("href").slice(1));
  if (!target) return;
  target.hidden = false;
  for (let fold = target.closest("details"); fold; fold = fold.parentElement.closest("details")) fold.open = true;
});

// --- a table that is wider than the page can be scrolled by key ---
const watchWidth = new ResizeObserver((entries) => {
  for (const { target } of entries) {
    if (target.scrollWidth > target.clientWidth) target.tabIndex = 0;
    else target.removeAttribute("tabindex");
  }
});
all(".scroll").forEach((box) => watchWidth.observe(box));

// --- cards: j, k, /, filter ---
const cards = all(".card");
const filter = one("#filter");
const found = one("#found");
const words = new Map();
const textOf = (card) => { // read once, when it is first searched
  if (!words.has(card)) words.set(card, card.textContent.toLowerCase());
  return words.get(card);
};
function applyFilter() {
  const wanted = filter.value.trim().toLowerCase();
  let count = 0;
  for (const card of cards) {
    card.hidden = wanted !== "" && !textOf(card).includes(wanted);
    count += card.hidden ? 0 : 1;
  }
  found.textContent = wanted ? `${count} of ${cards.length} cards` : "";
}
if (filter) {
  filter.addEventListener("input", applyFilter);
  filter.addEventListener("keydown", (event) => {
    if (event.key === "Escape") { filter.value = ""; applyFilter(); filter.blur(); }
    if (event.key === "Enter") { const first = cards.find((card) => !card.hidden); if (first) openCard(first); }
  });
}
const openAll = one("#openall");
if (openAll) openAll.addEventListener("click", () => {
  const open = openAll.textContent === "Open all";
  cards.forEach((card) => { card.open = open; });
  openAll.textContent = open ? "Close all" : "Open all";
});
function stepCard(step) {
  const shown = cards.filter((card) => !card.hidden);
  if (!shown.length) return;
  const current = shown.indexOf(document.activeElement && document.activeElement.closest(".card"));
  const next = current < 0 ? (step > 0 ? 0 : shown.length - 1) : Math.min(shown.length - 1, Math.max(0, current + step));
  shown[next].scrollIntoView({ block: "start" });
  one("summary", shown[next]).focus({ preventScroll: true });
}
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select, textarea")) return;
  if (event.key === "j") stepCard(1);
  else if (event.key === "k") stepCard(-1);
  else if (event.key === "t") switchTheme();
  else if (event.key === "/" && filter) { event.preventDefault(); filter.focus(); filter.scrollIntoView({ block: "center" }); }
});

// --- a token's activation under the pointer ---
const tip = document.createElement("div");
tip.id = "tip";
tip.hidden = true;
document.body.append(tip);
document.addEventListener("pointerover", (event) => {
  const token = event.target.closest && event.target.closest(".tokens [data-v]");
  tip.hidden = !token;
  if (!token) return;
  tip.textContent = token.dataset.v;
  const box = token.getBoundingClientRect();
  tip.style.left = `${Math.max(4, box.left + scrollX)}px`;
  tip.style.top = `${box.top + scrollY - 26}px`;
});

// --- whole traces ---
const data = JSON.parse(one("#data").textContent);
const featureSelect = one("#feature");
const traceSelect = one("#trace");
if (featureSelect && data.features.length) {
  const bytes = data.traces.map((trace) => Uint8Array.from(atob(trace.codes), (c) => c.charCodeAt(0)));
  const spans = all(".whole").map((box) => all(":scope > span", box));
  const groups = new Map();
  data.features.forEach((feature, i) => {
    const name = feature.kind === "latent" ? "Latents" : "Directions";
    if (!groups.has(name)) { const group = document.createElement("optgroup"); group.label = name; groups.set(name, group); featureSelect.append(group); }
    const option = document.createElement("option");
    option.value = String(i);
    option.textContent = feature.label.length > 90 ? `${feature.label.slice(0, 88)}…` : feature.label;
    groups.get(name).append(option);
  });
  let firings = [];
  let place = -1;
  const drawStrip = (codes, feature) => {
    const strip = one("#strip");
    const bars = [];
    const width = 100 / codes.length;
    codes.forEach((code, i) => {
      if (!code) return;
      const bar = document.createElementNS("http://www.w3.org/2000/svg", "rect");
      const height = Math.max(1, (40 * code) / 255);
      for (const [name, value] of [["class", feature.kind], ["x", `${i * width}%`], ["width", `${Math.max(width, 0.15)}%`], ["y", 42 - height], ["height", height]]) bar.setAttribute(name, value);
      bars.push(bar);
    });
    strip.replaceChildren(...bars);
  };
  const colour = () => {
    const f = Number(featureSelect.value);
    const t = Number(traceSelect.value);
    const feature = data.features[f];
    all(".whole, .cut").forEach((box) => { box.hidden = Number(box.dataset.trace) !== t; });
    const box = one(`#trace-${t}`);
    box.dataset.kind = feature.kind;
    const tokens = spans[t];
    const codes = [...bytes[t].subarray(f * tokens.length, (f + 1) * tokens.length)];
    firings = [];
    place = -1;
    tokens.forEach((token, i) => {
      const value = feature.typical + (codes[i] / 255) * (feature.max - feature.typical);
      const uncounted = ["sp", "sk"].find((name) => token.classList.contains(name)) || "";
      const fires = codes[i] > 0 && value > feature.level && !uncounted;
      token.className = [uncounted, codes[i] ? `h${Math.min(9, 1 + Math.floor((9 * codes[i]) / 256))}` : "", fires ? "f" : ""].join(" ").trim();
      if (codes[i]) token.dataset.v = value.toPrecision(3); else delete token.dataset.v;
      if (fires) firings.push(token);
    });
    one("#counted").textContent = `fires on ${firings.length} of ${tokens.length} tokens`;
    one("#next").disabled = firings.length === 0;
    drawStrip(codes, feature);
  };
  featureSelect.addEventListener("change", colour);
  traceSelect.addEventListener("change", colour);
  one("#next").addEventListener("click", () => {
    if (place >= 0) firings[place].classList.remove("here");
    place = (place + 1) % firings.length;
    const box = one(`#trace-${traceSelect.value}`);
    firings[place].classList.add("here");
    box.scrollTo({ top: firings[place].offsetTop - box.clientHeight / 3 });
  });
  colour();
}

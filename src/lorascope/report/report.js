// The report works without this; it adds the theme button, the map's switch and read-out, keys, the filter and the
// colouring of whole traces. It follows shared.js in one script, so it need not import what that gives.

// --- theme ---
try {
  const kept = localStorage.getItem("lorascope-theme");
  if (kept === "light" || kept === "dark") document.documentElement.dataset.theme = kept;
} catch { /* files may have no storage */ }
const switchTheme = themeSwitch(one("#theme"), " theme");

// --- which section is in view ---
const links = all(".contents li a");
const spy = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (entry.isIntersecting) links.forEach((a) => a.classList.toggle("here", a.hash === `#${entry.target.id}`));
  }
}, { rootMargin: "-10% 0px -80% 0px" });
links.forEach((a) => { const target = one(a.hash); if (target) spy.observe(target); });

// --- maps: switch, read-out, arrow keys, links to cards ---
switchTabs();
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
  const open = (cell) => { const card = cell.dataset.card && cardOf(cell.dataset.a); if (card) openCard(card); };
  const more = (cell) => (cell.dataset.card ? " · has a card: click or press Enter" : "");
  readMap(map, open, { more, href: (cell) => (cell.dataset.card ? `#card-${cell.dataset.a}` : "") });
}
unfoldLinks();
watchTables();
tokenTips();

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
    const kept = tokens.map((token) => ["sp", "sk"].find((name) => token.classList.contains(name)) || "");
    tokens.forEach((token, i) => {
      const value = feature.typical + (codes[i] / 255) * (feature.max - feature.typical);
      const uncounted = kept[i];
      const fires = codes[i] > 0 && value > feature.level && !uncounted;
      token.className = [uncounted, codes[i] ? (uncounted ? "un" : `h${Math.min(9, 1 + Math.floor((9 * codes[i]) / 256))}`) : "", fires ? "f" : ""].join(" ").trim();
      if (codes[i]) token.dataset.v = figures(value); else delete token.dataset.v;
      if (fires) firings.push(token);
    });
    one("#counted").textContent = `fires on ${firings.length} of ${tokens.length} tokens`;
    one("#next").disabled = firings.length === 0;
    one("#strip").setAttribute("class", `strip ${feature.kind}`);
    drawStrip(one("#strip"), codes, 0, 255, (t) => !kept[t]);
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

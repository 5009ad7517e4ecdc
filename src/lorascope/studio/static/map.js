// The maps: what the shade means, a read-out by pointer and arrow keys, links to directions; the interaction matrix.
import { all, ask, featureAddress, one } from "./studio.js";

/** The corpus that a map's links keep. */
const corpusOf = (element) => element.closest("[data-corpus]")?.dataset.corpus || "train";
const open = (element, address) => { location.href = featureAddress(`${address}+`, corpusOf(element)); };

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
  tab.addEventListener("click", () => { showMap(tab); history.replaceState(null, "", `#${tab.id.slice(4)}`); });
  tab.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step) { event.preventDefault(); showMap(tabs[(i + step + tabs.length) % tabs.length], true); }
  });
});
if (tabs.length) showMap(tabs.find((tab) => location.hash === `#${tab.id.slice(4)}`) || one('[role="tab"][aria-selected="true"]') || tabs[0]);

for (const map of all("svg.map")) {
  const readout = one(".readout", map.closest("figure"));
  const cells = all("rect[data-a]", map);
  let at = -1;
  const show = (i) => {
    if (i < 0 || i >= cells.length) return;
    if (at >= 0) cells[at].classList.remove("at");
    at = i;
    cells[at].classList.add("at");
    readout.textContent = `${cells[at].dataset.a}: ${cells[at].dataset.s}`;
  };
  const follow = () => { if (at >= 0) open(map, cells[at].dataset.a); };
  const under = (event) => cells.indexOf(document.elementsFromPoint(event.clientX, event.clientY).find((e) => e.dataset && e.dataset.a && map.contains(e)));
  map.addEventListener("pointermove", (event) => show(under(event)));
  map.addEventListener("click", (event) => { const i = under(event); if (i >= 0) { show(i); follow(); } });
  map.addEventListener("focus", () => { if (at < 0) show(0); });
  map.addEventListener("keydown", (event) => {
    if (event.key === "Enter") { follow(); return; }
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

// --- a layer's column leads where its link under the chart does ---
for (const column of all("#groups g[data-column]")) {
  column.addEventListener("click", () => all("#layers a").find((link) => link.textContent === column.dataset.column)?.click());
}

// --- while a recording is being measured: the page is made anew when that is done ---
const waiting = one("[data-measuring]");
if (waiting) {
  const look = async () => {
    const found = await ask(`/measured.json?corpus=${encodeURIComponent(corpusOf(waiting))}`).catch(() => ({ running: true }));
    if (found.running) setTimeout(look, 2000);
    else location.reload();
  };
  setTimeout(look, 1000);
}

// --- interactions ---
const canvas = one("#matrix");
if (canvas) {
  const names = canvas.dataset.addresses.split(",");
  const n = names.length;
  let codes = null; // fetched when the matrix comes into view: it has a byte for every pair
  const STEPS = 6;
  // the shades are those of the style sheet, read from elements that wear its classes
  const shades = () => {
    const holder = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    document.body.append(holder);
    const pen = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    const read = (name) => {
      const rect = document.createElementNS("http://www.w3.org/2000/svg", "rect");
      rect.setAttribute("class", name);
      holder.append(rect);
      pen.clearRect(0, 0, 1, 1);
      pen.fillStyle = getComputedStyle(rect).fill;
      pen.fillRect(0, 0, 1, 1);
      return pen.getImageData(0, 0, 1, 1).data.slice(0, 3);
    };
    const found = { blank: read("r0"), plus: [], minus: [] };
    for (let i = 1; i <= STEPS; i++) { found.plus.push(read(`p${i}`)); found.minus.push(read(`n${i}`)); }
    holder.remove();
    return found;
  };
  canvas.width = canvas.height = n;
  const draw = () => {
    if (!codes) return;
    const { blank, plus, minus } = shades();
    const pen = canvas.getContext("2d");
    const image = pen.createImageData(n, n);
    codes.forEach((code, i) => {
      const step = Math.min(STEPS, Math.round((Math.abs(code) / 127) * STEPS));
      const colour = step === 0 ? blank : (code > 0 ? plus : minus)[step - 1];
      image.data.set([colour[0], colour[1], colour[2], 255], 4 * i);
    });
    pen.putImageData(image, 0, 0);
  };
  document.addEventListener("themechange", draw);
  let [row, column] = [0, 0];
  const say = () => {
    const value = codes ? `cosine ${(codes[row * n + column] / 127).toFixed(2).replace("-", "−")}` : "loading…";
    one("#pair").textContent = `${names[row]} and ${names[column]}: ${value}`;
  };
  const load = async () => {
    const found = await ask("/interactions.json");
    if (found.addresses?.join(",") !== canvas.dataset.addresses) throw new Error("The study has changed; reload the page.");
    codes = Int8Array.from(atob(found.cosines), (c) => c.charCodeAt(0) << 24 >> 24);
    draw();
    if (one("#pair").textContent.trim()) say();
  };
  const seen = new IntersectionObserver((entries) => {
    if (!entries.some((entry) => entry.isIntersecting)) return;
    seen.disconnect();
    load().catch((error) => { one("#pair").textContent = error.message; });
  });
  seen.observe(canvas);
  const at = (event) => {
    const box = canvas.getBoundingClientRect();
    row = Math.min(n - 1, Math.max(0, Math.floor((n * (event.clientY - box.top)) / box.height)));
    column = Math.min(n - 1, Math.max(0, Math.floor((n * (event.clientX - box.left)) / box.width)));
    say();
  };
  const follow = () => open(canvas, names[row]);
  canvas.addEventListener("pointermove", at);
  canvas.addEventListener("click", (event) => { at(event); follow(); }); // a touch has not moved over it before
  canvas.addEventListener("focus", say);
  canvas.addEventListener("keydown", (event) => {
    if (event.key === "Enter") { follow(); return; }
    const move = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
    if (!move) return;
    event.preventDefault();
    row = Math.min(n - 1, Math.max(0, row + move[0]));
    column = Math.min(n - 1, Math.max(0, column + move[1]));
    say();
  });
}

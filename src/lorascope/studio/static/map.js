// The maps: what the shade means, a read-out by pointer and arrow keys, links to directions; the interaction matrix.
import { all, linkTo, one, readMap, switchTabs, touchOf, withModifier } from "./shared.js";
import { ask, featureAddress } from "./studio.js";

/** The corpus that a map's links keep. */
const corpusOf = (element) => element.closest("[data-corpus]")?.dataset.corpus || "train";
const hrefOf = (element, address) => featureAddress(`${address}+`, corpusOf(element));
const open = (element, address) => { location.href = hrefOf(element, address); };

// which map is shown stands in the address, and in those of the same map of other corpora
const keepShown = () => { for (const link of all(".segmented a")) link.hash = location.hash; };
const asked = location.hash && one(`[role="tab"][id="tab-${CSS.escape(location.hash.slice(1))}"]`);
switchTabs({ start: asked, chosen: (tab) => { history.replaceState(null, "", `#${tab.id.slice(4)}`); keepShown(); } });
keepShown();
for (const map of all("svg.map")) readMap(map, (cell) => open(map, cell.dataset.a), { href: (cell) => hrefOf(map, cell.dataset.a) });

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
  const MOST_MARKED = 64; // directions: with more, a cell is too small for a sign in it
  const signs = one("#signs");
  const shown = (code) => signs.value === "both" || (signs.value === "plus") === code > 0;
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
  const stepOf = (code) => (shown(code) ? Math.min(STEPS, Math.round((Math.abs(code) / 127) * STEPS)) : 0);
  /** A − across the cells below 0, as on the maps of decoders. */
  const mark = () => {
    if (n > MOST_MARKED) return;
    one("#marks").replaceChildren(...[...codes.keys()].filter((i) => codes[i] < 0 && stepOf(codes[i])).map((i) => {
      const rect = document.createElementNS("http://www.w3.org/2000/svg", "rect");
      const place = { x: `${(100 * (i % n + 0.28)) / n}%`, width: `${44 / n}%`, y: `${(100 * (Math.floor(i / n) + 0.44)) / n}%`, height: `${12 / n}%`, class: "minusmark" };
      for (const [name, value] of Object.entries(place)) rect.setAttribute(name, value);
      return rect;
    }));
  };
  const draw = () => {
    if (!codes) return;
    mark();
    const { blank, plus, minus } = shades();
    const pen = canvas.getContext("2d");
    const image = pen.createImageData(n, n);
    codes.forEach((code, i) => {
      const step = stepOf(code);
      const colour = step === 0 ? blank : (code > 0 ? plus : minus)[step - 1];
      image.data.set([colour[0], colour[1], colour[2], 255], 4 * i);
    });
    pen.putImageData(image, 0, 0);
  };
  document.addEventListener("themechange", draw);
  signs.addEventListener("change", draw);
  let [row, column] = [0, 0];
  const say = () => {
    const cosine = codes ? (codes[row * n + column] / 127).toFixed(2).replace("-", "−") : "";
    const value = !codes ? "loading…" : `cosine ${cosine}${/[1-9]/.test(cosine) ? (cosine.startsWith("−") ? ", they cancel" : ", alike") : ""}`;
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
  const touched = touchOf(canvas);
  let tapped = -1;
  canvas.addEventListener("click", (event) => {
    at(event);
    const here = row * n + column;
    if (!touched(event) || tapped === here) { follow(); return; }
    tapped = here; // read out, of a finger that has not moved over it before
    linkTo(one("#pair"), hrefOf(canvas, names[row]));
  });
  canvas.addEventListener("focus", say);
  canvas.addEventListener("keydown", (event) => {
    if (withModifier(event)) return;
    if (event.key === "Enter") { follow(); return; }
    const move = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
    if (!move) return;
    event.preventDefault();
    row = Math.min(n - 1, Math.max(0, row + move[0]));
    column = Math.min(n - 1, Math.max(0, column + move[1]));
    say();
  });
}

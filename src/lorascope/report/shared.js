// What the report and the studio's pages have in common: the theme, tabs, maps, folds, wide tables, token tips, strips.
// The report has it in its one script before report.js; the studio's modules import it.

export const one = (selector, root = document) => root.querySelector(selector);
export const all = (selector, root = document) => [...root.querySelectorAll(selector)];

/** Light and dark by a button, which names the other one; the function that switches. */
export function themeSwitch(button, after = "") {
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme || (system.matches ? "dark" : "light")) === "dark";
  const show = () => {
    button.textContent = (isDark() ? "Light" : "Dark") + after;
    document.dispatchEvent(new Event("themechange"));
  };
  const change = () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    try { localStorage.setItem("lorascope-theme", root.dataset.theme); } catch { /* for this page only: files may have no storage */ }
    show();
  };
  button.addEventListener("click", change);
  system.addEventListener("change", show);
  show();
  return change;
}

/** Tabs by click and arrow keys. `start` is shown first (default: the one that is marked); `chosen` hears of clicks. */
export function switchTabs({ start = null, chosen = () => {} } = {}) {
  const tabs = all('[role="tab"]');
  const show = (tab) => {
    for (const other of tabs) {
      other.setAttribute("aria-selected", String(other === tab));
      other.tabIndex = other === tab ? 0 : -1;
      one(`#${other.getAttribute("aria-controls")}`).hidden = other !== tab;
    }
  };
  const choose = (tab) => { show(tab); chosen(tab); };
  tabs.forEach((tab, i) => {
    tab.addEventListener("click", () => choose(tab));
    tab.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      const next = tabs[(i + step + tabs.length) % tabs.length];
      choose(next);
      next.focus();
    });
  });
  if (tabs.length) show(start || tabs.find((tab) => tab.getAttribute("aria-selected") === "true") || tabs[0]);
}

/** A map's read-out by pointer and arrow keys; `open(cell)` on a click or Enter, `more(cell)` ends what is said of it. */
export function readMap(map, open, more = () => "") {
  const readout = one(".readout", map.closest("figure"));
  const cells = all("rect[data-a]", map);
  let at = -1;
  const show = (i) => {
    if (i < 0 || i >= cells.length) return;
    if (at >= 0) cells[at].classList.remove("at");
    at = i;
    cells[at].classList.add("at");
    readout.textContent = `${cells[at].dataset.a}: ${cells[at].dataset.s}${more(cells[at])}`;
  };
  // hatched cells lie on top of the ones that carry the values
  const under = (event) => cells.indexOf(document.elementsFromPoint(event.clientX, event.clientY).find((e) => e.dataset && e.dataset.a && map.contains(e)));
  map.addEventListener("pointermove", (event) => show(under(event)));
  map.addEventListener("click", (event) => { const i = under(event); if (i >= 0) { show(i); open(cells[i]); } });
  map.addEventListener("focus", () => { if (at < 0) show(0); });
  map.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && at >= 0) { open(cells[at]); return; }
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

/** A link into something folded unfolds it. */
export function unfoldLinks() {
  document.addEventListener("click", (event) => {
    const link = event.target.closest && event.target.closest('a[href^="#"]');
    const target = link && document.getElementById(link.getAttribute("href").slice(1));
    if (!target) return;
    target.hidden = false;
    for (let fold = target.closest("details"); fold; fold = fold.parentElement.closest("details")) fold.open = true;
  });
}

/** Tables that are wider than the page can be scrolled by key. Call it again for new ones. */
export function watchTables() {
  all(".scroll").forEach((box) => watchWidth.observe(box));
}
const watchWidth = new ResizeObserver((entries) => {
  for (const { target } of entries) {
    if (target.scrollWidth > target.clientWidth) target.tabIndex = 0;
    else target.removeAttribute("tabindex");
  }
});

/** A token's activation under the pointer. */
export function tokenTips() {
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
}

const STRIP_HEIGHT = 42;
const MOST_BARS = 600;
const UNCOUNTED_HEIGHT = 8;

/** Draw values (from `low` on, up to `high`) over the course of a trace into an SVG; neighbours share a bar when there are
 * many. Where `counts(t)` says no (template, attention sinks), a low hatched bar stands for any value above `low`. */
export function drawStrip(svg, values, low, high, counts = () => true) {
  const per = Math.max(1, Math.ceil(values.length / MOST_BARS));
  const count = Math.ceil(values.length / per);
  const bars = [];
  for (let i = 0; i < count; i++) {
    const here = values.slice(i * per, (i + 1) * per);
    const value = Math.max(...here.filter((_, t) => counts(i * per + t)));
    if (!here.some((other) => other > low)) continue;
    const height = value > low ? Math.max(1.5, STRIP_HEIGHT * Math.min(1, (value - low) / (high - low || 1))) : UNCOUNTED_HEIGHT;
    const bar = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    const width = 100 / count;
    for (const [name, number] of [["x", `${i * width}%`], ["width", `${Math.max(width * 0.9, 0.12)}%`], ["y", STRIP_HEIGHT + 1 - height], ["height", height]]) bar.setAttribute(name, number);
    if (!(value > low)) bar.setAttribute("class", "un");
    bars.push(bar);
  }
  svg.replaceChildren(...bars);
}

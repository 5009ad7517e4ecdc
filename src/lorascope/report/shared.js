// What the report and the studio's pages have in common: the theme, tabs, maps, folds, wide tables, token tips, strips.
// The report has it in its one script before report.js; the studio's modules import it.

export const one = (selector, root = document) => root.querySelector(selector);
export const all = (selector, root = document) => [...root.querySelectorAll(selector)];

/** Whether a key goes with Alt, Ctrl or Meta: it is the browser's or the system's, as Alt+Left for the page before. */
export const withModifier = (event) => event.altKey || event.ctrlKey || event.metaKey;

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
      if (!step || withModifier(event)) return;
      event.preventDefault();
      const next = tabs[(i + step + tabs.length) % tabs.length];
      choose(next);
      next.focus();
    });
  });
  if (tabs.length) show(start || tabs.find((tab) => tab.getAttribute("aria-selected") === "true") || tabs[0]);
}

// --- numbers as report/numbers.py writes them: rounded half to even, which JavaScript does not ---
const EXACT = 100; // decimals, enough for a number that stands just between two
function evenly(near, exact) {
  const [text, power = ""] = near.split("e");
  const whole = exact.split("e")[0];
  const kept = whole.slice(0, text.includes(".") ? text.length : whole.indexOf("."));
  const between = /^\.?50*$/.test(whole.slice(kept.length)) && "02468".includes(kept.at(-1));
  return (between ? kept : text) + (power && `e${power}`);
}
const fixed = (value, places) => evenly(value.toFixed(places), value.toFixed(EXACT));
const powered = (value, places) => evenly(value.toExponential(places), value.toExponential(EXACT));

/** A number to three significant figures: `1,240`, `0.0123`, `4.2·10⁻⁵`; a dash for none. */
export function figures(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  const [sign, size] = [value < 0 ? "−" : "", Math.abs(value)];
  const exponent = Number(powered(size, digits - 1).split("e")[1]); // after rounding: 0.09999 is 0.100
  if (exponent < -3 || exponent >= 7) {
    const [mantissa, power] = powered(size, digits - 2).split("e");
    return `${sign}${mantissa}·10${String(Number(power)).replace("-", "⁻").replace(/\d/g, (digit) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[digit])}`;
  }
  const [whole, rest] = fixed(size, Math.max(0, digits - 1 - exponent)).split(".");
  return sign + whole.replace(/\B(?=(\d{3})+$)/g, ",") + (rest ? `.${rest}` : "");
}

/** Whether a click comes from a finger, which has not hovered: `touched(event)`. */
export function touchOf(element) {
  let last = "";
  element.addEventListener("pointerdown", (event) => { last = event.pointerType; });
  return (event) => (event.pointerType || last) === "touch" && event.detail !== 0;
}

/** A map's read-out by pointer and arrow keys; `open(cell)` on a click or Enter, `more(cell)` ends what is said of it.
 * A finger's first tap on a cell reads it out, with a link to `href(cell)` where that is one; its second opens it. */
export function readMap(map, open, { more = () => "", href = () => "" } = {}) {
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
  const touched = touchOf(map);
  let tapped = -1;
  map.addEventListener("click", (event) => {
    const i = under(event);
    if (i < 0) return;
    show(i);
    if (!touched(event) || tapped === i) { open(cells[i]); return; }
    tapped = i;
    linkTo(readout, href(cells[i]));
  });
  map.addEventListener("focus", () => { if (at < 0) show(0); });
  map.addEventListener("keydown", (event) => {
    if (withModifier(event)) return;
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

/** End a read-out with a link. */
export function linkTo(readout, address) {
  if (!address) return;
  const link = document.createElement("a");
  link.href = address;
  link.textContent = "Open";
  readout.append(" · ", link);
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

const EDGE = 4; // pixels that a tip keeps from the edges of the window and from its token

/** A token's activation under the pointer, a finger, or by arrow keys in a box of tokens, which read it out as well. A
 * box that has keys of its own (`data-keys`) is left to them. */
export function tokenTips() {
  const tip = document.createElement("div");
  tip.id = "tip";
  tip.hidden = true;
  const told = document.createElement("p");
  told.id = "told";
  told.setAttribute("role", "status");
  document.body.append(tip, told);
  let at = null; // the token that the arrow keys are on
  function tell(token) {
    tip.hidden = !token;
    if (!token) return;
    tip.textContent = token.dataset.v;
    tip.style.left = tip.style.top = "0"; // where nothing narrows it while it is measured
    const box = token.getClientRects()[0] ?? token.getBoundingClientRect();
    const left = Math.min(box.left, document.documentElement.clientWidth - tip.offsetWidth - EDGE);
    const above = box.top - tip.offsetHeight - EDGE;
    tip.style.left = `${Math.max(EDGE, left) + scrollX}px`;
    tip.style.top = `${(above < 0 ? box.bottom + EDGE : above) + scrollY}px`;
  }
  function leave() {
    at?.classList.remove("cursor");
    at = null;
  }
  document.addEventListener("pointerover", (event) => tell(event.target.closest && event.target.closest(".tokens [data-v]")));
  document.addEventListener("keydown", (event) => {
    const [box, by] = [event.target, { ArrowRight: 1, ArrowLeft: -1 }[event.key]];
    if (!by || withModifier(event) || !box.matches?.(".tokens:not([data-keys])")) return;
    const stops = all("[data-v]", box);
    if (!stops.length) return;
    event.preventDefault();
    const next = Math.min(stops.length - 1, Math.max(0, stops.includes(at) ? stops.indexOf(at) + by : 0));
    leave();
    at = stops[next];
    at.classList.add("cursor");
    at.scrollIntoView({ block: "nearest", inline: "nearest" });
    tell(at);
    told.textContent = `${at.textContent.trim() || "space"}: ${at.dataset.v}`;
  });
  document.addEventListener("focusout", (event) => { if (at && event.target.contains(at)) { leave(); tell(null); } });
  reachTokens();
}

/** Boxes of tokens that have activations to tell are reached by key. Call it again for new ones. */
export function reachTokens(root = document) {
  for (const box of all(".tokens:not([tabindex])", root)) {
    if (!one("[data-v]", box) && !box.matches(".whole")) continue;
    box.tabIndex = 0;
    box.setAttribute("role", "group");
    box.setAttribute("aria-label", "Tokens; arrow keys tell their activations");
  }
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

// What every page has: the theme, keys, tips of tokens, notes, and the bar that says that the study has changed.

import { all, one, themeSwitch, tokenTips, unfoldLinks, watchTables } from "./shared.js";

export { figures } from "./shared.js";

/** An element with properties and children; text is never markup. */
export function make(name, properties = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key.startsWith("data-") || key.startsWith("aria-") || key === "role") element.setAttribute(key, value);
    else element[key] = value;
  }
  element.append(...children);
  return element;
}

/** JSON from the studio; throws with the server's sentence and the status, where there is an answer. */
export async function ask(address, options = {}) {
  const response = await send(address, options);
  const value = await response.json().catch(() => ({ error: "The studio gave no readable answer." }));
  if (!response.ok) throw Object.assign(new Error(value.error || `Error ${response.status}`), { status: response.status });
  return value;
}

/** A request; the cookie that came with the studio's address goes along. */
export async function send(address, options = {}) {
  const headers = { ...(options.body ? { "content-type": "application/json" } : {}), ...options.headers };
  try {
    return await fetch(address, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The studio does not answer; is lorascope studio still running?");
  }
}

export const featureAddress = (id, corpus = "train") => `/feature/${encodeURIComponent(id)}${corpus === "train" ? "" : `?corpus=${encodeURIComponent(corpus)}`}`;

/** A feature's id as pages show it. */
export const named = (id) => id.replace(/-$/, "−");

let toastTimer = 0;
export function toast(text) {
  const box = one("#toast");
  box.textContent = text;
  box.hidden = false;
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => { box.hidden = true; }, 4000);
}

const switchTheme = themeSwitch(one("#theme"));

// --- the side of a direction that the address asks for ---
const askedSide = all(".sides:not(.single) > .side").find((side) => featureAddress(side.getAttribute("aria-label")) === location.pathname.replaceAll("+", "%2B"));
if (askedSide) {
  askedSide.classList.add("asked");
  askedSide.setAttribute("aria-current", "true");
  if (!location.hash && askedSide.previousElementSibling && askedSide.getBoundingClientRect().top > innerHeight / 2) askedSide.scrollIntoView(); // below, on a narrow screen
}

// --- keys ---
const help = one("#help");
one("#keys").addEventListener("click", () => help.showModal());
const PLACES = { o: "/", m: "/map", f: "/features", t: "/traces", c: "/categories", e: "/evidence", l: "/live", n: "/notes" };
let going = 0;

/** Move the mark among rows ([data-id] or [data-row]) by a step; without rows, go to the next or previous page. */
function step(by) {
  const rows = all("tr[data-id], [data-row]");
  if (!rows.length) {
    const link = one(by > 0 ? "#next" : "#previous");
    if (link && link.href) location.href = link.href;
    return;
  }
  const at = rows.findIndex((row) => row.classList.contains("at"));
  const next = at < 0 ? (by > 0 ? 0 : rows.length - 1) : Math.min(rows.length - 1, Math.max(0, at + by));
  if (at >= 0) rows[at].classList.remove("at");
  rows[next].classList.add("at");
  rows[next].scrollIntoView({ block: "nearest" });
  const link = one("th a, a", rows[next]);
  if (link) link.focus({ preventScroll: true });
}
/** Star what the page is about, not a token of it; the form for more unfolds. */
function starPage() {
  const editor = one(".note-editor:not(aside *)", askedSide ?? document);
  if (!editor) return;
  if (one("details.fields", editor)) one("details.fields", editor).open = true;
  one(".star", editor).click();
}
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || help.open) return;
  if (event.target.closest('input:not([type="checkbox"], [type="radio"]), select, textarea')) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  if (going && event.timeStamp - going < 1500) {
    going = 0;
    if (PLACES[event.key]) { event.preventDefault(); location.href = PLACES[event.key]; }
    return;
  }
  if (event.key === "g") going = event.timeStamp;
  else if (event.key === "j") step(1);
  else if (event.key === "k") step(-1);
  else if (event.key === "t") switchTheme();
  else if (event.key === "?") help.showModal();
  else if (event.key === "s") starPage();
  else if (event.key === "/") { event.preventDefault(); (one("#q") || one("#jump")).focus(); }
});

// --- sections that the report has, too, link to its cards: here to the features' pages ---
for (const link of all('a[href^="#card-"]')) link.setAttribute("href", featureAddress(link.getAttribute("href").slice(6)));
if (!one("#dropped")) all('a[href="#dropped"]').forEach((link) => link.setAttribute("href", "/#dropped"));

unfoldLinks();
watchTables();
tokenTips();

// --- notes: every change is one event, saved at once, one after the other; what could not be saved is tried again ---
const AGAIN = 4000; // milliseconds until it is
const PAUSE = 800; // and in typing, after which what is there is saved
const REPLACED = "Saved, in place of a newer note: it was changed elsewhere after this page was made. Reload to see both.";

/** Saves the fields of one place, of which `saved` holds what the server has. `collect(want)` says what the page holds
 * by now, `say(text)` tells the reader, `settle()` is called when all is saved or refused. */
export function keepSaved(place, saved, { collect, say, settle = () => {} }) {
  const wanted = new Map(); // field -> its newest value that is not saved yet, in the order of the changes
  let sending = false;
  let newer = false; // something was changed elsewhere after this page was made
  let timer = 0;
  const stands = (field) => (wanted.has(field) ? wanted.get(field) : saved.get(field) ?? false);
  const want = (field, value) => { if (stands(field) !== value) { wanted.delete(field); wanted.set(field, value); } };
  const fields = () => new Set([...saved.keys(), ...wanted.keys()]);
  async function post(field, value) {
    const before = saved.get(field) ?? false;
    const { replaced } = await ask("/notes", { method: "POST", keepalive: true, body: JSON.stringify({ place, field, value, before }) });
    newer ||= replaced;
    saved.set(field, value);
    if (wanted.get(field) === value) wanted.delete(field);
  }
  async function flush() {
    clearTimeout(timer);
    collect(want);
    if (sending || !wanted.size) return;
    sending = true;
    newer = false;
    const refused = [];
    say("Saving…");
    try {
      while (wanted.size) {
        const [field, value] = wanted.entries().next().value;
        try {
          await post(field, value);
        } catch (error) {
          if (field !== "star" && !(error.status < 500)) throw error; // a star goes back to what is saved
          refused.push(error.message);
          if (wanted.get(field) === value) wanted.delete(field); // refused: what the box holds goes out with the next change
        }
      }
      settle();
      say(refused.length ? `Not saved: ${[...new Set(refused)].join(" ")}` : newer ? REPLACED : "Saved.");
    } catch (error) {
      say(`Not saved: ${[...new Set([...refused, error.message])].join(" ")} Trying again…`);
      timer = setTimeout(flush, AGAIN);
    } finally {
      sending = false;
    }
  }
  /** Save once the reader pauses. */
  function soon() {
    clearTimeout(timer);
    say("");
    timer = setTimeout(flush, PAUSE);
  }
  // the page goes away: nobody is left to send one after the other
  addEventListener("pagehide", () => {
    collect(want);
    for (const [field, value] of wanted) post(field, value).catch(() => {});
  });
  return { stands, want, fields, flush, soon, pending: () => { collect(want); return wanted.size > 0; } };
}

/** Have a note's form save what is put into it; `settled(note)` is called whenever all of it is saved. */
export function wireEditor(editor, settled = () => {}) {
  const [star, tags] = [one(".star", editor), one(".tags", editor)];
  const boxes = { label: one(".label", editor), text: one(".text", editor) };
  const split = () => [...new Set(tags.value.split(",").map((tag) => tag.trim().replace(/[\s:]+/g, "-")).filter(Boolean))];
  const saved = new Map([["star", star.getAttribute("aria-pressed") === "true"], ...Object.entries(boxes).map(([name, box]) => [name, box.value]), ...split().map((tag) => [`tag:${tag}`, true])]);
  const showStar = () => {
    const on = note.stands("star");
    star.setAttribute("aria-pressed", String(on));
    one("span", star).textContent = on ? "★" : "☆";
    one(".word", star).textContent = on ? "Starred" : "Star";
  };
  function collect(want) {
    for (const [name, box] of Object.entries(boxes)) want(name, box.value);
    const now = split().map((tag) => `tag:${tag}`);
    now.forEach((field) => want(field, true));
    for (const field of note.fields()) if (field.startsWith("tag:") && !now.includes(field)) want(field, false);
  }
  const note = keepSaved(editor.dataset.place, saved, { collect, say: (text) => { one(".saved", editor).textContent = text; }, settle: () => { showStar(); settled([...saved.values()].some(Boolean)); } });
  star.addEventListener("click", () => {
    note.want("star", !note.stands("star"));
    showStar();
    note.flush();
  });
  for (const box of Object.values(boxes)) {
    box.addEventListener("input", note.soon);
    box.addEventListener("change", note.flush);
  }
  tags.addEventListener("change", note.flush);
  return note;
}
all(".note-editor").forEach((editor) => wireEditor(editor));

// --- the study may be made anew while the page is open ---
const changed = one("#changed");
one("#reload").addEventListener("click", () => location.reload());
async function look() {
  if (document.hidden) return;
  try {
    const { state } = await ask("/state.json");
    changed.hidden = state === document.body.dataset.state;
  } catch { /* the next look will tell */ }
}
setInterval(look, 5000);
document.addEventListener("visibilitychange", look);

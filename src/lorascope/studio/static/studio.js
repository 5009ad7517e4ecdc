// What every page has: the theme, keys, tips of tokens, notes, and the bar that says that the study has changed.

export const one = (selector, root = document) => root.querySelector(selector);
export const all = (selector, root = document) => [...root.querySelectorAll(selector)];

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

/** JSON from the studio; throws with the server's sentence. */
export async function ask(address, options = {}) {
  const response = await send(address, options);
  const value = await response.json().catch(() => ({ error: "The studio gave no readable answer." }));
  if (!response.ok) throw new Error(value.error || `Error ${response.status}`);
  return value;
}

/** A request with the token, where there is one. */
export async function send(address, options = {}) {
  let token = "";
  try { token = sessionStorage.getItem("lorascope-token") || ""; } catch { /* no storage */ }
  const headers = { ...(options.body ? { "content-type": "application/json" } : {}), ...(token ? { "x-lorascope-token": token } : {}), ...options.headers };
  try {
    return await fetch(address, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The studio does not answer; is lorascope studio still running?");
  }
}

export const featureAddress = (id, corpus = "train") => `/feature/${encodeURIComponent(id)}${corpus === "train" ? "" : `?corpus=${encodeURIComponent(corpus)}`}`;

/** A number to three figures, as on the pages. */
export function figures(value) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size < 1e-3 || size >= 1e7) return value.toExponential(1).replace("-", "−");
  return value.toLocaleString("en", { maximumSignificantDigits: 3 }).replace("-", "−");
}

let toastTimer = 0;
export function toast(text) {
  const box = one("#toast");
  box.textContent = text;
  box.hidden = false;
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => { box.hidden = true; }, 4000);
}

// --- theme ---
const root = document.documentElement;
const isDark = () => (root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
const nameTheme = () => { one("#theme").textContent = isDark() ? "Light" : "Dark"; };
function switchTheme() {
  root.dataset.theme = isDark() ? "light" : "dark";
  try { localStorage.setItem("lorascope-theme", root.dataset.theme); } catch { /* for this page only */ }
  nameTheme();
  document.dispatchEvent(new Event("themechange"));
}
one("#theme").addEventListener("click", switchTheme);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { nameTheme(); document.dispatchEvent(new Event("themechange")); });
nameTheme();

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
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || help.open) return;
  if (event.target.closest("input, select, textarea")) {
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
  else if (event.key === "s") { const star = one(".note-editor .star"); if (star) star.click(); }
  else if (event.key === "/") { event.preventDefault(); (one("#q") || one("#jump")).focus(); }
});

// --- a token's activation under the pointer ---
const tip = make("div", { id: "tip", hidden: true });
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

// --- sections that the report has, too, link to its cards: here to the features' pages; and a link into a fold opens it ---
document.addEventListener("click", (event) => {
  const link = event.target.closest && event.target.closest('a[href^="#"]');
  const name = link ? link.getAttribute("href").slice(1) : "";
  if (name.startsWith("card-")) { event.preventDefault(); location.href = featureAddress(name.slice(5)); return; }
  const target = name && document.getElementById(name);
  if (!target && name === "dropped") { event.preventDefault(); location.href = "/#dropped"; }
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
export const watchTables = () => all(".scroll").forEach((box) => watchWidth.observe(box));
watchTables();

// --- notes: every change is one event, saved at once ---
for (const editor of all(".note-editor")) {
  const said = one(".saved", editor);
  const tags = one(".tags", editor);
  const split = () => [...new Set(tags.value.split(",").map((tag) => tag.trim().replace(/[\s:]+/g, "-")).filter(Boolean))];
  let known = split();
  const save = async (field, value) => {
    said.textContent = "Saving…";
    try {
      await ask("/notes", { method: "POST", body: JSON.stringify({ place: editor.dataset.place, field, value }) });
      said.textContent = "Saved.";
    } catch (error) {
      said.textContent = `Not saved: ${error.message}`;
    }
  };
  const star = one(".star", editor);
  star.addEventListener("click", async () => {
    const on = star.getAttribute("aria-pressed") !== "true";
    star.setAttribute("aria-pressed", String(on));
    one("span", star).textContent = on ? "★" : "☆";
    one(".word", star).textContent = on ? "Starred" : "Star";
    await save("star", on);
  });
  for (const name of ["label", "text"]) {
    const box = one(`.${name}`, editor);
    let timer = 0;
    let kept = box.value;
    const flush = () => {
      clearTimeout(timer);
      if (box.value !== kept) { kept = box.value; save(name, kept); }
    };
    box.addEventListener("input", () => { clearTimeout(timer); said.textContent = ""; timer = setTimeout(flush, 800); });
    box.addEventListener("change", flush);
  }
  tags.addEventListener("change", async () => {
    const now = split();
    for (const tag of now.filter((name) => !known.includes(name))) await save(`tag:${tag}`, true);
    for (const tag of known.filter((name) => !now.includes(name))) await save(`tag:${tag}`, false);
    known = now;
  });
}

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

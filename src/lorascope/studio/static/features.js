// The feature table: searched, sorted and paged on the server while one types; rows chosen for comparison.
import { all, one, watchTables } from "./shared.js";
import { send, toast } from "./studio.js";

const MOST = 4;
const form = one("#filters");
const corpus = () => form.elements.corpus?.value || "train";
// another study may be served from the same port later: what was chosen of this one is kept under its name
const kept = form ? `lorascope-picked-${form.dataset.study}` : "";
const store = {
  get() { try { return JSON.parse(sessionStorage.getItem(kept) || "[]"); } catch { return []; } },
  set(names) { try { sessionStorage.setItem(kept, JSON.stringify(names)); } catch { /* this page only */ } },
};
let picked = form ? store.get() : [];

function showPicked() {
  all(".pick").forEach((tick) => { tick.checked = picked.includes(tick.closest("tr").dataset.id); });
  one("#picked").hidden = picked.length === 0;
  one("#compare").textContent = `Compare ${picked.length} of at most ${MOST}`;
  const wanted = new URLSearchParams({ features: picked.join(","), ...(corpus() === "train" ? {} : { corpus: corpus() }) });
  one("#compare").href = `/compare?${wanted}`;
}

/** What in the results has the focus, as a selector that finds it in the next ones. */
function focused() {
  const here = document.activeElement;
  if (!here || !one("#results").contains(here)) return null;
  if (here.dataset.sort) return `[data-sort="${here.dataset.sort}"]`;
  return here.id ? `#${here.id}` : null;
}

let latest = 0;
async function show(page = 1) {
  const wanted = new URLSearchParams([...new FormData(form)].filter(([, value]) => value));
  if (wanted.get("order") === "falling") wanted.delete("order");
  if (wanted.get("corpus") === "train") wanted.delete("corpus");
  if (page > 1) wanted.set("page", String(page));
  const address = `/features${wanted.size ? `?${wanted}` : ""}`;
  const turn = ++latest;
  let [fresh, trouble] = [null, ""];
  try {
    const response = await send(address);
    fresh = new DOMParser().parseFromString(await response.text(), "text/html");
    if (!response.ok || !one("#results", fresh)) trouble = one("main .absent", fresh)?.textContent || `Error ${response.status}`;
  } catch (error) {
    trouble = error.message;
  }
  if (turn !== latest) return;
  if (trouble) { toast(trouble); return; }
  const focus = focused();
  one("#results").replaceWith(one("#results", fresh));
  one(".found").textContent = one(".found", fresh).textContent; // in place, so that it is read out
  history.replaceState(null, "", address);
  showPicked();
  watchTables();
  const again = focus && one(focus);
  if (again) (again.disabled ? one(".pager button:not(:disabled)") : again)?.focus({ preventScroll: true });
}

async function turnPage(by) {
  await show(Number(one("#results").dataset.page) + by);
  one(".found").scrollIntoView({ block: "start" });
}

if (form) {
  let timer = 0;
  form.addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(() => show(), 120); });
  form.addEventListener("submit", (event) => { event.preventDefault(); show(); });
  document.addEventListener("click", (event) => {
    const sorter = event.target.closest(".sorter");
    if (sorter) {
      const same = form.elements.sort.value === sorter.dataset.sort;
      form.elements.order.value = same && form.elements.order.value === "falling" ? "rising" : "falling";
      form.elements.sort.value = sorter.dataset.sort;
      show();
    }
    if (event.target.id === "before") turnPage(-1);
    if (event.target.id === "after") turnPage(1);
  });
  document.addEventListener("change", (event) => {
    if (!event.target.matches(".pick")) return;
    const id = event.target.closest("tr").dataset.id;
    picked = picked.filter((name) => name !== id);
    if (event.target.checked && picked.length >= MOST) toast(`At most ${MOST} features can be compared.`);
    else if (event.target.checked) picked.push(id);
    store.set(picked);
    showPicked();
  });
  one("#unpick").addEventListener("click", () => { picked = []; store.set(picked); showPicked(); });
  showPicked();
}

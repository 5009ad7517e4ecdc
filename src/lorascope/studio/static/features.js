// The feature table: searched, sorted and paged on the server while one types; rows chosen for comparison.
import { all, ask, featureAddress, figures, make, one, toast, watchTables } from "./studio.js";

const MOST = 4;
const form = one("#filters");
const store = {
  get() { try { return JSON.parse(sessionStorage.getItem("lorascope-picked") || "[]"); } catch { return []; } },
  set(names) { try { sessionStorage.setItem("lorascope-picked", JSON.stringify(names)); } catch { /* this page only */ } },
};
let picked = store.get();

function showPicked() {
  const box = one("#picked");
  if (!box) return;
  all(".pick").forEach((tick) => { tick.checked = picked.includes(tick.closest("tr").dataset.id); });
  box.hidden = picked.length === 0;
  one("#compare").textContent = `Compare ${picked.length} of at most ${MOST}`;
  one("#compare").href = `/compare?features=${encodeURIComponent(picked.join(","))}`;
}

let latest = 0;
async function show(page = 1) {
  const wanted = new URLSearchParams([...new FormData(form)].filter(([, value]) => value));
  if (wanted.get("order") === "falling") wanted.delete("order");
  if (wanted.get("corpus") === "train") wanted.delete("corpus");
  if (page > 1) wanted.set("page", String(page));
  const address = `/features${wanted.size ? `?${wanted}` : ""}`;
  const turn = ++latest;
  const response = await fetch(address).catch(() => null);
  if (turn !== latest) return;
  const text = response && response.ok ? await response.text() : null;
  if (text === null) { toast("The studio did not answer."); return; }
  const fresh = new DOMParser().parseFromString(text, "text/html");
  if (turn !== latest || !one("#results", fresh)) return;
  one("#results").replaceWith(one("#results", fresh));
  history.replaceState(null, "", address);
  showPicked();
  watchTables();
}

if (form) {
  let timer = 0;
  form.addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(show, 120); });
  form.addEventListener("submit", (event) => { event.preventDefault(); show(); });
  document.addEventListener("click", (event) => {
    const sorter = event.target.closest(".sorter");
    if (sorter) {
      const same = form.elements.sort.value === sorter.dataset.sort;
      form.elements.order.value = same && form.elements.order.value === "falling" ? "rising" : "falling";
      form.elements.sort.value = sorter.dataset.sort;
      show();
    }
    const results = one("#results");
    if (event.target.id === "before") show(Number(results.dataset.page) - 1);
    if (event.target.id === "after") show(Number(results.dataset.page) + 1);
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

// --- the overview's leaders ---
for (const list of all(".leaders")) {
  ask(`/features.json?${list.dataset.query}`).then((found) => {
    const seen = new Set(); // the two polarities of a direction share its KL: the explained one stands for both
    const rows = (found.available ? [...found.rows] : []).sort((a, b) => (a.address === b.address ? Boolean(b.text) - Boolean(a.text) : 0))
      .filter((row) => !row.address || (!seen.has(row.address) && seen.add(row.address))).slice(0, 8);
    list.replaceChildren(...rows.map((row) => {
      const link = make("a", { href: featureAddress(row.id), textContent: row.id.replace(/-$/, "−") });
      const value = list.dataset.query.includes("kl") ? `KL ${figures(row.kl)}` : row.detection === null ? "" : `detection ${row.detection.toFixed(2)}`;
      return make("li", {}, link, make("span", { className: "t", textContent: row.text || "not explained" }), make("span", { className: "v", textContent: value }));
    }));
    if (!rows.length) list.replaceChildren(make("li", { className: "empty", textContent: found.available ? "None." : `Run ${found.missing.run}` }));
  }).catch((error) => list.replaceChildren(make("li", { className: "empty", textContent: error.message })));
}

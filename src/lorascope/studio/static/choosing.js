// A box that takes features by name or by words of their explanations.
import { one } from "./shared.js";
import { ask, make, named, toast } from "./studio.js";

const PAUSE = 150; // milliseconds in typing, after which suggestions come

/** `search(words)` gives rows of features, `exact(name)` whether there is one of this name, `take(id)` gets what is chosen.
 * An entry of the list is taken at once; what is typed only on Enter, since "sae.1" may become "sae.17": then the feature
 * of that name or else the first that is found by these words. */
export function featureBox(input, { search, exact, take }) {
  let known = [];
  let timer = 0;
  const list = one(`#${input.getAttribute("list")}`);
  const asTyped = () => input.value.trim().replace(/−$/, "-");
  async function suggest() {
    const words = asTyped();
    const rows = await search(words);
    if (words !== asTyped()) return;
    known = rows.map((row) => row.id);
    list.replaceChildren(...rows.map((row) => make("option", { value: row.id, label: row.text ? `${named(row.id)} · ${row.text.slice(0, 70)}` : named(row.id) })));
  }
  async function enter() {
    const words = asTyped();
    if (!words) return;
    try {
      const id = (await exact(words)) ? words : (await search(words))[0]?.id;
      if (id) accept(id, words);
      else toast(`No such feature: ${words}`);
    } catch (error) {
      toast(error.message);
    }
  }
  function accept(id, words) {
    if (words === asTyped()) { // nothing was typed on meanwhile
      clearTimeout(timer);
      input.value = "";
    }
    take(id);
  }
  input.addEventListener("input", (event) => {
    clearTimeout(timer);
    const chosen = event.inputType === undefined || event.inputType === "insertReplacementText";
    if (chosen && known.includes(input.value)) accept(input.value, asTyped());
    else timer = setTimeout(suggest, PAUSE);
  });
  input.addEventListener("keydown", (event) => { if (event.key === "Enter") { event.preventDefault(); enter(); } });
}

/** Rows of the table of features that words find on a corpus; none where there is no table. */
export async function foundBy(words, corpus = "train") {
  const where = corpus === "train" ? "" : `&corpus=${encodeURIComponent(corpus)}`;
  const found = await ask(`/features.json?size=12&q=${encodeURIComponent(words)}${where}`).catch(() => ({}));
  return found.rows || [];
}

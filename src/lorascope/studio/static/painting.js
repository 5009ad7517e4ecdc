// The tokens of a whole trace, shaded by features.
import { figures, named } from "./studio.js";

const STEPS = 9;

const HUES = 4;

/** A hue for each of some features: that of its kind (0 for +, 1 for −, 2 for latents) where it is still free, so that
 * a feature looks alike on all pages; else the next that is. */
export function huesOf(ids) {
  const taken = [];
  for (const id of ids) {
    const own = id.endsWith("+") ? 0 : id.endsWith("-") ? 1 : 2;
    const free = [own, 2, 3, 0, 1].find((hue) => !taken.includes(hue));
    taken.push(free ?? taken.length % HUES);
  }
  return taken;
}

/** Why a token counts for no feature: "sp" for template and markup, "sk" for an attention sink; "" where it counts. */
export const uncountedOf = (tokens) => tokens.map((token) => ["sp", "sk"].find((name) => token.classList.contains(name)) || "");

/** Whether a feature fires on a token. */
export const fires = ({ values, level, typical }, t, uncounted) => !uncounted[t] && level !== null && values[t] > level && values[t] > typical;

/** Shade each token by the feature that is strongest there, underline it where any fires (with several, a line each); the tokens where one does. */
export function paint(tokens, uncounted, features) {
  const firings = [];
  const hues = huesOf(features.map((feature) => feature.id));
  tokens.forEach((token, t) => {
    let [best, part] = [-1, 0];
    const firing = [];
    features.forEach((feature, k) => {
      const { values, typical, max } = feature;
      const share = max > typical ? Math.min(1, (values[t] - typical) / (max - typical)) : 0;
      if (share > part) [best, part] = [k, share];
      if (fires(feature, t, uncounted)) firing.push(k + 1);
    });
    const classes = uncounted[t] ? [uncounted[t]] : [];
    if (best >= 0) classes.push(`hue${hues[best]}`, uncounted[t] ? "un" : `h${Math.min(STEPS, 1 + Math.floor(STEPS * part * 0.9999))}`);
    if (firing.length) classes.push("f");
    const several = features.length > 1;
    if (several) { // hue alone would not tell them apart: studio.css draws a line for each
      if (best >= 0 && !uncounted[t] && !firing.includes(best + 1)) classes.push(`by${best + 1}`);
      classes.push(...firing.map((k) => `on${k}`));
    }
    token.className = classes.join(" ");
    if (best >= 0) token.dataset.v = (several ? `shaded by ${best + 1}: ` : "") + features.map((f, k) => (several ? `${k + 1} ${named(f.id)} ` : "") + figures(f.values[t])).join(" · ");
    else delete token.dataset.v;
    if (firing.length) firings.push(t);
  });
  return firings;
}

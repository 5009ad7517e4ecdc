// The feature page: the activation over the course of the trace where it is strongest.
import { all, drawStrip, one } from "./shared.js";
import { ask } from "./studio.js";

async function course(figure) {
  const { corpus, trace, feature } = figure.dataset;
  const page = await ask(`/trace/${encodeURIComponent(corpus)}/${trace}.json?features=${encodeURIComponent(feature)}`);
  const { values, typical, max } = page.features[0];
  drawStrip(one("svg", figure), values, typical, max);
}
const seen = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (!entry.isIntersecting) continue;
    seen.unobserve(entry.target);
    course(entry.target).catch((error) => { one("figcaption", entry.target).append(` (${error.message})`); });
  }
});
all(".course").forEach((figure) => seen.observe(figure));

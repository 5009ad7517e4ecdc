// The feature page: the activation over the course of the trace where it is strongest; examples unfold to whole traces.
import { all, drawStrip, one } from "./shared.js";
import { ask, named, send, toast } from "./studio.js";
import { paint, uncountedOf } from "./painting.js";

const addressOf = ({ corpus, trace, feature }, twin = "") => `/trace/${encodeURIComponent(corpus)}/${trace}${twin}?features=${encodeURIComponent(feature)}`;

async function course(figure) {
  const page = await ask(addressOf(figure.dataset, ".json"));
  const { values, typical, max } = page.features[0];
  drawStrip(one("svg", figure), values, typical, max, (t) => page.segments[t] !== 0 && !page.sinks.includes(t));
}
const seen = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (!entry.isIntersecting) continue;
    seen.unobserve(entry.target);
    course(entry.target).catch((error) => { one("figcaption", entry.target).append(` (${error.message})`); });
  }
});
all(".course").forEach((figure) => seen.observe(figure));

/** The whole trace of an example, shaded by its feature: a part of the trace's own page. */
async function wholeTrace(button) {
  const { dataset } = button;
  const response = await send(addressOf(dataset));
  const page = new DOMParser().parseFromString(await response.text(), "text/html");
  const whole = one("#trace", page);
  if (!whole) throw new Error(one("main .absent", page)?.textContent || `Error ${response.status}`);
  whole.removeAttribute("id");
  const tokens = all(":scope > span", whole);
  paint(tokens, uncountedOf(tokens), JSON.parse(whole.dataset.features));
  tokens.forEach((token) => token.classList.remove("hue0", "hue1", "hue2", "hue3")); // the side's own colour
  delete whole.dataset.keys;
  whole.setAttribute("role", "group"); // no landmark: there may be many, and of one token twice
  whole.setAttribute("aria-label", `${button.getAttribute("aria-label")}, ${named(dataset.feature)}; arrow keys tell activations`);
  tokens[dataset.position].classList.add("peak");
  return whole;
}
for (const button of all(".unfold")) {
  button.addEventListener("click", async () => {
    const example = button.closest(".example");
    try {
      if (!one(".whole", example)) example.append(await wholeTrace(button));
    } catch (error) {
      toast(error.message);
      return;
    }
    const [whole, open] = [one(".whole", example), button.getAttribute("aria-expanded") === "false"];
    button.setAttribute("aria-expanded", String(open));
    one(":scope > .tokens:not(.whole)", example).hidden = open;
    whole.hidden = !open;
    if (open) whole.scrollTo({ top: one(".peak", whole).offsetTop - whole.clientHeight / 3 });
  });
}

// A strip: activations over the course of a trace, as bars in an SVG.

const NAMESPACE = "http://www.w3.org/2000/svg";
const HEIGHT = 42;
const MOST_BARS = 600;

/** Draw values (from `low` on, up to `high`) into an SVG; neighbouring tokens share a bar when there are many. */
export function drawStrip(svg, values, low, high) {
  const per = Math.max(1, Math.ceil(values.length / MOST_BARS));
  const count = Math.ceil(values.length / per);
  const bars = [];
  for (let i = 0; i < count; i++) {
    const value = Math.max(...values.slice(i * per, (i + 1) * per));
    if (!(value > low)) continue;
    const height = Math.max(1.5, HEIGHT * Math.min(1, (value - low) / (high - low || 1)));
    const bar = document.createElementNS(NAMESPACE, "rect");
    const width = 100 / count;
    for (const [name, number] of [["x", `${i * width}%`], ["width", `${Math.max(width * 0.9, 0.12)}%`], ["y", HEIGHT + 1 - height], ["height", height]]) bar.setAttribute(name, number);
    bars.push(bar);
  }
  svg.replaceChildren(...bars);
}

// Small line charts, one for each number of a run's log.

const WIDTH = 240, HEIGHT = 80, EDGE = 6;

export function short(value) {
  if (value === null || value === undefined) return "–";
  if (Number.isInteger(value)) return value.toLocaleString("en");
  const size = Math.abs(value);
  return size >= 1e5 || size < 1e-3 ? value.toExponential(2) : value.toPrecision(4);
}

function element(name, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

/** A figure: name, last value, and the line of values over images seen. Lines without a value are passed over. */
export function chart(name, images, values) {
  const points = images.map((x, k) => [x, values[k]]).filter(([, y]) => y !== null && y !== undefined);
  const figure = document.createElement("figure");
  const caption = document.createElement("figcaption");
  const last = points.length ? points[points.length - 1][1] : null;
  const title = document.createElement("span"), number = document.createElement("b");
  title.textContent = name.replaceAll("_", " ").replace(".", ": ");
  number.textContent = short(last);
  caption.append(title, number);
  figure.append(caption);
  const ys = points.map(([, y]) => y), low = Math.min(...ys), high = Math.max(...ys);
  const first = images[0], end = images[images.length - 1];
  const across = (x) => EDGE + (WIDTH - 2 * EDGE) * (end > first ? (x - first) / (end - first) : 0.5);
  const up = (y) => HEIGHT - EDGE - (HEIGHT - 2 * EDGE) * (high > low ? (y - low) / (high - low) : 0.5);
  const svg = element("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img" });
  svg.setAttribute("aria-label", `${name}: from ${short(low)} to ${short(high)}, now ${short(last)}`);
  const line = points.map(([x, y], k) => `${k ? "L" : "M"}${across(x).toFixed(1)} ${up(y).toFixed(1)}`).join("");
  if (points.length) {
    const [x, y] = points[points.length - 1];
    svg.append(element("path", { d: line }), element("circle", { cx: across(x), cy: up(y), r: 2.5 }));
  }
  figure.append(svg);
  return figure;
}

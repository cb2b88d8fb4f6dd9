// The plane of a chart: from values to pixels, with gridlines, ticks and the names of both axes.

const MARGIN = { top: 12, right: 12, bottom: 36, left: 68 };

/** A number's place between two ends, on a linear or logarithmic axis. */
function scaleOf([low, high], [from, to], log = false) {
  const of = log ? Math.log10 : (value) => value;
  const span = of(high) - of(low) || 1;
  const scale = (value) => from + ((of(value) - of(low)) / span) * (to - from);
  return scale;
}

/** An empty drawing with both axes. xTicks: [[pixel place, text]]; yDomain: [low, high]. */
function plane(plot, { height = 230, yDomain, log = false, yUnit, yLabel, xLabel, xTicks }) {
  const width = Math.max(plot.clientWidth, 240);
  const inner = { left: MARGIN.left, right: width - MARGIN.right, top: MARGIN.top, bottom: height - MARGIN.bottom };
  const y = scaleOf(yDomain, [inner.bottom, inner.top], log);
  const root = svg("svg", { class: "chart", viewBox: `0 0 ${width} ${height}`, height });
  for (const value of log ? logTicks(...yDomain, 5) : ticks(...yDomain, 5)) {
    root.append(
      svg("line", { class: "gridline", x1: inner.left, x2: inner.right, y1: y(value), y2: y(value) }),
      svg("text", { x: inner.left - 6, y: y(value) + 4, "text-anchor": "end" }, tickText(value, yUnit)),
    );
  }
  root.append(svg("line", { class: "axis", x1: inner.left, x2: inner.right, y1: inner.bottom, y2: inner.bottom }));
  for (const [place, text, anchor] of xTicks(inner)) {
    root.append(
      svg("line", { class: "axis", x1: place, x2: place, y1: inner.bottom, y2: inner.bottom + 4 }),
      svg("text", { x: place, y: inner.bottom + 16, "text-anchor": anchor || "middle" }, text),
    );
  }
  const middle = (inner.top + inner.bottom) / 2;
  root.append(
    svg("text", { x: (inner.left + inner.right) / 2, y: height - 4, "text-anchor": "middle" }, xLabel),
    svg("text", { x: 0, y: 0, transform: `translate(11 ${middle}) rotate(-90)`, "text-anchor": "middle" }, yLabel),
  );
  plot.replaceChildren(root);
  return { root, inner, y, width };
}

/** As withUnit, but for units that the axis' name has already. */
function tickText(value, unit) {
  if (unit === "share") return `${plain(value * 100)} %`;
  if (unit === "bytes") return bytes(value);
  if (unit === "s") return value === 0 ? "0" : seconds(value);
  return plain(value);
}

/** What an axis is called: the quantity, and its unit where the ticks do not say it. */
function axisLabel(quantity, unit) {
  return ["", "share", "bytes", "s"].includes(unit) ? quantity : `${quantity}, ${unit}`;
}

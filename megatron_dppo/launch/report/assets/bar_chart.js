// Bars over bins, side by side for several runs, with an outline of what they are compared with.

/**
 * Draws into a frame's plot.
 * labels: of the bins; series: [{label, colour, values, reference, detail(bin) -> text or null}], null where a bin has nothing.
 */
function barChart(plot, { id, title, unit, yLabel, xLabel, labels, series, height = 220 }) {
  const values = series.flatMap((one) => [...one.values, ...(one.reference || [])]).filter((value) => value !== null);
  const highest = Math.max(...values, 0) || 1;
  let slot;
  const drawing = plane(plot, {
    height,
    yDomain: [0, highest * 1.06],
    yUnit: unit,
    yLabel,
    xLabel,
    xTicks: (inner) => {
      slot = (inner.right - inner.left) / labels.length;
      const every = Math.max(Math.ceil(Math.max(...labels.map((label) => label.length)) * 6.6 / slot), 1);
      return labels.map((label, bin) => [inner.left + (bin + 0.5) * slot, label]).filter((_, bin) => bin % every === 0);
    },
  });
  const { root, inner, y } = drawing;
  const gap = Math.min(slot * 0.12, 6), width = (slot - 2 * gap) / series.length;
  series.forEach(({ colour, values: own, reference }, index) => {
    own.forEach((value, bin) => {
      const left = inner.left + bin * slot + gap + index * width;
      if (value !== null && value > 0) root.append(svg("rect", { x: left, width: Math.max(width - 1, 1), y: y(value), height: inner.bottom - y(value), fill: colour, opacity: 0.85 }));
      const compared = reference ? reference[bin] : null;
      if (compared !== null && compared > 0) root.append(svg("line", { x1: left, x2: left + width - 1, y1: y(compared), y2: y(compared), stroke: "var(--ink)", "stroke-width": 1.6 }));
    });
  });
  const marked = svg("rect", { y: inner.top, height: inner.bottom - inner.top, width: slot, fill: "var(--ink)", opacity: 0.06, visibility: "hidden" });
  root.append(marked);
  explorable(
    root,
    title,
    () => labels.length,
    (pixel) => Math.min(Math.max(Math.floor((pixel - inner.left) / slot), 0), labels.length - 1),
    (bin, spoken, pointerX, pointerY) => {
      const box = root.getBoundingClientRect(), place = inner.left + bin * slot;
      marked.setAttribute("x", place);
      marked.setAttribute("visibility", "visible");
      const rows = series.flatMap(({ label, colour, values: own, reference, detail }) => [
        [colour, label, own[bin] === null ? "no tokens" : withUnit(own[bin], unit)],
        ...(reference && reference[bin] !== null ? [[null, "at the start", withUnit(reference[bin], unit)]] : []),
        ...(detail ? [[null, "", detail(bin)]] : []),
      ]);
      tooltip.show(pointerX ?? box.left + place + slot, pointerY ?? box.top + 30, `${xLabel}: ${labels[bin]}`, rows, spoken);
    },
    () => {
      marked.setAttribute("visibility", "hidden");
      tooltip.hide();
    },
  );
}

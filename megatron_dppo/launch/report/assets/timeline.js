// Where the time of each step went: stacked columns, one chart per run, and the shares of the whole run.

const PHASES = [
  { name: "make room", colour: "var(--run-5)", of: (at) => at("make_room") },
  { name: "generate", colour: "var(--run-0)", of: (at) => at("generate") },
  { name: "score", colour: "var(--run-3)", of: (at) => at("score") },
  { name: "rest of the rollout", colour: "var(--run-6)", of: (at) => Math.max(at("rollout") - at("generate") - at("score"), 0) },
  { name: "forward and backward", colour: "var(--run-1)", of: (at) => at("forward_backward") },
  { name: "rest of the update", colour: "var(--run-4)", of: (at) => Math.max(at("update") - at("forward_backward"), 0) },
  { name: "put away", colour: "var(--run-7)", of: (at) => at("put_away") },
  { name: "weight sync", colour: "var(--run-2)", of: (at) => at("sync") },
];
const MOST_COLUMNS = 90;

function timelines() {
  return data.runs.map((run, index) => timeline(run, index));
}

function timeline(run, index) {
  const { figure, legend, plot } = frame(
    `timeline-${index}`,
    `${run.name}: time of a step`,
    "The slowest rank's time of each phase. What is generated and scored is the slowest replica's own; the rest is waiting for it and moving data.",
  );
  const table = html("div", { class: "scroll" });
  figure.insertBefore(table, figure.querySelector("figcaption"));
  drawn(() => {
    figure.hidden = view.hidden.has(run.name);
    if (figure.hidden) return;
    const columns = columnsOf(run);
    if (!columns.length) {
      table.replaceChildren();
      return sayEmpty(plot, "This run has no times yet: they come with its first step.");
    }
    const used = PHASES.map((phase, at) => ({ ...phase, at })).filter(({ at }) => columns.some((column) => column.parts[at] > 0));
    legend.replaceChildren(...used.map(({ name, colour }) => html("span", {}, swatch(colour), name)));
    stacked(plot, run, columns, used);
    table.replaceChildren(shareTable(columns, used));
  });
  return figure;
}

/** [{step, parts: [seconds of each phase]}], neighbours averaged where there are more than a chart can show. */
function columnsOf(run) {
  const steps = run.x.step.map((step, at) => ({ step, at })).filter(({ at }) => run.metrics["time/step_s"] && run.metrics["time/step_s"][at] !== null);
  const stride = Math.max(Math.ceil(steps.length / MOST_COLUMNS), 1), columns = [];
  for (let first = 0; first < steps.length; first += stride) {
    const group = steps.slice(first, first + stride);
    const parts = PHASES.map(({ of }) => {
      const sum = group.reduce((total, { at }) => total + of((name) => (run.metrics[`time/${name}_s`] || [])[at] || 0), 0);
      return sum / group.length;
    });
    columns.push({ first: group[0].step, step: group[group.length - 1].step, count: group.length, parts });
  }
  return columns;
}

function stacked(plot, run, columns, used) {
  const total = ({ parts }) => used.reduce((sum, { at }) => sum + parts[at], 0);
  const totals = columns.map(total).sort((a, b) => a - b);
  // A first step that compiles or warms up is many times as long: it may stick out of the axis.
  const highest = Math.min(totals[totals.length - 1], 2.5 * quantile(totals, 0.9)) || 1;
  let slot;
  const { root, inner, y } = plane(plot, {
    height: 240,
    yDomain: [0, highest * 1.04],
    yUnit: "s",
    yLabel: "seconds per step",
    xLabel: "training step",
    xTicks: (inner) => {
      slot = (inner.right - inner.left) / columns.length;
      const every = Math.max(Math.ceil((columns.length * 60) / (inner.right - inner.left)), 1);
      return columns.map((column, at) => [inner.left + (at + 0.5) * slot, String(column.step)]).filter((_, at) => at % every === 0);
    },
  });
  columns.forEach(({ parts }, at) => {
    let sum = 0;
    for (const { at: phase, colour } of used) {
      const top = Math.min(sum + parts[phase], highest * 1.04);
      if (top > sum) root.append(svg("rect", { x: inner.left + at * slot + slot * 0.06, width: slot * 0.88, y: y(top), height: y(sum) - y(top), fill: colour }));
      sum = Math.min(sum + parts[phase], highest * 1.04);
    }
  });
  const marked = svg("rect", { y: inner.top, height: inner.bottom - inner.top, width: slot, fill: "var(--ink)", opacity: 0.12, visibility: "hidden" });
  root.append(marked);
  explorable(
    root,
    `${run.name}: seconds of each phase`,
    () => columns.length,
    (pixel) => Math.min(Math.max(Math.floor((pixel - inner.left) / slot), 0), columns.length - 1),
    (at, spoken, pointerX, pointerY) => {
      const box = root.getBoundingClientRect(), column = columns[at];
      marked.setAttribute("x", inner.left + at * slot);
      marked.setAttribute("visibility", "visible");
      const title = column.count > 1 ? `steps ${column.first}–${column.step}, mean` : `step ${column.step}`;
      const rows = [...used].reverse().map(({ at: phase, name, colour }) => [colour, name, seconds(column.parts[phase])]);
      tooltip.show(pointerX ?? box.left + inner.left + at * slot, pointerY ?? box.top + 30, title, [...rows, [null, "together", seconds(total(column))]], spoken);
    },
    () => {
      marked.setAttribute("visibility", "hidden");
      tooltip.hide();
    },
  );
}

function shareTable(columns, used) {
  const sums = used.map(({ at }) => columns.reduce((sum, { parts, count }) => sum + parts[at] * count, 0));
  const all = sums.reduce((sum, value) => sum + value, 0) || 1;
  const rows = used.map(({ name, colour }, at) =>
    html("tr", {}, html("td", {}, swatch(colour), name), html("td", { class: "number" }, seconds(sums[at])), html("td", { class: "number" }, `${plain((100 * sums[at]) / all)} %`)),
  );
  const head = html("tr", {}, html("th", {}, "phase"), html("th", { class: "number" }, "all steps"), html("th", { class: "number" }, "share"));
  return html("table", {}, html("thead", {}, head), html("tbody", {}, rows));
}

// Histograms of rewards and lengths, and what the trust region does by probability and by position, around one step.

const MEASURES = {
  masked: { label: "held back by the trust region", unit: "share", axis: "share held back" },
  divergence: { label: "mean divergence D(μ ‖ π)", unit: "", axis: "mean divergence" },
  abs_log_ratio: { label: "mean |log π − log μ|", unit: "nats", axis: "mean |log ratio|, nats" },
  tokens: { label: "tokens", unit: "share", axis: "share of tokens" },
};
const around = { share: 1, measure: "masked" };

/** The slider and the choice of what is measured; the charts follow. */
function distributionControls() {
  const output = html("output", {});
  const slider = html("input", { type: "range", min: 0, max: 100, step: 1, value: 100, id: "around", "aria-label": "part of training that is shown" });
  slider.addEventListener("input", () => {
    around.share = slider.value / 100;
    drawAll();
  });
  const choice = html("select", { id: "measure" }, Object.entries(MEASURES).map(([name, { label }]) => html("option", { value: name }, label)));
  choice.addEventListener("change", () => {
    around.measure = choice.value;
    drawAll();
  });
  drawn(() => {
    const texts = shownRuns().filter(({ run }) => run.distributions).map(({ run }) => {
      const [first, last] = windowOf(run.distributions);
      return `${data.runs.length > 1 ? `${run.name}: ` : ""}steps ${run.distributions.first[first]}–${run.distributions.last[last]}`;
    });
    output.textContent = texts.join(", ") || "no distributions recorded";
  });
  return html("div", { class: "toolbar" }, html("label", {}, "Part of training ", slider), output, html("label", {}, "By probability and by position: ", choice));
}

/** First and last window of the tenth of the run that the slider stands at. */
function windowOf({ first }) {
  const width = Math.max(Math.round(first.length / 10), 1);
  const from = Math.round(around.share * (first.length - width));
  return [from, from + width - 1];
}

function summed(rows, [first, last], bins) {
  const total = Array(bins).fill(0);
  for (const row of rows.slice(first, last + 1)) row.forEach((value, bin) => (total[bin] += value));
  return total;
}

/** A histogram: kind is reward or length. */
function histogram(kind, title, xLabel, note) {
  const { figure, legend, plot } = frame(`distribution-${kind}`, title, note);
  drawn(() => {
    const shown = shownRuns().filter(({ run }) => run.distributions);
    if (!shown.length) return sayEmpty(plot, absentDistributions());
    const { low, width } = shown[0].run.distributions[kind];
    const fits = shown.filter(({ run }) => run.distributions[kind].width === width);
    const count = Math.max(...fits.map(({ run }) => run.distributions[kind].counts[0].length));
    const used = Math.max(...fits.map(({ run }) => lastUsed(run.distributions[kind].counts))) + 1;
    const bins = kind === "reward" ? count : Math.min(used, count);
    const labels = Array.from({ length: bins }, (_, bin) => binLabel(kind, low + bin * width, width, bin === count - 1));
    const series = fits.map(({ run, colour }) => {
      const share = (rows, range) => shares(summed(rows, range, count)).slice(0, bins);
      const rows = run.distributions[kind].counts, width = windowOf(run.distributions);
      return { label: run.name, colour, values: share(rows, width), reference: share(rows, [0, width[1] - width[0]]) };
    });
    legend.replaceChildren(...barLegend(series));
    barChart(plot, { title, unit: "share", yLabel: "share of responses", xLabel, labels, series });
  });
  return figure;
}

function lastUsed(rows) {
  return Math.max(...rows.map((row) => row.findLastIndex((value) => value > 0)), 0);
}

function binLabel(kind, low, width, isLast) {
  if (kind === "reward") return isLast ? `${plain(low, 2)}–1` : plain(low, 2);
  if (width === 1) return isLast ? `${low}+` : String(low);
  return isLast ? `${low}+` : `${low}–${low + width - 1}`;
}

function shares(counts) {
  const total = counts.reduce((sum, value) => sum + value, 0);
  return counts.map((value) => (total ? value / total : 0));
}

/** What the trust region does in each bin: kind is position or probability. */
function byBin(kind, title, xLabel, note) {
  const { figure, legend, plot } = frame(`distribution-${kind}`, title, note);
  drawn(() => {
    const shown = shownRuns().filter(({ run }) => run.distributions && run.distributions[kind].lowest.length);
    if (!shown.length) return sayEmpty(plot, absentDistributions());
    const lowest = shown.map(({ run }) => run.distributions[kind].lowest).reduce((a, b) => (b.length > a.length ? b : a));
    const labels = lowest.map((low, bin) => (kind === "position" ? positionLabel(low, lowest[bin + 1]) : `${low}–${lowest[bin + 1] ?? 1}`));
    const measure = MEASURES[around.measure];
    const series = shown.map(({ run, colour }) => {
      const sums = run.distributions[kind], range = windowOf(run.distributions);
      const tokens = summed(sums.tokens, range, lowest.length);
      return {
        label: run.name,
        colour,
        values: measured(sums, range, lowest.length),
        reference: measured(sums, [0, range[1] - range[0]], lowest.length),
        detail: (bin) => `${plain(tokens[bin])} tokens with A ≠ 0`,
      };
    });
    legend.replaceChildren(...barLegend(series));
    barChart(plot, { title, unit: measure.unit, yLabel: measure.axis, xLabel, labels, series });
  });
  return figure;
}

function measured(sums, range, bins) {
  const tokens = summed(sums.tokens, range, bins);
  if (around.measure === "tokens") return shares(tokens);
  return summed(sums[around.measure], range, bins).map((value, bin) => (tokens[bin] ? value / tokens[bin] : null));
}

function positionLabel(low, next) {
  const end = next ?? Math.max(2 * low, 1); // bins double
  return end - low === 1 ? String(low) : `${low}–${end - 1}`;
}

function barLegend(series) {
  const names = data.runs.length > 1 ? series.map(({ label, colour }) => html("span", {}, swatch(colour), label)) : [];
  return [...names, html("span", {}, svg("svg", { width: 16, height: 8 }, svg("line", { x1: 0, x2: 16, y1: 4, y2: 4, stroke: "var(--ink)", "stroke-width": 1.6 })), "first tenth of training")];
}

function absentDistributions() {
  if (view.hidden.size === data.runs.length) return "All runs are switched off.";
  return "No run has a distributions.jsonl: it was made before that file was written, or is a record, which leaves it out.";
}

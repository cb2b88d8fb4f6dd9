// Single responses, the worst and the best, with every token coloured by what the update did to it.

const ORDERS = {
  worst: { label: "worst reward first", of: (sample) => [sample.reward ?? 0] },
  best: { label: "best reward first", of: (sample) => [-(sample.reward ?? 0)] },
  held: { label: "most tokens held back first", of: (sample) => [-(sample.trace ? sample.trace.weight.filter((weight) => weight === 0).length : -1)] },
  divergence: { label: "largest divergence first", of: (sample) => [-(sample.trace ? Math.max(...sample.trace.divergence.filter((value) => value !== null)) : -1)] },
  latest: { label: "latest first", of: (sample) => [-sample.step] },
};
const COLOURINGS = {
  weight: { label: "weight in the update", ends: ["0 (held back)", "1 or more"], of: (trace, at) => trace.weight[at], paint: (value) => [`var(--low)`, 0.55 * (1 - Math.min(value, 1))] },
  divergence: { label: "divergence", of: (trace, at) => trace.divergence[at], paint: (value, top) => ["var(--warm)", 0.75 * Math.min(value / top, 1)] },
  ratio: { label: "log π − log μ", of: (trace, at) => logRatio(trace, at), paint: (value, top) => [value < 0 ? "var(--low)" : "var(--high)", 0.7 * Math.min(Math.abs(value) / top, 1)] },
  surprise: { label: "rollout probability", ends: ["1", "0"], of: (trace, at) => (trace.rollout_log_prob[at] === null ? null : Math.exp(trace.rollout_log_prob[at])), paint: (value) => ["var(--high)", 0.6 * (1 - value)] },
};
const FIRST_SHOWN = 8;
const chosen = { order: "worst", colouring: "weight", traced: true, shown: FIRST_SHOWN };

function logRatio(trace, at) {
  return trace.log_prob[at] === null ? null : trace.log_prob[at] - trace.rollout_log_prob[at];
}

function sampleBrowser() {
  const list = html("div", { class: "samples", id: "sample-list" });
  const legend = html("span", { id: "sample-legend" });
  const more = html("button", { type: "button" }, "Show more");
  const traced = html("input", { type: "checkbox", id: "traced", checked: chosen.traced });
  const order = select("order", Object.entries(ORDERS).map(([name, { label }]) => [name, label]));
  const colouring = select("colouring", Object.entries(COLOURINGS).map(([name, { label }]) => [name, label]));
  order.addEventListener("change", () => change({ order: order.value, shown: FIRST_SHOWN }));
  colouring.addEventListener("change", () => change({ colouring: colouring.value }));
  traced.addEventListener("change", () => change({ traced: traced.checked, shown: FIRST_SHOWN }));
  more.addEventListener("click", () => change({ shown: chosen.shown + FIRST_SHOWN }));

  function change(what) {
    Object.assign(chosen, what);
    draw();
  }

  function draw() {
    const all = shownRuns().flatMap(({ run, colour }) => run.samples.map((sample) => ({ run, colour, sample })));
    const anyTraced = all.some(({ sample }) => sample.trace);
    traced.disabled = !anyTraced;
    const usable = chosen.traced && anyTraced ? all.filter(({ sample }) => sample.trace) : all;
    const key = ORDERS[chosen.order].of;
    usable.sort((a, b) => key(a.sample)[0] - key(b.sample)[0] || b.sample.step - a.sample.step);
    const top = topOf(usable.map(({ sample }) => sample.trace).filter((trace) => trace));
    legend.replaceChildren(...(anyTraced ? colourLegend(top) : ["no tokens recorded (logging.traced_tokens)"]));
    more.hidden = usable.length <= chosen.shown;
    more.textContent = `Show more (${usable.length - chosen.shown} left)`;
    list.replaceChildren(...usable.slice(0, chosen.shown).map((one) => sampleCard(one, top)));
    if (!usable.length) sayEmpty(list, view.hidden.size === data.runs.length ? "All runs are switched off." : "No run has a samples.jsonl: records leave it out, and logging.samples_per_step=0 writes none.");
  }

  drawn(draw);
  const toolbar = html("div", { class: "toolbar" }, html("label", {}, "Order ", order), html("label", {}, "Colour ", colouring), legend, html("label", {}, traced, "only with single tokens"));
  return html("div", { "data-panel": "samples" }, toolbar, list, html("p", {}, more));
}

function select(id, options) {
  return html("select", { id }, options.map(([value, label]) => html("option", { value }, label)));
}

/** Where the colour is strongest: beyond it are one in a hundred tokens of those that are shown. */
function topOf(traces) {
  const { of } = COLOURINGS[chosen.colouring];
  const sizes = traces.flatMap((trace) => trace.text.map((_, at) => of(trace, at))).filter((value) => value !== null).map(Math.abs).sort((a, b) => a - b);
  return sizes.length ? quantile(sizes, 0.99) || 1 : 1;
}

function colourLegend(top) {
  const { ends, paint, label } = COLOURINGS[chosen.colouring];
  const signed = chosen.colouring === "ratio";
  const [low, high] = ends || (signed ? [`−${plain(top)}`, `+${plain(top)}`] : ["0", plain(top)]);
  const range = { weight: [0, 1], surprise: [1, 0], ratio: [-top, top], divergence: [0, top] }[chosen.colouring];
  const stops = [0, 0.25, 0.5, 0.75, 1].map((share) => {
    const [colour, opacity] = paint(range[0] + share * (range[1] - range[0]), top);
    return `rgba(${colour}, ${opacity})`;
  });
  return [low, html("span", { class: "scale", role: "img", "aria-label": `colours of ${label}`, style: `background: linear-gradient(to right, ${stops.join(", ")})` }), high, html("span", { class: "token held", style: "margin-left: 1rem" }, "held back")];
}

function sampleCard({ run, colour, sample }, top) {
  const facts = [
    ...(data.runs.length > 1 ? [run.name] : []),
    `step ${sample.step}`,
    html("span", {}, "reward ", html("b", {}, plain(sample.reward))),
    `${plain(sample.tokens)} tokens`,
    { length: "cut at the length limit", stop: "ended by itself" }[sample.finish_reason] ?? String(sample.finish_reason),
    ...(sample.trace ? [`${sample.trace.weight.filter((weight) => weight === 0).length} held back`] : []),
    sample.prompt_id,
  ].map((fact) => html("span", {}, fact));
  const pairs = [["question", sample.question], ["expected", sample.answer || "–"]].map(([name, text]) => [html("dt", {}, name), html("dd", {}, text)]);
  const response = sample.trace ? tokensOf(sample, top) : [sample.response || "(empty)"];
  return html("article", { class: "sample", style: `--colour: ${colour}` }, html("div", { class: "facts" }, facts), html("dl", {}, pairs, html("dt", {}, "response"), html("dd", {}, response)));
}

/** The response token by token; one of them is in the order of tabs, and arrow keys move between them. */
function tokensOf({ trace, tokens }, top) {
  const { of, paint } = COLOURINGS[chosen.colouring];
  const spans = trace.text.map((text, at) => {
    const value = of(trace, at);
    const style = value === null ? null : `background: rgba(${paint(value, top).join(", ")})`;
    const kind = value === null ? " left-out" : trace.weight[at] === 0 ? " held" : "";
    const shown = text === "" ? html("span", { class: "special" }, at === tokens - 1 ? "end" : "·") : text.replaceAll("\n", "↵\n");
    const show = (event, spoken) => {
      const box = event.target.getBoundingClientRect();
      tooltip.show(box.left, box.bottom, `token ${at}: ${text === "" ? "special, or part of a character" : JSON.stringify(text)}`, tokenRows(trace, at), spoken);
    };
    return html("span", { class: `token${kind}`, style, tabindex: at ? -1 : 0, onpointerenter: (event) => show(event, false), onpointerleave: tooltip.hide, onfocus: (event) => show(event, true), onblur: tooltip.hide }, shown);
  });
  const element = html("span", { class: "tokens", role: "group", "aria-label": "Response by tokens. Arrow keys move between them." }, spans);
  element.addEventListener("keydown", (event) => {
    const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const next = move && spans[spans.indexOf(document.activeElement) + move];
    if (!next) return;
    event.preventDefault();
    next.focus();
  });
  const rest = tokens - trace.text.length;
  return rest > 0 ? [element, html("span", { class: "caption" }, ` … ${rest} more tokens were not recorded one by one`)] : [element];
}

function tokenRows(trace, at) {
  if (trace.weight[at] === null) return [[null, "left out of the loss", ""]];
  return [
    [null, "weight w", plain(trace.weight[at])],
    [null, "divergence D", plain(trace.divergence[at])],
    [null, "rollout probability μ", plain(Math.exp(trace.rollout_log_prob[at]))],
    [null, "policy's probability π", plain(Math.exp(trace.log_prob[at]))],
    [null, "ratio π / μ", plain(Math.exp(logRatio(trace, at)))],
  ];
}

// The page put together.

const SECTIONS = [
  ["summary", "Summary", "", () => [summary()]],
  ["learning", "Learning", "Curves are means over the steps of the window above; bands are one standard deviation of those steps.", () => [grid(panelsOf("learning").map(lineChart))]],
  ["trust", "Trust region", "Of tokens whose advantage is not 0. D is the divergence of the rollout policy μ from the policy being trained, π; tokens that would move further outward once D is above delta are held back.", () => [grid(panelsOf("trust").map(lineChart))]],
  ["distributions", "Distributions", "The bars are of the tenth of training that the slider stands at; the thin marks are of the first tenth.", () => [distributionControls(), pairs([
    byBin("probability", "By rollout probability", "μ of the token", "Which tokens the trust region is about."),
    byBin("position", "By position in the response", "token's place in the response", "A drift along the response shows here."),
    histogram("reward", "Rewards", "reward", "Of all responses of all replicas."),
    histogram("length", "Response lengths", "tokens", "Of all responses of all replicas; the last bin ends at the limit."),
  ])]],
  ["mismatch", "Mismatch of engine and trainer", "Before the first update of each batch, over every token.", () => [pairs(panelsOf("mismatch").map(lineChart))]],
  ["samples", "Samples", "Responses of the first replica that the run has kept. Point at a token, or move with the arrow keys, for its numbers.", () => [sampleBrowser()]],
  ["time", "Time", "", () => [pairs(timelines()), pairs(panelsOf("speed").map(lineChart))]],
  ["configuration", "Configuration", "", () => [configuration()]],
  ["metrics", "Any metric", "Everything that a run reports; docs/metrics.md says what each is.", () => [anyMetric()]],
];

function panelsOf(section) {
  return data.panels.map((panel, at) => ({ ...panel, id: `${section}-${at}` })).filter((panel) => panel.section === section);
}

function grid(figures) {
  return html("div", { class: "grid" }, figures);
}

function pairs(figures) {
  return html("div", { class: "grid pairs" }, figures);
}

function summary() {
  const arrow = (pair, unit) => (pair ? `${withUnit(pair[0], unit)} → ${withUnit(pair[1], unit)}` : "–");
  const rows = [
    ["steps", ({ steps }) => plain(steps, 6)],
    ["time in steps", ({ seconds: time }) => (time ? seconds(time) : "–")],
    ["reward, first → last 5 steps", ({ reward }) => arrow(reward, "")],
    ["held-out accuracy, first → last", ({ accuracy }) => arrow(accuracy, "share")],
    ["best held-out accuracy", ({ accuracy }) => (accuracy ? withUnit(accuracy[2], "share") : "–")],
    ["response length, first → last", ({ length }) => arrow(length, "tokens")],
    ["entropy, first → last", ({ entropy }) => arrow(entropy, "nats")],
    ["held back, median step", ({ masked }) => withUnit(masked, "share")],
    ["mismatch KL, worst step", ({ mismatch }) => withUnit(mismatch, "nats")],
    ["throughput, median step", ({ tokens_per_s: speed }) => withUnit(speed, "tokens/s")],
    ["skipped optimizer steps", ({ skipped }) => plain(skipped)],
    ["samples that could not be used", (_, run) => plain(run.failures)],
    ["kernels", (_, run) => run.texts.backend || "–"],
    ["folder", (_, run) => run.folder],
  ];
  const head = html("tr", {}, html("th", {}, ""), data.runs.map((run, index) => html("th", {}, swatch(`var(--run-${index % 8})`), run.name)));
  const body = rows.map(([label, text]) => html("tr", {}, html("td", {}, label), data.runs.map((run) => html("td", {}, text(run.summary, run)))));
  const alarms = data.runs.flatMap((run) => run.alarms.map((alarm) => html("li", {}, html("b", {}, `${data.runs.length > 1 ? `${run.name}, ` : ""}step ${alarm.step}: `), alarm.message)));
  const table = html("div", { class: "scroll" }, html("table", {}, html("thead", {}, head), html("tbody", {}, body)));
  return html("div", { "data-panel": "summary" }, alarms.length ? html("ul", { class: "alarms", "aria-label": "alarms" }, alarms) : null, table);
}

function anyMetric() {
  const names = [...new Set(data.runs.flatMap((run) => Object.keys(run.metrics)))].sort();
  const choice = select("any-metric", names.map((name) => [name, name]));
  const place = html("div", { class: "grid" });
  let before = null;
  function show() {
    if (before !== null) drawings.splice(before, 1);
    before = drawings.length;
    const figure = lineChart({ id: "any", title: choice.value, quantity: choice.value.split("/").pop().replaceAll("_", " "), unit: unitOf(choice.value), metrics: { [choice.value]: choice.value }, note: "", log: false, points: choice.value.startsWith("eval/"), absent: "The runs that are shown have no values of it." });
    figure.classList.add("wide");
    place.replaceChildren(figure);
    if (place.isConnected) drawings[before]();
  }
  if (names.includes("loss")) choice.value = "loss";
  choice.addEventListener("change", show);
  show();
  return html("div", {}, html("div", { class: "toolbar" }, html("label", {}, "Metric ", choice)), place);
}

function unitOf(name) {
  if (name.endsWith("_bytes")) return "bytes";
  if (name.startsWith("time/") && name.endsWith("_s")) return "s";
  return /fraction|share|accuracy/.test(name) ? "share" : "";
}

function controls() {
  const runs = document.getElementById("runs");
  data.runs.forEach((run, index) => {
    const button = html("button", { type: "button", "aria-pressed": "true", title: "show or hide this run" }, swatch(`var(--run-${index % 8})`), run.name);
    button.addEventListener("click", () => {
      const isShown = view.hidden.has(run.name);
      if (isShown) view.hidden.delete(run.name);
      else view.hidden.add(run.name);
      button.setAttribute("aria-pressed", String(isShown));
      drawAll();
    });
    runs.append(button);
  });
  const axis = document.getElementById("x-axis");
  axis.append(...Object.entries(AXES).filter(([name]) => data.runs.every((run) => run.x[name])).map(([name, { label }]) => html("option", { value: name }, label)));
  axis.addEventListener("change", () => {
    view.axis = axis.value;
    drawAll();
  });
  const slider = document.getElementById("smoothing"), output = document.getElementById("smoothing-value");
  const longest = Math.max(...data.runs.map((run) => run.x.step.length * run.every));
  slider.max = Math.max(Math.round(longest / 4), 2);
  slider.value = Math.max(Math.round(longest / 25), 1);
  const smoothed = () => {
    view.smoothing = Number(slider.value);
    output.textContent = view.smoothing === 1 ? "1 step" : `${view.smoothing} steps`;
  };
  slider.addEventListener("input", () => {
    smoothed();
    drawAll();
  });
  smoothed();
  const theme = document.getElementById("theme");
  theme.addEventListener("change", () => {
    if (theme.value) document.documentElement.dataset.theme = theme.value;
    else delete document.documentElement.dataset.theme;
  });
}

function build() {
  document.getElementById("written").textContent = `${data.runs.length === 1 ? "One run" : `${data.runs.length} runs`}, written ${data.written}`;
  const averaged = data.runs.filter((run) => run.every > 1).map((run) => `of ${run.name}, ${run.every} steps make one point`);
  document.getElementById("legend-help").textContent = `Charts can be read with the keyboard: Tab to a chart, then the arrow keys.${averaged.length ? ` Long runs are thinned: ${averaged.join("; ")}.` : ""} Written by megatron-dppo report; this file needs no network.`;
  controls();
  const main = document.querySelector("main"), nav = document.querySelector("nav");
  for (const [id, title, note, make] of SECTIONS) {
    nav.append(html("a", { href: `#${id}` }, title));
    main.append(html("section", { id, "aria-label": title }, html("h2", {}, title), note ? html("p", { class: "note" }, note) : null, make()));
  }
  drawAll();
  let width = window.innerWidth;
  window.addEventListener("resize", () => {
    if (window.innerWidth !== width) drawAll();
    width = window.innerWidth;
  });
  document.documentElement.dataset.ready = "true";
}

build();

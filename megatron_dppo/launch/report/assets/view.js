// What the page shows of the data, and who has to draw again when that changes.

const data = JSON.parse(document.getElementById("data").textContent);
const view = { hidden: new Set(), axis: "step", smoothing: 1 };
const drawings = [];

/** Draw now, and whenever the view or the width changes. */
function drawn(draw) {
  drawings.push(draw);
}

function drawAll() {
  for (const draw of drawings) draw();
}

/** The runs that are shown, with the colour that each keeps. */
function shownRuns() {
  return data.runs.map((run, index) => ({ run, colour: `var(--run-${index % 8})` })).filter(({ run }) => !view.hidden.has(run.name));
}

/** How far along each point of a run is; its steps, where it does not know better. */
function along(run) {
  return run.x[view.axis] || run.x.step;
}

const AXES = {
  step: { label: "training step", text: (value) => `step ${plain(value, 6)}`, tick: (value) => plain(value, 6) },
  seconds: { label: "time in steps", text: seconds, tick: seconds },
  tokens: { label: "tokens seen", text: (value) => `${plain(value)} tokens`, tick: (value) => plain(value) },
};

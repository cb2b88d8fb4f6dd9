// Curves over training: smoothed, with a band of one standard deviation of what was averaged.

const DASHES = ["", "6 3", "2 3", "8 3 2 3", "1 4"];

/** The chart of a panel (panels.py); returns its figure. */
function lineChart(panel) {
  let log = panel.log;
  const toggle = html("button", { class: "small", type: "button", "aria-pressed": String(log), title: "logarithmic y-axis" }, "log");
  const { figure, legend, plot } = frame(panel.id, panel.title, panel.note, toggle);
  const caption = figure.querySelector("figcaption");
  toggle.addEventListener("click", () => {
    log = !log;
    toggle.setAttribute("aria-pressed", String(log));
    draw();
  });

  function draw() {
    const series = seriesOf(panel);
    caption.textContent = panel.note;
    if (!series.length) {
      legend.replaceChildren();
      return sayEmpty(plot, view.hidden.size === data.runs.length ? "All runs are switched off." : panel.absent);
    }
    const all = series.flatMap((one) => one.points);
    const isLog = log && all.some((point) => point.value > 0);
    const domain = domainOf(series, isLog, panel.unit);
    const xs = all.map((point) => point.x);
    const ends = [Math.min(...xs), Math.max(...xs)];
    if (ends[0] === ends[1]) ends[1] = ends[0] + 1;
    let x;
    const axis = AXES[view.axis];
    const drawing = plane(plot, {
      yDomain: domain,
      log: isLog,
      yUnit: panel.unit,
      yLabel: axisLabel(panel.quantity, panel.unit),
      xLabel: axis.label,
      xTicks: (inner) => {
        x = scaleOf(ends, [inner.left, inner.right]);
        return ticks(...ends, Math.max(Math.floor((inner.right - inner.left) / 64), 2)).map((value) => [x(value), axis.tick(value)]);
      },
    });
    const shapes = drawSeries(drawing, series, x, isLog, domain, panel);
    drawAlarms(drawing, x, panel);
    legend.replaceChildren(...legendOf(panel));
    const outside = all.filter((point) => point.value !== null && (point.value < domain[0] || point.value > domain[1])).length;
    if (outside) caption.textContent += ` ${outside} of ${all.length} values lie beyond the axis${isLog ? ", or are not above 0" : ""}.`;
    explore(drawing, shapes, series, x, panel);
  }

  drawn(draw);
  return figure;
}

/** Of each run and metric that has values: colour, dash, points {x, step, value, mean, low, high}. */
function seriesOf(panel) {
  const shown = shownRuns(), found = [];
  const several = data.runs.length > 1;
  for (const { run, colour } of shown) {
    Object.entries(panel.metrics).forEach(([name, label], index) => {
      const values = run.metrics[name];
      if (!values || !values.some((value) => value !== null)) return;
      const places = along(run);
      const points = values.map((value, at) => ({ x: places[at], step: run.x.step[at], value })).filter((point) => point.value !== null);
      smooth(points, panel.points ? 1 : Math.max(Math.round(view.smoothing / run.every), 1));
      const many = Object.keys(panel.metrics).length > 1;
      found.push({
        run: run.name,
        label: several ? (many ? `${run.name}: ${label}` : run.name) : label,
        colour: several ? colour : `var(--run-${index % 8})`,
        dash: several ? DASHES[index % DASHES.length] : "",
        points,
      });
    });
  }
  return found;
}

/** Centred means over a window of points, and the standard deviation of what each is made of. */
function smooth(points, window) {
  const before = Math.floor((window - 1) / 2), after = Math.ceil((window - 1) / 2);
  points.forEach((point, at) => {
    const near = points.slice(Math.max(at - before, 0), at + after + 1).map((other) => other.value);
    point.mean = near.reduce((sum, value) => sum + value, 0) / near.length;
    const spread = Math.sqrt(near.reduce((sum, value) => sum + (value - point.mean) ** 2, 0) / near.length);
    point.low = point.mean - spread;
    point.high = point.mean + spread;
  });
}

/** What the y-axis has to hold: everything but the outermost hundredth, which would flatten the rest. */
function domainOf(series, log, unit) {
  const values = series.flatMap((one) => one.points.flatMap((point) => [point.value, point.mean]));
  const usable = values.filter((value) => Number.isFinite(value) && (!log || value > 0)).sort((a, b) => a - b);
  let low = quantile(usable, 0.01), high = quantile(usable, 0.99);
  const least = usable[0], most = usable[usable.length - 1];
  if (log ? most / high < high / low : most - high < high - low) high = most;
  if (log ? low / least < high / low : low - least < high - low) low = least;
  if (log) return low === high ? [low / 2, high * 2] : [low / 1.2, high * 1.2];
  if (low === high) return low === 0 ? [0, 1] : [Math.min(low * 0.9, low * 1.1), Math.max(high * 0.9, high * 1.1)];
  if (unit === "share" || unit === "bytes" || (low >= 0 && low < 0.4 * high)) low = Math.min(low, 0);
  const room = (high - low) * 0.06;
  return [low === 0 ? 0 : low - room, high + room];
}

/** Draws bands, faint raw values and the curves; returns what is clipped to the plane. */
function drawSeries({ root, inner, y }, series, x, log, [low, high], panel) {
  const clip = `clip-${panel.id}`;
  root.append(svg("clipPath", { id: clip }, svg("rect", { x: inner.left - 4, y: inner.top - 4, width: inner.right - inner.left + 8, height: inner.bottom - inner.top + 5 })));
  const group = svg("g", { "clip-path": `url(#${clip})` });
  const clamped = (value) => y(Math.min(Math.max(value, log ? low / 10 : low - (high - low)), log ? high * 10 : high + (high - low)));
  const path = (points, of) => points.map((point, at) => `${at ? "L" : "M"}${x(point.x).toFixed(1)} ${clamped(of(point)).toFixed(1)}`).join("");
  for (const { points, colour, dash } of series) {
    const drawable = log ? points.filter((point) => point.mean > 0) : points;
    const style = { stroke: colour, fill: "none", "stroke-linejoin": "round" };
    if (!panel.points && view.smoothing > 1 && points.length > 2) {
      const upper = path(drawable, (point) => point.high), lower = path([...drawable].reverse(), (point) => Math.max(point.low, log ? low / 10 : -Infinity));
      group.append(svg("path", { d: `${upper}${lower.replace("M", "L")}Z`, fill: colour, opacity: 0.15 }));
    }
    group.append(svg("path", { ...style, d: path(drawable, (point) => point.mean), "stroke-width": 1.8, "stroke-dasharray": dash }));
    if (panel.points || points.length === 1) {
      group.append(...drawable.map((point) => svg("circle", { cx: x(point.x), cy: clamped(point.value), r: 3, fill: colour })));
    }
  }
  root.append(group);
  return group;
}

/** A dashed upright where a run raised an alarm about one of the panel's metrics. */
function drawAlarms({ root, inner }, x, panel) {
  for (const { run } of shownRuns()) {
    for (const alarm of run.alarms) {
      const metric = alarm.message.split(" ")[0];
      if (!Object.keys(panel.metrics).some((name) => name === metric || name.startsWith(`${metric}_`))) continue;
      const at = run.x.step.findIndex((step) => step >= alarm.step);
      const place = x(along(run)[at < 0 ? run.x.step.length - 1 : at]);
      root.append(svg("line", { class: "alarm", x1: place, x2: place, y1: inner.top, y2: inner.bottom }, svg("title", {}, alarm.message)));
    }
  }
}

/** Runs by their colours and metrics by their dashes; of a single run, metrics by their colours. */
function legendOf(panel) {
  const labels = Object.values(panel.metrics), several = data.runs.length > 1;
  const runs = several ? shownRuns().map(({ run, colour }) => html("span", {}, swatch(colour), run.name)) : [];
  const metrics = labels.length === 1 ? [] : labels.map((label, at) => {
    const line = { x1: 0, x2: 22, y1: 4, y2: 4, "stroke-width": 2, stroke: several ? "var(--soft)" : `var(--run-${at % 8})`, "stroke-dasharray": several ? DASHES[at % DASHES.length] : "" };
    return html("span", {}, svg("svg", { width: 22, height: 8 }, svg("line", line)), label);
  });
  return [...runs, ...metrics];
}

function explore({ root, inner, y }, shapes, series, x, panel) {
  const places = [...new Set(series.flatMap((one) => one.points.map((point) => point.x)))].sort((a, b) => a - b);
  const cursor = svg("line", { class: "cursor", y1: inner.top, y2: inner.bottom, visibility: "hidden" });
  root.append(cursor);
  const nearest = (points, place) => points.reduce((best, point) => (Math.abs(point.x - place) < Math.abs(best.x - place) ? point : best));
  explorable(
    root,
    `${panel.title}: ${series.map((one) => one.label).join(", ")}`,
    () => places.length,
    (pixel) => {
      const distances = places.map((place) => Math.abs(x(place) - pixel));
      return distances.indexOf(Math.min(...distances));
    },
    (at, spoken, pointerX, pointerY) => {
      const place = places[at], box = root.getBoundingClientRect();
      for (const [name, value] of Object.entries({ x1: x(place), x2: x(place), visibility: "visible" })) cursor.setAttribute(name, value);
      const rows = series.map((one) => {
        const point = nearest(one.points, place);
        const isMean = !panel.points && view.smoothing > 1;
        const text = isMean ? `${withUnit(point.mean, panel.unit)} (single: ${withUnit(point.value, panel.unit)})` : withUnit(point.value, panel.unit);
        return [one.colour, one.label, text];
      });
      tooltip.show(pointerX ?? box.left + x(place), pointerY ?? box.top + 30, AXES[view.axis].text(place), rows, spoken);
    },
    () => {
      cursor.setAttribute("visibility", "hidden");
      tooltip.hide();
    },
  );
}

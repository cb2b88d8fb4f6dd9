// How the runs' configurations differ from each other, or a single run's from the defaults.

function configuration() {
  const table = html("div", { class: "scroll" });
  const all = html("input", { type: "checkbox", id: "all-options" });
  const search = html("input", { type: "search", id: "option-search", placeholder: "part of an option's name", "aria-label": "search options" });
  const note = html("p", { class: "note" });

  function draw() {
    const runs = data.runs.filter((run) => Object.keys(run.config).length && !view.hidden.has(run.name));
    if (!runs.length) {
      note.textContent = "";
      return sayEmpty(table, view.hidden.size === data.runs.length ? "All runs are switched off." : "No run has a config.yaml.");
    }
    const keys = [...new Set(runs.flatMap((run) => Object.keys(run.config)))];
    const columns = [...runs.map((run) => [run.name, run.config]), ["default", data.defaults]];
    const differs = (key) => (runs.length > 1 ? new Set(runs.map((run) => run.config[key])).size > 1 : runs[0].config[key] !== data.defaults[key]);
    const wanted = keys.filter((key) => (all.checked || differs(key)) && key.includes(search.value.trim()));
    note.textContent = runs.length > 1 ? `${keys.filter(differs).length} of ${keys.length} options differ between the runs that are shown.` : `${keys.filter(differs).length} of ${keys.length} options differ from their defaults.`;
    if (!wanted.length) return sayEmpty(table, search.value ? "No option has that in its name." : "The configurations are the same.");
    const head = html("tr", {}, html("th", {}, "option"), columns.map(([name]) => html("th", {}, name)));
    const rows = wanted.map((key) => {
      const cells = columns.map(([, config]) => html("td", { class: `key${config !== data.defaults && differs(key) ? " different" : ""}` }, key in config ? config[key] : "–"));
      return html("tr", {}, html("td", { class: "key" }, key), cells);
    });
    table.replaceChildren(html("table", {}, html("thead", {}, head), html("tbody", {}, rows)));
  }

  all.addEventListener("change", draw);
  search.addEventListener("input", draw);
  drawn(draw);
  return html("div", { "data-panel": "configuration" }, note, html("div", { class: "toolbar" }, html("label", {}, all, "all options"), search), table);
}

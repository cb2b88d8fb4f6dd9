// What stands beside the pointer, or is read out where the keyboard moved to.

const tooltip = {
  /** Rows are [colour or null, label, value]; x and y are of the window. */
  show(x, y, title, rows, spoken = false) {
    const box = document.getElementById("tooltip");
    const lines = rows.map(([colour, label, value]) =>
      html("tr", {}, html("td", {}, colour ? swatch(colour) : "", label), html("td", { class: "number" }, value)),
    );
    box.replaceChildren(html("b", {}, title), html("table", {}, html("tbody", {}, lines)));
    box.hidden = false;
    const { width, height } = box.getBoundingClientRect();
    const left = x + 16 + width > window.innerWidth ? x - width - 16 : x + 16;
    box.style.left = `${Math.max(left, 4)}px`;
    box.style.top = `${Math.max(Math.min(y + 12, window.innerHeight - height - 6), 4)}px`;
    if (spoken) {
      document.getElementById("spoken").textContent = `${title}: ${rows.map((row) => `${row[1]} ${row[2]}`).join(", ")}`;
    }
  },
  hide() {
    document.getElementById("tooltip").hidden = true;
  },
};

/**
 * Lets pointer and arrow keys move through the places of a drawing.
 * place(x): the index under a pointer at x pixels; point(index, spoken): show it; clear(): show none.
 */
function explorable(element, label, count, place, point, clear) {
  let at = -1;
  element.setAttribute("tabindex", "0");
  element.setAttribute("role", "img");
  element.setAttribute("aria-label", `${label}. Arrow keys read the values.`);
  element.addEventListener("pointermove", (event) => {
    at = place(event.clientX - element.getBoundingClientRect().left);
    point(at, false, event.clientX, event.clientY);
  });
  element.addEventListener("pointerleave", clear);
  element.addEventListener("blur", clear);
  element.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10, Home: -count(), End: count() };
    if (event.key === "Escape") return clear();
    if (!(event.key in moves)) return;
    event.preventDefault();
    at = Math.min(Math.max((at < 0 ? (moves[event.key] > 0 ? -1 : count()) : at) + moves[event.key], 0), count() - 1);
    point(at, true);
  });
}

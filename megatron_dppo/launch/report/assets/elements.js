// Elements of the page and of its drawings.

const SVG_NAMESPACE = "http://www.w3.org/2000/svg";

/** An HTML element with attributes ("on..." are listeners) and children, texts or elements. */
function html(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

/** The same in SVG. */
function svg(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG_NAMESPACE, tag), attributes, children);
}

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return element;
}

/** The sample of a colour that stands before a name. */
function swatch(colour) {
  return html("span", { class: "swatch", style: `--colour: ${colour}` });
}

/** A chart's frame: heading, legend, place for the drawing, caption. */
function frame(id, title, caption, ...buttons) {
  const legend = html("div", { class: "legend" });
  const plot = html("div", { class: "plot" });
  const figure = html(
    "figure",
    { "data-panel": id },
    html("div", { class: "top" }, html("h3", {}, title), html("span", {}, buttons)),
    legend,
    plot,
    html("figcaption", {}, caption),
  );
  return { figure, legend, plot };
}

/** Says in words why there is no drawing. */
function sayEmpty(plot, words) {
  plot.replaceChildren(html("p", { class: "empty" }, words));
}

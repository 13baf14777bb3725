"use strict";
// What the scripts of all pages share.
const find = (id) => document.getElementById(id);

// Create elements. Strings become text, never HTML, because song names may contain anything.
const make = (space) => (tag, attributes = {}, ...children) => {
  const element = space ? document.createElementNS(space, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null));
  return element;
};
const h = make(null);
const s = make("http://www.w3.org/2000/svg");

// Adding 0 removes the sign of -0.
const rounded = (value, digits) => Number(value.toFixed(digits)) + 0;
const number = (value, digits) => (value == null ? "–" : rounded(value, digits).toFixed(digits).replace("-", "−"));
const within = (value, low, high) => Math.min(Math.max(value, low), high);

function quantile(sorted, part) {
  const place = (sorted.length - 1) * part;
  const low = Math.floor(place);
  return sorted[low] + (sorted[Math.min(low + 1, sorted.length - 1)] - sorted[low]) * (place - low);
}

// The round distance between the ticks of an axis that has at most this many of them.
function tickStep(span, most) {
  const rough = span / most;
  const power = 10 ** Math.floor(Math.log10(rough));
  return [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
}

// Below each table: a hint while more of its columns are to the right.
for (const table of document.querySelectorAll(".scroll > table")) {
  const scroller = table.parentNode;
  const hint = h("p", { class: "more" }, "Scroll the table to the right to see more columns.");
  scroller.after(hint);
  const update = () => {
    hint.hidden = scroller.scrollWidth - scroller.clientWidth - scroller.scrollLeft < 8;
  };
  scroller.addEventListener("scroll", update, { passive: true });
  const sizes = new ResizeObserver(update);
  sizes.observe(scroller);
  sizes.observe(table);
  update();
}

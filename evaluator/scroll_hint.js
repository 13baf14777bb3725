"use strict";
// Below each table: a hint while more of its columns are to the right.
for (const table of document.querySelectorAll(".scroll > table")) {
  const scroller = table.parentNode;
  const hint = document.createElement("p");
  hint.className = "more";
  hint.textContent = "Scroll the table to the right to see more columns.";
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

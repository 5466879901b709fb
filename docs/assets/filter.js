"use strict";
// A long table gets a field that keeps the rows which hold every word that is typed.
const LONG = 40;

function filtered(table) {
  const rows = [...table.tBodies[0].rows];
  const field = document.createElement("input");
  field.type = "search";
  field.className = "table-filter";
  field.placeholder = `filter ${rows.length} rows: bert masked`;
  field.setAttribute("aria-label", "filter the rows of the table below");
  field.addEventListener("input", () => {
    const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
    }
  });
  (table.closest(".md-typeset__scrollwrap") || table).before(field);
}

for (const table of document.querySelectorAll(".md-typeset table")) {
  if (table.tBodies.length && table.tBodies[0].rows.length > LONG) filtered(table);
}

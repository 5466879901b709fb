"use strict";
const picks = document.querySelectorAll(".dial input");
const told = document.getElementById("told");

function pick(input) {
  const level = Number(input.dataset.rung);
  for (const mark of document.querySelectorAll("[data-level]")) {
    mark.classList.toggle("beyond", Number(mark.dataset.level) > level);
  }
  for (const row of document.querySelectorAll("tr[data-rung]")) {
    row.classList.toggle("picked", Number(row.dataset.rung) === level);
  }
  told.textContent = input.dataset.told;
}

for (const input of picks) input.addEventListener("change", () => pick(input));
const start = [...picks].find((input) => input.value === location.hash.slice(1)) || picks[picks.length - 1];
if (start) {
  start.checked = true;
  pick(start);
}

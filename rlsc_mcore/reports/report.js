"use strict";
// Filters, sorting, hover values and the theme switch; the page reads without them.
(() => {
  const byId = (id) => document.getElementById(id);
  const theme = byId("theme");
  theme.hidden = false;
  theme.addEventListener("click", () => {
    const dark = matchMedia("(prefers-color-scheme: dark)").matches;
    const now = document.documentElement.dataset.theme || (dark ? "dark" : "light");
    document.documentElement.dataset.theme = now === "dark" ? "light" : "dark";
  });

  const tip = byId("tip");
  document.addEventListener("pointerover", (event) => {
    const title = event.target instanceof Element && event.target.closest("svg") && event.target.querySelector(":scope > title");
    tip.hidden = !title;
    if (!title) return;
    tip.textContent = title.textContent;
    const box = event.target.getBoundingClientRect();
    const left = Math.min(box.left + box.width / 2, innerWidth - tip.offsetWidth - 8);
    tip.style.left = `${Math.max(8, left)}px`;
    tip.style.top = `${box.top > 60 ? box.top - tip.offsetHeight - 8 : box.bottom + 8}px`;
  });
  document.addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });

  const controls = byId("controls");
  if (!controls) return;
  controls.hidden = false;
  const lists = [...document.querySelectorAll(".questions")];
  const keys = {
    moved: (q) => -q.dataset.moved,
    up: (q) => -q.dataset.delta,
    down: (q) => +q.dataset.delta,
    index: (q) => +q.dataset.index,
  };
  const shown = {
    all: () => true,
    up: (q) => q.dataset.delta > 0,
    down: (q) => q.dataset.delta < 0,
    same: (q) => +q.dataset.delta === 0,
  };
  const update = () => {
    const words = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const key = keys[byId("sort").value];
    let count = 0;
    let total = 0;
    for (const list of lists) {
      const questions = [...list.children].sort((a, b) => key(a) - key(b));
      for (const question of questions) {
        const visible = shown[byId("show").value](question) && words.every((word) => question.dataset.search.includes(word));
        question.hidden = !visible;
        count += visible;
        total += 1;
      }
      list.append(...questions);
    }
    byId("count").textContent = `${count} of ${total} questions`;
  };
  controls.addEventListener("input", update);
  controls.addEventListener("submit", (event) => event.preventDefault());
  byId("raw").addEventListener("change", (event) => document.body.classList.toggle("as-typed", event.target.checked));
  update();
})();

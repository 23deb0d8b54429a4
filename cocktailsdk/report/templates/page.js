"use strict";
(() => {
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const tip = document.getElementById("tip");
  const boxes = all("input[name=pattern]");
  const search = document.getElementById("search");
  const status = document.getElementById("shown");

  // Filters: what has a pattern that is not chosen, or another name than what is searched for, is taken away.
  const networks = new Set(all("[data-network]").map((e) => e.dataset.network));
  const filter = () => {
    const off = new Set(boxes.filter((b) => !b.checked).map((b) => b.value));
    const wanted = search.value.trim().toLowerCase();
    const shown = new Set();
    for (const element of all("[data-pattern], [data-network]")) {
      const { pattern, network } = element.dataset;
      const hidden = off.has(pattern) || (network !== undefined && !network.toLowerCase().includes(wanted));
      element.classList.toggle("off", hidden);
      if (!hidden && pattern !== undefined && network !== undefined) shown.add(network);
    }
    for (const svg of all("figure > svg")) stop(svg);
    status.textContent = `${shown.size} of ${networks.size} networks shown`;
  };

  // Keys: one stop for each chart, arrows go from mark to mark.
  const marks = (svg) => all(".mark:not(.off)", svg);
  const stop = (svg, chosen) => {
    for (const mark of all(".mark", svg)) mark.setAttribute("tabindex", "-1");
    const first = chosen || marks(svg)[0];
    if (first) first.setAttribute("tabindex", "0");
  };
  const go = (event) => {
    const svg = event.currentTarget;
    const here = marks(svg);
    const at = here.indexOf(event.target.closest(".mark"));
    if (event.key === "Escape") return hide();
    if (event.key === "Enter" || event.key === " ") { event.preventDefault(); return open(event.target); }
    const next = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: here.length - 1 }[event.key];
    if (at < 0 || next === undefined) return undefined;
    event.preventDefault();
    const mark = here[(next + here.length) % here.length];
    stop(svg, mark);
    mark.focus();
    return undefined;
  };

  // What a mark says, beside it.
  const show = (mark) => {
    const spot = (mark.querySelector(".spot") || mark).getBoundingClientRect();
    tip.textContent = mark.dataset.told;
    tip.hidden = false;
    const size = tip.getBoundingClientRect();
    const left = Math.min(Math.max(8, spot.left + spot.width / 2 - size.width / 2), window.innerWidth - size.width - 8);
    const above = spot.top - size.height - 6;
    tip.style.left = `${Math.max(8, left)}px`;
    tip.style.top = `${above > 8 ? above : spot.bottom + 6}px`;
  };
  const hide = () => { tip.hidden = true; };
  const open = (target) => {
    const mark = target.closest(".mark");
    const prefix = mark && mark.closest("svg").dataset.run;
    const row = mark && mark.dataset.network && document.querySelector(`tr[data-run="${prefix}"][data-row="${CSS.escape(mark.dataset.network)}"]`);
    if (row) window.location.hash = row.id;
  };
  for (const svg of all("figure > svg")) {
    svg.addEventListener("keydown", go);
    for (const mark of all(".mark", svg)) {
      mark.addEventListener("mouseenter", () => show(mark));
      mark.addEventListener("focus", () => show(mark));
      mark.addEventListener("mouseleave", hide);
      mark.addEventListener("blur", hide);
      mark.addEventListener("click", () => show(mark));
      mark.addEventListener("dblclick", () => open(mark));
    }
  }
  window.addEventListener("scroll", hide, { passive: true });

  // Tables are sorted by what their columns say.
  for (const button of all("th button")) {
    button.addEventListener("click", () => {
      const head = button.closest("th");
      const table = button.closest("table");
      const column = head.cellIndex;
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of all("th[aria-sort]", table)) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const value = (row) => { const cell = row.cells[column]; return cell.dataset.value !== undefined ? Number(cell.dataset.value) : cell.textContent; };
      const order = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b)));
      const body = table.tBodies[0];
      const rows = [...body.rows].sort((a, b) => (down ? -1 : 1) * order(value(a), value(b)));
      body.append(...rows);
    });
  }

  // Commands are copied; pages that were opened from a file may have no clipboard, then they are selected.
  for (const button of all(".copy")) {
    button.addEventListener("click", async () => {
      const code = button.parentElement.querySelector("code");
      try {
        await navigator.clipboard.writeText(code.textContent);
        button.textContent = "copied";
      } catch {
        window.getSelection().selectAllChildren(code);
      }
    });
  }
  for (const box of boxes) box.addEventListener("change", filter);
  search.addEventListener("input", filter);
  document.querySelector(".filters").hidden = false;
  filter();
})();

"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const drawer = $("drawer");
  let opener = null; // where the focus goes back to

  // The page's address names the open drawer, so that a link to it can be sent and Back closes it.
  const named = () => {
    try { return $(decodeURIComponent(location.hash.slice(1))); } catch { return null; }
  };
  const follow = () => {
    const target = named();
    if (target instanceof HTMLTemplateElement) {
      $("drawer-title").textContent = target.dataset.title;
      $("drawer-body").replaceChildren(target.content.cloneNode(true));
      if (!drawer.open) drawer.showModal();
      drawer.scrollTop = 0;
      return;
    }
    if (drawer.open) drawer.close();
    for (let at = target; at; at = at.parentElement) if (at.matches("details")) at.open = true;
    if (target) target.scrollIntoView();
  };
  drawer.addEventListener("close", () => {
    if (named() instanceof HTMLTemplateElement) history.replaceState(null, "", location.pathname + location.search);
    $("drawer-body").replaceChildren();
    if (opener) opener.focus({ preventScroll: true });
  });
  addEventListener("click", (event) => {
    if (!drawer.open) opener = event.target.closest("a, button");
  }, true);
  drawer.addEventListener("click", (event) => { if (event.target === drawer) drawer.close(); });
  $("drawer-close").addEventListener("click", () => drawer.close());
  all("[data-drawer]").forEach((button) => button.addEventListener("click", () => {
    if (location.hash === "#" + button.dataset.drawer) follow();
    else location.hash = button.dataset.drawer;
  }));
  addEventListener("hashchange", follow);

  // Confusion matrix: counts or shares; one stop for Tab, arrow keys inside.
  all(".confusion").forEach((box) => {
    all("input", box).forEach((radio) => radio.addEventListener("change", () => { box.dataset.show = radio.value; }));
    const rows = all("tbody tr", box).map((row) => all("td", row).map((td) => td.querySelector("button")));
    const buttons = rows.flat().filter(Boolean);
    buttons.forEach((button, i) => { button.tabIndex = i ? -1 : 0; });
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    box.addEventListener("keydown", (event) => {
      const move = moves[event.key];
      let r = rows.findIndex((row) => row.includes(event.target));
      if (!move || r < 0) return;
      let c = rows[r].indexOf(event.target);
      event.preventDefault();
      do { r += move[0]; c += move[1]; } while (rows[r] && c >= 0 && c < rows[r].length && !rows[r][c]);
      if (rows[r] && rows[r][c]) rows[r][c].focus();
    });
    box.addEventListener("focusin", (event) => {
      if (buttons.includes(event.target)) buttons.forEach((b) => { b.tabIndex = b === event.target ? 0 : -1; });
    });
  });

  // Tables: a header sorts, a second time the other way.
  all("table.sortable").forEach((table) => all("thead th", table).forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") === "descending" || !(head.classList.contains("n") || head.hasAttribute("aria-sort"));
      const key = (row) => row.cells[column].dataset.v ?? row.cells[column].textContent;
      const compare = (a, b) => (isNaN(a) || isNaN(b) ? String(a).localeCompare(b) : a - b);
      const rows = all("tbody tr", table).sort((a, b) => compare(key(a), key(b)) * (up ? 1 : -1));
      all("th", head.parentElement).forEach((th) => th.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      table.tBodies[0].append(...rows);
    });
  }));

  // Photographs or the maps drawn over them: all switches are one.
  const switches = all(".overlay-switch input");
  switches.forEach((box) => box.addEventListener("change", () => {
    document.body.classList.toggle("overlaid", box.checked);
    switches.forEach((other) => { other.checked = box.checked; });
  }));

  // Paper has no buttons: everything is open while printing.
  let folded = [];
  addEventListener("beforeprint", () => {
    folded = all("details.part:not([open])");
    folded.forEach((part) => { part.open = true; });
  });
  addEventListener("afterprint", () => folded.forEach((part) => { part.open = false; }));

  follow();
})();

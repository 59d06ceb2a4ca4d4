// Comfort for the page of a cache: without it everything is there, but for the keys, the shard map's names, enlarging, and features over views.
(() => {
  const { all, one, keys } = kdcachePage;

  // --- samples
  const samples = all(".sample");
  const go = (step) => {
    if (!samples.length) return;
    const top = one("nav.bar").getBoundingClientRect().bottom + 24;
    const focused = samples.findIndex((sample) => sample.contains(document.activeElement));
    let now = focused;
    if (focused < 0 || Math.abs(samples[focused].getBoundingClientRect().top - top) > window.innerHeight) {
      now = samples.filter((sample) => sample.getBoundingClientRect().top <= top).length - 1;
    }
    const next = samples[Math.min(samples.length - 1, Math.max(0, now + step))];
    next.focus({ preventScroll: true });
    next.scrollIntoView({ block: "start" });
  };

  // --- a view's own box
  for (const sample of samples) {
    const boxes = all(".source [data-view]", sample);
    const choose = (number) => boxes.forEach((found) => found.classList.toggle("dim", number !== undefined && found.dataset.view !== number));
    for (const view of all(".view", sample)) {
      for (const event of ["pointerenter", "focusin"]) view.addEventListener(event, () => choose(view.dataset.view));
      for (const event of ["pointerleave", "focusout"]) view.addEventListener(event, () => choose(undefined));
    }
  }

  // --- features over views
  const choices = all("#choose input");
  const lay = (value) => {
    all(".view").forEach((view) => {
      const stack = one(".stack", view);
      if (!stack) return;
      const tile = value && all("[data-map]", view).find((image) => image.dataset.map === value);
      one(".laid", stack)?.remove();
      if (!tile) return;
      const image = document.createElement("img");
      image.src = tile.src;
      image.alt = tile.alt;
      image.className = "laid exact";
      stack.append(image);
    });
    all("[data-map]").forEach((image) => image.parentElement.classList.toggle("chosen", image.dataset.map === value));
  };
  choices.forEach((input) => input.addEventListener("change", () => lay(input.value)));
  const nextChoice = () => {
    if (!choices.length) return;
    const input = choices[(choices.findIndex((found) => found.checked) + 1) % choices.length];
    input.checked = true;
    lay(input.value);
  };

  // --- one view, large
  const large = one("#large");
  const views = all(".zoom");
  let shown = -1;
  const enlarge = (number) => {
    shown = (number + views.length) % views.length;
    const view = views[shown].closest(".view");
    one(".stack", large).replaceChildren(...all(".stack > *", views[shown]).map((part) => part.cloneNode(true)));
    one("p", large).textContent = one("img", views[shown]).alt;
    large.setAttribute("aria-label", one(".name", view).textContent);
    if (!large.open) large.showModal();
  };
  views.forEach((button, number) => button.addEventListener("click", () => enlarge(number)));
  large.addEventListener("click", (event) => { if (event.target === large) large.close(); });
  large.addEventListener("close", () => views[shown]?.focus());

  // --- shard map
  const map = one("#map");
  if (map) {
    const columns = Number(map.dataset.columns);
    const names = JSON.parse(map.dataset.names).flatMap((run) => run.length === 1 ? run
      : Array.from({ length: run[2] }, (_, i) => run[0] + String(run[1] + i).padStart(run[3], "0")));
    const drawing = one("svg", map), cursor = one("#cursor"), says = one("#map-says");
    let at = -1;
    const stateAt = (i) => {
      const point = drawing.createSVGPoint();
      point.x = (i % columns) + 0.5;
      point.y = Math.floor(i / columns) + 0.5;
      return all(".cell", drawing).find((path) => path.isPointInFill(point))?.dataset.state ?? "";
    };
    const point = (i) => {
      if (i < 0 || i >= names.length) return;
      at = i;
      cursor.setAttribute("x", i % columns);
      cursor.setAttribute("y", Math.floor(i / columns));
      cursor.setAttribute("visibility", "visible");
      const name = document.createElement("bdi");
      name.textContent = names[i].replace(/[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}]/gu, (c) => "\\u" + c.codePointAt(0).toString(16).padStart(4, "0"));
      says.replaceChildren(name, `: ${stateAt(i)}`);
    };
    drawing.addEventListener("pointermove", (event) => {
      const frame = drawing.getBoundingClientRect();
      const side = frame.width / columns;
      point(Math.floor((event.clientY - frame.top) / side) * columns + Math.min(columns - 1, Math.floor((event.clientX - frame.left) / side)));
    });
    map.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
      if (step === undefined) return;
      point(at < 0 ? 0 : Math.min(names.length - 1, Math.max(0, at + step)));
      event.preventDefault();
      event.stopPropagation();
    });
  }

  // --- keys
  document.addEventListener("keydown", (event) => {
    if (!large.open || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "ArrowRight" || event.key === "j") enlarge(shown + 1);
    if (event.key === "ArrowLeft" || event.key === "k") enlarge(shown - 1);
  });
  Object.assign(keys, { j: () => go(1), ArrowRight: () => go(1), k: () => go(-1), ArrowLeft: () => go(-1), m: nextChoice });
})();

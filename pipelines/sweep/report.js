// Comfort for the report of a sweep: which run is pointed at, in all charts at once, and one method alone.
(() => {
  const { all, one, keys } = kdcachePage;

  // --- the run that is pointed at or in focus: marked in every chart, and told below the chart
  const marks = all("a.run");
  const point = (mark) => {
    for (const other of marks) other.classList.toggle("same", Boolean(mark) && other.getAttribute("href") === mark.getAttribute("href"));
    if (!mark) return;
    const says = one(".says", mark.closest("section"));
    if (says) says.textContent = mark.getAttribute("aria-label");
  };
  for (const mark of marks) {
    for (const event of ["pointerenter", "focus"]) mark.addEventListener(event, () => point(mark));
    for (const event of ["pointerleave", "blur"]) mark.addEventListener(event, () => point(null));
  }

  // --- one method alone
  const choices = all("#methods input");
  if (choices.length) one("#kinds")?.classList.add("on-paper"); // they say the same
  const show = (method) => {
    for (const thing of all("#accuracy a.run, #curves a.run, .runs tr[data-group]")) thing.classList.toggle("dim", method !== "" && thing.dataset.group !== method);
  };
  choices.forEach((input) => input.addEventListener("change", () => show(input.value)));
  keys.m = () => {
    if (!choices.length) return;
    const next = choices[(choices.findIndex((found) => found.checked) + 1) % choices.length];
    next.checked = true;
    show(next.value);
  };
})();

// Starts the explorer, and ties the controls to it.

function digits(v) {
  if (!isFinite(v)) return "–";
  const size = Math.abs(v);
  const shown = size === 0 || Number.isInteger(v) ? v.toLocaleString("en")
    : size >= 1e-3 && size < 1e5 ? Number(v.toPrecision(4)).toString() : v.toExponential(2);
  return shown.replace("-", "−");
}
const titleOf = name => index.numbers.find(n => n.name === name)?.title || name;

const waiting = new Set();
function soon(run) { // once a frame
  if (waiting.has(run)) return;
  waiting.add(run);
  requestAnimationFrame(() => { waiting.delete(run); run(); });
}
function tip(i, px, py) {
  const box = byId("tip");
  box.hidden = i < 0;
  if (i < 0) return;
  box.textContent = `${rows.ids[i]} · ${rows.starts[i]}\n${titleOf(plot.x)} ${digits(rows.numbers[plot.x][i])}, `
    + `${titleOf(plot.y)} ${digits(rows.numbers[plot.y][i])}, rank ${choice.rank[i].toLocaleString("en")}`;
  const [width] = size();
  box.style.left = `${Math.min(px + 14, Math.max(0, width - 330))}px`;
  box.style.top = `${py + 14}px`;
}

function chosenChanged() {
  choose();
  counted = null;
  for (const name of ["decision", "rank", "quadrant"]) orders.delete(name);
  const chosen = choice.chosen.reduce((n, v) => n + v, 0), was = rows.numbers.selected;
  const same = choice.chosen.reduce((n, v, i) => n + (v && was[i] ? 1 : 0), 0);
  const changed = choice.chosen.some((v, i) => !v !== !was[i]);
  byId("budget-text").textContent = `= ${choice.keep.toLocaleString("en")} rows`;
  if (document.activeElement !== byId("percent"))
    byId("percent").value = Number((100 * choice.keep / rows.count).toPrecision(3));
  byId("state").textContent = !changed ? "As the run selected." :
    `Changed: ${chosen.toLocaleString("en")} rows, ${same.toLocaleString("en")} of them selected by the run`
    + (choice.edits.size ? `, ${choice.edits.size} decided by hand.` : ".");
  byId("reset").hidden = !changed && !moved();
  if (moved()) byId("state").textContent += ` Thresholds: difficulty ${digits(choice.thresholds.difficulty)}, influence ${digits(choice.thresholds.influence)}.`;
  filterChanged();
  compareMethods();
}
const budgetOf = percent => Math.max(1, Math.floor(rows.count * percent / 100 + 0.5));
const slide = keep => Math.log10(100 * keep / rows.count); // the slider is logarithmic

function fill(select, options, chosen) {
  for (const [value, title] of options) select.add(new Option(title, value, false, value === chosen));
}
function controls() {
  const numbers = index.numbers.filter(n => !n.hidden).map(n => [n.name, n.title]);
  const places = index.methods.map(name => [`rank by ${name}`, `rank by ${name}`]);
  Object.assign(plot, { x: rows.numbers.difficulty ? "difficulty" : "tokens", y: "influence" }, index.view);
  fill(byId("x"), [...numbers, ...places], plot.x);
  fill(byId("y"), [...numbers, ...places], plot.y);
  const groups = index.groups.map(g => [g.name, g.name]);
  fill(byId("color"), [["selected", "selected"], ["quadrant", "quadrant"], ...groups, ...numbers], plot.color);
  fill(byId("range"), [["", "any range"], ...numbers, ["rank", "rank"]], "");
  fill(byId("method"), [[RUN, `${RUN} (the run)`], ...index.methods.filter(m => m !== RUN).map(m => [m, m])], RUN);
  const every = [["", "any group"]];
  for (const { name, labels } of index.groups)
    labels.forEach((label, code) => every.push([`${name}=${code}`, `${name}: ${label || "(none)"}`]));
  fill(byId("group"), every, "");
  for (const axis of ["x", "y"])
    byId(axis).onchange = event => { plot[axis] = event.target.value; plot.lasso = null; resetView(); filterChanged(); };
  byId("color").onchange = event => { plot.color = event.target.value; draw(); };
  byId("method").onchange = event => { choice.method = event.target.value; chosenChanged(); };
  for (const name of ["only", "group", "range", "low", "high"]) byId(name).oninput = () => soon(filterChanged);
  const slider = byId("budget");
  slider.min = slide(1);
  slider.value = slide(choice.keep);
  const budget = percent => { choice.keep = Math.min(rows.count, budgetOf(percent)); soon(chosenChanged); };
  slider.oninput = () => budget(10 ** slider.value);
  byId("percent").oninput = event => {
    if (!(event.target.value > 0)) return;
    budget(Number(event.target.value));
    slider.value = slide(choice.keep);
  };
  byId("lasso").onclick = event => {
    plot.tool = plot.tool === "lasso" ? "move" : "lasso";
    event.target.setAttribute("aria-pressed", plot.tool === "lasso");
  };
  byId("unlasso").onclick = () => { plot.lasso = null; filterChanged(); };
  byId("home").onclick = () => { resetView(); draw(); };
  byId("reset").onclick = () => {
    Object.assign(choice, { keep: index.keep, method: RUN, thresholds: { ...index.thresholds } });
    for (const i of [...choice.edits.keys()]) decide(i, null);
    byId("method").value = RUN;
    slider.value = slide(choice.keep);
    chosenChanged();
  };
  byId("export-selection").onclick = () => download("selection.jsonl", jsonLines(chosenRows()));
  byId("export-edits").onclick = () => download("edits.jsonl", jsonLines(editRows()));
  byId("export-filtered").onclick = () =>
    download("filtered.jsonl", jsonLines([...filtered.rows].map(i => ({ example_id: rows.ids[i] }))));
  for (const kind of ["png", "svg", "csv"]) byId(kind).onclick = saved[kind];
  byId("search").oninput = event => search(event.target.value, (mask, share) => {
    filtered.matches = mask;
    byId("progress").textContent = share < 1 ? `searched ${Math.round(100 * share)} %` : "";
    filterChanged();
  }).catch(error => { byId("progress").textContent = unread(error); });
  holder.onscroll = () => soon(lines);
  body.onclick = event => {
    const line = event.target.closest("[data-row]");
    if (line) open(Number(line.dataset.row));
  };
  byId("help").onclick = () => byId("keys").showModal();
  byId("methods-fold")?.addEventListener("toggle", compareMethods);
  document.addEventListener("keydown", event => {
    if (event.target.matches("input, select, textarea, dialog *") || event.ctrlKey || event.metaKey || event.altKey) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    const keys = {
      j: () => step(1), k: () => step(-1), "/": () => byId("search").focus(), Escape: closeReader,
      l: () => byId("lasso").click(), "?": () => byId("keys").showModal(), c: () => [...panel.querySelectorAll("button")].find(b => b.textContent === "Copy")?.click(),
    };
    if (keys[event.key]) { event.preventDefault(); keys[event.key](); }
  });
}
function drawLegend(names, tally) {
  const list = byId("legend");
  list.replaceChildren(...names.map(([name, shade], k) => {
    const item = element("span", "", `${name} (${tally[k].toLocaleString("en")})`);
    item.prepend(Object.assign(element("i"), { style: `background:${shade}` }));
    return item;
  }));
}
function linked() {
  const id = decodeURIComponent((location.hash.match(/^#row=(.*)$/) || [])[1] || "");
  if (rows.place.has(id)) open(rows.place.get(id), { scroll: true });
}

load().then(() => {
  recall();
  headers();
  controls();
  resetView();
  chosenChanged();
  listen();
  linked();
  addEventListener("hashchange", linked);
  byId("explorer").dataset.ready = "yes";
}).catch(error => {
  byId("state").textContent = location.protocol === "file:" && !byId("blob-0")
    ? "This report's rows are files beside it, which a browser reads only from a server: run `diq view` on the run's folder."
    : unread(error);
});

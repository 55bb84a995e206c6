// Methods side by side, at the budget that is set: how much they share, and what kind of row each takes.

const MOST_SETS = 6, MOST_PATTERNS = 12;

function inside(name) {
  const ranks = rows.numbers[`rank by ${name}`];
  return Uint8Array.from(ranks, rank => rank <= choice.keep ? 1 : 0);
}
function compareMethods() {
  const holder = byId("methods");
  if (!holder || !byId("methods-fold").open) return;
  const sets = index.methods.map(inside);
  holder.replaceChildren(...sheet("methods", overlapTable(sets)), ...sheet("overlap", upset(sets)));
}
function sheet(name, table) {
  const scroll = element("div", "scroll"), said = element("p", "soft caption", table.caption.textContent), saves = element("div", "actions");
  const lines = () => [...table.rows].map(line => csvLine([...line.cells].map(cell => cell.title || cell.textContent)));
  table.setAttribute("aria-label", table.caption.textContent);
  table.deleteCaption(); // above, where it does not scroll
  scroll.append(table);
  saves.append("save", action("PNG", "Save this table as a picture", async () => download(`${name}.png`, [await pngOf(tableSvg(said, table))])),
    action("SVG", "Save this table as a picture", () => download(`${name}.svg`, [tableSvg(said, table)])),
    action("CSV", "Save this table", () => download(`${name}.csv`, lines())));
  return [said, scroll, saves];
}
function overlapTable(sets) {
  const table = element("table"), head = table.createTHead().insertRow(), body = table.createTBody();
  const numbers = ["tokens", "difficulty", "influence", "loss"].filter(name => rows.numbers[name]);
  for (const title of ["Method (plot its rank against the run's)", "Shared with the selection (%)", ...numbers.map(name => `${titleOf(name)}: median`)])
    head.append(element("th", "", title));
  const { labels } = rows.groups.source || { labels: [] };
  if (labels.length) head.append(element("th", "", "Sources"));
  const add = (name, set, shared) => {
    const line = body.insertRow();
    line.append(name, element("td", "", shared), ...numbers.map(number => spread(number, set)));
    if (labels.length) line.append(stack(set));
  };
  add(element("th", "", "the pool"), new Uint8Array(rows.count).fill(1), "");
  index.methods.forEach((name, m) => {
    const title = element("th"), both = sets[m].reduce((n, v, i) => n + (v & choice.chosen[i]), 0);
    title.append(action(name, "Plot its rank against the run's", () => versus(name)));
    add(title, sets[m], (100 * both / Math.max(1, sets[m].reduce((n, v) => n + v, 0))).toFixed(1));
  });
  table.append(element("caption", "", "Medians, and histograms over the range of the pool, each as high as its own highest bar. "
    + (labels.length ? "Sources: " + labels.slice(0, PALETTE.length).map(l => l || "(none)").join(", ") + ", in this order." : "")));
  return table;
}
function versus(name) {
  const other = index.methods.includes(RUN) ? RUN : index.methods.find(m => m !== name);
  for (const [axis, method] of [["x", other], ["y", name]]) {
    byId(axis).value = `rank by ${method}`;
    byId(axis).onchange({ target: byId(axis) });
  }
  byId("explorer").scrollIntoView();
}
const BINS = 16;
function spread(name, set) {
  const values = rows.numbers[name].filter((v, i) => set[i] && isFinite(v)).sort(), [low, high] = limits(name);
  const bins = new Array(BINS).fill(0), made = element("td", "", values.length ? fixed(name, values[values.length >> 1]) : "–");
  for (const v of values) bins[Math.min(BINS - 1, Math.max(0, Math.floor(BINS * (v - low) / (high - low))))]++;
  const shape = element("div", "spark"), most = Math.max(...bins, 1);
  for (const n of bins) shape.append(Object.assign(element("i"), { style: `height:${100 * n / most}%` }));
  made.append(shape);
  return made;
}
function stack(set) {
  const { codes, labels } = rows.groups.source, counts = new Array(Math.min(labels.length, PALETTE.length)).fill(0);
  set.forEach((v, i) => { if (v) counts[Math.min(codes[i], counts.length - 1)]++; });
  const sum = counts.reduce((a, b) => a + b, 0) || 1, made = element("td"), shape = element("div", "stack");
  counts.forEach((n, k) => shape.append(Object.assign(element("i"), { style: `width:${100 * n / sum}%;background:${PALETTE[k]}` })));
  made.title = counts.map((n, k) => `${k === PALETTE.length - 1 && labels.length > PALETTE.length ? "others" : labels[k] || "(none)"} ${(100 * n / sum).toFixed(1)} %`).join(", ");
  shape.setAttribute("role", "img");
  shape.setAttribute("aria-label", made.title);
  made.append(shape);
  return made;
}
// UpSet: each bar counts the rows that are in exactly the marked selections.
function upset(sets) {
  const names = index.methods.slice(0, MOST_SETS), counts = new Map();
  for (let i = 0; i < rows.count; i++) {
    let pattern = 0;
    for (let m = 0; m < names.length; m++) pattern |= sets[m][i] << m;
    if (pattern) counts.set(pattern, (counts.get(pattern) || 0) + 1);
  }
  const shown = [...counts].sort((a, b) => b[1] - a[1]).slice(0, MOST_PATTERNS), most = shown[0]?.[1] || 1;
  const table = element("table", "upset"), head = element("tr");
  table.append(element("caption", "", `Rows that exactly the marked methods select, of the first ${names.length} methods; the ${shown.length} largest groups.`));
  for (const name of [...names, "Rows", ""]) head.append(element("th", "", name));
  table.append(head);
  for (const [pattern, n] of shown) {
    const line = element("tr");
    names.forEach((name, m) => line.append(element("td", "", pattern >> m & 1 ? "●" : "")));
    const bar = element("td"), fill = element("div", "bar");
    fill.style.width = `${Math.max(2, 160 * n / most)}px`;
    bar.append(fill);
    line.append(element("td", "", n.toLocaleString("en")), bar);
    table.append(line);
  }
  return table;
}

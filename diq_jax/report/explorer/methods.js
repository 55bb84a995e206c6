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
  holder.replaceChildren(overlapTable(sets), upset(sets));
}
function overlapTable(sets) {
  const table = element("table"), head = element("tr"), median = (name, set) => {
    const values = rows.numbers[name].filter((v, i) => set[i] && isFinite(v)).sort();
    return values.length ? digits(values[values.length >> 1]) : "–";
  };
  const numbers = ["tokens", "difficulty", "influence", "loss"].filter(name => rows.numbers[name]);
  for (const title of ["Method", "Shared with the selection (%)", ...numbers.map(name => `Median ${name}`)])
    head.append(element("th", "", title));
  table.append(element("thead"), element("tbody"));
  table.tHead.append(head);
  index.methods.forEach((name, m) => {
    const line = element("tr"), shared = sets[m].reduce((n, v, i) => n + (v & choice.chosen[i]), 0);
    const size = sets[m].reduce((n, v) => n + v, 0);
    line.append(element("th", "", name), element("td", "", (100 * shared / Math.max(1, size)).toFixed(1)),
      ...numbers.map(number => element("td", "", median(number, sets[m]))));
    table.tBodies[0].append(line);
  });
  const scroll = element("div", "scroll");
  scroll.append(table);
  return scroll;
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
  const scroll = element("div", "scroll");
  scroll.append(table);
  return scroll;
}

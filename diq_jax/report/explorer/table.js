// The filter and the table of what passes it: only the lines in sight exist.

const LINE = 30; // pixels
const body = document.getElementById("lines"), holder = document.getElementById("table");
const filtered = { rows: new Uint32Array(0), passes: null, place: null, matches: null, sort: ["rank", 1] };
const COLUMNS = [
  ["decision", "", 26], ["rank", "Rank", 66], ["id", "Example", 84], ["start", "Question", 0],
  ["source", "Source", 110], ["quadrant", "Q", 34], ["difficulty", "Difficulty", 74],
  ["influence", "Influence", 76], ["tokens", "Tokens", 58],
].filter(([name]) => !["source", "difficulty", "quadrant"].includes(name)
  || rows.groups[name] || index.numbers.some(n => n.name === name));
const byId = id => document.getElementById(id);

function cell(name, i) {
  if (name === "decision") {
    const edit = choice.edits.get(i)?.decision;
    return edit === "never" ? "✕" : edit === "keep" ? "★" : choice.chosen[i] ? "●" : "";
  }
  if (name === "rank") return choice.rank[i].toLocaleString("en");
  if (name === "id") return rows.ids[i];
  if (name === "start") return rows.starts[i];
  if (name === "quadrant") return `Q${choice.quadrant[i]}`;
  if (rows.groups[name]) return rows.groups[name].labels[rows.groups[name].codes[i]];
  return fixed(name, rows.numbers[name][i]);
}
// As many decimals in all lines as tell a thousandth of the column's range.
const places = new Map();
function fixed(name, v) {
  if (!places.has(name)) {
    const [low, high] = limits(name), whole = rows.numbers[name].every(n => !isFinite(n) || Number.isInteger(n));
    places.set(name, whole ? 0 : Math.max(0, 3 - Math.floor(Math.log10(high - low))));
  }
  const n = places.get(name);
  return !isFinite(v) || n > 6 ? digits(v)
    : v.toLocaleString("en", { minimumFractionDigits: n, maximumFractionDigits: n }).replace("-", "−");
}
function sortKey(name) {
  if (name === "decision") return i => -choice.chosen[i];
  if (name === "rank") return i => choice.rank[i];
  if (name === "quadrant") return i => choice.quadrant[i];
  if (name === "id") return i => rows.numbers.id_order[i];
  if (rows.groups[name]) return i => rows.groups[name].codes[i];
  const values = rows.numbers[name];
  return i => isFinite(values[i]) ? values[i] : Infinity;
}

function filterChanged() {
  const wanted = byId("only").value, group = byId("group").value, number = byId("range").value;
  const [low, high] = [byId("low"), byId("high")].map(e => e.value === "" ? NaN : Number(e.value));
  const [groupName, code] = group ? group.split("=").map((v, k) => k ? Number(v) : v) : [];
  const at = (number && number !== "rank" && number !== "quadrant") ? rows.numbers[number]
    : number === "rank" ? choice.rank : choice.quadrant;
  const inside = plot.lasso && lassoTest();
  const passes = i => {
    if (filtered.matches && !filtered.matches[i]) return false;
    if (wanted === "selected" && !choice.chosen[i]) return false;
    if (wanted === "not" && choice.chosen[i]) return false;
    if (wanted === "edited" && !choice.edits.has(i)) return false;
    if (wanted === "changed" && !choice.chosen[i] === !rows.numbers.selected[i]) return false;
    if (wanted[0] === "Q" && choice.quadrant[i] !== Number(wanted[1])) return false;
    if (group && rows.groups[groupName].codes[i] !== code) return false;
    if (number && (at[i] < low || at[i] > high)) return false;
    return !inside || inside(i);
  };
  filtered.passes = new Uint8Array(rows.count);
  for (let i = 0; i < rows.count; i++) filtered.passes[i] = passes(i) ? 1 : 0;
  byId("unlasso").hidden = !plot.lasso;
  sortRows();
  draw();
}
// All rows in the order that is asked for; made once for each column and choice.
const orders = new Map();
function ordered() {
  const [name, sign] = filtered.sort, { id_order } = rows.numbers;
  if (!orders.has(name)) {
    const key = sortKey(name), keys = Float64Array.from({ length: rows.count }, (_, i) => key(i));
    const order = Uint32Array.from({ length: rows.count }, (_, i) => i);
    orders.set(name, order.sort((a, b) => keys[a] - keys[b] || id_order[a] - id_order[b]));
  }
  return sign > 0 ? orders.get(name) : orders.get(name).slice().reverse();
}
function sortRows() {
  const [name, sign] = filtered.sort, found = new Uint32Array(rows.count);
  let n = 0;
  for (const i of ordered()) if (filtered.passes[i]) found[n++] = i;
  filtered.rows = found.subarray(0, n);
  filtered.place = null; // made when next and previous are asked for
  holder.setAttribute("aria-rowcount", filtered.rows.length + 1);
  body.style.height = `${filtered.rows.length * LINE}px`;
  for (const header of holder.querySelectorAll("[data-sort]"))
    header.setAttribute("aria-sort", header.dataset.sort !== name ? "none" : sign > 0 ? "ascending" : "descending");
  count();
  lines();
}
function count() {
  const inside = filtered.rows.reduce((n, i) => n + choice.chosen[i], 0);
  const text = `${filtered.rows.length.toLocaleString("en")} of ${rows.count.toLocaleString("en")} rows, `
    + `${inside.toLocaleString("en")} of them selected`;
  if (byId("count").textContent !== text) byId("count").textContent = text;
}

function lines() {
  const first = Math.max(0, Math.floor(holder.scrollTop / LINE) - 6);
  const last = Math.min(filtered.rows.length, first + Math.ceil(holder.clientHeight / LINE) + 14);
  const made = document.createDocumentFragment();
  for (let place = first; place < last; place++) {
    const i = filtered.rows[place], line = document.createElement("div");
    line.className = "line" + (i === reader.row ? " current" : "") + (choice.chosen[i] ? " picked" : "");
    line.setAttribute("role", "row");
    line.setAttribute("aria-rowindex", place + 2);
    line.style.top = `${place * LINE}px`;
    line.dataset.row = i;
    for (const [name, , width] of COLUMNS) {
      const part = document.createElement("span");
      part.setAttribute("role", "cell");
      part.className = name;
      if (width) part.style.flex = `0 0 ${width}px`;
      part.textContent = cell(name, i);
      line.append(part);
    }
    made.append(line);
  }
  body.replaceChildren(made);
}
function headers() {
  const line = byId("headers");
  for (const [name, title, width] of COLUMNS) {
    const header = document.createElement("span");
    header.setAttribute("role", "columnheader");
    header.className = name;
    if (width) header.style.flex = `0 0 ${width}px`;
    if (name === "start") header.textContent = title;
    else {
      header.dataset.sort = name;
      const button = document.createElement("button");
      button.textContent = title || "●";
      button.title = title ? `Sort by ${title.toLowerCase()}` : "Sort by selected";
      button.onclick = () => {
        filtered.sort = [name, filtered.sort[0] === name ? -filtered.sort[1] : ["influence", "tokens", "difficulty"].includes(name) ? -1 : 1];
        sortRows();
      };
      header.append(button);
    }
    line.append(header);
  }
}
function reveal(i) {
  filtered.place ??= new Map([...filtered.rows].map((row, place) => [row, place]));
  const place = filtered.place.get(i);
  if (place === undefined) return;
  const top = place * LINE;
  const seen = panel.hidden ? holder.clientHeight - 3 * LINE : holder.clientHeight / 4; // the reader covers the rest
  if (top < holder.scrollTop || top > holder.scrollTop + seen) holder.scrollTop = top - seen / 2;
}
function step(by) {
  filtered.place ??= new Map([...filtered.rows].map((row, place) => [row, place]));
  const place = filtered.place.get(reader.row) ?? -1;
  const next = Math.min(Math.max(place + by, 0), filtered.rows.length - 1);
  if (filtered.rows.length) open(filtered.rows[next]);
}

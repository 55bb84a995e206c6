// One row in full: its texts with the heat of influence, its numbers, its neighbours, what to do with it.

const panel = document.getElementById("reader"), reader = { row: -1, heat: true };

function element(tag, kind, content) {
  const made = document.createElement(tag);
  if (kind) made.className = kind;
  if (content !== undefined) made.textContent = content;
  return made;
}
function action(text, title, run) {
  const made = element("button", "", text);
  made.title = title;
  made.onclick = run;
  return made;
}

async function open(i, { scroll = false } = {}) {
  reader.row = i;
  drawMarks();
  lines();
  history.replaceState(null, "", `#row=${encodeURIComponent(rows.ids[i])}`);
  let row;
  try {
    row = await record(i);
  } catch (error) {
    panel.replaceChildren(element("p", "", unread(error)));
    panel.hidden = false;
    return;
  }
  if (reader.row !== i) return;
  const parts = [top(i, row), facts(i), decision(i)];
  if (row.question) parts.push(...text("Question", row.question));
  if (row.pieces) parts.push(...heat(row));
  else for (const name of ["reasoning", "answer"])
    if (row[name]) parts.push(...text(name[0].toUpperCase() + name.slice(1), row[name]));
  if (!row.question && !row.answer) parts.push(element("p", "", "A pre-tokenised row: it came without text."));
  parts.push(...targets(row), ...others("Nearest by gradient (cosine)", row.near, ([j, c]) => [j, digits(c)]),
    ...others("Repeats", row.repeats, ([j, where, kind, s]) => [j, `${kind}, in ${where}, ${digits(s)}`]),
    ...placesBy(i), ...own(i, row));
  panel.replaceChildren(...parts);
  panel.hidden = false;
  reveal(i);
  const next = filtered.rows[filtered.place.get(i) + 1];
  if (next !== undefined) record(next).catch(() => {}); // unpacked before it is asked for
  panel.scrollTop = 0;
  if (scroll) panel.scrollIntoView({ block: "nearest" });
}
function top(i, row) {
  const line = element("div", "actions");
  const copy = action("Copy", "Copy the row as JSON (c)", () => navigator.clipboard?.writeText(JSON.stringify({
    id: rows.ids[i], question: row.question, reasoning: row.reasoning, answer: row.answer, ...row.own })));
  line.append(element("strong", "", rows.ids[i]), action("‹", "Previous row (k)", () => step(-1)),
    action("›", "Next row (j)", () => step(1)), copy, action("Close", "Close (Escape)", closeReader));
  return line;
}
function closeReader() {
  reader.row = -1;
  panel.hidden = true;
  history.replaceState(null, "", location.pathname + location.search);
  drawMarks();
  lines();
}
function facts(i) {
  const list = element("dl", "facts");
  const add = (name, shown) => {
    const pair = element("div");
    pair.append(element("dt", "", name), element("dd", "", shown));
    list.append(pair);
  };
  for (const { name, title, fact } of index.numbers)
    if (fact && isFinite(rows.numbers[name][i])) add(title, digits(rows.numbers[name][i]));
  add("quadrant", `Q${choice.quadrant[i]} ${index.quadrants[choice.quadrant[i]]}`);
  for (const { name } of index.groups) if (cell(name, i)) add(name, cell(name, i));
  add("rank", choice.rank[i].toLocaleString("en"));
  return list;
}
function decision(i) {
  const line = element("div", "actions"), edit = choice.edits.get(i);
  const reason = Object.assign(element("input"), { placeholder: "reason", value: edit?.reason || "" });
  reason.setAttribute("aria-label", "Reason for the decision");
  const buttons = [["keep", "★ Always keep"], ["never", "✕ Never this one"]].map(([name, title]) => {
    const button = action(title, `Decide by hand: ${name}`, () => {
      decide(i, edit?.decision === name ? null : name, reason.value);
      chosenChanged();
      open(i);
    });
    button.setAttribute("aria-pressed", edit?.decision === name);
    return button;
  });
  reason.onchange = () => { if (edit) decide(i, edit.decision, reason.value); };
  line.append(element("span", choice.chosen[i] ? "chosen" : "soft", choice.chosen[i] ? "selected" : "not selected"), ...buttons, reason);
  const why = element("p", "soft", "");
  record(i).then(row => { why.textContent = row.why ? `In the run: ${row.why}` : ""; });
  const both = element("div");
  both.append(line, why);
  return both;
}
const text = (title, content) => [element("h4", "", title), element("p", "text", content)];

// Shares of the score: red helps the targets, blue hurts them; the strongest tenth is saturated.
function heat(row) {
  const strong = row.heat.map(Math.abs).sort((a, b) => b - a)[Math.floor(row.heat.length / 10)] || 1e-30;
  const shown = element("p", "text");
  row.pieces.forEach((piece, k) => {
    const token = element("span", "", piece.replaceAll("\n", "⏎\n")), share = Math.min(1, Math.abs(row.heat[k]) / strong);
    token.style.background = `rgb(${row.heat[k] > 0 ? "213 94 0" : "0 114 178"} / ${(0.62 * share).toFixed(2)})`;
    token.title = digits(row.heat[k]);
    shown.append(token);
  });
  const sums = sentences(row).sort((a, b) => Math.abs(b.sum) - Math.abs(a.sum)).slice(0, 5);
  const list = element("ol");
  for (const { said, sum } of sums) {
    const line = element("li");
    line.append(element("b", "", digits(sum)), ` ${said.trim().slice(0, 200) || "line break"}`);
    list.append(line);
  }
  return [element("h4", "", "Reasoning and answer, by influence of each token"),
    element("p", "soft", "Orange helps the targets, blue hurts them; shares add up to the score. The question has none: its tokens are not trained on."), shown,
    element("h4", "", "Sentences that carry it"), list];
}
function sentences(row) {
  const out = [{ said: "", sum: 0 }];
  row.pieces.forEach((piece, k) => {
    const last = out[out.length - 1];
    last.said += piece;
    last.sum += row.heat[k];
    if (/[.!?。]\s*$|\n/.test(piece)) out.push({ said: "", sum: 0 });
  });
  return out.filter(({ said, sum }) => said.trim() || sum);
}
function targets(row) {
  return [["Targets that it helps most", row.helps], ["Targets that it hurts most", row.hurts]]
    .filter(([, list]) => list).map(([title, list]) => {
      const made = element("ol");
      for (const [t, score] of list) {
        const line = element("li");
        line.append(element("b", "", digits(score)), ` ${index.targets[t]}`);
        made.append(line);
      }
      const folded = element("details");
      folded.append(element("summary", "", list.length ? title : `${title}: none`), made);
      return folded;
    });
}
function others(title, list, told) {
  if (!list?.length) return [];
  const made = element("ul", "links");
  for (const item of list) {
    const [j, said] = told(item), line = element("li"), number = rows.place.get(j) ?? (Number.isInteger(j) ? j : -1);
    line.append(element("b", "", said), " ");
    line.append(number < 0 ? String(j)
      : action(`${rows.ids[number]} ${rows.starts[number]}`, "Read this row", () => open(number)));
    made.append(line);
  }
  return [element("h4", "", title), made];
}
function placesBy(i) {
  if (index.methods.length < 2) return [];
  const list = element("dl", "facts");
  for (const name of index.methods) {
    const rank = rows.numbers[`rank by ${name}`][i], pair = element("div");
    pair.append(element("dt", "", name), element("dd", rank <= choice.keep ? "chosen" : "", rank.toLocaleString("en")));
    list.append(pair);
  }
  const folded = element("details");
  folded.append(element("summary", "", "Its rank by every method (marked: inside the budget)"), list);
  return [folded];
}
function own(i, row) { // but those that the facts show
  const names = Object.keys(row.own || {}).filter(name => !rows.groups[name] || cell(name, i) !== String(row.own[name]));
  if (!names.length) return [];
  const list = element("dl", "facts");
  for (const name of names) {
    const pair = element("div"), shown = row.own[name];
    pair.append(element("dt", "", name), element("dd", "", typeof shown === "string" ? shown : JSON.stringify(shown)));
    list.append(pair);
  }
  const folded = element("details");
  folded.append(element("summary", "", "Its other columns"), list);
  return [folded];
}

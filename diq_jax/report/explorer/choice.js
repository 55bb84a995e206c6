// What would be selected: by the run, another budget, another method, moved thresholds, by hand.

const RUN = index.method;
const choice = {
  keep: index.keep, method: RUN, thresholds: { ...index.thresholds },
  quadrant: null, rank: null, chosen: new Uint8Array(rows.count), // filled by `choose`
  edits: new Map(), // row -> {decision: "keep" | "never", reason}
};
const EDITS = `diq-edits-${index.run}`;
const canCut = () => index.thresholds.difficulty !== null && index.thresholds.influence !== null;
const moved = () => canCut() && ["difficulty", "influence"].some(
  axis => choice.thresholds[axis] !== index.thresholds[axis]);

function quadrants() {
  if (!moved()) return rows.numbers.quadrant;
  const { difficulty, influence } = rows.numbers, cut = choice.thresholds;
  return Float32Array.from(difficulty, (d, i) =>
    1 + (d < cut.difficulty ? 1 : 0) + (influence[i] < cut.influence ? 2 : 0));
}

// The order of DIQ at moved thresholds: quadrants in turn, then influence, difficulty, id.
function diqRanks(quadrant) {
  const { difficulty, influence, id_order } = rows.numbers;
  const turn = Object.fromEntries(index.quadrant_order.map((q, place) => [q, place]));
  const order = Uint32Array.from({ length: rows.count }, (_, i) => i).sort((a, b) =>
    turn[quadrant[a]] - turn[quadrant[b]] || influence[b] - influence[a]
    || difficulty[b] - difficulty[a] || id_order[a] - id_order[b]);
  const ranks = new Float32Array(rows.count);
  order.forEach((row, place) => { ranks[row] = place + 1; });
  return ranks;
}

function choose() {
  choice.quadrant = quadrants();
  const again = moved() && choice.method === "diq";
  choice.rank = again ? diqRanks(choice.quadrant)
    : rows.numbers[choice.method === RUN ? "rank" : `rank by ${choice.method}`];
  const edited = [...choice.edits.values()], kept = edited.filter(e => e.decision === "keep").length;
  const order = new Uint32Array(rows.count);
  choice.rank.forEach((rank, i) => { order[rank - 1] = i; });
  choice.chosen.fill(0);
  for (const [i, { decision }] of choice.edits) if (decision === "keep") choice.chosen[i] = 1;
  let room = Math.max(0, choice.keep - kept);
  for (const i of order) {
    if (!room) break;
    if (choice.edits.has(i)) continue;
    choice.chosen[i] = 1;
    room--;
  }
}

function decide(i, decision, reason) {
  if (decision) choice.edits.set(i, { decision, reason });
  else choice.edits.delete(i);
  try {
    localStorage.setItem(EDITS, JSON.stringify(editRows()));
  } catch { /* a browser that keeps nothing for files: the export still has them */ }
}
function recall() {
  try {
    for (const edit of JSON.parse(localStorage.getItem(EDITS) || "[]"))
      if (rows.place.has(edit.example_id))
        choice.edits.set(rows.place.get(edit.example_id), edit);
  } catch { /* nothing kept */ }
  for (const edit of index.edits)
    if (rows.place.has(edit.example_id) && !choice.edits.has(rows.place.get(edit.example_id)))
      choice.edits.set(rows.place.get(edit.example_id), edit);
}
const editRows = () => [...choice.edits].map(([i, { decision, reason }]) =>
  ({ example_id: rows.ids[i], decision, reason }));
const chosenRows = () => [...choice.chosen.keys()].filter(i => choice.chosen[i])
  .sort((a, b) => choice.rank[a] - choice.rank[b]).map(i => ({ example_id: rows.ids[i] }));

const jsonLines = items => items.map(item => JSON.stringify(item) + "\n");
function download(name, parts) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob(parts));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

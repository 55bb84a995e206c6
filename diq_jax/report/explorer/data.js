// The rows: numbers and groups as typed arrays, texts in compressed chunks that are unpacked when read.

const index = JSON.parse(document.getElementById("index").textContent);
const rows = {
  count: index.rows,
  numbers: {}, // name -> Float32Array
  groups: {}, // name -> {codes: Uint16Array, labels}
  ids: [], // example ids
  starts: [], // first words of each question
  place: new Map(), // id -> row
};
const recent = new Map(); // chunk -> its rows, the last few that were read
let lowered = null; // lower-case text of each row, kept while it is small
const KEPT_CHUNKS = 8, KEPT_CHARACTERS = 2e8;

async function bytesOf(name) {
  const element = document.getElementById(`blob-${name}`);
  if (!element) {
    const response = await fetch(`rows/${name}.gz`);
    if (!response.ok) throw new Error(`rows/${name}.gz: ${response.status}`);
    return response.body;
  }
  const text = atob(element.textContent.trim()), bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return new Blob([bytes]).stream();
}
const unpack = async name =>
  new Response((await bytesOf(name)).pipeThrough(new DecompressionStream("gzip")));

async function load() {
  const [buffer, names] = await Promise.all([
    unpack("columns").then(r => r.arrayBuffer()), unpack("names").then(r => r.json()),
  ]);
  let offset = 0;
  for (const { name } of index.numbers) {
    rows.numbers[name] = new Float32Array(buffer, offset, rows.count);
    offset += 4 * rows.count;
  }
  for (const { name, labels } of index.groups) {
    rows.groups[name] = { codes: new Uint16Array(buffer, offset, rows.count), labels };
    offset += 2 * rows.count;
  }
  [rows.ids, rows.starts] = names;
  rows.ids.forEach((id, i) => rows.place.set(id, i));
}

async function chunk(number) {
  if (!recent.has(number)) recent.set(number, (await unpack(String(number))).json());
  const found = await recent.get(number);
  while (recent.size > KEPT_CHUNKS) recent.delete(recent.keys().next().value);
  return found;
}
const record = async i => (await chunk(Math.floor(i / index.chunk_rows)))[i % index.chunk_rows];

const searched = (row, i) =>
  [rows.ids[i], row.question, row.reasoning, row.answer].join("\n").toLowerCase();

// Calls found(mask, share of the rows read) as matches come in. A newer search ends an older one.
let searching = 0;
async function search(query, found) {
  const turn = ++searching, wanted = query.toLowerCase(), mask = new Uint8Array(rows.count);
  if (!wanted) return found(null, 1);
  const keep = index.characters <= KEPT_CHARACTERS;
  lowered ??= keep ? new Array(rows.count) : [];
  let shown = performance.now();
  for (let number = 0; number < index.chunks; number++) {
    const first = number * index.chunk_rows, last = Math.min(first + index.chunk_rows, rows.count);
    const missing = !keep || lowered[first] === undefined;
    const texts = missing ? (await (await unpack(String(number))).json()) : null;
    for (let i = first; i < last; i++) {
      const text = missing ? searched(texts[i - first], i) : lowered[i];
      if (keep) lowered[i] = text;
      mask[i] = text.includes(wanted) ? 1 : 0;
    }
    if (performance.now() - shown > 80 && number < index.chunks - 1) {
      found(mask, last / rows.count);
      await new Promise(requestAnimationFrame);
      shown = performance.now();
    }
    if (turn !== searching) return;
  }
  found(mask, 1);
}

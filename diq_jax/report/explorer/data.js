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
const lowered = []; // what `search` read of each chunk, kept while it is small
const KEPT_CHUNKS = 8, KEPT_CHARACTERS = (navigator.deviceMemory ?? 4) >= 4 ? 8e8 : 2e8; // a byte each, mostly

const unzip = stream => new Response(stream.pipeThrough(new DecompressionStream("gzip")));
async function unpack(name) {
  const element = document.getElementById(`blob-${name}`);
  if (!element) {
    const response = await fetch(`rows/${name}.gz`);
    if (!response.ok) throw new Error(`rows/${name}.gz: ${response.status}`);
    // Some servers have the browser unpack what is called .gz.
    return response.headers.get("Content-Encoding") ? response : unzip(response.body);
  }
  const text = atob(element.textContent.trim()), bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return unzip(new Blob([bytes]).stream());
}

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
  if (!recent.has(number)) recent.set(number, unpack(String(number)).then(response => response.json()));
  const found = await recent.get(number).catch(error => { recent.delete(number); throw error; });
  while (recent.size > KEPT_CHUNKS) recent.delete(recent.keys().next().value);
  return found;
}
const unread = error => `The rows could not be read: ${error.message}` + (index.served ? ". Does the server still run?" : "");
const record = async i => (await chunk(Math.floor(i / index.chunk_rows)))[i % index.chunk_rows];

// Text of each chunk in lower case: as the JSON that was unpacked, and from its first match on by row.
const AHEAD = 6; // chunks that are unpacked before their turn
const lower = async number => (await (await unpack(String(number))).text()).toLowerCase();
const byRow = (json, first) => JSON.parse(json).map((row, k) =>
  [rows.ids[first + k].toLowerCase(), row.question, row.reasoning, row.answer].join("\n"));

// Calls found(mask, share of the rows read) as matches come in. A newer search ends an older one.
let searching = 0;
async function search(query, found) {
  const turn = ++searching, wanted = query.toLowerCase(), mask = new Uint8Array(rows.count);
  if (!wanted) return found(null, 1);
  const keep = index.characters <= KEPT_CHARACTERS, escaped = JSON.stringify(wanted).slice(1, -1), ahead = [];
  let shown = performance.now(), asked = 0, pause = 30; // milliseconds: a first answer soon, the others at leisure
  for (let number = 0; number < index.chunks; number++) {
    for (; asked < Math.min(number + AHEAD, index.chunks); asked++) ahead.push(lowered[asked] ?? lower(asked));
    const next = ahead.shift(), first = number * index.chunk_rows;
    let texts = next instanceof Promise ? await next : next;
    if (turn !== searching) return;
    const last = Math.min(first + index.chunk_rows, rows.count), ids = rows.ids.slice(first, last);
    if (typeof texts === "string" && (texts.includes(escaped) || ids.some(id => id.toLowerCase().includes(wanted))))
      texts = byRow(texts, first);
    if (keep) lowered[number] = texts;
    if (typeof texts !== "string") texts.forEach((text, k) => { mask[first + k] = text.includes(wanted) ? 1 : 0; });
    if (performance.now() - shown > pause && number < index.chunks - 1) {
      found(mask, last / rows.count);
      await new Promise(painted => requestAnimationFrame(() => setTimeout(painted)));
      shown = performance.now();
      pause = 200;
    }
    if (turn !== searching) return;
  }
  found(mask, 1);
}

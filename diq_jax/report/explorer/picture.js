// The scatter and the tables of methods as files: the scatter's SVG by the functions that draw it, PNG of an SVG, CSV.

const escaped = text => String(text).replace(/[&<>"]/g, c => `&#${c.charCodeAt(0)};`);
const quoted = text => /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
const csvLine = cells => cells.map(cell => quoted(String(cell))).join(",") + "\n";

// What the drawing functions ask of a canvas, written as SVG.
class Paper {
  parts = []; saved = []; transform = ""; dash = []; globalAlpha = 1; lineWidth = 1; textAlign = "left";
  add(tag, shape, inside = "") {
    this.parts.push(`<${tag} ${shape}${this.transform && ` transform="${this.transform}"`}>${inside}</${tag}>\n`);
  }
  setLineDash(dash) { this.dash = dash; }
  save() { this.saved.push(this.transform); }
  restore() { this.transform = this.saved.pop(); }
  translate(x, y) { this.transform += `translate(${x} ${y})`; }
  rotate(turn) { this.transform += `rotate(${turn * 180 / Math.PI})`; }
  measureText(text) {
    const context = below.getContext("2d");
    context.font = this.font;
    return context.measureText(text);
  }
  strokeRect(x, y, wide, high) { // the axes draw lines with it
    this.add("path", `d="M${x.toFixed(1)} ${y.toFixed(1)}l${wide} ${high}" stroke="${this.strokeStyle}"
      stroke-width="${this.lineWidth}" stroke-dasharray="${this.dash}"`);
  }
  fillRect(x, y, wide, high) {
    this.add("rect", `x="${x.toFixed(1)}" y="${y.toFixed(1)}" width="${wide.toFixed(1)}" height="${high.toFixed(1)}" fill="${this.fillStyle}"`
      + (this.globalAlpha < 1 ? ` fill-opacity="${this.globalAlpha.toFixed(2)}"` : ""));
  }
  fillText(text, x, y) {
    const anchor = { left: "start", center: "middle", right: "end" }[this.textAlign], [size] = this.font.match(/[\d.]+px/);
    this.add("text", `x="${x.toFixed(1)}" y="${y.toFixed(1)}" fill="${this.fillStyle}" text-anchor="${anchor}"
      font-size="${size}"${/^[67]00/.test(this.font) ? ' font-weight="600"' : ""}`, escaped(text));
  }
}

function pictureSvg() {
  const [width, height] = size(), paper = new Paper(), family = getComputedStyle(document.body).fontFamily;
  paper.font = `13px ${family}`;
  drawAxes(paper, width, height);
  drawPoints(width, height, 1, (x, y, r, rgb, alpha) => {
    Object.assign(paper, { fillStyle: `rgb(${rgb})`, globalAlpha: alpha });
    paper.fillRect(x - r, y - r, 2 * r, 2 * r);
  });
  paper.globalAlpha = 1;
  if (cuts()) drawCuts(paper, width, height);
  Object.assign(paper, { font: `13px ${family}`, textAlign: "left" });
  const { names, tally } = plot.legend;
  const shown = [[`${titleOf(plot.color)}:`, "none"], ...names.map(([name, shade], k) => [`${name} (${tally[k].toLocaleString("en")})`, shade])];
  let left = EDGE.left, lines = 1;
  const places = shown.map(([said]) => {
    const wide = paper.measureText(said).width + 32;
    if (left > EDGE.left && left + wide > width) { left = EDGE.left; lines++; }
    left += wide;
    return [left - wide, lines];
  });
  const head = 20 * lines;
  shown.forEach(([said, shade], k) => {
    const [x, line] = places[k], y = 20 * line - head;
    paper.fillStyle = shade;
    paper.fillRect(x, y - 10, 11, 11);
    paper.fillStyle = css("--ink");
    paper.fillText(said, x + 16, y);
  });
  return svgOf(paper, 0, -head, width, height + head);
}
const svgOf = (paper, left, top, width, height) =>
  `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}" viewBox="${left} ${top} ${width} ${height}" font-family="${
    escaped(getComputedStyle(document.body).fontFamily)}"><rect x="${left}" y="${top}" width="100%" height="100%" fill="${css("--paper")}"/>\n${paper.parts.join("")}</svg>\n`;
function* wordsOf(...parts) {
  for (const part of parts) {
    const walker = document.createTreeWalker(part, NodeFilter.SHOW_TEXT);
    while (walker.nextNode())
      for (const { 0: word, index: at } of walker.currentNode.data.matchAll(/\S+/g)) yield [walker.currentNode, word, at];
  }
}
// A table under its caption, where they stand: bars, and each word.
function tableSvg(said, table) {
  const paper = new Paper(), { left, bottom, width } = table.getBoundingClientRect(), { top } = said.getBoundingClientRect(), range = document.createRange();
  for (const bar of table.querySelectorAll("i, .bar")) {
    const box = bar.getBoundingClientRect(), { backgroundColor, opacity } = getComputedStyle(bar);
    Object.assign(paper, { fillStyle: backgroundColor, globalAlpha: Number(opacity) });
    if (box.width && box.height) paper.fillRect(box.left, box.top, box.width, box.height);
  }
  Object.assign(paper, { fillStyle: css("--ink"), globalAlpha: 1 });
  for (const [node, word, at] of wordsOf(said, table)) {
    range.setStart(node, at);
    range.setEnd(node, at + word.length);
    const box = range.getBoundingClientRect(), { fontSize, fontWeight } = getComputedStyle(node.parentElement);
    paper.font = `${fontWeight} ${fontSize}`;
    paper.fillText(word, box.left, box.bottom - 0.24 * box.height);
  }
  return svgOf(paper, left - 8, top - 8, Math.max(width, said.clientWidth) + 16, bottom - top + 16);
}
function pictureCsv() {
  const [names, color] = colours(), score = index.numbers.some(n => n.name === plot.color && !n.hidden) && rows.numbers[plot.color];
  return [csvLine(["example_id", titleOf(plot.x), titleOf(plot.y), titleOf(plot.color)]), ...Array.from(filtered.rows, i =>
    csvLine([rows.ids[i], rows.numbers[plot.x][i], rows.numbers[plot.y][i], score ? score[i] : names[color(i)][0]]))];
}
async function pngOf(svg) {
  const image = new Image(), address = URL.createObjectURL(new Blob([svg], { type: "image/svg+xml" }));
  image.src = address;
  await image.decode();
  const canvas = Object.assign(element("canvas"), { width: 2 * image.width, height: 2 * image.height });
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  URL.revokeObjectURL(address);
  return new Promise(done => canvas.toBlob(done, "image/png"));
}
const saved = {
  png: async () => download("scatter.png", [await pngOf(pictureSvg())]),
  svg: () => download("scatter.svg", [pictureSvg()]),
  csv: () => download("scatter.csv", pictureCsv()),
};

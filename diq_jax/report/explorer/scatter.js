// The scatter: axes on one canvas, every row that passes the filter on a second, what moves on a third.
// Points are blended into pixels by hand, which a browser without a graphics card does fastest.

const SPAN = 14, EDGE = { left: 74, right: 12, top: 30, bottom: 42 };
const PALETTE = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a939c", "#b2a600"];
const RAMP = ["#6a3fa0", "#4c6fb5", "#2a8f9e", "#22a884", "#7ad151", "#e6d000"]; // seen on white and on black
const [below, plain, above] = ["axes", "points", "marks"].map(id => document.getElementById(id));
const plot = { x: "", y: "", color: "selected", view: null, lasso: null, tool: "move", hovered: -1 };
// Drawn rows by cell of SPAN pixels, for hovering: the first row of a cell, and the next after each row.
const cells = { across: 0, first: new Int32Array(0), next: new Int32Array(rows.count) };

const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const size = () => [plain.clientWidth, plain.clientHeight];

function limits(name) {
  const fence = index.fences[name];
  if (fence) return fence;
  let low = Infinity, high = -Infinity;
  for (const v of rows.numbers[name]) if (isFinite(v)) { low = Math.min(low, v); high = Math.max(high, v); }
  if (low > high) return [0, 1];
  const pad = 0.06 * (high - low) || 0.5;
  return [low - pad, high + pad];
}
function resetView() {
  plot.view = { x: limits(plot.x), y: limits(plot.y) };
}
const scale = ([low, high], from, to) => v => from + (v - low) / (high - low) * (to - from);
const inverse = ([low, high], from, to) => p => low + (p - from) / (to - from) * (high - low);
function axes() {
  const [width, height] = size();
  const across = [EDGE.left, width - EDGE.right], up = [height - EDGE.bottom, EDGE.top];
  return {
    x: scale(plot.view.x, ...across), y: scale(plot.view.y, ...up),
    atX: inverse(plot.view.x, ...across), atY: inverse(plot.view.y, ...up),
  };
}
// An outlier of a fenced column stands at the fence, as in the pictures.
function valuesOf(name) {
  const fence = index.fences[name], values = rows.numbers[name];
  return fence ? i => Math.min(Math.max(values[i], fence[0]), fence[1]) : i => values[i];
}

// [labels with colours, the color number of each row]
function colours() {
  const name = plot.color;
  if (name === "selected") return [
    [["not selected", "#8a939c"], ["selected", "#d55e00"]], i => choice.chosen[i]];
  if (name === "quadrant") return [
    [1, 2, 3, 4].map(q => [`Q${q} ${index.quadrants[q]}`, PALETTE[[1, 4, 0, 6][q - 1]]]),
    i => choice.quadrant[i] - 1];
  if (rows.groups[name]) {
    const { codes, labels } = rows.groups[name];
    const shown = labels.map((label, k) => [label, index.shades?.[label] ?? PALETTE[Math.min(k, PALETTE.length - 1)]]);
    return [shown.slice(0, PALETTE.length), i => Math.min(codes[i], PALETTE.length - 1)];
  }
  const values = rows.numbers[name], sorted = Float32Array.from(values).filter(isFinite).sort();
  const edges = RAMP.map((_, k) => sorted[Math.floor(k * (sorted.length - 1) / RAMP.length)]);
  return [
    RAMP.map((color, k) => [`from ${digits(edges[k])}`, color]),
    i => { let k = RAMP.length - 1; while (k > 0 && !(values[i] >= edges[k])) k--; return k; }];
}

function draw() {
  const [width, height] = size(), ratio = devicePixelRatio || 1, context = below.getContext("2d");
  if (!width) return;
  for (const canvas of [below, plain, above]) {
    const [w, h] = [Math.round(width * ratio), Math.round(height * ratio)];
    if (canvas.width !== w || canvas.height !== h) { canvas.width = w; canvas.height = h; }
  }
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  context.font = `13px ${getComputedStyle(document.body).fontFamily}`;
  drawAxes(context, width, height);
  drawPoints(width, height, ratio);
  drawMarks();
}
function drawPoints(width, height, ratio, mark) { // with `mark` for another sheet than the canvas
  const context = plain.getContext("2d"), image = mark ? null : context.createImageData(plain.width, plain.height);
  mark ??= (...at) => square(image, ...at);
  const { x, y } = axes(), [names, color] = colours(), tally = names.map(() => 0), n = filtered.rows.length;
  const shades = names.map(([, hex]) => [1, 3, 5].map(k => parseInt(hex.slice(k, k + 2), 16)));
  const radius = ratio * Math.max(1, Math.min(3.5, 3.6 - Math.log10(Math.max(n, 1) / 300)));
  const faint = Math.max(0.25, Math.min(0.75, 3000 / Math.max(n, 1)));
  cells.across = Math.ceil(width / SPAN) + 1;
  cells.first = new Int32Array(cells.across * (Math.ceil(height / SPAN) + 1)).fill(-1);
  const last = []; // the selected ones, to stand above
  const xOf = valuesOf(plot.x), yOf = valuesOf(plot.y);
  const put = (i, k, r, alpha) => {
    const px = x(xOf(i)), py = y(yOf(i));
    if (!(px >= EDGE.left && px <= width - EDGE.right && py >= EDGE.top && py <= height - EDGE.bottom)) return;
    const cell = Math.floor(py / SPAN) * cells.across + Math.floor(px / SPAN);
    cells.next[i] = cells.first[cell];
    cells.first[cell] = i;
    mark(px * ratio, py * ratio, r, shades[k], alpha);
  };
  for (const i of filtered.rows) {
    const k = color(i);
    tally[k]++;
    if (plot.color === "selected" && k === 1) last.push(i);
    else put(i, k, radius, faint);
  }
  for (const i of last) put(i, 1, radius + ratio, 1);
  plot.legend = { names, tally };
  if (!image) return;
  context.putImageData(image, 0, 0);
  drawLegend(names, tally);
}
function square({ data, width, height }, px, py, r, [red, green, blue], alpha) {
  const left = Math.max(0, Math.round(px - r)), right = Math.min(width, Math.round(px + r));
  const top = Math.max(0, Math.round(py - r)), bottom = Math.min(height, Math.round(py + r));
  for (let row = top; row < bottom; row++) for (let at = 4 * (row * width + left), k = left; k < right; k++, at += 4) {
    const there = data[at + 3] / 255 * (1 - alpha), sum = alpha + there;
    data[at] = (red * alpha + data[at] * there) / sum;
    data[at + 1] = (green * alpha + data[at + 1] * there) / sum;
    data[at + 2] = (blue * alpha + data[at + 2] * there) / sum;
    data[at + 3] = 255 * sum;
  }
}

function ticks([low, high]) {
  const raw = (high - low) / 6, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].find(m => m * power >= raw) * power, out = [];
  for (let v = Math.ceil(low / step) * step; v <= high; v += step) out.push(Math.abs(v) < step / 1e6 ? 0 : v);
  return out;
}
function drawAxes(context, width, height) {
  const { x, y } = axes();
  context.strokeStyle = css("--line");
  context.fillStyle = css("--ink");
  context.lineWidth = 1;
  context.textAlign = "center";
  for (const v of ticks(plot.view.x)) {
    const at = x(v);
    context.strokeRect(at, EDGE.top, 0, height - EDGE.top - EDGE.bottom);
    context.fillText(digits(v), at, height - EDGE.bottom + 16);
  }
  context.textAlign = "right";
  for (const v of ticks(plot.view.y)) {
    const at = y(v);
    context.strokeRect(EDGE.left, at, width - EDGE.left - EDGE.right, 0);
    context.fillText(digits(v), EDGE.left - 6, at + 4);
  }
  context.textAlign = "center";
  context.fillText(titleOf(plot.x), (EDGE.left + width) / 2, height - 6);
  context.save();
  context.translate(13, (EDGE.top + height - EDGE.bottom) / 2);
  context.rotate(-Math.PI / 2);
  context.fillText(titleOf(plot.y), 0, 0);
  context.restore();
}
const cuts = () => canCut() && plot.x === "difficulty" && plot.y === "influence";

function drawMarks() {
  const [width, height] = size(), context = above.getContext("2d"), ratio = devicePixelRatio || 1;
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  const { x, y } = axes();
  placeGrips(width);
  if (cuts()) drawCuts(context, width, height);
  for (const [i, ring] of [[plot.hovered, "--soft"], [reader.row, "--accent"]]) {
    if (i < 0) continue;
    context.strokeStyle = css(ring);
    context.lineWidth = 2.5;
    context.beginPath();
    context.arc(x(valuesOf(plot.x)(i)), y(valuesOf(plot.y)(i)), 8, 0, 7);
    context.stroke();
  }
  if (plot.lasso) {
    context.strokeStyle = css("--accent");
    context.lineWidth = 1.5;
    context.beginPath();
    plot.lasso.forEach(([vx, vy], k) => context[k ? "lineTo" : "moveTo"](x(vx), y(vy)));
    context.closePath();
    context.stroke();
  }
}
function drawCuts(context, width, height) {
  const { x, y } = axes();
  context.strokeStyle = css("--soft");
  context.lineWidth = 1;
  context.setLineDash([6, 4]);
  context.strokeRect(x(choice.thresholds.difficulty), EDGE.top, 0, height - EDGE.top - EDGE.bottom);
  context.strokeRect(EDGE.left, y(choice.thresholds.influence), width - EDGE.left - EDGE.right, 0);
  context.setLineDash([]);
  context.textAlign = "left";
  context.font = `600 12px ${getComputedStyle(document.body).fontFamily}`;
  for (const q of [1, 2, 3, 4]) {
    const { all, chosen } = counts()[q];
    const [of, picked] = [all, chosen].map(n => n.toLocaleString("en"));
    const text = width < 480 ? `Q${q}: ${picked} of ${of}`
      : `Q${q}${width < 760 ? "" : ` ${index.quadrants[q]}`}: ${of}, ${picked} selected`;
    const right = q === 1 || q === 3, top = q < 3, wide = context.measureText(text).width;
    const left = right ? width - EDGE.right - wide - 6 : EDGE.left + 6;
    const at = top ? EDGE.top + 16 : height - EDGE.bottom - 8;
    context.globalAlpha = 0.85;
    context.fillStyle = css("--paper");
    context.fillRect(left - 3, at - 13, wide + 6, 18);
    context.globalAlpha = 1;
    context.fillStyle = css("--ink");
    context.fillText(text, left, at);
  }
}
// A threshold's grip is a slider for keys, and for fingers, to whom the line alone is too thin.
const grips = ["difficulty", "influence"].map(name => [name, document.getElementById(`cut-${name}`)]).filter(([, grip]) => grip);
function placeGrips(width) {
  const { x, y } = axes();
  for (const [name, grip] of grips) {
    const across = name === "difficulty", value = choice.thresholds[name], [low, high] = plot.view[across ? "x" : "y"];
    grip.hidden = !cuts() || value < low || value > high;
    Object.assign(grip.style, across ? { left: `${x(value)}px`, top: `${EDGE.top}px` } : { left: `${width - EDGE.right}px`, top: `${y(value)}px` });
    for (const [key, shown] of [["min", low], ["max", high], ["now", value]]) grip.setAttribute(`aria-value${key}`, shown);
    grip.setAttribute("aria-valuetext", `${digits(value)}, ${counts()[1].all} rows in Q1`);
  }
}
function listenToGrips() {
  for (const [name, grip] of grips) {
    const move = value => { choice.thresholds[name] = value; soon(chosenChanged); };
    grip.onpointerdown = event => grip.setPointerCapture(event.pointerId);
    grip.onpointermove = event => {
      if (!grip.hasPointerCapture(event.pointerId)) return;
      const box = above.getBoundingClientRect(), { atX, atY } = axes();
      move(name === "difficulty" ? atX(event.clientX - box.left) : atY(event.clientY - box.top));
    };
    grip.onkeydown = event => {
      const steps = { ArrowUp: 1, ArrowRight: 1, ArrowDown: -1, ArrowLeft: -1, PageUp: 10, PageDown: -10 }[event.key];
      if (!steps) return;
      event.preventDefault();
      const [low, high] = plot.view[name === "difficulty" ? "x" : "y"];
      move(Math.min(high, Math.max(low, choice.thresholds[name] + steps * (high - low) / 100)));
    };
  }
}
let counted = null; // by quadrant; dropped when the choice changes
function counts() {
  if (counted) return counted;
  counted = Object.fromEntries([1, 2, 3, 4].map(q => [q, { all: 0, chosen: 0 }]));
  for (let i = 0; i < rows.count; i++) {
    const group = counted[choice.quadrant[i]];
    if (group) { group.all++; group.chosen += choice.chosen[i]; }
  }
  return counted;
}

function nearest(px, py) {
  const { x, y } = axes(), xOf = valuesOf(plot.x), yOf = valuesOf(plot.y);
  let best = -1, least = SPAN * SPAN;
  const column = Math.floor(px / SPAN), line = Math.floor(py / SPAN);
  for (let a = -1; a <= 1; a++) for (let b = -1; b <= 1; b++)
    for (let i = cells.first[(line + b) * cells.across + column + a] ?? -1; i >= 0; i = cells.next[i]) {
      const d = (x(xOf(i)) - px) ** 2 + (y(yOf(i)) - py) ** 2;
      if (d < least) { least = d; best = i; }
    }
  return best;
}
function lassoTest() {
  const xOf = valuesOf(plot.x), yOf = valuesOf(plot.y), ring = plot.lasso;
  return i => {
    const px = xOf(i), py = yOf(i);
    let inside = false;
    for (let k = 0, j = ring.length - 1; k < ring.length; j = k++) {
      const [ax, ay] = ring[k], [bx, by] = ring[j];
      if (ay > py !== by > py && px < (bx - ax) * (py - ay) / (by - ay) + ax) inside = !inside;
    }
    return inside;
  };
}
function lassoView() { // the rectangle in sight
  const { x: [left, right], y: [low, high] } = plot.view;
  plot.lasso = [[left, low], [right, low], [right, high], [left, high]];
  filterChanged();
}
function zoom(factor, px, py) {
  const { atX, atY } = axes(), centre = { x: atX(px), y: atY(py) };
  for (const axis of ["x", "y"])
    plot.view[axis] = plot.view[axis].map(v => centre[axis] + (v - centre[axis]) * factor);
  draw();
}
function pan(dx, dy) {
  const { atX, atY } = axes(), byX = atX(0) - atX(dx), byY = atY(0) - atY(dy);
  plot.view.x = plot.view.x.map(v => v + byX);
  plot.view.y = plot.view.y.map(v => v + byY);
  draw();
}

function listen() {
  let drag = null;
  const at = event => { const box = above.getBoundingClientRect(); return [event.clientX - box.left, event.clientY - box.top]; };
  const near = (px, py) => {
    if (!cuts()) return null;
    const { x, y } = axes();
    if (Math.abs(px - x(choice.thresholds.difficulty)) < 6) return "difficulty";
    return Math.abs(py - y(choice.thresholds.influence)) < 6 ? "influence" : null;
  };
  above.addEventListener("pointerdown", event => {
    const [px, py] = at(event), { atX, atY } = axes(), line = near(px, py);
    above.setPointerCapture(event.pointerId);
    const lasso = plot.tool === "lasso" || event.shiftKey;
    drag = { px, py, far: false, kind: line || (lasso ? "lasso" : "move") };
    if (drag.kind === "lasso") plot.lasso = [[atX(px), atY(py)]];
  });
  above.addEventListener("pointermove", event => {
    const [px, py] = at(event), { atX, atY } = axes();
    if (!drag) {
      const found = nearest(px, py), line = near(px, py);
      above.style.cursor = line === "difficulty" ? "ew-resize" : line ? "ns-resize" : found < 0 ? "crosshair" : "pointer";
      if (found !== plot.hovered) { plot.hovered = found; drawMarks(); tip(found, px, py); }
      return;
    }
    drag.far ||= Math.hypot(px - drag.px, py - drag.py) > 4;
    if (drag.kind === "lasso") { plot.lasso.push([atX(px), atY(py)]); drawMarks(); }
    else if (drag.kind === "move") { if (drag.far) { pan(px - drag.px, py - drag.py); drag.px = px; drag.py = py; } }
    else {
      choice.thresholds[drag.kind] = drag.kind === "difficulty" ? atX(px) : atY(py);
      soon(chosenChanged);
    }
  });
  above.addEventListener("pointerup", event => {
    const [px, py] = at(event), kind = drag?.kind, far = drag?.far;
    drag = null;
    if (kind === "lasso" && far) return filterChanged();
    if (kind === "lasso") plot.lasso = null;
    const found = far ? -1 : nearest(px, py);
    if (found >= 0) open(found);
    else drawMarks();
  });
  above.addEventListener("pointerleave", () => { plot.hovered = -1; tip(-1); drawMarks(); });
  above.addEventListener("wheel", event => {
    if (!event.ctrlKey && !event.metaKey && document.activeElement !== above) return; // the page scrolls
    event.preventDefault();
    zoom(event.deltaY > 0 ? 1.2 : 1 / 1.2, ...at(event));
  }, { passive: false });
  above.addEventListener("dblclick", () => { resetView(); draw(); });
  above.addEventListener("keydown", event => {
    const [width, height] = size();
    const keys = {
      "+": () => zoom(1 / 1.3, width / 2, height / 2), "=": () => zoom(1 / 1.3, width / 2, height / 2),
      "-": () => zoom(1.3, width / 2, height / 2), 0: () => { resetView(); draw(); },
      ArrowLeft: () => pan(40, 0), ArrowRight: () => pan(-40, 0),
      ArrowUp: () => pan(0, 40), ArrowDown: () => pan(0, -40), Enter: lassoView,
    };
    if (keys[event.key]) { event.preventDefault(); keys[event.key](); }
  });
  listenToGrips();
  new ResizeObserver(() => draw()).observe(plain);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
}

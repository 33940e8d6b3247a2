// ---- drawing: a colour for each cell, enlarged without smoothing, then borders and the chosen token as lines of one width
const DROPPED = 31;
// whether black lines have more contrast than white ones (WCAG 2), on a colour of linear luminance over 0.18
const isLight = (r, g, b) => 0.2126 * (r / 255) ** 2.2 + 0.7152 * (g / 255) ** 2.2 + 0.0722 * (b / 255) ** 2.2 > 0.18;

// whether the line between two cells lies on light colours
const isLightBetween = (colours, p, q) => isLight(...[0, 1, 2].map(c => (colours[3 * p + c] + colours[3 * q + c]) / 2));
// pixels of the page beside a picture and below it, for the scales of a spectrogram
const marginsOf = image => image.sound ? { left: 48, bottom: 22 } : { left: 0, bottom: 0 };

function cellColours(image, look, step, view) {
  const names = namesAt(image, look, step), count = names.length, colours = new Float32Array(3 * count);
  const paint = (p, r, g, b) => { colours[3 * p] = r; colours[3 * p + 1] = g; colours[3 * p + 2] = b; };
  if (view === "photo") {
    for (let p = 0; p < count; p++) paint(p, ...[0, 1, 2].map(c => image.sums[3 * p + c] / image.counts[p]));
  } else if (view === "picture") {
    const total = new Float64Array(3 * count), pixels = new Float64Array(count);
    names.forEach((name, p) => {
      if (name >= HIDDEN) return;
      pixels[name] += image.counts[p];
      for (let c = 0; c < 3; c++) total[3 * name + c] += image.sums[3 * p + c];
    });
    names.forEach((name, p) => { if (name < HIDDEN) paint(p, ...[0, 1, 2].map(c => total[3 * name + c] / pixels[name])); });
  } else if (view === "tokens") {
    names.forEach((name, p) => { if (name < HIDDEN) paint(p, ...image.palette.subarray(3 * look.rank[name], 3 * look.rank[name] + 3)); });
  } else {
    const sizes = sizesOf(image, look, step), most = largest(image);
    const seen = view === "attention" ? seenAt(look, step) : null;
    names.forEach((name, p) => {
      if (name >= HIDDEN) return;
      const level = seen ? seen[p] : Math.round(255 * Math.log(Math.max(1, sizes[name])) / Math.log(most));
      paint(p, ...heat.subarray(3 * Math.min(255, level), 3 * Math.min(255, level) + 3));
    });
  }
  names.forEach((name, p) => { if (name === GONE) view === "photo" ? paint(p, ...[0, 1, 2].map(c => 0.24 * colours[3 * p + c])) : paint(p, DROPPED, DROPPED, DROPPED); });
  return colours;
}

// the largest token of all settings that are shown, which have one scale
const largest = image => Math.max(2, ...panels.slice(1).flatMap(panel => [...sizesOf(image, lookOf(panel), lookOf(panel).blocks.length)]));

// what the class token saw in the block that comes next (after the last one: in the last one)
const seenAt = (look, step) => look.blocks[Math.min(step, look.blocks.length - 1)].attention || null;

function viewOf(panel) {
  if (panel.photo) return "photo";
  const view = at("view").value;
  return view === "attention" && !seenAt(lookOf(panel), state.step) ? "photo" : view;
}

// the part of the sheet of cells that is seen: one tile or all, zoomed
function windowOf(image) {
  const [rows, columns] = image.grid, one = image.tiles && !at("sheet").checked;
  const [high, wide] = one ? tileShape(image) : [rows, columns];
  const left = one ? state.frame % image.tiles.across * wide : 0, top = one ? Math.floor(state.frame / image.tiles.across) * high : 0;
  const { factor, x, y } = state.zoom;
  return { x: left + (x - 0.5 / factor) * wide, y: top + (y - 0.5 / factor) * high, w: wide / factor, h: high / factor, left, top, wide, high };
}
function aspectOf(image) {  // width ÷ height of what is seen
  if (image.sound) return window.innerWidth < 860 ? 2 : 3.6;
  const [high, wide] = image.tiles && !at("sheet").checked ? tileShape(image) : image.grid;
  return wide / high * (image.width / image.grid[1]) / (image.height / image.grid[0]);
}

// names of the tokens that a panel shows; the photo goes by the first setting, or by the one that the pointer is in
const namesIn = panel => namesAt(current(), lookOf(panel.photo ? panels[Math.max(1, state.panel)] : panel), state.step);

// draw one panel into any canvas of a size in pixels; `lines` is the width of borders
function paintInto(context, panel, width, height, lines) {
  const image = current(), names = namesIn(panel), seen = windowOf(image), view = viewOf(panel);
  const look = lookOf(panel.photo ? panels[1] : panel), colours = cellColours(image, look, state.step, view);
  const { left, bottom } = marginsOf(image), box = { x: left * lines, y: 0, w: width - left * lines, h: height - bottom * lines };
  const X = column => Math.round(box.x + (column - seen.x) / seen.w * box.w), Y = row => Math.round(box.y + (row - seen.y) / seen.h * box.h);
  context.clearRect(0, 0, width, height);
  context.save();
  context.beginPath(); context.rect(box.x, box.y, box.w, box.h); context.clip();
  const [rows, columns] = image.grid;
  if (view === "photo") {
    context.imageSmoothingEnabled = image.width < width && !image.sound;
    context.drawImage(image.canvas, X(0), Y(0), X(columns) - X(0), Y(rows) - Y(0));
  } else {
    context.imageSmoothingEnabled = false;
    for (const [row, column] of cellsIn(image, seen)) {
      const p = row * columns + column;
      context.fillStyle = `rgb(${colours[3 * p] + 0.5 | 0},${colours[3 * p + 1] + 0.5 | 0},${colours[3 * p + 2] + 0.5 | 0})`;
      context.fillRect(X(column), Y(row), X(column + 1) - X(column), Y(row + 1) - Y(row));
    }
  }
  const plain = panel.photo;
  if (view === "photo") fadeDropped(context, image, names, seen, X, Y);
  if (at("borders").checked && !plain) strokeBorders(context, image, names, colours, seen, X, Y, lines);
  if (image.tiles && at("sheet").checked) strokeTiles(context, image, X, Y, lines);
  if (state.patch !== null && names[state.patch] < HIDDEN) strokeToken(context, image, names, seen, X, Y, lines, plain);
  if (image.sound) playhead(context, image, seen, box, lines);
  context.restore();
  if (image.sound) drawAxes(context, image, seen, box, lines);
}

// rows and columns that are seen, at least in part, and belong to the tile
function* cellsIn(image, seen) {
  const from = [Math.max(seen.top, Math.floor(seen.y)), Math.max(seen.left, Math.floor(seen.x))];
  const to = [Math.min(seen.top + seen.high, Math.ceil(seen.y + seen.h)), Math.min(seen.left + seen.wide, Math.ceil(seen.x + seen.w))];
  for (let row = from[0]; row < to[0]; row++)
    for (let column = from[1]; column < to[1]; column++)
      if (tileOf(image, row * image.grid[1] + column) < frames(image)) yield [row, column];
}

function fadeDropped(context, image, names, seen, X, Y) {
  context.fillStyle = "rgba(0,0,0,.76)";
  for (const [row, column] of cellsIn(image, seen))
    if (names[row * image.grid[1] + column] === GONE) context.fillRect(X(column), Y(row), X(column + 1) - X(column), Y(row + 1) - Y(row));
}

// pairs of neighbouring cells of one tile, with the line between them
function* edgesIn(image, seen) {
  const columns = image.grid[1];
  for (const [row, column] of cellsIn(image, seen)) {
    const p = row * columns + column;
    if (column > seen.left && tileOf(image, p) === tileOf(image, p - 1)) yield [p, p - 1, column, row, column, row + 1];
    if (row > seen.top && tileOf(image, p) === tileOf(image, p - columns)) yield [p, p - columns, column, row, column + 1, row];
  }
}

// dark lines on light colours, light lines on dark ones
function strokeBorders(context, image, names, colours, seen, X, Y, lines) {
  const dark = new Path2D(), light = new Path2D();
  for (const [p, q, x0, y0, x1, y1] of edgesIn(image, seen)) {
    if (names[p] === names[q]) continue;
    const path = isLightBetween(colours, p, q) ? dark : light;
    path.moveTo(X(x0), Y(y0)); path.lineTo(X(x1), Y(y1));
  }
  const width = Math.max(1, Math.round(lines));
  context.save();
  if (width % 2) context.translate(0.5, 0.5);  // lines fill whole pixels
  context.lineWidth = width; context.lineCap = "square";
  context.strokeStyle = "rgba(0,0,0,.9)"; context.stroke(dark);
  context.strokeStyle = "rgba(255,255,255,.95)"; context.stroke(light);
  context.restore();
}

function strokeTiles(context, image, X, Y, lines) {
  const [rows, columns] = tileShape(image);
  context.strokeStyle = getComputedStyle(document.body).backgroundColor;
  context.lineWidth = 5 * lines;
  context.beginPath();
  for (let c = columns; c < image.grid[1]; c += columns) { context.moveTo(X(c), Y(0)); context.lineTo(X(c), Y(image.grid[0])); }
  for (let r = rows; r < image.grid[0]; r += rows) { context.moveTo(X(0), Y(r)); context.lineTo(X(image.grid[1]), Y(r)); }
  context.stroke();
}

// lines around the cells of a token
function* outlineOf(image, names, name, seen) {
  const columns = image.grid[1];
  for (const [row, column] of cellsIn(image, seen)) {
    const p = row * columns + column;
    if (names[p] !== name) continue;
    const same = q => q >= 0 && q < names.length && names[q] === name && tileOf(image, q) === tileOf(image, p);
    if (!(column > 0 && same(p - 1))) yield [column, row, column, row + 1];
    if (!(column < columns - 1 && same(p + 1))) yield [column + 1, row, column + 1, row + 1];
    if (!same(p - columns)) yield [column, row, column + 1, row];
    if (!same(p + columns)) yield [column, row + 1, column + 1, row + 1];
  }
}

// the chosen token: the others fade, and its outline is drawn twice, so that it is seen on every colour
function strokeToken(context, image, names, seen, X, Y, lines, plain) {
  const columns = image.grid[1], name = names[state.patch], outline = new Path2D();
  const style = getComputedStyle(document.documentElement), fade = style.getPropertyValue("--fade");
  for (const [row, column] of cellsIn(image, seen)) {
    const p = row * columns + column, box = [X(column), Y(row), X(column + 1) - X(column), Y(row + 1) - Y(row)];
    if (names[p] !== name) { context.fillStyle = fade; context.fillRect(...box); continue; }
    if (state.joined && state.joined.has(p)) { context.fillStyle = style.getPropertyValue("--tint"); context.fillRect(...box); }
  }
  for (const [x0, y0, x1, y1] of outlineOf(image, names, name, seen)) { outline.moveTo(X(x0), Y(y0)); outline.lineTo(X(x1), Y(y1)); }
  context.lineCap = "round";
  context.strokeStyle = "#fff"; context.lineWidth = 5 * lines; context.stroke(outline);
  context.strokeStyle = style.getPropertyValue("--mark"); context.lineWidth = 2.5 * lines; context.stroke(outline);
}

// ---- scales of a spectrogram
function drawAxes(context, image, seen, box, lines) {
  const [rows, columns] = image.grid, colour = getComputedStyle(document.body).color;
  context.fillStyle = context.strokeStyle = colour;
  context.font = `${11 * lines}px system-ui, sans-serif`; context.lineWidth = lines;
  const first = seen.x / columns * image.seconds, length = seen.w / columns * image.seconds;
  const step = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10].find(one => length / one <= Math.max(2, box.w / (60 * lines))) || 20;
  context.textAlign = "center"; context.textBaseline = "top";
  for (let t = Math.ceil(first / step - 1e-6) * step; t <= first + length + 1e-6; t += step) {
    const x = Math.min(box.x + box.w - 1, box.x + (t - first) / length * box.w);
    context.fillRect(x, box.h, lines, 4 * lines);
    const text = `${Number(t.toFixed(2))} s`, half = context.measureText(text).width / 2;
    context.fillText(text, Math.min(x, box.x + box.w - half), box.h + 6 * lines);
  }
  context.textAlign = "right"; context.textBaseline = "middle";
  let above = Infinity;  // labels that would touch the one before are left out
  for (const mark of [125, 250, 500, 1000, 2000, 4000]) {
    const band = image.bands.findIndex(one => one >= mark), y = (1 - (band + 0.5) / image.bands.length) * rows;
    const at = (y - seen.y) / seen.h * box.h;
    if (band <= 0 || at < 6 * lines || at > box.h - 6 * lines || above - at < 13 * lines) continue;
    above = at;
    context.fillRect(box.x - 4 * lines, at, 4 * lines, lines);
    context.fillText(hertz(mark).replace(" ", "\u2009"), box.x - 6 * lines, at);
  }
}

function playhead(context, image, seen, box, lines) {
  const audio = at("audio");
  if (!audio.currentTime) return;
  const x = box.x + (audio.currentTime / image.seconds * image.grid[1] - seen.x) / seen.w * box.w;
  context.fillStyle = "#000"; context.fillRect(x - 1.5 * lines, 0, 3 * lines, box.h);
  context.fillStyle = "#fff"; context.fillRect(x - 0.5 * lines, 0, lines, box.h);
}

// ---- on the screen
function draw(panel) {
  const density = window.devicePixelRatio || 1, canvas = panel.canvas;
  const width = Math.max(1, Math.round(canvas.clientWidth * density)), height = Math.max(1, Math.round(canvas.clientHeight * density));
  if (canvas.width !== width || canvas.height !== height) { canvas.width = width; canvas.height = height; }
  paintInto(panel.context, panel, width, height, density);
  const image = current(), look = panel.photo ? null : lookOf(panel);
  panel.caption.textContent = look ? `${tokensAt(image, look, state.step)} of ${image.patches} tokens` : "";
}

// pictures beside each other, as large as the window allows; wide ones above each other
function arrange() {
  const image = current();
  if (!image || !image.ready) return;
  const aspect = aspectOf(image), stage = document.querySelector(".stage"), stacked = aspect > 1.7;
  stage.classList.toggle("stacked", stacked);
  const rows = stacked ? panels.length : 1, room = window.innerHeight - at("pictures").getBoundingClientRect().top - window.scrollY;
  const strip = image.tiles ? 150 : image.sound ? 60 : 0, high = Math.max(170, (room - strip - 40 * rows - 24) / rows);
  for (const panel of panels) { panel.canvas.style.aspectRatio = String(aspect); panel.canvas.style.maxHeight = `${high}px`; panel.figure.style.maxWidth = `${high * aspect}px`; }
}

// everything that shows the choice; `same` keeps the panel about the token, of which nothing changed
function drawAll(same = false) {
  const image = current();
  if (!image || !image.ready) return;
  if (same !== true) state.joined = null;  // its row in the panel goes
  panels.forEach(draw);
  const blocks = image.looks[0].blocks.length;
  at("where").textContent = state.step === 0 ? `input, of ${blocks} blocks` : `after block ${state.step} of ${blocks}`;
  at("step").setAttribute("aria-valuetext", at("where").textContent);
  const view = at("view").value;
  at("scale").hidden = view !== "sizes" && view !== "attention";
  at("low").textContent = view === "sizes" ? "1 patch" : "none";
  at("high").textContent = view === "sizes" ? `${largest(image)} patches` : "most";
  at("fit").textContent = `${Number(state.zoom.factor.toFixed(1))}×`;
  drawFilm();
  if (same !== true) describe();
  remember();
}

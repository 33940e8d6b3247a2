// ---- what is known of the inputs; everything from outside (file names, class names) enters the page as text, never as HTML
const data = JSON.parse(document.getElementById("data").textContent);
const at = id => document.getElementById(id);
const GONE = 65535, HIDDEN = 65534;  // in place of a cell: a dropped patch, and a token of which only padding is left

function unpacked(text, kind) {
  const bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0));
  return new kind(bytes.buffer);
}
const heat = unpacked(data.heat, Uint8Array);

// what was chosen; `patch` is a cell of the picture, `pinned` keeps it while the pointer moves elsewhere
const state = {
  image: 0, step: 0, shown: [0, 1], patch: null, panel: 0, pinned: false, joined: null,
  zoom: { factor: 1, x: 0.5, y: 0.5 }, frame: 0, playing: null, rolling: null,
};
const panels = [];  // the photo, and one for each setting that is shown
const current = () => data.images[state.image];
const lookOf = panel => current().looks[panel.look];

// an image, unpacked once
const prepared = image => image.preparing ??= prepare(image);
async function prepare(image) {
  const picture = new Image();
  picture.src = image.picture;
  await picture.decode();
  image.canvas = element("canvas", { width: image.width, height: image.height });
  image.canvas.getContext("2d").drawImage(picture, 0, 0);
  const [rows, columns] = image.grid, cells = rows * columns;
  image.counts = new Int32Array(cells);  // pixels of each cell
  const span = (i, parts, whole) => Math.ceil((i + 1) * whole / parts) - Math.ceil(i * whole / parts);
  for (let cell = 0; cell < cells; cell++)
    image.counts[cell] = span(Math.floor(cell / columns), rows, image.height) * span(cell % columns, columns, image.width);
  image.sums = unpacked(image.sums, Float32Array);
  image.palette = unpacked(image.palette, Uint8Array);
  image.itself = Uint16Array.from({ length: cells }, (_, i) => tileOf(image, i) < frames(image) ? i : GONE);
  for (const look of image.looks) {
    for (const block of look.blocks) {
      block.names = unpacked(block.names, Uint16Array);
      if (block.unseen) block.unseen = unpacked(block.unseen, Uint16Array);
      if (block.attention) block.attention = unpacked(block.attention, Uint8Array);
      if (block.from) {
        block.from = unpacked(block.from, Uint16Array);
        block.to = unpacked(block.to, Uint16Array);
        block.similarity = unpacked(block.similarity, Float32Array);
      }
    }
    look.rank = survival(image, look);
  }
  image.ready = true;
  return image;
}

// tokens in the order in which they are lost, the last ones first, so that these get the colours that differ most
function survival(image, look) {
  const last = new Int32Array(image.itself.length).fill(-1);
  look.blocks.forEach((block, k) => { for (const name of block.names) if (name < HIDDEN) last[name] = k; });
  const order = [...last.keys()].sort((a, b) => (image.itself[a] === GONE) - (image.itself[b] === GONE) || last[b] - last[a] || a - b), rank = new Int32Array(order.length);
  order.forEach((name, i) => { rank[name] = i; });
  return rank;
}

const namesAt = (image, look, step) => step === 0 ? image.itself : look.blocks[step - 1].names;

// patches of each token, by its name; members in the padding count although they are not drawn
function sizesOf(image, look, step) {
  const names = namesAt(image, look, step), unseen = step ? look.blocks[step - 1].unseen : null, sizes = new Uint32Array(names.length);
  names.forEach(name => { if (name < HIDDEN) sizes[name]++; });
  if (unseen) {
    const seen = new Set();
    names.forEach((name, p) => { if (name < HIDDEN && !seen.has(name)) { seen.add(name); sizes[name] += unseen[p]; } });
  }
  return sizes;
}

const membersOf = (names, name) => [...names.keys()].filter(p => names[p] === name);
const tokensAt = (image, look, step) => step ? look.blocks[step - 1].tokens : image.patches;

// ---- videos are a sheet of tiles, one for each frame
const frames = image => image.tiles ? image.tiles.count : 1;
function tileShape(image) {
  if (!image.tiles) return image.grid;
  return [image.grid[0] / Math.ceil(image.tiles.count / image.tiles.across), image.grid[1] / image.tiles.across];
}
function tileOf(image, cell) {
  if (!image.tiles) return 0;
  const [rows, columns] = tileShape(image), row = Math.floor(cell / image.grid[1]), column = cell % image.grid[1];
  return Math.floor(row / rows) * image.tiles.across + Math.floor(column / columns);
}

// ---- where a cell lies, in words
const hertz = value => value >= 1000 ? `${Number((value / 1000).toPrecision(2))} kHz` : `${Math.round(value)} Hz`;
function place(image, cell) {
  const row = Math.floor(cell / image.grid[1]), column = cell % image.grid[1];
  if (image.sound) {
    const width = image.seconds / image.grid[1], from = column * width, count = image.bands.length;
    const time = `${from.toFixed(2)}–${(from + width).toFixed(2)} s`;
    if (image.grid[0] === 1) return time;
    const high = image.bands[Math.min(count - 1, count - 1 - Math.floor(row * count / image.grid[0]))];
    return `${time}, ${hertz(high)}`;
  }
  if (!image.tiles) return `row ${row + 1}, column ${column + 1}`;
  const [rows, columns] = tileShape(image);
  return `frame ${tileOf(image, cell) + 1}, row ${row % rows + 1}, column ${column % columns + 1}`;
}

function element(kind, properties = {}, ...children) {
  const made = Object.assign(document.createElement(kind), properties);
  made.append(...children);
  return made;
}

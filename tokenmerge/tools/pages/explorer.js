"use strict";
// Everything from outside (file names, class names, settings) enters the page as text, never as HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const at = id => document.getElementById(id);
const GONE = 65535, DROPPED = 31, BORDER = 0.25, GREY = 0.45 * 255 * 0.75;

function unpacked(text, kind) {
  const bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0));
  return new kind(bytes.buffer);
}
const heat = unpacked(data.heat, Uint8Array);

const state = { image: 0, step: 0, shown: [0, 1], patch: null, panel: 0, playing: null };
const panels = [];

// ---- what is known of an image, unpacked once
async function prepared(image) {
  if (image.ready) return image;
  const picture = new Image();
  picture.src = image.picture;
  await picture.decode();
  const canvas = new OffscreenCanvas(image.width, image.height), context = canvas.getContext("2d");
  context.drawImage(picture, 0, 0);
  image.pixels = context.getImageData(0, 0, image.width, image.height).data;
  const [rows, columns] = image.grid, patches = rows * columns;
  image.cells = new Int32Array(image.width * image.height);
  for (let y = 0, i = 0; y < image.height; y++) {
    const row = Math.floor(y * rows / image.height) * columns;
    for (let x = 0; x < image.width; x++, i++) image.cells[i] = row + Math.floor(x * columns / image.width);
  }
  image.counts = new Int32Array(patches);
  for (const cell of image.cells) image.counts[cell]++;
  image.sums = unpacked(image.sums, Float32Array);
  for (const look of image.looks) {
    for (const block of look.blocks) {
      block.names = unpacked(block.names, Uint16Array);
      if (block.attention) block.attention = unpacked(block.attention, Uint8Array);
      if (block.from) {
        block.from = unpacked(block.from, Uint16Array);
        block.to = unpacked(block.to, Uint16Array);
        block.similarity = unpacked(block.similarity, Int16Array);
      }
    }
  }
  image.itself = Uint16Array.from({ length: patches }, (_, i) => i);
  image.ready = true;
  return image;
}

const namesAt = (image, look, step) => step === 0 ? image.itself : look.blocks[step - 1].names;

function sizesOf(names) {
  const sizes = new Uint32Array(names.length);
  for (const name of names) if (name !== GONE) sizes[name]++;
  return sizes;
}

// ---- drawing: one colour for each patch, then one pass over the pixels
function patchColours(image, look, step, names, view) {
  const patches = names.length, colours = new Float32Array(3 * patches);
  if (view === "picture") {
    const total = new Float64Array(3 * patches), count = new Float64Array(patches);
    for (let p = 0; p < patches; p++) {
      const name = names[p];
      if (name === GONE) continue;
      count[name] += image.counts[p];
      for (let c = 0; c < 3; c++) total[3 * name + c] += image.sums[3 * p + c];
    }
    for (let p = 0; p < patches; p++)
      for (let c = 0; c < 3; c++) colours[3 * p + c] = names[p] === GONE ? DROPPED : total[3 * names[p] + c] / count[names[p]];
    return colours;
  }
  const sizes = sizesOf(names), last = sizesOf(namesAt(image, look, look.blocks.length));
  const most = Math.max(2, ...last), attention = view === "attention" ? seenAt(look, step) : null;
  for (let p = 0; p < patches; p++) {
    const level = attention ? attention[p] : Math.round(255 * Math.log(Math.max(1, sizes[names[p]] || 1)) / Math.log(most));
    for (let c = 0; c < 3; c++) colours[3 * p + c] = names[p] === GONE ? DROPPED : heat[3 * Math.min(255, level) + c];
  }
  return colours;
}

// what the class token saw in the block that comes next (after the last one: in the last one)
function seenAt(look, step) {
  const block = look.blocks[Math.min(step, look.blocks.length - 1)];
  return block.attention || null;
}

function draw(panel) {
  const image = data.images[state.image], look = image.looks[panel.look], names = namesAt(image, look, state.step);
  const view = at("view").value, photo = view === "photo" || (view === "attention" && !seenAt(look, state.step));
  const colours = photo ? null : patchColours(image, look, state.step, names, view);
  const lit = state.patch === null ? null : names[state.patch], borders = at("borders").checked;
  const { width, height, cells, pixels } = image, out = panel.buffer.data;
  for (let i = 0, y = 0; y < height; y++) {
    for (let x = 0; x < width; x++, i++) {
      const cell = cells[i], name = names[cell], o = 4 * i;
      let r, g, b;
      if (photo) {
        const fade = name === GONE ? 0.24 : 1;
        r = pixels[o] * fade; g = pixels[o + 1] * fade; b = pixels[o + 2] * fade;
      } else { r = colours[3 * cell]; g = colours[3 * cell + 1]; b = colours[3 * cell + 2]; }
      if (borders && ((x > 0 && names[cells[i - 1]] !== name) || (y > 0 && names[cells[i - width]] !== name))) {
        r = r * BORDER + GREY; g = g * BORDER + GREY; b = b * BORDER + GREY;
      }
      if (lit !== null && name !== lit) { r = 0.35 * r + 60; g = 0.35 * g + 60; b = 0.35 * b + 60; }
      out[o] = r + 0.5; out[o + 1] = g + 0.5; out[o + 2] = b + 0.5; out[o + 3] = 255;
    }
  }
  panel.context.putImageData(panel.buffer, 0, 0);
  const left = look.blocks.length && state.step ? look.blocks[state.step - 1].tokens : names.length;
  panel.caption.textContent = `${left} tokens of ${names.length} patches`;
}

function drawAll() {
  const image = data.images[state.image];
  if (!image || !image.ready) return;
  panels.forEach(draw);
  const blocks = image.looks[0].blocks.length;
  at("where").textContent = state.step === 0 ? `input, of ${blocks} blocks` : `after block ${state.step} of ${blocks}`;
  at("step").setAttribute("aria-valuetext", at("where").textContent);
  const view = at("view").value;
  at("scale").hidden = view !== "sizes" && view !== "attention";
  at("low").textContent = view === "sizes" ? "1 patch" : "none";
  at("high").textContent = view === "sizes" ? `${Math.max(...sizesOf(namesAt(image, image.looks[panels[0].look], blocks)))} patches` : "most";
  describe();
}

// ---- the token under the pointer
function line(text) {
  const p = document.createElement("p");
  p.textContent = text;
  at("token").append(p);
}
const place = (image, patch) => `row ${Math.floor(patch / image.grid[1]) + 1}, column ${patch % image.grid[1] + 1}`;

function describe() {
  at("token").replaceChildren();
  const image = data.images[state.image];
  if (state.patch === null) return line("No token is chosen: point at a patch.");
  const look = image.looks[panels[state.panel].look], names = namesAt(image, look, state.step), name = names[state.patch];
  line(`Patch at ${place(image, state.patch)}, ${look.title}`);
  if (name === GONE) return line("Its token was dropped.");
  const members = [...names.keys()].filter(p => names[p] === name);
  const shown = members.slice(0, 12).map(p => `(${Math.floor(p / image.grid[1]) + 1}, ${p % image.grid[1] + 1})`).join(" ");
  line(`Its token has size ${members.length}: ${shown}${members.length > 12 ? " …" : ""}`);
  const inside = new Set(members), events = [];
  for (let k = 0; k < state.step; k++) {
    const { from, to, similarity } = look.blocks[k];
    for (let i = 0; from && i < from.length; i++)
      if (inside.has(from[i]) && to[i] !== GONE) events.push({ block: k + 1, from: from[i], to: to[i], similarity: similarity[i] / 10000 });
  }
  for (const e of events.slice(-4).reverse())
    line(`Block ${e.block}: the token of ${place(image, e.from)} joined that of ${place(image, e.to)}, cosine ${e.similarity.toFixed(3)}`);
  if (events.length > 4) line(`… and ${events.length - 4} merges before.`);
  const next = look.blocks[state.step];
  for (let i = 0; next && next.from && i < next.from.length; i++) {
    if (names[next.from[i]] !== name) continue;
    line(next.to[i] === GONE ? "Next it is dropped." : `Next it joins the token of ${place(image, next.to[i])}, cosine ${(next.similarity[i] / 10000).toFixed(3)}.`);
  }
}

// ---- panels
function element(kind, properties = {}, ...children) {
  const made = Object.assign(document.createElement(kind), properties);
  made.append(...children);
  return made;
}

function predictions(panel, image, look) {
  const { top } = look, before = image.unmerged.top;
  panel.top.replaceChildren();
  if (!top.length) return;
  panel.top.append(element("tr", {}, element("th", { textContent: "unmerged" }), element("th", { textContent: look.title })));
  for (let i = 0; i < top.length; i++) {
    const cells = [before[i], top[i]].map(([name, share]) => {
      const cell = element("td", { textContent: `${name} ${(100 * share).toFixed(1)} %` });
      cell.style.setProperty("--share", `${100 * share}%`);
      return cell;
    });
    panel.top.append(element("tr", {}, ...cells));
  }
}

function makePanels() {
  const image = data.images[state.image], count = at("two").checked ? 2 : 1;
  const side = state.panel < count ? state.panel : 0;
  panels.length = 0;
  at("panels").replaceChildren();
  for (let i = 0; i < count; i++) {
    const panel = { look: Math.min(state.shown[i], image.looks.length - 1) };
    const choose = element("select", { ariaLabel: `setting ${i + 1}` });
    image.looks.forEach((look, k) => choose.append(element("option", { value: k, textContent: look.title })));
    choose.value = panel.look;
    choose.addEventListener("change", () => { state.shown[i] = Number(choose.value); makePanels(); });
    panel.caption = element("span");
    const canvas = element("canvas", { width: image.width, height: image.height, tabIndex: 0 });
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `${image.name}: merged tokens`);
    panel.context = canvas.getContext("2d", { willReadFrequently: true });  // it is only ever written by bytes
    panel.buffer = panel.context.createImageData(image.width, image.height);
    panel.top = element("table");
    const look = image.looks[panel.look];
    const speed = look.speed ? `, ${look.speed.toFixed(2)} times as fast here` : "";
    const cost = element("span", { textContent: `${look.gflops.toPrecision(3)} of ${image.unmerged.gflops.toPrecision(3)} GFLOPs${speed}` });
    cost.style.fontWeight = "normal";
    at("panels").append(element("section", { className: "panel" }, element("h2", {}, choose, panel.caption, cost), canvas, panel.top));
    predictions(panel, image, look);
    panels.push(panel);
    pointing(canvas, i);
  }
  state.panel = side;
  drawAll();
}

function choosePatch(patch, panel) {
  if (patch === state.patch && panel === state.panel) return;
  state.patch = patch; state.panel = panel;
  drawAll();
}

function pointing(canvas, panel) {
  const patchUnder = event => {
    const image = data.images[state.image], box = canvas.getBoundingClientRect();
    const row = Math.floor((event.clientY - box.top) / box.height * image.grid[0]);
    const column = Math.floor((event.clientX - box.left) / box.width * image.grid[1]);
    const inside = row >= 0 && column >= 0 && row < image.grid[0] && column < image.grid[1];
    return inside ? row * image.grid[1] + column : null;
  };
  canvas.addEventListener("pointermove", event => choosePatch(patchUnder(event), panel));
  canvas.addEventListener("pointerdown", event => choosePatch(patchUnder(event), panel));
  canvas.addEventListener("pointerleave", event => { if (event.pointerType === "mouse") choosePatch(null, panel); });
  canvas.addEventListener("keydown", event => {
    const columns = data.images[state.image].grid[1], patches = columns * data.images[state.image].grid[0];
    const move = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
    if (move === undefined) return;
    event.preventDefault(); event.stopPropagation();
    const patch = state.patch === null ? 0 : state.patch + move;
    if (patch >= 0 && patch < patches) choosePatch(patch, panel);
  });
}

// ---- time
function goTo(step) {
  const last = data.images[state.image].looks[0].blocks.length;
  state.step = Math.max(0, Math.min(last, step));
  at("step").value = state.step;
  drawAll();
}
function play(on) {
  clearInterval(state.playing);
  state.playing = null;
  at("play").textContent = on ? "❚❚" : "▶";
  at("play").setAttribute("aria-label", on ? "pause" : "play");
  if (!on) return;
  const last = data.images[state.image].looks[0].blocks.length;
  if (state.step === last) goTo(0);
  state.playing = setInterval(() => { if (state.step >= last) play(false); else goTo(state.step + 1); }, 600);
}

at("step").addEventListener("input", () => { play(false); goTo(Number(at("step").value)); });
at("play").addEventListener("click", () => play(state.playing === null));
for (const id of ["view", "borders"]) at(id).addEventListener("change", drawAll);
at("two").addEventListener("change", makePanels);
at("theme").addEventListener("click", () => {
  const dark = document.documentElement.dataset.theme
    ? document.documentElement.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = dark ? "light" : "dark";
});
document.addEventListener("keydown", event => {
  const typing = event.target.matches("input[type=text], input[type=file], select");
  if (at("main").hidden || typing || event.ctrlKey || event.metaKey || event.altKey) return;
  const onButton = event.target.matches("button, input[type=checkbox]"), onSlider = event.target === at("step");
  if (event.key === "ArrowLeft" && !onSlider) goTo(state.step - 1);
  else if (event.key === "ArrowRight" && !onSlider) goTo(state.step + 1);
  else if (event.key === " " && !onButton) play(state.playing === null);
  else if (event.key === "b") { at("borders").checked = !at("borders").checked; drawAll(); }
  else if (event.key === "v") {
    const able = [...at("view").options].filter(option => !option.disabled);
    at("view").value = able[(able.indexOf(at("view").selectedOptions[0]) + 1) % able.length].value;
    drawAll();
  }
  else if (event.key === "2") { at("two").checked = !at("two").checked; makePanels(); }
  else return;
  event.preventDefault();
});
at("legend").style.background = `linear-gradient(90deg, ${[0, 64, 128, 192, 255].map(i => `rgb(${heat.slice(3 * i, 3 * i + 3).join(",")})`).join(", ")})`;

// ---- images
async function showImage(index) {
  play(false);
  state.image = index; state.patch = null;
  const image = await prepared(data.images[index]);
  const seen = image.looks.every(look => look.blocks.some(block => block.attention));
  const choice = at("view").querySelector("[value=attention]");
  choice.disabled = !seen;
  choice.textContent = image.attention;
  if (!seen && at("view").value === "attention") at("view").value = "picture";
  at("step").max = image.looks[0].blocks.length;
  at("main").hidden = false;
  at("two").disabled = image.looks.length < 2;
  if (image.looks.length < 2) at("two").checked = false;
  state.step = Math.min(state.step, image.looks[0].blocks.length);
  makePanels();
}
function listImages() {
  at("image").replaceChildren(...data.images.map((image, i) => element("option", { value: i, textContent: image.name })));
  at("images").hidden = data.images.length < 2;
}
at("image").addEventListener("change", () => showImage(Number(at("image").value)));

// ---- the live explorer
let asked = 0;
async function run(body, query) {
  const status = at("status"), mine = ++asked;  // an answer that was overtaken is not shown
  if (body && body.size > data.limit) {
    status.className = "bad"; status.textContent = `the file is larger than ${data.limit >> 20} MiB: make it smaller`;
    return;
  }
  status.className = ""; status.textContent = "running …"; at("run").disabled = true;
  try {
    const settings = at("r").value.trim().split(/\s+/).map(one => `r=${encodeURIComponent(one)}`).join("&");
    const answer = await fetch(`api/run?${settings}&${query}`, { method: "POST", body, headers: { "X-Requested-With": "tokenmerge" } });
    const found = await answer.json();
    if (mine !== asked) return;
    if (!answer.ok) throw new Error(found.error);
    data.images = [found];
    listImages();
    await showImage(0);
    status.textContent = found.name;
  } catch (error) {
    if (mine === asked) { status.className = "bad"; status.textContent = error.message; }
  } finally { if (mine === asked) at("run").disabled = false; }
}
if (data.live) {
  let own = null;
  const again = () => own ? run(own, `name=${encodeURIComponent(own.name)}`) : run(null, `sample=${at("sample").value}`);
  data.samples.forEach((name, i) => at("sample").append(element("option", { value: i, textContent: name })));
  at("sample").addEventListener("change", () => { own = null; at("file").value = ""; again(); });
  at("file").addEventListener("change", () => { own = at("file").files[0] || null; again(); });
  at("run").addEventListener("click", again);
  at("r").addEventListener("keydown", event => { if (event.key === "Enter") again(); });
  for (const kind of ["dragover", "dragleave", "drop"]) document.addEventListener(kind, event => {
    event.preventDefault();
    at("drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop" && event.dataTransfer.files.length) { own = event.dataTransfer.files[0]; again(); }
  });
  if (data.samples.length) again();
  else { at("sample").parentElement.hidden = true; at("status").textContent = "choose a picture, or drop one here"; }
} else {
  listImages();
  showImage(0).then(() => goTo(data.images[0].looks[0].blocks.length));
}

// ---- saving what is shown, as pixels or as a drawing, and a link to it
const stem = () => `${current().name.replace(/\.[^.]*$/, "")}-${panels.slice(1).map(panel => lookOf(panel).title).join("-")}-block${state.step}`.replace(/[^\w.=-]+/g, "_");
const captionOf = panel => panel.photo ? current().name : `${lookOf(panel).title}, ${state.step ? `after block ${state.step}` : "input"}: ${tokensAt(current(), lookOf(panel), state.step)} of ${current().patches}`;

function offer(blob, name) {
  const url = URL.createObjectURL(blob), link = element("a", { href: url, download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

// sizes of a saved picture: one column of 900 pixels for each panel
function sheetOf() {
  const aspect = aspectOf(current()), stacked = aspect > 1.7, wide = stacked ? 1400 : 900, high = Math.round(wide / aspect), gap = 24, text = 44;
  const box = i => stacked ? { x: gap, y: gap + i * (high + text + gap) } : { x: gap + i * (wide + gap), y: gap };
  const width = stacked ? wide + 2 * gap : panels.length * (wide + gap) + gap;
  return { wide, high, gap, text, box, width, height: stacked ? gap + panels.length * (high + text + gap) : high + text + 2 * gap };
}

function savePNG() {
  const { wide, high, text, box, width, height } = sheetOf(), canvas = element("canvas", { width, height }), context = canvas.getContext("2d");
  const style = getComputedStyle(document.body);
  context.fillStyle = style.backgroundColor; context.fillRect(0, 0, width, height);
  panels.forEach((panel, i) => {
    const part = new OffscreenCanvas(wide, high);
    paintInto(part.getContext("2d"), panel, wide, high, 2);
    context.drawImage(part, box(i).x, box(i).y);
    context.fillStyle = style.color; context.font = "26px system-ui, sans-serif";
    context.fillText(captionOf(panel), box(i).x, box(i).y + high + text - 10, wide);
  });
  // `toBlob` waits until the page is idle, for up to seven seconds
  offer(new Blob([unpacked(canvas.toDataURL("image/png").split(",")[1], Uint8Array)], { type: "image/png" }), `${stem()}.png`);
}

const escaped = text => text.replace(/[&<>"']/g, c => `&#${c.codePointAt(0)};`);
const rgb = (colours, p) => `#${[0, 1, 2].map(c => Math.round(colours[3 * p + c]).toString(16).padStart(2, "0")).join("")}`;

function drawingOf(panel) {  // in units of one cell
  const image = current(), seen = windowOf(image), view = viewOf(panel), look = lookOf(panel.photo ? panels[1] : panel);
  const names = namesIn(panel), colours = cellColours(image, look, state.step, view), [rows, columns] = image.grid, parts = [];
  if (view === "photo") {
    parts.push(`<image href="${image.picture}" width="${columns}" height="${rows}" preserveAspectRatio="none"/>`);
    for (const [row, column] of cellsIn(image, seen))
      if (names[row * columns + column] === GONE) parts.push(`<rect x="${column}" y="${row}" width="1" height="1" fill="#000" fill-opacity=".76"/>`);
  } else {  // neighbours of one colour in a row are one rectangle
    let run = null;
    const end = () => { if (run) parts.push(`<rect x="${run.x}" y="${run.y}" width="${run.w}" height="1" fill="${run.fill}"/>`); run = null; };
    for (const [row, column] of cellsIn(image, seen)) {
      const fill = rgb(colours, row * columns + column);
      if (run && run.y === row && run.x + run.w === column && run.fill === fill) run.w++;
      else { end(); run = { x: column, y: row, w: 1, fill }; }
    }
    end();
  }
  if (at("borders").checked && !panel.photo) {
    const paths = { dark: "", light: "" };
    for (const [p, q, x0, y0, x1, y1] of edgesIn(image, seen)) {
      if (names[p] === names[q]) continue;
      paths[isLightBetween(colours, p, q) ? "dark" : "light"] += `M${x0} ${y0}L${x1} ${y1}`;
    }
    for (const [kind, colour] of [["dark", "#000"], ["light", "#fff"]])
      parts.push(`<path d="${paths[kind]}" stroke="${colour}" stroke-opacity=".85" stroke-width="2" vector-effect="non-scaling-stroke" fill="none"/>`);
  }
  if (state.patch !== null && names[state.patch] < HIDDEN) {
    const name = names[state.patch];
    for (const [row, column] of cellsIn(image, seen))
      if (names[row * columns + column] !== name) parts.push(`<rect x="${column}" y="${row}" width="1" height="1" fill="#fff" fill-opacity=".5"/>`);
    const path = [...outlineOf(image, names, name, seen)].map(([x0, y0, x1, y1]) => `M${x0} ${y0}L${x1} ${y1}`).join("");
    for (const [colour, width] of [["#fff", 10], ["#d55e00", 5]])
      parts.push(`<path d="${path}" stroke="${colour}" stroke-width="${width}" stroke-linecap="round" vector-effect="non-scaling-stroke" fill="none"/>`);
  }
  return { seen, body: parts.join("") };
}

function saveSVG() {
  const { wide, high, text, box, width, height } = sheetOf();
  const parts = panels.map((panel, i) => {
    const { seen, body } = drawingOf(panel), { x, y } = box(i);
    return `<svg x="${x}" y="${y}" width="${wide}" height="${high}" viewBox="${seen.x} ${seen.y} ${seen.w} ${seen.h}" preserveAspectRatio="none" shape-rendering="crispEdges">${body}</svg>`
      + `<text x="${x}" y="${y + high + text - 10}" font-family="sans-serif" font-size="26">${escaped(captionOf(panel))}</text>`;
  });
  const whole = `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}" viewBox="0 0 ${width} ${height}"><rect width="${width}" height="${height}" fill="#fff"/>${parts.join("")}</svg>`;
  offer(new Blob([whole], { type: "image/svg+xml" }), `${stem()}.svg`);
}

// ---- the address holds what is shown
function remember() {
  const values = { i: state.image, b: state.step, s: state.shown[0], v: at("view").value };
  if (at("two").checked) values.s2 = state.shown[1];
  if (!at("borders").checked) values.o = 0;
  if (state.pinned) { values.p = state.patch; values.in = state.panel; }
  if (state.zoom.factor > 1) values.z = [state.zoom.factor, state.zoom.x, state.zoom.y].map(one => Number(one.toFixed(4))).join(",");
  if (current().tiles) values.f = at("sheet").checked ? "all" : state.frame;
  Object.assign(values, data.live ? asked.link : {});
  const text = `#${new URLSearchParams(values)}`;
  state.written = text;
  clearTimeout(writing);
  if (text !== location.hash) writing = setTimeout(() => history.replaceState(null, "", text), 150);  // browsers limit how often
}
let writing = 0;

const remembered = () => new URLSearchParams(location.hash.slice(1));
function recalled(values) {
  const image = current(), number = (name, low, high, otherwise) => {
    const value = values.has(name) ? Number(values.get(name)) : NaN;
    return Number.isInteger(value) && value >= low && value <= high ? value : otherwise;
  };
  const last = image.looks.length - 1, view = at("view").querySelector(`option[value="${CSS.escape(values.get("v") || "")}"]`);
  state.shown = [number("s", 0, last, 0), number("s2", 0, last, Math.min(1, last))];
  at("two").checked = values.has("s2") && last > 0;
  at("borders").checked = values.get("o") !== "0";
  if (view && !view.disabled) at("view").value = view.value;
  at("sheet").checked = values.get("f") === "all";
  state.frame = number("f", 0, frames(image) - 1, 0);
  state.step = number("b", 0, image.looks[0].blocks.length, image.looks[0].blocks.length);
  state.patch = number("p", 0, image.itself.length - 1, null);
  if (state.patch !== null && image.itself[state.patch] === GONE) state.patch = null;  // a tile without a frame
  state.pinned = state.patch !== null;
  state.panel = number("in", 0, at("two").checked ? 2 : 1, 1);
  const zoom = (values.get("z") || "").split(",").map(Number);
  state.zoom = zoom.length === 3 && zoom.every(Number.isFinite) && zoom[0] >= 1 && zoom[0] <= 16 ? { factor: zoom[0], x: zoom[1], y: zoom[2] } : { factor: 1, x: 0.5, y: 0.5 };
  at("step").value = state.step;
  makePanels();
}

async function copyLink() {
  clearTimeout(writing);
  if (state.written) history.replaceState(null, "", state.written);
  const own = data.live && asked.own, button = at("link");
  try { await navigator.clipboard.writeText(location.href); } catch {
    const field = element("textarea", { value: location.href });  // where the clipboard is not open to pages
    document.body.append(field); field.select(); document.execCommand("copy"); field.remove();
  }
  button.textContent = own ? "copied, without your file" : "copied";
  setTimeout(() => { button.textContent = "copy link"; }, 2500);
}
at("link").addEventListener("click", copyLink);
at("png").addEventListener("click", savePNG);
at("svg").addEventListener("click", saveSVG);

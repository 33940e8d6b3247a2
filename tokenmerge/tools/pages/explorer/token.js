// ---- the panel about the chosen token: its size and members, and when, with whom and at what cosine it merged
const MOST_MEMBERS = 30;

function describe() {
  const box = at("token"), image = current();
  box.replaceChildren();
  const chosen = state.patch !== null && image.itself[state.patch] !== GONE;
  box.classList.toggle("pinned", chosen && state.pinned);
  if (!chosen) {
    box.append(element("h2", { textContent: "No token is chosen" }),
      element("p", { textContent: "Point at a patch to see which token it belongs to, and with whom that token merged. Click to pin it." }));
    return;
  }
  const panel = panels[Math.max(1, state.panel)], look = lookOf(panel), names = namesAt(image, look, state.step), name = names[state.patch];
  const after = state.step ? `after block ${state.step}` : "at the input";
  const head = element("h2", {}, swatch(image, look, panel, name), heading(image, look, name));
  if (state.pinned) head.append(element("button", { type: "button", id: "unpin", textContent: "unpin", onclick: () => { state.pinned = false; choosePatch(null, state.panel); } }));
  box.append(head, element("p", { className: "quiet", textContent: `Patch at ${place(image, state.patch)}; ${look.title}, ${after}` }));
  if (name === GONE) { box.append(element("p", { textContent: `This patch was dropped${droppedIn(look)}.` })); return; }
  const members = membersOf(names, name);
  if (image.sound) box.append(heardAs(image, members));
  box.append(memberList(image, members, sizesOf(image, look, state.step)[name]), ...mergesOf(image, look, members), ...next(image, look, name));
}

function heading(image, look, name) {
  if (name === GONE) return "Dropped";
  const size = sizesOf(image, look, state.step)[name];
  return size === 1 ? "Token of one patch" : `Token of ${size} patches`;
}

function swatch(image, look, panel, name) {
  const made = element("span", { className: "swatch" }), view = viewOf(panel) === "photo" ? "picture" : viewOf(panel);
  if (name < HIDDEN) made.style.background = `rgb(${cellColours(image, look, state.step, view).slice(3 * state.patch, 3 * state.patch + 3).join(",")})`;
  return made;
}

function droppedIn(look) {
  for (let k = 0; k < look.blocks.length; k++) if (look.blocks[k].names[state.patch] === GONE) return ` in block ${k + 1}`;
  return "";
}

function memberList(image, members, size) {
  const share = `${Number((100 * size / image.patches).toPrecision(2))} % of the input`;
  const unseen = size - members.length, more = members.length - MOST_MEMBERS;
  const inFrames = image.tiles ? ` in ${new Set(members.map(p => tileOf(image, p))).size} of ${image.tiles.count} frames` : "";
  const listed = members.slice(0, MOST_MEMBERS).map(p => `(${short(image, p)})`).join(" ");
  const text = `${share}${inFrames}${unseen ? `, ${unseen} of them in the padding` : ""}`;
  const list = element("p", { className: "members", textContent: listed });
  if (more > 0) {
    const all = element("button", { type: "button", textContent: `${more} more` });
    all.addEventListener("click", () => { list.textContent = members.map(p => `(${short(image, p)})`).join(" "); });
    list.append(" ", all);
  }
  const numbers = image.sound ? image.grid[0] === 1 ? "begin, s" : "begin, s; Hz" : image.tiles ? "frame, row, column" : "row, column";
  return element("section", {}, element("h3", { textContent: `Members (${numbers})` }), element("p", { textContent: text }), list);
}

// the same in numbers alone; of a moment, where it begins
const short = (image, cell) => place(image, cell).replace(/(frame|row|column) /g, "").replace(/–[\d.]+ s/, "").replace(/ k?Hz$/, unit => unit === " kHz" ? "k" : "");

// merges of these members up to this block, the latest first
function eventsOf(image, look, members) {
  const inside = new Set(members), events = [];
  for (let k = 0; k < state.step; k++) {
    const { from, to, similarity } = look.blocks[k];
    let sizes = null;
    for (let i = 0; from && i < from.length; i++) {
      if (to[i] === GONE || !(inside.has(to[i]) || inside.has(from[i]))) continue;
      sizes = sizes || sizesOf(image, look, k);
      events.push({ block: k + 1, from: from[i], to: to[i], similarity: similarity[i], sizes });
    }
  }
  return events.reverse();
}

function mergesOf(image, look, members) {
  const events = eventsOf(image, look, members);
  if (!events.length) return [element("p", { textContent: state.step ? "It has not merged yet." : "Nothing has merged at the input." })];
  const table = element("table", {}, element("tr", {}, ...["block", "joined", "cosine"].map(textContent => element("th", { textContent, scope: "col" }))));
  for (const event of events) {
    const who = name => name === HIDDEN ? "padding" : event.sizes[name] > 1 ? `${event.sizes[name]} at (${short(image, name)})` : `(${short(image, name)})`;
    const known = Number.isFinite(event.similarity), cosine = element("td", { textContent: known ? event.similarity.toFixed(3) : "unknown" });
    if (known) cosine.style.setProperty("--share", `${100 * Math.max(0, event.similarity)}%`);
    const row = element("tr", {}, element("td", { textContent: event.block }), element("td", { textContent: `${who(event.from)} → ${who(event.to)}` }), cosine);
    const joined = new Set(membersOf(namesAt(image, look, event.block - 1), event.from));
    row.addEventListener("pointerenter", () => { state.joined = joined; panels.forEach(draw); });
    row.addEventListener("pointerleave", () => { state.joined = null; panels.forEach(draw); });
    table.append(row);
  }
  const title = events.length === 1 ? "One merge" : `${events.length} merges, the latest first`;
  return [element("section", { className: "merges" }, element("h3", { textContent: title }), table)];
}

function next(image, look, name) {
  for (let k = state.step; k < look.blocks.length; k++) {
    const { from, to, similarity } = look.blocks[k];
    for (let i = 0; from && i < from.length; i++) {
      const mine = from[i] === name || to[i] === name;
      if (!mine) continue;
      const other = from[i] === name ? to[i] : from[i], where = other === HIDDEN ? "a token of the padding" : `the token at ${place(image, other)}`;
      const cosine = Number.isFinite(similarity[i]) ? `, cosine ${similarity[i].toFixed(3)}` : "";
      const text = to[i] === GONE ? `It is dropped in block ${k + 1}.`
        : from[i] === name ? `In block ${k + 1} it joins ${where}${cosine}.` : `In block ${k + 1} ${where} joins it${cosine}.`;
      return [element("p", { className: "next", textContent: text })];
    }
  }
  return state.step < look.blocks.length ? [element("p", { className: "next", textContent: "It does not merge any more." })] : [];
}

// ---- choosing: a pointer that rests on a patch, a click or a touch that pins it, keys
function choosePatch(patch, panel) {
  if (patch === state.patch && panel === state.panel) return;
  state.patch = patch; state.panel = panel; state.joined = null;
  drawAll();
}
function pin(patch, panel) {
  const image = current(), names = namesIn(panels[panel]);
  const same = state.pinned && patch !== null && state.patch !== null && names[patch] === names[state.patch] && panel === state.panel;
  state.pinned = patch !== null && image.itself[patch] !== GONE && !same;
  state.patch = patch; state.panel = panel; state.joined = null;
  drawAll();
}

function pointing(canvas, panel) {
  const patchUnder = event => {
    const image = current(), box = canvas.getBoundingClientRect(), seen = windowOf(image);
    const { left, bottom } = marginsOf(image);
    const column = Math.floor(seen.x + (event.clientX - box.left - left) / (box.width - left) * seen.w);
    const row = Math.floor(seen.y + (event.clientY - box.top) / (box.height - bottom) * seen.h);
    const inside = row >= seen.top && column >= seen.left && row < seen.top + seen.high && column < seen.left + seen.wide;
    const cell = row * image.grid[1] + column;
    return inside && event.clientX - box.left >= left && tileOf(image, cell) < frames(image) ? cell : null;
  };
  const hold = { moved: 0, x: 0, y: 0, pointers: new Map(), apart: 0 };
  canvas.addEventListener("pointerdown", event => {
    hold.pointers.set(event.pointerId, event); hold.moved = 0; hold.x = event.clientX; hold.y = event.clientY;
    hold.apart = apart(hold.pointers);
  });
  canvas.addEventListener("pointermove", event => {
    if (hold.pointers.has(event.pointerId)) {
      const before = hold.pointers.get(event.pointerId);
      hold.pointers.set(event.pointerId, event);
      hold.moved = Math.max(hold.moved, Math.hypot(event.clientX - hold.x, event.clientY - hold.y));
      if (hold.pointers.size === 2) { zoomBy(apart(hold.pointers) / hold.apart, 0.5, 0.5); hold.apart = apart(hold.pointers); return; }
      if (state.zoom.factor > 1 && hold.moved > 4) { moveBy((before.clientX - event.clientX) / canvas.clientWidth, (before.clientY - event.clientY) / canvas.clientHeight); return; }
    }
    if (!state.pinned && event.pointerType === "mouse") choosePatch(patchUnder(event), panel);
  });
  canvas.addEventListener("pointerup", event => {
    hold.pointers.delete(event.pointerId);
    if (hold.moved <= 4 && !hold.pointers.size) pin(patchUnder(event), panel);
  });
  canvas.addEventListener("pointercancel", event => hold.pointers.delete(event.pointerId));
  canvas.addEventListener("pointerleave", event => {
    hold.pointers.delete(event.pointerId);
    if (event.pointerType === "mouse" && !state.pinned) choosePatch(null, panel);
  });
  canvas.addEventListener("wheel", event => {
    if (!event.ctrlKey && !event.metaKey && state.zoom.factor === 1) return;  // the page scrolls; a pinch comes with ctrl
    event.preventDefault();
    const box = canvas.getBoundingClientRect();
    zoomBy(Math.exp(-event.deltaY / 300), (event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height);
  }, { passive: false });
  canvas.addEventListener("keydown", event => {
    const image = current(), columns = image.grid[1];
    const move = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
    if (event.key === "Enter") pin(state.patch, panel);
    else if (move !== undefined) {
      const seen = windowOf(image), row = Math.floor(state.patch / columns), column = state.patch % columns;
      const inside = (r, c) => r >= seen.top && c >= seen.left && r < seen.top + seen.high && c < seen.left + seen.wide;
      const first = state.patch === null || !inside(row, column) ? seen.top * columns + seen.left : null;
      const patch = first ?? state.patch + move, straight = first !== null || Math.abs(move) > 1 || Math.floor(patch / columns) === row;
      if (straight && inside(Math.floor(patch / columns), patch % columns) && image.itself[patch] !== GONE) choosePatch(patch, panel);
    } else return;
    event.preventDefault(); event.stopPropagation();
  });
}
const apart = pointers => { const [a, b] = [...pointers.values()]; return b ? Math.hypot(a.clientX - b.clientX, a.clientY - b.clientY) : 0; };

// ---- zoom, shared by all pictures; x and y are the centre in shares of the picture
function clampZoom() {
  const zoom = state.zoom, half = 0.5 / zoom.factor;
  zoom.x = Math.min(1 - half, Math.max(half, zoom.x)); zoom.y = Math.min(1 - half, Math.max(half, zoom.y));
  for (const panel of panels) panel.canvas.classList.toggle("zoomed", zoom.factor > 1);
}
function zoomBy(by, x, y) {  // keeps the point x, y (shares of what is seen) in its place
  const zoom = state.zoom, before = zoom.factor;
  zoom.factor = Math.min(16, Math.max(1, before * by));
  zoom.x += (x - 0.5) * (1 / before - 1 / zoom.factor); zoom.y += (y - 0.5) * (1 / before - 1 / zoom.factor);
  clampZoom(); drawAll();
}
function moveBy(x, y) { state.zoom.x += x / state.zoom.factor; state.zoom.y += y / state.zoom.factor; clampZoom(); drawAll(); }
function zoomAtToken(by) {  // the buttons zoom to the chosen token, if there is one
  const image = current(), seen = windowOf(image);
  if (state.patch === null || by < 1) return zoomBy(by, 0.5, 0.5);
  const columns = image.grid[1];
  zoomBy(by, (state.patch % columns + 0.5 - seen.x) / seen.w, (Math.floor(state.patch / columns) + 0.5 - seen.y) / seen.h);
}

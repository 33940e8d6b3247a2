// ---- videos: one frame at a time or all of them, and a strip of all frames below
function showMoments() {
  const image = current(), film = Boolean(image.tiles);
  at("moments").hidden = !film;
  at("frame").max = frames(image) - 1;
  at("frame").value = state.frame;
  at("frame").disabled = at("sheet").checked;
  at("film").hidden = at("sheet").checked;
  at("listen").hidden = !image.sound;
  if (image.sound && at("audio").src !== image.sound) { at("audio").src = image.sound; parts.length = 0; }
  at("padding").textContent = image.padding > 0.005 ? `The model hears ${image.padding.toFixed(2)} s of padding after the sound, which is not drawn.` : "";
}

function goToFrame(frame) {
  const image = current(), last = frames(image) - 1;
  state.frame = Math.max(0, Math.min(last, frame));
  at("frame").value = state.frame;
  drawAll(true);
}
function roll(on) {
  clearInterval(state.rolling);
  state.rolling = null;
  at("roll").textContent = on ? "❚❚" : "▶";
  if (!on) return;
  at("sheet").checked = false;
  showMoments(); arrange();
  const image = current();
  state.rolling = setInterval(() => goToFrame((state.frame + 1) % frames(image)), Math.max(120, 1000 * image.tiles.seconds));
}

// the strip: each frame of the first setting, small; the chosen token shows where it lies in time
function drawFilm() {
  const image = current(), canvas = at("film");
  if (!image.tiles) return;
  at("when").textContent = at("sheet").checked ? `all ${frames(image)} frames` : `frame ${state.frame + 1} of ${frames(image)}, ${(state.frame * image.tiles.seconds).toFixed(2)} s`;
  if (canvas.hidden) return;
  const density = window.devicePixelRatio || 1, count = frames(image), width = Math.round(canvas.clientWidth * density);
  const [rows, columns] = tileShape(image), aspect = columns / rows * (image.width / image.grid[1]) / (image.height / image.grid[0]);
  const gap = 4 * density, wide = Math.min((width - (count - 1) * gap) / count, 96 * density * aspect), high = wide / aspect;
  canvas.width = width; canvas.height = Math.max(1, Math.round(high));
  canvas.style.height = `${high / density}px`;
  const context = canvas.getContext("2d"), kept = state.frame, zoom = state.zoom;
  state.zoom = { factor: 1, x: 0.5, y: 0.5 };
  for (let i = 0; i < count; i++) {
    const part = element("canvas", { width: Math.max(1, Math.round(wide)), height: Math.max(1, Math.round(high)) });
    state.frame = i;
    paintInto(part.getContext("2d"), panels[Math.max(1, state.panel)], part.width, part.height, 0.5 * density);
    context.drawImage(part, i * (wide + gap), 0);
    if (i === kept) { context.strokeStyle = getComputedStyle(document.documentElement).getPropertyValue("--accent"); context.lineWidth = 6 * density; context.strokeRect(i * (wide + gap), 0, wide, high); }
  }
  state.frame = kept; state.zoom = zoom;
  canvas.dataset.step = String((wide + gap) / density);
}
at("film").addEventListener("pointerdown", event => goToFrame(Math.floor((event.clientX - at("film").getBoundingClientRect().left) / Number(at("film").dataset.step))));
at("frame").addEventListener("input", () => { roll(false); goToFrame(Number(at("frame").value)); });
at("roll").addEventListener("click", () => roll(state.rolling === null));
at("sheet").addEventListener("change", () => { roll(false); showMoments(); arrange(); drawAll(); });

// ---- sounds: the recording itself, with a line where it plays, and the parts that one token covers
const parts = [];  // seconds from and to, still to be played
function spansOf(image, members) {
  const columns = [...new Set(members.map(p => p % image.grid[1]))].sort((a, b) => a - b), spans = [], width = image.seconds / image.grid[1];
  for (const column of columns) {
    const last = spans.at(-1);
    if (last && last.to === column) last.to = column + 1; else spans.push({ from: column, to: column + 1 });
  }
  return spans.map(({ from, to }) => ({ from: from * width, to: to * width }));
}
function heardAs(image, members) {
  const spans = spansOf(image, members), total = spans.reduce((sum, { from, to }) => sum + to - from, 0);
  const text = spans.length === 1 ? `${spans[0].from.toFixed(2)} to ${spans[0].to.toFixed(2)} s` : `${spans.length} moments between ${spans[0].from.toFixed(2)} and ${spans.at(-1).to.toFixed(2)} s, ${total.toFixed(2)} s in all`;
  const button = element("button", { type: "button", id: "hear", textContent: "▶ hear it" });
  button.addEventListener("click", () => { parts.splice(0, parts.length, ...spans.map(span => ({ ...span }))); playPart(); });
  return element("p", {}, `${text} `, button);
}
function playPart() {
  const audio = at("audio");
  if (!parts.length) return;
  audio.currentTime = parts[0].from;
  audio.play().catch(() => { parts.length = 0; });  // a browser may refuse to play
}
function followSound() {
  const audio = at("audio");
  if (parts.length && audio.currentTime >= parts[0].to) {
    parts.shift();
    if (parts.length) playPart(); else audio.pause();
  }
  if (current().sound) panels.forEach(draw);
  if (!audio.paused) requestAnimationFrame(followSound);
}
at("audio").addEventListener("play", () => requestAnimationFrame(followSound));
at("audio").addEventListener("seeked", () => {
  const time = at("audio").currentTime;
  if (parts.length && (time < parts[0].from - 0.05 || time > parts[0].to)) parts.length = 0;  // somebody went elsewhere
  if (panels.length) panels.forEach(draw);
});

// ---- pictures and their controls
function predictions(image) {
  at("classes").replaceChildren();
  const shown = panels.slice(1).map(lookOf).filter(look => look.top.length);
  if (!shown.length) return;
  const table = element("table", {}, element("tr", {}, element("th", { textContent: "unmerged", scope: "col" }), ...shown.map(look => element("th", { textContent: look.title, scope: "col" }))));
  for (let i = 0; i < shown[0].top.length; i++) {
    const cells = [image.unmerged.top, ...shown.map(look => look.top)].map(top => {
      const [name, share] = top[i], cell = element("td", {}, element("span", { textContent: name }), element("b", { textContent: `${(100 * share).toFixed(1)} %` }));
      cell.style.setProperty("--share", `${100 * share}%`);
      return cell;
    });
    table.append(element("tr", {}, ...cells));
  }
  at("classes").append(element("h2", { textContent: "What the model answers" }), table);
}

const plain = value => String(Number(value.toPrecision(3)));

function figureOf(image, panel, i) {
  const canvas = element("canvas", { tabIndex: 0 });
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", panel.photo ? `${image.name}: the input` : `${image.name}: merged tokens`);
  panel.canvas = canvas;
  panel.context = canvas.getContext("2d", { willReadFrequently: true });
  panel.caption = element("span");
  const head = element("figcaption");
  if (panel.photo) head.append(element("b", { textContent: image.name }));
  else {
    const choose = element("select", { ariaLabel: `setting ${i}` }), look = image.looks[panel.look];
    image.looks.forEach((one, k) => choose.append(element("option", { value: k, textContent: one.title })));
    choose.value = panel.look;
    choose.addEventListener("change", () => {
      state.shown[i - 1] = Number(choose.value);
      makePanels();
      panels[i].figure.querySelector("select").focus();  // which is a new one
    });
    const speed = look.speed ? `${look.speed.toFixed(2)}× as fast here, ` : "";
    const cost = `${speed}${plain(look.gflops)} of ${plain(image.unmerged.gflops)} GFLOPs`;
    head.append(choose, panel.caption, element("span", { className: "quiet", textContent: cost, title: cost }));
  }
  panel.figure = element("figure", { className: "panel" }, head, canvas);
  pointing(canvas, i);
  return panel.figure;
}

function makePanels() {
  const image = current(), count = at("two").checked ? 2 : 1;
  panels.length = 0;
  panels.push({ photo: true }, ...state.shown.slice(0, count).map(look => ({ look: Math.min(look, image.looks.length - 1) })));
  state.panel = Math.min(state.panel, count);
  at("pictures").replaceChildren(...panels.map((panel, i) => figureOf(image, panel, i)));
  at("pictures").style.setProperty("--columns", panels.length);
  predictions(image);
  showMoments();
  clampZoom();
  arrange();
  drawAll();
}
new ResizeObserver(() => { arrange(); if (panels.length) panels.forEach(draw); if (panels.length) drawFilm(); }).observe(at("pictures"));

// ---- blocks
function goTo(step) {
  const last = current().looks[0].blocks.length;
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
  const last = current().looks[0].blocks.length;
  if (state.step === last) goTo(0);
  state.playing = setInterval(() => { if (state.step >= last) play(false); else goTo(state.step + 1); }, 600);
}

at("step").addEventListener("input", () => { play(false); goTo(Number(at("step").value)); });
at("play").addEventListener("click", () => play(state.playing === null));
for (const id of ["view", "borders"]) at(id).addEventListener("change", drawAll);
at("two").addEventListener("change", makePanels);
at("in").addEventListener("click", () => zoomAtToken(1.5));
at("out").addEventListener("click", () => zoomAtToken(1 / 1.5));
at("fit").addEventListener("click", () => { state.zoom = { factor: 1, x: 0.5, y: 0.5 }; clampZoom(); drawAll(); });
const dark = () => document.documentElement.dataset.theme ? document.documentElement.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
at("theme").addEventListener("click", () => { document.documentElement.dataset.theme = dark() ? "light" : "dark"; drawAll(); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
document.addEventListener("keydown", event => {
  const typing = event.target.matches("input[type=text], input[type=file], select");
  if (at("main").hidden || typing || event.ctrlKey || event.metaKey || event.altKey) return;
  const onButton = event.target.matches("button, input[type=checkbox], audio"), onSlider = event.target.matches("input[type=range]");
  if (event.key === "ArrowLeft" && !onSlider) goTo(state.step - 1);
  else if (event.key === "ArrowRight" && !onSlider) goTo(state.step + 1);
  else if (event.key === " " && !onButton) play(state.playing === null);
  else if (event.key === "b") { at("borders").checked = !at("borders").checked; drawAll(); }
  else if (event.key === "v") {
    const able = [...at("view").options].filter(option => !option.disabled);
    at("view").value = able[(able.indexOf(at("view").selectedOptions[0]) + 1) % able.length].value;
    drawAll();
  }
  else if (event.key === "2" && !at("two").disabled) { at("two").checked = !at("two").checked; makePanels(); }
  else if (event.key === "+" || event.key === "=") zoomAtToken(1.5);
  else if (event.key === "-") zoomAtToken(1 / 1.5);
  else if (event.key === "0") at("fit").click();
  else if (event.key === "Escape") { state.pinned = false; choosePatch(null, state.panel); drawAll(); }
  else return;
  event.preventDefault();
});
at("legend").style.background = `linear-gradient(90deg, ${[0, 64, 128, 192, 255].map(i => `rgb(${heat.slice(3 * i, 3 * i + 3).join(",")})`).join(", ")})`;

// ---- inputs; a page opens merged
let wanted = 0;
async function showImage(index, values = new URLSearchParams()) {
  play(false); roll(false);
  const mine = ++wanted, image = await prepared(data.images[index]);
  if (mine !== wanted) return;  // another one was chosen meanwhile
  state.image = index; state.joined = null;
  at("image").value = index;
  const seen = image.looks.every(look => look.blocks.some(block => block.attention));
  const choice = at("view").querySelector("[value=attention]");
  choice.disabled = !seen;
  choice.textContent = image.attention;
  if (!seen && at("view").value === "attention") at("view").value = "picture";
  at("step").max = image.looks[0].blocks.length;
  at("two").disabled = image.looks.length < 2;
  at("both").hidden = image.looks.length < 2;
  at("main").hidden = false;
  recalled(values);
}
function listImages() {
  at("image").replaceChildren(...data.images.map((image, i) => element("option", { value: i, textContent: image.name })));
  at("images").hidden = data.images.length < 2;
}
at("image").addEventListener("change", () => showImage(Number(at("image").value), keptValues()));
// of what was chosen, another input keeps the settings, the view and the block, but no place
function keptValues() {
  const values = new URLSearchParams((state.written || location.hash).slice(1));
  for (const name of ["p", "in", "z", "f"]) values.delete(name);
  return values;
}

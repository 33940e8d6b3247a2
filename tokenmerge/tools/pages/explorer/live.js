// ---- the live explorer: a sample or a file of the visitor goes to the model, and comes back as an image's data
const asked = { running: false, next: null, link: {}, own: null };
function say(text, bad = false) { at("status").className = bad ? "bad" : ""; at("status").textContent = text; }

// one request at a time, and then the latest one that was wanted meanwhile
async function run(request) {
  if (asked.running) { asked.next = request; return; }
  asked.running = true; asked.next = null;
  say("running …");
  try {
    const settings = request.r.split(/\s+/).map(one => `r=${encodeURIComponent(one)}`).join("&");
    const answer = await fetch(`api/run?${settings}&${request.query}`, { method: "POST", body: request.body, headers: { "X-Requested-With": "tokenmerge" } });
    const found = await answer.json();
    if (!answer.ok) throw new Error(found.error);
    await prepared(found);
    if (!asked.next) {
      data.images = [found];
      listImages();
      asked.link = request.link;
      await showImage(0, request.values);
      say(found.name);
    }
  } catch (error) { say(error.message, true); }
  asked.running = false;
  if (asked.next) run(asked.next);
}
function again(values = new URLSearchParams()) {
  const own = asked.own, r = at("r").value.trim(), sample = at("sample").value;
  return run(own ? { r, values, body: own, query: `name=${encodeURIComponent(own.name)}`, link: { r } }
    : { r, values, body: null, query: `sample=${sample}`, link: { r, sample } });
}
function take(file) {
  if (file && file.size > data.limit) return say(`the file is larger than ${data.limit >> 20} MiB: make it smaller`, true);
  asked.own = file || null;
  return again(keptValues());
}
function openAddress() {
  const values = remembered(), sample = values.get("sample");
  if (values.has("r")) at("r").value = values.get("r");
  if (sample !== null && at("sample").querySelector(`option[value="${CSS.escape(sample)}"]`)) at("sample").value = sample;
  if (data.samples.length) return again(values);
  at("sample").parentElement.hidden = true;
  at("status").textContent = "choose a file, or drop one here";
  return null;
}
data.samples.forEach((name, i) => at("sample").append(element("option", { value: i, textContent: name })));
at("sample").addEventListener("change", () => { asked.own = null; at("file").value = ""; again(keptValues()); });
at("file").addEventListener("change", () => take(at("file").files[0]));
at("run").addEventListener("click", () => again(keptValues()));
at("r").addEventListener("keydown", event => { if (event.key === "Enter") again(keptValues()); });
for (const kind of ["dragover", "dragleave", "drop"]) document.addEventListener(kind, event => {
  event.preventDefault();
  at("drop").classList.toggle("over", kind === "dragover");
  if (kind === "drop" && event.dataTransfer.files.length) take(event.dataTransfer.files[0]);
});
openAddress();
window.addEventListener("hashchange", () => { asked.own = null; openAddress(); });

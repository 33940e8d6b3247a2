// ---- the live explorer: a sample or a file of the visitor goes to the model, and comes back as an image's data
const asked = { count: 0, link: {}, own: null };
async function run(body, query, values) {
  const status = at("status"), mine = ++asked.count;  // an answer that was overtaken is not shown
  if (body && body.size > data.limit) {
    status.className = "bad"; status.textContent = `the file is larger than ${data.limit >> 20} MiB: make it smaller`;
    return;
  }
  status.className = ""; status.textContent = "running …"; at("run").disabled = true;
  try {
    const settings = at("r").value.trim().split(/\s+/).map(one => `r=${encodeURIComponent(one)}`).join("&");
    const answer = await fetch(`api/run?${settings}&${query}`, { method: "POST", body, headers: { "X-Requested-With": "tokenmerge" } });
    const found = await answer.json();
    if (mine !== asked.count) return;
    if (!answer.ok) throw new Error(found.error);
    data.images = [found];
    listImages();
    asked.link = { r: at("r").value.trim(), ...(body ? {} : { sample: at("sample").value }) };
    await showImage(0, values);
    status.textContent = found.name;
  } catch (error) {
    if (mine === asked.count) { status.className = "bad"; status.textContent = error.message; }
  } finally { if (mine === asked.count) at("run").disabled = false; }
}
function again(values = new URLSearchParams()) {
  const own = asked.own;
  return own ? run(own, `name=${encodeURIComponent(own.name)}`, values) : run(null, `sample=${at("sample").value}`, values);
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
at("file").addEventListener("change", () => { asked.own = at("file").files[0] || null; again(keptValues()); });
at("run").addEventListener("click", () => again(keptValues()));
at("r").addEventListener("keydown", event => { if (event.key === "Enter") again(keptValues()); });
for (const kind of ["dragover", "dragleave", "drop"]) document.addEventListener(kind, event => {
  event.preventDefault();
  at("drop").classList.toggle("over", kind === "dragover");
  if (kind === "drop" && event.dataTransfer.files.length) { asked.own = event.dataTransfer.files[0]; again(keptValues()); }
});
openAddress();
window.addEventListener("hashchange", () => { asked.own = null; openAddress(); });

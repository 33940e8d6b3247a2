// ---- a page written to a file
const asked = { link: {}, own: false };
function openAddress() {
  const values = remembered(), index = Number(values.get("i") || 0);
  return showImage(Number.isInteger(index) && index >= 0 && index < data.images.length ? index : 0, values);
}
listImages();
openAddress();
window.addEventListener("hashchange", openAddress);

"use strict";
// Whatever has a name of somebody's making is set as text, never as HTML.
const at = (id) => document.getElementById(id);
const drop = at("drop"), file = at("file"), result = at("result"), state = at("status");
const CAPTIONS = {
  "Photograph": "",
  "What spoke for it": "Brighter places spoke for the answer; the frame is what the network was fed. A map says where the network looked, not whether it was right to look there.",
  "Attention": "What attention gathered through all blocks, within the frame that the network was fed; the same for every class.",
};
let turn = 0;

function make(tag, text, kind) {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (kind) node.className = kind;
  return node;
}

function percent(p) {
  return (100 * p).toFixed(1) + " %";
}

function tell(text, bad) {
  state.textContent = text;
  state.classList.toggle("bad", Boolean(bad));
}

function view(pictures, index) {
  at("picture").src = pictures[index].source;
  at("caption").textContent = CAPTIONS[pictures[index].title] || "";
  [...at("views").children].forEach((b, i) => b.setAttribute("aria-pressed", String(i === index)));
}

function show(said, name) {
  at("answer").textContent = said.top[0].name;
  at("lead").textContent = said.doubts.length || said.top[0].p < 0.5 ? "Its best guess" : "It shows";
  at("doubts").replaceChildren(...said.doubts.map((text) => make("li", text)));
  at("bars").replaceChildren(...said.top.map((row) => {
    const li = make("li"), track = make("div", undefined, "track"), fill = make("div", undefined, "fill");
    fill.style.width = 100 * row.p + "%";
    track.append(fill);
    li.append(make("span", row.name), make("span", percent(row.p)), track);
    return li;
  }));
  at("views").replaceChildren(...said.pictures.map((p, i) => {
    const button = make("button", p.title);
    button.type = "button";
    button.addEventListener("click", () => view(said.pictures, i));
    return button;
  }));
  at("views").hidden = said.pictures.length < 2;
  at("picture").alt = name;
  view(said.pictures, 0);
  at("near").replaceChildren(...said.near.map((n) => {
    const li = make("li"), img = make("img"), label = make("span", n.name);
    img.src = n.source;
    img.alt = "";
    li.title = n.file;
    label.append(make("span", "likeness " + n.cosine.toFixed(2), "soft"));
    li.append(img, label);
    return li;
  }));
  at("alike").hidden = !said.near.length;
  tell(name + ", " + said.size + ", answered in " + said.seconds.toFixed(1) + " s");
  result.hidden = false;
}

async function ask(photo) {
  if (!photo) return;
  const mine = ++turn;
  document.body.classList.add("asked");
  if (photo.size > Number(document.body.dataset.limit)) {
    result.hidden = true;
    return tell(photo.name + " is larger than " + Number(document.body.dataset.limit) / 1e6 + " MB.", true);
  }
  tell("Looking at " + photo.name + " ...");
  result.classList.add("busy");
  try {
    const answer = await fetch("/ask", { method: "POST", body: photo, headers: { "X-Vitft": "ask", "Content-Type": "application/octet-stream" } });
    const said = await answer.json();
    if (mine !== turn) return;
    if (answer.ok) return show(said, photo.name || "pasted picture");
    result.hidden = true;
    tell(photo.name + ": " + said.error, true);
  } catch (error) {
    if (mine !== turn) return;
    result.hidden = true;
    tell("No answer from the server; is it still running?", true);
  } finally {
    if (mine === turn) result.classList.remove("busy");
  }
}

file.addEventListener("change", () => { ask(file.files[0]); file.value = ""; });
for (const kind of ["dragover", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    drop.classList.toggle("over", kind === "dragover");
    if (kind === "drop") ask(event.dataTransfer.files[0]);
  });
}
document.addEventListener("dragleave", () => drop.classList.remove("over"));
document.addEventListener("paste", (event) => ask(event.clipboardData.files[0]));

// The page: a form for each task, one picture and one board for all of them, and the results.

import { asked } from "./asked.js";
import { Board } from "./board.js";
import { drawnArticle, element, writtenArticle } from "./results.js";
import { base64Of, loadedModel, post, queueLength } from "./server.js";

const TABS = {
  draw: { task: "text_to_image", hint: "Say what to draw. The pictures come best first." },
  layout: { task: "layout_to_image", hint: "Draw a box for each thing, say what it is, and describe the whole.", boxes: 16, go: "Draw" },
  infill: { task: "infill", hint: "Choose a picture, draw a box on it, and say what the whole picture shows then.", boxes: 1, go: "Redraw" },
  edit: { task: "edit", hint: "Choose a picture and say what to change.", go: "Edit" },
  describe: { task: "answer", others: ["caption", "long_caption"], hint: "Choose a picture; ask about it, or have it described." },
};

const $ = (id) => document.getElementById(id);
let model = null;
let tab = "draw";
let picture = null; // { blob, bitmap }
let waiting = null; // AbortController of the request under way
let layout = []; // boxes of the tab of that name, kept while another is shown
const board = new Board($("board"), showNewBox);

// --- tabs ---

function belongs(part, name) {
  return part.dataset.for.split(" ").includes(name);
}

function tasksOf(name) {
  return [TABS[name].task, ...(TABS[name].others ?? [])];
}

// Why the model cannot do a task, or null.
function whyNot(task) {
  return model ? model.cm3leon.tasks[task] : null;
}

function selectTab(name) {
  if (tab === "layout") layout = board.boxes;
  tab = name;
  for (const button of document.querySelectorAll("[role=tab]")) {
    const selected = button.dataset.tab === name;
    button.setAttribute("aria-selected", selected);
    button.tabIndex = selected ? 0 : -1;
  }
  $("task").setAttribute("aria-labelledby", `tab-${name}`);
  for (const part of document.querySelectorAll("form [data-for]")) part.hidden = !belongs(part, name);
  $("hint").textContent = TABS[name].hint;
  $("go").textContent = TABS[name].go ?? "Draw";
  $("error").hidden = true;
  showBoard();
  showAvailability();
}

function showAvailability() {
  for (const button of document.querySelectorAll("[role=tab]")) {
    const off = tasksOf(button.dataset.tab).every(whyNot);
    button.classList.toggle("off", off);
    button.title = off ? "not available for this model" : "";
  }
  const told = tasksOf(tab).map(whyNot).filter(Boolean);
  $("unavailable").hidden = !told.length;
  $("unavailable").textContent = `Not available for this model: ${told.join("; ")}.`;
  $("as-writing").disabled = Boolean(whyNot("write"));
  $("as-writing").parentElement.title = whyNot("write") ?? "";
  for (const button of document.querySelectorAll("[data-task]")) {
    button.disabled = !model || waiting !== null || Boolean(whyNot(button.dataset.task || TABS[tab].task));
  }
}

// --- the picture and the boxes on it ---

function showBoard() {
  const boxes = TABS[tab].boxes ?? 0;
  if (tab === "layout") {
    const side = model?.cm3leon.image_size ?? 64;
    board.show(null, side, side, boxes, layout);
  } else if (picture) {
    board.show(picture.bitmap, picture.bitmap.width, picture.bitmap.height, boxes);
  }
  $("board-part").hidden = tab === "draw" || (tab !== "layout" && !picture);
  $("crop").hidden = tab === "layout" || !picture || picture.bitmap.width === picture.bitmap.height;
  showBoxes();
}

async function setPicture(blob) {
  fail(null);
  const most = model?.cm3leon.limits.image_bytes;
  if (blob.size > most) {
    fail(`This file has ${(blob.size / 2 ** 20).toFixed(1)} MiB; the server takes up to ${most / 2 ** 20}. Choose a smaller picture.`);
    return;
  }
  try {
    picture = { blob, bitmap: await createImageBitmap(blob) };
  } catch {
    fail("This file is not a picture that can be read. Choose a PNG or JPEG file.");
    return;
  }
  showBoard();
}

// A row of inputs for each box: all that can be drawn with a pointer can be typed.
function showBoxes() {
  const rows = (TABS[tab].boxes ? board.boxes : []).map((placed, number) => {
    const input = (name, value, change, type) => {
      const field = element("input", { type, value, required: true, ...(type === "number" ? { min: 0 } : { maxLength: 200 }) });
      field.addEventListener("input", () => { change(field.value); board.paint(); });
      return element("label", {}, name, field);
    };
    const sides = ["left", "top", "right", "bottom"].map((side, at) =>
      input(side, placed.box[at], (value) => { placed.box[at] = Number(value); }, "number"));
    const remove = element("button", { type: "button", className: "plain", ariaLabel: `remove box ${number + 1}` }, "✕");
    remove.addEventListener("click", () => { board.boxes.splice(number, 1); board.paint(); showBoxes(); });
    const label = tab === "layout" ? input(`what is in box ${number + 1}`, placed.label, (value) => { placed.label = value; }, "text") : "the part to redraw";
    return element("div", { className: "box" }, element("div", {}, label), ...sides, remove);
  });
  $("boxes").replaceChildren(...rows);
  $("add-box").hidden = !TABS[tab].boxes || rows.length >= TABS[tab].boxes;
}

// A new box of a layout is to be labelled next.
function showNewBox() {
  showBoxes();
  if (tab === "layout") $("boxes").lastElementChild.querySelector("input").focus({ preventScroll: true });
}

// --- asking ---

function settings() {
  const given = [...document.querySelectorAll(".settings input")].filter((field) => belongs(field.parentElement, tab) && field.value !== "");
  return Object.fromEntries(given.map((field) => [field.name, Number(field.value)]));
}

// What the model uses where nothing is filled in.
function showDefaults() {
  const { decoding, limits } = model.cm3leon;
  const fields = Object.fromEntries([...document.querySelectorAll(".settings input")].map((field) => [field.name, field]));
  for (const [name, field] of Object.entries(fields)) field.placeholder = decoding[name] ?? "";
  fields.candidates.placeholder = Math.max(1, Math.min(decoding.candidates, Math.floor(limits.drawn / (Number(fields.n.value) || 1))));
}

// Ask the server, showing how long it takes and what went wrong; the answer, or null.
async function ask(path, body) {
  if (waiting) {
    fail("One thing at a time: wait for what is under way, or cancel it.");
    return null;
  }
  waiting = new AbortController();
  const start = Date.now();
  let queue = null;
  const tell = async () => {
    const others = queue ? `, ${queue} ${queue === 1 ? "request waits" : "requests wait"} in the server` : "";
    $("seconds").textContent = `${Math.round((Date.now() - start) / 1000)} s${others}`;
    queue = await queueLength();
  };
  $("waiting").hidden = false;
  const clock = setInterval(tell, 1000);
  tell();
  showAvailability();
  try {
    return await post(path, body, waiting.signal);
  } catch (error) {
    if (error.name !== "AbortError") fail(error.message);
    return null;
  } finally {
    clearInterval(clock);
    waiting = null;
    $("waiting").hidden = true;
    showAvailability();
  }
}

function fail(message) {
  $("error").hidden = message === null;
  $("error").textContent = message ?? "";
}

function show(article) {
  $("empty").hidden = true;
  $("results").prepend(article);
}

const ACTIONS = {
  "Use as picture": async (blob) => {
    await setPicture(blob);
    if (tab === "draw" || tab === "layout") selectTab("infill");
    $("file").focus();
  },
};

async function enlarge(blob) {
  const answer = await ask("/v1/tasks/upscale", { image: await base64Of(blob) });
  if (answer) show(drawnArticle("Enlarged", answer.data, ACTIONS));
}

async function submit(task) {
  fail(null);
  try {
    const shown = picture?.blob;
    const [path, body, title] = await asked(task, shown, board.boxes, settings());
    const answer = await ask(path, body);
    if (!answer) return;
    const actions = whyNot("upscale") ? ACTIONS : { ...ACTIONS, Enlarge: enlarge };
    show(answer.data ? drawnArticle(title, answer.data, actions) : writtenArticle(title, shown, answer.text));
  } catch (error) {
    fail(error.message);
  }
}

// --- wiring ---

for (const button of document.querySelectorAll("[role=tab]")) button.addEventListener("click", () => selectTab(button.dataset.tab));
document.querySelector("[role=tablist]").addEventListener("keydown", (event) => {
  const names = Object.keys(TABS);
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!step) return;
  selectTab(names[(names.indexOf(tab) + step + names.length) % names.length]);
  $(`tab-${tab}`).focus();
});
$("task").addEventListener("submit", (event) => {
  event.preventDefault();
  submit(event.submitter?.dataset.task || TABS[tab].task);
});
$("task").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && event.target.tagName === "TEXTAREA") $("task").requestSubmit();
});
$("file").addEventListener("change", () => { if ($("file").files.length) setPicture($("file").files[0]); });
$("cancel").addEventListener("click", () => waiting?.abort());
document.querySelector("[name=n]").addEventListener("input", () => { if (model) showDefaults(); });
$("add-box").addEventListener("click", () => board.add("", [0, 0, Math.ceil(board.width / 2), Math.ceil(board.height / 2)]));

selectTab("draw");
loadedModel((text) => { $("model").textContent = text; }).then((loaded) => {
  model = loaded;
  $("model").textContent = `model ${model.id}, draws ${model.cm3leon.sizes.join(", enlarged ")} pixels`;
  showDefaults();
  selectTab(tab);
});

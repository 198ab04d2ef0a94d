// The page: a form for each task, one image and one board that all of them share, and the results.

import { Board } from "./board.js";
import { requestOf } from "./requests.js";
import { element, imageArticle, textArticle } from "./results.js";
import { base64Of, loadedModel, post, queueLength } from "./server.js";

const TABS = {
  generate: { task: "text_to_image", hint: "Describe the image. The results come best first." },
  layout: { task: "layout_to_image", hint: "Add a box for each object with the pointer, name the object, and describe the whole.", boxes: 16 },
  infill: { task: "infill", hint: "Choose an image, add a box with the pointer, and describe the whole image as it is to be.", boxes: 1, go: "Inpaint" },
  edit: { task: "edit", hint: "Choose an image and say what to change.", go: "Edit" },
  describe: { task: "vqa", others: ["caption", "long_caption"], hint: "Choose an image; ask about it, or have it described." },
};

const IMAGES = 4; // asked for where the field is empty

const $ = (id) => document.getElementById(id);
let model = null;
let tab = "generate";
let image = null; // { blob, bitmap }
let waiting = null; // AbortController of the pending request
let layout = []; // boxes of the tab of that name, kept while another tab is shown
const board = new Board($("board"), showNewBox);

// --- tabs ---

function belongs(part, name) {
  return part.dataset.for.split(" ").includes(name);
}

// The task of the tab's own button.
function chosenTask() {
  const { task } = TABS[tab];
  return task === "text_to_image" && $("as-writing").checked ? "write" : task;
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
  $("go").textContent = TABS[name].go ?? "Generate";
  $("error").hidden = true;
  showBoard();
  showAvailability();
  showDefaults();
}

function showAvailability() {
  for (const button of document.querySelectorAll("[role=tab]")) {
    const off = tasksOf(button.dataset.tab).every(whyNot);
    button.classList.toggle("off", off);
    button.title = off ? "not available for this model" : "";
  }
  const reasons = tasksOf(tab).map(whyNot).filter(Boolean);
  $("unavailable").hidden = !reasons.length;
  $("unavailable").textContent = `Not available for this model: ${reasons.join("; ")}.`;
  $("as-writing").disabled = Boolean(whyNot("write"));
  $("as-writing").parentElement.title = whyNot("write") ?? "";
  for (const button of document.querySelectorAll("[data-task]")) {
    button.disabled = !model || waiting !== null || Boolean(whyNot(button.dataset.task || TABS[tab].task));
  }
}

// --- the image and its boxes ---

function showBoard() {
  const boxes = TABS[tab].boxes ?? 0;
  if (tab === "layout") {
    const side = model?.cm3leon.image_size ?? 64;
    board.show(null, side, side, boxes, layout);
  } else if (image) {
    board.show(image.bitmap, image.bitmap.width, image.bitmap.height, boxes);
  }
  $("board-part").hidden = tab === "generate" || (tab !== "layout" && !image);
  $("crop").hidden = tab === "layout" || !image || image.bitmap.width === image.bitmap.height;
  showBoxes();
}

async function setImage(blob) {
  fail(null);
  const most = model?.cm3leon.limits.image_bytes;
  if (blob.size > most) {
    fail(`This file has ${(blob.size / 2 ** 20).toFixed(1)} MiB; the server takes up to ${most / 2 ** 20}. Choose a smaller image.`);
    return;
  }
  try {
    image = { blob, bitmap: await createImageBitmap(blob) };
  } catch {
    fail("This file is not an image that can be read. Choose a PNG or JPEG file.");
    return;
  }
  showBoard();
}

// A row of inputs for each box: boxes can be typed as well as added with a pointer.
function showBoxes() {
  const rows = (TABS[tab].boxes ? board.boxes : []).map((entry, number) => {
    const input = (name, value, change, type) => {
      const field = element("input", { type, value, required: true, ...(type === "number" ? { min: 0 } : { maxLength: 200 }) });
      field.addEventListener("input", () => { change(field.value); board.paint(); });
      return element("label", {}, name, field);
    };
    const sides = ["left", "top", "right", "bottom"].map((side, at) =>
      input(side, entry.box[at], (value) => { entry.box[at] = Number(value); }, "number"));
    const remove = element("button", { type: "button", className: "plain", ariaLabel: `remove box ${number + 1}` }, "✕");
    remove.addEventListener("click", () => { board.boxes.splice(number, 1); board.paint(); showBoxes(); });
    const label = tab === "layout" ? input(`object in box ${number + 1}`, entry.label, (value) => { entry.label = value; }, "text") : "the region to inpaint";
    return element("div", { className: "box" }, element("div", {}, label), ...sides, remove);
  });
  $("boxes").replaceChildren(...rows);
  $("add-box").hidden = !TABS[tab].boxes || rows.length >= TABS[tab].boxes;
}

// In a layout a new box is labeled next.
function showNewBox() {
  showBoxes();
  if (tab === "layout") $("boxes").lastElementChild.querySelector("input").focus({ preventScroll: true });
}

// --- requests ---

function settings() {
  const given = [...document.querySelectorAll(".settings input")].filter((field) => belongs(field.parentElement, tab) && field.value !== "");
  return { n: defaults().n, ...Object.fromEntries(given.map((field) => [field.name, Number(field.value)])) };
}

// What an empty field stands for: the model's own settings of the task. At temperature 0 all images of a prompt are
// the same, so that one is enough.
function defaults() {
  const decoding = model ? { ...model.cm3leon.decoding, ...model.cm3leon.decoding.tasks[chosenTask()] } : {};
  const typed = (name) => document.querySelector(`.settings [name=${name}]`).value;
  const n = Number(typed("temperature") || decoding.temperature) === 0 ? 1 : IMAGES;
  const most = Math.floor(model?.cm3leon.limits.generated / (Number(typed("n")) || n));
  return { ...decoding, n, candidates: Math.max(1, Math.min(decoding.candidates, most)) };
}

function showDefaults() {
  if (!model) return;
  const values = defaults();
  for (const field of document.querySelectorAll(".settings input")) field.placeholder = values[field.name] ?? "";
}

// Send a request, showing how long it takes and what goes wrong; the answer, or null.
async function send(path, body) {
  if (waiting) {
    fail("One request at a time: wait for the pending one, or cancel it.");
    return null;
  }
  waiting = new AbortController();
  const start = Date.now();
  let queue = null;
  const showTime = async () => {
    const others = queue ? `, ${queue} ${queue === 1 ? "request" : "requests"} in the queue` : "";
    $("seconds").textContent = `${Math.round((Date.now() - start) / 1000)} s${others}`;
    queue = await queueLength();
  };
  $("waiting").hidden = false;
  const clock = setInterval(showTime, 1000);
  showTime();
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
  "Use as input": async (blob) => {
    await setImage(blob);
    if (tab === "generate" || tab === "layout") selectTab("infill");
    $("file").focus();
  },
};

async function enlarge(blob) {
  const answer = await send("/v1/tasks/upscale", { image: await base64Of(blob) });
  if (answer) show(imageArticle("Enlarged", answer.data, ACTIONS));
}

async function submit(task) {
  fail(null);
  try {
    const file = image?.blob;
    const [path, body, title] = await requestOf(task, file, board.boxes, settings());
    const answer = await send(path, body);
    if (!answer) return;
    const actions = whyNot("upscale") ? ACTIONS : { ...ACTIONS, Enlarge: enlarge };
    show(answer.data ? imageArticle(title, answer.data, actions) : textArticle(title, file, answer.text));
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
  submit(event.submitter?.dataset.task || chosenTask());
});
$("task").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && event.target.tagName === "TEXTAREA") $("task").requestSubmit();
});
$("file").addEventListener("change", () => { if ($("file").files.length) setImage($("file").files[0]); });
$("cancel").addEventListener("click", () => waiting?.abort());
document.querySelector(".settings").addEventListener("input", showDefaults);
$("as-writing").addEventListener("change", showDefaults);
$("add-box").addEventListener("click", () => board.add("", [0, 0, Math.ceil(board.width / 2), Math.ceil(board.height / 2)]));

selectTab("generate");
loadedModel((text) => { $("model").textContent = text; }).then((loaded) => {
  model = loaded;
  $("model").textContent = `model ${model.id}, generates ${model.cm3leon.sizes.join(", enlarged ")} pixels`;
  selectTab(tab);
});

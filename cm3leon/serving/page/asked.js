// What the form asks the server for.

import { base64Of } from "./server.js";

function filled(id, what) {
  const field = document.getElementById(id);
  const value = field.value.trim();
  if (!value) {
    field.focus();
    throw new Error(`${what} is empty.`);
  }
  return value;
}

async function dataOf(picture) {
  if (!picture) throw new Error("Choose a picture first.");
  return base64Of(picture);
}

// Path, body and title of a request. Throws an Error that says what is missing.
// picture: a blob or undefined; boxes: those on the board; settings: fields of the body that were filled in.
export async function asked(task, picture, boxes, settings) {
  const prompt = () => filled("prompt", "The prompt");
  if (task === "text_to_image" && document.getElementById("as-writing").checked) {
    const text = prompt();
    return ["/v1/tasks/write", { text, ...settings }, `“${text}” as writing`];
  }
  if (task === "text_to_image") {
    const body = { prompt: prompt(), ...settings };
    return ["/v1/images/generations", body, body.prompt];
  }
  if (task === "layout_to_image") {
    if (!boxes.length) throw new Error("Draw a box for each thing first.");
    if (boxes.some(({ label }) => !label.trim())) throw new Error("Say what is in each box.");
    const body = { prompt: prompt(), objects: boxes, ...settings };
    return ["/v1/tasks/layout_to_image", body, `${body.prompt} (layout)`];
  }
  const image = await dataOf(picture);
  if (task === "infill") {
    if (!boxes.length) throw new Error("Draw a box around the part to redraw first.");
    const body = { image, box: boxes[0].box, prompt: prompt(), ...settings };
    return ["/v1/tasks/infill", body, `${body.prompt} (a part redrawn)`];
  }
  if (task === "edit") {
    const instruction = filled("instruction", "What to change");
    return ["/v1/tasks/edit", { image, instruction, ...settings }, instruction];
  }
  if (task === "answer") {
    const question = filled("question", "The question");
    return ["/v1/tasks/answer", { image, question }, question];
  }
  const long = task === "long_caption";
  return ["/v1/tasks/caption", { image, long }, long ? "Description at length" : "Description"];
}

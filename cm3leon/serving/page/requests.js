// The request that the form makes of the server.

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

async function dataOf(file) {
  if (!file) throw new Error("Choose an image first.");
  return base64Of(file);
}

// Path, body and title of a task's request. Throws an Error that says what is missing.
// file: the image's blob, or undefined; boxes: those on the board; settings: fields of the body that were filled in.
export async function requestOf(task, file, boxes, settings) {
  const path = `/v1/tasks/${task}`;
  const prompt = () => filled("prompt", "The prompt");
  if (task === "write") {
    const text = prompt();
    return [path, { text, ...settings }, `“${text}” as writing`];
  }
  if (task === "text_to_image") {
    const body = { prompt: prompt(), ...settings };
    return [path, body, body.prompt];
  }
  if (task === "layout_to_image") {
    if (!boxes.length) throw new Error("Add a box for each object first.");
    if (boxes.some(({ label }) => !label.trim())) throw new Error("Name the object in each box.");
    const body = { prompt: prompt(), objects: boxes, ...settings };
    return [path, body, `${body.prompt} (layout)`];
  }
  const image = await dataOf(file);
  if (task === "infill") {
    if (!boxes.length) throw new Error("Add a box around the region to inpaint first.");
    const body = { image, box: boxes[0].box, prompt: prompt(), ...settings };
    return [path, body, `${body.prompt} (inpainted)`];
  }
  if (task === "edit") {
    const instruction = filled("instruction", "What to change");
    return [path, { image, instruction, ...settings }, instruction];
  }
  if (task === "vqa") {
    const question = filled("question", "The question");
    return [path, { image, question }, question];
  }
  return [path, { image }, task === "long_caption" ? "Long caption" : "Caption"];
}

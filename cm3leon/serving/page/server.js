// Requests to the server this page comes from.

// An answer's JSON. Throws an Error whose message can be shown to a person.
async function read(request) {
  let response;
  try {
    response = await request;
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer. Is it still running?");
  }
  let answer = null;
  try {
    answer = await response.json();
  } catch { /* no JSON: the status says what there is to say */ }
  if (response.ok && answer) return answer;
  throw new Error(answer?.error?.message ?? `The server answered with status ${response.status}.`);
}

export function post(path, body, signal) {
  return read(fetch(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal }));
}

// The served model, once it is loaded; report is told what is going on until then.
export async function loadedModel(report) {
  for (;;) {
    try {
      const [model] = (await read(fetch("/v1/models"))).data;
      if (model.cm3leon) return model;
      report(`${model.id} is being loaded …`);
    } catch (error) {
      report(error.message);
    }
    await new Promise((resolve) => setTimeout(resolve, 1000));
  }
}

// How many requests wait in the server, or null if it does not say.
export async function queueLength() {
  try {
    return (await (await fetch("/health")).json()).queue_length;
  } catch {
    return null;
  }
}

export function base64Of(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => resolve(reader.result));
    reader.addEventListener("error", () => reject(new Error("The picture cannot be read.")));
    reader.readAsDataURL(blob);
  });
}

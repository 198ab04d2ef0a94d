// Requests to the server this page comes from.

// The JSON of a response. Throws an Error whose message can be shown to a person.
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
  } catch { /* no JSON: the status is the message */ }
  if (response.ok && answer) return answer;
  throw new Error(answer?.error?.message ?? `The server answered with status ${response.status}.`);
}

export function post(path, body, signal) {
  return read(fetch(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal }));
}

// The served model, once it is loaded; until then report gets messages about its state.
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

// The number of requests in the server's queue, or null if it does not answer.
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
    reader.addEventListener("error", () => reject(new Error("The image cannot be read.")));
    reader.readAsDataURL(blob);
  });
}

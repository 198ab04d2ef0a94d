// The server's answers as elements of the page.

// An element with properties and children; children are elements or texts, so that no output of a model is parsed as HTML.
export function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

export function pngOf(base64) {
  return new Blob([Uint8Array.from(atob(base64), (character) => character.charCodeAt(0))], { type: "image/png" });
}

// An <img> of a blob; small images keep their pixels when they are shown larger.
export function imageOf(blob, description) {
  const image = element("img", { src: URL.createObjectURL(blob), alt: description });
  image.addEventListener("load", () => image.classList.toggle("small", image.naturalWidth <= 128));
  return image;
}

// One generated image with its score, seed and buttons. actions: name -> function of its blob.
function card(generated, description, fileName, actions) {
  const blob = pngOf(generated.b64_json);
  const facts = [];
  if ("score" in generated) facts.push(generated.score === null ? "no score: not ranked" : `CLIP score ${generated.score.toFixed(3)}`);
  if ("seed" in generated) facts.push(`seed ${generated.seed}`);
  const buttons = Object.entries(actions).map(([name, act]) => {
    const button = element("button", { type: "button", className: "plain" }, name);
    button.addEventListener("click", () => act(blob));
    return button;
  });
  const download = element("a", { className: "button", href: URL.createObjectURL(blob), download: fileName }, "Download PNG");
  const [image, caption] = [imageOf(blob, description), element("figcaption", {}, facts.join(", "))];
  image.addEventListener("load", () => { caption.textContent = [...facts, `${image.naturalWidth} × ${image.naturalHeight}`].join(", "); });
  return element(
    "figure", {}, image, caption,
    element("div", { className: "card-buttons" }, download, ...buttons),
  );
}

function documentTable(documents) {
  const columns = ["id", "caption", "licence", "attribution", "source", "score"];
  const row = (kind, values) => element("tr", {}, ...values.map((value) => element(kind, {}, value)));
  const cell = (value) => (typeof value === "number" ? value.toFixed(3) : String(value ?? "unknown"));
  return element(
    "div", { className: "scroll" },
    element("table", {},
      element("thead", {}, row("th", columns)),
      element("tbody", {}, ...documents.map((found) => row("td", columns.map((name) => cell(found[name])))))),
  );
}

export function imageArticle(title, data, actions) {
  const cards = data.map((generated, number) => {
    const fileName = `cm3leon-${"seed" in generated ? `seed-${generated.seed}` : number + 1}.png`;
    return card(generated, `${title}, image ${number + 1}`, fileName, actions);
  });
  const article = element("article", {}, element("h2", {}, title), element("div", { className: "cards" }, ...cards));
  const documents = data[0].retrieved_documents ?? [];
  if (documents.length) {
    article.append(element("h3", {}, "Retrieved documents"), documentTable(documents));
  }
  return article;
}

export function textArticle(title, file, text) {
  const shown = element("p", {}, text || "(an empty text)");
  return element("article", {}, element("h2", {}, title), element("div", { className: "answer" }, imageOf(file, "the image"), shown));
}

// What the server answered, as parts of the page.

// An element with properties and children; children are elements or texts, so nothing that comes from a model is read as HTML.
export function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

export function pngOf(base64) {
  return new Blob([Uint8Array.from(atob(base64), (character) => character.charCodeAt(0))], { type: "image/png" });
}

// An <img> of a blob; small pictures keep their pixels when they are shown larger.
export function pictureOf(blob, description) {
  const image = element("img", { src: URL.createObjectURL(blob), alt: description });
  image.addEventListener("load", () => image.classList.toggle("small", image.naturalWidth <= 128));
  return image;
}

// One drawn picture: score, seed, and what can be done with it. actions: name -> function of its blob.
function card(drawn, description, fileName, actions) {
  const blob = pngOf(drawn.b64_json);
  const facts = [];
  if ("score" in drawn) facts.push(drawn.score === null ? "no score: not ranked" : `CLIP score ${drawn.score.toFixed(3)}`);
  if ("seed" in drawn) facts.push(`seed ${drawn.seed}`);
  const buttons = Object.entries(actions).map(([name, act]) => {
    const button = element("button", { type: "button", className: "plain" }, name);
    button.addEventListener("click", () => act(blob));
    return button;
  });
  const download = element("a", { className: "button", href: URL.createObjectURL(blob), download: fileName }, "Download PNG");
  const [image, caption] = [pictureOf(blob, description), element("figcaption", {}, facts.join(", "))];
  image.addEventListener("load", () => { caption.textContent = [...facts, `${image.naturalWidth} × ${image.naturalHeight}`].join(", "); });
  return element(
    "figure", {}, image, caption,
    element("div", { className: "card-buttons" }, download, ...buttons),
  );
}

function documentTable(neighbors) {
  const columns = ["id", "caption", "licence", "attribution", "source", "score"];
  const row = (kind, values) => element("tr", {}, ...values.map((value) => element(kind, {}, value)));
  const told = (value) => (typeof value === "number" ? value.toFixed(3) : String(value ?? "not told"));
  return element(
    "div", { className: "scroll" },
    element("table", {},
      element("thead", {}, row("th", columns)),
      element("tbody", {}, ...neighbors.map((found) => row("td", columns.map((name) => told(found[name])))))),
  );
}

export function drawnArticle(title, data, actions) {
  const cards = data.map((drawn, number) => {
    const fileName = `cm3leon-${"seed" in drawn ? `seed-${drawn.seed}` : number + 1}.png`;
    return card(drawn, `${title}, picture ${number + 1}`, fileName, actions);
  });
  const article = element("article", {}, element("h2", {}, title), element("div", { className: "cards" }, ...cards));
  const neighbors = data[0].neighbors ?? [];
  if (neighbors.length) {
    article.append(element("h3", {}, "Drawn after these retrieved documents"), documentTable(neighbors));
  }
  return article;
}

export function writtenArticle(title, picture, text) {
  const shown = element("p", {}, text || "(the model said nothing)");
  return element("article", {}, element("h2", {}, title), element("div", { className: "answer" }, pictureOf(picture, "the picture"), shown));
}

// A canvas that shows an image, or an empty square, and on which boxes are added with a pointer. Boxes are in pixels of the image.

const SIDE = 384;
const COLORS = ["#c2185b", "#1565c0", "#2e7d32", "#ef6c00", "#6a1b9a", "#00838f"];

export class Board {
  // onChange is called when a box was added.
  constructor(canvas, onChange) {
    this.canvas = canvas;
    this.onChange = onChange;
    this.boxes = [];
    this.most = 0;
    this.draft = null;
    canvas.addEventListener("pointerdown", (event) => this.start(event));
    canvas.addEventListener("pointermove", (event) => this.move(event));
    canvas.addEventListener("pointerup", () => this.end());
    canvas.addEventListener("pointercancel", () => { this.draft = null; this.paint(); });
  }

  // most: how many boxes there may be; if it is one, a new box replaces it.
  show(image, width, height, most, boxes = []) {
    Object.assign(this, { image, width, height, most, boxes, draft: null });
    this.scale = SIDE / Math.max(width, height);
    this.canvas.width = Math.max(1, Math.round(width * this.scale));
    this.canvas.height = Math.max(1, Math.round(height * this.scale));
    this.canvas.classList.toggle("takes-boxes", most > 0);
    this.paint();
  }

  add(label, box) {
    this.boxes = this.most === 1 ? [{ label, box }] : [...this.boxes, { label, box }].slice(0, this.most);
    this.paint();
    this.onChange();
  }

  // The pixel of the image under the pointer.
  pixelAt(event) {
    const frame = this.canvas.getBoundingClientRect();
    const inside = (value, most) => Math.min(Math.max(value, 0), most);
    return [
      inside(((event.clientX - frame.left) / frame.width) * this.width, this.width),
      inside(((event.clientY - frame.top) / frame.height) * this.height, this.height),
    ];
  }

  start(event) {
    if (!this.most || (this.most > 1 && this.boxes.length >= this.most)) return;
    this.canvas.setPointerCapture(event.pointerId);
    this.from = this.pixelAt(event);
    this.move(event);
  }

  move(event) {
    if (!this.from) return;
    const [x, y] = this.pixelAt(event);
    const [left, top] = [Math.floor(Math.min(x, this.from[0])), Math.floor(Math.min(y, this.from[1]))];
    this.draft = [left, top, Math.ceil(Math.max(x, this.from[0])), Math.ceil(Math.max(y, this.from[1]))];
    this.paint();
  }

  end() {
    const box = this.draft;
    this.from = this.draft = null;
    if (box && box[2] - box[0] > 1 && box[3] - box[1] > 1) this.add("", box);
    else this.paint();
  }

  paint() {
    const context = this.canvas.getContext("2d");
    const { width, height } = this.canvas;
    context.clearRect(0, 0, width, height);
    if (this.image) {
      context.imageSmoothingEnabled = this.scale < 3;
      context.drawImage(this.image, 0, 0, width, height);
      this.shade(context);
    } else {
      this.grid(context);
    }
    const shown = [...this.boxes, ...(this.draft ? [{ label: "", box: this.draft }] : [])];
    shown.forEach(({ label, box }, number) => this.frame(context, label, box, COLORS[number % COLORS.length]));
  }

  // Shade the parts of an image that is not square which the center crop leaves out.
  shade(context) {
    const { width, height } = this.canvas;
    const [across, down] = [Math.max(0, (width - height) / 2), Math.max(0, (height - width) / 2)];
    context.fillStyle = "rgb(28 35 33 / 60%)";
    for (const [x, y, w, h] of [[0, 0, across, height], [width - across, 0, across, height], [0, 0, width, down], [0, height - down, width, down]]) {
      context.fillRect(x, y, w, h);
    }
  }

  grid(context) {
    context.strokeStyle = "#e3e8e6";
    context.lineWidth = 1;
    for (let step = 1; step < 8; step += 1) {
      const at = Math.round((step * this.canvas.width) / 8) + 0.5;
      context.beginPath();
      context.moveTo(at, 0);
      context.lineTo(at, this.canvas.height);
      context.moveTo(0, at);
      context.lineTo(this.canvas.width, at);
      context.stroke();
    }
  }

  frame(context, label, [left, top, right, bottom], color) {
    const [x, y, w, h] = [left, top, right - left, bottom - top].map((value) => value * this.scale);
    context.lineWidth = 5;
    context.strokeStyle = "#fff";
    context.strokeRect(x, y, w, h);
    context.lineWidth = 2.5;
    context.strokeStyle = color;
    context.strokeRect(x, y, w, h);
    if (!label) return;
    context.font = "600 14px system-ui, sans-serif";
    const wide = context.measureText(label).width + 8;
    context.fillStyle = color;
    context.fillRect(x, y, wide, 20);
    context.fillStyle = "#fff";
    context.fillText(label, x + 4, y + 15);
  }
}

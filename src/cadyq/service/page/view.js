// The stage: before and after with a divider, tiles as they arrive, bits as colors; zoomed and moved by
// pointer, wheel, fingers and keys. Coordinates of the world are pixels of the result.

// Cividis (Nunez, Anderton and Renslow, PLoS ONE 2018), made to look the same to color-blind eyes.
const RAMP = [[0, 34, 78], [53, 69, 108], [102, 105, 112], [148, 142, 119], [200, 184, 102], [254, 232, 56]];
const ARRIVAL = 420; // milliseconds in which a tile appears
const calm = matchMedia("(prefers-reduced-motion: reduce)");

export function rampColor(share) {
  const at = Math.min(Math.max(share, 0), 1) * (RAMP.length - 1);
  const i = Math.min(Math.floor(at), RAMP.length - 2);
  return "rgb(" + RAMP[i].map((v, k) => Math.round(v + (RAMP[i + 1][k] - v) * (at - i))).join(" ") + ")";
}

export function rampGradient() {
  return `linear-gradient(to right, ${RAMP.map((c) => `rgb(${c.join(" ")})`).join(", ")})`;
}

export class View {
  constructor(canvas, divider, tip, onZoom, onRange) {
    Object.assign(this, { canvas, divider, tip, onZoom, onRange });
    this.context = canvas.getContext("2d");
    this.split = 0;
    this.heat = false;
    this.pointers = new Map();
    this.clear();
    new ResizeObserver(() => this.resized()).observe(canvas);
    this.listen();
  }

  clear() {
    this.before = this.after = this.parts = this.layout = null;
    this.tiles = [];
    this.size = [0, 0];
    this.draw();
  }

  /** A picture to start from; its size is known once the service has read it. */
  setBefore(bitmap) {
    this.before = bitmap;
    if (!this.layout) this.setSize(bitmap.width, bitmap.height);
    this.draw();
  }

  /** What the service says when it starts: LR size, scale, tile grid, candidate bits. */
  setLayout(layout) {
    const { width, height, scale } = layout;
    this.layout = layout;
    this.range = null;
    this.tiles = [];
    this.after = null;
    this.setSize(width * scale, height * scale);
    const factor = Math.ceil(Math.max(...this.size) / 1600);
    this.parts = new OffscreenCanvas(Math.ceil(this.size[0] / factor), Math.ceil(this.size[1] / factor));
    this.draw();
  }

  setSize(width, height) {
    // A larger version of the same picture stays where it is on the screen.
    const factor = this.size[0] ? this.size[0] / width : 0;
    this.size = [width, height];
    if (factor && !this.fitted) this.zoom *= factor;
    else this.fit();
  }

  /** A part of the picture has arrived: its box in LR pixels, mean bits per tile, and an image. */
  addPart(box, bits, image) {
    const [y0, y1, x0, x1] = box;
    const { scale, tile } = this.layout;
    const shrink = (this.parts.width / this.size[0]) * scale;
    const paint = this.parts.getContext("2d");
    paint.drawImage(image, x0 * shrink, y0 * shrink, (x1 - x0) * shrink, (y1 - y0) * shrink);
    // Tiles that left say little beside tiles that chose, but all where the others are alike.
    const chosen = bits.flat().filter((value) => value > 0);
    this.widen(new Set(chosen).size > 1 ? chosen : bits.flat());
    const now = performance.now();
    bits.forEach((row, r) => row.forEach((value, c) => {
      const delay = calm.matches ? -ARRIVAL : (r + c) * Math.min(45, 700 / (bits.length + row.length));
      this.tiles.push({
        x: x0 + c * tile, y: y0 + r * tile,
        w: Math.min(tile, x1 - x0 - c * tile), h: Math.min(tile, y1 - y0 - r * tile),
        bits: value, start: now + delay,
      });
    }));
    this.draw();
  }

  /** Colors span the means that occur, rounded outwards to half bits: a fixed scale would show gray. */
  widen(values) {
    if (!values.length) return;
    const [low, high] = this.range ?? [Infinity, -Infinity];
    this.range = [
      Math.min(low, Math.floor(Math.min(...values) * 2) / 2), Math.max(high, Math.ceil(Math.max(...values) * 2) / 2),
    ];
    this.onRange(this.range);
  }

  setAfter(bitmap) {
    this.after = bitmap;
    this.draw();
  }

  setSplit(share, animate = false) {
    cancelAnimationFrame(this.gliding);
    const goal = Math.min(Math.max(share, 0), 1);
    if (!animate || calm.matches) return this.place(goal);
    const step = () => {
      const left = goal - this.split;
      this.place(Math.abs(left) < 0.004 ? goal : this.split + left * 0.16);
      if (this.split !== goal) this.gliding = requestAnimationFrame(step);
    };
    step();
  }

  place(share) {
    this.split = share;
    this.divider.style.left = `${share * 100}%`;
    const percent = Math.round(share * 100);
    this.divider.setAttribute("aria-valuenow", percent);
    this.divider.setAttribute("aria-valuetext", `${percent} % before, ${100 - percent} % after`);
    this.draw();
  }

  setHeat(shown) {
    this.heat = shown;
    this.draw();
  }

  // --- zoom: CSS pixels per pixel of the result; origin: where its corner lies on the canvas

  fit() {
    const { clientWidth: w, clientHeight: h } = this.canvas;
    const [width, height] = this.size;
    if (!width || !w) return;
    this.fitted = true;
    this.zoom = Math.min(w / width, h / height, 4);
    this.origin = [(w - width * this.zoom) / 2, (h - height * this.zoom) / 2];
    this.moved();
  }

  zoomBy(factor, at = [this.canvas.clientWidth / 2, this.canvas.clientHeight / 2]) {
    const [w, h] = [this.canvas.clientWidth, this.canvas.clientHeight];
    const fit = Math.min(w / this.size[0], h / this.size[1], 4);
    const zoom = Math.min(Math.max(this.zoom * factor, fit), Math.max(8, fit));
    if (zoom === fit) return this.fit();
    const ratio = zoom / this.zoom;
    this.fitted = false;
    this.origin = this.origin.map((o, i) => at[i] - (at[i] - o) * ratio);
    this.zoom = zoom;
    this.moved();
  }

  pan(dx, dy) {
    if (this.fitted) return;
    this.origin = [this.origin[0] + dx, this.origin[1] + dy];
    this.moved();
  }

  moved() {
    // The picture cannot be lost: what is smaller than the stage is centered, what is larger covers it.
    const stage = [this.canvas.clientWidth, this.canvas.clientHeight];
    this.origin = this.origin.map((o, i) => {
      const length = this.size[i] * this.zoom;
      return length <= stage[i] ? (stage[i] - length) / 2 : Math.min(0, Math.max(stage[i] - length, o));
    });
    this.onZoom(this.fitted ? "Fit" : `${Math.round(this.zoom * 100 * devicePixelRatio)} %`);
    this.draw();
  }

  resized() {
    const { clientWidth: w, clientHeight: h } = this.canvas;
    this.canvas.width = Math.round(w * devicePixelRatio);
    this.canvas.height = Math.round(h * devicePixelRatio);
    if (this.fitted || !this.zoom) this.fit();
    else if (this.size[0]) this.moved();
  }

  // --- drawing

  draw() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      this.paint();
    });
  }

  paint() {
    const { context: c, canvas, size } = this;
    c.setTransform(1, 0, 0, 1, 0, 0);
    c.clearRect(0, 0, canvas.width, canvas.height);
    if (!size[0] || !this.zoom) return;
    const z = this.zoom * devicePixelRatio;
    c.setTransform(z, 0, 0, z, this.origin[0] * devicePixelRatio, this.origin[1] * devicePixelRatio);
    c.imageSmoothingQuality = "high";
    c.imageSmoothingEnabled = true;
    if (this.before) c.drawImage(this.before, 0, 0, ...size);
    const edge = this.split * canvas.clientWidth;
    const left = (edge - this.origin[0]) / this.zoom;
    c.save();
    c.beginPath();
    c.rect(left, 0, size[0] - left, size[1]);
    if (left < size[0]) c.clip();
    if (left < size[0]) this.paintAfter(c, z);
    c.restore();
    if (this.heat) this.paintHeat(c);
  }

  paintAfter(c, z) {
    const { layout, size } = this;
    if (this.after) {
      c.imageSmoothingEnabled = z < 2; // beyond, a pixel is shown as a pixel
      c.drawImage(this.after, 0, 0, ...size);
    }
    const now = performance.now();
    const arriving = this.tiles.filter((t) => now < t.start + ARRIVAL);
    if (!this.after && layout) {
      const s = layout.scale, shrink = this.parts.width / size[0];
      for (const t of this.tiles) {
        if (now < t.start) continue;
        c.globalAlpha = Math.min(1, (now - t.start) / ARRIVAL);
        const box = [t.x * s, t.y * s, t.w * s, t.h * s];
        c.drawImage(this.parts, ...box.map((v) => v * shrink), ...box);
      }
      c.globalAlpha = 1;
      this.paintGrid(c, z);
    }
    for (const t of arriving) {
      if (now < t.start) continue;
      const s = layout.scale;
      c.globalAlpha = 0.75 * (1 - (now - t.start) / ARRIVAL);
      c.fillStyle = this.color(t.bits);
      c.fillRect(t.x * s, t.y * s, t.w * s, t.h * s);
    }
    c.globalAlpha = 1;
    if (arriving.length) this.draw();
  }

  /** Fine lines where tiles are still awaited. */
  paintGrid(c, z) {
    const { layout, size } = this;
    const side = layout.tile * layout.scale;
    if (side * z < 6) return;
    const here = new Set(this.tiles.map((t) => `${t.x / layout.tile},${t.y / layout.tile}`));
    c.lineWidth = 1 / z;
    c.strokeStyle = "rgb(255 255 255 / .22)";
    for (let row = 0; row < layout.rows; row++) {
      for (let col = 0; col < layout.cols; col++) {
        if (here.has(`${col},${row}`)) continue;
        const [x, y] = [col * side, row * side];
        c.strokeRect(x, y, Math.min(side, size[0] - x), Math.min(side, size[1] - y));
      }
    }
  }

  paintHeat(c) {
    const s = this.layout?.scale;
    c.globalAlpha = 0.7;
    for (const t of this.tiles) {
      if (performance.now() < t.start) continue;
      c.fillStyle = this.color(t.bits);
      c.fillRect(t.x * s, t.y * s, t.w * s, t.h * s);
    }
    c.globalAlpha = 1;
  }

  color(bits) {
    const [low, high] = this.range;
    return rampColor(high > low ? (bits - low) / (high - low) : 1);
  }

  // --- pointer, wheel, fingers, keys

  listen() {
    const { canvas, divider, pointers } = this;
    const at = (event) => {
      const box = canvas.getBoundingClientRect();
      return [event.clientX - box.left, event.clientY - box.top];
    };
    canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      this.zoomBy(Math.exp(-event.deltaY * 0.0016), at(event));
    }, { passive: false });
    canvas.addEventListener("dblclick", (event) => (this.fitted ? this.zoomBy(1 / this.zoom / devicePixelRatio, at(event)) : this.fit()));
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      pointers.set(event.pointerId, at(event));
    });
    canvas.addEventListener("pointermove", (event) => {
      this.point(at(event), event.pointerType);
      const old = pointers.get(event.pointerId);
      if (!old) return;
      const now = at(event);
      const other = [...pointers].find(([id]) => id !== event.pointerId)?.[1];
      pointers.set(event.pointerId, now);
      if (other) {
        const apart = (p) => Math.hypot(p[0] - other[0], p[1] - other[1]);
        this.zoomBy(apart(now) / Math.max(apart(old), 1), [(now[0] + other[0]) / 2, (now[1] + other[1]) / 2]);
      } else {
        this.pan(now[0] - old[0], now[1] - old[1]);
      }
    });
    for (const name of ["pointerup", "pointercancel"]) {
      canvas.addEventListener(name, (event) => pointers.delete(event.pointerId));
    }
    canvas.addEventListener("pointerleave", () => (this.tip.style.visibility = "hidden"));
    canvas.addEventListener("keydown", (event) => {
      const moves = { ArrowLeft: [60, 0], ArrowRight: [-60, 0], ArrowUp: [0, 60], ArrowDown: [0, -60] };
      if (moves[event.key]) this.pan(...moves[event.key]);
      else if (event.key === "+" || event.key === "=") this.zoomBy(1.4);
      else if (event.key === "-") this.zoomBy(1 / 1.4);
      else if (event.key === "0") this.fit();
      else return;
      event.preventDefault();
    });

    divider.addEventListener("pointerdown", (event) => {
      divider.setPointerCapture(event.pointerId);
      event.preventDefault();
      divider.focus({ focusVisible: false });
    });
    divider.addEventListener("pointermove", (event) => {
      if (divider.hasPointerCapture(event.pointerId)) this.setSplit(at(event)[0] / canvas.clientWidth);
    });
    divider.addEventListener("keydown", (event) => {
      const big = event.shiftKey ? 0.1 : 0.02;
      const goals = {
        ArrowLeft: this.split - big, ArrowDown: this.split - big, ArrowRight: this.split + big,
        ArrowUp: this.split + big, PageDown: this.split - 0.1, PageUp: this.split + 0.1, Home: 0, End: 1,
      };
      if (goals[event.key] === undefined) return;
      event.preventDefault();
      this.setSplit(goals[event.key]);
    });
  }

  /** Say how many bits the tile under the pointer has. */
  point([x, y], kind) {
    const tile = this.layout && this.tiles.find((t) => {
      const s = this.layout.scale * this.zoom;
      const [left, top] = [this.origin[0] + t.x * s, this.origin[1] + t.y * s];
      return x >= left && x < left + t.w * s && y >= top && y < top + t.h * s;
    });
    this.tip.style.visibility = tile && this.heat && kind === "mouse" ? "visible" : "hidden";
    if (!tile) return;
    this.tip.textContent = tile.bits ? `${tile.bits.toFixed(1)} bits` : "left the network: bicubic";
    const flip = x > this.canvas.clientWidth - 120 ? -this.tip.offsetWidth - 12 : 14;
    this.tip.style.transform = `translate(${x + flip}px, ${Math.max(y - 30, 4)}px)`;
  }
}

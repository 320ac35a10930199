import { drawLead, drawRegion, edge } from "../ui/heat";
import type { View } from "./geometry";
import type { Photo } from "./photo";

/** A number of 0 to 1 that two whole numbers choose: the same window looks the same each time. */
export function noise(a: number, b: number): number {
  let x = (a * 374761393 + b * 668265263 + 1442695041) | 0;
  x = Math.imul(x ^ (x >>> 13), 1274126177);
  return ((x ^ (x >>> 16)) >>> 0) / 2 ** 32;
}

export interface Frame {
  width: number;
  height: number;
  /** where the panes are, in the same pixels: what the model sees of the image */
  left: number;
  top: number;
  across: number;
  down: number;
}

/** How many times wider than high a window is at least and at most: a longer image is squeezed, so that it can be seen. */
const [TALLEST, WIDEST] = [1 / 6, 12];

/** Where the panes lie in a canvas that shows the whole image, and for a letterbox also what is around it. */
export function frameOf(view: View, photo: { width: number; height: number }, width: number, density = 1): Frame {
  const [x1, y1, x2, y2] = view.region;
  const [left, top] = [Math.min(0, x1), Math.min(0, y1)];
  const [right, bottom] = [Math.max(photo.width, x2), Math.max(photo.height, y2)];
  const ratio = Math.min(WIDEST, Math.max(TALLEST, (right - left) / (bottom - top)));
  const [across, down] = [(width * density) / (right - left), (width * density) / ratio / (bottom - top)];
  return {
    width: Math.round(width * density),
    height: Math.round((width * density) / ratio),
    left: (x1 - left) * across,
    top: (y1 - top) * down,
    across: (x2 - x1) * across,
    down: (y2 - y1) * down,
  };
}

/** The photo as a window: what the model sees in leaded panes, and the rest of the photo in the dark around it. */
export function drawGlass(canvas: HTMLCanvasElement, photo: Photo, view: View, frame: Frame): void {
  canvas.width = frame.width;
  canvas.height = frame.height;
  const context = canvas.getContext("2d") as CanvasRenderingContext2D;
  context.imageSmoothingQuality = "high";
  context.fillStyle = "#0b0910";
  context.fillRect(0, 0, frame.width, frame.height);
  const whole = wholeOf(view, photo);
  if (photo.bitmap) {
    context.filter = "grayscale(0.85) brightness(0.42)";
    drawRegion(context, photo.bitmap, whole, frame.width, frame.height, [photo.width, photo.height]);
    context.filter = "none";
  }
  const pane = document.createElement("canvas");
  pane.width = Math.max(1, Math.round(frame.across));
  pane.height = Math.max(1, Math.round(frame.down));
  drawPanes(pane, photo, view);
  context.drawImage(pane, Math.round(frame.left), Math.round(frame.top));
}

export function wholeOf(view: View, photo: { width: number; height: number }): [number, number, number, number] {
  const [x1, y1, x2, y2] = view.region;
  return [Math.min(0, x1), Math.min(0, y1), Math.max(photo.width, x2), Math.max(photo.height, y2)];
}

/** The panes alone: each a little lighter or darker than its neighbours, with light on its upper edge. */
function drawPanes(canvas: HTMLCanvasElement, photo: Photo, { region, rows, columns }: View): void {
  const { width, height } = canvas;
  const context = canvas.getContext("2d") as CanvasRenderingContext2D;
  context.imageSmoothingQuality = "high";
  context.fillStyle = "#16121f";
  context.fillRect(0, 0, width, height);
  if (photo.bitmap) {
    context.filter = "saturate(1.26) contrast(1.05)";
    drawRegion(context, photo.bitmap, region, width, height, [photo.width, photo.height]);
    context.filter = "none";
  }
  const [w, h] = [width / columns, height / rows];
  const fine = Math.min(w, h) < 18;
  const depth = fine ? 0.12 : 0.3;
  for (let row = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++) {
      const [x, y] = [edge(column, columns, width), edge(row, rows, height)];
      const tone = noise(row, column);
      if (!photo.bitmap) {
        context.fillStyle = `hsl(${232 + 40 * tone} 22% ${17 + 12 * noise(column, row)}%)`;
        context.fillRect(x, y, w + 1, h + 1);
      }
      context.fillStyle =
        tone < 0.5 ? `rgb(8 4 24 / ${depth * (0.5 - tone)})` : `rgb(255 250 235 / ${0.5 * depth * (tone - 0.5)})`;
      context.fillRect(x, y, w + 1, h + 1);
      if (!fine) drawShine(context, x, y, w, h, tone);
    }
  }
  const lead = Math.max(1, Math.min(9, Math.min(w, h) / 10));
  drawLead(context, rows, columns, width, height, lead, "#0b0910");
  if (!fine) drawRidge(context, rows, columns, width, height, lead);
}

/** A pane is brightest in the middle and dark at the lead; a streak of light lies on its upper corner. */
function drawShine(context: CanvasRenderingContext2D, x: number, y: number, w: number, h: number, tone: number): void {
  const [cx, cy] = [x + w * (0.35 + 0.3 * tone), y + h * 0.45];
  const inner = context.createRadialGradient(cx, cy, 0, cx, cy, Math.hypot(w, h) * 0.62);
  inner.addColorStop(0, "rgb(255 246 224 / 0.1)");
  inner.addColorStop(0.55, "rgb(255 246 224 / 0)");
  inner.addColorStop(1, "rgb(5 2 16 / 0.5)");
  context.fillStyle = inner;
  context.fillRect(x, y, w + 1, h + 1);
  const streak = context.createLinearGradient(x, y, x + w * (0.45 + 0.4 * tone), y + h * 0.8);
  streak.addColorStop(0, `rgb(255 255 255 / ${0.1 + 0.1 * tone})`);
  streak.addColorStop(0.3, "rgb(255 255 255 / 0)");
  context.fillStyle = streak;
  context.fillRect(x, y, w + 1, h + 1);
}

/** The light on the lead, and the solder where it crosses. */
function drawRidge(
  context: CanvasRenderingContext2D,
  rows: number,
  columns: number,
  width: number,
  height: number,
  lead: number,
): void {
  drawLead(context, rows, columns, width, height, lead * 0.28, "rgb(190 180 205 / 0.34)");
  for (let row = 0; row <= rows; row++) {
    for (let column = 0; column <= columns; column++) {
      const [x, y] = [edge(column, columns, width), edge(row, rows, height)];
      context.fillStyle = "#14101a";
      context.beginPath();
      context.arc(x, y, lead * (0.85 + 0.25 * noise(column, row)), 0, 2 * Math.PI);
      context.fill();
      context.fillStyle = "rgb(200 190 215 / 0.22)";
      context.beginPath();
      context.arc(x - lead * 0.2, y - lead * 0.25, lead * 0.4, 0, 2 * Math.PI);
      context.fill();
    }
  }
}

const MOST = 700;
const SECONDS = 1.15;

/** Let a finished window assemble from its panes. Returns how to stop it. */
export function assemble(canvas: HTMLCanvasElement, finished: HTMLCanvasElement, view: View, frame: Frame): () => void {
  const context = canvas.getContext("2d") as CanvasRenderingContext2D;
  // A window of thousands of panes assembles by groups of them.
  const group = Math.max(1, Math.ceil(Math.sqrt((view.rows * view.columns) / MOST)));
  const [rows, columns] = [Math.ceil(view.rows / group), Math.ceil(view.columns / group)];
  const [w, h] = [(frame.across / view.columns) * group, (frame.down / view.rows) * group];
  const far = Math.hypot(rows / 2, columns / 2);
  let [request, began] = [0, -1];

  const draw = (now: number) => {
    if (began < 0) began = now;
    const time = (now - began) / 1000 / SECONDS;
    context.globalAlpha = 1;
    if (time >= 1) {
      context.drawImage(finished, 0, 0);
      return;
    }
    context.fillStyle = "#0b0910";
    context.fillRect(0, 0, frame.width, frame.height);
    // The unlit window stands from the first moment; then its panes light up.
    context.globalAlpha = 0.3;
    context.drawImage(finished, 0, 0);
    context.globalAlpha = Math.min(1, time * 1.4);
    drawAround(context, finished, frame);
    for (let row = 0; row < rows; row++) {
      for (let column = 0; column < columns; column++) {
        const [dx, dy] = [column + 0.5 - columns / 2, row + 0.5 - rows / 2];
        const delay = 0.5 * (Math.hypot(dx, dy) / far) + 0.14 * noise(row, column);
        const done = Math.min(1, Math.max(0, (time - delay) / 0.36));
        if (!done) continue;
        const eased = 1 - (1 - done) ** 3;
        const x = frame.left + column * w;
        const y = frame.top + row * h;
        const wide = Math.min(w, frame.left + frame.across - x);
        const high = Math.min(h, frame.top + frame.down - y);
        const size = 0.72 + 0.28 * eased;
        const away = (1 - eased) * Math.max(w, h) * 0.55;
        context.globalAlpha = eased;
        context.drawImage(
          finished,
          x,
          y,
          wide,
          high,
          x + (wide * (1 - size)) / 2 + (dx / far) * away,
          y + (high * (1 - size)) / 2 + (dy / far) * away,
          wide * size,
          high * size,
        );
      }
    }
    request = requestAnimationFrame(draw);
  };
  request = requestAnimationFrame(draw);
  return () => cancelAnimationFrame(request);
}

/** What lies around the panes. */
function drawAround(context: CanvasRenderingContext2D, finished: HTMLCanvasElement, frame: Frame): void {
  context.save();
  context.beginPath();
  context.rect(0, 0, frame.width, frame.height);
  context.rect(frame.left, frame.top, frame.across, frame.down);
  context.clip("evenodd");
  context.drawImage(finished, 0, 0);
  context.restore();
}

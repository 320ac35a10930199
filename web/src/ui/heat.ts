/** Drawing numbers over an image, and the lead between panes. */

export type Region = readonly [x1: number, y1: number, x2: number, y2: number];
export type Colour = readonly [red: number, green: number, blue: number];

const STOPS: readonly Colour[] = [
  [12, 8, 38],
  [71, 24, 116],
  [168, 42, 91],
  [232, 110, 45],
  [250, 193, 76],
  [255, 246, 205],
];

/** From deep violet to candlelight, for a value of 0 to 1. */
export function ramp(value: number): Colour {
  const place = Math.min(Math.max(value, 0), 1) * (STOPS.length - 1);
  const from = Math.min(Math.floor(place), STOPS.length - 2);
  const [a, b] = [STOPS[from] as Colour, STOPS[from + 1] as Colour];
  const mix = (i: 0 | 1 | 2) => Math.round(a[i] + (b[i] - a[i]) * (place - from));
  return [mix(0), mix(1), mix(2)];
}

export const css = ([red, green, blue]: Colour, alpha = 1) => `rgb(${red} ${green} ${blue} / ${alpha})`;

/** The numbers moved to 0 to 1: by their own range, or by a range that several grids share. */
export function scaled(values: readonly (readonly number[])[], range?: readonly [number, number]): number[][] {
  const all = values.flat();
  const [low, high] = range ?? [Math.min(...all), Math.max(...all)];
  const width = high - low || 1;
  return values.map((row) => row.map((value) => (value - low) / width));
}

/** Give a canvas the pixels of its size on this screen. Returns its context, in CSS pixels. */
export function sharp(canvas: HTMLCanvasElement, width: number, height: number): CanvasRenderingContext2D {
  const density = Math.min(window.devicePixelRatio || 1, 3);
  canvas.width = Math.round(width * density);
  canvas.height = Math.round(height * density);
  const context = canvas.getContext("2d") as CanvasRenderingContext2D;
  context.setTransform(density, 0, 0, density, 0, 0);
  context.imageSmoothingQuality = "high";
  return context;
}

/** Draw a region of an image over a whole canvas of this size; what lies outside of the image stays as it was. */
export function drawRegion(
  context: CanvasRenderingContext2D,
  image: CanvasImageSource,
  [x1, y1, x2, y2]: Region,
  width: number,
  height: number,
  size: readonly [width: number, height: number],
): void {
  const [across, down] = [width / (x2 - x1), height / (y2 - y1)];
  context.drawImage(image, -x1 * across, -y1 * down, size[0] * across, size[1] * down);
}

/**
 * Draw a value of 0 to 1 per patch. `light`: the patches of low values go dark, as glass without light behind it.
 * `colour`: each patch has the colour of its value, half transparent.
 */
export function drawHeat(
  context: CanvasRenderingContext2D,
  values: readonly (readonly number[])[],
  width: number,
  height: number,
  kind: "light" | "colour" = "light",
  strength = 0.85,
): void {
  const rows = values.length;
  values.forEach((row, y) => {
    row.forEach((value, x) => {
      const [left, right] = [edge(x, row.length, width), edge(x + 1, row.length, width)];
      const [top, bottom] = [edge(y, rows, height), edge(y + 1, rows, height)];
      context.fillStyle = kind === "light" ? css([9, 6, 20], strength * (1 - value)) : css(ramp(value), strength);
      context.fillRect(left, top, right - left, bottom - top);
    });
  });
}

/** Where a pane begins, in whole pixels, so that neighbours meet without a seam. */
export const edge = (number: number, count: number, length: number) => Math.round((number * length) / count);

/** Draw the lead between the panes of a grid. */
export function drawLead(
  context: CanvasRenderingContext2D,
  rows: number,
  columns: number,
  width: number,
  height: number,
  thickness = Math.max(1, Math.min(3.5, Math.min(width / columns, height / rows) / 11)),
  colour = "#0b0910",
): void {
  context.fillStyle = colour;
  for (let x = 0; x <= columns; x++) {
    context.fillRect(edge(x, columns, width) - thickness / 2, 0, thickness, height);
  }
  for (let y = 0; y <= rows; y++) {
    context.fillRect(0, edge(y, rows, height) - thickness / 2, width, thickness);
  }
}

/** The patch at a place of an element, or null beside it. */
export function patchAt(
  event: { clientX: number; clientY: number },
  element: Element,
  rows: number,
  columns: number,
): [row: number, column: number] | null {
  const box = element.getBoundingClientRect();
  const column = Math.floor(((event.clientX - box.left) / box.width) * columns);
  const row = Math.floor(((event.clientY - box.top) / box.height) * rows);
  return row >= 0 && row < rows && column >= 0 && column < columns ? [row, column] : null;
}

/** The colours of maps over a pale photo: those of src/vitrail/explain/overlay.py, so that figures and page agree. */

const STOPS = ["#ffe45c", "#ff9f1c", "#ef3e2e", "#b8123f", "#8a1048"].map((hex) =>
  [1, 3, 5].map((at) => Number.parseInt(hex.slice(at, at + 2), 16)),
);
const MANY = 400; /* patches, from which on the highest 1 of 200 share the last colour */
const FADED = 0.5;
const COLOUR = 0.35;
const COLOURS = 256;

/** Red, green, blue and opacity of 256 values: from yellow to a dark red, and opaque with the value. */
export const HEAT = new Uint8ClampedArray(4 * COLOURS);
for (let i = 0; i < COLOURS; i++) {
  const value = i / (COLOURS - 1);
  const place = value * (STOPS.length - 1);
  const from = Math.min(Math.floor(place), STOPS.length - 2);
  const [a, b] = [STOPS[from] as number[], STOPS[from + 1] as number[]];
  HEAT.set(
    [0, 1, 2].map((j) => (a[j] as number) + ((b[j] as number) - (a[j] as number)) * (place - from)),
    4 * i,
  );
  HEAT[4 * i + 3] = 255 * 0.85 * Math.min(value / 0.6, 1) ** 1.3;
}

/** The lowest value of a map, and the highest one; of many patches, the one that few exceed. */
export function range(map: Float32Array): [low: number, high: number] {
  const sorted = Float32Array.from(map).sort();
  return [
    sorted[0] as number,
    sorted[map.length < MANY ? map.length - 1 : Math.floor(0.995 * (map.length - 1))] as number,
  ];
}

/** The pixels of a map: each value by the map's own range, or by one that two maps share. */
export function heat(map: Float32Array, [low, high] = range(map)): Uint8ClampedArray<ArrayBuffer> {
  const span = high - low || 1;
  const pixels = new Uint8ClampedArray(4 * map.length);
  for (let i = 0; i < map.length; i++) {
    const at = 4 * Math.round((COLOURS - 1) * Math.min(Math.max(((map[i] as number) - low) / span, 0), 1));
    for (let j = 0; j < 4; j++) pixels[4 * i + j] = HEAT[at + j] as number;
  }
  return pixels;
}

/** The pixels of panes of glass, from red, green and blue of 0 to 1. */
export function glass(colours: Float32Array): Uint8ClampedArray<ArrayBuffer> {
  const pixels = new Uint8ClampedArray((4 * colours.length) / 3);
  for (let i = 0; i < colours.length / 3; i++) {
    for (let j = 0; j < 3; j++) pixels[4 * i + j] = 255 * (colours[3 * i + j] as number);
    pixels[4 * i + 3] = 205;
  }
  return pixels;
}

/** A photo, pale and with a share of its colour: dark places of it are lighter than strong places of a map. */
export function pale(photo: CanvasImageSource, width: number, height: number): OffscreenCanvas {
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d") as OffscreenCanvasRenderingContext2D;
  context.drawImage(photo, 0, 0, width, height);
  const pixels = context.getImageData(0, 0, width, height);
  const { data } = pixels;
  for (let i = 0; i < data.length; i += 4) {
    const [r, g, b] = [data[i] as number, data[i + 1] as number, data[i + 2] as number];
    const grey = 0.2126 * r + 0.7152 * g + 0.0722 * b;
    for (let j = 0; j < 3; j++) {
      data[i + j] = 255 * FADED + (1 - FADED) * (grey + COLOUR * ((data[i + j] as number) - grey));
    }
  }
  context.putImageData(pixels, 0, 0);
  return canvas;
}

/** Pixels of one per cell, as an image. */
export function small(pixels: Uint8ClampedArray<ArrayBuffer>, width: number, height: number): OffscreenCanvas {
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d") as OffscreenCanvasRenderingContext2D;
  context.putImageData(new ImageData(pixels, width, height), 0, 0);
  return canvas;
}

/** The key of a map as a CSS background. */
export const KEY = `linear-gradient(90deg, ${Array.from({ length: 17 }, (_, i) => {
  const [r, g, b, a] = HEAT.subarray(4 * Math.round((255 * i) / 16), 4 * Math.round((255 * i) / 16) + 4);
  return `rgb(${r} ${g} ${b} / ${((a as number) / 255).toFixed(3)})`;
}).join(", ")}), #fff`;

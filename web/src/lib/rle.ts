import type { Rle } from "../api/answers";

/** The run lengths of COCO's code: of zeros and ones in turn, down the columns. */
export function lengths({ counts }: Rle): number[] {
  const found: number[] = [];
  let place = 0;
  while (place < counts.length) {
    let [value, shift, more] = [0, 0, true];
    while (more) {
      const bits = counts.charCodeAt(place++) - 48;
      value += (bits & 31) * 2 ** shift;
      shift += 5;
      more = (bits & 32) !== 0 && place < counts.length;
      if (!more && bits & 16) value -= 2 ** shift;
    }
    found.push(found.length > 2 ? value + (found[found.length - 2] as number) : value);
  }
  return found;
}

/** Write the number of a mask's class into the places [height * width], row by row, where the mask is one. */
export function mark(rle: Rle, number: number, places: Uint8Array): void {
  const [height, width] = rle.size as [number, number];
  let from = 0;
  lengths(rle).forEach((length, i) => {
    const to = Math.min(from + length, height * width);
    if (i % 2) {
      for (let place = from; place < to; place++)
        places[(place % height) * width + Math.floor(place / height)] = number;
    }
    from = to;
  });
}

const GLASS: readonly [number, number, number][] = [
  [47, 91, 224],
  [222, 160, 48],
  [28, 148, 99],
  [200, 35, 63],
  [122, 72, 208],
  [31, 160, 186],
  [228, 106, 60],
  [222, 112, 172],
  [150, 186, 62],
  [136, 186, 255],
  [146, 28, 72],
  [255, 214, 112],
];

/** Colours of glass that are easy to tell apart; after them hues by the golden angle. */
export function classColour(number: number): readonly [number, number, number] {
  const glass = GLASS[number];
  if (glass) return glass;
  const [hue, value, saturation] = [(number * 0.61803398875) % 1, number % 2 ? 0.95 : 0.7, number % 3 ? 0.75 : 0.45];
  const channel = (n: number) => {
    const k = (n + hue * 6) % 6;
    return Math.round(255 * (value - value * saturation * Math.max(0, Math.min(k, 4 - k, 1))));
  };
  return [channel(5), channel(3), channel(1)];
}

import type { ExplanationData, PackedArray } from "./data";

function bytes(text: string): Uint8Array {
  const found = atob(text);
  const values = new Uint8Array(found.length);
  for (let i = 0; i < found.length; i++) values[i] = found.charCodeAt(i);
  return values;
}

/** An array in 8 bits. Its numbers are computed when they are read: low + byte / 255 * (high - low), per last axis. */
export class Numbers {
  readonly shape: readonly number[];
  private readonly bytes: Uint8Array;
  private readonly edges: readonly [Float32Array, Float32Array] | null;

  constructor({ shape, data, low, high }: PackedArray) {
    this.shape = shape;
    this.bytes = bytes(data);
    this.edges = low && high ? [new Float32Array(bytes(low).buffer), new Float32Array(bytes(high).buffer)] : null;
  }

  get length(): number {
    return this.bytes.length;
  }

  slice(start: number, count: number): Float32Array {
    const found = new Float32Array(count);
    const row = this.shape[this.shape.length - 1] as number;
    for (let i = 0; i < count; i++) {
      const byte = this.bytes[start + i] as number;
      if (this.edges) {
        const place = Math.floor((start + i) / row);
        const low = this.edges[0][place] as number;
        found[i] = low + (byte / 255) * ((this.edges[1][place] as number) - low);
      } else found[i] = byte;
    }
    return found;
  }

  /** The map with this number, of maps that have `size` numbers each. */
  map(number: number, size: number): Float32Array {
    return this.slice(number * size, size);
  }
}

/** The arrays of an explanation, each decoded once, when it is first read. */
export class Arrays {
  private readonly read = new Map<string, Numbers>();

  constructor(private readonly data: ExplanationData) {}

  has(name: string): boolean {
    return name in this.data.arrays;
  }

  get(name: string): Numbers {
    let found = this.read.get(name);
    if (!found) {
      found = new Numbers(this.data.arrays[name] as PackedArray);
      this.read.set(name, found);
    }
    return found;
  }
}

export function mean(maps: readonly Float32Array[]): Float32Array {
  const found = new Float32Array((maps[0] as Float32Array).length);
  for (const map of maps) {
    for (let i = 0; i < found.length; i++) found[i] = (found[i] as number) + (map[i] as number) / maps.length;
  }
  return found;
}

/** The place of the highest number, but for one that is left out. */
export function strongest(map: Float32Array, but = -1): number {
  let best = but === 0 ? 1 : 0;
  for (let i = best + 1; i < map.length; i++) if (i !== but && (map[i] as number) > (map[best] as number)) best = i;
  return best;
}

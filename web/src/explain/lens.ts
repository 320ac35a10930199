import { Arrays, mean, strongest } from "./arrays";
import type { ExplanationData } from "./data";

/** What a person looks at. Layers and patches are counted from 0. */
export interface Look {
  view: string;
  layer: number;
  /** 0: the mean over heads; otherwise the number of a head, from 1 */
  head: number;
  /** -1: the answer as a whole */
  output: number;
  patch: number | null;
  /** a patch stays chosen when the pointer leaves */
  pinned: boolean;
}

/** The numbers of an explanation, by what they mean. */
export class Lens {
  readonly arrays: Arrays;
  readonly rows: number;
  readonly columns: number;
  readonly patches: number;
  /** side of the blocks of patches that stand for them between patches */
  readonly block: number;
  readonly layers: number;
  readonly heads: number;
  /** layers whose attention between patches was kept */
  readonly kept: readonly number[];
  /** a patch to begin with: the one that speaks most for the answer */
  readonly first: number;

  constructor(readonly data: ExplanationData) {
    this.arrays = new Arrays(data);
    [this.rows, this.columns] = (data.grid ?? [0, 0]) as [number, number];
    this.patches = this.rows * this.columns;
    this.block = data.block ?? 1;
    const heads = this.arrays.has("heads") ? this.arrays.get("heads").shape : [0, 0];
    [this.layers, this.heads] = heads as [number, number];
    this.kept = (data.attention_layers ?? []).map((layer) => layer - 1);
    const map = ["relevance", "rollout"].find((name) => this.arrays.has(name));
    this.first = map ? strongest(this.arrays.get(map).slice(0, this.patches)) : 0;
  }

  has(name: string): boolean {
    return this.arrays.has(name);
  }

  /** The blocks of a grid, down and across. */
  blocks([down, across]: readonly [number, number]): [number, number] {
    return [Math.ceil(down / this.block), Math.ceil(across / this.block)];
  }

  get cells(): number {
    const [down, across] = this.blocks([this.rows, this.columns]);
    return down * across;
  }

  cellOf(patch: number): number {
    const [row, column] = [Math.floor(patch / this.columns), patch % this.columns];
    return Math.floor(row / this.block) * Math.ceil(this.columns / this.block) + Math.floor(column / this.block);
  }

  /** The kept layer that is nearest to a layer. */
  nearest(layer: number): number {
    return this.kept.reduce(
      (best, each) => (Math.abs(each - layer) < Math.abs(best - layer) ? each : best),
      this.kept[0] ?? layer,
    );
  }

  /** Attention of one head (from 1) of a layer, or of their mean (0): from a patch, or from where the answer is read. */
  attention(layer: number, head: number, patch: number | null): Float32Array {
    if (patch === null || !this.has("attention")) return this.ofHeads("heads", layer, this.heads, head, null);
    const place = this.kept.indexOf(this.nearest(layer));
    const heads = this.arrays.get("attention").shape[1] as number;
    return this.ofHeads("attention", place, heads, heads === 1 ? 0 : head, this.cellOf(patch));
  }

  private ofHeads(name: string, layer: number, heads: number, head: number, cell: number | null): Float32Array {
    const one = (number: number) => {
      const at = layer * heads + number;
      return cell === null
        ? this.arrays.get(name).map(at, this.patches)
        : this.arrays.get(name).map(at * this.cells + cell, this.cells);
    };
    return head ? one(head - 1) : mean(Array.from({ length: heads }, (_, i) => one(i)));
  }

  rollout(patch: number | null): Float32Array {
    return patch !== null && this.has("rollout_patches")
      ? this.arrays.get("rollout_patches").map(patch, this.patches)
      : this.arrays.get("rollout").map(0, this.patches);
  }

  relevance(output: number): Float32Array {
    return output < 0
      ? this.arrays.get("relevance").map(0, this.patches)
      : this.arrays.get("relevance_outputs").map(output, this.patches);
  }

  words(output: number): Float32Array {
    const words = this.arrays.get("words");
    if (output >= 0) return words.map(output, this.patches);
    return mean(Array.from({ length: words.shape[0] as number }, (_, i) => words.map(i, this.patches)));
  }

  norms(layer: number): Float32Array {
    return this.arrays.get("norms").map(layer, this.patches);
  }

  /** Whether there is one position embedding per patch of this image. */
  get positioned(): boolean {
    return this.has("positions") && this.arrays.get("positions").shape[0] === this.patches;
  }

  place(patch: number): string {
    return `row ${Math.floor(patch / this.columns) + 1}, column ${(patch % this.columns) + 1}`;
  }
}

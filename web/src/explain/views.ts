import { glass, heat, range } from "./heat";
import type { Lens, Look } from "./lens";

export type Unit = "share" | "ratio" | "number";

/** A way to look at an explanation. */
export interface View {
  key: string;
  name: string;
  /** what is seen and how to read it, for a newcomer */
  says: string;
  /** where it comes from */
  paper: string;
  /** whether this explanation has it */
  there: (lens: Lens) => boolean;
  layer?: boolean;
  head?: boolean;
  /** a patch can be chosen; `always`: without one, the first is */
  patch?: "may" | "always";
  /** what its outputs are */
  outputs?: "outputs" | "pieces";
  /** what the numbers are: shares of one, or only their ratios mean something */
  unit?: Unit;
  map?: (lens: Lens, look: Look) => Float32Array;
}

/** In the order of the page. The first is the most faithful map of results/faithfulness.json. */
export const VIEWS: readonly View[] = [
  {
    key: "relevance",
    name: "Relevance",
    says: "The darker a patch, the more it speaks for the answer that you choose: attention, weighted by how much each piece of it changes the answer, followed back through all layers.",
    paper: "arXiv 2012.09838",
    there: (lens) => lens.has("relevance"),
    outputs: "outputs",
    unit: "ratio",
    map: (lens, look) => lens.relevance(look.output),
  },
  {
    key: "words",
    name: "Words",
    says: "Choose a word of the caption: dark patches are where the model looked when it wrote this word.",
    paper: "arXiv 1502.03044",
    there: (lens) => lens.has("words"),
    outputs: "pieces",
    unit: "share",
    map: (lens, look) => lens.words(look.output),
  },
  {
    key: "attention",
    name: "Attention",
    says: "Point at a patch, or move over them with the arrow keys: dark patches are where it looks in this layer and head. With no patch chosen, you see where the answer is read from.",
    paper: "arXiv 2010.11929",
    there: (lens) => lens.has("heads"),
    layer: true,
    head: true,
    patch: "may",
    unit: "share",
    map: (lens, look) => lens.attention(look.layer, look.head, look.patch),
  },
  {
    key: "rollout",
    name: "Rollout",
    says: "The attention of all layers multiplied together: dark patches are those that reach the answer in the end, or that reach the patch you point at.",
    paper: "arXiv 2005.00928",
    there: (lens) => lens.has("rollout"),
    patch: "may",
    unit: "share",
    map: (lens, look) => lens.rollout(look.patch),
  },
  {
    key: "similarity",
    name: "Similarity",
    says: "Point at a patch: dark patches mean much the same to the model. Add a second photo to find the same thing there.",
    paper: "arXiv 2112.05814",
    there: (lens) => lens.has("similarity"),
    patch: "always",
    map: (lens, look) => lens.arrays.get("similarity").map(lens.cellOf(look.patch ?? lens.first), lens.cells),
  },
  {
    key: "colours",
    name: "Colours",
    says: "Patches that mean similar things to the model have similar colours. Red, green and blue are the three directions in which the tokens differ most (principal components).",
    paper: "arXiv 2304.07193",
    there: (lens) => lens.has("pca"),
    patch: "may",
  },
  {
    key: "layers",
    name: "Layer by layer",
    says: "What the model would answer if it ended after each layer. Only the last layer was trained to answer: watch where its answer first appears.",
    paper: "logit lens, arXiv 2303.08112",
    there: (lens) => Boolean(lens.data.lens?.length),
  },
  {
    key: "distance",
    name: "Distance",
    says: "Each dot is a head, and its height is how far it looks on average. Low heads look next door, like a small convolution; high ones look across the whole photo.",
    paper: "arXiv 2010.11929, figure 7",
    there: (lens) => lens.has("distance"),
    layer: true,
    head: true,
    unit: "share",
    map: (lens, look) => lens.attention(look.layer, look.head, null),
  },
  {
    key: "norms",
    name: "Norms",
    says: "The darker a patch, the longer its token. A few that are several times longer than the others serve the model as scratch space (registers), and say little about their place.",
    paper: "arXiv 2309.16588",
    there: (lens) => lens.has("norms"),
    layer: true,
    map: (lens, look) => lens.norms(look.layer),
  },
  {
    key: "positions",
    name: "Positions",
    says: "Point at a patch: dark patches have a similar position embedding, which is how the model knows where a patch is. Each of the small maps belongs to the patch at its place; a trained model shows rows and columns.",
    paper: "arXiv 2010.11929, figure 7",
    there: (lens) => lens.positioned,
    patch: "always",
    map: (lens, look) => lens.arrays.get("positions").map(look.patch ?? lens.first, lens.patches),
  },
];

/** The pixels of a map: its cells are blocks where it has fewer than there are patches. */
export function cellsOf(lens: Lens, map: Float32Array, shared = range(map)) {
  return { pixels: heat(map, shared), block: map.length === lens.patches ? 1 : lens.block };
}

/** The similarity of a patch with those of the second photo. */
export function beside(lens: Lens, patch: number): Float32Array | null {
  if (!lens.has("similarity_beside")) return null;
  const numbers = lens.arrays.get("similarity_beside");
  return numbers.map(lens.cellOf(patch), numbers.shape[1] as number);
}

/** The range that both photos share, so that the same colour means the same similarity. */
export function together(map: Float32Array, other: Float32Array | null): [low: number, high: number] {
  const [low, high] = range(map);
  const [theirs, highest] = other ? range(other) : [low, high];
  return [Math.min(low, theirs), Math.max(high, highest)];
}

export function coloursOf(lens: Lens, name: "pca" | "pca_beside") {
  const numbers = lens.arrays.get(name);
  return { pixels: glass(numbers.slice(0, numbers.length)), block: 1 };
}

/** What `POST /v1/explain` answers for an image: the numbers that the views of this folder draw. */
export interface ExplanationData {
  /** rows and columns of the patches that the model sees; a model without attention has none */
  grid?: [number, number];
  /** side of a patch in pixels of the model's input */
  patch?: number;
  prefix_tokens?: number;
  /** attention rollout, [rows][columns] */
  rollout?: number[][];
  /** mean attention distance in pixels, [layers][heads] */
  attention_distance?: number[][];
  /** of an answer that is made piece by piece: its pieces, with the attention of each over the patches */
  pieces?: { text: string; p: number; attention: number[][] | null }[];
}

/** An image as the page holds it. `region` is what the model sees of it, in pixels of the image: [x1, y1, x2, y2]. */
export interface ExplainedImage {
  name: string;
  url: string;
  width: number;
  height: number;
  region: [number, number, number, number];
}

export interface ExplanationProps {
  data: ExplanationData;
  image: ExplainedImage;
  /** a second image with its explanation, for what compares two */
  beside?: { data: ExplanationData; image: ExplainedImage } | null;
}

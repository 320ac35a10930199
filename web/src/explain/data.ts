/** What `POST /v1/explain` answers for an image: the numbers that the views of this folder draw. */
export interface ExplanationData {
  /** rows and columns of the patches that the model sees; a model without attention has none */
  grid?: [number, number];
}

/** What may be requested beyond the numbers of an image: a second image to compare with, and the relevance of a class. */
export interface More {
  beside?: Blob;
  class?: string;
}

export interface ExplanationProps {
  data: ExplanationData;
  /** what the image is called */
  name: string;
  /** explain the same image again, and more; absent in a page without a server */
  ask?: (more: More) => Promise<ExplanationData>;
  /** the view that the address names, "open" at first, and how to name another: links to a result carry it */
  view?: string;
  onView?: (view: string) => void;
}

import type { components } from "../api/schema";

type Schemas = components["schemas"];

/** What `POST /v1/explain` answers for an image: the numbers that the views of this folder draw. */
export type ExplanationData = Schemas["Explanation"];
export type PackedArray = Schemas["PackedArray"];

/** What else an explanation shall hold, for the same photo. */
export interface More {
  /** another image, whose patches are compared with those of the first */
  beside?: Blob;
  /** a class whose relevance is wanted, whether or not it belongs to the answer */
  class?: string;
}

export interface ExplanationProps {
  data: ExplanationData;
  /** what the photo is called */
  name: string;
  /** ask again for the same photo; without it the views that need more are left out */
  ask?: (more: More) => Promise<ExplanationData>;
  classNames?: readonly string[] | null;
  /** the view that is open */
  view?: string;
  onView?: (view: string) => void;
}

import type { ExplanationProps } from "./data";

export type { ExplainedImage, ExplanationData, ExplanationProps } from "./data";

/** What the model saw in an image: the views of its numbers. */
export function Explanation({ data, image }: ExplanationProps) {
  return (
    <p>
      {image.name}: {data.grid?.join(" × ")} patches
    </p>
  );
}

import type { ExplanationProps } from "./data";

export type { ExplanationData, ExplanationProps, More } from "./data";

/** What the model saw in an image: the views of its numbers. */
export function Explanation({ data, name }: ExplanationProps) {
  return (
    <p>
      {name}: {data.grid?.join(" × ")} patches
    </p>
  );
}

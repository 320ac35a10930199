import type { components } from "./schema";

type Schemas = components["schemas"];
export type Token = Schemas["Piece"];
export type Rle = Schemas["RunLengths"];
export type Segment = Schemas["Segment"];
export interface Box {
  label: string;
  score: number;
  box: [x1: number, y1: number, x2: number, y2: number];
}

/** The answer of a task; boxes are drawn, though no task of vitrail gives any yet. */
export type Answer = Schemas["Prediction"] & { boxes?: Box[] };

export const percent = (share: number, digits = 1) => `${(100 * share).toFixed(digits)} %`;

/** One line for people, as a terminal would show it. */
export function summary(answer: Answer): string {
  if (answer.error) return answer.error;
  if (answer.labels?.length)
    return answer.labels
      .slice(0, 3)
      .map(({ label, score }) => `${label} ${percent(score)}`)
      .join(", ");
  if (answer.caption != null) return `${answer.sure === false ? "not sure: " : ""}${answer.caption}`;
  if (answer.segments)
    return (
      answer.segments
        .slice(0, 4)
        .map(({ label, share }) => `${label} ${percent(share)}`)
        .join(", ") || "no class was found"
    );
  if (answer.boxes)
    return answer.boxes.map(({ label, score }) => `${label} ${percent(score)}`).join(", ") || "nothing was found";
  if (answer.values)
    return answer.values.map(({ name, value }) => `${name} ${Number(value.toPrecision(4))}`).join(", ");
  if (answer.embedding) return `a vector of ${answer.embedding.length} numbers`;
  return JSON.stringify(answer);
}

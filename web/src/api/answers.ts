/** The answers of the tasks, as `vitrail predict --json` prints them: their fields depend on the task. */
export interface Label {
  label: string;
  score: number;
}
export interface Token {
  text: string;
  p: number;
}
export interface Caption {
  caption: string;
  score: number;
  tokens: Token[];
}
export interface Rle {
  size: [height: number, width: number];
  counts: string | number[];
}
export interface Segment {
  label: string;
  share: number;
  area: number;
  rle: Rle;
}
export interface Box {
  label: string;
  score: number;
  box: [x1: number, y1: number, x2: number, y2: number];
}
export interface Value {
  name: string;
  value: number;
}

export interface Answer {
  task?: string;
  labels?: Label[];
  caption?: string;
  captions?: Caption[];
  /** how well a caption matches its image, where the model can tell */
  match?: number;
  /** whether that is enough to rely on */
  sure?: boolean;
  segments?: Segment[];
  boxes?: Box[];
  values?: Value[];
  embedding?: number[];
  /** of an image that could not be read beside others that could */
  error?: string;
}

export const percent = (share: number, digits = 1) => `${(100 * share).toFixed(digits)} %`;

/** One line for people, as a terminal would show it. */
export function summary(answer: Answer): string {
  if (answer.error) return answer.error;
  if (answer.labels?.length)
    return answer.labels
      .slice(0, 3)
      .map(({ label, score }) => `${label} ${percent(score)}`)
      .join(", ");
  if (answer.caption !== undefined) return `${answer.sure === false ? "not sure: " : ""}${answer.caption}`;
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

import type { Answer } from "../api/answers";

type Cell = string | number | boolean | null | undefined;
type Row = Record<string, Cell>;

/** One row per image; of a task that finds several things in an image, one row per thing. */
export function rows(image: string, answer: Answer): Row[] {
  const first: Row = { image, task: answer.task };
  if (answer.error) return [{ ...first, error: answer.error }];
  if (answer.labels) return [{ ...first, label: answer.labels[0]?.label, score: answer.labels[0]?.score }];
  if (answer.caption != null) {
    return [{ ...first, caption: answer.caption, match: answer.match, sure: answer.sure }];
  }
  if (answer.segments?.length) {
    return answer.segments.map(({ label, share, area }) => ({ ...first, label, share, area }));
  }
  if (answer.boxes?.length) {
    return answer.boxes.map(({ label, score, box: [x1, y1, x2, y2] }) => ({ ...first, label, score, x1, y1, x2, y2 }));
  }
  if (answer.values)
    return [{ ...first, ...Object.fromEntries(answer.values.map(({ name, value }) => [name, value])) }];
  if (answer.embedding) return [{ ...first, embedding: JSON.stringify(answer.embedding) }];
  return [first];
}

/** CSV with a header; columns that no row fills are left out. */
export function asCsv(all: Row[]): string {
  const named = new Set(all.flatMap((row) => Object.keys(row).filter((name) => row[name] != null)));
  const columns = [...named].filter((name) => name !== "error").concat(named.has("error") ? ["error"] : []);
  const lines = [columns, ...all.map((row) => columns.map((name) => row[name]))];
  return lines.map((line) => `${line.map(cell).join(",")}\r\n`).join("");
}

function cell(value: Cell): string {
  if (value == null) return "";
  if (typeof value === "number") return String(value);
  // A spreadsheet would run a text that begins like a formula.
  const text = String(value).replace(/^[=+\-@\t\r]/, "'$&");
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

/** Hand a text to the browser as a file. */
export function download(text: string, name: string, type: string): void {
  const url = URL.createObjectURL(new Blob([text], { type }));
  const link = document.createElement("a");
  link.href = url;
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

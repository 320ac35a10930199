import { useCallback, useEffect, useRef, useState } from "react";
import type { Answer } from "../api/answers";
import type { ApiError, Client } from "../api/client";
import { type Found, isImage } from "./photo";
import { asApiError, pause } from "./useAnswer";

export interface Item {
  id: number;
  path: string;
  file: File;
  /** a small copy of the image; empty where this browser cannot show it */
  thumbnail: string;
  answer: Answer | null;
}

const SIDE = 320;
const IMAGES = 8;
const BYTES = 12e6;
let count = 0;

/** Many images that are answered in small groups, one group at a time. */
export function useGallery(client: Client, model: string) {
  const [items, setItems] = useState<Item[]>([]);
  const [error, setError] = useState<ApiError | null>(null);
  const [left, setLeft] = useState<number | null>(null);
  const [attempt, setAttempt] = useState(0);
  const [skipped, setSkipped] = useState(0);
  const control = useRef<AbortController | null>(null);
  const all = useRef<Item[]>([]);
  all.current = items;

  const change = useCallback((ids: Map<number, Partial<Item>>) => {
    setItems((before) => before.map((item) => (ids.has(item.id) ? { ...item, ...ids.get(item.id) } : item)));
  }, []);

  const add = useCallback(
    async (files: Found[]) => {
      const images = files.filter(({ file }) => isImage(file));
      setSkipped(files.length - images.length);
      const fresh = images.map(({ path, file }) => ({ id: ++count, path, file, thumbnail: "", answer: null }));
      setItems((before) => [...before, ...fresh]);
      for (const { id, file } of fresh) {
        const thumbnail = await small(file);
        if (thumbnail) change(new Map([[id, { thumbnail }]]));
      }
    },
    [change],
  );

  const clear = useCallback(() => {
    control.current?.abort();
    setItems((before) => {
      for (const { thumbnail } of before) URL.revokeObjectURL(thumbnail);
      return [];
    });
    setError(null);
    setLeft(null);
    setSkipped(0);
  }, []);

  // Another model answers all images anew.
  const shown = useRef(model);
  useEffect(() => {
    if (shown.current === model) return;
    shown.current = model;
    setItems((before) => before.map((item) => ({ ...item, answer: null })));
  }, [model]);

  const waiting = items.some(({ answer }) => !answer);
  // biome-ignore lint/correctness/useExhaustiveDependencies: a new attempt starts it again
  useEffect(() => {
    if (!waiting) return;
    const mine = new AbortController();
    control.current = mine;
    setError(null);
    const run = async () => {
      while (!mine.signal.aborted) {
        const group = next(all.current);
        if (!group.length) return;
        try {
          change(await answered(client, model, group, mine.signal));
        } catch (caught) {
          if (mine.signal.aborted) return;
          const found = asApiError(caught);
          setError(found);
          if (!found.passing) return;
          for (let seconds = found.after ?? 1; seconds > 0 && !mine.signal.aborted; seconds--) {
            setLeft(seconds);
            await pause(1);
          }
          setLeft(null);
          setError(null);
        }
        await pause(0); // the state that was just set is read next
      }
    };
    run();
    return () => mine.abort();
  }, [waiting, model, client, attempt, change]);

  const retry = useCallback(() => setAttempt((number) => number + 1), []);
  return { items, add, clear, error, left, retry, skipped };
}

/** The next images that have no answer, as many as fit in a request. */
function next(items: Item[]): Item[] {
  const group: Item[] = [];
  let bytes = 0;
  for (const item of items) {
    if (item.answer) continue;
    bytes += item.file.size;
    if (group.length && (group.length === IMAGES || bytes > BYTES)) break;
    group.push(item);
  }
  return group;
}

/** The answers of a group. An image that the server refuses has the reason in place of an answer. */
async function answered(
  client: Client,
  model: string,
  group: Item[],
  signal: AbortSignal,
): Promise<Map<number, Partial<Item>>> {
  try {
    const found = await client.predict(
      group.map(({ file }) => file),
      model,
      signal,
    );
    return new Map(group.map(({ id }, i) => [id, { answer: found[i] as Answer }]));
  } catch (caught) {
    const error = asApiError(caught);
    if (![413, 415, 422].includes(error.status)) throw caught;
    if (group.length === 1) return new Map([[(group[0] as Item).id, { answer: { error: error.message } }]]);
    const each = new Map<number, Partial<Item>>();
    for (const item of group) for (const entry of await answered(client, model, [item], signal)) each.set(...entry);
    return each;
  }
}

async function small(file: File): Promise<string> {
  try {
    const bitmap = await createImageBitmap(file);
    const scale = Math.min(1, SIDE / Math.min(bitmap.width, bitmap.height));
    const canvas = document.createElement("canvas");
    canvas.width = Math.max(1, Math.round(bitmap.width * scale));
    canvas.height = Math.max(1, Math.round(bitmap.height * scale));
    const context = canvas.getContext("2d") as CanvasRenderingContext2D;
    context.imageSmoothingQuality = "high";
    context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
    bitmap.close();
    const blob = await new Promise<Blob | null>((resolve) => canvas.toBlob(resolve, "image/webp", 0.85));
    return blob ? URL.createObjectURL(blob) : "";
  } catch {
    return "";
  }
}

import { useCallback, useEffect, useState } from "react";
import type { Answer } from "../api/answers";
import { ApiError, type Client, type ModelCard } from "../api/client";
import type { ExplanationData } from "../explain";
import type { Photo } from "./photo";

interface State<T> {
  /** what there is of the answer so far, for one that comes word by word */
  draft: string | null;
  value: T | null;
  error: ApiError | null;
  /** seconds until it is tried again */
  left: number | null;
}

export interface Requested<T> extends State<T> {
  busy: boolean;
  retry: () => void;
}

const EMPTY = { draft: null, value: null, error: null, left: null };
const TRIES = 5;
type Work<T> = (signal: AbortSignal, onText: (text: string) => void) => Promise<T>;

export const asApiError = (error: unknown): ApiError =>
  error instanceof ApiError ? error : new ApiError(0, "page", "The page failed to show this answer", String(error));

/** Ask the server, again after a while where it is busy. `key` names the question; null: there is none. */
export function useRequest<T>(key: string | null, work: Work<T>): Requested<T> {
  const [state, setState] = useState<{ key: string | null; of: State<T> }>({ key, of: EMPTY });
  const [attempt, setAttempt] = useState(0);

  // biome-ignore lint/correctness/useExhaustiveDependencies: `work` is made anew each time; the key stands for it
  useEffect(() => {
    if (key === null) return;
    const control = new AbortController();
    const put = (changes: Partial<State<T>>) => {
      if (!control.signal.aborted) setState({ key, of: { ...EMPTY, ...changes } });
    };
    put({});
    persist(() => work(control.signal, (draft) => put({ draft })), control.signal, put);
    return () => control.abort();
  }, [key, attempt]);

  const retry = useCallback(() => setAttempt((number) => number + 1), []);
  const current = state.key === key ? state.of : EMPTY;
  const busy = key !== null && current.value === null && (current.error === null || current.left !== null);
  return { ...current, busy, retry };
}

/** Run the work, and again after the time that the server names where it is busy. */
async function persist<T>(run: () => Promise<T>, signal: AbortSignal, put: (changes: Partial<State<T>>) => void) {
  for (let tries = 1; ; tries++) {
    try {
      put({ value: await run() });
      return;
    } catch (caught) {
      if (signal.aborted) return;
      const error = asApiError(caught);
      if (!error.passing || tries === TRIES) {
        put({ error });
        return;
      }
      for (let left = error.after ?? 1; left > 0 && !signal.aborted; left--) {
        put({ error, left });
        await pause(1);
      }
    }
  }
}

export const pause = (seconds: number) => new Promise((resolve) => setTimeout(resolve, 1000 * seconds));

const answers = new WeakMap<Photo, Map<string, Answer>>();
const explanations = new WeakMap<Photo, Map<string, ExplanationData>>();

/** What was answered for a photo is kept as long as the photo. */
async function kept<T>(
  store: WeakMap<Photo, Map<string, T>>,
  photo: Photo,
  model: string,
  ask: () => Promise<T>,
): Promise<T> {
  const found = store.get(photo) ?? new Map<string, T>();
  store.set(photo, found);
  const known = found.get(model);
  if (known !== undefined) return known;
  const value = await ask();
  found.set(model, value);
  return value;
}

export function useAnswer(client: Client, card: ModelCard, photo: Photo): Requested<Answer> {
  return useRequest(`${client.base} ${card.name} ${photo.id}`, (signal, onText) =>
    kept(answers, photo, card.name, async () => {
      if (card.streams) return client.stream(photo.blob, card.name, onText, signal);
      return (await client.predict([photo.blob], card.name, signal))[0] as Answer;
    }),
  );
}

export function useExplanation(client: Client, model: string, photo: Photo): Requested<ExplanationData> {
  return useRequest(`${client.base} ${model} ${photo.id}`, (signal) =>
    kept(explanations, photo, model, () => client.explain(photo.blob, model, {}, signal)),
  );
}

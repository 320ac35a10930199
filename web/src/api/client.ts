import type { ExplanationData, More } from "../explain";
import { Kept } from "../lib/storage";
import type { Answer } from "./answers";
import type { components, paths } from "./schema";

export type Models = components["schemas"]["Models"];
export type ModelCard = components["schemas"]["ModelCard"];
type ErrorBody = components["schemas"]["Error"];
type Path = keyof paths;

/** An answer of the server that is an error, or no answer: what is wrong and what to do. */
export class ApiError extends Error {
  constructor(
    readonly status: number,
    readonly code: string,
    message: string,
    readonly hint: string,
    /** seconds after which to try again */
    readonly after: number | null = null,
  ) {
    super(message);
  }

  /** whether the same request may succeed a little later */
  get passing(): boolean {
    return this.after !== null && (this.status === 503 || this.status === 429);
  }
}

/** The server at an address; a key is kept for it until this tab is closed. */
export class Client {
  private readonly kept: Kept;

  constructor(readonly base: string) {
    this.kept = new Kept("session", `vitrail-key ${base}`);
  }

  get key(): string {
    return this.kept.get() ?? "";
  }

  set key(key: string) {
    this.kept.set(key || null);
  }

  url(path: Path | "/docs"): string {
    return `${this.base}${path}`;
  }

  async models(signal?: AbortSignal): Promise<Models> {
    return json(await this.ask("/v1/models", { signal: signal ?? null }));
  }

  /** One answer per image, in their order. */
  async predict(images: Blob[], model: string, signal?: AbortSignal): Promise<Answer[]> {
    const response = await this.ask("/v1/predict", {
      method: "POST",
      body: form(images, model),
      signal: signal ?? null,
    });
    const found = await json<{ predictions: Answer[] }>(response);
    return found.predictions.map((answer) => (answer.error ? { ...answer, error: ofFile(answer.error) } : answer));
  }

  /** The numbers of an explanation of one image. */
  async explain(image: Blob, model: string, more: More = {}, signal?: AbortSignal): Promise<ExplanationData> {
    const body = form([image], model);
    if (more.beside) body.append("beside", more.beside, "image-2");
    if (more.class) body.append("class", more.class);
    const response = await this.ask("/v1/explain", { method: "POST", body, signal: signal ?? null });
    return (await json<{ explanation: ExplanationData }>(response)).explanation;
  }

  /** The answer for one image; `onText` is called with each draft of it. */
  async stream(image: Blob, model: string, onText: (text: string) => void, signal: AbortSignal): Promise<Answer> {
    const response = await this.ask(
      "/v1/predict",
      { method: "POST", body: form([image], model), signal },
      "?stream=true",
    );
    for await (const { event, data } of events(response)) {
      const found = JSON.parse(data);
      if (event === "word") onText(found.text);
      else if (event === "done") return found.predictions[0];
      else if (event === "error") throw asError(PASSING.includes(found.error?.code) ? 503 : 422, found, null);
    }
    throw cutOff();
  }

  private async ask(path: Path, init: RequestInit, query = ""): Promise<Response> {
    const headers = this.key ? { Authorization: `Bearer ${this.key}` } : undefined;
    let response: Response;
    try {
      response = await fetch(this.url(path) + query, { ...init, ...(headers && { headers }), credentials: "omit" });
    } catch (error) {
      if (init.signal?.aborted) throw error;
      const place = this.base || location.origin;
      const hint = "check that it runs, and that it allows this page (vitrail serve --allow-origin)";
      throw new ApiError(
        0,
        "away",
        `The server at ${place} does not answer`,
        this.base ? hint : "check that it runs, then try again",
      );
    }
    if (response.ok) return response;
    const after = Number(response.headers.get("Retry-After")) || null;
    throw asError(response.status, await response.json().catch(() => null), after);
  }
}

const cutOff = () => new ApiError(0, "cut_off", "The answer was cut off", "check that the server runs, then try again");

/** The body of an answer, whose connection may end before it does. */
async function json<T>(response: Response): Promise<T> {
  try {
    return await response.json();
  } catch (error) {
    throw error instanceof SyntaxError ? error : cutOff();
  }
}

/** The server counts the images of a request; for a person each is a file. */
const ofFile = (message: string) =>
  message
    .replace(/^(image \d+|beside): /, "")
    .replace(/^image \d+ /, "the file ")
    .replace(/^beside /, "the second photo ");

/** The codes of status 503: it is worth waiting. The status of a stream is sent before its error is known. */
const PASSING = ["busy", "timeout", "stopping", "out_of_memory"];

function form(images: Blob[], model: string): FormData {
  const body = new FormData();
  // The names of people's files stay here.
  images.forEach((image, i) => {
    body.append("images", image, `image-${i + 1}`);
  });
  body.append("model", model);
  return body;
}

function asError(status: number, body: ErrorBody | null, after: number | null): ApiError {
  const { code, message, hint } = body?.error ?? {
    code: "unknown",
    message: `The server answered with status ${status}`,
    hint: "check that this address is a vitrail server, or look at the log of the proxy before it",
  };
  // A page of another origin may not read Retry-After.
  const wait = after ?? (status === 503 || status === 429 ? 5 : null);
  return new ApiError(status, code, ofFile(message), hint, wait);
}

/** The server-sent events of a response. */
async function* events(response: Response): AsyncGenerator<{ event: string; data: string }> {
  const reader = (response.body as ReadableStream<BufferSource>).pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    while (true) {
      const { done, value } = await reader.read().catch(() => ({ done: true, value: "" })); // the connection has ended
      if (done) return;
      text += value;
      const blocks = text.split("\n\n");
      text = blocks.pop() ?? "";
      for (const block of blocks) {
        const field = (name: string) => new RegExp(`^${name}: ?(.*)$`, "m").exec(block)?.[1] ?? "";
        if (field("data")) yield { event: field("event"), data: field("data") };
      }
    }
  } finally {
    await reader.cancel().catch(() => {});
  }
}

/** The server of this page: `?api=`, or what the page's head names, or where the page comes from. */
export function address(): string {
  const named = new URLSearchParams(location.search).get("api");
  const meta = document.querySelector<HTMLMetaElement>('meta[name="vitrail-api"]')?.content;
  const given = named || meta || new URL(".", location.href).href;
  const url = URL.canParse(given) ? new URL(given) : null;
  if (!url || !/^https?:$/.test(url.protocol)) return "";
  const base = (url.origin + url.pathname).replace(/\/+$/, "");
  return base === location.origin ? "" : base;
}

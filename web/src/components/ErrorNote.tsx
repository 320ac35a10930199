import { type FormEvent, useId, useState } from "react";
import type { ApiError, Client } from "../api/client";
import { Button } from "../ui/controls";

const TITLES: Record<number, string> = {
  0: "No answer",
  401: "A key is needed",
  413: "Too large",
  415: "Not an image",
  422: "This cannot be answered",
  429: "Too many requests",
  503: "The server is busy",
};

interface Props {
  error: ApiError;
  client: Client;
  onRetry: () => void;
  left?: number | null;
}

/** What went wrong, and what to do. */
export function ErrorNote({ error, client, onRetry, left = null }: Props) {
  return (
    <div className="note" data-kind={error.passing ? "passing" : "failed"} role={left === null ? "alert" : undefined}>
      <h2>{TITLES[error.status] ?? "This did not work"}</h2>
      <p>{sentence(error.message)}</p>
      <p className="soft">
        {sentence(error.status === 401 ? "write the key that the server's owner gave you" : error.hint)}
      </p>
      {error.status === 401 ? (
        <KeyForm client={client} onDone={onRetry} />
      ) : (
        <div className="row">
          <Button onClick={onRetry}>Try again</Button>
          {left !== null && <span className="soft small">again in {left} s</span>}
        </div>
      )}
    </div>
  );
}

const sentence = (text: string) => `${text.charAt(0).toUpperCase()}${text.slice(1)}${/[.!?]$/.test(text) ? "" : "."}`;

/** The API key: it stays in this tab, and is gone when the tab is closed. */
export function KeyForm({ client, onDone }: { client: Client; onDone: () => void }) {
  const [key, setKey] = useState(client.key);
  const told = useId();
  const submit = (event: FormEvent) => {
    event.preventDefault();
    client.key = key.trim();
    onDone();
  };
  return (
    <form className="key-form" onSubmit={submit}>
      <label className="field">
        API key
        <input
          type="password"
          autoComplete="off"
          spellCheck={false}
          value={key}
          aria-describedby={told}
          onChange={(event) => setKey(event.target.value)}
        />
      </label>
      <Button kind="main" type="submit">
        Use this key
      </Button>
      <p id={told} className="soft small">
        It is kept in this tab only, and sent to no other server.
      </p>
    </form>
  );
}

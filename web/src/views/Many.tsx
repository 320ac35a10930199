import { useEffect, useRef } from "react";
import { type Answer, percent, summary } from "../api/answers";
import type { Client, ModelCard } from "../api/client";
import { ErrorNote } from "../components/ErrorNote";
import { Icon } from "../components/icons";
import { ModelPicker } from "../components/ModelPicker";
import { asCsv, download, rows } from "../lib/csv";
import type { Found } from "../lib/photo";
import { type Item, useGallery } from "../lib/useGallery";
import { Button } from "../ui/controls";

interface Props {
  client: Client;
  models: ModelCard[];
  model: ModelCard;
  onModel: (name: string) => void;
  /** files that were dropped on the page and are not taken yet */
  files: Found[];
  onTaken: () => void;
  /** look at one of them alone */
  onOpen: (file: File, name: string) => void;
}

/** Many photos with their answers, and these as a table. */
export function Many({ client, models, model, onModel, files, onTaken, onOpen }: Props) {
  const { items, add, clear, error, left, retry, skipped } = useGallery(client, model.name);
  const done = items.filter(({ answer }) => answer).length;

  useEffect(() => {
    if (!files.length) return;
    onTaken();
    add(files);
  }, [files, onTaken, add]);

  const save = () => {
    const all = items.flatMap(({ path, answer }) => (answer ? rows(path, answer) : []));
    download(asCsv(all), `vitrail-${model.name}.csv`, "text/csv;charset=utf-8");
  };

  return (
    <div className="stack many">
      <div className="panel stack">
        <div className="row">
          <h1>Many photos</h1>
          <ModelPicker label="Model" models={models} value={model.name} onChange={onModel} />
        </div>
        <p className="soft">
          Drop photos or whole folders anywhere on this page. They are sent to the server in small groups, and are not
          kept.
        </p>
        <div className="row">
          <FilesButton folder={false} onFiles={add} />
          <FilesButton folder onFiles={add} />
          {items.length > 0 && (
            <>
              <Button kind="main" onClick={save} disabled={!done}>
                <Icon name="save" />
                Save as CSV
              </Button>
              <Button kind="bare" onClick={clear}>
                Remove all
              </Button>
            </>
          )}
        </div>
        {items.length > 0 && (
          <div className="progress">
            <progress max={items.length} value={done} aria-label="Photos that are answered" />
            <span className="numbers small" role="status">
              {done} of {items.length} answered
            </span>
          </div>
        )}
        {skipped > 0 && (
          <p className="soft small">
            {skipped === 1 ? "1 file that is no image was" : `${skipped} files that are no images were`} left out.
          </p>
        )}
        {error && <ErrorNote error={error} client={client} onRetry={retry} left={left} />}
      </div>
      {items.length > 0 && (
        <ul className="gallery" aria-label="Photos">
          {items.map((item) => (
            <Card key={item.id} item={item} onOpen={onOpen} />
          ))}
        </ul>
      )}
    </div>
  );
}

function Card({ item: { path, file, thumbnail, answer }, onOpen }: { item: Item; onOpen: Props["onOpen"] }) {
  return (
    <li className="card" data-busy={answer ? undefined : ""} data-failed={answer?.error ? "" : undefined}>
      <button type="button" onClick={() => onOpen(file, path)} title={path}>
        {thumbnail ? <img src={thumbnail} alt="" loading="lazy" /> : <span className="card-blank" />}
        <span className="card-answer">{answer ? <Short answer={answer} /> : <span className="soft">waits</span>}</span>
        <span className="soft small card-path">{path}</span>
      </button>
    </li>
  );
}

function Short({ answer }: { answer: Answer }) {
  const best = answer.labels?.[0];
  if (!best) return summary(answer);
  return (
    <>
      {best.label} <span className="numbers soft">{percent(best.score, 0)}</span>
    </>
  );
}

function FilesButton({ folder, onFiles }: { folder: boolean; onFiles: (files: Found[]) => void }) {
  const input = useRef<HTMLInputElement>(null);
  return (
    <>
      <Button onClick={() => input.current?.click()}>
        <Icon name={folder ? "folder" : "upload"} />
        {folder ? "Choose a folder" : "Choose photos"}
      </Button>
      <input
        ref={input}
        type="file"
        hidden
        multiple
        {...(folder ? { webkitdirectory: "" } : { accept: "image/*" })}
        onChange={(event) => {
          const files = [...(event.target.files ?? [])];
          onFiles(files.map((file) => ({ path: file.webkitRelativePath || file.name, file })));
          event.target.value = "";
        }}
      />
    </>
  );
}

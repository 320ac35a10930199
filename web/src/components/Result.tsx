import { type ReactNode, useCallback, useMemo, useState } from "react";
import { summary } from "../api/answers";
import type { Client, ModelCard } from "../api/client";
import { viewOf } from "../lib/geometry";
import type { Photo } from "../lib/photo";
import { useAnswer } from "../lib/useAnswer";
import { SAMPLES } from "../samples";
import { Slider, Spinner } from "../ui/controls";
import { AnswerView } from "./Answer";
import { ErrorNote } from "./ErrorNote";
import { ModelFacts } from "./ModelPicker";
import { type Layers, Overlay } from "./Overlay";
import { Window } from "./Window";

interface Props {
  client: Client;
  card: ModelCard;
  photo: Photo;
  /** the choice of the model */
  picker: ReactNode;
  /** below the window */
  children?: ReactNode;
  /** below the answer */
  below?: ReactNode;
}

/** A photo as a model's window, and the model's answer. */
export function Result({ client, card, photo, picker, children, below }: Props) {
  const { value: answer, draft, error, left, retry } = useAnswer(client, card, photo);
  const view = useMemo(() => viewOf(card, photo.width, photo.height), [card, photo]);
  const layers = useLayers();
  const credit = SAMPLES.find(({ name }) => name === photo.sample)?.credit;

  return (
    <article className="result" aria-label={`${card.name}: ${photo.name}`}>
      <div className="stack">
        <Window photo={photo} view={view}>
          {answer && photo.bitmap && <Overlay answer={answer} photo={photo} view={view} layers={layers} />}
        </Window>
        <p className="soft small window-told">
          {photo.bitmap
            ? `${photo.name}, ${photo.width} × ${photo.height} pixels`
            : `${photo.name}: this browser cannot show it`}
          {credit ? `. Photo: ${credit}` : ""}
        </p>
        {children}
      </div>
      <div className="stack">
        <div className="panel stack answer">
          <div className="row answer-head">{picker}</div>
          {error ? (
            <ErrorNote error={error} client={client} onRetry={retry} left={left} />
          ) : answer ? (
            <>
              <AnswerView answer={answer} layers={layers} />
              {answer.segments?.length ? (
                <Slider
                  label="Colour"
                  min={0}
                  max={100}
                  step={5}
                  value={Math.round(100 * layers.strength)}
                  text={`${Math.round(100 * layers.strength)} %`}
                  onChange={(value) => layers.change({ strength: value / 100 })}
                />
              ) : null}
            </>
          ) : draft ? (
            <p className="caption" data-draft="">
              {draft}
              <span className="cursor" aria-hidden="true" />
            </p>
          ) : (
            <Spinner text={`${card.name} looks at the photo`} />
          )}
          <p className="unseen" role="status">
            {answer ? `${card.name}: ${summary(answer)}` : ""}
          </p>
          <ModelFacts card={card} />
        </div>
        {answer && below}
      </div>
    </article>
  );
}

function useLayers(): Layers {
  const [state, setState] = useState<Omit<Layers, "change">>({ hidden: new Set(), strength: 0.6, hover: null });
  const change = useCallback<Layers["change"]>((changes) => setState((before) => ({ ...before, ...changes })), []);
  return { ...state, change };
}

import { type Answer, percent, type Token } from "../api/answers";
import type { Layers } from "./Overlay";
import { cssOf } from "./Overlay";

/** The answer for an image, whatever the task. */
export function AnswerView({ answer, layers }: { answer: Answer; layers: Layers }) {
  if (answer.labels) return <Bars rows={answer.labels.map(({ label, score }) => ({ name: label, share: score }))} />;
  if (answer.caption != null) return <CaptionView answer={answer} />;
  if (answer.segments) return <Legend answer={answer} layers={layers} />;
  if (answer.boxes) return <BoxList answer={answer} />;
  if (answer.values) {
    return (
      <dl className="values">
        {answer.values.map(({ name, value }) => (
          <div key={name}>
            <dt>{name}</dt>
            <dd className="numbers">{Number(value.toPrecision(4))}</dd>
          </div>
        ))}
      </dl>
    );
  }
  if (answer.embedding) return <Embedding vector={answer.embedding} />;
  return <pre className="raw">{JSON.stringify(answer, null, 1)}</pre>;
}

/** Names with a bar each. */
export function Bars({ rows }: { rows: { name: string; share: number }[] }) {
  return (
    <ol className="bars">
      {rows.map(({ name, share }, i) => (
        <li key={name} data-first={i === 0 ? "" : undefined}>
          <span className="bars-name">{name}</span>
          <span className="bars-share numbers">{percent(share)}</span>
          <span className="bars-track" aria-hidden="true">
            <span style={{ width: `${100 * share}%` }} />
          </span>
        </li>
      ))}
    </ol>
  );
}

function CaptionView({ answer }: { answer: Answer }) {
  const [best, ...others] = answer.captions ?? [];
  return (
    <div className="stack">
      <p className="caption">
        {best?.tokens?.length
          ? // biome-ignore lint/suspicious/noArrayIndexKey: a word may come twice, and words do not move
            best.tokens.map((token, i) => <Word key={i} token={token} />)
          : answer.caption}
      </p>
      {best?.tokens?.length ? (
        <p className="soft small">The line below a word is as strong as the model was sure of it.</p>
      ) : null}
      {answer.match != null && <Match match={answer.match} sure={answer.sure} />}
      {answer.match == null && answer.sure === false && <NotSure />}
      {others.length > 0 && (
        <details>
          <summary>Other captions</summary>
          <ol className="others">
            {others.map(({ caption }) => (
              <li key={caption}>{caption}</li>
            ))}
          </ol>
        </details>
      )}
    </div>
  );
}

function Word({ token: { text, p } }: { token: Token }) {
  return (
    <>
      {text.startsWith(" ") ? " " : ""}
      <span className="word" title={`probability ${percent(p)}`} style={{ "--p": p }}>
        {text.trim()}
      </span>
    </>
  );
}

function NotSure() {
  return (
    <p className="note" data-kind="passing">
      The model is not sure that this caption fits the image.
    </p>
  );
}

function Match({ match, sure }: { match: number; sure: Answer["sure"] }) {
  return (
    <div className="stack">
      <p className="row small">
        <span>How well the caption matches the image (higher is better)</span>
        <strong className="numbers">{match.toFixed(2)}</strong>
      </p>
      {sure === false && <NotSure />}
    </div>
  );
}

/** The classes of a mask, each with its colour and a switch. */
function Legend({ answer, layers }: { answer: Answer; layers: Layers }) {
  const { hidden, hover, change } = layers;
  return (
    <ul className="legend" aria-label="Classes in the image">
      {answer.segments?.map(({ label, share }) => (
        <li key={label} data-hover={hover === label ? "" : undefined}>
          <label>
            <input
              type="checkbox"
              checked={!hidden.has(label)}
              onChange={() => {
                const next = new Set(hidden);
                if (!next.delete(label)) next.add(label);
                change({ hidden: next });
              }}
            />
            <i className="swatch" style={{ background: cssOf(label) }} aria-hidden="true" />
            <span>{label}</span>
            <span className="numbers soft">{percent(share)}</span>
          </label>
        </li>
      ))}
    </ul>
  );
}

function BoxList({ answer }: { answer: Answer }) {
  if (!answer.boxes?.length) return <p>Nothing was found in this image.</p>;
  return (
    <ul className="legend" aria-label="Objects in the image">
      {answer.boxes.map(({ label, score, box }) => (
        <li key={`${label} ${box.join(" ")}`}>
          <i className="swatch" style={{ background: cssOf(label) }} aria-hidden="true" />
          <span>{label}</span>
          <span className="numbers soft">{percent(score)}</span>
        </li>
      ))}
    </ul>
  );
}

function Embedding({ vector }: { vector: number[] }) {
  const most = Math.max(...vector.map(Math.abs)) || 1;
  return (
    <div className="stack">
      <p>A vector of {vector.length} numbers.</p>
      <div className="barcode" aria-hidden="true">
        {vector.slice(0, 256).map((value, i) => (
          <i
            // biome-ignore lint/suspicious/noArrayIndexKey: the numbers have no other name than their place
            key={i}
            style={{ opacity: 0.08 + (0.92 * Math.abs(value)) / most }}
            data-below={value < 0 ? "" : undefined}
          />
        ))}
      </div>
    </div>
  );
}

import "./explain.css";
import { useId, useMemo, useState } from "react";
import { Slider, Spinner } from "../ui/controls";
import { strongest } from "./arrays";
import { Beside } from "./Beside";
import { Distance, figure, Layers, Norms } from "./charts";
import type { ExplanationData, ExplanationProps, More } from "./data";
import { type Cells, Glass } from "./Glass";
import { KEY } from "./heat";
import { Lens, type Look } from "./lens";
import { Heads, Positions } from "./mosaics";
import { Outputs } from "./Outputs";
import { beside, cellsOf, coloursOf, together, type Unit, VIEWS, type View } from "./views";

export type { ExplanationData, ExplanationProps, More } from "./data";

/** What the model saw in an image: the views of its numbers. */
export function Explanation({ data: given, name, ask, classNames = null, view: named, onView }: ExplanationProps) {
  const { data, more, busy, error, again } = useMore(given, ask);
  const lens = useMemo(() => new Lens(data), [data]);
  const views = useMemo(() => VIEWS.filter((view) => view.there(lens)), [lens]);
  const [own, setOwn] = useState(named);
  const view = views.find(({ key }) => key === (named ?? own)) ?? views[0];
  const [look, setLook] = useState<Omit<Look, "view">>({
    layer: Math.max(0, lens.layers - 1),
    head: 0,
    output: -1,
    patch: null,
    pinned: false,
  });
  const change = (changes: Partial<Look>) => setLook((before) => ({ ...before, ...changes }));
  if (!view) return <Notes notes={data.notes} />;
  const choose = (key: string) => {
    setOwn(key);
    onView?.(key);
    change({ output: -1 });
  };
  return (
    <div className="lens">
      <Tabs views={views} view={view} onChoose={choose} />
      <p className="says">
        {view.says} <span className="soft small paper">{view.paper}</span>
      </p>
      <Stage
        lens={lens}
        view={view}
        look={{ ...look, view: view.key }}
        change={change}
        name={name}
        classNames={classNames}
        {...(ask && { again })}
        more={more}
      />
      {busy && <Spinner text="The model explains once more" />}
      {error && (
        <p className="wrong" role="alert">
          {error}
        </p>
      )}
      <Notes notes={data.notes} />
    </div>
  );
}

/** The explanation, and a way to ask for more of it. The newest request wins. */
function useMore(given: ExplanationData, ask: ExplanationProps["ask"]) {
  const [state, setState] = useState<{ given: ExplanationData; data: ExplanationData; more: More }>({
    given,
    data: given,
    more: {},
  });
  const [busy, setBusy] = useState(0);
  const [error, setError] = useState("");
  const { data, more } = state.given === given ? state : { data: given, more: {} };
  const again = async (changes: More): Promise<ExplanationData | null> => {
    if (!ask) return null;
    const wanted = { ...more, ...changes };
    setBusy((count) => count + 1);
    setError("");
    try {
      const data = await ask(wanted);
      setState({ given, data, more: wanted });
      return data;
    } catch (reason) {
      const { message, hint } = reason as Error & { hint?: string };
      setError([message, hint].filter(Boolean).join(": "));
      return null;
    } finally {
      setBusy((count) => count - 1);
    }
  };
  return { data, more, busy: busy > 0, error, again };
}

interface TabsProps {
  views: readonly View[];
  view: View;
  onChoose: (key: string) => void;
}

function Tabs({ views, view, onChoose }: TabsProps) {
  const group = useId();
  return (
    <div className="segmented views" role="radiogroup" aria-label="What to look at">
      {views.map(({ key, name }) => (
        <label key={key}>
          <input type="radio" name={group} value={key} checked={key === view.key} onChange={() => onChoose(key)} />
          <span>{name}</span>
        </label>
      ))}
    </div>
  );
}

interface StageProps {
  lens: Lens;
  view: View;
  look: Look;
  change: (changes: Partial<Look>) => void;
  name: string;
  classNames: readonly string[] | null;
  again?: (more: More) => Promise<ExplanationData | null>;
  more: More;
}

function Stage({ lens, view, look, change, name, classNames, again, more }: StageProps) {
  const id = useId();
  const { data } = lens;
  const { layer, head, output, patch } = look;
  const map = useMemo(
    () => view.map?.(lens, { view: view.key, layer, head, output, patch, pinned: false }) ?? null,
    [lens, view, layer, head, output, patch],
  );
  const shared = useMemo(
    () => (map && together(map, view.key === "similarity" ? beside(lens, patch ?? lens.first) : null)) ?? undefined,
    [lens, view, map, patch],
  );
  const cells: Cells | null = useMemo(
    () => (map ? cellsOf(lens, map, shared) : view.key === "colours" ? coloursOf(lens, "pca") : null),
    [lens, view, map, shared],
  );
  const between =
    view.key === "attention" ? lens.has("attention") : view.key !== "rollout" || lens.has("rollout_patches");
  const mark = !view.patch || !between ? null : (patch ?? (view.patch === "always" ? lens.first : null));
  const point = (next: number | null) => {
    if (!look.pinned && next !== patch) change({ patch: next });
  };
  const pin = (next: number | null) =>
    change(
      next === null || (look.pinned && next === patch) ? { patch: null, pinned: false } : { patch: next, pinned: true },
    );
  const grid = [lens.rows, lens.columns] as const;
  return (
    <div className="stage">
      <div className="panes">
        <Glass
          source={data.image}
          frame={data.frame}
          grid={grid}
          cells={cells}
          mark={mark}
          label={`${name}: ${view.name.toLowerCase()}`}
          told={id}
          start={lens.first}
          {...(view.patch && between && { onPoint: point, onChoose: pin })}
        />
        {map && shared && <Key map={map} shared={shared} unit={view.unit ?? "number"} />}
        <p id={id} className="told numbers" aria-live="polite">
          {map ? tell(lens, view, look, map, mark) : view.key === "colours" ? tellColours(lens, mark) : ""}
        </p>
      </div>
      <div className="controls stack">
        {view.outputs && (
          <Outputs
            lens={lens}
            kind={view.outputs}
            output={output}
            onChoose={(next) => change({ output: next })}
            classNames={classNames}
            {...(again && {
              onClass: async (chosen: string) => {
                const found = await again({ class: chosen });
                if (found) change({ output: found.outputs?.indexOf(chosen) ?? -1 });
              },
            })}
          />
        )}
        <Sliders lens={lens} view={view} look={look} change={change} />
        {view.key === "attention" && <Heads lens={lens} look={look} onChoose={(chosen) => change({ head: chosen })} />}
        {view.key === "distance" && (
          <Distance lens={lens} layer={layer} head={head} onChoose={(layer, head) => change({ layer, head })} />
        )}
        {view.key === "norms" && <Norms lens={lens} layer={layer} />}
        {view.key === "layers" && <Layers lens={lens} />}
        {view.key === "positions" && <Positions lens={lens} patch={mark ?? lens.first} onChoose={pin} />}
        {(view.key === "similarity" || view.key === "colours") && (
          <Beside
            lens={lens}
            shared={view.key === "colours" ? null : (shared ?? null)}
            patch={mark ?? lens.first}
            {...(again && { onPhoto: (beside: Blob) => again({ beside }) })}
            there={Boolean(more.beside)}
          />
        )}
        {look.pinned && mark !== null && (
          <p className="small soft">
            {`The patch at ${lens.place(mark)} stays chosen. Choose it again, or press Escape, to let it go.`}
          </p>
        )}
      </div>
    </div>
  );
}

interface SlidersProps {
  lens: Lens;
  view: View;
  look: Look;
  change: (changes: Partial<Look>) => void;
}

function Sliders({ lens, view, look, change }: SlidersProps) {
  // Between patches only some layers of a large model were sent.
  const layers =
    view.key === "attention" && lens.kept.length ? lens.kept : Array.from({ length: lens.layers }, (_, i) => i);
  const place = Math.max(0, layers.indexOf(view.key === "attention" ? lens.nearest(look.layer) : look.layer));
  const count = layers.length === lens.layers ? "" : `, of ${layers.length} that were sent`;
  return (
    <>
      {view.layer && layers.length > 1 && (
        <Slider
          label="Layer"
          min={0}
          max={layers.length - 1}
          value={place}
          text={`${(layers[place] as number) + 1} of ${lens.layers}${count}`}
          onChange={(next) => change({ layer: layers[next] as number })}
        />
      )}
      {view.head && lens.heads > 1 && (
        <Slider
          label="Head"
          min={0}
          max={lens.heads}
          value={look.head}
          text={look.head ? `${look.head} of ${lens.heads}` : `mean of ${lens.heads}`}
          onChange={(head) => change({ head })}
        />
      )}
    </>
  );
}

/** A value for people. Of relevance only the ratio to the mean means something. */
function told(value: number, unit: Unit, map: Float32Array): string {
  if (unit === "share") return `${(100 * value).toFixed(1)} %`;
  if (unit === "number") return figure(value);
  const mean = map.reduce((sum, each) => sum + each / map.length, 0);
  return mean ? `${figure(value / mean)} × the mean` : "0";
}

/** The map in words. */
function tell(lens: Lens, view: View, look: Look, map: Float32Array, mark: number | null): string {
  // A patch is the most similar to itself.
  const itself = view.patch === "always" && mark !== null;
  const best = strongest(map, itself ? (map.length === lens.patches ? mark : lens.cellOf(mark)) : -1);
  const [, across] = map.length === lens.patches ? [0, lens.columns] : lens.blocks([lens.rows, lens.columns]);
  const block = map.length === lens.patches ? 1 : lens.block;
  const where = `row ${Math.floor(best / across) * block + 1}, column ${(best % across) * block + 1}`;
  const from = mark === null ? "" : `Patch at ${lens.place(mark)}. `;
  const mean =
    view.key === "attention" && mark !== null && look.head && lens.arrays.get("attention").shape[1] === 1
      ? " Between patches this model's heads were sent as their mean."
      : "";
  return `${from}${itself ? "Most similar to it" : "Strongest"}: ${where} (${told(map[best] as number, view.unit ?? "number", map)}).${mean}`;
}

function tellColours(lens: Lens, mark: number | null): string {
  const shares = (lens.data.pca_shares ?? []).map((share) => `${(100 * share).toFixed(0)} %`);
  const told = `Red, green and blue hold ${shares.join(", ")} of how the patches differ.`;
  if (mark === null) return told;
  const colours = [...lens.arrays.get("pca").slice(3 * mark, 3)].map((value) => `${(100 * value).toFixed(0)} %`);
  return `Patch at ${lens.place(mark)}: red ${colours[0]}, green ${colours[1]}, blue ${colours[2]}. ${told}`;
}

function Key({ map, shared: [low, high], unit }: { map: Float32Array; shared: [number, number]; unit: Unit }) {
  return (
    <div className="key small numbers" aria-hidden="true">
      <span>{told(low, unit, map)}</span>
      <i style={{ background: KEY }} />
      <span>{told(high, unit, map)}</span>
    </div>
  );
}

function Notes({ notes }: { notes: readonly string[] }) {
  return notes.length ? (
    <ul className="notes small soft">
      {notes.map((note) => (
        <li key={note}>{note}</li>
      ))}
    </ul>
  ) : null;
}

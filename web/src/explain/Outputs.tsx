import type { Lens } from "./lens";

interface Props {
  lens: Lens;
  kind: "outputs" | "pieces";
  output: number;
  onChoose: (output: number) => void;
  classNames: readonly string[] | null;
  /** ask for the relevance of a class that the answer does not hold */
  onClass?: (name: string) => void;
}

/** What the answer consists of: classes to choose from, or the words of a caption. */
export function Outputs({ lens, kind, output, onChoose, classNames, onClass }: Props) {
  const { data } = lens;
  const pieces = data.pieces ?? [];
  const names = kind === "pieces" ? pieces.map(({ text }) => text) : (data.outputs ?? []);
  const others = (classNames ?? []).filter((name) => !names.includes(name));
  const words = pieces.length > 0;
  return (
    <fieldset className="stack outputs">
      <legend>{words ? "Choose a word" : "Choose what is explained"}</legend>
      <div className={words ? "chips words" : "chips"}>
        <button type="button" aria-pressed={output < 0} onClick={() => onChoose(-1)}>
          {words ? "all words" : "the answer"}
        </button>
        {names.map((name, i) => (
          <button
            // biome-ignore lint/suspicious/noArrayIndexKey: a caption may hold a word twice
            key={i}
            type="button"
            dir="auto"
            aria-pressed={output === i}
            onClick={() => onChoose(i)}
          >
            {name.trim() || "␣"}
          </button>
        ))}
      </div>
      {kind === "outputs" && onClass && others.length > 0 && (
        <label className="field">
          Another class
          <select value="" onChange={(event) => onClass(event.target.value)}>
            <option value="" disabled>
              choose one of {others.length}
            </option>
            {others.map((name) => (
              <option key={name}>{name}</option>
            ))}
          </select>
        </label>
      )}
    </fieldset>
  );
}

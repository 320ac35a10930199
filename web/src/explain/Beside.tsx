import { type DragEvent, useId, useMemo, useState } from "react";
import { FileButton } from "../components/Sources";
import { SAMPLES, sampleFile } from "../samples";
import { strongest } from "./arrays";
import { Glass } from "./Glass";
import { heat } from "./heat";
import type { Lens } from "./lens";
import { beside, coloursOf } from "./views";

interface Props {
  lens: Lens;
  /** the range of similarity that both photos share; null: principal components are shown */
  shared: [number, number] | null;
  patch: number;
  onPhoto?: (photo: Blob) => void;
  there: boolean;
}

/** A second photo, whose patches are compared with those of the first. */
export function Beside({ lens, shared, patch, onPhoto, there }: Props) {
  const { data } = lens;
  const told = useId();
  const [over, setOver] = useState(false);
  const grid = (data.grid_beside ?? [0, 0]) as [number, number];
  const shown = data.image_beside && data.frame_beside ? { image: data.image_beside, frame: data.frame_beside } : null;
  const map = useMemo(() => (shared ? beside(lens, patch) : null), [lens, shared, patch]);
  const cells = useMemo(() => {
    if (!lens.has("pca_beside")) return null;
    return map && shared ? { pixels: heat(map, shared), block: lens.block } : coloursOf(lens, "pca_beside");
  }, [lens, map, shared]);
  const drop = (event: DragEvent) => {
    const file = event.dataTransfer.files[0];
    if (!file) return;
    event.preventDefault();
    event.stopPropagation();
    setOver(false);
    // The page's own hint counts what enters and leaves.
    document.dispatchEvent(new DragEvent("dragleave", { dataTransfer: event.nativeEvent.dataTransfer }));
    onPhoto?.(file);
  };
  const best = map && strongest(map);
  const across = lens.blocks(grid)[1];
  return (
    <section className="stack beside" aria-label="A second photo">
      <h2>{shown ? "The second photo" : "Compare with a second photo"}</h2>
      {shown && (
        <>
          <Glass
            source={shown.image}
            frame={shown.frame}
            grid={grid}
            cells={cells}
            mark={null}
            label={shared ? "The second photo: similarity with the chosen patch" : "The second photo in colours"}
            told={told}
          />
          <p id={told} className="told numbers">
            {map && best !== null
              ? `Most similar there: row ${Math.floor(best / across) * lens.block + 1}, column ${(best % across) * lens.block + 1} (${(map[best] as number).toFixed(2)}).`
              : "The colours are of both photos together."}
          </p>
        </>
      )}
      {onPhoto && (
        // biome-ignore lint/a11y/noStaticElementInteractions: the button and the samples do the same
        <div
          className="drop"
          data-over={over ? "" : undefined}
          data-live=""
          onDragOver={(event) => {
            event.preventDefault();
            setOver(true);
          }}
          onDragLeave={() => setOver(false)}
          onDrop={drop}
        >
          <FileButton main={false} onFile={onPhoto} />
          <ul className="samples" aria-label="Sample photos for the second">
            {SAMPLES.map(({ name, url }) => (
              <li key={name}>
                <button type="button" title={name} onClick={async () => onPhoto(await sampleFile(url))}>
                  <img src={url} alt={`compare with the sample photo: ${name}`} width="44" height="44" />
                </button>
              </li>
            ))}
          </ul>
          <p className="small soft">{there ? "Drop another one here to change it." : "Or drop one here."}</p>
        </div>
      )}
    </section>
  );
}

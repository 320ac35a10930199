import { type MouseEvent, useEffect, useMemo, useRef } from "react";
import { Tile } from "./Glass";
import { heat, small } from "./heat";
import type { Lens, Look } from "./lens";
import { cellsOf } from "./views";

interface HeadsProps {
  lens: Lens;
  look: Look;
  onChoose: (head: number) => void;
}

/** All heads of a layer side by side. */
export function Heads({ lens, look: { layer, head, patch }, onChoose }: HeadsProps) {
  const from = patch !== null && lens.has("attention") ? patch : null;
  const heads = from === null ? lens.heads : (lens.arrays.get("attention").shape[1] as number);
  const tiles = useMemo(
    () => Array.from({ length: heads }, (_, i) => cellsOf(lens, lens.attention(layer, heads === 1 ? 0 : i + 1, from))),
    [lens, layer, from, heads],
  );
  if (lens.heads < 2 || heads < 2) return null;
  const distance = lens.arrays.get("distance");
  const far = (i: number) => Math.round(distance.slice(layer * lens.heads + i, 1)[0] as number);
  return (
    <div className="stack">
      <h2>Each head of this layer</h2>
      <div className="mosaic">
        {tiles.map((cells, i) => (
          <button
            // biome-ignore lint/suspicious/noArrayIndexKey: heads have no other name
            key={i}
            type="button"
            aria-pressed={head === i + 1}
            aria-label={`head ${i + 1}, looks ${far(i)} pixels far on average`}
            title={`head ${i + 1}: ${far(i)} pixels far on average`}
            onClick={() => onChoose(head === i + 1 ? 0 : i + 1)}
          >
            <Tile cells={cells} rows={lens.rows} columns={lens.columns} />
            <span aria-hidden="true">{i + 1}</span>
          </button>
        ))}
      </div>
    </div>
  );
}

interface PositionsProps {
  lens: Lens;
  patch: number;
  onChoose: (patch: number) => void;
}

/** The similarity of each position with all others: each small map lies at its patch's place. */
export function Positions({ lens, patch, onChoose }: PositionsProps) {
  const canvas = useRef<HTMLCanvasElement>(null);
  const { rows, columns, patches } = lens;
  useEffect(() => {
    const pen = canvas.current?.getContext("2d");
    if (!pen) return;
    pen.fillStyle = "#fff";
    pen.fillRect(0, 0, columns * (columns + 1), rows * (rows + 1));
    for (let i = 0; i < patches; i++) {
      const map = lens.arrays.get("positions").map(i, patches);
      pen.drawImage(
        small(heat(map), columns, rows),
        (i % columns) * (columns + 1),
        Math.floor(i / columns) * (rows + 1),
      );
    }
  }, [lens, rows, columns, patches]);
  const choose = (event: MouseEvent<HTMLCanvasElement>) => {
    const box = event.currentTarget.getBoundingClientRect();
    const row = Math.min(rows - 1, Math.floor(((event.clientY - box.top) / box.height) * rows));
    const column = Math.min(columns - 1, Math.floor(((event.clientX - box.left) / box.width) * columns));
    onChoose(row * columns + column);
  };
  return (
    <div className="stack">
      <h2>All positions</h2>
      <div className="positions" style={{ aspectRatio: `${columns * (columns + 1)} / ${rows * (rows + 1)}` }}>
        <canvas
          ref={canvas}
          width={columns * (columns + 1)}
          height={rows * (rows + 1)}
          role="img"
          aria-label={`A map for each of ${patches} positions, laid out as the patches are. The chosen one is at ${lens.place(patch)}.`}
          onClick={choose}
        />
        <i
          aria-hidden="true"
          style={{
            left: `${(100 * (patch % columns)) / columns}%`,
            top: `${(100 * Math.floor(patch / columns)) / rows}%`,
            width: `${100 / columns}%`,
            height: `${100 / rows}%`,
          }}
        />
      </div>
    </div>
  );
}

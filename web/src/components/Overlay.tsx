import { type PointerEvent, useEffect, useMemo, useRef } from "react";
import { type Answer, percent, type Segment } from "../api/answers";
import type { View } from "../lib/geometry";
import { wholeOf } from "../lib/glass";
import type { Photo } from "../lib/photo";
import { classColour, mark } from "../lib/rle";

/** What a person chose to see of masks. */
export interface Layers {
  hidden: ReadonlySet<string>;
  strength: number;
  /** the class below the pointer */
  hover: string | null;
  change: (changes: Partial<Omit<Layers, "change">>) => void;
}

const numbers = new Map<string, number>();

/** The colour of a class, the same for all images and models of this page. */
export function colourOf(label: string): readonly [number, number, number] {
  if (!numbers.has(label)) numbers.set(label, numbers.size);
  return classColour(numbers.get(label) as number);
}

export const cssOf = (label: string) => `rgb(${colourOf(label).join(" ")})`;

interface Props {
  answer: Answer;
  photo: Photo;
  view: View;
  layers: Layers;
}

/** Masks and boxes over the window. */
export function Overlay({ answer, photo, view, layers }: Props) {
  const [x1, y1, x2, y2] = wholeOf(view, photo);
  const left = (x: number) => `${(100 * (x - x1)) / (x2 - x1)}%`;
  const top = (y: number) => `${(100 * (y - y1)) / (y2 - y1)}%`;
  const place = {
    left: left(0),
    top: top(0),
    width: `${(100 * photo.width) / (x2 - x1)}%`,
    height: `${(100 * photo.height) / (y2 - y1)}%`,
  };
  return (
    <>
      {answer.segments?.length ? <Masks segments={answer.segments} layers={layers} place={place} /> : null}
      {answer.boxes?.map(({ label, score, box }) => (
        <div
          key={`${label} ${box.join(" ")}`}
          className="box"
          aria-hidden="true"
          style={{
            left: left(box[0]),
            top: top(box[1]),
            width: `${(100 * (box[2] - box[0])) / (x2 - x1)}%`,
            height: `${(100 * (box[3] - box[1])) / (y2 - y1)}%`,
            borderColor: cssOf(label),
          }}
        >
          <span>
            <i className="swatch" style={{ background: cssOf(label) }} />
            {label} {percent(score, 0)}
          </span>
        </div>
      ))}
    </>
  );
}

interface MasksProps {
  segments: Segment[];
  layers: Layers;
  place: { left: string; top: string; width: string; height: string };
}

/** The classes as coloured glass, with lead where they meet. */
function Masks({ segments, layers, place }: MasksProps) {
  const canvas = useRef<HTMLCanvasElement>(null);
  const { hidden, strength, hover, change } = layers;
  const [height, width] = (segments[0] as Segment).rle.size as [number, number];
  const places = useMemo(() => {
    const found = new Uint8Array(height * width);
    segments.forEach(({ rle }, i) => {
      mark(rle, i + 1, found);
    });
    return found;
  }, [segments, height, width]);

  useEffect(() => {
    const element = canvas.current as HTMLCanvasElement;
    element.width = width;
    element.height = height;
    const context = element.getContext("2d") as CanvasRenderingContext2D;
    const pixels = context.createImageData(width, height);
    const colours = segments.map(({ label }) => colourOf(label));
    const shown = segments.map(({ label }) => !hidden.has(label));
    const weight = segments.map(({ label }) => 255 * (hover && hover !== label ? strength * 0.45 : strength));
    for (let i = 0; i < places.length; i++) {
      const number = (places[i] as number) - 1;
      const right = (i + 1) % width ? (places[i + 1] as number) - 1 : number;
      const below = i + width < places.length ? (places[i + width] as number) - 1 : number;
      const at = 4 * i;
      if ((right !== number || below !== number) && (shown[number] || shown[right] || shown[below])) {
        pixels.data.set([11, 9, 16, 235], at);
      } else if (shown[number]) {
        pixels.data.set([...(colours[number] as readonly [number, number, number]), weight[number] as number], at);
      }
    }
    context.putImageData(pixels, 0, 0);
  }, [segments, places, width, height, hidden, strength, hover]);

  const follow = (event: PointerEvent<HTMLCanvasElement>) => {
    const box = event.currentTarget.getBoundingClientRect();
    const x = Math.floor(((event.clientX - box.left) / box.width) * width);
    const y = Math.floor(((event.clientY - box.top) / box.height) * height);
    const label = segments[(places[y * width + x] ?? 0) - 1]?.label ?? null;
    if (label !== hover) change({ hover: label });
  };

  return (
    <canvas
      ref={canvas}
      className="masks"
      style={place}
      role="img"
      aria-label={`Where the model sees ${segments.map(({ label }) => label).join(", ")}`}
      onPointerMove={follow}
      onPointerDown={follow}
      onPointerLeave={() => change({ hover: null })}
    />
  );
}

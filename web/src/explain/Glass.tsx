import { type KeyboardEvent, type PointerEvent, useEffect, useMemo, useRef, useState } from "react";
import { pale, small } from "./heat";

/** One pixel per cell of a map, of cells that are `block` patches wide and high. */
export interface Cells {
  pixels: Uint8ClampedArray<ArrayBuffer>;
  block: number;
}

interface Props {
  /** a data URL */
  source: string;
  /** where the model's input lies in the image: left, top, right, bottom, as shares of its size */
  frame: readonly number[];
  grid: readonly [rows: number, columns: number];
  cells: Cells | null;
  mark: number | null;
  label: string;
  /** the id of the text that tells what is seen */
  told: string;
  /** the patch below the pointer, or null beside it */
  onPoint?: (patch: number | null) => void;
  onChoose?: (patch: number | null) => void;
  /** where the arrow keys begin */
  start?: number;
}

const SIDE = 900;

/** An image, pale, under the panes of a map. A patch is chosen by the pointer, a tap, or the arrow keys. */
export function Glass({ source, frame, grid, cells, mark, label, told, onPoint, onChoose, start = 0 }: Props) {
  const canvas = useRef<HTMLCanvasElement>(null);
  const photo = usePhotoOf(source);
  const [rows, columns] = grid;

  useEffect(() => {
    if (photo && canvas.current) draw(canvas.current, photo, frame, [rows, columns], cells, mark);
  }, [photo, frame, rows, columns, cells, mark]);

  const patchAt = (event: { clientX: number; clientY: number; currentTarget: HTMLElement }): number | null => {
    const box = event.currentTarget.getBoundingClientRect();
    const [left, top, right, bottom] = frame as [number, number, number, number];
    const x = ((event.clientX - box.left) / box.width - left) / (right - left);
    const y = ((event.clientY - box.top) / box.height - top) / (bottom - top);
    return x < 0 || x >= 1 || y < 0 || y >= 1 ? null : Math.floor(y * rows) * columns + Math.floor(x * columns);
  };
  const point = (event: PointerEvent<HTMLCanvasElement>) => {
    if (event.pointerType !== "touch") onPoint?.(patchAt(event));
  };
  const press = (event: KeyboardEvent) => {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (event.key === "Escape") return onChoose?.(null);
    if (!step) return;
    event.preventDefault();
    const from = mark ?? start;
    const row = Math.floor(from / columns) + (mark === null ? 0 : (step[0] as number));
    const column = (from % columns) + (mark === null ? 0 : (step[1] as number));
    if (row >= 0 && row < rows && column >= 0 && column < columns) onChoose?.(row * columns + column);
  };
  if (!onChoose)
    return <canvas ref={canvas} className="glass-map" role="img" aria-label={label} aria-describedby={told} />;
  return (
    // biome-ignore lint/a11y/noInteractiveElementToNoninteractiveRole: the arrow keys move over its patches
    <canvas
      ref={canvas}
      className="glass-map chosen"
      tabIndex={0}
      role="application"
      aria-roledescription="image cut into patches"
      aria-label={label}
      aria-describedby={told}
      onPointerMove={point}
      onPointerLeave={() => onPoint?.(null)}
      onClick={(event) => onChoose(patchAt(event))}
      onKeyDown={press}
    />
  );
}

interface Photo {
  image: HTMLImageElement;
  ground: OffscreenCanvas;
  scale: number;
}

function usePhotoOf(source: string): Photo | null {
  const [photo, setPhoto] = useState<Photo | null>(null);
  useEffect(() => {
    let left = false;
    const image = new Image();
    image.onload = () => {
      if (left) return;
      const scale = Math.max(1, Math.ceil(SIDE / Math.max(image.width, image.height)));
      setPhoto({ image, ground: pale(image, image.width, image.height), scale });
    };
    image.src = source;
    return () => {
      left = true;
    };
  }, [source]);
  return photo;
}

function draw(
  canvas: HTMLCanvasElement,
  { image, ground, scale }: Photo,
  frame: readonly number[],
  [rows, columns]: readonly [number, number],
  cells: Cells | null,
  mark: number | null,
): void {
  const [width, height] = [image.width * scale, image.height * scale];
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  const pen = canvas.getContext("2d") as CanvasRenderingContext2D;
  const [left, top, right, bottom] = [0, 1, 2, 3].map((i) => (frame[i] as number) * (i % 2 ? height : width)) as [
    number,
    number,
    number,
    number,
  ];
  const [wide, high] = [(right - left) / columns, (bottom - top) / rows];
  pen.imageSmoothingEnabled = image.width >= 200;
  pen.drawImage(ground, 0, 0, width, height);
  if (!rows || !columns) return;
  if (cells) {
    const [down, across] = [Math.ceil(rows / cells.block), Math.ceil(columns / cells.block)];
    pen.imageSmoothingEnabled = false;
    // Blocks at the edge may reach beyond the image.
    pen.drawImage(small(cells.pixels, across, down), left, top, wide * across * cells.block, high * down * cells.block);
  }
  // What the model does not see is paler still.
  pen.fillStyle = "rgb(255 255 255 / .62)";
  pen.beginPath();
  pen.rect(0, 0, width, height);
  pen.rect(left, top, right - left, bottom - top);
  pen.fill("evenodd");
  pen.strokeStyle = "rgb(20 12 30 / .34)";
  pen.lineWidth = Math.max(1, Math.min(width / 900, wide / 8));
  pen.beginPath();
  for (let i = 0; i <= columns; i++) {
    pen.moveTo(left + i * wide, top);
    pen.lineTo(left + i * wide, bottom);
  }
  for (let i = 0; i <= rows; i++) {
    pen.moveTo(left, top + i * high);
    pen.lineTo(right, top + i * high);
  }
  pen.stroke();
  if (mark === null) return;
  for (const [colour, line] of [
    ["#fff", 8],
    ["#1d2f9e", 4],
  ] as const) {
    pen.strokeStyle = colour;
    pen.lineWidth = (line * Math.max(width, height)) / SIDE;
    pen.strokeRect(left + (mark % columns) * wide, top + Math.floor(mark / columns) * high, wide, high);
  }
}

/** A small map, whose cells are single pixels that the browser enlarges. */
export function Tile({ cells, rows, columns }: { cells: Cells; rows: number; columns: number }) {
  const canvas = useRef<HTMLCanvasElement>(null);
  const [down, across] = useMemo(
    () => [Math.ceil(rows / cells.block), Math.ceil(columns / cells.block)],
    [rows, columns, cells.block],
  );
  useEffect(() => {
    const pen = canvas.current?.getContext("2d");
    if (!pen) return;
    pen.fillStyle = "#fff";
    pen.fillRect(0, 0, across, down);
    pen.drawImage(small(cells.pixels, across, down), 0, 0);
  }, [cells, across, down]);
  return <canvas ref={canvas} width={across} height={down} className="tile" />;
}

import type { ReactNode } from "react";
import { useEffect, useMemo, useRef, useState } from "react";
import type { View } from "../lib/geometry";
import { assemble, drawGlass, frameOf } from "../lib/glass";
import type { Photo } from "../lib/photo";

const still = () => window.matchMedia("(prefers-reduced-motion: reduce)").matches;

interface Props {
  photo: Photo;
  view: View;
  /** what is drawn over the whole window */
  children?: ReactNode;
}

/** The photo as a stained-glass window, whose panes are the patches of the model. */
export function Window({ photo, view, children }: Props) {
  const box = useRef<HTMLDivElement>(null);
  const canvas = useRef<HTMLCanvasElement>(null);
  const light = useRef<HTMLCanvasElement>(null);
  const drawn = useRef("");
  const [width, setWidth] = useState(0);
  const key = `${photo.id} ${view.region.join(" ")} ${view.rows} ${view.columns}`;
  // biome-ignore lint/correctness/useExhaustiveDependencies: the key stands for the view, which is made anew each time
  const frame = useMemo(
    () => frameOf(view, photo, width || 480, Math.min(window.devicePixelRatio || 1, 2)),
    [key, width],
  );

  useEffect(() => {
    const element = box.current as HTMLDivElement;
    const observer = new ResizeObserver(() => setWidth(Math.round(element.clientWidth)));
    observer.observe(element);
    return () => observer.disconnect();
  }, []);

  // biome-ignore lint/correctness/useExhaustiveDependencies: as above
  useEffect(() => {
    const [shown, glow] = [canvas.current, light.current];
    if (!width || !shown || !glow) return;
    const finished = document.createElement("canvas");
    drawGlass(finished, photo, view, frame);
    shown.width = frame.width;
    shown.height = frame.height;
    glow.width = 32;
    glow.height = Math.max(1, Math.round((32 * frame.height) / frame.width));
    glow.getContext("2d")?.drawImage(finished, 0, 0, glow.width, glow.height);
    const again = drawn.current === key; // only the size has changed
    drawn.current = key;
    if (again || still()) {
      shown.getContext("2d")?.drawImage(finished, 0, 0);
      return;
    }
    return assemble(shown, finished, view, frame);
  }, [key, frame]);

  return (
    <div className="window" style={{ "--ratio": frame.width / frame.height }}>
      <div className="window-light" aria-hidden="true">
        <canvas ref={light} />
      </div>
      <div className="window-frame" ref={box}>
        <canvas
          ref={canvas}
          role="img"
          aria-label={`${photo.name}, cut into ${view.rows} by ${view.columns} patches`}
        />
        {children}
      </div>
    </div>
  );
}

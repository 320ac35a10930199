import { useEffect, useRef, useState } from "react";
import { dropped, type Found, imageOf } from "./photo";

/** Files that are dropped anywhere on the page, or pasted. Returns whether something is held over the page. */
export function useDrop(onFiles: (files: Found[]) => void): boolean {
  const [over, setOver] = useState(false);
  const call = useRef(onFiles);
  call.current = onFiles;

  useEffect(() => {
    let depth = 0;
    const holds = (event: DragEvent) => event.dataTransfer?.types.includes("Files") ?? false;
    const move = (by: number) => (event: DragEvent) => {
      if (!holds(event)) return;
      event.preventDefault();
      depth = Math.max(0, depth + by);
      setOver(depth > 0);
    };
    const drop = (event: DragEvent) => {
      if (!holds(event) || !event.dataTransfer) return;
      event.preventDefault();
      depth = 0;
      setOver(false);
      dropped(event.dataTransfer).then((files) => files.length && call.current(files));
    };
    const paste = (event: ClipboardEvent) => {
      const file = imageOf(event.clipboardData);
      if (file) call.current([{ path: file.name || "pasted image", file }]);
    };
    const [enter, leave, stay] = [move(1), move(-1), move(0)];
    const control = new AbortController();
    const { signal } = control;
    document.addEventListener("dragenter", enter, { signal });
    document.addEventListener("dragleave", leave, { signal });
    document.addEventListener("dragover", stay, { signal });
    document.addEventListener("drop", drop, { signal });
    document.addEventListener("paste", paste, { signal });
    return () => control.abort();
  }, []);
  return over;
}

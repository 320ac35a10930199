import { useCallback, useEffect, useRef, useState } from "react";
import { SAMPLES, sampleFile } from "../samples";
import { type Photo, readPhoto, release } from "./photo";

/** A photo that a person gave, or a sample. A sample is named in the address; a person's photo never is. */
export function usePhoto(sample: string | undefined, onSample: (name: string | undefined) => void) {
  const [photo, setPhoto] = useState<Photo | null>(null);
  const order = useRef(0);

  /** The newest request wins, whichever is read first. */
  const put = useCallback(async (reading: Promise<Photo>) => {
    const number = ++order.current;
    const found = await reading;
    if (number !== order.current) return release(found);
    setPhoto((before) => {
      // Its window may still be drawn in this turn.
      if (before) setTimeout(() => release(before), 2000);
      return found;
    });
  }, []);

  useEffect(() => {
    const chosen = SAMPLES.find(({ name }) => name === sample);
    if (chosen) put(readSample(chosen.url, chosen.name));
  }, [sample, put]);

  const give = useCallback(
    (blob: Blob, name: string) => {
      onSample(undefined);
      put(readPhoto(blob, name));
    },
    [onSample, put],
  );
  return [photo, give] as const;
}

async function readSample(url: string, name: string): Promise<Photo> {
  return readPhoto(await sampleFile(url), name, name);
}

import { useRef, useState } from "react";
import type { Photo } from "../lib/photo";
import { SAMPLES } from "../samples";
import { Button } from "../ui/controls";
import { Icon } from "./icons";
import { Webcam } from "./Webcam";

interface Props {
  photo: Photo | null;
  onFile: (file: Blob, name: string) => void;
  onSample: (name: string) => void;
  main?: boolean;
}

/** Where a photo comes from: a file, the camera, or the samples. */
export function Sources({ photo, onFile, onSample, main = false }: Props) {
  const [camera, setCamera] = useState(false);
  return (
    <div className="sources">
      <div className="row">
        <FileButton main={main} onFile={onFile} />
        <Button onClick={() => setCamera(true)}>
          <Icon name="camera" />
          Camera
        </Button>
      </div>
      <ul className="samples" aria-label="Sample photos">
        {SAMPLES.map(({ name, url }) => (
          <li key={name}>
            <button type="button" aria-pressed={photo?.sample === name} onClick={() => onSample(name)} title={name}>
              <img src={url} alt={`sample photo: ${name}`} width="56" height="56" />
            </button>
          </li>
        ))}
      </ul>
      {camera && (
        <Webcam
          onClose={() => setCamera(false)}
          onPhoto={(blob) => {
            setCamera(false);
            onFile(blob, "photo from the camera");
          }}
        />
      )}
    </div>
  );
}

/** A button that opens the browser's choice of files. */
export function FileButton({ main, onFile }: { main: boolean; onFile: Props["onFile"] }) {
  const input = useRef<HTMLInputElement>(null);
  return (
    <>
      <Button kind={main ? "main" : "plain"} onClick={() => input.current?.click()}>
        <Icon name="upload" />
        Choose a photo
      </Button>
      <input
        ref={input}
        type="file"
        accept="image/*"
        hidden
        onChange={(event) => {
          const file = event.target.files?.[0];
          if (file) onFile(file, file.name);
          event.target.value = "";
        }}
      />
    </>
  );
}

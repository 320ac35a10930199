import { useEffect, useRef, useState } from "react";
import { Button } from "../ui/controls";

interface Props {
  onPhoto: (photo: Blob) => void;
  onClose: () => void;
}

/** A photo from the camera. */
export function Webcam({ onPhoto, onClose }: Props) {
  const dialog = useRef<HTMLDialogElement>(null);
  const video = useRef<HTMLVideoElement>(null);
  const [ready, setReady] = useState(false);
  const [problem, setProblem] = useState("");

  useEffect(() => {
    dialog.current?.showModal();
    let [stream, gone] = [null as MediaStream | null, false];
    const stop = () => {
      for (const track of stream?.getTracks() ?? []) track.stop();
    };
    const start = async () => {
      if (!navigator.mediaDevices) throw new DOMException("", "SecurityError");
      stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
      if (gone) return stop();
      const element = video.current as HTMLVideoElement;
      element.srcObject = stream;
      await element.play();
      setReady(true);
    };
    start().catch((error: DOMException) => {
      if (!gone) setProblem(PROBLEMS[error.name] ?? "The camera could not be started.");
    });
    return () => {
      gone = true;
      stop();
    };
  }, []);

  const take = () => {
    const element = video.current as HTMLVideoElement;
    const canvas = document.createElement("canvas");
    canvas.width = element.videoWidth;
    canvas.height = element.videoHeight;
    canvas.getContext("2d")?.drawImage(element, 0, 0);
    canvas.toBlob((blob) => blob && onPhoto(blob), "image/jpeg", 0.92);
  };

  return (
    <dialog ref={dialog} className="dialog stack" aria-labelledby="webcam" onClose={onClose}>
      <h2 id="webcam">A photo from the camera</h2>
      {problem ? (
        <p role="alert">{problem}</p>
      ) : (
        <video ref={video} playsInline muted aria-label="What the camera sees" />
      )}
      <div className="row">
        {!problem && (
          <Button kind="main" disabled={!ready} onClick={take}>
            Take the photo
          </Button>
        )}
        <Button onClick={() => dialog.current?.close()}>{problem ? "Close" : "Cancel"}</Button>
      </div>
    </dialog>
  );
}

const PROBLEMS: Record<string, string> = {
  NotAllowedError: "The browser did not allow the camera. Allow it for this page, and open this again.",
  NotFoundError: "This device has no camera.",
  NotReadableError: "Another program uses the camera. Close that, and open this again.",
  SecurityError: "The browser gives a page the camera only over https, or on this machine.",
};

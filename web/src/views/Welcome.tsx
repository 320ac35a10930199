import { Rose } from "../components/Rose";
import { Sources } from "../components/Sources";

interface Props {
  onFile: (file: Blob, name: string) => void;
  onSample: (name: string) => void;
}

/** What the page shows before there is a photo. */
export function Welcome({ onFile, onSample }: Props) {
  return (
    <div className="welcome">
      <div className="welcome-rose">
        <Rose className="rose-large" />
      </div>
      <div className="stack">
        <h1>See what a Vision Transformer sees</h1>
        <p className="lead">
          It cuts an image into patches, like a window into panes of glass, and lets each of them look at all others.
          Give it a photo, read its answer, then look inside.
        </p>
        <Sources photo={null} main onFile={onFile} onSample={onSample} />
        <p className="soft small">Or drop a photo anywhere on this page, or paste one. Whole folders work too.</p>
      </div>
    </div>
  );
}

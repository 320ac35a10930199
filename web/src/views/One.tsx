import { type ReactNode, type RefObject, useRef, useState } from "react";
import type { Client, ModelCard } from "../api/client";
import { Inside } from "../components/Inside";
import { Icon } from "../components/icons";
import { ModelPicker } from "../components/ModelPicker";
import { Result } from "../components/Result";
import { Sources } from "../components/Sources";
import { download } from "../lib/csv";
import type { Photo } from "../lib/photo";
import type { Route } from "../lib/route";
import { asPage } from "../lib/save";
import { Button } from "../ui/controls";

export interface PhotoProps {
  client: Client;
  models: ModelCard[];
  photo: Photo;
  route: Route;
  onRoute: (changes: Partial<Route>) => void;
  onFile: (file: Blob, name: string) => void;
}

/** The model of a name, or the default. */
export function chosen(models: ModelCard[], name: string | undefined, other = 0): ModelCard {
  return models.find((card) => card.name === name) ?? models[other] ?? (models[0] as ModelCard);
}

/** One photo and one model. */
export function One({ client, models, photo, route, onRoute, onFile }: PhotoProps) {
  const card = chosen(models, route.model);
  const whole = useRef<HTMLDivElement>(null);
  const open = route.inside !== undefined;
  return (
    <div className="stack one" ref={whole}>
      <h1 className="unseen" data-live="">
        One photo
      </h1>
      <Result
        client={client}
        card={card}
        photo={photo}
        picker={
          <ModelPicker label="Model" models={models} value={card.name} onChange={(model) => onRoute({ model })} />
        }
        below={
          <Share whole={whole} title={`${card.name}: ${photo.name}`} sample={photo.sample !== undefined}>
            <Button kind="main" aria-expanded={open} onClick={() => onRoute({ inside: open ? undefined : "open" })}>
              <Icon name={open ? "close" : "eye"} />
              {open ? "Close the inside" : "Look inside the model"}
            </Button>
          </Share>
        }
      >
        <div data-live="">
          <Sources photo={photo} onFile={onFile} onSample={(sample) => onRoute({ sample })} />
        </div>
      </Result>
      {route.inside !== undefined && (
        <Inside
          client={client}
          card={card}
          photo={photo}
          view={route.inside}
          onView={(inside) => onRoute({ inside })}
        />
      )}
    </div>
  );
}

interface ShareProps {
  whole: RefObject<HTMLDivElement | null>;
  title: string;
  sample: boolean;
  children?: ReactNode;
}

/** A link to the result, and the result as a file. */
export function Share({ whole, title, sample, children }: ShareProps) {
  const [told, setTold] = useState("");
  const copy = async () => {
    try {
      await navigator.clipboard.writeText(location.href);
      setTold(
        sample ? "The link is copied." : "The link is copied. It opens this model and view; your photo is not in it.",
      );
    } catch {
      setTold("The browser did not allow copying: copy the address of this page.");
    }
  };
  const save = async () => {
    if (!whole.current) return;
    const name = title.replace(/[^\p{L}\p{N}.-]+/gu, "-").slice(0, 80);
    download(await asPage(whole.current, title), `vitrail-${name}.html`, "text/html;charset=utf-8");
    setTold("The result is saved as one HTML file.");
  };
  return (
    <div className="row share" data-live="">
      {children}
      <Button onClick={copy}>
        <Icon name="link" />
        Copy the link
      </Button>
      <Button onClick={save}>
        <Icon name="save" />
        Save as a page
      </Button>
      <span className="soft small" role="status">
        {told}
      </span>
    </div>
  );
}

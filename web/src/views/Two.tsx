import { useRef } from "react";
import { ModelPicker } from "../components/ModelPicker";
import { Result } from "../components/Result";
import { Sources } from "../components/Sources";
import { chosen, type PhotoProps, Share } from "./One";

/** One photo and two models side by side. */
export function Two({ client, models, photo, route, onRoute, onFile }: PhotoProps) {
  const first = chosen(models, route.model);
  const other = models.findIndex(({ name }) => name !== first.name);
  const second = chosen(models, route.with, Math.max(other, 0));
  const whole = useRef<HTMLDivElement>(null);
  const picker = (label: string, value: string, name: "model" | "with") => (
    <ModelPicker label={label} models={models} value={value} onChange={(model) => onRoute({ [name]: model })} />
  );
  return (
    <div className="stack two">
      <h1 className="unseen">Two models</h1>
      <Sources photo={photo} onFile={onFile} onSample={(sample) => onRoute({ sample })} />
      {models.length < 2 && (
        <p className="note" data-kind="passing">
          This server has one model. Start it with two to compare them: <code>vitrail serve classify caption</code>
        </p>
      )}
      <div className="pair" ref={whole}>
        <Result client={client} card={first} photo={photo} picker={picker("First model", first.name, "model")} />
        <Result client={client} card={second} photo={photo} picker={picker("Second model", second.name, "with")} />
      </div>
      <Share
        whole={whole}
        title={`${first.name} and ${second.name}: ${photo.name}`}
        sample={photo.sample !== undefined}
      />
    </div>
  );
}

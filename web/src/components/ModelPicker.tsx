import type { ModelCard } from "../api/client";
import { Segmented } from "../ui/controls";

interface Props {
  label: string;
  models: ModelCard[];
  value: string;
  onChange: (name: string) => void;
}

/** The models of the server: a few as buttons, more as a list. */
export function ModelPicker({ label, models, value, onChange }: Props) {
  if (models.length < 2) return <p className="model-name">{value}</p>;
  const options = models.map(({ name }) => ({ value: name, text: name }));
  if (models.length <= 4 && models.every(({ name }) => name.length <= 14)) {
    return <Segmented label={label} options={options} value={value} onChange={onChange} />;
  }
  return (
    <select className="select" aria-label={label} value={value} onChange={(event) => onChange(event.target.value)}>
      {options.map((option) => (
        <option key={option.value}>{option.value}</option>
      ))}
    </select>
  );
}

const short = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });

/** What is known of a model. */
export function ModelFacts({ card }: { card: ModelCard }) {
  const facts: [string, string | null][] = [
    ["task", card.task],
    ["weights", card.parameters === null ? null : short.format(card.parameters)],
    [
      "sees",
      `${card.image_size[1]} × ${card.image_size[0]} pixels${card.patch ? `, in patches of ${card.patch}` : ""}`,
    ],
    ["classes", card.classes ? String(card.classes) : null],
    ["trained on", card.training_data],
    ["licence", card.licence],
    ["runs on", `${card.engine}, ${card.precision}`],
  ];
  return (
    <details className="facts">
      <summary>About this model</summary>
      <dl className="values">
        {facts.map(([name, value]) =>
          value ? (
            <div key={name}>
              <dt>{name}</dt>
              <dd>{value}</dd>
            </div>
          ) : null,
        )}
      </dl>
    </details>
  );
}

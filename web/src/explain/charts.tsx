import type { Lens } from "./lens";

const [WIDTH, HEIGHT] = [420, 220];
const [LEFT, RIGHT, TOP, BOTTOM] = [40, 10, 26, 34];

interface ChartProps {
  layers: number;
  /** the highest value */
  most: number;
  unit: string;
  label: string;
  /** the layer that is chosen */
  layer: number;
  children: (x: (layer: number) => number, y: (value: number) => number) => React.ReactNode;
}

/** Values by layer. */
function Chart({ layers, most, unit, label, layer, children }: ChartProps) {
  const x = (place: number) => LEFT + ((WIDTH - LEFT - RIGHT) * (place + 0.5)) / layers;
  const y = (value: number) => HEIGHT - BOTTOM - ((HEIGHT - TOP - BOTTOM) * value) / (most || 1);
  const steps = [0, 0.25, 0.5, 0.75, 1].map((share) => share * most);
  const every = Math.ceil(layers / 12);
  return (
    <svg className="chart" viewBox={`0 0 ${WIDTH} ${HEIGHT}`} role="img" aria-label={label}>
      <rect className="here" x={x(layer) - 9} y={TOP} width={18} height={HEIGHT - TOP - BOTTOM} rx={6} />
      {steps.map((value) => (
        <g key={value}>
          <line className="rule" x1={LEFT} x2={WIDTH - RIGHT} y1={y(value)} y2={y(value)} />
          <text x={LEFT - 6} y={y(value) + 4} textAnchor="end">
            {figure(value)}
          </text>
        </g>
      ))}
      {Array.from({ length: layers }, (_, i) => i).map((place) =>
        place % every ? null : (
          <text key={place} x={x(place)} y={HEIGHT - BOTTOM + 16} textAnchor="middle">
            {place + 1}
          </text>
        ),
      )}
      <text x={(LEFT + WIDTH - RIGHT) / 2} y={HEIGHT - 4} textAnchor="middle">
        layer
      </text>
      <text x={2} y={10}>
        {unit}
      </text>
      {children(x, y)}
    </svg>
  );
}

export const figure = (value: number) =>
  value === 0 ? "0" : Math.abs(value) >= 100 ? value.toFixed(0) : value.toPrecision(2);

interface DistanceProps {
  lens: Lens;
  layer: number;
  head: number;
  onChoose: (layer: number, head: number) => void;
}

/** How far each head looks, by layer. */
export function Distance({ lens, layer, head, onChoose }: DistanceProps) {
  const values = lens.arrays.get("distance").slice(0, lens.layers * lens.heads);
  const at = (number: number) => [Math.floor(number / lens.heads), number % lens.heads] as const;
  const far = values.reduce((best, value, i) => (value > (values[best] as number) ? i : best), 0);
  const near = values.reduce((best, value, i) => (value < (values[best] as number) ? i : best), 0);
  const tell = (number: number) =>
    `layer ${at(number)[0] + 1}, head ${at(number)[1] + 1}: ${figure(values[number] as number)} pixels`;
  const label = `How far each head looks, by layer. Nearest: ${tell(near)}. Farthest: ${tell(far)}.`;
  return (
    <>
      <Chart layers={lens.layers} most={Math.max(...values)} unit="pixels" label={label} layer={layer}>
        {(x, y) =>
          [...values].map((value, i) => {
            const [row, column] = at(i);
            return (
              // biome-ignore lint/a11y/noStaticElementInteractions: the sliders choose the same
              <circle
                key={`${row} ${column}`}
                className={row === layer && column + 1 === head ? "dot here" : "dot"}
                cx={x(row)}
                cy={y(value)}
                r={row === layer && column + 1 === head ? 6.5 : 4.5}
                onClick={() => onChoose(row, column + 1)}
              >
                <title>{tell(i)}</title>
              </circle>
            );
          })
        }
      </Chart>
      <p className="soft small">
        Nearest: {tell(near)}. Farthest: {tell(far)}. Choose a dot, or use the sliders, to see its head on the photo.
      </p>
    </>
  );
}

/** The lengths of tokens by layer: the median patch, the longest, and the class token. */
export function Norms({ lens, layer }: { lens: Lens; layer: number }) {
  const layers = lens.arrays.get("norms").shape[0] as number;
  const medians: number[] = [];
  const longest: number[] = [];
  for (let i = 0; i < layers; i++) {
    const sorted = lens.norms(i).sort();
    medians.push(sorted[sorted.length >> 1] as number);
    longest.push(sorted[sorted.length - 1] as number);
  }
  const prefix = lens.has("norms_prefix") ? lens.arrays.get("norms_prefix") : null;
  const first =
    prefix && Array.from({ length: layers }, (_, i) => prefix.slice(i * (prefix.shape[1] as number), 1)[0] as number);
  const outliers = lens.arrays.get("outliers").slice(0, lens.patches);
  const count = outliers.reduce((sum, value) => sum + value, 0);
  const lines = [
    { name: "longest patch", values: longest, dash: "" },
    { name: "median patch", values: medians, dash: "7 4" },
    ...(first
      ? [{ name: lens.data.pool === "token" ? "class token" : "first extra token", values: first, dash: "2 4" }]
      : []),
  ];
  const most = Math.max(...lines.flatMap(({ values }) => values));
  const told = lines.map(({ name, values }) => `${name} ${figure(values[layer] as number)}`).join(", ");
  return (
    <>
      <Chart
        layers={layers}
        most={most}
        unit="length"
        label={`Lengths of tokens by layer. Layer ${layer + 1}: ${told}.`}
        layer={layer}
      >
        {(x, y) =>
          lines.map(({ name, values, dash }) => (
            <polyline
              key={name}
              className="curve"
              strokeDasharray={dash}
              points={values.map((value, i) => `${x(i)},${y(value)}`).join(" ")}
            />
          ))
        }
      </Chart>
      <ul className="legend small">
        {lines.map(({ name, dash }) => (
          <li key={name}>
            <svg viewBox="0 0 34 8" width="34" height="8" aria-hidden="true">
              <line className="curve" x1="1" x2="33" y1="4" y2="4" strokeDasharray={dash} />
            </svg>
            {name}
          </li>
        ))}
      </ul>
      <p className="small">
        {count
          ? `${count} of ${lens.patches} patches are outliers: in the last layer, longer than three times the median.`
          : "No patch is an outlier here: none is longer than three times the median in the last layer."}
      </p>
    </>
  );
}

/** The answer after each layer. */
export function Layers({ lens }: { lens: Lens }) {
  const layers = (lens.data.lens ?? []).map(({ layer, text, answer }) => ({ layer, text, rows: shares(answer) }));
  const last = layers[layers.length - 1];
  const final = last?.rows[0]?.[0];
  const share = (rows: readonly (readonly [string, number])[]) => rows.find(([name]) => name === final)?.[1] ?? 0;
  return (
    <div className="scroll">
      <table className="layers">
        <thead>
          <tr>
            <th scope="col">Layer</th>
            <th scope="col">Answer</th>
            {final && <th scope="col">{final}</th>}
          </tr>
        </thead>
        <tbody>
          {layers.map(({ layer, text, rows }) => (
            <tr key={layer} data-final={(rows.length ? rows[0]?.[0] === final : text === last?.text) ? "" : undefined}>
              <th scope="row" className="numbers">
                {layer}
              </th>
              <td dir="auto">{rows[0]?.[0] ?? text}</td>
              {final && (
                <td className="share">
                  <div>
                    <span className="track">
                      <i style={{ width: `${100 * share(rows)}%` }} />
                    </span>
                    <span className="numbers">{(100 * share(rows)).toFixed(0)} %</span>
                  </div>
                </td>
              )}
            </tr>
          ))}
        </tbody>
      </table>
    </div>
  );
}

/** The rows of an answer that are a name and a share from 0 to 1, such as a class and its probability. */
function shares(answer: Record<string, unknown>): [string, number][] {
  for (const rows of Object.values(answer)) {
    if (!Array.isArray(rows) || !rows.length) continue;
    const found = rows.map((row) => {
      const values = Object.values(row ?? {});
      const names = values.filter((value) => typeof value === "string");
      const numbers = values.filter((value) => typeof value === "number" && value >= 0 && value <= 1);
      return names.length === 1 && numbers.length === 1 ? ([names[0], numbers[0]] as [string, number]) : null;
    });
    if (found.every((row) => row !== null)) return found;
  }
  return [];
}

interface Pane {
  d: string;
  fill: string;
}

const [BLUE, DEEP, TEAL, RUBY, WINE, AMBER, GOLD, EMERALD, VIOLET] = [
  "#2f5be0",
  "#1d37a0",
  "#1f86b5",
  "#c8233f",
  "#8c1640",
  "#f0a62c",
  "#ffd36b",
  "#1c9463",
  "#6a3cc0",
] as const;

const at = (radius: number, angle: number) =>
  `${(radius * Math.sin(angle)).toFixed(2)} ${(-radius * Math.cos(angle)).toFixed(2)}`;

/** A pane between two radii; its sides may open outwards. */
function pane(inner: number, outer: number, angle: number, narrow: number, wide: number): string {
  return `M${at(inner, angle - narrow)}L${at(outer, angle - wide)}A${outer} ${outer} 0 0 1 ${at(outer, angle + wide)}L${at(inner, angle + narrow)}A${inner} ${inner} 0 0 0 ${at(inner, angle - narrow)}Z`;
}

/** The round head of a lancet. */
function head(radius: number, angle: number, wide: number): string {
  const size = (radius * Math.sin(wide)).toFixed(2);
  return `M${at(radius, angle - wide)}A${size} ${size} 0 0 1 ${at(radius, angle + wide)}A${radius} ${radius} 0 0 0 ${at(radius, angle - wide)}Z`;
}

function disc(centre: number, angle: number, radius: number): string {
  const [x, y] = [centre * Math.sin(angle), -centre * Math.cos(angle)];
  return `M${(x - radius).toFixed(2)} ${y.toFixed(2)}a${radius} ${radius} 0 1 0 ${2 * radius} 0a${radius} ${radius} 0 1 0 ${-2 * radius} 0Z`;
}

function panes(): Pane[] {
  const found: Pane[] = [];
  const add = (d: string, fill: string) => found.push({ d, fill });
  const around = (count: number, turn: number, draw: (angle: number, i: number) => void) => {
    for (let i = 0; i < count; i++) draw(((i + turn) / count) * 2 * Math.PI, i);
  };
  // The rim, and beads in it.
  around(24, 0.5, (angle, i) => add(pane(88, 97, angle, 0.118, 0.118), i % 2 ? DEEP : BLUE));
  around(24, 0, (angle, i) => add(disc(92.5, angle, 3.1), i % 2 ? AMBER : RUBY));
  // Outer lancets, each of panes with a medallion.
  around(24, 0.5, (angle, i) => {
    add(pane(50, 62, angle, 0.105, 0.109), i % 2 ? VIOLET : TEAL);
    add(pane(62, 76, angle, 0.109, 0.112), i % 2 ? BLUE : RUBY);
    add(head(76, angle, 0.112), i % 2 ? AMBER : GOLD);
    add(disc(69, angle, 4.3), i % 2 ? EMERALD : BLUE);
  });
  around(24, 0, (angle, i) => add(disc(83.6, angle, 2.2), i % 2 ? TEAL : EMERALD));
  // Inner petals.
  around(12, 0, (angle, i) => {
    add(pane(15, 26, angle, 0.17, 0.19), i % 2 ? WINE : DEEP);
    add(pane(26, 39, angle, 0.19, 0.205), i % 2 ? RUBY : BLUE);
    add(head(39, angle, 0.205), i % 2 ? GOLD : AMBER);
    add(disc(33, angle, 4.2), i % 2 ? BLUE : EMERALD);
  });
  around(12, 0.5, (angle) => add(disc(45.5, angle, 2.6), VIOLET));
  // The eye.
  around(6, 0.5, (angle, i) => add(pane(6, 13, angle, 0.48, 0.5), i % 2 ? RUBY : AMBER));
  add(disc(0, 0, 5.4), GOLD);
  return found;
}

const PANES = panes();

/** A rose window: what stands where no photo is yet. */
export function Rose({ className = "" }: { className?: string }) {
  return (
    <svg className={`rose ${className}`} viewBox="-101 -101 202 202" aria-hidden="true">
      <radialGradient id="rose-light">
        <stop offset="0" stopColor="#fff" stopOpacity="0.7" />
        <stop offset="0.5" stopColor="#fff" stopOpacity="0.04" />
        <stop offset="1" stopColor="#060212" stopOpacity="0.6" />
      </radialGradient>
      <circle r="100" fill="var(--lead)" />
      {PANES.map(({ d, fill }) => (
        <path key={d} d={d} fill={fill} />
      ))}
      <circle r="98" fill="url(#rose-light)" style={{ mixBlendMode: "overlay" }} />
    </svg>
  );
}

/** The sign of vitrail: a small rose window of few panes. */
export function Sign() {
  return (
    <svg className="sign" viewBox="-32 -32 64 64" aria-hidden="true">
      <circle r="32" fill="#17131d" />
      {Array.from({ length: 8 }, (_, i) => {
        const d = pane(17, 29.5, ((i + 0.5) / 8) * 2 * Math.PI, 0.34, 0.36);
        return <path key={d} d={d} fill={i % 2 ? RUBY : BLUE} />;
      })}
      {Array.from({ length: 4 }, (_, i) => {
        const d = pane(8.5, 15.5, (i / 4) * 2 * Math.PI, 0.66, 0.71);
        return <path key={d} d={d} fill={i % 2 ? EMERALD : VIOLET} />;
      })}
      <circle r="6.5" fill={AMBER} />
    </svg>
  );
}

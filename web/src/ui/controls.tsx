import type { ButtonHTMLAttributes, ReactNode } from "react";
import { useId } from "react";

interface ButtonProps extends ButtonHTMLAttributes<HTMLButtonElement> {
  kind?: "main" | "plain" | "bare";
  /** only an icon is shown: then `aria-label` names the button */
  icon?: boolean;
}

export function Button({ kind = "plain", icon = false, className = "", ...rest }: ButtonProps) {
  return (
    <button
      type="button"
      className={`button ${className}`}
      data-kind={kind}
      data-icon={icon ? "" : undefined}
      {...rest}
    />
  );
}

interface SegmentedProps<T extends string> {
  label: string;
  options: readonly { value: T; text: ReactNode }[];
  value: T;
  onChange: (value: T) => void;
}

/** One of a few choices: a group of radio buttons. */
export function Segmented<T extends string>({ label, options, value, onChange }: SegmentedProps<T>) {
  const name = useId();
  return (
    <div className="segmented" role="radiogroup" aria-label={label}>
      {options.map((option) => (
        <label key={option.value}>
          <input
            type="radio"
            name={name}
            value={option.value}
            checked={option.value === value}
            onChange={() => onChange(option.value)}
          />
          <span>{option.text}</span>
        </label>
      ))}
    </div>
  );
}

interface SliderProps {
  label: string;
  min: number;
  max: number;
  step?: number;
  value: number;
  onChange: (value: number) => void;
  /** what stands beside it, and what a screen reader says */
  text?: string;
}

export function Slider({ label, min, max, step = 1, value, onChange, text = String(value) }: SliderProps) {
  return (
    <label className="slider">
      <span>{label}</span>
      <input
        type="range"
        min={min}
        max={max}
        step={step}
        value={value}
        aria-valuetext={text}
        onChange={(event) => onChange(event.target.valueAsNumber)}
      />
      <output>{text}</output>
    </label>
  );
}

export function Panel({
  title,
  children,
  className = "",
}: {
  title?: string;
  children: ReactNode;
  className?: string;
}) {
  const id = useId();
  return (
    <section className={`panel stack ${className}`} aria-labelledby={title ? id : undefined}>
      {title && <h2 id={id}>{title}</h2>}
      {children}
    </section>
  );
}

export function Spinner({ text }: { text: string }) {
  return (
    <p className="row soft" role="status">
      <span className="spinner" aria-hidden="true" />
      {text}
    </p>
  );
}

import { useEffect, useState } from "react";
import { Kept } from "./storage";

export type Theme = "system" | "light" | "dark";
const KEPT = new Kept("local", "vitrail-theme");
const NEXT: Record<Theme, Theme> = { system: "light", light: "dark", dark: "system" };

function stored(): Theme {
  const found = KEPT.get();
  return found === "light" || found === "dark" ? found : "system";
}

/** The theme, and how to change to the next one. */
export function useTheme(): [Theme, () => void] {
  const [theme, setTheme] = useState<Theme>(stored);
  useEffect(() => {
    if (theme === "system") {
      delete document.documentElement.dataset.theme;
      KEPT.set(null);
    } else {
      document.documentElement.dataset.theme = theme;
      KEPT.set(theme);
    }
  }, [theme]);
  return [theme, () => setTheme((before) => NEXT[before])];
}

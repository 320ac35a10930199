import { useCallback, useSyncExternalStore } from "react";

/** What the fragment of the address says: never anything of an upload. */
export interface Route {
  /** one photo, two models, or many photos */
  view: "one" | "two" | "many";
  model?: string | undefined;
  /** the second model */
  with?: string | undefined;
  sample?: string | undefined;
  /** the view of the explanation; absent: it is closed */
  inside?: string | undefined;
}

const NAMES = ["view", "model", "with", "sample", "inside"] as const;

export function parse(fragment: string): Route {
  const found = new URLSearchParams(fragment.replace(/^#/, ""));
  const view = found.get("view");
  const word = (name: string) => found.get(name) ?? undefined;
  return {
    view: view === "two" || view === "many" ? view : "one",
    model: word("model"),
    with: word("with"),
    sample: word("sample"),
    inside: word("inside"),
  };
}

export function format(route: Route): string {
  const found = new URLSearchParams();
  for (const name of NAMES) {
    const value = route[name];
    if (value && !(name === "view" && value === "one")) found.set(name, value);
  }
  return found.size ? `#${found}` : "";
}

const listen = (changed: () => void) => {
  window.addEventListener("hashchange", changed);
  return () => window.removeEventListener("hashchange", changed);
};

/** The route, and how to change it. Another view is a step in the browser's history; other changes replace the step. */
export function useRoute(): [Route, (changes: Partial<Route>) => void] {
  const fragment = useSyncExternalStore(listen, () => location.hash);
  const change = useCallback((changes: Partial<Route>) => {
    const before = parse(location.hash);
    const next = format({ ...before, ...changes });
    if (next === location.hash) return;
    const url = location.pathname + location.search + next;
    if (changes.view && changes.view !== before.view) history.pushState(null, "", url);
    else history.replaceState(null, "", url);
    window.dispatchEvent(new HashChangeEvent("hashchange"));
  }, []);
  return [parse(fragment), change];
}

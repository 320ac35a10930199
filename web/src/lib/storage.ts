/** What the browser keeps for this page: `session` until the tab is closed. Where it keeps nothing, this page does. */
export class Kept {
  private memory: string | null = null;

  constructor(
    private readonly kind: "session" | "local",
    private readonly name: string,
  ) {}

  get(): string | null {
    try {
      return this.storage().getItem(this.name);
    } catch {
      return this.memory;
    }
  }

  set(value: string | null): void {
    this.memory = value;
    try {
      if (value === null) this.storage().removeItem(this.name);
      else this.storage().setItem(this.name, value);
    } catch {
      // A browser that blocks storage throws: the value lives as long as the page.
    }
  }

  private storage(): Storage {
    return this.kind === "session" ? sessionStorage : localStorage;
  }
}

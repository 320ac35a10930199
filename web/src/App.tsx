import { useCallback, useMemo, useState } from "react";
import { address, Client, type Models } from "./api/client";
import { ErrorNote, KeyForm } from "./components/ErrorNote";
import { Icon } from "./components/icons";
import { Sign } from "./components/Rose";
import type { Found } from "./lib/photo";
import { type Route, useRoute } from "./lib/route";
import { useRequest } from "./lib/useAnswer";
import { useDrop } from "./lib/useDrop";
import { usePhoto } from "./lib/usePhoto";
import { type Theme, useTheme } from "./lib/useTheme";
import { SAMPLES } from "./samples";
import { Button, Segmented, Spinner } from "./ui/controls";
import { Many } from "./views/Many";
import { chosen, One } from "./views/One";
import { Two } from "./views/Two";
import { Welcome } from "./views/Welcome";

const VIEWS = [
  { value: "one", text: "One photo" },
  { value: "two", text: "Two models" },
  { value: "many", text: "Many photos" },
] as const;

export function App() {
  const client = useMemo(() => new Client(address()), []);
  const models = useRequest("models", (signal) => client.models(signal));
  const [route, change] = useRoute();
  return (
    <>
      <button type="button" className="skip" onClick={() => document.getElementById("main")?.focus()}>
        Skip to the content
      </button>
      <Header client={client} route={route} onRoute={change} onKey={models.retry} />
      <main id="main" tabIndex={-1}>
        {models.error ? (
          <>
            <h1 className="unseen">vitrail</h1>
            <ErrorNote error={models.error} client={client} onRetry={models.retry} left={models.left} />
          </>
        ) : models.value ? (
          <Views client={client} models={models.value} route={route} onRoute={change} />
        ) : (
          <Spinner text="The models are listed" />
        )}
      </main>
      <footer className="soft small">
        <p>
          Photos go to {client.base || "the server of this page"} for their answer. They are not written to disk or to a
          log.
        </p>
        <p>
          <a href={client.url("/docs")}>The interface for programs</a>
        </p>
      </footer>
    </>
  );
}

interface ViewsProps {
  client: Client;
  models: Models;
  route: Route;
  onRoute: (changes: Partial<Route>) => void;
}

function Views({ client, models: { models, default: first }, route, onRoute }: ViewsProps) {
  const sorted = useMemo(
    () => [...models].sort((a, b) => Number(b.name === first) - Number(a.name === first)),
    [models, first],
  );
  const setSample = useCallback((sample: string | undefined) => onRoute({ sample }), [onRoute]);
  const [photo, give] = usePhoto(route.sample, setSample);
  const [files, setFiles] = useState<Found[]>([]);
  const taken = useCallback(() => setFiles([]), []);
  const over = useDrop((found) => {
    const only = found[0];
    if (found.length === 1 && only && !only.path.includes("/") && route.view !== "many")
      return give(only.file, only.path);
    setFiles(found);
    onRoute({ view: "many" });
  });
  const names = [route.model, route.view === "two" ? route.with : undefined];
  const strange = names.filter((name) => name && !models.some((card) => card.name === name));
  const shared = { client, models: sorted, route, onRoute, onFile: give };
  return (
    <>
      {over && (
        <div className="drop-hint" aria-hidden="true">
          <p>Let go to put it into the window</p>
        </div>
      )}
      {/* A link may come from another server. */}
      {strange.map((name) => (
        <p key={name} className="note strange" data-kind="passing" role="status">
          This server has no model called {name}: another one answers.
        </p>
      ))}
      {route.sample && !SAMPLES.some(({ name }) => name === route.sample) && (
        <p className="note strange" data-kind="passing" role="status">
          There is no sample photo called {route.sample}.
        </p>
      )}
      {/* It stays, so that a photo can be opened from it and left again. */}
      <div hidden={route.view !== "many"}>
        <Many
          client={client}
          models={sorted}
          model={chosen(sorted, route.model)}
          onModel={(model) => onRoute({ model })}
          files={files}
          onTaken={taken}
          onOpen={(file, name) => {
            give(file, name);
            onRoute({ view: "one" });
          }}
        />
      </div>
      {route.view === "many" ? null : !photo ? (
        <Welcome onFile={give} onSample={setSample} />
      ) : route.view === "two" ? (
        <Two {...shared} photo={photo} />
      ) : (
        <One {...shared} photo={photo} />
      )}
    </>
  );
}

interface HeaderProps {
  client: Client;
  route: Route;
  onRoute: (changes: Partial<Route>) => void;
  onKey: () => void;
}

const THEMES: Record<Theme, { icon: "half" | "sun" | "moon"; name: string }> = {
  system: { icon: "half", name: "as the system" },
  light: { icon: "sun", name: "light" },
  dark: { icon: "moon", name: "dark" },
};

function Header({ client, route, onRoute, onKey }: HeaderProps) {
  const [theme, next] = useTheme();
  const [asking, setAsking] = useState(false);
  return (
    <header>
      <p className="brand">
        <Sign />
        vitrail
      </p>
      <nav aria-label="Views">
        <Segmented label="View" options={VIEWS} value={route.view} onChange={(view) => onRoute({ view })} />
      </nav>
      <div className="row tools">
        {client.base && <span className="server small">{client.base.replace(/^https?:\/\//, "")}</span>}
        <Button kind="bare" icon aria-label="API key" aria-expanded={asking} onClick={() => setAsking(!asking)}>
          <Icon name="key" />
        </Button>
        <Button kind="bare" icon aria-label={`Theme: ${THEMES[theme].name}`} onClick={next}>
          <Icon name={THEMES[theme].icon} />
        </Button>
      </div>
      {asking && (
        <div className="panel key-panel">
          <KeyForm
            client={client}
            onDone={() => {
              setAsking(false);
              onKey();
            }}
          />
        </div>
      )}
    </header>
  );
}

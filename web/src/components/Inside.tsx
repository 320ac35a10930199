import { lazy, Suspense } from "react";
import type { Client, ModelCard } from "../api/client";
import type { Photo } from "../lib/photo";
import { useExplanation } from "../lib/useAnswer";
import { Spinner } from "../ui/controls";
import { ErrorNote } from "./ErrorNote";

const Explanation = lazy(() => import("../explain").then((module) => ({ default: module.Explanation })));

interface Props {
  client: Client;
  card: ModelCard;
  photo: Photo;
  /** the view of the explanation that is open */
  view: string;
  onView: (view: string) => void;
}

/** What the model computed for a photo. */
export function Inside({ client, card, photo, view, onView }: Props) {
  const { value, error, retry, left } = useExplanation(client, card.name, photo);
  return (
    <section className="panel stack inside" aria-label="Inside the model">
      {error ? (
        <ErrorNote error={error} client={client} onRetry={retry} left={left} />
      ) : value ? (
        <Suspense fallback={<Spinner text="The views are loading" />}>
          <Explanation
            key={`${card.name} ${photo.id}`}
            data={value}
            name={photo.name}
            classNames={card.class_names}
            ask={(more) => client.explain(photo.blob, card.name, more)}
            view={view}
            onView={onView}
          />
        </Suspense>
      ) : (
        <Spinner text="The model explains itself" />
      )}
    </section>
  );
}

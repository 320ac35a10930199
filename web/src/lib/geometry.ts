import type { ModelCard } from "../api/client";
import type { Region } from "../ui/heat";

/** What a model sees of an image, and into how many patches it cuts that. */
export interface View {
  /** in pixels of the image; outside of it for a letterbox */
  region: Region;
  rows: number;
  columns: number;
}

/** As `vitrail.data.preprocess.Preprocess` does it. */
export function viewOf(card: ModelCard, width: number, height: number): View {
  const [high, wide] = card.image_size as [number, number];
  const patch = card.patch ?? Math.max(high, wide) / 8;
  const size = card.crop_fraction || 1;
  const cells = (h: number, w: number) => ({
    rows: Math.max(1, Math.ceil(h / patch - 1e-6)),
    columns: Math.max(1, Math.ceil(w / patch - 1e-6)),
  });
  const centred = (w: number, h: number): Region => [
    (width - w) / 2,
    (height - h) / 2,
    (width + w) / 2,
    (height + h) / 2,
  ];
  if (card.resize === "squash") return { region: centred(width * size, height * size), ...cells(high, wide) };
  if (card.resize === "letterbox") {
    const scale = Math.min(wide / width, high / height);
    return { region: centred(wide / scale, high / scale), ...cells(high, wide) };
  }
  const scale = Math.max(wide / width, high / height) / size;
  if (card.resize === "whole") return { region: [0, 0, width, height], ...cells(height * scale, width * scale) };
  return { region: centred(wide / scale, high / scale), ...cells(high, wide) };
}

/** An image as the page holds it. It leaves the page only to be answered. */
export interface Photo {
  id: number;
  name: string;
  blob: Blob;
  /** the name of a sample photo */
  sample?: string;
  /** its pixels; null for a kind of file that this browser cannot show, which the model may still read */
  bitmap: ImageBitmap | null;
  url: string;
  width: number;
  height: number;
}

let count = 0;
const LARGEST = 2048;

/** Read an image; a very large one is kept at a smaller size for the screen, and sent in full. */
export async function readPhoto(blob: Blob, name: string, sample?: string): Promise<Photo> {
  const found = { id: ++count, name, blob, url: URL.createObjectURL(blob), ...(sample && { sample }) };
  let bitmap: ImageBitmap;
  try {
    bitmap = await createImageBitmap(blob);
  } catch {
    return { ...found, bitmap: null, width: 4, height: 3 };
  }
  const { width, height } = bitmap;
  const scale = LARGEST / Math.max(width, height);
  if (scale < 1) {
    const small = await createImageBitmap(bitmap, {
      resizeWidth: Math.max(1, Math.round(width * scale)),
      resizeHeight: Math.max(1, Math.round(height * scale)),
      resizeQuality: "high",
    });
    bitmap.close();
    bitmap = small;
  }
  return { ...found, bitmap, width, height };
}

export function release(photo: Photo): void {
  URL.revokeObjectURL(photo.url);
  photo.bitmap?.close();
}

const ENDINGS = /\.(jpe?g?|jfif|png|webp|gif|bmp|tiff?|hei[cf]|avif|jp2|p[bgnp]m|tga|npy)$/i;

export const isImage = (file: File) => file.type.startsWith("image/") || ENDINGS.test(file.name);

export interface Found {
  path: string;
  file: File;
}

/** The files of a drop, with those in folders, in the order of their paths. */
export async function dropped(data: DataTransfer): Promise<Found[]> {
  const entries = [...data.items].map((item) => item.webkitGetAsEntry()).filter((entry) => entry !== null);
  if (!entries.length) return [...data.files].map((file) => ({ path: file.name, file }));
  const found = (await Promise.all(entries.map((entry) => walk(entry)))).flat();
  return found.sort((a, b) => a.path.localeCompare(b.path, "en", { numeric: true }));
}

async function walk(entry: FileSystemEntry): Promise<Found[]> {
  if (entry.name.startsWith(".")) return [];
  if (entry.isFile) {
    const file = await new Promise<File>((resolve, reject) => (entry as FileSystemFileEntry).file(resolve, reject));
    return [{ path: entry.fullPath.replace(/^\//, ""), file }];
  }
  const reader = (entry as FileSystemDirectoryEntry).createReader();
  const inside: FileSystemEntry[] = [];
  while (true) {
    // A reader gives at most a hundred entries at once.
    const some = await new Promise<FileSystemEntry[]>((resolve, reject) => reader.readEntries(resolve, reject));
    if (!some.length) break;
    inside.push(...some);
  }
  return (await Promise.all(inside.map(walk))).flat();
}

/** The first image of a paste or a drop. */
export function imageOf(data: DataTransfer | null): File | null {
  const files = [...(data?.files ?? [])];
  return files.find(isImage) ?? files[0] ?? null;
}

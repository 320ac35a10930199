/** A result as one HTML file that needs nothing else: images and fonts are inside, and it runs no script. */
export async function asPage(element: HTMLElement, title: string): Promise<string> {
  const copy = element.cloneNode(true) as HTMLElement;
  const canvases = copy.querySelectorAll("canvas");
  element.querySelectorAll("canvas").forEach((canvas, i) => {
    const image = document.createElement("img");
    image.src = canvas.toDataURL(canvas.className.includes("masks") ? "image/png" : "image/webp", 0.9);
    image.alt = canvas.getAttribute("aria-label") ?? "";
    image.className = canvas.className;
    image.style.cssText = canvas.style.cssText;
    canvases[i]?.replaceWith(image);
  });
  const images = [...copy.querySelectorAll("img")].filter((image) => !image.src.startsWith("data:"));
  await Promise.all(images.map(async (image) => image.setAttribute("src", await asData(image.src))));
  keepChosen(copy);
  for (const live of copy.querySelectorAll("button, input, select, video, dialog, form, [data-live]")) live.remove();
  for (const details of copy.querySelectorAll("details")) details.open = true;
  const theme = document.documentElement.dataset.theme;
  return `<!doctype html>
<html lang="en"${theme ? ` data-theme="${theme}"` : ""}>
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; font-src data:; style-src 'unsafe-inline'">
<title>${asText(title)}</title>
<style>
${await styles()}
</style>
</head>
<body>
<main class="saved">
<h1>${asText(title)}</h1>
${copy.outerHTML}
<p class="soft small">Answered by vitrail on ${new Date().toISOString().slice(0, 10)}.</p>
</main>
</body>
</html>
`;
}

/** Nothing can be chosen in a file: what was chosen stays as text, and the other choices leave. */
function keepChosen(copy: HTMLElement): void {
  for (const other of copy.querySelectorAll(".segmented label:has(input:not(:checked))")) other.remove();
  for (const button of copy.querySelectorAll("button[aria-pressed=true]")) {
    const chosen = document.createElement("strong");
    chosen.append(...button.childNodes);
    button.replaceWith(chosen);
  }
}

const asText = (text: string) => text.replace(/[&<>"]/g, (sign) => `&#${sign.charCodeAt(0)};`);

async function asData(url: string): Promise<string> {
  const blob = await (await fetch(url)).blob();
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result as string);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

/** All rules of this page, with the fonts inside. */
async function styles(): Promise<string> {
  const found: string[] = [];
  for (const sheet of document.styleSheets) {
    for (const rule of sheet.cssRules) {
      if (!(rule instanceof CSSFontFaceRule)) {
        found.push(rule.cssText);
        continue;
      }
      const address = /url\("?([^")]+\.woff2)"?\)/.exec(rule.cssText)?.[1];
      if (!address || address.includes("latin-ext")) continue;
      const url = new URL(address, sheet.href ?? location.href).href;
      const source = `url("${await asData(url)}") format("woff2")`;
      found.push(rule.cssText.replace(/src:[^;]+;/, `src: ${source};`));
    }
  }
  return found.join("\n").replaceAll("</", "<\\/");
}

import astronaut from "./astronaut.webp";
import cat from "./cat.webp";
import coffee from "./coffee.webp";
import rocket from "./rocket.webp";
import temple from "./temple.webp";

export interface Sample {
  name: string;
  url: string;
  credit: string;
}

/** The file of a sample. Its small copy on the page has brought it already: that is taken, also where the server is away. */
export const sampleFile = async (url: string) => (await fetch(url, { cache: "force-cache" })).blob();

/** Photos that the page brings along. */
export const SAMPLES: readonly Sample[] = [
  { name: "cat", url: cat, credit: "Stéfan van der Walt, CC0" },
  { name: "temple", url: temple, credit: "danielbuechele on Flickr, CC BY 2.0" },
  { name: "astronaut", url: astronaut, credit: "NASA, public domain" },
  { name: "rocket", url: rocket, credit: "SpaceX, CC0" },
  { name: "coffee", url: coffee, credit: "Rachel Michetti, CC0" },
];

import "@fontsource/marcellus/latin-400.css";
import "@fontsource-variable/figtree/index.css";
import "./ui/tokens.css";
import "./ui/ui.css";
import "./page.css";
import "./result.css";
import "./gallery.css";
import { StrictMode } from "react";
import { createRoot } from "react-dom/client";
import { App } from "./App";

createRoot(document.getElementById("root") as HTMLElement).render(
  <StrictMode>
    <App />
  </StrictMode>,
);

import react from "@vitejs/plugin-react";
import { defineConfig } from "vite";

/** Paths are relative, so that the build can be hosted below any path; `npm run dev` passes the interface on. */
export default defineConfig({
  base: "./",
  plugins: [react()],
  build: {
    outDir: "../src/vitrail/serve/page",
    emptyOutDir: true,
    target: "es2022",
    modulePreload: false,
    assetsInlineLimit: 0,
    rollupOptions: {
      output: {
        entryFileNames: "assets/[name]-[hash].js",
        chunkFileNames: "assets/[name]-[hash].js",
        assetFileNames: "assets/[name]-[hash][extname]",
      },
    },
  },
  server: { proxy: { "/v1": "http://127.0.0.1:8000", "/readyz": "http://127.0.0.1:8000" } },
});

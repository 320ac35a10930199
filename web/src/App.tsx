export function App() {
  return (
    <main>
      <h1>vitrail</h1>
    </main>
  );
}

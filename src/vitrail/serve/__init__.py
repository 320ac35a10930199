"""Models behind HTTP: `vitrail serve`. DESIGN's HTTP interface, over FastAPI and uvicorn (the extra `serve`).

`settings` are what an operator chooses; `models` what is served, and `engines` what runs it; `worker` the batches;
`uploads` and `decoding` the way of an image into the process; `guard` what holds for every request; `app` the
endpoints; `server` the process.
"""

"""LitServe with one of vitrail's engines, answering what `vitrail serve` answers: `bench/serving.py` starts it.

A file of its own, since LitServe's workers are new processes that import the class of its interface.
"""

import argparse
import time
from contextlib import ExitStack
from typing import Any

import litserve
from fastapi import Request

from vitrail.data.decode import EncodedImage
from vitrail.serve import engines
from vitrail.serve.settings import Settings
from vitrail.zoo import load


class Api(litserve.LitAPI):  # type: ignore[misc, unused-ignore]
    """Decodes and answers in a worker."""

    def __init__(self, model: str, engine: Any, device: str | None, batch: int) -> None:
        super().__init__(max_batch_size=batch, batch_timeout=Settings().max_wait)
        self.model, self.name, self.place, self.batch_size = model, engine, device, batch

    def setup(self, device: str) -> None:
        self.places = ExitStack()
        settings = Settings(engine=self.name, max_batch=self.batch_size)
        task = load(self.model, device=self.place)
        self.engine = engines.choose(self.model, task, settings, time.monotonic(), self.places)

    # LitServe reads a form only where this very class is the type of the request; what it gives is the form.
    def decode_request(self, request: Request, **kwargs: Any) -> Any:
        form: Any = request
        return self.engine.task.prepare(EncodedImage(form["images"].file.read(), "image"))

    def batch(self, inputs: list[Any]) -> list[Any]:
        return inputs

    def predict(self, x: list[Any], **kwargs: Any) -> list[Any]:
        with self.engine.autocast():
            return self.engine.task.answers(x)  # type: ignore[return-value, unused-ignore]

    def unbatch(self, output: list[Any]) -> list[Any]:
        return output

    def encode_response(self, output: Any, **kwargs: Any) -> dict[str, Any]:
        found: dict[str, Any] = output.row()
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--engine", required=True)
    parser.add_argument("--device")
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--port", type=int, required=True)
    args = parser.parse_args()
    api = Api(args.model, args.engine, args.device, args.batch)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, timeout=120)
    server.run(port=args.port, generate_client_file=False, host="127.0.0.1", log_level="error")


if __name__ == "__main__":
    main()

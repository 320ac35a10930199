"""Write `web/openapi.json`, from which the page's client is generated: `python web/openapi.py [FILE]`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from vitrail.serve.app import create_app
from vitrail.serve.settings import Settings

HERE = Path(__file__).parent


def schema() -> dict[str, Any]:
    """The interface, which depends on no model: nothing is loaded and no server is started."""
    nobody = cast(Any, SimpleNamespace(name="none"))
    app = create_app([nobody], Settings(), nobody)
    found = app.openapi()
    app.state.service.decoders.shutdown()
    app.state.service.large.shutdown()
    return found


def main() -> None:
    file = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "openapi.json"
    file.write_text(json.dumps(schema(), indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

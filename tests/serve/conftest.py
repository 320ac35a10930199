"""Tests of the server need its packages."""

import pytest

for _name in ("fastapi", "uvicorn", "python_multipart", "prometheus_client"):
    pytest.importorskip(_name, reason="needs pip install 'vitrail[serve]'")

"""What the endpoints answer."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from serve.serving import (
    captioner,
    classifier,
    client_of,
    error_of,
    form,
    near,
    photo,
    served,
    service_of,
    stirred,
    texts,
)
from task_examples import EXAMPLES
from tasks.caption import small

from vitrail.predictions import answer_files
from vitrail.predictions.answers import agree
from vitrail.tasks.caption import Caption
from vitrail.tasks.caption.answers import Thresholds
from vitrail.tasks.task import Task


def rows_of(folder: Path, task: Task, images: list[bytes]) -> list[dict[str, Any]]:
    """What `vitrail predict --json` prints for these files, less the path."""
    paths = [folder / f"{i}.png" for i in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        path.write_bytes(image)
    rows = [dict(answered.row) for answered in answer_files(task, paths)]
    return [{name: value for name, value in row.items() if name != "image"} for row in rows]


@pytest.mark.parametrize("name", ["classify", "segment", "embed", "caption", "regress"])
def test_one_image_is_answered_as_predict_answers_it(name: str, tmp_path: Path) -> None:
    task, image = stirred(next(iter(EXAMPLES[name].values()))()), photo()
    expected = json.loads(json.dumps(rows_of(tmp_path, task, [image])))
    with client_of(served("model", task)) as client:
        for answer in (client.post("/v1/predict", files=form(image)), client.post("/v1/predict", json=texts(image))):
            assert answer.status_code == 200, answer.text
            assert answer.json() == {"model": "model", "predictions": expected}


def test_several_images_are_answered_in_their_order(tmp_path: Path) -> None:
    task, images = classifier(), [photo(seed) for seed in range(20)]
    expected = rows_of(tmp_path, task, images)
    with client_of(served("model", task), max_batch=8) as client:
        found = client.post("/v1/predict", files=form(*images)).json()["predictions"]
    assert (
        len(found) == 20
        and found[0] != found[1]
        and all(agree(one, other) for one, other in zip(found, expected, strict=True))
    )
    assert [row["labels"][0]["score"] for row in found] == pytest.approx(
        [row["labels"][0]["score"] for row in expected],
        rel=1e-5,
    )


def test_top_is_of_the_request_alone() -> None:
    with client_of() as client:
        counts = [
            len(client.post("/v1/predict", files=form(photo()), data=data).json()["predictions"][0]["labels"])
            for data in ({"top": "2"}, {}, {"top": "7"}, {"top": "100"})
        ]
        assert counts == [2, 5, 7, 7]
        for value in ("0", "-1", "two", "1.5", "", "9" * 30):
            error_of(client.post("/v1/predict", files=form(photo()), data={"top": value}), 422, "bad_field")
        error_of(client.post("/v1/predict", json={**texts(photo()), "top": True}), 422, "bad_field")


def test_top_is_refused_where_there_are_no_classes() -> None:
    with client_of(served("words", captioner())) as client:
        error = error_of(client.post("/v1/predict", files=form(photo()), data={"top": "2"}), 422, "refused")
    assert "words" in error["message"]


def test_a_model_is_chosen_by_its_name() -> None:
    models = [served("one", classifier(1, 3)), served("two", classifier(2, 4))]
    with client_of(*models) as client:
        assert len(client.post("/v1/predict", files=form(photo())).json()["predictions"][0]["labels"]) == 3
        found = client.post("/v1/predict", json={**texts(photo()), "model": "two"}).json()
        assert found["model"] == "two" and len(found["predictions"][0]["labels"]) == 4
        error = error_of(
            client.post("/v1/predict", files=form(photo()), data={"model": "../etc"}), 404, "no_such_model"
        )
        assert "one, two" in error["hint"]


def test_an_image_that_cannot_be_read_has_an_error_beside_the_others() -> None:
    with client_of() as client:
        rows = client.post("/v1/predict", files=form(photo(1), b"no image", photo(2))).json()["predictions"]
        assert [sorted(row) for row in rows] == [["labels", "task"], ["error"], ["labels", "task"]]
        assert rows[1]["error"] == "image 2 is not an image"


def test_the_models_are_listed() -> None:
    with client_of(served("one", classifier(1, 3)), served("words", captioner())) as client:
        found = client.get("/v1/models").json()
    assert found["default"] == "one" and [model["name"] for model in found["models"]] == ["one", "words"]
    first = found["models"][0]
    assert first["parameters"] > 0 and first["classes"] == 3 and first["image_size"] == [8, 8]
    assert first["licence"] == "MIT" and [model["streams"] for model in found["models"]] == [False, True]


def test_a_stream_of_words_ends_with_the_whole_answer() -> None:
    with client_of(served("words", captioner()), served("classes", classifier())) as client:
        whole = client.post("/v1/predict", files=form(photo())).json()
        answer = client.post("/v1/predict?stream=true", files=form(photo()))
        assert answer.headers["content-type"].startswith("text/event-stream")
        blocks = [block.split("\n") for block in answer.text.strip().split("\n\n")]
        events = [(block[0].removeprefix("event: "), json.loads(block[1].removeprefix("data: "))) for block in blocks]
        assert [name for name, _ in events[:-1]] == ["word"] * (len(events) - 1) and len(events) > 2
        assert events[-1] == ("done", whole)
        assert len({value["text"] for _, value in events[:-1]}) == len(events) - 1
        post = "/v1/predict?stream=true"
        error_of(client.post(post, files=form(photo(), photo())), 422, "no_stream")
        error = error_of(client.post(post, files=form(photo()), data={"model": "classes"}), 422, "no_stream")
        assert "words" in error["hint"]
        assert "event: error" in client.post(post, files=form(b"no image")).text
        error_of(client.post("/v1/predict?stream=perhaps", files=form(photo())), 422, "bad_query")
        assert service_of(client).images == 0


def test_a_caption_tells_whether_it_is_sure_in_an_answer_and_at_the_end_of_a_stream() -> None:
    task = stirred(small.captioner(contrastive=0.5, text_depth=1))
    assert isinstance(task, Caption)
    task.sure_from = Thresholds(1000.0)
    with client_of(served("words", task)) as client:
        (row,) = client.post("/v1/predict", files=form(photo())).json()["predictions"]
        stream = client.post("/v1/predict?stream=true", files=form(photo())).text
    assert row["sure"] is False and isinstance(row["match"], float)
    (last,) = [line for line in stream.splitlines() if "predictions" in line]
    assert near(json.loads(last.removeprefix("data: "))["predictions"], [row])


def test_state_metrics_and_documents() -> None:
    with client_of(served("small", classifier())) as client:
        assert client.get("/healthz").json() == {"status": "ok"} and client.get("/readyz").status_code == 200
        client.post("/v1/predict", files=form(photo(), photo()))
        client.get("/v1/secret-of-a-client")
        text = client.get("/metrics").text
        assert 'vitrail_images_total{model="small"} 2.0' in text and "secret" not in text
        assert 'vitrail_requests_total{endpoint="/v1/predict",status="200"} 1.0' in text
        service_of(client).stopping = True
        error = error_of(client.get("/readyz"), 503, "stopping")
        assert error["hint"] and error_of(client.post("/v1/predict", files=form(photo())), 503, "stopping")


def test_the_documentation_loads_nothing_from_elsewhere() -> None:
    with client_of() as client:
        page = client.get("/docs")
        assert page.status_code == 200 and "http" not in page.text and "default-src 'self'" in str(page.headers)
        for name in ("docs/swagger-ui-bundle.js", "docs/swagger-ui.css", "docs/start.js"):
            assert name in page.text and client.get(f"/{name}").status_code == 200
        paths = client.get("/openapi.json").json()["paths"]
        assert {"/v1/predict", "/v1/explain", "/v1/models", "/healthz", "/readyz", "/metrics"} == set(paths)


def test_the_page_is_served_with_all_that_it_names() -> None:
    with client_of() as client:
        page = client.get("/")
        assert page.status_code == 200 and "default-src 'self'" in str(page.headers)
        named = re.findall(r'(?:src|href)="([^"]+)"', page.text)
        assert len(named) >= 3 and all(name.startswith("./") for name in named)
        assert all(client.get(name[1:]).status_code == 200 for name in named)
        error_of(client.get("/../../etc/passwd"), 404, "not_found")

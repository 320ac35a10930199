"""What is explained over HTTP, and that it does not keep predictions waiting."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from images import encoded, smooth
from serve.serving import (
    PATIENCE,
    captioner,
    classifier,
    client_of,
    error_of,
    form,
    near,
    photo,
    served,
    service_of,
    texts,
)

import vitrail
from vitrail.explain.explanation import Explanation, explanation
from vitrail.explain.packing import packed
from vitrail.export import export
from vitrail.serve.engines import Engine
from vitrail.serve.errors import ApiError, as_compressed_json
from vitrail.serve.explaining import MAX_EXPLANATIONS, Abandoned, Explainer
from vitrail.serve.models import Served
from vitrail.serve.schema import Explained, Predictions
from vitrail.serve.streams import streamed
from vitrail.serve.uploads import Upload
from vitrail.serve.worker import Worker

EXPLAIN, PREDICT = "/v1/explain", "/v1/predict"


def unpacked(array: dict[str, Any]) -> np.ndarray[Any, Any]:
    """The values of a packed array."""
    data = np.frombuffer(base64.b64decode(array["data"]), np.uint8).reshape(array["shape"])
    if "low" not in array:
        return data
    shape = (*array["shape"][:-1], 1)
    low, high = (np.frombuffer(base64.b64decode(array[edge]), "<f4").reshape(shape) for edge in ("low", "high"))
    return low + data / np.float32(255) * (high - low)


def test_an_explanation_is_that_of_the_command_in_eight_bits() -> None:
    task = classifier()
    expected = explanation(task, encoded(smooth(), "PNG"))
    with client_of(served("small", task)) as client:
        for answer in (client.post(EXPLAIN, files=form(photo())), client.post(EXPLAIN, json=texts(photo()))):
            assert answer.status_code == 200, answer.text
            found = answer.json()
            Explained.model_validate(found)
            told = found["explanation"]
            assert found["model"] == "small" and near(told["answer"], json.loads(json.dumps(expected.row)))
            shown = {name: array for name, array in expected.arrays.items() if name != "image"}
            assert told["arrays"].keys() == shown.keys()
            for name, array in shown.items():
                span = float(np.ptp(array.astype(np.float32)))
                np.testing.assert_allclose(unpacked(told["arrays"][name]), array, atol=span / 200 + 1e-6, err_msg=name)
            assert told["image"].startswith("data:image/jpeg;base64,/9j/")
            assert {"attention", "rollout_patches", "similarity", "pca", "positions", "norms"} <= told["arrays"].keys()
            assert [layer["layer"] for layer in told["lens"]] == [1, 2, 3, 4]


def test_another_image_and_another_class_are_explained_too() -> None:
    task = classifier()
    with client_of(served("small", task)) as client:
        plain = client.post(EXPLAIN, files=form(photo())).json()["explanation"]
        other = next(name for name in task.classes if name not in plain["outputs"])
        answer = client.post(
            EXPLAIN, files=[*form(photo()), ("beside", ("x", photo(1, "JPEG")))], data={"class": other}
        )
        told = answer.json()["explanation"]
        assert told["outputs"] == [*plain["outputs"], other]
        assert told["arrays"]["relevance_outputs"]["shape"] == [len(told["outputs"]), *told["grid"]]
        assert told["arrays"]["similarity_beside"]["shape"] == [16, 16] and told["image_beside"] != told["image"]
        as_json = {**texts(photo()), "class": other, "beside": texts(photo(1, "JPEG"))["images"][0]}
        assert near(client.post(EXPLAIN, json=as_json).json()["explanation"]["notes"], told["notes"])
        cards = client.get("/v1/models").json()["models"]
        assert cards[0]["class_names"] == list(task.classes)


@pytest.mark.parametrize(
    "how, status, code",
    [
        ({"files": form(photo(), photo())}, 413, "too_many_images"),
        ({"files": [*form(photo()), *[("beside", ("b", photo()))] * 2]}, 413, "too_many_images"),
        ({"files": [("beside", ("b", photo()))]}, 422, "no_images"),
        ({"files": form(photo()), "data": {"class": "no such class"}}, 422, "refused"),
        ({"files": form(photo()), "data": {"top": "2"}}, 422, "unknown_field"),
        ({"files": form(photo()), "data": {"model": "none"}}, 404, "no_such_model"),
        ({"files": [*form(photo()), ("beside", ("b", b"no image"))]}, 415, "not_an_image"),
        ({"files": [*form(photo()), ("beside", ("b", photo()[:-40]))]}, 422, "bad_image"),
        ({"files": form(b"")}, 422, "empty_image"),
        ({"json": {**texts(photo()), "beside": 3}}, 422, "bad_field"),
        ({"json": {**texts(photo()), "class": 3}}, 422, "bad_field"),
        ({"json": {**texts(photo()), "beside": "http://127.0.0.1/"}}, 422, "bad_base64"),
    ],
)
def test_what_cannot_be_explained(how: dict[str, Any], status: int, code: str) -> None:
    with client_of() as client:
        error_of(client.post(EXPLAIN, **how), status, code)
        assert service_of(client).explainer.waiting == service_of(client).images == service_of(client).bytes == 0


def test_a_class_of_a_model_without_classes() -> None:
    with client_of(served("words", captioner())) as client:
        error = error_of(client.post(EXPLAIN, files=form(photo()), data={"class": "dog"}), 422, "refused")
        assert error["message"] == "the model has no class 'dog': it has no classes at all"


def test_only_explain_takes_another_image() -> None:
    with client_of() as client:
        error_of(client.post(PREDICT, files=[*form(photo()), ("beside", ("b", photo()))]), 422, "unknown_field")
        error_of(client.post(PREDICT, json={**texts(photo()), "beside": "eA=="}), 422, "unknown_field")


def test_predictions_carry_the_maps_of_their_answer_alone() -> None:
    with client_of() as client:
        plain = client.post(PREDICT, files=form(photo())).json()["predictions"]
        whole = client.post(EXPLAIN, files=form(photo())).json()["explanation"]
        found = client.post(PREDICT, files=form(photo(), b"", photo(1)), data={"explain": "true"}).json()
        Predictions.model_validate(found)
        first, broken, last = found["predictions"]
        maps = first.pop("explanation")
        assert near(first, plain[0]) and "error" in broken and last["explanation"]["arrays"] != maps["arrays"]
        assert maps["arrays"].keys() == {"relevance", "rollout"} and "answer" not in maps
        for name, array in maps["arrays"].items():
            np.testing.assert_allclose(unpacked(array), unpacked(whole["arrays"][name]), rtol=1e-3, atol=1e-6)
        assert len(json.dumps(maps)) < 0.1 * len(json.dumps(whole))
        many = client.post(PREDICT, files=form(*[photo()] * (MAX_EXPLANATIONS + 1)), data={"explain": "true"})
        assert str(MAX_EXPLANATIONS) in error_of(many, 413, "too_many_images")["message"]


def test_a_caption_carries_the_attention_of_each_word() -> None:
    with client_of(served("words", captioner("transformer"))) as client:
        whole = client.post(EXPLAIN, files=form(photo())).json()["explanation"]
        data = {"explain": "true"}
        alone = client.post(PREDICT, files=form(photo()), data=data).json()
        stream = client.post(f"{PREDICT}?stream=true", files=form(photo()), data=data).text
    pieces = whole["pieces"]
    assert [piece["text"] for piece in pieces][-1] == "<end>" and all(0 <= piece["p"] <= 1 for piece in pieces)
    assert whole["arrays"]["words"]["shape"] == [len(pieces), *whole["grid"]]
    maps = alone["predictions"][0]["explanation"]
    assert near(maps["pieces"], pieces) and maps["arrays"]["words"]["shape"] == whole["arrays"]["words"]["shape"]
    name, told = stream.strip().split("\n\n")[-1].split("\n")
    assert name == "event: done" and near(json.loads(told.removeprefix("data: ")), alone)


def test_a_network_without_patches_of_attention_tells_what_is_missing() -> None:
    from vitrail.baselines import CNNConfig
    from vitrail.data.preprocess import Preprocess
    from vitrail.tasks.classify import Classify
    from vitrail.tasks.encoder import encoder_for

    task = Classify(encoder_for(CNNConfig()), ["a", "b"], Preprocess(size=(32, 32))).eval()
    with client_of(served("cnn", task)) as client:
        told = client.post(EXPLAIN, files=form(photo())).json()["explanation"]
    assert any("ViT" in note for note in told["notes"])
    assert "relevance" in told["arrays"] and "attention" not in told["arrays"]


@pytest.mark.slow
def test_an_export_is_refused_with_the_reason(tmp_path: Path) -> None:
    classifier().save(tmp_path / "model")
    export(tmp_path / "model", tmp_path / "small", "pt2")
    task = vitrail.load(tmp_path / "small")
    with client_of(Served("export", task, Engine("export", task), {})) as client:
        assert client.post(PREDICT, files=form(photo())).status_code == 200
        for answer in (
            client.post(EXPLAIN, files=form(photo())),
            client.post(PREDICT, files=form(photo()), data={"explain": "true"}),
        ):
            error = error_of(answer, 422, "refused")
            assert "small is an export" in error["message"] and "checkpoint" in error["message"]


def test_answers_are_compressed_for_clients_that_ask_for_it() -> None:
    value = {"a": "x" * 10_000}
    for accepted, encoding in (
        ("gzip, br", "gzip"),
        ("GZIP;q=0.5", "gzip"),
        ("gzip;q=0", None),
        ("br, gzip; q=0.000", None),
        ("", None),
    ):
        made = as_compressed_json(value, accepted)
        assert made.headers.get("content-encoding") == encoding and made.headers["vary"] == "Accept-Encoding"
    with client_of() as client:
        answer = client.post(EXPLAIN, files=form(photo()))
        assert answer.headers["content-encoding"] == "gzip" and answer.json()["explanation"]["text"]


def test_predictions_are_answered_between_the_steps_of_an_explanation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The explanation does not end before the prediction that came in its midst is answered."""
    begun, answered = threading.Event(), threading.Event()

    def slow(task: Any, image: Any, *rest: Any) -> Explanation:
        begun.set()
        while not answered.wait(0.01):
            rest[-1]()
        return Explanation({}, "", {"frame": [0, 0, 1, 1]}, {"image": np.zeros((2, 2, 3), np.uint8)})

    monkeypatch.setattr("vitrail.serve.service.explanation", slow)
    with client_of() as client:
        found: list[Any] = []
        thread = threading.Thread(target=lambda: found.append(client.post(EXPLAIN, files=form(photo()))))
        thread.start()
        assert begun.wait(PATIENCE)
        assert client.post(PREDICT, files=form(photo())).status_code == 200
        answered.set()
        thread.join(PATIENCE)
        assert found[0].status_code == 200 and service_of(client).explainer.seconds > 0


def test_an_explanation_ends_however_many_others_come() -> None:
    """A pause runs what waits, and not what comes because of that."""
    worker, order = Worker(1, 0.0), []

    def other(items: list[Any]) -> list[Any]:
        order.append("other")
        if len(order) < 50:
            worker.submit(other, None, "key")
        return items

    def long() -> None:
        for step in range(3):
            worker.submit(other, None, "key")
            worker.run_waiting()
            order.append(f"step {step}")

    worker.call(long, long=True).result(PATIENCE)
    worker.close()
    steps = [order.index(f"step {step}") for step in range(3)]
    assert steps[0] == 1 and steps[2] < 10, order


def test_one_explanation_does_not_run_in_the_midst_of_another() -> None:
    worker, order = Worker(1, 0.0), []

    def long(name: str) -> Callable[[], None]:
        def run() -> None:
            order.append(f"{name} begins")
            if name == "a":
                worker.call(long("b"), long=True)
            worker.run_waiting()
            order.append(f"{name} ends")

        return run

    worker.call(long("a"), long=True).result(PATIENCE)
    worker.close()
    assert order == ["a begins", "a ends", "b begins", "b ends"]


def test_an_explanation_that_nobody_waits_for_ends_at_its_next_step() -> None:
    worker, ended, gone = Worker(1, 0.0), threading.Event(), threading.Event()
    explainer = Explainer(worker, 30)

    def endless(pause: Callable[[], None]) -> Explanation:
        try:
            while True:
                gone.wait(0.01)
                pause()
        except Abandoned:
            ended.set()
            raise

    async def leave() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await explainer.run(endless)

    asyncio.run(leave())
    assert ended.wait(PATIENCE)
    worker.close()


def test_only_so_many_explanations_wait() -> None:
    with client_of(classifier_model := served("small", classifier())) as client:
        explainer = service_of(client).explainer
        with explainer.room(MAX_EXPLANATIONS):
            answer = client.post(EXPLAIN, files=form(photo()))
            error = error_of(answer, 503, "busy")
            assert "explanations" in error["message"] and "retry-after" in answer.headers
            error_of(client.post(PREDICT, files=form(photo()), data={"explain": "1"}), 503, "busy")
            assert client.post(PREDICT, files=form(photo())).status_code == 200, classifier_model.name
            upload = Upload(images=[photo()], explain=True)
            with pytest.raises(ApiError) as refused, ExitStack() as room:  # it keeps no place in the queue
                streamed(service_of(client), served("words", captioner()), upload, room)
            assert refused.value.status == 503 and service_of(client).images == 0
        with explainer.room(1):  # it would not be ready in time
            explainer.seconds = 1_000.0
            error_of(client.post(EXPLAIN, files=form(photo())), 503, "busy")
        assert client.post(EXPLAIN, files=form(photo())).status_code == 200


def test_the_model_is_left_as_it_was() -> None:
    task = classifier()
    before = {name: value.clone() for name, value in task.state_dict().items()}
    with client_of(served("small", task)) as client:
        one = client.post(PREDICT, files=form(photo())).json()
        for _ in range(2):
            client.post(EXPLAIN, files=form(photo()))
        assert client.post(PREDICT, files=form(photo())).json() == one
    assert not any(parameter.grad is not None for parameter in task.parameters()) and not task.training
    assert all(torch.equal(value, before[name]) for name, value in task.state_dict().items())
    hooks = [module for module in task.modules() if module._forward_hooks or module._forward_pre_hooks]
    assert not hooks


def test_a_large_model_stays_within_a_few_megabytes() -> None:
    """What the attention of 12 layers of 12 heads between 14 x 14 patches would be, of which half is kept."""
    array = np.zeros((6, 12, 196, 196), np.float16)
    assert len(json.dumps(packed(array))) < 4.5e6

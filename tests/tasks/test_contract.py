"""What every task must keep, whatever its job."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import vitrail
from vitrail.data.decode import Preprocess
from vitrail.data.text import Tokenizer
from vitrail.sizes import SIZES, config_for
from vitrail.tasks.caption import Caption, Captioning
from vitrail.tasks.classify import Classify
from vitrail.tasks.encoder import encoder_for
from vitrail.tasks.knn import KNN
from vitrail.tasks.regress import Regress
from vitrail.tasks.search import Decoding
from vitrail.tasks.task import Task

NANO, EIGHT = SIZES["nano/2"], Preprocess(size=(8, 8))
WORDS = Tokenizer.train(["a red dog runs on the grass"], "words", 20)


def neighbours() -> Task:
    task = KNN(encoder_for(NANO), ["a", "b"], EIGHT, images=5)
    task.head.build_index(torch.randn(5, 64), torch.tensor([0, 1, 1, 0, 1]))
    return task


def captioner(decoder: Any) -> Task:
    small: dict[str, Any] = {
        "decoder_width": 16,
        "decoder_depth": 1,
        "decoder_heads": 2,
        "decoding": Decoding(max_length=6),
    }
    return Caption(encoder_for(NANO), Captioning(decoder=decoder, **small), WORDS, EIGHT)


TASKS: dict[str, Callable[[], Task]] = {
    "classify": lambda: vitrail.create("nano/2", classes=["a", "b"]),
    "classify, sigmoid and hidden": lambda: Classify(
        encoder_for(config_for(NANO, registers=1)), ["a", "b", "c"], EIGHT, hidden=8, loss="sigmoid"
    ),
    "regress": lambda: Regress(encoder_for(NANO), ["age", "angle"], EIGHT),
    "knn": neighbours,
    "embed": lambda: vitrail.create("nano/2"),
    **{f"caption, {decoder}": partial(captioner, decoder) for decoder in ("recurrent", "attentive", "transformer")},
}


@pytest.fixture(params=TASKS)
def task(request: pytest.FixtureRequest) -> Task:
    torch.manual_seed(0)
    return TASKS[request.param]()


def inputs(task: Task, inputs: int) -> tuple[torch.Tensor, ...]:
    """What `forward` takes: normalised images, and two captions of each where there are words."""
    images = torch.randn(inputs, 3, 8, 8)
    return (images, torch.randint(4, 8, (inputs, 2, 3))) if isinstance(task, Caption) else (images,)


def test_saved_loaded_and_plain_data(task: Task, tmp_path: Path) -> None:
    task.save(tmp_path / "m")
    again = vitrail.load(tmp_path / "m")
    assert type(again) is type(task) and again.classes == task.classes
    assert json.loads(json.dumps(task.config())) == json.loads(json.dumps(again.config()))
    own, loaded = task.state_dict(), again.state_dict()
    assert own.keys() == loaded.keys() and all(torch.equal(own[name], loaded[name]) for name in own)
    given = inputs(task, 3)
    # The same bits in other memory: some processors choose a kernel by where a tensor begins, and round otherwise.
    torch.testing.assert_close(task.eval()(*given), again(*given), atol=1e-5, rtol=1e-5)


def test_features_keep_their_grid_at_odd_sizes(task: Task) -> None:
    tokens = task.features(torch.randn(2, 3, 6, 14))
    assert tokens.grid == (3, 7) and tokens.patches.shape == (2, 21, 64)


def test_predict_takes_images_of_any_kind_and_no_image(task: Task) -> None:
    images = [Image.new("RGB", (9, 30), "red"), Image.new("L", (40, 8)), Image.new("CMYK", (8, 8))]
    answers = task.train().predict(images)
    assert len(answers) == 3 and all(answer.as_row() for answer in answers)
    assert not task.training
    assert task.predict([]) == []


def test_answers_do_not_depend_on_the_batch(task: Task) -> None:
    images = [torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8) for _ in range(5)]
    together, alone = task.predict(images), [task.predict([p])[0] for p in images]
    for a, b in zip(together, alone, strict=True):
        scores = [{label["label"]: label["score"] for label in answer.labels} for answer in (a, b)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-5) and a.caption == b.caption
        assert a.embedding == pytest.approx(b.embedding, abs=1e-5)


def test_a_batch_of_eight_and_of_nothing_go_through_forward(task: Task) -> None:
    assert len(task(*inputs(task, 8))) == 8
    if not isinstance(task, Caption):  # whose words are shared out among the images
        assert len(task(*inputs(task, 0))) == 0

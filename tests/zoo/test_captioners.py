"""Pretrained captioners of the Hub, against transformers' own words, and language models on their way in."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_captioners
import tokenizers
import torch
from local_hub import Hub
from PIL import Image
from tokenizers import models

import vitrail
from vitrail.cli import main
from vitrail.data.text import END
from vitrail.errors import UserError
from vitrail.tasks.caption import Decoding
from vitrail.tasks.caption.components import NextWords
from vitrail.tasks.caption.hub import HubCaption, grid_of
from vitrail.tasks.caption.language import OWN
from vitrail.tasks.caption.search import Generated, generate
from vitrail.zoo import captioners

pytest.importorskip("transformers", reason="needs pip install 'vitrail[caption]'")

Make = Callable[[Path], Any]


@pytest.fixture(scope="module", params=tiny_captioners.CAPTIONERS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """transformers' model, and the folder that it was saved to."""
    folder = tmp_path_factory.mktemp("captioner") / request.param
    return tiny_captioners.CAPTIONERS[request.param](folder), folder


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(5, 3, tiny_captioners.SIDE, tiny_captioners.SIDE, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.effect_noise((30, 20), 90).convert("RGB").save(path)
    return path


def words(task: HubCaption, images: torch.Tensor, max_length: int = 16) -> list[list[int]]:
    """Greedy captions in the model's own numbers, without what follows the end."""
    task.option = Decoding(beam=1, no_repeat_ngram_size=0, max_length=max_length)
    with torch.no_grad():
        rows = task.generate({"image": images}).words[:, 0].tolist()
    return [[i - OWN for i in (row[: row.index(END)] if END in row else row)] for row in rows]


def loaded(folder: Path) -> HubCaption:
    task = vitrail.load(str(folder))
    assert isinstance(task, HubCaption)
    return task


def both_ways(task: HubCaption, images: torch.Tensor, how: Decoding) -> tuple[Generated, Generated]:
    """What is written with the cache, and by reading all words so far at each step."""
    memory, samples = task.memory(images), torch.arange(len(images))

    def step(words: torch.Tensor, rows: torch.Tensor | None, state: torch.Tensor) -> Any:
        state = torch.cat([state if rows is None else state[rows], words[:, None]], dim=1)
        return task.decoder(state.view(len(images), -1, state.shape[1]), memory)[:, :, -1].flatten(0, 1), None, state

    cached = generate(NextWords(task.decoder), task.decoder(memory=memory), how, samples)
    return cached, generate(step, torch.zeros(len(images), 0, dtype=torch.int64), how, samples)


def test_the_words_are_those_of_transformers_own_greedy_search(pair: tuple[Any, Path], images: torch.Tensor) -> None:
    model, folder = pair
    task = vitrail.load(str(folder))
    assert isinstance(task, HubCaption) and task.name == "caption"
    rows = words(task, images)
    theirs = model.generate(pixel_values=images, max_new_tokens=15, do_sample=False, num_beams=1).tolist()
    for ours, row in zip(rows, theirs, strict=True):
        row = row[1:]  # the start
        assert ours == (row[: row.index(task.vocabulary.end)] if task.vocabulary.end in row else row)
    assert len({tuple(row) for row in rows}) > 1  # they depend on the image


def test_with_cache_and_without_the_same(pair: tuple[Any, Path], images: torch.Tensor) -> None:
    task = loaded(pair[1])
    with torch.no_grad():
        cached, anew = both_ways(task, images, Decoding(beam=3, max_length=10))
        logits = task(images, torch.nn.functional.pad(cached.words[..., :-1], (1, 0), value=1))
    assert torch.equal(cached.words, anew.words)
    there = cached.words > END
    assert torch.allclose(cached.logp[there], anew.logp[there], atol=1e-4)
    assert logits.shape == (*cached.words.shape, task.tokenizer.size)


def test_one_image_for_a_git_of_videos(images: torch.Tensor, tmp_path: Path) -> None:
    tiny_captioners.git(tmp_path / "m", num_image_with_embedding=6)
    with torch.no_grad():
        cached, anew = both_ways(loaded(tmp_path / "m"), images, Decoding(beam=3, max_length=10))
    assert torch.equal(cached.words, anew.words)


def test_the_image_is_prepared_as_its_processor_says(pair: tuple[Any, Path]) -> None:
    prepared = vitrail.load(str(pair[1])).preprocess
    assert (prepared.size, prepared.resize, prepared.interpolation) == ((16, 16), "squash", "bicubic")
    assert prepared.mean == (0.48, 0.46, 0.41) and prepared.std == (0.27, 0.26, 0.28)


def test_the_attention_for_each_word(pair: tuple[Any, Path], images: torch.Tensor) -> None:
    task, rows = loaded(pair[1]), torch.arange(5).repeat_interleave(2)
    with torch.no_grad():
        tokens = task.features(images)
        state = task.decoder(memory=task.memory(images))
        for place in range(3):
            words = torch.ones(10, dtype=torch.int64)
            _, attention, state = task.decoder(words, rows=None if place else rows, state=state)
    assert tokens.grid == (2, 2) and tokens.prefix.shape[1] == 1
    assert attention.shape == (10, 5) and (attention > 0).all() and (attention.sum(dim=1) <= 1 + 1e-5).all()
    assert torch.allclose(attention[0], attention[1])  # two captions of one image, so far alike


def test_saved_in_our_layout_it_needs_no_folder_of_theirs(
    pair: tuple[Any, Path], images: torch.Tensor, tmp_path: Path
) -> None:
    task = vitrail.load(str(pair[1]))
    assert isinstance(task, HubCaption)
    task.option = Decoding(beam=2, max_length=9)
    task.save(tmp_path / "own")
    assert {p.name for p in (tmp_path / "own").iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}
    again = vitrail.load(tmp_path / "own")
    assert isinstance(again, HubCaption) and again.option == task.option and again.preprocess == task.preprocess
    with torch.no_grad():
        a, b = task.generate({"image": images}), again.generate({"image": images})
    assert torch.equal(a.words, b.words) and torch.equal(a.logp, b.logp)


def test_predict_prints_words_with_their_probabilities(
    pair: tuple[Any, Path], photo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", str(photo), "--model", str(pair[1]), "--json", "--device", "cpu"]) == 0
    row = json.loads(capsys.readouterr().out)
    first = row["captions"][0]
    assert row["task"] == "caption" and row["caption"] == first["caption"]
    assert first["caption"] == "".join(token["text"] for token in first["tokens"]).strip()
    assert all(0 < token["p"] <= 1 for token in first["tokens"])


def test_explain_draws_where_it_looked_for_each_word(
    pair: tuple[Any, Path], photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["explain", str(photo), "--model", str(pair[1]), "--out", str(tmp_path / "seen"), "--device", "cpu"]
    assert main(args) == 0
    numbers = json.loads((tmp_path / "seen" / "numbers.json").read_text())
    assert (tmp_path / "seen" / "words.png").stat().st_size > 1000
    assert len(numbers["words"]) == len(numbers["pieces"]) and len(numbers["words"][0]) == 2
    assert "".join(piece["text"] for piece in numbers["pieces"]).strip().startswith(numbers["caption"])


def test_eval_scores_it_and_convert_proves_it(
    tmp_path: Path, photo: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pycocoevalcap", reason="needs pip install 'vitrail[caption]'")
    monkeypatch.setattr(shutil, "which", lambda name: None)  # Java's scores take many seconds
    tiny_captioners.blip(tmp_path / "m")
    for i in range(4):
        (tmp_path / "data").mkdir(exist_ok=True)
        Image.effect_noise((24, 20), 20 * i + 9).convert("RGB").save(tmp_path / "data" / f"{i}.png")
        (tmp_path / "data" / f"{i}.txt").write_text(f"a dog runs\nnoise {i}\n")
    capsys.readouterr()
    data = ["--data", str(tmp_path / "data"), "--split", "train", "--device", "cpu", "--json"]
    assert main(["eval", str(tmp_path / "m"), *data]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["cider"] >= 0 and row["count"] >= 3 and 0 < row["distinct"] <= 1
    args = ["convert", str(tmp_path / "m"), str(tmp_path / "own"), "--verify", "--json"]
    assert main(args) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["task"] == "caption" and row["differences"]["tokens"]["relative"] < 1e-6
    assert main(["predict", str(photo), "--model", str(tmp_path / "own"), "--device", "cpu"]) == 0


def test_the_makers_decoding_is_kept(tmp_path: Path) -> None:
    tiny_captioners.vit_gpt2(tmp_path / "m")
    chosen = {
        "num_beams": 4,
        "max_length": 12,
        "no_repeat_ngram_size": 2,
        "length_penalty": 0.5,
        "eos_token_id": [0, 5],
    }
    (tmp_path / "m" / "generation_config.json").write_text(json.dumps({"decoder_start_token_id": 0, **chosen}))
    task = vitrail.load(str(tmp_path / "m"))
    assert isinstance(task, HubCaption)
    assert task.option == Decoding(beam=4, length_penalty=0.5, no_repeat_ngram_size=2, max_length=12)


def test_from_the_hub_and_then_without_it(server: Hub, images: torch.Tensor, tmp_path: Path) -> None:
    model = tiny_captioners.vit_gpt2(tmp_path / "m")
    server.repositories["some/captioner"] = {"main": tmp_path / "m"}
    task = vitrail.load("some/captioner")
    assert isinstance(task, HubCaption)
    rows = words(task, images)
    assert any(path.endswith("/tokenizer.json") for path in server.requests)
    server.status = 503
    again = vitrail.load("some/captioner")
    assert isinstance(again, HubCaption) and words(again, images) == rows
    assert rows[0] == model.generate(pixel_values=images[:1], max_new_tokens=15, do_sample=False)[0, 1:].tolist()


def test_an_older_folder_whose_tokenizer_is_in_two_files(tmp_path: Path, images: torch.Tensor) -> None:
    tiny_captioners.vit_gpt2(tmp_path / "m")
    content = json.loads((tmp_path / "m" / "tokenizer.json").read_text())["model"]
    (tmp_path / "m" / "tokenizer.json").rename(tmp_path / "kept.json")
    (tmp_path / "m" / "vocab.json").write_text(json.dumps(content["vocab"]))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in content["merges"]]
    (tmp_path / "m" / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (tmp_path / "m" / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    task = loaded(tmp_path / "m")
    assert task.predict([Image.new("RGB", (20, 20))])[0].row()["captions"]  # a caption, whatever it says
    assert task.tokenizer.encode("a dog runs") == [
        i + OWN for i in tiny_captioners.byte_pairs().encode("a dog runs").ids
    ]


def wrong_type(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "architectures": ["BlipForQuestionAnswering"]}))


def wrong_width(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    values["decoder"]["n_embd"] = 32
    (folder / "config.json").write_text(json.dumps(values))


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def other_tokenizer(folder: Path) -> None:
    values = json.loads((folder / "tokenizer.json").read_text())
    values["model"]["vocab"] |= {f"more{i}": 320 + i for i in range(9)}
    (folder / "tokenizer.json").write_text(json.dumps(values))


def few_words(folder: Path) -> None:
    small = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    (folder / "tokenizer.json").write_text(small.to_str())


def no_end(folder: Path) -> None:
    values = json.loads((folder / "tokenizer.json").read_text())
    values["added_tokens"], vocabulary = [], values["model"]["vocab"]
    vocabulary[next(word for word, i in vocabulary.items() if i == 0)] = 319 + 1
    values["model"]["vocab"] = {word: i for word, i in vocabulary.items() if i < 320}
    (folder / "tokenizer.json").write_text(json.dumps(values))


def fewer_weights(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["decoder.transformer.h.0.mlp.c_fc.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "damage, says",
    [
        (wrong_type, "BlipForQuestionAnswering, which does not generate captions"),
        (wrong_width, "lacks|cannot be loaded"),
        (no_tokenizer, "has no readable tokenizer"),
        (other_tokenizer, "/m: the tokenizer has 329 words but its model 320"),
        (few_words, "/m: the tokenizer has 2 words but its model 320"),
        (no_end, "/m: the tokenizer has no word 0, which is the end token of its model"),
        (fewer_weights, "lacks decoder.transformer.h.0.mlp.c_fc.weight"),
    ],
)
def test_damage_is_one_plain_line(damage: Callable[[Path], None], says: str, tmp_path: Path) -> None:
    tiny_captioners.vit_gpt2(tmp_path / "m")
    damage(tmp_path / "m")
    with pytest.raises(UserError, match=says) as raised:
        vitrail.load(str(tmp_path / "m"))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("more", [0, 9])
def test_a_tokenizer_of_another_checkpoint_is_refused(more: int, tmp_path: Path) -> None:
    tiny_captioners.vit_gpt2(tmp_path / "m")
    vitrail.load(str(tmp_path / "m")).save(tmp_path / "own")
    file = tmp_path / "own" / "tokenizer.json"
    values = json.loads(file.read_text())
    words = sorted(values["model"]["vocab"], key=values["model"]["vocab"].get)
    turned = {word: i for i, word in enumerate([*words[:-2], words[-1], words[-2]])}
    values["model"]["vocab"] = turned | {f"more{i}": 320 + i for i in range(more)}
    file.write_text(json.dumps(values))
    with pytest.raises(UserError, match="own/tokenizer.json") as raised:
        vitrail.load(str(tmp_path / "own"))
    assert ("belongs to another checkpoint", "329 words but its model 320")[more > 0] in str(raised.value)


def test_a_checkpoint_that_asks_for_more_than_it_holds_gets_no_memory(tmp_path: Path) -> None:
    tiny_captioners.git(tmp_path / "m")
    vitrail.load(str(tmp_path / "m")).save(tmp_path / "own")
    config = json.loads((tmp_path / "own" / "config.json").read_text())
    config["transformers"]["intermediate_size"] = 1 << 40
    (tmp_path / "own" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="weights|contradict|does not describe"):
        vitrail.load(tmp_path / "own")


def test_without_transformers_a_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_captioners.git(tmp_path / "m")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install 'vitrail\[caption\]'"):
        vitrail.load(str(tmp_path / "m"))


def test_it_does_not_train(pair: tuple[Any, Path], images: torch.Tensor) -> None:
    with pytest.raises(UserError, match="cannot be trained"):
        vitrail.load(str(pair[1])).loss({"image": images})
    with pytest.raises(UserError, match="no encoder"):
        vitrail.load(str(pair[1]), channels=4)


@pytest.mark.parametrize(
    "tokens, height, width, grid",
    [
        (197, 224, 224, (14, 14)),
        (49, 224, 224, (7, 7)),
        (261, 224, 224, (16, 16)),
        (25, 32, 48, (4, 6)),
        (1, 8, 8, (1, 1)),
    ],
)
def test_the_grid_of_so_many_tokens(tokens: int, height: int, width: int, grid: tuple[int, int]) -> None:
    assert grid_of(tokens, height, width) == grid


def test_a_language_model_is_told_from_others(tmp_path: Path) -> None:
    tiny_captioners.git(tmp_path / "git")
    with pytest.raises(UserError, match="not a causal language model"):
        captioners.language_model(str(tmp_path / "git"))
    vitrail.create("nano/2").save(tmp_path / "vit")
    with pytest.raises(UserError, match="not a causal language model"):
        captioners.language_model(str(tmp_path / "vit"))
    with pytest.raises(UserError, match="no model"):
        captioners.language_model(str(tmp_path / "nothing"))


def test_nothing_is_printed_where_nothing_is_wrong(
    pair: tuple[Any, Path], capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        vitrail.load(str(pair[1]))
    assert capfd.readouterr() == ("", "") and not caplog.records

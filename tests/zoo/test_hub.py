"""Hub ids, against a server on this machine that answers as the Hub does."""

from __future__ import annotations

import json
import shutil
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from local_hub import Hub, commit_of
from safetensors.torch import load_file, save_file

import vitrail
from vitrail.cli import main
from vitrail.errors import UserError
from vitrail.zoo import convert, hub


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small models in the layouts that the Hub has."""
    folder = tmp_path_factory.mktemp("models")
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = vitrail.create("nano/2", classes=["cat", "dog"], width=16, depth=1, heads=2, activation="gelu_tanh")
        torch.nn.init.normal_(model.get_parameter("head.linear.weight"))
        model.save(folder / f"vitrail-{seed}")
    for to in ("timm", "hf", "google"):
        convert(folder / "vitrail-0", folder / to, to)
    return folder


def answers(source: str | Path, **options: Any) -> torch.Tensor:
    images = torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)
    with torch.inference_mode():
        return vitrail.load(source, **options)(images)


@pytest.mark.parametrize("layout", ["timm", "hf", "google", "vitrail-0"])
def test_every_layout_comes_from_the_hub_once(layout: str, server: Hub, models: Path) -> None:
    server.repositories["some/vit"] = {"main": models / layout}
    torch.testing.assert_close(answers("some/vit"), answers(models / "vitrail-0"), rtol=1e-4, atol=1e-5)
    assert vitrail.load("some/vit").classes == (["0", "1"] if layout == "google" else ["cat", "dog"])
    fetched = [line for line in server.requests if line.startswith("GET") and "/resolve/" in line]
    assert len(fetched) == len(set(fetched)) == len(list((models / layout).iterdir()))


@pytest.mark.parametrize("scheme", ["hf-hub:", "hf_hub:"])
def test_an_id_as_timm_writes_it(
    scheme: str, server: Hub, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It means the Hub, also where a folder has the owner's name."""
    server.repositories["some/vit"] = {"main": models / "timm", "v2": models / "vitrail-1"}
    (tmp_path / "some").mkdir()
    monkeypatch.chdir(tmp_path)
    torch.testing.assert_close(answers(f"{scheme}some/vit"), answers(models / "vitrail-0"), rtol=1e-4, atol=1e-5)
    assert torch.equal(answers(f"{scheme}some/vit", revision="v2"), answers(models / "vitrail-1"))
    assert torch.equal(answers(f"local-dir:{models / 'timm'}"), answers(models / "timm"))
    with pytest.raises(UserError, match="hf-hub:OWNER/NAME"):
        vitrail.load(f"{scheme}vit_base_patch16_224")


@pytest.mark.parametrize("name", ["vit_base_patch16_224", "vit_base_patch16_224.augreg_in21k"])
def test_timms_names_get_a_line_that_helps(name: str) -> None:
    with pytest.raises(UserError, match="timm/NAME.TAG"):
        vitrail.load(name)


def test_revisions(server: Hub, models: Path) -> None:
    first, second = models / "vitrail-0", models / "vitrail-1"
    server.repositories["some/vit"] = {"main": first, "v2": second}
    assert torch.equal(answers("some/vit"), answers(first))
    for how in ({"revision": "v2"}, {"revision": commit_of(second)}):
        assert torch.equal(answers("some/vit", **how), answers(second))
    assert torch.equal(answers("some/vit@v2"), answers(second))
    with pytest.raises(UserError, match="no revision 'v9'"):
        vitrail.load("some/vit", revision="v9")


def test_a_push_between_two_files_mixes_no_versions(server: Hub, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.repositories["some/vit"] = {"main": models / "vitrail-0", "old": models / "vitrail-0"}
    get = hub.Repository.get

    def pushed(self: hub.Repository, file: str) -> Path | None:
        found = get(self, file)
        server.repositories["some/vit"]["main"] = models / "vitrail-1"
        return found

    monkeypatch.setattr(hub.Repository, "get", pushed)
    assert torch.equal(answers("some/vit"), answers(models / "vitrail-0"))


def test_private_ones_want_a_token(server: Hub, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.repositories["some/secret"] = {"main": models / "hf"}
    server.token["some/secret"] = "hf_sesame"
    with pytest.raises(UserError, match="or a private one: check the name, or log in"):
        vitrail.load("some/secret")
    monkeypatch.setenv("HF_TOKEN", "hf_sesame")
    assert vitrail.load("some/secret").classes == ["cat", "dog"]


def test_shards_and_single_files(server: Hub, models: Path, tmp_path: Path) -> None:
    weights = load_file(models / "hf" / "model.safetensors")
    folder = tmp_path / "sharded"
    shutil.copytree(models / "hf", folder)
    (folder / "model.safetensors").unlink()
    places = {name: f"model-{i % 3}.safetensors" for i, name in enumerate(weights)}
    for place in set(places.values()):
        save_file({name: weights[name] for name in weights if places[name] == place}, folder / place)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    server.repositories["some/shards"] = {"main": folder}
    torch.testing.assert_close(answers("some/shards"), answers(models / "vitrail-0"), rtol=1e-4, atol=1e-5)

    (folder / "model-1.safetensors").unlink()
    server.repositories["some/gap"] = {"main": folder}
    with pytest.raises(UserError, match=r"names 'model-1.safetensors', which is not in the repository"):
        vitrail.load("some/gap")

    (tmp_path / "two").mkdir()
    for name in ("a.npz", "b.npz"):
        np.savez(tmp_path / "two" / name, x=np.zeros(3))
    server.repositories["some/two"] = {"main": tmp_path / "two"}
    with pytest.raises(UserError, match=r"2 checkpoints \(a.npz, b.npz\): download one file"):
        vitrail.load("some/two")
    (tmp_path / "none").mkdir()
    server.repositories["some/none"] = {"main": tmp_path / "none"}
    with pytest.raises(UserError, match="no weights that vitrail reads"):
        vitrail.load("some/none")


@pytest.mark.parametrize(
    "prepare, words",
    [
        ({}, "some/vit is not a local file or folder, and the Hub has no model some/vit"),
        ({"gated": {"some/vit"}}, "some/vit is gated: accept its terms"),
        ({"status": 500}, "the Hub cannot be reached and it is not in the cache"),
        ({"status": 429}, "the Hub cannot be reached and it is not in the cache"),
        ({"silent": True}, "the Hub cannot be reached and it is not in the cache"),
    ],
)
def test_what_cannot_be_had_is_one_line_at_once(
    prepare: dict[str, Any],
    words: str,
    server: Hub,
    models: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name, value in prepare.items():
        setattr(server, name, value)
    if server.silent:
        server.fall_silent(monkeypatch)
    if "gated" in prepare:
        server.repositories["some/vit"] = {"main": models / "hf"}
    assert main(["convert", "some/vit", "out"]) == 2
    said = capsys.readouterr()
    assert (
        said.out == "" and words in said.err and said.err.startswith("vitrail: some/vit") and said.err.count("\n") == 1
    )
    assert not Path("out").exists()
    if "cannot be reached" in words:  # huggingface_hub alone would try again for minutes
        assert server.requests == ["HEAD /some/vit/resolve/main/config.json"]


def test_a_closed_port_and_a_name_that_no_hub_allows(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:  # bound and not listening: nobody answers there
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        waits: list[float] = []
        monkeypatch.setattr(time, "sleep", waits.append)
        with pytest.raises(UserError, match="cannot be reached"):
            vitrail.load("some/vit")
        assert waits == []  # before another try
    with pytest.raises(UserError, match="the Hub does not allow the name some/a--b"):
        vitrail.load("some/a--b")
    assert server.requests == []


def test_the_cache_answers_where_the_hub_does_not(
    server: Hub, models: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server.repositories["some/vit"] = {"main": models / "hf"}
    before = answers("some/vit")
    server.fall_silent(monkeypatch)
    assert torch.equal(answers("some/vit"), before)
    assert caplog.text.count("some/vit comes from the cache") == 1
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    server.requests.clear()
    assert torch.equal(answers("some/vit"), before) and server.requests == []
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        vitrail.load("some/other")


def test_a_command_reads_from_the_hub_and_a_path_wins(
    server: Hub, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.repositories["some/vit"] = {"main": models / "vitrail-0", "v2": models / "vitrail-1"}
    assert main(["convert", "some/vit", "out", "--to", "timm", "--revision", "v2", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["out"] == "out" and row["to"] == "timm" and row["classes"] == 2
    torch.testing.assert_close(answers("out"), answers(models / "vitrail-1"), rtol=1e-4, atol=1e-5)
    shutil.copytree(models / "vitrail-1", tmp_path / "some" / "vit")
    assert torch.equal(answers("some/vit"), answers(models / "vitrail-1"))

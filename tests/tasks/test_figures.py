"""Figures of answers: readable below images of any shape, whatever the text."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from vitrail.tasks.figures import MAX_LINES, Page, with_bars, with_text

WHITE = (255, 255, 255)


def ink(figure: Image.Image, top: int) -> np.ndarray:
    """Where anything is drawn below a row."""
    return np.asarray((np.asarray(figure)[top:] < 200).any(axis=2))


@pytest.mark.parametrize("size", [(8, 8), (1, 1), (640, 480), (1600, 4), (4, 1600), (300, 900)])
@pytest.mark.parametrize("text", ["a dog", "a dog runs on the grass and " * 9, "x" * 3000, "", "שלום עולם ключ"])
def test_text_stays_inside_its_margins(size: tuple[int, int], text: str) -> None:
    image = Image.new("RGB", size, "red")
    page, figure = Page(image, text), with_text(image, text)
    assert figure.width >= 360 and figure.getpixel((figure.width // 2, page.image.height // 2)) == (255, 0, 0)
    drawn = ink(figure, page.image.height)
    assert drawn.any() == bool(text)
    assert not drawn[:, : page.margin - 2].any() and not drawn[:, -page.margin + 2 :].any()
    assert not drawn[: page.margin // 2].any() and not drawn[-page.margin // 2 :].any()
    assert len(drawn) <= MAX_LINES * page.line + 2 * page.margin


def test_small_images_are_enlarged_without_blur() -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    figure = np.asarray(with_text(Image.fromarray(pixels), "noise"))
    assert (
        np.array_equal(figure[:360:45, :360:45], pixels) and len(np.unique(figure[:360].reshape(-1, 3), axis=0)) == 64
    )


def test_bars_are_as_long_as_their_shares() -> None:
    image = Image.new("RGB", (400, 100), "red")
    figure = np.asarray(with_bars(image, [("cat", 0.5), ("a very long name of a class " * 5, 0.25), ("none", 0.0)]))
    lengths = []
    for colour in ("#2563a8", "#9db8d9", "#eef0f4"):
        rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        lengths.append((figure == rgb).all(axis=2).sum(axis=1).max())
    first, second, whole = lengths
    assert first == pytest.approx(whole / 2, abs=2) and second == pytest.approx(whole / 4, abs=2) and whole > 60

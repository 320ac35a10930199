"""Draw the README's picture from the weights in the package: python docs/pictures.py."""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image

import vitrail
from vitrail.explain.attention import attention_maps, encoder_of, rollout
from vitrail.explain.pictures import png
from vitrail.files import write_whole
from vitrail.vit import ViT

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = ROOT / "src" / "vitrail" / "zoo" / "samples"


def main() -> None:
    task = vitrail.load("classify")
    encoder: ViT = encoder_of(task)
    paths = sorted(SAMPLES.glob("*.png"))
    figure = Figure(figsize=(1.35 * len(paths), 3.2), layout="compressed")
    axes = figure.subplots(2, len(paths))
    for column, path in enumerate(paths):
        picture = Image.open(path)
        images = task.preprocess(picture)[None]
        with torch.inference_mode():
            grid = task.features(images).grid
            heat = rollout(attention_maps(task, images), encoder.prefix_tokens, encoder.config.pool)[0].view(grid)
        best = task.predict([picture])[0].labels[0]
        heat = (heat - heat.min()) / (heat.max() - heat.min())
        heat = torch.nn.functional.interpolate(heat[None, None], size=(32, 32), mode="bilinear")[0, 0]
        pixels = torch.from_numpy(task.preprocess.fit(picture).permute(1, 2, 0).numpy() / 255)
        axes[0, column].imshow(pixels)
        axes[1, column].imshow(pixels * (0.12 + 0.88 * heat[..., None]))
        axes[1, column].set_title(f"{best['label']} {best['score']:.0%}", fontsize=9)
        for row in range(2):
            axes[row, column].set_axis_off()
    write_whole(ROOT / "docs" / "rollout.png", png(figure, dpi=110))


if __name__ == "__main__":
    main()

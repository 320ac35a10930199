"""`vitrail explain`: how a model comes to its answer for an image."""

from __future__ import annotations

from collections.abc import Sequence

from vitrail.commands.source import load_model
from vitrail.errors import UserError
from vitrail.options import SOURCE, VERIFY, Parser, path


def explain(args: Sequence[str]) -> int:
    """Show how a model comes to its answer for an image: `vitrail explain IMAGE [--model SOURCE] --out DIR`."""
    parser = Parser("explain", explain)
    parser.add_argument("image", type=path, nargs="+", help="one image")
    parser.add_argument("--model", default="classify", help=SOURCE)
    parser.add_revision()
    parser.add_merge()
    parser.add_argument("--verify", action="store_true", help=VERIFY)
    parser.add_argument("--beside", type=path, help="another image, whose patches are compared with the first one's")
    parser.add_argument("--near", type=path, help="folder in which the most similar images are found")
    parser.add_argument("--out", type=path, required=True, help="folder for the page, the figures and the arrays")
    options = parser.parse_args(args)
    image = options.image[0]
    if len(options.image) > 1:
        raise UserError(f"explain draws one image, got {len(options.image)}: name one of them")
    for named in (image, options.beside):
        if named is not None and named.is_dir():
            raise UserError(f"{named} is a folder, and explain draws one image: name a file in it")
    if options.near is not None and not options.near.is_dir():
        raise UserError(f"--near {options.near} is not a folder: name one that holds images")
    from vitrail.data.sources import images_of
    from vitrail.explain.command import explain as write
    from vitrail.explain.command import refuse_out

    refuse_out(options.out)  # before the model is loaded
    gallery = [] if options.near is None else images_of([options.near])
    task = load_model(options.model, options.device, options.revision, options.verify, options.merge)
    written = write(task, image, options.out, options.beside, gallery)
    print(f"{image}: {' '.join(written['text'].split())}")
    print(written["files"]["index.html"])
    return 0

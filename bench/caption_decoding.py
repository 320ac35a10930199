"""Caption decoding with a key-value cache against decoding without one.

    python bench/caption_decoding.py --model RUN --data flickr8k

Speed: beam 5 for batches of 16 images and of one, each encoded once before the clock starts, at 20 and 60 words, on
one thread and on two (a step with a cache is so small that a second thread hardly helps). The decoder has the size of
the model's, room for 60 words, and random weights that make the end token so unlikely that every caption has its full
length; the two ways alternate. Agreement: the model's own captions of the validation images, beam 5, both ways in
float32. Latency: one image from pixels to caption, greedy, beam 5 and with the checkpoint's settings.
Without --model it uses a model of the recipe caption-vit with random weights, without --data noise. `--tiny` uses a
small model, a few images and a few words. The exit code is 1 if the two ways choose different captions.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from harness import Parser, Row, in_turns, record, seconds
from torch import Tensor

import vitrail
from vitrail.data.captions import open_captions
from vitrail.data.text import END, Tokenizer
from vitrail.recipes import find
from vitrail.tasks.caption import Caption, Captioning, Decoding
from vitrail.tasks.caption.components import NextWords
from vitrail.tasks.caption.decoders import Decoder, Memory, WordDecoder, decoder_for
from vitrail.tasks.caption.search import Generated, generate
from vitrail.tasks.encoder import encoder_for, pooled_width, token_width
from vitrail.train.build import preparation
from vitrail.vit import ViTConfig

TIE = 1e-5
"""different captions are equally good if their scores differ by no more than this"""
MAX_LENGTH = 64


def parser() -> Parser:
    parser = Parser(__doc__, images=4, rounds=1, threads=[1], batches=(2, 1), lengths=(3, 6))
    parser.set_defaults(batches=(16, 1), lengths=(20, 60))
    parser.add_argument("--model", help="a captioner of vitrail; random weights if left out")
    parser.add_argument("--data", help="a captioned set with a validation split; noise if left out")
    parser.add_argument("--images", type=int, default=1000, help="images of the validation split to compare on")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="the last one for latency and agreement")
    return parser


@torch.inference_mode()
def main() -> int:
    args = parser().parse_args()
    torch.manual_seed(0)
    task = vitrail.load(args.model) if args.model else fresh(args.tiny)
    assert isinstance(task, Caption)
    images = images_of(args.data, args.images, task)
    rows: Row = {
        "threads": args.threads,
        "parameters": sum(p.numel() for p in task.parameters()),
        "vocabulary": task.tokenizer.size,
        "images": len(images),
        "trained": args.model is not None,
    }
    decoder = endless(task, task.tokenizer.size)
    for threads in args.threads:
        torch.set_num_threads(threads)
        for batch in args.batches:
            memory = task.memory(torch.stack([task.preprocess(image) for image in images[:batch]]))
            for words in args.lengths:
                name = f"batch {batch}, {words} words, {threads} threads"
                rows[name] = speeds(decoder, memory, words, args.rounds)
                print(name, rows[name], flush=True)
    rows["agreement"] = agree(task, images)
    rows["latency"] = latency(task, images[:50])
    print(rows["agreement"], rows["latency"], flush=True)
    record("caption-decoding", rows, args.results)
    return int(any(row["other"] for row in rows.values() if isinstance(row, dict) and "other" in row))


def images_of(data: str | None, count: int, task: Caption) -> list[Tensor]:
    """The first images of a set's validation split, or at most 64 of noise."""
    if data is None:
        return [torch.randint(0, 256, (3, 160, 160), dtype=torch.uint8) for _ in range(min(count, 64))]
    val = open_captions(data).val
    assert val is not None, "the data has no validation split"
    return [val.image(i, task.preprocess.channels) for i in range(min(count, len(val)))]


def fresh(tiny: bool) -> Caption:
    """The model of the recipe caption-vit with random weights."""
    run = find("caption-vit")(6000)
    assert isinstance(run.task, Captioning) and isinstance(run.model, ViTConfig)
    task, model = run.task, run.model
    if tiny:
        task = replace(task, decoder_width=32, decoder_heads=2, decoder_depth=1, vocabulary_size=400)
        model = replace(model, width=32, heads=2, depth=1, stem=(4, 8), patch=16, image_size=(32, 32))
    texts = [f"{number * 2654435761 % 2**32:08x}" for number in range(4000)]
    tokenizer = Tokenizer.train(texts, "bpe", task.vocabulary_size)
    return Caption(encoder_for(model), task, tokenizer, preparation(replace(run, model=model, early_size=None))).eval()


def endless(task: Caption, vocabulary: int) -> Decoder:
    """A decoder of the same size that hardly ever ends a caption."""
    config = replace(task.captioning, most_words=MAX_LENGTH)
    widths = token_width(task.encoder.config), pooled_width(task.encoder.config)
    decoder = decoder_for(config, vocabulary, *widths).eval()
    assert isinstance(decoder, WordDecoder)
    with torch.no_grad():
        decoder.bias[END] = -20.0
    return decoder


def written(decoder: Decoder, memory: Memory, how: Decoding, cache: bool) -> Generated:
    """Captions decoded with a cache, or by processing all words so far in each step."""
    images = len(memory.tokens)
    samples = torch.arange(images)

    def without_cache(words: Tensor, rows: Tensor | None, state: Tensor) -> tuple[Tensor, None, Tensor]:
        state = torch.cat([state if rows is None else state[rows], words[:, None]], dim=1)
        last = torch.zeros(state.shape, dtype=torch.bool).view(images, -1, state.shape[1])
        last[..., -1] = True
        return decoder(state.view(last.shape), memory, counted=last), None, state

    if cache:
        return generate(NextWords(decoder), decoder(memory=memory), how, samples)
    return generate(without_cache, torch.zeros(images, 0, dtype=torch.int64), how, samples)


def speeds(decoder: Decoder, memory: Memory, words: int, rounds: int) -> Row:
    """Median seconds of both ways, which alternate."""
    how = Decoding(beam=5, max_length=words)
    captions: dict[str, Generated] = {}

    def step(way: str) -> None:
        captions[way] = written(decoder, memory, how, way == "with")

    times = in_turns({way: partial(step, way) for way in ("with", "without")}, rounds)
    assert captions["with"].words.shape[2] == words
    ratios = [slow / fast for slow, fast in zip(times["without"], times["with"], strict=True)]
    return {
        **{way: round(statistics.median(readings), 4) for way, readings in times.items()},
        "times as fast": round(statistics.median(ratios), 2),
        "from": round(min(ratios), 2),
        "to": round(max(ratios), 2),
        **agreement(captions["with"], captions["without"]),
    }


def agreement(a: Generated, b: Generated) -> dict[str, int]:
    """Numbers of images whose best captions are the same both ways, equally good, or different."""
    length = max(a.words.shape[2], b.words.shape[2])
    rows = [torch.nn.functional.pad(w.words[:, 0], (0, length - w.words.shape[2])) for w in (a, b)]
    same = (rows[0] == rows[1]).all(dim=1)
    tie = ~same & ((a.score[:, 0] - b.score[:, 0]).abs() <= TIE)
    return {"same": int(same.sum()), "ties": int(tie.sum()), "other": int((~same & ~tie).sum())}


def agree(task: Caption, inputs: list[Tensor]) -> dict[str, int]:
    """`agreement` over many images, 16 at a time, encoded once for both ways."""
    limit = task.decoder.within_limit(task.option.max_length)
    how = replace(task.option, beam=5, sample=False, max_length=limit)
    totals = {"same": 0, "ties": 0, "other": 0}
    for start in range(0, len(inputs), 16):
        images = torch.stack([task.preprocess(image) for image in inputs[start : start + 16]])
        memory = task.memory(images)
        found = agreement(*(written(task.decoder, memory, how, cache) for cache in (True, False)))
        totals = {name: totals[name] + found[name] for name in totals}
    return totals


def latency(task: Caption, images: list[Tensor]) -> Row:
    """Milliseconds from one image's pixels to its caption."""
    own = task.option
    rows = {}
    for name, how in (("greedy", replace(own, beam=1)), ("beam 5", replace(own, beam=5)), ("as its checkpoint", own)):
        with decoding(task, how):
            for image in images[:3]:
                task.predict([image])
            times = sorted(1000 * seconds(partial(task.predict, [image])) for image in images)
        rows[name] = {
            "median": round(statistics.median(times), 1),
            "of ten, the slowest": round(times[len(times) * 9 // 10], 1),
        }
    return rows


@contextmanager
def decoding(task: Caption, how: Decoding) -> Iterator[None]:
    """Sets how the task decodes inside the block."""
    own, task.option = task.option, how
    try:
        yield
    finally:
        task.option = own


if __name__ == "__main__":
    sys.exit(main())

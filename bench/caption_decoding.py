"""Captions written with a cache against the same without: python bench/caption_decoding.py --model RUN --data flickr8k.

Speed: beam 5 for batches of 16 pictures and of one, each encoded once before the clock starts, at 20 and 60 words, on
one thread and on two (a step with a cache is so small that the second one hardly helps it). The decoder has the sizes
of the model's, room for 60 words, and fresh weights, whose end is made so unlikely that every caption has its full
length; the two ways take turns. Agreement: the model's own captions of the validation pictures, beam 5, by both ways in
float32. Latency: one picture from pixels to caption, greedy, beam 5 and as its checkpoint says.
Without --model a model of the recipe caption-vit with fresh weights stands in; without --data noise does.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace
from typing import Any

import torch
from record import record
from torch import Tensor

import vitrail
from vitrail.data.captions import open_captions
from vitrail.data.text import END, Tokenizer
from vitrail.recipes import find
from vitrail.tasks.caption import Caption, Captioning, decoder_for
from vitrail.tasks.decoders import Decoder, Memory
from vitrail.tasks.encoder import encoder_for, pooled_width, token_width
from vitrail.tasks.search import Decoding, Written, write
from vitrail.train.build import preparation

TIE = 1e-5
"""captions that differ, with scores no further apart than this, are as good as each other"""
LONGEST = 64


def fresh() -> Caption:
    """The model of the recipe caption-vit, with weights that nobody trained."""
    run = find("caption-vit")(6000)
    assert isinstance(run.task, Captioning)
    texts = [f"{number * 2654435761 % 2**32:08x}" for number in range(4000)]
    tokenizer = Tokenizer.train(texts, "bpe", run.task.vocabulary_size)
    return Caption(encoder_for(run.model), run.task, tokenizer, preparation(run)).eval()


def endless(task: Caption, vocabulary: int) -> Decoder:
    """A decoder of the same sizes that goes on writing."""
    config = replace(task.captioning, most_words=LONGEST)
    widths = token_width(task.encoder.config), pooled_width(task.encoder.config)
    decoder = decoder_for(config, vocabulary, *widths).eval()
    with torch.no_grad():
        decoder.bias[END] = -20.0
    return decoder


def speeds(decoder: Decoder, memory: Memory, words: int, rounds: int) -> dict[str, Any]:
    """Median seconds of both ways, taking turns."""
    how, samples = Decoding(beam=5, longest=words), torch.arange(len(memory.tokens))
    seconds: dict[bool, list[float]] = {True: [], False: []}
    made: dict[bool, Written] = {}
    for turn in range(rounds + 1):
        for cache in (True, False):
            began = time.perf_counter()
            made[cache] = write(decoder, memory, how, samples, cache)
            if turn:  # the first warms up
                seconds[cache].append(time.perf_counter() - began)
    assert made[True].words.shape[2] == words
    ratios = [slow / fast for slow, fast in zip(seconds[False], seconds[True], strict=True)]
    return {
        "with": round(statistics.median(seconds[True]), 4),
        "without": round(statistics.median(seconds[False]), 4),
        "times as fast": round(statistics.median(ratios), 2),
        "from": round(min(ratios), 2),
        "to": round(max(ratios), 2),
        **agreement(made[True], made[False]),
    }


def agreement(a: Written, b: Written) -> dict[str, int]:
    """Pictures with the same best caption by both ways, with one as good, and with another."""
    length = max(a.words.shape[2], b.words.shape[2])
    rows = [torch.nn.functional.pad(w.words[:, 0], (0, length - w.words.shape[2])) for w in (a, b)]
    same = (rows[0] == rows[1]).all(dim=1)
    tie = ~same & ((a.score[:, 0] - b.score[:, 0]).abs() <= TIE)
    return {"same": int(same.sum()), "ties": int(tie.sum()), "other": int((~same & ~tie).sum())}


def agree(task: Caption, pictures: list[Tensor]) -> dict[str, int]:
    """The same over many pictures, 16 at a time, encoded once for both ways."""
    how, totals = replace(task.decoding, beam=5, sample=False), {"same": 0, "ties": 0, "other": 0}
    for start in range(0, len(pictures), 16):
        images = torch.stack([task.preprocess(picture) for picture in pictures[start : start + 16]])
        memory, samples = task.memory(images), torch.arange(len(images))
        found = agreement(*(write(task.decoder, memory, how, samples, cache) for cache in (True, False)))
        totals = {name: totals[name] + found[name] for name in totals}
    return totals


def latency(task: Caption, pictures: list[Tensor]) -> dict[str, Any]:
    """Milliseconds from one picture's pixels to its caption."""
    own = task.decoding
    rows = {}
    for name, how in (("greedy", replace(own, beam=1)), ("beam 5", replace(own, beam=5)), ("as its checkpoint", own)):
        task.decoding = how
        times = []
        for picture in [*pictures[:3], *pictures]:
            began = time.perf_counter()
            task.predict([picture])
            times.append(1000 * (time.perf_counter() - began))
        times = sorted(times[3:])
        rows[name] = {
            "median": round(statistics.median(times), 1),
            "of ten, the slowest": round(times[len(times) * 9 // 10], 1),
        }
    task.decoding = own
    return rows


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a captioner of vitrail; fresh weights if left out")
    parser.add_argument("--data", help="a captioned set with a validation part; noise if left out")
    parser.add_argument("--pictures", type=int, default=1000, help="of the validation part, to compare captions of")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="the last one for latency and agreement")
    options = parser.parse_args()
    torch.manual_seed(0)
    task = vitrail.load(options.model) if options.model else fresh()
    assert isinstance(task, Caption)
    if options.data:
        part = open_captions(options.data).val
        assert part is not None, "the data has no validation part"
        pictures = [part.picture(i, task.preprocess.channels) for i in range(min(options.pictures, len(part)))]
    else:
        pictures = [torch.randint(0, 256, (3, 160, 160), dtype=torch.uint8) for _ in range(min(options.pictures, 64))]
    rows: dict[str, Any] = {
        "threads": options.threads,
        "parameters": sum(p.numel() for p in task.parameters()),
        "vocabulary": task.tokenizer.size,
        "pictures": len(pictures),
        "trained": options.model is not None,
    }
    decoder = endless(task, task.tokenizer.size)
    for threads in options.threads:
        torch.set_num_threads(threads)
        for batch in (16, 1):
            memory = task.memory(torch.stack([task.preprocess(picture) for picture in pictures[:batch]]))
            for words in (20, 60):
                name = f"batch {batch}, {words} words, {threads} threads"
                rows[name] = speeds(decoder, memory, words, options.rounds)
                print(name, rows[name], flush=True)
    rows["agreement"] = agree(task, pictures)
    rows["latency"] = latency(task, pictures[:50])
    print(rows["agreement"], rows["latency"], flush=True)
    record("caption-decoding", rows)


if __name__ == "__main__":
    main()

"""Tables of what was measured and what was aimed at, and of training on little data."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from table_data import Rows, command_of, read, rows_of, seeds

MEASURES: dict[str, tuple[str, str, Callable[[Rows], str]]] = {
    "digits": (
        "`digits` from scratch, test split",
        "97.5 %; each run within 2 minutes",
        lambda rows: seeds(rows),
    ),
    "cifar10-quick": (
        "`cifar10-quick` from scratch, test split",
        "80 %; each run within 30 minutes on 2 cores",
        lambda rows: seeds(rows),
    ),
    "cifar10-laptop": (
        "`cifar10-laptop` from scratch, test split",
        "87 %; each run within 30 minutes on 2 cores with bf16",
        lambda rows: seeds(rows),
    ),
    "cifar10-quick-plain": (
        "the same with a plain patch projection, without the convolutional stem",
        "none, for comparison",
        lambda rows: seeds(rows),
    ),
    "classify": (
        "bundled CIFAR-10 classifier; test split",
        "88.5 %; the recipe `cifar10` on a GPU 94 %",
        lambda rows: f"{rows['top1']:.2%} of {rows['count']:,} images",
    ),
    "training-step": (
        "training step: timm's time divided by vitrail's",
        "1, better 1.3",
        lambda rows: (
            f"bf16 {rows['bf16, best of timm / best of vitrail']:.2f}, "
            f"fp32 {rows['fp32, best of timm / best of vitrail']:.2f}"
        ),
    ),
    "loading": (
        "loading photos: vitrail's images per second divided by torchvision's",
        "1.3 (better 2) at the original size; 3 at 3,000 pixels",
        lambda rows: (
            f"{rows['as they are']['ratio_of_medians']:.2f} at the original size; "
            f"{rows['3000 pixels']['ratio_of_medians']:.2f} at 3,000 pixels"
        ),
    ),
    "shards": (
        "loading photos from tar files: images per second divided by those of their folder, 2 workers",
        "1.5 after `--resize 256`",
        lambda rows: (
            f"{rows['resized tar files / folder']:.2f} after `vitrail data shard --resize 256`, "
            f"{rows['tar files / folder']:.2f} without `--resize`"
        ),
    ),
    "folder": (
        "`vitrail train folder` on photos of ants and bees, beside timm's ViT",
        "within 10 minutes; from scratch not below timm's",
        lambda rows: (
            f"from scratch {rows['scratch mean top-1']:.1%}; from the bundled weights "
            f"{rows['weights mean top-1']:.1%}; timm's ViT {rows['timm mean top-1']:.1%}; at most "
            f"{max(rows['scratch most seconds'], rows['weights most seconds']) / 60:.1f} minutes"
        ),
    ),
    "transfer": (
        "gain of the bundled weights over training from scratch: ants and bees; CIFAR-10 at twice the image size",
        "above twice its standard error; above 0",
        lambda rows: "; ".join(_gain(rows[name]) for name in TRANSFERS if "gain" in rows.get(name, {})),
    ),
    "caption": (
        "bundled captioner, Flickr8k's validation split",
        "CIDEr 0.42, BLEU-4 0.16; with shuffled images less than a quarter of that CIDEr",
        lambda rows: (
            f"CIDEr {rows['cider']:.3f}, BLEU-4 {rows['bleu4']:.3f}; with shuffled images "
            f"CIDEr {rows['captions of other images']['cider']:.3f}"
        ),
    ),
    "caption-decoding": (
        "beam search with 5 beams: speed with a cache divided by speed without, for 20 and 60 tokens; time per caption",
        "3 and 5 times, with the same tokens; 150 ms",
        lambda rows: "; ".join(
            [
                *(
                    f"{_faster(rows, 16, n)} times in batches of 16 on {'one thread' if n == 1 else f'{n} threads'}"
                    for n in rows["threads"]
                ),
                f"{_faster(rows, 1, rows['threads'][-1])} times for one image",
                f"{rows['agreement']['same']:,} of {rows['images']:,} captions identical",
                f"{rows['latency']['as its checkpoint']['median']:.0f} ms per caption",
            ]
        ),
    ),
    "caption-match": (
        "what the bundled captioner tells of its captions, AUROC: right against swapped images by `match`; Flickr8k "
        "against other photos by the image's likeness",
        "printed",
        lambda rows: "; ".join(
            [
                f"right against swapped {rows['right_against_swapped']['match']['auroc']:.2f}",
                *(f"{name} {row['likeness']['auroc']:.2f}" for name, row in rows["against_other_photos"].items()),
            ]
        ),
    ),
    "serving": (
        "`vitrail serve` under load: images per second divided by the engine's own, and by LitServe's; with more "
        "clients than the queue takes, divided by before",
        "0.9; 1; 0.9, with no answer but 200 and 503",
        lambda rows: "; ".join(
            [
                f"{rows['model']}, {rows['settings']['clients']} clients: {rows['of_own_rate']:.2f}",
                f"{rows['of_litserve']:.2f}" if "of_litserve" in rows else "LitServe not installed",
                f"{rows['kept_with_more_clients']:.2f}" if "kept_with_more_clients" in rows else "not measured",
            ]
        ),
    ),
    "hostile": (
        "hostile requests to `vitrail serve`: mutated image files, bombs, heads, paths, and requests made up by "
        "schemathesis",
        "no status of 500 or above but 503, no crash, bounded memory",
        lambda rows: (
            f"{rows['mutated']['files']:,} files; "
            f"{sum(len(row.get('wrong', ())) for row in rows.values() if isinstance(row, dict))} wrong answers"
        ),
    ),
    "deploy": (
        "the Dockerfile's steps in a clean virtual environment: `vitrail serve` answers after",
        "60 s, after installation",
        lambda rows: f"{rows['first_answer_seconds']:.0f} s ({rows['target']})",
    ),
    "doctor": (
        "flipped labels among the first 5 % that `vitrail doctor` lists, of 2,000 images of CIFAR-10",
        "60 %, within 5 minutes of 2 cores",
        lambda rows: (
            f"{rows['flipped labels']['mean']['found']:.0%}, {rows['flipped labels']['mean']['seeds']} seeds; "
            f"{max(row.get('cpu_seconds', 0) for row in rows['flipped labels'].values()) / 60:.1f} minutes of CPU time"
        ),
    ),
    "kills": (
        "runs killed at random moments and resumed, some between a write and its rename",
        "50 kills, each run as one that nothing disturbed, to the bit",
        lambda rows: (
            f"{rows['total']['kills']} kills, {rows['total']['between write and rename']} of them between a write and "
            f"its rename; {rows['total']['identical']} of {rows['total']['runs']} runs identical"
        ),
    ),
    "checkpoints": (
        "time that saving a state every 50 steps of `cifar10-quick` adds to the training",
        "3 %",
        lambda rows: (
            f"{rows['with states / without, processor'] - 1:+.1%} of the processor's time, "
            f"{rows['with states / without, clock'] - 1:+.1%} of the clock's"
        ),
    ),
    "damaged": (
        "training on 2,000 images of which 5 % are damaged, truncated, empty or hostile, with `--max-bad 0.1`",
        "it ends, and each is named once",
        lambda rows: "; ".join(
            f"{name} {rows[name]['named once']} of {sum(rows['damaged'].values())} named once"
            for name in ("in memory", "streamed")
        ),
    ),
    "logits": (
        "largest attention logit in the first 1,000 steps",
        "100",
        lambda rows: "; ".join(f"`{name}` {max(row['largest']):.0f}" for name, row in rows.items()),
    ),
    "predict": (
        "`vitrail predict` on 2,000 photos: images per second divided by those of a plain script with timm; peak "
        "memory for 20,000 above that for 2,000",
        "2; 50 MB",
        lambda rows: (
            f"{statistics.median(rows['times as fast as timm fp32']):.1f}; "
            f"{rows['vitrail']['peak MB']['20,000'] - rows['vitrail']['peak MB']['2,000']:+.0f} MB"
        ),
    ),
    "merging": (
        "token merging in training and at inference, 256 tokens: top-1 lost on CIFAR-10's val, and speed-up",
        "0.5 points; 1.4",
        lambda rows: (
            f"{rows['mean_loss']:.2f} points"
            + (f" (standard error {rows['error_loss']:.2f})" if rows["error_loss"] is not None else " (one seed)")
            + f"; {rows['inference']['ratio']:.2f}"
        ),
    ),
    "engines": (
        "ViT-B/16 at 224 pixels: the fastest engine of vitrail's exports, its time above the fastest of all, and its "
        "speed divided by timm's eager float32",
        "at most 3 % slower; 3 with AVX512-VNNI or AMX",
        lambda rows: "; ".join(
            f"{batch}: {row['best']}, {row['slower by']:+.0%}, {row['times as fast as eager']:.1f}"
            for batch, row in rows["ratios"].items()
        ),
    ),
    "ranks": (
        "training in 2 and 4 processes, with whole weights and with `--shard`, compared with one process",
        "the same images and scores, losses within rounding",
        lambda rows: _ranks([found for case in rows.values() for found in case.values()]),
    ),
    "startup": (
        "`vitrail --help`, median time",
        "0.4 s",
        lambda rows: f"{rows['vitrail --help, median seconds']:.2f} s",
    ),
    "ray-predict": (
        "prediction by Ray for 20,000 images, 20 of them damaged, one of its workers killed midway",
        "20,000 rows, none twice, none missing",
        lambda rows: (
            f"{rows['rows']:,} rows, {rows['rows of an image that has another']} twice, "
            f"{rows['images without a row']} missing, {rows['rows with an error']} with an error"
        ),
    ),
}
"""the files that the README shows, in order: the task, the goal, and the result in words"""


def results() -> list[list[str]]:
    """What was measured, one row per file; `goals` has what was not."""
    found = {name: read(name) for name in MEASURES}
    rows = [
        [MEASURES[name][0], _result(name), f"`{command_of(own)}`"] for name, own in found.items() if own is not None
    ]
    return [["task", "score and cost", "command"], *rows]


def goals() -> list[list[str]]:
    """The results beside the goals that were set before they were measured."""
    return [["task", "goal", "result"], *([task, goal, _result(name)] for name, (task, goal, _) in MEASURES.items())]


def _result(name: str) -> str:
    """A result in words; each seed of a series names its own number of cores."""
    found = read(name)
    if found is None:
        return "not measured"
    rows = found["rows"]
    own = any("cores" in run for run in rows.get("runs", []))
    where = " (on one core)" if found["machine"]["cores"] == 1 and not own else ""
    return MEASURES[name][2](rows) + where


def _ranks(found: list[Rows]) -> str:
    """How far runs in several processes are from one, over all comparisons."""
    same = sum(each["the same images"] and each["scores of the same weights are equal"] for each in found)
    most = max(value for each in found for name, value in each.items() if "loss" in name)
    return f"the same images and scores in {same} of {len(found)} comparisons; losses differ by at most {most:.0e}"


def _faster(rows: Rows, batch: int, threads: int) -> str:
    """The speed-up from the cache at 20 and at 60 tokens."""
    found = (rows[f"batch {batch}, {words} words, {threads} threads"]["times as fast"] for words in (20, 60))
    return " and ".join(f"{times:.1f}" for times in found)


TRANSFERS: dict[str, str] = {"hymenoptera": "ants and bees", "cifar10": "CIFAR-10"}
"""data sets of results/transfer.json"""

TRANSFER_ROWS: dict[str, str] = {
    "weights_top1": "from the bundled weights",
    "scratch_top1": "from scratch",
    "gain": "gain, mean of the pairs",
    "gain_standard_error": "its standard error",
    "gain_corrected_standard_error": "its standard error, corrected for overlapping training folds",
    "least_gain": "smallest gain of a pair",
    "linear_top1": "linear probe of the bundled weights",
    "knn_top1": "k-NN with the bundled weights",
    "untouched_top1": "the bundled weights without training, at their own 32 pixels",
    "untouched_at_twice_the_size_top1": "the bundled weights without training, at 64 pixels",
}


def _gain(rows: Rows) -> str:
    """A mean gain with its standard error, or with the smallest gain of a pair."""
    error = rows.get("gain_standard_error")
    if error:
        corrected = 100 * rows["gain_corrected_standard_error"]
        spread = f"standard error {100 * error:.1f}, corrected for overlapping folds {corrected:.1f}"
    else:
        spread = f"smallest {100 * rows['least_gain']:+.1f}"
    return f"{100 * rows['gain']:+.1f} points ({spread}, {rows['pairs']} pairs)"


def transfer() -> list[list[str]]:
    """Training from the bundled weights beside training from scratch."""
    rows, found = [["data set", "budget", "measure", "result"]], read("transfer")
    for data, title in TRANSFERS.items():
        if found is None or data not in found["rows"]:
            rows.append([title, "", "not measured", ""])
            continue
        own = found["rows"][data]
        budget = own["settings"]
        given = f"{budget['size']} pixels, {budget['epochs']:g} epochs" + (
            f" of {budget['images']:,}" if budget["images"] else ""
        )
        for name, measure in TRANSFER_ROWS.items():
            if name in own:
                points = f"{100 * own[name]:.1f} points" if "gain" in name else f"{own[name]:.1%}"
                rows.append([title, given, measure, points])
                title = given = ""
    return rows


FOLDER: dict[str, str] = {
    "scratch": "`vitrail train folder`, from scratch",
    "weights": "the same with `--init classify`",
    "timm": "timm's ViT of the same width and depth, AdamW, for as long as the first row",
}
"""kinds of results/folder.json"""


def folder() -> list[list[str]]:
    """The recipe `folder` on a small folder, one column per seed."""
    found = read("folder")
    if found is None:
        return [["training", "mean"]]
    runs = found["rows"]["runs"]
    rows = [["training", "parameters", *(f"seed {run['seed']}" for run in runs), "mean", "longest run, seconds"]]
    for kind, title in FOLDER.items():
        done = [run[kind] for run in runs]
        scores = [f"{run['top1']:.1%}" for run in done]
        slowest = f"{max(run['wall_seconds'] for run in done):.0f}"
        rows.append(
            [title, f"{done[0]['parameters']:,}", *scores, f"{found['rows'][f'{kind} mean top-1']:.1%}", slowest]
        )
    return rows


def first_hour() -> list[list[str]]:
    """What is typed, printed and made in the first hour with each tool."""
    rows = [["tool", "step", "typed", "lines printed", "files", "CPU seconds"]]
    for tool, steps in (rows_of("first-hour") or {}).items():
        program = "vitrail" if tool == "vitrail" else "yolo"
        for step, row in steps.items():
            numbers = f"{row['lines']:,}", f"{row['files']:,}", f"{row['CPU seconds']:.1f}"
            rows.append([tool, step, f"<code>{program} {row['typed']}</code>", *numbers])
    return rows


def faithfulness() -> list[list[str]]:
    """Deletion and insertion of each map, and the standard error of the mean over images."""
    rows = rows_of("faithfulness") or {}
    names = {"attention": "attention of the last layer"}
    return [
        ["map", "deletion (lower is better)", "insertion (higher is better)", "difference"],
        *(
            [
                names.get(name, name),
                f"{row['deletion']:.3f}",
                f"{row['insertion']:.3f}",
                f"{row['difference']:.3f} ± {row['error']:.3f}",
            ]
            for name, row in rows.items()
        ),
    ]

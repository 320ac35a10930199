"""Words of other tools, and what vitrail calls the same thing: for the error of a flag that does not exist."""

from __future__ import annotations

from collections.abc import Collection

MEANT: dict[str, tuple[str, ...]] = {
    # length and batches
    "steps iterations iters num-steps num-iterations max-iters max-iterations total-steps train-steps": (
        "--max-steps",
    ),
    "e epoch n-epochs num-epochs num-train-epochs max-epochs nepochs": ("--epochs",),
    "b bs batch batch-sz batchsize train-batch-size per-device-train-batch-size mini-batch-size": (
        "--batch-size",
        "--max-batch",
    ),
    "batch-size max-batch-size": ("--max-batch",),
    "accum grad-accum gradient-accumulation gradient-accumulation-steps accumulate-grad-batches accum-iter": (
        "--accumulate",
    ),
    "auto-batch autobatch auto-batch-size auto-scale-batch-size auto-find-batch-size batch-size-finder": (
        "--accumulate, with the value auto",
    ),
    "patience early-stopping early-stop stop-early early-stopping-patience": (
        "--patience",
        "--epochs, and the checkpoint that is best on val is kept anyway",
    ),
    # optimizer
    "learning-rate lr0 base-lr blr max-lr peak-lr": ("--lr",),
    "opt optim": ("--optimizer",),
    "wd decay l2": ("--weight-decay",),
    "scheduler sched lr-scheduler lr-schedule lr-scheduler-type cos-lr": ("--schedule",),
    "warmup-epochs warmup-steps warmup-ratio num-warmup-steps lr-warmup": ("--warmup",),
    "min-lr lrf eta-min": ("--final",),
    "clip-grad grad-clip gradient-clip max-grad-norm clip-norm gradient-clip-val": ("--clip",),
    "model-ema ema-decay": ("--ema",),
    "layerwise-lr-decay llrd layer-lr-decay": ("--layer-decay",),
    "label-smoothing smooth": ("--smoothing",),
    # data and images
    "dataset data-dir data-path data-root train-dir train-data root datadir input": ("--data",),
    "d": ("--data",),
    "img-size imgsz imsize input-size size resolution img image-resolution crop-size": (
        "--image-size",
        "--resize",
        "--sizes",
    ),
    "in-chans num-channels in-channels": ("--channels",),
    "num-workers nw j n-workers dataloader-num-workers": ("--workers",),
    "num-classes nb-classes n-classes nc classes": ("the classes are those of the data: leave it out",),
    "augment auto-augment aa autoaugment randaug randaugment": ("--policy",),
    "random-erasing reprob re-prob": ("--erase",),
    "hflip horizontal-flip fliplr": ("--flip",),
    "class-weights weighted-loss": ("--weighted", "--class-weights"),
    "oversample weighted-sampler balance": ("--balanced",),
    "cache cache-images ram": ("--memory",),
    # models
    "pretrained weights checkpoint ckpt finetune finetune-from init-from load-from": ("--init", "--model"),
    "model m": ("--model", "--init", "name the model as the first argument"),
    "source image images file files": ("name it without a flag",),
    "arch architecture backbone encoder": ("--init",),
    "freeze freeze-backbone frozen linear-probe head-only peft lora": ("--method",),
    "drop-path-rate stochastic-depth": ("--drop-path",),
    "patch-size": ("--patch",),
    "embed-dim hidden-size dim": ("--width",),
    "num-layers layers n-layers": ("--depth",),
    "num-heads n-heads": ("--heads",),
    # device
    "gpu gpu-id cuda use-cuda accelerator no-cuda cpu dev": ("--device",),
    "gpus num-gpus devices n-gpus world-size nproc-per-node": ("--nproc", "--device"),
    "amp fp16 bf16 half mixed-precision use-amp dtype quantize quantise int8 quantization": ("--precision",),
    "torch-compile jit": ("--compile",),
    "fsdp": ("--shard",),
    # the run and its output
    "o output output-dir out-dir save-dir project log-dir logdir name run-name exp-name experiment save": ("--out",),
    "resume-from resume-from-checkpoint continue auto-resume": ("--resume",),
    "manual-seed random-seed random-state rng": ("--seed",),
    "eval-interval eval-freq eval-steps val-interval eval-every-epochs validate-every": ("--eval-every",),
    "save-freq save-steps save-interval checkpoint-every save-period": ("--save-every",),
    "save-total-limit": ("--keep",),
    "debug dry-run smoke-test sanity fast-run test-run": ("--fast-dev-run",),
    "tb tensorboard wandb track log-to report-to logger trackio": (
        "--tensorboard",
        "the run's folder has metrics.jsonl and report.html, and `vitrail compare` draws runs: leave it out",
    ),
    "val-split val-fraction validation-split val-size valid-pct test-size": (
        "a tenth of the training images is held back, or make a folder val: leave it out",
    ),
    "config cfg yaml hparams": ("a recipe is named as the first argument (vitrail train lists them): leave it out",),
    # prediction
    "topk top-k k top5 n-best": ("--top", "--top-k"),
    "beams num-beams beam-size beam-width": ("--beam",),
    "max-new-tokens max-len": ("--max-length",),
    "tta test-time-augmentation augment-test": ("--flip",),
    "csv output-file results save-txt jsonl": ("--out",),
    "subset": ("--split",),
    # export and serve
    "format target to-format include": ("--to",),
    "dynamic shapes input-shape": ("--sizes",),
    "calibration calib-data": ("--data",),
    "benchmark time": ("--engines",),
    "address bind ip hostname listen": ("--host",),
    "p": ("--port",),
    "key token auth api-key": ("--api-keys",),
    "cors origin origins allowed-origins": ("--allow-origin",),
    "backend runtime": ("--engine",),
    "concurrency queue-size": ("--queue",),
    "delay max-latency batch-timeout": ("--max-wait-ms",),
}
"""words of other tools, without dashes before them; and what is meant, by preference: a flag, if the command has it, or
a sentence"""

BY_WORD = {word: meant for words, meant in MEANT.items() for word in words.split()}


def meant(option: str, flags: Collection[str]) -> str | None:
    """What a flag of another tool means here, given the command's own flags; None if it is not known."""
    word = option.lstrip("-").partition("=")[0].replace("_", "-").lower()
    for text in BY_WORD.get(word, BY_WORD.get(word.removeprefix("no-"), ())):
        if not text.startswith("--") or text.partition(",")[0] in flags:
            return text
    return None

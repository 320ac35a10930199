"""Tables of captioners: the bundled one, the ladder, and what was tried."""

from __future__ import annotations

from table_data import Rows, plain, read, rows_of


def captioner() -> list[list[str]]:
    """Scores of the bundled captioner, of its captions for the wrong images, and of people's captions."""
    found = read("caption")
    if found is None:
        return [["measure", "score"]]
    model = found["rows"]
    columns = {"bundled captioner": model, "shuffled images": model["captions of other images"]}
    columns["people"] = model["people"]
    measures = [name for name, value in model.items() if not isinstance(value, dict)]

    def cells(name: str) -> list[str]:
        return [plain(column[name]) if name in column else "" for column in columns.values()]

    return [["measure", *columns], *([name, *cells(name)] for name in measures)]


CHOSEN: dict[str, str] = {
    "the likeliest": "log-probability alone",
    "with its match": "log-probability and match",
    "with the consensus": "log-probability and consensus",
    "with both": "all three",
}
"""how the bundled captioner chooses among its captions, by the names in results/caption.json"""


def choosing() -> list[list[str]]:
    """Scores of the bundled captioner by how it chooses among the captions that it finds."""
    rows, found = [["caption chosen by", "CIDEr", "BLEU-4", "length"]], read("caption")
    if found is None or "chosen" not in found["rows"]:
        return rows
    ways = {**found["rows"]["chosen"], "with both": found["rows"]}
    return rows + [
        [CHOSEN[how], f"{row['cider']:.3f}", f"{row['bleu4']:.3f}", f"{row['length']:.1f}"] for how, row in ways.items()
    ]


def sure() -> list[list[str]]:
    """What tells right captions of the bundled captioner from others, and images that it knows from other photos."""
    rows = [["Flickr8k's validation split against", "images", "AUROC of match", "AUROC of likeness", "not sure"]]
    found = rows_of("caption-match")
    if found is None:
        return rows

    def cell(row: Rows) -> str:
        return f"{row['auroc']:.2f} ({row['interval'][0]:.2f} to {row['interval'][1]:.2f})"

    own = found["right_against_swapped"]
    count = own["match"]["images"][0]
    rows.append(["nothing: its own images and captions", str(count), "", "", f"{own['not_sure']['right']:.0%}"])
    rows.append(["captions of other images", str(count), cell(own["match"]), "", f"{own['not_sure']['swapped']:.0%}"])
    for name, row in found["against_other_photos"].items():
        count = row["match"]["images"][1]
        rows.append([OTHERS[name], str(count), cell(row["match"]), cell(row["likeness"]), f"{row['not_sure']:.0%}"])
    return rows


OTHERS = {
    "photos": "photos of many kinds, of ImageNet",
    "hymenoptera": "ants and bees",
    "bccd": "blood cells under a microscope",
}
"""photos of other things, by the name of their folder"""


def trained(name: str) -> list[list[str]]:
    """Trainings of captioners, as `bench/ideas.py` gathered them, with their best scores on validation."""
    rows, found = [["command", "minutes", "CIDEr", "BLEU-4"]], read(name)
    for run in found["rows"]["runs"] if found else []:
        scores = [f"{run[key]:.3f}" if key in run else "" for key in ("cider", "bleu4")]
        rows.append([f"`{run['command']}`", f"{run['minutes']:.0f}", *scores])
    return rows


def tried() -> list[list[str]]:
    """`trained` with the recipes of an earlier commit, whose commands no longer run."""
    (_, *header), *rows = trained("caption-tried")
    found = read("caption-tried")
    title = f"recipe and options, at commit {found['commit'][:7]}" if found else "recipe and options"
    return [[title, *header], *([f"`{name[1:-1].removeprefix('vitrail train ')}`", *rest] for name, *rest in rows)]


LADDER: dict[str, str] = {
    "a": "a. CNN + RNN",
    "b": "b. CNN + LSTM",
    "c": "c. CNN + LSTM with attention",
    "d": "d. ViT + LSTM with attention",
    "e": "e. ViT + Transformer",
    "f": "f. e, after learning to match images with captions",
    "cifar10": "e, with an encoder trained on CIFAR-10 first",
}
"""rungs of `bench/ladder.py`, in order, with their titles"""


def earlier(rung: Rows) -> bool:
    """Whether a rung was measured with recipes that have changed since."""
    from vitrail.recipes import RECIPES

    return rung["recipes"] != [RECIPES[stage](6_000).fingerprint for stage in rung["stages"]]


def measured_rungs() -> dict[str, Rows]:
    """The rungs that have been measured, as `bench/ladder.py` wrote them."""
    found = {name: read(f"ladder-{name}") for name in LADDER}
    measured = {name: each["rows"] for name, each in found.items() if each is not None and each["rows"]["runs"]}
    return {name: rows | {"title": LADDER[name]} for name, rows in measured.items()}


def ladder() -> list[list[str]]:
    """The rungs with the mean and range of their seeds on validation, and people."""
    columns = ["parameters", "of the encoder", "CIDEr", "BLEU-4", "epochs", "core minutes"]
    columns += ["learning rate ×", "CIDEr of the short trials"]
    rows = [["rung", "recipes", *columns, "seeds"]]
    for rung in measured_rungs().values():
        done = rung["runs"]

        def mean(key: str, done: list[Rows] = done) -> str:
            scores = [run[key] for run in done]
            spread = f" ({min(scores):.3f} to {max(scores):.3f})" if len(scores) > 1 else ""
            return f"{sum(scores) / len(scores):.3f}{spread}"

        minutes = sum(run["training_seconds"] * run["cores"] for run in done) / len(done) / 60
        epochs = " + ".join(f"{done[0][key]:.1f}" for key in reversed(done[0]) if key.startswith("epochs"))
        tries = ", ".join(f"{tried['cider']:.3f}" for tried in rung["tries"])
        stages = ", ".join(f"`{stage}`" for stage in rung["stages"])
        stages += " of an earlier version" * earlier(rung)
        sizes = [f"{done[0]['parameters']:,}", "" if earlier(rung) else f"{_encoder_size(rung['stages'][-1]):,}"]
        scores = [mean("cider"), mean("bleu4"), epochs, f"{minutes:.0f}"]
        rows.append([rung["title"], stages, *sizes, *scores, f"{rung['rate']:g}", tries, str(len(done))])
    if len(rows) == 1:
        return [["rung", "CIDEr"], ["not measured", ""]]
    if (found := read("caption")) is not None:
        people = found["rows"]["people"]
        scores = [f"{people[key]:.3f}" for key in ("cider", "bleu4")]
        rows.append(["people, each caption against the others", *[""] * 3, *scores, *[""] * 5])
    return rows


def _encoder_size(recipe: str) -> int:
    from vitrail.recipes import RECIPES
    from vitrail.tasks.encoder import encoder_for

    return sum(parameter.numel() for parameter in encoder_for(RECIPES[recipe](6000).model).parameters())


def ladder_commands() -> list[list[str]]:
    """The commands, for the first seed, of the rungs that were measured with today's recipes."""
    from vitrail.recipes import RECIPES

    rows = [["rung", "commands"]]
    for name, rung in measured_rungs().items():
        if earlier(rung):
            continue
        run, commands = rung["runs"][0], []
        for i, stage in enumerate(rung["stages"]):
            recipe = RECIPES[stage](6000)
            epochs = run["epochs" if stage == rung["stages"][-1] else f"epochs of {stage}"]
            rates = f"--lr {recipe.optim.lr * rung['rate']:g} --muon-lr {recipe.optim.muon_lr * rung['rate']:g}"
            init = f" --init runs/{rung['stages'][i - 1]}-{run['seed']}" if i else ""
            words = f"--epochs {epochs:g} --eval-every {epochs:g} {rates} --seed {run['seed']}"
            commands.append(f"`vitrail train {stage} --data {recipe.data} {words}{init}`")
        rows.append([name, ", ".join(commands)])
    return rows

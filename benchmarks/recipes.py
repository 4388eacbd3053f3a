"""What each way of training buys, on real films at 64 px with the CPU generator: FD and coverage (against
all training films), label agreement by class, and the AUROC of a classifier that saw synthetic films only.

python benchmarks/recipes.py --source FOLDER [--out FOLDER] [--images 1000] [--only NAME ...] [--toy]

FOLDER is laid out like the Kaggle set. A recipe is a name and its settings of the train stage: add a line
to `RECIPES`. Every recipe has a study of its own in OUT, made from the same films with the same seeds; what
is complete is not made again, and what was stopped goes on. OUT/recipes.json holds the table that is
printed: a row a measure, a column a recipe, the mean of the generators (or runs). --toy takes a few steps
at 32 px: it shows that all recipes run, and nothing else.
"""

import argparse, shutil
from pathlib import Path

from cxr_synth.base.files import write_json
from cxr_synth.base.readers import read_csv, read_json
from cxr_synth.protocol.schema import result_row
from cxr_synth.stages.run import run

RECIPES = {  # name -> settings of the train stage
    "plain": dict(prompt_dropout=0.0),
    "dropout": dict(prompt_dropout=0.1),
    "offset": dict(prompt_dropout=0.1, noise_offset=0.1),
    "snapshots": dict(prompt_dropout=0.1, snapshots=20),
    "decoder": dict(prompt_dropout=0.1, tune_decoder=400),
}
METRICS = ("fd", "coverage", "label_agreement")
AS_IT_IS = dict(plan=dict(tier="lesson", pool=400, arms="synthetic_only"))
TOY = dict(
    data=dict(resolution=32),
    plan=dict(tier="guide", pool=24, size=32),  # a generator of all films: snapshots need 6 a class
    train=dict(
        vae_steps=4,
        base_steps=4,
        base_batch_size=8,
        max_train_steps=4,
        train_batch_size=4,
        preview_steps=None,
        heldout_images=None,
    ),
    generate=dict(num_inference_steps=2, batch_size=8),
    quality=dict(size=32, halvings=2),
    experiments=dict(size=32, views=1),
)
SHORT = {"snapshots": dict(snapshots=2, snapshot_images=6), "decoder": dict(tune_decoder=4)}


def some_films(source, out, n):
    "Copy n films, drawn evenly from the sorted names, with their folders."
    suffixes = (".png", ".jpeg", ".jpg")
    files = sorted(p for p in Path(source).rglob("*") if p.suffix.lower() in suffixes)
    if not files:
        raise SystemExit(f"{source} holds no PNG or JPEG files.")
    for p in files[:: max(1, len(files) // n)][:n]:
        there = out / p.relative_to(source)
        there.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(p, there)


def settings_of(name, films, toy):
    "The settings of all stages for a recipe."
    found = {stage: dict(values) for stage, values in (TOY if toy else AS_IT_IS).items()}
    found["data"] = found.get("data", {}) | dict(source=str(films))
    short = SHORT.get(name, {}) if toy else {}
    found["train"] = found.get("train", {}) | RECIPES[name] | short
    return found


def measured(study):
    "What one study says: metrics of its generators, AUROC of synthetic_only; means by name."
    found = {}
    for path in sorted((study / "quality").glob("real*.json")):
        for row in read_json(path, list[dict]):
            if row["metric"] in METRICS and row["value"] is not None:
                key = f"{row['metric']} {row['class_name']} ({row['reference']})"
                found.setdefault(key, []).append(row["value"])
    for row in read_csv(study / "results.csv", result_row()):
        for split in ("val", "internal"):
            score = row[f"{split}_auroc"]  # a text, empty where nothing was predicted
            if row["arm"] == "synthetic_only" and score:
                found.setdefault(f"auroc {row['arm']} ({split})", []).append(float(score))
    return {key: sum(values) / len(values) for key, values in found.items()}


def print_table(table):
    "A row a measure, a column a recipe."
    names = list(dict.fromkeys(key for row in table.values() for key in row))
    width = max(map(len, names))
    print(" " * width, *(f"{recipe:>10}" for recipe in table))
    for name in names:
        cells = (f"{row[name]:10.4g}" if name in row else f"{'-':>10}" for row in table.values())
        print(f"{name:{width}}", *cells)


def main(args):
    out, table = Path(args.out), {}
    if not (out / "films").exists():
        part = out / "films.part"  # left by a run that was stopped: copied over
        some_films(args.source, part, args.images)
        part.rename(out / "films")
    for name in args.only or RECIPES:
        settings = settings_of(name, out / "films", args.toy)
        study = run(out / name, until="experiments", preset="tiny", **settings)
        table[name] = measured(study)
        write_json(out / "recipes.json", table)
    print_table(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", required=True)
    parser.add_argument("--out", default="recipes")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--only", nargs="*", choices=RECIPES)
    parser.add_argument("--toy", action="store_true")
    main(parser.parse_args())

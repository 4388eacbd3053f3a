"""What each way of training buys, on real films at 64 px with the CPU generator: FD and coverage (against
all training films), label agreement by class, and the AUROC of a classifier that saw synthetic films only.

python benchmarks/recipes.py --source FOLDER [--out FOLDER] [--images 1000] [--only NAME ...]

A recipe is a name and its settings of the train stage: add a line to `RECIPES`. Every recipe has a study
of its own in OUT, made from the same films with the same seeds; what is complete is not made again.
"""

import argparse, json, shutil
from pathlib import Path

from cxr_synth.base.readers import read_csv, read_json
from cxr_synth.protocol.schema import result_row
from cxr_synth.stages.run import run

RECIPES = {  # name -> settings of the train stage
    "plain": dict(prompt_dropout=0.0),
    "dropout": dict(prompt_dropout=0.1),
    "offset": dict(prompt_dropout=0.1, noise_offset=0.1),
    "snapshots": dict(prompt_dropout=0.1, snapshots=20),
}
METRICS = ("fd", "coverage", "label_agreement")


def some_films(source, out, n):
    "Copy n films, drawn evenly from the sorted names, with their folders."
    files = sorted(
        p for p in Path(source).rglob("*") if p.suffix.lower() in (".png", ".jpeg", ".jpg")
    )
    for p in files[:: max(1, len(files) // n)][:n]:
        there = out / p.relative_to(source)
        there.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(p, there)


def measured(study):
    "What one study says: metrics of its generators, AUROC of synthetic_only."
    found = {}
    for path in sorted((study.root / "quality").glob("real*.json")):
        for row in read_json(path):
            if row["reference"] in ("train", "internal", "val"):
                key = f"{row['metric']} {row['class_name']} ({row['reference']})"
                found.setdefault(key, []).append(row["value"])
    for row in read_csv(study / "results.csv", result_row()):
        if row["status"] == "done" or row["val_auroc"]:
            for split in ("val", "internal"):
                if row[f"{split}_auroc"]:
                    found.setdefault(f"{row['arm']} {split} auroc", []).append(
                        row[f"{split}_auroc"]
                    )
    return {k: sum(map(float, v)) / len(v) for k, v in found.items() if None not in v}


def main(args):
    out = Path(args.out)
    if not (out / "films").exists():
        some_films(args.source, out / "films.part", args.images)
        (out / "films.part").rename(out / "films")
    for name in args.only or RECIPES:
        study = run(
            out / name,
            until="experiments",
            preset="tiny",
            data=dict(source=str(out / "films")),
            plan=dict(tier="lesson", pool=400, arms="synthetic_only"),
            train=RECIPES[name],
        )
        (out / f"{name}.json").write_text(json.dumps(measured(study), indent=1))
    for path in sorted(out.glob("*.json")):
        print(path.stem, path.read_text())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", required=True)
    parser.add_argument("--out", default="recipes")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--only", nargs="*", choices=RECIPES)
    main(parser.parse_args())

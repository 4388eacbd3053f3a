"""Real-only AUROC of the study-sized phantom set, by the project's own path (data stage, frozen
features, logistic head).

python benchmarks/phantom_study.py [--strength LOW HIGH] [--shift SHARE] [--size PX] [--replicates
N]

"""

import argparse, os, tempfile, time
from pathlib import Path

import numpy as np
from cxr_synth.classify.augment import augment
from cxr_synth.classify.probe import balanced_weights, fit_probe, predict_probe
from cxr_synth.stats.auc import score
from cxr_synth.base.compute import seed_for
from cxr_synth.base.records import Study
from cxr_synth.base.settings import DataConfig
from cxr_synth.images.study_images import load_images, split_rows, training_rows
from cxr_synth.stages.data import stage_data
from cxr_synth.images.phantom import STUDY_PHANTOM, write_phantoms
from cxr_synth.images.features import extract_features

VIEWS, C = 8, 0.01  # as in ExperimentsConfig


def features(study, rows, view=0):
    images = load_images(study, rows.image_id)
    if view:
        images = augment(images, [seed_for(0, "view", i, view) for i in rows.image_id])
    return extract_features(images, size=128)


def trained(study, fraction, replicate, pool):
    "The head of the arm `real`: all views of each image."
    rows, at = training_rows(study, fraction, replicate), pool["at"]
    return fit_probe(
        pool["views"][:, [at[i] for i in rows.image_id]],
        rows.label,
        balanced_weights(rows.label, len(rows)),
        C,
    ), rows


def main(args):
    root, start = Path(tempfile.mkdtemp()), time.time()
    preset = (
        STUDY_PHANTOM
        | dict(shift=args.shift)
        | ({"strength": args.strength} if args.strength else {})
        | ({"size": args.size} if args.size else {})
    )
    write_phantoms(root / "set", **preset)
    print(f"{preset}\ndrawn in {time.time() - start:.0f} s")
    study = Study(root / "study")
    stage_data(study, DataConfig(source=str(root / "set"), resolution=64))
    every = training_rows(study, 1.0, 0)
    pool = dict(
        at={i: k for k, i in enumerate(every.image_id)},
        views=np.stack([features(study, every, v) for v in range(VIEWS)]),
    )
    held = {s: split_rows(study, s) for s in ("internal", "test")}
    seen = {s: features(study, rows) for s, rows in held.items()}
    for fraction, replicates in ((0.1, args.replicates), (1.0, 1)):
        found = {s: [] for s in held if (s, fraction) != ("internal", 1.0)}
        for k in range(replicates):
            head, rows = trained(study, fraction, k, pool)
            for s in found:
                found[s].append(score(held[s].label, predict_probe(head, seen[s])))
        print(f"{fraction:.0%}: {rows.patient_id.nunique()} patients, {len(rows)} images")
        for s, runs in found.items():
            a, p = [r["auroc"] for r in runs], held[s].patient_id.nunique()
            print(
                f"  {s}: {p} patients, {len(held[s])} images; AUROC mean {np.mean(a):.3f}, "
                f"sd {np.std(a):.3f}, {min(a):.3f} to {max(a):.3f}; "
                f"specificity {np.mean([r['specificity'] for r in runs]):.2f}, "
                f"sensitivity {np.mean([r['sensitivity'] for r in runs]):.2f}"
            )
    print(f"{time.time() - start:.0f} s")


if __name__ == "__main__":
    p = argparse.ArgumentParser()
    p.add_argument("--strength", type=float, nargs=2)
    p.add_argument("--shift", type=float, default=0.0)
    p.add_argument("--size", type=int)
    p.add_argument("--replicates", type=int, default=10)
    os.environ.setdefault("CXR_QUIET", "1")
    main(p.parse_args())

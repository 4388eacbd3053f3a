"""Analysis of 1,000 runs x 2,900 images with 5,000 patient draws: seconds and peak memory, reading
included. Limits: 60 s and 2 GiB on two cores.
"""

import argparse, resource, tempfile, time
from pathlib import Path
import numpy as np, pandas as pd
from cxr_synth.base.records import Study, generator_name
from cxr_synth.report.contrasts import analyse
from cxr_synth.stats.simulate import simulate
from cxr_synth.report.rehearsal import (
    REHEARSAL_RESULTS,
    metric_values,
    rehearse_images,
    rehearse_plan,
)


def build(root, arms, patients):
    "A study with 5 x 6 runs an arm, written fast; val has 100 patients."
    study, rows = Study(root), rehearse_images(root, dict(val=50, internal=patients, train=10))
    plan = rehearse_plan(root, ((0.1, 5, 6),), arms)
    seen, results = rows[rows.split != "train"], []
    base = simulate(
        seen.patient_id.values,
        seen.label.values,
        dict(real=0.9, mixed=0.92),
        5,
        6,
        np.random.default_rng(0),
        0.05,
        0.03,
    )
    for arm in arms:
        for k, s in np.ndindex(5, 6):
            table = seen[["image_id", "patient_id", "split", "label"]].assign(
                prob=np.round(base["real" if arm == "real" else "mixed"][k, s], 6)
            )
            folder = study / f"runs/{arm}/{generator_name(0.1, k)}-seed{s}"
            folder.mkdir(parents=True)
            table.to_csv(folder / "predictions.csv", index=False)
            row = dict(
                arm=arm,
                network="",
                real_fraction=0.1,
                replicate=k,
                seed=s,
                generator="",
                n_real=400,
                n_synthetic=400,
                status="done",
                plan_sha256=plan.sha256,
            )
            results.append(
                row
                | {
                    f"{sp}_{m}": v
                    for sp, t in table.groupby("split")
                    for m, v in metric_values(t.label, t.prob).items()
                }
            )
    pd.DataFrame(results, columns=REHEARSAL_RESULTS).to_csv(study / "results.csv", index=False)
    return study, int((rows.split == "internal").sum()), len(results)


def main():
    arg = argparse.ArgumentParser(description=__doc__)
    arg.add_argument("--arms", type=int, default=34)
    arg.add_argument("--patients", type=int, default=725)
    arg.add_argument("--draws", type=int, default=5000)
    arg = arg.parse_args()
    with tempfile.TemporaryDirectory() as root:
        study, images, runs = build(
            Path(root),
            ["real", "mixed", *(f"mixed-share{i + 1}" for i in range(arg.arms - 2))],
            arg.patients,
        )
        start = time.perf_counter()
        a = analyse(study, arg.draws)
        took = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(
            f"{runs} runs x {images} images, {arg.draws} draws, {len(a['contrasts'])} contrasts: "
            f"{took:.1f} s, peak {peak:.2f} GiB; {a['verdict']['word']}"
        )


if __name__ == "__main__":
    main()

"""Analysis of 1,000 runs x 2,900 images with 5,000 patient draws: seconds and peak memory, reading
included. Limits: 60 s and 2 GiB on two cores.
"""

import argparse, resource, tempfile, time
from pathlib import Path
import pandas as pd
from cxr_synth.report.contrasts import analyse
from cxr_synth.report.rehearsal import rehearse_images, rehearse_plan, rehearse_runs


def build(root, arms, patients):
    "A study with 5 x 6 runs an arm; val has 100 patients."
    study = rehearse_images(root, dict(val=50, internal=patients, train=10))
    rehearse_plan(study, ((0.1, 5, 6),), arms)
    truth = {arm: 0.9 if arm == "real" else 0.92 for arm in arms}
    rehearse_runs(study, {0.1: truth})
    split = pd.read_csv(study / "data/manifest.csv", dtype=str).split
    return study, int((split == "internal").sum()), len(arms) * 5 * 6


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

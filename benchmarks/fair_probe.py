"""All arms of a tier with the probe on a folder of real images: seconds for the features, and for the runs.

In the place of synthetic images: training films, encoded again (the known generator `copy`).
"""

import argparse, tempfile, time
import pandas as pd
from cxr_synth.base.records import Study
from cxr_synth.base.settings import DataConfig, ExperimentsConfig, PlanConfig
from cxr_synth.stages.data import stage_data
from cxr_synth.classify.recipes import RunContext
from cxr_synth.classify.executors import precompute_shared
from cxr_synth.stages.classify import open_test, stage_experiments
from cxr_synth.images.known_generators import write_known_set
from cxr_synth.protocol.plan import TIERS, load_plan
from cxr_synth.stages.plan import plan_text, stage_plan

OF_A_MODEL = ("roundtrip", "img2img", "filtered")


def timed(what, call):
    "Do something and print the seconds."
    start = time.perf_counter()
    call()
    print(f"{what}: {time.perf_counter() - start:.0f} s", flush=True)


def leave_out(tier):
    "The tier without the arms that need a trained autoencoder or a search for copies."
    cells = [
        (*size, [arm for arm in arms if arm.split("-")[0] not in OF_A_MODEL])
        for *size, arms in TIERS[tier]["cells"]
    ]
    TIERS[tier] |= dict(cells=cells, beside=[])


def copies(study, plan):
    "A set of copies for every generator of the plan."
    for entry in plan.generators:
        write_known_set(study, "copy", entry, redo=False)


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("source")
    p.add_argument("--study", help="kept there, and continued")
    p.add_argument("--tier", default="fair")
    p.add_argument("--views", type=int, default=8)
    p.add_argument("--size", type=int, default=128)
    p.add_argument("--executor", default="processes")
    p.add_argument("--workers", type=int, default=2)
    a = p.parse_args()
    study = Study(a.study or tempfile.mkdtemp())
    timed("data", lambda: stage_data(study, DataConfig(source=a.source, resolution=64)))
    leave_out(a.tier)
    timed("plan", lambda: stage_plan(study, PlanConfig(tier=a.tier, size=a.size)))
    plan = load_plan(study)
    print(plan_text(plan))
    timed("copies", lambda: copies(study, plan))
    cfg = ExperimentsConfig(size=a.size, views=a.views, executor=a.executor, workers=a.workers)
    todo = plan.runs()
    timed(
        (
            f"features of {a.views} views and "
            f"{sum(sum(g.images.values()) for g in plan.generators):,} synthetic images, C "
            "(expected: at most 900)"
        ),
        lambda: precompute_shared(RunContext(study, plan, cfg, "cpu"), todo),
    )
    timed(f"{len(todo)} runs (expected: at most 900)", lambda: stage_experiments(study, cfg))
    open_test(study)
    t = pd.read_csv(study / "results.csv")
    print(
        t.groupby(["real_fraction", "arm"], sort=False)[
            ["val_auroc", "internal_auroc", "test_auroc"]
        ]
        .mean()
        .round(4)
        .to_string()
    )


if __name__ == "__main__":
    main()

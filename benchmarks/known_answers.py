"""Does the whole study find what is known? 900 drawn children to train on, 2,099 to test on, and
generators whose worth is written down; 5 replicates x 6 seeds.

python benchmarks/known_answers.py [--kinds truth copy wrong leaky] [--study FOLDER]     about
five minutes a kind on two cores; FOLDER keeps the studies

"""

import argparse, os, shutil, tempfile, time
from pathlib import Path

os.environ.setdefault("CXR_QUIET", "1")
from cxr_synth.stages.report import stage_report
from cxr_synth.base.readers import read_json
from cxr_synth.base.records import Study
from cxr_synth.base.settings import ExperimentsConfig, PlanConfig, ReportConfig, resolve
from cxr_synth.stages.data import stage_data
from cxr_synth.stages.classify import open_test, stage_experiments
from cxr_synth.images.known_generators import KNOWN_GENERATORS, stage_known_generator
from cxr_synth.protocol.plan import TIERS, load_plan
from cxr_synth.stages.plan import stage_plan

ARMS = ["real", "duplicate", "mixed", "oracle", "permuted"]
TIERS["known"] = dict(primary=[0.1], cells=[(0.1, 5, 6, ARMS)], oracles=5)
EXPECTED = {
    "truth": ("mixed", "real", {"improves"}),
    "copy": ("mixed", "real", {"no meaningful difference", "inconclusive", "worsens"}),
    "wrong": ("mixed", "real", {"worsens"}),
    "leaky": ("oracle", "mixed", {"improves"}),
}


def calibrate(study, kind):
    "A study with a known generator, from plan to report: analysis.json."
    stage_plan(study, PlanConfig(tier="known", builtin=kind))
    stage_known_generator(study, load_plan(study))
    stage_experiments(study, ExperimentsConfig(executor="processes", workers=2))
    open_test(study)
    stage_report(study, ReportConfig(poster=800))
    return read_json(study / "analysis.json")


def show(kind, analysis):
    """Print the contrasts; is the expected one as it must be, `duplicate` nothing, and `permuted`
    below `real`?
    """
    found = {
        (c["arm"], c["control"], c["split"]): c
        for c in analysis["contrasts"]
        if c["state"] == "measured"
    }
    for (arm, control, split), c in found.items():
        print(
            (
                f"{kind:6} {arm:>9} - {control:5} {split:8} {c['estimate']:+7.2f} pp ({c['low']:+.2f} "
                f"to {c['high']:+.2f})  {c.get('word', '')}"
            ),
            flush=True,
        )
    arm, control, words = EXPECTED[kind]
    same, lower = found["duplicate", "real", "internal"], found["permuted", "real", "internal"]
    return (
        found[arm, control, "internal"]["word"] in words
        and abs(same["estimate"]) < 0.05
        and (kind != "truth" or lower["high"] < 0)
    )


def main():
    arg = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arg.add_argument("--kinds", nargs="+", default=list(KNOWN_GENERATORS), choices=KNOWN_GENERATORS)
    arg.add_argument("--study")
    arg = arg.parse_args()
    root = Path(arg.study or tempfile.mkdtemp())
    start = time.perf_counter()
    good = True
    base = Study(root / "data-only")
    stage_data(base, resolve("data", "phantom-study"), preset="phantom-study")
    print(f"data: {time.perf_counter() - start:.0f} s", flush=True)
    for kind in arg.kinds:
        study = Study(root / kind)
        if not (study / "study.json").exists():
            shutil.copytree(base.root, study.root)
        good &= show(kind, calibrate(study, kind))
        print(
            f"{kind}: {time.perf_counter() - start:.0f} s so far; answers as expected: {good}",
            flush=True,
        )
    if not arg.study:
        shutil.rmtree(root)
    raise SystemExit(not good)


if __name__ == "__main__":
    main()

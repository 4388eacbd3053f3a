"""Does the whole study find what is known? 900 drawn children to train on, 2,099 to test on, and
generators whose worth is written down; 5 replicates x 6 seeds. And on real films, of which nobody
knows what would help: a generator that copies them, and the arm `copy`, must not; 10 replicates at 5 %.

python benchmarks/known_answers.py [--kinds truth copy wrong leaky] [--study FOLDER]     about
five minutes a kind on two cores; FOLDER keeps the studies
python benchmarks/known_answers.py --source FOLDER     real films instead, with their official split

"""

import argparse, os, shutil, tempfile, time
from pathlib import Path

os.environ.setdefault("CXR_QUIET", "1")
from cxr_synth.stages.report import stage_report
from cxr_synth.base.readers import read_json
from cxr_synth.base.records import Study
from cxr_synth.base.settings import (
    DataConfig,
    ExperimentsConfig,
    PlanConfig,
    ReportConfig,
    resolve,
)
from cxr_synth.stages.data import stage_data
from cxr_synth.stages.classify import open_test, stage_experiments
from cxr_synth.images.known_generators import (
    KNOWN_GENERATORS,
    stage_known_generator,
    write_known_set,
)
from cxr_synth.protocol.plan import TIERS, load_plan
from cxr_synth.stages.plan import stage_plan

ARMS = ["real", "duplicate", "mixed", "copy", "more_real", "oracle", "permuted"]
TIERS["known"] = dict(primary=[0.1], cells=[(0.1, 5, 6, ARMS)], oracles=5)
FILMS = ["real", "mixed", "copy", "more_real"]
TIERS["films"] = dict(primary=[0.05], cells=[(0.05, 10, 6, FILMS)], oracles=0)
NO_GAIN = {"no meaningful difference", "inconclusive", "worsens"}
EXPECTED = {
    "truth": ("mixed", "real", {"improves"}),
    "copy": ("mixed", "real", NO_GAIN),
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


def measured(kind, analysis):
    "Print and give the contrasts by arm, control and split."
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
    return found


def as_expected(kind, analysis):
    """Is the expected contrast as it must be, `duplicate` nothing, and `permuted` below `real`? Does the
    arm `copy` not stand above `real`?
    """
    found = measured(kind, analysis)
    arm, control, words = EXPECTED[kind]
    same, lower = found["duplicate", "real", "internal"], found["permuted", "real", "internal"]
    return (
        found[arm, control, "internal"]["word"] in words
        and abs(same["estimate"]) < 0.05
        and found["copy", "real", "internal"]["low"] <= 0
        and (kind != "truth" or lower["high"] < 0)
    )


def copies_of_films(source, root):
    "A study of real films whose generator copies them: is there no gain, and none of the arm `copy`?"
    study = Study(root / "films")
    stage_data(study, DataConfig(source=source, resolution=64))
    stage_plan(study, PlanConfig(tier="films"))
    for entry in load_plan(study).generators:
        write_known_set(study, "copy", entry, redo=False)
    stage_experiments(study, ExperimentsConfig(executor="processes", workers=2))
    open_test(study)
    stage_report(study, ReportConfig(poster=800))
    analysis = read_json(study / "analysis.json")
    found = measured("films", analysis)
    no_word = analysis["verdict"]["word"] in NO_GAIN
    return no_word and found["copy", "real", "internal"]["low"] <= 0


def main():
    arg = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arg.add_argument("--kinds", nargs="+", default=list(KNOWN_GENERATORS), choices=KNOWN_GENERATORS)
    arg.add_argument("--study")
    arg.add_argument("--source", help="a folder of real films")
    arg = arg.parse_args()
    root = Path(arg.study or tempfile.mkdtemp())
    start = time.perf_counter()
    if arg.source:
        good = copies_of_films(arg.source, root)
        print(f"films: {time.perf_counter() - start:.0f} s; copies gain nothing: {good}")
        raise SystemExit(not good)
    good = True
    base = Study(root / "data-only")
    stage_data(base, resolve("data", "phantom-study"), preset="phantom-study")
    print(f"data: {time.perf_counter() - start:.0f} s", flush=True)
    for kind in arg.kinds:
        study = Study(root / kind)
        if not (study / "study.json").exists():
            shutil.copytree(base.root, study.root)
        good &= as_expected(kind, calibrate(study, kind))
        print(
            f"{kind}: {time.perf_counter() - start:.0f} s so far; answers as expected: {good}",
            flush=True,
        )
    if not arg.study:
        shutil.rmtree(root)
    raise SystemExit(not good)


if __name__ == "__main__":
    main()

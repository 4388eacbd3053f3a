"A rehearsal has the files, columns and keys of a real study, and nothing else."

import csv, json, re

import pandas as pd, pytest
from cxr_synth.report.contrasts import analyse
from cxr_synth.report.rehearsal import rehearse, rehearse_opening
from cxr_synth.stages.run import run

SMALL = dict(
    data=dict(patients=120, resolution=32),
    plan=dict(tier="lesson", pool=40, size=32, builtin="truth"),
    quality=dict(size=32, halvings=3),
    experiments=dict(size=32, views=2),
)
PATIENTS = dict(val=20, internal=30, test=20, train=20)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    "A real study of a known generator, up to the opened test."
    return run(tmp_path_factory.mktemp("real") / "study", until="open-test", **SMALL)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "study"
    arms = ("real", "duplicate", "copy", "mixed", "synthetic_only")
    return rehearse_opening(rehearse(folder, PATIENTS, ((0.1, 2, 2),), arms))


def what(study):
    "Tables and records of a study: path without names of generators, arms and runs -> files."
    out = {}
    for path in sorted(study.root.rglob("*")):
        name = path.relative_to(study.root).as_posix()
        if path.suffix not in (".csv", ".json", ".jsonl") or name.startswith("cache/"):
            continue
        name = re.sub(r"runs/[a-z_]+/", "runs/ARM/", name)
        name = re.sub(r"real\d{3}-rep\d+(-base)?", "GENERATOR", name)
        out.setdefault(re.sub(r"-seed\d+", "-seedN", name), []).append(path)
    return out


def keys(value):
    "The shape of a JSON value: its keys, and those of its parts; the first of a list stands for all."
    if isinstance(value, dict):
        named = {k: v for k, v in value.items() if not re.fullmatch(r".*rep\d+(-base)?", k)}
        return {k: keys(v) for k, v in named.items()}
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [keys(value[0])]
    return None


FREE = {  # what depends on settings and data, not on the writer
    "questions",
    "inputs",
    "versions",
    "settings",
    "runtime",
    "at_threshold",
    "builtin",
}


def shape(path):
    if path.suffix == ".csv":
        with open(path, newline="") as f:
            return next(csv.reader(f))
    text = path.read_text()
    value = json.loads(text.splitlines()[0] if path.suffix == ".jsonl" else text)
    if isinstance(value, dict):
        free = (*FREE, "files")  # which files there are is compared above
        value = {k: None if k in free else v for k, v in value.items()}
    return keys(value)


def test_every_file_of_a_rehearsal_is_one_that_a_study_has(real, made):
    there, here = what(real), what(made)
    assert set(here) <= set(there)
    # the audit needs the source's files, which nobody has drawn; marks of the gate need a diffusion model
    assert set(there) - set(here) <= {"data/audit.json", "synthetic/GENERATOR/flags.csv"}


def test_columns_and_keys_are_those_of_the_writers(real, made):
    there, here = what(real), what(made)
    for name, paths in here.items():
        known = [shape(p) for p in there[name]]
        for path in paths:
            assert shape(path) in known, (name, path)


def test_the_settings_on_record_are_those_of_the_stages(real, made):
    a, b = real.records(), made.records()
    for out in ("data", "plan.json", "quality", "runs"):
        assert set(a[out]["settings"]) == set(b[out]["settings"])
        assert set(a[out]["runtime"]) == set(b[out]["runtime"])
        assert set(b[out]["inputs"]) >= {"data/manifest.csv"} or out == "data"


def test_runs_predict_what_a_real_run_predicts(real, made):
    "Of val the part of the fraction; all of internal; the test in a file of its own."
    for study in (real, made):
        manifest = pd.read_csv(study / "data/manifest.csv", dtype=str)
        share = pd.read_csv(study / "data/fractions.csv", dtype={"image_id": str})
        share = share[(share.replicate == 1) & (share.min_fraction <= 0.1)]
        folder = study / "runs/mixed/real010-rep1-seed0"
        found = pd.read_csv(folder / "predictions.csv", dtype={"image_id": str})
        val = set(manifest.image_id[manifest.split == "val"]) & set(share.image_id)
        internal = set(manifest.image_id[manifest.split == "internal"])
        assert set(found.image_id) == val | internal
        sealed = pd.read_csv(folder / "test.csv", dtype={"image_id": str})
        assert set(sealed.image_id) == set(manifest.image_id[manifest.split == "test"])


def test_the_analysis_reads_both_alike(real, made):
    "The same keys, whether a study is made up or not."
    a, b = analyse(real, draws=100), analyse(made, draws=100)
    assert set(a) == set(b)
    assert [set(x) for x in a["contrasts"][:1]] == [set(x) for x in b["contrasts"][:1]]
    assert [set(x) for x in a["arms"][:1]] == [set(x) for x in b["arms"][:1]]
    assert not a["problems"] and not b["problems"]

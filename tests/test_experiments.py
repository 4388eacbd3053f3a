"The grid of runs: the same table from one process, a pool and Dask; killed and started again; and numbers that another program finds, too."

import os, shutil, signal, subprocess, sys, time

import numpy as np, pandas as pd, pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from cxr_synth.base.files import read_csv, read_json, write_csv, write_json
from cxr_synth.base.records import Study
from cxr_synth.base.settings import DataConfig, ExperimentsConfig, PlanConfig
from cxr_synth.images.study_images import training_rows
from cxr_synth.stages.data import stage_data
from cxr_synth.classify.recipes import RunContext, training_recipe
from cxr_synth.protocol.schema import PREDICTION_COLUMNS
from cxr_synth.stages.classify import open_test, stage_experiments
from cxr_synth.images.known_generators import stage_known_generator
from cxr_synth.protocol.plan import load_plan
from cxr_synth.stages.plan import stage_plan
from cxr_synth.classify.finetune import weighted_rows

FLAGS = ["--experiments.size", "32", "--experiments.views", "2", "--experiments.device", "cpu"]
SETTINGS = dict(size=32, views=2, device="cpu")


@pytest.fixture(scope="module")
def serial(tmp_path_factory):
    "A study of drawn patients with a known generator, all runs done in this process."
    study = Study(tmp_path_factory.mktemp("serial") / "study")
    stage_data(study, DataConfig(patients=120, resolution=32))
    stage_plan(study, PlanConfig(pool=12, size=32, builtin="truth"))
    stage_known_generator(study, load_plan(study))
    for g in load_plan(study).generators:
        write_csv(study / f"quality/{g.name}-copies.csv", ["file_name", "reason", "by"], [])
    shutil.copytree(study.root, study.root.with_name("before"))
    stage_experiments(study, ExperimentsConfig(**SETTINGS))
    return study


@pytest.fixture
def copy(serial, tmp_path):
    "The same study, no run done, what the runs share computed."
    shutil.copytree(serial.root.with_name("before"), tmp_path / "study")
    shutil.rmtree(tmp_path / "study/cache")
    shutil.copytree(serial / "cache", tmp_path / "study/cache")
    return Study(tmp_path / "study")


@pytest.mark.parametrize("executor", ["processes", "dask"])
def test_executors_agree(serial, copy, executor):
    if executor == "dask":
        pytest.importorskip("distributed")
    stage_experiments(copy, ExperimentsConfig(**SETTINGS, executor=executor, workers=2))
    assert (copy / "results.csv").read_bytes() == (serial / "results.csv").read_bytes()
    for r in load_plan(copy).runs():
        assert (copy / r.folder / "predictions.csv").read_bytes() == (
            serial / r.folder / "predictions.csv"
        ).read_bytes()


def kill_after(runs, study, flags):
    "Start the grid, and kill it without warning when so many runs are done; the command."
    command = [
        sys.executable,
        "-c",
        "import sys; from cxr_synth.app import main; sys.exit(main())",
        "experiments",
        str(study.root),
        *flags,
    ]
    p = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while p.poll() is None and len(list(study.root.glob("runs/*/*/run.json"))) < runs:
        time.sleep(0.01)
    assert p.poll() is None, p.communicate()[1]
    os.kill(p.pid, signal.SIGKILL)
    p.wait()
    return command


def test_killed_and_started_again(serial, copy):
    command = kill_after(12, copy, FLAGS)
    before = {f: f.stat().st_mtime_ns for f in copy.root.glob("runs/*/*/run.json")}
    assert 12 <= len(before) < len(load_plan(copy).runs())
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert {f: f.stat().st_mtime_ns for f in before} == before  # none done twice,
    assert (copy / "results.csv").read_bytes() == (serial / "results.csv").read_bytes()  # none lost


TUNE = dict(
    method="finetune",
    network="small_cnn",
    size=32,
    steps=6,
    batch_size=16,
    warmup=1,
    checkpoint_steps=2,
    device="cpu",
)


def test_all_arms_are_fine_tuned(copy):
    "Every arm of the plan through the grid with a network that learns from end to end: killed halfway, and gone on with by two processes."
    flags = " ".join(f"--experiments.{k.replace('_', '-')} {v}" for k, v in TUNE.items()).split()
    kill_after(20, copy, flags)
    stage_experiments(copy, ExperimentsConfig(**TUNE, executor="processes", workers=2))
    rows, runs = read_csv(copy / "results.csv"), load_plan(copy).runs()
    assert [r["status"] for r in rows] == ["done"] * len(runs)
    assert {r["optimizer_steps"] for r in rows if r["arm"] != "real_short"} == {"6"}
    assert {r["optimizer_steps"] for r in rows if r["arm"] == "real_short"} < {
        str(k) for k in range(1, 6)
    }
    assert not list(copy.root.glob("runs/*/*/checkpoint*")) and all(
        (copy / r.folder / "history.csv").exists() for r in runs
    )
    some = [r for r in runs if r.arm in ("mixed", "pretrain_finetune") and r.seed == 1]
    before = {r: (copy / r.folder / "predictions.csv").read_bytes() for r in some}
    for r in some:
        shutil.rmtree(copy / r.folder)
    stage = read_json(copy / "runs/stage.json")
    write_json(copy / "runs/stage.json", stage | dict(status="running"))
    stage_experiments(copy, ExperimentsConfig(**TUNE))
    assert {
        r: (copy / r.folder / "predictions.csv").read_bytes() for r in some
    } == before  # the same in this process
    assert [e["exploratory"] for e in open_test(copy)["opened"]] == [False]


def test_another_program_finds_the_same(serial):
    plan = load_plan(serial)
    shop = RunContext(str(serial.root), plan, ExperimentsConfig(**SETTINGS), "cpu")
    rows = {
        (r["arm"], float(r["real_fraction"]), int(r["replicate"]), int(r["seed"])): r
        for r in read_csv(serial / "results.csv")
    }
    for run in [r for r in plan.runs() if r.arm in ("real", "mixed", "rebalanced") and r.seed == 0]:
        x, y, w = weighted_rows(
            training_recipe(run, shop)[0][0],
            len(training_rows(serial, run.fraction, run.replicate)),
        )
        model = LogisticRegression(
            solver="newton-cholesky", C=read_json(serial / run.folder / "run.json")["C"], tol=1e-8
        ).fit(x.astype(float), y, sample_weight=w)
        for split in run.splits:
            t = pd.read_csv(serial / run.folder / "predictions.csv").query("split == @split")
            manifest = (
                pd.read_csv(serial / "data/manifest.csv")
                .set_index("image_id")
                .loc[t.image_id]
                .reset_index()
            )
            assert (
                np.abs(
                    model.predict_proba(
                        np.asarray(shop.material.unaltered(manifest, split), float)
                    )[:, 1]
                    - t.prob
                ).max()
                < 5e-3
            )
            if t.label.nunique() == 2:
                assert float(
                    rows[run.arm, run.fraction, run.replicate, run.seed][f"{split}_auroc"]
                ) == pytest.approx(roc_auc_score(t.label, t.prob), abs=1e-12)


def test_the_sealed_test_opens_once(serial, copy):
    shutil.copytree(serial / "runs", copy / "runs", dirs_exist_ok=True)
    shutil.copy(serial / "results.csv", copy / "results.csv")
    assert not any(r["test_auroc"] for r in read_csv(copy / "results.csv"))
    assert [e["exploratory"] for e in open_test(copy)["opened"]] == [False]
    for r in read_csv(copy / "results.csv"):
        t = pd.read_csv(
            copy
            / f"runs/{r['arm']}/real{round(100 * float(r['real_fraction'])):03d}-rep{r['replicate']}-seed{r['seed']}/test.csv"
        )
        assert list(t.columns) == [*PREDICTION_COLUMNS, "prob"] and float(
            r["test_auroc"]
        ) == pytest.approx(roc_auc_score(t.label, t.prob), abs=1e-12)

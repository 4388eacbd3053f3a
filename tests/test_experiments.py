"The grid of runs: the same table from one process, a pool and Dask, killed and started again."

import os, shutil, signal, subprocess, sys, time

from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
import numpy as np, pandas as pd, pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from cxr_synth.base.files import CxrError, write_csv, write_json
from cxr_synth.base.readers import read_csv, read_json
from cxr_synth.base.records import Study
from cxr_synth.base.settings import DataConfig, ExperimentsConfig, PlanConfig
from cxr_synth.images.study_images import more_real_rows, split_rows, training_rows
from cxr_synth.stages.data import stage_data
from cxr_synth.classify import recipes
from cxr_synth.classify.executors import Job, do_run, result_key
from cxr_synth.classify.recipes import RunContext, training_set
from cxr_synth.classify.runs import fit_run
from cxr_synth.protocol.arms import ARMS, Arm
from cxr_synth.protocol.sets import load_metadata
from cxr_synth.protocol.schema import SEALED_COLUMNS
from cxr_synth.stages.classify import open_test, stage_experiments
from cxr_synth.images.known_generators import stage_known_generator
from cxr_synth.protocol.plan import Run, load_plan
from cxr_synth.stages.plan import stage_plan
from cxr_synth.classify.finetune import weighted_rows

FLAGS = ["--experiments.size", "32", "--experiments.views", "2", "--experiments.device", "cpu"]
SETTINGS = dict(size=32, views=2, device="cpu")


def loaded_modules():
    return sorted(sys.modules)


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
    views=4,  # of the preset, as the command has it
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
    "Every arm with a network that learns from end to end: killed halfway, gone on with by two processes."
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


def context_of(study, **settings):
    return RunContext(study, load_plan(study), ExperimentsConfig(**SETTINGS | settings), "cpu")


def row_of(study, run):
    "A run's row of results.csv."
    key = (run.arm, str(run.fraction), str(run.replicate), str(run.seed))
    return next(r for r in read_csv(study / "results.csv") if result_key(r) == key)


def test_another_program_finds_the_same(serial):
    context = context_of(serial)
    manifest = pd.read_csv(serial / "data/manifest.csv").set_index("image_id", drop=False)
    for run in context.plan.runs():
        if run.arm not in ("real", "mixed", "rebalanced") or run.seed:
            continue
        total = len(training_rows(serial, run.fraction, run.replicate))
        x, y, w = weighted_rows(training_set(run, context).phases[0], total)
        C = read_json(serial / run.folder / "run.json")["C"]
        model = LogisticRegression(solver="newton-cholesky", C=C, tol=1e-8)
        model.fit(x.astype(float), y, sample_weight=w)
        for split in run.splits:
            t = pd.read_csv(serial / run.folder / "predictions.csv").query("split == @split")
            images = context.store.to_predict(manifest.loc[t.image_id], split)
            found = model.predict_proba(np.asarray(images, float))[:, 1]
            assert np.abs(found - t.prob).max() < 1e-5
            if t.label.nunique() == 2:
                auroc = float(row_of(serial, run)[f"{split}_auroc"])
                assert auroc == pytest.approx(roc_auc_score(t.label, t.prob), abs=1e-12)


def test_records_say_what_was_trained_on(serial):
    "n_real, n_synthetic, share and pool of every arm, by their definitions."
    plan = load_plan(serial)
    for run in plan.runs():
        row = read_json(serial / run.folder / "run.json")
        real = own = training_rows(serial, run.fraction, run.replicate)
        if run.arm == "more_real":
            real = more_real_rows(serial, run.fraction, run.replicate)
        even = abs(int((real.label == 0).sum()) - int((real.label == 1).sum()))
        pool = plan.pools["full" if run.arm == "mixed_full_pool" else "mixed"]
        n_synthetic = 0
        if run.arm == "rebalanced":
            n_synthetic = even
        elif run.synthetic:
            n_synthetic = 2 * int(np.ceil(0.8 * (pool // 2)))
        assert row["n_real"] == (0 if run.arm == "synthetic_only" else len(real))
        assert row["n_synthetic"] == n_synthetic
        assert ("generator" in row) == run.synthetic
        if run.synthetic and run.arm != "rebalanced":
            share = dict(synthetic_only=1.0).get(run.arm, 0.5)
            assert (row["generator"], row["share"], row["pool"]) == (
                plan.generator_of(run),
                share,
                pool,
            )
        drawn = 2 * int(np.ceil(0.8 * (plan.pools["mixed"] // 2)))
        if run.arm == "copy":
            assert (row["share"], row["pool"], row["copies"]) == (0.5, plan.pools["mixed"], drawn)
        part = len(own) / (len(own) + drawn)
        expected = len(own) * (part if run.arm == "real_short" else 1)
        assert row["total_weight"] == round(expected, 2)


def test_an_arm_is_an_entry_and_a_function(serial, monkeypatch):
    def doubled(run, context):
        return replace(recipes.real(run, context), part=2.0)

    monkeypatch.setitem(ARMS, "doubled", Arm("Are twice the steps better?", recipe=doubled))
    context = context_of(serial)
    weight = fit_run(Run("doubled", 0.1, 0, 0), context).facts["total_weight"]
    assert weight == 2 * fit_run(Run("real", 0.1, 0, 0), context).facts["total_weight"]
    monkeypatch.setitem(ARMS, "again", Arm("?", recipe="cxr_synth.classify.recipes:duplicate"))
    twin = training_set(Run("again", 0.1, 0, 0), context)
    assert twin.n_rows == training_set(Run("duplicate", 0.1, 0, 0), context).n_rows
    with pytest.raises(CxrError, match="Allowed: real"):
        training_set(Run("unheard", 0.1, 0, 0), context)


def mark_all(study, name):
    "A copy report that marks every normal image."
    files = [line["file_name"] for line in load_metadata(study, name)]
    rows = [dict(file_name=f, reason="copy", by="copy report") for f in files if "normal" in f]
    write_csv(study / f"quality/{name}-copies.csv", ["file_name", "reason", "by"], rows)


def test_filtered_without_a_class(copy):
    run = Run("filtered", 0.1, 0, 0)
    mark_all(copy, run.subset)
    left = training_set(run, context_of(copy))
    real = training_set(replace(run, arm="real"), context_of(copy))
    assert (left.n_synthetic, left.n_real, left.n_rows) == (0, real.n_real, real.n_rows)
    mixed = training_set(replace(run, arm="mixed"), context_of(copy))
    assert left.facts["removed"] == mixed.n_synthetic


def test_only_and_unknown_executors(copy):
    cfg = ExperimentsConfig(**SETTINGS, only="real, mixed")
    stage_experiments(copy, cfg)
    assert {r["arm"] for r in read_csv(copy / "results.csv")} == {"real", "mixed"}
    with pytest.raises(CxrError, match="--experiments.only: unknown arm 'guide'"):
        stage_experiments(copy, replace(cfg, only="guide"))
    with pytest.raises(CxrError, match="Allowed: serial, processes, dask"):
        stage_experiments(copy, ExperimentsConfig(**SETTINGS, executor="cloud"))
    with pytest.raises(CxrError, match="nothing has been planned yet"):
        stage_experiments(Study(copy.root / "none"))


def test_a_second_look_is_exploratory(copy):
    "Whoever has seen the test, changes a setting and opens it again, is told so."
    cfg = ExperimentsConfig(**SETTINGS, only="real mixed")
    stage_experiments(copy, cfg)
    first = open_test(copy)
    stage_experiments(copy, replace(cfg, share=0.4), redo=True)
    assert not any(r["test_auroc"] for r in read_csv(copy / "results.csv"))
    assert (copy / "runs.redo1").is_dir() and (copy / "results.csv.redo1").exists()
    assert [e["exploratory"] for e in open_test(copy)["opened"]] == [False, True]
    assert [e["exploratory"] for e in first["opened"]] == [False]


@pytest.mark.parametrize("method", ["probe", "finetune"])
def test_a_worker_loads_neither_diffusers_nor_transformers(method, serial, tmp_path):
    "What a spawned process imports to make a run, asked of one that makes it."
    study = Study(shutil.copytree(serial.root.with_name("before"), tmp_path / "study"))
    settings = dict(SETTINGS, method=method)
    if method == "finetune":
        settings |= dict(network="small_cnn", steps=2, batch_size=16, warmup=1)
    job = Job.of(context_of(study, **settings), 1)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        record = pool.submit(do_run, Run("mixed", 0.1, 0, 0), job).result()
        loaded = pool.submit(loaded_modules).result()
    assert record["status"] == "done", record
    assert not {"diffusers", "transformers", "peft", "gradio"} & set(loaded)
    assert "cxr_synth.classify.executors" in loaded


def test_the_sealed_test_opens_once(serial, copy):
    shutil.copytree(serial / "runs", copy / "runs", dirs_exist_ok=True)
    shutil.copy(serial / "results.csv", copy / "results.csv")
    assert not any(r["test_auroc"] for r in read_csv(copy / "results.csv"))
    assert [e["exploratory"] for e in open_test(copy)["opened"]] == [False]
    for run in load_plan(copy).runs():
        t = pd.read_csv(copy / run.folder / "test.csv")
        assert list(t.columns) == SEALED_COLUMNS and "label" not in SEALED_COLUMNS
        t = t.merge(split_rows(copy, "test")[["image_id", "label"]], validate="1:1")
        auroc = float(row_of(copy, run)["test_auroc"])
        assert auroc == pytest.approx(roc_auc_score(t.label, t.prob), abs=1e-12)

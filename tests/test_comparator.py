"Real films are as strong a comparator as they can be: all views, one answer, copies gain nothing."

import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from cxr_synth.base.compute import seed_for
from cxr_synth.base.files import CxrError, write_text
from cxr_synth.base.records import Study
from cxr_synth.base.settings import DataConfig, ExperimentsConfig
from cxr_synth.classify import probe
from cxr_synth.classify.augment import DIRECTIONS, copy_films
from cxr_synth.classify.feature_store import FeatureStore, chosen_C
from cxr_synth.classify.finetune import strata_by_class, weighted_rows
from cxr_synth.classify.probe import balanced_weights, choose_C, fit_probe, predict_probe
from cxr_synth.classify.recipes import RunContext, training_set
from cxr_synth.classify.runs import fit_run, make_run, read_test
from cxr_synth.images.images import prepare_image
from cxr_synth.images.known_generators import stage_known_generator
from cxr_synth.images.study_images import (
    load_images,
    more_real_rows,
    split_rows,
    training_rows,
)
from cxr_synth.protocol.plan import Contrast, Plan, PlannedGenerator, Run
from cxr_synth.stages.data import stage_data

VIEWS = 8
SIX = range(6)  # replicates


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    "Drawn patients, and generators that only copy."
    study = Study(tmp_path_factory.mktemp("comparator") / "study")
    stage_data(study, DataConfig(patients=300, resolution=64))
    write_text(study / "plan.json", "{}")
    stage_known_generator(study, PLAN)
    return study


PLAN = Plan(
    pools=dict(mixed=60, full=200),
    builtin="copy",
    generators=tuple(
        PlannedGenerator(f"real010-rep{k}", 0.1, k, images=dict(normal=40, pneumonia=40))
        for k in SIX
    ),
    primary=Contrast("mixed", "real", 0.1, "internal"),
    sha256="0" * 64,
)


@pytest.fixture(scope="module")
def context(study):
    return RunContext(study, PLAN, ExperimentsConfig(size=64, views=VIEWS, device="cpu"), "cpu")


@pytest.fixture(scope="module")
def pixels(study):
    "As `context`, for networks that learn from pixels, at a size of their own."
    cfg = ExperimentsConfig(method="finetune", network="small_cnn", size=48, device="cpu")
    return RunContext(study, PLAN, cfg, "cpu")


def resized(film):
    return np.asarray(prepare_image(Image.fromarray(film), 48))


def rows_of(context, arm, fraction=0.1):
    "What an arm trains on, as weighted rows, with the total that its films have."
    run = Run(arm, fraction, 0, 0)
    return weighted_rows(training_set(run, context).phases[-1], context.total_weight(run))


def test_copies_gain_nothing(context):
    """The arm `copy`, and `mixed` with a generator that copies, against `real`; and what they gained when a
    film was shown in one view drawn by lot, as it was before.
    """
    even = RunContext(context.study, PLAN, replace(context.cfg, C=0.03), "cpu")
    internal = split_rows(even.study, "internal")
    seen = even.store.unaltered(internal.image_id)

    def auroc(strata, run):
        head = fit_probe(*weighted_rows(strata, even.total_weight(run)), 0.03)
        return roc_auc_score(internal.label, predict_probe(head, seen))

    gains = []
    for k in SIX:
        runs = [Run(arm, 0.1, k, 0) for arm in ("real", "copy", "mixed")]
        real, copy, mixed = (auroc(training_set(r, even).phases[0], r) for r in runs)
        x, y = even.store.views(even.training_rows(runs[0]).image_id), even.labels(runs[0])
        lot = np.random.default_rng(k).integers(0, VIEWS, len(y))
        once = x[lot, np.arange(len(y))]
        copies = strata_by_class(*even.copied_images(runs[1], 60), 0.5)
        naive = auroc(strata_by_class(once, y, 1.0), runs[0])
        gained = auroc(strata_by_class(once, y, 0.5) + copies, runs[0]) - naive
        gains.append([copy - real, mixed - real, gained, real - naive])
    copy, mixed, gained, stronger = np.mean(gains, 0)
    assert copy < 0.002 and mixed < 0.002, gains
    assert gained > 0.005 and stronger > gained, gains


def test_real_has_one_answer(context):
    heads = [fit_run(Run("real", 0.1, 0, seed), context).model for seed in (0, 1, 2)]
    assert all(np.array_equal(head.coef_, heads[0].coef_) for head in heads)
    mixed = [fit_run(Run("mixed", 0.1, 0, seed), context).model for seed in (0, 1)]
    assert not np.array_equal(mixed[0].coef_, mixed[1].coef_)


def test_seeds_share_the_fit_of_real(context, monkeypatch):
    fit_run(Run("real", 0.1, 1, 0), context)
    monkeypatch.setattr(
        "cxr_synth.classify.feature_store.fit_probe", lambda *a, **k: pytest.fail("fitted again")
    )
    fresh = RunContext(context.study, context.plan, context.cfg, "cpu")  # as in another process
    fit_run(Run("real", 0.1, 1, 5), fresh)


def test_views_weigh_no_more_than_their_film(context):
    n = len(training_rows(context.study, 0.1, 0))
    for arm in ("real", "duplicate", "augmented", "mixed", "copy", "more_real", "permuted"):
        x, y, weight = rows_of(context, arm)
        assert weight.sum() == pytest.approx(n), arm
        assert weight[y == 1].sum() == pytest.approx(n / 2), arm
    x, y, weight = rows_of(context, "real")
    assert len(y) == VIEWS * n
    x, y, weight = rows_of(context, "mixed")
    assert weight[: VIEWS * n].sum() == pytest.approx(n / 2)
    x, y, weight = rows_of(context, "rebalanced")  # there a synthetic image weighs as a film
    assert weight[0] * VIEWS == pytest.approx(weight[-1])


def test_no_child_on_both_sides_when_C_is_chosen(context, monkeypatch):
    seen = []

    def held_out_losses(x, y, train, held, grid):
        seen.append((x.shape, set(train), set(held)))
        return np.ones(len(grid))

    monkeypatch.setattr(probe, "_held_out_losses", held_out_losses)
    rows = training_rows(context.study, 0.25, 0)
    choose_C(context.store.views(rows.image_id), rows.label, rows.patient_id, 0)
    who = rows.patient_id.to_numpy()
    assert len(seen) == 5
    for shape, train, held in seen:
        assert shape[:2] == (VIEWS, len(rows))
        assert not {*who[list(train)]} & {*who[list(held)]}
        assert len(train | held) == len(rows)


def test_C_does_not_depend_on_how_often_a_view_is_repeated(context):
    "The balance of loss and regularisation is one of films, not of rows."
    rows = training_rows(context.study, 0.25, 1)
    x = np.asarray(context.store.unaltered(rows.image_id))
    y, patients = rows.label.to_numpy(), rows.patient_id
    grid = (1e-3, 3e-3, 1e-2)
    split = np.arange(len(y)) % 2 == 0, np.arange(len(y)) % 2 == 1
    once, four = (
        probe._held_out_losses(np.stack([x] * n), y, *map(np.flatnonzero, split), grid)
        for n in (1, 4)
    )
    assert once == pytest.approx(four, abs=1e-6)
    one, more = (choose_C(np.stack([x] * n), y, patients, 0, 2, grid) for n in (1, 3))
    assert one == more


def test_C_of_an_arm_is_that_of_real(context):
    rows = training_rows(context.study, 0.1, 0)
    C = {context.C(Run(arm, 0.1, 0, 0)) for arm in ("real", "mixed", "copy", "more_real")}
    assert len(C) == 1
    fresh = FeatureStore(context.study, context.cfg, context.plan.seed, "cpu")
    assert chosen_C(fresh, rows, seed_for(context.plan.seed, "C", 0.1)) in C


@pytest.mark.parametrize("C", [3e-4, 1e-2, 1e-1])
def test_the_solver_finds_the_optimum(context, C):
    "Another solver's; and a start elsewhere changes nothing."
    rows = training_rows(context.study, 0.25, 0)
    x, y = context.store.views(rows.image_id), rows.label.to_numpy()
    weight = balanced_weights(y, len(y))
    head = fit_probe(x, y, weight, C)
    flat = x.reshape(-1, x.shape[-1]).astype(float)
    other = LogisticRegression(C=C, tol=1e-9, solver="newton-cholesky")
    other.fit(flat, np.tile(y, VIEWS), sample_weight=np.tile(weight / VIEWS, VIEWS))
    assert np.abs(predict_probe(head, flat) - other.predict_proba(flat)[:, 1]).max() < 1e-5
    start = fit_probe(x[0], y, weight, 0.1)
    again = fit_probe(x, y, weight, C, start=start)
    assert np.abs(predict_probe(head, flat) - predict_probe(again, flat)).max() < 1e-5


def test_copies_are_the_films_of_the_run(context, pixels):
    "Each differs from a film of the run by one pixel's shift and a JPEG, and the turns differ."
    run = Run("copy", 0.1, 0, 0)
    pool = context.plan.pools["mixed"]
    x, y = pixels.copied_images(run, pool)
    mixed = training_set(Run("mixed", 0.1, 0, 0), context)
    copy = training_set(run, context)
    assert copy.n_rows == mixed.n_rows
    assert [s.share for s in copy.phases[0]] == [s.share for s in mixed.phases[0]]
    assert (copy.about["pool"], copy.about["share"]) == (pool, 0.5)
    assert (copy.n_synthetic, copy.about["copies"]) == (0, mixed.n_synthetic)
    assert x.shape[1:] == (48, 48) and len(np.unique(x.reshape(len(x), -1), axis=0)) == len(x)
    rows = training_rows(context.study, 0.1, 0)
    for label in (0, 1):
        films = load_images(context.study, rows.image_id[rows.label == label])
        every = np.repeat(films, 8, 0), np.tile(np.arange(8), len(films))
        allowed = {resized(film).tobytes() for film in copy_films(*every)}
        assert {image.tobytes() for image in x[y == label]} <= allowed


def test_a_copy_is_a_shift_and_a_jpeg():
    rng = np.random.default_rng(0)
    film = np.cumsum(rng.normal(0, 3, (40, 40)), 1) + 100
    film = np.clip(film, 0, 255).astype(np.uint8)
    eight = copy_films(np.stack([film] * 8), range(8))
    assert len(np.unique(eight.reshape(8, -1), axis=0)) == 8
    for copied, (right, down) in zip(eight, DIRECTIONS):
        back = np.roll(copied, (-down, -right), (0, 1))[2:-2, 2:-2].astype(int)
        assert np.abs(back - film[2:-2, 2:-2]).mean() < 4
        assert (back != film[2:-2, 2:-2]).any()


def test_copies_repeat_as_late_as_they_can(pixels):
    "Films first, then directions: with eight times the films all copies differ."
    rows = training_rows(pixels.study, 0.1, 0)
    fewest = int(rows.label.value_counts().min())
    asked = {}

    def copies(ids, directions):
        asked["all"] = list(zip(ids, directions))
        return np.zeros((len(ids), 1))

    fresh = RunContext(pixels.study, pixels.plan, pixels.cfg, "cpu")
    fresh.store.copies = copies
    fresh.copied_images(Run("copy", 0.1, 0, 0), 2 * 8 * fewest)
    normal = asked["all"][: 8 * fewest]
    label = rows.set_index("image_id").label
    smaller = [p for p in asked["all"] if label[p[0]] == label.value_counts().idxmin()]
    assert len(set(smaller)) == 8 * fewest and len(normal) == 8 * fewest
    first = [film for film, _ in smaller[:fewest]]
    assert len(set(first)) == fewest


def test_copy_is_drawn_as_mixed_is(context):
    run = Run("copy", 0.1, 0, 1)
    y = context.copied_images(run, 40)[1]
    assert np.array_equal(y, context.synthetic_images(Run("mixed", 0.1, 0, 1), 40)[1])


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.25])
@pytest.mark.parametrize("replicate", [0, 3])
def test_more_real_is_a_quarter_more(study, fraction, replicate):
    own = training_rows(study, fraction, replicate)
    more = more_real_rows(study, fraction, replicate)
    assert {*own.image_id} < {*more.image_id}
    added = more[~more.image_id.isin(own.image_id)]
    assert not {*added.patient_id} & {*own.patient_id}
    for label in (0, 1):
        before = own.patient_id[own.label == label].nunique()
        assert added.patient_id[added.label == label].nunique() == int(before / 4 + 0.5)
    for split in ("internal", "val", "test"):
        assert not {*more.patient_id} & {*split_rows(study, split).patient_id}
    wider = {0.05: 0.1, 0.1: 0.25, 0.25: 0.5}[fraction]
    assert {*added.image_id} < {*training_rows(study, wider, replicate).image_id}
    assert more.equals(more_real_rows(study, fraction, replicate))


@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_more_real_needs_patients_left(context, fraction):
    with pytest.raises(CxrError, match="Allowed: 0.05, 0.1, 0.25"):
        training_set(Run("more_real", fraction, 0, 0), context)


def test_more_real_trains_on_them(context):
    run = Run("more_real", 0.25, 0, 0)
    facts = fit_run(run, context).facts
    assert facts["n_real"] == len(more_real_rows(context.study, 0.25, 0))
    assert facts["total_weight"] == len(training_rows(context.study, 0.25, 0))


@pytest.mark.parametrize("arm", ["copy", "more_real"])
def test_fine_tuning_has_both_arms(pixels, arm):
    found = training_set(Run(arm, 0.1, 0, 0), pixels)
    assert all(s.x.dtype == np.uint8 and s.x.shape[1:] == (48, 48) for s in found.phases[0])
    assert sum(s.share for s in found.phases[0]) == pytest.approx(1)


def test_the_labels_of_the_test_stay_in_the_manifest(context, tmp_path):
    study = context.study
    run = Run("real", 0.1, 0, 1)
    make_run(run, context)
    path = study / run.folder / "test.csv"
    table = pd.read_csv(path)
    assert list(table) == ["image_id", "patient_id", "split", "prob"]
    images = split_rows(study, "test")
    opened = read_test(path, images)
    assert opened.label.tolist() == images.label.tolist()
    shutil.copy(path, tmp_path / "test.csv")
    with pytest.raises(CxrError, match="not of the test"):
        read_test(tmp_path / "test.csv", images.iloc[1:])

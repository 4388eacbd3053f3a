"What was computed before is used again only for the same question and the same formula."

from dataclasses import replace
from types import SimpleNamespace

import numpy as np

from cxr_synth.quality import measure
from cxr_synth.quality.metrics import METRICS, metrics_on


def features(n, seed, d=12):
    return np.random.default_rng(seed).normal(size=(n, d))


def measured(folder, other=None):
    "Measurements of 12 images a side, with floor and value from the cache in a folder."
    baseline = measure.Baseline(features(40, 0), np.arange(40), other, 3, cache=folder)
    return baseline.measure(features(30, 2), 12)


def test_distances_of_a_shorter_list_of_metrics_are_not_taken(tmp_path, monkeypatch):
    "A study that was measured before a metric was added."
    other = features(40, 1)
    whole = measured(tmp_path / "whole", other)
    assert [*whole] == metrics_on("features") and "source-auc" in whole
    with monkeypatch.context() as patch:
        patch.delitem(METRICS, "source-auc")
        few = measured(tmp_path / "few", other)
    assert [*few] == [m for m in whole if m != "source-auc"]
    assert measured(tmp_path / "few", other) == whole


def test_a_corrected_formula_gives_its_own_number(tmp_path, monkeypatch):
    before = measured(tmp_path)["kid"].value
    other = replace(METRICS["kid"], function=lambda pair: 7.0)
    monkeypatch.setitem(METRICS, "kid", other)
    assert measured(tmp_path)["kid"].value == before  # the version says that nothing has changed
    monkeypatch.setitem(METRICS, "kid", replace(other, version=other.version + 1))
    assert measured(tmp_path)["kid"].value == 7


def test_similarity_of_a_corrected_formula(tmp_path, monkeypatch):
    x = np.random.default_rng(0).integers(0, 256, (8, 32, 32), np.uint8)

    def mean():
        return measure.set_similarity(x, 8, 8, 2, cache=tmp_path)[0][0]

    def constant(images, first, second):
        return np.full(len(first), 0.25, np.float32)

    before = mean()
    monkeypatch.setattr(measure, "ms_ssim", constant)
    assert mean() == before
    corrected = replace(METRICS["ms-ssim"], version=METRICS["ms-ssim"].version + 1)
    monkeypatch.setitem(METRICS, "ms-ssim", corrected)
    assert mean() == 0.25


class Pixels:
    "An embedder whose features are the pixels."

    key = ("pixels",)

    def __call__(self, images):
        return images.reshape(len(images), -1)

    layout = __call__


def test_copies_are_searched_again_for_other_patients_and_other_seen_images(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (12, 32, 32), np.uint8)
    labels, patients = np.zeros(12, int), np.arange(12)
    real = SimpleNamespace(
        images=images, labels=labels, patients=patients, cache=tmp_path, embedder=Pixels()
    )

    def nearest(seen, of=None):
        return measure.CopySearch(real, seen)(images[:3], of)["features"].to_numpy()

    every = np.ones(12, bool)
    assert nearest(every).max() < 1e-3  # each finds itself
    assert nearest(every, patients[:3]).min() > 0.1  # but not among other patients' images
    assert nearest(patients > 2).min() > 0.1
    assert nearest(every).max() < 1e-3

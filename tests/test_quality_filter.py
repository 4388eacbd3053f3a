"Images whose class the probe does not see are marked: the swapped ones, and no metadata is touched."

import json

import numpy as np
import pytest

from cxr_synth.base.files import CxrError, write_text
from cxr_synth.base.readers import read_csv, read_json
from cxr_synth.base.records import Study, open_stage
from cxr_synth.base.settings import DataConfig, GenerateConfig, QualityConfig
from cxr_synth.images.known_generators import draw_film, write_class_images
from cxr_synth.images.study_images import training_rows
from cxr_synth.protocol.sets import marked_images
from cxr_synth.quality.disagreement import film_heads, find_disagreement, patient_folds
from cxr_synth.quality.measure import RealReference, fit_head, load_synthetic_set
from cxr_synth.ship.set_card import filter_words
from cxr_synth.stages.data import stage_data
from cxr_synth.stages.quality import stage_quality

NAME = "real050-rep0"
CFG = dict(size=64, halvings=2, pairs=50, device="cpu")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    "40 images a class, of which the first ten show the other class."
    study = Study(tmp_path_factory.mktemp("filter") / "study")
    stage_data(study, DataConfig(patients=200, resolution=32, strength=2.0))
    folder, lines = study / f"synthetic/{NAME}", []
    for label in range(2):
        shown = [1 - label] * 10 + [label] * 30
        films = [draw_film(study, 9_000 + 2 * k + label, c) for k, c in enumerate(shown)]
        lines += write_class_images(folder, NAME, label, "truth", np.stack(films))
    write_text(folder / "metadata.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    open_stage(study, "generate", f"synthetic/{NAME}", GenerateConfig(), adopt=True).finish()
    return study


def test_swapped_labels_are_marked_and_metadata_stays(study):
    metadata = study / f"synthetic/{NAME}/metadata.jsonl"
    before = metadata.read_bytes()
    stage_quality(study, QualityConfig(filter="copies", **CFG))
    path = study / f"quality/{NAME}-disagreements.csv"
    assert not path.exists() and "classifier" not in filter_words(study, NAME)
    without = marked_images(study, NAME)
    with pytest.raises(CxrError, match="quality.filter"):
        stage_quality(study, QualityConfig(filter="classifier", **CFG))
    stage_quality(study, QualityConfig(filter="classifier", **CFG), redo=True)
    rows = read_csv(path)
    marked = {row["file_name"] for row in rows}
    assert {(row["reason"], row["by"]) for row in rows} == {("disagrees", "classifier")}
    for row in rows:  # the likelier class is the other one
        asked = row["file_name"].startswith("pneumonia")
        assert (float(row["pneumonia"]) >= 0.5) != asked
    names = [json.loads(line)["file_name"] for line in before.decode().splitlines()]
    swapped = {name for k, name in enumerate(names) if k % 40 < 10}
    assert len(swapped) == 20 and len(marked & swapped) >= 17
    assert len(marked - swapped) <= 0.2 * 60
    assert marked_images(study, NAME) == without | marked
    assert metadata.read_bytes() == before
    record = read_json(study / "quality/stage.json")
    facts = record["generators"][NAME]["disagreement"]
    assert facts["films"] == len(training_rows(study, 0.5, 0))
    assert facts["normal"]["marked"] + facts["pneumonia"]["marked"] == len(marked)
    assert max(facts[c]["real_share"] for c in ("normal", "pneumonia")) < 0.3
    assert f"classifier: {len(marked)} marked (disagrees: {len(marked)})" in filter_words(
        study, NAME
    )


def test_the_head_sees_the_generators_own_films_alone(study):
    real = RealReference(study, QualityConfig(**CFG), "cpu")
    synthetic = load_synthetic_set(study, NAME, real.embedder)
    counts = []

    def fit(x, y):
        counts.append(len(x))
        return fit_head(x, y)

    find_disagreement(real, synthetic, fit)
    n = len(training_rows(study, 0.5, 0))
    assert counts[-1] == n and sum(counts[:-1]) == 4 * n  # five folds, each left out once


def test_out_of_fold_means_by_patient():
    g = np.random.default_rng(1)
    labels, patients = np.repeat([0, 1], 20), np.repeat(np.arange(20), 2)
    folds = patient_folds(labels, patients)
    assert all(len(set(folds[patients == p])) == 1 for p in range(20)) and set(folds) == {*range(5)}
    x = g.normal(0, 1, (40, 3))
    heads = film_heads(x, labels, patients, lambda x, y: lambda f: np.full(len(f), len(x)))
    assert (heads.unseen(x, folds) == [40 - (folds == k).sum() for k in folds]).all()
    assert (heads.unseen(x[:3], np.full(3, -1)) == 40).all()


@pytest.mark.parametrize("labels", [[0, 0, 1], [0, 0, 0], [1, 1, 1]])
def test_too_few_patients(labels):
    with pytest.raises(CxrError, match="two of each class"):
        patient_folds(labels, [1, 2, 3])

"The quality stage on generators whose truth is known: new patients, out of focus, and copies."

import json
import re

import numpy as np
import pandas as pd
import pytest
from scipy.ndimage import gaussian_filter

from cxr_synth.base.files import CxrError, write_text
from cxr_synth.base.readers import read_json
from cxr_synth.base.records import Study, open_stage
from cxr_synth.base.settings import CLASSES, DataConfig, GenerateConfig, QualityConfig
from cxr_synth.images.known_generators import draw_film, write_class_images
from cxr_synth.images.study_images import load_images, training_rows
from cxr_synth.protocol.schema import MARK_COLUMNS, QUALITY_COLUMNS
from cxr_synth.protocol.sets import set_marks
from cxr_synth.quality.measure import Embedder, load_synthetic_set
from cxr_synth.stages.data import stage_data
from cxr_synth.stages.quality import quality_table, stage_quality

CFG = QualityConfig(size=64, halvings=8, pairs=200, device="cpu")


def write_set(study, name, images):
    "A synthetic set, as `generate` would leave it; images of each class."
    folder, lines = study / f"synthetic/{name}", []
    for label, of_class in enumerate(images):
        if len(of_class):
            lines += write_class_images(folder, name, label, "truth", of_class)
    write_text(folder / "metadata.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    open_stage(study, "generate", f"synthetic/{name}", GenerateConfig(), adopt=True).finish()


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    study = Study(tmp_path_factory.mktemp("quality") / "study")
    stage_data(study, DataConfig(patients=260, resolution=32))
    new = [
        np.stack([draw_film(study, 10_000 + 2 * k + label, label) for k in range(60)])
        for label in range(2)
    ]
    rows = training_rows(study, 1.0, 0).drop_duplicates("patient_id")  # a film of each: as varied
    seen = [load_images(study, rows.image_id[rows.label == label][:60]) for label in range(2)]
    noise = np.random.default_rng(0).normal(0, 1, (60, 32, 32))
    copied = [(x + noise).clip(0, 255).round().astype(np.uint8) for x in seen]
    write_set(study, "real100-rep0", new)
    write_set(study, "real100-rep0-base", [gaussian_filter(x, (0, 0.7, 0.7)) for x in new])
    write_set(study, "real100-rep1", copied)
    stage_quality(study, CFG)
    return study


@pytest.fixture(scope="module")
def table(study):
    return quality_table(study)


def verdicts(table, generator, metric, reference=None):
    "What is said of both classes."
    mine = (table.generator == generator) & (table.metric == metric)
    if reference:
        mine &= table.reference == reference
    return {*table[mine].verdict}


@pytest.mark.parametrize("metric", ["fd", "kid", "source-auc", "copies"])
def test_nothing_is_found_in_new_patients(table, metric):
    assert "above the floor" not in verdicts(table, "real100-rep0", metric)


@pytest.mark.parametrize("metric", ["fd", "kid", "mmd", "source-auc"])
def test_everything_is_found_before_fine_tuning(table, metric):
    assert verdicts(table, "real100-rep0-base", metric, "train") == {"above the floor"}


@pytest.mark.parametrize("metric", ["fd", "kid", "mmd", "coverage", "source-auc"])
def test_no_distance_minds_copying(table, metric):
    said = verdicts(table, "real100-rep1", metric, "train")
    assert said and not said & {"above the floor", "below the floor"}


def test_the_search_finds_the_copies_and_marks_them(study, table):
    assert verdicts(table, "real100-rep1", "copies") == {"above the floor"}
    marks = pd.read_csv(study / "quality/real100-rep1-copies.csv")
    assert len(marks) > 100 and [*marks] == MARK_COLUMNS
    assert {*marks.by} == {"copy report"}
    assert len(set_marks(study, "real100-rep1")) == len(marks)


def test_every_set_has_rows_of_one_shape_and_figures(study):
    for name in ("real100-rep0", "real100-rep0-base", "real100-rep1"):
        rows = read_json(study / f"quality/{name}.json")
        assert all([*row] == QUALITY_COLUMNS for row in rows)
        figures = {p.name for p in (study / "quality/figures" / name).iterdir()}
        pairs = {f"pairs-{c}.png" for c in CLASSES}
        assert figures == {"distances.png", "map.png", "copies.png"} | pairs
        assert (study / f"quality/figures/{name}-grid.png").is_file()


def test_the_record_says_what_the_search_could_find(study):
    facts = read_json(study / "quality/stage.json")["generators"]["real100-rep1"]
    assert re.match(r"n = \d\d images in 1280 dimensions", facts["warning"])  # half the patients
    assert {*facts["other_class"]} == {*CLASSES}
    assert {*facts["copies"]["normal"]["recall"]} == {"jpeg", "shift", "noise"}


def test_tests_for_copies_are_adjusted_for_their_number(study):
    "Two classes of three sets; the word stands where the adjusted test has it."
    rows = {k: read_json(study / f"quality/real100-rep{k}.json") for k in (0, 1)}
    found = [row for k in rows for row in rows[k] if row["metric"] == "copies"]
    assert all(row["p"] <= row["p_adjusted"] for row in found)
    assert all((row["p_adjusted"] <= 0.05) == ("copies, or" in row["sentence"]) for row in found)
    facts = read_json(study / "quality/stage.json")["generators"]
    assert {facts[name]["copies"][c]["tests"] for name in facts for c in CLASSES} == {6}
    near = [row for row in rows[1] if row["metric"] == "fd"]
    assert all(row["sentence"].endswith("raises its alarm: copies.") for row in near)
    assert not any("raises its alarm" in row["sentence"] for row in rows[0])


def test_a_second_call_changes_nothing(study):
    path = study / "quality/real100-rep0.json"
    before = path.stat().st_mtime_ns
    stage_quality(study, CFG)
    assert path.stat().st_mtime_ns == before


def test_a_set_without_a_class_is_named(tmp_path, study):
    one = Study(tmp_path / "one")
    some = np.stack([draw_film(study, 30_000 + k, 0) for k in range(2)])
    write_set(one, "real100-rep0", [some, []])
    with pytest.raises(CxrError, match="holds no pneumonia images"):
        load_synthetic_set(one, "real100-rep0", Embedder(CFG, "cpu"))

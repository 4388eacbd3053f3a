"The audit on data that are less than usual: nothing fails, and no sentence claims what was not measured."

import io

import numpy as np
import pytest

from cxr_synth.base.settings import DataConfig
from cxr_synth.data.audit import audit, audit_figure, held_out, one_hot_columns
from cxr_synth.data.sources import folder_source
from cxr_synth.data.survey import inspect_source
from cxr_synth.images.phantom import write_phantoms


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    "Table and thumbnails of 60 drawn patients."
    folder = write_phantoms(tmp_path_factory.mktemp("drawn") / "set", patients=60, size=64)
    t, small, _ = inspect_source(folder_source(folder), DataConfig(source=str(folder)))
    return t, small


def few(t, small):
    rows = t.groupby("label").head(4).index
    return t.loc[rows], small[rows]


def one_class(t, small):
    return t[t.label == 1], small[t.label == 1]


def one_image(t, small):
    return t[:1], small[:1]


def no_test(t, small):
    return t.assign(official_split="", split=t.split.where(t.split != "test", "internal")), small


def all_alike(t, small):
    return t.assign(pixels_sha256="x", split="train"), np.repeat(small[:1], len(t), 0)


def black(t, small):
    return t, small * 0


def png_only(t, small):
    return t.assign(quant="", quality=None, format="PNG"), small


def no_patients(t, small):
    return t.assign(kind="", patient_id="file-" + t.image_id, group=t.image_id), small


SAID = {  # what the finding of that name must say
    few: ("shortcuts", "Too few patients"),
    one_class: ("shortcuts", "Too few patients"),
    one_image: ("shortcuts", "Too few patients"),
    no_test: ("official test", "no official test"),
    all_alike: ("exact copies", "1 picture is there more than once"),
    black: ("blank", "of one grey all over"),
    png_only: ("shortcuts", "No trait of the files tells"),
    no_patients: ("patients", "tell no patient"),
}


@pytest.mark.parametrize("change", SAID)
def test_odd_sets(drawn, change):
    t, small = change(*drawn)
    report = audit(t, small)
    name, text = SAID[change]
    findings = {f["name"]: f["found"] for f in report["findings"]}
    assert text in findings[name]
    audit_figure(report, t, small).savefig(io.BytesIO())


def test_nothing_is_said_of_what_is_not_there(drawn):
    names = {f["name"] for f in audit(*no_test(*drawn))["findings"]}
    assert not any(name.startswith("shift") for name in names) and "official overlap" not in names
    shortcuts = {f["name"]: f["found"] for f in audit(*png_only(*drawn))["findings"]}["shortcuts"]
    assert "JPEG" not in shortcuts


def test_a_name_that_training_never_saw_is_no_evidence():
    "The regression knows nothing of it: equal scores, where rounding errors once decided."
    y, fold = np.arange(100) % 3 > 0, np.arange(100) % 5
    name = np.where((np.arange(100) < 40) & (fold == 4), "RGB", "L")  # all in one fold
    score = held_out(one_hot_columns(name), y, fold)
    assert len(set(score[fold == 4])) == 1

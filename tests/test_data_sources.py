"Sources and rules: what is refused says what was received; the table of sources fits the settings."

from dataclasses import fields

import pytest

from cxr_synth.base.files import CxrError
from cxr_synth.base.records import Study
from cxr_synth.base.settings import SOURCE_SETTINGS, DataConfig
from cxr_synth.data.patients import patients_by_table
from cxr_synth.data.sources import (
    SOURCES,
    SourceEntry,
    class_rule,
    folder_source,
    open_source,
    patients_by_regex,
    register_source,
    unregister_source,
)
from cxr_synth.images.phantom import write_phantoms

NIH = ["No Finding/00000013_005.png", "No Finding/00000013_006.png", "Pneumonia/00000032_001.png"]


@pytest.mark.parametrize(
    "rule, says",
    [
        (r"\d+_\d+", "has 0 groups"),
        (r"(\d+)_(\d+)", "has 2 groups"),
        ("(", "is no regular expression"),
        ("person([0-9]+)", "fits none of 3 names"),
    ],
)
def test_bad_patient_rules(rule, says):
    with pytest.raises(CxrError, match=says):
        patients_by_regex(NIH, rule)


@pytest.mark.parametrize(
    "text, says",
    [
        ("file,who\n", "has no column image, patient_id"),
        ("image,patient_id\nscan7.png,ann\n", "such as scan7.png"),
        ("image,patient_id\n00000013_005.png,ann\n00000013_005.png,bob\n", "two patients"),
    ],
)
def test_bad_patient_tables(tmp_path, text, says):
    (tmp_path / "who.csv").write_text(text)
    with pytest.raises(CxrError, match=says):
        patients_by_table(NIH, tmp_path / "who.csv")
    with pytest.raises(CxrError, match="does not exist"):
        patients_by_table(NIH, tmp_path / "typo.csv")


@pytest.mark.parametrize(
    "spec", ["normal=CLEAR", "normal=A,pneumonia=A", "normal=A,pneumonia=B+b", "normal,pneumonia"]
)
def test_bad_class_rules(spec):
    with pytest.raises(CxrError, match="does not name both classes, or names a folder twice"):
        class_rule(spec)


def test_a_folder_too_deep(tmp_path):
    drawn = write_phantoms(tmp_path / "set", patients=10, size=64)
    with pytest.raises(CxrError, match=r"has no class folders \(found: IM-0001-0001.png"):
        folder_source(drawn / "train" / "NORMAL")


def test_table_of_sources():
    assert {name: entry.settings for name, entry in SOURCES.items()} == SOURCE_SETTINGS
    names = {f.name for f in fields(DataConfig)}
    special = {name for used in SOURCE_SETTINGS.values() for name in used}
    assert special <= names
    for source, used in SOURCE_SETTINGS.items():
        settings = DataConfig(source=source).settings()
        assert settings["source"] == source
        assert set(settings) & special == set(used)


def test_a_further_source(tmp_path):
    entry = SourceEntry("two", lambda study, cfg: (study, cfg), (), lambda cfg, paths: None)
    register_source("two", entry)
    try:
        cfg = DataConfig(source="two")
        assert cfg.kind == "two" and "patients" not in cfg.settings()
        assert open_source(Study(tmp_path), cfg)[1] is cfg
    finally:
        unregister_source("two")
    assert DataConfig(source="two").kind == "folder"

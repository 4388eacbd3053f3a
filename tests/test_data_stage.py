"The data stage: two roads to the same data, lost images, another source, bad input that leaves no trace."

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from cxr_synth.base.files import CxrError, write_json
from cxr_synth.base.readers import read_json
from cxr_synth.base.records import Study
from cxr_synth.base.settings import CLASSES, DataConfig
from cxr_synth.data.sources import folder_source
from cxr_synth.images.phantom import write_phantoms
from cxr_synth.images.study_images import load_fractions, load_manifest
from cxr_synth.protocol.dataset import dataset_card
from cxr_synth.stages.data import stage_data


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return write_phantoms(tmp_path_factory.mktemp("drawn") / "set", patients=60, size=64)


@pytest.fixture(scope="module")
def made(drawn, tmp_path_factory):
    "A finished study of the drawn folder, to be copied."
    study = Study(tmp_path_factory.mktemp("made") / "study")
    stage_data(study, DataConfig(source=str(drawn), resolution=32))
    return study


@pytest.fixture
def study(made, tmp_path):
    return Study(shutil.copytree(made.root, tmp_path / "study"))


@pytest.fixture
def cfg(drawn, tmp_path):
    "Settings for a copy of the drawn folder."
    return DataConfig(source=str(shutil.copytree(drawn, tmp_path / "films")), resolution=32)


def as_hub(folder, out):
    "Store a folder in the Hub's layout."
    from datasets import ClassLabel, Dataset, Features, Image as Column

    source = folder_source(folder)
    features = Features(image=Column(), label=ClassLabel(names=["NORMAL", "PNEUMONIA"]))
    (out / "data").mkdir(parents=True)
    for split in ("train", "test"):
        rows = [r for r in source.rows if r["official_split"] == split]
        images = [dict(bytes=source.read(r["path"]), path=Path(r["path"]).name) for r in rows]
        columns = dict(image=images, label=[CLASSES.index(r["class_name"]) for r in rows])
        table = Dataset.from_dict(columns, features=features)
        table.to_parquet(out / "data" / f"{split}-00000-of-00001.parquet")
    return out


def test_two_roads_to_the_same_data(made, drawn, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    study = Study(tmp_path / "hub-study")
    hub = as_hub(drawn, tmp_path / "hub")
    stage_data(study, DataConfig(source="hub", hub_id=str(hub), resolution=32))
    for rel in ("data/manifest.csv", "data/fractions.csv", "data/images"):
        assert study.digest(rel) == made.digest(rel), rel


def test_what_was_written_is_what_is_read(made):
    t = load_manifest(made)
    assert t.image_id.is_monotonic_increasing
    assert set(load_fractions(made).image_id) == set(t.image_id[t.split != "test"])
    assert "on two sides of the study" in (made / "data/audit.html").read_text(encoding="utf-8")


def test_other_settings_are_refused(study, cfg):
    with pytest.raises(CxrError, match="data.seed: recorded 0, now 1"):
        stage_data(study, replace(cfg, seed=1))


def test_other_contents_are_refused(study, cfg):
    film = next(Path(cfg.source).rglob("IM-0001-0001.png"))
    shutil.copyfile(next(Path(cfg.source).rglob("person*.png")), film)
    with pytest.raises(CxrError, match="IM-0001-0001 has other content"):
        stage_data(study, cfg)
    stage_data(study, cfg, redo=True)
    assert (study / "data.redo1/manifest.csv").is_file()


def test_lost_images_are_made_again(study, cfg, capsys):
    before = study.digest("data/images")
    lost = next((study / "data/images").iterdir())
    lost.unlink()
    record = read_json(study.record_path("data"))
    gone = Path(record["runtime"]["source"]).with_name("gone")
    record["runtime"]["source"] = str(gone)
    write_json(study.record_path("data"), record)
    stage_data(study, replace(cfg, source=str(gone)))  # the source is not here either
    assert "1 prepared images are not here, and neither is their source" in capsys.readouterr().out
    assert not lost.exists()
    stage_data(study, cfg)
    assert study.digest("data/images") == before


def test_unknown_card(study, cfg):
    with pytest.raises(CxrError, match="neither a known data set nor a file"):
        stage_data(study, replace(cfg, card="nobody.json"))
    assert not dataset_card(study).licensed


def test_a_header_that_is_fine_and_a_class_that_is_missing(cfg, tmp_path):
    film = next(Path(cfg.source, "test/NORMAL").iterdir())
    fresh, good = Study(tmp_path / "fresh"), film.read_bytes()
    film.write_bytes(good[: len(good) // 2])
    with pytest.raises(CxrError, match=f"cannot read the image test/NORMAL/{film.name}"):
        stage_data(fresh, cfg)
    shutil.rmtree(Path(cfg.source, "train/NORMAL"))
    with pytest.raises(CxrError, match="only pneumonia images for training"):
        stage_data(fresh, cfg)
    assert not fresh.root.exists()

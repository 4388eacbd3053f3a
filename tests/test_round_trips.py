"Real images after the autoencoder: written once, read as files, and never taken for synthetic ones."

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from cxr_synth.base.files import CxrError
from cxr_synth.base.records import Study, stale_stages
from cxr_synth.base.settings import DataConfig, ExperimentsConfig, GenerateConfig, resolve
from cxr_synth.classify.feature_store import FeatureStore
from cxr_synth.diffusion.image_writer import ImageSetWriter
from cxr_synth.diffusion.pipelines import load_pipeline, round_trip
from cxr_synth.images.images import prepare_image
from cxr_synth.images.study_images import load_images, training_rows
from cxr_synth.protocol.plan import Cell, Plan, PlannedGenerator
from cxr_synth.protocol.sets import load_metadata
from cxr_synth.ship.hub_push import push
from cxr_synth.ship.pack import pack, unpack
from cxr_synth.ship.set_card import write_card
from cxr_synth.stages.data import stage_data
from cxr_synth.stages.generate import stage_generate
from cxr_synth.stages.quality import synthetic_sets
from test_generate_shards import CFG, NAME, untrained_study

SET = f"{NAME}-roundtrip"
PLAN = Plan(
    arms=("real", "roundtrip"),
    cells=(Cell(1.0, 1, 2, ("real", "roundtrip")),),
    generators=(PlannedGenerator(NAME, images={"normal": 2, "pneumonia": 2}),),
)


def generate(study, **cfg):
    stage_generate(study, GenerateConfig(**CFG | cfg), plan=PLAN)


def contents(study):
    folder = study / "synthetic" / SET
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != "stage.json"]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    study = untrained_study(tmp_path_factory.mktemp("round_trips") / "study")
    generate(study)
    return study


def test_the_arm_sees_what_the_autoencoder_gives(study):
    "The same arrays as from the pipeline itself, at full resolution and at the experiments' size."
    rows = training_rows(study, 1.0, 0)
    vae = load_pipeline(study / f"models/{NAME}/normal", device="cpu").vae
    expected = round_trip(vae, load_images(study, rows.image_id))
    for size in (32, 24):
        store = FeatureStore(study, ExperimentsConfig(method="finetune", size=size), 0, "cpu")
        smaller = [np.asarray(prepare_image(Image.fromarray(x), size)) for x in expected]
        assert np.array_equal(store.roundtrip(1.0, 0), np.stack(smaller))


def test_no_place_takes_it_for_a_synthetic_set(study):
    assert synthetic_sets(study) == [NAME]
    calls = [
        lambda: load_metadata(study, SET),
        lambda: write_card(study, SET),
        lambda: push(study, SET, "me/set"),
    ]
    for call in calls:
        with pytest.raises(CxrError, match="real patients"):
            call()
    assert "real patients" in (study / "synthetic" / SET / "README.md").read_text()
    assert resolve("generate", recorded=study.recorded("generate")).num_inference_steps == 2


def test_packed_and_read_without_models_and_films(study, tmp_path):
    home = Study(tmp_path / "home")
    unpack(pack(study, tmp_path / "study.zip", ("study", "synthetic")), home)
    assert contents(home) == contents(study)
    assert not (home / f"models/{NAME}/normal").exists()
    stage_data(home, DataConfig(patients=120, resolution=32))
    generate(home)
    assert stale_stages(home) == []
    cfg = ExperimentsConfig(method="finetune", size=32)
    there, here = (FeatureStore(s, cfg, 0, "cpu").roundtrip(1.0, 0) for s in (study, home))
    assert np.array_equal(there, here)


def test_killed_and_shared(study, tmp_path, monkeypatch):
    "Stopped in the middle of a batch, gone on by two processes: the bytes of an undisturbed one."
    whole = contents(study)
    (study / "synthetic" / SET).rename(tmp_path / "whole")
    put, count = ImageSetWriter.put, []

    def killed(self, image, line):
        count.append(1)
        if len(count) == 12:
            raise KeyboardInterrupt
        put(self, image, line)

    with monkeypatch.context() as m:
        m.setattr(ImageSetWriter, "put", killed)
        with pytest.raises(KeyboardInterrupt):
            generate(study)
    assert len(list((study / "synthetic" / SET).glob("*.png"))) == 11
    generate(study, shard="2/2")
    with pytest.raises(CxrError, match="no finished round trips"):
        FeatureStore(study, ExperimentsConfig(size=32), 0, "cpu").roundtrip(1.0, 0)
    generate(study, shard="1/2")
    assert contents(study) == whole


def test_other_drawing_settings_are_none_of_its_business(study):
    before = (study / "synthetic" / SET / "stage.json").read_bytes()
    cfg = GenerateConfig(**CFG | dict(num_inference_steps=1))
    stage_generate(study, cfg, redo=True, plan=PLAN)
    assert (study / "synthetic" / SET / "stage.json").read_bytes() == before
    without = replace(PLAN, arms=("real",))
    stage_generate(study, cfg, plan=without)  # a plan without the arm needs none


def test_films_of_others_are_not_touched(study, tmp_path):
    (study / "synthetic" / SET).rename(tmp_path / "whole")
    mine = study / "synthetic" / SET / "mine.png"
    mine.parent.mkdir()
    mine.write_bytes(b"mine")
    with pytest.raises(CxrError, match="do not belong to the set"):
        stage_generate(study, GenerateConfig(**CFG | dict(num_inference_steps=1)), plan=PLAN)
    assert mine.read_bytes() == b"mine"

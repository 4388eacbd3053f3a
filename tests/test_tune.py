"""`cxr-synth tune`: resumable cell by cell, judged on validation films alone, refused after results;
what was edited, swapped or lost is named, as tests/test_chain.py does for the other stages.
"""

import json, shutil

import numpy as np, pytest
from PIL import Image
from cxr_synth.base.files import CxrError
from cxr_synth.base.readers import read_json
from cxr_synth.base.records import Study, stale_stages
from cxr_synth.base.settings import TuneConfig, resolve
from cxr_synth.images.study_images import load_manifest
from cxr_synth.quality import selection
from cxr_synth.stages import tune
from cxr_synth.stages.run import run, run_stage
from cxr_synth.stages.tune import combinations, stage_tune

CFG = TuneConfig(images=6, guidance="1 3", steps="2", samplers="ddim", device="cpu")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    train = dict(
        base="tiny",
        joint=False,
        vae_steps=4,
        base_steps=4,
        base_batch_size=8,
        max_train_steps=4,
        train_batch_size=8,
    )
    return run(
        tmp_path_factory.mktemp("tune") / "study",
        until="train",
        data=dict(patients=150, resolution=32),
        plan=dict(tier="guide", pool=40, size=32),
        train=train | dict(preview_steps=None, heldout_images=None, snapshots=2, snapshot_images=6),
        generate=dict(num_inference_steps=2),
        quality=dict(size=32, halvings=3),
    )


def test_snapshots_are_kept_and_recorded(study):
    folder = study / "models/real100-rep0"
    record = study.record("models/real100-rep0")
    sealed = resolve("generate", "tiny", study.recorded("generate"))
    about = {k: getattr(sealed, k) for k in ("num_inference_steps", "guidance_scale")}
    for c in ("normal", "pneumonia"):
        found = read_json(folder / c / "provenance.json", dict)["snapshots"]
        assert [row["step"] for row in found["table"]] == [2, 4]
        assert found["chosen"] in (2, 4)
        assert f"checkpoints/{c}-step000002.safetensors" in record["files"]
        assert all(row | about == row and row["extractor"] for row in found["table"])


def test_snapshots_may_go_once_the_model_is_there(study, tmp_path):
    copy = shutil.copytree(study.root, tmp_path / "s")
    kept = [*copy.glob("models/*/checkpoints/*-step*.safetensors")]
    assert len(kept) == 4  # none of the base
    for path in kept:
        path.unlink()
    model = Study(copy).record("models/real100-rep0")
    run_stage(Study(copy), "train")
    run_stage(Study(copy), "generate")
    assert Study(copy).record("models/real100-rep0") == model
    assert stale_stages(Study(copy)) == []


@pytest.fixture(scope="module")
def searched(study, tmp_path_factory):
    "A study with a search, to be read only."
    copy = Study(shutil.copytree(study.root, tmp_path_factory.mktemp("searched") / "s"))
    stage_tune(copy, CFG)
    return copy


@pytest.fixture
def copied(searched, tmp_path):
    "The same, to damage."
    return Study(shutil.copytree(searched.root, tmp_path / "s"))


def test_a_stopped_search_goes_on_and_test_films_are_never_read(study, searched, monkeypatch):
    seen, drawn, real = set(), [], tune._drawn
    load = selection.load_images
    monkeypatch.setattr(selection, "load_images", lambda s, ids: seen.update(ids) or load(s, ids))

    def stops(*args):
        if len(drawn) == 3:
            raise KeyboardInterrupt
        drawn.append(args[3])
        return real(*args)

    monkeypatch.setattr(tune, "_drawn", stops)
    with pytest.raises(KeyboardInterrupt):
        stage_tune(study, CFG)
    half = read_json(study / "tune.json", dict)["cells"]
    assert len(half) == 1
    monkeypatch.setattr(tune, "_drawn", real)
    found = stage_tune(study, CFG)
    assert found["cells"][:1] == half and len(found["cells"]) == 3
    rows = load_manifest(study)
    assert not seen & set(rows.image_id[rows.split == "test"])
    for name in ("tune.png", "tune.svg", "tune.stage.json"):
        assert (study / name).is_file()
    assert found == read_json(searched / "tune.json", dict)  # which nobody stopped
    best = min(found["cells"], key=lambda cell: cell["both"]["distance"])
    assert found["best"] == best and str(best["guidance_scale"]) in found["flags"]


def test_refused_once_classifiers_are_trained(study, monkeypatch):
    monkeypatch.setattr(type(study.ledger), "read", lambda self: ([dict(event="results")], []))
    with pytest.raises(CxrError, match="Choose before experiments"):
        stage_tune(study, CFG)


@pytest.mark.parametrize(
    "bad",
    [
        dict(guidance="0.5"),
        dict(guidance="much"),
        dict(steps="2.5"),
        dict(samplers="magic"),
        dict(images=5),
        dict(generator="mine"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(bad):
    with pytest.raises(CxrError, match="--tune|sampler|generator"):
        TuneConfig(**bad)


def test_the_present_settings_come_first_and_once():
    now = resolve("generate", "tiny", guidance_scale=3.0, num_inference_steps=2, scheduler="ddim")
    found = combinations(CFG, now)
    assert found[0]["guidance_scale"] == 3 and len(found) == 2
    steered = resolve("generate", "tiny", negative_prompt="noise")
    assert all(each["guidance_scale"] > 1 for each in combinations(CFG, steered))


MODELS = "models/real100-rep0"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def edited_result(study):
    found = read_json(study / "tune.json", dict)
    found["best"]["guidance_scale"] = 99.0
    (study / "tune.json").write_text(json.dumps(found))


def swapped_weights(study):
    shutil.copy(
        study / MODELS / "normal" / WEIGHTS,
        study / MODELS / "pneumonia" / WEIGHTS,
    )


def one_grey_level(study):
    path = next((study / "data/images").glob("*.png"))
    pixels = np.array(Image.open(path))
    pixels[0, 0] ^= 1
    Image.fromarray(pixels).save(path)


def moved_patient(study):
    path = study / "data/manifest.csv"
    path.write_text(path.read_text().replace(",val,", ",train,", 1))


ALTERED = {
    "tune.json": edited_result,
    MODELS: swapped_weights,
    "data/images": one_grey_level,
    "data/manifest.csv": moved_patient,
}


@pytest.mark.parametrize("names", ALTERED)
def test_altered_files_are_named(copied, names):
    ALTERED[names](copied)
    with pytest.raises(CxrError, match="was changed") as e:
        stage_tune(Study(copied.root), CFG)
    assert names in str(e.value).replace("\\", "/")


def test_what_was_lost_heals(copied):
    before = copied.digest("tune.json")
    (copied / "tune.json").unlink()
    stage_tune(Study(copied.root), CFG)
    assert Study(copied.root).digest("tune.json") == before
    assert stale_stages(Study(copied.root)) == []


def test_a_result_without_its_record_is_refused(copied):
    (copied / "tune.stage.json").unlink()
    with pytest.raises(CxrError, match="tune.json"):
        stage_tune(Study(copied.root), CFG)


@pytest.mark.parametrize("text", ["[]", '"text"', "null", "3", "{}", "{"])
def test_records_that_are_none(copied, cxr_synth_command, text):
    (copied / "tune.stage.json").write_text(text)
    said = cxr_synth_command("status", copied.root)
    assert said.status == 2 and "tune.stage.json" in said.err


@pytest.mark.parametrize(
    "damage",
    [
        lambda found: "{",
        lambda found: "[]",
        lambda found: "{}",
        lambda found: json.dumps(found | dict(cells=3)),
        lambda found: json.dumps(found | dict(cells=[dict(scheduler="ddim")])),
        lambda found: json.dumps(found).replace('"distance": ', '"distance": NaN, "was": ', 1),
    ],
    ids=["cut", "list", "empty", "no cells", "half a cell", "NaN"],
)
def test_a_damaged_search_is_named_when_it_goes_on(copied, damage):
    record = read_json(copied / "tune.stage.json", dict)
    del record["files"]
    (copied / "tune.stage.json").write_text(json.dumps(record | dict(status="running")))
    path = copied / "tune.json"
    path.write_text(damage(read_json(path, dict)))
    with pytest.raises(CxrError, match="tune.json"):
        stage_tune(Study(copied.root), CFG)

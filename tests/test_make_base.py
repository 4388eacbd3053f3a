"A small base trained on drawings: the script that makes it, and a study that starts from it."

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from diffusers import StableDiffusionPipeline

from cxr_synth.base.files import CxrError, digest_file
from cxr_synth.base.settings import TrainConfig
from cxr_synth.diffusion.pipelines import load_pipeline, round_trip
from cxr_synth.diffusion.tuned_decoder import tune_decoder
from cxr_synth.images.phantom import draw_phantom
from cxr_synth.stages.run import run

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def scripts():
    "The drawings and the script as modules."
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import base_drawings
    import make_base

    sys.path.remove(str(ROOT / "benchmarks"))
    return base_drawings, make_base


@pytest.fixture(scope="module")
def base(scripts, tmp_path_factory):
    "The folder that the script makes in two steps from few drawings."
    work, script = tmp_path_factory.mktemp("base"), scripts[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "DRAWINGS", 96)
        patch.setattr(script, "BATCH", 8)
        patch.setattr(sys, "argv", ["make_base.py", str(work), "2"])
        script.main()
    return work / "small-xray"


def test_drawings_depend_on_their_number_alone(scripts):
    draw = scripts[0].draw
    again = [draw(k) for k in range(8)]
    assert all((draw(k).film == again[k].film).all() for k in reversed(range(8)))
    assert {d.film.shape for d in again} == {(64, 64)} and {d.film.dtype for d in again} == {
        np.dtype("uint8")
    }
    assert len({d.film.tobytes() for d in again}) == 8


def test_captions_name_what_is_drawn_and_never_a_pneumonia(scripts):
    drawings, seen = scripts[0], set()
    for number in range(300):
        caption = drawings.draw(number).caption
        assert (
            caption.startswith("a chest xray ")
            and "pneumonia" not in caption
            and "{" not in caption
        )
        seen |= {
            word
            for word in ("effusion", "nodules", "mass", "collapse", "normal")
            if word in caption
        }
    assert len(seen) == 5


def test_a_mass_is_brighter_than_the_same_chest_without(scripts):
    drawings = scripts[0]
    rng = np.random.default_rng(0)
    y, x = np.mgrid[-1:1:64j, -1:1:64j]
    for side in (-1, 1):
        shadow = drawings._SHADOWS["mass"](x, y, {}, side, rng)
        assert 0.5 < shadow.max() <= 1 and shadow[:, x[0] * side < -0.2].max() < 0.2


def test_the_folder_is_whole_and_small(base):
    assert sum(p.stat().st_size for p in base.rglob("*") if p.is_file()) < 10.5e6
    facts = json.loads((base / "provenance.json").read_text())
    assert {name: digest_file(base / name) for name in facts["weights"]} == facts["weights"]
    assert "never seen a pneumonia" in (base / "README.md").read_text()
    assert StableDiffusionPipeline.from_pretrained(base, safety_checker=None).vae_scale_factor == 8


def test_its_round_trip_loses_nothing_and_there_is_nothing_to_tune(base, tmp_path):
    vae = load_pipeline(str(base)).vae
    films = np.stack([draw_phantom(k, 0, k % 2) for k in range(3)])
    assert (round_trip(vae, films) == films).all()
    with pytest.raises(CxrError, match="WaveletVAE has no decoder to tune"):
        tune_decoder(
            vae, films, tmp_path / "d.safetensors", tmp_path / "d.pt", TrainConfig(tune_decoder=2)
        )


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_study_starts_from_it(base, tmp_path, method):
    train = dict(base=str(base), max_train_steps=2, train_batch_size=4, preview_steps=None)
    run(
        tmp_path / "s",
        until="generate",
        data=dict(patients=60),
        plan=dict(tier="lesson", pool=12, size=32),
        train=train | dict(method=method, rank=4),
        generate=dict(num_inference_steps=2),
    )
    generator = next((tmp_path / "s/models").glob("real*"))
    assert json.loads((generator / "normal/provenance.json").read_text())["base"] == "small-xray"
    assert not (generator / "base").exists()
    assert len(list((tmp_path / "s/synthetic" / generator.name).rglob("*.png"))) >= 12

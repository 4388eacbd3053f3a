"A small base trained on drawings: the script that makes it, and a study that starts from it."

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from cxr_synth.base.files import digest_file
from cxr_synth.base.settings import TrainConfig, shipped_folder
from cxr_synth.diffusion.decoder import load_decoder
from cxr_synth.diffusion.hub import check_source
from cxr_synth.diffusion.pipelines import load_pipeline
from cxr_synth.diffusion.tuned_decoder import film_error, tune_decoder
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
        patch.setattr(script, "UNSEEN", 16)
        for name in ("BATCH", "VAE_BATCH"):
            patch.setattr(script, name, 8)
        patch.setattr(sys, "argv", ["make_base.py", str(work), "2", "2"])
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


def test_the_shipped_one_is_what_the_script_makes(base):
    shipped = shipped_folder("small-xray")
    facts = json.loads((shipped / "provenance.json").read_text())
    assert {name: digest_file(shipped / name) for name in facts["weights"]} == facts["weights"]
    assert sum(p.stat().st_size for p in shipped.rglob("*") if p.is_file()) < 10.5e6
    names = [
        sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))
        for folder in (shipped, base)
    ]
    assert names[0] == names[1]
    for part in ("unet", "vae", "text_encoder"):
        ours, made = (json.loads((f / part / "config.json").read_text()) for f in (shipped, base))
        ours.pop("scaling_factor", None), made.pop("scaling_factor", None)
        assert ours == made


def test_a_folder_of_the_same_name_wins(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert check_source("small-xray").folder == shipped_folder("small-xray")
    (tmp_path / "small-xray").symlink_to(base)
    assert shipped_folder("small-xray") is None
    assert check_source("small-xray").folder.resolve() == base


def test_its_decoder_is_tuned_and_its_grain_measured(base, tmp_path):
    vae = load_pipeline(str(base)).vae
    films = np.stack([draw_phantom(k, 0, k % 2) for k in range(16)])
    before = film_error(vae, films)
    cfg = TrainConfig(tune_decoder=10, decoder_batch_size=8, device="cpu")
    tune_decoder(vae, films, tmp_path / "d.safetensors", tmp_path / "d.pt", cfg)
    grain = vae.decoder.grain.clone()
    assert film_error(vae, films) < before and (grain > 0).all()
    fresh = load_pipeline(str(base)).vae
    load_decoder(fresh, tmp_path / "d.safetensors")
    assert torch.equal(fresh.decoder.grain, grain)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_study_starts_from_it(base, tmp_path, method):
    train = dict(base=str(base), max_train_steps=2, train_batch_size=4, preview_steps=None)
    run(
        tmp_path / "s",
        until="generate",
        data=dict(patients=120),
        plan=dict(tier="lesson", pool=12, size=32),
        train=train | dict(method=method, rank=4),
        generate=dict(num_inference_steps=2),
    )
    generator = next((tmp_path / "s/models").glob("real*"))
    assert json.loads((generator / "joint/provenance.json").read_text())["base"] == "small-xray"
    assert not (generator / "base").exists()
    assert len(list((tmp_path / "s/synthetic" / generator.name).rglob("*.png"))) >= 12

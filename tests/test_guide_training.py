"The guide's sections 6 and 7, verbatim but for the base, sizes and steps: its two prompts share one folder."

import shutil

import numpy as np
import pytest
from PIL import Image

import cxr_synth
from cxr_synth.base.readers import read_json
from cxr_synth.base.settings import PROMPTS
from cxr_synth.diffusion.command import parse_command
from cxr_synth.diffusion.small_pipeline import tiny_pipeline
from cxr_synth.images.phantom import draw_phantom
from test_train_guide import BLOCKS

SHORT = dict(
    resolution=32,
    train_batch_size=2,
    max_train_steps=2,
    num_class_images=3,
    num_validation_images=1,
    device="cpu",
)


@pytest.fixture
def colab(tmp_path, monkeypatch):
    "The working folder of the guide's notebook: training data, and a base under another name."
    monkeypatch.chdir(tmp_path)
    prompts = [*PROMPTS.values(), "a chest x-ray image, medical radiograph"]
    tiny_pipeline("tokenizer", prompts, 32).save_pretrained("base")
    for label, cls in enumerate(PROMPTS):
        (tmp_path / "cxr_training_data" / cls).mkdir(parents=True)
        for k in range(4):
            film = Image.fromarray(draw_phantom(k, 0, label, size=32))
            film.save(tmp_path / "cxr_training_data" / cls / f"{k:05d}.png")
    return tmp_path


def _section_6(n):
    "`generate_class_images(200, './class_images/xray')`, as the guide calls it."
    cxr_synth.generate_class_images(
        n, "./class_images/xray", base="./base", steps=2, batch_size=2, device="cpu"
    )


def _section_7(block, **more):
    flags = parse_command(block) | SHORT | dict(pretrained_model_name_or_path="./base")
    return cxr_synth.train_dreambooth(**flags | more)


def test_section_6_then_7(colab, capsys):
    _section_6(3)
    drawn = {p.name: p.read_bytes() for p in (colab / "class_images/xray").iterdir()}
    for block in BLOCKS[:2]:
        capsys.readouterr()
        out = _section_7(block)
        said = [line for line in capsys.readouterr().out.splitlines() if "class_images" in line]
        assert len(said) == 1 and "medical radiograph" in said[0] and "as they are" in said[0]
        prior = read_json(out / "provenance.json")["prior"]
        assert prior == dict(images=3, prompt="a chest xray image")
    assert {p.name: p.read_bytes() for p in (colab / "class_images/xray").iterdir()} == drawn


def test_missing_images_are_drawn_as_the_folder_says(colab):
    _section_6(3)
    whole = {p.name: p.read_bytes() for p in (colab / "class_images/xray").iterdir()}
    shutil.rmtree("class_images")
    _section_6(1)
    _section_7(BLOCKS[0])
    assert {p.name: p.read_bytes() for p in (colab / "class_images/xray").iterdir()} == whole


def test_too_many_images(colab):
    _section_6(5)
    out = _section_7(BLOCKS[0])
    assert read_json(out / "provenance.json")["prior"]["images"] == 3


@pytest.mark.parametrize("class_images", [True, False])
def test_auto_precision_with_a_prior(colab, class_images, monkeypatch):
    "Settled once: images, training and record say the same; asked again, the model is there."
    if class_images:
        _section_6(3)
    out = _section_7(BLOCKS[0], mixed_precision="auto")
    facts = read_json(out / "provenance.json")
    folder = read_json(colab / "class_images/xray/class_images.json")
    assert facts["settings"]["mixed_precision"] in ("no", "bf16")
    assert class_images or folder["precision"] == facts["settings"]["mixed_precision"]
    before = (out / "provenance.json").stat().st_mtime_ns
    monkeypatch.setattr(
        "cxr_synth.diffusion.dreambooth.pick_precision", lambda device: "fp16"
    )  # as on another machine
    _section_7(BLOCKS[0], mixed_precision="auto")
    assert (out / "provenance.json").stat().st_mtime_ns == before


def test_class_images_are_read_as_they_were_drawn(colab):
    "Whether they were drawn just now or before, the model is the same to the bit."
    weights = "unet/diffusion_pytorch_model.safetensors"
    first = _section_7(BLOCKS[0]) / weights
    again = _section_7(BLOCKS[0], output_dir="models/again") / weights
    assert first.read_bytes() == again.read_bytes()
    assert len(list((colab / "class_images/xray").glob("*.png"))) == 3
    assert np.asarray(Image.open(colab / "class_images/xray/0000.png")).shape == (32, 32)

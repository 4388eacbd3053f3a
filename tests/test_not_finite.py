"""A network that begins to give NaN stops whatever draws with it, at once: no black image is written, and
after mending the same command goes on.
"""

from functools import partial

import numpy as np
import pytest
import torch
from cxr_synth.base.files import CxrError
from cxr_synth.base.readers import read_json
from cxr_synth.base.settings import PROMPTS, GenerateConfig, TrainConfig
from cxr_synth.diffusion import dreambooth, image_set
from cxr_synth.diffusion.command import train_dreambooth
from cxr_synth.diffusion.dreambooth import class_task, generate_class_images, make_class_images
from cxr_synth.diffusion.pipelines import load_pipeline, save_pipeline
from cxr_synth.diffusion.sampling import generate_synthetic_dataset, load_finetuned_model, sample
from cxr_synth.diffusion.small_pipeline import tiny_pipeline
from cxr_synth.images.folders import read_image
from PIL import Image

STEPS = 2


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    prompts = [*PROMPTS.values(), "a chest xray image", "chest"]
    save_pipeline(tiny_pipeline(folder / "tokenizer", prompts, 32), folder / "base")
    return folder / "base"


def spoil(pipe, part, k):
    "From call number `k` of a part on, counted from 0, one of its numbers is NaN."
    calls = []

    def first_number(out):
        out = out[0] if isinstance(out, tuple) else out.sample
        calls.append(len(out))
        if len(calls) > k:
            out[0, 0, 0, 0] = torch.nan

    network = pipe.unet if part == "U-Net" else pipe.vae.decoder
    if part == "U-Net":
        network.register_forward_hook(lambda module, args, out: first_number(out))
    else:
        network.register_forward_hook(lambda module, args, out: first_number((out,)))
    return pipe


def of_batch(part, k):
    "The call of a part with which batch `k` begins."
    return k * STEPS if part == "U-Net" else k


def shows_something(path):
    return np.ptp(np.asarray(read_image(path)).astype(int)) > 0


def said(call, *texts):
    with pytest.raises(CxrError) as caught:
        call()
    for text in texts:
        assert text in str(caught.value), str(caught.value)


@pytest.mark.parametrize("part", ["U-Net", "decoder"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_generate_stops(study_copy, cxr_synth_command, monkeypatch, part, precision):
    name = "real010-rep0"
    load = image_set.load_model
    more = ("--generate.mixed-precision", precision, "--exploratory")
    with monkeypatch.context() as m:
        m.setattr(
            image_set, "load_model", lambda *a: spoil(load(*a), part, of_batch(part, 1))
        )  # each class has a model of its own, and three batches of two
        done = cxr_synth_command("generate", study_copy.root, *more, "--redo")
    first = image_set.image_seed(0, name, "normal", 2)
    assert done.status == 2 and "Traceback" not in done.err
    for text in (f"{name} normal", f"seed {first}", f"The {part} gave NaN"):
        assert text in done.err, done.err
    help_is_float32 = "--generate.mixed-precision no --redo" in done.err
    assert help_is_float32 == (part == "U-Net" and precision == "bf16")
    assert ("mixed precision bf16" in done.err) == help_is_float32
    images = sorted(p.name for p in (study_copy / f"synthetic/{name}").rglob("*.png"))
    assert images == ["000000.png", "000001.png"]
    assert read_json(study_copy / f"synthetic/{name}/stage.json")["status"] == "running"
    assert cxr_synth_command("generate", study_copy.root, *more, "--redo").status == 0  # goes on
    assert len(list((study_copy / f"synthetic/{name}").rglob("*.png"))) == 12


def test_the_advice_of_generate_works(study_copy, cxr_synth_command, monkeypatch):
    load = image_set.load_model

    def half(model, device, cfg):
        pipe = load(model, device, cfg)
        return pipe if cfg.mixed_precision == "no" else spoil(pipe, "U-Net", 0)

    monkeypatch.setattr(image_set, "load_model", half)
    more = ("--generate.mixed-precision", "bf16")
    assert cxr_synth_command("plan", study_copy.root, *more, "--redo").status == 0
    done = cxr_synth_command("generate", study_copy.root, *more, "--redo")
    lines = [line.partition("cxr-synth ")[2] for line in done.err.splitlines()]
    lines = [line for line in lines if line]
    assert [line.split()[0] for line in lines] == ["plan", "generate"]
    for line in lines:
        done = cxr_synth_command(*line.split())
        assert done.status == 0, done.err


@pytest.mark.parametrize("part", ["U-Net", "decoder"])
def test_class_images_stop(base, tmp_path, part):
    pipe = spoil(load_pipeline(base), part, of_batch(part, 1))

    def call(pipe):
        return make_class_images(pipe, tmp_path / "c", "chest", 6, 32, STEPS, batch=2)

    said(lambda: call(pipe), f"class images in {tmp_path / 'c'}", "seed 2", f"The {part}")
    assert sorted(p.name for p in (tmp_path / "c").glob("*.png")) == ["0000.png", "0001.png"]
    assert len(call(load_pipeline(base))) == 6
    assert all(map(shows_something, (tmp_path / "c").glob("*.png")))


def test_the_guides_class_images_stop(base, tmp_path, monkeypatch):
    monkeypatch.setattr(
        dreambooth, "load_pipeline", lambda *a, **kw: spoil(load_pipeline(*a, **kw), "U-Net", 0)
    )
    how = dict(base=str(base), steps=STEPS, batch_size=2, device="cpu", mixed_precision="bf16")
    call = partial(generate_class_images, 2, str(tmp_path / "c"), "chest", **how)
    said(call, "seed 0", "bf16", "mixed_precision no")
    assert not list((tmp_path / "c").glob("*.png"))


@pytest.mark.parametrize("part", ["U-Net", "decoder"])
def test_previews_stop(base, tmp_path, monkeypatch, part):
    """The training itself is sound: the preview at step 2 is not."""
    cfg = TrainConfig(
        base=str(base),
        max_train_steps=4,
        max_views=100,
        train_batch_size=2,
        preview_steps=2,
        preview_images=1,
        heldout_images=None,
        mixed_precision="no",
        device="cpu",
    )
    images = np.random.default_rng(0).integers(0, 255, (4, 32, 32), np.uint8)
    draw, drawn = dreambooth.Previews.__call__, []

    def spoilt(self, loop):
        drawn.append(loop.step)
        if loop.step == 2:
            spoil(self.trainer.pipe, part, 0)
        draw(self, loop)

    monkeypatch.setattr(dreambooth.Previews, "__call__", spoilt)
    task, out = class_task(images, "chest"), tmp_path / "m"
    how = dict(desc="one", previews=tmp_path / "p")
    call = partial(dreambooth.fine_tune, str(base), task, out, tmp_path / "m.pt", cfg, **how)
    said(call, "one: the preview at step 2", f"The {part} gave NaN", "float32")
    assert [p.name for p in (tmp_path / "p").glob("*.png")] == ["000000.png"]
    assert not (out / "provenance.json").exists() and max(drawn) == 2


@pytest.mark.parametrize("part", ["U-Net", "decoder"])
def test_the_guides_images_stop(base, tmp_path, part):
    pipe = spoil(load_finetuned_model(base, "cpu"), part, of_batch(part, 2))

    def call(pipe):
        return generate_synthetic_dataset(pipe, "chest", 6, str(tmp_path / "s"), 2, STEPS)

    said(lambda: call(pipe), str(tmp_path / "s"), "'chest'", "seed 4", f"The {part}")
    assert len(list((tmp_path / "s").glob("*.png"))) == 4
    call(load_finetuned_model(base, "cpu"))
    assert len(list((tmp_path / "s").glob("*.png"))) == 6


def test_the_guides_training_stops(base, tmp_path, monkeypatch):
    "Not with black images as a prior."
    (tmp_path / "i").mkdir()
    for k in range(4):
        x = np.random.default_rng(k).integers(0, 255, (32, 32), np.uint8)
        Image.fromarray(x).save(tmp_path / f"i/{k}.png")
    monkeypatch.setattr(
        dreambooth, "load_pipeline", lambda *a, **kw: spoil(load_pipeline(*a, **kw), "decoder", 0)
    )
    call = partial(
        train_dreambooth,
        pretrained_model_name_or_path=str(base),
        instance_data_dir=str(tmp_path / "i"),
        output_dir=str(tmp_path / "m"),
        instance_prompt="chest",
        with_prior_preservation=True,
        num_class_images=2,
        resolution=32,
        train_batch_size=2,
        max_train_steps=2,
        device="cpu",
    )
    said(call, "class images in", "seed 0", "The decoder gave NaN", "in float32")
    assert not list(tmp_path.rglob("class_images/*.png"))


@pytest.mark.parametrize("upcast", [True, False])
def test_a_decoder_that_overflows_in_half_precision(base, upcast):
    "Stable Diffusion's in float16: finite in float32, whether or not its configuration says so."
    pipe = load_finetuned_model(base, "cpu")
    pipe.vae.register_to_config(force_upcast=upcast)
    cfg = GenerateConfig(num_inference_steps=STEPS, mixed_precision="bf16", device="cpu")
    exact = np.asarray(sample(pipe, "chest", [1], 32, cfg)[0])
    real = pipe.vae.decoder.conv_in.forward

    def narrow(x):
        out = real(x)
        return out if out.dtype == torch.float32 else out * torch.inf

    pipe.vae.decoder.conv_in.forward = narrow
    assert np.array_equal(exact, np.asarray(sample(pipe, "chest", [1], 32, cfg)[0]))
    half = load_finetuned_model(base, "cpu")
    half.vae.to(torch.float16)  # as a user may have loaded it
    assert np.ptp(np.asarray(sample(half, "chest", [1], 32, cfg)[0])) > 0
    assert half.vae.dtype == torch.float32

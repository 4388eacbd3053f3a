"A model that was trained is gone from memory when the next one comes, and after an error too."

import gc
import weakref

import numpy as np
import pytest
from PIL import Image

import cxr_synth
from cxr_synth.base.files import CxrError
from cxr_synth.base.settings import PROMPTS, TrainConfig
from cxr_synth.diffusion import dreambooth
from cxr_synth.diffusion.dreambooth import TrainingTask, make_trainer, train_base
from cxr_synth.diffusion.pipelines import load_pipeline
from cxr_synth.diffusion.small_pipeline import tiny_pipeline
from cxr_synth.diffusion.trainer import Trainer
from cxr_synth.images.phantom import draw_phantom

METHODS = {"full": {}, "lora": dict(rank=4)}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("memory")
    tiny_pipeline(root / "tokenizer", PROMPTS.values(), 32).save_pretrained(root / "base")
    (root / "images").mkdir()
    for k in range(8):
        Image.fromarray(draw_phantom(k, 0, 0, size=32)).save(root / f"images/{k}.png")
    return root


@pytest.fixture
def loaded(monkeypatch):
    "Weak references to the networks of each pipeline that is loaded or made, and to its trainer."
    seen = []

    def watched(make):
        def load(*args, **kw):
            alive = [ref() for refs in seen for ref in refs if ref() is not None]
            assert not alive, f"{len(alive)} networks are alive when the next pipeline is loaded"
            pipe = make(*args, **kw)
            seen.append([weakref.ref(m) for m in (pipe.unet, pipe.text_encoder, pipe.vae)])
            return pipe

        return load

    for name in ("load_pipeline", "tiny_pipeline"):
        monkeypatch.setattr(dreambooth, name, watched(getattr(dreambooth, name)))
    gc.disable()  # the collector comes when it is called, not by chance
    yield seen
    gc.enable()


def train(root, out, method="full", **more):
    flags = dict(
        pretrained_model_name_or_path=str(root / "base"),
        instance_data_dir=str(root / "images"),
        output_dir=str(out),
        instance_prompt=PROMPTS["normal"],
        resolution=32,
        train_batch_size=2,
        max_train_steps=3,
        num_validation_images=1,
        heldout_data_dir=str(root / "images"),
        heldout_images=4,
        heldout_steps=1,
        train_text_encoder=True,
        device="cpu",
    )
    return cxr_synth.train_dreambooth(**flags | METHODS[method] | more)


def _gone(seen, n):
    assert len(seen) == n and all(ref() is None for refs in seen for ref in refs)


@pytest.mark.parametrize("method", METHODS)
def test_two_in_a_row(root, tmp_path, loaded, method):
    for k in range(2):
        train(root, tmp_path / str(k), method)
    _gone(loaded, 2)


@pytest.mark.parametrize(
    "method, text, kind",
    [
        ("full", "an illegal memory access", RuntimeError),
        ("lora", "out of memory", CxrError),  # which names what helps
    ],
)
def test_the_second_after_an_error(root, tmp_path, loaded, method, text, kind, monkeypatch):
    "A notebook keeps the error; what was at work when it came is free all the same."

    def run_out(self, k, learning):
        raise RuntimeError(text)

    monkeypatch.setattr(Trainer, "one_pass", run_out)
    with pytest.raises(kind) as kept:
        train(root, tmp_path / "0", method)
    assert kept.value.__traceback__ is not None
    _gone(loaded, 1)
    monkeypatch.undo()
    train(root, tmp_path / "1", method)


def test_class_images_then_training(root, tmp_path, loaded):
    cxr_synth.generate_class_images(
        2,
        str(tmp_path / "c"),
        PROMPTS["normal"],
        str(root / "base"),
        steps=1,
        batch_size=2,
        device="cpu",
    )
    train(root, tmp_path / "0", with_prior_preservation=True, class_data_dir=str(tmp_path / "c"))
    _gone(loaded, 2)


def test_a_base_from_nothing(root, tmp_path, loaded):
    images = np.stack([draw_phantom(k, 0, 0, size=32) for k in range(8)])
    task = TrainingTask(images, [PROMPTS["normal"]], np.zeros(8, int))
    cfg = TrainConfig(base="tiny", vae_steps=2, base_steps=2, vae_batch_size=4, base_batch_size=4)
    for k in range(2):
        train_base(task, tmp_path / str(k), cfg)
        gc.collect()  # of what the caller was given
    _gone(loaded, 2)


def test_no_cycle(root, tmp_path):
    "A trainer needs no collector to go: it and its hooks do not hold one another."
    images = np.stack([draw_phantom(k, 0, 0, size=32) for k in range(8)])
    one = [PROMPTS["normal"]], np.zeros(8, int)
    task = TrainingTask(images, *one, heldout=(images, *one))
    cfg = TrainConfig(max_train_steps=2, train_batch_size=4, device="cpu", preview_images=1)
    trainer = make_trainer(
        load_pipeline(root / "base"), task, tmp_path / "a.pt", cfg, previews=tmp_path / "previews"
    )
    assert len(trainer.loop.hooks) == 2
    trainer.run()
    gone = weakref.ref(trainer)
    gc.collect()
    gc.disable()
    try:
        del trainer
        assert gone() is None
    finally:
        gc.enable()

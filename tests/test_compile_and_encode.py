"""What a GPU does once: the U-Net's blocks are compiled for one shape, whatever watches the training; an
image is encoded once for all generators. Compilation here is a stand-in that counts.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cxr_synth.base.settings import GenerateConfig, TrainConfig
from cxr_synth.diffusion import image_set, sampling, small_pipeline, trainer
from cxr_synth.diffusion.dreambooth import class_task, make_trainer
from cxr_synth.diffusion.pipelines import load_pipeline, save_pipeline
from cxr_synth.diffusion.small_pipeline import tiny_pipeline
from cxr_synth.diffusion.trainer import cached_latents


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    save_pipeline(tiny_pipeline(folder / "tokenizer", ["chest"], 32), folder / "base")
    return folder / "base"


@pytest.fixture
def compiled(monkeypatch):
    "How often a graph was compiled; the settings with which it was asked for."
    torch._dynamo.reset()
    found = SimpleNamespace(graphs=0, asked=[])

    def backend(graph, inputs):
        found.graphs += 1
        return graph.forward

    def compile(self, *args, **kw):
        found.asked.append(kw)
        return real(self, *args, backend=backend, **kw)

    real = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    yield found
    torch._dynamo.reset()


def losses(base, folder, watched):
    "Six steps with compiled blocks; with held-out losses and previews in other shapes between them."
    cfg = TrainConfig(
        base=str(base),
        max_train_steps=6,
        train_batch_size=4,
        heldout_images=5 if watched else None,
        heldout_steps=2,
        preview_steps=2 if watched else None,
        preview_images=3,
        mixed_precision="no",
        compile=True,
        device="cpu",
    )
    images = np.random.default_rng(0).integers(0, 256, (8, 32, 32), np.uint8)
    heldout = images[:5], ["chest"], np.zeros(5, int)
    task = class_task(images, "chest", heldout=heldout)
    made = make_trainer(load_pipeline(base), task, folder / "c.pt", cfg, previews=folder / "p")
    return [row["loss"] for row in made.run() if "loss" in row]


def test_what_watches_a_training_compiles_nothing(base, tmp_path, compiled):
    (tmp_path / "a").mkdir()
    plain = losses(base, tmp_path / "a", False)
    alone, compiled.graphs = compiled.graphs, 0
    assert alone > 0 and all(asked["dynamic"] is False for asked in compiled.asked)
    torch._dynamo.reset()
    watched = losses(base, tmp_path, True)
    assert compiled.graphs == alone
    assert watched == pytest.approx(plain, rel=1e-5)
    assert len(list((tmp_path / "p").glob("*.png"))) == 4


def test_drawing_compiles_for_one_shape(base, compiled, monkeypatch):
    "Trials of a batch size compile nothing; all calls have the shape of the first."
    cfg = image_set.SetConfig(
        num_inference_steps=2, compile=True, mixed_precision="no", device="cpu"
    )
    pipe = image_set.load_model((base, None), "cpu", cfg)

    class Small(sampling.Sampler):  # a stand-in of a GPU: drawn on the CPU all the same
        def __init__(self, pipe, prompt, resolution, cfg, batch_size):
            self.pipe, self.batch_size = pipe, batch_size

        def __call__(self, seeds):
            n = self.batch_size
            if n > 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            with torch.no_grad():
                words = torch.zeros(n, 32, 64)
                self.pipe.unet(torch.zeros(n, 4, 8, 8), torch.tensor(1), words)

    with monkeypatch.context() as m:
        m.setattr(sampling, "Sampler", Small)
        elsewhere = property(lambda self: torch.device("meta"))
        m.setattr(type(pipe), "device", elsewhere)
        assert sampling.find_batch_size(pipe, 32, cfg, 8) == (2, False)
    assert compiled.graphs == 0
    assert compiled.asked and all(asked["dynamic"] is False for asked in compiled.asked)


def test_an_image_is_encoded_once_for_all(base, tmp_path, monkeypatch):
    vae, encoded = load_pipeline(base).vae, []
    real = trainer.encode_latents

    def counted(vae, images, *args, **kw):
        encoded.append(len(images))
        return real(vae, images, *args, **kw)

    monkeypatch.setattr(trainer, "encode_latents", counted)
    images = np.random.default_rng(0).integers(0, 256, (70, 32, 32), np.uint8)  # two passes
    small = cached_latents(vae, images[10:40], folder=tmp_path)
    whole = cached_latents(vae, images, folder=tmp_path)
    assert encoded == [30, 40]  # only what was not there
    afresh = cached_latents(vae, images)
    for k in (0, 1):
        assert torch.equal(whole[k], afresh[k]) and torch.equal(whole[k][10:40], small[k])
    some = [3, 69, 3, 20]
    assert torch.equal(cached_latents(vae, images[some], folder=tmp_path)[0], whole[0][some])
    assert encoded == [30, 40, 70]


@pytest.mark.parametrize("bf16", [True, False])
def test_encoding_on_a_gpu_is_in_bfloat16_where_it_has_it(base, monkeypatch, bf16):
    "And it shows a bar."
    asked, bars = [], []
    monkeypatch.setattr(trainer, "pick_precision", lambda device: "bf16" if bf16 else "fp16")
    result = torch.zeros(2, 4, 8, 8)
    monkeypatch.setattr(
        trainer, "encode_latents", lambda *args: asked.append(args[2:]) or (result, result)
    )
    images = np.zeros((2, 32, 32), np.uint8)
    vae = load_pipeline(base).vae
    cached_latents(vae, images, "cuda")
    cached_latents(vae, images, "cpu")
    assert asked == [("cuda", "bf16" if bf16 else "no"), ("cpu", "no")]
    monkeypatch.setattr(
        small_pipeline, "progress", lambda items, desc, **kw: bars.append(desc) or items
    )
    small_pipeline.encode_latents(vae, images)
    assert bars == ["encode"]


def test_the_memory_layout_of_a_gpu(base, monkeypatch):
    "channels_last when drawing, too."
    pipe = load_pipeline(base)
    for device, precision, last in (("cuda", "bf16", True), ("cpu", "bf16", False)):
        sampling.choose_memory_layout(pipe, device, precision, 8)
        weight = pipe.unet.conv_in.weight
        assert weight.is_contiguous(memory_format=torch.channels_last) == last
    assert GenerateConfig().compile is False

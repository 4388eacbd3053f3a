"The digest of all weights: once in a fine-tuning for all that want it, and never that of weights of before."

import json

import numpy as np
import pytest
import torch

from cxr_synth.base import cache
from cxr_synth.base.cache import hashing_once, weights_key
from cxr_synth.base.mirror import Mirror
from cxr_synth.base.settings import TrainConfig
from cxr_synth.diffusion.dreambooth import class_task, fine_tune, make_class_images, model_key
from cxr_synth.diffusion.pipelines import load_pipeline, save_pipeline
from cxr_synth.diffusion.small_pipeline import tiny_pipeline
from cxr_synth.diffusion.trainer import cached_latents


@pytest.fixture
def read(monkeypatch):
    "The networks whose weights were read, in their order."
    read, plain = [], cache._hash_weights

    def counting(modules):
        read.append([type(module).__name__ for module in modules])
        return plain(modules)

    monkeypatch.setattr(cache, "_hash_weights", counting)
    return read


def test_once_in_a_fine_tuning(tmp_path, read):
    "Class images, a mirror, checkpoints, three sets of latents and the record want it."
    base = tmp_path / "base"
    save_pipeline(tiny_pipeline(tmp_path / "tokenizer", ["chest", "other"], 32), base)
    films = np.random.default_rng(0).integers(0, 256, (6, 32, 32), np.uint8)
    heldout = films[4:], ["chest"], np.zeros(2, int)

    def task(pipe):
        drawn = make_class_images(pipe, tmp_path / "class", "other", 2, 32, 2, batch=2)
        return class_task(films[:4], "chest", prior=(drawn, "other"), heldout=heldout)

    cfg = dict(base=str(base), max_train_steps=2, train_batch_size=2, prior_loss_weight=1.0)
    cfg |= dict(heldout_images=2, preview_steps=None, mixed_precision="no", device="cpu")
    where = dict(cache=tmp_path / "cache", mirror=Mirror(tmp_path / "drive", tmp_path))
    checkpoint = tmp_path / "model/checkpoints/last.pt"
    fine_tune(str(base), task, tmp_path / "model", checkpoint, TrainConfig(**cfg), **where)

    whole, *encoder = read
    assert whole == ["UNet2DConditionModel", "CLIPTextModel", "AutoencoderKL"]
    assert encoder == [["Encoder", "Conv2d"]]
    facts = json.loads((tmp_path / "model/provenance.json").read_text())
    class_images = json.loads((tmp_path / "class/class_images.json").read_text())
    assert facts["model"] == class_images["model"] == model_key(load_pipeline(base))
    assert model_key(load_pipeline(tmp_path / "model")) != facts["model"]


def adam(net, **how):
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, **how)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()


def replace(net):
    net[0].weight = torch.nn.Parameter(net[0].weight.detach() + 1)


WRITES = {
    "a step": lambda net: adam(net, foreach=False),
    "a step of many tensors": lambda net: adam(net, foreach=True),
    "a fused step": lambda net: adam(net, fused=True),
    "a running mean": lambda net: net(torch.ones(2, 3, 8, 8)),
    "loaded": lambda net: net.load_state_dict({k: v + 1 for k, v in net.state_dict().items()}),
    "through data": lambda net: net[0].weight.data.add_(1),
    "replaced": replace,
    "another type": lambda net: net.to(torch.float64),
}


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.BatchNorm2d(16))


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_write_is_seen(write, read):
    net = network()
    with hashing_once():
        before = weights_key(net)
        assert weights_key(net) == before and len(read) == 1
        write(net)
        after = weights_key(net)
    assert after != before and after == weights_key(net)


def test_a_single_number_is_seen(read):
    "One of many, so that none of those compared."
    net = torch.nn.Linear(1000, 100)
    with hashing_once():
        before = weights_key(net)
        with torch.no_grad():
            net.weight[3, 7] += 1
        assert weights_key(net) != before


def test_other_networks_are_not_mixed_up(read):
    one, two = network(), network()
    with hashing_once():
        alone, both = weights_key(one), weights_key(one, two)
        assert weights_key(two) == alone != both
        assert weights_key(one, two) == both and len(read) == 3
    weights_key(one)
    assert len(read) == 4  # outside nothing is kept


def test_latents_of_weights_that_changed_within(tmp_path):
    "The cache of latents, asked twice in one block."
    vae = tiny_pipeline(tmp_path / "tokenizer", ["chest"], 32).vae
    films = np.random.default_rng(0).integers(0, 256, (2, 32, 32), np.uint8)
    with hashing_once():
        before = cached_latents(vae, films, folder=tmp_path / "cache")[0]
        adam(vae, fused=True)
        after = cached_latents(vae, films, folder=tmp_path / "cache")[0]
    assert not torch.equal(after, before)
    assert torch.equal(after, cached_latents(vae, films)[0])

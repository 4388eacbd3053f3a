"The table of networks where other parts rely on it: help texts, spellings, weights that are there or not."

import dataclasses, inspect
from unittest.mock import patch
import numpy as np, pytest, torch
from cxr_synth.base import settings
from cxr_synth.base.files import CxrError
from cxr_synth.base.settings import ExperimentsConfig
from cxr_synth.classify.explain import has_maps
from cxr_synth.classify.finetune import Classifier, load_network, save_network
from cxr_synth.images.networks import NETWORKS, LoadedNetwork, find_network, network_key
from cxr_synth.quality.measure import Embedder


def test_help_names_every_network_that_learns():
    "The comment above the setting is its help, and is written by hand."
    lines = inspect.getsource(settings.ExperimentsConfig).splitlines()
    above = next(a for a, b in zip(lines, lines[1:]) if " network:" in b)
    named = {network_key(word.strip(",")) for word in above.split("#")[1].split()}
    assert {name for name, n in NETWORKS.items() if n.classifier} == named


def test_defaults_are_in_the_table():
    fields = {f.name: f.default for f in dataclasses.fields(ExperimentsConfig)}
    assert find_network(fields["network"]) is find_network(fields["network"], to_learn=True)
    assert find_network(settings.QualityConfig().extractor).features


@pytest.mark.parametrize("name", [n for n in NETWORKS if NETWORKS[n].classifier])
def test_both_spellings_build_the_same(name):
    a, b = (
        Classifier(spelling, 64, pretrained=False) for spelling in (name, name.replace("-", "_"))
    )
    for x, y in zip(a.state_dict().values(), b.state_dict().values()):
        assert torch.equal(x, y)


def test_saved_under_one_spelling_read_under_the_other(tmp_path):
    model = Classifier("small_cnn", 32)
    save_network(model, tmp_path / "weights.safetensors")
    read = load_network(tmp_path / "weights.safetensors", "small-cnn", 32)
    x = torch.zeros(1, 1, 32, 32)
    assert torch.equal(read(x), model.eval()(x))


def test_not_pretrained_starts_from_nothing():
    "Other seeds, other first weights: none of them come from ImageNet."
    a, b = (Classifier("efficientnet_lite0", 32, pretrained=False, seed=s) for s in (0, 1))
    imagenet = Classifier("efficientnet_lite0", 32)
    first = [m.net._conv_stem.weight.detach().numpy() for m in (a, b, imagenet)]
    assert not np.array_equal(first[0], first[1])
    assert not np.array_equal(first[0], first[2])
    assert all(p.requires_grad for p in imagenet.parameters())


def test_a_network_that_only_learns_is_no_frozen_one():
    with pytest.raises(CxrError, match="unknown extractor 'small-cnn'"):
        find_network("small_cnn")


def test_either_spelling_of_fids_network_is_called_fid():
    "The metric's name goes by the extractor's, so there must be one."
    with patch("cxr_synth.quality.measure.load_backbone", lambda *a: LoadedNetwork(None, None)):
        names = [
            Embedder(settings.QualityConfig(extractor=name), "cpu").about["extractor"]
            for name in ("inception-fid", "inception_fid")
        ]
    assert names == ["inception-fid"] * 2


@pytest.mark.parametrize(
    "name, maps", [("vit_b_16", False), ("vit-b-16", False), ("resnet50", True)]
)
def test_transformers_have_no_maps(name, maps):
    assert has_maps(name) == maps

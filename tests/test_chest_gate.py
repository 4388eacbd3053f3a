"""The gate's idea of a chest: learned from few or many films, of drawn children and of real ones."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from cxr_synth.base.files import CxrError
from cxr_synth.images.chest_gate import LEAST_FILMS, learn_chest
from cxr_synth.images.phantom import draw_phantom

KERMANY = Path(os.environ.get("CXR_DATA", "")) / "kermany-224"


@pytest.fixture(scope="module")
def films():
    return np.stack([draw_phantom(k, 0, k % 2, size=64) for k in range(420)])


def like_real(x, real):
    "Images with mean and spread of real ones, so that no rule on greys could tell them apart."
    about = dict(axis=(1, 2), keepdims=True)
    x = (x - x.mean(**about)) / x.std(**about)
    return (x * real.std(**about) + real.mean(**about)).clip(0, 255).astype(np.uint8)


def unlearned(real):
    "What generators draw that have learned nothing."
    rng = np.random.default_rng(1)
    noise = rng.normal(size=real.shape)
    fog = np.stack([gaussian_filter(x, 8) for x in noise])
    return dict(fog=like_real(fog, real), noise=like_real(noise, real))


@pytest.mark.parametrize("n", [LEAST_FILMS, 22, 150])
def test_fog_and_noise_are_marked_and_chests_pass(films, n):
    gate = learn_chest(films[:n], films[150:220])
    new = films[220:]
    for name, images in unlearned(new).items():
        assert gate.marks(images).mean() > 0.95, name
    assert gate.marks(new).mean() <= 0.02
    assert gate.marks(new[:1].repeat(50, 0)).mean() == 0  # a collapsed set: each image is a chest


def test_a_soft_picture_of_a_chest_is_a_chest(films):
    gate = learn_chest(films[:40], films[150:220])
    soft = np.stack([gaussian_filter(x.astype(float), 1.5) for x in films[220:]]).astype(np.uint8)
    assert gate.marks(soft).mean() < 0.05


def test_one_image_and_many_get_the_same_answer(films):
    gate = learn_chest(films[:40], films[150:220])
    some = np.concatenate([films[220:230], 255 - films[230:240]])
    assert [bool(gate.reason(x)) for x in some] == gate.marks(some).tolist()


def test_any_side(films):
    large = np.stack([draw_phantom(k, 0, k % 2, size=100) for k in range(60)])
    gate = learn_chest(large[:20], large[20:40])
    assert gate.marks(large[40:]).mean() <= 0.05 and gate.marks(255 - large[40:]).all()


@pytest.mark.parametrize("short", [0, 1])
def test_too_few_films_are_refused(films, short):
    sides = [films[:30], films[30:60]]
    sides[short] = sides[short][: LEAST_FILMS - 1]
    with pytest.raises(
        CxrError, match=f"{LEAST_FILMS - 1} {('training', 'held-out')[short]} films"
    ):
        learn_chest(*sides)


@pytest.mark.skipif(not KERMANY.is_dir(), reason="needs the real data set: CXR_DATA")
def test_real_films(films):
    paths = sorted((KERMANY / "train").rglob("*.jpeg"))
    chosen = np.random.default_rng(0).permutation(len(paths))[:700]
    sides = [Image.open(paths[k]).convert("L").resize((64, 64)) for k in chosen]
    real = np.stack([np.asarray(image) for image in sides])
    gate = learn_chest(real[:200], real[200:400])
    assert gate.marks(real[400:]).mean() <= 0.02
    for name, images in unlearned(real[400:]).items():
        assert gate.marks(images).mean() > 0.9, name

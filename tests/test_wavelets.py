"The wavelet transform in the place of an autoencoder: exact, and known to diffusers."

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline

from cxr_synth.base.files import CxrError
from cxr_synth.diffusion.small_pipeline import (
    decode_latents,
    encode_latents,
    tiny_pipeline,
    to_pixels,
)
from cxr_synth.diffusion.wavelets import (
    WaveletVAE,
    fit_latent_scales,
    wavelet_level,
    wavelet_matrix,
)
from cxr_synth.images.phantom import draw_phantom


@pytest.fixture(scope="module")
def films():
    return np.stack([draw_phantom(k, 0, k % 2) for k in range(6)])


def fitted(films):
    vae = WaveletVAE()
    fit_latent_scales(vae, to_pixels(films))
    return vae


@pytest.mark.parametrize("side", [16, 24, 64, 128, 256])
def test_every_pixel_comes_back(side):
    noise = np.random.default_rng(side).integers(0, 256, (3, side, side), np.uint8)
    vae = WaveletVAE()
    mean, spread = encode_latents(vae, noise)
    assert mean.shape == (3, 64, side // 8, side // 8) and not spread.any()
    assert (decode_latents(vae, mean) == noise).all()


def level_by_filters(x):
    "One level by the published analysis filters (Cohen, Daubechies & Feauveau 1992), mirrored at the ends."
    low = [
        0.602949018236358,
        0.266864118442872,
        -0.078223266528988,
        -0.016864118442875,
        0.026748757410810,
    ]
    high = [1.115087052456994, -0.591271763114247, -0.057543526228500, 0.091271763114250]
    mirrored = np.concatenate([x[4:0:-1], x, x[-2:-6:-1]])

    def filtered(taps, centre):
        return sum(
            w * (mirrored[centre + k] + (mirrored[centre - k] if k else 0))
            for k, w in enumerate(taps)
        )

    n = len(x) // 2
    averages = np.array([filtered(low, 4 + 2 * i) for i in range(n)])
    details = np.array([filtered(high, 5 + 2 * i) for i in range(n)])
    return averages * 2**0.5, details / 2**0.5


def test_a_level_is_that_of_the_published_filters():
    x = np.random.default_rng(0).normal(size=48)
    for ours, theirs in zip(wavelet_level(x), level_by_filters(x)):
        np.testing.assert_allclose(ours, theirs, atol=1e-9)


def test_constants_make_latents_of_variance_one(films):
    vae = fitted(films)
    latents = vae.encode(to_pixels(films)).latents
    assert abs(float(latents.mean((0, 2, 3)).abs().max())) < 1e-4
    assert float(latents.square().mean()) == pytest.approx(1, abs=0.02)
    order = latents.std((0, 2, 3)).argmax()
    assert order == 0  # the average stays the largest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision_of_the_run_does_not_matter(films, dtype):
    vae = fitted(films)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        latents = vae.encode(to_pixels(films)).latents
        again = decode_latents(vae, latents)
    assert latents.dtype == torch.float32 and (again == films).all()


def test_a_pipeline_with_it_is_saved_and_loaded_by_diffusers(films, tmp_path):
    pipe = tiny_pipeline(tmp_path / "tokenizer", ["a chest xray"], 64, vae=None)
    parts = dict(pipe.components) | dict(vae=fitted(films))
    made = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    made.save_pretrained(tmp_path / "pipe")
    again = StableDiffusionPipeline.from_pretrained(tmp_path / "pipe", safety_checker=None)
    assert isinstance(again.vae, WaveletVAE) and again.vae_scale_factor == 8
    latents = made.vae.encode(to_pixels(films)).latents
    assert (decode_latents(again.vae, latents) == films).all()
    assert isinstance(pipe.vae, AutoencoderKL)  # and the small pipeline still has its own


@pytest.mark.parametrize("side", [0, 8, 12, 60, 65])
def test_a_side_that_does_not_fit(side):
    with pytest.raises(CxrError, match=f"images of {side} px"):
        wavelet_matrix(side)

"The wavelet transform and the autoencoder on it: the transform is exact, and diffusers knows both."

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline

from cxr_synth.base.files import CxrError
from cxr_synth.base.loop import Loop, TrainedPart
from cxr_synth.diffusion.decoder import Drawing, decode_drawn
from cxr_synth.diffusion.pipelines import round_trip
from cxr_synth.diffusion.small_pipeline import (
    decode_latents,
    encode_latents,
    tiny_pipeline,
    to_pixels,
    train_vae,
)
from cxr_synth.diffusion.tuned_decoder import film_error
from cxr_synth.diffusion.wavelets import (
    WaveletVAE,
    fit_grain,
    fit_wavelet_scales,
    from_wavelet_blocks,
    wavelet_blocks,
    wavelet_level,
    wavelet_matrix,
)
from cxr_synth.images.phantom import draw_phantom


@pytest.fixture(scope="module")
def films():
    return np.stack([draw_phantom(k, 0, k % 2) for k in range(48)])


@pytest.fixture(scope="module")
def trained(films, tmp_path_factory):
    "An autoencoder after thirty steps, and its error before."
    torch.manual_seed(0)
    vae = WaveletVAE()
    fit_wavelet_scales(vae, to_pixels(films))
    before = film_error(vae, films)
    path = tmp_path_factory.mktemp("vae") / "vae.pt"
    train_vae(vae, films, Loop(dict(vae=TrainedPart(vae, 2e-3)), path, 30), batch=16)
    return vae.eval().requires_grad_(False), before


@pytest.mark.parametrize("side", [16, 24, 64, 128, 256])
def test_every_pixel_comes_back_from_the_transform(side):
    noise = torch.tensor(np.random.default_rng(side).uniform(-1, 1, (3, side, side)))
    blocks = wavelet_blocks(noise.float())
    assert blocks.shape == (3, 16, side // 4, side // 4)
    assert (from_wavelet_blocks(blocks) - noise).abs().max() < 2e-6


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


def test_constants_make_numbers_of_variance_one(films):
    vae = WaveletVAE()
    fit_wavelet_scales(vae, to_pixels(films))
    blocks = wavelet_blocks(to_pixels(films)[:, 0])
    scaled = (blocks - vae.means[:, None, None]) / vae.spreads[:, None, None]
    assert abs(float(scaled.mean((0, 2, 3)).abs().max())) < 1e-4
    np.testing.assert_allclose(scaled.std((0, 2, 3)), 1, atol=1e-4)
    assert vae.spreads.argmax() == 0  # the average


def test_training_halves_the_error_and_scales_the_latents(films, trained):
    vae, before = trained
    assert film_error(vae, films) < before / 2
    mean, spread = encode_latents(vae, films)
    assert mean.shape == (48, 16, 8, 8)
    variance = float(mean.var() + spread.square().mean())
    assert variance * vae.config.scaling_factor**2 == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("side", [64, 128])
def test_it_takes_images_of_other_sizes(trained, side):
    films = np.stack([draw_phantom(k, 0, 0, side) for k in range(2)])
    assert round_trip(trained[0], films).shape == films.shape


def drawn(vae, z, seeds):
    "Images of latents, as the sampler has them."
    return decode_drawn(vae, z * vae.config.scaling_factor, seeds, Drawing("films"))


def test_grain_is_what_a_round_trip_leaves_out(films, trained):
    vae = trained[0]
    fit_grain(vae, films)
    x = to_pixels(films)
    z = vae.encode(x).latent_dist.mean
    back = vae.decode(z).sample
    missing = wavelet_blocks((x - back)[:, 0]).square().mean((0, 2, 3)).sqrt()
    np.testing.assert_allclose(vae.decoder.grain * vae.spreads, missing, rtol=1e-4)
    added = wavelet_blocks((drawn(vae, z, list(range(48))) - back)[:, 0])
    np.testing.assert_allclose(added.square().mean((0, 2, 3)).sqrt(), missing, rtol=0.03)


def test_each_image_has_the_grain_of_its_own_seed(films, trained):
    vae = trained[0]
    fit_grain(vae, films)
    z = vae.encode(to_pixels(films[:4])).latent_dist.mean
    together, alone = drawn(vae, z, [5, 6, 7, 8]), drawn(vae, z[2:3], [7])
    assert (together[2:3] - alone).abs().max() < 1e-5
    same = drawn(vae, z[:1].expand(2, -1, -1, -1), [1, 2])
    assert (same[0] - same[1]).abs().max() > 0.01


def test_a_pipeline_with_it_is_saved_and_loaded_by_diffusers(films, trained, tmp_path):
    pipe = tiny_pipeline(tmp_path / "tokenizer", ["a chest xray"], 64, vae=None)
    parts = dict(pipe.components) | dict(vae=trained[0])
    made = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    made.save_pretrained(tmp_path / "pipe")
    again = StableDiffusionPipeline.from_pretrained(tmp_path / "pipe", safety_checker=None)
    assert isinstance(again.vae, WaveletVAE) and again.vae_scale_factor == 8
    latents = made.vae.encode(to_pixels(films)).latent_dist.mean
    assert (decode_latents(again.vae, latents) == decode_latents(made.vae, latents)).all()
    assert isinstance(pipe.vae, AutoencoderKL)  # and the small pipeline still has its own


@pytest.mark.parametrize("side", [0, 8, 12, 60, 65])
def test_a_side_that_does_not_fit(side):
    with pytest.raises(CxrError, match=f"images of {side} px"):
        wavelet_matrix(side)

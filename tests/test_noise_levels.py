"Whatever scheduler a base names, training sees the noise levels of the base by DDPM's formula."

import inspect

import diffusers
import numpy as np
import pytest
import torch
from diffusers import SchedulerMixin

from cxr_synth.base.files import CxrError
from cxr_synth.base.settings import PROMPTS, TrainConfig
from cxr_synth.diffusion.dreambooth import TrainingTask, fine_tune, make_trainer
from cxr_synth.diffusion.pipelines import load_pipeline, save_pipeline
from cxr_synth.diffusion.small_pipeline import tiny_pipeline
from cxr_synth.diffusion.trainer import HeldOutLoss, diffusion_target, training_noise
from cxr_synth.images.phantom import draw_phantom

LEVELS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
ABAR = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)
# ABAR when the last level is to hold no image at all (Lin et al. 2024, algorithm 1)
_ROOTS = ABAR.double().sqrt()
UNSEEN = ((_ROOTS - _ROOTS[-1]) * _ROOTS[0] / (_ROOTS[0] - _ROOTS[-1])).square().float()


def _schedulers():
    "Every scheduler of diffusers that can be made, and what its maker takes."
    found = {}
    for name in dir(diffusers):
        kind = getattr(diffusers, name)
        if (
            isinstance(kind, type)
            and issubclass(kind, SchedulerMixin)
            and kind is not SchedulerMixin
        ):
            found[name] = set(inspect.signature(kind).parameters)
    return found


SCHEDULERS = _schedulers()
WITH_LEVELS = sorted(n for n, takes in SCHEDULERS.items() if {*LEVELS} <= takes)
OTHERS = sorted({*SCHEDULERS} - {*WITH_LEVELS})  # of other kinds of models
OF_THEIR_OWN = {"CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"}  # levels that are shifted


def _make(name, **more):
    takes = SCHEDULERS[name]
    wanted = LEVELS | more
    if not {*wanted} <= takes:
        pytest.skip(f"{name} takes no {', '.join({*wanted} - takes)}")
    try:
        return getattr(diffusers, name)(**wanted)
    except ImportError as e:
        pytest.skip(str(e).splitlines()[0])


def _draw():
    g = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(8, 4, 4, 4, generator=g) for _ in range(2))
    return x0, noise, torch.tensor([0, 1, 37, 250, 500, 777, 998, 999])


def _closed_form(abar, kind):
    "Noised latents and targets (Ho et al. 2020, eq. 4; Salimans and Ho 2022, appendix D)."
    x0, noise, t = _draw()
    a, b = (part.sqrt()[t].view(-1, 1, 1, 1) for part in (abar, 1 - abar))
    return a * x0 + b * noise, noise if kind == "epsilon" else a * noise - b * x0


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", WITH_LEVELS)
def test_levels_of_every_scheduler(name, kind):
    scheduler = _make(name, prediction_type=kind)
    if name in OF_THEIR_OWN:
        with pytest.raises(CxrError, match="not those of DDPM"):
            training_noise(scheduler)
        return
    levels = training_noise(scheduler)
    x0, noise, t = _draw()
    noised, target = _closed_form(ABAR, kind)
    torch.testing.assert_close(levels.add_noise(x0, noise, t), noised, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(diffusion_target(levels, x0, noise, t), target, atol=1e-6, rtol=1e-6)


def test_the_list_is_whole():
    "A base of the family may name each of these; StableDiffusionPipeline's own list is among them."
    known = {s.name for s in diffusers.schedulers.KarrasDiffusionSchedulers}
    other = {"EDMEulerScheduler", "DPMSolverSDEScheduler"}  # no betas; needs torchsde
    assert known - other <= {*WITH_LEVELS} and len(WITH_LEVELS) > 15


@pytest.mark.parametrize("name", OTHERS)
def test_others_are_refused(name):
    try:
        scheduler = getattr(diffusers, name)()
    except (ImportError, TypeError) as e:  # it needs a package, or arguments
        pytest.skip(str(e).splitlines()[0])
    with pytest.raises(CxrError, match="cannot be trained on"):
        training_noise(scheduler)


@pytest.mark.parametrize("name", WITH_LEVELS)
def test_levels_without_an_image(name):
    scheduler = _make(name, rescale_betas_zero_snr=True, prediction_type="epsilon")
    with pytest.raises(CxrError, match="v_prediction"):
        training_noise(scheduler)
    if name in OF_THEIR_OWN:
        return
    levels = training_noise(
        _make(name, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    )
    x0, noise, t = _draw()
    noised, target = _closed_form(UNSEEN, "v_prediction")
    torch.testing.assert_close(levels.add_noise(x0, noise, t), noised, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(diffusion_target(levels, x0, noise, t), target, atol=1e-5, rtol=1e-5)


# ---- everything that uses them


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    "Folder of a base for each scheduler, all with the same weights."
    root = tmp_path_factory.mktemp("bases")
    pipe = tiny_pipeline(root / "tokenizer", PROMPTS.values(), 32)

    def with_scheduler(scheduler):
        folder = root / f"base{len(list(root.iterdir()))}"
        pipe.scheduler = scheduler
        save_pipeline(pipe, folder)
        return folder

    return with_scheduler


CFG = dict(max_train_steps=3, train_batch_size=4, mixed_precision="no", device="cpu", snr_gamma=5.0)


def _task():
    images = np.stack([draw_phantom(k, 0, 0, size=32) for k in range(8)])
    one = [PROMPTS["normal"]], np.zeros(8, int)
    return TrainingTask(images, *one, heldout=(images, *one))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    "name",
    [
        "DPMSolverMultistepScheduler",
        "EulerDiscreteScheduler",
        "PNDMScheduler",
        "UniPCMultistepScheduler",
    ],
)
def test_training_and_heldout_loss(base, tmp_path, name, kind):
    "The same losses, to the bit, as with a base that names DDPM."
    seen = []
    for scheduler in ("DDPMScheduler", name):
        pipe = load_pipeline(base(_make(scheduler, prediction_type=kind)))
        cfg = TrainConfig(**CFG, heldout_images=8, heldout_steps=1, preview_steps=None)
        trainer = make_trainer(pipe, _task(), tmp_path / f"{scheduler}.pt", cfg)
        assert isinstance(trainer.loop.hooks[0], HeldOutLoss)
        log = trainer.run()
        seen.append([(row.get("loss"), row.get("heldout")) for row in log])
        assert type(pipe.scheduler).__name__ == scheduler  # the base's own goes into the model
    assert seen[0] == seen[1] and all(heldout for _, heldout in seen[0])


def test_refused_before_anything_is_written(base, tmp_path):
    unseen = _make("DDIMScheduler", rescale_betas_zero_snr=True)
    with pytest.raises(CxrError, match="v_prediction"):
        cfg = TrainConfig(**CFG)
        fine_tune(str(base(unseen)), _task(), tmp_path / "out", tmp_path / "out/c.pt", cfg)
    assert not (tmp_path / "out").exists()

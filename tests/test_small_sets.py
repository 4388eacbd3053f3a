"Sets smaller than a batch: one film of one patient, as instance, as prior and held out."

import numpy as np
import pytest
from cxr_synth.base.files import CxrError
from cxr_synth.base.settings import TrainConfig
from cxr_synth.diffusion.dreambooth import class_task, fine_tune
from cxr_synth.diffusion.pipelines import load_pipeline, save_pipeline
from cxr_synth.diffusion.small_pipeline import tiny_pipeline


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    save_pipeline(tiny_pipeline(folder / "tokenizer", ["chest", "other"], 32), folder / "base")
    return folder / "base"


def films(n):
    return np.random.default_rng(n).integers(0, 256, (n, 32, 32), np.uint8)


def train(base, folder, n, n_prior, n_heldout, views=20):
    cfg = TrainConfig(
        base=str(base),
        max_train_steps=3,
        train_batch_size=8,
        prior_loss_weight=1.0,
        heldout_images=4,
        heldout_steps=1,
        preview_steps=None,
        mixed_precision="no",
        device="cpu",
    )
    heldout = films(n_heldout), ["chest"], np.zeros(n_heldout, int)
    task = class_task(films(n), "chest", prior=(films(n_prior), "other"), heldout=heldout)
    return fine_tune(str(base), task, folder / "m", folder / "m.pt", cfg, views=views)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 1, 2), (1, 9, 1), (9, 9, 3)])
def test_sets_smaller_than_a_batch(base, tmp_path, sizes):
    rows = train(base, tmp_path, *sizes)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert all(np.isfinite(row["heldout"]) for row in rows)
    assert all(np.isfinite(row["prior"]) for row in rows[:3])
    assert load_pipeline(tmp_path / "m").unet.config.sample_size == 8


def test_a_batch_that_was_asked_for_is_not_made_smaller(base, tmp_path):
    "Without a limit of views, as in the guide: said, with what to do."
    with pytest.raises(CxrError, match="a batch of 8 does not fit a set of 3 images"):
        train(base, tmp_path, 3, 9, 1, views=0)

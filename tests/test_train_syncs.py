"A step of training asks the device for no number: on a GPU each such question waits for all that was begun."

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cxr_synth.base.settings import PROMPTS, TrainConfig
from cxr_synth.diffusion import trainer as trainers
from cxr_synth.diffusion.dreambooth import TrainingTask, make_trainer
from cxr_synth.diffusion.pipelines import load_pipeline
from cxr_synth.diffusion.small_pipeline import tiny_pipeline
from cxr_synth.images.phantom import draw_phantom

ASKING = {
    torch.ops.aten._local_scalar_dense.default,  # .item(), float(), bool(), if
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.nonzero.default,
}


class Questions(TorchDispatchMode):
    "Counts them."

    def __init__(self):
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += func in ASKING
        return func(*args, **kwargs or {})


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    root = tmp_path_factory.mktemp("base")
    tiny_pipeline(root / "tokenizer", PROMPTS.values(), 32).save_pretrained(root / "base")
    return root / "base"


CASES = {
    "full": dict(train_text_encoder=True, snr_gamma=5.0),
    "prior": dict(prior_loss_weight=0.7),
    "lora": dict(method="lora", rank=4, lora_alpha=4, train_text_encoder=True),
    "average": dict(ema_decay=0.9),
}


def _trainer(base, tmp_path, case):
    cfg = TrainConfig(
        **dict(max_train_steps=8, train_batch_size=4, mixed_precision="no", device="cpu")
        | CASES[case]
    )
    images = np.stack([draw_phantom(k, 0, 0, size=32) for k in range(8)])
    prior = (images, PROMPTS["pneumonia"]) if cfg.prior_loss_weight else None
    task = TrainingTask(images, [PROMPTS["normal"]], np.zeros(8, int), prior)
    return make_trainer(load_pipeline(base), task, tmp_path / "a.pt", cfg)


@pytest.mark.parametrize("case", CASES)
def test_no_questions_in_a_step(base, tmp_path, case, monkeypatch):
    "What is drawn on the CPU does not count; everything from there on does."
    trainer = _trainer(base, tmp_path, case)
    trainer.losses(0)  # what is computed once
    trainer.loop.optimizer.update(0)
    drawn = [[draws.at(k) for draws in trainer.draws] for k in (1, 2)]
    for k in (1, 2):
        for draws, batch in zip(trainer.draws, drawn[k - 1], strict=True):
            monkeypatch.setattr(draws, "at", lambda k, batch=batch: batch)
        with Questions() as questions:
            values = trainer.losses(k)
            norm = trainer.loop.optimizer.update(k)
            trainer.loop.log.add(k, values | dict(grad_norm=norm))
        assert questions.n == 0


def test_the_count_can_fail():
    with Questions() as questions:
        torch.ones(1).item()
        if torch.ones(1) > 0:
            torch.ones(2).nonzero()
    assert questions.n == 3


def test_copies_to_the_device_are_not_waited_for(base, tmp_path, monkeypatch):
    "Everything that a step brings along goes through the one function that copies without waiting."
    trainer = _trainer(base, tmp_path, "full")
    trainer.losses(0)
    copied, copy = [], trainers._to_device_async
    monkeypatch.setattr(
        trainers,
        "_to_device_async",
        lambda x, device: copied.append(tuple(x.shape)) or copy(x, device),
    )
    trainer.losses(1)
    length = trainer.prompts.tokenizer.model_max_length
    shape = (4, *trainer.draws[0].data.mean.shape[1:])
    assert sorted(copied) == sorted([(4,), shape, shape, (4,), (1, length), (4,)])

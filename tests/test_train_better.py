"""Prompt dropout, noise offset and snapshots: exact resume, right targets, and what is refused."""

import dataclasses

import numpy as np, pytest, torch
from cxr_synth.base.files import CxrError
from cxr_synth.base.readers import read_json
from cxr_synth.base.settings import PRESETS, PROMPTS, TrainConfig, resolve
from cxr_synth.diffusion.dreambooth import Snapshots, TrainingTask, fine_tune, make_trainer
from cxr_synth.diffusion.pipelines import load_pipeline
from cxr_synth.diffusion.small_pipeline import tiny_pipeline
from cxr_synth.images.phantom import draw_phantom

CFG = TrainConfig(
    max_train_steps=5,
    train_batch_size=4,
    learning_rate=1e-3,
    lr_warmup_steps=1,
    mixed_precision="no",
    checkpoint_steps=2,
    heldout_images=None,
    prior_loss_weight=1.0,
    prompt_dropout=0.4,
    noise_offset=0.1,
    device="cpu",
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    root = tmp_path_factory.mktemp("base")
    tiny_pipeline(root / "tokenizer", PROMPTS.values(), 32).save_pretrained(root / "base")
    return root / "base"


@pytest.fixture(scope="module")
def task():
    images = np.stack([draw_phantom(k, 0, k % 2, size=32) for k in range(16)])
    prior = images[1::2], PROMPTS["pneumonia"]
    return TrainingTask(images[::2], [PROMPTS["normal"]], np.zeros(8, int), prior=prior)


def weights(trainer):
    return {n: p.detach().clone() for n, p in trainer.loop.optimizer.params.items()}


def killed_at(trainer, step):
    losses = trainer.losses

    def stop(k):
        if k == step:
            raise KeyboardInterrupt
        return losses(k)

    trainer.losses = stop
    with pytest.raises(KeyboardInterrupt):
        trainer.run()


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_killed_run_ends_with_the_same_bits(base, task, tmp_path, method):
    cfg = dataclasses.replace(CFG, method=method, rank=4, lora_alpha=4)
    whole = make_trainer(load_pipeline(base), task, tmp_path / "a.pt", cfg)
    log = whole.run()
    killed_at(make_trainer(load_pipeline(base), task, tmp_path / "b.pt", cfg), 3)
    again = make_trainer(load_pipeline(base), task, tmp_path / "b.pt", cfg)
    assert again.loop.step == 2
    assert again.run() == log
    for name, value in weights(again).items():
        assert torch.equal(value, weights(whole)[name])


def darkest(draw):
    images = draw(PROMPTS["normal"], [1, 2], 2, 2.0)
    return dict(distance=float(images.mean()), n=len(images))


def chosen(base, task, out, judge=darkest):
    "A model with snapshots at 2, 4 and 5; checkpoints at 2 and 4."
    cfg = dataclasses.replace(CFG, snapshots=2)
    fine_tune(str(base), task, out / "model", out / "last.pt", cfg, judge=judge)
    snapshots = {p.name: p.read_bytes() for p in sorted(out.glob("*-step*.safetensors"))}
    return read_json(out / "model/provenance.json", dict), snapshots


@pytest.mark.parametrize("when", ["before a snapshot", "after a snapshot", "while judging"])
def test_a_killed_training_chooses_the_same_snapshot(base, task, tmp_path, monkeypatch, when):
    calm, snapshots = chosen(base, task, tmp_path / "calm")
    assert [row["step"] for row in calm["snapshots"]["table"]] == [2, 4, 5]
    assert len(snapshots) == 3
    write, calls = Snapshots.__call__, []

    def dies_at_four(self, loop):
        if when == "after a snapshot":
            write(self, loop)
        if loop.step == 4:
            raise KeyboardInterrupt
        return when == "after a snapshot" or write(self, loop)

    def dies_at_the_second(draw):
        calls.append(darkest(draw))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return calls[-1]

    judge = dies_at_the_second if when == "while judging" else darkest
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        if when != "while judging":
            m.setattr(Snapshots, "__call__", dies_at_four)
        chosen(base, task, tmp_path / "killed", judge)
    assert not (tmp_path / "killed/model/provenance.json").exists()
    assert chosen(base, task, tmp_path / "killed") == (calm, snapshots)


def test_a_lost_snapshot_is_said_and_passed_over(base, task, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("CXR_QUIET", raising=False)
    write = Snapshots.__call__

    def loses_the_second(self, loop):
        write(self, loop)
        if loop.step == 5:
            (tmp_path / "last-step000002.safetensors").unlink()

    monkeypatch.setattr(Snapshots, "__call__", loses_the_second)
    found, _ = chosen(base, task, tmp_path)
    assert [row["step"] for row in found["snapshots"]["table"]] == [4, 5]
    said = capsys.readouterr()
    assert "the snapshot of step 2 cannot be chosen" in said.out + said.err


def test_both_walks_drop_prompts_and_shift_the_noise(base, task, tmp_path):
    plain = dataclasses.replace(CFG, prompt_dropout=0.0, noise_offset=0.0)
    one = make_trainer(load_pipeline(base), task, tmp_path / "a.pt", CFG)
    other = make_trainer(load_pipeline(base), task, tmp_path / "b.pt", plain)
    for mine, theirs in zip(one.draws, other.draws, strict=True):
        pairs = [(mine.at(k), theirs.at(k)) for k in range(20)]
        dropped = torch.stack([(a[3] == one.no_prompt).float().mean() for a, _ in pairs]).mean()
        assert 0.2 < dropped < 0.6
        assert not any((b[3] == other.no_prompt).any() for _, b in pairs)
        for a, b in pairs:
            added = a[1] - b[1]  # one number a channel
            assert torch.allclose(added, added[..., :1, :1].expand_as(added), atol=1e-6)
            assert added.abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_target_is_the_noise_that_was_added(base, task, tmp_path, kind):
    pipe = load_pipeline(base)
    pipe.scheduler.register_to_config(prediction_type=kind)
    trainer = make_trainer(pipe, task, tmp_path / "a.pt", CFG)
    x0, noise, t, which = trainer.draws[0].at(0)
    abar = trainer.noise_levels.alphas_cumprod[t].view(-1, 1, 1, 1)
    with torch.no_grad():
        words = trainer.prompts(which, False)
        noisy = abar.sqrt() * x0 + (1 - abar).sqrt() * noise
        answer = trainer.pipe.unet(noisy, t, words).sample
        wanted = noise if kind == "epsilon" else abar.sqrt() * noise - (1 - abar).sqrt() * x0
        by_hand = (answer - wanted).square().flatten(1).mean(1)
        assert torch.allclose(trainer.errors(x0, noise, t, which, False), by_hand, rtol=1e-4)


def test_presets_drop_a_tenth_and_the_guides_commands_none():
    for name in PRESETS:
        assert resolve("train", name).prompt_dropout == 0.1
        assert resolve("train", name).noise_offset == 0
    assert TrainConfig().prompt_dropout == 0


@pytest.mark.parametrize(
    "bad",
    [
        dict(prompt_dropout=1.0),
        dict(prompt_dropout=-0.1),
        dict(noise_offset=1.5),
        dict(snapshots=0),
        dict(snapshot_images=5),
        dict(snapshots=10, weights="best"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(bad):
    with pytest.raises(CxrError, match="Allowed|Leave one of them away"):
        TrainConfig(**bad)

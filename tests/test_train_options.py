"Options that save time or memory change the loss by rounding alone; previews and other looks change nothing."

import dataclasses
import os
from importlib.util import find_spec

import numpy as np, pytest, torch
from cxr_synth.base.files import CxrError
from cxr_synth.diffusion import dreambooth
from cxr_synth.base.settings import PROMPTS, TrainConfig
from cxr_synth.diffusion.command import train_dreambooth
from cxr_synth.diffusion.dreambooth import TrainingTask, make_trainer
from cxr_synth.diffusion.pipelines import load_pipeline
from cxr_synth.images.phantom import draw_phantom
from cxr_synth.diffusion.small_pipeline import tiny_pipeline

CFG = TrainConfig(
    max_train_steps=2,
    train_batch_size=2,
    learning_rate=1e-3,
    lr_warmup_steps=1,
    mixed_precision="no",
    checkpoint_steps=1,
    device="cpu",
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    root = tmp_path_factory.mktemp("base")
    tiny_pipeline(root / "tokenizer", PROMPTS.values(), 32).save_pretrained(root / "base")
    return root / "base"


@pytest.fixture(scope="module")
def task():
    images = np.stack([draw_phantom(k, 0, 0, size=32) for k in range(8)])
    return TrainingTask(
        images,
        [PROMPTS["normal"]],
        np.zeros(8, int),
        heldout=(images[:2], [PROMPTS["normal"]], np.zeros(2, int)),
    )


def losses(base, task, tmp_path, hooks=True, **kw):
    cfg = dataclasses.replace(CFG, **kw)
    trainer = make_trainer(
        load_pipeline(base), task, tmp_path / f"{len(list(tmp_path.iterdir()))}.pt", cfg
    )
    if not hooks:
        trainer.loop.hooks = []
    log = trainer.run()
    assert all(p.dtype == torch.float32 for p in trainer.loop.optimizer.params.values())
    return [r["loss"] for r in log if "loss" in r]


@pytest.fixture(scope="module")
def plain(base, task, tmp_path_factory):
    return {
        m: losses(
            base, task, tmp_path_factory.mktemp(m), hooks=False, method=m, rank=4, lora_alpha=4
        )
        for m in ("full", "lora")
    }


@pytest.mark.parametrize(
    "method, option, tolerance",
    [
        ("full", dict(gradient_checkpointing=True), 1e-5),
        ("lora", dict(gradient_checkpointing=True), 1e-5),
        ("full", dict(channels_last=True), 1e-4),
        ("full", dict(mixed_precision="bf16"), 0.05),
        ("lora", dict(mixed_precision="bf16"), 0.05),
        ("full", dict(mixed_precision="fp16"), 0.05),
        ("lora", dict(mixed_precision="fp16"), 0.05),
    ],
    ids=lambda o: str(*o.items()) if isinstance(o, dict) else str(o),
)
def test_rounding_alone(base, task, plain, tmp_path, method, option, tolerance):
    assert losses(
        base, task, tmp_path, hooks=False, method=method, rank=4, lora_alpha=4, **option
    ) == pytest.approx(plain[method], rel=tolerance)


def test_looking_changes_nothing(base, task, tmp_path):
    assert losses(base, task, tmp_path, heldout_steps=1) == losses(
        base, task, tmp_path, hooks=False
    )


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is here")
def test_eight_bits_need_bitsandbytes(base, task, tmp_path):
    with pytest.raises(CxrError, match="pip install bitsandbytes"):
        losses(base, task, tmp_path, use_8bit_adam=True)


def _command(base, task, tmp_path):
    from PIL import Image

    (tmp_path / "images").mkdir()
    for k, im in enumerate(task.images):
        Image.fromarray(im).save(tmp_path / f"images/{k}.png")
    return dict(
        pretrained_model_name_or_path=str(base),
        instance_data_dir=str(tmp_path / "images"),
        instance_prompt=PROMPTS["normal"],
        resolution=32,
        max_train_steps=2,
        train_batch_size=4,
        num_validation_images=1,
        device="cpu",
        checkpoint_steps=1,
    )


def test_tensorboard(base, task, tmp_path):
    pytest.importorskip("tensorboard")
    out = train_dreambooth(
        **_command(base, task, tmp_path), output_dir=str(tmp_path / "out"), tensorboard=True
    )
    assert list(out.rglob("events.out.tfevents*"))


def names(folder):
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*.*") if p.is_file()}


def test_mirror(base, task, tmp_path, monkeypatch, capsys):
    "The finished model takes the place of the checkpoints; another machine takes it up from there."
    args, drive = _command(base, task, tmp_path), tmp_path / "drive/out"
    args["mirror"] = str(drive.parent)
    seen = []
    monkeypatch.setattr(dreambooth, "save_model", watched(dreambooth.save_model, seen, drive))
    out = train_dreambooth(**args, output_dir=str(tmp_path / "out"))
    assert {"checkpoints/last.pt", "checkpoints/last.pt.json"} <= seen[0]
    model = names(out) - {"train.csv"}
    kept = {".mirrored.json", "checkpoints/last.csv"} | {f"previews/00000{k}.png" for k in (0, 2)}
    saved = {n for n in model if not n.startswith("previews/")}
    assert names(drive) == kept | saved | {f"{n}.json" for n in saved}
    assert (out / "train.csv").exists() and not (out / "checkpoints").exists()
    capsys.readouterr()
    monkeypatch.setattr(dreambooth, "make_trainer", None)  # nothing is trained again
    again = train_dreambooth(**args, output_dir=str(tmp_path / "new/out"))
    assert "brought back" in capsys.readouterr().out
    assert {n: (again / n).read_bytes() for n in saved} == {
        n: (out / n).read_bytes() for n in saved
    }
    assert (again / "train.csv").read_bytes() == (out / "train.csv").read_bytes()
    assert not (again / "checkpoints").exists()


def watched(save, seen, drive):
    def saving(*args, **kw):
        seen.append(names(drive))
        return save(*args, **kw)

    return saving


@pytest.mark.parametrize("damage", ["cut weights", "cut facts", "cut provenance", "other settings"])
def test_a_mirrored_model_that_does_not_fit(base, task, tmp_path, damage):
    "It is not taken up; the model is trained again."
    args, drive = _command(base, task, tmp_path), tmp_path / "drive/out"
    args["mirror"] = str(drive.parent)
    out = train_dreambooth(**args, output_dir=str(tmp_path / "out"))
    weights = "unet/diffusion_pytorch_model.safetensors"
    good = (out / weights).read_bytes()
    cut = {
        "cut weights": weights,
        "cut facts": f"{weights}.json",
        "cut provenance": "provenance.json",
    }
    if damage in cut:
        os.truncate(drive / cut[damage], (drive / cut[damage]).stat().st_size // 2)
    more = dict(learning_rate=1e-3) if damage == "other settings" else {}
    again = train_dreambooth(**args, **more, output_dir=str(tmp_path / "new/out"))
    assert ((again / weights).read_bytes() == good) == (damage in cut)


def test_a_mirror_that_cannot_be(base, task, tmp_path):
    args = _command(base, task, tmp_path)
    with pytest.raises(CxrError, match="cannot write to the mirror"):
        train_dreambooth(
            **args, output_dir=str(tmp_path / "x"), mirror=str(tmp_path / "images/0.png")
        )

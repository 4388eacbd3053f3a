"""Memory that is too small: refused before a download where it can be foreseen, named with the setting that
helps where it cannot; other errors of a GPU stay what they are. The GPUs here are stand-ins.
"""

from dataclasses import replace
from types import SimpleNamespace

import psutil, pytest, torch
from cxr_synth.base.compute import out_of_memory
from cxr_synth.base.files import CxrError
from cxr_synth.base.settings import PRESETS, TrainConfig, resolve
from cxr_synth.diffusion import dreambooth, hub
from cxr_synth.diffusion.preflight import memory_advice, preset_for
from cxr_synth.diffusion.trainer import Trainer

GIB = 2**30
CARDS = {  # name -> GiB, has bfloat16
    "Tesla T4": (14.7, False),
    "NVIDIA L4": (22.2, True),
    "NVIDIA A100-SXM4-40GB": (39.4, True),
    "NVIDIA A100-SXM4-80GB": (79.1, True),
}


@pytest.fixture
def computer(monkeypatch):
    "`computer(card)` is a computer with that card, or without any and 12.7 GiB."
    sizes = dict(total_memory=0)
    cuda = SimpleNamespace(
        is_available=lambda: bool(sizes["total_memory"]),
        is_bf16_supported=lambda including_emulation: sizes["bf16"],
        current_device=lambda: 0,
        device_count=lambda: 1,
        get_device_name=lambda: sizes["name"],
        get_device_properties=lambda k: SimpleNamespace(total_memory=sizes["total_memory"]),
    )

    def computer(card):
        gib, bf16 = CARDS.get(card, (0, False))
        sizes.update(name=card, total_memory=gib * GIB, bf16=bf16)
        monkeypatch.setattr(torch, "cuda", cuda)
        memory = SimpleNamespace(total=12.7 * GIB)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)

    return computer


FITS = {
    None: "laptop",
    "Tesla T4": "t4-16gb",
    "NVIDIA L4": "l4-24gb",
    "NVIDIA A100-SXM4-40GB": "a100-40gb",
    "NVIDIA A100-SXM4-80GB": "a100-80gb",
}


@pytest.mark.parametrize("card", FITS)
def test_the_preset_for_each_card(computer, card):
    computer(card)
    assert preset_for("cuda" if card else "cpu", CARDS.get(card, (12.7,))[0]) == FITS[card]


@pytest.mark.parametrize("card", FITS)
def test_the_large_preset_stops_before_any_download(computer, monkeypatch, tmp_path, card):
    "42 GiB; refused on all but the 80 GB card, with the preset that fits and the settings that help."
    computer(card)
    for name in ("snapshot_download", "hub_commit"):
        monkeypatch.setattr(hub, name, lambda *a, **kw: pytest.fail("asked the Hub"))
    cfg = resolve("train", "a100-80gb")
    if FITS[card] == "a100-80gb":
        return dreambooth.print_preflight(cfg, 512, tmp_path)
    with pytest.raises(CxrError) as caught:
        dreambooth.print_preflight(cfg, 512, tmp_path)
    text = str(caught.value)
    for part in (card or "no GPU", f"--preset {FITS[card]}", "Nothing was downloaded"):
        assert part in text
    for flag in ("gradient-checkpointing", "train-batch-size 4", "method lora"):
        assert f"--train.{flag}" in text


def test_a_user_who_knows_better(computer, tmp_path, capsys, monkeypatch):
    "The refusal names the flag, and with it training begins; what the estimate says is still printed."
    computer("NVIDIA A100-SXM4-40GB")
    monkeypatch.delenv("CXR_QUIET", raising=False)
    cfg = resolve("train", "a100-80gb")
    with pytest.raises(CxrError, match="--train.trust-memory"):
        dreambooth.print_preflight(cfg, 512, tmp_path)
    capsys.readouterr()
    dreambooth.print_preflight(replace(cfg, trust_memory=True), 512, tmp_path)
    assert "It will not fit." in capsys.readouterr().out
    assert replace(cfg, trust_memory=True).settings() == cfg.settings()  # the same result


def test_the_settings_that_are_named_exist():
    cfg = resolve("train", "a100-80gb")
    words = [w for w in memory_advice(cfg).replace(";", " ").split() if w.startswith("--train.")]
    assert len(words) == 4
    for word in words:
        assert word.removeprefix("--train.").replace("-", "_") in TrainConfig.__dataclass_fields__
    assert "lora" not in memory_advice(resolve("train", "a100-80gb-lora"))
    assert set(FITS.values()) <= set(PRESETS)


ERRORS = {
    "a GPU's": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cuBLAS's": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
    "a CPU's": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    "Python's": MemoryError(),
}
OTHER = RuntimeError("CUDA error: an illegal memory access was encountered")


@pytest.mark.parametrize("kind", ERRORS)
def test_running_out_in_training_names_the_setting(
    study_copy, cxr_synth_command, monkeypatch, kind
):
    def fails(self, step):
        raise ERRORS[kind]

    monkeypatch.setattr(Trainer, "losses", fails)
    more = ("--redo", "--exploratory", "--train.max-train-steps", "3")
    done = cxr_synth_command("train", study_copy.root, *more)
    assert done.status == 2 and "out of memory in training" in done.err, done.err
    assert "--train.base-batch-size" in done.err and "real010-rep0" in done.err
    assert out_of_memory(ERRORS[kind])


def test_running_out_in_fine_tuning_names_the_setting(tmp_path, monkeypatch):
    "Of a pretrained base, and by the guide's command."
    from cxr_synth.diffusion.dreambooth import class_task, fine_tune
    from cxr_synth.diffusion.pipelines import save_pipeline
    from cxr_synth.diffusion.small_pipeline import tiny_pipeline
    import numpy as np

    def fails(self, step):
        raise ERRORS["cuBLAS's"]

    monkeypatch.setattr(Trainer, "losses", fails)
    save_pipeline(tiny_pipeline(tmp_path / "tok", ["chest"], 32), tmp_path / "base")
    cfg = TrainConfig(base=str(tmp_path / "base"), train_batch_size=2, device="cpu")
    task = class_task(np.zeros((2, 32, 32), np.uint8), "chest")
    with pytest.raises(CxrError, match="--train.gradient-checkpointing") as caught:
        fine_tune(str(tmp_path / "base"), task, tmp_path / "m", tmp_path / "m.pt", cfg)
    assert "train-batch-size 1 --train.gradient-accumulation-steps 2" in str(caught.value)


def test_other_errors_of_a_gpu_stay(study_copy, cxr_synth_command, monkeypatch):
    def fails(self, step):
        raise OTHER

    assert not out_of_memory(OTHER)
    monkeypatch.setattr(Trainer, "losses", fails)
    more = ("--redo", "--exploratory", "--train.max-train-steps", "3")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        cxr_synth_command("train", study_copy.root, *more)

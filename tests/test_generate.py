"Generators of every kind, and what goes wrong on the way."

import json, re, shutil
from collections import namedtuple
from dataclasses import replace

import numpy as np
import pytest, torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from cxr_synth.diffusion import image_set, image_writer
from cxr_synth.base.files import CxrError, digest_file, write_json
from cxr_synth.base.readers import read_json
from cxr_synth.base.records import Stage, Study, stale_stages
from cxr_synth.base.settings import DataConfig, GenerateConfig, resolve
from cxr_synth.stages.data import stage_data
from cxr_synth.images.study_images import load_synthetic
from cxr_synth.diffusion.image_set import regenerate_image
from cxr_synth.stages.generate import stage_generate
from cxr_synth.diffusion.lora import add_lora, save_lora
from cxr_synth.diffusion.pipelines import fuse, load_pipeline
from cxr_synth.protocol.plan import Plan, PlannedGenerator
from cxr_synth.protocol.sets import load_metadata, read_redrawn, set_digests
from cxr_synth.ship.set_card import assert_same_images, read_set
from cxr_synth.ship.pack import pack, unpack
from test_generate_shards import CFG, NAME, bytes_of, clear, untrained_study

FEW = Plan(generators=(PlannedGenerator(NAME, images={"normal": 3, "pneumonia": 3}),))


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return untrained_study(tmp_path_factory.mktemp("generate") / "study")


def run(study, plan=FEW, **cfg):
    clear(study)
    stage_generate(study, GenerateConfig(**CFG | cfg), plan=plan, card=None)
    return load_synthetic(study, NAME)[0]


def test_seed_and_prompt_decide(study):
    a, b = run(study), run(study, replace(FEW, seed=1))
    assert not any(np.array_equal(x, y) for x, y in zip(a, b))


def test_number_per_class_may_be_a_rule(study):
    assert len(run(study, Plan(generators=(PlannedGenerator(NAME, images="2"),)))) == 4


def test_larger_drawing_takes_the_image_path(study):
    assert run(study, resolution=64).shape == (6, 32, 32)


def test_out_of_memory_later(study, monkeypatch):
    clear(study)
    draw, calls = image_set.Sampler.__call__, []

    def fails(self, seeds):
        calls.append(len(seeds))
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return draw(self, seeds)

    monkeypatch.setattr(image_set.Sampler, "__call__", fails)
    with pytest.raises(CxrError, match="--generate.batch-size 1 --redo"):
        stage_generate(study, GenerateConfig(**CFG), plan=FEW, card=None)
    assert len(list((study / "synthetic" / NAME).rglob("*.png"))) == 2  # what was finished stays
    stage_generate(study, GenerateConfig(**CFG), plan=FEW, card=None)
    assert len(load_synthetic(study, NAME)[0]) == 6


def test_full_disk_is_named_before_the_first_image(study, monkeypatch):
    clear(study)
    monkeypatch.setattr(
        image_writer.shutil,
        "disk_usage",
        lambda p: namedtuple("Usage", "total used free")(10**9, 10**9, 1000),
    )
    with pytest.raises(CxrError, match="6 images need up to"):
        stage_generate(study, GenerateConfig(**CFG), plan=FEW, card=None)
    assert not list((study / "synthetic" / NAME).rglob("*.png"))


def test_images_without_a_record_are_not_touched(study):
    clear(study)
    path = study / "synthetic" / NAME / "normal/000000.png"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"mine")
    with pytest.raises(CxrError, match="do not belong to the set"):
        stage_generate(study, GenerateConfig(**CFG), plan=FEW, card=None)
    assert path.read_bytes() == b"mine"
    stage_generate(study, GenerateConfig(**CFG), plan=FEW, card=None, redo=True)
    assert b"mine" in {
        p.read_bytes() for p in (study / "synthetic").rglob("*.redo*/normal/000000.png")
    }


def test_gate_flags_and_keeps(study, monkeypatch):
    draw, drawn = image_set.Sampler.__call__, []

    def spoil_the_first_of_three(self, seeds):
        pixels = np.array(draw(self, seeds))
        for k in range(len(pixels)):
            if len(drawn) % 3 == 0:
                pixels[k] = np.nan
            drawn.append(k)
        return pixels

    monkeypatch.setattr(image_set.Sampler, "__call__", spoil_the_first_of_three)
    assert len(run(study)) == 6
    flags = (study / "synthetic" / NAME / "flags.csv").read_text().splitlines()
    spoilt = [f"{c}/000000.png,not a number,gate" for c in ("normal", "pneumonia")]
    assert [line for line in flags if "not a number" in line] == spoilt


def test_other_bytes_than_the_metadata_says(study):
    "As on another machine: the lost image comes out with other bytes, and that is said."
    run(study)
    folder = study / "synthetic" / NAME
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    lines[1]["sha256"] = "0" * 64
    (folder / "metadata.jsonl").write_text("".join(json.dumps(m) + "\n" for m in lines))
    (folder / lines[1]["file_name"]).unlink()
    record = read_json(folder / "stage.json")  # before it was finished
    write_json(folder / "stage.json", record | dict(status="running"))
    with pytest.raises(CxrError, match="normal/000001.png came out with other bytes"):
        stage_generate(study, GenerateConfig(**CFG), plan=FEW, card=None)


def record_models(study):
    "The record says what is in the folder now."
    stage = Stage(study, f"models/{NAME}", study.record(f"models/{NAME}"))
    stage.note_files()
    stage.save()


@pytest.fixture
def other_models(study):
    "Other models in place of the untrained ones, and a record that says so; the old ones come back."
    folder = study / "models" / NAME
    kept = folder.with_name(".kept")
    shutil.copytree(folder, kept)
    for c in ("normal", "pneumonia"):
        shutil.rmtree(folder / c)

    def make(fill, **how):
        fill(kept, folder)
        record = read_json(folder / "stage.json")
        write_json(folder / "stage.json", record | dict(settings=record["settings"] | how))
        record_models(study)
        return folder

    yield make
    shutil.rmtree(folder)
    kept.rename(folder)


def test_joint_model_draws_both_classes(study, other_models):
    other_models(lambda old, new: shutil.copytree(old / "normal", new / "joint"), joint=True)
    assert not np.array_equal(*run(study)[[0, 3]])
    inputs = study.records()[f"synthetic/{NAME}"]["inputs"]
    assert [i for i in inputs if i.startswith("models")] == [f"models/{NAME}/joint"]


def lora_models(old, new):
    "A LoRA on a base per class, with weights that matter."
    shutil.copytree(old / "normal", new / "base")
    for seed, c in enumerate(("normal", "pneumonia")):
        pipe = load_pipeline(new / "base")
        for p in add_lora(pipe.unet, pipe.text_encoder, 4, seed=seed):
            p.data += 0.05
        save_lora(new / c, pipe.unet, pipe.text_encoder, new / "base", 4)


def test_lora_generator_is_its_fused_pipeline(study, other_models, tmp_path):
    folder = other_models(lora_models, method="lora")
    images = run(study, before=True)
    inputs = study.records()[f"synthetic/{NAME}"]["inputs"]
    assert {i for i in inputs if i.startswith("models")} == {
        f"models/{NAME}/{p}" for p in ("base", "normal", "pneumonia")
    }
    before, _ = load_synthetic(study, f"{NAME}-base")
    assert np.abs(images.astype(int) - before).max() > 2
    assert np.array_equal(
        np.array(regenerate_image(study, f"{NAME}-base", "normal/000002.png")), before[2]
    )
    clear(study)
    for c in ("normal", "pneumonia"):
        fuse(folder / c, tmp_path / c)
        shutil.rmtree(folder / c)
        shutil.copytree(tmp_path / c, folder / c)
    record_models(study)
    assert np.abs(run(study).astype(int) - images).max() <= 1


def test_lora_of_another_base_is_refused(study, other_models):
    def wrong(old, new):
        lora_models(old, new)
        shutil.rmtree(new / "base")
        shutil.copytree(old / "pneumonia", new / "base")  # other weights, same shapes

    other_models(wrong, method="lora")
    with pytest.raises(CxrError, match="base"):
        run(study)


def test_half_copied_model_is_refused(study, other_models):
    def half(old, new):
        for c in ("normal", "pneumonia"):
            shutil.copytree(old / c, new / c)
        file = new / "normal/unet/diffusion_pytorch_model.safetensors"
        file.write_bytes(file.read_bytes()[:1000])

    other_models(half)
    with pytest.raises(CxrError, match="cannot load the model"):
        run(study)


def test_a_share_is_no_setting_of_the_set(study):
    clear(study)
    stage_generate(study, GenerateConfig(**CFG, shard="2/2"), plan=FEW, card=None)
    assert resolve("generate", recorded=study.recorded("generate")).shard == ""


def test_killed_between_the_last_image_and_the_metadata(study, monkeypatch):
    "What the bytes depend on was settled in .parts; the next start finds it there."
    clear(study)
    with monkeypatch.context() as m:

        def killed(*args):
            raise KeyboardInterrupt

        m.setattr(image_set, "complete_set", killed)
        with pytest.raises(KeyboardInterrupt):
            stage_generate(study, GenerateConfig(**CFG), plan=FEW, card=None)
    stage_generate(study, GenerateConfig(**CFG), plan=FEW, card=None)
    record = study.records()[f"synthetic/{NAME}"]
    assert (record["status"], record["batch_size"], record["threads"], record["precision"]) == (
        "complete",
        2,
        1,
        "no",
    )
    assert np.array_equal(
        np.array(regenerate_image(study, NAME, "normal/000001.png")),
        load_synthetic(study, NAME)[0][1],
    )


def test_there_and_back(study, tmp_path):
    "Packed and unpacked elsewhere without models and films: the stages go on, nothing is stale."
    from datasets import load_dataset

    clear(study)
    stage_generate(study, GenerateConfig(**CFG), plan=FEW)
    assert "Not for clinical use" in (study / "synthetic" / NAME / "README.md").read_text()
    write_json(study / "plan.json", dict(sha256="0"))
    home = Study(tmp_path / "home")
    unpack(pack(study, tmp_path / "study.zip"), home)
    assert not (home / "data/images").exists() and not (home / "models" / NAME / "normal").exists()
    stage_data(home, DataConfig(patients=120, resolution=32))
    stage_generate(home, GenerateConfig(**CFG), plan=FEW)
    assert home.digest("data/images") == study.digest("data/images") and stale_stages(home) == []
    images, labels = load_synthetic(home, NAME)
    assert np.array_equal(images, load_synthetic(study, NAME)[0]) and bytes_of(home) == bytes_of(
        study
    )
    ds = load_dataset(
        "imagefolder",
        data_dir=str(home / "synthetic" / NAME),
        split="train",
        cache_dir=str(tmp_path / "cache"),
    )
    assert {m["sha256"]: np.asarray(m["image"].convert("L")).tobytes() for m in ds} == {
        m["sha256"]: im.tobytes() for m, im in zip(load_metadata(study, NAME), images)
    }


@pytest.mark.parametrize(
    "bad, said",
    [
        (dict(num_inference_steps=0), "not possible"),
        (dict(guidance_scale=-1.0), "not possible"),
        (dict(resolution=100), "not possible"),
        (dict(batch_size=-8), "not possible"),
        (dict(scheduler="heun"), "Allowed: dpmsolver++, ddim, euler, unipc"),
    ],
)
def test_settings_that_cannot_be(bad, said):
    with pytest.raises(CxrError, match=re.escape(said)):
        GenerateConfig(**bad)


def test_a_lost_image_is_made_again_with_its_bytes(study):
    run(study)
    path = study / "synthetic" / NAME / "normal/000001.png"
    kept = path.read_bytes()
    path.unlink()
    stage_generate(study, GenerateConfig(**CFG), plan=FEW, card=None)
    assert path.read_bytes() == kept


@pytest.mark.parametrize(
    "plan, cfg, said",
    [
        (FEW, dict(guidance_scale=9.0), "generate.guidance_scale: recorded .*, now 9.0"),
        (replace(FEW, seed=1), {}, "generate.seed: recorded 0, now 1"),
    ],
)
def test_other_settings_are_refused_by_name(study, plan, cfg, said):
    run(study)
    with pytest.raises(CxrError, match=said):
        stage_generate(study, GenerateConfig(**CFG | cfg), plan=plan, card=None)


def test_a_whole_set_needs_no_model_and_a_lost_image_does(study, tmp_path):
    "As in a study that was unpacked without its models."
    images = run(study)
    model, away = study / "models" / NAME / "normal", tmp_path / "normal"
    shutil.move(model, away)
    path = study / "synthetic" / NAME / "normal/000001.png"
    try:
        stage_generate(study, GenerateConfig(**CFG), plan=FEW, card=None)
        path.unlink()
        with pytest.raises(CxrError, match="model_index.json is missing"):
            stage_generate(study, GenerateConfig(**CFG), plan=FEW, card=None)
    finally:
        shutil.move(away, model)
    stage_generate(study, GenerateConfig(**CFG), plan=FEW, card=None)
    assert np.array_equal(load_synthetic(study, NAME)[0], images)


def lose(study, monkeypatch, device, change):
    "A lost image, made again on a device of that name, whose bits are others by `change`."
    path = study / "synthetic" / NAME / "normal/000001.png"
    path.unlink()
    draw = image_set.Sampler.__call__
    with monkeypatch.context() as m:
        m.setattr(image_set, "device_name", lambda kind: device)
        m.setattr(image_set.Sampler, "__call__", lambda self, seeds: draw(self, seeds) + change)
        stage_generate(study, GenerateConfig(**CFG), plan=FEW, card=None)
    return path


def test_a_lost_image_from_a_gpu_is_written_down(study, monkeypatch, capsys):
    "The new bytes are taken, metadata.jsonl stays, readers know, and what was made from the set is stale."
    run(study)
    folder = study / "synthetic" / NAME
    before, old = (folder / "metadata.jsonl").read_bytes(), load_metadata(study, NAME)
    digest, kept = study.digest(f"synthetic/{NAME}"), set_digests(folder)
    path = lose(study, monkeypatch, "cuda NVIDIA A100", 0.1)
    (line,) = read_redrawn(folder)
    assert line["device"] == "cuda NVIDIA A100" and "cuda NVIDIA A100" in capsys.readouterr().out
    assert (folder / "metadata.jsonl").read_bytes() == before
    assert (line["before"], line["sha256"]) == (old[1]["sha256"], digest_file(path))
    now = load_metadata(study, NAME)
    assert [m for m in now if m not in old] == [old[1] | dict(sha256=digest_file(path))]
    assert np.array_equal(load_synthetic(study, NAME)[0][1], np.asarray(Image.open(path)))
    assert_same_images(study, NAME, read_set(study, NAME))
    assert study.records()[f"synthetic/{NAME}"]["devices"] == ["cpu", "cuda NVIDIA A100"]
    assert study.digest(f"synthetic/{NAME}") != digest and set_digests(folder)[0] == kept[0]
    assert len(set_digests(folder)) == 2 and not (folder / ".parts").exists()
    assert stale_stages(study) == []
    stage_generate(study, GenerateConfig(**CFG), plan=FEW, card=None)  # nothing left to do
    assert len(read_redrawn(folder)) == 1
    lose(study, monkeypatch, "cpu", 0.2)  # of a set that a GPU had a part in
    assert [m["device"] for m in read_redrawn(folder)] == ["cuda NVIDIA A100", "cpu"]
    assert len(load_synthetic(study, NAME)[0]) == 6


def test_a_lost_image_of_a_cpu_must_have_its_bytes(study, monkeypatch):
    run(study)
    with pytest.raises(CxrError, match="normal/000001.png came out with other bytes"):
        lose(study, monkeypatch, "cpu", 0.1)
    assert read_redrawn(study / "synthetic" / NAME) == []
    assert stale_stages(study) != []


def test_a_lost_image_from_a_gpu_with_the_same_bytes(study, monkeypatch):
    run(study)
    lose(study, monkeypatch, "cuda NVIDIA A100", 0)
    assert read_redrawn(study / "synthetic" / NAME) == []
    assert len(load_synthetic(study, NAME)[0]) == 6


def test_tf32_for_the_steps_and_not_for_the_pixels(study, monkeypatch):
    "The switches stand as they were before; without a GPU nothing looks at them."

    def switches():
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    seen, before = {"unet": set(), "vae": set()}, switches()
    forward, decode = UNet2DConditionModel.forward, AutoencoderKL.decode

    def unet(self, *args, **kw):
        seen["unet"].add(switches())
        return forward(self, *args, **kw)

    def vae(self, *args, **kw):
        seen["vae"].add(switches())
        return decode(self, *args, **kw)

    monkeypatch.setattr(UNet2DConditionModel, "forward", unet)
    monkeypatch.setattr(AutoencoderKL, "decode", vae)
    run(study)
    assert seen == {"unet": {(True, True)}, "vae": {(False, False)}} and switches() == before
    assert study.records()[f"synthetic/{NAME}"]["tf32"] is False

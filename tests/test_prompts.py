"Prompts as a model reads them: cut ends are counted and said, blank ones and twins are refused, everywhere."

import numpy as np
import pytest
from PIL import Image

from cxr_synth.base.files import CxrError
from cxr_synth.base.settings import PROMPTS, GenerateConfig, TrainConfig
from cxr_synth.diffusion.command import train_dreambooth
from cxr_synth.diffusion.dreambooth import (
    TrainingTask,
    fine_tune,
    generate_class_images,
    make_class_images,
    train_base,
)
from cxr_synth.diffusion.pipelines import save_pipeline
from cxr_synth.diffusion.prompts import check_prompt, check_prompts
from cxr_synth.diffusion.sampling import Sampler, generate_synthetic_dataset
from cxr_synth.diffusion.small_pipeline import tiny_pipeline

LONG = "a chest xray, " * 20  # 60 tokens and more; the small model reads 30
BLANK = ["", " ", "\t\n", "\u00a0", "\u3000"]
NO_TEXT = [None, 7, 0.5, True, b"a chest xray", ["a chest xray"], {"prompt": "a"}]
ODD = ["a\x00b", "\x1b[31m", "\udcff", "a\ufffeb"]
TWINS = [  # different texts, the same tokens
    ("a chest xray", "A Chest XRAY"),
    ("a chest xray", "a  chest   xray"),
    ("a chest xray", " a chest xray\n"),
    (LONG + "healthy", LONG + "pneumonia"),
    (LONG, LONG + "and more"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    root = tmp_path_factory.mktemp("base")
    save_pipeline(tiny_pipeline(root / "tok", PROMPTS.values(), 32), root / "base")
    return root / "base"


@pytest.fixture(scope="module")
def pipe(base):
    from cxr_synth.diffusion.sampling import load_finetuned_model

    return load_finetuned_model(base, "cpu")


def films(folder, n=2):
    folder.mkdir(parents=True)
    for k in range(n):
        noise = np.random.default_rng(k).integers(0, 256, (32, 32), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{k}.png")
    return folder


def task(*prompts, prior=None):
    images = np.zeros((len(prompts), 32, 32), np.uint8)
    return TrainingTask(images, list(prompts), np.arange(len(prompts)), prior)


@pytest.mark.parametrize("prompt", [*BLANK, *NO_TEXT, *ODD], ids=repr)
def test_no_prompt(prompt):
    with pytest.raises(CxrError, match="my prompt"):
        check_prompt(prompt, "my prompt")


@pytest.mark.parametrize("a, b", TWINS)
def test_twins(pipe, a, b):
    with pytest.raises(CxrError, match="are the same for the model") as e:
        check_prompts(pipe.tokenizer, {"normal": a, "pneumonia": b})
    assert "normal" in str(e.value) and "pneumonia" in str(e.value)


@pytest.mark.parametrize("more, count", [("", 60), ("and then", 75)])
def test_what_is_cut_is_counted(pipe, more, count):
    ids = pipe.tokenizer(LONG + more).input_ids
    with pytest.warns(UserWarning, match=f"{len(ids) - 2} tokens, of which it reads 30") as said:
        check_prompts(pipe.tokenizer, {"the prompt": LONG + more})
    assert "does not read" in str(said[0].message)


@pytest.mark.parametrize("prompt", ["a chest xray", "a chest xray of normal lungs, clear"])
def test_good_prompts_pass_in_silence(pipe, prompt, recwarn):
    check_prompts(pipe.tokenizer, {"a": prompt, "b": prompt, "c": "another chest"})
    assert not recwarn.list


# ---- where prompts enter


@pytest.mark.parametrize("prompt", [BLANK[1], 7, ODD[0]], ids=repr)
@pytest.mark.parametrize("flag", ["instance_prompt", "class_prompt", "validation_prompt"])
def test_the_guides_command(base, tmp_path, flag, prompt):
    flags = dict(
        instance_prompt="a chest xray", class_prompt="an xray", with_prior_preservation=True
    )
    with pytest.raises(CxrError, match=flag):
        train_dreambooth(
            **flags | {flag: prompt},
            pretrained_model_name_or_path=base,
            instance_data_dir=films(tmp_path / "films"),
            output_dir=tmp_path / "out",
            resolution=32,
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("a, b", TWINS)
def test_the_guides_command_with_twins(base, tmp_path, a, b):
    with pytest.raises(CxrError, match="are the same for the model"):
        train_dreambooth(
            instance_prompt=a,
            class_prompt=b,
            with_prior_preservation=True,
            pretrained_model_name_or_path=base,
            instance_data_dir=films(tmp_path / "films"),
            output_dir=tmp_path / "out",
            resolution=32,
        )
    assert not list((tmp_path / "out").rglob("*.png"))  # no class image was drawn


@pytest.mark.parametrize("prompt", [*BLANK[:3], 7, None], ids=repr)
def test_class_images(base, tmp_path, prompt):
    with pytest.raises(CxrError):
        generate_class_images(1, tmp_path / "out", prompt, base)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("prompt", [*BLANK[:3], 7, None], ids=repr)
def test_synthetic_images(pipe, tmp_path, prompt):
    with pytest.raises(CxrError):
        generate_synthetic_dataset(pipe, prompt, 1, tmp_path / "out")
    with pytest.raises(CxrError):
        make_class_images(pipe, tmp_path / "out", prompt, 1, 32)
    with pytest.raises(CxrError):
        Sampler(pipe, prompt, 32, GenerateConfig(), 1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("negative", [" ", "\n", "A Chest  xray", "a chest xray"], ids=repr)
def test_a_negative_prompt_that_steers_nowhere(pipe, negative):
    with pytest.raises(CxrError, match="prompt"):
        cfg = GenerateConfig(negative_prompt=negative, guidance_scale=3.0)
        Sampler(pipe, "a chest xray", 32, cfg, 1)


@pytest.mark.parametrize("a, b", TWINS)
@pytest.mark.parametrize("where", ["instance", "prior"])
def test_training(base, tmp_path, a, b, where):
    images = np.zeros((1, 32, 32), np.uint8)
    work = task(a, b) if where == "instance" else task(a, prior=(images, b))
    cfg = TrainConfig(base=str(base), max_train_steps=1, train_batch_size=1, prior_loss_weight=1.0)
    with pytest.raises(CxrError, match="are the same for the model"):
        fine_tune(str(base), work, tmp_path / "out", tmp_path / "out/last.pt", cfg)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("a, b", TWINS[:4])
def test_a_base_from_nothing_is_refused_before_its_autoencoder(tmp_path, a, b):
    with pytest.raises(CxrError, match="are the same for the model"):
        train_base(task(a, b), tmp_path / "work", TrainConfig(vae_steps=1))
    assert not list(tmp_path.rglob("*.csv"))


# ---- in a study


def table(study, path, prompt_of):
    from cxr_synth.base.readers import read_csv

    rows = read_csv(study / "data/manifest.csv")
    lines = [f'{r["image_id"]},"{prompt_of(k, r)}"' for k, r in enumerate(rows)]
    path.write_text("\n".join(["image_id,prompt", *lines]) + "\n")
    return str(path)


SHARED = {
    "one prompt for all": lambda k, row: "a chest xray",
    "one prompt of both classes": lambda k, row: (
        "a xray" if k % 3 == 0 else f"a {row['class_name']} xray"
    ),
}


@pytest.mark.parametrize("kind", SHARED)
def test_joint_models_need_prompts_that_differ(study_copy, tmp_path, kind):
    from cxr_synth.diffusion.generator import StudyTasks

    name = next((study_copy / "models").glob("real*")).name
    prompts = table(study_copy, tmp_path / "prompts.csv", SHARED[kind])
    with pytest.raises(CxrError, match="tell the classes apart"):
        StudyTasks(study_copy, name, TrainConfig(prompts=prompts, joint=True))
    assert StudyTasks(study_copy, name, TrainConfig(prompts=prompts)).prompts


@pytest.mark.parametrize("prompt", BLANK[:3], ids=repr)
def test_a_blank_class_prompt_in_a_study(study_copy, prompt):
    from cxr_synth.diffusion.generator import StudyTasks

    name = next((study_copy / "models").glob("real*")).name
    with pytest.raises(CxrError, match="class.prompt"):
        cfg = TrainConfig(prior="generated", prior_loss_weight=1.0, class_prompt=prompt)
        StudyTasks(study_copy, name, cfg)


def test_classes_of_a_joint_model_that_differ_in_capitals(study_copy, tmp_path, pipe):
    from cxr_synth.diffusion.generator import StudyTasks

    name = next((study_copy / "models").glob("real*")).name
    texts = {"normal": "A Chest xray", "pneumonia": "a chest XRAY"}
    prompts = table(study_copy, tmp_path / "p.csv", lambda k, row: texts[row["class_name"]])
    tasks = StudyTasks(study_copy, name, TrainConfig(prompts=prompts, joint=True))
    with pytest.raises(CxrError, match="are the same for the model"):
        tasks.task(pipe, None)


def test_a_long_table_of_prompts_is_said(study_copy, tmp_path, pipe):
    from cxr_synth.diffusion.generator import StudyTasks

    name = next((study_copy / "models").glob("real*")).name
    prompts = table(
        study_copy, tmp_path / "p.csv", lambda k, row: f"{row['class_name']} {k} " + LONG
    )
    tasks = StudyTasks(study_copy, name, TrainConfig(prompts=prompts))
    with pytest.warns(UserWarning, match="too long for this model"):
        tasks.task(pipe, 0)

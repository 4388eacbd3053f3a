"The guide's three commands (section 7), as they stand there, become settings."

import pytest
from cxr_synth.base.files import CxrError
from cxr_synth.diffusion.command import GuideFlags, guide_flags, parse_command

FULL = """
# Train for {upper} class - Full DreamBooth with Text Encoder
export MODEL_NAME="stabilityai/stable-diffusion-2-1-base"
export INSTANCE_DIR="./cxr_training_data/{cls}"
export CLASS_DIR="./class_images/xray"
export OUTPUT_DIR="./models/cxr_full_{cls}"

accelerate launch train_dreambooth.py \\
  --pretrained_model_name_or_path=$MODEL_NAME \\
  --instance_data_dir=$INSTANCE_DIR \\
  --class_data_dir=$CLASS_DIR \\
  --output_dir=$OUTPUT_DIR \\
  --instance_prompt="{prompt}" \\
  --class_prompt="a chest xray image" \\
  --resolution=512 \\
  --train_batch_size=8 \\
  --gradient_accumulation_steps=2 \\
  --learning_rate=5e-6 \\
  --lr_scheduler="cosine" \\
  --lr_warmup_steps=100 \\
  --max_train_steps=800 \\
  --train_text_encoder \\
  --with_prior_preservation \\
  --prior_loss_weight=1.0 \\
  --num_class_images=200 \\
  --mixed_precision="fp16" \\
  --validation_prompt="{short}" \\
  --num_validation_images=4 \\
  --validation_steps=200 \\
  --seed=42
"""
LORA = """
# LoRA training for NORMAL class
accelerate launch train_dreambooth_lora.py \\
  --pretrained_model_name_or_path="stabilityai/stable-diffusion-2-1-base" \\
  --instance_data_dir="./cxr_training_data/normal" \\
  --output_dir="./models/cxr_lora_normal" \\
  --instance_prompt="a chest xray of healthy normal lungs" \\
  --resolution=512 \\
  --train_batch_size=16 \\
  --learning_rate=1e-4 \\
  --max_train_steps=1500 \\
  --train_text_encoder \\
  --rank=128 \\
  --mixed_precision="fp16" \\
  --seed=42
"""
BLOCKS = [
    FULL.format(
        upper="NORMAL",
        cls="normal",
        prompt="a chest xray of healthy normal lungs, clear lung fields",
        short="a chest xray of healthy normal lungs",
    ),
    FULL.format(
        upper="PNEUMONIA",
        cls="pneumonia",
        prompt="a chest xray showing pneumonia infection, lung opacity",
        short="a chest xray showing pneumonia",
    ),
    LORA,
]


@pytest.mark.parametrize("block", BLOCKS[:2])
def test_full_commands(block):
    flags = guide_flags(parse_command(block))
    cfg = flags.config()
    assert (flags.resolution, flags.seed, flags.class_data_dir) == (512, 42, "./class_images/xray")
    assert flags.validation_prompt in flags.instance_prompt.replace(" infection, lung opacity", "")
    assert (
        cfg.method,
        cfg.train_batch_size,
        cfg.gradient_accumulation_steps,
        cfg.learning_rate,
        cfg.max_train_steps,
    ) == ("full", 8, 2, 5e-6, 800)
    assert (cfg.lr_scheduler, cfg.lr_warmup_steps, cfg.train_text_encoder, cfg.mixed_precision) == (
        "cosine",
        100,
        True,
        "fp16",
    )
    assert (cfg.prior, cfg.prior_loss_weight, cfg.num_class_images, cfg.class_prompt) == (
        "generated",
        1.0,
        200,
        "a chest xray image",
    )
    assert (cfg.preview_steps, cfg.preview_images) == (200, 4)


def test_lora_command():
    cfg = guide_flags(parse_command(LORA)).config()
    assert (
        cfg.method,
        cfg.rank,
        cfg.lora_alpha,
        cfg.train_batch_size,
        cfg.learning_rate,
        cfg.max_train_steps,
    ) == ("lora", 128, 128, 16, 1e-4, 1500)
    assert cfg.train_text_encoder and cfg.prior_loss_weight is None


def test_every_flag_arrives():
    "No flag of the commands is read and then forgotten."
    import re

    for block in BLOCKS:
        named = set(re.findall(r"--(\w+)", block))
        kw = parse_command(block)
        assert named <= set(kw) and named <= set(GuideFlags.__dataclass_fields__)
        assert all(getattr(guide_flags(kw), k) == v for k, v in kw.items())


def test_the_guides_model_is_gone(tmp_path):
    from cxr_synth.diffusion.command import train_dreambooth

    with pytest.raises(CxrError, match="sd2-community"):
        train_dreambooth(**parse_command(LORA) | dict(output_dir=str(tmp_path / "x")))


NEEDED = dict(
    pretrained_model_name_or_path="x", instance_data_dir="x", output_dir="x", instance_prompt="x"
)


@pytest.mark.parametrize(
    "flags, said",
    [
        (NEEDED | dict(resolution=30), "multiples of 8"),
        (NEEDED | dict(learning_rat=1), "unknown argument 'learning_rat'"),
        (dict(output_dir="x"), "needs pretrained_model_name_or_path"),
    ],
)
def test_flags_that_cannot_be(flags, said):
    with pytest.raises(CxrError, match=said):
        guide_flags(flags)

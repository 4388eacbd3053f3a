"""Does a model saved with one set of library versions give the same answers with another?

In one environment:   python benchmarks/lora_versions.py save FOLDER
in another one:       python benchmarks/lora_versions.py load FOLDER
FOLDER gets a small base, and one LoRA and one full model per environment that saved; `load` prints, for each,
the largest difference from the answers noted at saving: through this library, and through plain diffusers.
"""

import os, sys
from functools import partial
from pathlib import Path

os.environ.setdefault("CXR_QUIET", "1")
import diffusers, numpy as np, peft, torch, transformers
from diffusers import StableDiffusionPipeline
from cxr_synth.base.files import CxrError
from cxr_synth.base.settings import PROMPTS, TrainConfig
from cxr_synth.diffusion.dreambooth import class_task, fine_tune
from cxr_synth.diffusion.lora import LORA_FILE, add_lora, save_lora
from cxr_synth.diffusion.pipelines import load_pipeline, save_pipeline
from cxr_synth.diffusion.small_pipeline import tiny_pipeline


@torch.no_grad()
def answers(pipe):
    ids = pipe.tokenizer(
        list(PROMPTS.values()), padding="max_length", max_length=32, return_tensors="pt"
    ).input_ids
    words = pipe.text_encoder(ids)[0]
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return dict(words=words, noise=pipe.unet(noise, torch.tensor([5, 500]), words).sample)


def save(root, versions):
    if not (root / "base").exists():
        save_pipeline(tiny_pipeline(root / "tokenizer", PROMPTS.values(), 32), root / "base")
    pipe, g = load_pipeline(root / "base"), torch.Generator().manual_seed(1)
    for p in add_lora(pipe.unet, pipe.text_encoder, rank=4, alpha=8):
        p.data += 0.1 * torch.randn(p.shape, generator=g)
    save_lora(root / versions, pipe.unet, pipe.text_encoder, root / "base", 4, 8)
    torch.save(answers(pipe), root / versions / "answers.pt")
    save_full(root / f"full_{versions}", root / "base")


def save_full(folder, base):
    "A model as training with method full leaves it, after two steps."
    cfg = TrainConfig(
        base=str(base),
        max_train_steps=2,
        train_batch_size=2,
        heldout_images=None,
        preview_steps=None,
        device="cpu",
    )
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32), np.uint8)
    checkpoint = folder.with_suffix(".pt")
    fine_tune(str(base), class_task(images, PROMPTS["normal"]), folder, checkpoint, cfg)
    torch.save(answers(load_pipeline(folder)), folder / "answers.pt")


def plain(root, folder):
    is_lora = (folder / "lora.json").exists()
    source = root / "base" if is_lora else folder
    pipe = StableDiffusionPipeline.from_pretrained(source, safety_checker=None)
    if is_lora:
        pipe.load_lora_weights(folder, weight_name=LORA_FILE)
    return pipe


def difference(get, noted):
    "Largest difference of a pipeline's answers from the noted ones, or why it cannot be loaded."
    try:
        found = answers(get())
    except (IndexError, TypeError, ValueError, CxrError) as e:
        return f"{type(e).__name__}: {str(e).splitlines()[0]}"
    return {k: (v - noted[k]).abs().max().item() for k, v in found.items()}


def load(root, versions):
    print("here:", versions)
    for folder in sorted(p.parent for p in root.glob("*/answers.pt")):
        noted = torch.load(folder / "answers.pt", weights_only=True)
        loaders = {
            "cxr_synth": partial(load_pipeline, folder),
            "diffusers": partial(plain, root, folder),
        }
        for name, get in loaders.items():
            print(f"  {folder.name}  by {name:<10} {difference(get, noted)}")


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("save", "load"):
        sys.exit(__doc__)
    libraries = dict(torch=torch, diffusers=diffusers, transformers=transformers, peft=peft)
    versions = "_".join(f"{n}-{m.__version__.split('+')[0]}" for n, m in libraries.items())
    dict(save=save, load=load)[sys.argv[1]](Path(sys.argv[2]), versions)

"""PEFT refuses every LoRA beside a torchao older than it knows, and Colab brings one (0.10): LoRA works all
the same. The package here is a stand-in, with that version and nothing in it; where torchao 0.10 itself is
installed, as in the Colab leg of the CI, all tests of LoRA run beside it.
"""

import os, subprocess, sys

CODE = """
import sys, torch
from pathlib import Path
from importlib.metadata import version
from cxr_synth.base.settings import PROMPTS
from cxr_synth.diffusion.lora import add_lora, lora_layers, save_lora
from cxr_synth.diffusion.pipelines import fuse, load_pipeline, save_pipeline
from cxr_synth.diffusion.small_pipeline import tiny_pipeline

assert version("torchao") == "0.10.0"
root = Path(sys.argv[1])
save_pipeline(tiny_pipeline(root / "tok", PROMPTS.values(), 32), root / "base")
pipe = load_pipeline(root / "base")
add_lora(pipe.unet, pipe.text_encoder, 2)
with torch.no_grad():
    for model in (pipe.unet, pipe.text_encoder):
        for p in model.parameters():
            p.add_(0.01) if p.requires_grad else None
save_lora(root / "lora", pipe.unet, pipe.text_encoder, root / "base", 2)
loaded = load_pipeline(root / "lora")
assert len(lora_layers(loaded.unet)) == len(lora_layers(pipe.unet)) > 0
fuse(root / "lora", root / "full")
words = torch.ones(1, 8, dtype=torch.long)
a, b = (load_pipeline(root / name).text_encoder(words)[0] for name in ("lora", "full"))
assert torch.allclose(a, b, atol=1e-5)
print("works")
"""
ANYTHING = """
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {})
"""


def test_lora_beside_an_old_torchao(tmp_path):
    package = tmp_path / "site"
    (package / "torchao").mkdir(parents=True)
    for module in ("__init__", "quantization", "utils"):  # some versions of diffusers look into it
        (package / f"torchao/{module}.py").write_text(ANYTHING)
    info = package / "torchao-0.10.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torchao\nVersion: 0.10.0\n")
    path = os.pathsep.join([str(package), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path)],
        env=dict(os.environ, PYTHONPATH=path),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout.endswith("works\n"), done.stderr[-2000:]

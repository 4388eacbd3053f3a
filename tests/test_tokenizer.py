"The tokenizer is built from a word list: two processes write the same bytes, and two prompts differ."

import os, subprocess, sys

CODE = """
import hashlib, sys
from pathlib import Path
from cxr_synth.base.settings import PROMPTS
from cxr_synth.diffusion.small_pipeline import write_tokenizer
tok = write_tokenizer(sys.argv[1], PROMPTS.values())
for name in ("vocab.json", "merges.txt"):
    print(hashlib.sha256(Path(sys.argv[1], name).read_bytes()).hexdigest())
for prompt in PROMPTS.values():
    print(tok(prompt).input_ids)
"""


def test_two_processes_agree(tmp_path):
    outs = [
        subprocess.run(
            [sys.executable, "-c", CODE, str(tmp_path / str(seed))],
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
        for seed in (1, 2)
    ]
    assert outs[0] == outs[1]
    assert len(outs[0]) == 4 and outs[0][2] != outs[0][3]

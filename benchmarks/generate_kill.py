"""Generation killed (SIGKILL) at 10 random moments by 1, 2 and 4 processes in turn, each time resumed.

The set must have the bytes of an undisturbed one, and no stray files.
"""

import os, random, sys, tempfile
from pathlib import Path

os.environ |= dict(CXR_QUIET="1", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import test_generate_shards as shards
from cxr_synth.base.settings import GenerateConfig
from cxr_synth.protocol.plan import Plan, PlannedGenerator
from cxr_synth.stages.generate import stage_generate

fifty = {"normal": 50, "pneumonia": 50}
shards.PLAN = Plan(generators=(PlannedGenerator(shards.NAME, images=fifty),))
with tempfile.TemporaryDirectory() as root:
    study = shards.untrained_study(Path(root) / "study")
    moment = random.Random(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
    stage_generate(study, GenerateConfig(**shards.CFG), plan=shards.PLAN, card=None)
    calm = shards.bytes_of(study)
    shards.clear(study)
    for i in range(10):
        processes, more = (1, 2, 4)[i % 3], moment.randint(0, 7)
        shards.kill_after(study, more, processes)
        print(
            (
                f"kill {i + 1}: {processes} processes, "
                f"{len(list((study / 'synthetic' / shards.NAME).rglob('*.png')))} images there"
            ),
            flush=True,
        )
    stage_generate(study, GenerateConfig(**shards.CFG), plan=shards.PLAN, card=None)
    end = shards.bytes_of(study)
    print(
        "the same files with the same bytes"
        if end == calm
        else f"DIFFERENT: {sorted(set(end) ^ set(calm)) or 'bytes'}"
    )
    sys.exit(end != calm)

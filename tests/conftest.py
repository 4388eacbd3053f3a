"""Set before any test imports torch, and inherited by the processes that tests start: one thread, no
screen, no network, no bars.
"""

import os

for name, value in dict(
    OMP_NUM_THREADS="1", MPLBACKEND="Agg", HF_HUB_OFFLINE="1", CXR_QUIET="1"
).items():
    os.environ.setdefault(name, value)

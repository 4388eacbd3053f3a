"A training run that dies: by SIGKILL, by a full disk. benchmarks/kill_train.py does the first ten times."

import random, signal, sys, time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import kill_train


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("kill")
    kill_train.prepare(root)
    return root


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
@pytest.mark.parametrize("method", kill_train.METHODS)
def test_killed_twice(root, method):
    died = kill_train.killed_and_resumed(kill_train.context(), root, method, 2, random.Random(1))
    assert len(died) == 2


def fill_the_disk(root, out, size):
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (size, size)
    )  # a write beyond this size fails, as on a full disk
    from cxr_synth.base.files import CxrError

    try:
        kill_train.train(root, out, "full")
    except CxrError as e:
        (out / "message").write_text(str(e))
        sys.exit(5)


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on file sizes")
def test_full_disk(root):
    out, ctx = root / "disk", kill_train.context()
    p = ctx.Process(target=kill_train.train, args=(root, out, "full"))
    p.start()
    while p.is_alive() and not (out / "checkpoints/last.pt").exists():
        time.sleep(0.002)
    p.kill()
    p.join()
    before = (out / "checkpoints/last.pt").read_bytes()
    begun = set((out / "checkpoints").glob(".*~"))  # what the kill interrupted, if anything
    p = ctx.Process(target=fill_the_disk, args=(root, out, len(before) // 2))
    p.start()
    p.join()
    assert p.exitcode == 5
    message = (out / "message").read_text()
    for part in ("cannot write the checkpoint", "GB free", "goes on from there"):
        assert part in message
    assert (out / "checkpoints/last.pt").read_bytes() == before
    assert set((out / "checkpoints").glob(".*~")) <= begun
    (out / "message").unlink()
    kill_train.finish(ctx, root, out, "full")
    assert (out / "provenance.json").exists()
    assert not list((out / "checkpoints").glob(".*~"))

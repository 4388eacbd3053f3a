"""Checkpoints: when they are written, that the training does not wait for them, and what a Drive may do to
their copies: lose writes that it called finished, fill up, die.
"""

import dataclasses
import errno
import os
import shutil
import sys
import threading
import time
import types

import pytest
import torch
import torch.nn.functional as F

from cxr_synth.base import checkpoints, files, loop as loops, mirror as mirrors
from cxr_synth.base.checkpoints import Checkpoint, copy_to_cpu
from cxr_synth.base.files import CxrError
from cxr_synth.base.loop import Loop, TrainedPart, batch_at
from cxr_synth.base.settings import TrainConfig
from cxr_synth.stages.train import stage_train
from cxr_synth.base.mirror import Mirror, check_mounted, checked_facts, flush_drive, is_whole


def _train(path, stop=None, total=6, hook=None, **kw):
    "A line learns; its checkpoints are two tensors and what Adam keeps of them."
    torch.manual_seed(0)
    line = torch.nn.Linear(1, 1)
    how = dict(every=1, minutes=None, keep_last=False, ema_decay=0.9, warmup=1) | kw
    loop = Loop(dict(line=TrainedPart(line, 0.1)), path, total=total, **how)
    loop.hooks += [hook] if hook else []

    def losses(step):
        if step == stop:
            raise KeyboardInterrupt
        x = torch.from_numpy(batch_at(step, 8, 32, "line")).float()[:, None] / 32
        loss = F.mse_loss(line(x), 2 * x + 1)
        loop.optimizer.backward(loss)
        return dict(loss=loss)

    loop.run(losses, "line")
    return line.weight.item(), loop


def _interrupted(*args, **kw):
    with pytest.raises(KeyboardInterrupt):
        _train(*args, **kw)


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    "What an undisturbed training ends with."
    weight, loop = _train(tmp_path_factory.mktemp("calm") / "a.pt")
    return weight, loop.log.table()


# ---- when


@pytest.fixture
def written(monkeypatch):
    "Steps whose checkpoints were written."
    steps, begin = [], Checkpoint.begin

    def noting(self, state, also=()):
        steps.append(state["step"])
        begin(self, state, also)

    monkeypatch.setattr(Checkpoint, "begin", noting)
    return steps


@pytest.mark.parametrize(
    "minutes, every, steps", [(10, None, [4, 8]), (10, 3, [3, 6, 9]), (None, 5, [5])]
)
def test_cadence(tmp_path, written, monkeypatch, minutes, every, steps):
    "Three minutes a step; nothing after the last of ten steps."
    now = [0.0]
    monkeypatch.setattr(loops.time, "monotonic", lambda: now[0])

    def tick(loop):
        now[0] += 180

    _train(tmp_path / "a.pt", total=10, hook=tick, minutes=minutes, every=every)
    assert written == steps


def test_default_is_ten_minutes(tmp_path, written):
    cfg = TrainConfig()
    assert (cfg.checkpoint_minutes, cfg.checkpoint_steps) == (10, None)
    _train(tmp_path / "a.pt", every=None, minutes=10, keep_last=True)
    assert written == [6]  # only the last: the result is saved nowhere else


# ---- in the background


def test_training_goes_on_while_one_is_written(tmp_path, monkeypatch, calm):
    "Steps 2 and 3 are taken before the state of step 1 is on disk; step 4's waits for it."
    go, seen, write = threading.Event(), [], Checkpoint._write

    def slow(self, file, state, step):
        seen.append(("begun", step))
        assert go.wait(20)
        write(self, file, state, step)
        seen.append(("written", step))

    monkeypatch.setattr(Checkpoint, "_write", slow)

    def note(loop):
        seen.append(("step", loop.step))
        if loop.step == 3:
            time.sleep(0.1)
            assert ("written", 2) not in seen
            go.set()

    weight, _ = _train(tmp_path / "a.pt", hook=note, every=2)
    order = [seen.index(x) for x in [("begun", 2), ("step", 3), ("written", 2), ("begun", 4)]]
    assert order == sorted(order) and weight == calm[0]


def test_what_is_written_is_the_moment(tmp_path, monkeypatch):
    "Steps that are taken meanwhile do not get into the state that is being written."
    write, states = Checkpoint._write, {}

    def late(self, file, state, step):
        time.sleep(0.1)
        states[step] = state
        write(self, file, state, step)

    monkeypatch.setattr(Checkpoint, "_write", late)
    now = {}

    def note(loop):
        now[loop.step] = copy_to_cpu(loop.state())

    _train(tmp_path / "a.pt", every=2, hook=note)
    for step in (2, 4):
        for got, want in zip(
            checkpoints.all_tensors(states[step]), checkpoints.all_tensors(now[step]), strict=True
        ):
            assert torch.equal(got, want)
        assert len(states[step]["rows"]) == step


def test_a_write_that_fails_ends_the_run(tmp_path, monkeypatch):
    def fails(*args, **kw):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints.torch, "save", fails)
    with pytest.raises(CxrError, match="cannot write the checkpoint"):
        _train(tmp_path / "a.pt")
    assert [p.name for p in tmp_path.iterdir()] == ["a.csv"]


# ---- two generations


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone", "facts cut", "facts gone"])
@pytest.mark.parametrize("newest", [True, False])
def test_one_damaged_generation(tmp_path, calm, damage, newest, capsys):
    path = tmp_path / "run/a.pt"
    _interrupted(path, stop=4)
    steps = {checked_facts(f)["step"]: f for f in Checkpoint(path).files}
    assert set(steps) == {3, 4} and all(is_whole(f, checked_facts(f)) for f in steps.values())
    file = steps[4 if newest else 3]
    _damage(file, damage)
    found = Checkpoint(path, dict(total=6)).load()
    assert found["step"] == (3 if newest else 4)
    if newest and damage in ("cut", "flipped"):
        assert str(file) in capsys.readouterr().out
    weight, loop = _train(path)
    assert (weight, loop.log.table()) == calm


def _damage(file, how):
    facts = mirrors.facts_path(file)
    if how == "cut":
        os.truncate(file, file.stat().st_size // 2)
    elif how == "flipped":
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    elif how == "facts cut":
        os.truncate(facts, 10)
    else:
        (facts if how == "facts gone" else file).unlink()


def test_the_older_stays_until_the_newer_is_whole(tmp_path, monkeypatch):
    "Whenever the machine stops, at least one whole state is there, once the first was written."
    path, seen = tmp_path / "a.pt", []
    replace = os.replace

    def looking(source, target):
        replace(source, target)
        whole = [f for f in Checkpoint(path).files if f.exists() and checked_facts(f)]
        seen.append(sum(is_whole(f, checked_facts(f)) for f in whole))

    monkeypatch.setattr(files.os, "replace", looking)
    _train(path)
    first = seen.index(1)
    assert len(seen) > 10 and all(seen[first:]) and not any(seen[:first])


# ---- the mirror


class Drive:
    "The folder of a mirror whose writes fail from one on: cut, lost, refused, or the mount dies."

    def __init__(self, folder, monkeypatch):
        self.folder, self.writes, self.good, self.how = str(folder), 0, 10**9, "cut"
        self.replace, self.open = os.replace, open
        monkeypatch.setattr(files.os, "replace", self._replace)

    def _replace(self, source, target):
        if not str(target).startswith(self.folder):
            return self.replace(source, target)
        self.writes += 1
        if self.writes <= self.good:
            return self.replace(source, target)
        if self.how in ("cut", "lost"):  # and called finished all the same
            if self.how == "cut" and self.writes == self.good + 1:
                os.truncate(source, os.path.getsize(source) // 2)
                return self.replace(source, target)
            return os.unlink(source)  # what was there before stays
        number = errno.ENOENT if self.how == "refused" else errno.ENOTCONN
        raise OSError(number, os.strerror(number), str(target))


def _writes_of_a_run(folder, monkeypatch):
    with monkeypatch.context() as patch:
        drive = Drive(folder / "drive", patch)
        _interrupted(folder / "run/a.pt", stop=5, mirror=Mirror(folder / "drive", folder / "run"))
    return drive.writes


@pytest.mark.parametrize("how", ["cut", "lost", "refused", "dead"])
def test_a_drive_that_fails_after_n_writes(tmp_path, monkeypatch, calm, how, capsys):
    "For every N: the run is not ended by it, and another machine goes on from what is whole there."
    total = _writes_of_a_run(tmp_path / "all", monkeypatch)
    assert total > 15
    at = []
    for n in range(1, total + 1):
        root = tmp_path / f"{how}{n}"
        with monkeypatch.context() as patch:
            drive = Drive(root / "drive", patch)
            drive.good, drive.how = n, how
            _interrupted(root / "run/a.pt", stop=5, mirror=Mirror(root / "drive", root / "run"))
        shutil.rmtree(root / "run")  # the machine is gone
        capsys.readouterr()
        found = Checkpoint(
            root / "run/a.pt", dict(total=6), Mirror(root / "drive", root / "run")
        ).load()
        at.append(found["step"] if found else 0)
        shutil.rmtree(root / "run", ignore_errors=True)
        weight, loop = _train(root / "run/a.pt", mirror=Mirror(root / "drive", root / "run"))
        assert (weight, loop.log.table()) == calm
    assert at == sorted(at) and set(at) == {0, 1, 2, 3, 4, 5}  # more writes, more to go on from


def test_a_mount_that_cannot_be_read(tmp_path, monkeypatch, calm, capsys):
    "Training starts anew, with a line; later copies that fail end nothing."
    _interrupted(tmp_path / "run/a.pt", stop=5, mirror=Mirror(tmp_path / "drive", tmp_path / "run"))
    shutil.rmtree(tmp_path / "run")
    again = Mirror(tmp_path / "drive", tmp_path / "run")

    def dead(*args, **kw):
        raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))

    monkeypatch.setattr(mirrors.shutil, "copyfileobj", dead)
    monkeypatch.setattr(mirrors.shutil, "disk_usage", dead)
    weight, loop = _train(tmp_path / "run/a.pt", mirror=again)
    assert (weight, loop.log.table()) == calm
    said = capsys.readouterr().out
    assert "was not brought back" in said and "Training goes on" in said


@pytest.mark.parametrize("room, kept", [(2.5, {3, 4}), (1.5, {4}), (0.5, set())])
def test_the_mirror_keeps_what_fits(tmp_path, monkeypatch, calm, room, kept, capsys):
    "Two checkpoints, one, or none; the log always."
    size = [0]
    folder = tmp_path / "drive"

    def usage(where):
        used = sum(p.stat().st_size for p in folder.rglob("*.pt"))
        return types.SimpleNamespace(free=int(room * size[0]) + mirrors._RESERVE - used)

    def measured(loop):
        size[0] = size[0] or sum(p.stat().st_size for p in (tmp_path / "size").glob("a.pt"))

    _interrupted(tmp_path / "size/a.pt", stop=2)
    measured(None)
    monkeypatch.setattr(mirrors.shutil, "disk_usage", usage)
    mirror = Mirror(folder, tmp_path / "run")
    _interrupted(tmp_path / "run/a.pt", stop=4, mirror=mirror)
    found = {checked_facts(f)["step"] for f in folder.glob("*.pt") if is_whole(f, checked_facts(f))}
    assert found == kept and (folder / "a.csv").exists()
    assert ("GB are free" in capsys.readouterr().out) == (not kept)
    shutil.rmtree(tmp_path / "run")
    assert _train(tmp_path / "run/a.pt", mirror=Mirror(folder, tmp_path / "run"))[0] == calm[0]


def test_the_best_weights_come_back(tmp_path):
    def look(loop):
        if loop.step in (2, 3):
            loop.keep_best(1 / loop.step)

    mirror = Mirror(tmp_path / "drive", tmp_path / "run")
    _interrupted(tmp_path / "run/a.pt", stop=4, mirror=mirror, hook=look)
    best = (tmp_path / "run/a-best.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "run")
    _, loop = _train(tmp_path / "run/a.pt", mirror=Mirror(tmp_path / "drive", tmp_path / "run"))
    assert loop.best["step"] == 3 and loop.best_path.read_bytes() == best
    shutil.rmtree(tmp_path / "run")
    os.truncate(tmp_path / "drive/a-best.safetensors", 8)
    _, loop = _train(tmp_path / "run/a.pt", mirror=Mirror(tmp_path / "drive", tmp_path / "run"))
    assert loop.best == {} and not loop.best_path.exists()


def test_a_cut_record_takes_nothing_of_the_user(tmp_path):
    (tmp_path / "drive").mkdir()
    (tmp_path / "drive/a.csv").write_text("mine")
    (tmp_path / "drive/.mirrored.json").write_text('["a.')
    _train(tmp_path / "run/a.pt", mirror=Mirror(tmp_path / "drive", tmp_path / "run"))
    assert (tmp_path / "drive/a.csv.before1").read_text() == "mine"
    assert (tmp_path / "drive/a.csv").read_text().startswith("step")


# ---- Colab


@pytest.fixture
def colab(tmp_path, monkeypatch):
    "A stand-in for `google.colab`, with a Drive below the test's folder."
    calls = []
    drive = types.ModuleType("google.colab.drive")
    drive.flush_and_unmount = lambda: calls.append("flush")
    drive.mount = lambda where: calls.append(f"mount {where}")
    google, package = types.ModuleType("google"), types.ModuleType("google.colab")
    google.colab, package.drive = package, drive
    for module in (google, package, drive):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(mirrors, "DRIVE", tmp_path / "drive")
    return calls


def test_drive_is_flushed_and_mounted_again(tmp_path, colab, capsys):
    flush_drive("")
    flush_drive(tmp_path / "elsewhere")
    flush_drive(tmp_path / "drive/MyDrive/xray", work=tmp_path / "drive/MyDrive/study")
    assert colab == []
    flush_drive(tmp_path / "drive/MyDrive/xray")
    assert colab == ["flush", f"mount {tmp_path / 'drive'}"]

    def fails():
        raise ValueError("timed out")

    sys.modules["google.colab.drive"].flush_and_unmount = fails
    flush_drive(tmp_path / "drive/MyDrive/xray")
    assert "timed out" in capsys.readouterr().out


def test_the_stage_flushes_drive(colab, tmp_path, study_copy, monkeypatch):
    "At its end, once, whatever it had to do."
    record = study_copy.record(f"models/{sorted(study_copy.root.glob('models/*'))[0].name}")
    fields = TrainConfig.__dataclass_fields__
    known = TrainConfig(**{k: v for k, v in record["settings"].items() if k in fields})
    cfg = dataclasses.replace(known, mirror=str(tmp_path / "drive/MyDrive"), device="cpu")
    stage_train(study_copy, cfg)
    assert colab == ["flush", f"mount {tmp_path / 'drive'}"]


def test_a_drive_that_is_not_mounted(tmp_path, colab, monkeypatch):
    with pytest.raises(CxrError, match="drive.mount"):
        Mirror(tmp_path / "drive/MyDrive/xray", tmp_path)
    assert not (tmp_path / "drive").exists()
    monkeypatch.setattr(mirrors.os.path, "ismount", lambda path: True)
    check_mounted(tmp_path / "drive/MyDrive/xray")

"""Progress: real pipes and terminals, killed processes, clocks of our own, and a whole small run."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from cxr_synth.app import status
from cxr_synth.base import beat
from cxr_synth.base.bars import Bar, RunProgress, follow_run, followed_run, note_part
from cxr_synth.base.beat import BEAT, Heartbeat, beat_text, read_beat
from cxr_synth.base.files import write_json
from cxr_synth.base.records import Study
from cxr_synth.base.settings import resolve
from cxr_synth.base.standin import PAGE, is_place_free, is_standin, write_standin
from cxr_synth.base.timeline import StageWork, Timeline
from cxr_synth.protocol.plan import Plan, PlannedGenerator
from cxr_synth.report.running_page import RunningPage
from cxr_synth.ship.pack import pack_members
from cxr_synth.stages.workload import _generate_work, _train_work

ROOT = Path(__file__).resolve().parent.parent
STUDY = dict(name="demo", preset="tiny", source="phantom")


def environment(**more):
    "As a user's, without the switch that silences progress."
    env = {k: v for k, v in os.environ.items() if k != "CXR_QUIET"}
    return env | dict(PYTHONPATH=str(ROOT), PYTHONUNBUFFERED="1") | more


def python(code, **more):
    "What a program writes to a pipe: standard output and standard error."
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment(**more), cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode(), done.stderr.decode()


@pytest.fixture
def study(tmp_path):
    write_json(tmp_path / "study.json", STUDY)
    return Study(tmp_path)


class Clock:
    def __init__(self):
        self.now, self.asked = 1000.0, 0

    def __call__(self):
        self.asked += 1
        return self.now


# -- bars in pipes and on terminals

BARS = """
import time
from cxr_synth.base.compute import progress
for _ in progress(range(700), "slow", unit="image"):
    time.sleep(0.007)
with progress(total=3000, initial=1500, desc="half", unit="image") as bar:
    for _ in range(500):
        time.sleep(0.005)
        bar.update(3)
for _ in progress(range(100), "quick"):
    pass
for _ in progress(iter(range(900)), "unknown length"):
    time.sleep(0.005)
"""


def test_in_a_pipe_a_bar_writes_lines_and_no_carriage_return():
    out, err = python(BARS)
    assert out == "" and "\r" not in err and "\x1b" not in err
    counts = {d: err.count(f"{d}: ") for d in ("slow", "half", "quick", "unknown length")}
    assert 1 <= counts["slow"] <= 10 and 1 <= counts["half"] <= 5, err  # on a busy machine, too
    assert counts["quick"] == 0 and 1 <= counts["unknown length"] <= 6, err
    assert re.search(r"slow: \d+ %, \d+ of 700 images, .*[\d.]+ images/s", err)
    assert err.count("\n") == sum(counts.values())


def test_quiet_is_quiet():
    assert python(BARS, CXR_QUIET="1") == ("", "")


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
@pytest.mark.parametrize("quiet", ["", "1"])
def test_on_a_terminal_the_line_of_the_run_stands_above_its_bars(tmp_path, quiet):
    import pty
    import termios

    write_json(tmp_path / "study.json", STUDY)
    code = (
        "import time\n"
        "from cxr_synth.base.bars import follow_run, note_part\n"
        "from cxr_synth.base.compute import progress\n"
        "from cxr_synth.base.messages import say\n"
        f"with follow_run({str(tmp_path)!r}, ['data', 'train']) as run:\n"
        "    run.begin('train'); note_part('generator', 1, 4)\n"
        "    for k in progress(range(40), 'base', unit='image', main=True):\n"
        "        time.sleep(0.03)\n"
        "        if k == 20: say('a word between')\n"
    )
    main, side = pty.openpty()
    termios.tcsetwinsize(side, (24, 100))
    env = environment(CXR_QUIET=quiet, COLUMNS="100", TERM="xterm")
    done = subprocess.Popen(
        [sys.executable, "-c", code], env=env, cwd=ROOT, stdout=side, stderr=side
    )
    os.close(side)
    text = b""
    while done.poll() is None or text == b"":
        try:
            text += os.read(main, 65536)
        except OSError:
            break
    done.wait()
    text = text.decode(errors="replace")
    assert "a word between\r\n" in text
    if quiet:
        assert text == "a word between\r\n"
        return
    assert "stage 2 of 2, train: generator 1 of 4, time left unknown yet" in text
    assert "base:" in text and "\r" in text and text.count("\n") < 40


# -- what it costs


def test_a_bar_of_a_million_steps_costs_a_look_at_the_clock_each(study, monkeypatch):
    clock = Clock()
    with follow_run(study.root, ["train"], clock=clock, wall=clock) as run:
        run.begin("train")
        shown = []
        monkeypatch.setattr(run, "_listen", lambda: shown.append(run.line()))
        bar = Bar(total=1_000_000, main=True, clock=clock)
        clock.asked = 0
        for _ in range(100_000):  # in 100 s
            clock.now += 0.001
            bar.update(10)
        assert run.heart.written <= 100 / 3 + 3
        assert len(shown) <= 100 / 3 + 2
        assert clock.asked < 100_000 + 20_000
        bar.close()
    assert not (study / BEAT).exists()


def test_on_a_slow_disk_signs_become_rare(study, monkeypatch):
    clock, write = Clock(), beat.write_json

    def slow(path, facts):
        clock.now += 2
        write(path, facts)

    monkeypatch.setattr(beat, "write_json", slow)
    heart = Heartbeat(study.root, clock=clock)
    for _ in range(1000):
        clock.now += 1
        heart.beat(line="x")
    assert heart.written <= 11  # 2 s of every 100


# -- the sign of life


def hold_study(study, code="time.sleep(60)"):
    "A process that follows a run there and waits; its second word says that it has begun."
    text = (
        "import time\nfrom cxr_synth.base.bars import follow_run\n"
        f"with follow_run({str(study.root)!r}, ['data', 'train', 'report']) as run:\n"
        f"    run.begin('train'); run.part('generator', 2, 4)\n    print('here', flush=True)\n    {code}"
    )
    env = environment(CXR_QUIET="1")
    p = subprocess.Popen([sys.executable, "-c", text], env=env, cwd=ROOT, stdout=subprocess.PIPE)
    assert p.stdout.readline().strip() == b"here"
    return p


def test_status_knows_a_living_process_from_a_killed_one(study):
    p = hold_study(study)
    assert (
        f"at work: stage 2 of 3, train: generator 2 of 4, time left unknown yet (process {p.pid}"
        in (status(study))
    )
    p.kill()
    p.wait()
    text = status(study)
    assert text.startswith("stopped: stage 2 of 3, train") and "that process is gone" in text
    with follow_run(study.root, ["data"]) as run:  # whoever comes next takes its place
        run.begin("data")
        assert read_beat(study.root)["pid"] == os.getpid()
    assert status(study) == "" and not (study / BEAT).exists()


@pytest.mark.skipif(os.name == "nt", reason="needs signals")
def test_a_run_that_is_interrupted_leaves_no_sign(study):
    p = hold_study(study)
    p.send_signal(signal.SIGINT)
    p.wait()
    assert not (study / BEAT).exists()


def test_the_second_process_leaves_the_note_of_the_first(study):
    p = hold_study(study)
    try:
        with follow_run(study.root, ["experiments"]) as run:
            run.begin("experiments")
            assert read_beat(study.root)["pid"] == p.pid
        assert read_beat(study.root)["pid"] == p.pid
    finally:
        p.kill()
        p.wait()


@pytest.mark.parametrize("age, word", [(10, "at work, it seems"), (500, "stopped")])
def test_of_another_machine_only_the_age_is_known(study, age, word):
    note = dict(pid=1, begun=5.0, host="elsewhere", at=1000.0, line="stage 3 of 8")
    write_json(study / BEAT, note)
    assert beat_text(study.root, lambda: 1000 + age).startswith(f"{word}: stage 3 of 8")
    assert Heartbeat(study.root, clock=lambda: 1000 + age).beat(line="mine") is (word == "stopped")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": "x"}', '{"pid": 3}'])
def test_a_damaged_note_is_none(study, text):
    (study / BEAT).write_text(text)
    assert beat_text(study.root) == ""
    assert Heartbeat(study.root).beat(line="mine") and read_beat(study.root)["line"] == "mine"


def test_a_number_that_another_process_has_now(study):
    heart = Heartbeat(study.root)
    heart.beat(line="x")
    note = read_beat(study.root)
    write_json(study / BEAT, note | dict(begun=note["begun"] - 100, host=socket.gethostname()))
    assert beat_text(study.root).startswith("stopped")


def test_nothing_is_written_where_no_study_is(tmp_path):
    (tmp_path / "holiday.jpg").write_text("")
    with follow_run(tmp_path, ["data"]) as run:
        run.begin("data")
    with follow_run(tmp_path / "absent", ["data"]) as run:
        run.begin("data")
    assert os.listdir(tmp_path) == ["holiday.jpg"]


def test_a_disk_that_is_full_does_not_stop_the_work(study, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(beat, "write_json", full)
    with follow_run(study.root, ["train"]) as run:
        run.begin("train")
    assert not (study / BEAT).exists()


def test_no_pack_takes_the_note_or_the_page_that_stands_in(study):
    write_standin(study, "<p>being made")
    Heartbeat(study.root).beat(line="x")
    assert pack_members(study, ["study", "results"]) == ["study.json"]


# -- time left


def test_time_left_of_a_run_whose_speed_is_known():
    "Every stage at the speed that the weights say times 3: the forecast is exact from the first bar on."
    clock = Clock()
    work = {"train": 100, "generate": 50, "quality": 10, "report": 5}
    weights = {s: StageWork(w, tells_speed=s == "train") for s, w in work.items()}
    run, end = Timeline(list(work), weights, clock), clock.now + 3 * sum(work.values())
    for stage, seconds in work.items():
        run.begin(stage)
        bar = Bar(total=100, clock=clock)
        run.open_bar(bar)
        for step in range(1, 101):
            clock.now += 3 * seconds / 100
            bar.n = step
            if (left := run.left()) is None:
                assert stage == "train" and clock.now < 1000 + 4
            else:
                assert left == pytest.approx(end - clock.now, abs=1e-6)
        run.close_bar(bar)
    assert clock.now == pytest.approx(end)


def test_what_an_earlier_run_did_is_no_news_about_speed():
    clock = Clock()
    weights = {s: StageWork(100, tells_speed=True) for s in ("train", "generate")}
    run = Timeline(["train", "generate"], weights, clock)
    run.begin("train")
    for k in range(1, 4):  # trained before
        run.part("generator", k, 4)
        clock.now += 0.01
    run.part("generator", 4, 4)
    bar = Bar(total=1000, initial=600, clock=clock)
    run.open_bar(bar)
    assert run.left() is None and "unknown yet" in run.line()
    clock.now, bar.n = clock.now + 10, 800
    assert run.stage_left() == pytest.approx(10)
    assert run.left() == pytest.approx(10 + 100 * 10 / 5, rel=0.01)  # 10 s for a twentieth of 100


def test_parts_without_bars_tell_by_their_number():
    clock = Clock()
    run = Timeline(["quality"], {}, clock)
    run.begin("quality")
    run.part("set", 1, 4)
    clock.now += 20
    assert run.left() is None
    run.part("set", 2, 4)
    assert run.left() == pytest.approx(60)
    clock.now += 10
    assert run.left() == pytest.approx(50)


def test_with_stable_diffusion_nothing_is_guessed():
    images = dict(normal=100, pneumonia=100)
    plan = Plan(generators=(PlannedGenerator("real100-rep0", 1.0, 0, 3000, images),))
    for preset in ("a100-80gb", "t4-16gb"):
        assert _train_work(plan, resolve("train", preset, {}), 512).seconds is None
        draw = resolve("generate", preset, {})
        assert _generate_work(plan, draw, 512, "sd21-base").seconds is None
        assert _generate_work(plan, replace(draw, device="cpu"), 64, "sd21-base").seconds is None
    draw = resolve("generate", "tiny", {}, device="cpu")
    shipped, scratch = (
        _generate_work(plan, draw, 64, base).seconds for base in ("small-xray", "tiny")
    )
    assert 0 < 3 * shipped < scratch
    small = _train_work(plan, resolve("train", "tiny", {}, device="cpu"), 64)
    assert small.seconds == pytest.approx(sum(small.bars)) and small.seconds > 0


def test_outside_a_run_parts_are_nobodys(study):
    note_part("generator", 1, 2)
    assert followed_run() is None
    with pytest.raises(KeyError), follow_run(study.root, ["train"]):
        raise KeyError
    assert followed_run() is None


# -- the page before the report


def run_in(study, stage="train"):
    run = RunProgress(study.root, ["data", "train", "report"])
    run.begin(stage)
    return run


def finished_report(study):
    (study / "report").mkdir()
    (study / PAGE).write_text("the report")
    record = dict(stage="report", output="report", format=3, status="complete", started="2026")
    record |= dict(settings={}, runtime={}, inputs={}, versions={}, files={})
    write_json(study / "report/stage.json", record)


def test_a_finished_report_stays_unless_it_is_made_again(study):
    finished_report(study)
    RunningPage(study)(run_in(study))
    assert (study / PAGE).read_text() == "the report" and not is_place_free(study)
    RunningPage(study, redo=True)(run_in(study))
    assert is_standin(study) and "is being made" in (study / PAGE).read_text()
    assert (study / "report.redo1/index.html").read_text() == "the report"


def test_not_before_the_data_and_not_in_a_strange_folder(study):
    RunningPage(study)(run_in(study, "data"))
    assert not (study / "report").exists()
    (study / "report").mkdir()
    (study / "report/notes.txt").write_text("mine")
    RunningPage(study)(run_in(study))
    assert os.listdir(study / "report") == ["notes.txt"]


def test_killed_between_note_and_page(study, monkeypatch):
    "The note is written first, with both digests: old page or new one, it is known."
    write_standin(study, "<p>old")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("killed")))
    write_standin(study, "<p>new")
    monkeypatch.undo()
    assert (study / PAGE).read_text() == "<p>old" and is_standin(study)
    assert write_standin(study, "<p>new") and is_standin(study)


def test_page_is_written_every_ten_seconds_at_most(study):
    clock = Clock()
    page, run = RunningPage(study, clock=clock), run_in(study)
    for _ in range(600):
        clock.now += 0.1
        page(run)
    assert page.written == 6


# -- a whole run

SMALL = (
    "--data phantom --data.patients 120 --data.resolution 32 --plan.tier lesson --plan.pool 40 "
    "--plan.size 32 --plan.builtin truth --quality.size 32 --quality.halvings 3 --experiments.size 32 "
    "--experiments.views 2 --report.draws 200"
)


def test_a_whole_run_in_a_pipe(tmp_path):
    study, seen, signs = Study(tmp_path / "s"), [], set()
    code = "import sys; from cxr_synth.app import main; sys.exit(main())"
    line = [sys.executable, "-c", code, "run", str(study.root), *SMALL.split()]
    errors = tmp_path / "errors.txt"
    with open(errors, "wb") as err:
        p = subprocess.Popen(
            line, env=environment(), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=err
        )
        while p.poll() is None:
            time.sleep(0.05)
            if note := read_beat(study.root):
                signs.add(note["stage"])
            if (study / PAGE).is_file() and len(seen) < 3:
                seen.append((study / PAGE).read_text(encoding="utf-8"))
    text = errors.read_bytes().decode()
    assert p.returncode == 0, text
    assert "\r" not in text and "stage 6 of 8, experiments" in text
    assert "is being made" in seen[0] and 'http-equiv="refresh"' in seen[0]
    assert "<strong>data</strong>" in seen[0] and "http" not in seen[0].replace("http-equiv", "")
    assert {"quality", "experiments"} <= signs
    html = (study / PAGE).read_text(encoding="utf-8")
    assert "is being made" not in html and not (study / "report/.standin.json").exists()
    assert not (study / BEAT).exists() and not study.root.joinpath("report.redo1").exists()
    files = study.record("report")["files"]
    assert "index.html" in files and not any("standin" in name for name in files)
    assert "stale" not in status(study)

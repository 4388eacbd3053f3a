"Printing never ends a run: terminals that know few characters, pipes that close; files are always UTF-8."

import io
import json
import os
import subprocess
import sys

import pytest

from cxr_synth.base.files import CxrError, write_csv, write_json, write_text
from cxr_synth.base.messages import plain_characters, say
from cxr_synth.base.readers import read_csv, read_json

ENCODINGS = ["ascii", "cp1252", "cp437", "cp866", "latin-1", "utf-8", "shift_jis"]
TEXTS = {  # a text -> what must be left of it in ASCII
    "AUROC −0.021": "AUROC -0.021",
    "Acc=0.9±0.1": "Acc=0.9+-0.1",
    "0.5 – 0.7 … ×2": "0.5 - 0.7 ... x2",
    "снимки": "\\u0441\\u043d",
    "胸部X線": "\\u80f8\\u90e8X",
    "🫁": "\\U0001fac1",
    "╭─╮│": "+-+|",
    "\udcff.png": "\\udcff.png",
    "plain": "plain",
}


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("text", TEXTS)
def test_say_on_any_terminal(encoding, text):
    file = io.TextIOWrapper(io.BytesIO(), encoding)
    say(text, file)
    said = file.buffer.getvalue().decode(encoding).rstrip("\n")
    if encoding == "ascii":
        assert said.startswith(TEXTS[text])
    assert len(said) >= len(text) and "?" not in said


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_only_encoders_are_helped(encoding):
    with pytest.raises(UnicodeDecodeError):
        plain_characters(UnicodeDecodeError(encoding, b"\xff", 0, 1, "no"))


CLOSING = """
import sys
from cxr_synth import app
from cxr_synth.base.files import CxrError
def command(argv):
    print("estimate \u2212 0.02 \u0441\u043d\u0438\u043c\u043a\u0438 " + argv[1])
    if argv[0] == "refuse":
        raise CxrError("D:/\u0441\u043d\u0438\u043c\u043a\u0438 \u2212 is not there")
    if argv[0] == "system":
        open("\u0441\u043d\u0438\u043c\u043a\u0438/\u2212")
app.command = command
sys.exit(app.main())
"""


def run(code, *words, encoding, **more):
    env = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    return subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, env=env, **more
    )


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "cp437", "ascii:strict", "cp1252:strict"])
@pytest.mark.parametrize("how, status", [("fine", 0), ("refuse", 2), ("system", 2)])
def test_command_line_on_any_terminal(encoding, how, status, tmp_path):
    done = run(CLOSING, how, "x", encoding=encoding, cwd=tmp_path)
    assert done.returncode == status, done.stderr
    assert b"estimate - 0.02 \\u0441" in done.stdout and b"Traceback" not in done.stderr
    assert status == 0 or b"\\u0441" in done.stderr


@pytest.mark.parametrize("line", [["--help"], ["run", "--help"], ["status", "снимки"]])
@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_help_and_refusals(line, encoding, tmp_path):
    code = "import sys; from cxr_synth.app import main; sys.exit(main())"
    done = run(code, *line, encoding=encoding, cwd=tmp_path)
    assert done.returncode == (2 if line[0] == "status" else 0)
    assert b"Traceback" not in done.stderr and b"Error" not in done.stderr


@pytest.mark.parametrize("name", ["снимки", "−", "Büro 2", "胸部"])
@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_stage_from_python(name, encoding, tmp_path):
    code = (
        "import sys; from cxr_synth.base.records import Study\n"
        "from cxr_synth.base.cache import read_or_none\n"
        "from cxr_synth.base.readers import read_json\n"
        "print(read_or_none(sys.argv[1], read_json))\n"
    )
    write_text(tmp_path / name / "broken.json", "{")
    done = run(code, str(tmp_path / name / "broken.json"), encoding=f"{encoding}:strict")
    assert (done.returncode, done.stdout) == (0, b"None\n") and b"is made anew" in done.stderr


@pytest.mark.skipif(os.name == "nt", reason="pipes of another kind")
def test_a_reader_that_leaves(tmp_path):
    code = """
import sys
from cxr_synth import app
def command(argv):
    for k in range(100_000):
        print("a line of status")
app.command = command
sys.exit(app.main())
"""
    p = subprocess.Popen(
        [sys.executable, "-c", code, "status"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    p.stdout.readline()
    p.stdout.close()
    assert p.stderr.read() == b"" and p.wait() == 141


@pytest.mark.parametrize("text", [t for t in TEXTS if "\udcff" not in t])
def test_files_are_utf_8(tmp_path, text, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    write_json(tmp_path / "a.json", {text: text})
    write_csv(tmp_path / "a.csv", ["a"], [{"a": text}])
    assert read_json(tmp_path / "a.json") == {text: text}
    assert read_csv(tmp_path / "a.csv") == [{"a": text}]
    assert json.loads((tmp_path / "a.json").read_bytes().decode("utf-8")) == {text: text}


@pytest.mark.parametrize("name", ["\udcff.png", "a\udc80b"])
def test_names_that_are_no_utf_8(tmp_path, name):
    with pytest.raises(CxrError, match="Rename that file"):
        write_csv(tmp_path / "a.csv", ["path"], [{"path": name}])
    assert not list(tmp_path.iterdir())

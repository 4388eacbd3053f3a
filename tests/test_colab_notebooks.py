"""The notebooks 03_train and 04_generate as Colab runs them: "Run all" in IPython, all cells in their order,
with a stand-in of `google.colab`, and with torchao 0.10, as Colab brings it. No GPU, no network.
"""

import json, os, subprocess, sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RUNNER = """
import json, os, re, sys, types
from importlib.machinery import ModuleSpec
from pathlib import Path

calls = []
try:
    import google
except ImportError:
    google = types.ModuleType("google")
    google.__path__ = []
names = ("google.colab", "google.colab.drive", "google.colab.userdata", "google.colab.files")
colab, drive, userdata, files = modules = [types.ModuleType(name) for name in names]
drive.mount = lambda where, **how: calls.append(f"mount {where}")
drive.flush_and_unmount = lambda **how: calls.append("flush")
userdata.get = lambda name: ""
files.download = lambda path: calls.append(f"download {path}")
google.colab, colab.drive, colab.userdata, colab.files = colab, drive, userdata, files
for module in (google, *modules):
    module.__spec__ = module.__spec__ or ModuleSpec(module.__name__, None)
    sys.modules[module.__name__] = module

from IPython.core.interactiveshell import InteractiveShell

shell = InteractiveShell.instance()
shell.system = lambda line: calls.append(f"! {line}")
shell.register_magic_function(lambda line: calls.append(f"pip {line}"), magic_name="pip")


class NoNbdev:  # Colab does not bring it, nor does this package
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] == "nbdev":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, NoNbdev)


def form(source):
    "A line with `# @param` is a name and a literal, which the form replaces; its kind is JSON or a list."
    for line in re.findall(r".*# @param.*", source):
        value, kind = re.fullmatch(r"[A-Z]+ = (.+?)  # @param (.+)", line).groups()
        kind = re.sub(r"^\\{type: ", '{"type": ', kind)
        assert isinstance(eval(value), str) and json.loads(kind)
        assert isinstance(json.loads(kind), dict) or eval(value) in json.loads(kind), line


def make_small():
    "The study of the lesson: as few steps as show that all cells go through."
    if lesson := sys.modules.get("cxr_synth.stages.run"):
        lesson._LESSON["plan"] |= dict(pool=12)
        lesson._LESSON["train"] |= dict(max_train_steps=3, heldout_images=8)
        lesson._LESSON["generate"] |= dict(num_inference_steps=2)


for cell in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["cells"]:
    source = "".join(cell["source"])
    if cell["cell_type"] == "code":
        form(source)
        make_small()
        shell.run_cell(source, store_history=True).raise_error()
assert len(calls) == 2 and calls[0].startswith("! pip freeze") and "cxr_synth" in calls[1], calls
print("to the end")
"""
REFUSED = (
    'raise ImportError("Found an incompatible version of torchao: 0.10.0, but only above 0.16.0")\n'
)


def in_colab(notebook, work, *beside):
    "Run a notebook in a process of its own, in an empty folder."
    runner = work / "runner.py"
    runner.write_text(RUNNER, encoding="utf-8")
    own = dict(PYTHONPATH=os.pathsep.join([str(ROOT), *map(str, beside)]), CXR_QUIET="1")
    own |= dict(MPLBACKEND="agg", IPYTHONDIR=str(work / ".ipython"))
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"} | own
    return subprocess.run(
        [sys.executable, runner, notebook],
        cwd=work,
        env=env,
        capture_output=True,
        text=True,
        timeout=900,
    )


def has_torchao():
    try:
        return version("torchao") == "0.10.0"
    except PackageNotFoundError:
        return False


@pytest.fixture
def torchao(tmp_path):
    "Where torchao 0.10 is not installed: a folder with one that fails when it is used, as that does."
    if has_torchao():
        return []
    folder = tmp_path / "beside"
    for name in ("torchao", "torchao-0.10.0.dist-info"):
        (folder / name).mkdir(parents=True)
    (folder / "torchao/__init__.py").write_text(REFUSED)
    about = "Metadata-Version: 2.1\nName: torchao\nVersion: 0.10.0\n"
    (folder / "torchao-0.10.0.dist-info/METADATA").write_text(about)
    return [folder]


def run_all(name, work, torchao):
    done = in_colab(ROOT / f"nbs/{name}.ipynb", work, *torchao)
    assert done.returncode == 0 and done.stdout.endswith("to the end\n"), done.stdout + done.stderr
    return sorted(p.name for p in work.iterdir() if p.name.startswith("my-"))


def test_train_then_generate(tmp_path, torchao):
    "One machine, two kernels: the second notebook draws with the models of the first."
    assert run_all("03_train", tmp_path, torchao) == ["my-study-small"]
    made = tmp_path / "my-study-small/models/real010-rep0/stage.json"
    before = made.read_bytes()
    assert run_all("04_generate", tmp_path, torchao) == ["my-study-small"]
    assert made.read_bytes() == before


@pytest.mark.skipif(
    not has_torchao(), reason="a minute; the leg of the CI with Colab's versions runs it"
)
def test_generate_on_a_new_machine(tmp_path, torchao):
    assert run_all("04_generate", tmp_path, torchao) == ["my-study-small"]


BROKEN = {
    "1 / 0": "ZeroDivisionError",
    "import nbdev": "No module named 'nbdev'",
    'NAME = other  # @param ["a"]': "NameError",
    "print('no set-up cell')": "AssertionError: []",
}


@pytest.mark.parametrize("source", BROKEN)
def test_the_stand_in_fails(source, tmp_path):
    cell = dict(cell_type="code", source=[source])
    (tmp_path / "broken.ipynb").write_text(json.dumps(dict(cells=[cell])))
    done = in_colab(tmp_path / "broken.ipynb", tmp_path)
    assert done.returncode != 0 and BROKEN[source] in done.stdout + done.stderr

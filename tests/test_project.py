"""What holds the project together: one version, a light import, notebooks in their order and tidy,
README in step.
"""

import json, os, re, subprocess, sys, tomllib
from configparser import ConfigParser
from importlib import import_module
from pathlib import Path

import pytest
import cxr_synth

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if not p.name.startswith("_"))
HEAVY = [
    "torch",
    "torchvision",
    "diffusers",
    "transformers",
    "pandas",
    "numpy",
    "scipy",
    "sklearn",
    "matplotlib",
    "PIL",
    "tyro",
]


def cells(path, kind=None):
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [c for c in found if kind in (None, c["cell_type"])]


def source(cell):
    return "".join(cell["source"])


def python(code):
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout


@pytest.fixture(scope="module")
def ini():
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


@pytest.fixture(scope="module")
def toml():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


# -- one version, one set of facts


def test_version_is_the_same_everywhere(ini):
    assert cxr_synth.__version__ == ini["version"]
    assert f"\n## {ini['version']}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_settings_agree_with_pyproject(ini, toml):
    assert toml["project"]["name"] == ini["lib_name"] == cxr_synth.__name__
    assert toml["tool"]["nbdev"]["tst_flags"] == ini["tst_flags"]
    assert toml["project"]["requires-python"] == f">={ini['min_python']}"


def test_console_scripts_lead_somewhere(toml):
    for target in toml["project"]["scripts"].values():
        module, function = target.split(":")
        assert callable(getattr(import_module(module), function))


def test_nbdev_test_passes_options_on(
    tmp_path,
):  # in an empty project, so that options passed over would run nothing
    (tmp_path / "pyproject.toml").write_text(
        (ROOT / "pyproject.toml").read_text(encoding="utf-8"), encoding="utf-8"
    )
    code = (
        "import sys; from cxr_synth.app import nbdev_test; "
        "sys.argv = ['nbdev_test', '--no_such_option', '1']; sys.exit(nbdev_test())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "--no-such-option" in done.stderr, done.stdout + done.stderr


# -- a light import, and names found when they are used


def test_import_loads_no_heavy_library():
    loaded = python(f"import sys, cxr_synth; print(*sorted(set({HEAVY}) & set(sys.modules)))")
    assert loaded.split() == []


@pytest.mark.parametrize("name", cxr_synth.__all__)
def test_public_name_is_found(name):
    assert getattr(cxr_synth, name) is getattr(
        import_module(f"cxr_synth.{cxr_synth._HOME[name]}"), name
    )
    assert name in dir(cxr_synth)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'cxr_synth' has no attribute 'no_such_name'"):
        getattr(cxr_synth, "no_such_name")  # noqa: B009 (the failing access is the test)
    with pytest.raises(ImportError, match="no_such_name"):
        exec("from cxr_synth import no_such_name", {})


# -- notebooks


LAST = """#| hide
if "google.colab" not in sys.modules:  # there is no checkout to export from
    import nbdev

    nbdev.nbdev_export()"""


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.relative_to(ROOT / "nbs").as_posix())
def test_notebook_has_its_frame(path):
    first, *_, last = cells(path)
    assert first["cell_type"] == "markdown" and re.match(r"# \w.*\n\n> \S", source(first))
    assert (
        f"colab.research.google.com/github/cxr-synth/cxr_synth/blob/main/{path.relative_to(ROOT).as_posix()})"
        in source(first)
    )
    setup = [c for c in cells(path, "code") if '"google.colab" in sys.modules' in source(c)]
    assert len(setup) == 1 and "#| hide" in source(setup[0]) and "-c pins.txt" in source(setup[0])
    assert source(last) == LAST, f"the last cell of a notebook is to be:\n{LAST}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.relative_to(ROOT / "nbs").as_posix())
def test_notebook_cells_have_ids(path):
    ids = [c.get("id") for c in cells(path)]
    assert None not in ids and len(ids) == len(set(ids))


def texts(cell):
    "The text of a code cell's stored outputs."
    for output in cell["outputs"]:
        data = output.get("data", {})
        yield from (
            "".join(v)
            for k, v in {"text": output.get("text", ""), **data}.items()
            if k.startswith("text")
        )


STUMBLES = {
    "a warning": r"Warning: ",
    "a progress bar": r"\d(it|s)/(s|it)\b",
    "a path of one machine": r"(^|[\s'\"(=])(/[\w.-]+){2,}|\b[A-Z]:\\",
}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.relative_to(ROOT / "nbs").as_posix())
def test_stored_outputs_are_fit_to_read(path):
    for i, cell in enumerate(cells(path)):
        for output in cell.get("outputs", []):
            assert output["output_type"] != "error", f"cell {i}"
        for text in texts(cell) if cell["cell_type"] == "code" else []:
            for what, pattern in STUMBLES.items():
                assert not re.search(pattern, text), f"cell {i} shows {what}: {text[:200]}"


# -- README


def test_readme_is_in_step():
    done = subprocess.run(
        [sys.executable, ROOT / ".ci/readme.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_readme_links_and_pictures_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = [t for t in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"[a-z]+:|#", t)]
    assert len(targets) > 30
    assert [t for t in targets if not (ROOT / t).is_file()] == []


def test_readme_names_its_two_commands():
    for heading, words in {"Run the study": "cxr-synth run", "Run the tests": "pytest"}.items():
        done = subprocess.run(
            [sys.executable, ROOT / ".ci/readme.py", "--command", heading],
            capture_output=True,
            text=True,
        )
        assert done.stdout.startswith("python3 -m venv .venv && ") and words in done.stdout

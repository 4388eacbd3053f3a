"""The rooms of the house: which may import which, one home for each public name, notebooks and
modules in step.
"""

import ast
import builtins
import dis
import json
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {  # room -> the rooms that it may import
    "base": "",
    "stats": "base",
    "protocol": "base stats",
    "images": "base stats protocol",
    "data": "base stats protocol images",
    "diffusion": "base stats protocol images",
    "quality": "base stats protocol images",
    "classify": "base stats protocol images",
    "report": "base stats protocol images data diffusion quality classify",
    "ship": "base stats protocol images data diffusion quality classify",
    "stages": "base stats protocol images data diffusion quality classify report ship",
    "guide": "base stats protocol images data diffusion quality classify report ship stages",
    "app": "base stats protocol images data diffusion quality classify report ship stages guide",
}
STAGES = {
    "stages.data": "01_data",
    "stages.plan": "02_plan",
    "stages.train": "03_train",
    "stages.generate": "04_generate",
    "stages.quality": "05_quality",
    "stages.classify": "06_classify",
    "stages.report": "07_report",
    "guide": "08_guide",
    "app": "09_app",
}
MODULES = sorted(p for p in (ROOT / "cxr_synth").rglob("*.py") if not p.name.startswith("_"))


def name_of(path):
    return ".".join(path.relative_to(ROOT / "cxr_synth").with_suffix("").parts)


def notebook_of(module):
    return ROOT / "nbs" / f"{STAGES.get(module, module.replace('.', '/'))}.ipynb"


def imported_modules(path):
    "Modules of the package that a module imports, anywhere in it, as names below cxr_synth."
    here = ["cxr_synth", *path.relative_to(ROOT / "cxr_synth").with_suffix("").parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = here[: -node.level] if node.level else []
            full = ".".join([*base, node.module or ""]).rstrip(".")
            names = [full] if full != "cxr_synth" else [f"{full}.{a.name}" for a in node.names]
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        else:
            continue
        for name in names:
            if name.startswith("cxr_synth."):
                yield name.removeprefix("cxr_synth.")


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_module_imports_only_rooms_below(path):
    room = name_of(path).split(".")[0]
    allowed = {room, *ROOMS[room].split()}
    wrong = {m for m in imported_modules(path) if m.split(".")[0] not in allowed}
    assert not wrong, f"{name_of(path)} imports {sorted(wrong)}; {room} may import {ROOMS[room]}"


def test_no_module_imports_in_a_circle():
    graph = {name_of(p): set(imported_modules(p)) for p in MODULES}
    done, path = set(), []

    def visit(module):
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module in done or module not in graph:
            return
        path.append(module)
        for other in sorted(graph[module]):
            visit(other)
        path.pop()
        done.add(module)

    for module in graph:
        visit(module)


def public_names(path):
    "What a module exports: its `__all__`."
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    return []


def test_each_public_name_has_one_home():
    homes = defaultdict(list)
    for path in MODULES:
        for name in public_names(path):
            homes[name].append(name_of(path))
    assert {n: m for n, m in homes.items() if len(m) > 1} == {}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_module_stands_where_its_notebook_stands(path):
    module = name_of(path)
    cells = json.loads(notebook_of(module).read_text(encoding="utf-8"))["cells"]
    sources = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    assert f"#| default_exp {module}" in sources
    relative = "../" * (module.count(".") + 1) + notebook_of(module).relative_to(ROOT).as_posix()
    assert relative in path.read_text(encoding="utf-8")


def test_every_notebook_has_its_module():
    found = {p for p in (ROOT / "nbs").rglob("*.ipynb") if not p.name.startswith("_")}
    expected = {notebook_of(name_of(p)) for p in MODULES}
    assert found - expected == {ROOT / "nbs/index.ipynb"}


def code_objects(code):
    "A code object and all that lie within it."
    yield code
    for inner in code.co_consts:
        if hasattr(inner, "co_code"):
            yield from code_objects(inner)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_module_defines_or_imports_every_name_it_uses(path):
    "A notebook knows the imports of all its cells, the module those of its exported ones alone."
    code = compile(path.read_text(encoding="utf-8"), str(path), "exec")
    made = {i.argval for i in dis.get_instructions(code) if i.opname == "STORE_NAME"}
    known = made | set(dir(builtins)) | {"__annotations__", "__doc__", "__file__", "__name__"}
    used = {
        i.argval
        for part in code_objects(code)
        for i in dis.get_instructions(part)
        if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")
    }
    classes = {  # names of a class body are its own
        i.argval
        for part in code_objects(code)
        for i in dis.get_instructions(part)
        if i.opname == "STORE_NAME"
    }
    assert used - known - classes == set()


HEAVY = [
    "torch",
    "diffusers",
    "transformers",
    "pandas",
    "sklearn",
    "matplotlib",
    "peft",
    "accelerate",
    "datasets",
]
LIGHT = {  # what runs often, or in many processes, and what it must not load
    "cxr_synth": HEAVY,
    "cxr_synth.base.settings": HEAVY,
    "cxr_synth.base.records": HEAVY,
    "cxr_synth.stages.plan": ["diffusers", "transformers", "peft", "accelerate"],
    "cxr_synth.stages.classify": ["diffusers", "transformers", "peft", "accelerate"],
}
STATS_AND_PROTOCOL = [p for p in MODULES if name_of(p).split(".")[0] in ("stats", "protocol")]
LIGHT |= {f"cxr_synth.{name_of(p)}": ["torch", "diffusers", "peft"] for p in STATS_AND_PROTOCOL}


@pytest.mark.parametrize("path", STATS_AND_PROTOCOL, ids=name_of)
def test_statistics_and_protocol_need_no_tables(path):
    "They may use scikit-learn, which loads pandas where it is installed, but not pandas itself."
    tree = ast.parse(path.read_text(encoding="utf-8"))
    modules = [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    modules += [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    assert {m.split(".")[0] for m in modules}.isdisjoint({"torch", "pandas"})


@pytest.mark.parametrize("module", LIGHT)
def test_module_loads_no_heavy_library(module):
    code = f"import sys, {module}; print(*sorted({set(LIGHT[module])!r} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []


# -- links between notebooks, and in MAP.md


def links(text):
    "Relative link targets of Markdown, without the part behind #."
    found = re.findall(r"\]\(([^)\s]+)\)", text)
    return [t.partition("#")[0] for t in found if not re.match(r"[a-z]+:|#", t)]


@pytest.mark.parametrize(
    "path",
    sorted([*(ROOT / "nbs").rglob("*.ipynb"), ROOT / "nbs/MAP.md"]),
    ids=lambda p: p.relative_to(ROOT / "nbs").as_posix(),
)
def test_links_lead_somewhere(path):
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    assert [t for t in links(text) if not (path.parent / t).exists()] == []


@pytest.mark.parametrize("page", ["index.ipynb", "MAP.md"])
def test_index_and_map_name_every_notebook(page):
    text = (ROOT / "nbs" / page).read_text(encoding="utf-8")
    books = [notebook_of(name_of(p)).relative_to(ROOT / "nbs").as_posix() for p in MODULES]
    assert [name for name in books if f"]({name})" not in text] == []

"The report's page in every state that a study can be in, and the templates that it is made from."

import ast
import copy
import json
import re
from html import unescape
from importlib.resources import files
from pathlib import Path

import pytest

from cxr_synth.protocol.schema import QUALITY_COLUMNS
from cxr_synth.report.contrasts import analyse
from cxr_synth.report.evidence import Evidence
from cxr_synth.report.page import report_page
from cxr_synth.report.rehearsal import rehearse
from cxr_synth.report.render import _environment, render
from cxr_synth.stats.intervals import WORDS

ROOT = Path(__file__).resolve().parent.parent
TEMPLATES = ROOT / "cxr_synth/report/templates"


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    patients = dict(val=20, internal=60, test=60, train=20)
    return rehearse(tmp_path_factory.mktemp("page") / "demo", patients, arms=("real", "mixed"))


@pytest.fixture(scope="module")
def found(study):
    return analyse(study, draws=200, ev=Evidence(study))


@pytest.fixture
def analysis(found):
    return copy.deepcopy(found)


def text_of(page):
    "What a reader sees: no tags, white space as one space."
    body = page[page.index("<main>") :]
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]+>", " ", body))).strip()


def shown(study, analysis):
    return text_of(report_page(study, analysis, {}, "2026-01-06T00:00:00+00:00"))


@pytest.mark.parametrize("word", WORDS)
def test_every_word_has_its_story(study, analysis, word):
    analysis["contrasts"][0] |= dict(word=word, remarks=["first", "a <b> & c"])
    analysis["verdict"] |= dict(word=word, sentence=f"Synthetic images {word} so.")
    page = report_page(study, analysis, {}, "2026-01-06")
    assert f'<section class="box {word.split()[0]}">' in page
    assert f"<strong>{word}</strong>" in page
    assert "of 1,000 pairs of one sick and one healthy drawn patient" in text_of(page)
    assert "Remarks: first; a <b> & c." in text_of(page)


@pytest.mark.parametrize(
    "test, sentence",
    [
        (dict(state="absent"), "This data set has no official test"),
        (
            dict(state="sealed", openings=[]),
            "no AUROC on this page rests on it. What would settle it",
        ),
        (dict(state="sealed", openings=["2026-01-05T00:00"]), "It was opened before (2026-01-05)"),
        (
            dict(state="opened", openings=["2026-01-05T00:00"]),
            "opened (2026-01-05). What would settle it",
        ),
        (
            dict(state="opened", openings=["2026-01-05", "2026-02-05"], exploratory=True),
            "(2026-01-05, 2026-02-05). What is said about it is exploratory",
        ),
    ],
)
def test_state_of_the_official_test(study, analysis, test, sentence):
    analysis["test"] |= test
    text = shown(study, analysis).replace(" .", ".").replace(" :", ":")
    assert sentence in text
    assert ("is exploratory." in text) == analysis["test"]["exploratory"]


@pytest.mark.parametrize("replicates, sets", [(1, "one synthetic set"), (2, "two synthetic sets")])
def test_few_replicates_conclude_nothing(study, analysis, replicates, sets):
    analysis["contrasts"][0] |= dict(word="inconclusive", remarks=[])
    analysis["verdict"] |= dict(word="inconclusive", sentence="It is inconclusive so.")
    assert "earns no stronger word" not in shown(study, analysis)
    analysis["contrasts"][0]["replicates"] = replicates
    text = shown(study, analysis)
    assert f"The pilot rests on {sets} at this fraction" in text
    assert text.count("stays open") == 1


@pytest.mark.parametrize(
    "remark, low, said",
    [
        ("copies of the real films do as well", 0.5, "copies of the real films do as well, so"),
        ("not compared with copies of the real films", 0.5, "nobody has compared"),
        ("", 0.5, "lies on one side of zero, but the study is too small"),
        ("", -2.0, "holds zero and reaches beyond the margin"),
    ],
)
def test_why_a_question_stays_open_is_said_once(study, analysis, remark, low, said):
    analysis["contrasts"][0] |= dict(word="inconclusive", remarks=[remark], low=low, high=3.0)
    beforehand = "More patients would."
    about = dict(word="inconclusive", sentence="It is inconclusive so.", beforehand=beforehand)
    analysis["verdict"] |= about
    text = shown(study, analysis)
    assert said in text and text.count("stays open") == 1
    assert text.count(f"The plan said so beforehand: {beforehand}") == 1


def test_the_page_begins_with_what_one_sees(study, analysis):
    png = b"\x89PNG"
    figures = dict.fromkeys(("films", "generators", "forest", "grid"), png)
    page = report_page(study, analysis, figures, "2026-01-06")
    heads = re.findall("<h2>(.*?)</h2>", page)
    assert heads[:3] == ["What one sees", "By how much", "What would settle it"]
    assert page.index("Hollow: the difference of each generator") < page.index("All comparisons")
    assert page.count("<img") == 4


def test_generators_that_have_not_learned_are_named_in_the_box(study, analysis):
    quality = {p: p.read_text() for p in (study / "quality").glob("real010-rep?.json")}
    same = dict.fromkeys(QUALITY_COLUMNS) | dict(class_name="both", floor=0.9)
    fog = [
        same | dict(metric="label-auroc", reference="val", value=0.5, low=0.43, high=0.57),
        same | dict(metric="coverage", reference="train", value=0.0),
    ]
    try:
        for path in quality:
            path.write_text(json.dumps(fog))
        text = shown(study, analysis)
        assert text.count("These images do not show chests") == 1
        assert "says nothing about synthetic X-rays" in text
        assert "label-AUROC 0.50 (0.43 to 0.57; real films 0.90)" in text
        assert "Better images, before any larger study" in text
    finally:
        for path, content in quality.items():
            path.write_text(content)
    assert "do not show chests" not in shown(study, analysis)


def test_a_sealed_question_has_no_verdict(study, analysis):
    c = analysis["contrasts"][0]
    asked = {k: c[k] for k in ("arm", "control", "fraction", "metric", "role")}
    analysis["contrasts"][0] = asked | dict(state="sealed", split="test")
    analysis["verdict"] |= dict(word=None, sentence="No verdict yet: it is sealed.")
    analysis["beside"] = {}
    text = shown(study, analysis)
    assert text.count("No verdict yet: it is sealed.") == 1
    assert "In other words" not in text and "McNemar" not in text and "not measured yet." in text


def test_what_is_missing_is_listed_and_counted(study, analysis):
    assert "What is missing" not in shown(study, analysis)
    assert "Deviations from the plan: none recorded." in shown(study, analysis)
    analysis["missing"] = dict(pending=[f"run {i}" for i in range(11)], failed=["a: <boom>"])
    analysis["problems"] = ["one & two"]
    text = shown(study, analysis)
    assert "not there yet: 11 run 0" in text and "run 7 and 3 more" in text
    assert "a: <boom>" in text and "one & two" in text
    assert "11 planned run(s) are not there" in text and "none recorded" not in text


def test_zero_variance_and_pending_runs_get_no_word(study, analysis):
    first = analysis["contrasts"][0]
    first |= dict(pending=3)
    del first["word"]
    other = first | dict(role="estimate", pending=0, zero=["seeds", "patients"])
    analysis["contrasts"].append(other)
    analysis["verdict"] |= dict(word=None, sentence="No verdict yet.")
    text = shown(study, analysis)
    assert "unfinished" in text and "zero variance of seeds, patients" in text


def test_all_templates_are_shipped_and_compile():
    names = {p.name for p in TEMPLATES.iterdir()}
    assert {p.name for p in files("cxr_synth.report").joinpath("templates").iterdir()} == names
    for name in names:
        _environment().get_template(name)
    manifest = (ROOT / "MANIFEST.in").read_text()
    assert {n.rpartition(".")[2] for n in names} == {"j2", "css"}
    assert "recursive-include cxr_synth/report/templates *.j2 *.css" in manifest


def test_every_page_holds_the_one_style_sheet():
    style = (TEMPLATES / "style.css").read_text(encoding="utf-8").strip()
    page = render("compare.html.j2", analyses={}, rows=[], png=None)
    assert style in page and page.startswith("<!doctype html>")
    assert [p.name for p in TEMPLATES.parent.rglob("*") if "<style" in _text(p)] == ["base.html.j2"]


def _text(path):
    return path.read_text(encoding="utf-8") if path.suffix in (".py", ".j2") else ""


@pytest.mark.parametrize("room", ["report", "data", "stages"])
def test_no_html_in_python(room):
    tag = re.compile(
        r"</?(a|div|figure|h[1-6]|html|img|li|main|p|section|span|style|t[dhr]|table|ul)\b[^<]*>"
    )
    for path in (ROOT / "cxr_synth" / room).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not tag.search(node.value), f"{path.name}:{node.lineno}: {node.value[:60]!r}"

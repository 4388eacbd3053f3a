"""The report in a real browser: it opens, asks nothing of the network, logs nothing, and shows what
the files say.
"""

import re, shutil, subprocess, sys
from html import unescape
from pathlib import Path

import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from cxr_synth.stages.report import stage_report
from cxr_synth.report.contrasts import format_pp
from cxr_synth.base.readers import read_json
from cxr_synth.base.records import generator_name
from cxr_synth.base.settings import ReportConfig
from cxr_synth.report.rehearsal import rehearse, rehearse_opening

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
from report_page import browser, visit  # noqa: E402


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    study = rehearse_opening(
        rehearse(
            tmp_path_factory.mktemp("report") / "study <b>",
            dict(val=20, internal=60, test=60, train=20),
            arms=("real", "mixed"),
        )
    )
    stage_report(study, ReportConfig(draws=300, poster=300))
    return study


@pytest.mark.skipif(browser() is None, reason="no Chromium or Chrome on this machine")
def test_page_opens_alone(study):
    took, console, asked, dom = visit(study / "report/index.html")
    assert console == [] and asked == []
    assert "Do synthetic chest X-rays" in dom and "<b>" not in re.sub(
        r"<style>.*?</style>", "", dom, flags=re.S
    )


def test_page_is_small_and_self_contained(study):
    text = (study / "report/index.html").read_text(encoding="utf-8")
    assert len(text) < 8_000_000
    assert not re.search(r"<script|https?://|@import|url\(", text)


def test_numbers_on_the_page_are_those_of_the_predictions(study):
    text = unescape((study / "report/index.html").read_text(encoding="utf-8"))
    c = read_json(study / "analysis.json")["contrasts"]
    labels = pd.read_csv(study / "data/manifest.csv")[["image_id", "label"]]  # test.csv has none

    def mean_auroc(arm, fraction, split):
        cell = {1.0: (1, 3), 0.1: (3, 3)}[fraction]
        tables = [
            pd.read_csv(
                study
                / f"runs/{arm}/{generator_name(fraction, k)}-seed{s}"
                / ("test.csv" if split == "test" else "predictions.csv")
            )
            .drop(columns="label", errors="ignore")
            .merge(labels, on="image_id")
            for k in range(cell[0])
            for s in range(cell[1])
        ]
        tables = [t[t.split == split] for t in tables]
        films = [t.groupby(["patient_id", "label"]).prob.transform("size") for t in tables]
        by_child = [
            roc_auc_score(t.label, t.prob, sample_weight=1 / n) for t, n in zip(tables, films)
        ]
        by_film = [roc_auc_score(t.label, t.prob) for t in tables]
        return sum(by_child) / len(tables), sum(by_film) / len(tables)

    named = [r for r in c if r["state"] == "measured"]
    assert len(named) >= 3
    for r in named:
        (a, a_film), (b, b_film) = (
            mean_auroc(arm, r["fraction"], r["split"]) for arm in (r["arm"], r["control"])
        )
        for shown in (
            *(f"{x:.3f}" for x in (a, b, a_film, b_film)),
            str(round(1000 * (1 - a))),
            str(round(1000 * (1 - b))),
            format_pp(100 * (a - b)),
        ):
            assert shown in text, (r["arm"], shown)


def test_two_studies_are_compared_on_the_command_line(study, tmp_path):
    other = shutil.copytree(study.root, tmp_path / "other")
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from cxr_synth.app import main; sys.exit(main())",
            "report",
            str(study.root),
            str(other),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (study / "report/compare.html").is_file() and "compare.html" in done.stdout

"The report stage: made again, unfinished, stale, of two replicates, and of several studies."

import shutil

import pytest

from cxr_synth.base.files import CxrError, write_json
from cxr_synth.base.readers import read_json
from cxr_synth.base.records import Study
from cxr_synth.base.settings import ReportConfig
from cxr_synth.report.rehearsal import rehearse, rehearse_opening
from cxr_synth.stages.report import cli_compare, stage_report

QUICK = ReportConfig(draws=100, poster=300)


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    patients = dict(val=20, internal=60, test=60, train=20)
    study = rehearse(tmp_path_factory.mktemp("stage") / "demo", patients, arms=("real", "mixed"))
    stage_report(study, QUICK)
    return study


@pytest.fixture
def study(rehearsed, tmp_path):
    return Study(shutil.copytree(rehearsed.root, tmp_path / "demo"))


def page_of(study):
    return (study / "report/index.html").read_text(encoding="utf-8")


def test_another_setting_replaces_the_report(study):
    before = (study / "report/results-table.md").read_bytes()
    stage_report(study, ReportConfig(draws=150, poster=300))
    record = read_json(study / "report/stage.json")
    assert (record["settings"], record["runtime"]) == (
        dict(draws=150, real_films=True),
        dict(poster=300),
    )
    assert (study / "report/results-table.md").read_bytes() == before
    assert not list(study.root.glob("*.redo*"))


def test_redo_keeps_the_old_report(study):
    stage_report(study, QUICK, redo=True)
    assert (study / "report.redo1/index.html").is_file() and (study / "report/index.html").is_file()


def test_an_analysis_without_a_record_is_kept(study):
    shutil.rmtree(study / "report")
    (study / "analysis.json").write_text('"mine"')
    stage_report(study, QUICK)
    assert (study / "analysis.json.redo1").read_text() == '"mine"'


def test_a_study_without_runs_is_refused(study, tmp_path):
    (tmp_path / "half").mkdir()
    for name in ("plan.json", "study.json"):
        shutil.copy(study / name, tmp_path / "half" / name)
    shutil.copytree(study / "data", tmp_path / "half/data")
    with pytest.raises(CxrError, match="cxr-synth experiments"):
        stage_report(Study(tmp_path / "half"), QUICK)


def test_an_unfinished_study_gets_a_report_without_a_word(study):
    (study / "results.csv").unlink()
    for path in (study / "runs/mixed").glob("*-seed2"):
        shutil.rmtree(path)
    record = read_json(study / "runs/stage.json") | dict(status="running")
    write_json(study / "runs/stage.json", record)
    stage_report(study, QUICK)
    assert read_json(study / "analysis.json")["verdict"]["word"] is None
    assert "What is missing" in page_of(study)
    assert "the stage experiments has not finished (runs)" in page_of(study)


def test_a_stale_stage_is_named(study):
    with open(study / "data/manifest.csv", "a", encoding="utf-8") as f:
        f.write("x9,,normal,0,,p99999,train,train,,,,,\n")
    with pytest.raises(CxrError, match="data/manifest.csv was changed"):
        stage_report(study, QUICK)


def test_two_replicates_conclude_nothing(tmp_path):
    patients = dict(val=20, internal=60, test=20, train=20)
    cells = ((1.0, 1, 2), (0.1, 2, 3))
    study = rehearse(tmp_path / "pilot", patients, cells, ("real", "mixed"))
    stage_report(study, QUICK)
    assert read_json(study / "analysis.json")["contrasts"][0]["word"] == "inconclusive"
    assert "The pilot rests on two synthetic sets" in page_of(study)


def test_comparing_makes_the_reports_that_are_missing(study, tmp_path):
    other = rehearse_opening(Study(shutil.copytree(study.root, tmp_path / "other")))
    shutil.rmtree(other / "report")
    (other / "analysis.json").unlink()
    said = cli_compare([str(study.root), str(other.root)], QUICK)
    page = (study / "report/compare.html").read_text(encoding="utf-8")
    assert said == f"Comparison: {study / 'report/compare.html'}"
    assert (other / "report/index.html").is_file()
    assert f"demo ({tmp_path.name}/other)" in page and "2 studies side by side" in page

"""Damaged files: every reader names file, line and column; every file of a study is read through
them; a table of patients is read with care.
"""

import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cxr_synth.base.cache import cached, recorded
from cxr_synth.base.files import CxrError, write_csv
from cxr_synth.base.readers import read_array, read_csv, read_frame, read_json, read_lines
from cxr_synth.base.records import Study
from cxr_synth.base.settings import DataConfig
from cxr_synth.classify.executors import ResultsTable
from cxr_synth.data.patients import patients_by_table, read_patients, with_patients
from cxr_synth.diffusion.dreambooth import read_prompts
from cxr_synth.images.phantom import write_phantoms
from cxr_synth.images.study_images import load_fractions, load_manifest, training_rows
from cxr_synth.protocol.dataset import read_card
from cxr_synth.protocol.plan import Plan, load_plan
from cxr_synth.protocol.schema import (
    Analysis,
    Audit,
    FractionRow,
    ManifestRow,
    OpenedLog,
    PredictionRow,
    result_row,
)
from cxr_synth.protocol.sets import load_metadata, marked_images
from cxr_synth.quality.gallery import Gallery
from cxr_synth.report.evidence import Evidence, load_results
from cxr_synth.report.figures import load_quality, training_curves
from cxr_synth.report.page import audit_facts, heat_rows
from cxr_synth.ship.set_card import filter_words
from cxr_synth.stages.data import stage_data

SET = "real010-rep0"
RUN = "runs/mixed/real010-rep0-seed0"


# -- one kind of damage after the other, on bytes


def _cut(raw):
    return raw[: len(raw) * 2 // 3 - 1]


def _swap(old, new, count=-1):
    return lambda raw: raw.replace(old, new, count)


def _second_line(change):
    "Change the second line of a text, which is the first row of a table."

    def damage(raw):
        head, row, rest = raw.split(b"\n", 2)
        return b"\n".join([head, change(row), rest])

    return damage


ANY = {  # what may happen to every file
    "empty": lambda raw: b"",
    "cut": _cut,
    "NUL bytes": lambda raw: raw[: len(raw) // 2] + bytes(50) + raw[len(raw) // 2 :],
    "NUL bytes alone": lambda raw: bytes(len(raw)),
    "binary junk": lambda raw: bytes(range(256)) * 4,
    "a JPEG": lambda raw: b"\xff\xd8\xff\xe0\x00\x10JFIF" + raw,
    "a workbook": lambda raw: b"PK\x03\x04" + bytes(30) + raw,
    "an old workbook": lambda raw: b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + raw,
    "a web page": lambda raw: b"<!DOCTYPE html>\n<html><body>404</body></html>\n",
    "UTF-16": lambda raw: raw.decode().encode("utf-16"),
    "UTF-16 without mark": lambda raw: raw.decode().encode("utf-16-le"),
    "Latin-1 in it": lambda raw: raw[:20] + "Mu\xfcller".encode("latin-1") + raw[20:],
    "blank lines": lambda raw: b"\n\n\n",
    "conflict of git": lambda raw: b"<<<<<<< HEAD\n" + raw + b"=======\n" + raw + b">>>>>>> a\n",
}
TABLE = {
    "semicolons": _swap(b",", b";"),
    "tabs": _swap(b",", b"\t"),
    "no header": lambda raw: raw.split(b"\n", 1)[1],
    "header alone twice": lambda raw: raw.split(b"\n")[0] + b"\n" + raw,
    "a column is missing": lambda raw: b"".join(
        line.partition(b",")[2] + b"\n" for line in raw.splitlines()
    ),
    "a column is doubled": lambda raw: b"".join(
        line.partition(b",")[0] + b"," + line + b"\n" for line in raw.splitlines()
    ),
    "a row is short": _second_line(lambda row: row.rpartition(b",")[0]),
    "a row is long": _second_line(lambda row: row + b",1"),
    "an open quote": _second_line(lambda row: b'"' + row),
    "the last line is cut": lambda raw: raw.rstrip(b"\n")[:-1],
}
DOCUMENT = {
    "a list": lambda raw: b"[1]",
    "an object": lambda raw: b"{}",
    "a text": lambda raw: b'"text"',
    "null": lambda raw: b"null",
    "NaN": lambda raw: b"NaN",
    "infinite": lambda raw: b"[1e999]",
    "nested": lambda raw: b"[" * 100_000 + b"]" * 100_000,
    "huge number": lambda raw: b"[" + b"9" * 5000 + b"]",
    "a key is doubled": lambda raw: b'{"a": 1, "a": 2}',
    "two documents": lambda raw: raw + raw,
    "a comma too many": lambda raw: raw.rstrip()[:-1] + b",]}",
    "single quotes": _swap(b'"', b"'"),
}
TABLES = {  # file of a study -> what reads it
    "data/manifest.csv": lambda s: load_manifest(s),
    "data/fractions.csv": lambda s: load_fractions(s),
    "results.csv": lambda s: load_results(s),
    f"{RUN}/heat.csv": lambda s: heat_rows(s, load_plan(s).primary),
    f"synthetic/{SET}/flags.csv": lambda s: marked_images(s, SET),
    f"models/{SET}/train.csv": lambda s: training_curves(s),
}
DOCUMENTS = {
    "plan.json": lambda s: load_plan(s),
    "opened.json": lambda s: Evidence(s).test,
    "data/audit.json": lambda s: audit_facts(s),
    "data/dataset.json": lambda s: read_card(str(s / "data/dataset.json")),
    f"quality/{SET}.json": lambda s: load_quality(s),
    f"{RUN}/run.json": lambda s: ResultsTable(s, load_plan(s).runs()).rows,
    "analysis.json": lambda s: read_json(s / "analysis.json", Analysis),
}
CASES = [(f, w, d) for f in TABLES for w, d in (ANY | TABLE).items()]
CASES += [(f, w, d) for f in DOCUMENTS for w, d in (ANY | DOCUMENT).items()]
CASES += [(f"synthetic/{SET}/metadata.jsonl", w, d) for w, d in ANY.items()]
READS = TABLES | DOCUMENTS | {f"synthetic/{SET}/metadata.jsonl": lambda s: load_metadata(s, SET)}
HARMLESS = {  # what leaves a file as good as it was
    ("data/dataset.json", "an object"),  # a card without facts says that nothing is known
    ("data/dataset.json", "UTF-16"),  # a card may be a user's own file
    (f"synthetic/{SET}/metadata.jsonl", "empty"),
}


@pytest.fixture(scope="module")
def light(finished_study, tmp_path_factory):
    "A study without caches and weights, to damage and to mend."
    import shutil

    folder = tmp_path_factory.mktemp("light") / "s"
    ignore = shutil.ignore_patterns(
        "cache", "*.safetensors", "report", "base", "normal", "pneumonia"
    )
    return Study(shutil.copytree(finished_study, folder, ignore=ignore))


@pytest.fixture
def damaged(light):
    "`damaged(name, change)` damages a file of the study until the test ends."
    before = {}

    def damage(name, change):
        path = light / name
        before.setdefault(path, path.read_bytes())
        path.write_bytes(change(before[path]))
        return light

    yield damage
    for path, raw in before.items():
        path.write_bytes(raw)


def refusal(read, *args, **kw):
    "The text of the `CxrError` that a call ends with; anything else is a failure."
    with pytest.raises(CxrError) as e:
        read(*args, **kw)
    text = str(e.value)
    assert 2 <= len(text.splitlines()) <= 5 and max(map(len, text.splitlines())) < 500, text
    return text


@pytest.mark.parametrize("name, what, change", CASES, ids=[f"{f}: {w}" for f, w, _ in CASES])
def test_every_damage_of_every_file(damaged, name, what, change):
    if (name, what) in HARMLESS:
        pytest.skip("nothing is wrong with it")
    study = damaged(name, change)
    assert Path(name).name in refusal(READS[name], study)


@pytest.mark.parametrize("name", READS)
def test_mark_and_line_ends_of_other_programs_do_no_harm(damaged, name):
    before = repr(READS[name](damaged(name, lambda raw: raw)))
    with_mark = repr(READS[name](damaged(name, lambda raw: b"\xef\xbb\xbf" + raw)))
    assert with_mark == before
    if name.endswith(".csv"):
        assert repr(READS[name](damaged(name, _swap(b"\n", b"\r\n")))) == before


@pytest.mark.parametrize("name", READS)
@pytest.mark.parametrize("what", ["folder", "missing", "pipe"])
def test_something_else_in_its_place(light, name, what, tmp_path):
    path, aside = light / name, tmp_path / "aside"
    os.replace(path, aside)
    try:
        if what == "folder":
            path.mkdir()
        elif what == "pipe":
            if not hasattr(os, "mkfifo"):
                pytest.skip("this system has no named pipes")
            os.mkfifo(path)
        reader = read_lines if name.endswith("jsonl") else read_json
        text = refusal(read_csv if name.endswith("csv") else reader, path)
        assert (
            path.name in text
            and {"folder": "a folder", "missing": "is missing", "pipe": "no regular"}[what] in text
        )
    finally:
        path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
        os.replace(aside, path)


@pytest.mark.parametrize(
    "error", [PermissionError(13, "Permission denied"), OSError(5, "I/O error")]
)
def test_no_permission_or_a_broken_disk(tmp_path, monkeypatch, error):
    def fail(path):
        raise error

    (tmp_path / "a.json").write_text("{}")
    monkeypatch.setattr(Path, "read_bytes", fail)
    text = refusal(read_json, tmp_path / "a.json")
    assert "a.json" in text and error.strerror in text


# -- values


VALUES = [  # file, schema, column, value that must not stand there
    ("data/manifest.csv", ManifestRow, "label", ["2", "-1", "x", "", "0.5", "nan", "true"]),
    ("data/manifest.csv", ManifestRow, "split", ["Train", "", "holdout"]),
    ("data/manifest.csv", ManifestRow, "class_name", ["NORMAL", "", "covid"]),
    ("data/manifest.csv", ManifestRow, "patient_id", ["", " ", "\u3000"]),
    ("data/manifest.csv", ManifestRow, "image_id", ["", " ", "../x", "a/b"]),
    ("data/manifest.csv", ManifestRow, "width", ["0", "-5", "wide", "1e400"]),
    ("data/manifest.csv", ManifestRow, "sha256", ["", "0" * 63, "Z" * 64]),
    ("data/fractions.csv", FractionRow, "min_fraction", ["0", "1.5", "nan", "half", "-0.1", "inf"]),
    ("data/fractions.csv", FractionRow, "replicate", ["-1", "one", "0.5"]),
    (f"{RUN}/predictions.csv", PredictionRow, "prob", ["", "nan", "inf", "-0.1", "1.01", "0,5"]),
    (f"{RUN}/predictions.csv", PredictionRow, "label", ["2", "normal", ""]),
    (f"{RUN}/predictions.csv", PredictionRow, "split", ["train", "", "all"]),
    ("results.csv", "results", "real_fraction", ["0", "10", "nan", ""]),
    ("results.csv", "results", "status", ["", "finished"]),
    ("results.csv", "results", "internal_auroc", ["nan", "good", "inf"]),
    ("results.csv", "results", "plan_sha256", ["", "abc"]),
]
VALUES = [(f, s, c, v) for f, s, c, values in VALUES for v in values]


@pytest.mark.parametrize("name, schema, column, value", VALUES)
def test_values_that_must_not_stand_there(light, tmp_path, name, schema, column, value):
    rows = read_csv(light / name)[:40]
    rows[16][column] = value
    write_csv(tmp_path / "t.csv", list(rows[0]), rows)
    schema = result_row() if schema == "results" else schema
    for read in (read_csv, read_frame):
        text = refusal(read, tmp_path / "t.csv", schema)
        assert f"t.csv, row 17 (line 18), column {column}: found {repr(value)[:6]}" in text


TOGETHER = {  # what single cells do not show: file, schema, change of the rows, what is said
    "image twice": ("data/manifest.csv", ManifestRow, lambda r: r[3].update(r[2]), "second time"),
    "class against label": (
        "data/manifest.csv",
        ManifestRow,
        lambda r: r[3].update(class_name="pneumonia" if r[3]["label"] == "0" else "normal"),
        "label",
    ),
    "patient in two splits": (
        "data/manifest.csv",
        ManifestRow,
        lambda r: r[1].update(
            split="test" if r[0]["split"] != "test" else "train", patient_id=r[0]["patient_id"]
        ),
        "is in",
    ),
    "fraction twice": (
        "data/fractions.csv",
        FractionRow,
        lambda r: r[5].update(r[4]),
        "second time",
    ),
    "prediction twice": (
        f"{RUN}/predictions.csv",
        PredictionRow,
        lambda r: r[1].update(r[0]),
        "second time",
    ),
    "run twice": ("results.csv", None, lambda r: r[1].update(r[0]), "second time"),
    "no row": ("data/manifest.csv", ManifestRow, lambda r: r.clear(), "no rows"),
}


@pytest.mark.parametrize("what", TOGETHER)
def test_rows_that_do_not_go_together(light, tmp_path, what):
    name, schema, change, says = TOGETHER[what]
    rows = read_csv(light / name)
    columns = list(rows[0])
    change(rows)
    write_csv(tmp_path / "t.csv", columns, rows)
    assert says in refusal(read_csv, tmp_path / "t.csv", schema or result_row())


def change_rows(path, change):
    rows = read_csv(path)
    change(rows)
    write_csv(path, list(rows[0]), rows)


def test_fractions_of_other_images(damaged, light):
    damaged("data/fractions.csv", lambda raw: raw)
    change_rows(light / "data/fractions.csv", lambda r: r[0].update(image_id="IM-9999-0001"))
    assert "such as IM-9999-0001" in refusal(training_rows, light, 0.1, 0)


def test_run_that_the_plan_does_not_know(damaged, light):
    damaged("results.csv", lambda raw: raw)
    change_rows(light / "results.csv", lambda r: r[0].update(arm="better"))
    assert "runs/better/" in refusal(load_results, light)


def test_record_of_another_run(damaged, light):
    other = (light / RUN.replace("seed0", "seed1") / "run.json").read_bytes()
    damaged(f"{RUN}/run.json", lambda raw: other)
    assert "another run" in refusal(ResultsTable, light, load_plan(light).runs())


LINES = {
    "cut": lambda m: None,
    "a key is missing": lambda m: m.pop("label"),
    "another label": lambda m: m.update(label=1 - m["label"]),
    "label as text": lambda m: m.update(label="0"),
    "a path out of the folder": lambda m: m.update(file_name="../../data/images/a.png"),
    "no hash": lambda m: m.update(sha256=""),
    "seed as text": lambda m: m.update(seed="7"),
    "prompt is null": lambda m: m.update(prompt=None),
}


@pytest.mark.parametrize("what", LINES)
def test_lines_of_metadata(damaged, what):
    def change(raw):
        lines = [json.loads(line) for line in raw.splitlines()]
        LINES[what](lines[2])
        text = "".join(json.dumps(m) + "\n" for m in lines)
        return (text[:-9] if what == "cut" else text).encode()

    study = damaged(f"synthetic/{SET}/metadata.jsonl", change)
    text = refusal(load_metadata, study, SET)
    assert "metadata.jsonl" in text and "line " in text


def test_image_with_two_lines(damaged):
    study = damaged(f"synthetic/{SET}/metadata.jsonl", lambda raw: raw + raw.splitlines(True)[0])
    assert "for the second time" in refusal(load_metadata, study, SET)


@pytest.mark.parametrize("read", [marked_images, Gallery, filter_words])
@pytest.mark.parametrize(
    "text", ["a,b,c\n1,2,3\n", "file_name\nnormal/000000.png\n", "", "file_name,reason,by\nx\n"]
)
def test_marks_of_another_form(light, read, text):
    path = light / f"curation/{SET}.csv"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    try:
        assert f"{SET}.csv" in refusal(read, light, SET)
    finally:
        path.unlink()


@pytest.mark.parametrize("separator", ";\t,")
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "cp1252"])
def test_marks_from_a_spreadsheet(light, separator, encoding):
    path = light / f"curation/{SET}.csv"
    path.parent.mkdir(exist_ok=True)
    rows = [["File_name", "reason", "by"], ["normal/000003.png", "für später", "person"]]
    text = "\r\n".join(separator.join(row) for row in rows) + "\r\n" + separator * 2 + "\r\n"
    path.write_bytes(text.encode(encoding))
    try:
        assert "normal/000003.png" in marked_images(light, SET)
        assert Gallery(light, SET).marks == {"normal/000003.png": "für später"}
    finally:
        path.unlink()


def test_marks_of_images_that_are_not_there(light):
    path = light / f"curation/{SET}.csv"
    path.parent.mkdir(exist_ok=True)
    path.write_text("file_name,reason,by\nnormal/999999.png,copy,person\n")
    try:
        assert "normal/999999.png" in refusal(marked_images, light, SET)
    finally:
        path.unlink()


def test_damaged_predictions_are_written_down(damaged, light):
    "One run that cannot be read does not hide the others; it is named."
    damaged(f"{RUN}/predictions.csv", lambda raw: bytes(range(256)))
    evidence = Evidence(light)
    row = evidence.results[evidence.results.arm == "mixed"].iloc[0]
    assert evidence.run(row, "internal") is None
    assert "predictions.csv" in next(iter(evidence.problems))


# -- the command line, in this process


COMMANDS = [
    ("plan.json", "[]", ["experiments"]),
    ("plan.json", "{}", ["generate"]),
    ("results.csv", bytes(range(256)), ["report"]),
    ("results.csv", bytes(range(256)), ["open-test"]),
    ("results.csv", "semicolons", ["report"]),
    ("data/manifest.csv", "semicolons", ["plan"]),
    ("data/manifest.csv", "", ["train"]),
    ("opened.json", "[]", ["report"]),
    (f"synthetic/{SET}/metadata.jsonl", b"{", ["pack"]),
]


@pytest.mark.parametrize("name, raw, command", COMMANDS)
def test_commands_refuse(damaged, light, name, raw, command, cxr_synth_command):
    if raw == "semicolons":
        damaged(name, lambda old: b"\xef\xbb\xbf" + old.replace(b",", b";"))
    else:
        damaged(name, lambda old: raw.encode() if isinstance(raw, str) else raw)
    done = cxr_synth_command(*command, light.root)
    assert done.status == 2 and "Traceback" not in done.out + done.err
    assert Path(name).name in done.err and len(done.err.strip().splitlines()) <= 8


# -- tables of patients


NAMES = ["train/NORMAL/a.png", "train/NORMAL/b.png", "train/PNEUMONIA/c.png", "test/NORMAL/d.png"]
RIGHT = [(name, f"p{k // 2}") for k, name in enumerate(NAMES)]
ANSWER = ["p0", "p0", "p1", "p1"]


def patient_table(folder, rows=RIGHT, header=("image", "patient_id"), separator=",", end="\n"):
    path = folder / "who.csv"
    lines = [separator.join(map(str, row)) for row in (header, *rows)]
    path.write_bytes((end.join(lines) + end).encode())
    return path


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "cp1252"])
def test_tables_of_spreadsheet_programs(tmp_path, encoding, separator, end, capsys):
    rows = [(name, f"Müller{k // 2}") for k, name in enumerate(NAMES)]
    path = patient_table(tmp_path, rows, (" Image", "PATIENT_ID "), separator, end)
    mark = b"\xfe\xff" if encoding == "utf-16-be" else b""
    path.write_bytes(mark + path.read_bytes().decode().encode(encoding))
    assert patients_by_table(NAMES, path) == ["Müller0", "Müller0", "Müller1", "Müller1"]
    assert ("Windows-1252" in capsys.readouterr().out) == (encoding == "cp1252")


SAME = {  # other ways to write the same table
    "columns in another order": dict(
        rows=[(p, n) for n, p in RIGHT], header=("patient_id", "image")
    ),
    "more columns": dict(
        rows=[(n, 7, p, "") for n, p in RIGHT], header=("image", "age", "patient_id", "")
    ),
    "file names alone": dict(rows=[(n.rpartition("/")[2], p) for n, p in RIGHT]),
    "without suffix": dict(rows=[(n.rpartition("/")[2][:-4], p) for n, p in RIGHT]),
    "paths without suffix": dict(rows=[(n[:-4], p) for n, p in RIGHT]),
    "backslashes": dict(rows=[(n.replace("/", "\\"), p) for n, p in RIGHT]),
    "below a folder": dict(rows=[(f"/home/me/data/{n}", p) for n, p in RIGHT]),
    "capitals": dict(rows=[(n.upper(), p) for n, p in RIGHT]),
    "spaces around": dict(rows=[(f" {n} ", f" {p}  ") for n, p in RIGHT]),
    "quotes": dict(
        rows=[(f'"{n}"', f'"{p}"') for n, p in RIGHT], header=('"image"', '"patient_id"')
    ),
    "backwards": dict(rows=RIGHT[::-1]),
    "blank rows between": dict(rows=[x for row in RIGHT for x in (row, ("", ""))]),
    "the line sep=": dict(rows=[("image", "patient_id"), *RIGHT], header=("sep=,",)),
    "no line end at the end": dict(rows=[*RIGHT[:-1], (RIGHT[-1][0], "p1")], end="\n"),
}


@pytest.mark.parametrize("what", SAME)
def test_same_table_in_other_words(tmp_path, what):
    path = patient_table(tmp_path, **SAME[what])
    if what == "no line end at the end":
        path.write_bytes(path.read_bytes().rstrip(b"\n"))
    assert patients_by_table(NAMES, path) == ANSWER


def instead(k, *row):
    return [*RIGHT[:k], row, *RIGHT[k + 1 :]] if row else [*RIGHT[:k], *RIGHT[k + 1 :]]


WRONG = {  # rows that are refused, and what is said
    "a row is missing": (instead(1), "no patient for 1 of 4 images, such as train/NORMAL/b.png"),
    "two rows are missing": (RIGHT[:2], "no patient for 2 of 4"),
    "a blank patient": (instead(1, NAMES[1], ""), "rows for 1 of them, with an empty patient_id"),
    "a patient of spaces": (instead(1, NAMES[1], "  "), "no patient for 1 of 4"),
    "no patient, in words": (instead(1, NAMES[1], "NaN"), "no patient for 1 of 4"),
    "no patient, by a formula": (instead(1, NAMES[1], "#N/A"), "no patient for 1 of 4"),
    "all blank": ([(n, "") for n in NAMES], "no patient for 4 of 4"),
    "a table of others": ([("x.png", "p0"), ("y.png", "p1")], "knows" and "names 2 files"),
    "a blank image": (instead(1, "", "p0"), "row 2"),
    "two patients": ([*RIGHT, (NAMES[0], "p9")], "two patients, p0 and p9"),
    "a number with .0": (
        [*instead(0, NAMES[0], "12")[:1], (NAMES[1], "12.0"), *RIGHT[2:]],
        "'12.0'",
    ),
    "leading zeros": ([(NAMES[0], "012"), (NAMES[1], "12"), *RIGHT[2:]], "'012'"),
    "case": ([(NAMES[0], "P1"), *RIGHT[1:]], "more than case, spaces or zeros"),
    "spaces inside": ([(NAMES[0], "p  x"), (NAMES[1], "p x"), *RIGHT[2:]], "'p  x'"),
    "a rounded number": (instead(0, NAMES[0], "1.23457E+14"), "rounded"),
    "too few cells": (instead(1, NAMES[1]), "row 2"),
    "an open quote": (instead(1, '"' + NAMES[1], "p0"), "is no table"),
}


@pytest.mark.parametrize("what", WRONG)
def test_tables_that_are_refused(tmp_path, what):
    rows, says = WRONG[what]
    text = refusal(patients_by_table, NAMES, patient_table(tmp_path, rows))
    assert "who.csv" in text and says in text


FILES = ANY | {
    "header alone": lambda raw: raw.split(b"\n")[0] + b"\n",
    "another column": _swap(b"patient_id", b"person"),
    "a column is doubled": _swap(b"patient_id", b"image"),
    "a NUL and an open quote": lambda raw: raw[:50] + b'\0"' + raw[50:],
}


@pytest.mark.parametrize("what", sorted(set(FILES) - {"UTF-16", "Latin-1 in it", "cut"}))
def test_files_that_are_no_table_of_patients(tmp_path, what):
    path = patient_table(tmp_path)
    path.write_bytes(FILES[what](path.read_bytes()))
    text = refusal(patients_by_table, NAMES, path)
    assert "who.csv" in text
    if "workbook" in what:
        assert "CSV UTF-8" in text


def test_name_that_fits_two_images(tmp_path):
    path = patient_table(tmp_path, [("a.png", "p0")])
    text = refusal(patients_by_table, ["train/NORMAL/a.png", "train/PNEUMONIA/a.png"], path)
    assert "fits 2 images" in text and "path within the source" in text


def test_what_was_not_used_is_said(tmp_path):
    rows = [*RIGHT, RIGHT[0], ("z.png", "p7"), ("y.png", "p8")]
    path = patient_table(tmp_path, rows)
    assert patients_by_table(NAMES, path) == ANSWER
    text = " ".join(read_patients(NAMES, path).notes(path))
    assert "2 rows for images that are not here, such as z.png" in text and "in 1 rows" in text


def test_images_without_a_patient_may_be_left_out(tmp_path):
    path = patient_table(tmp_path, instead(1))
    known, lost, _ = with_patients([dict(path=n) for n in NAMES], path, "skip")
    assert [r["path"] for r in known] == [NAMES[0], *NAMES[2:]]
    assert [r["path"] for r in lost] == NAMES[1:2]


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    return write_phantoms(tmp_path_factory.mktemp("films") / "set", patients=60, size=64)


def film_rows(films):
    paths = sorted(p.relative_to(films).as_posix() for p in films.rglob("*.png"))
    return [
        (p, Path(p).stem.split("_")[0].rpartition("-")[0] or Path(p).stem.split("_")[0])
        for p in paths
    ]


def patients_finding(study):
    report = read_json(study / "data/audit.json", Audit)
    return next(f for f in report["findings"] if f["name"] == "patients")


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".TXT"])
def test_stage_with_a_table(films, tmp_path, suffix):
    table = patient_table(tmp_path, film_rows(films), separator="\t").rename(
        tmp_path / f"who{suffix}"
    )
    study = Study(tmp_path / "s")
    stage_data(study, DataConfig(source=str(films), patient_rule=str(table), resolution=32))
    assert set(load_manifest(study).patient_id.str[:8]) == {"patient-"}
    finding = patients_finding(study)
    assert finding["level"] == "ok" and "for every image" in finding["found"]


@pytest.mark.parametrize("suffix", [".xlsx", ".xls", ".ods"])
def test_stage_with_a_workbook(films, tmp_path, suffix):
    table = tmp_path / f"who{suffix}"
    table.write_bytes((b"\xd0\xcf\x11\xe0" if suffix == ".xls" else b"PK\x03\x04") + bytes(99))
    config = DataConfig(source=str(films), patient_rule=str(table), resolution=32)
    assert "CSV" in refusal(stage_data, Study(tmp_path / "s"), config)
    assert not (tmp_path / "s").exists()


def test_stage_refuses_or_skips_images_without_a_patient(films, tmp_path):
    rows = film_rows(films)
    table = patient_table(tmp_path, rows[:-1])
    study = Study(tmp_path / "s")
    config = dict(source=str(films), patient_rule=str(table), resolution=32)
    assert f"no patient for 1 of {len(rows)} images" in refusal(
        stage_data, study, DataConfig(**config)
    )
    assert not study.root.exists()
    stage_data(study, DataConfig(**config, on_bad="skip"))
    assert len(load_manifest(study)) == len(rows) - 1
    assert rows[-1][0] in (study / "data/audit.json").read_text()
    stage_data(study, DataConfig(**config, on_bad="skip"))  # the same again: done


def test_audit_counts_what_is_not_known(films, tmp_path):
    "The names would tell a patient, but the rule says that each film is of another one."
    study = Study(tmp_path / "s")
    stage_data(study, DataConfig(source=str(films), patient_rule="none", resolution=32))
    finding = patients_finding(study)
    assert finding["level"] == "warning"
    assert f"known for 0 of {len(film_rows(films))} images" in finding["found"]


# -- other tables and documents that people bring


PROMPTS = [("image_id", "prompt"), ("a", "a chest xray"), ("b", "größere Lunge")]


@pytest.mark.parametrize("separator", ",;\t")
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_prompts_from_a_spreadsheet(tmp_path, separator, encoding):
    text = "\r\n".join(separator.join(row) for row in PROMPTS)
    (tmp_path / "p.csv").write_bytes(text.encode(encoding))
    assert read_prompts(tmp_path / "p.csv", ["b", "a"])[0] == ["a chest xray", "größere Lunge"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a,b\n1,2\n",
        "image_id,prompt\n",
        "image_id,prompt\na,x\na,y\n",
        "image_id,prompt\n,x\n",
        "\0",
    ],
)
def test_prompts_of_another_form(tmp_path, text):
    (tmp_path / "p.csv").write_text(text)
    assert "p.csv" in refusal(read_prompts, tmp_path / "p.csv", ["a"])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_card_of_other_editors(tmp_path, encoding):
    (tmp_path / "c.json").write_bytes('{"name": "Klinik Süd"}'.encode(encoding))
    assert read_card(str(tmp_path / "c.json")).name == "Klinik Süd"


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"name": 1}', '{"nam": "x"}', '{"name": "x", "name": "y"}']
)
def test_card_of_another_form(tmp_path, text):
    (tmp_path / "c.json").write_text(text)
    assert "c.json" in refusal(read_card, str(tmp_path / "c.json"))


# -- caches


ARRAYS = {
    "cut": lambda raw: raw[:90],
    "cut in the numbers": lambda raw: raw[:-150],
    "empty": lambda raw: b"",
    "junk": lambda raw: bytes(range(256)),
    "an archive": lambda raw: b"PK\x03\x04" + raw,
    "a text": lambda raw: b"hello",
    "another header": _swap(b"descr", b"descx"),
}


class Bomb:
    "What runs when it is unpickled."

    def __reduce__(self):
        return os.mkdir, ("it-has-run",)


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("what", [*ARRAYS, "a pickle", "an array of objects"])
def test_damaged_array_is_made_anew(tmp_path, monkeypatch, capsys, what, mmap):
    import pickle

    import numpy as np

    monkeypatch.chdir(tmp_path)
    right = cached(tmp_path / "c", "x", dict(a=1), lambda: np.arange(50), mmap)
    path = next((tmp_path / "c").glob("*.npy"))
    raw = path.read_bytes()
    if what == "an array of objects":
        np.save(path, np.array([Bomb()], dtype=object), allow_pickle=True)
    else:
        del right
        path.write_bytes(pickle.dumps(Bomb()) if what == "a pickle" else ARRAYS[what](raw))
    assert path.name in refusal(read_array, path, mmap)
    assert cached(tmp_path / "c", "x", dict(a=1), lambda: np.arange(50), mmap).tolist() == list(
        range(50)
    )
    said = capsys.readouterr()
    assert len((said.out + said.err).strip().splitlines()) == 1 and "made anew" in said.err
    assert path.read_bytes() == raw and not (tmp_path / "it-has-run").exists()


@pytest.mark.parametrize("what", [*ANY, *DOCUMENT])
def test_damaged_record_is_made_anew(tmp_path, what):
    path = tmp_path / "r.json"
    right = recorded(path, "key", lambda: dict(value=1))
    path.write_bytes((ANY | DOCUMENT)[what](path.read_bytes()))
    assert recorded(path, "key", lambda: dict(value=1)) == right
    assert read_json(path) == right


# -- any bytes at all


def spoilt(raw):
    "A file, with some bytes replaced, removed or put in between."
    edit = st.tuples(st.integers(0, len(raw)), st.integers(0, 40), st.binary(max_size=12))

    def apply(edits):
        out = raw
        for at, gone, new in edits:
            out = out[:at] + new + out[at + gone :]
        return out

    return st.lists(edit, min_size=1, max_size=3).map(apply)


FUZZED = {
    "t.csv": (
        b"image_id,patient_id,split,label,prob\na,p,val,0,0.25\nb,q,val,1,0.5\nc,q,internal,1,1e-05\n",
        lambda path: read_csv(path, PredictionRow),
        lambda path: read_frame(path, PredictionRow),
    ),
    "o.json": (
        json.dumps(
            dict(
                plan_sha256="0" * 64,
                opened=[
                    dict(date="d", exploratory=False, plan_sha256="0" * 64, tests_sha256="1" * 64)
                ],
            )
        ).encode(),
        lambda path: read_json(path, OpenedLog),
    ),
    "p.json": (json.dumps(Plan().to_json()).encode(), lambda path: read_json(path, Plan)),
    "l.jsonl": (
        b'{"seed": 1}\n{"seed": 2}\n',
        read_lines,
        lambda path: read_lines(path, growing=True),
    ),
    "who.csv": (
        b"image,patient_id\na.png,p\nb.png,q\n",
        lambda path: read_patients(["a.png", "b.png"], path),
    ),
}


@pytest.mark.parametrize("name", FUZZED)
def test_any_bytes_are_read_or_refused(tmp_path, name):
    raw, *reads = FUZZED[name]
    path = tmp_path / name

    @settings(
        max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(spoilt(raw) | st.binary(max_size=200))
    def check(data):
        path.write_bytes(data)
        for read in reads:
            try:
                found = read(path)
            except CxrError as e:
                assert name in str(e)
            else:
                assert found is not None

    check()

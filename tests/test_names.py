"File and folder names: who is on which film, which folders are meant, what may not be a name."

import hashlib, os, random, shutil, sys, time, unicodedata, uuid

import numpy as np, pytest
from PIL import Image

from cxr_synth.base.files import CxrError
from cxr_synth.base.records import Study
from cxr_synth.base.settings import DataConfig
from cxr_synth.data.names import find_patient_part
from cxr_synth.data.sources import check_names, folder_source, folders_above, patients_by_regex
from cxr_synth.data.survey import LONGEST_ID, image_ids, inspect_source
from cxr_synth.images.phantom import draw_phantom, write_phantoms
from cxr_synth.protocol.dataset import KERMANY, find_card, parse_name
from cxr_synth.stages.data import stage_data

CLASSES = "NORMAL", "PNEUMONIA"


def films(form, patients=40, most=3, split=("",)):
    "Paths of a set: one to `most` films of each patient, named by a form."
    r, paths = random.Random(0), []
    for p in range(patients):
        for f in range(r.randint(1, most)):
            name = form.format(p=p, f=f, s=f // 2, letter="abc"[f], day=10 + f)
            paths.append(f"{split[p % len(split)]}{CLASSES[p % 2]}/{name}.png")
    return paths


CODES = [uuid.uuid5(uuid.NAMESPACE_URL, str(k)) for k in range(5000)]
SHARDS = [
    f"NORMAL/p1{p % 9}/p1{p % 9}00{p:04d}/s{p:03d}{f}/{CODES[3 * p + f]}.png"
    for p in range(60)
    for f in range(3)
]
TELLING = {
    "NIH": films("{p:08d}_{f:03d}"),
    "NIH, official split": films("{p:08d}_{f:03d}", split=("train/", "test/")),
    "CheXpert": films("patient{p:05d}_study{s}_view{f}_frontal"),
    "CheXpert, folders": films("patient{p:05d}/study{s}/view{f}_frontal"),
    "MIMIC": films("p1{p:07d}_s5{p:04d}{s:03d}_02aa804e-bde0afdd-1234abcd-0000000{f}"),
    "MIMIC, folders": SHARDS,
    "BIMCV": films("sub-S{p:05d}_ses-E{s:05d}_run-{f}_bp-chest"),
    "folder per patient": films("P{p:03d}/img{f}"),
    "letters": films("{p:04d}{letter}"),
    "dates behind": films("{p:05d}_202001{day}"),
    "date before": films("20200115_{p:05d}_{f}"),
    "UID": films("1.2.840.113619.{p}.{f}"),
    "UUID per patient": [f"NORMAL/{c}_{f}.png" for c in CODES[:40] for f in range(3)],
    "names": [
        f"NORMAL/{n}_{f}.png"
        for n in [
            "ann",
            "bob",
            "cid",
            "dan",
            "eve",
            "fay",
            "gus",
            "hal",
            "ian",
            "joy",
            "kay",
            "leo",
            "mia",
        ]
        for f in range(3)
    ],
    "dashes": films("pt-{p}-film-{f}"),
    "spaces": films("patient {p} ({f})"),
    "slices": [f"NORMAL/patient{p:03d}_slice_{f:03d}.png" for p in range(20) for f in range(40)],
    "one in ten twice": [
        f"NORMAL/{p:05d}_{f}.png" for p in range(200) for f in range(1 + (p % 10 == 0))
    ],
}


def above(paths):
    return [folders_above(path) for path in paths]


@pytest.mark.parametrize("kind", TELLING)
def test_names_that_tell_patients_stop(kind):
    "The rule that the message shows makes the groups that it promises, and is accepted."
    paths = TELLING[kind]
    part = find_patient_part(paths, above(paths))
    found = patients_by_regex(paths, part.rule)
    assert len(set(found)) == part.patients < len(paths)
    check_names(paths, part.rule)
    check_names(paths, "none")
    with pytest.raises(CxrError) as e:
        check_names(paths)
    said = str(e.value)
    assert part.rule in said and part.path in said and f"{part.patients:,}" in said
    assert "--data.patient-rule none" in said and len(said.splitlines()) <= 5
    truth = {"NIH": 40, "MIMIC, folders": 60, "slices": 20, "one in ten twice": 200}
    assert part.patients == truth.get(kind, part.patients)


def flat(names):
    return [f"{CLASSES[k % 2]}/{name}.png" for k, name in enumerate(names)]


R = random.Random(1)
DAYS = [f"2020{R.randint(1, 12):02d}{R.randint(1, 28):02d}" for _ in range(300)]
SILENT = {
    "Kaggle": flat(
        [f"person{p}_{k}_{f}" for p in range(40) for k in ("virus", "bacteria") for f in range(2)]
    ),
    "Kaggle, normal": flat([f"IM-{p:04d}-000{f}" for p in range(50) for f in range(2)]),
    "DOI": flat([f"VIRUS-{p}-000{f}" for p in range(900, 950) for f in range(3)]),
    "plain": flat([f"IMG_{k:04d}" for k in range(200)]),
    "bare numbers": flat([str(k) for k in range(200)]),
    "anew in each folder": [
        f"{s}/{c}/{k:03d}.png" for s in ("train", "test") for c in CLASSES for k in range(99)
    ],
    "kind and number": [
        f"PNEUMONIA/{x}_{k:04d}.png" for x in ("virus", "bacteria") for k in range(80)
    ],
    "UUID": flat(map(str, CODES)),
    "hashes": flat([hashlib.md5(str(k).encode()).hexdigest() for k in range(3000)]),
    "short hashes": flat([f"{R.getrandbits(32):08x}" for _ in range(3000)]),
    "fixed beginning": flat([f"hospital_A_{k:05d}" for k in range(300)]),
    "dates": flat([f"{day}_{k:04d}" for k, day in enumerate(DAYS)]),
    "dates with dashes": flat(
        [f"scan-{d[:4]}-{d[4:6]}-{d[6:]}-{k:04d}" for k, d in enumerate(DAYS)]
    ),
    "times": flat(
        [f"IMG_{day}_1{k % 10}{k % 60:02d}{k * 7 % 60:02d}" for k, day in enumerate(DAYS)]
    ),
    "folds": flat([f"fold{k % 10}_{k:04d}" for k in range(300)]),
    "years": [f"NORMAL/{y}/{k:04d}.png" for y in range(2005, 2021) for k in range(20)],
    "label behind": flat([f"CHNCXR_{k:04d}_{k % 2}" for k in range(600)]),
    "size behind": flat([f"{k:04d}_{500 + k % 37}x{600 + k % 41}" for k in range(600)]),
    "two copies": flat([f"IMG_{k:04d}" for k in range(100)] + ["IMG_0003 (1)", "IMG_0009 (1)"]),
    "two films": ["NORMAL/00000013_005.png", "NORMAL/00000013_006.png"],
    "not UTF-8": flat([os.fsdecode(b"caf\xe9_%04d" % k) for k in range(99)]),
}


@pytest.mark.parametrize("kind", SILENT)
def test_no_false_alarm(kind):
    check_names(SILENT[kind])


# --- the set's own distribution at its DOI


@pytest.mark.parametrize("kind", ["bacteria", "virus", "normal"])
@pytest.mark.parametrize("name", ["{}-1008087-0001", "{}-28501-0012", "{}-1008087-0001 (1)"])
def test_names_at_the_doi(kind, name):
    number = name.split("-")[1]
    assert parse_name(name.format(kind.upper())) == (kind, f"{kind}-{number}")


def test_the_card_of_the_doi():
    names = [f"{k}-{p}-0001" for k in ("NORMAL", "VIRUS") for p in range(1008000, 1008020)]
    assert find_card("folder", stems=names) == KERMANY
    assert find_card("folder", stems=[*names, "IMG_0001"]) != KERMANY
    assert find_card("folder", stems=names[:20]) != KERMANY  # one kind: anybody's


# --- rules


NIH = films("{p:08d}_{f:03d}")
HALF = NIH + [f"NORMAL/IMG{k}.png" for k in range(len(NIH))]
BAD_RULES = [
    (
        HALF,
        r"(\d+)_\d+",
        f"fits {len(NIH)} of {2 * len(NIH)} names, but not {len(NIH)}, such as NORMAL/IMG0",
    ),
    (NIH, r"(\d+)_000", "fits 40 of"),
    (NIH, r"person(\d+)", "fits none of"),
    (NIH, r"\d+_\d+", "has 0 groups"),
    (NIH, r"(\d+)_(\d+)", "has 2 groups"),
    (NIH, r"(?P<p>\d+)_(?P<f>\d+)", "has 2 groups"),
    (NIH, r"(x*)\d+_", "finds nothing in"),
    (NIH, r"(x)?\d+_", "finds nothing in"),
    (NIH, r"(.*?)", "finds nothing in"),
    (NIH, r"\.(png)", "finds one patient, 'png', in all"),
    (NIH, r"(\d{4})\d{4}_", "finds one patient, '0000', in all"),
    (NIH, r"(\d+_\d+)", "finds another patient in each of"),
    (NIH, r"(.*)", "finds another patient in each of"),
    (NIH, "(", "is no regular expression"),
    (NIH, "[", "is no regular expression"),
    (NIH, "(?P<", "is no regular expression"),
    (NIH, r"(a)\2", "is no regular expression"),
    (NIH, "*", "is no regular expression"),
]


@pytest.mark.parametrize(("paths", "rule", "says"), BAD_RULES)
def test_bad_rules(paths, rule, says):
    with pytest.raises(CxrError, match="--data.patient-rule") as e:
        check_names(paths, rule)
    assert says in str(e.value) and len(str(e.value).splitlines()) <= 5


@pytest.mark.parametrize(
    "rule",
    [
        "(a+)+$",
        "((a|aa)+)$".replace("((", "(").replace(")+)", ")+"),
        "([a-z]*)*[0-9]{9}",
        "(?:(?:a*)*)*(b)",
    ],
)
def test_a_rule_that_would_never_end(rule):
    paths = [f"NORMAL/{'a' * 60}{k}!.png" for k in range(50)]
    start = time.monotonic()
    with pytest.raises(CxrError, match="--data.patient-rule"):
        patients_by_regex(paths, rule)
    assert time.monotonic() - start < 15


def test_every_film_another_patient_may_be_true():
    paths = flat([f"IMG_{k:04d}" for k in range(50)])
    check_names(paths, r"_(\d+)")
    assert len(set(patients_by_regex(paths, r"_(\d+)"))) == 50


# --- folders of classes


def fill(folder, n=3, first=0, suffix=".png"):
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(n):
        Image.fromarray(draw_phantom(first + k, 0, 0, size=32)).save(
            folder / f"f{first + k}{suffix}"
        )


@pytest.fixture
def mine(tmp_path):
    "Three class folders and one of other pictures."
    for k, name in enumerate(("CLEAR", "BACTERIA", "VIRUS", "LATERAL")):
        fill(tmp_path / "mine" / name, first=10 * k)
    return tmp_path / "mine"


@pytest.mark.parametrize(
    ("classes", "says"),
    [
        ("normal=CLEAR,pneumonia=BACTERIA+VIRUSS", "'VIRUSS'"),
        ("normal=CLEAR,pneumonia=BACTERIA+VIRUSS", "Did you mean VIRUS?"),
        ("normal=CLAER,pneumonia=BACTERIA+VIRUS", "Did you mean CLEAR?"),
        ("normal=CLEAR,pneumonia=BACTERIA+FUNGUS+VIRUS", "'FUNGUS'"),
        ("normal=CLEAR+X1+X2,pneumonia=BACTERIA", "'X1', 'X2'"),
        ("normal=CLEAR,pneumonia=CLEAR", "Twice: clear"),
        ("normal=CLEAR,pneumonia=VIRUS+virus", "Twice: virus"),
        ("healthy=CLEAR,pneumonia=VIRUS", "Unknown: 'healthy'"),
        ("normal=CLEAR,pneumonia=", "does not name both classes"),
        ("normal=,pneumonia=VIRUS", "does not name both classes"),
        ("CLEAR,VIRUS", "does not name both classes"),
        ("normal=CLEAR,pneumonia=BACTERIA+VIRUS+EMPTY", "no images in EMPTY"),
        ("normal=A,pneumonia=B", "has no class folders"),
    ],
)
def test_class_names_that_are_not_there(mine, classes, says):
    (mine / "EMPTY").mkdir()
    with pytest.raises(CxrError) as e:
        folder_source(mine, classes)
    assert says in str(e.value) and len(str(e.value).splitlines()) <= 5


def test_a_class_name_in_one_split_only_may_be(tmp_path):
    for name in ("train/CLEAR", "train/VIRUS", "train/BACTERIA", "test/CLEAR", "test/VIRUS"):
        fill(tmp_path / name)
    assert folder_source(tmp_path, "normal=CLEAR,pneumonia=BACTERIA+VIRUS").rows
    with pytest.raises(CxrError, match="'VIRUSES'.*\n.*BACTERIA, CLEAR, VIRUS"):
        folder_source(tmp_path, "normal=CLEAR,pneumonia=BACTERIA+VIRUSES")


def test_what_is_left_out_is_said(mine):
    fill(mine / "nested" / "VIRUS")
    fill(mine, 1, 90)
    (mine / "VIRUS/notes.txt").write_text("x")
    (mine / "VIRUS/a.gif").write_text("x")
    (mine / "CLEAR/x.png").mkdir()
    if sys.platform != "win32":
        os.mkfifo(mine / "CLEAR/pipe.png")
        (mine / "CLEAR/round").symlink_to(mine)
    notes = " ".join(folder_source(mine, "normal=CLEAR,pneumonia=BACTERIA+VIRUS").notes)
    for word in ("LATERAL", "nested", "f90.png", "1 .gif, 1 .txt", "x.png", "pipe.png", "round"):
        assert word in notes


def test_an_empty_set_says_what_it_holds(tmp_path):
    for name in ("NORMAL", "PNEUMONIA"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.gif").write_text("x")
        (tmp_path / name / "Thumbs.db").write_text("x")
    with pytest.raises(CxrError, match="is empty") as e:
        folder_source(tmp_path)
    assert "2 .gif." in str(e.value) and "thumbs" not in str(e.value).lower()


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege")
@pytest.mark.parametrize("what", ["files", "folders"])
def test_all_links_as_in_the_hubs_cache(tmp_path, what):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    for name in ("NORMAL", "PNEUMONIA"):
        fill(blobs / name)
        if what == "folders":
            snapshot.mkdir(exist_ok=True)
            (snapshot / name).symlink_to(blobs / name)
        else:
            (snapshot / name).mkdir(parents=True)
            for p in (blobs / name).iterdir():
                (snapshot / name / p.name).symlink_to(p)
    with pytest.raises(CxrError, match="all 6 images in .* are links") as e:
        folder_source(snapshot)
    assert f"cp -rL {snapshot}" in str(e.value) and "--local-dir" in str(e.value)
    assert len(str(e.value).splitlines()) <= 5


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege")
@pytest.mark.parametrize("to", ["outside", "nowhere", "itself", "inside"])
def test_one_link(tmp_path, to):
    drawn = write_phantoms(tmp_path / "set", patients=40, size=32)
    fill(tmp_path / "outside", 1, 500)
    link = drawn / "train/NORMAL/IM-9000-0001.png"
    fill(drawn / "LATERAL", 1, 600)
    target = dict(
        outside=tmp_path / "outside/f500.png", nowhere=tmp_path / "none", itself=link.name
    )
    link.symlink_to(target.get(to, "../../LATERAL/f600.png"))
    cfg = DataConfig(source=str(drawn), workers=1)
    if to == "inside":
        assert "IM-9000-0001" in set(inspect_source(folder_source(drawn), cfg)[0].image_id)
        return
    with pytest.raises(CxrError, match="IM-9000-0001.png"):
        inspect_source(folder_source(drawn), cfg)


# --- names as files


def test_ids_differ_on_every_file_system():
    accent = unicodedata.normalize("NFC", "é"), unicodedata.normalize("NFD", "é")
    paths = ["a/x.png", "a/X.png", "b/x.PNG", "a/x.jpg", "a/STRASSE.png", "a/straße.png"]
    paths += [f"a/{c}.png" for c in accent] + ["a/" + "n" * 240 + f"{k}.png" for k in range(3)]
    paths += ["a/" + "é" * 120 + ".png", os.fsdecode(b"a/caf\xe9.png")]
    ids = image_ids(paths)
    keys = {unicodedata.normalize("NFC", i).casefold() for i in ids}
    assert len(keys) == len(paths)
    assert all(len(i.encode(errors="surrogateescape")) <= LONGEST_ID for i in ids)
    assert image_ids(["a/IM-0001-0001.png"]) == ["IM-0001-0001"]


def test_long_and_odd_names_go_through_the_stage(tmp_path):
    drawn = write_phantoms(tmp_path / "set", patients=40, size=32)
    folder, names = (
        drawn / "train/NORMAL",
        ["n" * 245, "a b", "%41", "#1", "ü", "a,b", 'q"q', "-rf", "a\nb"],
    )
    for k, name in enumerate(names):
        Image.fromarray(draw_phantom(700 + k, 0, 0, size=32)).save(folder / f"{name}.png")
    (folder / os.fsdecode(b"caf\xe9.png")).write_bytes((folder / "ü.png").read_bytes())
    study = Study(tmp_path / "study")
    cfg = DataConfig(source=str(drawn), on_bad="skip", workers=1, resolution=32)
    stage_data(study, cfg)
    stage_data(study, cfg)  # again: done, though one name is not UTF-8
    made = [p.stem for p in (study / "data/images").glob("*.png")]
    assert set(names[1:]) <= set(made) and len(made) == len(folder_source(drawn).rows) - 1


# --- hardly any data


def tiny(folder, normal, ill, name="{c}{k}", same=False):
    for c, n in (("NORMAL", normal), ("PNEUMONIA", ill)):
        (folder / c).mkdir(parents=True)
        for k in range(n):
            x = draw_phantom(0 if same else 100 * len(c) + k, 0, 0, size=32)
            Image.fromarray(x).save(folder / c / f"{name.format(c=c, k=k)}.png")
    return DataConfig(source=str(folder), workers=1)


@pytest.mark.parametrize(
    ("make", "rule", "says"),
    [
        (dict(normal=0, ill=12), "", "only pneumonia images"),
        (dict(normal=12, ill=0), "", "only normal images"),
        (dict(normal=0, ill=0), "", "is empty"),
        (dict(normal=1, ill=1), "", "too few patients to divide"),
        (dict(normal=1, ill=12), "", "no normal in"),
        (dict(normal=12, ill=3), "", "no pneumonia in"),
        (dict(normal=12, ill=12, same=True), "", "1 different pictures"),
        (dict(normal=12, ill=12, name="ann_{c}{k}"), "(ann)_", "finds one patient, 'ann'"),
        (dict(normal=12, ill=12, name="IM-0001-{k:04d}"), "", "24 images of 1 patients"),
    ],
)
def test_hardly_any_data(tmp_path, make, rule, says):
    cfg = tiny(tmp_path / "set", **make)
    cfg = DataConfig(source=cfg.source, workers=1, patient_rule=rule)
    with pytest.raises(CxrError) as e:
        stage_data(Study(tmp_path / "study"), cfg)
    assert says in str(e.value) and len(str(e.value).splitlines()) <= 5
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize("value", [0, 3, 128, 255])
@pytest.mark.parametrize("n", [1, 6])
def test_images_of_one_grey(tmp_path, value, n):
    "One is a matter for the audit; many stop the stage, counted, with an example."
    cfg = tiny(tmp_path / "set", 12, 12)
    for k in range(n):
        x = np.full((32, 32), value, np.uint8)
        x[0, k] = 255 - value  # no copies of one another
        Image.fromarray(x).save(tmp_path / f"set/NORMAL/NORMAL{k}.png")
    if n == 1:
        inspect_source(folder_source(cfg.source), cfg)
        return
    with pytest.raises(CxrError, match="6 of 24 images show nothing.*NORMAL0.png"):
        inspect_source(folder_source(cfg.source), cfg)


# --- through the command line


@pytest.mark.parametrize("source", ["s", "s/data", "s/data/images", "s/synthetic", "s/cache", "."])
def test_data_within_the_study_stay(cxr_synth_command, tmp_path, source, monkeypatch):
    monkeypatch.chdir(tmp_path)
    home = tmp_path / source
    shutil.copytree(
        write_phantoms(tmp_path / "drawn", patients=20, size=32), home, dirs_exist_ok=True
    )
    shutil.rmtree(tmp_path / "drawn")

    def state():
        return {
            p: (p.stat().st_mtime_ns, p.read_bytes()) for p in tmp_path.rglob("*") if p.is_file()
        }

    before = state()
    run = cxr_synth_command("data", "s", "--data", home)
    assert run.status == 2 and state() == before
    assert "one lies in the other" in run.err and len(run.err.splitlines()) <= 5


def test_the_command_stops_and_shows_the_rule(cxr_synth_command, tmp_path):
    for path in TELLING["NIH"]:
        (tmp_path / "set" / path).parent.mkdir(parents=True, exist_ok=True)
        k = int(hashlib.md5(path.encode()).hexdigest()[:4], 16)
        Image.fromarray(draw_phantom(k, 0, 0, size=32)).save(tmp_path / "set" / path)
    told = cxr_synth_command("data", tmp_path / "s", "--data", tmp_path / "set")
    assert told.status == 2 and not (tmp_path / "s").exists()
    rule = told.err.split("--data.patient-rule '")[1].split("'")[0]
    for name, given in (("a", rule), ("b", "none")):
        words = ("--data.patient-rule", given, "--data.resolution", "32")
        run = cxr_synth_command("data", tmp_path / name, "--data", tmp_path / "set", *words)
        assert run.status == 0, run.err
    ids = {n: (tmp_path / n / "data/manifest.csv").read_text() for n in "ab"}
    assert "patient-00000039" in ids["a"] and "file-00000039_000" in ids["b"]


def test_the_audit_says_that_nobody_is_known(tmp_path):
    "Also where the names would tell, but the user says that they do not."
    from cxr_synth.base.readers import read_json

    drawn = write_phantoms(tmp_path / "set", patients=20, size=32)
    study = Study(tmp_path / "study")
    stage_data(study, DataConfig(source=str(drawn), patient_rule="none", workers=1, resolution=32))
    found = {f["name"]: f["found"] for f in read_json(study / "data/audit.json")["findings"]}
    assert "file names tell no patient" in found["patients"]

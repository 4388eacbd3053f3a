"Packs that were forged, damaged, interrupted or sent to a full disk; a push to a local stand-in of the Hub."

import base64, json, os, random, shutil, stat, subprocess, sys, threading, time, zipfile, zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from cxr_synth.ship import pack as packing
from cxr_synth.base.files import CxrError, digest_file, write_csv, write_json
from cxr_synth.base.records import Study, open_stage, stale_stages
from cxr_synth.base.settings import GenerateConfig, TrainConfig
from cxr_synth.protocol.dataset import CARDS, FILE, dataset_card, write_card_file
from cxr_synth.ship.hub_push import push
from cxr_synth.ship.pack import SUMS, cli_pack, cli_unpack, mirror_file, pack, unpack
from cxr_synth.ship.set_card import write_card

NAME, TOKEN = "real010-rep0", "hf_standInTokenThatMustNotLeak"


def make_study(root, n=3):
    "A finished study whose synthetic images are noise, with every kind of file that a set may hold."
    study, meta = Study(root), []
    folder = study / "synthetic" / NAME
    write_json(study / "study.json", dict(name="demo", preset="tiny", source="hub"))
    write_csv(study / "data/manifest.csv", ["image_id"], [dict(image_id="a")])
    write_card_file(study, CARDS["kermany"])
    write_json(study / "plan.json", dict(sha256="0"))
    open_stage(study, "train", f"models/{NAME}", TrainConfig(), adopt=True).finish(
        n_real=31, n_patients=19
    )
    for label, cls in enumerate(("normal", "pneumonia")):
        (folder / cls).mkdir(parents=True)
        for k in range(n):
            Image.fromarray(
                np.random.default_rng([label, k]).integers(0, 255, (64, 64), dtype=np.uint8)
            ).save(folder / cls / f"{k:06d}.png")
            meta.append(
                dict(
                    file_name=f"{cls}/{k:06d}.png",
                    label=label,
                    class_name=cls,
                    prompt='a chest xray: "x" | y',
                    negative_prompt="",
                    seed=2**62 + k,
                    steps=15,
                    guidance_scale=3.0,
                    scheduler="DDIM",
                    base_model="tiny",
                    generator=NAME,
                    sha256=digest_file(folder / cls / f"{k:06d}.png"),
                )
            )
    (folder / "metadata.jsonl").write_text("".join(json.dumps(m) + "\n" for m in meta))
    write_csv(
        folder / "flags.csv",
        ["file_name", "reason", "by"],
        [dict(file_name="normal/000000.png", reason="constant", by="gate")],
    )
    open_stage(study, "generate", f"synthetic/{NAME}", GenerateConfig(), adopt=True).finish(
        resolution=64
    )
    return study


def files(root):
    return {
        p.relative_to(root).as_posix(): p.read_bytes()
        for p in sorted(Path(root).rglob("*"))
        if p.is_file()
    }


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return make_study(tmp_path_factory.mktemp("study") / "demo")


@pytest.fixture(scope="module")
def good(study):
    return pack(study)


# ---- what a pack must refuse


def rewrite(good, path, drop=(), add=(), change=lambda z: None):
    "The good pack with members dropped or added; `change` may lie in the zip's list."
    with zipfile.ZipFile(good) as a, zipfile.ZipFile(path, "w") as b:
        for i in a.infolist():
            if i.filename not in drop:
                b.writestr(i, a.read(i))
        for name, data in add:
            b.writestr(name, data)
        change(b)
    return path


def info(name, mode=0):
    i = zipfile.ZipInfo(name)
    i.external_attr = mode << 16
    return i


def bomb(z):
    "A member of some megabytes that truly unfolds to 10 GB."
    c = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = c.compress(bytes(10**7)) + c.flush(
        zlib.Z_FULL_FLUSH
    )  # blocks after a full flush stand alone: repeat one
    i = zipfile.ZipInfo("data/zeros.csv")
    z.writestr(i, block * 1000 + c.flush())
    i.compress_type = zipfile.ZIP_DEFLATED
    i.file_size = 10**10


def liar(z):
    bomb(z)
    z.NameToInfo["data/zeros.csv"].file_size = 10**6


def sharing(z):
    for i in z.infolist()[:3]:
        i.compress_size = i.file_size = 15_000


def locked(z):
    z.infolist()[1].flag_bits |= 1


def huge(z):
    z.infolist()[0].file_size = z.infolist()[0].compress_size = 3 * 10**11


FORGERIES = {
    "missing": (dict(drop=["plan.json"]), "'plan.json' is missing"),
    "extra": (dict(add=[("data/more.csv", b"x")]), "'data/more.csv' is an extra file"),
    "absolute": (dict(add=[("/etc/evil", b"x")]), "'/etc/evil' is an absolute path"),
    "climbs": (dict(add=[("synthetic/../../evil", b"x")]), "climbs out"),
    "drive": (dict(add=[("C:/evil", b"x")]), "'C:/evil' is a path with a Windows drive"),
    "backslash": (dict(add=[("data\\..\\..\\evil", b"x")]), "backslash"),
    "link": (
        dict(add=[(info("synthetic/x/y", stat.S_IFLNK | 0o777), b"/etc")]),
        "'synthetic/x/y' is a link",
    ),
    "device": (
        dict(add=[(info("synthetic/x/y", stat.S_IFCHR | 0o666), b"")]),
        "not an ordinary file",
    ),
    "twice": (dict(add=[("plan.json", b"{}")]), "'plan.json' is there twice"),
    "case": (dict(add=[("data/MANIFEST.csv", b"x")]), "is there twice"),
    "file-folder": (
        dict(add=[(f"synthetic/{NAME}/normal/000000.png/x", b"x")]),
        "a file and a folder at once",
    ),
    "elsewhere": (
        dict(add=[(".git/hooks/pre-commit", b"x")]),
        "in a place that a pack does not use",
    ),
    "checkpoint": (
        dict(add=[("models/a/checkpoints/base.pt", b"x")]),
        "in a place that a pack does not use",
    ),
    "bomb": (dict(change=bomb), "'data/zeros.csv' is a bomb"),
    "lying-bomb": (dict(change=liar), "'data/zeros.csv' is an extra file"),
    "declared": (dict(change=huge), "a bomb: it would unfold to 300 GB"),
    "shared-bytes": (dict(change=sharing), "its members share bytes"),
    "encrypted": (dict(change=locked), "encrypted"),
    "no-sums": (dict(drop=[SUMS]), "has no SHA256SUMS"),
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("case", FORGERIES)
def test_forged(good, tmp_path, case):
    how, why = FORGERIES[case]
    home = tmp_path / "outside" / "study"
    with pytest.raises(CxrError) as e:
        unpack(rewrite(good, tmp_path / "forged.zip", **how), Study(home))
    assert why in str(e.value) and len(str(e.value).splitlines()) <= 5
    assert not home.parent.exists() and sorted(p.name for p in tmp_path.iterdir()) == ["forged.zip"]


def test_lying_bomb_with_a_checksum_writes_no_more_than_it_declares(good, tmp_path):
    def lie(z):
        bomb(z)
        z.NameToInfo["data/zeros.csv"].file_size = 10**6

    path = rewrite(good, tmp_path / "lie.zip", drop=[SUMS], change=lie)
    with zipfile.ZipFile(good) as z:
        sums = z.read(SUMS)
    with zipfile.ZipFile(path, "a") as z:
        z.writestr(SUMS, sums + f"{'0' * 64}  data/zeros.csv\n".encode())
    with pytest.raises(CxrError, match="damaged"):
        unpack(path, Study(tmp_path / "s"))
    assert sum(p.stat().st_size for p in (tmp_path / "s").rglob("*") if p.is_file()) < 2 * 10**6
    assert [p.name for p in (tmp_path / "s").iterdir()] == [".unpack"]


def test_any_flipped_byte_is_refused_or_harmless(good, tmp_path):
    "Dates and the like are not covered by a checksum; contents and names are, wherever the byte is."
    raw = good.read_bytes()
    rng = random.Random(0)
    refused = 0
    with zipfile.ZipFile(good) as z:
        truth = {n: z.read(n) for n in z.namelist() if n != SUMS}
    tail = len(raw) - 2500  # the zip's list, where a flip can do most
    for k in [*rng.sample(range(tail), 80), *rng.sample(range(tail, len(raw)), 160)]:
        flipped = bytearray(raw)
        flipped[k] ^= 1 << rng.randrange(8)
        (tmp_path / "flipped.zip").write_bytes(flipped)
        home = tmp_path / f"s{k}"
        try:
            unpack(tmp_path / "flipped.zip", Study(home))
        except CxrError:
            refused += 1
            assert not [n for n in files(home) if not n.startswith(".unpack/")]
        else:
            assert files(home) == truth
        shutil.rmtree(home, ignore_errors=True)
    assert 120 < refused < 240


@pytest.mark.parametrize("content", [b"", b"PK", b"no zip at all" * 100])
def test_no_zip(tmp_path, content):
    (tmp_path / "x.zip").write_bytes(content)
    with pytest.raises(CxrError, match="damaged or only half there|is empty"):
        unpack(tmp_path / "x.zip", Study(tmp_path / "s"))


@pytest.mark.parametrize("what", ["folder", "study", "link to a folder"])
def test_a_folder_in_place_of_a_zip(good, study, tmp_path, what):
    "Neither read, nor written, nor copied as one; and the message says what it is."
    path = tmp_path / "p.zip"
    if what == "link to a folder":
        (tmp_path / "there").mkdir()
        path.symlink_to(tmp_path / "there")
    else:
        path.mkdir()
    if what == "study":
        (path / "study.json").write_text("{}")
    for job in (
        lambda: unpack(path, Study(tmp_path / "s")),
        lambda: mirror_file(path, tmp_path),
        lambda: pack(study, path),
    ):
        with pytest.raises(CxrError, match="p.zip is a folder"):
            job()
    with pytest.raises(CxrError, match="is a file"):
        unpack(good, Study(good))
    assert not (tmp_path / "s").exists()


def test_no_space(good, study, tmp_path, monkeypatch):
    monkeypatch.setattr(
        packing.shutil, "disk_usage", lambda p: shutil._ntuple_diskusage(10**9, 10**9, 1000)
    )
    with pytest.raises(CxrError, match="not enough space"):
        unpack(good, Study(tmp_path / "s"))
    with pytest.raises(CxrError, match="not enough space"):
        pack(study, tmp_path / "x.zip")
    with pytest.raises(CxrError, match="not enough space"):
        mirror_file(good, tmp_path)
    assert not list(tmp_path.iterdir())


# ---- never over other content


def test_other_content_stays(good, study, tmp_path):
    home = Study(tmp_path / "s")
    (home / "data").mkdir(parents=True)
    (home / "data/manifest.csv").write_text("mine")
    (home / "notes.txt").write_text("mine too")
    with pytest.raises(CxrError, match="data/manifest.csv"):
        unpack(good, home)
    assert files(home.root) == {"data/manifest.csv": b"mine", "notes.txt": b"mine too"}
    shutil.copy(study / "data/manifest.csv", home / "data/manifest.csv")
    assert unpack(good, home)["kept"] == 1
    assert (home / "notes.txt").read_text() == "mine too"


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_links_in_the_study(good, study, tmp_path):
    home = Study(tmp_path / "s")
    (tmp_path / "elsewhere").mkdir()
    home.root.mkdir()
    (home / "synthetic").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CxrError, match="leads out of the study by a link"):
        unpack(good, home)
    assert not list((tmp_path / "elsewhere").iterdir())
    copy = Study(shutil.copytree(study.root, tmp_path / "copy"))
    for rel in (f"synthetic/{NAME}/normal", "synthetic"):
        shutil.move(copy / rel, tmp_path / "moved")
        (copy / rel).symlink_to(tmp_path / "moved")
        with pytest.raises(CxrError, match="is a link"):
            pack(copy)
        (copy / rel).unlink()
        shutil.move(tmp_path / "moved", copy / rel)


# ---- killed and continued


def child(code, *args, **env):
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from cxr_synth.base.records import Study; "
            f"from cxr_synth.ship.pack import *; from cxr_synth.ship.hub_push import *; {code}",
            *map(str, args),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | env,
    )


def kill_when(p, ready):
    while p.poll() is None and not ready():
        time.sleep(0.0005)
    ended = p.poll()
    p.kill()
    out = p.communicate()[0]
    assert ended is None, out


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    return make_study(tmp_path_factory.mktemp("large") / "large", n=600)


def test_killed_pack(large, tmp_path):
    calm, out = digest_file(pack(large, tmp_path / "calm.zip")), tmp_path / "out.zip"

    def parts():
        return list(tmp_path.glob(".out.zip~?????~"))

    kill_when(
        child("pack(Study(sys.argv[1]), sys.argv[2])", large.root, out),
        lambda: any(p.stat().st_size > 10**6 for p in parts()),
    )
    assert not out.exists() and parts()
    assert digest_file(pack(large, out)) == calm and not parts()


def test_killed_unpack(large, tmp_path):
    file, home = pack(large, tmp_path / "large.zip"), tmp_path / "s"
    for cls in ("normal", "pneumonia"):
        (home / "synthetic" / NAME / cls).mkdir(parents=True)  # so that files are moved one by one

    def start():
        return child("unpack(sys.argv[1], Study(sys.argv[2]))", file, home)

    kill_when(start(), lambda: len(list(home.glob(f".unpack/*/synthetic/{NAME}/normal/*"))) > 300)
    assert not list(home.glob("synthetic/*/*/*.png"))
    kill_when(start(), lambda: (home / "synthetic" / NAME / "normal/000010.png").exists())
    assert (
        not (home / "synthetic" / NAME / "metadata.jsonl").exists()
        and not (home / "study.json").exists()
    )
    assert sum(unpack(file, Study(home)).values()) == len(zipfile.ZipFile(file).namelist()) - 1
    there = files(home)
    there.pop(f"synthetic/{NAME}/README.md")
    expected = {k: v for k, v in files(large.root).items() if not k.startswith("cache/")}
    assert {k: v for k, v in there.items() if not k.startswith("cache/")} == expected


def test_killed_mirror(large, tmp_path):
    file, drive = pack(large, tmp_path / "large.zip"), tmp_path / "drive"
    drive.mkdir()
    part = drive / ".large.zip.cxr-part"
    kill_when(
        child("mirror_file(sys.argv[1], sys.argv[2], block=100)", file, drive),
        lambda: part.exists() and part.stat().st_size > 10**6,
    )
    assert [p.name for p in drive.iterdir()] == [".large.zip.cxr-part"]
    kept = part.stat().st_size
    assert packing.resume_copy(file, part, 4096)[0] <= file.stat().st_size - kept + 2 * 8192
    with open(part, "r+b") as f:
        f.seek(5000)
        f.write(b"rotten")
    assert digest_file(mirror_file(file, drive)) == digest_file(file)
    assert [p.name for p in drive.iterdir()] == ["large.zip"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_mirror_to_a_full_or_read_only_folder(good, tmp_path):
    (tmp_path / ".demo.zip.cxr-part").symlink_to("/dev/full")
    with pytest.raises(CxrError, match="the disk is full"):
        mirror_file(good, tmp_path)
    with pytest.raises(CxrError, match="may not be written to|read-only|not enough space"):
        mirror_file(good, "/sys/kernel")
    with pytest.raises(CxrError, match="is no folder"):
        mirror_file(good, tmp_path / "not-mounted")


# ---- the card and the set


def test_unpacked_set_loads(good, study, tmp_path):
    from datasets import load_dataset

    unpack(good, Study(tmp_path / "s"))
    for how in (
        dict(path="imagefolder", data_dir=str(tmp_path / "s/synthetic" / NAME)),
        dict(path=str(tmp_path / "s/synthetic" / NAME)),
    ):
        ds = load_dataset(**how, split="train", cache_dir=str(tmp_path / "cache"))
        rows = {r["sha256"]: r for r in ds}
        for m in map(
            json.loads, (study / "synthetic" / NAME / "metadata.jsonl").read_text().splitlines()
        ):
            row = rows.pop(m["sha256"])
            assert np.array_equal(
                np.array(row.pop("image")),
                np.array(Image.open(study / "synthetic" / NAME / m.pop("file_name"))),
            )
            assert row == m
        assert not rows


def test_card_facts_and_header(study, tmp_path):
    from huggingface_hub import DatasetCard

    copy = Study(shutil.copytree(study.root, tmp_path / "copy"))
    card = DatasetCard.load(write_card(copy, NAME))
    assert card.data.license == "cc-by-4.0" and "not-for-clinical-use" in card.data.tags
    for fact in (
        "Not for clinical use",
        "10 % of the training patients, replicate 0: 19 patients, 31 images",
        "doi.org/10.17632/rscbjbr9sj",
        "quality gate: 1 marked (constant: 1)",
        "copy report: not made",
    ):
        assert fact in card.text, fact


def test_card_of_unknown_images_claims_nothing(study, tmp_path):
    from huggingface_hub import DatasetCard

    copy = Study(shutil.copytree(study.root, tmp_path / "copy"))
    (copy / FILE).unlink()
    (copy / "data/manifest.csv").unlink()
    write_json(copy / "study.json", dict(name="demo", preset="tiny", source="folder"))
    card = DatasetCard.load(write_card(copy, NAME))
    assert card.data.license == "unknown" and "unknown, ask the owner" in card.text
    for claim in ("Kermany", "CC BY", "hospital", "children"):
        assert claim not in card.text, claim


def test_facts_travel_in_the_pack(study, tmp_path):
    home = Study(tmp_path / "home")
    unpack(pack(study, tmp_path / "p.zip"), home)
    assert dataset_card(home) == CARDS["kermany"]


def test_card_makes_no_later_stage_stale(study, tmp_path):
    "README.md is documentation: `digest_folder` leaves it out."
    from cxr_synth.base.settings import QualityConfig

    copy = Study(shutil.copytree(study.root, tmp_path / "copy"))
    open_stage(
        copy, "quality", "quality", QualityConfig(), [f"synthetic/{NAME}"], adopt=True
    ).finish()
    write_card(copy, NAME)
    assert stale_stages(copy) == []


def test_command_line_texts(study, tmp_path):
    assert cli_pack(str(study.root), str(tmp_path / "a.zip")).startswith("16 files")
    assert cli_unpack(str(tmp_path / "a.zip"), str(tmp_path / "s")).startswith("16 files verified")
    assert "16 were there already" in cli_unpack(str(tmp_path / "a.zip"), str(tmp_path / "s"))


# ---- the Hub's stand-in


class Hub(BaseHTTPRequestHandler):
    "The few requests of the Hub's protocol that `upload_folder` makes. State is in the server object."

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, obj, status=200):
        body = json.dumps(obj).encode()
        self.send_response(status)
        for k, v in {
            "Content-Type": "application/json",
            "Content-Length": len(body),
            "X-Request-Id": "1",
        }.items():
            self.send_header(k, str(v))
        self.end_headers()
        self.wfile.write(body)

    def handle_request(self):
        s, path = self.server, self.path.split("?")[0]
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = b""
            while n := int(self.rfile.readline(), 16):
                body += self.rfile.read(n)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        s.seen.append((self.command, path))
        if path.startswith("/lfs/"):
            s.blobs[path[5:]] = body
            return self.answer({})
        if self.headers.get("Authorization") != f"Bearer {s.token}":
            return self.answer(dict(error="Invalid credentials"), 401)
        if s.read_only and self.command == "POST":
            return self.answer(dict(error="Forbidden: you need write rights"), 403)
        if path == "/api/repos/create":
            if s.private is not None:
                return self.answer(dict(error="exists", url=s.url + "/datasets/anna/lungs"), 409)
            b = json.loads(body)
            s.private = b.get("private", b.get("visibility") == "private")
            return self.answer(dict(url=s.url + "/datasets/anna/lungs"))
        if path.startswith("/api/datasets/anna/lungs") and s.private is None:
            return self.answer(dict(error="not found"), 404)
        if path in ("/api/datasets/anna/lungs", "/api/datasets/anna/lungs/revision/main"):
            return self.answer(dict(id="anna/lungs", sha="0" * 40, private=s.private, siblings=[]))
        if path.startswith("/api/datasets/anna/lungs/tree/"):
            return self.answer(
                [dict(type="file", path=p, size=len(c), oid="0" * 40) for p, c in s.files.items()]
            )
        if path == "/api/validate-yaml":
            return self.answer(dict(errors=[], warnings=[]))
        if path.startswith("/api/datasets/anna/lungs/preupload/"):
            return self.answer(
                dict(
                    files=[
                        dict(
                            path=f["path"],
                            uploadMode="lfs" if s.lfs and f["path"].endswith(".png") else "regular",
                            shouldIgnore=False,
                        )
                        for f in json.loads(body)["files"]
                    ]
                )
            )
        if path.endswith("/info/lfs/objects/batch"):
            return self.answer(
                dict(
                    transfer="basic",
                    objects=[
                        o | dict(actions=dict(upload=dict(href=f"{s.url}/lfs/{o['oid']}")))
                        for o in json.loads(body)["objects"]
                    ],
                )
            )
        if path.startswith("/api/datasets/anna/lungs/commit/"):
            if s.fail_commits:
                s.fail_commits -= 1
                return self.answer(dict(error="try later"), 503)
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    s.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                if line["key"] == "lfsFile":
                    s.files[line["value"]["path"]] = s.blobs[line["value"]["oid"]]
            return self.answer(
                dict(
                    commitUrl=f"{s.url}/datasets/anna/lungs/commit/{'1' * 40}",
                    commitOid="1" * 40,
                    success=True,
                )
            )
        self.answer(dict(error=f"the stand-in does not know {self.command} {path}"), 501)

    do_GET = do_POST = do_PUT = do_HEAD = handle_request


@pytest.fixture
def hub():
    s = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    s.url = f"http://127.0.0.1:{s.server_port}"
    s.token = TOKEN
    s.files = {}
    s.blobs = {}
    s.seen = []
    s.private = None
    s.lfs = True
    s.read_only = False
    s.fail_commits = 0
    threading.Thread(target=s.serve_forever, daemon=True).start()
    yield s
    s.shutdown()
    s.server_close()


def send(study, tmp_path, url, token=TOKEN, public=False, xet=False, repo="anna/lungs"):
    "Push in a fresh process (the library reads its endpoint when imported); the text that it printed."
    p = child(
        """
from cxr_synth.base.files import CxrError
try: print(cli_push(sys.argv[1], sys.argv[2], sys.argv[3], public=sys.argv[4] == "True"))
except CxrError as e: print("error:", e)""",
        study.root,
        NAME,
        repo,
        public,
        HF_ENDPOINT=url,
        HF_TOKEN=token,
        HF_HUB_OFFLINE="0",
        HF_HUB_DISABLE_XET=str(int(not xet)),
        HF_HOME=str(tmp_path / "hf"),
        HF_HUB_DISABLE_IMPLICIT_TOKEN="0",
        HF_DEBUG="1",
    )
    out = p.communicate()[0]
    assert p.returncode == 0, out
    assert TOKEN not in out and not any(TOKEN.encode() in c for c in files(study.root).values())
    assert not any(TOKEN.encode() in c for c in files(tmp_path).values())
    return out


@pytest.mark.parametrize("lfs", [True, False])
def test_push(study, tmp_path, hub, lfs):
    hub.lfs = lfs
    copy = Study(shutil.copytree(study.root, tmp_path / "copy"))
    assert "dry run, nothing is sent" in push(copy, NAME, "anna/lungs") and not hub.seen
    assert "10 files are at" in send(copy, tmp_path, hub.url, xet=not lfs)
    assert hub.private is True and hub.files == files(copy / "synthetic" / NAME)
    assert bool(hub.blobs) == lfs
    arrived = tmp_path / "arrived"
    for n, c in hub.files.items():
        (arrived / n).parent.mkdir(parents=True, exist_ok=True)
        (arrived / n).write_bytes(c)
    from datasets import load_dataset

    assert len(load_dataset(str(arrived), split="train", cache_dir=str(tmp_path / "cache"))) == 6
    assert "10 files are at" in send(
        copy, tmp_path, hub.url
    )  # again: nothing is lost, nothing refused


def test_push_goes_on_after_a_failure(study, tmp_path, hub):
    copy = Study(shutil.copytree(study.root, tmp_path / "copy"))
    hub.fail_commits = 1
    assert "answered with status 503" in send(copy, tmp_path, hub.url) and not hub.files
    assert "10 files are at" in send(copy, tmp_path, hub.url)


def test_push_refused(study, tmp_path, hub):
    copy = Study(shutil.copytree(study.root, tmp_path / "copy"))
    assert "does not accept the token" in send(copy, tmp_path, hub.url, token="hf_wrong")
    assert "no Hub token was found" in send(copy, tmp_path, hub.url, token="")
    hub.read_only = True
    assert "may not write to anna/lungs" in send(copy, tmp_path, hub.url)
    hub.read_only = False
    hub.private = False
    assert "is public" in send(copy, tmp_path, hub.url)
    hub.files["normal/000099.png"] = b"of another set"
    assert "such as normal/000099.png" in send(copy, tmp_path, hub.url, public=True)
    assert list(hub.files) == ["normal/000099.png"] and not hub.blobs
    assert "cannot be reached" in send(copy, tmp_path, "http://127.0.0.1:9")


def test_push_of_unknown_images_needs_a_licence(study, tmp_path, hub):
    copy = Study(shutil.copytree(study.root, tmp_path / "copy"))
    write_card_file(copy, CARDS["unknown"])
    write_card(copy, NAME)
    for dry in (True, False):
        with pytest.raises(CxrError, match="repeat with --licence"):
            push(copy, NAME, "anna/lungs", dry_run=dry)
    assert not hub.seen
    with pytest.raises(CxrError, match="names no licence"):
        push(copy, NAME, "anna/lungs", licence="unknown")
    told = push(copy, NAME, "anna/lungs", licence="CC BY-NC 4.0")
    assert "license: cc-by-nc-4.0" in told and "Licence of the real images: CC BY-NC 4.0." in told
    card = copy / "synthetic" / NAME / "README.md"
    card.write_text(
        card.read_text(encoding="utf-8").replace("## Use", "Thanks to Anna.\n\n## Use"),
        encoding="utf-8",
    )
    told = push(copy, NAME, "anna/lungs", licence="by permission of the clinic")
    assert "license: other\nlicense_name: by-permission-of-the-clinic" in told
    assert (
        "Licence of the real images: by permission of the clinic." in told
        and "Thanks to Anna." in told
    )


def test_a_card_of_an_older_version_is_not_published_with_its_claim(study, tmp_path):
    copy = Study(shutil.copytree(study.root, tmp_path / "copy"))
    write_card_file(copy, CARDS["unknown"])
    old = (
        "---\nlicense: cc-by-4.0\n---\nTrained on Kermany. These images are changed material in "
        "the sense of that licence: name the source.\n"
    )
    (copy / "synthetic" / NAME / "README.md").write_text(old, encoding="utf-8")
    with pytest.raises(CxrError, match="written by an older version"):
        push(copy, NAME, "anna/lungs", licence="MIT")


def test_a_known_licence_is_not_contradicted(study):
    with pytest.raises(CxrError, match="contradicts data/dataset.json: CC BY 4.0"):
        push(study, NAME, "anna/lungs", licence="MIT")


def test_push_offline_and_unfinished(study, tmp_path):
    copy = Study(shutil.copytree(study.root, tmp_path / "copy"))
    (copy / "synthetic" / NAME / "normal/000001.png").unlink()
    with pytest.raises(CxrError, match="missing, such as normal/000001.png"):
        push(copy, NAME, "anna/lungs")
    with pytest.raises(CxrError, match="missing, such as normal/000001.png"):
        pack(copy)

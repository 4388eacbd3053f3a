"""Pack, unpack and copy a study beside `cp -r` and plain hashing of the same files: medians of
several rounds in one process.

Small files measure calls, one large file measures bytes. Each round does all tasks one after the
other, so that a busy moment hits all alike; targets are removed outside the timed part.

"""

import json
import argparse, hashlib, os, shutil, statistics, subprocess, tempfile, time
from pathlib import Path

import numpy as np
from PIL import Image
from cxr_synth.ship import pack as packing
from cxr_synth.base.files import digest_file, write_json
from cxr_synth.base.records import Study
from cxr_synth.ship.pack import mirror_file, pack, unpack

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--images", type=int, default=5000, help="64-px PNGs of the small-file study")
parser.add_argument("--megabytes", type=int, default=1000, help="size of the large file, MB")
parser.add_argument("--rounds", type=int, default=5)
parser.add_argument(
    "--folder", default=None, help="where to work; the system's temporary folder by default"
)
args = parser.parse_args()
os.environ["CXR_QUIET"] = "1"


def small_study(root):
    "A finished set of PNGs: smoothed noise, which compresses about as well as a 64-px X-ray."
    folder = root / "synthetic/real100-rep0"
    lines = []
    rng = np.random.default_rng(0)
    for k in range(args.images):
        cls = ("normal", "pneumonia")[k % 2]
        path = folder / cls / f"{k // 2:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = Image.fromarray(rng.integers(0, 255, (32, 32), dtype=np.uint8))
        noise.resize((64, 64), Image.BICUBIC).save(path)
        line = {
            "file_name": f"{cls}/{path.name}",
            "label": k % 2,
            "class_name": cls,
            "base_model": "tiny",
            "generator": "real100-rep0",
            "sha256": digest_file(path),
        }
        lines.append(json.dumps(line) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))
    write_json(root / "study.json", dict(name="small", source="phantom"))
    return Study(root), packing.DEFAULT_PARTS


def large_study(root):
    "One large file, as a trained model is."
    path = root / "models/real100-rep0/normal/unet/weights.safetensors"
    path.parent.mkdir(parents=True)
    with open(path, "wb") as f:
        for _ in range(args.megabytes):
            f.write(os.urandom(10**6))
    write_json(root / "study.json", dict(name="large", source="phantom"))
    return Study(root), (*packing.DEFAULT_PARTS, "models")


def hash_all(root):
    for p in root.rglob("*"):
        if p.is_file():
            digest_file(p)


def copy_all(source, target, force):
    subprocess.run(["cp", "-r", source, target], check=True)
    if force:
        packing.force_to_disk(target)


def tasks(study, what, work):
    "Name -> call; each makes its own target anew."
    zipped = work / "x.zip"

    def gone(*ps):
        return [shutil.rmtree(p) if p.is_dir() else p.unlink() for p in ps if p.exists()]

    return {
        "cp -r": (lambda: copy_all(study.root, work / "copy", False), lambda: gone(work / "copy")),
        "cp -r, then fsync": (
            lambda: copy_all(study.root, work / "copy", True),
            lambda: gone(work / "copy"),
        ),
        "hashing alone": (lambda: hash_all(study.root), lambda: None),
        "pack": (lambda: pack(study, zipped, what), lambda: gone(zipped)),
        "unpack": (
            lambda: unpack(work / "kept.zip", Study(work / "home")),
            lambda: gone(work / "home"),
        ),
        "unpack again": (lambda: unpack(work / "kept.zip", Study(work / "there")), lambda: None),
        "copy to a folder": (
            lambda: mirror_file(work / "kept.zip", work / "drive"),
            lambda: gone(work / "drive/kept.zip"),
        ),
    }


def measure(title, study, what, work):
    (work / "drive").mkdir(parents=True)
    unpack(pack(study, work / "kept.zip", what), Study(work / "there"))
    sizes = [p.stat().st_size for p in study.root.rglob("*") if p.is_file()]
    seconds = {}
    for _ in range(args.rounds):
        for name, (call, clean) in tasks(study, what, work).items():
            clean()
            start = time.perf_counter()
            call()
            seconds.setdefault(name, []).append(time.perf_counter() - start)
    print(f"\n{title}: {len(sizes):,} files, {sum(sizes) / 1e6:,.1f} MB, {args.rounds} rounds")
    print(f"{'task':18} {'median s':>9} {'fastest s':>10} {'MB/s':>8} {'files/s':>9}")
    for name, s in seconds.items():
        m = statistics.median(s)
        print(
            f"{name:18} {m:9.3f} {min(s):10.3f} {sum(sizes) / 1e6 / m:8,.0f} {len(sizes) / m:9,.0f}"
        )


with tempfile.TemporaryDirectory(dir=args.folder) as tmp:
    block = os.urandom(10**8)
    start = time.perf_counter()
    hashlib.sha256(block).digest()
    print(f"sha256 of bytes in memory: {0.1 * 1e3 / (time.perf_counter() - start):,.0f} MB/s")
    if args.images:
        measure("small files", *small_study(Path(tmp) / "small"), Path(tmp) / "a")
    if args.megabytes:
        measure("one large file", *large_study(Path(tmp) / "large"), Path(tmp) / "b")

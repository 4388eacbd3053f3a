"Images that start from training films: drawn as diffusers draws them, resumable, and never passed on."

import shutil
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionImg2ImgPipeline
from PIL import Image

from cxr_synth.base.files import CxrError
from cxr_synth.base.readers import read_csv, read_json
from cxr_synth.base.records import Study, stale_stages
from cxr_synth.base.settings import (
    DataConfig,
    ExperimentsConfig,
    GenerateConfig,
    PlanConfig,
    QualityConfig,
    ReportConfig,
    TrainConfig,
    resolve,
)
from cxr_synth.classify.executors import precompute_shared
from cxr_synth.classify.recipes import RunContext, training_set
from cxr_synth.diffusion.decoder import Drawing, decode_drawn
from cxr_synth.diffusion.generator import train_generator
from cxr_synth.diffusion.image_set import load_model, regenerate_image
from cxr_synth.diffusion.image_writer import ImageSetWriter
from cxr_synth.diffusion.img2img_set import (
    Img2ImgConfig,
    Img2ImgSampler,
    drawn_steps,
    generate_img2img,
    regenerate_img2img,
)
from cxr_synth.diffusion.pipelines import load_pipeline, round_trip
from cxr_synth.images.study_images import load_images, load_synthetic, training_rows
from cxr_synth.protocol.arms import ParsedArm, parse_arm
from cxr_synth.protocol.plan import BLOCKS, STRENGTH_ARMS, TIERS, Cell, Plan, PlannedGenerator, Run
from cxr_synth.protocol.plan import load_plan, secondary_contrasts, tier_cells
from cxr_synth.protocol.sets import load_metadata
from cxr_synth.report.figures import load_quality
from cxr_synth.report.rehearsal import rehearse
from cxr_synth.report.strength import strength_points
from cxr_synth.ship.hub_push import push
from cxr_synth.ship.pack import _real_images, pack, unpack
from cxr_synth.ship.set_card import write_card
from cxr_synth.stages.data import stage_data
from cxr_synth.stages.generate import stage_generate
from cxr_synth.stages.plan import make_plan
from cxr_synth.stages.quality import stage_quality
from cxr_synth.stages.report import stage_report
from cxr_synth.stages.run import run
from conftest import SMALL

NAME, SET = "real050-rep0", "real050-rep0-img2img50"
CFG = dict(num_inference_steps=4, batch_size=3, threads=1, mixed_precision="no", device="cpu")
ARMS = ("real", "mixed", "img2img-strength50")
PLAN = Plan(
    arms=ARMS,
    cells=(Cell(0.5, 1, 2, ARMS),),
    pools={"mixed": 16},
    generators=(PlannedGenerator(NAME, 0.5, 0, images={"normal": 8, "pneumonia": 8}),),
)
WITHOUT = replace(PLAN, arms=ARMS[:2], cells=(Cell(0.5, 1, 2, ARMS[:2]),))


def generate(study, plan=PLAN, redo=False, **cfg):
    stage_generate(study, GenerateConfig(**CFG | cfg), redo, plan)


def contents(study, name=SET):
    "Every file of a set but its record, which has a date."
    folder = study / "synthetic" / name
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != "stage.json"]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "Half of 120 drawn patients, and a generator whose autoencoder has seen a few hundred images."
    study = Study(tmp_path_factory.mktemp("img2img") / "study")
    stage_data(study, DataConfig(patients=120, resolution=32))
    few = dict(vae_steps=60, base_steps=2, base_batch_size=4, max_train_steps=2, train_batch_size=4)
    few |= dict(mixed_precision="no", heldout_images=None, preview_steps=None, device="cpu")
    train_generator(study, NAME, TrainConfig(**few))
    return study


@pytest.fixture(scope="module")
def study(trained):
    "The same, with the sets of the plan."
    generate(trained)
    return trained


@pytest.fixture(scope="module")
def pipe(trained):
    cfg = Img2ImgConfig(**CFG)
    return load_model((trained / f"models/{NAME}/normal", None), "cpu", cfg)


def draw(study, pipe, items, size, **cfg):
    "The drawn pixels of some (seed, film), with calls of one size."
    cfg = Img2ImgConfig(**CFG | cfg)

    def films(ids):
        return load_images(study, ids)

    sampler = Img2ImgSampler(pipe, "a chest xray", 32, cfg, size, films)
    calls = [sampler(items[k : k + size]) for k in range(0, len(items), size)]
    return np.concatenate(calls)


# ------------------------------------------------------------------ the arm and the plan


def test_names():
    assert (
        parse_arm("img2img")
        == parse_arm("img2img-strength50")
        == ParsedArm("img2img", None, None, 50)
    )
    assert [parse_arm(f"img2img-strength{n}").strength for n in (5, 95)] == [5, 95]
    for name in ("4", "96", "0", "30-strength50", "x"):
        with pytest.raises(CxrError, match="unknown variant"):
            parse_arm(f"img2img-strength{name}")
    for name in ("mixed-strength30", "img2img-share25", "real-strength30"):
        with pytest.raises(CxrError, match="unknown variant"):
            parse_arm(name)


@pytest.mark.parametrize("asked", [0.05, 0.1])
def test_tiers(asked):
    "Three in the primary cell of fair and full, none elsewhere or in smaller tiers; no word of their own."
    for tier, about in TIERS.items():
        primary = asked if set(about["primary"]) <= set(BLOCKS) else about["primary"][0]
        cells = tier_cells(tier, primary)
        found = {c.fraction: [a for a in c.arms if a.startswith("img2img")] for c in cells}
        there = {f: arms for f, arms in found.items() if arms}
        assert there == ({primary: STRENGTH_ARMS} if tier in ("fair", "full") else {})
        family = secondary_contrasts(cells, primary, True)
        assert not any(c.arm.startswith("img2img") for c in family)
        more = tier_cells(tier, primary, ["img2img-strength50"])
        assert sum("img2img-strength50" in c.arms for c in more) == 1


def test_cost_counts_them(trained):
    cfg = PlanConfig(tier="lesson", pool=12, size=32)
    plain = make_plan(trained, cfg)
    plan = make_plan(trained, replace(cfg, arms="img2img-strength30 img2img-strength90"))
    assert [g.images for g in plan.generators] == [g.images for g in plain.generators]
    assert plan.cost["images"] == plain.cost["images"] + 2 * 2 * plan.pools["mixed"]
    assert plan.cost["runs"] == plain.cost["runs"] + 2 * 6
    assert plan.arms[-2:] == ("img2img-strength30", "img2img-strength90")
    assert not any(c.arm.startswith("img2img") for c in plan.secondary)


def test_none_with_a_known_generator(trained):
    plan = make_plan(trained, PlanConfig(tier="fair", pool=12, size=32, builtin="truth"))
    assert not {a for a in plan.arms if a.startswith("img2img")}
    with pytest.raises(CxrError, match="no autoencoder"):
        PlanConfig(arms="img2img-strength30", builtin="truth").check()


# ------------------------------------------------------------------ one image


@pytest.mark.parametrize("strength", [30, 50, 95])
def test_an_image_is_what_diffusers_draws_by_hand(study, pipe, strength):
    "The pipeline as diffusers loads it, one image, the prompt as text, the film encoded here."
    film = training_rows(study, 0.5, 0).image_id[5]
    folder = study / f"models/{NAME}/normal"
    plain = StableDiffusionImg2ImgPipeline.from_pretrained(folder, safety_checker=None)
    plain.scheduler = DPMSolverMultistepScheduler.from_config(plain.scheduler.config)
    grey = np.asarray(Image.open(study / f"data/images/{film}.png").convert("L"), np.float32)
    pixels = torch.from_numpy(grey / 127.5 - 1).expand(1, 3, -1, -1)
    with torch.inference_mode():
        mean = plain.vae.encode(pixels).latent_dist.mean * plain.vae.config.scaling_factor
    expected = plain(
        "a chest xray",
        image=mean,
        strength=strength / 100,
        num_inference_steps=10,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(7),
        output_type="np",
    ).images[0]
    cfg = dict(strength=strength, num_inference_steps=10)
    for size in (1, 3):
        found = draw(study, pipe, [(7, film)], size, **cfg)[0].transpose(1, 2, 0)
        assert np.abs(found - expected).max() < 1e-3
    assert (
        np.abs(draw(study, pipe, [(8, film)], 1, **cfg)[0].transpose(1, 2, 0) - expected).max()
        > 0.05
    )


def test_neighbours_in_a_call_do_not_matter(study, pipe):
    films = training_rows(study, 0.5, 0).image_id
    items = [(k, films[k]) for k in range(6)]
    whole = draw(study, pipe, items, 3)
    alone = np.concatenate([draw(study, pipe, [item], 3) for item in items])
    assert np.array_equal(whole, alone)
    assert np.array_equal(whole[::-1], draw(study, pipe, items[::-1], 3))


def test_narrower_numbers_draw_nearly_the_same(study):
    "By autocast, and with U-Net and text encoder stored in bf16 beside a float32 decoder, as on a GPU."
    film = training_rows(study, 0.5, 0).image_id[5]
    found = {}
    for kind in ("no", "bf16", "stored"):
        cfg = Img2ImgConfig(**CFG | dict(mixed_precision="no"))
        pipe = load_model((study / f"models/{NAME}/normal", None), "cpu", cfg)
        if kind == "stored":
            pipe.unet.to(torch.bfloat16)
            pipe.text_encoder.to(torch.bfloat16)
        precision = "bf16" if kind == "bf16" else "no"
        found[kind] = draw(study, pipe, [(7, film)], 2, mixed_precision=precision)[0]
    assert pipe.vae.dtype == torch.float32
    for kind in ("bf16", "stored"):
        apart = np.abs(found[kind] - found["no"])
        assert 0 < apart.max() < 0.1 and apart.mean() < 0.02, kind


def test_the_film_goes_under_as_the_strength_grows(study, pipe):
    "At 10 % an image is nearest to its own film's round trip; at 95 % hardly any is."
    films = training_rows(study, 0.5, 0).image_id.tolist()[:24]
    vae = load_pipeline(study / f"models/{NAME}/normal", device="cpu").vae
    after = round_trip(vae, load_images(study, films)).astype(float)
    apart, own = [], []
    for strength in (10, 30, 50, 70, 95):
        cfg = dict(strength=strength, num_inference_steps=20)
        x = draw(study, pipe, list(enumerate(films)), 8, **cfg).mean(1) * 255
        distance = np.abs(x[:, None] - after).mean((2, 3))
        apart.append(distance.diagonal().mean())
        own.append((distance.argmin(1) == np.arange(len(films))).mean())
    assert apart == sorted(apart) and apart[-1] > 3 * apart[0]
    assert own[0] > 0.9 and own[-1] < 0.3 and own == sorted(own, reverse=True)


def test_too_few_steps_are_refused_before_anything_is_drawn(trained):
    assert [drawn_steps(*x) for x in ((15, 30), (30, 50), (50, 95), (4, 30))] == [4, 15, 47, 1]
    before = {p: p.stat().st_mtime_ns for p in (trained / "synthetic").rglob("*")}
    plan = replace(
        PLAN, arms=("img2img-strength30",), cells=(Cell(0.5, 1, 1, ("img2img-strength30",)),)
    )
    with pytest.raises(CxrError, match="num-inference-steps 4 or more"):
        generate(trained, plan, num_inference_steps=3)
    assert before == {p: p.stat().st_mtime_ns for p in (trained / "synthetic").rglob("*")}


def test_latents_of_eight_channels_are_drawn_as_a_plain_loop_draws_them(study):
    "The small base's own autoencoder; the loop is DDIM from the paper, for a network that answers v."
    cfg = Img2ImgConfig(**CFG | dict(num_inference_steps=8, strength=50, scheduler="ddim"))
    pipe = load_model(("small-xray", None), "cpu", cfg)
    film = training_rows(study, 0.5, 0).image_id[5]
    found = draw(study, pipe, [(7, film)], 1, **dict(num_inference_steps=8, scheduler="ddim"))
    pixels = torch.from_numpy(load_images(study, [film])[:, None] / np.float32(127.5) - 1)
    abar, (no, yes) = (
        pipe.scheduler.alphas_cumprod,
        pipe.encode_prompt("a chest xray", "cpu", 1, True)[::-1],
    )
    times = list(range(999, -1, -125))[4:]
    with torch.inference_mode():
        x = pipe.vae.encode(pixels.expand(-1, 3, -1, -1)).latent_dist.mean
        x = x * pipe.vae.config.scaling_factor
        assert x.shape[1] == 8
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(7))
        x = abar[times[0]].sqrt() * x + (1 - abar[times[0]]).sqrt() * noise
        for t, then in zip(times, [*times[1:], -1]):
            a, b = abar[t], abar[then] if then >= 0 else torch.tensor(1.0)
            v = [pipe.unet(x, t, words).sample for words in (no, yes)]
            v = v[0] + 3.0 * (v[1] - v[0])
            x0, e = a.sqrt() * x - (1 - a).sqrt() * v, a.sqrt() * v + (1 - a).sqrt() * x
            x = b.sqrt() * x0 + (1 - b).sqrt() * e
        expected = decode_drawn(pipe.vae, x, [7], Drawing("a test"))
    assert np.abs(found - (expected / 2 + 0.5).clamp(0, 1).numpy()).max() < 1e-3


# ------------------------------------------------------------------ a set


def test_the_lines_say_all(study):
    lines = load_metadata(study, SET)
    assert [m["file_name"] for m in lines] == [
        f"{c}/{k:06d}.png" for c in ("normal", "pneumonia") for k in range(8)
    ]
    rows = training_rows(study, 0.5, 0).set_index("image_id")
    for m in lines:
        assert (
            rows.class_name[m["image_id"]] == m["class_name"]
        )  # seen by the generator, of the class
        assert (m["strength"], m["generator"]) == (0.5, SET)
    assert len({m["seed"] for m in lines}) == 16
    assert all(len({m["image_id"] for m in lines if m["label"] == y}) == 8 for y in (0, 1))
    old = {m["seed"] for m in load_metadata(study, NAME)}
    assert not old & {m["seed"] for m in lines}
    record = study.records()[f"synthetic/{SET}"]
    assert record["status"] == "complete" and record["settings"]["strength"] == 50
    assert resolve("generate", recorded=study.recorded("generate")).num_inference_steps == 4
    assert stale_stages(study) == []


def test_films_come_in_turn(trained):
    "More images than films: each film as often as any other, or once more; at each strength the same order."
    n = int((training_rows(trained, 0.5, 0).label == 0).sum())
    images = {"normal": n + 3, "pneumonia": 1}
    for strength in (20, 25):
        generate_img2img(
            trained, NAME, strength, images, GenerateConfig(**CFG | dict(num_inference_steps=5))
        )
    a, b = (load_metadata(trained, f"{NAME}-img2img{s}") for s in (20, 25))
    films = [m["image_id"] for m in a]
    assert films == [m["image_id"] for m in b] and films != sorted(films)
    assert len(set(films[:n])) == n and films[n : n + 3] == films[:3]
    assert [m["seed"] for m in a] != [m["seed"] for m in b]


def test_killed_and_shared(study, tmp_path, monkeypatch):
    "Stopped in the middle of a call, gone on by two processes: the bytes of an undisturbed one."
    whole = contents(study)
    (study / "synthetic" / SET).rename(tmp_path / "whole")
    put, count = ImageSetWriter.put, []

    def killed(self, image, line):
        count.append(1)
        if len(count) == 11:
            raise KeyboardInterrupt
        put(self, image, line)

    with monkeypatch.context() as m:
        m.setattr(ImageSetWriter, "put", killed)
        with pytest.raises(KeyboardInterrupt):
            generate(study)
    assert len(list((study / "synthetic" / SET).rglob("*.png"))) == 10
    generate(study, shard="2/2")
    assert not (study / "synthetic" / SET / "metadata.jsonl").exists()
    generate(study, shard="1/2")
    assert contents(study) == whole


def test_one_image_again(study):
    images, _ = load_synthetic(study, SET)
    again = regenerate_img2img(study, SET, "pneumonia/000003.png", "cpu")
    assert np.array_equal(np.asarray(again), images[8 + 3])
    with pytest.raises(CxrError, match="start from training films"):
        regenerate_image(study, SET, "pneumonia/000003.png")


def test_other_settings_are_refused_by_name(study):
    whole = contents(study)
    with pytest.raises(CxrError, match="guidance_scale"):
        generate_img2img(
            study, NAME, 50, {"normal": 8, "pneumonia": 8}, GenerateConfig(**CFG, guidance_scale=2)
        )
    assert contents(study) == whole


# ------------------------------------------------------------------ never passed on


def test_refused_as_a_round_trip_is(study):
    for call in (lambda: write_card(study, SET), lambda: push(study, SET, "me/set", licence="cc")):
        with pytest.raises(CxrError, match="real patients, noised to 50 % and drawn anew"):
            call()
    text = (study / "synthetic" / SET / "README.md").read_text()
    assert "X-rays of real patients" in text and NAME in text and "do not publish" in text
    write_card(study, NAME)


def test_packed_with_or_without(study, tmp_path):
    home = Study(tmp_path / "home")
    unpack(pack(study, tmp_path / "all.zip", ("study", "synthetic")), home)
    assert contents(home) == contents(study)
    pack(study, tmp_path / "less.zip", ("study", "synthetic"), round_trips=False)
    listed = {}
    for name in ("all", "less"):
        with zipfile.ZipFile(tmp_path / f"{name}.zip") as z:
            listed[name] = z.namelist()
    assert not [n for n in listed["less"] if "img2img" in n]
    assert f"synthetic/{NAME}/metadata.jsonl" in listed["less"]
    films = [n for n in listed["all"] if "img2img" in n and n.endswith(".png")]
    assert (_real_images(listed["all"]), _real_images(listed["less"])) == (len(films), 0)
    stage_data(home, DataConfig(patients=120, resolution=32))
    generate(home)  # without models: the sets are there
    assert stale_stages(home) == []


# ------------------------------------------------------------------ what is made of them


def test_trained_on_as_mixed_is(study):
    "The same real images, the same share, and of the other set the images that this seed draws of the pool."
    cfg = ExperimentsConfig(method="finetune", size=32)
    context = RunContext(study, PLAN, cfg, "cpu")
    pixels = {name: load_synthetic(study, name)[0] for name in (NAME, SET)}
    names = [m["file_name"] for m in load_metadata(study, SET)]
    for seed in (0, 1):
        mixed, started = (training_set(Run(a, 0.5, 0, seed), context) for a in ARMS[1:])
        drawn = context.synthetic_images(Run("mixed", 0.5, 0, seed), 16)[2]
        assert len(drawn) == 14 == started.n_synthetic  # four of five of either class, rounded up
        for k in (0, 1):
            assert np.array_equal(started.phases[0][k].x, mixed.phases[0][k].x)
        for found, name in ((mixed, NAME), (started, SET)):
            x = np.concatenate([stratum.x for stratum in found.phases[0][2:]])
            assert np.array_equal(x, pixels[name][[names.index(n) for n in drawn]])
        assert [s.share for s in started.phases[0]] == [s.share for s in mixed.phases[0]]
        assert started.about == mixed.about | dict(strength=0.5)
    asked = []
    context.synthetic_set = asked.append
    precompute_shared(context, PLAN.runs())
    assert asked == [NAME, SET]  # before the processes start


def test_quality_finds_the_films_and_keeps_them_apart(trained, tmp_path, monkeypatch):
    "A generator that gives back its films, with grain: all are found, and no other set's words change."
    study = Study(shutil.copytree(trained.root, tmp_path / "s", ignore=lambda *_: ["synthetic"]))
    cfg = QualityConfig(size=32, halvings=2)
    sizes = {"normal": 20, "pneumonia": 20}
    plan = replace(WITHOUT, generators=(replace(PLAN.generators[0], images=sizes),))
    generate(study, plan)
    stage_quality(study, cfg)
    before = read_json(study / f"quality/{NAME}.json")

    def films(self, start, items):
        grain = np.random.default_rng(0).normal(0, 3, (len(items), 1, 32, 32))
        x = self.films([image_id for _, image_id in items])[:, None] + grain
        return np.repeat(x.clip(0, 255), 3, axis=1).astype(np.float32) / 255

    monkeypatch.setattr(Img2ImgSampler, "start", lambda self, items: items)
    monkeypatch.setattr(Img2ImgSampler, "draw", films)
    generate_img2img(study, NAME, 50, sizes, GenerateConfig(**CFG))
    stage_quality(study, cfg, redo=True)
    assert read_json(study / f"quality/{NAME}.json") == before
    rows = read_json(study / f"quality/{SET}.json")
    assert {r["metric"] for r in rows} == {r["metric"] for r in before}
    copies = {r["class_name"]: r for r in rows if r["metric"] == "copies"}
    for cls, row in copies.items():
        assert row["value"] > 0.9 and row["verdict"] == "above the floor", cls
        assert row["sentence"].startswith("Made from training films on purpose.")
    assert len(read_csv(study / f"quality/{SET}-copies.csv")) > 36


# ------------------------------------------------------------------ the report


def made_up(folder, arms):
    "A made-up study of these arms, reported."
    patients = dict(val=20, internal=60, test=20, train=40)
    made = rehearse(folder, patients, ((0.1, 3, 2),), arms)
    stage_report(made, ReportConfig(draws=50, poster=600))
    return made, (made / "report/index.html").read_text(encoding="utf-8")


def test_report_draws_the_curve(tmp_path):
    "Points from the files themselves; the sets from films stand in no other figure and no other table."
    made, page = made_up(tmp_path / "with", ("real", "mixed", *STRENGTH_ARMS))
    analysis = read_json(made / "analysis.json")
    points = strength_points(
        load_quality(made, films=True), analysis["contrasts"], load_plan(made).primary
    )
    assert [p.strength for p in points] == [0.3, 0.5, 0.7, 1.0]
    for p in points:
        ending = "" if p.strength == 1 else f"-img2img{100 * p.strength:.0f}"
        arm = "mixed" if p.strength == 1 else f"img2img-strength{100 * p.strength:.0f}"
        files = [read_json(made / f"quality/real010-rep{k}{ending}.json") for k in (0, 1)]
        for metric, found in (("fd", p.distance), ("copies", p.marked)):
            rows = [r for file in files for r in file if r["metric"] == metric]
            mine = [r["value"] for r in rows if r["class_name"] == "normal"]
            assert found["normal"][0] == pytest.approx(np.mean(mine))
        c = next(c for c in analysis["contrasts"] if c["arm"] == arm and c["split"] == "internal")
        assert p.difference["estimate"] == c["estimate"] and "p_holm" not in c
        assert c["role"] == ("primary" if p.strength == 1 else "estimate")
    assert (made / "report/figures/strength.png").exists()
    assert "fidelity, copies and worth against strength" in page
    assert "near copies (49 %, from text 1 %, held-out films 1 %)" in " ".join(page.split())
    assert not [r for r in load_quality(made) if "img2img" in r["generator"]]
    assert "-img2img" not in page  # no set from films is called a generator


def test_no_curve_without_the_arm(tmp_path):
    made, page = made_up(tmp_path / "without", ("real", "mixed"))
    assert not (made / "report/figures/strength.png").exists() and "img2img" not in page


def test_the_whole_chain(tmp_path):
    "Data to report with trained generators, in one command."
    plan = SMALL["plan"] | dict(arms="img2img-strength50")
    study = run(tmp_path / "study", **SMALL | dict(plan=plan))
    assert stale_stages(study) == []
    results = read_csv(study / "results.csv")
    mine = [r for r in results if r["arm"] == "img2img-strength50"]
    assert len(mine) == 6 and {r["status"] for r in mine} == {"done"}
    mixed = [r for r in results if r["arm"] == "mixed"]
    for name in ("generator", "share", "pool", "n_real", "n_synthetic"):
        assert [r[name] for r in mine] == [r[name] for r in mixed]
    inputs = study.records()["runs"]["inputs"]
    assert {f"synthetic/real010-rep{k}-img2img50" for k in (0, 1)} <= set(inputs)
    assert (study / "report/figures/strength.png").exists()
    run(study.root, **SMALL | dict(plan=plan))  # nothing left to do, nothing refused

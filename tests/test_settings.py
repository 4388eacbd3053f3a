"""Settings know their range: values in and out of it for every field of every config; what does not go
together; and a refusal that leaves no trace.
"""

import dataclasses, json, math
from typing import Literal, get_args, get_origin

import pytest
from hypothesis import HealthCheck, given, settings as hypothesis_settings, strategies as st

from cxr_synth.app import known_flags, main
from cxr_synth.base.files import CxrError
from cxr_synth.base.records import STAGES, Study
from cxr_synth.base import settings
from cxr_synth.base.settings import CONFIGS, PRESETS, flag, from_word, resolve, settings_table
from cxr_synth.stages.validation import validate_settings
from cxr_synth.stages.run import run

FREE = {  # texts that may be anything, or that only the stage can tell: why
    "data.source": "any other text is the path of a folder",
    "data.patient_rule": "a regular expression, or the path of a file",
    "data.hub_id": "the Hub knows, or the path of a folder",
    "data.revision": "the Hub knows",
    "data.card": "a name, or the path of a file: checked before a stage begins",
    "plan.because": "the user's own words",
    "plan.pilot": "the folder of a study: the plan looks into it",
    "train.base": "a name, a folder or a Hub id: checked before a stage begins",
    "train.revision": "the Hub knows",
    "train.prompts": "the path of a file: checked before a stage begins",
    "train.class_prompt": "the user's own words",
    "train.mirror": "the path of a folder",
    "generate.negative_prompt": "the user's own words",
    "quality.weights": "a path or a Hub id: checked before a stage begins",
    "experiments.weights": "a path: checked before a stage begins",
}
FIELDS = [(s, f) for s, config in CONFIGS.items() for f in dataclasses.fields(config)]
NAMES = [f"{stage}.{f.name}" for stage, f in FIELDS]
each_field = pytest.mark.parametrize("stage, f", FIELDS, ids=NAMES)
numbers = [(s, f) for s, f in FIELDS if settings._number_type(f)]
each_number = pytest.mark.parametrize("stage, f", numbers, ids=lambda x: getattr(x, "name", x))
few = hypothesis_settings(
    max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)


def contents(folder):
    "Every file of a folder with its bytes; hidden ones too."
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def facts(f):
    return f.metadata.get("json_schema_extra", {})


def bounds(f):
    "Lowest and highest number that a field allows, and the step between them."
    of, whole = f.metadata, settings._number_type(f) is int
    low, high = of.get("ge", of.get("gt")), of.get("le", of.get("lt"))
    if not whole:
        low = math.nextafter(low, high) if "gt" in of else low
        high = math.nextafter(high, low) if "lt" in of else high
    return low, high, of.get("multiple_of", 1)


def allowed_values(f):
    "A strategy of values that a field allows."
    if settings._number_type(f):
        low, high, step = bounds(f)
        if settings._number_type(f) is int:
            found = st.integers(-(-low // step), high // step).map(lambda k: k * step)
        else:
            found = st.floats(low, high, allow_subnormal=False)
        return found | st.none() if settings._is_optional(f) else found
    if get_origin(f.type) is Literal:
        return st.sampled_from(get_args(f.type))
    return st.booleans() if f.type is bool else st.just(f.default)


def refused_values(f):
    "A strategy of values that a field does not allow."
    texts = st.sampled_from(["", "8", "none", "yes", "\0"])
    if settings._number_type(f) is None:
        wrong = st.sampled_from([3, 1.5, True, ["a"], b"a", float("nan")])
        if f.type is bool:
            return st.sampled_from([0, 1, "yes", "True", 0.0, None])
        if get_origin(f.type) is Literal:
            loud = [word.upper() for word in get_args(f.type) if word.upper() != word]
            return wrong | texts | st.none() | st.sampled_from(loud)
        return wrong | st.sampled_from(["a\0b", " ", "\ud800", "a\x1b[2Jb"]) | st.none()
    low, high, step = bounds(f)
    wrong = texts | st.sampled_from([float("nan"), math.inf, -math.inf, True, False, [1]])
    if not settings._is_optional(f):
        wrong |= st.none()
    if settings._number_type(f) is int:
        wrong |= st.integers(high + 1) | st.integers(max_value=low - 1) | st.just(low + 0.5)
        return wrong | st.just(float(low)) | (st.just(low + 1) if step > 1 else wrong)
    above = st.floats(min_value=high, exclude_min=True) | st.just(10**9)
    return wrong | above | st.floats(max_value=low, exclude_max=True)


COMPANIONS = {  # what a value needs beside it
    "weights": dict(heldout_images=8),
    "heldout_images": dict(weights="last"),
    "guidance_scale": dict(negative_prompt=""),
    "decoder_batch_size": dict(tune_decoder=1),  # without it, the other two are no settings
    "decoder_learning_rate": dict(tune_decoder=1),
    "snapshot_images": dict(snapshots=1),
    "prior_loss_weight": dict(joint=False),  # which the preset switches on
}


@each_field
@few
@given(data=st.data())
def test_what_is_allowed_is_taken_and_recorded(stage, f, data):
    value = data.draw(allowed_values(f))
    beside = COMPANIONS.get(f.name, {}) if stage in ("train", "generate") else {}
    cfg = resolve(stage, **{f.name: value}, **beside)
    assert getattr(cfg, f.name) == value
    record = json.loads(json.dumps(cfg.settings() | cfg.runtimes(), allow_nan=False))
    assert resolve(stage, recorded=record) == cfg
    word = "none" if value is None else repr(value) if isinstance(value, float) else str(value)
    if f.type is not bool:
        assert from_word(CONFIGS[stage], f.name, word) == value


@each_field
@few
@given(data=st.data())
def test_what_is_not_allowed_is_refused_by_name(stage, f, data):
    value = data.draw(refused_values(f))
    with pytest.raises(CxrError) as e:
        CONFIGS[stage](**{f.name: value})
    said = str(e.value)
    assert said.startswith(flag(CONFIGS[stage], f.name) + " ") and "\nAllowed: " in said
    assert len(said.splitlines()) == 3 and "\0" not in said
    if settings._number_type(f):
        assert settings._range_text(f) in said


@each_number
def test_every_number_has_a_range_with_both_ends(stage, f):
    low, high, _ = bounds(f)
    assert math.isfinite(low) and math.isfinite(high) and low < high
    unit = facts(f)["unit"]
    assert settings._number_type(f) is float or unit or f.name in ("seed", "rank", "lora_alpha")


def test_every_text_is_a_choice_a_name_in_a_table_or_known_to_be_free():
    texts = [f"{s}.{f.name}" for s, f in FIELDS if f.type is str]
    free = [n for n, (_, f) in zip(NAMES, FIELDS) if f.type is str and not facts(f).get("table")]
    free = [n for n in free if not facts(dict(zip(NAMES, FIELDS))[n][1]).get("check")]
    assert set(free) == set(FREE) and len(texts) > len(free)


@each_field
def test_every_default_and_every_preset_is_allowed(stage, f):
    values = [PRESETS[p].get(stage, {}).get(f.name, f.default) for p in PRESETS]
    table = facts(f).get("table")
    for value in {*map(str, values)} if table else ():
        known = settings.resolve_name(table)
        assert value in ("", *known) or value.replace("_", "-") in known
    for preset in PRESETS:
        resolve(stage, preset)


@pytest.mark.parametrize("stage", CONFIGS)
def test_help_shows_what_each_flag_may_be(cxr_synth_command, capsys, stage):
    with pytest.raises(SystemExit) as end:
        cxr_synth_command(stage, "--help")
    assert end.value.code == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for row in settings_table(stage):
        assert row["meaning"] and row["flag"] in shown and row["meaning"][:30] in shown
        if row["allowed"] != "true or false":
            assert f"{row['flag']} {row['allowed']} {row['meaning'][:12]}" in shown


def test_an_unknown_setting_is_refused_in_python():
    for stage, config in CONFIGS.items():
        with pytest.raises(CxrError, match="no setting 'sise'"):
            config(sise=3)
        with pytest.raises(CxrError, match="sise"):
            resolve(stage, sise=3)


def test_numbers_of_numpy_and_paths_are_plain():
    import numpy as np
    from pathlib import Path

    cfg = settings.DataConfig(seed=np.int64(3), shift=np.float32(0.5), source=Path("films"))
    assert (type(cfg.seed), type(cfg.shift), cfg.source) == (int, float, "films")


# --- names and texts with a form of their own


@pytest.mark.parametrize(
    "stage, name, values",
    [
        ("plan", "tier", ["huge", "", "Pilot", "pilot "]),
        ("plan", "builtin", ["true", "TRUTH"]),
        ("plan", "network", ["resnet5", ""]),
        (
            "plan",
            "arms",
            ["mixed-share0", "mixed-share100", "mixd", "real mixed-pool3", "real-share5"],
        ),
        ("plan", "my_guess", ["nan", "inf", "a lot", "1e9", "101", "--", "1.5 2"]),
        ("quality", "extractor", ["inception", ""]),
        ("experiments", "network", ["densenet", ""]),
        ("experiments", "only", ["mixd", "real,mixedd"]),
        ("experiments", "executor", ["cloud", "", "process"]),
        ("generate", "shard", ["0/4", "5/4", "a/b", "1", "1/0", "-1/2", "1/2/3"]),
        ("guide", "seeds", ["a b", "", "1 1", "1.5", "-3", "nan", " ", "1 2 x"]),
        ("guide", "network", ["vgg"]),
        ("data", "classes", ["normal=A", "a=b,c=d", "normal=A,pneumonia=A"]),
        ("data", "source", [""]),
    ],
)
def test_a_text_of_another_form_is_refused(stage, name, values):
    for value in values:
        with pytest.raises(CxrError, match="Allowed|Expected"):
            CONFIGS[stage](**{name: value})


@pytest.mark.parametrize(
    "stage, name, values",
    [
        ("plan", "arms", ["", "mixed-share25", "mixed-pool500, mixed-share75"]),
        ("plan", "my_guess", ["", "+1.5", "-2", "1,5", "0"]),
        ("plan", "network", ["mobilenet_v2", "mobilenet-v2"]),
        ("experiments", "executor", ["processes", "dask", "tcp://127.0.0.1:8786"]),
        ("experiments", "only", ["real mixed", "real,mixed"]),
        ("generate", "shard", ["1/1", "2/4"]),
        ("guide", "seeds", ["42", "1, 2, 3"]),
        ("data", "classes", ["normal=CLEAR,pneumonia=BACTERIA+VIRUS"]),
    ],
)
def test_a_text_of_the_right_form_is_taken(stage, name, values):
    for value in values:
        assert getattr(CONFIGS[stage](**{name: value}), name) == value


# --- what does not go together


TOGETHER = {
    "joint model, prior of the other class": dict(train=dict(joint=True, prior_loss_weight=1.0)),
    "best weights, nothing watched": dict(train=dict(weights="best", heldout_images=None)),
    "rate of a frozen text encoder": dict(
        train=dict(train_text_encoder=False, text_encoder_lr=1e-4)
    ),
    "negative prompt without guidance": dict(
        generate=dict(negative_prompt="text", guidance_scale=1.0)
    ),
    "round trip of a known generator": dict(plan=dict(arms="roundtrip", builtin="truth")),
    "films drawn by a known generator": dict(plan=dict(arms="img2img-strength30", builtin="truth")),
    "known generator and real images": dict(data=dict(source="films"), plan=dict(builtin="wrong")),
    "fp16 training on a CPU": dict(train=dict(mixed_precision="fp16", device="cpu")),
    "fp16 drawing on a CPU": dict(generate=dict(mixed_precision="fp16", device="cpu")),
    "fp16 classifier on a CPU": dict(
        experiments=dict(method="finetune", mixed_precision="fp16", device="cpu")
    ),
    "8-bit states on a CPU": dict(train=dict(use_8bit_adam=True, device="cpu")),
    "no such file of prompts": dict(train=dict(prompts="nowhere.csv")),
    "no such weights for quality": dict(quality=dict(weights="nowhere")),
    "no such weights for experiments": dict(experiments=dict(weights="no/where")),
    "no such base": dict(train=dict(base="no-such-base")),
    "a base that left the Hub": dict(train=dict(base="runwayml/stable-diffusion-v1-5")),
    "no such card": dict(data=dict(source="films", card="nobodys")),
    "size for the extractor": dict(quality=dict(size=33)),
    "size for the probe": dict(experiments=dict(size=33)),
    "size for the plan": dict(plan=dict(size=100)),
    "size for a transformer": dict(
        experiments=dict(method="finetune", network="vit_b_16", size=100)
    ),
    "size for a deep network": dict(
        experiments=dict(method="finetune", network="densenet121", size=16)
    ),
    "a network without features as a probe": dict(experiments=dict(network="small_cnn")),
    "an extractor that cannot learn": dict(
        experiments=dict(method="finetune", network="inception-fid")
    ),
    "the guide with an extractor": dict(guide=dict(network="rad-dino")),
    "a part of the images in a whole run": dict(generate=dict(shard="1/2")),
    "a part of the runs in a whole run": dict(experiments=dict(only="real")),
}


@pytest.mark.parametrize("wanted", TOGETHER.values(), ids=TOGETHER)
def test_what_does_not_go_together_is_refused_before_anything_is_written(wanted, tmp_path):
    study = Study(tmp_path / "s")
    with pytest.raises(CxrError) as e:
        if "guide" in wanted:
            validate_settings(study, guide=resolve("guide", **wanted["guide"]))
        else:
            run(study.root, **wanted)
    assert "--" in str(e.value) and len(str(e.value).splitlines()) <= 4
    assert not study.root.exists()


LINES = {  # what is typed after STUDY: what the refusal names
    "run --plan.pool 8": "--plan.pool 8",
    "run --data.resolution 60": "--data.resolution 60",
    "run --train.mixed-precision fp16 --train.device cpu": "--train.mixed-precision",
    "run --quality.size 33": "--quality.size 33",
    "run --quality.weights nowhere": "--quality.weights nowhere",
    "run --experiments.share 0": "--experiments.share 0",
    "run --experiments.share nan": "--experiments.share nan",
    "run --report.draws 0": "--report.draws 0",
    "data --data.patients 0": "--data.patients 0",
    "data --data.patients 1000000000": "--data.patients 1000000000",
    "data --data.patients 8.5": "--data.patients 8.5",
    "data --data.patients many": "--data.patients many",
    "data --data.resolution -64": "--data.resolution -64",
    "data --data.resolution 1000000": "--data.resolution 1000000",
    "data --data.val-share nan": "--data.val-share nan",
    "data --data.val-share 7": "--data.val-share 7",
    "data --data.val-share -inf": "--data.val-share -inf",
    "data --data.workers -2": "--data.workers -2",
    "data --on-bad ignore": "--data.on-bad ignore",
    "data --data.seed 1 --data.seed 2": "--data.seed is given twice",
    "data --data phantom --data.source hub": "--data.source is given twice",
    "data --redo --no-redo": "--redo is given twice",
    "data --preset tiny --preset=laptop": "--preset is given twice",
    "data --data.patience 3": "--data.patients",
    "data --patients 30": "--data.patients",
    "data --train.rank 3": "cxr-synth train",
    "data --tier pilot": "cxr-synth plan",
    "data --data.seed": "--data.seed needs a value",
    "data other": "one study folder",
    "plan --plan.my-guess nan": "--my-guess 'nan'",
    "plan --plan.tier huge": "Allowed: lesson, pilot, fair, full",
    "train --train.max-train-steps 0": "--train.max-train-steps 0",
    "train --train.train-batch-size 0": "--train.train-batch-size 0",
    "train --train.learning-rate 0": "--train.learning-rate 0",
    "train --train.ema-decay 2": "--train.ema-decay 2",
    "train --train.ema-decay 0": "or none",
    "train --train.snr-gamma -1": "--train.snr-gamma -1",
    "train --train.max-grad-norm 0": "--train.max-grad-norm 0",
    "train --train.vae-steps 0": "--train.vae-steps 0",
    "train --train.base-batch-size -1": "--train.base-batch-size -1",
    "train --train.heldout-steps 0": "--train.heldout-steps 0",
    "train --train.preview-steps -1": "--train.preview-steps -1",
    "train --train.max-views 0": "--train.max-views 0",
    "train --train.prior-loss-weight -1": "--train.prior-loss-weight -1",
    "train --train.text-encoder-lr -1": "--train.text-encoder-lr -1",
    "quality --quality.max-images -5": "--quality.max-images -5",
    "quality --quality.halvings -1": "--quality.halvings -1",
    "quality --quality.pairs -1": "--quality.pairs -1",
    "experiments --experiments.views 0": "--experiments.views 0",
    "experiments --experiments.share -0.5": "--experiments.share -0.5",
    "experiments --experiments.C nan": "--experiments.C nan",
    "experiments --experiments.executor processes --experiments.workers 0": "--experiments.workers",
    "experiments --experiments.method finetune --experiments.steps 0": "--experiments.steps 0",
    "experiments --experiments.learning-rate inf": "--experiments.learning-rate inf",
    "report --report.draws 1": "--report.draws 1",
    "report --report.poster -100": "--report.poster -100",
    "guide --guide.seeds a": "--guide.seeds 'a'",
}


@pytest.mark.parametrize("line", LINES)
def test_a_line_is_refused_with_the_flag_and_nothing_is_touched(
    line, finished_study, tmp_path, cxr_synth_command
):
    command, *flags = line.split()
    for study in (tmp_path / "s", finished_study):
        before = contents(study)
        done = cxr_synth_command(command, study, *flags)
        assert done.status == 2 and LINES[line] in done.err, done.err
        assert len(done.err.strip().splitlines()) <= 5 and "Traceback" not in done.err
        assert contents(study) == before
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    "name", ["", " ", "a" * 300, "a/" + "b" * 400, "a\0b", "é" * 150, "x/" * 2000]
)
@pytest.mark.parametrize("command", ["data", "run", "status"])
def test_a_study_that_can_be_no_folder(command, name, tmp_path, cxr_synth_command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = cxr_synth_command(command, name)
    assert done.status == 2 and "can be no folder" in done.err
    assert len(done.err.strip().splitlines()) <= 5 and not list(tmp_path.iterdir())


def test_another_source_is_named(finished_study, tmp_path, cxr_synth_command):
    (tmp_path / "films").mkdir()
    before = contents(finished_study)
    for source in ("hub", tmp_path / "films"):
        for command in ("data", "run"):
            done = cxr_synth_command(command, finished_study, "--data", source)
            assert done.status == 2 and "made of the source phantom" in done.err
            assert str(source) in done.err and "--redo" in done.err
    assert contents(finished_study) == before


REFUSED_THEN_RIGHT = [
    ("quality", ["--quality.size", "33"], ["--quality.size", "32"]),
    ("quality", ["--quality.weights", "nowhere"], []),
    ("experiments", ["--experiments.size", "33"], ["--experiments.size", "32"]),
    ("experiments", ["--experiments.share", "1"], ["--experiments.share", "0.5"]),
    ("generate", ["--generate.mixed-precision", "fp16", "--generate.device", "cpu"], []),
    ("generate", ["--generate.num-inference-steps", "0"], []),
    ("plan", ["--plan.size", "33"], ["--plan.size", "32"]),
]


@pytest.mark.parametrize("stage, wrong, right", REFUSED_THEN_RIGHT)
def test_after_a_refusal_the_right_value_is_taken(
    stage, wrong, right, study_copy, cxr_synth_command
):
    assert cxr_synth_command(stage, study_copy.root, *wrong).status == 2
    done = cxr_synth_command(stage, study_copy.root, *right)
    assert done.status == 0, done.err


def test_a_stage_that_made_nothing_takes_other_settings(tmp_path):
    from cxr_synth.base.records import open_stage
    from cxr_synth.base.settings import ReportConfig

    study = Study(tmp_path / "s")
    open_stage(study, "report", "report", ReportConfig(draws=100))
    again = open_stage(study, "report", "report", ReportConfig(draws=200))
    assert again.record["settings"]["draws"] == 200
    (study / "report/index.html").write_text("made")
    with pytest.raises(CxrError, match="recorded 200, now 300"):
        open_stage(study, "report", "report", ReportConfig(draws=300))


def test_zeros_of_an_older_version_are_none(study_copy):
    old = dict(snr_gamma=0.0, ema_decay=0, text_encoder_steps=0, preview_steps=0, joint=False)
    cfg = resolve("train", recorded=old)
    assert [getattr(cfg, name) for name in old] == [None, None, None, None, False]
    path = next(study_copy.root.glob("models/*/stage.json"))
    record = json.loads(path.read_text())
    for name in ("snr_gamma", "text_encoder_lr", "text_encoder_steps", "prior_loss_weight"):
        if record["settings"][name] is None:
            record["settings"][name] = 0.0
    path.write_text(json.dumps(record))
    from cxr_synth.base.records import differences

    cfg = resolve("train", recorded=study_copy.recorded("train"))
    assert differences(record["settings"], json.loads(json.dumps(cfg.settings()))) == []


def test_settings_of_another_stage_and_plain_dicts_are_refused(tmp_path):
    from cxr_synth.stages.data import stage_data

    for wrong in (settings.PlanConfig(), {"patients": 30}, None):
        with pytest.raises(CxrError, match="DataConfig"):
            stage_data(Study(tmp_path / "s"), wrong)
    with pytest.raises(CxrError, match="unknown stage 'trian'"):
        run(tmp_path / "s", trian={})
    assert not (tmp_path / "s").exists()


def test_the_guides_command_names_its_own_flags():
    from cxr_synth.diffusion.command import guide_flags

    four = dict(
        pretrained_model_name_or_path="b",
        instance_data_dir="i",
        output_dir="o",
        instance_prompt="p",
    )
    for name, value in dict(
        train_batch_size=0, resolution=100, resolution_=0, max_train_steps=-1, validation_steps=-1
    ).items():
        name = name.rstrip("_")
        with pytest.raises(CxrError, match=f"{name} {value}"):
            guide_flags(four | {name: value}).config()


def test_every_flag_of_the_line_is_known_to_its_command():
    for command in (*CONFIGS, "run"):
        known = known_flags(command)
        stages = CONFIGS if command not in CONFIGS else [command]
        for stage in stages:
            if command == "run" and not STAGES[stage].in_run:
                continue
            assert {row["flag"] for row in settings_table(stage)} <= set(known)


@pytest.mark.parametrize("columns", ["0", "1", "7", "500"])
def test_help_in_a_window_of_any_width(columns, monkeypatch, capsys):
    "In one column the help would never end."
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit) as e:
        main(["data", "--help"])
    assert e.value.code == 0 and "--data.resolution" in capsys.readouterr().out

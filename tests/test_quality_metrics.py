"The table of metrics, and the names and intervals that follow from it."

import numpy as np
import pytest

from cxr_synth.base.settings import QualityConfig
from cxr_synth.images.networks import NETWORKS
from cxr_synth.quality.copies import wilson
from cxr_synth.quality.measure import Embedder, Measurement, make_row, summarise_draws
from cxr_synth.quality.metrics import METRICS, VERDICTS, floor_verdict, metrics_on


@pytest.mark.parametrize("name", METRICS)
def test_an_entry_says_what_a_report_needs(name):
    m = METRICS[name]
    assert m.label and m.question.endswith("?") and m.version >= 1
    assert m.on in ("features", "similarities", "scores", "labels", "copies")
    assert m.worse in ("above", "below", "either", "")
    assert bool(m.above) == (m.worse in ("above", "either"))
    assert bool(m.below) == (m.worse in ("below", "either"))


@pytest.mark.parametrize("extractor", [k for k, n in NETWORKS.items() if n.features])
def test_only_inception_gives_an_fid(extractor):
    "Folders named it FD with any network, Inception included."
    names = metrics_on("features", extractor)
    assert ("fid" in names) == (extractor == "inception-fid")
    assert ("fid" in names) != ("fd" in names)


@pytest.mark.parametrize("name", ["efficientnet-lite0", "efficientnet_lite0"])
def test_a_row_names_the_extractor_as_the_table_does(name):
    "With - or _, or an FID of inception_fid would be called FD."
    embedder = Embedder(QualityConfig(extractor=name, size=32), "cpu")
    assert embedder.name == embedder.about["extractor"] == "efficientnet-lite0"


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("value", [-5.0, 0.5, 5.0])
def test_every_verdict_has_a_sentence(name, value):
    found = summarise_draws(name, [value, value], [0.0, 1.0], 60)
    row = make_row("normal", name, found, extractor="efficientnet-lite0")
    assert row["verdict"] in VERDICTS
    assert row["sentence"].count("{") == 0 and "  " not in row["sentence"]
    assert ": ." not in row["sentence"], "a finding without words"


def test_what_lies_beyond_the_floor_on_the_harmless_side():
    near = Measurement(-1.0, -1.0, -1.0, 0.5, 0.0, 1.0, "within the floor", 60)
    said = make_row("normal", "fd", near)["sentence"]  # nearness alone accuses nobody of copying
    assert "lost diversity" in said and "copies" not in said
    assert "harmless" in make_row("normal", "source-auc", near)["sentence"]
    assert "No difference" in make_row("normal", "density", near)["sentence"]


@pytest.mark.parametrize(
    "value, other, worse, n, want",
    [
        (0.5, [5.0], "above", 60, "within the floor"),
        (0.5, [0.9], "above", 60, "not measurable at this n"),
        (0.5, None, "above", 49, "not measurable at this n"),
        (1.5, [0.9], "above", 49, "above the floor"),
        (-1.0, [0.1], "below", 60, "below the floor"),
        (0.5, [0.2], "below", 60, "not measurable at this n"),
        (-1.0, None, "either", 60, "below the floor"),
        (9.0, None, "", 60, "uninformative"),
    ],
)
def test_verdicts(value, other, worse, n, want):
    assert floor_verdict(value, [0.0, 1.0], other, worse, n) == want


@pytest.mark.parametrize("hits, n", [(0, 1), (0, 100), (1, 100), (50, 100), (100, 100)])
def test_wilson_agrees_with_its_formula(hits, n):
    z = 1.959963984540054
    p, s = hits / n, z * z / n
    half = z * np.sqrt(p * (1 - p) / n + s / (4 * n))
    want = max(0.0, (p + s / 2 - half) / (1 + s)), min(1.0, (p + s / 2 + half) / (1 + s))
    assert wilson(hits, n) == pytest.approx(want, abs=1e-12)

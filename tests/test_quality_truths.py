"Metrics against values known by hand or published, and against the libraries that people use."

from itertools import permutations, product

import numpy as np
import pytest
import torch
from cxr_synth.quality.metrics import (
    density_coverage,
    enlarge_small,
    expected_coverage,
    frechet_distance,
    frechet_moments,
    inception_score,
    kid,
    ms_ssim,
    random_pairs,
    rbf_mmd,
    source_auc,
    unit_length,
)
from cxr_synth.stats.auc import auroc


def rng(seed=0):
    return np.random.default_rng(seed)


def matrices(n=60, m=80, d=32, seed=0):  # correlated features
    r = rng(seed)
    mix = r.normal(size=(d, d))
    return r.normal(size=(n, d)) @ mix, r.normal(size=(m, d)) @ mix + 0.3


# -- Fréchet


@pytest.mark.parametrize(
    "m1, S1, m2, S2, want",
    [
        (
            np.zeros(512),
            np.eye(512),
            np.ones(512),
            np.eye(512),
            512,
        ),  # pytorch-fid tests this with 2,048, as does the notebook
        (np.zeros(1), np.eye(1), 3 * np.ones(1), 4 * np.eye(1), 10),  # N(0, 1) and N(3, 4)
        (np.zeros(2), np.diag([4.0, 9.0]), np.zeros(2), np.eye(2), 5),
        (
            np.zeros(2),
            np.array([[2.0, 1], [1, 2]]),
            np.zeros(2),
            np.diag([1.0, 3.0]),
            8 - 2 * 14**0.5,
        ),  # do not commute
        (np.zeros(6), np.diag([1.0, 1, 1, 0, 0, 0]), np.zeros(6), np.diag([0.0, 0, 0, 1, 1, 1]), 6),
    ],
)  # supports do not meet
def test_frechet_by_hand(m1, S1, m2, S2, want):
    assert frechet_moments(m1, S1, m2, S2) == pytest.approx(want, rel=1e-7)


def test_frechet_of_monai():
    assert frechet_distance([[1, 2]] * 3, [[2, 2], [1, 2], [1, 2]]) == pytest.approx(
        4 / 9, abs=1e-7
    )


@pytest.mark.parametrize("n", [2, 4, 32, 300])
@pytest.mark.parametrize("d", [2, 4, 256])
def test_frechet_is_finite_for_any_shape(n, d):  # an eigenvalue version once gave NaN
    x, y = rng(1).normal(size=(n, d)), rng(2).normal(size=(n + 1, d))
    got = frechet_distance(x, y)
    assert np.isfinite(got) and got > -1e-9
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
    assert got == pytest.approx(
        frechet_moments(x.mean(0), np.cov(x.T), y.mean(0), np.cov(y.T)), rel=1e-3, abs=1e-6
    )


def test_frechet_depends_on_no_order():
    x, y = matrices()
    assert frechet_distance(x[::-1], y[rng().permutation(len(y))]) == pytest.approx(
        frechet_distance(x, y), rel=1e-10
    )


def test_mean_term_of_the_same_distribution():
    "Exact in expectation: trace * (1/N + 1/M), 0.2369 for trace 150 and 1,200 against 1,341 images."
    assert round(150 * (1 / 1200 + 1 / 1341), 4) == 0.2369
    r, s = rng(), np.sqrt(1 / np.arange(1, 301))
    n = 120
    m = 134
    trace = float((s**2).sum())
    got = [
        np.square(
            (r.normal(size=(n, 300)) * s).mean(0) - (r.normal(size=(m, 300)) * s).mean(0)
        ).sum()
        for _ in range(200)
    ]
    assert np.mean(got) == pytest.approx(trace * (1 / n + 1 / m), rel=0.1)


def test_frechet_agrees_with_pytorch_fid():
    score = pytest.importorskip("pytorch_fid.fid_score")
    x, y = matrices(300, 400, 64)
    try:
        want = score.calculate_frechet_distance(
            x.mean(0), np.cov(x, rowvar=False), y.mean(0), np.cov(y, rowvar=False)
        )
    except TypeError as e:
        pytest.skip(f"pytorch-fid 0.3.0 does not work with this scipy: {e}")
    assert frechet_distance(x, y) == pytest.approx(want, rel=1e-6)


# -- kernels


def test_kid_by_hand():
    assert kid([[0], [1]], [[2], [3]]) == pytest.approx(297.5, abs=1e-10)


def test_kernel_distances_are_unbiased():
    r = rng()
    for f in (kid, lambda x, y: rbf_mmd(x, y, 1.0)):
        got = [f(r.normal(size=(30, 20)), r.normal(size=(50, 20))) for _ in range(200)]
        assert min(got) < 0 < max(got) and abs(np.mean(got)) < 4 * np.std(got) / len(got) ** 0.5


def test_kid_agrees_with_torch_fidelity():
    peer = pytest.importorskip("torch_fidelity.metric_kid")
    x, y = (m[:60] for m in matrices())
    for kernel, mine in (("poly", kid(x, y)), ("rbf", None)):
        a, b = (x, y) if kernel == "poly" else (unit_length(x), unit_length(y))
        want = peer.kernel_mmd(
            a,
            b,
            kid_kernel=kernel,
            kid_kernel_poly_degree=3,
            kid_kernel_poly_gamma=None,
            kid_kernel_poly_coef0=1.0,
            kid_kernel_rbf_sigma=0.7,
        )
        assert (mine if mine is not None else rbf_mmd(x, y, 0.7)) == pytest.approx(
            want, rel=1e-9, abs=1e-12
        )


def test_kid_agrees_with_its_formula():  # the unbiased estimator, written as loops
    x, y = (m[:12, :5] for m in matrices())

    def kernel(a, b):
        return (a @ b / 5 + 1) ** 3

    def within(s):
        return np.mean([kernel(a, b) for a, b in permutations(s, 2)])

    between = np.mean([kernel(a, b) for a, b in product(x, y)])
    assert kid(x, y) == pytest.approx(within(x) + within(y) - 2 * between, rel=1e-10)


def test_kid_of_a_set_with_itself_is_not_zero():
    "A pair with itself is left out within the sets, but not between them."
    x, _ = matrices()
    assert kid(x, x) < 0


# -- density and coverage


@pytest.mark.parametrize(
    "n, m, want", [(1341, 1200, 0.9593), (3875, 1200, 0.7407), (1200, 1200, 0.9689)]
)
def test_expected_coverage(n, m, want):
    assert round(expected_coverage(n, m), 4) == want


def test_density_and_coverage_of_the_same_distribution():
    r = rng()
    got = np.array(
        [density_coverage(r.normal(size=(160, 6)), r.normal(size=(100, 6))) for _ in range(40)]
    )
    assert got.mean(0) == pytest.approx([1, expected_coverage(160, 100)], abs=0.02)


def test_density_and_coverage_in_many_dimensions():
    "prdc's README: 1.0555 and 0.9735 for one draw of 10,000 in 1,000 dimensions."
    r = rng()
    got = [
        density_coverage(r.normal(size=(700, 1000)), r.normal(size=(700, 1000))) for _ in range(3)
    ]
    assert np.mean(got, axis=0) == pytest.approx([1.0555, 0.9735], abs=0.12) and np.mean(
        got, axis=0
    )[1] == pytest.approx(expected_coverage(700, 700), abs=0.015)


def test_tight_cloud_inside_a_wide_one():
    "Dense, but it covers little; swapped arguments would say the opposite."
    r = rng()
    wide, tight = r.normal(size=(200, 16)) * 3, r.normal(size=(200, 16)) * 0.1
    density, coverage = density_coverage(wide, tight)
    assert density > 5 and coverage < 0.7
    assert density_coverage(tight, wide) == (0, 0)


def test_density_and_coverage_agree_with_prdc(capsys):
    peer = pytest.importorskip("prdc")
    for seed in range(3):
        x, y = matrices(200, 150, 16, seed)
        want = peer.compute_prdc(x, y, 5)
        assert density_coverage(x, y) == pytest.approx(
            (want["density"], want["coverage"]), abs=1e-12
        )


# -- MS-SSIM


def test_ms_ssim_of_constants():
    flat = torch.tensor([0.25, 0.75, 0, 1]).view(4, 1, 1).expand(4, 256, 256)
    assert ms_ssim(flat, [0, 0, 2], [0, 1, 3]) == pytest.approx([1, 0.93419, 0.29295], abs=5e-4)


@pytest.mark.parametrize("side", [161, 182, 224, 256])
def test_ms_ssim_agrees_with_pytorch_msssim(side):
    peer = pytest.importorskip("pytorch_msssim")
    x = torch.rand(3, side, side, generator=torch.Generator().manual_seed(0))
    x = torch.cat([x, (x + 0.3 * x.roll(3, 1)) / 1.3])
    want = peer.ms_ssim(x[:3, None], x[3:, None], data_range=1, size_average=False)
    assert ms_ssim(x, [0, 1, 2], [3, 4, 5]) == pytest.approx(want.numpy(), abs=1e-4)


def test_ms_ssim_of_small_images_is_that_of_enlarged_ones():
    x = (rng().random((4, 64, 64)) * 255).astype(np.uint8)
    assert enlarge_small(x).shape == (4, 256, 256) and enlarge_small(
        np.zeros((1, 176, 176), np.uint8)
    ).shape == (1, 176, 176)
    assert np.array_equal(ms_ssim(x, [0, 1], [2, 3]), ms_ssim(enlarge_small(x), [0, 1], [2, 3]))


def test_ms_ssim_does_not_depend_on_company():
    x = rng().random((8, 180, 180)).astype(np.float32)
    i, j = random_pairs(8, 24)
    together = ms_ssim(torch.tensor(x), i, j)
    assert together[5] == pytest.approx(
        float(ms_ssim(torch.tensor(x[[i[5], j[5]]]), [0], [1])[0]), abs=1e-6
    )


# -- the rest


def test_inception_score_ends():
    assert inception_score(np.zeros((9, 5))) == pytest.approx(1)
    assert inception_score(200 * np.eye(8)) == pytest.approx(8)


def test_auroc_agrees_with_sklearn():
    from sklearn.metrics import roc_auc_score

    y, s = rng().integers(0, 2, 300), rng(1).integers(0, 20, 300)  # with ties
    assert auroc(y, s) == pytest.approx(roc_auc_score(y, s), abs=1e-12)


def test_source_auc_ends():
    r = rng()
    same = [source_auc(r.normal(size=(80, 40)), r.normal(size=(80, 40)), seed=k) for k in range(10)]
    assert abs(np.mean(same) - 0.5) < 0.06
    assert source_auc(r.normal(size=(80, 40)), r.normal(size=(80, 40)) + 2) > 0.99

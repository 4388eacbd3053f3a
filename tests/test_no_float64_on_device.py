"""Apple's GPUs have no float64: a stand-in for such a device, on the CPU, refuses it wherever
training, features and quality compute.
"""

from unittest.mock import patch

import numpy as np, pytest, torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from cxr_synth import guide
from cxr_synth.classify import finetune
from cxr_synth.diffusion import trainer
from cxr_synth.images import features, networks
from cxr_synth.quality import copies, folders, metrics
from cxr_synth.base.settings import ExperimentsConfig
from cxr_synth.base.loop import Loop, TrainedPart
from cxr_synth.images.phantom import draw_phantom
from cxr_synth.diffusion.small_pipeline import tiny_pipeline, tiny_vae, train_vae


class Storages:
    "Which storages are on the device; they are kept, so that no address is used twice."

    def __init__(self):
        self.kept = {}

    def __contains__(self, x):
        return isinstance(x, torch.Tensor) and x.untyped_storage()._cdata in self.kept

    def add(self, x):
        self.kept[x.untyped_storage()._cdata] = x.untyped_storage()


class NoFloat64(TorchDispatchMode):
    "Results of operations on the device are on the device, and none of them may be float64."

    def __init__(self, there):
        super().__init__()
        self.there = there
        self.paused = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if self.paused or not any(x in self.there for x in tree_flatten((args, kwargs))[0]):
            return out
        for x in tree_flatten(out)[0]:
            if not isinstance(x, torch.Tensor):
                continue
            if x.dtype == torch.float64:
                raise TypeError(f"{func}: the device has no float64")
            self.there.add(x)
        return out


class Device(TorchFunctionMode):
    "Says `mps` of what was moved to mps, and computes it on the CPU."

    def __init__(self):
        super().__init__()
        self.there = Storages()
        self.ops = NoFloat64(self.there)

    def __enter__(self):
        self.ops.__enter__()
        return super().__enter__()

    def __exit__(self, *e):
        super().__exit__(*e)
        return self.ops.__exit__(*e)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func == torch.Tensor.device.__get__:
            return torch.device("mps" if args[0] in self.there else "cpu")
        if func is torch._C._nn._parse_to:
            return func(*args, **kwargs)  # only reads arguments
        asked = [d for x in tree_flatten((args, kwargs))[0] if (d := device_of(x))]
        if func is torch.Tensor.cpu:
            asked = [torch.device("cpu")]
        if func is torch.Tensor.numpy and args[0] in self.there:
            raise TypeError("can't convert a device's tensor to NumPy")
        if not asked:
            return func(*args, **kwargs)
        args, kwargs = tree_map(
            lambda x: torch.device("cpu") if device_of(x) else x, (args, kwargs)
        )
        return self.move(func, args, kwargs, asked[-1].type == "mps")

    def move(self, func, args, kwargs, to_device):
        "The result in a storage of its own, on the device or off it."
        self.ops.paused = (
            not to_device and bool(args) and args[0] in self.there
        )  # off the device: what comes out is the CPU's
        try:
            out = func(*args, **kwargs)
            if not isinstance(out, torch.Tensor):
                return out
            if (
                args
                and isinstance(args[0], torch.Tensor)
                and out.untyped_storage()._cdata == args[0].untyped_storage()._cdata
            ):
                if (out in self.there) == to_device:
                    return out
                out = out.clone(memory_format=torch.preserve_format)
        finally:
            self.ops.paused = False
        if to_device:
            if out.dtype == torch.float64:
                raise TypeError(f"{func}: the device has no float64")
            self.there.add(out)
        return out


def device_of(x):
    "The device that an argument names."
    if isinstance(x, torch.device):
        return x
    return torch.device(x) if isinstance(x, str) and x in ("mps", "cpu") else None


@pytest.fixture
def device():
    with Device() as d:
        yield d


def phantoms(n, size=32):
    return np.stack([draw_phantom(k, 0, k % 2, size=size) for k in range(n)]), np.arange(n) % 2


# -- the stand-in itself


def test_the_stand_in_refuses_float64_there_and_allows_it_here(device):
    x = torch.ones(3).to("mps")
    assert (
        x.device.type == (x * 2)[1:].device.type == "mps"
        and torch.zeros(2, device="mps").device.type == "mps"
    )
    assert x.cpu().device.type == x.to("cpu").device.type == "cpu" and x.cpu().double().sum() == 3
    net = torch.nn.Linear(2, 1).to("mps")
    net(torch.ones(1, 2, device="mps")).sum().backward()
    assert net.weight.device.type == net.weight.grad.device.type == "mps"
    for ask in (
        lambda: x.double(),
        lambda: x.to(torch.float64),
        lambda: x.to("cpu").double().to("mps"),
        lambda: torch.zeros(2, dtype=torch.float64, device="mps"),
        lambda: x.sum(dtype=torch.float64),
        lambda: net.double(),
    ):
        with pytest.raises(TypeError, match="no float64"):
            ask()
    with pytest.raises(TypeError, match="NumPy"):
        x.numpy()


# -- what computes there


def test_classifier_is_trained_and_predicts(device, tmp_path):
    x, y = phantoms(16)
    cfg = ExperimentsConfig(
        method="finetune",
        network="small_cnn",
        size=32,
        steps=3,
        batch_size=4,
        pretrained=False,
        mixed_precision="no",
    )
    strata = finetune.strata_by_class(x, y, 1.0)
    model = finetune.finetune([strata], cfg, "mps", tmp_path / "checkpoint.pt", "test")
    assert next(model.parameters()).device.type == "mps"
    p = finetune.predict_images(model, x, "mps")
    assert p.dtype == np.float64 and ((p > 0) & (p < 1)).all()


def test_features_and_their_head(device):
    x, _ = phantoms(5)
    networks.load_backbone.cache_clear()
    try:
        f = features.extract_features(x, "efficientnet-lite0", 32, "mps")
        logits = metrics.apply_head(
            f,
            tuple(
                part.to("mps") for part in networks.load_backbone("efficientnet-lite0", "mps").head
            ),
        )
    finally:
        networks.load_backbone.cache_clear()
    assert f.shape == (5, 1280) and logits.dtype == np.float64 and logits.shape == (5, 1000)


def test_activations_of_a_folder(device, tmp_path):
    from PIL import Image

    (tmp_path / "images").mkdir()
    for k, im in enumerate(phantoms(4)[0]):
        Image.fromarray(im).save(tmp_path / f"images/{k}.png")

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 4, 8, 8)

        def forward(self, x):
            return [self.conv(x).mean((2, 3), keepdim=True)]

    with (
        patch.object(folders, "pick_device", lambda *a: "mps"),
        pytest.warns(UserWarning, match="means nothing"),
    ):
        assert (
            folders.calculate_fid(
                tmp_path / "images", tmp_path / "images", model=Net(), cache=tmp_path / "cache"
            )
            < 1e-9
        )


def test_likeness_and_copies(device):
    x, _ = phantoms(24)

    def see(images):
        return features.compute_features(
            images, lambda b: torch.from_numpy(b).to("mps").float().flatten(1).cpu(), 32, "mps"
        )

    space = copies.feature_space(see, flip=True)
    assert (copies.nearest_neighbours(space, x, space.reference(x))[2] == np.arange(24)).all()
    assert metrics.ms_ssim(x, [0, 1], [0, 1]) == pytest.approx([1, 1])


def test_diffusion_is_trained_and_draws(device, tmp_path):
    x, y = phantoms(16)
    prompts = ["normal lungs", "pneumonia"]
    vae = tiny_vae()
    train_vae(
        vae, x, Loop(dict(vae=TrainedPart(vae, 1e-3)), tmp_path / "vae.pt", 2), 4, device="mps"
    )
    pipe = tiny_pipeline(tmp_path / "tokenizer", prompts, 32, vae=vae)
    data = trainer.LatentSet(pipe.vae, x, prompts, y, "mps", tmp_path / "cache")
    t = trainer.Trainer(
        pipe,
        data,
        tmp_path / "run.pt",
        3,
        4,
        1e-3,
        accumulate=2,
        prior=data,
        snr_gamma=5,
        device="mps",
        warmup=1,
        ema_decay=0.9,
        clip=1.0,
    )
    t.loop.hooks.append(trainer.HeldOutLoss(t, data, 4, 2))
    log = t.run()
    assert (
        np.isfinite([r["loss"] for r in log if "loss" in r]).all()
        and pipe.unet.device.type == "mps"
    )
    assert trainer.sample_images(pipe, prompts, [1, 2], steps=2).dtype == np.uint8


def test_the_guide_trains(device, tmp_path):
    x, y = phantoms(8)
    data = [
        (torch.from_numpy(im).float()[None].expand(3, -1, -1) / 255, int(label))
        for im, label in zip(x, y)
    ]
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    with patch.object(guide, "pick_device", lambda *a: "mps"):
        history, best = guide.train_classifier(
            guide.TwoLogits("small_cnn", 32, False),
            loader,
            loader,
            2,
            device="mps",
            save_path=tmp_path / "best.pth",
        )
    assert len(history["val_auc"]) == 2 and (tmp_path / "best.pth").exists()

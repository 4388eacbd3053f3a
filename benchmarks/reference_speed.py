"""Images per second of `train_dreambooth` beside diffusers' own scripts and beside a bare loop.

Same pipeline (64 px), folder of images, batch, precision, steps and seed; every program is run twice, short
and long, and the difference counts: no start-up, no saving. Runs are taken in turn; medians. The scripts are
`train_dreambooth.py` and `train_dreambooth_lora.py` of diffusers' `examples/dreambooth`, as they are:
python benchmarks/reference_speed.py --scripts FOLDER [--vae 32 64 128] [--batch 8] [--precision no]
    [--steps 40] [--rounds 5] [--clock cpu]

The scripts encode the images again in every step. What that costs hangs on the autoencoder: the operations
of encoding an image, per operation of the U-Net's forward pass, are printed for this pipeline and for
Stable Diffusion 2.1.
"""

import argparse, contextlib, importlib.util, io, logging, os, tempfile, time
from pathlib import Path
from statistics import median

os.environ |= dict(CXR_QUIET="1", HF_HUB_OFFLINE="1", TQDM_DISABLE="1")

import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from train_speed import bare

from cxr_synth.base.settings import PROMPTS, TrainConfig
from cxr_synth.diffusion.command import train_dreambooth
from cxr_synth.diffusion.dreambooth import choose_weights
from cxr_synth.diffusion.families import known_parts, millions
from cxr_synth.diffusion.pipelines import load_pipeline
from cxr_synth.diffusion.small_pipeline import tiny_pipeline, tiny_vae
from cxr_synth.images.phantom import draw_phantom

SHORT = 4  # steps of the short run
SIDE = 64  # px
SCRIPTS = {"full": "train_dreambooth", "lora": "train_dreambooth_lora"}


def load_script(folder, name):
    "A script of diffusers as a module."
    spec = importlib.util.spec_from_file_location(name, Path(folder) / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def common(case, args, root, steps, out):
    "The flags that both understand."
    flags = dict(
        pretrained_model_name_or_path=str(root / "base"),
        instance_data_dir=str(root / "images"),
        instance_prompt=PROMPTS["normal"],
        output_dir=str(out),
        resolution=SIDE,
        train_batch_size=args.batch,
        max_train_steps=steps,
        mixed_precision=args.precision,
        learning_rate=1e-5,
        lr_scheduler="constant",
        lr_warmup_steps=0,
        seed=0,
    )
    return flags | (dict(rank=args.rank) if case["method"] == "lora" else {})


def theirs(script, case, args, root, steps, out):
    "A run of diffusers' script; it saves no checkpoint and draws nothing."
    flags = common(case, args, root, steps, out) | dict(checkpointing_steps=10**6)
    line = [word for k, v in flags.items() for word in (f"--{k}", str(v))]
    line += ["--train_text_encoder"] if case["trained"] else []
    line += ["--pre_compute_text_embeddings"] if case["precomputed"] else []
    script.args = script.parse_args(line)  # which the script for LoRA reads as a global
    script.main(script.args)


def ours(case, args, root, steps, out):
    "A run of the same settings here: no average, no previews, no held-out loss, no checkpoint."
    flags = common(case, args, root, steps, out)
    flags |= dict(train_text_encoder=case["trained"], validation_steps=0, heldout_images=None)
    train_dreambooth(**flags, checkpoint_minutes=None, device="cpu")


def bare_step(case, args, root):
    "A step of the bare loop: forward, backward, clipping, AdamW; everything else was done before."
    cfg = TrainConfig(
        method=case["method"],
        rank=args.rank,
        lora_alpha=args.rank,
        train_text_encoder=case["trained"],
        train_batch_size=args.batch,
        mixed_precision=args.precision,
    )
    pipe = load_pipeline(root / "base")
    choose_weights(pipe, cfg)
    return bare(pipe, cfg, "cpu")


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def timed(clock, run, *args):
    "Seconds of a call that prints nothing."
    start = CLOCKS[clock]()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        run(*args)
    return CLOCKS[clock]() - start


def repeated(step, steps):
    "Call a function so many times."
    for _ in range(steps):
        step()


def per_step(run, args, root):
    "Seconds of a step: a long run less a short one."
    took = []
    for steps in (SHORT, SHORT + args.steps):
        with tempfile.TemporaryDirectory(dir=root) as out:
            took.append(timed(args.clock, run, steps, Path(out) / "model"))
    return (took[1] - took[0]) / args.steps


def compare(case, args, root):
    "A row of the table."
    script = load_script(args.scripts, SCRIPTS[case["method"]])
    step = bare_step(case, args, root)
    repeated(step, SHORT)
    runs = dict(
        theirs=lambda: per_step(
            lambda n, out: theirs(script, case, args, root, n, out), args, root
        ),
        ours=lambda: per_step(lambda n, out: ours(case, args, root, n, out), args, root),
        bare=lambda: timed(args.clock, repeated, step, args.steps) / args.steps,
    )
    times = {name: [] for name in runs}
    for k in range(args.rounds):
        for name in list(runs)[:: 1 if k % 2 else -1]:
            times[name].append(runs[name]())
    speed = {name: args.batch / median(t) for name, t in times.items()}
    pairs = sorted(a / b for a, b in zip(times["theirs"], times["ours"]))
    print(
        f"{case['method']:5} {'trained' if case['trained'] else 'frozen':8} "
        f"{'before' if case['precomputed'] else 'each step':10} {speed['theirs']:8.1f} "
        f"{speed['ours']:8.1f} {speed['bare']:8.1f}   {speed['ours'] / speed['theirs']:5.2f} "
        f"({pairs[0]:.2f} to {pairs[-1]:.2f})   {speed['ours'] / speed['bare']:5.2f}",
        flush=True,
    )


def encoding_share(unet, vae, width, side):
    "Operations of encoding an image, per operation of the U-Net's forward pass."
    shrink = 2 ** (len(vae.config.block_out_channels) - 1)
    device = unet.device
    x = torch.empty(1, 3, side, side, device=device)
    z = torch.empty(1, 4, side // shrink, side // shrink, device=device)
    t, words = (
        torch.zeros(1, dtype=torch.long, device=device),
        torch.empty(1, 77, width, device=device),
    )
    counted = []
    for call in (lambda: vae.encode(x), lambda: unet(z, t, words)):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            call()
        counted.append(counter.get_total_flops())
    return counted[0] / counted[1]


def print_shares(pipe):
    "What encoding weighs here, and in the base that the guide names."
    with torch.device("meta"):
        large = known_parts("sd21-base")
    sizes = (large["text_encoder"].config.hidden_size, 512)
    theirs = encoding_share(large["unet"], large["vae"], *sizes)
    ours = encoding_share(pipe.unet, pipe.vae, pipe.text_encoder.config.hidden_size, SIDE)
    print(f"encoding an image / U-Net forward: here {ours:.2f}, Stable Diffusion 2.1 {theirs:.2f}")


def prepare(root, args):
    "A pipeline in its folder, and drawn X-rays in theirs."
    vae = tiny_vae(tuple(args.vae)) if args.vae else None
    pipe = tiny_pipeline(root / "tokenizer", PROMPTS.values(), SIDE, vae=vae)
    print_shares(pipe)
    pipe.save_pretrained(root / "base")
    (root / "images").mkdir()
    for k in range(args.images):
        image = Image.fromarray(draw_phantom(k, 0, 0, size=SIDE))
        image.save(root / "images" / f"{k:04d}.png")
    sizes = [millions(getattr(pipe, part).parameters()) for part in ("unet", "text_encoder", "vae")]
    print(
        f"U-Net, text encoder, autoencoder: {', '.join(f'{n:.2f}' for n in sizes)} M numbers; {SIDE} px, "
        f"{args.images} images, batch {args.batch}, precision {args.precision}, LoRA rank {args.rank}, "
        f"{args.steps} steps, {args.rounds} rounds, {torch.get_num_threads()} threads, {args.clock} clock"
    )


def cases():
    "Method, text encoder, and when diffusers' script encodes the prompt."
    for method in SCRIPTS:
        yield dict(method=method, trained=False, precomputed=False)
        yield dict(method=method, trained=False, precomputed=True)
        yield dict(method=method, trained=True, precomputed=False)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scripts", required=True, help="folder of diffusers' two scripts")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: on a busy machine")
    parser.add_argument("--vae", type=int, nargs="*", help="channels of the autoencoder's levels")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--precision", default="no")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rank", type=int, default=16)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    print("method encoder  prompt       theirs     ours     bare   ours/theirs          ours/bare")
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), args)
        for case in cases():
            compare(case, args, Path(folder))

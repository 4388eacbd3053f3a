"""A 60-step run killed (SIGKILL) at random moments and started again.

Is everything in its folder, to the bit, what an undisturbed run leaves?
python benchmarks/kill_train.py [--kills 10] [--seed 0] [--methods full lora]
"""

import argparse, multiprocessing, random, shutil, tempfile, time
from pathlib import Path

METHODS = {"full": {}, "lora": dict(rank=4)}


def prepare(root):
    "A small untrained base and a folder of drawn images."
    from PIL import Image
    from cxr_synth.base.settings import PROMPTS
    from cxr_synth.images.phantom import draw_phantom
    from cxr_synth.diffusion.small_pipeline import tiny_pipeline

    tiny_pipeline(root / "tokenizer", PROMPTS.values(), 32).save_pretrained(root / "base")
    (root / "images").mkdir()
    for k in range(12):
        Image.fromarray(draw_phantom(k, 0, 0, size=32)).save(root / f"images/{k}.png")


def train(root, out, method):
    "The run: previews, held-out loss, average, snapshots, prior and log are all on."
    import torch
    from cxr_synth.base.settings import PROMPTS
    from cxr_synth.diffusion.command import train_dreambooth

    torch.set_num_threads(1)
    train_dreambooth(
        pretrained_model_name_or_path=str(root / "base"),
        instance_data_dir=str(root / "images"),
        output_dir=str(out),
        instance_prompt=PROMPTS["normal"],
        resolution=32,
        train_batch_size=2,
        learning_rate=1e-3,
        max_train_steps=60,
        train_text_encoder=True,
        with_prior_preservation=True,
        class_data_dir=str(root / "images"),
        validation_steps=60,
        num_validation_images=1,
        heldout_data_dir=str(root / "images"),
        heldout_images=4,
        heldout_steps=10,
        checkpoint_steps=7,
        ema_decay=0.9,
        snapshots=20,
        prompt_dropout=0.1,
        noise_offset=0.1,
        snr_gamma=5.0,
        device="cpu",
        **METHODS[method],
    )


def contents(out):
    "SHA-256 of every file of a finished run; the checkpoint is gone by then."
    from cxr_synth.base.files import digest_file

    return {
        p.relative_to(out).as_posix(): digest_file(p) for p in sorted(out.rglob("*")) if p.is_file()
    }


def context():
    "Children start from a server that has imported the library once."
    ctx = multiprocessing.get_context("forkserver")
    ctx.set_forkserver_preload(["cxr_synth.diffusion.dreambooth"])
    return ctx


def finish(ctx, *args):
    p = ctx.Process(target=train, args=args)
    start = time.perf_counter()
    p.start()
    p.join()
    if p.exitcode:
        raise SystemExit(f"the run ended with status {p.exitcode}: {args[1]} cannot be resumed")
    return time.perf_counter() - start


def kill_once(ctx, seconds, *args):
    "Whether the run was still going when it was killed."
    p = ctx.Process(target=train, args=args)
    p.start()
    p.join(seconds)
    alive = p.is_alive()
    p.kill()
    p.join()
    return alive


def killed_and_resumed(ctx, root, method, kills, rng):
    """Kill the runs of one folder after another, up to twice each, until `kills` have died.

    Every folder must end like the undisturbed one. Returns the steps at which they died.
    """
    from cxr_synth.base.readers import read_csv

    p = ctx.Process(target=contents, args=(root,))
    p.start()
    p.join()  # the first child also waits for the server to import the library
    duration = finish(ctx, root, root / f"{method}-calm", method)
    calm = contents(root / f"{method}-calm")
    died = []
    folder = 0
    while len(died) < kills:
        out, folder = root / f"{method}-{folder}", folder + 1
        for _ in range(min(2, kills - len(died))):  # one that was resumed is killed again
            if not kill_once(ctx, rng.uniform(0, duration), root, out, method):
                break
            log = out / "checkpoints/last.csv"
            died.append(int(read_csv(log)[-1]["step"]) + 1 if log.exists() else 0)
        finish(ctx, root, out, method)
        assert contents(out) == calm, (
            f"{out.name} differs: {[k for k in calm if contents(out).get(k) != calm[k]]}"
        )
        shutil.rmtree(out)
    return died


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    args, root = parser.parse_args(), Path(tempfile.mkdtemp())
    rng = random.Random(args.seed)
    prepare(root)
    for method in args.methods:
        print(
            f"{method}: killed after the checkpoints of steps "
            f"{killed_and_resumed(context(), root, method, args.kills, rng)}; all folders equal "
            "the undisturbed one"
        )
    shutil.rmtree(root)

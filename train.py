"""Trains the TAE, the base DiT, its VideoJAM fine-tuning, and a control without motion.

    python train.py                             the sprite world, every stage: 20 minutes, one core
    python train.py --data FOLDER               own videos: FOLDER/metadata.csv with file_name, text
    python train.py --stage jam --steps 5000    one stage, or the same stage for longer

Stages, in order: tae; encode (latents of videos and of their RGB flow); base (Eq. 3); jam (Eq. 6,
from the base); control (Eq. 3, from the base, for exactly jam's steps, data and learning rate).
A run is a folder: settings.json, a checkpoint a stage, latents/, previews/, metrics.jsonl, and
model.pt, the bundle that `python sample.py --run FOLDER` takes. Everything random in a step follows
from (seed, stage, step), so a run that was interrupted ends with the same weights to the bit.
"""
import argparse
import copy
import csv
import dataclasses
import json
import os
import shutil
import signal
import time
import zlib
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from flow import (HELD_OUT, RAFT, ROOT, estimate_flow, flow_to_rgb, read_file, report_errors,
                  sprite_clips, write_file)
from videojam import PRESETS, TAE, DiT, VideoJAM, squared_errors, tae_loss, tokenize

STAGES = ("tae", "encode", "base", "jam", "control")
# preset -> stage -> (steps, learning rate, batch); encode's "steps" are clips. The toy's take
# 20 minutes of one core; the paper's fine-tuning is 50,000 x 32 (4b) and 35,000 x 256 (30b) at 5e-6
DEFAULTS = {
    "toy": {"tae": (900, 1e-3, 4), "encode": (4096, 0, 32), "base": (2800, 3e-3, 32),
            "jam": (600, 1e-3, 32), "control": (600, 1e-3, 32)},
    "small": {"tae": (50_000, 3e-4, 8), "encode": (100_000, 0, 8), "base": (200_000, 2e-4, 64),
              "jam": (20_000, 5e-5, 64), "control": (20_000, 5e-5, 64)},
    "4b": {"tae": (300_000, 1e-4, 32), "encode": (3_000_000, 0, 1), "base": (500_000, 1e-4, 256),
           "jam": (50_000, 5e-6, 32), "control": (50_000, 5e-6, 32)},
    "30b": {"tae": (300_000, 1e-4, 32), "encode": (9_000_000, 0, 1), "base": (500_000, 1e-4, 1024),
            "jam": (35_000, 5e-6, 256), "control": (35_000, 5e-6, 256)},
}
VERSION = 2                             # of a run's folder: raised when old runs cannot go on
SHARD = 512                             # clips in a file of latents
CHECKPOINT_SECONDS = 60
T_BINS = 5                              # losses are reported apart for t in [0, .2), [.2, .4), ...


# ---------------------------------------------------------------- data

class Sprites:
    """The sprite world, endless: clip i is seed i, with its exact flow."""
    def __init__(self, preset, rich):
        self.preset, self.rich = preset, rich

    def clips(self, indices):
        """Video and RGB flow (n, T, 3, H, W) in [0, 1], captions."""
        video, flow, captions, _ = sprite_clips(indices, self.preset.frames, self.preset.size,
                                                self.rich)
        return video, flow_to_rgb(flow), captions

    def held_out(self, n):
        return self.clips(range(HELD_OUT, HELD_OUT + n))


def read_video(path, fps, size):
    """A video file at `fps` and cropped to a square: (T, 3, size, size) uint8."""
    meta = iio.immeta(path, plugin="FFMPEG")
    step, frames = meta["fps"] / fps, []
    for index, frame in enumerate(iio.imiter(path, plugin="FFMPEG")):
        # output frame k shows what the input shows at time k / fps; slow videos repeat frames
        while round(len(frames) * step) == index:
            image = torch.from_numpy(frame).permute(2, 0, 1)[None].float()
            scale = size / min(image.shape[-2:])
            sides = [max(size, round(side * scale)) for side in image.shape[-2:]]
            image = F.interpolate(image, sides, mode="bilinear", antialias=True)[0]
            top, left = (sides[0] - size) // 2, (sides[1] - size) // 2
            frames.append(image[:, top:top + size, left:left + size].round().byte())
    return torch.stack(frames)


class Folder:
    """Videos of a folder, listed with captions in its metadata.csv; flow by RAFT. Clip i is cut
    from video i modulo their number, at an offset that i decides."""
    def __init__(self, path, preset):
        self.preset, path = preset, Path(path)
        with open(path / "metadata.csv", newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        if not rows or not {"file_name", "text"} <= set(rows[0]):
            raise ValueError(f"{path}/metadata.csv: needs rows with columns file_name and text")
        raft, self.videos, self.motions, self.captions = RAFT.load(), [], [], []
        for row in tqdm(rows, desc="reading videos, estimating their flow"):
            try:
                video = read_video(path / row["file_name"], preset.fps, preset.size)
            except Exception as error:      # whatever the decoder says of a broken file
                tqdm.write(f"skipped {row['file_name']}: {' '.join(str(error).split())[:100]}")
                continue
            if len(video) < preset.frames:
                tqdm.write(f"skipped {row['file_name']}: {len(video)} frames at {preset.fps} fps, "
                           f"a clip takes {preset.frames}")
                continue
            flow = estimate_flow(raft, video[None] / 255)[0]
            self.videos.append(video)
            self.motions.append((flow_to_rgb(flow) * 255).round().byte())
            self.captions.append(row["text"])
        if not self.videos:
            raise ValueError(f"{path}: none of the {len(rows)} videos in metadata.csv can be used")
        print(f"{path}: {len(self.videos)} of {len(rows)} videos, "
              f"{sum(map(len, self.videos)) / preset.fps:.0f} s at {preset.fps} fps")

    def clips(self, indices):
        T, cuts, captions = self.preset.frames, [], []
        for i in indices:
            k = i % len(self.videos)
            start = int(np.random.default_rng(i).integers(len(self.videos[k]) - T + 1))
            cuts.append((self.videos[k][start:start + T], self.motions[k][start:start + T]))
            captions.append(self.captions[k])
        video, motion = (torch.stack(part) / 255 for part in zip(*cuts))
        return video, motion, captions

    def held_out(self, n):              # few videos: previews show clips that it learns from
        return self.clips(range(n))


class Latents:
    """What the encode stage wrote, memory-mapped: a clip's x, d (C, T', H', W') and caption."""
    def __init__(self, folder):
        names = sorted(path.stem for path in folder.glob("*.json"))
        self.x = [np.load(folder / f"{name}.x.npy", mmap_mode="r") for name in names]
        self.d = [np.load(folder / f"{name}.d.npy", mmap_mode="r") for name in names]
        self.captions = [caption for name in names
                         for caption in json.loads((folder / f"{name}.json").read_text())]

    def batch(self, indices, max_bytes):
        def gather(shards):
            clips = np.stack([shards[i // SHARD][i % SHARD] for i in indices])
            return torch.from_numpy(clips).float()
        y = tokenize([self.captions[i] for i in indices], max_bytes)
        return gather(self.x), gather(self.d), y


# ---------------------------------------------------------------- a run and its folder

def generator(*key):
    """A random stream of its own for (seed, stage, step)."""
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))


def device_of(name):
    """The device that --device names. ValueError where this machine has none such."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError):
        raise ValueError(f"--device {name}: no such device, take cpu or cuda") from None


def can_compile(device):
    """torch.compile needs a C++ compiler on a CPU."""
    return device.type != "cpu" or shutil.which(os.environ.get("CXX", "g++")) is not None


def weights_of(args):
    """The bundle that --run names; without it, the shipped one."""
    return Path(args.run) / "model.pt" if args.run else ROOT / "weights/toy.pt"


def read_lines(path):
    """The prompts of a text file, one a line; ValueError where there are none."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {getattr(error, 'strerror', 'not UTF-8')}") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{path}: no prompt in it")
    return prompts


def write_video(path, video, fps, scale=None):
    """(T, 3, H, W) in [0, 1] -> .mp4 or .gif, enlarged to about 256 px so that a person can see."""
    scale = scale or max(1, round(256 / video.shape[-2]))
    frames = (video.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    frames = frames.repeat(scale, 1).repeat(scale, 2)
    options = {"duration": 1000 / fps, "loop": 0} if Path(path).suffix == ".gif" else \
        {"plugin": "FFMPEG", "fps": fps, "macro_block_size": 2, "output_params": ["-crf", "12"]}
    write_file(path, lambda temporary: iio.imwrite(temporary, frames, **options))


def grid(*videos):
    """Videos (n, T, 3, H, W) -> one (T, 3, H', W'): a column for each of n, a row an argument."""
    rows = [torch.cat(list(F.pad(video, (1, 1, 1, 1), value=1)), -1) for video in videos]
    return torch.cat(rows, -2)


class Run:
    """A run's folder and what all of its stages share."""
    def __init__(self, args):
        self.args, self.preset = args, PRESETS[args.preset]
        self.out, self.device = Path(args.out), args.device
        settings = {"preset": args.preset, "data": args.data, "rich": args.rich, "seed": args.seed}
        path = self.out / "settings.json"
        if path.is_file():
            before = json.loads(path.read_text())
            changed = "; ".join(f"{k} {before.get(k)!r}, not {v!r}" for k, v in settings.items()
                                if before.get(k) != v)
            if changed:
                raise ValueError(f"{self.out} was begun with {changed}: take another --out")
        if args.data and not (Path(args.data) / "metadata.csv").is_file():
            raise ValueError(f"{args.data}: no metadata.csv (columns file_name and text) in it")
        try:
            (self.out / "previews").mkdir(parents=True, exist_ok=True)
            write_file(path, lambda temporary: temporary.write_text(json.dumps(settings, indent=1)))
        except OSError as error:
            raise ValueError(f"cannot write into {self.out}: {error.strerror}") from None
        self.world = None

    def data(self):
        """The videos, read only when a stage needs them."""
        if self.world is None:
            self.world = Folder(self.args.data, self.preset) if self.args.data else \
                Sprites(self.preset, self.args.rich)
        return self.world

    def setting(self, stage):
        """(steps, learning rate, batch) of a stage: the flags, or the preset's defaults."""
        flags = self.args.steps, self.args.lr, self.args.batch
        pairs = zip(flags, DEFAULTS[self.args.preset][stage])
        return tuple(default if flag is None else flag for flag, default in pairs)

    def checkpoint(self, stage):
        """A stage's last checkpoint, None before the first."""
        path = self.out / f"{stage}.pt"
        state = read_file(path, "checkpoint") if path.exists() else None
        if state and state.get("version") != VERSION:
            raise ValueError(f"{path}: of another version of train.py, take another --out")
        return state

    def finished(self, stage, module):
        """The module with a stage's weights (EMA) in it, and the step that they are of."""
        state = self.checkpoint(stage)
        if state is None:
            raise ValueError(f"{self.out}: has no {stage} yet, run --stage {stage} first")
        if state["step"] < state["of"]:
            raise ValueError(f"{self.out}: {stage} stopped at step {state['step']} of "
                             f"{state['of']}, finish it first with --stage {stage}")
        module.load_state_dict(state["ema"])
        return module.to(self.device).eval(), state["step"]

    def tae(self):
        return self.finished("tae", TAE(self.preset.tae))[0].requires_grad_(False)

    def log(self, **row):
        with open(self.out / "metrics.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")

    def forget_after(self, stage, step):
        """Takes the rows of steps that are to be done again out of metrics.jsonl."""
        path = self.out / "metrics.jsonl"
        if path.exists():
            lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
            kept = [row for row in map(json.loads, lines)
                    if row["stage"] != stage or row["step"] <= step]
            text = "".join(json.dumps(row) + "\n" for row in kept)
            write_file(path, lambda temporary: temporary.write_text(text))

    def export(self):
        """model.pt: the TAE and every DiT that is trained by now."""
        dits = {}
        for stage in ("jam", "base", "control"):
            state = self.checkpoint(stage)
            if state and state["step"] == state["of"]:
                dits[stage] = self.new_dit(motion=stage == "jam")
                dits[stage].load_state_dict(state["ema"])
        if dits:
            which = next(iter(dits))
            bundle = VideoJAM(self.preset, self.tae(), dits.pop(which), which)
            bundle.save(self.out / "model.pt", **dits)

    def new_dit(self, motion=False):
        return DiT(dataclasses.replace(self.preset.dit, motion=motion))


# ---------------------------------------------------------------- one loop for every stage

def average(values):
    """The mean of numbers, or of rows of them by column, without NaNs; None where none is left."""
    columns = [c[~np.isnan(c)] for c in np.array(values, float).reshape(len(values), -1).T]
    means = [round(float(c.mean()), 5) if len(c) else None for c in columns]
    return means if isinstance(values[0], list) else means[0]


def optimize(run, stage, model, loss_of, preview, finish=lambda ema: None, origin=None):
    """Trains `model` for a stage's steps, from its last checkpoint on: AdamW, gradients clipped to
    norm 1, an exponential moving average (EMA) of the weights; a short warm-up, then a constant
    learning rate that falls to zero over the last 30% (a stage made longer goes back up).

    loss_of(step) -> scalar loss, {name: float or list} to report; preview(ema, step) writes a
    video; finish(ema) completes the average at the end; `origin`: what the stage starts from."""
    steps, lr, batch = run.setting(stage)
    print(f"{stage}: {steps} steps, lr {lr:g}, batch {batch}, "
          f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {run.device}, "
          f"{'compiled' if run.args.compile else 'not compiled'}")
    model.to(run.device).train()
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr, (.9, .99), weight_decay=0, fused=True)
    step, state = 0, run.checkpoint(stage)
    settings = {"lr": lr, "batch": batch, "origin": origin, "uniform_t": run.args.uniform_t}
    if state:
        changed = "; ".join(f"{k} {state[k]}, not {v}" for k, v in settings.items()
                            if state[k] != v)
        if changed:
            raise ValueError(f"{run.out}/{stage}.pt was begun with {changed}: take another --out, "
                             f"or delete that file to begin the stage again")
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    run.forget_after(stage, step)
    if step >= steps:
        return print(f"{stage}: {step} steps are done already")

    def save():
        content = {"kind": "checkpoint", "version": VERSION, "stage": stage, "step": step,
                   "of": steps, **settings, "model": model.state_dict(), "ema": ema.state_dict(),
                   "optimizer": optimizer.state_dict()}
        write_file(run.out / f"{stage}.pt", lambda temporary: torch.save(content, temporary))

    if run.args.compile and isinstance(model, DiT):
        model.compile_blocks()
    saved, recent, every = time.time(), [], max(1, min(50, steps // 10))
    bar = tqdm(total=steps, initial=step, desc=stage, smoothing=.05)
    stopped = []                                            # Ctrl-C waits for the end of the step
    handler = signal.signal(signal.SIGINT, lambda *_: stopped.append(True))
    try:
        while step < steps:
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1, (step + 1) / min(200, steps / 10 + 1),
                                       (steps - step) / (.3 * steps))
            with torch.autocast(run.device.type, torch.bfloat16):
                loss, report = loss_of(step)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            decay = min(.999, (1 + step) / (10 + step))         # short runs forget their start too
            with torch.no_grad():
                torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
            recent.append(report)
            bar.update()
            if step % every == 0 or step == steps:
                row = {k: average([r[k] for r in recent]) for k in recent[0]}
                run.log(stage=stage, step=step, lr=group["lr"], **row)
                bar.set_postfix({k: v for k, v in row.items() if not isinstance(v, list)})
                recent = []
            if step == steps:
                finish(ema)
            if step == steps or step % max(1, steps // 5) == 0:
                preview(ema, step)
            if step == steps or stopped or time.time() - saved > CHECKPOINT_SECONDS:
                save()
                saved = time.time()
            if stopped:
                raise ValueError(f"stopped at step {step} of {stage}: the same command goes on")
    finally:
        signal.signal(signal.SIGINT, handler)
        bar.close()


# ---------------------------------------------------------------- the stages

def train_tae(run):
    """The auto-encoder of videos and their RGB flow alike; then its latents' statistics."""
    torch.manual_seed(run.args.seed)
    tae, batch = TAE(run.preset.tae), run.setting("tae")[2]

    def loss_of(step):
        clips = torch.cat(run.data().clips(range(step * batch, (step + 1) * batch))[:2])
        loss = tae_loss(tae, clips.to(run.device), generator=generator(run.args.seed, "tae", step))
        return loss, {"loss": loss.item()}

    def reconstructions(ema, n):
        video, motion, _ = run.data().held_out(n)
        with torch.no_grad(), torch.autocast(run.device.type, torch.bfloat16):
            return [(clips, ema.decode(ema.encode(clips.to(run.device))).cpu()[:, :clips.shape[1]])
                    for clips in (video, motion)]

    def preview(ema, step):
        pairs = reconstructions(ema, 8)
        psnr = [-10 * (a - b).square().mean((1, 2, 3, 4)).log10().mean().item() for a, b in pairs]
        run.log(stage="tae", step=step, psnr_video=round(psnr[0], 2), psnr_motion=round(psnr[1], 2))
        tqdm.write(f"tae: step {step}, held-out PSNR {psnr[0]:.1f} dB, RGB flow {psnr[1]:.1f} dB")
        write_video(run.out / f"previews/tae-{step:06d}.mp4", grid(*pairs[0], *pairs[1]),
                    run.preset.fps)

    def finish(ema):
        """The latents' basis, from 256 clips and from their RGB flow."""
        clips = [run.data().clips(range(start, start + batch)) for start in range(0, 256, batch)]
        with torch.autocast(run.device.type, torch.bfloat16):
            for kind, videos in enumerate(list(zip(*clips))[:2]):
                ema.fit_basis([video.to(run.device) for video in videos], bool(kind),
                              generator(run.args.seed, "basis", kind))

    optimize(run, "tae", tae, loss_of, preview, finish)


def encode(run):
    """Latents of clips and of their flow, in shards; those that are there already are kept."""
    clips, _, batch = run.setting("encode")
    folder = run.out / "latents"
    folder.mkdir(exist_ok=True)
    tae, tae_step = run.finished("tae", TAE(run.preset.tae))
    stamp = folder / "tae_step"
    if stamp.exists() and int(stamp.read_text()) != tae_step:
        raise ValueError(f"{folder} was encoded by the TAE of step {stamp.read_text()}, it is now "
                         f"at {tae_step}: delete it and the stages after it, or take another --out")
    write_file(stamp, lambda temporary: temporary.write_text(str(tae_step)))
    shards = -(-clips // SHARD)
    missing = [s for s in range(shards) if not (folder / f"{s:05d}.json").exists()]
    print(f"encode: {clips} clips in {shards} shards of {SHARD}, {len(missing)} to do")
    for shard in tqdm(missing, desc="encode", unit_scale=SHARD, unit="clip"):
        x, d, captions = [], [], []
        for start in range(shard * SHARD, (shard + 1) * SHARD, batch):
            end = min(start + batch, (shard + 1) * SHARD)
            video, motion, text = run.data().clips(range(start, end))
            with torch.no_grad(), torch.autocast(run.device.type, torch.bfloat16):
                x.append(tae.encode(video.to(run.device)).half().cpu().numpy())
                d.append(tae.encode(motion.to(run.device), motion=True).half().cpu().numpy())
            captions += text
        # the captions come last: a shard that has them is complete
        write_file(folder / f"{shard:05d}.x.npy", lambda file: np.save(file, np.concatenate(x)))
        write_file(folder / f"{shard:05d}.d.npy", lambda file: np.save(file, np.concatenate(d)))
        write_file(folder / f"{shard:05d}.json", lambda file: file.write_text(json.dumps(captions)))


def train_dit(run, stage):
    """base, jam or control: the same data and lines; jam alone has d beside x."""
    motion, origin = stage == "jam", None
    if stage == "base":
        torch.manual_seed(run.args.seed)
        model = run.new_dit()
    else:
        model, base_step = run.finished("base", run.new_dit())
        model.requires_grad_(True)
        origin = f"base at step {base_step}"
        if motion:
            model.add_motion()
    latents = Latents(run.out / "latents")
    if not latents.captions:
        raise ValueError(f"{run.out}: has no latents yet, run --stage encode first")
    batch, C = run.setting(stage)[2], run.preset.tae.channels
    # the control's draws are jam's: the same clips, noise of x, times and dropped prompts
    stream = "base" if stage == "base" else "fine-tuning"

    def loss_of(step):
        rng = generator(run.args.seed, stream, step)
        indices = torch.randint(len(latents.captions), (batch,), generator=rng).tolist()
        x1, d1, y = (part.to(run.device) for part in latents.batch(indices, model.config.max_bytes))
        z1 = torch.cat([x1, d1], 1) if motion else x1
        t, errors = squared_errors(model, z1, y, C, uniform=run.args.uniform_t, generator=rng)
        parts = {"x": errors[:, :C].detach().mean(1)}
        if motion:
            parts["d"] = errors[:, C:].detach().mean(1)
        report = {f"loss_{name}": part.mean().item() for name, part in parts.items()}
        bins = (t * T_BINS).long().clamp(max=T_BINS - 1)
        for name, part in parts.items():
            report[f"bins_{name}"] = [part[bins == b].mean().item() for b in range(T_BINS)]
        return errors.mean(), report

    def preview(ema, step):
        *_, captions = run.data().held_out(8)
        bundle = VideoJAM(run.preset, run.tae(), ema, stage)
        shown = [part.cpu() for part in bundle.generate(captions, steps=30) if part is not None]
        bundle.dit.train()
        write_video(run.out / f"previews/{stage}-{step:06d}.mp4", grid(*shown), run.preset.fps)

    optimize(run, stage, model, loss_of, preview, origin=origin)


# ---------------------------------------------------------------- command line

def parse():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--preset", default="toy", help=f"one of {', '.join(PRESETS)}")
    parser.add_argument("--data", help="folder of videos and metadata.csv; default: sprite world")
    parser.add_argument("--out", help="folder of the run; default: runs/PRESET, or runs/DATA")
    parser.add_argument("--stage", choices=STAGES, help="this one alone; default: all, in order")
    parser.add_argument("--steps", type=int, help="of each stage run (encode: clips)")
    parser.add_argument("--lr", type=float, help="learning rate of each stage run")
    parser.add_argument("--batch", type=int, help="clips in a step of each stage run")
    parser.add_argument("--rich", type=float, default=.2, help="sprite world: share of textured "
                        "backgrounds, and of scenes with several sprites (default %(default)s)")
    parser.add_argument("--uniform-t", action=argparse.BooleanOptionalAction, help="uniform t, or "
                        "logit-normal; default: uniform for the toy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction,
                        help="torch.compile each block; default: where a C++ compiler is")
    args = parser.parse_args()
    if args.preset not in PRESETS:
        raise ValueError(f"unknown preset {args.preset!r}: one of {', '.join(PRESETS)}")
    for name in ("steps", "lr", "batch"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            raise ValueError(f"--{name} must be positive, got {getattr(args, name)}")
    if not 0 <= args.rich <= 1:
        raise ValueError(f"--rich must be from 0 to 1, got {args.rich}")
    if args.data:
        args.data = str(Path(args.data).resolve())
    args.out = args.out or f"runs/{Path(args.data).name if args.data else args.preset}"
    if args.uniform_t is None:          # where a toy's few latents lie is decided before t = .1,
        args.uniform_t = args.preset == "toy"       # of which logit-normal samples only 1.4%
    args.device = device_of(args.device)
    if args.compile is None:
        args.compile = can_compile(args.device)
    return args


def main():
    args = parse()
    run = Run(args)
    for stage in [args.stage] if args.stage else STAGES:
        start = time.time()
        if stage == "tae":
            train_tae(run)
        elif stage == "encode":
            encode(run)
        else:
            train_dit(run, stage)
            run.export()
        print(f"{stage}: {time.time() - start:.0f} s")
    print(f'{run.out}: done. python sample.py --run {run.out} "a red square moves left"')


if __name__ == "__main__":
    report_errors(main)

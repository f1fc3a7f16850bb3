"""Motion: optical flow as an RGB video (Eq. 5), a sprite world whose flow is exact, and RAFT.

    python flow.py video.mp4        the flow of a video, as a video beside it
    python flow.py --train          train RAFT from nothing on scenes with exact flow
    python flow.py --eval FOLDER    end-point error on pairs with true flow

Flow is (..., 2, H, W) in pixels per frame, x (right) then y (down). Flow k goes from frame k to
frame k + 1; the last one is repeated, so that flow and video have the same length.
"""
import argparse
import contextlib
import ctypes
import itertools
import logging
import math
import os
import re
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import imageio.v3 as iio
import imageio_ffmpeg
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent
logging.getLogger("imageio_ffmpeg").setLevel(logging.ERROR)     # it warns of every resized video

# ---------------------------------------------------------------- files and errors, for all scripts

def out_of_memory(error):
    """Whether an exception says so; a CPU's is a RuntimeError."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or \
        "can't allocate memory" in str(error)


def one_line(error):
    """The beginning of what an exception says, which may be long."""
    return " ".join(str(error).split())[:200]


class Parser(argparse.ArgumentParser):
    """A flag that is wrong is bad input like any other: one line, by `report_errors`."""
    def error(self, message):
        raise ValueError(f"{message} (-h shows all flags)")


def report_errors(main):
    """Runs a script's main. Bad input, a ValueError, a file that cannot be read or written, or too
    little memory ends as one line on stderr and exit code 2, Ctrl-C as one line and a shell's
    usual 130."""
    script = Path(sys.argv[0]).name
    if hasattr(sys.stdout, "reconfigure"):          # (a notebook's has not)
        sys.stdout.reconfigure(errors="backslashreplace")   # names of files may be any bytes
    try:
        main()
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        if out_of_memory(error):
            error = ("out of memory: take a smaller batch or size, fewer videos, or (training) "
                     "--accumulate")
        elif isinstance(error, RuntimeError):
            raise
        elif getattr(error, "filename", None):
            error = f"cannot use {error.filename}: {error.strerror}"
        print(f"{script}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{script}: interrupted; what was written is whole", file=sys.stderr)
        sys.exit(130)


def write_file(path, save):
    """Calls save(temporary path), then renames: a file is either whole or not there."""
    path = Path(path)
    if not path.parent.is_dir():
        raise ValueError(f"{path.parent}: no such folder to write {path.name} into")
    # (resolved: imageio would take link/.. for nothing)
    temporary = path.parent.resolve() / f".{path.stem}.{os.getpid()}.part{path.suffix}"
    try:
        save(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:        # (torch.save's own are RuntimeErrors)
        if out_of_memory(error):                    # of what is computed while it is written
            raise
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise ValueError(f"cannot write {path}: {reason}") from None
    finally:
        temporary.unlink(missing_ok=True)


def check_video(path, frames):
    """OSError where a video that was just written is not whole, of which ffmpeg says nothing."""
    try:                    # (absolute: to ffmpeg a name that begins as 12: has a protocol)
        whole = imageio_ffmpeg.count_frames_and_secs(str(path.absolute()))[0] == frames
    except RuntimeError:
        whole = False
    if not whole:
        raise OSError("the video is not whole, is the disk full?")


def write_video(path, video, fps, scale=None):
    """(T, 3, H, W) in [0, 1] -> .mp4 or .gif, enlarged to about 256 px so that a person can see."""
    scale = scale or max(1, round(256 / video.shape[-2]))
    frames = (video.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    frames = frames.repeat(scale, 1).repeat(scale, 2)

    def save(temporary):
        if temporary.suffix == ".gif":
            temporary.write_bytes(iio.imwrite("<bytes>", frames, extension=".gif", loop=0,
                                              duration=1000 / fps))
        else:
            iio.imwrite(temporary, frames, plugin="FFMPEG", fps=fps, macro_block_size=2,
                        output_params=["-crf", "12"], ffmpeg_log_level="quiet")
            check_video(temporary, len(frames))

    write_file(path, save)


def grid(*videos):
    """Videos (n, T, 3, H, W) -> one (T, 3, H', W'): a column for each of n, a row an argument."""
    rows = [torch.cat(list(F.pad(video, (1, 1, 1, 1), value=1)), -1) for video in videos]
    return torch.cat(rows, -2)


def write_text(path, text):
    write_file(path, lambda temporary: temporary.write_text(
        text, encoding="utf-8", errors="surrogateescape"))      # names that are not UTF-8 too


def read_lines(path):
    """The prompts of a text file, one a line; ValueError where there are none."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {getattr(error, 'strerror', 'not UTF-8')}") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{path}: no prompt in it")
    return prompts


def on_cpu(content):
    """The same data with its tensors on the CPU."""
    if isinstance(content, dict):
        return {key: on_cpu(value) for key, value in content.items()}
    return content.cpu() if torch.is_tensor(content) else content


def write_tensors(path, content):
    """A dict of data and tensors; with a "kind" in it `read_file` reads it. (Tensors of a GPU would
    come back on a GPU, where others have none.)"""
    write_file(path, lambda temporary: torch.save(on_cpu(content), temporary))


def read_file(path, kind):
    """torch.load of data alone (no code runs); whatever is wrong with the file becomes one line.
    Tensors are read from the file when they are used, unless it is compressed: of a large bundle
    the model that is wanted, once for all processes of a machine."""
    try:
        with zipfile.ZipFile(path) as archive:
            stored = all(part.compress_type == zipfile.ZIP_STORED for part in archive.infolist())
        content = torch.load(str(path), map_location="cpu", weights_only=True, mmap=stored)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from None
    except Exception:
        raise ValueError(f"{path}: not a {kind} file, or damaged") from None
    if not isinstance(content, dict) or content.get("kind") != kind:
        raise ValueError(f"{path}: not a {kind} file")
    return content


def keep_memory():
    """Has glibc's malloc keep what is freed. It would give large blocks back to the system, and
    each step of a training on a CPU would ask for them again, page by page: of the toy's, 6,000
    pages in `train.py` and 5 to 20% of its time. (With another malloc nothing happens.)"""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt, M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = ctypes.CDLL(None).mallopt, -1, -3
        mallopt(M_TRIM_THRESHOLD, 2 ** 31 - 1)
        mallopt(M_MMAP_THRESHOLD, 2 ** 25)      # (older ones take no more)


def device_of(name):
    """The device that --device names; without it, a GPU if there is one. ValueError where this
    machine has none such. What begins with it keeps its memory: see above."""
    keep_memory()
    name, why = name or ("cuda" if torch.cuda.is_available() else "cpu"), "meta holds no numbers"
    try:
        if (device := torch.empty(0, device=name).device).type != "meta":
            return device
    except (RuntimeError, AssertionError, ImportError) as error:
        why = str(error).splitlines()[0][:100]
    raise ValueError(f"--device {name}: no such device, take cpu or cuda ({why})")


def refuse_changes(path, before, settings, remedy="take another --out"):
    """ValueError where a folder's training was begun with other settings than these."""
    changed = "; ".join(f"{k} {before.get(k)!r}, not {v!r}" for k, v in settings.items()
                        if before.get(k) != v)
    if changed:
        raise ValueError(f"{path} was begun with {changed}: {remedy}")


def cpu_capabilities():
    """{instruction set: whether this CPU has it}; empty where torch (2.11) does not tell."""
    return getattr(torch.cpu, "get_capabilities", dict)()


def fast_dtype(device):
    """bf16 where the device multiplies it faster than fp32: GPUs, and CPUs that have instructions
    for it. Elsewhere fp32, which is two to four (with AVX2 alone 400) times as fast there."""
    if torch.device(device).type != "cpu":
        return torch.bfloat16
    has = cpu_capabilities()
    return torch.bfloat16 if has.get("amx_bf16") or has.get("avx512_bf16") else torch.float32


def autocast(device, dtype=None):
    """Matrix products in `dtype`, by default the device's fast one; the weights stay fp32."""
    dtype = dtype or fast_dtype(device)
    return torch.autocast(torch.device(device).type, torch.bfloat16, dtype == torch.bfloat16)


# ---------------------------------------------------------------- an optimizer for matrices

BAD_STEPS = 10                          # so many not finite in a row end a training
# (a, b, c) of four steps X <- a X + (b A + c A^2) X, A = X X^T: each the polynomial that brings all
# singular values nearest to 1, from where the step before left those between .003 and 1, with 1%
# to spare for bf16 (Amsel et al., 2025, "The Polar Express"; Muon has one polynomial, five times)
POLAR = ((8.3019, -24.0424, 17.4699), (4.0103, -2.9290, .5430), (3.5027, -2.5773, .5049),
         (2.5229, -1.8395, .4272))


def orthogonalized(matrices):
    """Matrices (n, rows, columns) with the same singular vectors, but singular values of about 1:
    .78 to 1.22 from .003 of the matrix' norm on, smaller ones 290 times as large as they were.
    Where rows are sharded, each process takes whole matrices, its share of the n."""
    if hasattr(matrices, "placements"):         # a DTensor
        from torch.distributed.tensor import DTensor, Shard     # (a second, for those who need it)
        rows, mesh = matrices.placements, matrices.device_mesh
        taken = matrices.redistribute(placements=[Shard(0) if p.is_shard() else p for p in rows])
        done = DTensor.from_local(orthogonalized(taken.to_local()).contiguous(), mesh,
                                  taken.placements, shape=taken.shape, stride=taken.stride())
        return done.redistribute(placements=rows)
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    X = wide.to(fast_dtype(matrices.device))
    X = X / X.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for a, b, c in POLAR:
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X if wide is matrices else X.mT


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024) with Nesterov's momentum, for matrices and for convolutions'
    kernels, which are matrices (out, in height width). A step goes equally far in all directions of
    a matrix, so rare ones, such as a word's, are learned as fast as loud ones. It is scaled to an
    AdamW step's size, .2 lr an element, so that one lr serves both.

    torch.optim.Muon takes a step more (see POLAR), and multiplies in bf16 everywhere: 17 times the
    time, or more than a whole training step of the toy, on a CPU without instructions for it.

    paces {weight: tensor of its shape}: how many times as far as others an element goes."""
    def __init__(self, weights, lr, momentum=.95, paces=None):
        super().__init__(weights, {"lr": lr, "momentum": momentum})
        self.paces = paces or {}
        for weight in self.param_groups[0]["params"]:       # now, so that a checkpoint can fill it
            self.state[weight]["momentum"] = torch.zeros_like(weight)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            alike = {}                  # of one shape, multiplied at once: fewer, larger products
            for weight in group["params"]:
                alike.setdefault(weight.shape, []).append(weight)
            for weights in alike.values():
                matrices = []
                for weight in weights:
                    average = self.state[weight]["momentum"]
                    average.lerp_(weight.grad, 1 - group["momentum"])
                    matrices.append(weight.grad.lerp(average, group["momentum"]).flatten(1))
                step = -group["lr"] * .2 * max(matrices[0].shape) ** .5
                for weight, update in zip(weights, orthogonalized(torch.stack(matrices))):
                    update = update.view_as(weight)
                    if weight in self.paces:
                        update = update * self.paces[weight]
                    weight.add_(update, alpha=step)


def optimizers(model, lr, paces=None):
    """[AdamW, Muon]: Muon (with its `paces`) for the matrices of Linears and the kernels of
    convolutions, AdamW for all else. Their states are made at once, so that a checkpoint can fill
    them."""
    matrices = {module.weight: None for module in model.modules()
                if isinstance(module, (nn.Linear, nn.Conv2d))}
    others = [weight for weight in model.parameters() if weight not in matrices]
    adamw = torch.optim.AdamW(others, lr, (.9, .99), weight_decay=0, fused=True)
    for weight in others:
        adamw.state[weight] = {"step": torch.zeros((), device=weight.device),
                               "exp_avg": torch.zeros_like(weight),
                               "exp_avg_sq": torch.zeros_like(weight)}
    return [adamw, Muon(matrices, lr, paces=paces)]


# ---------------------------------------------------------------- Sec. 4.2: flow as RGB (Eq. 5)

def flow_to_rgb(flow, sigma=0.15):
    """Eq. 5. flow (..., 2, H, W) in px -> rgb (..., 3, H, W) in [0, 1].

    Hue is the angle alpha, saturation the magnitude m = min(1, |flow| / (sigma sqrt(H^2 + W^2))),
    value is 1: still is white, and the map is invertible below saturation (m < 1). H, W are those
    of the frames that the flow was measured on. (The paper says only that an angle has a colour and
    m is its "opacity", once that a larger m reduces it: that is open, and this is our choice.)"""
    H, W = flow.shape[-2:]
    u, v = flow.unbind(-3)
    m = (torch.hypot(u, v) / (sigma * math.hypot(H, W))).clamp(max=1)
    hue = torch.atan2(v, u) / (2 * math.pi) * 6                         # sixths of a turn
    # each channel is 1 for a third of the circle, 0 for a third, and ramps in between
    channels = [((hue + shift) % 6 - 3).abs().sub(1).clamp(0, 1) for shift in (0, 4, 2)]
    return 1 - m.unsqueeze(-3) * (1 - torch.stack(channels, -3))


def rgb_to_flow(rgb, sigma=0.15):
    """Inverse of flow_to_rgb below saturation: (..., 3, H, W) in [0, 1] -> (..., 2, H, W) px."""
    H, W = rgb.shape[-2:]
    r, g, b = rgb.unbind(-3)
    high, low = rgb.amax(-3), rgb.amin(-3)
    span = (high - low).clamp(min=1e-8)
    hue = torch.where(high == r, (g - b) / span,
                      torch.where(high == g, 2 + (b - r) / span, 4 + (r - g) / span))
    alpha = hue * (2 * math.pi / 6)
    norm = (high - low) / high.clamp(min=1e-8) * (sigma * math.hypot(H, W))
    return torch.stack([norm * alpha.cos(), norm * alpha.sin()], -3)


# ---------------------------------------------------------------- The sprite world
# Coordinates of a scene are in frame widths, x right and y down, its time tau runs from 0 to 1 over
# the clip, so one seed is the same scene at every size and length (but that swings and orbits are
# fitted into the frame by the positions that are shown). Angles are clockwise on screen.

HELD_OUT = 1_000_000_000            # seeds below are for training, from here on for evaluation
COLOURS = {"red": (.90, .12, .12), "green": (.10, .62, .18), "blue": (.12, .25, .90),
           "yellow": (.95, .80, .05), "purple": (.58, .15, .72), "cyan": (.05, .75, .82)}
SHAPES = ("circle", "square", "triangle", "cross", "star")
# kind -> (phrases, how often), in the order of the paper's basic, complex, rotational, physics
MOTIONS = {
    "move": (("moves left", "moves right", "moves up", "moves down"), 5),
    "zigzag": (("zigzags left", "zigzags right"), 2),
    "swing": (("swings from side to side",), 3),
    "orbit": (("orbits clockwise", "orbits counterclockwise"), 3),
    "spin": (("spins clockwise", "spins counterclockwise"), 4),
    "fall": (("falls and bounces",), 3),
    "collide": (("collide",), 2),
}
TRAVEL = {"slowly": (.15, .25), "": (.30, .45), "quickly": (.52, .65)}   # widths in the clip
TURNS = {"slowly": (.20, .30), "": (.50, .70), "quickly": (.90, 1.1)}    # turns in the clip
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
BACKGROUNDS = ("stripes", "checks", "clouds")


def is_held_out(shape, colour, motion):
    """One in ten combinations of shape, colour and kind of motion is never in a training clip."""
    return (SHAPES.index(shape) + 3 * list(COLOURS).index(colour)
            + 7 * list(MOTIONS).index(motion)) % 10 == 4


def bouncing(tau, y0, floor, fall_time, restitution):
    """Height of a ball let go at y0 that reaches the floor at fall_time: exact parabolas.

    Each bounce keeps `restitution` of the speed, so 1 - restitution^2 of the energy is lost."""
    gravity = 2 * (floor - y0) / fall_time ** 2
    start, speed = fall_time, gravity * fall_time * restitution
    y = y0 + gravity * tau ** 2 / 2
    while start < 1 and speed > 1e-3:           # endless bounces end in finite time: at rest
        t = tau - start
        y = np.where(t > 0, floor - speed * t + gravity * t ** 2 / 2, y)
        start, speed = start + 2 * speed / gravity, speed * restitution
    return np.minimum(y, floor)


def motion_path(kind, phrase, speed, radius, tau, rng):
    """The path of one sprite: (T, 3) of x, y (widths) and angle, and the parameters behind it."""
    x, y, angle = np.zeros_like(tau), np.zeros_like(tau), np.zeros_like(tau)
    word, p = phrase.split()[-1], {}
    sign = -1 if word in ("left", "counterclockwise") else 1
    if kind == "move":
        p["travel"] = rng.uniform(*TRAVEL[speed])
        x, y = (direction * p["travel"] * tau for direction in DIRECTIONS[word])
    elif kind == "zigzag":
        p = {"travel": rng.uniform(.45, .6), "height": rng.uniform(.2, .3)}
        x = sign * p["travel"] * tau
        y = p["height"] * np.abs((2 * tau + .5) % 1 * 2 - 1)            # two teeth
    elif kind == "swing":
        p = {"length": rng.uniform(.3, .4), "amplitude": rng.uniform(.6, .85),
             "cycles": rng.uniform(.8, 1.2), "phase": rng.choice([0., np.pi])}
        theta = p["amplitude"] * np.cos(2 * np.pi * p["cycles"] * tau + p["phase"])
        x, y, angle = p["length"] * np.sin(theta), p["length"] * np.cos(theta), -theta
    elif kind == "orbit":
        p = {"radius": rng.uniform(.18, .28), "turns": sign * rng.uniform(.8, 1.2),
             "phase": rng.uniform(0, 2 * np.pi)}
        theta = p["phase"] + 2 * np.pi * p["turns"] * tau
        x, y = p["radius"] * np.cos(theta), p["radius"] * np.sin(theta)
    elif kind == "spin":
        p["turns"] = sign * rng.uniform(*TURNS[speed])
        angle = 2 * np.pi * p["turns"] * tau + rng.uniform(0, 2 * np.pi)
    elif kind == "fall":
        p = {"fall_time": rng.uniform(.3, .45), "restitution": rng.uniform(.6, .8)}
        floor = 1 - radius
        y = bouncing(tau, rng.uniform(radius, .4), floor, p["fall_time"], p["restitution"])
    # anywhere in the frame where the whole path fits; what falls lands on the frame's lower edge
    x = x + rng.uniform(radius - x.min(), 1 - radius - x.max())
    if kind != "fall":
        y = y + rng.uniform(radius - y.min(), 1 - radius - y.max())
    return np.stack([x, y, angle], -1), p


def collision_paths(radii, tau, rng):
    """Two sprites of equal mass that meet head-on: momentum is kept, a share of the speed too."""
    when, y, e = rng.uniform(.4, .6), rng.uniform(.25, .75), rng.uniform(.7, 1)
    middle = rng.uniform(.45, .55)
    room = np.array([middle - 2 * radii[0], 1 - middle - 2 * radii[1]])  # from the contact outwards
    v = np.array([1, -1]) * room / when * rng.uniform(.7, 1, 2)
    after = np.array([(1 - e) * v[0] + (1 + e) * v[1], (1 + e) * v[0] + (1 - e) * v[1]]) / 2
    fits = min(1, *(room / (1 - when) / np.maximum(np.abs(after), 1e-9)))   # stay in the frame
    v, after = v * fits, after * fits
    contact = np.array([middle - radii[0], middle + radii[1]])
    x = contact[:, None] + np.where(tau < when, v[:, None], after[:, None]) * (tau - when)
    paths = [np.stack([row, np.full_like(tau, y), np.zeros_like(tau)], -1) for row in x]
    return paths, {"when": when, "before": v, "after": after}


def sprite_scene(seed, frames, rich):
    """What happens in the clip of a seed: background, sprites from front to back, caption."""
    rng = np.random.default_rng(seed)
    tau = np.linspace(0, 1, frames) if frames > 1 else np.zeros(1)
    textured, several = rng.random(2) < rich
    kinds = [kind for kind in MOTIONS if not (several and kind == "collide")]
    odds = np.array([MOTIONS[kind][1] for kind in kinds], float)
    count = int(rng.integers(2, 4)) if several else 1
    motions = list(rng.choice(kinds, count, p=odds / odds.sum()))
    if motions == ["collide"]:
        motions = ["collide"] * 2
    sprites = []
    for motion, colour in zip(motions, rng.permutation(list(COLOURS))):
        # a disc's spin is invisible; training never sees the held-out combinations
        shape = rng.choice([name for name in SHAPES if not (name == "circle" and motion == "spin")
                            and (seed >= HELD_OUT or not is_held_out(name, colour, motion))])
        phrase = rng.choice(MOTIONS[motion][0])
        speed = rng.choice(list(TRAVEL)) if motion in ("move", "spin") else ""
        sprites.append({"shape": str(shape), "colour": str(colour), "kind": motion,
                        "phrase": f"{phrase} {speed}".strip(), "radius": rng.uniform(.12, .17)})
        if motion != "collide":
            sprites[-1]["path"], sprites[-1]["physics"] = motion_path(
                motion, phrase, speed, sprites[-1]["radius"], tau, rng)
    names = [f"a {s['colour']} {s['shape']}" for s in sprites]
    if motions[0] == "collide":
        paths, physics = collision_paths([s["radius"] for s in sprites], tau, rng)
        for sprite, path in zip(sprites, paths):
            sprite["path"], sprite["physics"] = path, physics
        caption = f"{names[0]} and {names[1]} collide"
    else:
        clauses = [f"{name} {s['phrase']}" for name, s in zip(names, sprites)]
        caption = ", ".join(clauses[:-1]) + " and " * (count > 1) + clauses[-1]
    background = {"kind": str(rng.choice(BACKGROUNDS)) if textured else "plain",
                  "colour": rng.uniform(.8, .95) + rng.uniform(-.05, .05, 3),
                  "wave": rng.uniform(-1, 1, (3, 2)), "phase": rng.uniform(0, 2 * np.pi, 3)}
    if textured:
        caption += f" over {background['kind']}"
    return {"seed": seed, "caption": caption, "sprites": sprites, "background": background,
            "held_out": any(is_held_out(s["shape"], s["colour"], s["kind"]) for s in sprites)}


def signed_distance(shape, x, y, r):
    """Distance in px from points to the outline of a shape of radius r (beyond corners to its
    edges' lines); negative inside."""
    if shape == "circle":
        return torch.hypot(x, y) - .95 * r
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - .82 * r
    if shape == "triangle":                                         # points up; three half-planes
        return torch.maximum(y, x.abs() * math.sqrt(.75) - y / 2) - .52 * r
    if shape == "cross":
        a, b = x.abs(), y.abs()
        return torch.minimum(torch.maximum(a - r, b - .36 * r), torch.maximum(b - r, a - .36 * r))
    fold = math.pi / 5                                              # star: one of ten half-points
    theta = (torch.atan2(x, -y) + fold) % (2 * fold) - fold
    a, b = torch.hypot(x, y) * theta.cos(), torch.hypot(x, y) * theta.sin().abs()
    edge = torch.tensor([.5 * math.cos(fold) - 1.15, .5 * math.sin(fold)])   # outer to inner corner
    normal = edge / edge.norm()
    return (a - 1.15 * r) * normal[1] - b * normal[0]


def render_background(background, size):
    """(3, H, W): a pale colour, on textured ones with a faint pattern in all channels."""
    kind, wave, phase = background["kind"], background["wave"], background["phase"]
    axis = (torch.arange(size) + .5) / size * 2 * math.pi
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    a, c = 4 * wave[0]
    if kind == "plain":
        pattern = torch.tensor(-1.)
    elif kind == "stripes":
        pattern = torch.tanh(3 * torch.sin(a * x + c * y + phase[0]))
    elif kind == "checks":
        pattern = torch.tanh(4 * torch.sin((2 + abs(a)) * x + phase[0])
                             * torch.sin((2 + abs(a)) * y + phase[1]))
    else:
        pattern = sum(torch.sin(2 * w[0] * x + 2 * w[1] * y + p) for w, p in zip(wave, phase)) / 2
    colour = torch.tensor(background["colour"], dtype=torch.float32).view(3, 1, 1)
    return (colour - .07 * (1 + pattern)).clamp(0, 1).expand(3, size, size)


def sprite_clip(seed, frames=16, size=64, rich=.5, order=None):
    """A clip of the sprite world, by exact geometry with anti-aliased outlines.

    seed: from HELD_OUT on for evaluation. rich in [0, 1]: the share of textured backgrounds
    and, apart from it, of scenes with two or three independent sprites (the first named in front).
    order: a permutation of the frames; the flow is then that of the permuted clip.
    Returns video (T, 3, H, W) in [0, 1], flow (T, 2, H, W) in px, caption, scene. A scene's
    sprites have `path` (T, 3): x, y of the centre in px and the angle in radians, and `physics`."""
    scene = sprite_scene(int(seed), frames, rich)
    video = render_background(scene["background"], size).repeat(frames, 1, 1, 1)
    flow = torch.zeros(frames, 2, size, size)
    side = torch.arange(size) + .5
    y, x = torch.meshgrid(side, side, indexing="ij")
    for sprite in reversed(scene["sprites"]):                           # back to front
        sprite["path"][:, :2] *= size
        sprite["radius"] *= size
        if order is not None:
            sprite["path"] = sprite["path"][order]
        path = torch.tensor(sprite["path"], dtype=torch.float32)[..., None, None]
        dx, dy, angle = x - path[:, 0], y - path[:, 1], path[:, 2]      # from the centre
        cos, sin = angle.cos(), angle.sin()
        distance = signed_distance(sprite["shape"], cos * dx + sin * dy, cos * dy - sin * dx,
                                   torch.tensor(sprite["radius"]))
        cover = (.5 - distance).clamp(0, 1).unsqueeze(1)                # (T, 1, H, W)
        video = torch.lerp(video, torch.tensor(COLOURS[sprite["colour"]]).view(3, 1, 1), cover)
        # rigid motion: turn about the centre, then move with it
        step_x, step_y, turn = path.diff(dim=0, append=path[-1:]).unbind(1)
        cos, sin = turn.cos(), turn.sin()
        moved = torch.stack([cos * dx - sin * dy - dx + step_x,
                             sin * dx + cos * dy - dy + step_y], 1)
        flow = torch.where(cover >= .5, moved, flow)
    flow[-1] = flow[-2:][0]                                             # (the last one is repeated)
    return video, flow, scene["caption"], scene


def sprite_clips(seeds, frames=16, size=64, rich=.5, orders=None):
    """Many clips: video (N, T, 3, H, W), flow (N, T, 2, H, W), captions, scenes."""
    video, flow, captions, scenes = zip(*(
        sprite_clip(seed, frames, size, rich, order)
        for seed, order in zip(seeds, orders or itertools.repeat(None))))
    return torch.stack(video), torch.stack(flow), list(captions), list(scenes)


# ---------------------------------------------------------------- RAFT: the small model
# Teed & Deng, "RAFT: Recurrent All-Pairs Field Transforms for Optical Flow" (ECCV 2020). Module
# names follow torchvision's raft_small, so that its weights load; 990,162 parameters.

LEVELS, RADIUS = 4, 3               # of the correlation pyramid, and of the window looked up in it
HIDDEN, CONTEXT, MOTION = 96, 64, 82    # channels of the GRU's state, and of what it sees: frame 1
                                    # and motion (80 of them encoded, 2 the flow itself)


def conv(c_in, c_out, kernel, stride=1, norm=False, relu=True):
    """Convolution, instance norm (without parameters), ReLU: what RAFT is built of."""
    return nn.Sequential(nn.Conv2d(c_in, c_out, kernel, stride, padding=kernel // 2),
                         *[nn.InstanceNorm2d(c_out)] * norm, *[nn.ReLU(inplace=True)] * relu)


class Bottleneck(nn.Module):
    """Residual block: 1x1 to a quarter of the channels, 3x3, 1x1 back."""
    def __init__(self, c_in, c_out, stride, norm):
        super().__init__()
        self.convnormrelu1 = conv(c_in, c_out // 4, 1, norm=norm)
        self.convnormrelu2 = conv(c_out // 4, c_out // 4, 3, stride, norm)
        self.convnormrelu3 = conv(c_out // 4, c_out, 1, norm=norm)
        self.downsample = (nn.Identity() if stride == 1
                           else conv(c_in, c_out, 1, stride, norm, relu=False))

    def forward(self, x):
        y = self.convnormrelu3(self.convnormrelu2(self.convnormrelu1(x)))
        return F.relu(self.downsample(x) + y, inplace=True)


class Encoder(nn.Module):
    """Image (B, 3, H, W) in [-1, 1] -> (B, c_out, H/8, W/8)."""
    def __init__(self, c_out, norm):
        super().__init__()
        self.convnormrelu = conv(3, 32, 7, 2, norm)
        self.layer1 = nn.Sequential(Bottleneck(32, 32, 1, norm), Bottleneck(32, 32, 1, norm))
        self.layer2 = nn.Sequential(Bottleneck(32, 64, 2, norm), Bottleneck(64, 64, 1, norm))
        self.layer3 = nn.Sequential(Bottleneck(64, 96, 2, norm), Bottleneck(96, 96, 1, norm))
        self.conv = nn.Conv2d(96, c_out, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        return self.conv(self.layer3(self.layer2(self.layer1(self.convnormrelu(x)))))


class UpdateBlock(nn.Module):
    """One iteration: motion encoder, convolutional GRU, flow head.

    state (B, 96, h, w), what `of_context` has made of the context, looked-up correlation
    (B, 196, h, w), flow (B, 2, h, w) in cells -> new state and the change of the flow."""
    def __init__(self):
        super().__init__()
        self.motion_encoder = nn.ModuleDict({
            "convcorr1": conv(LEVELS * (2 * RADIUS + 1) ** 2, 96, 1),
            "convflow1": conv(2, 64, 7), "convflow2": conv(64, 32, 3),
            "conv": conv(96 + 32, MOTION - 2, 3)})
        seen = HIDDEN + CONTEXT + MOTION            # the GRU sees the flow itself too
        self.recurrent_block = nn.ModuleDict({"convgru1": nn.ModuleDict({
            gate: nn.Conv2d(seen, HIDDEN, 3, padding=1) for gate in ("convz", "convr", "convq")})})
        self.flow_head = nn.Sequential(OrderedDict(
            conv1=nn.Conv2d(HIDDEN, 128, 3, padding=1), relu=nn.ReLU(),
            conv2=nn.Conv2d(128, 2, 3, padding=1)))

    def of_context(self, context):
        """The GRU's weights for what changes between iterations, and its answer to the context,
        which does not: a convolution is a sum over its input's channels, so that part of it is
        computed once. (update, reset and new state in one: (288, 178, 3, 3), (B, 288, h, w).)"""
        gru = self.recurrent_block["convgru1"].values()
        weight, bias = (torch.cat(parts) for parts in zip(*((g.weight, g.bias) for g in gru)))
        of_state, of_context, of_motion = weight.split([HIDDEN, CONTEXT, MOTION], 1)
        return (torch.cat([of_state, of_motion], 1),
                F.conv2d(context, of_context, bias, padding=1))

    def forward(self, state, of_context, corr, flow):
        encoder, (weight, fixed) = self.motion_encoder, of_context
        motion = torch.cat([encoder["convcorr1"](corr),
                            encoder["convflow2"](encoder["convflow1"](flow))], 1)
        x = torch.cat([encoder["conv"](motion), flow], 1)
        (of_gates, of_new), (gates, new) = (
            part.split([2 * HIDDEN, HIDDEN], axis) for axis, part in enumerate((weight, fixed)))
        gates = F.conv2d(torch.cat([state, x], 1), of_gates, padding=1).add_(gates)
        update, reset = gates.sigmoid_().chunk(2, 1)
        new = F.conv2d(torch.cat([reset * state, x], 1), of_new, padding=1).add_(new).tanh_()
        state = (1 - update) * state + update * new
        return state, self.flow_head(state)


def correlation_pyramid(features1, features2):
    """All-pairs correlation: two (B, C, h, w) -> LEVELS of (B h w, 1, h / 2^l, w / 2^l).

    Every cell of frame 1 has its own map over frame 2, of which each level averages 2 x 2 cells."""
    B, C, h, w = features1.shape
    with torch.autocast(features1.device.type, enabled=False):          # sub-pixel peaks need fp32
        corr = features1.float().flatten(2).mT @ features2.float().flatten(2)
        corr.div_(math.sqrt(C))
    pyramid = [corr.view(B * h * w, 1, h, w)]
    for _ in range(LEVELS - 1):
        pyramid.append(F.avg_pool2d(pyramid[-1], 2))
    return pyramid


def look_up(pyramid, coords):
    """The pyramid around coords (B, 2, h, w), x then y in cells -> (B, LEVELS * 49, h, w).

    Channels run over levels, then over the window's x offset (-3..3), then over its y offset: x is
    the *outer* one, as in the authors' code. Coordinate 0 is the centre of the first cell, zeros
    are outside. On level l coords are divided by 2^l and no more: a pooled cell's centre really
    lies (2^l - 1) / 2 fine cells further on, an offset that the weights have learned to expect."""
    B, _, h, w = coords.shape
    side = torch.arange(-RADIUS, RADIUS + 1, device=coords.device, dtype=coords.dtype)
    window = torch.stack(torch.meshgrid(side, side, indexing="ij"), -1)         # [i, j] is x, y
    centre = coords.permute(0, 2, 3, 1).reshape(B * h * w, 1, 1, 2)
    looked_up = []
    for level, corr in enumerate(pyramid):
        # grid_sample's -1 and 1 are the centres of the first and last cells (align_corners=True)
        last = torch.tensor(corr.shape[:1:-1], device=coords.device) - 1        # of x, of y
        at = (centre / 2 ** level + window).div_(last / 2).sub_(1)              # (B h w, 7, 7, 2)
        looked_up.append(F.grid_sample(corr, at, align_corners=True).view(B, h, w, -1))
    return torch.cat(looked_up, -1).permute(0, 3, 1, 2)


class RAFT(nn.Module):
    """RAFT()(frame1, frame2, iters) -> a list of flows, one per iteration, the last is the best.

    frame1, frame2: (B, 3, H, W) in [0, 1], of any size; flows: (B, 2, H, W) in px, x then y."""
    def __init__(self):
        super().__init__()
        self.feature_encoder = Encoder(128, norm=True)
        self.context_encoder = Encoder(HIDDEN + CONTEXT, norm=False)
        self.update_block = UpdateBlock()

    def forward(self, frame1, frame2, iters=12):
        if frame1.shape != frame2.shape:
            raise ValueError(f"frames of different sizes: {tuple(frame1.shape)} and "
                             f"{tuple(frame2.shape)}")
        flows = self.flows(self.prepare(torch.cat([frame1, frame2])), iters)
        return [self.restore(flow, *frame1.shape[-2:]) for flow in flows]

    def flows(self, images, iters):
        """Prepared frames, the first of all pairs and then the second -> flows in cells."""
        features1, features2 = self.feature_encoder(images).chunk(2)
        context = self.context_encoder(images[:len(features1)])
        return self.refine(features1, features2, context, iters)

    def refine(self, features1, features2, context, iters):
        """Features (B, 128, h, w), context (B, 160, h, w) -> flows (B, 2, h, w) in cells."""
        B, _, h, w = features1.shape
        pyramid = correlation_pyramid(features1, features2)
        state, context = context.float().split([HIDDEN, CONTEXT], 1)
        state, of_context = state.tanh(), self.update_block.of_context(context.relu())
        y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        # (in context's order in memory, which all that follows then has)
        start = torch.empty_like(context[:, :2], dtype=torch.float32).copy_(torch.stack([x, y]))
        coords, flows = start, []
        for _ in range(iters):
            coords = coords.detach()                # each iteration learns from its own error only
            corr = look_up(pyramid, coords)
            state, delta = self.update_block(state, of_context, corr, coords - start)
            coords = coords + delta.float()
            flows.append(coords - start)
        return flows

    @staticmethod
    def layout(H, W):
        """The size that frames are enlarged to, and the padding (left, right, top, bottom)."""
        scale = max(1, min(4, 256 / min(H, W)))     # motion far below a cell (8 px) is hard
        h, w = round(H * scale), round(W * scale)
        # whole cells, and 16 of them at least: the pyramid's last level then has 2
        extra_h, extra_w = (max(128, math.ceil(side / 8) * 8) - side for side in (h, w))
        return (h, w), (extra_w // 2, extra_w - extra_w // 2, extra_h // 2, extra_h - extra_h // 2)

    def prepare(self, frames):
        """Frames (B, 3, H, W) in [0, 1] -> what the encoders take: in [-1, 1], enlarged, padded."""
        size, padding = self.layout(*frames.shape[-2:])
        # align_corners=False: pixels are areas, so flow grows by exactly the factor of the size
        frames = F.interpolate(frames, size, mode="bilinear", align_corners=False)
        return F.pad(frames * 2 - 1, padding, mode="replicate")

    def restore(self, flow, H, W):
        """Flow in cells of prepared frames -> (B, 2, H, W) in px of the frames."""
        (h, w), (left, _, top, _) = self.layout(H, W)
        flow = upsample(flow)[..., top:top + h, left:left + w]
        flow = F.interpolate(flow, (H, W), mode="bilinear", align_corners=False)
        return flow * flow.new_tensor([W / w, H / h]).view(2, 1, 1)

    @classmethod
    def load(cls, path=ROOT / "weights/raft.pt"):
        """Our weights (fp16), torchvision's raft_small or the authors' raft-small.pth, strictly;
        fp32, eval mode, no gradients.

        Raises ValueError, one line, where the file is missing, damaged or of another network."""
        if not Path(path).is_file():
            raise ValueError(f"{path}: no such weights file")
        raft = cls()
        try:
            state = dict(torch.load(path, map_location="cpu", weights_only=True))
            if "module.fnet.conv1.weight" in state:
                state = {torchvision_name(key): value for key, value in state.items()}
            raft.load_state_dict(state)                 # copies into fp32 parameters
        except Exception as error:                      # a damaged file can raise almost anything
            raise ValueError(f"{path}: damaged, or not RAFT-small's weights: "
                             f"{one_line(error)}") from None
        return raft.eval().requires_grad_(False)


AUTHORS_NAMES = (                       # of the authors' layers, as patterns -> torchvision's
    (r"^module\.", ""), (r"^fnet\.", "feature_encoder."), (r"^cnet\.", "context_encoder."),
    (r"(_encoder)\.conv1\.", r"\1.convnormrelu.0."), (r"(_encoder)\.conv2\.", r"\1.conv."),
    (r"(layer\d\.\d)\.conv(\d)\.", r"\1.convnormrelu\2.0."),
    (r"block\.encoder\.convc1\.", "block.motion_encoder.convcorr1.0."),
    (r"block\.encoder\.convf(\d)\.", r"block.motion_encoder.convflow\1.0."),
    (r"block\.encoder\.conv\.", "block.motion_encoder.conv.0."),
    (r"block\.gru\.", "block.recurrent_block.convgru1."))


def torchvision_name(key):
    """The name that torchvision gives to a weight of the authors' raft-small.pth."""
    for pattern, name in AUTHORS_NAMES:
        key = re.sub(pattern, name, key)
    return key


def upsample(flow):
    """Flow in cells (B, 2, h, w) -> (B, 2, 8h, 8w) in px. The corners' centres stay corners."""
    h, w = flow.shape[-2:]
    return 8 * F.interpolate(flow, (8 * h, 8 * w), mode="bilinear", align_corners=True)


@torch.no_grad()
def estimate_flow(raft, video, iters=12):
    """video (B, T, 3, H, W) in [0, 1] -> flow (B, T, 2, H, W) in px, the last one repeated.

    Each frame's features are computed once, products are in bf16 where that is fast, on the device
    that raft is on. Of memory only the video itself and the result grow with T.
    ValueError where the video has another shape, one frame only, or NaN or infinite pixels."""
    if video.dim() != 5 or video.shape[2] != 3 or not video.is_floating_point():
        raise ValueError(f"a video is (B, T, 3, H, W) in [0, 1], this one is "
                         f"{tuple(video.shape)}, {str(video.dtype)[6:]}")
    video = video.to(next(raft.parameters()).device, torch.float32)
    B, T, _, H, W = video.shape
    if T < 2:
        raise ValueError("flow needs two frames at least, the video has one")
    if not video.isfinite().all():
        raise ValueError("the video has pixels that are NaN or infinite")
    result = video.new_empty(B, T, 2, H, W)
    with autocast(video.device):
        for clip, flow in zip(video, result):
            features1 = raft.feature_encoder(raft.prepare(clip[:1]))
            # so many that their correlations take 32 MB, or on a GPU, which idles with less, 256 MB
            numbers = 2 ** (23 if video.device.type == "cpu" else 26)
            pairs = max(1, numbers // features1[0, 0].numel() ** 2)
            for k in range(0, T - 1, pairs):
                images = raft.prepare(clip[k:k + pairs + 1])
                features = torch.cat([features1, raft.feature_encoder(images[1:])])
                # channels last: a tenth faster where no norm needs another order
                context = raft.context_encoder(images[:-1].contiguous(
                    memory_format=torch.channels_last))
                cells = raft.refine(features[:-1], features[1:], context, iters)[-1]
                flow[k:k + len(cells)] = raft.restore(cells, H, W)
                features1 = features[-1:]
            flow[-1] = flow[-2]
    return result


# ---------------------------------------------------------------- RAFT: training

def fractal_noise(n, side, generator):
    """(n, 3, side, side) of deviation 1: its amplitudes fall as f^-beta with the frequency, beta
    from 0.6 (grain) to 2 (clouds; photographs have about 1); mostly light, some colour."""
    f = torch.hypot(torch.fft.fftfreq(side)[:, None], torch.fft.rfftfreq(side)).clamp(min=1 / side)
    beta = torch.rand(n, 1, 1, 1, generator=generator) * 1.4 + .6
    spectrum = torch.fft.rfft2(torch.randn(n, 3, side, side, generator=generator)) * f ** -beta
    noise = torch.fft.irfft2(spectrum, (side, side))
    noise = noise[:, :1] + .5 * torch.rand(n, 1, 1, 1, generator=generator) * noise
    return noise / noise.std((1, 2, 3), keepdim=True)


def photo_crops(photos, n, side, generator):
    """(n, 3, side, side) in [0, 1]: random squares of random photographs (3, H, W) uint8."""
    def below(high):
        return int(torch.randint(high, (), generator=generator))

    crops = []
    for _ in range(n):
        photo = photos[below(len(photos))]
        edge = min(photo.shape[1:])
        edge = edge // 3 + below(edge - edge // 3 + 1)
        top, left = (below(length - edge + 1) for length in photo.shape[1:])
        crop = photo[None, :, top:top + edge, left:left + edge].float() / 255
        crops.append(F.interpolate(crop, (side, side), mode="bilinear", antialias=True))
    return torch.cat(crops)


def project(H, points):
    """Points (n, 2, P) through homographies H (n, 3, 3): an affine motion and a perspective."""
    points = H[..., :2] @ points + H[..., 2:]
    return points[:, :2] / points[:, 2:]


def read_photos(folder):
    """The images of a folder as (3, H, W) uint8, sides of 64 px at least. ValueError if none."""
    photos = []
    for path in sorted(Path(folder).glob("*")):
        try:
            image = read_image(path)
        except ValueError:
            continue
        if min(image.shape[1:]) >= 64:
            photos.append((image * 255).round().byte())
    if not photos:
        raise ValueError(f"{folder}: no images of 64 px or more in it")
    return photos


def flow_scenes(n, size, seed, shapes=6, photos=()):
    """Scenes with exact flow: frame1, frame2 (n, 3, size, size) in [0, 1], flow (n, 2, size, size).

    A background and up to `shapes` shapes in front of it (polygons, blobs, jagged and thin ones),
    each with a texture (fractal noise soft or hard, gradients, `photos`, or nothing) and a motion
    of its own upon the camera's: affine, perspective and a smooth bending, shifts from nothing to
    a third of the frame; in half of the scenes a tenth of that. Then light and contrast change,
    blur and noise. All geometry is a formula of continuous coordinates; flow is the front layer's
    at the pixel centres of frame1."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return torch.rand(n, *shape, generator=generator) * (high - low) + low

    def chance(p):
        return uniform(0, 1, 1, 1) < p

    def direction(angle):                           # (n, k, 1) -> (n, k, 2)
        return torch.cat([angle.cos(), angle.sin()], -1)

    def shift(most):                                # small ones are the most frequent
        return direction(uniform(0, 2 * math.pi, 1, 1)).mT * size * most * uniform(0, 1, 1, 1) ** 3

    def rotation(angle):                            # (n, 1, 1) -> (n, 2, 2)
        return torch.cat([direction(angle), direction(angle + math.pi / 2)], 1).mT

    side = torch.arange(size) + .5
    points = torch.stack(torch.meshgrid(side, side, indexing="xy")).flatten(1)          # (2, P)
    frames, flow = torch.zeros(2, n, 3, size * size), torch.zeros(n, 2, size * size)
    pace = torch.where(chance(.5), .1, 1.)          # fractions of a pixel have to be learned too
    camera, camera_turn, camera_zoom = (pace * part for part in (
        shift(.25), *uniform(-.45, .45, 2, 1, 1).pow(3).unbind(1)))
    for layer in range(shapes + 1):                 # from the background to the front
        # texture: a picture of the frame's size, reflected beyond its edges
        textured = chance(.8)                       # the others are plain
        slope = uniform(-.4, .4, 3, 2) * uniform(0, 1, 1, 1) ** 2 @ points / size
        noise = fractal_noise(n, size, generator).flatten(2) * uniform(.3, 3, 1, 1)
        detail = slope + uniform(.05, .5, 1, 1) * noise.tanh()
        picture = (uniform(.1, .9, 3, 1) + textured * detail).view(n, 3, size, size)
        if photos:
            taken = (textured & chance(.5)).unsqueeze(-1)
            picture = torch.where(taken, photo_crops(photos, n, size, generator), picture)
        # motion: v -> s + A v / (1 + g v), v from the layer's centre
        own = pace * chance(.7 if layer else .3)
        s = camera * uniform(.5, 1.5, 1, 1) + own * shift(.2)           # nearer or farther
        turn = camera_turn + own * uniform(-.7, .7, 1, 1) ** 3
        zoom = (camera_zoom + own * uniform(-.5, .5, 1, 1) ** 3).exp()
        A = zoom * rotation(turn) + own * uniform(-.4, .4, 2, 2) ** 3
        g = own * uniform(-1, 1, 1, 2) ** 3 * .5 / size
        # and a smooth bending: two waves of vectors k
        length, theta = size * uniform(.3, 2, 2, 1), uniform(0, 2 * math.pi, 2, 1)
        k = 2 * math.pi / length * direction(theta)
        # slope below 0.4, so that it can be inverted
        bend = pace * .2 * length.mT / (2 * math.pi) * uniform(-1, 1, 2, 2) * chance(.4)
        if layer == 0:                              # what nobody can see move does not move
            s, g, bend = s * textured, g * textured, bend * textured
            A = torch.where(textured, A, torch.eye(2))
        centre, phase = uniform(0, size, 2, 1), uniform(0, 2 * math.pi, 2, 1)
        H = torch.cat([torch.cat([A + s * g, s], 2), F.pad(g, (0, 1), value=1)], 1)
        back = torch.linalg.inv(H)

        def bent(v):
            return bend @ torch.sin(k @ (v + centre) + phase)

        # outline: a body of uneven radius in stretched coordinates, or half-planes
        stretch = (uniform(-1, 1, 1, 1) * (1 + 1.2 * chance(.2))).exp()     # some are thin
        radius, slant = size * uniform(.2, .6, 1, 1) ** 2 + 1, uniform(0, math.pi, 1, 1)
        axes = torch.cat([stretch, 1 / stretch], 1) * rotation(slant).mT
        lobes = torch.tensor([2., 3, 7, 19]).view(4, 1)
        uneven = uniform(-.6, .6, 4, 1) / lobes ** uniform(.2, 1.5, 1, 1) * chance(.6)
        turned = uniform(0, 2 * math.pi, 4, 1)
        sides = uniform(0, 1, 6, 1) + torch.arange(6.).view(6, 1)
        offsets, body, present = radius * uniform(.5, 1, 6, 1), chance(.6), chance(.7)
        scale, where = uniform(.6, 1.2, 1, 1), uniform(-.5, .5, 2, 1)
        first = points - centre
        for i, v in enumerate((first, project(back, first) + bent(first))):
            at = (v + centre) * (2 * scale / size) - scale + where
            paint = F.grid_sample(picture, at.mT.view(n, size, size, 2), align_corners=False,
                                  padding_mode="reflection").flatten(2)                 # (n, 3, P)
            cover = torch.ones(n, 1, size * size)
            if layer > 0:
                v = axes @ v
                waves = (lobes * torch.atan2(v[:, 1:], v[:, :1]) + turned).cos()        # (n, 4, P)
                edge = radius * (1 + (uneven * waves).sum(1, keepdim=True))
                planes = direction(sides) @ v - offsets                                 # (n, 6, P)
                distance = torch.where(body, torch.hypot(v[:, :1], v[:, 1:]) - edge,
                                       planes.amax(1, keepdim=True))
                cover = (.5 - distance).clamp(0, 1) * present
            frames[i].lerp_(paint, cover)
            if i == 0:
                second = project(H, first)
                for _ in range(8):          # a contraction
                    second = project(H, first - bent(second))
                flow = torch.where(cover >= .5, second - first, flow)
    frames = frames.view(2, n, 3, size, size)
    lit = chance(.4).unsqueeze(-1)                  # light and contrast change, evenly or not
    uneven = F.interpolate(uniform(-.2, .2, 1, 2, 2), (size, size), mode="bilinear")
    gain = (uniform(-.2, .2, 1, 1, 1) + uneven * chance(.4).unsqueeze(-1)) * lit
    frames[1] = frames[1].clamp(min=0) ** (uniform(-.2, .2, 1, 1, 1) * lit).exp() * gain.exp()
    if torch.rand((), generator=generator) < .25:
        frames = F.avg_pool2d(F.pad(frames.flatten(0, 1), (1, 1, 1, 1), mode="replicate"), 3, 1) \
            .view_as(frames)
    noise = uniform(-.04, .05, 1, 1, 1).clamp(min=0)
    frames = (frames + noise * torch.randn(frames.shape, generator=generator)).clamp(0, 1)
    return *frames, flow.view(n, 2, size, size)


def enlarged_crops(frame1, frame2, flow, generator):
    """Pairs of 64 px, enlarged four times as RAFT.prepare does; of each, 128 px around a pixel
    that moves (around any, if none does)."""
    enlarged = [F.interpolate(frame, scale_factor=4, mode="bilinear") for frame in (frame1, frame2)]
    enlarged.append(4 * F.interpolate(flow, scale_factor=4))   # an outline does not mix two motions
    side, crops = enlarged[0].shape[-1], []
    chosen = torch.multinomial(flow.norm(dim=1).flatten(1) + 1e-6, 1, generator=generator)[:, 0]
    for i, pixel in enumerate(chosen.tolist()):
        centre = 4 * torch.tensor(divmod(pixel, side // 4))
        jitter = torch.randint(-64, 65, (2,), generator=generator)
        y, x = (centre + jitter - 64).clamp(0, side - 128).tolist()
        crops.append([picture[i, :, y:y + 128, x:x + 128] for picture in enlarged])
    return [torch.stack(parts) for parts in zip(*crops)]


def training_pairs(step, batch, photos=()):
    """The batch of a step: frame1, frame2, flow, at the resolution that the network works at.

    Every other one is a quarter as many scenes of 256 px, or an eighth of 384 px in turn; the rest,
    of 128 px, are from sprites and scenes of 64 px enlarged, and scenes of 128 px."""
    if step % 2:
        count, size = (batch // 8, 384) if step % 4 == 3 else (batch // 4, 256)
        return flow_scenes(max(1, count), size, step, photos=photos)
    sprites = batch * 3 // 8
    scenes = (batch - sprites) // 2
    # fewer frames: faster motion, yet a square must turn by less than 45 degrees to be followed
    frames = (12, 16, 20)[step // 2 % 3]
    video, flow, _, _ = sprite_clips(range(step * sprites, (step + 1) * sprites), frames, 64)
    clip = torch.arange(sprites)
    k = (step // 2 + 5 * clip) % (frames - 1)
    small = [torch.cat(parts) for parts in zip((video[clip, k], video[clip, k + 1], flow[clip, k]),
                                               flow_scenes(scenes, 64, -1 - step, photos=photos))]
    enlarged = enlarged_crops(*small, torch.Generator().manual_seed(step))
    return [torch.cat(parts) for parts in zip(
        enlarged, flow_scenes(batch - sprites - scenes, 128, step, photos=photos))]


def validate(raft, out, clips=4):
    """Median end-point error in px over moving pixels, held-out sprites (64 px) and scenes (128).

    Also writes out/preview.png: rows of frame, next frame, true flow, estimate."""
    first, second, flow = flow_scenes(clips, 128, HELD_OUT)
    data = {"sprites": sprite_clips(range(HELD_OUT, HELD_OUT + clips))[:2],
            "scenes": (torch.stack([first, second], 1), flow.unsqueeze(1))}
    scores, rows = {}, []
    for name, (video, truth) in data.items():
        flow = estimate_flow(raft, video).cpu()
        flow = flow[:, :truth.shape[1]]             # scenes are one pair, with one flow
        scores[name] = (flow - truth).norm(dim=2)[truth.norm(dim=2) > .05].median().item()
        k = video.shape[1] // 2 - 1
        row = [video[:, k], video[:, k + 1], flow_to_rgb(truth[:, k]), flow_to_rgb(flow[:, k])]
        rows += F.interpolate(torch.cat(row, -1), (128, 4 * 128)).unbind()
    picture = (torch.cat(rows, 1) * 255).byte().permute(1, 2, 0).numpy()
    write_file(f"{out}/preview.png", lambda temporary: temporary.write_bytes(
        iio.imwrite("<bytes>", picture, extension=".png")))
    return scores


def train_raft(out="runs/raft", steps=20_000, batch=8, lr=4e-4, weights=None, images=None,
               iters=8, every=500, seed=0):
    """Trains RAFT, from nothing or from `weights`; a second call on the same folder goes on where
    the first stopped, and, if that was begun for as many steps, which the learning rate depends on,
    ends with the same weights as an uninterrupted one.

    images: a folder of photographs that become textures; seed: of the pairs, so that a training
    that begins from another's weights need not see the same ones. Writes out/state.pt (to resume),
    out/raft.pt (fp16 weights) and out/preview.png (see `validate`) every `every` steps."""
    out, device = Path(out), device_of(None)
    photos = read_photos(images) if images else ()
    torch.manual_seed(0)
    raft = RAFT.load(weights) if weights else RAFT()
    out.mkdir(parents=True, exist_ok=True)
    raft.requires_grad_(True).to(device, memory_format=torch.channels_last).train()
    adamw, muon = optimizers(raft, lr)
    settings = {"batch": batch, "lr": lr, "weights": weights and str(weights),
                "images": images and str(images), "iters": iters, "seed": seed}
    start, bad, scores = 0, 0, {}
    if (out / "state.pt").exists():
        state = read_file(out / "state.pt", "raft training")
        refuse_changes(out, state["settings"], settings)
        start = state["step"]
        raft.load_state_dict(state["model"])
        adamw.load_state_dict(state["adamw"])
        muon.load_state_dict(state["muon"])

    bar = tqdm(range(start, steps), initial=start, total=steps, desc="raft", smoothing=.05)
    for step in bar:
        for optimizer in (adamw, muon):             # a warm-up, then down to nothing in a line
            optimizer.param_groups[0]["lr"] = lr * min((step + 1) / (.05 * steps),
                                                       (steps - step) / (.95 * steps))
        frame1, frame2, truth = (t.to(device) for t in training_pairs(
            seed * 100_000 + step, batch, photos))
        with autocast(device):
            flows = raft.flows(torch.cat([frame1, frame2]) * 2 - 1, iters)
        # sequence loss: all iterations count, later ones more
        loss = sum(.8 ** (iters - 1 - i) * ((upsample(flow) - truth).square().sum(1) + 1e-4)
                   .sqrt().mean() for i, flow in enumerate(flows))
        raft.zero_grad()
        loss.backward()
        bad += 1
        if nn.utils.clip_grad_norm_(raft.parameters(), 1).isfinite():
            adamw.step()
            muon.step()
            bad = 0
        if bad == BAD_STEPS:
            raise ValueError(f"{out}: {BAD_STEPS} steps in a row are not finite, up to step "
                             f"{step + 1}: take a smaller --lr and another --out")
        if (step + 1) % every == 0 or step + 1 == steps:
            write_tensors(out / "raft.pt", {k: v.half() for k, v in raft.state_dict().items()})
            write_tensors(out / "state.pt", {           # last: with it the step is done
                "kind": "raft training", "settings": settings, "step": step + 1,
                "model": raft.state_dict(), "adamw": adamw.state_dict(),
                "muon": muon.state_dict()})
            scores = validate(raft, out)
            tqdm.write(f"step {step + 1}: median error of what moves, px: {scores}")
        bar.set_postfix(loss=loss.item(), **scores)


# ---------------------------------------------------------------- RAFT: flow of files

def read_flow(path):
    """True flow in the field's formats -> (2, H, W) px and which pixels are known, (H, W) bool:
    Middlebury's .flo, or KITTI's 16-bit .png ((value - 2^15) / 64, known third)."""
    path = Path(path)
    if path.suffix == ".flo":
        data = path.read_bytes()
        width, height = np.frombuffer(data[4:12], "<i4").tolist() if len(data) >= 12 else (0, 0)
        if data[:4] != b"PIEH" or width < 1 or len(data) != 12 + 8 * width * height:
            raise ValueError(f"{path}: not a .flo file, or damaged")
        flow = np.frombuffer(data[12:], "<f4").reshape(height, width, 2)
        known = (np.abs(flow) < 1e9).all(-1)                            # 1e10 stands for unknown
    else:
        reader = imageio_ffmpeg.read_frames(str(path.absolute()), pix_fmt="rgb48le",
                                            bits_per_pixel=48)
        try:
            if path.read_bytes()[24:26] != b"\x10\2":       # 16 bits, colour: ffmpeg would widen
                raise ValueError
            width, height = next(reader)["size"]
            data = np.frombuffer(next(reader), "<u2").reshape(height, width, 3).astype(np.float32)
        except Exception:                           # whatever the decoder says of other files
            raise ValueError(f"{path}: not a 16-bit png of flow") from None
        flow, known = (data[..., :2] - 2 ** 15) / 64, data[..., 2] > 0
    if not known.any():
        raise ValueError(f"{path}: no pixel's flow is known")
    return torch.from_numpy(np.where(known[..., None], flow, 0)).permute(2, 0, 1), \
        torch.from_numpy(known)


def read_image(path):
    """(3, H, W) in [0, 1]."""
    try:
        image = iio.imread(path)
    except Exception:                               # whatever the decoder says of other files
        raise ValueError(f"{path}: not an image") from None
    if image.ndim not in (2, 3) or image.dtype.kind != "u" or \
            image.ndim == 3 and image.shape[-1] > 4:            # (several grey pages)
        raise ValueError(f"{path}: not one image of 8 or 16 bits")
    image = image[..., None] if image.ndim == 2 else image
    image = image[..., :3] if image.shape[-1] > 2 else image[..., :1].repeat(3, -1)     # (no alpha)
    white = np.iinfo(image.dtype).max
    return torch.from_numpy(image.astype(np.float32)).permute(2, 0, 1) / white


def evaluate(raft, folder):
    """Prints the end-point error of every pair below `folder`, laid out as Middlebury's:
    frame10.png and frame11.png in a folder, flow10.flo or flow10.png beside them or in the folder
    of the same name elsewhere (other-data/Venus, other-gt-flow/Venus)."""
    line = "{:<24} {:8.3f} px   (no motion: {:.3f} px)".format
    folder, rows, truths = Path(folder), [], {}
    # (Middlebury's flow10.png is a picture beside the .flo, which therefore comes first)
    for path in sorted(folder.rglob("flow10.*")):
        truths.setdefault(path.parent.name, []).append(path)
    firsts = sorted(p for p in folder.rglob("frame10.*") if p.parent.name in truths)
    if not firsts:
        raise ValueError(f"{folder}: no frame10.png with a flow10.flo or flow10.png of its "
                         f"folder's name in it")
    for first in tqdm(firsts, desc="pairs"):
        named = truths[first.parent.name]
        named = [path for path in named if path.parent == first.parent] or named
        if named[-1].parent != named[0].parent:
            raise ValueError(f"{first}: is its flow {named[0]} or {named[-1]}?")
        truth, known = read_flow(named[0])
        pair = [read_image(first), read_image(first.with_stem("frame11"))]
        if not pair[0].shape[1:] == pair[1].shape[1:] == known.shape:
            raise ValueError(f"{first}: its frames and flow are of different sizes")
        flow = estimate_flow(raft, torch.stack(pair)[None])[0, 0].cpu()
        error = (flow - truth).norm(dim=0)[known]
        still = truth.norm(dim=0)[known].mean().item()
        rows.append((error.mean().item(), still))
        tqdm.write(line(first.parent.name, *rows[-1]))
    print(line(f"mean of {len(rows)}", *np.mean(rows, axis=0)))


def render_flow(raft, path, chunk=16):
    """Writes the flow of a video beside it, as video-flow.mp4 (Eq. 5), and prints how large it is.
    Frames come and go in chunks, so any length fits into memory."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    path, means, largest = Path(path), [], []           # of each frame's flow, px
    target = path.with_name(f"{path.stem}-flow.mp4")
    try:
        reader = imageio_ffmpeg.read_frames(str(path.absolute()))
        meta = next(reader)
    except Exception:                               # whatever the decoder says of other files
        raise ValueError(f"{path}: not a video that can be read") from None
    width, height = meta["size"]

    def pictures():
        frames = []
        for data in itertools.chain(reader, [None]):
            if data is not None:
                frames.append(torch.frombuffer(bytearray(data), dtype=torch.uint8).view(
                    height, width, 3).permute(2, 0, 1) / 255)
            if len(frames) > 1 and (data is None or len(frames) > chunk):
                flow = estimate_flow(raft, torch.stack(frames)[None])[0, :-1].cpu()
                size = flow.norm(dim=1).flatten(1)
                means.extend(size.mean(1).tolist()), largest.extend(size.amax(1).tolist())
                rgb = (flow_to_rgb(flow) * 255).round().byte().permute(0, 2, 3, 1).numpy()
                yield from rgb
                bar.update(len(flow))
                frames = frames[-1:]
        if not means:
            raise ValueError(f"{path}: flow needs two frames at least, the video has {len(frames)}")
        yield rgb[-1]                               # the last one is repeated

    def save(temporary):
        iio.imwrite(temporary, pictures(), is_batch=True, plugin="FFMPEG", fps=meta["fps"],
                    macro_block_size=2, output_params=["-crf", "12"], ffmpeg_log_level="quiet")
        check_video(temporary, len(means) + 1)

    pairs = max(1, round(meta["duration"] * meta["fps"]) - 1)
    with tqdm(total=pairs, desc="estimating", unit="pair") as bar:
        write_file(target, save)
    print(f"{target}: mean {np.mean(means):.3f} px, largest {max(largest):.2f} px a frame")


def main():
    parser = Parser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("video", nargs="?", help="write its flow beside it")
    what.add_argument("--train", action="store_true", help="train RAFT, or resume")
    what.add_argument("--eval", metavar="FOLDER", help="end-point error on pairs with true flow")
    parser.add_argument("--weights", help="other weights than weights/raft.pt; --train: start from "
                        "these (default: from nothing)")
    parser.add_argument("--out", help="--train: its folder (default: runs/raft)")
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=4e-4)
    parser.add_argument("--images", help="a folder of photographs for textures")
    parser.add_argument("--seed", type=int, default=0, help="of the training's pairs")
    args = parser.parse_args()
    if args.train:
        # (so that no clip of sprites is a held-out one)
        if not 3 <= args.batch <= 256 or not 1 <= args.steps <= 100_000 or \
                not 0 < args.lr < math.inf or not 0 <= args.seed < 100:
            raise ValueError("--batch must be from 3 to 256, --steps from 1 to 100,000, --lr "
                             "positive, --seed from 0 to 99")
        return train_raft(args.out or "runs/raft", args.steps, args.batch, args.lr, args.weights,
                          args.images, seed=args.seed)
    if args.out is not None:
        raise ValueError("--out is the folder of --train; flow is written beside its video")
    raft = RAFT.load(args.weights or ROOT / "weights/raft.pt")
    raft.to(device_of(None))
    if args.eval is not None:
        evaluate(raft, args.eval)
    else:
        render_flow(raft, args.video)


if __name__ == "__main__":
    report_errors(main)

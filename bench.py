"""Measures what the README reports.

    python bench.py sprites         is the named sprite there, and does it move as named? (--n 500)
    python bench.py speed           training step, sampling, rendering; JSON on the last line

`sprites` tracks the sprite of a clip by its colour, recognises its shape, and fits the family of
motions that the prompt names: least squares over the scene's own physics, in px.
"""
import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from flow import (COLOURS, DIRECTIONS, HELD_OUT, ROOT, SHAPES, TRAVEL, TURNS, bouncing, flow_to_rgb,
                  report_errors, signed_distance, sprite_clips)
from train import can_compile
from videojam import DiT, VideoJAM, euler_sample, linear_quadratic, squared_errors, tokenize

# ---------------------------------------------------------------- tracking a sprite

PERIOD = {"circle": 0, "square": math.pi / 2, "triangle": 2 * math.pi / 3, "cross": math.pi / 2,
          "star": 2 * math.pi / 5}                      # a turn by which a shape equals itself


def cover_of(shape, x, y, r):
    """How much of a pixel at (x, y) from the centre a shape of radius r covers: [0, 1]."""
    return (.5 - signed_distance(shape, x, y, r)).clamp(0, 1)


def track(video, colour, shape):
    """Follows a sprite by its colour through (T, 3, S, S) on a plain background.

    Returns `there` (T,) bool: something of that colour and of a sprite's size is seen, nothing of
    another colour; `shape`, the likeliest; `path` (T, 3): x, y in px, angle of the named shape."""
    T, _, S, _ = video.shape
    background = video.permute(1, 0, 2, 3).flatten(1).median(1).values
    towards = torch.tensor(COLOURS[colour]) - background
    offset = video - background[:, None, None]
    amount = torch.einsum("tchw,c->thw", offset, towards) / towards.square().sum()
    residual = (offset - amount[:, None] * towards[:, None, None]).norm(dim=1)
    alpha = amount.clamp(0, 1) * ((amount > .2) & (residual < .25))
    area = alpha.sum((1, 2))
    other = ((offset.norm(dim=1) > .35) & (residual > .35)).sum((1, 2))
    there = (area > .01 * S * S) & (area < .15 * S * S) & (other < .006 * S * S)
    grid = torch.arange(S) + .5
    total = area.clamp(min=1e-6)
    x, y = (alpha.sum(1) * grid).sum(1) / total, (alpha.sum(2) * grid).sum(1) / total

    # shape and angle: the template that is nearest, at the tracked centre and of the same area
    half = int(.22 * S)
    window = torch.arange(-half, half + 1)
    cols, rows = x.long()[:, None] + window, y.long()[:, None] + window             # (T, window)
    seen = torch.stack([F.pad(a, [half + 1] * 4)[r + half + 1][:, c + half + 1]
                        for a, r, c in zip(alpha, rows, cols)])
    dx, dy = cols + .5 - x[:, None], rows + .5 - y[:, None]

    def nearest(name, frames, turns):
        """The least error over angles of a shape, and the angle, in each of some frames."""
        unit = cover_of(name, *torch.meshgrid(*[torch.arange(-20, 21.)] * 2, indexing="xy"),
                        torch.tensor(15.)).sum()
        r = 15 * (area[frames] / unit).sqrt()[:, None, None, None]
        theta = torch.arange(turns) / turns * PERIOD[name]
        cos, sin = theta.cos()[:, None, None], theta.sin()[:, None, None]
        p, q = dx[frames][:, None, None, :], dy[frames][:, None, :, None]
        template = cover_of(name, cos * p + sin * q, cos * q - sin * p, r)  # (n, turns, side, side)
        errors = (template - seen[frames, None]).square().mean((2, 3))
        return errors.amin(1), theta[errors.argmin(1)]

    some = torch.arange(0, T, 4)
    errors = {name: nearest(name, some, 12)[0].sum().item() for name in SHAPES}
    angle = nearest(shape, torch.arange(T), 24)[1].double().numpy()
    if PERIOD[shape]:                                   # the shortest way from frame to frame
        angle = np.unwrap(angle, period=PERIOD[shape])
    path = np.stack([x.double().numpy(), y.double().numpy(), angle], 1)
    return there, min(errors, key=errors.get), path


# ---------------------------------------------------------------- fitting the named motion

def least_squares(basis, target):
    """The candidate of (K, n, P) that fits target (n,) best: RMS error, coefficients, index."""
    coefficients = np.linalg.pinv(basis) @ target                       # (K, P)
    rms = np.sqrt(np.mean((np.einsum("knp,kp->kn", basis, coefficients) - target) ** 2, 1))
    best = int(rms.argmin())
    return rms[best], coefficients[best], best


def in_range(value, low, high, slack=.3):
    return low * (1 - slack) <= value <= high * (1 + slack)


def fit_motion(kind, phrase, path, size, radius=.145):
    """Fits a motion of the scene's family to a tracked path (T, 3).

    Returns the RMS error of the centre in px, and whether it is the named motion: an error under
    2.5% of the frame's width, in the named direction, of an amount that such scenes have."""
    T, words = len(path), phrase.split()
    tau, one = np.linspace(0, 1, T), np.ones(T)
    x, y, angle = path[:, 0] / size, path[:, 1] / size, path[:, 2]
    both, zero = np.concatenate([x, y]), np.zeros(T)

    def planar(*columns):
        """A basis for x and y together: an offset each, and columns given as (for x, for y)."""
        pairs = [(one, zero), (zero, one), *columns]
        return np.stack([np.concatenate(pair) for pair in pairs], -1)[None]

    speed = words[-1] if words[-1] in TRAVEL else ""
    word = words[-2] if speed else words[-1]
    if kind == "move":
        rms, c, _ = least_squares(planar((tau, zero), (zero, tau)), both)
        along = c[2] * DIRECTIONS[word][0] + c[3] * DIRECTIONS[word][1]
        across = abs(c[2] * DIRECTIONS[word][1]) + abs(c[3] * DIRECTIONS[word][0])
        good = in_range(along, *TRAVEL[speed]) and across < .3 * along
    elif kind == "zigzag":
        tooth = np.abs((2 * tau + .5) % 1 * 2 - 1)
        rms, c, _ = least_squares(planar((tau, zero), (zero, tooth)), both)
        good = in_range(c[2] * DIRECTIONS[word][0], .45, .6) and in_range(c[3], .2, .3)
    elif kind == "swing":
        family = [(a, n, p) for a in np.linspace(.5, 1, 11) for n in np.linspace(.6, 1.4, 33)
                  for p in (0, np.pi)]
        theta = [a * np.cos(2 * np.pi * n * tau + p) for a, n, p in family]
        rms, c, best = least_squares(np.concatenate(
            [planar((np.sin(t), np.cos(t))) for t in theta]), both)
        good = in_range(c[2], .3, .4) and in_range(family[best][1], .8, 1.2, .15)
    elif kind == "orbit":
        sign = 1 if word == "clockwise" else -1
        theta = [2 * np.pi * n * tau for n in np.linspace(.6, 1.4, 33) * sign]
        rms, c, best = least_squares(np.concatenate(
            [planar((np.cos(t), np.sin(t)), (-np.sin(t), np.cos(t))) for t in theta]), both)
        good = in_range(np.hypot(c[2], c[3]), .18, .28)
    elif kind == "spin":
        rms, _, _ = least_squares(planar(), both)
        off, c, _ = least_squares(np.stack([one, tau], -1)[None], angle)
        turns = c[1] / (2 * np.pi) * (1 if word == "clockwise" else -1)
        rms = np.hypot(rms, off * radius)               # an angle's error, at the sprite's edge
        good = in_range(turns, *TURNS[speed])
    elif kind == "fall":
        family = [(f, e) for f in np.linspace(.25, .5, 26) for e in np.linspace(.5, .9, 9)]
        rms, c, best = least_squares(np.concatenate(
            [planar((zero, bouncing(tau, 0, 1, f, e))) for f, e in family]), both)
        good = in_range(c[2], 1 - .4 - .17, 1 - 2 * .12)
    return rms * size, bool(good and rms < .025)


# ---------------------------------------------------------------- python bench.py sprites

def held_out_clips(n, frames, size):
    """The first n held-out clips with one sprite: video, captions, scenes."""
    seeds, chosen = HELD_OUT + 10_000, []
    while len(chosen) < n:
        video, flow, captions, scenes = sprite_clips(range(seeds, seeds + 64), frames, size, rich=0)
        chosen += [(v, f, c, s) for v, f, c, s in zip(video, flow, captions, scenes)
                   if len(s["sprites"]) == 1]
        seeds += 64
    video, flow, captions, scenes = zip(*chosen[:n])
    return torch.stack(video), torch.stack(flow), list(captions), list(scenes)


def interval(values, statistic=np.mean):
    """[value, low, high]: a statistic and its 95% bootstrap interval over prompts."""
    values, rng = np.asarray(values, float), np.random.default_rng(0)
    draws = statistic(values[rng.integers(len(values), size=(2000, len(values)))], axis=1)
    return [float(statistic(values)), *map(float, np.percentile(draws, [2.5, 97.5]))]


def judge(video, scenes):
    """Per clip: whether the sprite is there throughout, in shape, its motion error and verdict."""
    rows = []
    for clip, scene in zip(video, scenes):
        sprite = scene["sprites"][0]
        there, shape, path = track(clip, sprite["colour"], sprite["shape"])
        error, named = fit_motion(sprite["kind"], sprite["phrase"], path, clip.shape[-1])
        rows.append({"kind": sprite["kind"], "there": bool(there.all()),
                     "shape": shape == sprite["shape"], "held_out": scene["held_out"],
                     "error": error, "named": named and bool(there.all())})
    return rows


def weights_of(args):
    return Path(args.run) / "model.pt" if args.run else ROOT / "weights/toy.pt"


def percent(values):
    return "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * v for v in interval(values)))


def sprites(args):
    weights = weights_of(args)
    bundle = VideoJAM.load(weights)
    config, tae = bundle.config, bundle.tae
    real, flow, captions, scenes = held_out_clips(args.n, config.frames, config.size)
    results = {"real clips": judge(real, scenes)}
    with torch.no_grad():
        coded, psnr = [], []
        for video, motion in zip(real.split(50), flow_to_rgb(flow).split(50)):
            coded.append(tae.decode(tae.encode(video), frames=config.frames))
            rgb = tae.decode(tae.encode(motion, True), True, config.frames)
            psnr.append([(a - b).square().mean((1, 2, 3, 4)).log10() * -10
                         for a, b in ((coded[-1], video), (rgb, motion))])
    psnr = [torch.cat(part).mean().item() for part in zip(*psnr)]
    results["through the TAE"] = judge(torch.cat(coded), scenes)
    for which, options in (("base", {}), ("control", {}), ("jam", {"w2": 0.}), ("jam", {})):
        model = VideoJAM.load(weights, which)
        if can_compile(torch.device("cpu")):
            model.dit.compile_blocks()
        name = which + (f", w2 = {options.get('w2', args.w2):g}" if which == "jam" else "")
        video, _ = model.generate(captions, steps=args.steps, batch=50, seed=HELD_OUT, w1=args.w1,
                                  progress=name, **{"w2": args.w2, **options})
        results[name] = judge(video, scenes)
    print(f"{args.n} held-out single-sprite prompts, {args.steps} steps, w1 = {args.w1:g}; "
          f"TAE {psnr[0]:.1f} dB, of RGB flow {psnr[1]:.1f} dB\n")
    print("| | sprite there, in its colour, in all frames % | of the named shape % | "
          "moves as named % | median motion error, px |\n|---|---|---|---|---|")
    for name, rows in results.items():
        error = "{:.2f} [{:.2f}, {:.2f}]".format(*interval([r["error"] for r in rows], np.median))
        print(f"| {name} |", " | ".join(percent([r[k] for r in rows])
                                        for k in ("there", "shape", "named")), f"| {error} |")
    kinds = sorted({r["kind"] for r in results["real clips"]})
    print("\n| moves as named % | " + " | ".join(kinds) + " | unseen combinations |\n|---" +
          "|---" * (len(kinds) + 1) + "|")
    for name, rows in results.items():
        cells = [[r["named"] for r in rows if r["kind"] == kind] for kind in kinds]
        cells.append([r["named"] for r in rows if r["held_out"]])
        print(f"| {name} |", " | ".join(
            f"{100 * np.mean(cell):.0f} (n {len(cell)})" if cell else "-" for cell in cells), "|")
    out = Path("runs/bench")
    out.mkdir(parents=True, exist_ok=True)
    (out / "sprites.json").write_text(json.dumps({"psnr": psnr, **results}))


# ---------------------------------------------------------------- python bench.py speed

def median_time(function, repeats=7):
    function()
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def speed(args):
    weights = weights_of(args)
    base, jam = (VideoJAM.load(weights, which) for which in ("base", "jam"))
    preset, batch, result = base.config, args.batch, {}
    shape = preset.latent_shape()
    C, y = shape[0], tokenize(["a red square moves left slowly"] * batch)
    tokens = math.prod(shape[1:]) // preset.dit.patch ** 2

    def training_step(model):
        model = model.train()
        if can_compile(torch.device("cpu")):
            model.compile_blocks()
        optimizer = torch.optim.AdamW(model.parameters(), 0., fused=True)
        z = torch.randn(batch, C * (1 + model.config.motion), *shape[1:])

        def step():
            with torch.autocast("cpu", torch.bfloat16):
                loss = squared_errors(model, z, y, C)[1].mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return step

    # multiply-adds of the model: each matrix once a token, attention once a pair of tokens
    c, L = base.dit.config, y.shape[1]
    matrices = sum(p.numel() for p in base.dit.blocks.parameters() if p.ndim == 2) * tokens
    matrices += c.depth * 2 * c.text_width * c.width * (L - tokens)     # K, V of the text
    matrices += sum(p.numel() for p in base.dit.text.layers.parameters() if p.ndim == 2) * L
    attention = (2 * c.depth * c.width * tokens * (tokens + L)
                 + 2 * c.text_depth * c.text_width * L * L)
    flops = 3 * 2 * (matrices + attention) * batch                      # forward and backward
    for dtype in (torch.bfloat16, torch.float32):
        a = torch.randn(4096, 4096, dtype=dtype)
        name = str(dtype).removeprefix("torch.")
        result[f"matrix product {name}, GFLOP/s"] = 2 * 4096 ** 3 / median_time(lambda: a @ a) / 1e9
    steps = {name: training_step(model) for name, model in (("base", base.dit), ("jam", jam.dit))}
    for step in [*steps.values()] * 3:                                  # compile, settle
        step()
    times = [[median_time(step, 1) for step in steps.values()] for _ in range(9)]       # in turn
    for name, value in zip(steps, np.median(times, 0)):
        result[f"training step {name}, ms"] = 1e3 * float(value)
    for model in (base.dit, jam.dit):
        model.eval()
    result["training step jam / base"] = (result["training step jam, ms"]
                                          / result["training step base, ms"])
    result["training step, GFLOP/s"] = flops / result["training step base, ms"] / 1e6
    result["share of the bf16 product's rate"] = (result["training step, GFLOP/s"]
                                                  / result["matrix product bfloat16, GFLOP/s"])
    for mode in ("none", "cfg", "inner"):
        def run(mode=mode):
            x = torch.randn(batch, *shape)
            with torch.autocast("cpu", torch.bfloat16):
                euler_sample(jam.dit, x, x, y, linear_quadratic(20), mode=mode)
        result[f"sampling {mode}, ms a step"] = 1e3 * median_time(run, 3) / 20
    result["sampling inner / cfg"] = (result["sampling inner, ms a step"]
                                      / result["sampling cfg, ms a step"])
    result["clips rendered a second"] = 256 / median_time(
        lambda: [sprite_clips(range(i, i + 64)) for i in range(0, 256, 64)], 3)
    print(f"{batch} clips of {tokens} tokens, {flops / 1e9:.0f} GFLOP a training step, "
          f"{torch.get_num_threads()} threads\n\n| | |\n|---|---|")
    for name, value in result.items():
        print(f"| {name} | {value:.3g} |")
    print(json.dumps(result))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("experiment", choices=("sprites", "speed"))
    parser.add_argument("--run", help="folder of a training run; default: the shipped weights")
    parser.add_argument("--n", type=int, default=500, help="prompts")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--w1", type=float, default=5.)
    parser.add_argument("--w2", type=float, default=3.)
    parser.add_argument("--batch", type=int, default=64, help="clips in a step of `speed`")
    args = parser.parse_args()
    {"sprites": sprites, "speed": speed}[args.experiment](args)


if __name__ == "__main__":
    report_errors(main)

"""The paper's experiments, with the control that it did not have, on the sprite world.

    python bench.py                         all of them (--quick for a look): runs/bench/report.html
    python bench.py compare --n 500         one (runs/bench/compare/report.html), of motivation,
                                            compare, ablation, sdedit; or speed
    python bench.py metrics FOLDER          VBench's motion metrics of anybody's videos
    python bench.py generate PROMPTS.txt FOLDER     samples of a prompt file, named as for VBench
    python bench.py rate A/ B/              a page that asks people which is better
    python bench.py votes votes-*.json      the table of their votes

A sprite is tracked by its colour, its shape is the nearest template, and its path is fitted by the
motion that the prompt names: least squares over the scene's own physics, in px.
"""
import argparse
import base64
import dataclasses
import functools
import html
import itertools
import json
import math
import os
import re
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from imageio_ffmpeg import read_frames
from torch import nn
from tqdm import tqdm

from flow import (COLOURS, DIRECTIONS, HELD_OUT, RAFT, SHAPES, TRAVEL, TURNS, Parser, autocast,
                  bouncing, device_of, estimate_flow, fast_dtype, flow_to_rgb, grid, optimizers,
                  out_of_memory, read_lines, report_errors, rgb_to_flow, signed_distance,
                  sprite_clips, sprite_scene, write_text, write_video)
from train import SUFFIXES, can_compile, flops_of, preset_of, recomputes
from videojam import (PRESETS, TAE, DiT, VideoJAM, corrupted, cut, euler_sample, linear_quadratic,
                      noised, say_cut, set_recompute, squared_errors, tokenize, velocity,
                      weights_of)

# ---------------------------------------------------------------- tracking a sprite

PERIOD = {"circle": 0, "square": math.pi / 2, "triangle": 2 * math.pi / 3, "cross": math.pi / 2,
          "star": 2 * math.pi / 5}                      # a turn by which a shape equals itself


def cover_of(shape, x, y, r):
    """How much of a pixel at (x, y) from the centre a shape of radius r covers: [0, 1]."""
    return (.5 - signed_distance(shape, x, y, r)).clamp(0, 1)


def track(video, colour, shape):
    """Follows a sprite by its colour through (T, 3, S, S) on a plain background.

    Returns `there` (T,) bool: something of that colour and of a sprite's size is seen, nothing of
    another colour; `shape`, the likeliest; `path` (T, 3): x, y in px, angle of the named shape;
    `alpha` (T, S, S): where that colour is, from 0 to 1."""
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
    centres = torch.arange(S) + .5
    total = area.clamp(min=1e-6)
    x, y = (alpha.sum(1) * centres).sum(1) / total, (alpha.sum(2) * centres).sum(1) / total

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
    return there, min(errors, key=errors.get), path, alpha


def blobs(mask, least):
    """How many connected regions (corners connect) of at least `least` pixels (T, S, S) has."""
    T, S, _ = mask.shape
    label = torch.arange(1., S * S + 1).view(1, S, S) * mask
    while not torch.equal(spread := F.max_pool2d(label, 3, 1, 1) * mask, label):
        label = spread                                  # the largest spreads over its region
    sizes = torch.zeros(T, S * S + 1)
    sizes.scatter_add_(1, label.flatten(1).long(), mask.float().flatten(1))
    return (sizes[:, 1:] >= least).sum(1)


# ---------------------------------------------------------------- fitting the named motion

def least_squares(bases, target):
    """Which of some bases (n, P) fits target (n,) best: RMS error, coefficients (P,), index."""
    basis = np.stack(bases)                                             # (K, n, P)
    coefficients = np.linalg.pinv(basis) @ target                       # (K, P)
    rms = np.sqrt(np.mean((np.einsum("knp,kp->kn", basis, coefficients) - target) ** 2, 1))
    best = int(rms.argmin())
    return rms[best], coefficients[best], best


def in_range(value, low, high, slack=.3):
    return low * (1 - slack) <= value <= high * (1 + slack)


def fit_motion(kind, phrase, path, size, radius=.145):
    """Fits a motion of the scene's family to a tracked path (T, 3).

    Returns the RMS error in px of a coordinate of the centre (a spin's has the angle's in it, at a
    sprite's edge); whether it is the named motion (an error under 2.5% of the frame's width, in the
    named direction, of an amount that such scenes have); and that amount: widths travelled, length,
    radius, turns, or the share of energy that a bounce keeps."""
    T, words = len(path), phrase.split()
    tau, one = np.linspace(0, 1, T), np.ones(T)
    x, y, angle = path[:, 0] / size, path[:, 1] / size, path[:, 2]
    both, zero = np.concatenate([x, y]), np.zeros(T)

    def planar(*columns):
        """A basis for x and y together: an offset each, and columns given as (for x, for y)."""
        pairs = [(one, zero), (zero, one), *columns]
        return np.stack([np.concatenate(pair) for pair in pairs], -1)

    speed = words[-1] if words[-1] in TRAVEL else ""
    word = words[-2] if speed else words[-1]
    if kind == "move":
        rms, c, _ = least_squares([planar((tau, zero), (zero, tau))], both)
        along = c[2] * DIRECTIONS[word][0] + c[3] * DIRECTIONS[word][1]
        across = abs(c[2] * DIRECTIONS[word][1]) + abs(c[3] * DIRECTIONS[word][0])
        good, amount = in_range(along, *TRAVEL[speed]) and across < .3 * along, along
    elif kind == "zigzag":
        tooth = np.abs((2 * tau + .5) % 1 * 2 - 1)
        rms, c, _ = least_squares([planar((tau, zero), (zero, tooth))], both)
        amount = c[2] * DIRECTIONS[word][0]
        good = in_range(amount, .45, .6) and in_range(c[3], .2, .3)
    elif kind == "swing":
        family = [(a, n, p) for a in np.linspace(.5, 1, 11) for n in np.linspace(.6, 1.4, 33)
                  for p in (0, np.pi)]
        theta = [a * np.cos(2 * np.pi * n * tau + p) for a, n, p in family]
        rms, c, best = least_squares([planar((np.sin(t), np.cos(t))) for t in theta], both)
        amount = c[2]
        good = in_range(amount, .3, .4) and in_range(family[best][1], .8, 1.2, .15)
    elif kind == "orbit":
        sign = 1 if word == "clockwise" else -1
        theta = [2 * np.pi * n * tau for n in np.linspace(.6, 1.4, 33) * sign]
        rms, c, _ = least_squares([planar((np.cos(t), np.sin(t)), (-np.sin(t), np.cos(t)))
                                   for t in theta], both)
        amount = np.hypot(c[2], c[3])
        good = in_range(amount, .18, .28)
    elif kind == "spin":
        rms, _, _ = least_squares([planar()], both)
        off, c, _ = least_squares([np.stack([one, tau], -1)], angle)
        amount = c[1] / (2 * np.pi) * (1 if word == "clockwise" else -1)      # turns
        rms = np.hypot(rms, off * radius)               # an angle's error, at the sprite's edge
        good = in_range(amount, *TURNS[speed])
    elif kind == "fall":
        family = [(f, e) for f in np.linspace(.25, .5, 26) for e in np.linspace(.5, .9, 9)]
        rms, c, best = least_squares([planar((zero, bouncing(tau, 0, 1, f, e)))
                                      for f, e in family], both)
        good, amount = in_range(c[2], 1 - .4 - .17, 1 - 2 * .12), family[best][1] ** 2
    return rms * size, bool(good and rms < .025), float(amount)


# ---------------------------------------------------------------- statistics: every number's n

def interval(values, statistic=np.mean, share=False):
    """[value, low, high]: a statistic and its 95% bootstrap interval over prompts. For the share of
    prompts that have something (values of 0 and 1), of which nearly all or none may have it,
    Wilson's score interval: a bootstrap has little or nothing to draw there."""
    values, rng = np.asarray(values, float), np.random.default_rng(0)
    if share and np.isin(values, (0, 1)).all():
        n, p, z = len(values), values.mean(), 1.959964
        middle, reach = p + z ** 2 / (2 * n), z * np.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2)
        ends = np.clip([middle - reach, middle + reach], 0, 1 + z ** 2 / n) / (1 + z ** 2 / n)
        return [float(p), *ends.tolist()]
    draws = statistic(values[rng.integers(len(values), size=(2000, len(values)))], axis=1)
    return [float(statistic(values)), *map(float, np.percentile(draws, [2.5, 97.5]))]


def paired(a, b):
    """Mean of a - b over prompts, 95% bootstrap interval, and p of a sign-flip permutation test."""
    difference, rng = np.asarray(a, float) - np.asarray(b, float), np.random.default_rng(0)
    flipped = (rng.choice([-1, 1], (5000, len(difference))) * difference).mean(1)
    p = (1 + (np.abs(flipped) >= abs(difference.mean()) - 1e-12).sum()) / 5001
    return [*interval(difference), float(p)]


def cell(values, scale=1, statistic=np.mean, share=False):
    """A table's cell: value [low, high], over the clips that have one; how many, if not all do."""
    have = [value for value in values if value is not None]
    if not have:
        return "-"
    return "{:.{k}f} [{:.{k}f}, {:.{k}f}]".format(
        *(scale * v for v in interval(have, statistic, share)), k=1 if scale == 100 else 2) \
        + f", n = {len(have)}" * (len(have) < len(values))


# ---------------------------------------------------------------- metrics of any video (VBench's)

def warp(image, flow):
    """image (B, 3, H, W) looked up at x + flow(x), flow (B, 2, H, W) in px."""
    B, _, H, W = image.shape
    y, x = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    at = torch.stack([x, y]).to(flow) + flow
    at = at.permute(0, 2, 3, 1) * 2 / torch.tensor([W - 1, H - 1]).to(flow) - 1
    return F.grid_sample(image, at, padding_mode="border", align_corners=True)


def vbench(video, fps, raft, flow=None):
    """VBench's motion metrics of a video (T, 3, H, W) in [0, 1], by its formulas.

    dynamic: dynamic_degree (of RAFT's flow, ours being the small model); flicker:
    temporal_flickering; smooth: motion_smoothness, but the odd frames are interpolated by RAFT's
    flow between the even ones, not by AMT, so it compares with VBench's only in order. `flow`,
    where it is known: RAFT's, of frames 1/8 s apart. None where a video is too short for one."""
    def flow_of(frames):
        return estimate_flow(raft, frames[None])[0, :-1]

    some, even = video[::max(1, round(fps / 8))], video[::2]
    H, W = video.shape[-2:]
    dynamic = flicker = smooth = None
    if len(some) > 1:
        size = (flow_of(some) if flow is None else flow[:-1]).norm(dim=1).flatten(1)
        top = size.topk(max(1, int(.05 * H * W)), 1).values.mean(1)
        dynamic = bool((top > 6 * min(H, W) / 256).sum() >= round(4 * len(some) / 16))
    if len(video) > 1:
        flicker = 1 - (video[1:] - video[:-1]).abs().mean().item()
    if len(even) > 1:                   # halfway from both sides, each by its own flow
        ahead, back = flow_of(even), flow_of(even.flip(0)).flip(0)
        middle = (warp(even[:-1], -ahead / 2) + warp(even[1:], -back / 2)) / 2
        smooth = 1 - (video[1::2][:len(middle)] - middle).abs().mean().item()
    return {"dynamic": dynamic, "flicker": flicker, "smooth": smooth}


VBENCH = {"dynamic": "dynamic degree %", "flicker": "temporal flickering %",
          "smooth": "motion smoothness %"}


def frame_statistics(video):
    """(N, T, 3, H, W) -> (N T, 27): colour, contrast and edges of every frame, by thirds of it."""
    frames = video.flatten(0, 1)
    edges = F.pad((frames[..., 1:] - frames[..., :-1]).abs(), (0, 1))
    parts = [F.adaptive_avg_pool2d(x, (3, 1)) for x in (frames, frames.square(), edges)]
    return torch.cat(parts, 1).flatten(1).double()


def moments(features):
    """Mean (k,) and covariance (k, k) of features (n, k)."""
    return features.mean(0), features.T.cov()


def frechet(a, b):
    """Frechet distance (squared, as FID is) of two sets of features, given by their `moments`, in
    b's variances. Sets that are small, or drawn with repetition, are further apart by chance."""
    scale = b[1].diagonal().sqrt().clamp(min=1e-6)
    (mean_a, cov_a), (mean_b, cov_b) = ((mean / scale, cov / scale / scale[:, None])
                                        for mean, cov in (a, b))
    cross = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


def distance_cell(video, others, n):
    """A table's cell: the Frechet distance of frame statistics, with its interval over n prompts
    (of several samples, all prompts' first ones come first)."""
    theirs = moments(frame_statistics(others))
    mine = frame_statistics(video).unflatten(0, (-1, n, video.shape[1]))

    def distance(prompts, axis=0):
        return np.apply_along_axis(
            lambda i: frechet(moments(mine[:, i.astype(int)].flatten(0, 2)), theirs), axis, prompts)

    return cell(range(n), statistic=distance)


# ---------------------------------------------------------------- the sprite world's own metrics

def held_out_clips(n, frames, size, start=HELD_OUT + 10_000):
    """The first n held-out clips with one sprite on a plain background, from a seed on: video,
    flow, captions, scenes."""
    alone = (seed for seed in itertools.count(start)
             if len(sprite_scene(seed, frames, 0)["sprites"]) == 1)
    return sprite_clips(list(itertools.islice(alone, n)), frames, size, rich=0)


def judge(video, scenes):
    """Per scene: is the sprite there throughout, alone, in shape; its motion, error and verdict.
    Of several samples of a prompt (all prompts' first ones come first), the mean. Tracked is the
    centre of all that has the sprite's colour: two halves, or two sprites, may move as `named`
    together, hence `whole`, which wants one."""
    rows = []
    for clip, scene in zip(video, itertools.cycle(scenes)):
        sprite, S = scene["sprites"][0], clip.shape[-1]
        there, shape, path, alpha = track(clip, sprite["colour"], sprite["shape"])
        error, named, amount = fit_motion(sprite["kind"], sprite["phrase"], path, S)
        there = bool(there.all())
        one = bool((blobs(alpha > .5, .003 * S * S) == 1).all())
        speeds = {"move": TRAVEL, "spin": TURNS}.get(sprite["kind"], {})
        paces = {None: 0, **{word: np.mean(speeds[word]) for word in speeds}}  # None: no motion
        speed = min(paces, key=lambda word: abs(amount - paces[word]))
        word = sprite["phrase"].split()[-1]
        rows.append({
            "kind": sprite["kind"], "held_out": scene["held_out"], "there": there, "one": one,
            "shape": shape == sprite["shape"], "named": named and there,
            "whole": named and there and one,
            # what is not there has no motion to be off, what does not bounce no energy to keep
            "error": error if there else None,
            "speed": there and speed == (word if word in speeds else "") if speeds else None,
            "energy": amount if sprite["kind"] == "fall" and named and there else None})
    return [mean_row(rows[i::len(scenes)]) for i in range(len(scenes))]


def mean_row(rows):
    """The mean of each number in rows of the same prompt, over those that have one."""
    merged = {key: [row[key] for row in rows if row[key] is not None] for key in rows[0]}
    return {key: None if not values else
            values[0] if key in ("kind", "held_out") else float(np.mean(values))
            for key, values in merged.items()}


def in_parts(function, clips):
    """function of clips (n, ...), eight at a time: what is large does not fit all at once."""
    return torch.cat([function(part) for part in clips.split(8)])


class World:
    """What every experiment starts from: held-out clips, the bundle's models, and their samples."""
    def __init__(self, args):
        self.args, self.device, self.models = args, device_of(args.device), {}
        self.raft = RAFT.load().to(self.device)
        for which in ("jam", "base", "control"):
            try:
                self.models[which] = VideoJAM.load(weights_of(args), which, self.device)
            except ValueError:
                if which == "jam":
                    raise
                print(f"{weights_of(args)}: no {which} model, its rows are left out")
                continue
            if self.device.type == "cpu" and can_compile(self.device):  # (a GPU samples faster)
                self.models[which].dit.compile_blocks()
        self.config, self.tae = self.models["jam"].config, self.models["jam"].tae
        self.video, self.flow, self.captions, self.scenes = held_out_clips(
            args.n, self.config.frames, self.config.size)
        self.also = {run: VideoJAM.load(run / "model.pt", device=self.device)
                     for run in args.also or ()}

    @functools.lru_cache(4)             # compare's, which ablation has again; all do not fit
    def sample(self, which="jam", **options):
        """Video and RGB motion for the prompts (--seeds times all of them, one after the other);
        sample i starts from the noise of HELD_OUT + i."""
        defaults = {"steps": self.args.steps, "w1": self.args.w1, "w2": self.args.w2}
        made = (self.models | self.also)[which].generate(
            self.captions * self.args.seeds, seed=HELD_OUT, batch=50,
            progress=f"{which} {options or ''}", **{**defaults, **options})
        return tuple(None if part is None else part.cpu() for part in made)

    @torch.no_grad()
    def latents(self, video, flow):
        """Latents x1, d1 of clips and of their flow, and noise x0, d0 for them, on the device."""
        rgb = flow_to_rgb(flow, self.config.sigma)
        x1, d1 = (in_parts(lambda v: self.tae.encode(v.to(self.device), motion), clips)
                  for motion, clips in enumerate((video, rgb)))
        generator = torch.Generator().manual_seed(HELD_OUT)
        return x1, d1, *(torch.randn(x1.shape, generator=generator).to(x1) for _ in range(2))

    @torch.no_grad()
    def coded(self, video, motion=False):
        """Video, or RGB flow, through the TAE: the ceiling of what a DiT can reach."""
        return in_parts(lambda v: self.tae.decode(self.tae.encode(v.to(self.device), motion),
                                                  motion, self.config.frames).cpu(), video)

    @property
    def ceilings(self):
        return {"real clips": (self.video, flow_to_rgb(self.flow, self.config.sigma)),
                "through the TAE": (self.coded(self.video), None)}


PHYSICS = {"there": "there, in its colour, in all frames %", "one": "one sprite %",
           "shape": "of the named shape %", "named": "moves as named %",
           "whole": "one sprite that moves as named %",
           "error": "median motion error of those there, px", "speed": "speed as named %",
           "energy": "energy kept by a bounce"}


def table_of(results, titles):
    """A table of {name: rows of measures} with a column for each of {measure: title}."""
    return ["", *titles.values()], [
        [name, *(cell([row[key] for row in rows], 100 if "%" in title else 1,
                      np.median if key == "error" else np.mean,
                      share="%" in title and key not in ("flicker", "smooth"))
                 for key, title in titles.items())]
        for name, rows in results.items()]


def paired_table(results, against):
    """Every model minus one, over the same prompts and noise."""
    table = []
    for name in results:
        if name in (against, "real clips", "through the TAE"):
            continue
        row = [f"{name} minus {against}"]
        for key, scale in (("named", 100), ("whole", 100), ("one", 100), ("shape", 100),
                           ("error", 1)):
            a, b = (np.array([r[key] for r in results[which]], float) for which in (name, against))
            both = ~np.isnan(a - b)                     # (None, what a clip does not have, is NaN)
            if not both.any():
                row.append("-")
                continue
            *values, p = paired(a[both], b[both])
            row.append("{:+.{k}f} [{:+.{k}f}, {:+.{k}f}], p = {:.4f}, n = {}".format(
                *(scale * v for v in values), p, both.sum(), k=1 if scale == 100 else 2))
        table.append(row)
    return ["", "moves as named, points", "one sprite that moves as named, points",
            "one sprite, points", "of the named shape, points",
            "mean motion error where both are there, px"], table


# ---------------------------------------------------------------- the experiments

def motivation(world):
    """Sec. 3, Fig. 3: the appearance loss before and after the frames are permuted. The paper has
    35,000 training clips, each at one random step, and the difference of the losses; here a few
    held-out clips are seen at all steps, and the rise is relative, per clip."""
    config, n = world.config, min(world.args.n, 64)
    seeds, rng = [scene["seed"] for scene in world.scenes[:n]], np.random.default_rng(0)
    orders = [rng.permutation(config.frames) for _ in seeds]
    y = tokenize(world.captions[:n], config.dit.max_bytes).to(world.device)
    clips = [world.latents(*sprite_clips(seeds, config.frames, config.size, 0, order)[:2])
             for order in (None, orders)]
    times = linear_quadratic(100).to(world.device)
    steps = range(0, 100, 1 if world.args.steps >= 100 else 5)
    models = {which: (bundle.dit, 1) for which, bundle in world.models.items()}
    models["jam, d = 0"] = models["jam"][0], 0
    curves, table, shown, levels = {}, [], (0, 20, 40, 60, 80, 90, 95), []
    for which, (dit, given) in models.items():
        C, gaps, level = config.tae.channels, [], [which]
        for k in tqdm(steps, desc=f"motivation {which}"):
            losses = []
            for x1, d1, x0, d0 in clips:
                t = times[k].expand(n)
                z = noised(x1, x0, t)
                if dit.config.motion:
                    z = torch.cat([z, given * noised(d1, d0, t)], 1)
                with torch.no_grad(), autocast(world.device):
                    u = dit(z, t, y)[:, :C]
                losses.append((u - velocity(x1, x0)).square().flatten(1).mean(1).cpu())
            gaps.append((losses[1] / losses[0] - 1).numpy())
            if k in shown:
                level.append(cell(losses[0].tolist()))
        curves[which] = steps, [interval(gap) for gap in gaps]
        flat = np.mean([high <= .02 for k, (_, _, high) in zip(*curves[which]) if k <= 60])
        table.append([which, f"{100 * flat:.0f} %", cell(np.mean(gaps, 0), 100)])
        levels.append(level)
    header = ["loss of the clips as they are", *(f"step {k}, t = {times[k]:.3f}" for k in shown)]
    by_t = {name: ([float(times[k]) for k in steps], gaps) for name, (_, gaps) in curves.items()}
    return {"about": f"Relative rise of the appearance loss when a clip's frames are permuted; n = "
                     f"{n} clips (64 at most), the same noise and permutation for every model, 95% "
                     "bands. Flat: the share of steps up to 60 where the rise is surely below 2%. "
                     "VideoJAM sees the noised flow of the permuted clip too; with d = 0 it does "
                     "not. At step 0 (t = 0) all see noise alone: what rises there is how "
                     "unlikely the permuted clip is, not what a model notices.",
            "tables": [(["", "flat up to step 60", "mean rise %"], table), (header, levels)],
            "curves": [("sampler's step", curves), ("t (0 noise, 1 data)", by_t)]}


def compare(world):
    """Tables 1, 2, 4: base, control (plain fine-tuning for the same steps) and VideoJAM."""
    config, args = world.config, world.args

    def psnr(a, b):
        return (-10 * (a - b).square().mean((1, 2, 3, 4)).log10()).tolist()

    videos = world.ceilings
    real, rgb = videos["real clips"]
    for which in ("base", "control"):
        if which in world.models:
            videos[which] = world.sample(which)
    alone, guided = "VideoJAM, w2 = 0", f"VideoJAM, w2 = {args.w2:g}"
    videos |= {alone: world.sample(w2=0.), guided: world.sample()}
    results = {name: judge(video, world.scenes) for name, (video, _) in videos.items()}
    others = held_out_clips(args.n, config.frames, config.size, HELD_OUT + 10_000_000)[0]
    some = min(args.n, args.few)
    seen_by_raft, distances = {}, {}
    for name, (video, motion) in videos.items():
        rows = seen_by_raft[name] = []
        for i, clip in enumerate(tqdm(video[:some], desc=f"flow of {name}")):
            clip = clip.to(world.device)
            seen = estimate_flow(world.raft, clip[None])[0]
            rows.append({**vbench(clip, config.fps, world.raft, seen if config.fps == 8 else None),
                         "apart": None})
            if motion is not None:
                told = rgb_to_flow(motion[i].to(world.device), config.sigma)
                moving = (told.norm(dim=1) > .3) | (seen.norm(dim=1) > .3)
                if moving.any():
                    rows[-1]["apart"] = (told - seen).norm(dim=1)[moving].mean().item()
        distances[name] = distance_cell(video, others, args.n)
    titles = VBENCH | {"apart": "motion predicted against seen by RAFT, px"}
    header, table = table_of(seen_by_raft, titles)
    header = [f"the first {some} prompts", *header[1:],
              f"frame distance to {args.n} other real clips (all prompts)"]
    table = [[*row, distances[row[0]]] for row in table]
    kinds = sorted({r["kind"] for r in results["real clips"]})
    by_kind = [[name, *(cell([r["named"] for r in rows if r["kind"] == k], 100, share=True)
                        for k in kinds),
                cell([r["named"] for r in rows if r["held_out"]], 100, share=True)]
               for name, rows in results.items()]
    counts = [f"{k} (n {sum(r['kind'] == k for r in results['real clips'])})" for k in kinds]
    unseen = f"unseen combinations (n {sum(r['held_out'] for r in results['real clips'])})"
    both = {name: results[name] for name in (alone, guided)}
    tables = [table_of(results, PHYSICS),
              *([paired_table(results, "control")] if "control" in results else []),
              paired_table(both, alone),
              (["moves as named %", *counts, unseen], by_kind), (header, table)]
    quality = [cell(psnr(real, videos["through the TAE"][0])),
               cell(psnr(rgb, world.coded(rgb, True)))]
    return {"about": f"n = {args.n} prompts, those of held-out clips of one sprite on a plain "
                     f"background ({len(set(world.captions))} of them different), samples "
                     f"of each: {args.seeds}, the same noise for every model, "
                     f"{args.steps} steps, w1 = {args.w1:g}; 95% intervals over prompts, Wilson's "
                     "for shares, by bootstrap for all else "
                     "(that of the frame distance leans upwards: what is drawn twice varies less); "
                     "the p values are not corrected for their number. "
                     f"TAE: {quality[0]} dB, RGB flow {quality[1]} dB.",
            "tables": tables, "clips": results,
            "shown": [(name, video[:8]) for name, (video, _) in videos.items()]
            + [("motion predicted by VideoJAM", world.sample()[1][:8])]}


def ablation(world):
    """Table 3 (its "w/o Inner-Guidance" is w2 = 0, "w/o optical flow" is d = 0), and what it leaves
    open: w2, and how long it acts."""
    steps, w2 = world.args.steps, world.args.w2
    variants = {f"VideoJAM, w2 = {w2:g}": {},
                "without text guidance": {"w1": 0.},
                "without motion guidance": {"w2": 0.},
                # classifier-free guidance on u(x, 0, y): composable without its motion term
                "d = 0 at inference": {"mode": "composable", "w1": world.args.w1 + 1, "w2": 0.},
                "InstructPix2Pix": {"mode": "ip2p"},
                "composable": {"mode": "composable"}}
    variants |= {f"w2 = {w:g}": {"w2": w} for w in (1., 2., 4., 6.) if w != w2}
    variants |= {f"w2 in the first {share}% of steps": {"motion_steps": steps * share / 100}
                 for share in (25, 75, 100)}
    variants |= {str(run): {"which": run} for run in world.also}
    rows = {name: judge(video, world.scenes) for name, (video, _) in world.ceilings.items()}
    rows |= {name: judge(world.sample(**options)[0], world.scenes)
             for name, options in variants.items()}
    return {"about": f"n = {world.args.n} held-out clips' prompts, the same noise in every row. "
                     "Composable guidance has its motion term in all steps. The p values are not "
                     "corrected for their number.",
            "tables": [table_of(rows, PHYSICS), paired_table(rows, f"VideoJAM, w2 = {w2:g}")],
            "clips": rows}


@torch.no_grad()
def sdedit(world):
    """App. B, Fig. 8: clips noised to steps 20, 60, 80 of 100 and sampled on from there."""
    n, args, table = min(world.args.n, world.args.few), world.args, []
    video, flow = (part[:n].to(world.device) for part in (world.video, world.flow))
    y = tokenize(world.captions[:n], world.config.dit.max_bytes).to(world.device)
    times = linear_quadratic(100).to(world.device)
    x1, d1, x0, d0 = world.latents(video, flow)
    truth, shown = F.avg_pool2d(flow.flatten(0, 1), 8), [("the clip", video[:8].cpu())]

    def row(name, t, edited):
        seen = in_parts(lambda v: estimate_flow(world.raft, v), edited)
        coarse = F.avg_pool2d(seen.flatten(0, 1), 8)
        cosine = F.cosine_similarity(coarse.flatten(1), truth.flatten(1))
        table.append([name, t, cell(cosine.view(n, -1).mean(1).tolist()),
                      cell((edited - video).abs().flatten(1).mean(1).tolist())])
        shown.append((name, edited[:8].cpu()))

    row("the clip itself, by RAFT", "1", video)
    row("through the TAE", "1", world.coded(video).to(world.device))
    for which in ("base", "jam"):
        for start in (0, 20, 60, 80) if which in world.models else ():
            dit, t = world.models[which].dit, times[start].expand(n)
            x, d = noised(x1, x0, t), noised(d1, d0, t) if dit.config.motion else None
            with autocast(world.device):
                x, _ = euler_sample(dit, x, d, y, times[start:], args.w1, args.w2,
                                    "cfg" if d is None else "inner",
                                    motion_steps=max(0, 50 - start),
                                    progress=f"sdedit, {which} from {start}")
                edited = in_parts(lambda v: world.tae.decode(v, frames=world.config.frames), x)
            row(f"{which}, step {start}", f"{times[start]:.3f}", edited)
    return {"about": f"n = {n} clips. Coarse motion (8 x 8 px means of RAFT's flow) "
                     "against the clip's own: cosine, 1 is the same. Step 0 is a free sample. "
                     "VideoJAM is given the clip's noised motion too.",
            "tables": [(["from", "t", "agreement of motion", "difference of pixels"], table)],
            "shown": shown}


# ---------------------------------------------------------------- folders of anybody's videos

def videos_of(folder, kinds=SUFFIXES):
    """The paths of a folder's videos; ValueError where there are none."""
    paths = sorted(p for p in Path(folder).glob("*") if p.suffix.lower() in kinds)
    if not paths:
        raise ValueError(f"{folder}: no videos ({', '.join(sorted(kinds))}) in it")
    return paths


def file_stem(prompt):
    """A prompt as a file's name: no slash or NUL, 180 bytes at most (a name holds 255)."""
    return cut(re.sub("[/\0]", " ", prompt), 180)


def prompt_of(stem):
    """The prompt (or what of it fits a file's name) of a video named PROMPT-INDEX."""
    return re.sub(r"-\d+$", "", stem)


def by_prompt(named, mean=np.mean):
    """Pairs of a video's stem and what was measured of it -> the mean of that for every prompt."""
    groups = {}
    for stem, value in named:
        groups.setdefault(prompt_of(stem), []).append(value)
    return [mean(values) for values in groups.values()]


def metrics(args):
    """The same metrics for a folder of videos, `{prompt}-{index}.mp4` as VBench names them; with a
    prompt file, of its prompts alone."""
    paths, rows, skipped, missing = videos_of(args.paths[0]), {}, 0, 0
    device = device_of(args.device)
    raft = RAFT.load().to(device)
    if len(args.paths) == 2:
        wanted = {file_stem(prompt) for prompt in read_lines(args.paths[1])}
        missing = len(wanted - {prompt_of(path.stem) for path in paths})
        paths = [path for path in paths if prompt_of(path.stem) in wanted]
    args.out.mkdir(parents=True, exist_ok=True)             # or to have worked for nothing
    for path in tqdm(paths, desc="metrics"):
        try:
            reader, frames = read_frames(str(path.absolute())), []
            meta = next(reader)
            width, height = meta["size"]
            for frame in reader:                # one by one, since large ones fill the memory
                frame = torch.frombuffer(bytearray(frame), dtype=torch.uint8) \
                    .view(1, height, width, 3).permute(0, 3, 1, 2)
                frames.append(F.interpolate(frame, (args.size, args.size), mode="bilinear",
                                            antialias=True) if args.size else frame)
            video = torch.cat(frames)
        except Exception as error:          # whatever the decoder says of a broken file
            if out_of_memory(error):
                raise
            tqdm.write(f"skipped {path.name}: it cannot be decoded")
            skipped += 1
            continue
        if prompt_of(path.stem) == path.stem:
            tqdm.write(f"{path.name}: not named PROMPT-INDEX, its name is taken as the prompt")
        rows[path.name] = vbench(video.to(device) / 255, meta["fps"], raft)
    if not rows:
        raise ValueError(f"{args.paths[0]}: no video to measure ({skipped} cannot be read, "
                         f"{missing} prompts have none)")
    size = f"resized to {args.size} px" if args.size else "in their own sizes"
    prompts = by_prompt(((Path(name).stem, row) for name, row in rows.items()), mean_row)
    return {"about": f"n = {len(rows)} videos of {len(prompts)} prompts, {size}, {skipped} "
                     f"skipped, {missing} prompts without a video. Means of prompts, whose videos "
                     "are averaged first; 95% intervals by bootstrap over prompts. By VBench's "
                     "formulas; RAFT is ours, and interpolates in place of AMT.",
            "tables": [table_of({args.paths[0]: prompts}, VBENCH)],
            "videos": rows}


def generate(args):
    """A folder of samples for a prompt file, named as VBench wants them."""
    prompts, out = list(dict.fromkeys(read_lines(args.paths[0]))), Path(args.paths[1])
    if len({file_stem(prompt) for prompt in prompts}) < len(prompts):
        raise ValueError(f"{args.paths[0]}: two prompts would have the same file name, which has "
                         "a prompt's first 180 bytes, without slashes")
    bundle = VideoJAM.load(weights_of(args), args.which, device_of(args.device))
    out.mkdir(parents=True, exist_ok=True)
    say_cut(prompts, bundle.config.dit.max_bytes)
    many = [prompt for prompt in prompts for _ in range(args.seeds)]
    for start in tqdm(range(0, len(many), 16), desc="generate"):     # written as they come
        some = many[start:start + 16]
        video, _ = bundle.generate(some, args.steps, args.w1, args.w2, seed=start)
        for i, (prompt, clip) in enumerate(zip(some, video), start):
            write_video(out / f"{file_stem(prompt)}-{i % args.seeds}.mp4", clip, bundle.config.fps)
    print(f"{out}: {len(many)} videos")


# ---------------------------------------------------------------- python bench.py speed

def times_by_turns(functions, device, repeats, warm):
    """Seconds (repeats, functions) that each takes, one after the other in each turn: what else the
    machine does meets them alike. Turns that warm up are left out; three are enough where more
    would take over a minute."""
    times = []
    for _ in tqdm(range(warm + repeats), "by turns"):
        if len(times) >= warm + 3 and np.sum(times[warm:]) > 60:
            break
        times.append([])
        for function in functions:
            start = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times[-1].append(time.perf_counter() - start)
    return np.array(times[warm:])


def speed(args):
    """Each part's time and FLOPs at a preset's or a run's size, with random weights, and what share
    it reaches of the rate of a matrix product that is measured in the same run and precision (bf16
    where the device is fast at it). FLOPs are the model's own: not the optimizers', nor what is
    recomputed."""
    device, B = device_of(args.device), args.batch
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    preset = preset_of(args.preset) if args.preset else VideoJAM.load(weights_of(args)).config
    shape, y = preset.latent_shape(), tokenize(["a red square moves left slowly"] * B)
    side = 4096 if device.type == "cpu" else 8192
    square = torch.randn(side, side, dtype=fast_dtype(device), device=device)
    product = f"matrix product, {str(square.dtype)[6:]}"

    def training(dit, data, place=device):
        optimizing = optimizers(dit, 0.)

        def gradients():
            dit.zero_grad()
            with autocast(device):
                loss = squared_errors(dit, *(part.to(place) for part in data)).mean()
            loss.backward()

        def step():
            gradients()
            for optimizer in optimizing:
                optimizer.step()
        return step, gradients

    def sampling(dit, mode):
        x, text, times = torch.randn(B, *shape, device=device), y.to(device), linear_quadratic(4)
        return autocast(device)(
            lambda: euler_sample(dit, x, x, text, times.to(device), mode=mode))

    with torch.device(device):
        torch.manual_seed(0)
        tae, dits = TAE(preset.tae), {
            which: DiT(dataclasses.replace(preset.dit, motion=which == "jam"))
            for which in ("base", "jam")}
    # name -> a function, how often it does that, the FLOPs of all
    tasks = {product: (lambda: square @ square, 1, 2 * side ** 3)}
    for which, dit in dits.items():
        for weight in dit.parameters():
            nn.init.normal_(weight, std=.02)        # (much of it is zero at first: faster to sum)
        set_recompute(dit, recomputes(preset))
        z1 = torch.randn(B, shape[0] * (1 + dit.config.motion), *shape[1:])
        data = corrupted(z1, y, shape[0])
        step, gradients = training(dit, data)
        with torch.device("meta"):
            flops = flops_of(training(DiT(dit.config), data, "meta")[1])
        name = f"training step of {B} clips, {which}"
        # (in this order, so that either model's step follows its own: what has just run matters)
        tasks |= {f"{name}, without the optimizers": (gradients, 1, flops), name: (step, 1, flops)}
    clips = max(1, min(8, 2 ** 19 // (preset.frames * preset.size ** 2)))       # 8 of the toy's

    def render():
        return sprite_clips(range(clips), preset.frames, preset.size)[0]

    video, raft = render().to(device), RAFT.load().to(device)
    parts = {"TAE, encode a clip": (autocast(device)(lambda: tae.encode(video)), clips),
             "RAFT, a pair of frames": (lambda: estimate_flow(raft, video[:1]), preset.frames - 1)}
    parts |= {f"sampling, {mode}, a step of {B} clips": (sampling(dits["jam"], mode), 4)
              for mode in ("none", "cfg", "inner")}
    parts["a sprite clip, rendered"] = render, clips
    for name, (function, count) in parts.items():
        function = torch.no_grad()(function)
        tasks[name] = function, count, flops_of(function)
    if can_compile(device):
        for dit in dits.values():
            dit.compile_blocks()
    turns = times_by_turns([function for function, _, _ in tasks.values()], device, 7, 2)
    seconds = dict(zip(tasks, turns.T))                             # a number for each turn
    medians = {name: float(np.median(times)) for name, times in seconds.items()}
    peak = 2 * side ** 3 / medians[product]
    result = {name: {"ms": 1e3 * medians[name] / count, "GFLOP": flops / count / 1e9,
                     "share": flops / medians[name] / peak}
              for name, (_, count, flops) in tasks.items()}

    def ratio(one, other):          # within a turn: what else the machine does meets both alike
        return float(np.median(seconds[one] / seconds[other]))

    trained, each = f"training step of {B} clips, ", f", a step of {B} clips"
    ratios = {"training step, jam / base": ratio(trained + "jam", trained + "base"),
              "sampling, inner / cfg": ratio("sampling, inner" + each, "sampling, cfg" + each),
              f"{product}, GFLOP/s": peak / 1e9,
              "threads": torch.get_num_threads()}
    if device.type == "cuda":
        ratios["peak memory, both models in it, GB"] = \
            torch.cuda.max_memory_allocated(device) / 1e9
    print(markdown((["", "ms", "GFLOP", "of the matrix product's rate"],
                    [[name, f"{r['ms']:.3g}", f"{r['GFLOP']:.3g}", f"{100 * r['share']:.0f} %"]
                     for name, r in result.items()])), "\n")
    print(markdown((["", ""], [[name, f"{value:.3g}"] for name, value in ratios.items()])), "\n")
    print(json.dumps({**result, **ratios}))


# ---------------------------------------------------------------- human evaluation (2AFC)

QUESTIONS = {"text": "Which video fits the text better?",
             "quality": "Which video looks better?",
             "motion": "In which video is the motion more coherent?"}
RATING_PAGE = """<!doctype html><meta charset="utf-8"><title>Which is better?</title>
<style>body{font:18px sans-serif;text-align:center;margin:2em}video{width:40vw;max-width:512px;
image-rendering:pixelated;margin:.5em}button{font-size:1em;padding:.5em 2em;margin:.5em}</style>
<p id="progress"></p><h2 id="prompt"></h2>
<div><video id="left" autoplay loop muted playsinline></video>
<video id="right" autoplay loop muted playsinline></video></div><h3 id="question"></h3>
<button id="1">left (1 or &larr;)</button><button id="2">right (2 or &rarr;)</button>
<p><button id="save">save the votes</button> <button id="undo">undo (u)</button>
<button id="new">another rater</button></p>
<script>
const data = DATA, keys = Object.keys(data.questions), $ = id => document.getElementById(id);
const shuffled = a => { for (let i = a.length - 1; i > 0; i--) {
  const j = Math.floor(Math.random() * (i + 1)); [a[i], a[j]] = [a[j], a[i]]; } return a; };
const memory = "videojam " + JSON.stringify(
  [data.a, data.b, data.pairs.map(p => [p.name, p.a.length, p.b.length])]);
let state = null;
try { state = JSON.parse(localStorage.getItem(memory)); } catch (error) {}
state ||= {rater: Math.random().toString(36).slice(2), votes: [],
           order: shuffled(data.pairs.map((_, i) => [i, Math.random() < .5]))};
const {rater, votes} = state, trials = state.order.map(([i, swap]) => ({...data.pairs[i], swap}));
function show() {
  try { localStorage.setItem(memory, JSON.stringify(state)); } catch (error) {}
  const i = Math.floor(votes.length / keys.length), t = trials[i], over = !t;
  $("progress").textContent = `pair ${Math.min(i + 1, trials.length)} of ${trials.length}`;
  $("1").disabled = $("2").disabled = over;
  if (over) { $("question").textContent = "Done: save the votes."; return; }
  $("prompt").textContent = t.prompt;
  $("question").textContent = data.questions[keys[votes.length % keys.length]];
  for (const [id, source] of [["left", t.swap ? t.b : t.a], ["right", t.swap ? t.a : t.b]])
    if ($(id).src !== source) $(id).src = source;
}
function vote(side) {
  const t = trials[Math.floor(votes.length / keys.length)];
  if (t) votes.push({pair: t.name, question: keys[votes.length % keys.length],
                     choice: (side === 1) !== t.swap ? "a" : "b"});
  show();
}
function save() {
  const content = {kind: "videojam votes", a: data.a, b: data.b, rater, votes};
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(content)], {type: "application/json"}));
  link.download = `votes-${rater}.json`; link.click();
}
$("1").onclick = () => vote(1); $("2").onclick = () => vote(2); $("save").onclick = save;
$("undo").onclick = () => { votes.pop(); show(); };
$("new").onclick = () => { if (confirm("Are these votes saved? They go away.")) {
  localStorage.removeItem(memory); location.reload(); } };
document.onkeydown = e => {
  const side = {1: 1, ArrowLeft: 1, 2: 2, ArrowRight: 2}[e.key];
  if (e.repeat) return;
  if (side) vote(side); else if (e.key === "u") $("undo").click(); };
show();
</script>"""


def data_url(path):
    content = base64.b64encode(path.read_bytes()).decode()
    return f"data:video/{path.suffix[1:].lower()};base64,{content}"


def rate(args):
    """One page that asks which of two videos is better: pairs in random order, sides hidden. With
    a prompt file, whole prompts are shown where the files' names have only their beginning."""
    a, b = ({path.stem: path for path in videos_of(folder, (".mp4", ".webm"))}    # (browsers' own)
            for folder in args.paths[:2])
    prompts = {file_stem(prompt): prompt for file in args.paths[2:] for prompt in read_lines(file)}
    names = sorted(a.keys() & b.keys())
    if not names:
        raise ValueError(f"{args.paths[0]} and {args.paths[1]}: no video has the same name in both")
    pairs = [{"name": name, "prompt": prompts.get(prompt_of(name), prompt_of(name)),
              "a": data_url(a[name]), "b": data_url(b[name])} for name in names]
    data = json.dumps({"a": args.paths[0], "b": args.paths[1], "questions": QUESTIONS,
                       "pairs": pairs}).replace("<", "\\u003c")
    args.out.mkdir(parents=True, exist_ok=True)
    page = args.out / "rate.html"
    write_text(page, RATING_PAGE.replace("DATA", data, 1))
    print(f"{page}: {len(names)} pairs, {len(a) + len(b) - 2 * len(names)} videos without a pair; "
          "open it, vote, save, then python bench.py votes votes-*.json")


def votes(args):
    """The paper's table: votes for A, as the mean over prompts of their share, and how far raters
    agree. (The paper has 5 raters a pair, 640 votes a baseline at least.)"""
    ballots, sides = {}, set()
    for path in args.paths:
        try:
            content = json.loads(Path(path).read_text())
            if content["kind"] != "videojam votes":
                raise ValueError("another kind of file")
            sides.add((content["a"], content["b"]))
            for v in content["votes"]:
                ballots.setdefault((v["question"], str(v["pair"])), {})[content["rater"]] = \
                    {"a": 1, "b": 0}[v["choice"]]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}: not a votes file of bench.py rate") from None
    if len(sides) != 1 or not ballots:
        raise ValueError("votes takes one or more files of votes on the same two folders")
    table = []
    for question in QUESTIONS:
        cast = {pair: v for (asked, pair), v in ballots.items() if asked == question}
        if cast:
            shares = by_prompt((pair, np.mean([*v.values()])) for pair, v in cast.items())
            agree = by_prompt((pair, np.mean([i == j for i, j in
                                              itertools.combinations(v.values(), 2)]))
                              for pair, v in cast.items() if len(v) > 1)
            table.append([question, str(len(set().union(*cast.values()))),
                          str(sum(map(len, cast.values()))),
                          *(cell(part, 100, share=True) for part in (shares, agree))])
    (a, b), = sides
    return {"about": f"A = {a}, B = {b}; means of prompts, 95% intervals over them.",
            "tables": [(["", "raters", "votes", "for A %", "two raters agree %"], table)]}


# ---------------------------------------------------------------- the report

def svg(xlabel, curves, width=640, height=320):
    """Lines with their bands: {name: (x, [(mean, low, high)])} -> an inline SVG."""
    colours = dict(zip(curves, ("#1f77b4", "#ff7f0e", "#2ca02c", "#9467bd")))
    xs = [x for x, _ in curves.values() for x in x]
    ys = [v for _, ys in curves.values() for y in ys for v in y]
    x0, x1, y0, y1 = min(xs), max(xs), min(0, *ys), max(ys)

    def at(x, y):
        return (f"{50 + (x - x0) / (x1 - x0 or 1) * (width - 60):.1f},"
                f"{height - 40 - (y - y0) / (y1 - y0 or 1) * (height - 60):.1f}")

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
             f'width="{width}" font-size="12" font-family="sans-serif">']
    for row, (name, (x, y)) in enumerate(curves.items()):
        band = [at(a, high) for a, (_, _, high) in zip(x, y)]
        band += [at(a, low) for a, (_, low, _) in zip(x, y)][::-1]
        line = [at(a, mean) for a, (mean, _, _) in zip(x, y)]
        parts += [f'<polygon points="{" ".join(band)}" fill="{colours[name]}" opacity=".2"/>',
                  f'<polyline points="{" ".join(line)}" fill="none" stroke="{colours[name]}"/>',
                  f'<text x="60" y="{20 + 15 * row}" fill="{colours[name]}">{name}</text>']
    for value in (y0, y1):
        parts.append(f'<text x="2" y="{at(x0, value).split(",")[1]}">{100 * value:.0f}%</text>')
    for value in (x0, x1):
        parts.append(f'<text x="{at(value, y0).split(",")[0]}" y="{height - 22}" '
                     f'text-anchor="middle">{value:.3g}</text>')
    return "".join(parts) + f'<text x="{width / 2}" y="{height - 6}">{xlabel}</text></svg>'


def markdown(table):
    header, rows = table
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def report(out, sections, fps):
    """results.json, report.md, report.html (self-contained) and its curves as .svg, of {name:
    section}."""
    out.mkdir(parents=True, exist_ok=True)
    text, page = ["# VideoJAM: experiments"], ["<!doctype html><meta charset=utf-8><style>"
        "body{font:15px sans-serif;margin:2em}td,th{padding:.2em .8em;border-bottom:1px solid #ccc}"
        "video{margin:.2em;image-rendering:pixelated}</style><h1>VideoJAM: experiments</h1>"]
    for name, section in sections.items():
        last = len(text)
        text += [f"## {name}", f"`{section['command']}`", section["about"]]
        page += [f"<h2>{name}</h2><code>{html.escape(section['command'])}</code>"
                 f"<p>{html.escape(section['about'])}"]
        for header, rows in section["tables"]:
            text.append(markdown((header, rows)))
            page.append("<table>" + "".join(
                "<tr>" + "".join(f"<td>{html.escape(str(c))}" for c in row)
                for row in [header, *rows]) + "</table><br>")
        for i, (label, curves) in enumerate(section.get("curves", ())):
            page.append(svg(label, curves))
            write_text(out / f"{name}-{i}.svg", page[-1])
        for title, clips in section.get("shown", ()):
            path = out / f".{os.getpid()}.mp4"
            write_video(path, grid(clips), fps, scale=2)
            page.append(f'<p>{html.escape(title)}<br><video autoplay loop muted src="'
                        f'{data_url(path)}"></video>')
            path.unlink()
    data = {name: {k: v for k, v in section.items() if k != "shown"}
            for name, section in sections.items()}
    for name, content in (("report.md", "\n\n".join(text) + "\n"), ("report.html", "\n".join(page)),
                          ("results.json", json.dumps(data, default=list))):
        write_text(out / name, content)
    print("\n\n".join(text[last:]) + f"\n\n{out}/report.html\n")


# ---------------------------------------------------------------- command line

EXPERIMENTS = {"motivation": motivation, "compare": compare, "ablation": ablation, "sdedit": sdedit}
PATHS = {"metrics": (1, 2, "a folder of videos, and a prompt file if you like"),
         "generate": (2, 2, "a prompt file and a folder"),
         "rate": (2, 3, "two folders of videos with the same names, and a prompt file if you like"),
         "votes": (1, math.inf, "one or more files of votes on the same two folders")}
BY_ITSELF = {"metrics": metrics, "generate": generate, "rate": rate, "votes": votes, "speed": speed}


def main():
    parser = Parser(description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", nargs="?", help="default: all, and speed",
                        choices=[*EXPERIMENTS, *BY_ITSELF])
    parser.add_argument("paths", nargs="*", help="of metrics, generate, rate and votes")
    parser.add_argument("--run", help="folder of a training run; default: the shipped weights")
    parser.add_argument("--also", nargs="*", type=Path, help="other runs, a row each in the "
                        "ablation")
    parser.add_argument("--n", type=int, help="prompts (default: 50, 16 with --quick)")
    parser.add_argument("--which", choices=("jam", "base", "control"), default="jam",
                        help="the model that `generate` samples")
    parser.add_argument("--seeds", type=int, default=1, help="samples of each prompt "
                        "(compare, ablation, generate), of which a prompt's numbers are the means")
    parser.add_argument("--steps", type=int, help="of the sampler (default: 100, 25 with "
                        "--quick; sdedit's and motivation's are those of 100)")
    parser.add_argument("--w1", type=float, default=5., help="text guidance (%(default)g)")
    parser.add_argument("--w2", type=float, default=3., help="motion guidance (%(default)g)")
    parser.add_argument("--quick", action="store_true", help="16 prompts, 25 steps, RAFT for 4 "
                        "of them: a look")
    parser.add_argument("--size", type=int, help="metrics: resize videos to a square of this many "
                        "pixels a side first (the paper: 256)")
    parser.add_argument("--preset", help="size of the models of `speed`: one of "
                        f"{', '.join(PRESETS)}; default: the run's")
    parser.add_argument("--batch", type=int, default=64, help="clips in a step of `speed`")
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument("--out", type=Path, help="folder; default: runs/bench, or in it")
    args = parser.parse_intermixed_args()
    args.n = args.n if args.n is not None else 16 if args.quick else 50
    args.steps = args.steps if args.steps is not None else 25 if args.quick else 100
    args.few = 4 if args.quick else 24      # clips that RAFT, which is slow, looks at
    if args.preset is not None:
        preset_of(args.preset)                  # or to have worked for nothing; so below
    for name in ("n", "steps", "seeds", "size", "batch"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name} must be positive, got {getattr(args, name)}")
    linear_quadratic(args.steps)                # ValueError where there are more than it can take
    least, most, what = PATHS.get(args.experiment, (0, 0, "no paths: a run is named by --run"))
    if not least <= len(args.paths) <= most:
        raise ValueError(f"{args.experiment} takes {what}")
    args.out = args.out or Path("runs/bench") / (args.experiment or "")
    command = "python bench.py " + shlex.join(sys.argv[1:])
    if args.experiment in BY_ITSELF:
        section = BY_ITSELF[args.experiment](args)
        if section:
            report(args.out, {args.experiment: {**section, "command": command}}, 8)
    else:
        args.out.mkdir(parents=True, exist_ok=True)
        world, sections = World(args), {}
        for name in [args.experiment] if args.experiment else EXPERIMENTS:
            sections[name] = {**EXPERIMENTS[name](world), "command": command}
            report(args.out, sections, world.config.fps)
        if not args.experiment:
            speed(args)


if __name__ == "__main__":
    report_errors(main)

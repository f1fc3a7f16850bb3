"""What is measured of a video: tracking and fitting of sprites, VBench's formulas, statistics.

A sprite is tracked by its chroma, from which the background's is subtracted; its shape is the
nearest template's; the motion that the prompt names is fitted to its path, by the scene's physics.
"""
import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F

from flow import estimate_flow, stream_flow
from synthetic import (COLOURS, DIRECTIONS, HELD_OUT, LOWEST_DROP, RADII, RANGES, SHAPES, TRAVEL,
                       TURNS, bouncing, cover_of, sprite_clips, sprite_scene, two_teeth)

# ---------------------------------------------------------------- tracking a sprite

PERIOD = {"circle": 0, "square": math.pi / 2, "triangle": 2 * math.pi / 3, "cross": math.pi / 2,
          "star": 2 * math.pi / 5}                      # the smallest turn that changes nothing

def track(video, colour, shape):
    """Follows a sprite by its colour through (T, 3, S, S) on a background of one chroma: in_frame
    (T,) bool, that colour is seen, of a sprite's size, and no other; the likeliest shape; the path
    (T, 3): x, y in px, angle of the named shape; alpha (T, S, S) in [0, 1]: where it is."""
    S = video.shape[-1]
    chroma = video - video.mean(1, keepdim=True)
    background = chroma.transpose(0, 1).flatten(1).median(1).values
    towards = torch.tensor(COLOURS[colour]) - sum(COLOURS[colour]) / 3 - background
    offset = chroma - background[:, None, None]
    amount = torch.einsum("tchw,c->thw", offset, towards) / towards.square().sum()
    residual = (offset - amount[:, None] * towards[:, None, None]).norm(dim=1)
    alpha = amount.clamp(0, 1) * ((amount > .2) & (residual < .15))
    area = alpha.sum((1, 2))
    other = ((offset.norm(dim=1) > .2) & (residual > .2)).sum((1, 2))
    in_frame = (area > .01 * S * S) & (area < .15 * S * S) & (other < .006 * S * S)
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

    errors = {name: nearest(name, slice(None, None, 4), 12)[0].sum().item() for name in SHAPES}
    angle = nearest(shape, slice(None), 24)[1].double().numpy()
    if PERIOD[shape]:                                   # the shortest way from frame to frame
        angle = np.unwrap(angle, period=PERIOD[shape])
    path = np.stack([x.double().numpy(), y.double().numpy(), angle], 1)
    return in_frame, min(errors, key=errors.get), path, alpha

def count_regions(mask, least):
    """How many connected regions of at least `least` pixels each of the masks (T, S, S) has."""
    T, S, _ = mask.shape
    label = torch.arange(1., S * S + 1).view(1, S, S) * mask
    while not torch.equal(spread := F.max_pool2d(label, 3, 1, 1) * mask, label):
        label = spread                                  # the largest spreads over its region
    sizes = torch.zeros(T, S * S + 1)
    sizes.scatter_add_(1, label.flatten(1).long(), mask.float().flatten(1))
    return (sizes[:, 1:] >= least).sum(1)

# ---------------------------------------------------------------- fitting the named motion

def least_squares(bases, target):
    """The best of some bases (n, P) for a target (n,): RMS error, coefficients (P,), index."""
    basis = np.stack(bases)                                             # (K, n, P)
    coefficients = np.linalg.pinv(basis) @ target                       # (K, P)
    rms = np.sqrt(np.mean((np.einsum("knp,kp->kn", basis, coefficients) - target) ** 2, 1))
    best = int(rms.argmin())
    return rms[best], coefficients[best], best

def in_range(value, low, high, slack=.3):
    return low * (1 - slack) <= value <= high * (1 + slack)

def fit_motion(kind, phrase, path, size, radius=.145):
    """Fits the family of a named motion to a path (T, 3): the RMS error in px of a coordinate (of a
    spin with the angle's, at the sprite's edge); whether the path is as named: an error below 2.5%
    of the width, the right direction, widths and a spin's turns within 30% of the training range, a
    swing's cycles within 15% (its angle and an orbit's turns: as wide as the search). ValueError: a
    motion of two sprites."""
    T, words = len(path), phrase.split()
    tau, one, zero = np.linspace(0, 1, T), np.ones(T), np.zeros(T)
    both = path[:, :2].T.flatten() / size                               # x of all frames, then y

    def planar(*columns):
        """A basis for x and y together: an offset of each, and columns given as (for x, for y)."""
        pairs = [(one, zero), (zero, one), *columns]
        return np.stack([np.concatenate(pair) for pair in pairs], -1)

    speed = words[-1] if words[-1] in TRAVEL else ""
    word, limits = words[-2] if speed else words[-1], RANGES.get(kind)
    sign = -1 if word in ("left", "counterclockwise") else 1
    if kind == "move":
        rms, c, _ = least_squares([planar((tau, zero), (zero, tau))], both)
        along = c[2] * DIRECTIONS[word][0] + c[3] * DIRECTIONS[word][1]
        across = abs(c[2] * DIRECTIONS[word][1]) + abs(c[3] * DIRECTIONS[word][0])
        good = in_range(along, *TRAVEL[speed]) and across < .3 * along
    elif kind == "zigzag":
        rms, c, _ = least_squares([planar((tau, zero), (zero, two_teeth(tau)))], both)
        good = in_range(sign * c[2], *limits["travel"]) and in_range(c[3], *limits["height"])
    elif kind == "swing":
        family = [(a, n, p) for a in np.linspace(.5, 1, 11) for n in np.linspace(.6, 1.4, 33)
                  for p in (0, np.pi)]
        theta = [a * np.cos(2 * np.pi * n * tau + p) for a, n, p in family]
        rms, c, best = least_squares([planar((np.sin(t), np.cos(t))) for t in theta], both)
        good = in_range(c[2], *limits["length"]) and \
            in_range(family[best][1], *limits["cycles"], slack=.15)
    elif kind == "orbit":
        theta = [2 * np.pi * n * tau for n in np.linspace(.6, 1.4, 33) * sign]
        rms, c, _ = least_squares([planar((np.cos(t), np.sin(t)), (-np.sin(t), np.cos(t)))
                                   for t in theta], both)
        good = in_range(np.hypot(c[2], c[3]), *limits["radius"])
    elif kind == "spin":
        rms, _, _ = least_squares([planar()], both)
        off, c, _ = least_squares([np.stack([one, tau], -1)], path[:, 2])
        rms = np.hypot(rms, off * radius)               # an angle's error, at the sprite's edge
        good = in_range(sign * c[1] / (2 * np.pi), *TURNS[speed])
    elif kind == "fall":
        family = [(f, e) for f in np.linspace(.25, .5, 26) for e in np.linspace(.5, .9, 9)]
        rms, c, _ = least_squares([planar((zero, bouncing(tau, 0, 1, f, e)))
                                      for f, e in family], both)
        good = in_range(c[2], 1 - LOWEST_DROP - RADII[1], 1 - 2 * RADII[0])
    else:
        raise ValueError(f"{kind}: not the motion of one sprite")
    return rms * size, bool(good and rms < .025)

# ---------------------------------------------------------------- scores of sprite clips

def held_out_clips(n, frames, size, start=HELD_OUT + 10_000, **options):
    """n held-out clips of one sprite, from a seed on: `sprite_clips` with its options."""
    alone = (seed for seed in itertools.count(start)
             if len(sprite_scene(seed, frames, 0)["sprites"]) == 1)
    return sprite_clips(list(itertools.islice(alone, n)), frames, size, clutter=0, **options)

def score_clips(video, scenes):
    """Scores of clips (N, T, 3, S, S) against the scenes of one sprite that they should show:
    detected (`track` sees the sprite in all frames, no other colour); single (one connected region
    throughout); shape (the nearest template is the named one's); motion_ok (detected, and moving as
    named); single_motion_ok (both: two sprites may move as named together); error (`fit_motion`'s,
    or None). A dict each. The clips may be k samples of all scenes, one after the other."""
    rows = []
    for clip, scene in zip(video, itertools.cycle(scenes)):
        sprite, S = scene["sprites"][0], clip.shape[-1]
        in_frame, shape, path, alpha = track(clip, sprite["colour"], sprite["shape"])
        error, as_named = fit_motion(sprite["kind"], sprite["phrase"], path, S)
        detected = bool(in_frame.all())
        single = bool((count_regions(alpha > .5, .003 * S * S) == 1).all())
        motion_ok = as_named and detected
        rows.append({
            "kind": sprite["kind"], "held_out": scene["held_out"], "detected": detected,
            "single": single, "shape": shape == sprite["shape"], "motion_ok": motion_ok,
            "single_motion_ok": motion_ok and single, "error": error if detected else None})
    return rows

def static_share(video):
    """The share of the variance of pixels (N, T, 3, H, W) that their means over time have."""
    return (video.mean(1).var(correction=0) / video.var(correction=0)).item()

def present(rows, key):
    """A score of those rows that have it."""
    return [row[key] for row in rows if row[key] is not None]

def mean_row(rows):
    """The mean of each score over rows of one prompt, of those that have it."""
    merged = {key: present(rows, key) for key in rows[0]}
    return {key: None if not values else
            values[0] if key in ("kind", "held_out") else float(np.mean(values))
            for key, values in merged.items()}

def by_prompt(rows, n):
    """Rows of n prompts, then of another sample of each, and so on -> the n means."""
    return [mean_row(rows[i::n]) for i in range(n)]

# ---------------------------------------------------------------- statistics: every number's n

def interval(values, statistic=np.mean, share=False):
    """[value, low, high], 95% over rows, by bootstrap; for a share of 0s and 1s Wilson's."""
    values, rng = np.asarray(values, float), np.random.default_rng(0)
    if share and np.isin(values, (0, 1)).all():
        n, p, z = len(values), values.mean(), 1.959964
        middle, reach = p + z ** 2 / (2 * n), z * np.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2)
        ends = np.clip([middle - reach, middle + reach], 0, 1 + z ** 2 / n) / (1 + z ** 2 / n)
        return [float(p), *ends.tolist()]
    draws = statistic(values[rng.integers(len(values), size=(2000, len(values)))], axis=1)
    return [float(statistic(values)), *map(float, np.percentile(draws, [2.5, 97.5]))]

def paired(differences):
    """Mean of paired differences, 95% bootstrap interval, p of a sign-flip permutation test."""
    differences, rng = np.asarray(differences, float), np.random.default_rng(0)
    flipped = (rng.choice([-1, 1], (5000, len(differences))) * differences).mean(1)
    p = (1 + (np.abs(flipped) >= abs(differences.mean()) - 1e-12).sum()) / 5001
    return [*interval(differences), float(p)]

def cell(values, scale=1, statistic=np.mean, share=False):
    """A table's cell, value [low, high], over the clips that have one; and n, if not all do."""
    have = [value for value in values if value is not None]
    if not have:
        return "-"
    digits = 1 if scale == 100 else 2
    value, low, high = (f"{scale * v:.{digits}f}" for v in interval(have, statistic, share))
    return f"{value} [{low}, {high}]" + f", n = {len(have)}" * (len(have) < len(values))

# ---------------------------------------------------------------- metrics of any video (VBench's)

def warp(image, flow):
    """image (B, 3, H, W) sampled at x + flow(x), flow (B, 2, H, W) in px."""
    B, _, H, W = image.shape
    y, x = torch.meshgrid(torch.arange(H).to(flow), torch.arange(W).to(flow), indexing="ij")
    at = torch.stack([x, y]) + flow
    at = at.permute(0, 2, 3, 1) * 2 / torch.tensor([W - 1, H - 1]).to(flow) - 1
    return F.grid_sample(image, at, padding_mode="border", align_corners=True)

def vbench(video, fps, raft):
    """VBench's motion metrics, by its formulas; video() gives the frames, (3, H, W) in [0, 1].
    dynamic: dynamic_degree, by RAFT-small; flicker: temporal_flickering; smooth: motion_smoothness,
    with RAFT's flow in AMT's place, so only its order compares. None: the video is too short."""
    def every(n, start=0):
        return itertools.islice(video(), start, None, n)

    def is_fast(frame, flow):
        size = flow.norm(dim=0).flatten()
        top = size.topk(max(1, int(.05 * len(size)))).values.mean()
        return (top > 6 * min(frame.shape[1:]) / 256).item()

    def smoothness(first, second, ahead, odd):  # halfway between two even frames, from both sides
        back = estimate_flow(raft, torch.stack([second, first])[None])[0, 0]
        middle = (warp(first[None], -ahead[None] / 2) + warp(second[None], -back[None] / 2)) / 2
        return 1 - (odd - middle[0]).abs().mean().item()

    flicker = [1 - (b - a).abs().mean().item() for a, b in itertools.pairwise(video())]
    fast = [is_fast(a, flow) for a, _, flow in stream_flow(raft, every(max(1, round(fps / 8))))]
    smooth = [smoothness(*three, odd) for three, odd in zip(stream_flow(raft, every(2)),
                                                            every(2, 1))]
    return {"dynamic": sum(fast) >= round(4 * (len(fast) + 1) / 16) if fast else None,
            "flicker": np.mean(flicker) if flicker else None,
            "smooth": np.mean(smooth) if smooth else None}

VBENCH = {"dynamic": "dynamic degree %", "flicker": "temporal flickering %",
          "smooth": "motion smoothness %"}

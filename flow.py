"""Motion: optical flow as an RGB video (Eq. 5), a sprite world whose flow is exact, and RAFT.

    python flow.py --train          train RAFT from nothing on scenes with exact flow

Flow is (..., 2, H, W) in pixels per frame, x (right) then y (down). Flow k goes from frame k to
frame k + 1; the last one is repeated, so that flow and video have the same length.
"""
import argparse
import math
import os
import sys
from collections import OrderedDict
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent

# ---------------------------------------------------------------- files and errors, for all scripts

def report_errors(main):
    """Runs a script's main. Bad input, a ValueError, ends as one line on stderr and exit code 2,
    Ctrl-C as one line and a shell's usual 130."""
    script = Path(sys.argv[0]).name
    try:
        main()
    except ValueError as error:
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
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        save(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def read_file(path, kind):
    """torch.load of data alone (no code runs); whatever is wrong with the file becomes one line."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except Exception:
        raise ValueError(f"{path}: not a {kind} file, or damaged") from None
    if not isinstance(content, dict) or content.get("kind") != kind:
        raise ValueError(f"{path}: not a {kind} file")
    return content


# ---------------------------------------------------------------- Sec. 4.2: flow as RGB (Eq. 5)

def flow_to_rgb(flow, sigma=0.15):
    """Eq. 5. flow (..., 2, H, W) in px -> rgb (..., 3, H, W) in [0, 1].

    Hue is the angle alpha, saturation the magnitude m = min(1, |flow| / (sigma sqrt(H^2 + W^2))),
    value is 1: still is white, and the map is invertible below saturation (m < 1)."""
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
# the clip, so one seed is the same scene at every size and length. Angles are clockwise on screen.

HELD_OUT = 1_000_000_000            # seeds below are for training, from here on for evaluation
COLOURS = {"red": (.90, .12, .12), "green": (.10, .62, .18), "blue": (.12, .25, .90),
           "yellow": (.95, .80, .05), "purple": (.58, .15, .72), "cyan": (.05, .75, .82)}
SHAPES = ("circle", "square", "triangle", "cross", "star")
# kind -> (the paper's category, phrases, how often)
MOTIONS = {
    "move": ("basic", ("moves left", "moves right", "moves up", "moves down"), 8),
    "zigzag": ("complex", ("zigzags left", "zigzags right"), 2),
    "swing": ("complex", ("swings from side to side",), 2),
    "orbit": ("complex", ("orbits clockwise", "orbits counterclockwise"), 2),
    "spin": ("rotational", ("spins clockwise", "spins counterclockwise"), 3),
    "fall": ("physics", ("falls and bounces",), 2),
    "collide": ("physics", ("collide",), 2),
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
    paths = []
    for i in range(2):
        x = contact[i] + np.where(tau < when, v[i], after[i]) * (tau - when)
        paths.append(np.stack([x, np.full_like(tau, y), np.zeros_like(tau)], -1))
    return paths, {"when": when, "before": v, "after": after}


def sprite_scene(seed, frames, rich):
    """What happens in the clip of a seed: background, sprites from front to back, caption."""
    rng = np.random.default_rng(seed)
    tau = np.linspace(0, 1, frames) if frames > 1 else np.zeros(1)
    textured, several = rng.random(2) < rich
    kinds = [kind for kind in MOTIONS if not (several and kind == "collide")]
    odds = np.array([MOTIONS[kind][2] for kind in kinds], float)
    count = int(rng.integers(2, 4)) if several else 1
    motions = list(rng.choice(kinds, count, p=odds / odds.sum()))
    if motions == ["collide"]:
        motions = ["collide"] * 2
    sprites = []
    for motion, colour in zip(motions, rng.permutation(list(COLOURS))):
        # a disc's spin is invisible; training never sees the held-out combinations
        shape = rng.choice([name for name in SHAPES if not (name == "circle" and motion == "spin")
                            and (seed >= HELD_OUT or not is_held_out(name, colour, motion))])
        phrase = rng.choice(MOTIONS[motion][1])
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
    """Distance in px from points to the outline of a shape of radius r; negative inside."""
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


def render_background(backgrounds, size):
    """(N, 3, H, W): a pale colour, on textured ones with a faint pattern in all channels."""
    colour = torch.tensor(np.stack([b["colour"] for b in backgrounds]), dtype=torch.float32)
    canvas = colour[:, :, None, None].repeat(1, 1, size, size)
    grid = (torch.arange(size) + .5) / size * 2 * math.pi
    y, x = torch.meshgrid(grid, grid, indexing="ij")
    for i, b in enumerate(backgrounds):
        if b["kind"] == "plain":
            continue
        (a, c), phase = 4 * b["wave"][0], b["phase"]
        if b["kind"] == "stripes":
            pattern = torch.tanh(3 * torch.sin(a * x + c * y + phase[0]))
        elif b["kind"] == "checks":
            pattern = torch.tanh(4 * torch.sin((2 + abs(a)) * x + phase[0])
                                 * torch.sin((2 + abs(a)) * y + phase[1]))
        else:
            pattern = sum(torch.sin(2 * w[0] * x + 2 * w[1] * y + p)
                          for w, p in zip(b["wave"], phase)) / 2
        canvas[i] -= .07 * (1 + pattern)
    return canvas.clamp(0, 1)


def sprite_clips(seeds, frames=16, size=64, rich=.5, orders=None):
    """Many clips of the sprite world at once, by exact geometry with anti-aliased outlines.

    seeds: ints, from HELD_OUT on for evaluation. rich in [0, 1]: the share of textured backgrounds
    and, apart from it, of scenes with two or three independent sprites (the first named in front).
    orders: a permutation of the frames for each clip; the flow is then that of the permuted clip.
    Returns video (N, T, 3, H, W) in [0, 1], flow (N, T, 2, H, W) in px, captions, scenes. A scene's
    sprites have `path` (T, 3): x, y of the centre in px and the angle in radians, and `physics`."""
    scenes = [sprite_scene(int(seed), frames, rich) for seed in seeds]
    N, T = len(scenes), frames
    window = 2 * math.ceil(.17 * 1.2 * size) + 2                        # holds the largest sprite
    background = render_background([s["background"] for s in scenes], size)
    # a canvas of pixels (r, g, b, u, v), padded on every side so that no sprite needs clipping
    pad = window // 2
    side = size + 2 * pad
    canvas = torch.zeros(N, T, side, side, 5)
    inner = canvas[:, :, pad:pad + size, pad:pad + size]
    inner[..., :3] = background.permute(0, 2, 3, 1).unsqueeze(1)
    pixels = canvas.view(-1, 5)
    for i, scene in enumerate(scenes):
        for sprite in scene["sprites"]:
            sprite["path"][:, :2] *= size
            sprite["radius"] *= size
            if orders is not None:
                sprite["path"] = sprite["path"][orders[i]]
    for depth in reversed(range(max(len(s["sprites"]) for s in scenes))):       # back to front
        for shape in SHAPES:
            chosen = [i for i, s in enumerate(scenes) if len(s["sprites"]) > depth
                      and s["sprites"][depth]["shape"] == shape]
            if not chosen:
                continue
            sprites = [scenes[i]["sprites"][depth] for i in chosen]
            path = torch.tensor(np.stack([s["path"] for s in sprites]), dtype=torch.float32)
            after = torch.cat([path[:, 1:], path[:, -1:]], 1)
            r = torch.tensor([s["radius"] for s in sprites])[:, None, None, None]
            corner = (path[..., :2] - window / 2).round().long()                # (n, T, 2)
            cols = corner[..., 0, None, None] + torch.arange(window)            # (n, T, 1, window)
            rows = corner[..., 1, None, None] + torch.arange(window)[:, None]   # (n, T, window, 1)
            cx, cy, angle = path[..., None, None].unbind(2)                     # (n, T, 1, 1)
            x, y = cols + .5 - cx, rows + .5 - cy                               # from the centre
            cos, sin = angle.cos(), angle.sin()
            distance = signed_distance(shape, cos * x + sin * y, cos * y - sin * x, r)
            cover = (.5 - distance).clamp(0, 1)                         # (n, T, window, window)
            # rigid motion: turn about the centre, then move with it
            step_x, step_y, turn = (after - path)[..., None, None].unbind(2)
            cos, sin = turn.cos(), turn.sin()
            moved = torch.stack([cos * x - sin * y - x + step_x,
                                 sin * x + cos * y - y + step_y], -1)
            frame = torch.tensor(chosen)[:, None] * T + torch.arange(T)         # (n, T)
            at = (frame[..., None, None] * side + rows + pad) * side + cols + pad
            under, cover = pixels[at], cover[..., None]
            paint = torch.tensor([COLOURS[s["colour"]] for s in sprites])[:, None, None, None]
            pixels[at] = torch.cat([torch.lerp(under[..., :3], paint, cover),
                                    torch.where(cover >= .5, moved, under[..., 3:])], -1)
    video, flow = inner.permute(0, 1, 4, 2, 3).split([3, 2], 2)
    flow = torch.cat([flow[:, :-1], flow[:, -2:][:, :1]], 1)    # (the last one is repeated)
    video = video.contiguous()
    return video, flow, [s["caption"] for s in scenes], scenes


def sprite_clip(seed, frames=16, size=64, rich=.5):
    """One clip: video (T, 3, H, W), flow (T, 2, H, W), caption, scene (see sprite_clips)."""
    video, flow, captions, scenes = sprite_clips([seed], frames, size, rich)
    return video[0], flow[0], captions[0], scenes[0]


# ---------------------------------------------------------------- RAFT: the small model
# Teed & Deng, "RAFT: Recurrent All-Pairs Field Transforms for Optical Flow" (ECCV 2020). Module
# names follow torchvision's raft_small, so that its weights load; 990,162 parameters.

LEVELS, RADIUS = 4, 3               # of the correlation pyramid, and of the window looked up in it
HIDDEN, CONTEXT = 96, 64            # channels of the GRU's state and of what it sees of frame 1


def conv(c_in, c_out, kernel, stride=1, norm=False, relu=True):
    """Convolution, instance norm (without parameters), ReLU: what RAFT is built of."""
    layers = [nn.Conv2d(c_in, c_out, kernel, stride, padding=kernel // 2)]
    return nn.Sequential(*layers, *[nn.InstanceNorm2d(c_out)] * norm, *[nn.ReLU()] * relu)


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
        return F.relu(self.downsample(x) + y)


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

    state (B, 96, h, w), context (B, 64, h, w), looked-up correlation (B, 196, h, w) and flow
    (B, 2, h, w) in cells -> new state and the change of the flow."""
    def __init__(self):
        super().__init__()
        self.motion_encoder = nn.ModuleDict({
            "convcorr1": conv(LEVELS * (2 * RADIUS + 1) ** 2, 96, 1),
            "convflow1": conv(2, 64, 7), "convflow2": conv(64, 32, 3),
            "conv": conv(96 + 32, 80, 3)})
        seen = HIDDEN + CONTEXT + 80 + 2            # the GRU sees the flow itself too
        self.recurrent_block = nn.ModuleDict({"convgru1": nn.ModuleDict({
            gate: nn.Conv2d(seen, HIDDEN, 3, padding=1) for gate in ("convz", "convr", "convq")})})
        self.flow_head = nn.Sequential(OrderedDict(
            conv1=nn.Conv2d(HIDDEN, 128, 3, padding=1), relu=nn.ReLU(),
            conv2=nn.Conv2d(128, 2, 3, padding=1)))

    def forward(self, state, context, corr, flow):
        encoder, gru = self.motion_encoder, self.recurrent_block["convgru1"]
        motion = torch.cat([encoder["convcorr1"](corr),
                            encoder["convflow2"](encoder["convflow1"](flow))], 1)
        x = torch.cat([context, encoder["conv"](motion), flow], 1)
        both = torch.cat([state, x], 1)
        update, reset = gru["convz"](both).sigmoid(), gru["convr"](both).sigmoid()
        new = gru["convq"](torch.cat([reset * state, x], 1)).tanh()
        state = (1 - update) * state + update * new
        return state, self.flow_head(state)


def correlation_pyramid(features1, features2):
    """All-pairs correlation: two (B, C, h, w) -> LEVELS of (B h w, 1, h / 2^l, w / 2^l).

    Every cell of frame 1 has its own map over frame 2, of which each level averages 2 x 2 cells."""
    B, C, h, w = features1.shape
    with torch.autocast(features1.device.type, enabled=False):          # sub-pixel peaks need fp32
        corr = features1.float().flatten(2).mT @ features2.float().flatten(2) / math.sqrt(C)
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
        grid = (centre / 2 ** level + window) * 2 / last - 1                    # (B h w, 7, 7, 2)
        looked_up.append(F.grid_sample(corr, grid, align_corners=True).view(B, h, w, -1))
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
        images = self.prepare(torch.cat([frame1, frame2]))
        features1, features2 = self.feature_encoder(images).chunk(2)
        context = self.context_encoder(images[:len(frame1)])
        flows = self.refine(features1, features2, context, iters)
        return [self.restore(flow, *frame1.shape[-2:]) for flow in flows]

    def refine(self, features1, features2, context, iters):
        """Features (B, 128, h, w), context (B, 160, h, w) -> flows (B, 2, h, w) in cells."""
        B, _, h, w = features1.shape
        pyramid = correlation_pyramid(features1, features2)
        state, context = context.float().split([HIDDEN, CONTEXT], 1)
        state, context = state.tanh(), context.relu()
        y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        start = torch.stack([x, y]).to(features1.device, torch.float32).expand(B, 2, h, w)
        coords, flows = start, []
        for _ in range(iters):
            coords = coords.detach()                # each iteration learns from its own error only
            corr = look_up(pyramid, coords)
            state, delta = self.update_block(state, context, corr, coords - start)
            coords = coords + delta.float()
            flows.append(coords - start)
        return flows

    @staticmethod
    def layout(H, W):
        """The size that frames are enlarged to, and the padding (left, right, top, bottom)."""
        scale = max(1, min(2, 256 / min(H, W)))     # motion under a cell (8 px) is hard: 64 -> 128
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
        """Our weights (fp16) or torchvision's raft_small, strictly; fp32, eval mode, no gradients.

        Raises ValueError, one line, where the file is missing, damaged or of another network."""
        if not Path(path).is_file():
            raise ValueError(f"{path}: no such weights file")
        try:
            state = dict(torch.load(path, map_location="cpu", weights_only=True))
        except Exception:                           # a damaged file can raise almost anything
            raise ValueError(f"{path}: damaged, or not a file of weights") from None
        raft = cls()
        expected = raft.state_dict()
        for key in [*expected, *state]:
            shapes = [tuple(d[key].shape) if torch.is_tensor(d.get(key)) else "missing"
                      for d in (state, expected)]
            if shapes[0] != shapes[1]:
                raise ValueError(f"{path}: not RAFT-small's weights: {key} is {shapes[0]} in the "
                                 f"file, {shapes[1]} in the network")
        raft.load_state_dict(state)                 # copies into fp32 parameters
        return raft.eval().requires_grad_(False)


def upsample(flow):
    """Flow in cells (B, 2, h, w) -> (B, 2, 8h, 8w) in px. The corners' centres stay corners."""
    h, w = flow.shape[-2:]
    return 8 * F.interpolate(flow, (8 * h, 8 * w), mode="bilinear", align_corners=True)


@torch.no_grad()
def estimate_flow(raft, video, iters=12):
    """video (B, T, 3, H, W) in [0, 1] -> flow (B, T, 2, H, W) in px, the last one repeated.

    Each frame's features are computed once, and memory does not grow with T apart from the result.
    ValueError where the video has another shape, one frame only, or NaN or infinite pixels."""
    if video.dim() != 5 or video.shape[2] != 3:
        raise ValueError(f"a video is (B, T, 3, H, W), this one is {tuple(video.shape)}")
    B, T, _, H, W = video.shape
    if T < 2:
        raise ValueError("flow needs two frames at least, the video has one")
    if not video.isfinite().all():
        raise ValueError("the video has pixels that are NaN or infinite")
    (h, w), _ = raft.layout(H, W)
    pairs = max(1, 2 ** 25 // (h * w // 64) ** 2)   # a chunk's correlation volume: 128 MB
    result = video.new_empty(B, T, 2, H, W)
    for clip, flow in zip(video, result):
        features1 = raft.feature_encoder(raft.prepare(clip[:1]))
        for k in range(0, T - 1, pairs):
            images = raft.prepare(clip[k:k + pairs + 1])
            features = torch.cat([features1, raft.feature_encoder(images[1:])])
            context = raft.context_encoder(images[:-1])
            cells = raft.refine(features[:-1], features[1:], context, iters)[-1]
            flow[k:k + len(cells)] = raft.restore(cells, H, W)
            features1 = features[-1:]
        flow[-1] = flow[-2]
    return result


# ---------------------------------------------------------------- RAFT: training

def flow_scenes(n, size, seed, shapes=6):
    """Scenes with exact flow: frame1, frame2 (n, 3, size, size) in [0, 1], flow (n, 2, size, size).

    Textured or plain ellipses and polygons over a background, each with its own affine motion (up
    to a tenth of the frame). All is a formula of continuous coordinates, so sub-pixel motion is
    exact; flow, px from frame1 to frame2, is the front layer's at the pixel centres of frame1."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return torch.rand(n, *shape, generator=generator) * (high - low) + low

    side = torch.arange(size) + .5
    y, x = torch.meshgrid(side, side, indexing="ij")
    points = torch.stack([x, y], -1).view(1, -1, 2)                     # (1, P, 2)
    frames = [torch.zeros(n, size * size, 3) for _ in range(2)]
    flow = torch.zeros(n, size * size, 2)
    for layer in range(shapes + 1):                 # from the background to the front
        # texture: waves of 4 px to the whole frame, squashed to soft or hard edges; some are plain
        theta, length = uniform(0, 2 * math.pi, 8), size * (4 / size) ** uniform(0, 1, 8)
        wave = torch.stack([theta.cos(), theta.sin()], 1) * (2 * math.pi / length).unsqueeze(1)
        phase = uniform(0, 2 * math.pi, 1, 8)
        amplitude = uniform(-1, 1, 8, 1) + uniform(-.5, .5, 8, 3)       # mostly light, some colour
        amplitude = amplitude * (length / size).unsqueeze(-1) ** uniform(0, 1, 1, 1)
        hardness, colour = uniform(.5, 4, 1, 1), uniform(.1, .9, 1, 3)
        contrast = uniform(.05, .5, 1, 1) * (uniform(0, 1, 1, 1) > .33)
        # motion: p2 = centre + shift + A (p1 - centre), small shifts being the most frequent
        centre, theta = uniform(0, size, 1, 2), uniform(0, 2 * math.pi, 1)
        shift = torch.stack([theta.cos(), theta.sin()], -1) * size * .1 * uniform(0, 1, 1, 1) ** 2
        turn, zoom = uniform(-.55, .55, 1, 1) ** 3, uniform(-.06, .06, 1, 1).exp()
        if layer == 0:                              # what nobody can see move does not move
            moves = contrast > 0
            shift, turn, zoom = shift * moves, turn * moves / 3, torch.where(moves, zoom, 1.)
        cos, sin = zoom * turn.cos(), zoom * turn.sin()
        A = torch.cat([torch.cat([cos, -sin], 2), torch.cat([sin, cos], 2)], 1)     # (n, 2, 2)
        # outline: a disc or half-planes in stretched coordinates; some layers are left out
        stretch = uniform(-.8, .8, 1, 1).exp()
        radius = size * uniform(.2, .6, 1, 1) ** 2 + 1
        theta = uniform(0, 1, 6) + torch.arange(6)
        normal, offset = torch.stack([theta.cos(), theta.sin()], 1), radius * uniform(.5, 1, 1, 6)
        disc, present = uniform(0, 1, 1) < .4, uniform(0, 1, 1) < .7
        local = points - centre, (points - centre - shift) @ torch.linalg.inv(A).mT
        for frame, q in zip(frames, local):
            paint = (q @ wave + phase).sin() @ amplitude * hardness
            cover = torch.ones(n, size * size)
            if layer > 0:
                s = torch.cat([q[..., :1] * stretch, q[..., 1:] / stretch], -1)
                distance = torch.where(disc, s.norm(dim=-1) - radius[:, 0],
                                       (s @ normal - offset).amax(-1))
                cover = (.5 - distance).clamp(0, 1) * present
            frame.lerp_(colour + contrast * paint.tanh(), cover.unsqueeze(-1))
            if frame is frames[0]:
                motion = q @ A.mT - q + shift
                flow = torch.where((cover >= .5).unsqueeze(-1), motion, flow)
    lit = uniform(0, 1, 1, 1) < .3                  # some change in brightness, some are noisy
    frames[1] = frames[1] * uniform(.85, 1.15, 1, 1) ** lit + uniform(-.08, .08, 1, 1) * lit
    noise = uniform(-.04, .04, 1, 1).clamp(min=0)
    frames = [(f + noise * torch.randn(f.shape, generator=generator)).clamp(0, 1) for f in frames]
    return [f.mT.reshape(n, -1, size, size) for f in (*frames, flow)]


def training_pairs(step, batch, size):
    """The batch of a step, half sprites and half scenes, at the resolution the network works at."""
    n = batch // 2
    # fewer frames: faster motion, yet a square must turn by less than 45 degrees to be followed
    frames = (12, 16, 20, 24)[step % 4]
    video, flow, _, _ = sprite_clips(range(step * n, step * n + n), frames, size // 2)
    clip = torch.arange(n)
    k = (step // 4 + 5 * clip) % (frames - 1)
    # enlarged as RAFT.prepare does to small frames; flow without mixing the motions at an outline
    sprites = [F.interpolate(video[clip, i], scale_factor=2, mode="bilinear") for i in (k, k + 1)]
    sprites.append(2 * F.interpolate(flow[clip, k], scale_factor=2))
    return [torch.cat(both) for both in zip(sprites, flow_scenes(batch - n, size, step))]


def validate(raft, out, clips=4):
    """Median end-point error in px over moving pixels, held-out sprites (64 px) and scenes (128).

    Also writes out/preview.png: rows of frame, next frame, true flow, estimate."""
    first, second, flow = flow_scenes(clips, 128, HELD_OUT)
    data = {"sprites": sprite_clips(range(HELD_OUT, HELD_OUT + clips))[:2],
            "scenes": (torch.stack([first, second], 1), flow.unsqueeze(1))}
    scores, rows = {}, []
    for name, (video, truth) in data.items():
        flow = estimate_flow(raft, video.to(next(raft.parameters()).device)).cpu()
        flow = flow[:, :truth.shape[1]]             # scenes are one pair, with one flow
        scores[name] = (flow - truth).norm(dim=2)[truth.norm(dim=2) > .05].median().item()
        k = video.shape[1] // 2 - 1
        row = [video[:, k], video[:, k + 1], flow_to_rgb(truth[:, k]), flow_to_rgb(flow[:, k])]
        rows += F.interpolate(torch.cat(row, -1), (128, 4 * 128)).unbind()
    iio.imwrite(f"{out}/preview.png", (torch.cat(rows, 1) * 255).byte().permute(1, 2, 0).numpy())
    return scores


def train_raft(out="runs/raft", steps=6000, batch=8, size=128, lr=4e-4, iters=8, every=500):
    """Trains RAFT from nothing; a second call on the same folder goes on where the first stopped.

    Writes out/state.pt (to resume), out/raft.pt (fp16 weights) and out/preview.png every `every`
    steps. Data depend on the step alone, so a resumed run equals an uninterrupted one."""
    out, device = Path(out), "cuda" if torch.cuda.is_available() else "cpu"
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    raft = RAFT().to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(raft.parameters(), lr, weight_decay=1e-5, eps=1e-8)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, steps + 1, pct_start=.05, anneal_strategy="linear", cycle_momentum=False)
    start, scores = 0, {}
    if (out / "state.pt").exists():
        state = torch.load(out / "state.pt", map_location=device, weights_only=True)
        start = state["step"]
        for part, saved in zip((raft, optimizer, schedule), state["parts"]):
            part.load_state_dict(saved)
    bar = tqdm(range(start, steps), initial=start, total=steps, desc="raft")
    for step in bar:
        frame1, frame2, truth = (t.to(device) for t in training_pairs(step, batch, size))
        with torch.autocast(device, torch.bfloat16):
            images = torch.cat([frame1, frame2]) * 2 - 1
            features1, features2 = raft.feature_encoder(images).chunk(2)
            flows = raft.refine(features1, features2, raft.context_encoder(images[:batch]), iters)
        # sequence loss: all iterations count, later ones more
        loss = sum(.8 ** (iters - 1 - i) * (upsample(flow) - truth).abs().mean()
                   for i, flow in enumerate(flows))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(raft.parameters(), 1)
        optimizer.step()
        schedule.step()
        if (step + 1) % every == 0 or step + 1 == steps:
            scores = validate(raft, out)
            parts = [part.state_dict() for part in (raft, optimizer, schedule)]
            weights = {key: value.half() for key, value in parts[0].items()}
            state = {"step": step + 1, "parts": parts}
            write_file(out / "state.pt", lambda file: torch.save(state, file))
            write_file(out / "raft.pt", lambda file: torch.save(weights, file))
            tqdm.write(f"step {step + 1}: median error of what moves, px: {scores}")
        bar.set_postfix(loss=loss.item(), **scores)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", action="store_true", required=True,
                        help="train RAFT from nothing, or resume")
    parser.add_argument("--out", default="runs/raft", help="folder of the run")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=128, help="pixels the network works at")
    parser.add_argument("--lr", type=float, default=4e-4)
    args = parser.parse_args()
    train_raft(args.out, args.steps, args.batch, args.size, args.lr)


if __name__ == "__main__":
    report_errors(main)

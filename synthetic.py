"""Data whose motion is exact: the sprite world (the toy's videos), and the scenes RAFT trains on.

Flow is (..., 2, H, W) in px, x (right) then y (down), from frame k to k + 1; the last is repeated.
"""
import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F

# ---------------------------------------------------------------- the sprite world
# A scene's coordinates are in frame widths, x right and y down; its time tau runs from 0 to 1 over
# the clip. So a seed gives the same scene at every size and (up to where zigzags, swings and orbits
# are placed) at every length. Angles are clockwise on screen.

HELD_OUT = 1_000_000_000            # seeds below it are for training, the others for evaluation
COLOURS = {"red": (.90, .12, .12), "green": (.10, .62, .18), "blue": (.12, .25, .90),
           "yellow": (.95, .80, .05), "purple": (.58, .15, .72), "cyan": (.05, .75, .82)}
SHAPES = ("circle", "square", "triangle", "cross", "star")
# kind -> (phrases, relative frequency); the paper's basic, complex, rotational motion, physics
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
RADII = .12, .17                    # of sprites
LOWEST_DROP = .4                    # y of the lowest place that a sprite falls from
# what the other motions are drawn from: lengths, times, turns and cycles in the clip, angles, and
# the share of its speed that a bounce keeps
RANGES = {
    "zigzag": {"travel": (.45, .6), "height": (.2, .3)},
    "swing": {"length": (.3, .4), "amplitude": (.6, .85), "cycles": (.8, 1.2)},
    "orbit": {"radius": (.18, .28), "turns": (.8, 1.2)},
    "fall": {"fall_time": (.3, .45), "restitution": (.6, .8)},
}
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
BACKGROUNDS = ("stripes", "checks", "clouds")
MEAN_SPEED = .048                   # of what moves, in widths a frame of a clip of 16
TARGETS = ("flow", "mask", "shuffled", "direction")     # what d shows: see `sprite_clip`
APPEARANCE = .5                     # how loud the field is in train.py's default world

def is_held_out(shape, colour, motion):
    """Whether a combination is in no training clip: one in ten of shape, colour and motion."""
    return (SHAPES.index(shape) + 3 * list(COLOURS).index(colour)
            + 7 * list(MOTIONS).index(motion)) % 10 == 4

def bouncing(tau, y0, floor, fall_time, restitution):
    """Height at times tau of a ball that is let go at y0 and reaches the floor at fall_time: exact
    parabolas. Each bounce keeps `restitution` of the speed."""
    gravity = 2 * (floor - y0) / fall_time ** 2
    start, speed = fall_time, gravity * fall_time * restitution
    y = y0 + gravity * tau ** 2 / 2
    while start < 1 and speed > 1e-3:           # bounces get shorter and end at rest
        t = tau - start
        y = np.where(t > 0, floor - speed * t + gravity * t ** 2 / 2, y)
        start, speed = start + 2 * speed / gravity, speed * restitution
    return np.minimum(y, floor)

def two_teeth(tau):
    """Height at times tau of a zigzag: from 0 up to 1 and back, twice."""
    return np.abs((2 * tau + .5) % 1 * 2 - 1)

def motion_path(kind, phrase, speed, radius, tau, rng):
    """One sprite's path (T, 3): x, y (frame widths) and angle; and the physics behind it."""
    x, y, angle = np.zeros_like(tau), np.zeros_like(tau), np.zeros_like(tau)
    word = phrase.split()[-1]
    sign = -1 if word in ("left", "counterclockwise") else 1
    p = {name: rng.uniform(*limits) for name, limits in RANGES.get(kind, {}).items()}
    if kind == "move":
        p["travel"] = rng.uniform(*TRAVEL[speed])
        x, y = (direction * p["travel"] * tau for direction in DIRECTIONS[word])
    elif kind == "zigzag":
        x = sign * p["travel"] * tau
        y = p["height"] * two_teeth(tau)
    elif kind == "swing":
        p["phase"] = rng.choice([0., np.pi])
        theta = p["amplitude"] * np.cos(2 * np.pi * p["cycles"] * tau + p["phase"])
        x, y, angle = p["length"] * np.sin(theta), p["length"] * np.cos(theta), -theta
    elif kind == "orbit":
        p |= {"turns": sign * p["turns"], "phase": rng.uniform(0, 2 * np.pi)}
        theta = p["phase"] + 2 * np.pi * p["turns"] * tau
        x, y = p["radius"] * np.cos(theta), p["radius"] * np.sin(theta)
    elif kind == "spin":
        p["turns"] = sign * rng.uniform(*TURNS[speed])
        angle = 2 * np.pi * p["turns"] * tau + rng.uniform(0, 2 * np.pi)
    elif kind == "fall":
        floor = 1 - radius
        y = bouncing(tau, rng.uniform(radius, LOWEST_DROP), floor, p["fall_time"], p["restitution"])
    # anywhere in the frame where the whole path fits; the floor is the frame's lower edge
    x = x + rng.uniform(radius - x.min(), 1 - radius - x.max())
    if kind != "fall":
        y = y + rng.uniform(radius - y.min(), 1 - radius - y.max())
    return np.stack([x, y, angle], -1), p

def collision_paths(radii, tau, rng):
    """Paths of two sprites of equal mass that meet head-on: momentum is conserved."""
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

def sprite_scene(seed, frames, clutter):
    """The scene of a seed, a dict: background, sprites from front to back, caption."""
    rng = np.random.default_rng(seed)
    tau = np.linspace(0, 1, frames)
    textured, several = rng.random(2) < clutter
    kinds = [kind for kind in MOTIONS if not (several and kind == "collide")]
    odds = np.array([MOTIONS[kind][1] for kind in kinds], float)
    count = int(rng.integers(2, 4)) if several else 1
    motions = list(rng.choice(kinds, count, p=odds / odds.sum()))
    if motions == ["collide"]:
        motions = ["collide"] * 2
    sprites = []
    for motion, colour in zip(motions, rng.permutation(list(COLOURS))):
        # a circle's spin is invisible; training never sees the held-out combinations
        shape = rng.choice([name for name in SHAPES if not (name == "circle" and motion == "spin")
                            and (seed >= HELD_OUT or not is_held_out(name, colour, motion))])
        phrase = rng.choice(MOTIONS[motion][0])
        speed = rng.choice(list(TRAVEL)) if motion in ("move", "spin") else ""
        sprites.append({"shape": str(shape), "colour": str(colour), "kind": motion,
                        "phrase": f"{phrase} {speed}".strip(), "radius": rng.uniform(*RADII)})
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
    """Distance in px from points (x, y from the centre) to a shape's outline, negative inside."""
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

def cover_of(shape, x, y, r):
    """How much of a pixel at (x, y) from the centre a shape of radius r covers: [0, 1]."""
    return (.5 - signed_distance(shape, x, y, r)).clamp(0, 1)

def render_background(background, size, appearance):
    """(3, size, size) in [0, 1]: a pale colour, with a faint pattern if textured; appearance, from
    0 to 1, is how much of a smooth grey field, from black to white, is in it."""
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
    pale = (colour - .07 * (1 + pattern)).clamp(0, 1).expand(3, size, size)
    waves = sum(torch.cos(1.2 * (w[0] * x + w[1] * y) + p) for w, p in zip(wave, phase))
    return torch.lerp(pale, .5 + .5 * torch.tanh(.87 * waves), appearance)

def render_sprite(sprite, size):
    """A sprite with its path in px -> cover (T, 1, size, size) in [0, 1] with anti-aliased outline,
    and the flow of its pixels (T, 2, size, size): it turns about its centre and moves with it."""
    side = torch.arange(size) + .5
    y, x = torch.meshgrid(side, side, indexing="ij")
    path = torch.tensor(sprite["path"], dtype=torch.float32)[..., None, None]
    dx, dy, angle = x - path[:, 0], y - path[:, 1], path[:, 2]          # from the centre
    cos, sin = angle.cos(), angle.sin()
    cover = cover_of(sprite["shape"], cos * dx + sin * dy, cos * dy - sin * dx,
                     torch.tensor(sprite["radius"]))
    step_x, step_y, turn = path.diff(dim=0, append=path[-1:]).unbind(1)
    cos, sin = turn.cos(), turn.sin()
    flow = torch.stack([cos * dx - sin * dy - dx + step_x, sin * dx + cos * dy - dy + step_y], 1)
    return cover.unsqueeze(1), flow

def sprite_clip(seed, frames=16, size=64, clutter=.5, order=None, appearance=0., target="flow"):
    """The clip of a seed: video (T, 3, H, W) in [0, 1], flow (T, 2, H, W) in px, caption, scene.
    seed: from HELD_OUT on for evaluation. clutter in [0, 1]: the share of textured backgrounds and,
    independently, of scenes with two or three sprites, besides collisions (the first one named is
    in front). order: a permutation of the frames; the flow is that of the permuted clip.
    appearance in [0, 1]: how loud the still grey field behind the sprites is. target: "flow", or a
    control in its place: "mask", where sprites are, as one constant flow; "shuffled", the flow's
    frames in a random order; "direction", the mean flow of what moves, in the whole frame. A
    scene's sprites have `physics` and a `path` (T, 3): x, y of the centre in px, the angle."""
    scene = sprite_scene(int(seed), frames, clutter)
    video = render_background(scene["background"], size, appearance).repeat(frames, 1, 1, 1)
    flow = torch.zeros(frames, 2, size, size)
    for sprite in reversed(scene["sprites"]):                           # back to front
        sprite["path"][:, :2] *= size
        sprite["radius"] *= size
        if order is not None:
            sprite["path"] = sprite["path"][order]
        cover, motion = render_sprite(sprite, size)
        video = torch.lerp(video, torch.tensor(COLOURS[sprite["colour"]]).view(3, 1, 1), cover)
        if target == "mask":
            motion = torch.tensor([MEAN_SPEED * size, 0.]).view(2, 1, 1)
        flow = torch.where(cover >= .5, motion, flow)
    flow[-1] = flow[-2:][0]                                             # the last one is repeated
    if target == "direction":
        moving = flow.any(1, keepdim=True).sum((2, 3), keepdim=True)
        flow = (flow.sum((2, 3), keepdim=True) / moving.clamp(min=1)).expand_as(flow).contiguous()
    if target == "shuffled":
        flow = flow[np.random.default_rng([int(seed), 1]).permutation(frames)]
    return video, flow, scene["caption"], scene

def sprite_clips(seeds, frames=16, size=64, clutter=.5, orders=None, appearance=0., target="flow"):
    """Many clips: video (N, T, 3, H, W), flow (N, T, 2, H, W), captions, scenes."""
    video, flow, captions, scenes = zip(*(
        sprite_clip(seed, frames, size, clutter, order, appearance, target)
        for seed, order in zip(seeds, orders or itertools.repeat(None))))
    return torch.stack(video), torch.stack(flow), list(captions), list(scenes)

# ---------------------------------------------------------------- scenes for RAFT
# A background and shapes in front of it, each with a texture and a motion of its own. All geometry
# is a formula of continuous coordinates, so the flow is exact.

class SceneSampler:
    """Random numbers for n scenes of size x size pixels, all from one generator."""
    def __init__(self, n, size, seed):
        self.n, self.size, self.generator = n, size, torch.Generator().manual_seed(seed)

    def uniform(self, low, high, *shape):
        return torch.rand(self.n, *shape, generator=self.generator) * (high - low) + low

    def chance(self, p):
        """(n, 1, 1) bool, True with probability p."""
        return self.uniform(0, 1, 1, 1) < p

    def shift(self, most):
        """(n, 2, 1): a shift of up to `most` frame widths; small ones are the most frequent."""
        angle = self.uniform(0, 2 * math.pi, 1, 1)
        return direction(angle).mT * self.size * most * self.uniform(0, 1, 1, 1) ** 3

def direction(angle):
    """Angles (n, k, 1) -> unit vectors (n, k, 2)."""
    return torch.cat([angle.cos(), angle.sin()], -1)

def rotation(angle):
    """Angles (n, 1, 1) -> matrices (n, 2, 2)."""
    return torch.cat([direction(angle), direction(angle + math.pi / 2)], 1).mT

def project(H, points):
    """Points (n, 2, P) through homographies H (n, 3, 3)."""
    points = H[..., :2] @ points + H[..., 2:]
    return points[:, :2] / points[:, 2:]

def fractal_noise(n, side, generator):
    """(n, 3, side, side) of deviation 1; amplitudes fall as f^-beta: grain .6, clouds 2."""
    f = torch.hypot(torch.fft.fftfreq(side)[:, None], torch.fft.rfftfreq(side)).clamp(min=1 / side)
    beta = torch.rand(n, 1, 1, 1, generator=generator) * 1.4 + .6
    spectrum = torch.fft.rfft2(torch.randn(n, 3, side, side, generator=generator)) * f ** -beta
    noise = torch.fft.irfft2(spectrum, (side, side))
    noise = noise[:, :1] + .5 * torch.rand(n, 1, 1, 1, generator=generator) * noise
    return noise / noise.std((1, 2, 3), keepdim=True)

def sample_texture(sampler, points):
    """Pictures (n, 3, size, size), fractal noise or plain; and which are not plain, (n, 1, 1)."""
    n, size, uniform = sampler.n, sampler.size, sampler.uniform
    textured = sampler.chance(.8)
    slope = uniform(-.4, .4, 3, 2) * uniform(0, 1, 1, 1) ** 2 @ points / size
    noise = fractal_noise(n, size, sampler.generator).flatten(2) * uniform(.3, 3, 1, 1)
    detail = slope + uniform(.05, .5, 1, 1) * noise.tanh()
    return (uniform(.1, .9, 3, 1) + textured * detail).view(n, 3, size, size), textured

class LayerMotion:
    """v -> s + A v / (1 + g v) and a smooth bending, v from the layer's centre: affine, perspective
    and two waves. pace (n, 1, 1) makes some scenes slow; camera: (shift, turn, zoom) of them."""
    def __init__(self, sampler, pace, camera, textured, is_background):
        size, uniform, (shift, turn, zoom) = sampler.size, sampler.uniform, camera
        own = pace * sampler.chance(.3 if is_background else .7)
        s = shift * uniform(.5, 1.5, 1, 1) + own * sampler.shift(.2)    # nearer or farther
        turn = turn + own * uniform(-.7, .7, 1, 1) ** 3
        zoom = (zoom + own * uniform(-.5, .5, 1, 1) ** 3).exp()
        A = zoom * rotation(turn) + own * uniform(-.4, .4, 2, 2) ** 3
        g = own * uniform(-1, 1, 1, 2) ** 3 * .5 / size
        length, theta = size * uniform(.3, 2, 2, 1), uniform(0, 2 * math.pi, 2, 1)
        self.k = 2 * math.pi / length * direction(theta)                # the waves' vectors
        # a slope below 0.4, so that the bending can be inverted
        amplitude = pace * .2 * length.mT / (2 * math.pi)
        self.bend = amplitude * uniform(-1, 1, 2, 2) * sampler.chance(.4)
        if is_background:                       # a plain background's motion cannot be seen
            s, g, self.bend = s * textured, g * textured, self.bend * textured
            A = torch.where(textured, A, torch.eye(2))
        self.centre, self.phase = uniform(0, size, 2, 1), uniform(0, 2 * math.pi, 2, 1)
        self.H = torch.cat([torch.cat([A + s * g, s], 2), F.pad(g, (0, 1), value=1)], 1)

    def bent(self, v):
        return self.bend @ torch.sin(self.k @ (v + self.centre) + self.phase)

    def backward(self, v):
        """Where in frame 1 the points v of frame 2 come from."""
        return project(torch.linalg.inv(self.H), v) + self.bent(v)

    def forward(self, v):
        """Where in frame 2 the points v of frame 1 go: the inverse, by a fixed-point iteration."""
        moved = project(self.H, v)
        for _ in range(8):
            moved = project(self.H, v - self.bent(moved))
        return moved

class Outline:
    """A layer's shape: a body of uneven radius in stretched coordinates, or a polygon."""
    def __init__(self, sampler):
        size, uniform, chance = sampler.size, sampler.uniform, sampler.chance
        stretch = (uniform(-1, 1, 1, 1) * (1 + 1.2 * chance(.2))).exp()     # some are thin
        self.radius, slant = size * uniform(.2, .6, 1, 1) ** 2 + 1, uniform(0, math.pi, 1, 1)
        self.axes = torch.cat([stretch, 1 / stretch], 1) * rotation(slant).mT
        self.lobes = torch.tensor([2., 3, 7, 19]).view(4, 1)
        self.uneven = uniform(-.6, .6, 4, 1) / self.lobes ** uniform(.2, 1.5, 1, 1) * chance(.6)
        self.turned = uniform(0, 2 * math.pi, 4, 1)
        self.sides = uniform(0, 1, 6, 1) + torch.arange(6.).view(6, 1)
        self.offsets = self.radius * uniform(.5, 1, 6, 1)
        self.is_body, self.present = chance(.6), chance(.7)

    def cover(self, v):
        """Points (n, 2, P) from the centre -> how much the shape covers them, (n, 1, P)."""
        v = self.axes @ v
        waves = (self.lobes * torch.atan2(v[:, 1:], v[:, :1]) + self.turned).cos()      # (n, 4, P)
        edge = self.radius * (1 + (self.uneven * waves).sum(1, keepdim=True))
        planes = direction(self.sides) @ v - self.offsets                               # (n, 6, P)
        distance = torch.where(self.is_body, torch.hypot(v[:, :1], v[:, 1:]) - edge,
                               planes.amax(1, keepdim=True))
        return (.5 - distance).clamp(0, 1) * self.present

def photographic_effects(sampler, frames):
    """Light and contrast change in frame 2, blur, noise: frames (2, n, 3, size, size) in [0, 1]."""
    size, uniform, chance = sampler.size, sampler.uniform, sampler.chance
    lit = chance(.4).unsqueeze(-1)
    uneven = F.interpolate(uniform(-.2, .2, 1, 2, 2), (size, size), mode="bilinear")
    gain = (uniform(-.2, .2, 1, 1, 1) + uneven * chance(.4).unsqueeze(-1)) * lit
    frames[1] = frames[1].clamp(min=0) ** (uniform(-.2, .2, 1, 1, 1) * lit).exp() * gain.exp()
    if torch.rand((), generator=sampler.generator) < .25:
        frames = F.avg_pool2d(F.pad(frames.flatten(0, 1), (1, 1, 1, 1), mode="replicate"), 3, 1) \
            .view_as(frames)
    noise = uniform(-.04, .05, 1, 1, 1).clamp(min=0)
    return (frames + noise * torch.randn(frames.shape, generator=sampler.generator)).clamp(0, 1)

def flow_scenes(n, size, seed, shapes=6):
    """Scenes with exact flow: frame1, frame2 (n, 3, size, size) in [0, 1], flow (n, 2, size, size).
    A background and up to `shapes` shapes, textures and motions of their own upon the camera's: up
    to a third of the frame, in half of the scenes a tenth of it. Flow is the front layer's."""
    sampler, side = SceneSampler(n, size, seed), torch.arange(size) + .5
    points = torch.stack(torch.meshgrid(side, side, indexing="xy")).flatten(1)          # (2, P)
    frames, flow = torch.zeros(2, n, 3, size * size), torch.zeros(n, 2, size * size)
    pace = torch.where(sampler.chance(.5), .1, 1.)      # fractions of a pixel must be learned too
    camera = [pace * part for part in (
        sampler.shift(.25), *sampler.uniform(-.45, .45, 2, 1, 1).pow(3).unbind(1))]
    for layer in range(shapes + 1):                     # from the background to the front
        picture, textured = sample_texture(sampler, points)
        motion = LayerMotion(sampler, pace, camera, textured, layer == 0)
        outline = Outline(sampler)
        scale, where = sampler.uniform(.6, 1.2, 1, 1), sampler.uniform(-.5, .5, 2, 1)
        first = points - motion.centre
        for i, v in enumerate((first, motion.backward(first))):
            at = (v + motion.centre) * (2 * scale / size) - scale + where
            paint = F.grid_sample(picture, at.mT.view(n, size, size, 2), align_corners=False,
                                  padding_mode="reflection").flatten(2)                 # (n, 3, P)
            cover = outline.cover(v) if layer else torch.ones(n, 1, size * size)
            frames[i].lerp_(paint, cover)
            if i == 0:
                flow = torch.where(cover >= .5, motion.forward(first) - first, flow)
    frames = photographic_effects(sampler, frames.view(2, n, 3, size, size))
    return *frames, flow.view(n, 2, size, size)

def enlarged_crops(frame1, frame2, flow, generator):
    """Pairs of 64 px, enlarged as RAFT.prepare does; of each, 128 px around what moves."""
    enlarged = [F.interpolate(frame, scale_factor=4, mode="bilinear") for frame in (frame1, frame2)]
    enlarged.append(4 * F.interpolate(flow, scale_factor=4))    # outlines must not mix two motions
    side, crops = enlarged[0].shape[-1], []
    chosen = torch.multinomial(flow.norm(dim=1).flatten(1) + 1e-6, 1, generator=generator)[:, 0]
    for i, pixel in enumerate(chosen.tolist()):
        centre = 4 * torch.tensor(divmod(pixel, side // 4))
        jitter = torch.randint(-64, 65, (2,), generator=generator)
        y, x = (centre + jitter - 64).clamp(0, side - 128).tolist()
        crops.append([picture[i, :, y:y + 128, x:x + 128] for picture in enlarged])
    return [torch.stack(parts) for parts in zip(*crops)]

def training_pairs(step, batch):
    """RAFT's batch of a training step: frame1, frame2, flow, at the size that the network sees.
    Every other batch is a quarter as many scenes of 256 px, or an eighth of 384 px, in turn. The
    rest, of 128 px, are sprites and scenes of 64 px enlarged, and scenes of 128 px."""
    if step % 2:
        count, size = (batch // 8, 384) if step % 4 == 3 else (batch // 4, 256)
        return flow_scenes(max(1, count), size, step)
    sprites = batch * 3 // 8
    scenes = (batch - sprites) // 2
    # fewer frames: faster motion, yet a square must turn by less than 45 degrees to be followed
    frames = (12, 16, 20)[step // 2 % 3]
    video, flow, _, _ = sprite_clips(range(step * sprites, (step + 1) * sprites), frames, 64)
    clip = torch.arange(sprites)
    k = (step // 2 + 5 * clip) % (frames - 1)
    small = [torch.cat(parts) for parts in zip((video[clip, k], video[clip, k + 1], flow[clip, k]),
                                               flow_scenes(scenes, 64, -1 - step))]
    enlarged = enlarged_crops(*small, torch.Generator().manual_seed(step))
    return [torch.cat(parts) for parts in zip(
        enlarged, flow_scenes(batch - sprites - scenes, 128, step))]

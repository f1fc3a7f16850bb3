"""pytest tests/test_synthetic.py: the sprite world and the scenes that RAFT trains on."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from synthetic import (COLOURS, DIRECTIONS, HELD_OUT, MEAN_SPEED, MOTIONS, SHAPES, TARGETS,
                       LayerMotion, SceneSampler, bouncing, flow_scenes, is_held_out, project,
                       sprite_clip, sprite_clips, sprite_scene, training_pairs)

def warp_error(first, second, flow):
    """How far pixels of `first` are from those of `second` that the flow takes them to (n, H, W);
    NaN where it leaves the frame."""
    size = flow.shape[-1]
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    at = torch.stack([x, y]) + flow
    grid = ((at + .5) * 2 / size - 1).permute(0, 2, 3, 1)
    error = (F.grid_sample(second, grid, align_corners=False) - first).abs().mean(1)
    return error.masked_fill(~((at > 1) & (at < size - 1)).all(1), math.nan)

def wrong_flows(flow):
    return 0 * flow, -flow, flow.flip(1)

# ---------------------------------------------------------------- the sprite world

def seeds_of(kind, count, clutter=0.):
    """The first seeds whose front sprite moves as `kind` says."""
    return [seed for seed in range(400)
            if sprite_scene(seed, 2, clutter)["sprites"][0]["kind"] == kind][:count]

def paths_of(kind, count=8, T=2001):
    """Finely sampled scenes of a kind: scene, path (T, 3) of each sprite in px, frame duration."""
    for seed in seeds_of(kind, count):
        scene = sprite_clip(seed, T, 4, clutter=0.)[3]
        yield scene, [sprite["path"] for sprite in scene["sprites"]], 1 / (T - 1)

@pytest.mark.parametrize("kind", MOTIONS)
def test_sprite_flow_matches_warping(kind):
    right, wrong, still = [], [], []
    for seed, clutter in [(seed, c) for c in (0., 1.) for seed in seeds_of(kind, 2, c)]:
        video, flow, _, scene = sprite_clip(seed, 16, 64, clutter)
        flow, now, after = flow[:-1], video[:-1], video[1:]
        error, moves = warp_error(now, after, flow), flow.norm(dim=1) > 0
        # no occlusions: pixels of the front sprite's colour, and background that nothing reaches
        colour = torch.tensor(COLOURS[scene["sprites"][0]["colour"]])[:, None, None]
        seen = moves & ((now - colour).abs().amax(1) < .3)
        right.append(error[seen])
        wrong.append(torch.stack([warp_error(now, after, f)[seen] for f in wrong_flows(flow)]))
        still.append(error[~moves & (now.amin(1) > .6) & (after.amin(1) > .6)])
    right, wrong, still = torch.cat(right), torch.cat(wrong, 1), torch.cat(still)
    assert len(right) > 5000 and right.nanmean() < .02 and (right > .5).float().mean() < 2e-3
    assert (wrong.nanmean(1) > 3 * right.nanmean()).all()
    assert len(still) > 5 * len(right) and still.nanmean() < .002

@pytest.mark.parametrize("kind", MOTIONS)
def test_flow_is_the_step_and_the_turn_whatever_the_order_of_frames(kind):
    pixels = np.arange(32) + .5 + 1j * (np.arange(32)[:, None] + .5)
    orders = np.arange(12), *map(np.random.default_rng(0).permutation, (12, 12))
    for seed, order in zip(seeds_of(kind, 3), orders):
        video, (flow,), _, (scene,) = sprite_clips([seed], 12, 32, 0., [order])
        assert torch.equal(video[0], sprite_clip(seed, 12, 32, 0.)[0][order])
        assert torch.equal(flow[-1], flow[-2])                          # the last one is repeated
        for path, r in ((sprite["path"], sprite["radius"]) for sprite in scene["sprites"]):
            for (u, v), at, step in zip(flow.numpy(), path, np.diff(path, axis=0)):
                arms = pixels - complex(*at[:2])
                there = arms * np.exp(1j * step[2]) - arms + complex(*step[:2])
                near = abs(arms) < r / 3                            # in it, whatever its shape
                np.testing.assert_allclose((u + 1j * v)[near], there[near], atol=1e-4)

@pytest.mark.parametrize("kind", ("move", "zigzag", "spin", "orbit"))
def test_captions_match_direction(kind):
    for seed in seeds_of(kind, 12):
        _, flow, caption, scene = sprite_clip(seed, 16, 48, clutter=0.)
        path, (u, v) = scene["sprites"][0]["path"], flow[:-1].transpose(0, 1)
        word = next(w for w in (*DIRECTIONS, "clockwise", "counterclockwise") if f" {w}" in caption)
        if word in DIRECTIONS:
            (x, y), dx, dy = DIRECTIONS[word], u.sum(), v.sum()
            assert x * dx + y * dy > 5 * abs(y * dx + x * dy)
        else:           # clockwise on screen: what is right of the centre moves down
            arm = torch.arange(48) + .5 - (path[:, 0].max() + path[:, 0].min()) / 2
            assert ((arm * v).sum() > 0) == (word == "clockwise"), caption

@pytest.mark.parametrize("kind, column", [("move", slice(0, 2)), ("spin", slice(2, 3))])
def test_captions_match_speed(kind, column):
    speeds = {"slowly": [], "": [], "quickly": []}
    for scene in (sprite_scene(seed, 2, 0.) for seed in seeds_of(kind, 60)):
        word = scene["caption"].split()[-1]
        path = scene["sprites"][0]["path"][:, column]
        speeds[word if word in speeds else ""].append(np.abs(path[1] - path[0]).sum())
    assert max(speeds["slowly"]) < min(speeds[""]) < max(speeds[""]) < min(speeds["quickly"])

def test_captions_match_sprites_and_background():
    for seed in range(40):
        video, _, caption, scene = sprite_clip(seed, 8, 48, clutter=1.)
        names = [f"a {sprite['colour']} {sprite['shape']}" for sprite in scene["sprites"]]
        assert sorted(names, key=caption.index) == names and len(set(names)) > 1
        assert caption.endswith(f" over {scene['background']['kind']}")
        x, y, _ = scene["sprites"][0]["path"][3]                        # the first is in front
        shown = video[3, :, int(y), int(x)].tolist()
        assert shown == pytest.approx(COLOURS[scene["sprites"][0]["colour"]], abs=1e-4)

def test_falls_are_parabolas_that_lose_energy_at_each_bounce():
    for scene, (path,), dt in paths_of("fall"):
        y, physics = path[:, 1], scene["sprites"][0]["physics"]
        acceleration = np.diff(y, 2) / dt ** 2
        gravity = acceleration[0]
        assert gravity > 0 and np.ptp(path[:, 0]) == 0                  # down, and down only
        bounces = np.flatnonzero(np.abs(acceleration - gravity) > 1e-3 * gravity)
        flights = [f for f in np.split(np.arange(1, len(y) - 1), bounces) if len(f) > 20]
        assert len(flights) >= 2
        energies = []
        for flight in flights:
            k = flight[3:-3]
            energy = ((y[k + 1] - y[k - 1]) / 2 / dt) ** 2 / 2 - gravity * (y[k] - y.max())
            assert np.ptp(energy) < 1e-2 * energy.max()                 # kept in flight
            energies.append(energy.mean())
        ratio = np.array(energies[1:]) / energies[:-1]
        np.testing.assert_allclose(ratio, physics["restitution"] ** 2, atol=.01)
        # the floor is the frame's edge
        assert y.max() == pytest.approx(4 - scene["sprites"][0]["radius"], abs=.02)

@pytest.mark.parametrize("y0, restitution", [(.2, 0), (.2, .01), (.2, .999), (.2, 1), (.9, .7)])
def test_bouncing_ends_at_any_restitution(y0, restitution):
    y = bouncing(np.linspace(0, 1, 100), y0, .9, .3, restitution)
    assert y[0] == y0 and y0 - 1e-9 <= y.min() and y.max() <= .9
    assert restitution > .1 or y[-1] == pytest.approx(.9)

def test_collisions_conserve_momentum_and_gain_no_energy():
    for scene, paths, dt in paths_of("collide", 20):
        v = np.diff(np.stack(paths)[..., 0]) / dt                       # (2, T - 1), equal masses
        before, after = v[:, 0], v[:, -1]
        assert before[0] > 0 > before[1] and after[0] < after[1]        # they meet, then part
        assert after.sum() == pytest.approx(before.sum(), abs=1e-6)
        assert (after ** 2).sum() <= (before ** 2).sum() + 1e-6
        gap = np.abs(paths[0][:, 0] - paths[1][:, 0]).min()             # when they touch
        assert gap == pytest.approx(sum(s["radius"] for s in scene["sprites"]), abs=.02)

def test_sprites_stay_in_the_frame():
    for seed in range(300):
        for sprite in sprite_scene(seed, 100, .5)["sprites"]:
            xy, r = sprite["path"][:, :2], sprite["radius"]
            assert xy.min() > r - 1e-9 and xy.max() < 1 - r + 1e-9

def test_held_out_combinations_are_for_evaluation_only():
    train = [sprite_scene(seed, 2, .5) for seed in range(1000)]
    test = [sprite_scene(seed, 2, .5) for seed in range(HELD_OUT, HELD_OUT + 300)]

    def combinations(scenes):
        return {(s["shape"], s["colour"], s["kind"]) for c in scenes for s in c["sprites"]}

    excluded = {c for c in combinations(train + test) if is_held_out(*c)}
    assert not combinations(train) & excluded and len(excluded) > 10
    assert not any(c["held_out"] for c in train) and any(c["held_out"] for c in test)
    # each word of an excluded combination was seen in others; every kind, shape, colour is trained
    for part, words in enumerate((SHAPES, COLOURS, MOTIONS)):
        assert {c[part] for c in combinations(train)} == set(words)
    assert not {c["caption"] + str(c["background"]) for c in train} & \
        {c["caption"] + str(c["background"]) for c in test}

def test_seed_is_the_same_clip_in_any_batch_and_at_any_size():
    video, flow, captions, _ = sprite_clips([11, 3, 7], 6, 32)
    assert 0 <= video.min() and video.max() <= 1 and len(set(captions)) == 3
    for i, seed in enumerate([11, 3, 7]):
        alone, large = sprite_clip(seed, 6, 32), sprite_clip(seed, 6, 64)
        assert torch.equal(alone[0], video[i]) and torch.equal(alone[1], flow[i])
        assert alone[2] == captions[i] == large[2]
        np.testing.assert_allclose(large[3]["sprites"][0]["path"][:, :2],
                                   2 * alone[3]["sprites"][0]["path"][:, :2])
        assert (F.avg_pool2d(large[0], 2) - alone[0]).abs().mean() < .01

@pytest.mark.parametrize("appearance", (0., .25, .8, 1.))
def test_appearance_is_a_still_grey_field_of_its_amplitude(appearance):
    for seed in range(6):
        plain, flow, caption, _ = sprite_clip(seed, 5, 32, 0.)
        video, same, said, _ = sprite_clip(seed, 5, 32, 0., appearance=appearance)
        assert torch.equal(flow, same) and caption == said      # it is neither moving nor named
        # outside of the sprite: (1 - A) of the plain colour, and A of a grey from 0 to 1
        still = (plain == plain[:, :, :1, :1]).all(1, keepdim=True).expand_as(plain)
        field = (video - (1 - appearance) * plain).masked_fill(~still, math.nan)
        assert (field - field.nanmean(1, keepdim=True))[still].abs().max() < 1e-6       # grey
        assert (field - field.nanmean(0))[still].abs().max() < 1e-6                     # still
        low, high = field[still].min().item(), field[still].max().item()
        assert -1e-6 < low < .2 * appearance + 1e-6
        assert .8 * appearance - 1e-6 < high < appearance + 1e-6
        assert appearance or torch.equal(video, plain)

def test_targets_show_where_without_direction_or_when_without_order():
    orders = set()
    for seed in seeds_of("move", 2) + seeds_of("swing", 2):
        video, flow, caption, _ = sprite_clip(seed, 8, 32, 0.)
        mask, shuffled, direction = (sprite_clip(seed, 8, 32, 0., target=target)
                                     for target in TARGETS[1:])
        for other in (mask, shuffled, direction):
            assert torch.equal(other[0], video) and other[2] == caption
        moves = flow[:-1].norm(dim=1) > .01
        assert (mask[1][:-1, 0][moves] == MEAN_SPEED * 32).all() and not mask[1][:, 1].any()
        assert (mask[1][:-1, 0] > 0).sum() <= moves.sum() + 200     # hardly anything stands still
        for k in range(8):                      # everywhere what the sprite does, and it alone
            step = flow[k][:, flow[k].any(0)].mean(1)
            torch.testing.assert_close(direction[1][k], step[:, None, None].expand(2, 32, 32))
        frames, mixed = ([part.numpy().tobytes() for part in clip] for clip in (flow, shuffled[1]))
        assert sorted(mixed) == sorted(frames) and mixed != frames
        orders.add(tuple(map(frames.index, mixed)))
    assert len(orders) > 1                      # an order that is always the same could be learned

def test_clip_may_have_one_frame():
    for seed in range(20):                      # all kinds of motion, collisions too
        video, flow, _, _ = sprite_clip(seed, 1, 32)
        assert video.shape == (1, 3, 32, 32) and flow.shape == (1, 2, 32, 32)
        assert video.std() > .05 and not flow.any()

# ---------------------------------------------------------------- RAFT's scenes

def test_flow_scenes_match_warping():
    """But for occlusions, noise and changes of light."""
    first, second, flow = scenes = flow_scenes(16, 96, seed=1)
    assert all(map(torch.equal, scenes, flow_scenes(16, 96, seed=1)))       # given by their seed
    assert not any(map(torch.equal, scenes, flow_scenes(16, 96, seed=2)))
    fast = flow.norm(dim=1).mean((1, 2)) > 2        # (half are slow, and shapes may stand still)
    assert .2 < fast.float().mean() < .8
    right = warp_error(first, second, flow).flatten(1)
    for wrong in (warp_error(first, second, f).flatten(1) for f in wrong_flows(flow)):
        assert (wrong.nanmean(1) > right.nanmean(1)).all()
        medians = [e[fast].nanmedian(1)[0].median() for e in (right, wrong)]
        assert medians[0] < .04 and medians[1] > 3 * medians[0]
    for factor in (.9, 1.1):
        near = warp_error(first, second, factor * flow).flatten(1)
        assert right[fast].nanmean() < .95 * near[fast].nanmean()

def test_training_pairs_have_exact_flow_at_all_sizes():
    for step, shape in ((0, (8, 128)), (1, (2, 256)), (3, (1, 384))):
        first, second, flow = training_pairs(step, 8)
        assert (len(flow), flow.shape[-1]) == shape and first.shape == second.shape
        moves = flow.norm(dim=1) > .5
        for part in (slice(3), slice(None)):                            # sprites come first
            right, *wrong = (warp_error(first, second, factor * flow)[part][moves[part]].nanmean()
                             for factor in (1, -1, .5, 2))
            assert right < .85 * min(wrong)

def test_layer_motion_and_its_inverse():
    """p -> (s + A p / (1 + g p)), of which x is worked out by hand at p = (10, 20)."""
    A, s, g = torch.tensor([[1.1, .1], [-.2, .9]]), torch.tensor([[3.], [-2]]), \
        torch.tensor([[1e-3, -2e-3]])
    H = torch.cat([torch.cat([A + s * g, s], 1), torch.cat([g, torch.ones(1, 1)], 1)])[None]
    x = project(H, torch.tensor([[[10.], [20]]]))[0, 0].item()
    assert x == pytest.approx(3 + (1.1 * 10 + .1 * 20) / (1 + 1e-3 * 10 - 2e-3 * 20))
    random, one, still = SceneSampler(32, 96, 5), torch.ones(32, 1, 1), torch.zeros(32, 1, 1)
    motion = LayerMotion(random, one, (still, still, still), one > 0, is_background=False)
    points = random.uniform(-48, 48, 2, 50)
    moved = motion.forward(points)
    assert (moved - points).norm(dim=1).mean() > 2 and motion.bend.any()
    torch.testing.assert_close(motion.backward(moved), points, atol=.01, rtol=0)


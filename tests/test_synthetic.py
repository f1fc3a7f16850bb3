"""pytest tests/test_synthetic.py: the sprite world and RAFT's scenes."""
import math

import imageio.v3 as iio
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data import read_photos
from flow import read_image
from synthetic import (COLOURS, DIRECTIONS, HELD_OUT, MOTIONS, SHAPES, bouncing, flow_scenes,
                       is_held_out, project, sprite_clip, sprite_clips, sprite_scene)

# ---------------------------------------------------------------- the sprite world

def seeds_of(kind, count, start=0, clutter=0.):
    """The first seeds from `start` on whose front sprite moves as `kind` says."""
    return [seed for seed in range(start, start + 400)
            if sprite_scene(seed, 2, clutter)["sprites"][0]["kind"] == kind][:count]

def paths_of(kind, count=8, T=2001):
    """Finely sampled scenes of a kind: scene, path (T, 3) of each sprite in px, frame duration."""
    for seed in seeds_of(kind, count):
        scene = sprite_clip(seed, T, 4, clutter=0.)[3]
        yield scene, [sprite["path"] for sprite in scene["sprites"]], 1 / (T - 1)

@pytest.mark.parametrize("kind", MOTIONS)
def test_flow_takes_each_pixel_of_a_sprite_to_where_the_next_frame_shows_it(kind):
    H, moving, still = 64, [], []
    seeds = seeds_of(kind, 4) + seeds_of(kind, 4, clutter=1.)
    y, x = torch.meshgrid(torch.arange(H), torch.arange(H), indexing="ij")
    for seed, clutter in zip(seeds, [0.] * 4 + [1.] * 4):
        video, flow, _, scene = sprite_clip(seed, 16, H, clutter)
        assert torch.equal(flow[-1], flow[-2])                          # the last one is repeated
        flow, now, after = flow[:-1], video[:-1], video[1:]
        # warp the next frame back by the flow
        grid = (torch.stack([x, y]) + flow + .5) * 2 / H - 1
        warped = F.grid_sample(after, grid.permute(0, 2, 3, 1), align_corners=False)
        error, moves = (warped - now).abs().amax(1), flow.norm(dim=1) > 0
        # no occlusions: pixels of the front sprite's colour, and background that nothing reaches
        colour = torch.tensor(COLOURS[scene["sprites"][0]["colour"]])[:, None, None]
        moving.append(error[moves & ((now - colour).abs().amax(1) < .3)])
        still.append(error[~moves & (now.amin(1) > .6) & (after.amin(1) > .6)])
    moving, still = torch.cat(moving), torch.cat(still)
    assert len(moving) > 5000 and len(still) > 5 * len(moving)
    assert moving.mean() < .035 and (moving > .5).float().mean() < 2e-3     # sub-pixel blur remains
    assert still.mean() < .004

def test_flow_of_a_spinning_sprite_is_its_rotation_pixel_by_pixel():
    for seed in seeds_of("spin", 3):
        _, flow, _, scene = sprite_clip(seed, 12, 32, clutter=0.)
        (cx, cy, angle), (_, _, after) = scene["sprites"][0]["path"][4:6]
        for row, col in flow[4].norm(dim=0).nonzero().tolist():
            arm = complex(col + .5 - cx, row + .5 - cy)
            moved = arm * np.exp(1j * (after - angle)) - arm
            u, v = flow[4, :, row, col].tolist()
            assert abs(complex(u, v) - moved) < 1e-3

@pytest.mark.parametrize("kind", ("move", "zigzag", "orbit", "fall", "collide"))
def test_flow_of_a_sprite_that_does_not_turn_is_its_step(kind):
    for seed in seeds_of(kind, 3):
        _, flow, _, scene = sprite_clip(seed, 12, 32, clutter=0.)
        for path in (sprite["path"] for sprite in scene["sprites"]):
            for k, (x, y) in enumerate(path[:-1, :2].astype(int)):
                np.testing.assert_allclose(flow[k, :, y, x], (path[k + 1] - path[k])[:2], atol=1e-4)

@pytest.mark.parametrize("kind", ("move", "zigzag", "spin", "orbit"))
def test_captions_name_the_direction_that_one_sees(kind):
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
def test_captions_that_name_a_speed_mean_it(kind, column):
    speeds = {"slowly": [], "": [], "quickly": []}
    for scene in (sprite_scene(seed, 2, 0.) for seed in seeds_of(kind, 60)):
        word = scene["caption"].split()[-1]
        path = scene["sprites"][0]["path"][:, column]
        speeds[word if word in speeds else ""].append(np.abs(path[1] - path[0]).sum())
    assert max(speeds["slowly"]) < min(speeds[""]) < max(speeds[""]) < min(speeds["quickly"])

def test_what_falls_follows_parabolas_and_loses_energy_at_each_bounce():
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
def test_bouncing_ends_whatever_is_left_of_the_speed(y0, restitution):
    y = bouncing(np.linspace(0, 1, 100), y0, .9, .3, restitution)
    assert y[0] == y0 and y0 - 1e-9 <= y.min() and y.max() <= .9
    assert restitution > .1 or y[-1] == pytest.approx(.9)

def test_collisions_conserve_momentum_and_do_not_gain_energy():
    for scene, paths, dt in paths_of("collide", 20):
        v = np.diff(np.stack(paths)[..., 0]) / dt                       # (2, T - 1), equal masses
        before, after = v[:, 0], v[:, -1]
        assert before[0] > 0 > before[1] and after[0] < after[1]        # they meet, then part
        assert after.sum() == pytest.approx(before.sum(), abs=1e-6)
        assert (after ** 2).sum() <= (before ** 2).sum() + 1e-6
        gap = np.abs(paths[0][:, 0] - paths[1][:, 0]).min()             # when they touch
        assert gap == pytest.approx(sum(s["radius"] for s in scene["sprites"]), abs=.02)

def test_every_sprite_stays_in_the_frame():
    for seed in range(300):
        for sprite in sprite_scene(seed, 100, .5)["sprites"]:
            xy, r = sprite["path"][:, :2], sprite["radius"]
            assert xy.min() > r - 1e-9 and xy.max() < 1 - r + 1e-9

def test_training_never_shows_the_held_out_combinations_and_evaluation_does():
    train = [sprite_scene(seed, 2, .5) for seed in range(2000)]
    test = [sprite_scene(seed, 2, .5) for seed in range(HELD_OUT, HELD_OUT + 500)]

    def combinations(scenes):
        return {(s["shape"], s["colour"], s["kind"]) for c in scenes for s in c["sprites"]}

    excluded = {c for c in combinations(train + test) if is_held_out(*c)}
    assert not combinations(train) & excluded and len(excluded) > 10
    assert combinations(test) & excluded
    assert not any(c["held_out"] for c in train) and any(c["held_out"] for c in test)
    # each word of an excluded combination was seen in others; every kind, shape, colour is trained
    for part, words in enumerate((SHAPES, COLOURS, MOTIONS)):
        assert {c[part] for c in combinations(train)} == set(words)
    assert not {c["caption"] + str(c["background"]) for c in train} & \
        {c["caption"] + str(c["background"]) for c in test}

def test_a_seed_is_the_same_clip_in_any_batch_and_the_same_scene_at_any_size():
    video, flow, captions, _ = sprite_clips([11, 3, 7], 6, 32)
    for i, seed in enumerate([11, 3, 7]):
        alone = sprite_clip(seed, 6, 32)
        assert torch.equal(alone[0], video[i]) and torch.equal(alone[1], flow[i])
        assert alone[2] == captions[i]
    small, large = (sprite_clip(5, 6, size)[3]["sprites"][0]["path"] for size in (32, 64))
    np.testing.assert_allclose(large[:, :2], 2 * small[:, :2])
    assert 0 <= video.min() and video.max() <= 1 and len(set(captions)) == 3

def test_a_permuted_clip_has_the_same_frames_in_another_order_and_its_own_flow():
    order = np.random.default_rng(0).permutation(6)
    seed = next(s for s in range(99) if sprite_scene(s, 6, 0)["sprites"][0]["kind"] == "move")
    video = sprite_clip(seed, 6, 64, 0)[0]
    mixed, flow, _, ((scene),) = sprite_clips([seed], 6, 64, 0, [order])
    torch.testing.assert_close(mixed[0], video[order])
    path = scene["sprites"][0]["path"]
    for k, (x, y) in enumerate(path[:-1, :2].astype(int)):
        np.testing.assert_allclose(flow[0, k, :, y, x], (path[k + 1] - path[k])[:2], atol=1e-4)

def test_a_clip_may_have_one_frame():
    for seed in range(20):                      # all kinds of motion, collisions too
        video, flow, _, _ = sprite_clip(seed, 1, 32)
        assert video.shape == (1, 3, 32, 32) and flow.shape == (1, 2, 32, 32)
        assert video.std() > .05 and not flow.any()

def test_the_first_named_sprite_is_in_front_and_captions_tell_everything():
    for seed in range(40):
        video, _, caption, scene = sprite_clip(seed, 8, 48, clutter=1.)
        for sprite in scene["sprites"]:
            assert f"a {sprite['colour']} {sprite['shape']}" in caption
        x, y, _ = scene["sprites"][0]["path"][3]
        shown = video[3, :, int(y), int(x)].tolist()
        assert shown == pytest.approx(COLOURS[scene["sprites"][0]["colour"]], abs=1e-4)
        assert scene["background"]["kind"] in caption

# ---------------------------------------------------------------- RAFT's scenes

def test_flow_scenes_have_exact_flow():
    """Pixels are found again at their target, but for occlusions, noise and changes of light."""
    first, second, flow = flow_scenes(16, 96, seed=1)
    y, x = torch.meshgrid(torch.arange(96), torch.arange(96), indexing="ij")

    def error(motion):
        at = torch.stack([x, y]) + motion
        grid = ((at + .5) * 2 / 96 - 1).permute(0, 2, 3, 1)
        found = F.grid_sample(second, grid, align_corners=False)
        error = (found - first).abs().mean(1)
        return error.masked_fill(~((at > 1) & (at < 95)).all(1), math.nan).flatten(1)

    fast = flow.norm(dim=1).mean((1, 2)) > 2        # (half are slow, and shapes may stand still)
    assert .2 < fast.float().mean() < .8
    right, *wrong = (error(m) for m in (flow, 0 * flow, -flow, flow.flip(1)))
    for other in wrong:
        assert (other.nanmean(1) > right.nanmean(1)).all()
        medians = [e[fast].nanmedian(1)[0].median() for e in (right, other)]
        assert medians[0] < .04 and medians[1] > 3 * medians[0]
    again = flow_scenes(16, 96, seed=1)
    assert torch.equal(again[0], first) and torch.equal(again[2], flow)
    assert not torch.equal(flow_scenes(16, 96, seed=2)[2], flow)

def test_a_layers_motion_and_its_inverse():
    """p -> (s + A p / (1 + g p)), of which the first row is worked out by hand at p = (10, 20)."""
    A, s, g = torch.tensor([[[1.1, .1], [-.2, .9]]]), torch.tensor([[[3.], [-2]]]), \
        torch.tensor([[[1e-3, -2e-3]]])
    H = torch.cat([torch.cat([A + s * g, s], 2), torch.cat([g, torch.ones(1, 1, 1)], 2)], 1)
    x, _ = project(H, torch.tensor([[[10.], [20]]]))[0, :, 0].tolist()
    assert x == pytest.approx(3 + (1.1 * 10 + .1 * 20) / (1 + 1e-3 * 10 - 2e-3 * 20))
    points = torch.rand(1, 2, 50) * 96 - 48
    back = project(torch.linalg.inv(H), project(H, points))
    torch.testing.assert_close(back, points, atol=1e-3, rtol=0)

def test_photographs_become_textures(tmp_path):
    with pytest.raises(ValueError, match="no images of 64 px or more"):
        read_photos(tmp_path)
    (tmp_path / "notes.txt").write_text("no image")
    iio.imwrite(tmp_path / "grey.png", np.full((80, 90), 7, np.uint8))
    iio.imwrite(tmp_path / "small.png", np.zeros((20, 90, 3), np.uint8))
    assert (read_image(tmp_path / "grey.png") == 7 / 255).all()
    deep = np.full((80, 90), 30_000, np.uint16)
    iio.imwrite(tmp_path / "deep.png", deep)
    assert (read_image(tmp_path / "deep.png") - 30_000 / 65_535).abs().max() < 1e-6
    (tmp_path / "deep.png").unlink()
    iio.imwrite(tmp_path / "several.gif", np.random.randint(0, 255, (3, 90, 90, 3), np.uint8))
    iio.imwrite(tmp_path / "pages.tif", np.random.randint(0, 255, (80, 90, 90), np.uint8))
    photos = read_photos(tmp_path)
    assert len(photos) == 1 and photos[0].shape == (3, 80, 90) and (photos[0] == 7).all()
    plain, taken = flow_scenes(4, 64, 3)[0], flow_scenes(4, 64, 3, photos=photos)[0]
    assert plain.shape == taken.shape and not torch.equal(plain, taken)

"""pytest tests/test_flow.py"""
import importlib
import math
import os
import platform
import subprocess
import sys
import types
import zlib
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, bad_weights

import flow as script
from flow import (COLOURS, DIRECTIONS, HELD_OUT, MOTIONS, RAFT, SHAPES, autocast, bouncing,
                  correlation_pyramid, estimate_flow, flow_scenes, flow_to_rgb, is_held_out,
                  look_up, project, read_flow, read_image, read_photos, rgb_to_flow,
                  sprite_clip, sprite_clips, sprite_scene, torchvision_name, write_file)

CLIPS = ROOT.parent / "shared/clips"

# ---------------------------------------------------------------- the optimizer


@pytest.mark.parametrize("dtype, tolerance", ((torch.bfloat16, 1e-6), (torch.float32, .02)))
@pytest.mark.parametrize("shape", ((12, 40), (40, 12), (24, 24)))
def test_muon_is_torchs(shape, dtype, tolerance, monkeypatch):
    """torch's works in bf16 whatever the device; ours in what is fast there. With its polynomial."""
    monkeypatch.setattr(script, "fast_dtype", lambda device: dtype)
    monkeypatch.setattr(script, "POLAR", ((3.4445, -4.7750, 2.0315),) * 5)
    start = torch.randn(shape)
    ours, theirs = start.clone().requires_grad_(), start.clone().requires_grad_()
    optimizers = (script.Muon([ours], .01), torch.optim.Muon(
        [theirs], .01, weight_decay=0, adjust_lr_fn="match_rms_adamw"))
    for _ in range(4):
        ours.grad = theirs.grad = torch.randn(shape)
        for optimizer in optimizers:
            optimizer.step()
    assert (ours - theirs).norm() <= tolerance * (theirs - start).norm()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
@pytest.mark.parametrize("values", (
    torch.logspace(0, -4, 96), torch.tensor([1.] + [0.] * 95), torch.tensor([1.] + [.004] * 95),
    torch.ones(96)), ids=("of all sizes", "rank 1", "one large", "equal"))
def test_orthogonalized_keeps_singular_vectors_and_evens_out_the_values(values, dtype, monkeypatch):
    monkeypatch.setattr(script, "fast_dtype", lambda device: dtype)
    U, V = torch.linalg.qr(torch.randn(96, 96))[0], torch.linalg.qr(torch.randn(200, 96))[0]
    matrix = 7 * (U * values) @ V.T
    for given, left, right in ((matrix, U, V), (matrix.T, V, U)):
        result = script.orthogonalized(given[None])[0].float()
        diagonal = (left.T @ result @ right).diagonal()
        large = values / values.norm() >= .003
        assert ((diagonal[large] > .76) & (diagonal[large] < 1.24)).all(), diagonal
        assert (diagonal[~large].abs() < .82).all()
        others = torch.linalg.matrix_norm(result - (left * diagonal) @ right.T, 2)
        assert others < (.3 if dtype == torch.bfloat16 else .001)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's malloc")
def test_what_is_freed_is_not_asked_for_again():
    code = """if 1:
        import resource, torch, flow
        flow.device_of("cpu")
        faults = []
        for _ in range(6):
            tensors = [torch.ones(2 ** 22) for _ in range(16)]      # 16 MB each
            del tensors
            faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
        print(faults[1] - faults[0], faults[-1] - faults[2])"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert int(run.stdout.split()[1]) < 6000, run.stdout + run.stderr  # 200,000 without


def test_muon_takes_kernels_as_matrices_in_either_memory_format():
    start, grads = torch.randn(8, 6, 3, 3), torch.randn(3, 8, 6, 3, 3)
    results = []
    for weight in (start.flatten(1), start, start.to(memory_format=torch.channels_last)):
        weight = weight.clone(memory_format=torch.preserve_format).requires_grad_()
        optimizer = script.Muon([weight], .01)
        for grad in grads:
            weight.grad = grad.view(weight.shape).clone(memory_format=torch.preserve_format)
            optimizer.step()
        results.append(weight.detach().flatten(1))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=1e-6)


# ---------------------------------------------------------------- Eq. 5


def uniform_flow(u, v, H=30, W=40):
    return torch.tensor([u, v], dtype=torch.float64).view(2, 1, 1).expand(2, H, W)


@pytest.mark.parametrize("u, v, rgb", [
    (0, 0, (1, 1, 1)),                                  # still is white
    (7.5, 0, (1, 0, 0)), (15, 0, (1, 0, 0)),            # right: red; m = 1 from .15 * 50 px on
    (3.75, 0, (1, .5, .5)),                             # half the speed, half the saturation
    (-7.5, 0, (0, 1, 1)),                               # left: the opposite colour
    (7.5 * .5, 7.5 * math.sqrt(.75), (1, 1, 0)),        # 60 degrees clockwise, y being down: yellow
    (7.5 * .5, -7.5 * math.sqrt(.75), (1, 0, 1)),       # 60 degrees the other way: magenta
    (0, 7.5, (.5, 1, 0)), (0, -7.5, (.5, 0, 1)),        # down and up
])
def test_eq5_gives_the_colours_that_a_person_can_check_by_eye(u, v, rgb):
    colour = flow_to_rgb(uniform_flow(u, v))
    torch.testing.assert_close(colour[:, 3, 5], torch.tensor(rgb, dtype=torch.float64))
    assert colour.shape == (3, 30, 40)


def test_eq5_saturates_at_m_1_that_grows_with_height_and_width():
    for H, W, sigma in ((30, 40, .15), (60, 80, .15), (5, 12, .15), (12, 5, .3)):
        limit = sigma * math.sqrt(H * H + W * W)
        for factor in (.25, .999, 1, 3):
            low = flow_to_rgb(uniform_flow(limit * factor, 0, H, W), sigma)[1, 0, 0]
            assert low == pytest.approx(1 - min(1, factor))         # green and blue fall as m rises


def test_eq5_round_trip_below_saturation_in_any_batch_shape():
    generator = torch.Generator().manual_seed(0)
    flow = torch.randn(2, 3, 2, 24, 32, generator=generator) * 2
    limit = .15 * 40
    keep = (flow.norm(dim=2) < limit)[:, :, None].expand_as(flow)
    assert keep.float().mean() > .9
    back = rgb_to_flow(flow_to_rgb(flow))
    torch.testing.assert_close(back[keep], flow[keep], atol=1e-4, rtol=1e-4)
    # beyond it the angle stays and the norm is the limit
    wide = back.norm(dim=2)[~keep[:, :, 0]]
    torch.testing.assert_close(wide, torch.full_like(wide, limit), atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------- the sprite world


def seeds_of(kind, count, start=0, rich=0.):
    """The first seeds from `start` on whose front sprite moves as `kind` says."""
    return [seed for seed in range(start, start + 400)
            if sprite_scene(seed, 2, rich)["sprites"][0]["kind"] == kind][:count]


def paths_of(kind, count=8, T=2001):
    """Finely sampled scenes of a kind: scene, path (T, 3) of each sprite in px, frame duration."""
    for seed in seeds_of(kind, count):
        scene = sprite_clip(seed, T, 4, rich=0.)[3]
        yield scene, [sprite["path"] for sprite in scene["sprites"]], 1 / (T - 1)


@pytest.mark.parametrize("kind", MOTIONS)
def test_flow_takes_each_pixel_of_a_sprite_to_where_the_next_frame_shows_it(kind):
    H, moving, still = 64, [], []
    seeds = seeds_of(kind, 4) + seeds_of(kind, 4, rich=1.)
    y, x = torch.meshgrid(torch.arange(H), torch.arange(H), indexing="ij")
    for seed, rich in zip(seeds, [0.] * 4 + [1.] * 4):
        video, flow, _, scene = sprite_clip(seed, 16, H, rich)
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
        _, flow, _, scene = sprite_clip(seed, 12, 32, rich=0.)
        (cx, cy, angle), (_, _, after) = scene["sprites"][0]["path"][4:6]
        for row, col in flow[4].norm(dim=0).nonzero().tolist():
            arm = complex(col + .5 - cx, row + .5 - cy)
            moved = arm * np.exp(1j * (after - angle)) - arm
            u, v = flow[4, :, row, col].tolist()
            assert abs(complex(u, v) - moved) < 1e-3


@pytest.mark.parametrize("kind", ("move", "zigzag", "orbit", "fall", "collide"))
def test_flow_of_a_sprite_that_does_not_turn_is_its_step(kind):
    for seed in seeds_of(kind, 3):
        _, flow, _, scene = sprite_clip(seed, 12, 32, rich=0.)
        for path in (sprite["path"] for sprite in scene["sprites"]):
            for k, (x, y) in enumerate(path[:-1, :2].astype(int)):
                np.testing.assert_allclose(flow[k, :, y, x], (path[k + 1] - path[k])[:2], atol=1e-4)


@pytest.mark.parametrize("kind", ("move", "zigzag", "spin", "orbit"))
def test_captions_name_the_direction_that_one_sees(kind):
    for seed in seeds_of(kind, 12):
        _, flow, caption, scene = sprite_clip(seed, 16, 48, rich=0.)
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
        video, _, caption, scene = sprite_clip(seed, 8, 48, rich=1.)
        for sprite in scene["sprites"]:
            assert f"a {sprite['colour']} {sprite['shape']}" in caption
        x, y, _ = scene["sprites"][0]["path"][3]
        shown = video[3, :, int(y), int(x)].tolist()
        assert shown == pytest.approx(COLOURS[scene["sprites"][0]["colour"]], abs=1e-4)
        assert scene["background"]["kind"] in caption


# ---------------------------------------------------------------- RAFT


@pytest.fixture(scope="module")
def raft():
    torch.manual_seed(0)
    return RAFT().eval().requires_grad_(False)


def test_raft_is_the_small_model_of_990162_parameters(raft):
    assert sum(p.numel() for p in raft.parameters()) == 990_162


def test_look_up_equals_a_loop_over_the_window_of_every_level():
    torch.manual_seed(0)
    h, w, (f1, f2) = 16, 20, torch.randn(2, 1, 32, 16, 20)
    coords = torch.rand(1, 2, h, w) * 30 - 5                            # some lie outside
    out = look_up(correlation_pyramid(f1, f2), coords)
    assert out.shape == (1, 4 * 49, h, w)
    for y, x in ((0, 0), (7, 3), (15, 19)):
        corr = (f1[0, :, y, x] @ f2[0].flatten(1)).view(1, 1, h, w) / math.sqrt(32)
        for level in range(4):
            for i, dx in enumerate(range(-3, 4)):
                for j, dy in enumerate(range(-3, 4)):
                    px = coords[0, 0, y, x].item() / 2 ** level + dx
                    py = coords[0, 1, y, x].item() / 2 ** level + dy
                    value = sum(corr[0, 0, b, a].item() * (1 - abs(px - a)) * (1 - abs(py - b))
                                for a in (math.floor(px), math.floor(px) + 1)
                                for b in (math.floor(py), math.floor(py) + 1)
                                if 0 <= a < corr.shape[3] and 0 <= b < corr.shape[2])
                    assert out[0, level * 49 + i * 7 + j, y, x] == pytest.approx(value, abs=1e-4)
            corr = F.avg_pool2d(corr, 2)


@pytest.mark.parametrize("H, W", [(1, 1), (5, 9), (33, 200), (300, 260)])
def test_raft_takes_frames_of_any_size(raft, H, W):
    assert estimate_flow(raft, torch.rand(1, 2, 3, H, W), iters=1).shape == (1, 2, 2, H, W)
    flows = raft(torch.rand(1, 3, H, W), torch.rand(1, 3, H, W), iters=2)
    assert [flow.shape for flow in flows] == [(1, 2, H, W)] * 2
    assert flows[-1].isfinite().all()


@pytest.mark.parametrize("H, W, scale", [
    (64, 64, 4), (64, 100, 4), (128, 130, 2), (150, 257, 256 / 150), (300, 260, 1)])
def test_raft_flow_is_in_px_of_the_frame_although_small_ones_are_enlarged(raft, H, W, scale):
    """One cell is 8 px of the frame that the network sees."""
    (h, w), (left, right, top, bottom) = RAFT.layout(H, W)
    assert (h, w) == (round(H * scale), round(W * scale))
    cells = torch.ones(1, 2, (h + top + bottom) // 8, (w + left + right) // 8)
    flow = raft.restore(cells, H, W)
    assert flow.shape == (1, 2, H, W)
    torch.testing.assert_close(flow[0, 0], torch.full((H, W), 8 * W / w))
    torch.testing.assert_close(flow[0, 1], torch.full((H, W), 8 * H / h))


@pytest.mark.parametrize("B, T, side, dtype, within", [
    (2, 4, 64, torch.float32, 1e-3),
    (1, 12, 64, torch.float32, 1e-3),                   # 64 px: 8 pairs in a chunk, then 3
    (1, 3, 32, torch.bfloat16, .02),                    # few: there are CPUs that are slow at it
])
def test_estimate_flow_equals_raft_on_each_pair_and_repeats_the_last(raft, B, T, side, dtype,
                                                                     within, monkeypatch):
    """To rounding: sums are in another order, since the order in memory is another."""
    monkeypatch.setattr(script, "fast_dtype", lambda device: dtype)
    video = torch.rand(B, T, 3, side, side)
    flow = estimate_flow(raft, video, iters=1)
    assert torch.equal(flow[:, -1], flow[:, -2]) and flow.shape == (B, T, 2, side, side)
    for k in {0, T - 3, T - 2}:
        with autocast(video.device):
            pair = raft(video[:, k], video[:, k + 1], iters=1)[-1]
        torch.testing.assert_close(flow[:, k], pair, atol=within, rtol=1e-3)


@pytest.mark.parametrize("video, complaint", [
    (torch.rand(3, 3, 32, 32), "(B, T, 3, H, W)"),
    (torch.rand(1, 3, 4, 32, 32), "(B, T, 3, H, W)"),
    (torch.rand(1, 1, 3, 32, 32), "two frames"),
    (torch.rand(1, 2, 3, 32, 32) / 0, "NaN or infinite"),
])
def test_estimate_flow_refuses_what_is_not_a_video(raft, video, complaint):
    with pytest.raises(ValueError) as error:
        estimate_flow(raft, video)
    assert complaint in str(error.value)


def test_raft_weights_come_back_from_half_precision_and_anything_else_is_refused(raft, tmp_path):
    half = {key: value.half() for key, value in raft.state_dict().items()}
    torch.save(half, tmp_path / "good")
    loaded = RAFT.load(tmp_path / "good")
    for key, value in loaded.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, half[key].float())
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    key = next(iter(half))
    others = {"extra": {**half, "extra": half[key]}, "lacking": {**half, key: None},
              "shape": {**half, key: half[key][:1]}}
    for name, content in others.items():
        torch.save(content, tmp_path / name)
    for path in [*bad_weights(tmp_path, tmp_path / "good"), *(tmp_path / name for name in others)]:
        with pytest.raises(ValueError) as error:
            RAFT.load(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()                              # no code of the file ran


def test_shipped_raft_is_right_on_sprites():
    """(tests/endurance.py has 200 clips.)"""
    video, flow, _, _ = sprite_clips(range(HELD_OUT + 100, HELD_OUT + 112))
    error = (estimate_flow(RAFT.load(), video[:, 6:8])[:, 0] - flow[:, 6]).norm(dim=1)
    assert error.median() < .1                                  # of all pixels; most stand still
    assert error[flow[:, 6].norm(dim=1) > .05].median() < .45   # of those that move (still: 1.9)


def test_training_scenes_have_exact_flow():
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
    assert (script.read_image(tmp_path / "grey.png") == 7 / 255).all()
    deep = np.full((80, 90), 30_000, np.uint16)
    iio.imwrite(tmp_path / "deep.png", deep)
    assert (script.read_image(tmp_path / "deep.png") - 30_000 / 65_535).abs().max() < 1e-6
    (tmp_path / "deep.png").unlink()
    iio.imwrite(tmp_path / "several.gif", np.random.randint(0, 255, (3, 90, 90, 3), np.uint8))
    iio.imwrite(tmp_path / "pages.tif", np.random.randint(0, 255, (80, 90, 90), np.uint8))
    photos = read_photos(tmp_path)
    assert len(photos) == 1 and photos[0].shape == (3, 80, 90) and (photos[0] == 7).all()
    plain, taken = flow_scenes(4, 64, 3)[0], flow_scenes(4, 64, 3, photos=photos)[0]
    assert plain.shape == taken.shape and not torch.equal(plain, taken)


def test_interrupted_raft_training_ends_as_the_uninterrupted_to_the_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(script, "validate", lambda raft, out: {})
    pairs, options = script.training_pairs, dict(steps=4, batch=4, iters=1, every=1)

    def interrupted(step, *rest):
        if step == 2:
            raise KeyboardInterrupt
        return pairs(step, *rest)

    script.train_raft(tmp_path / "whole", **options)
    monkeypatch.setattr(script, "training_pairs", interrupted)
    with pytest.raises((KeyboardInterrupt, ValueError)):
        script.train_raft(tmp_path / "parts", **options)
    monkeypatch.setattr(script, "training_pairs", pairs)
    script.train_raft(tmp_path / "parts", **options)
    whole, parts = (torch.load(tmp_path / name / "raft.pt") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[k], parts[k]) for k in whole)
    with pytest.raises(ValueError, match="begun with seed 0, not 1: take another --out"):
        script.train_raft(tmp_path / "parts", **options, seed=1)
    script.train_raft(tmp_path / "other", **{**options, "steps": 1}, seed=1)
    other = torch.load(tmp_path / "other/raft.pt")
    assert not any(torch.equal(whole[k], other[k]) for k in whole if k.endswith("conv.weight"))
    with pytest.raises(ValueError, match="no such weights"):
        script.train_raft(tmp_path / "new", **options, weights="nowhere")
    assert not (tmp_path / "new").exists()


def test_raft_training_that_is_no_longer_finite_ends(tmp_path, monkeypatch):
    frame = torch.zeros(1, 3, 64, 64)
    monkeypatch.setattr(script, "training_pairs", lambda *_: (frame / 0, frame, frame[:, :2]))
    with pytest.raises(ValueError, match="10 steps in a row are not finite, up to step 10: take"):
        script.train_raft(tmp_path / "run", steps=20, batch=1, iters=1)


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("error, raised", [(OSError("disk full"), ValueError),
                                           (RuntimeError("PytorchStreamWriter failed"), ValueError),
                                           (OSError(), ValueError),
                                           (RuntimeError("can't allocate memory"), RuntimeError),
                                           (KeyboardInterrupt(), KeyboardInterrupt)])
def test_write_file_leaves_the_old_file_or_the_new_one_and_nothing_else(tmp_path, error, raised):
    def breaks(path):
        path.write_text("half")
        raise error

    path = tmp_path / "file.txt"
    write_file(path, lambda temporary: temporary.write_text("old"))
    with pytest.raises(raised):
        write_file(path, breaks)
    with pytest.raises(raised):
        write_file(tmp_path / "never.txt", breaks)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match="no such folder"):
        write_file(tmp_path / "nowhere" / "file.txt", breaks)


# ---------------------------------------------------------------- flow of files


def flo(path, flow):
    """Middlebury's format: a tag, width, height, then u and v pixel by pixel."""
    _, H, W = flow.shape
    path.write_bytes(b"PIEH" + np.array([W, H], "<i4").tobytes()
                     + flow.permute(1, 2, 0).numpy().astype("<f4").tobytes())


def test_true_flow_is_read_from_flo_files_with_unknown_pixels(tmp_path):
    flow = torch.randn(2, 5, 7)
    flow[:, 2, 3] = 1e10
    flo(tmp_path / "flow10.flo", flow)
    read, known = read_flow(tmp_path / "flow10.flo")
    assert known.sum() == 34 and not known[2, 3] and torch.equal(read[:, known], flow[:, known])
    for data in (bytes(9), np.array([-1, -1], "<i4").tobytes() + bytes(8)):
        (tmp_path / "flow10.flo").write_bytes(b"PIEH" + data)
        with pytest.raises(ValueError, match="not a .flo file"):
            read_flow(tmp_path / "flow10.flo")
    flo(tmp_path / "flow10.flo", torch.full((2, 5, 7), 1e10))
    with pytest.raises(ValueError, match="flow10.flo: no pixel's flow is known"):
        read_flow(tmp_path / "flow10.flo")


def test_true_flow_is_read_from_kittis_png(tmp_path):
    """16 bits a channel: u and v are (value - 2^15) / 64, the third says what is known."""
    flow, known = (torch.randn(2, 6, 8) * 64).round() / 64, torch.rand(6, 8) > .3
    data = np.concatenate([flow.numpy() * 64 + 2 ** 15, known[None].numpy()]).astype("<u2")
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in data.transpose(1, 2, 0))

    def chunk(kind, content):
        return (len(content).to_bytes(4, "big") + kind + content
                + zlib.crc32(kind + content).to_bytes(4, "big"))

    header = (8).to_bytes(4, "big") + (6).to_bytes(4, "big") + bytes([16, 2, 0, 0, 0])
    (tmp_path / "flow10.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(
        b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    read, seen = read_flow(tmp_path / "flow10.png")
    assert torch.equal(seen, known) and torch.equal(read[:, known], flow[:, known])
    iio.imwrite(tmp_path / "picture.png", np.full((6, 8, 3), 200, np.uint8))
    iio.imwrite(tmp_path / "depth.png", np.full((6, 8), 40_000, np.uint16))     # grey
    for name in ("nowhere.png", "picture.png", "depth.png"):
        with pytest.raises(ValueError, match="not a 16-bit png"):
            read_flow(tmp_path / name)


def test_eval_prints_the_error_of_middleburys_layout(tmp_path, run, refuses):
    video, flow, _, _ = sprite_clip(HELD_OUT, 4, 64)
    for folder in ("data/Venus", "gt/Venus"):
        (tmp_path / folder).mkdir(parents=True)
    for k in (0, 1):
        iio.imwrite(tmp_path / f"data/Venus/frame1{k}.png",
                    (video[k] * 255).round().byte().permute(1, 2, 0).numpy())
    assert "no frame10.png with" in refuses(script.main, "--eval", tmp_path)
    flo(tmp_path / "gt/Venus/flow10.flo", flow[0])
    iio.imwrite(tmp_path / "gt/Venus/flow10.png", np.zeros((64, 64, 3), np.uint8))
    code, printed, _ = run(script.main, "--eval", tmp_path)
    frames = (video[:2] * 255).round() / 255
    error = (estimate_flow(RAFT.load(), frames[None])[0, 0] - flow[0]).norm(dim=0).mean()
    assert code == 0 and f"{error:.3f} px" in printed and "mean of 1" in printed
    (tmp_path / "other/Venus").mkdir(parents=True)      # another scene of that name
    flo(tmp_path / "other/Venus/flow10.flo", flow[0] + 1)
    assert "frame10.png: is its flow" in refuses(script.main, "--eval", tmp_path)
    flo(tmp_path / "data/Venus/flow10.flo", flow[0])    # what lies beside the frames is theirs
    assert run(script.main, "--eval", tmp_path)[1] == printed
    iio.imwrite(tmp_path / "data/Venus/frame11.png", np.zeros((64, 60, 2), np.uint8))
    assert "of different sizes" in refuses(script.main, "--eval", tmp_path)
    assert "no frame10.png with" in refuses(script.main, "--eval", "")


@pytest.mark.parametrize("channels", (1, 2, 3, 4))
def test_images_lose_their_alpha_and_grey_ones_become_rgb(tmp_path, channels):
    image = np.random.default_rng(0).integers(0, 255, (5, 7, channels), np.uint8)
    iio.imwrite(tmp_path / "a.png", image[..., 0] if channels == 1 else image)
    shown = image[..., :3] if channels > 2 else image[..., :1].repeat(3, -1)
    assert torch.equal(read_image(tmp_path / "a.png"), torch.from_numpy(shown).movedim(-1, 0) / 255)


def test_the_flow_of_a_video_is_written_beside_it(tmp_path, run, refuses, capfd, monkeypatch):
    """In chunks, and with the same numbers as whole."""
    video = sprite_clip(HELD_OUT + 1, 6, 64)[0]
    path = tmp_path / "a.mp4"
    iio.imwrite(path, (video * 255).round().byte().permute(0, 2, 3, 1).numpy(), plugin="FFMPEG",
                fps=8, macro_block_size=2, output_params=["-crf", "1"])
    code, printed, _ = run(script.main, path)
    frames = torch.from_numpy(iio.imread(path, plugin="FFMPEG")).permute(0, 3, 1, 2) / 255
    flow = estimate_flow(RAFT.load(), frames[None])[0]
    size = flow[:-1].norm(dim=1)
    assert code == 0 and f"mean {size.mean():.3f} px, largest {size.max():.2f} px" in printed
    shown = torch.from_numpy(iio.imread(tmp_path / "a-flow.mp4", plugin="FFMPEG"))
    assert shown.shape == (6, 64, 64, 3)
    assert (shown.permute(0, 3, 1, 2) / 255 - flow_to_rgb(flow)).abs().mean() < .02
    script.render_flow(RAFT.load(), path, chunk=2)
    assert capfd.readouterr().out == printed
    path.write_bytes(path.read_bytes()[:300])
    assert "not a video that can be read" in refuses(script.main, path)
    assert "b.mp4: no such file" in refuses(script.main, tmp_path / "b.mp4")
    assert "no such file" in refuses(script.main, "/")
    assert "--out is the folder of --train" in refuses(script.main, path, "--out", tmp_path)
    iio.imwrite(tmp_path / "one.mp4", np.zeros((1, 32, 32, 3), np.uint8), plugin="FFMPEG", fps=8)
    assert "two frames at least" in refuses(script.main, tmp_path / "one.mp4")
    assert not (tmp_path / "one-flow.mp4").exists()


def test_a_video_that_ffmpeg_could_not_finish_is_no_video(tmp_path):
    """A full disk: ffmpeg ends, and says nothing to anyone."""
    iio.imwrite(tmp_path / "a.mp4", np.random.randint(0, 255, (6, 64, 64, 3), np.uint8),
                plugin="FFMPEG", fps=8, macro_block_size=2)
    script.check_video(tmp_path / "a.mp4", 6)
    for frames, size in ((7, 10 ** 6), (6, 3000), (6, 0)):
        (tmp_path / "b.mp4").write_bytes((tmp_path / "a.mp4").read_bytes()[:size])
        with pytest.raises(OSError, match="not whole"):
            script.check_video(tmp_path / "b.mp4", frames)


def test_the_authors_names_are_mapped_one_to_one_to_torchvisions():
    """Where the authors' file is (its path in RAFT_AUTHORS), all of it is used and nothing left."""
    assert torchvision_name("module.fnet.layer2.0.downsample.0.weight") == \
        "feature_encoder.layer2.0.downsample.0.weight"
    assert torchvision_name("module.cnet.layer1.1.conv3.bias") == \
        "context_encoder.layer1.1.convnormrelu3.0.bias"
    assert torchvision_name("module.update_block.gru.convq.weight") == \
        "update_block.recurrent_block.convgru1.convq.weight"
    if "RAFT_AUTHORS" not in os.environ:
        pytest.skip("no path to the authors' raft-small.pth in RAFT_AUTHORS")
    raft = RAFT.load(os.environ["RAFT_AUTHORS"])
    assert sum(p.numel() for p in raft.parameters()) == 990_162


def torchvision_raft(folder):
    """torchvision's module of RAFT from its sources, an unzipped wheel: what needs its compiled
    operators is never asked for."""
    def module(name, *path, **content):
        made = types.ModuleType(name)
        made.__path__ = [str(Path(folder, "torchvision", *path))]
        made.__dict__.update(content)
        return made

    stand_ins = {
        "torchvision": module("torchvision"), "torchvision.ops": module("ops", "ops"),
        "torchvision.models": module("models", "models"),
        "torchvision.models.optical_flow": module("flow", "models", "optical_flow"),
        "torchvision.transforms": module("transforms", "transforms"),
        "torchvision.transforms._presets": module("presets", OpticalFlow=None),
        "torchvision.utils": module("utils", _log_api_usage_once=lambda *_: None,
                                    _make_ntuple=lambda x, n: (x,) * n)}
    with pytest.MonkeyPatch.context() as patch:
        for name, made in stand_ins.items():
            patch.setitem(sys.modules, name, made)
        stand_ins["torchvision.ops"].Conv2dNormActivation = importlib.import_module(
            "torchvision.ops.misc").Conv2dNormActivation
        return importlib.import_module("torchvision.models.optical_flow.raft")


@pytest.mark.skipif("TORCHVISION" not in os.environ, reason="no path to an unzipped wheel of "
                    "torchvision in TORCHVISION (pip download --no-deps torchvision)")
@pytest.mark.skipif(not CLIPS.exists(), reason="no ../shared/clips: real images")
@pytest.mark.parametrize("clip", ["cockatoo.mp4", "bikes.mp4"])
def test_output_is_torchvisions_on_real_images_to_a_thousandth_of_a_pixel(clip):
    """(Where motion is faster than between two frames of these, torchvision's code itself differs
    by more between one thread and two.)"""
    raft = RAFT.load(os.environ.get("RAFT_AUTHORS", ROOT / "weights/raft.pt"))
    theirs = torchvision_raft(os.environ["TORCHVISION"]).raft_small(weights=None).eval()
    theirs.load_state_dict(raft.state_dict())
    frames = iio.imread(CLIPS / clip)[[100, 101], -272:, :488]
    first, second = torch.from_numpy(frames).permute(0, 3, 1, 2).unsqueeze(1) / 255
    with torch.no_grad():
        for a, b in zip(raft(first, second), theirs(first * 2 - 1, second * 2 - 1), strict=True):
            torch.testing.assert_close(a, b, atol=1e-3, rtol=0)
    assert a.abs().max() > 1

"""pytest tests/test_metrics.py: tracking, fitting and scoring of sprites, statistics, VBench."""
import numpy as np
import pytest
import torch

import flow as script
import metrics
from metrics import (by_prompt, cell, count_regions, fit_motion, held_out_clips, interval, paired,
                     score_clips, track, vbench, warp)
from synthetic import COLOURS, HELD_OUT, SHAPES, sprite_scene

KINDS = {"move", "zigzag", "swing", "orbit", "spin", "fall"}

@pytest.fixture(scope="module", params=(0., .9), ids="appearance {}".format)
def real(request):
    """Two clips of each kind, and their scenes, at a loudness of the background."""
    video, _, _, scenes = held_out_clips(24, 16, 64, appearance=request.param)
    kinds = [scene["sprites"][0]["kind"] for scene in scenes]
    some = [i for i, kind in enumerate(kinds) if kinds[:i].count(kind) < 2]
    return video[some], [scenes[i] for i in some]

def spoil(video):
    """Frame 7 without its sprite; a corner has the background's colour."""
    video = video.clone()
    video[:, 7] = video[:, 7, :, :1, :1]
    return video

def test_static_share_of_a_known_variance():
    """Half of the clips are 0, half 1; every other frame has .5 added in half of its pixels."""
    video = torch.zeros(8, 4, 3, 16, 16)
    video[4:] += 1
    assert metrics.static_share(video) == pytest.approx(1)
    video[:, ::2, :, :8] += .5
    still, moving = .25 + .125 ** 2, .25 ** 2 / 2
    assert metrics.static_share(video) == pytest.approx(still / (still + moving))

def test_held_out_clips_have_unseen_seeds_and_one_sprite():
    video, flow, captions, scenes = held_out_clips(12, 3, 32)
    assert video.shape == (12, 3, 3, 32, 32) and flow.shape == (12, 3, 2, 32, 32)
    assert len({scene["seed"] for scene in scenes}) == 12
    for caption, scene in zip(captions, scenes):
        (s,) = scene["sprites"]
        assert caption == f"a {s['colour']} {s['shape']} {s['phrase']}"
        assert scene["seed"] >= HELD_OUT and scene["background"]["kind"] == "plain"

def test_track_follows_the_true_path(real):
    for clip, scene in zip(*real):
        sprite = scene["sprites"][0]
        in_frame, shape, path, _ = track(clip, sprite["colour"], sprite["shape"])
        assert in_frame.all() and shape == sprite["shape"], scene["caption"]
        off = path - sprite["path"]
        assert np.abs(off[:, :2]).max() < .8, scene["caption"]          # px
        if sprite["shape"] != "circle":         # radians, up to a turn that changes nothing
            assert np.ptp(off[:, 2]) < .2, scene["caption"]

def test_score_clips_accepts_real_clips(real):
    rows = score_clips(*real)
    assert {row["kind"] for row in rows} == KINDS
    for row, scene in zip(rows, real[1]):
        assert all(row[key] for key in ("detected", "single", "shape", "motion_ok",
                                        "single_motion_ok")) and row["error"] < .7, row
        assert row["held_out"] == scene["held_out"]

def test_score_clips_rejects_wrong_motion_a_missing_sprite_and_others(real):
    video, scenes = real
    for row in score_clips(video.flip(1), scenes):
        assert row["detected"] and row["shape"]
        assert row["kind"] == "swing" or not row["motion_ok"], row      # a swing is one backwards
    for row in score_clips(video[:, :1].expand_as(video), scenes):
        assert row["detected"] and not row["motion_ok"], row            # nothing moves
    others = {key: [{**scene, "sprites": [{**s, key: names[names.index(s[key]) - 1]}]}
                    for scene in scenes for s in scene["sprites"]]
              for key, names in (("colour", list(COLOURS)), ("shape", SHAPES))}
    for row in score_clips(video, others["shape"]):
        assert row["detected"] and not row["shape"], row
    for row in score_clips(spoil(video), scenes) + score_clips(video, others["colour"]):
        assert not row["detected"] and not row["motion_ok"] and row["error"] is None, row

def test_score_clips_tells_two_sprites_from_one(real):
    video, shifted = real[0], real[0].roll(24, -1)      # a second one, 24 px to the right
    chroma = shifted - shifted.mean(2, keepdim=True)
    second = (chroma - chroma[..., :1, :1]).abs().amax(2, keepdim=True) > .02
    rows = score_clips(torch.where(second, shifted, video), real[1])
    assert any(row["motion_ok"] for row in rows)        # both move as named
    assert not any(row["single"] or row["single_motion_ok"] for row in rows)
    rows = score_clips(torch.where(second, shifted.roll(1, 2), video), real[1])
    assert not any(row["detected"] for row in rows)     # the second one has another colour

def test_the_samples_of_a_prompt_are_averaged(real):
    video, scenes = real[0][:3], real[1][:3]
    again = torch.cat([video[:1], spoil(video[1:2]), video[2:]])
    once, twice = score_clips(video, scenes), score_clips(torch.cat([video, again]), scenes)
    assert twice[:3] == once and len(twice) == 6
    twice = by_prompt(twice, 3)
    assert [row["detected"] for row in twice] == [1, .5, 1] and twice[0] == once[0]
    assert twice[1]["error"] == once[1]["error"]        # of those detected

def test_fit_motion_accepts_true_paths_and_rejects_faster_ones():
    scenes = [sprite_scene(HELD_OUT + i, 16, 0)["sprites"] for i in range(60)]
    sprites = [s for s, *others in scenes if not others]
    assert {s["kind"] for s in sprites} == KINDS
    for s in sprites:
        path = s["path"] * [64, 64, 1]
        # a ball falls as far, in a third of the time; else twice and more, as 30% are allowed
        fast = path[[*range(0, 16, 3), *[15] * 10]] if s["kind"] == "fall" else 2.2 * path
        verdicts = [fit_motion(s["kind"], s["phrase"], p, 64)[1] for p in (path, fast)]
        assert verdicts == [True, False], s
    tau, shaking = np.linspace(0, 1, 16), (-1.) ** np.arange(16)
    path = np.stack([10 + 24 * tau, 32 + shaking, 0 * tau], 1)
    error, _ = fit_motion("move", "moves right", path, 64)      # y is off by 1 px, x by nothing
    assert error == pytest.approx(.5 ** .5, rel=.02)
    with pytest.raises(ValueError, match="collide: not the motion of one sprite"):
        fit_motion("collide", "collide", path, 64)

def test_count_regions_connects_corners_and_leaves_out_specks():
    mask = torch.zeros(3, 8, 8, dtype=bool)
    mask[0, 1:3, 1:3] = mask[0, 3:5, 3:5] = True            # they touch at a corner: one
    mask[1, :3, :3] = mask[1, 5:, 5:] = mask[1, 0, 7] = True
    assert count_regions(mask, 2).tolist() == [1, 2, 0]
    assert count_regions(mask, 1).tolist() == [1, 3, 0]

def test_interval_brackets_the_statistic_and_shrinks_with_more_prompts():
    values = np.random.default_rng(1).normal(3, 1, 400)
    mean, low, high = interval(values)
    assert low < mean == values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=.08)
    median, below, above = interval(values[:25], np.median)
    assert below < median == np.median(values[:25]) < above and above - below > 2 * (high - low)

def test_wilson_interval_solves_its_equation():
    """Both ends solve |p - end| = z sqrt(end (1 - end) / n)."""
    for hits, n in ((0, 97), (3, 10), (52, 53), (53, 53)):
        p, low, high = interval([1] * hits + [0] * (n - hits), share=True)
        assert p == hits / n and 0 <= low <= p <= high <= 1
        for end in (low, high):
            assert abs(p - end) == pytest.approx(1.959964 * (end * (1 - end) / n) ** .5, abs=1e-9)
    assert interval([.5, 0, 1], share=True) == interval([.5, 0, 1])     # several samples a prompt

def test_paired_sees_a_small_difference_that_two_intervals_hide():
    rng = np.random.default_rng(2)
    a = rng.normal(0, 1, 200)
    b = a - .1 + rng.normal(0, .2, 200)
    mean, low, high, p = paired(a - b)
    assert mean == pytest.approx((a - b).mean()) and 0 < low < mean < high and p < .001
    assert interval(a)[1] < interval(b)[2]                  # unpaired, they overlap
    assert paired(b - a)[3] < .001 and paired(a - a)[3] == 1
    assert paired([-1.] * 4)[3] == pytest.approx(2 / 16, abs=.02)   # of 16 signs two are as extreme

def test_cell_has_an_interval_and_says_how_many_clips_have_a_value():
    assert cell([True] * 53, 100, share=True) == "100.0 [93.2, 100.0]"
    assert cell([False] * 97, 100, share=True) == "0.0 [0.0, 3.8]"
    assert cell([1.] * 5, 100) == "100.0 [100.0, 100.0]"    # no share: flicker
    assert cell([0.] * 53) == "0.00 [0.00, 0.00]"           # nor this: an error in px
    assert cell([2., None, 2.]) == "2.00 [2.00, 2.00], n = 2" and cell([None]) == "-"

def test_warping_back_by_the_flow_gives_the_frame():
    image = torch.rand(1, 3, 16, 16)
    flow = torch.tensor([2., -1]).view(1, 2, 1, 1).expand(1, 2, 16, 16)
    torch.testing.assert_close(warp(image, flow)[..., 1:, :14], image[..., :15, 2:])

@pytest.mark.parametrize("pairs, speed, dynamic", [
    (3, 3.1, False), (4, 3.1, True), (4, 2.9, False)])
def test_vbench_dynamic_degree_counts_pairs_by_the_fastest_pixels(pairs, speed, dynamic,
                                                                  monkeypatch):
    """Of 16 frames 4 pairs have to move: the mean of the top 5% above 6 px of 256."""
    flow = torch.zeros(1, 16, 2, 64, 64)
    flow[0, :pairs, 0].view(pairs, -1)[:, :103] = speed     # half of 5%: at 3.1 1.56 > 1.5
    for module in (script, metrics):
        monkeypatch.setattr(module, "estimate_flow", lambda raft, video: flow[:, :video.shape[1]])
    video = torch.zeros(16, 3, 64, 64)
    assert vbench(video.unbind, 8, None)["dynamic"] == dynamic

def test_vbench_flicker_and_smoothness_of_a_known_motion(monkeypatch):
    """Things move by 1 px a frame: with the exact flow every odd frame is predicted."""
    video, lengths = torch.zeros(9, 3, 24, 24), []
    for t, frame in enumerate(video):
        frame[:, 8:14, 5 + t:9 + t] = torch.arange(72.).view(3, 6, 4) * 37 % 72 / 72

    def exact(raft, frames):
        lengths.append(frames.shape[1])
        right = torch.equal(frames[0, 1], frames[0, 0].roll(2, -1))
        flow = torch.zeros(1, frames.shape[1], 2, 24, 24)
        flow[:, :, 0] = 2 if right else -2
        return flow

    for module in (script, metrics):
        monkeypatch.setattr(module, "estimate_flow", exact)
    row = vbench(video.unbind, 16, None)
    assert row["flicker"] == pytest.approx(1 - (video[1:] - video[:-1]).abs().mean().item())
    assert row["smooth"] == pytest.approx(1, abs=1e-5) and row["flicker"] < .99
    assert vbench(video.unbind, 32, None)["dynamic"] is True and 3 in lengths   # 1/8 s apart
    assert vbench(video[:2].unbind, 8, None)["smooth"] is None                  # too short
    one = vbench(video[:1].unbind, 8, None)
    assert one == {"dynamic": None, "flicker": None, "smooth": None}

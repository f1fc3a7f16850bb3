"""pytest tests/test_metrics.py: tracking, fitting, scores, statistics, VBench's formulas."""
import functools

import numpy as np
import pytest
import torch

import metrics
from flow import RAFT
from metrics import (cell, count_regions, fit_motion, held_out_clips, interval, paired, score_clips,
                     track, vbench, warp)
from synthetic import COLOURS, sprite_clips

@pytest.fixture(scope="module")
def real():
    video, _, captions, scenes = held_out_clips(24, 16, 64)
    (sprites,) = zip(*(scene["sprites"] for scene in scenes))
    assert captions == [f"a {s['colour']} {s['shape']} {s['phrase']}" for s in sprites]
    return video, scenes

@pytest.fixture(autouse=True)
def cheap(monkeypatch):
    """Nothing here is about how good RAFT's flow is."""
    monkeypatch.setattr(metrics, "estimate_flow", functools.partial(metrics.estimate_flow, iters=1))

def test_score_clips_accepts_real_clips(real):
    rows = score_clips(*real)
    assert {row["kind"] for row in rows} == {"move", "zigzag", "swing", "orbit", "spin", "fall"}
    for row in rows:
        assert row["detected"] and row["shape"] and row["single_motion_ok"] and row["error"] < .7, row
    for clip, scene in zip(*real):
        sprite = scene["sprites"][0]
        off = track(clip, sprite["colour"], sprite["shape"])[2] - sprite["path"]
        assert np.abs(off[:, :2]).max() < .8, scene["caption"]          # px
        if sprite["shape"] != "circle":         # radians, up to a turn that changes nothing
            assert np.ptp(off[:, 2]) < .2, scene["caption"]

def test_score_clips_rejects_reversed_clips(real):
    for row in score_clips(real[0].flip(1), real[1]):
        assert row["detected"] and row["shape"] and (row["kind"] == "swing" or not row["motion_ok"]), row

def test_score_clips_rejects_missing_and_wrong_sprites(real):
    video, colours = real[0].clone(), list(COLOURS)
    video[:, 7] = video[:, 7, :, :1, :1]        # a corner's colour is the background's
    others = [{**scene, "sprites": [{**s, "colour": colours[(colours.index(s["colour"]) + 1) % 6]}]}
              for scene in real[1] for s in scene["sprites"]]
    for row in score_clips(video, real[1]) + score_clips(real[0], others):
        assert not row["detected"] and not row["motion_ok"], row

def test_score_clips_tells_two_sprites_from_one(real):
    video, shifted = real[0], real[0].roll(24, -1)      # a second one beside it, 24 px to the right
    second = (shifted - shifted[..., :1, :1]).abs().amax(2, keepdim=True) > .02
    rows = score_clips(torch.where(second, shifted, video), real[1])
    assert sum(row["motion_ok"] for row in rows) > len(rows) / 10
    assert not any(row["single"] or row["single_motion_ok"] for row in rows)

def test_score_clips_averages_samples_of_a_prompt(real):
    video, scenes = real[0][:3], real[1][:3]
    spoiled = video.clone()
    spoiled[1, 7] = spoiled[1, 7, :, :1, :1]            # there in one sample of two
    once, twice = score_clips(video, scenes), score_clips(torch.cat([video, spoiled]), scenes)
    assert [row["detected"] for row in twice] == [1, .5, 1] and len(once) == len(twice) == 3
    assert twice[0] == once[0] and twice[1]["error"] == once[1]["error"]

def test_fit_motion_rejects_twice_the_speed(real):
    for s in (scene["sprites"][0] for scene in real[1]):
        # .2 more, as amounts may be 30% off; a ball falls as far as it did, in half the time
        fast = 2.2 * s["path"] if s["kind"] != "fall" else s["path"][[*range(0, 16, 2), *[15] * 8]]
        verdicts = [fit_motion(s["kind"], s["phrase"], path, 64)[1] for path in (s["path"], fast)]
        assert verdicts == [True, False], s

def test_what_stands_still_has_no_speed(real):
    moves = [i for i, s in enumerate(real[1]) if s["sprites"][0]["kind"] in ("move", "spin")]
    video, scenes = real[0][moves], [real[1][i] for i in moves]
    assert len(moves) > 4 and all(row["speed"] for row in score_clips(video, scenes))
    assert not any(row["speed"] for row in score_clips(video[:, :1].expand_as(video), scenes))

def test_intervals_bracket_the_statistic_and_shrink_with_more_prompts():
    values = np.random.default_rng(1).normal(3, 1, 400)
    mean, low, high = interval(values)
    assert low < mean == values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 / 20, rel=.2)
    median, below, above = interval(values[:25], np.median)
    assert below < median == np.median(values[:25]) < above and above - below > 2 * (high - low)

def test_wilson_interval_solves_its_equation():
    """Both ends solve |p - end| = z sqrt(end (1 - end) / n): more in 100 is never a lower end."""
    for hits, n in ((0, 97), (3, 10), (52, 53), (53, 53)):
        p, low, high = interval([1] * hits + [0] * (n - hits), share=True)
        assert p == hits / n
        for end in (low, high):
            assert abs(p - end) == pytest.approx(1.959964 * (end * (1 - end) / n) ** .5, abs=1e-9)
    assert interval([.5, 0, 1], share=True) == interval([.5, 0, 1])     # of several samples each
    assert cell([True] * 53, 100, share=True) == "100.0 [93.2, 100.0]"
    assert cell([False] * 97, 100, share=True) == "0.0 [0.0, 3.8]"
    assert cell([1.] * 5, 100) == "100.0 [100.0, 100.0]"          # not a share: no flicker
    assert cell([0.] * 53) == "0.00 [0.00, 0.00]"                 # nor this: an error, in px

def test_count_regions_connects_corners_and_leaves_out_specks():
    mask = torch.zeros(3, 8, 8, dtype=bool)
    mask[0, 1:3, 1:3] = mask[0, 3:5, 3:5] = True            # they touch at a corner: one
    mask[1, :3, :3] = mask[1, 5:, 5:] = mask[1, 0, 7] = True
    assert count_regions(mask, 2).tolist() == [1, 2, 0]
    assert count_regions(mask, 1).tolist() == [1, 3, 0]

def test_paired_sees_a_small_difference_that_the_two_intervals_hide():
    rng = np.random.default_rng(2)
    a = rng.normal(0, 1, 200)
    b = a - .1 + rng.normal(0, .2, 200)
    mean, low, high, p = paired(a, b)
    assert mean == pytest.approx((a - b).mean()) and 0 < low < mean < high and p < .001
    assert interval(a)[1] < interval(b)[2]                  # unpaired, they overlap
    assert paired(a, a)[3] == 1

def test_vbench_metrics_by_their_formulas():
    raft = RAFT.load()
    still = sprite_clips([11], 1, 64, 0)[0][0].expand(8, 3, 64, 64)
    assert vbench(still, 8, raft) == {"dynamic": False, "flicker": 1, "smooth": pytest.approx(
        1, abs=1e-3)}
    video = sprite_clips([11], 8, 64, 0)[0]
    row = vbench(video[0], 8, raft)
    assert row["flicker"] == pytest.approx(1 - (video[0, 1:] - video[0, :-1]).abs().mean().item())
    assert vbench(video[0][:1].repeat(2, 1, 1, 1), 8, raft)["smooth"] is None

def test_warping_back_by_the_flow_gives_the_frame():
    image = torch.rand(1, 3, 16, 16)
    flow = torch.tensor([2., -1]).view(1, 2, 1, 1).expand(1, 2, 16, 16)
    moved = warp(image, flow)
    torch.testing.assert_close(moved[..., 1:, :14], image[..., :15, 2:])

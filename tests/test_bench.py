"""pytest tests/test_bench.py"""
import json

import numpy as np
import pytest

import bench
from bench import fit_motion, held_out_clips, interval, judge, track
from flow import COLOURS


@pytest.fixture(scope="module")
def real():
    video, _, captions, scenes = held_out_clips(24, 16, 64)
    (sprites,) = zip(*(scene["sprites"] for scene in scenes))
    assert captions == [f"a {s['colour']} {s['shape']} {s['phrase']}" for s in sprites]
    return video, scenes


def test_real_clips_are_there_in_shape_and_move_as_named(real):
    rows = judge(*real)
    assert {row["kind"] for row in rows} == {"move", "zigzag", "swing", "orbit", "spin", "fall"}
    for row in rows:
        assert row["there"] and row["shape"] and row["named"] and row["error"] < .7, row
    for clip, scene in zip(*real):
        sprite = scene["sprites"][0]
        off = track(clip, sprite["colour"], sprite["shape"])[2] - sprite["path"]
        assert np.abs(off[:, :2]).max() < .8, scene["caption"]          # px
        if sprite["shape"] != "circle":         # radians, up to a turn that changes nothing
            assert np.ptp(off[:, 2]) < .2, scene["caption"]


def test_reversed_clips_lose_but_for_swings_which_are_swings_backwards_too(real):
    for row in judge(real[0].flip(1), real[1]):
        assert row["there"] and row["shape"] and (row["kind"] == "swing" or not row["named"]), row


def test_sprites_that_are_missing_in_one_frame_or_of_another_colour_lose(real):
    video, colours = real[0].clone(), list(COLOURS)
    video[:, 7] = video[:, 7, :, :1, :1]        # a corner's colour is the background's
    others = [{**scene, "sprites": [{**s, "colour": colours[(colours.index(s["colour"]) + 1) % 6]}]}
              for scene in real[1] for s in scene["sprites"]]
    for row in judge(video, real[1]) + judge(real[0], others):
        assert not row["there"] and not row["named"], row


def test_twice_the_speed_loses(real):
    for s in (scene["sprites"][0] for scene in real[1]):
        # .2 more, as amounts may be 30% off; a ball falls as far as it did, in half the time
        fast = 2.2 * s["path"] if s["kind"] != "fall" else s["path"][[*range(0, 16, 2), *[15] * 8]]
        verdicts = [fit_motion(s["kind"], s["phrase"], path, 64)[1] for path in (s["path"], fast)]
        assert verdicts == [True, False], s


def test_intervals_bracket_the_statistic_and_shrink_with_more_prompts():
    values = np.random.default_rng(1).normal(3, 1, 400)
    mean, low, high = interval(values)
    assert low < mean == values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 / 20, rel=.2)
    median, below, above = interval(values[:25], np.median)
    assert below < median == np.median(values[:25]) < above and above - below > 2 * (high - low)


def test_the_table_has_a_row_for_each_model(bundle, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, said, err = run(bench.main, "sprites", "--run", bundle, "--n", 3, "--steps", 2)
    assert not code, err
    for name in ("real clips", "through the TAE", "base", "control", "jam, w2 = 0", "jam, w2 = 3"):
        assert said.count(f"| {name} |") == 2
    assert len(json.loads((tmp_path / "runs/bench/sprites.json").read_text())["base"]) == 3

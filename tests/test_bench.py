"""pytest tests/test_bench.py"""
import functools
import json
import re

import numpy as np
import pytest
import torch

import bench
from bench import fit_motion, held_out_clips, interval, judge, track
from flow import COLOURS
from train import write_video
from videojam import VideoJAM


@pytest.fixture(scope="module")
def real():
    video, _, captions, scenes = held_out_clips(24, 16, 64)
    (sprites,) = zip(*(scene["sprites"] for scene in scenes))
    assert captions == [f"a {s['colour']} {s['shape']} {s['phrase']}" for s in sprites]
    return video, scenes


@pytest.fixture(autouse=True)
def cheap(monkeypatch):
    monkeypatch.setattr(bench, "can_compile", lambda device: False)     # tiny models: not worth it
    # nothing here is about how good RAFT's flow is
    monkeypatch.setattr(bench, "estimate_flow", functools.partial(bench.estimate_flow, iters=1))


def test_real_clips_are_there_in_shape_and_move_as_named(real):
    rows = judge(*real)
    assert {row["kind"] for row in rows} == {"move", "zigzag", "swing", "orbit", "spin", "fall"}
    for row in rows:
        assert row["there"] and row["shape"] and row["whole"] and row["error"] < .7, row
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


def test_two_sprites_that_move_as_named_together_are_not_one_that_does(real):
    video, shifted = real[0], real[0].roll(24, -1)      # a second one beside it, 24 px to the right
    second = (shifted - shifted[..., :1, :1]).abs().amax(2, keepdim=True) > .02
    rows = judge(torch.where(second, shifted, video), real[1])
    assert sum(row["named"] for row in rows) > len(rows) / 10
    assert not any(row["one"] or row["whole"] for row in rows)


def test_several_samples_of_a_prompt_count_as_their_mean(real):
    video, scenes = real[0][:3], real[1][:3]
    spoiled = video.clone()
    spoiled[1, 7] = spoiled[1, 7, :, :1, :1]            # there in one sample of two
    once, twice = judge(video, scenes), judge(torch.cat([video, spoiled]), scenes)
    assert [row["there"] for row in twice] == [1, .5, 1] and len(once) == len(twice) == 3
    assert twice[0] == once[0] and twice[1]["error"] == once[1]["error"]


def test_twice_the_speed_loses(real):
    for s in (scene["sprites"][0] for scene in real[1]):
        # .2 more, as amounts may be 30% off; a ball falls as far as it did, in half the time
        fast = 2.2 * s["path"] if s["kind"] != "fall" else s["path"][[*range(0, 16, 2), *[15] * 8]]
        verdicts = [fit_motion(s["kind"], s["phrase"], path, 64)[1] for path in (s["path"], fast)]
        assert verdicts == [True, False], s


def test_what_stands_still_has_no_speed_not_even_a_slow_one(real):
    moves = [i for i, s in enumerate(real[1]) if s["sprites"][0]["kind"] in ("move", "spin")]
    video, scenes = real[0][moves], [real[1][i] for i in moves]
    assert len(moves) > 4 and all(row["speed"] for row in judge(video, scenes))
    assert not any(row["speed"] for row in judge(video[:, :1].expand_as(video), scenes))


def test_intervals_bracket_the_statistic_and_shrink_with_more_prompts():
    values = np.random.default_rng(1).normal(3, 1, 400)
    mean, low, high = interval(values)
    assert low < mean == values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 / 20, rel=.2)
    median, below, above = interval(values[:25], np.median)
    assert below < median == np.median(values[:25]) < above and above - below > 2 * (high - low)


def test_the_interval_of_a_share_is_wilsons():
    """Both ends solve |p - end| = z sqrt(end (1 - end) / n): more in 100 is never a lower end."""
    for hits, n in ((0, 97), (3, 10), (52, 53), (53, 53)):
        p, low, high = interval([1] * hits + [0] * (n - hits), share=True)
        assert p == hits / n
        for end in (low, high):
            assert abs(p - end) == pytest.approx(1.959964 * (end * (1 - end) / n) ** .5, abs=1e-9)
    assert interval([.5, 0, 1], share=True) == interval([.5, 0, 1])     # of several samples each
    assert bench.cell([True] * 53, 100, share=True) == "100.0 [93.2, 100.0]"
    assert bench.cell([False] * 97, 100, share=True) == "0.0 [0.0, 3.8]"
    assert bench.cell([1.] * 5, 100) == "100.0 [100.0, 100.0]"          # not a share: no flicker
    assert bench.cell([0.] * 53) == "0.00 [0.00, 0.00]"                 # nor this: an error, in px


def test_blobs_are_counted_with_corners_connected_and_specks_left_out():
    mask = torch.zeros(3, 8, 8, dtype=bool)
    mask[0, 1:3, 1:3] = mask[0, 3:5, 3:5] = True            # they touch at a corner: one
    mask[1, :3, :3] = mask[1, 5:, 5:] = mask[1, 0, 7] = True
    assert bench.blobs(mask, 2).tolist() == [1, 2, 0]
    assert bench.blobs(mask, 1).tolist() == [1, 3, 0]


def test_paired_sees_a_small_difference_that_the_two_intervals_hide():
    rng = np.random.default_rng(2)
    a = rng.normal(0, 1, 200)
    b = a - .1 + rng.normal(0, .2, 200)
    mean, low, high, p = bench.paired(a, b)
    assert mean == pytest.approx((a - b).mean()) and 0 < low < mean < high and p < .001
    assert interval(a)[1] < interval(b)[2]                  # unpaired, they overlap
    assert bench.paired(a, a)[3] == 1


def test_vbench_metrics_by_their_formulas():
    raft = bench.RAFT.load()
    still = bench.sprite_clips([11], 1, 64, 0)[0][0].expand(8, 3, 64, 64)
    assert bench.vbench(still, 8, raft) == {"dynamic": False, "flicker": 1, "smooth": pytest.approx(
        1, abs=1e-3)}
    video = bench.sprite_clips([11], 8, 64, 0)[0]
    row = bench.vbench(video[0], 8, raft)
    assert row["flicker"] == pytest.approx(1 - (video[0, 1:] - video[0, :-1]).abs().mean().item())
    assert bench.vbench(video[0][:1].repeat(2, 1, 1, 1), 8, raft)["smooth"] is None


def test_warping_back_by_the_flow_gives_the_frame():
    image = torch.rand(1, 3, 16, 16)
    flow = torch.tensor([2., -1]).view(1, 2, 1, 1).expand(1, 2, 16, 16)
    moved = bench.warp(image, flow)
    torch.testing.assert_close(moved[..., 1:, :14], image[..., :15, 2:])


def test_frechet_distance_of_gaussians():
    a = torch.randn(20000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    b, wider = bench.moments(a), bench.moments(2 * a + torch.tensor([1., 0, 0]))
    assert bench.frechet(b, b) == pytest.approx(0, abs=1e-6)
    # means 1 apart in one of three features, deviations doubled: 1 + 3 (2 - 1)^2
    assert bench.frechet(wider, b) == pytest.approx(4, abs=.1)


def test_frame_distance_has_an_interval_over_clips_that_narrows_with_their_number():
    clips = torch.rand(96, 4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    clips *= torch.linspace(.5, 1, 96).view(-1, 1, 1, 1, 1)     # clips differ, frames of one less
    widths = []
    for n in (24, 96):
        video = clips[::96 // n]
        value, low, high = map(float, re.findall(r"[\d.]+", bench.distance_cell(video, clips, n)))
        expected = bench.frechet(*(bench.moments(bench.frame_statistics(v))
                                   for v in (video, clips)))
        assert value == pytest.approx(expected, abs=.006) and low < high
        widths.append(high - low)
    assert widths[1] < widths[0]
    # twice the same samples of each prompt say no more than once
    assert bench.distance_cell(torch.cat([clips, clips]), clips, 96)[5:] == \
        bench.distance_cell(clips, clips, 96)[5:]


def test_every_experiment_writes_its_tables_and_a_page_that_holds_all(bundle, run, tmp_path,
                                                                      monkeypatch):
    many = bench.times_by_turns
    monkeypatch.setattr(bench, "times_by_turns", lambda functions, device, *_: many(
        functions, device, 1, 0))
    code, said, err = run(bench.main, "--run", bundle, "--n", 2, "--steps", 2, "--out", tmp_path,
                          "--batch", 2)
    assert not code, err
    assert (tmp_path / "motivation-0.svg").read_text().count("<polyline") == 4
    for row in ("real clips", "through the TAE", "base", "control", "VideoJAM, w2 = 0",
                "VideoJAM, w2 = 3", "d = 0 at inference", "InstructPix2Pix", "jam, step 60",
                "jam, d = 0"):
        assert f"| {row} |" in said, row
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results) == {"motivation", "compare", "ablation", "sdedit"}
    assert len(results["compare"]["clips"]["base"]) == 2
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 2 and page.count("data:video/mp4;base64,") > 8
    assert "://" not in page.replace("http://www.w3.org", "")       # nothing is fetched
    assert json.loads(said.splitlines()[-1])["sampling, inner / cfg"] > 0
    assert not list(tmp_path.glob(".*"))


def test_what_would_fail_at_the_end_is_said_before_anything_is_drawn(bundle, refuses, tmp_path,
                                                                     monkeypatch):
    monkeypatch.setattr(VideoJAM, "generate", None)
    (tmp_path / "file").write_text("")
    assert "nowhere/model.pt: no such file" in refuses(
        bench.main, "ablation", "--run", bundle, "--n", 1, "--also", tmp_path / "nowhere",
        "--out", tmp_path / "out")
    assert "file: File exists" in refuses(bench.main, "motivation", "--run", bundle, "--n", 1,
                                          "--out", tmp_path / "file")


def test_a_path_where_an_experiment_takes_none_is_not_taken_for_a_run(bundle, refuses, tmp_path):
    for experiment in (*bench.EXPERIMENTS, "speed"):
        assert "named by --run" in refuses(bench.main, experiment, bundle, "--out", tmp_path / "x")


def test_an_unknown_preset_is_refused_before_anything_is_drawn(bundle, refuses, tmp_path):
    assert "unknown preset 'huge': one of toy, small, 4b, 30b" in refuses(
        bench.main, "--run", bundle, "--preset", "huge", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_models_that_a_bundle_lacks_are_left_out(bundle, run, tmp_path):
    jam = bench.VideoJAM.load(bundle / "model.pt")
    jam.save(tmp_path / "model.pt")
    code, said, err = run(bench.main, "compare", "--run", tmp_path, "--n", 1, "--steps", 1,
                          "--out", tmp_path / "out")
    assert not code and "no control model" in said and "| base |" not in said, err


def test_a_folder_is_generated_measured_and_rated(bundle, run, tmp_path, refuses, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a red square\n\na b/c " + "x" * 300 + "\n")
    for folder, seeds in (("a", 2), ("b", 1)):
        code, _, err = run(bench.main, "generate", tmp_path / "prompts.txt", tmp_path / folder,
                           "--run", bundle, "--steps", 1, "--seeds", seeds)
        assert not code, err
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(names) == 4 and "a red square-0.mp4" in names and "a red square-1.mp4" in names
    (tmp_path / "a" / "broken-0.mp4").write_bytes(b"no video")
    write_video(tmp_path / "a" / "a red square-2.gif", torch.rand(5, 3, 16, 16), 8)
    code, said, err = run(bench.main, "metrics", tmp_path / "a", "--out", tmp_path / "out")
    assert not code and "5 videos of 2 prompts, in their own sizes, 1 skipped" in said, err
    (line,) = [line for line in said.splitlines() if f"| {tmp_path / 'a'} |" in line]
    videos = json.loads((tmp_path / "out/results.json").read_text())["metrics"]["videos"]
    means = [np.mean([row["flicker"] for name, row in videos.items() if name.startswith(prompt)])
             for prompt in ("a red square-", "a b c ")]         # of 3 videos and of 2
    assert f"| {bench.cell(means, 100)} |" in line
    (tmp_path / "some.txt").write_text("a red square\nanother\n")
    sizes, measure = set(), bench.vbench
    monkeypatch.setattr(bench, "vbench", lambda video, *rest: (
        sizes.add(tuple(video.shape[1:])), measure(video, *rest))[1])
    code, said, err = run(bench.main, "metrics", tmp_path / "a", tmp_path / "some.txt",
                          "--size", 40)
    assert not code and "3 videos of 1 prompts, resized to 40 px, 0 skipped, 1 prompts" in said, err
    assert sizes == {(3, 40, 40)}
    (tmp_path / "twice.txt").write_text("x" * 200 + "1\n" + "x" * 200 + "2\n")
    assert "180 bytes" in refuses(bench.main, "generate", tmp_path / "twice.txt", tmp_path / "c")
    code, said, err = run(bench.main, "rate", tmp_path / "a", tmp_path / "b", "--out", tmp_path)
    assert not code and "2 pairs, 3 videos without a pair" in said, err
    page = (tmp_path / "rate.html").read_text()
    assert page.count("data:video/mp4;base64,") == 4 and "DATA" not in page
    assert "x" * 300 not in page                            # the files' names hold 180 bytes
    run(bench.main, "rate", tmp_path / "a", tmp_path / "b", tmp_path / "prompts.txt",
        "--out", tmp_path)
    assert '"prompt": "a b/c ' in (page := (tmp_path / "rate.html").read_text())
    assert "x" * 300 in page
    (tmp_path / "empty").mkdir()
    assert "no videos" in refuses(bench.main, "metrics", tmp_path / "empty")
    assert "no videos" in refuses(bench.main, "rate", tmp_path / "a", tmp_path / "missing")
    assert "prompts.txt" in refuses(bench.main, "generate", tmp_path / "no-prompts.txt", tmp_path)


def test_generate_draws_in_batches_what_it_would_draw_at_once(bundle, run, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("a red square\n")
    clips = {}
    monkeypatch.setattr(bench, "write_video",
                        lambda path, clip, fps: clips.update({path.name: clip}))
    code, _, err = run(bench.main, "generate", tmp_path / "prompts.txt", tmp_path / "a",
                       "--run", bundle, "--steps", 2, "--seeds", 18)
    assert not code, err
    whole, _ = VideoJAM.load(bundle / "model.pt").generate(
        ["a red square"] * 18, steps=2)
    assert len(clips) == 18
    for i, clip in enumerate(whole):
        assert torch.equal(clips[f"a red square-{i}.mp4"], clip)


def test_votes_become_shares_with_intervals_and_agreement(run, tmp_path, refuses):
    def ballot(name, choices, a="A"):
        votes = [{"pair": f"p{i}", "question": "motion", "choice": c}
                 for i, c in enumerate(choices)]
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({"kind": "videojam votes", "a": a, "b": "B", "rater": name,
                                    "votes": votes}))
        return path
    one, two = ballot("one", "aaab"), ballot("two", "aabb")
    code, said, err = run(bench.main, "votes", "--out", tmp_path, one, two)
    assert not code, err
    (line,) = [line for line in said.splitlines() if line.startswith("| motion")]
    assert "| 2 | 8 | 62.5 [" in line and "| 75.0 [" in line
    for path in (one, two):             # two pairs of one prompt: 1 vote of 4 for A
        path.write_text(path.read_text().replace("p2", "q-0").replace("p3", "q-1"))
    code, said, err = run(bench.main, "votes", "--out", tmp_path, one, two)
    (line,) = [line for line in said.splitlines() if line.startswith("| motion")]
    cells = [bench.cell(shares, 100, share=True) for shares in ([1, 1, .25], [1, 1, .5])]
    assert f"| 2 | 8 | {cells[0]} | {cells[1]} |" in line
    assert "same two folders" in refuses(bench.main, "votes", one, ballot("three", "a", "C"))
    for foreign in ("[1]", '{"kind": "b"}', one.read_text().replace('"a"}', "1}")):
        (tmp_path / "foreign.json").write_text(foreign)
        assert "not a votes file" in refuses(bench.main, "votes", tmp_path / "foreign.json")
    assert "No such file" in refuses(bench.main, "votes", tmp_path / "nowhere.json")
    assert "same two folders" in refuses(bench.main, "votes")

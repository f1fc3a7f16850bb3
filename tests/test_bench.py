"""pytest tests/test_bench.py: the experiments, folders of videos, votes."""
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import bench
import flow
import metrics
import sample
from common import ffmpeg, open_video, write_video
from conftest import ROOT, make_varying
from metrics import cell
from videojam import VideoJAM, linear_quadratic, read_model_file, write_model_file

@pytest.fixture(autouse=True)
def cheap(monkeypatch):
    monkeypatch.setattr(bench, "can_compile", lambda device: False)     # tiny models: not worth it
    for module in (bench, metrics, flow):   # nothing here is about how good RAFT's flow is
        monkeypatch.setattr(module, "estimate_flow", lambda raft, video: 9 * video[:, :, :2])

def test_every_experiment_writes_its_tables_and_a_page_that_holds_all(model_folder, run, tmp_path):
    code, said, err = run(bench.main, "--run", model_folder, "--n", 2, "--steps", 2,
                          "--out", tmp_path)
    assert not code, err
    assert (tmp_path / "motivation-0.svg").read_text().count("<polyline") == 4
    for row in ("real clips", "through the TAE", "base", "control", "VideoJAM, w2 = 0",
                "VideoJAM, w2 = 3", "d = 0 at inference", "InstructPix2Pix", "jam, step 60",
                "jam, d = 0: loss", "jam: loss", "jam: rise, absolute", "jam: rise %"):
        assert f"| {row} |" in said, row
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results) == {"motivation", "compare", "ablation", "sdedit"}
    assert len(results["compare"]["clips"]["base"]) == 2
    curves = results["motivation"]["curves"][0][1]
    assert any(rise for rise, *_ in curves["base"][1])
    assert curves["jam"] != curves["jam, d = 0"]
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 2 and page.count("data:video/mp4;base64,") > 8
    assert "://" not in page.replace("http://www.w3.org", "")       # nothing is fetched
    assert not list(tmp_path.glob(".*"))

def test_sdedit_goes_on_from_the_clip_noised_to_each_step(model_folder, run, tmp_path, monkeypatch):
    given, latents, original = [], [], bench.Evaluator.latents
    monkeypatch.setattr(bench.Evaluator, "latents", lambda e, *clips: (
        latents.extend(original(e, *clips)), latents)[1])
    monkeypatch.setattr(bench, "euler_sample", lambda dit, x, d, y, times, *args, **options: (
        given.append((times, x, d)), (x, d))[1])
    code, _, err = run(bench.main, "sdedit", "--run", model_folder, "--n", 2, "--out", tmp_path)
    assert not code and len(given) == 12, err
    x1, d1, x0, d0 = latents
    for i, (times, x, d) in enumerate(given):               # of base, then of jam
        rest = linear_quadratic(100)[(0, 20, 60, 80, 90, 95)[i % 6]:]
        assert torch.equal(times, rest) and (d is None) == (i < 6)
        torch.testing.assert_close(x, (1 - rest[0]) * x0 + rest[0] * x1)
        assert d is None or torch.allclose(d, (1 - rest[0]) * d0 + rest[0] * d1, atol=1e-5)

def test_premise_trains_and_judges_each_world_once(model_folder, run, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "DOSES", (0., .5))
    monkeypatch.setattr(bench, "TRAININGS", (7,))
    preset, tae, dits = read_model_file(model_folder / "model.pt")
    trained, devices, on_ctrl_c = [], [], signal.getsignal(signal.SIGINT)

    def train(command):
        """In place of train.py: the fourth training is stopped."""
        flags = dict(zip(command[2::2], command[3::2]))
        trained.append(tuple(flags[name] for name in ("--appearance", "--target", "--seed")))
        devices.append(flags.get("--device"))
        world = dataclasses.replace(preset, appearance=float(trained[-1][0]), target=trained[-1][1])
        (out := Path(flags["--out"])).mkdir(exist_ok=True)
        write_model_file(out / "model.pt", world, tae, dits)
        if len(trained) == 4:
            signal.raise_signal(signal.SIGINT)          # Ctrl-C reaches both processes
        return subprocess.CompletedProcess(command, 2 if len(trained) == 4 else 0)

    ffmpeg()                                            # it is tried once, by subprocess.run
    monkeypatch.setattr(bench.subprocess, "run", train)
    flags = "premise", "--n", 3, "--steps", 1, "--out", tmp_path / "out"
    code, said, err = run(bench.main, *flags)
    assert code == 2 and "0.5-shuffled-7: not trained to its end" in err and "3 of 5 train" in said
    assert signal.getsignal(signal.SIGINT) == on_ctrl_c
    shutil.rmtree(tmp_path / "out/0.5-shuffled-7")
    code, said, err = run(bench.main, *flags, "--device", "cpu")
    assert not code and "5 of 5 trainings" in said, err
    worlds = [("0.0", "flow"), ("0.5", "flow"), ("0.5", "mask"), ("0.5", "shuffled"),
              ("0.5", "direction")]
    assert trained == [(*world, "7") for world in worlds[:4] + worlds[3:]]
    assert devices == [None] * 4 + ["cpu"] * 2
    section = json.loads((tmp_path / "out/results.json").read_text())["premise"]
    assert [row[:2] for row in section["runs"]] == [[float(a), b] for a, b in worlds]
    ((low, high), _) = section["curves"][0][1]["detected, points"]
    assert low < 60 and 80 < high < 90                  # % of the variance that stands still
    assert (tmp_path / "out/premise-3.svg").read_text().count("<polyline") == 4
    e = bench.Evaluator(SimpleNamespace(
        run=tmp_path / "out/0.5-mask-7", n=3, seeds=1, steps=1, emulated=None, w1=None, w2=3.,
        device=None))
    for which, name in (("base", "base"), ("control", "control"), ("jam", "VideoJAM")):
        w1, emulated = bench.PRESETS["toy"].sampler(None, None)
        video, _ = e.models[which].generate(e.captions, 1, w1, seed=bench.HELD_OUT, batch=50,
                                            emulated=emulated)
        assert section["runs"][2][2][0]["scores"][name] == metrics.score_clips(video, e.scenes)
    # judged anew when it was trained on, not when its file is written again; and with all models
    world = tmp_path / "out/0-flow-7"
    write_model_file(world / "model.pt", preset, tae, {"jam": dits["jam"]})
    os.utime(world / "model.pt", (later := time.time() + 9, later))
    assert not run(bench.main, *flags)[0] and len(trained) == 6
    (world / "checkpoints/jam-2").mkdir(parents=True)
    (status := world / "checkpoints/jam-2/status.json").write_text("{}")
    os.utime(status, (later, later))
    monkeypatch.setattr(bench.subprocess, "run", lambda command: Mock(returncode=0))
    assert "0-flow-7: has no base, control to compare with" in run(bench.main, *flags)[2]

def test_premise_pairs_each_training_with_its_control_and_averages_over_trainings():
    def judged(jam, control, share=.5):
        rows = {"base": (0, 0), "control": control, "VideoJAM": jam}
        return {"share": share, "fig3": ["", {}, 1], "scores": {name: [
            {"held_out": 1, **dict.fromkeys(bench.PAIRED, float(hit)), "error": hit or None}
            for hit in hits] for name, hits in rows.items()}}

    section = bench.premise_section(
        SimpleNamespace(n=2, seeds=1, steps=1, emulated=1, w1=1., w2=1.),
        {(.2, "flow"): [judged((1, 0), (0, 0), .4)] * 2,
         (.5, "flow"): [judged((1, 2), (0, 1)), judged((0, 1), (5, 0))],
         (.5, "mask"): [judged((1, 0), (1, 1)), judged((1, 0), (1, 1)), judged((0, 0), (2, 2))]})
    detected, motion_error = ({row[0]: row[column].split()[0] for table in section["tables"][1:]
                               for row in table[1]} for column in (1, -1))
    assert [detected[f"0.5, {world}: VideoJAM minus control"] for world in (
        "flow, training 0", "flow, training 1", "flow, mean", "mask, training 2", "mask, mean")] \
        == ["+100.0", "-200.0", "-50.0", "-200.0", "-100.0"]    # the mean is of two, and of three
    assert detected["gain, mask minus gain, flow"] == "-50.0"
    assert detected["gain at 0.5 minus gain at 0.2"] == "-100.0"
    # only where both have one: of the first training's second prompt
    assert motion_error["0.5, flow, mean: VideoJAM minus control"] == "+1.00"
    assert motion_error["0.5, mask, training 2: VideoJAM minus control"] == "-"
    shares, values = section["curves"][0][1]["detected, points"]
    assert shares == [40, 50] and [value for value, *_ in values] == [.5, -.5]

def test_the_median_of_errors_and_the_mean_of_shares_are_what_a_table_says():
    rows = [{"error": error, "single": error == 9} for error in (0., 0., 9.)]
    _, ((_, *cells),) = bench.score_table({"model": rows}, {
        "error": bench.SCORES["error"], "single": bench.SCORES["single"]})
    assert [text.split()[0] for text in cells] == ["0.00", "33.3"]

def test_what_would_fail_at_the_end_is_said_before_anything_is_drawn(model_folder, refuses,
                                                                     tmp_path, monkeypatch):
    monkeypatch.setattr(VideoJAM, "generate", None)
    (tmp_path / "file").write_text("")
    assert "nowhere/model.pt: No such file" in refuses(
        bench.main, "ablation", "--run", tmp_path / "nowhere", "--n", 1, "--out", tmp_path / "out")
    assert "file: File exists" in refuses(bench.main, "motivation", "--run", model_folder, "--n", 1,
                                          "--out", tmp_path / "file")
    for experiment in (*bench.EXPERIMENTS, "premise"):      # a path is not taken for a run
        assert "--run names a run" in refuses(bench.main, experiment, model_folder)
    for words in (["premise"], ["metrics", model_folder]):
        assert "it takes no --run" in refuses(bench.main, *words, "--run", model_folder)
    assert "--w1: must be from -1000 to 1000, got nan" in refuses(bench.main, "--w1", "nan")
    shutil.copytree(model_folder, own := tmp_path / "own")
    (own / "videos.json").write_text("{}")
    assert "own videos, but the exp" in refuses(bench.main, "--run", own, "--out", tmp_path / "out")

@pytest.fixture
def given(monkeypatch):
    """The options of each call of generate."""
    calls, generate = [], VideoJAM.generate
    monkeypatch.setattr(VideoJAM, "generate", lambda model, prompts, **options: (
        calls.append({"prompts": prompts, **options}), generate(model, prompts, **options))[1])
    return calls

def test_flags_of_the_sampler_reach_it(model_folder, run, tmp_path, given):
    flags = {"steps": 2, "emulated": 20, "w1": 3., "w2": 4.}
    code, said, err = run(bench.main, "compare", "--run", model_folder, "--n", 2, "--seeds", 2,
                          "--out", tmp_path, *(word for name, value in flags.items()
                                               for word in (f"--{name}", value)))
    assert not code and given[-1].items() >= flags.items(), err
    for prompts in (options["prompts"] for options in given):
        assert prompts == prompts[:2] * 2 and prompts[0] != prompts[1]
    assert [options["w2"] for options in given] == [4, 4, 0, 4]     # base, control, VideoJAM
    clips = json.loads((tmp_path / "results.json").read_text())["compare"]["clips"]
    assert len(clips["base"]) == 4 and len(clips["real clips"]) == 2
    assert "p = 1.0000, n = 2 |" in said                # by prompt

def test_ablation_is_table_3_with_guidances_of_one_strength(model_folder, run, tmp_path, given):
    code, said, err = run(bench.main, "ablation", "--run", model_folder, "--n", 1, "--steps", 4,
                          "--w1", 1, "--w2", 3, "--out", tmp_path)
    assert not code, err
    rows = [line.split(" | ")[0].strip("| ") for line in said.splitlines()
            if line.startswith("| ") and "through" not in line and "real" not in line][2:]
    made = [tuple(options.get(name) for name in ("w1", "w2", "mode", "motion_steps"))
            for options in given]
    assert dict(zip(rows, made)).items() >= {
        "VideoJAM, w2 = 3": (1, 3, None, None), "without text guidance": (0, 3, None, None),
        "without motion guidance": (1, 0, None, None),
        "d = 0 at inference": (1, 3, "no-motion", None),
        "InstructPix2Pix": (2, 4, "ip2p", None),        # where a scale of 1 is Eq. 8's 0
        "composable": (2, 4, "composable", None), "w2 on u^x alone": (1, 3, "inner-x", None),
        "w2 = 6": (1, 6, None, None), "w2 in the first 25% of steps": (1, 3, None, 1)}.items()

def test_models_that_a_file_lacks_are_left_out(model_folder, run, tmp_path):
    preset, tae, dits = read_model_file(model_folder / "model.pt")
    write_model_file(tmp_path / "model.pt", preset, tae, {"jam": dits["jam"]})
    code, said, err = run(bench.main, "compare", "--run", tmp_path, "--n", 1, "--steps", 1,
                          "--out", tmp_path / "out")
    assert not code and "no control model" in said and "| base |" not in said, err

def test_folders_of_samples_are_measured(model_folder, run, tmp_path, refuses):
    (tmp_path / "prompts.txt").write_text("a red square\n\na b/c " + "x" * 300 + "\n")
    code, _, err = run(sample.main, "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "a",
                       "--run", model_folder, "--steps", 1, "--n", 2, "--upscale", 1)
    assert not code, err
    (tmp_path / "a" / "broken-0.mp4").write_bytes(b"no video")
    write_video(tmp_path / "a" / "a red square-2.gif", torch.rand(5, 3, 16, 16), 8)
    code, said, err = run(bench.main, "metrics", tmp_path / "a", "--out", tmp_path / "out")
    assert not code and "5 videos of 2 prompts, 1 skipped" in said, err
    (line,) = [line for line in said.splitlines() if f"| {tmp_path / 'a'} |" in line]
    videos = json.loads((tmp_path / "out/results.json").read_text())["metrics"]["videos"]
    means = [np.mean([row["flicker"] for name, row in videos.items() if name.startswith(prompt)])
             for prompt in ("a red square-", "a b c ")]         # of 3 videos and of 2
    assert f"| {cell(means, 100)} |" in line
    (tmp_path / "empty").mkdir()
    for nothing, complaint in (("empty", "no video in it that can be read"),
                               ("missing", "no such folder"), ("prompts.txt", "no such folder")):
        assert complaint in refuses(bench.main, "metrics", tmp_path / nothing)

def test_metrics_of_a_file_are_those_of_its_frames_in_its_own_rate(tmp_path, run):
    path = make_varying(tmp_path / "v-0.mp4")
    code, said, err = run(bench.main, "metrics", tmp_path, "--out", tmp_path / "out")
    (row,) = json.loads((tmp_path / "out/results.json").read_text())["metrics"]["videos"].values()
    video = torch.stack(list(open_video(path))) / 255
    assert not code and len(video) == 16, err
    assert row == pytest.approx(metrics.vbench(video.unbind, 16 / 1.2, bench.RAFT.load()))
    assert row["flicker"] == pytest.approx(.975, abs=.001)

@pytest.mark.skipif(not shutil.which("node"), reason="no node to run the page's functions")
def test_the_voting_page_pairs_videos_and_counts_votes():
    page = (ROOT / "assets/rate.html").read_text()
    script = page.split("<script>")[1].split("</script>")[0] + """
    const file = name => ({name}), ballot = (rater, choices) => ({rater, votes: [...choices].map(
      (choice, i) => ({pair: ["p-0", "p-1", "q-0", "r-0"][i], question: "motion", choice}))});
    console.log(JSON.stringify([
      pairsOf(["a b-0.mp4", "c-0.webm", "d.txt"].map(file), ["a b-0.mp4", "d.txt"].map(file),
              ["a/b"]).map(p => [p.name, p.prompt]),
      tally([ballot("one", "aabb"), ballot("two", "abbb")]), interval([0, 1, 1, 1])]))"""
    pairs, (row,), (mean, low, high) = json.loads(subprocess.run(
        ["node", "-e", script], capture_output=True, text=True, check=True).stdout)
    assert pairs == [["a b-0", "a/b"]]
    assert (row["question"], row["raters"], row["votes"]) == ("motion", 2, 8)
    assert row["shares"] == [.75, 0, 0] and row["agree"] == [.5, 1, 1]      # p, q, r
    assert mean == .75 and .2 < low < mean < high <= 1


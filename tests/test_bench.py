"""pytest tests/test_bench.py: the experiments, folders of videos, votes."""
import functools
import json

import numpy as np
import pytest
import torch

import bench
import metrics
import sample
from common import open_video, write_video
from conftest import ROOT, make
from metrics import cell
from videojam import VideoJAM

@pytest.fixture(autouse=True)
def cheap(monkeypatch):
    monkeypatch.setattr(bench, "can_compile", lambda device: False)     # tiny models: not worth it
    for module in (bench, metrics):         # nothing here is about how good RAFT's flow is
        monkeypatch.setattr(module, "estimate_flow",
                            functools.partial(module.estimate_flow, iters=1))

def test_every_experiment_writes_its_tables_and_a_page_that_holds_all(model_folder, run, tmp_path,
                                                                      monkeypatch):
    for module in (bench, metrics):
        monkeypatch.setattr(module, "estimate_flow", lambda raft, video: 0 * video[:, :, :2])
    code, said, err = run(bench.main, "--run", model_folder, "--n", 2, "--steps", 2, "--out", tmp_path)
    assert not code, err
    assert (tmp_path / "motivation-0.svg").read_text().count("<polyline") == 4
    for row in ("real clips", "through the TAE", "base", "control", "VideoJAM, w2 = 0",
                "VideoJAM, w2 = 3", "d = 0 at inference", "InstructPix2Pix", "jam, step 60",
                "jam, d = 0", "jam: loss", "jam: rise, absolute", "jam: rise %"):
        assert f"| {row} |" in said, row
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results) == {"motivation", "compare", "ablation", "sdedit"}
    assert len(results["compare"]["clips"]["base"]) == 2
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 3 and page.count("data:video/mp4;base64,") > 8
    assert "://" not in page.replace("http://www.w3.org", "")       # nothing is fetched
    assert not list(tmp_path.glob(".*"))

@pytest.mark.parametrize("name, placeholder", [("rate.html", "DATA"), ("report.html", "CONTENT")])
def test_pages_have_one_placeholder(name, placeholder):
    assert (ROOT / "assets" / name).read_text().count(placeholder) == 1

def test_what_would_fail_at_the_end_is_said_before_anything_is_drawn(model_folder, refuses, tmp_path,
                                                                     monkeypatch):
    monkeypatch.setattr(VideoJAM, "generate", None)
    (tmp_path / "file").write_text("")
    assert "nowhere/model.pt: No such file" in refuses(
        bench.main, "ablation", "--run", tmp_path / "nowhere", "--n", 1, "--out", tmp_path / "out")
    assert "file: File exists" in refuses(bench.main, "motivation", "--run", model_folder, "--n", 1,
                                          "--out", tmp_path / "file")

def test_a_path_where_an_experiment_takes_none_is_not_taken_for_a_run(model_folder, refuses, tmp_path):
    for experiment in bench.EXPERIMENTS:
        assert "named by --run" in refuses(bench.main, experiment, model_folder, "--out", tmp_path / "x")

def test_models_that_a_file_lacks_are_left_out(model_folder, run, tmp_path):
    jam = bench.VideoJAM.load(model_folder / "model.pt")
    jam.save(tmp_path / "model.pt")
    code, said, err = run(bench.main, "compare", "--run", tmp_path, "--n", 1, "--steps", 1,
                          "--out", tmp_path / "out")
    assert not code and "no control model" in said and "| base |" not in said, err

def test_folders_of_samples_are_measured_and_rated(model_folder, run, tmp_path, refuses, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a red square\n\na b/c " + "x" * 300 + "\n")
    for folder, seeds in (("a", 2), ("b", 1)):
        code, _, err = run(sample.main, "--prompts", tmp_path / "prompts.txt", "--out",
                           tmp_path / folder, "--run", model_folder, "--steps", 1, "--n", seeds)
        assert not code, err
    (tmp_path / "a" / "broken-0.mp4").write_bytes(b"no video")
    write_video(tmp_path / "a" / "a red square-2.gif", torch.rand(5, 3, 16, 16), 8)
    code, said, err = run(bench.main, "metrics", tmp_path / "a", "--out", tmp_path / "out")
    assert not code and "5 videos of 2 prompts, in their own sizes, 1 skipped" in said, err
    (line,) = [line for line in said.splitlines() if f"| {tmp_path / 'a'} |" in line]
    videos = json.loads((tmp_path / "out/results.json").read_text())["metrics"]["videos"]
    means = [np.mean([row["flicker"] for name, row in videos.items() if name.startswith(prompt)])
             for prompt in ("a red square-", "a b c ")]         # of 3 videos and of 2
    assert f"| {cell(means, 100)} |" in line
    sizes, measure = set(), bench.vbench
    monkeypatch.setattr(bench, "vbench", lambda video, *rest: (
        sizes.update(tuple(frame.shape) for frame in video), measure(video, *rest))[1])
    code, said, err = run(bench.main, "metrics", tmp_path / "a", "--size", 40)
    assert not code and "5 videos of 2 prompts, resized to 40 px, 1 skipped" in said, err
    assert sizes == {(3, 40, 40)}
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

def test_metrics_of_a_file_are_those_of_its_frames_in_its_own_rate(tmp_path, run):
    """16 frames in 1.2 s, which the header calls 23 a second."""
    folder = tmp_path / "a"
    folder.mkdir()
    make(folder / "v-0.mp4", "testsrc2=s=64x64:r=30:d=1.2,select='lt(n,12)+not(mod(n,6))'",
         "-fps_mode", "passthrough", "-enc_time_base", "1/1000", "-pix_fmt", "yuv420p", "-crf", "1")
    code, said, err = run(bench.main, "metrics", folder, "--out", tmp_path / "out")
    (row,) = json.loads((tmp_path / "out/results.json").read_text())["metrics"]["videos"].values()
    video = torch.stack(list(open_video(folder / "v-0.mp4"))) / 255
    assert not code and len(video) == 16, err
    assert row == pytest.approx(metrics.vbench(video, 16 / 1.2, bench.RAFT.load()))
    assert row["flicker"] == pytest.approx(.975, abs=.001)

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
    cells = [cell(shares, 100, share=True) for shares in ([1, 1, .25], [1, 1, .5])]
    assert f"| 2 | 8 | {cells[0]} | {cells[1]} |" in line
    assert "same two folders" in refuses(bench.main, "votes", one, ballot("three", "a", "C"))
    for foreign in ("[1]", '{"kind": "b"}', one.read_text().replace('"a"}', "1}")):
        (tmp_path / "foreign.json").write_text(foreign)
        assert "not a votes file" in refuses(bench.main, "votes", tmp_path / "foreign.json")
    assert "No such file" in refuses(bench.main, "votes", tmp_path / "nowhere.json")
    assert "same two folders" in refuses(bench.main, "votes")

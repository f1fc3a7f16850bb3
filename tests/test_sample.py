"""pytest tests/test_sample.py: what sample.py writes and refuses."""
import os
import subprocess
import sys
from pathlib import Path

import imageio.v3 as iio
import pytest
import torch
from conftest import ROOT, TINY, bad_weights, tiny_dit

import sample
from common import grid
from videojam import VideoJAM

PROMPT = "a red square"

@pytest.fixture
def draw(run, model_folder, tmp_path, monkeypatch):
    """draw("PROMPT", ...) in 3 steps -> {file: the picture written into it}, what it printed."""
    original, written = sample.write_video, {}

    def spy(path, video, *rest):
        written[path] = video
        original(path, video, *rest)

    monkeypatch.setattr(sample, "write_video", spy)

    def call(*argv, out="a.gif"):
        written.clear()
        code, said, err = run(sample.main, *argv, "--run", model_folder, "--steps", 3, "--upscale", 1,
                              "--out", tmp_path / out)
        assert code == 0, err
        assert all(path.is_file() for path in written)
        return dict(written), said
    return call

def only(written):
    (picture,) = written.values()
    return picture

def beside(*videos):
    """The picture of some videos (T, 3, H, W) from left to right, each in a white frame."""
    return torch.cat([grid(video[None]) for video in videos], -1)

def generated(model_folder, prompts, which="jam", **options):
    return VideoJAM.load(model_folder / "model.pt", which).generate(prompts, steps=3, **options)

# ---------------------------------------------------------------- what is written

@pytest.mark.parametrize("out", ("a.mp4", "a.gif"))
def test_a_prompt_becomes_the_file_that_is_asked_for_and_its_place_is_said(draw, tmp_path, out):
    written, said = draw(PROMPT, out=out)
    assert list(written) == list(tmp_path.iterdir()) == [tmp_path / out]
    assert str(tmp_path / out) in said
    assert iio.imread(tmp_path / out).shape == (TINY.frames, 18, 18, 3)

def test_the_file_shows_what_the_model_generates(draw, model_folder):
    for flags, options in (((), {}), (("--seed", 7), {"seed": 7}), (("--w1", 2), {"w1": 2}),
                           (("--w2", 0), {"w2": 0}), (("--emulated", 20), {"emulated": 20})):
        video, _ = generated(model_folder, [PROMPT], **options)
        assert torch.equal(only(draw(PROMPT, *flags)[0]), beside(video[0]))
        assert not options or not torch.equal(video, generated(model_folder, [PROMPT])[0])

@pytest.mark.parametrize("mode", sample.GUIDANCE)
def test_every_guidance_can_be_asked_for(draw, model_folder, mode):
    video, _ = generated(model_folder, [PROMPT], mode=mode)
    assert torch.equal(only(draw(PROMPT, "--guidance", mode)[0]), beside(video[0]))

@pytest.mark.parametrize("which", ("jam", "base", "control"))
def test_every_model_can_be_asked_for(draw, model_folder, which):
    video, _ = generated(model_folder, [PROMPT], which)
    assert torch.equal(only(draw(PROMPT, "--which", which)[0]), beside(video[0]))

def test_motion_and_compare_stand_beside_the_video_from_the_same_noise(draw, model_folder):
    (video, motion), base = generated(model_folder, [PROMPT]), generated(model_folder, [PROMPT], "base")[0]
    for flags, shown in ((("--motion",), [video, motion]), (("--compare",), [base, video]),
                         (("--compare", "--motion"), [base, video, motion])):
        picture = only(draw(PROMPT, *flags)[0])
        assert torch.equal(picture, beside(*(part[0] for part in shown))), flags

def test_what_is_compared_has_the_same_guidance_where_it_needs_no_motion(draw, model_folder):
    for mode, of_base in (("none", "none"), ("cfg", "cfg"), ("ip2p", None)):
        shown = [generated(model_folder, [PROMPT], which, mode=guidance)[0][0]
                 for which, guidance in (("base", of_base), ("jam", mode))]
        picture = only(draw(PROMPT, "--compare", "--guidance", mode)[0])
        assert torch.equal(picture, beside(*shown)), mode

def test_a_name_may_look_like_an_address_to_ffmpeg(run, model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(sample.main, PROMPT, "--run", model_folder, "--steps", 1, "--out", "12:30.mp4")
    assert code == 0 and os.listdir() == ["12:30.mp4"], err

def test_several_prompts_and_samples_are_numbered_in_order(draw, model_folder, tmp_path):
    # (some editors begin a file with a mark)
    (tmp_path / "prompts.txt").write_text("a cross\n  a star \n\né\u2028e\n", encoding="utf-8-sig")
    written, said = draw(PROMPT, "--prompts", tmp_path / "prompts.txt", "--n", 2)
    assert [path.name for path in written] == [f"a-{i}.gif" for i in range(8)]
    prompts = [PROMPT, "a cross", "a star", "é\u2028e"]
    expected, _ = generated(model_folder, [prompt for prompt in prompts for _ in range(2)])
    for (path, picture), video in zip(written.items(), expected):
        assert torch.equal(picture, beside(video)) and str(path) in said
    assert not torch.equal(expected[0], expected[1])        # each has noise of its own

def test_videos_are_written_as_they_come(draw, model_folder, tmp_path, monkeypatch):
    generate, batches = VideoJAM.generate, []

    def stopped(self, prompts, **options):
        batches.append(len(prompts))
        if len(batches) == 2:
            raise ValueError("stopped")
        return generate(self, prompts, **options)

    whole, _ = generated(model_folder, [PROMPT] * 18)
    written, _ = draw(PROMPT, "--n", 18)
    assert all(torch.equal(a, beside(b)) for a, b in zip(written.values(), whole, strict=True))
    for path in written:
        path.unlink()
    monkeypatch.setattr(VideoJAM, "generate", stopped)
    with pytest.raises(AssertionError, match="stopped"):    # (what `draw` says of exit code 2)
        draw(PROMPT, "--n", 18)
    assert sorted(tmp_path.iterdir()) == sorted(written)[:batches[0]] and batches[0] < 18

def test_small_videos_are_enlarged_for_a_person_and_the_name_comes_from_the_prompt(
        run, model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, said, err = run(sample.main, "a/../red: square?", "--run", model_folder, "--steps", 2)
    (path,) = (path for path in tmp_path.rglob("*") if path.is_file())
    assert code == 0 and path.parent == tmp_path / "outputs" and path.name == "a-red-square.mp4"
    assert path.name in said and 200 < iio.imread(path).shape[2] < 300

def test_a_prompt_that_is_too_long_is_said_and_cut_between_characters(draw, model_folder):
    fits = "x" * (TINY.dit.max_bytes - 1)
    written, said = draw(fits + "🙂 and more")
    assert repr(fits) in said and f"takes {TINY.dit.max_bytes}" in said
    assert torch.equal(only(written), beside(generated(model_folder, [fits])[0][0]))
    assert "cut" not in draw(PROMPT)[1]

# ---------------------------------------------------------------- bad input

@pytest.mark.parametrize("argv, complaint", [
    ((), "no prompt"), (("--prompts", "empty.txt"), "no prompt"),
    (("--prompts", "missing.txt"), "cannot read missing.txt"),
    (("--prompts", "latin.txt"), "cannot read latin.txt"), ((PROMPT, "--steps", 0), "--steps"),
    ((PROMPT, "--steps", -3), "--steps"), ((PROMPT, "--steps", 1001), "1000"),
    ((PROMPT, "--emulated", 0), "--emulated: must be a positive"),
    ((PROMPT, "--device", "bad"), "--device bad: no such device"),
    ((PROMPT, "--device", "meta"), "--device meta: no such device"),
    ((PROMPT, "--run", ""), "model.pt: no such file"), ((PROMPT, "--seed", 2 ** 64), "--seed: must"),
    ((PROMPT, "--w1", "nan"), "not finite"), (("\udce9",), "not UTF-8"),
    (("empty.txt",), "empty.txt: a file, not a prompt: --prompts empty.txt takes its lines"),
    ((PROMPT, "--guidance", "more"), "--guidance: invalid choice: 'more'"),
    ((PROMPT, "--n", 0), "--n"), ((PROMPT, "--upscale", 0), "--upscale"),
    ((PROMPT, "--out", "nowhere/a.mp4"), "nowhere"),
    ((PROMPT, "--out", "empty.txt/a.mp4"), "empty.txt"),
    ((PROMPT, "--out", "folder.mp4"), "folder.mp4: a folder"),
    ((PROMPT, "--upscale", 10 ** 9), "out of memory: take a smaller"),
    ((PROMPT, "--out", "a.avi"), ".mp4 or .gif"), ((PROMPT, "--out", "a"), ".mp4 or .gif"),
    ((PROMPT, "--run", "nowhere"), "nowhere/model.pt: no such file"),
    ((PROMPT, "--which", "base", "--motion"), "predicts no motion"),
    ((PROMPT, "--which", "base", "--guidance", "inner"), "needs motion")])
def test_bad_input_is_one_line_and_nothing_is_written(refuses, model_folder, tmp_path, monkeypatch, argv,
                                                      complaint):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    for flag, value in (("--run", model_folder), ("--out", "a.mp4")):
        argv += () if flag in argv else (flag, value)
    assert complaint in refuses(sample.main, *argv)
    assert sorted(os.listdir()) == ["empty.txt", "folder.mp4", "latin.txt"]

def test_a_folder_that_cannot_be_written_is_said_before_anything_is_drawn(refuses, model_folder, tmp_path,
                                                                          monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)  # root may
    monkeypatch.setattr(VideoJAM, "generate", None)
    complaint = refuses(sample.main, PROMPT, "--run", model_folder, "--out", tmp_path / "a.mp4")
    assert str(tmp_path) in complaint and not list(tmp_path.iterdir())

@pytest.mark.parametrize("out", ("a.mp4", "a.gif"))
def test_a_disk_that_fails_leaves_no_half_written_file(refuses, model_folder, tmp_path, monkeypatch, out):
    def fails(path, *_, **__):
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError(28, "No space left on device")

    if out == "a.gif":                          # made in memory
        monkeypatch.setattr(Path, "write_bytes", fails)
    else:
        monkeypatch.setattr("imageio.v3.imwrite", fails)
    assert "No space left" in refuses(sample.main, PROMPT, "--run", model_folder, "--steps", 1, "--out",
                                      tmp_path / out)
    assert not list(tmp_path.iterdir())

def test_files_that_are_not_weights_are_refused_and_run_no_code(refuses, model_folder, tmp_path):
    for path in bad_weights(tmp_path, model_folder / "model.pt"):
        run_folder = tmp_path / f"run of {path.name}"
        run_folder.mkdir()
        if path.exists():
            path.rename(run_folder / "model.pt")
        assert str(run_folder) in refuses(sample.main, PROMPT, "--run", run_folder, "--out",
                                          tmp_path / "a.mp4")
    assert not (tmp_path / "a.mp4").exists() and not (tmp_path / "ran").exists()

def test_a_file_without_the_base_model_cannot_be_compared_and_says_so_at_once(
        refuses, model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(VideoJAM, "generate", None)
    jam = VideoJAM.load(model_folder / "model.pt")
    VideoJAM(TINY, jam.tae, tiny_dit()).save(tmp_path / "model.pt")
    assert "has no 'base' model" in refuses(sample.main, PROMPT, "--run", tmp_path, "--compare",
                                            "--steps", 1, "--out", tmp_path / "a.mp4")
    assert not (tmp_path / "a.mp4").exists()

def test_as_a_command_bad_input_ends_in_exit_code_2_and_one_line(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "sample.py", PROMPT, "--run", "nowhere"],
                          cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "sample.py: nowhere/model.pt: no such file\n"
    assert not list(tmp_path.iterdir())

@pytest.mark.skipif(not (ROOT / "weights/toy.pt").exists(), reason="no weights/toy.pt yet")
def test_a_fresh_clone_samples_with_the_shipped_weights(run, tmp_path):
    code, said, err = run(sample.main, "a red square moves left", "--motion", "--out",
                          tmp_path / "a.mp4", "--steps", 20)
    assert code == 0, err
    assert str(tmp_path / "a.mp4") in said and iio.imread(tmp_path / "a.mp4").shape[0] == 16

"""pytest tests/test_sample.py: what sample.py writes, and what it refuses."""
import functools
import os
from pathlib import Path
from unittest.mock import Mock

import imageio.v3 as iio
import pytest
import torch
from conftest import TINY, tiny_dit

import sample
from common import grid
from videojam import TAE, VideoJAM, write_model_file

PROMPT = "a red square"

@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

@pytest.fixture
def draw(run, model_folder, monkeypatch):
    """draw("PROMPT", ...) in 3 steps -> {file: the picture written into it}, what it printed."""
    write_video, written = sample.write_video, {}
    monkeypatch.setattr(sample, "write_video", lambda path, video, *rest: (
        written.update({str(path): video}), write_video(path, video, *rest)))
    def call(*argv, out="a.gif"):
        written.clear()
        code, said, err = run(sample.main, *argv, "--run", model_folder, "--steps", 3, "--upscale",
                              1, "--out", out)
        assert code == 0 and all(map(os.path.isfile, written)), err
        return dict(written), said
    return call

@pytest.fixture(scope="module")
def generated(model_folder):
    """generated([prompt, ...], which, ...) -> the video and the motion that draw has to write."""
    load = functools.cache(lambda which: VideoJAM.load(model_folder / "model.pt", which))
    return lambda prompts, which="jam", **options: load(which).generate(prompts, 3, **options)

def picture(*videos):
    """Videos (T, 3, H, W) from left to right, several each in a white frame."""
    return torch.cat([grid(video[None]) for video in videos], -1) if videos[1:] else videos[0]

@pytest.mark.parametrize("out", ("a.mp4", "a.gif", "12:30.mp4"))    # ffmpeg's protocols have colons
def test_writes_the_file_asked_for_and_prints_its_name(draw, out):
    written, said = draw(PROMPT, out=out)
    assert list(written) == os.listdir() == [out] and out in said
    assert iio.imread(Path(out).absolute()).shape == (TINY.frames, 16, 16, 3)
    if out == "a.gif":                                                  # it lasts 620 of 625 ms
        durations = [iio.immeta(out, index=k)["duration"] for k in range(TINY.frames)]
        assert sum(durations) == 620 and set(durations) == {120, 130}

@pytest.mark.parametrize("flag, value, option", [
    ("--seed", 7, "seed"), ("--w1", 2, "w1"), ("--w2", 0, "w2"), ("--emulated", 20, "emulated"),
    ("--which", "base", "which"), ("--which", "control", "which"),
    *(("--guidance", mode, "mode") for mode in sample.GUIDANCE)])
def test_flags_reach_the_model(draw, generated, flag, value, option):
    video, default = generated([PROMPT], **{option: value})[0], generated([PROMPT])[0]
    (written,) = draw(PROMPT, flag, value)[0].values()
    assert torch.equal(written, picture(video[0]))
    assert torch.equal(video, default) == (value == "inner")

@pytest.mark.parametrize("flags, of_base, of_jam", [
    ("--motion", None, None), ("--compare", None, None), ("--compare --motion", None, None),
    ("--compare --guidance none", "none", "none"), ("--compare --guidance ip2p", "cfg", "ip2p")])
def test_compare_and_motion_stand_beside_the_video(draw, generated, flags, of_base, of_jam):
    others = [generated([PROMPT], which, mode=of_base)[0] for which in ("base", "control")]
    video, motion = generated([PROMPT], mode=of_jam)
    shown = others * ("--compare" in flags) + [video] + [motion] * ("--motion" in flags)
    (written,) = draw(PROMPT, *flags.split())[0].values()
    assert torch.equal(written, picture(*(part[0] for part in shown)))

def test_compare_passes_over_a_control_that_a_run_has_not(run):
    Path("part").mkdir()
    write_model_file("part/model.pt", TINY, TAE(TINY.tae), {"jam": tiny_dit(),
                                                            "base": tiny_dit(False)})
    _, said, _ = run(sample.main, PROMPT, "--run", "part", "--compare", "--steps", 1)
    assert "1 of base | jam in" in said

def test_several_prompts_and_samples_are_numbered_in_order(draw, generated):
    Path("prompts.txt").write_text("a cross\n  a star \n\né\u2028e\n", encoding="utf-8-sig")
    written, said = draw(PROMPT, "--prompts", "prompts.txt", "--n", 2)
    assert list(written) == [f"a-{i}.gif" for i in range(8)]
    expected, _ = generated([prompt for prompt in (PROMPT, "a cross", "a star", "é\u2028e")
                             for _ in range(2)])
    for (path, video), wanted in zip(written.items(), expected):
        assert torch.equal(video, picture(wanted)) and path in said
    assert not torch.equal(expected[0], expected[1])        # each has noise of its own

def test_videos_are_written_as_they_are_made(draw, generated, monkeypatch):
    expected, generate, there = generated([PROMPT] * 18)[0], VideoJAM.generate, []
    def watched(*args, **options):
        there.append(len(os.listdir()))
        return generate(*args, **options)
    monkeypatch.setattr(VideoJAM, "generate", watched)
    written, _ = draw(PROMPT, "--n", 18)
    assert there == [0, 16]
    for video, wanted in zip(written.values(), expected, strict=True):
        assert torch.equal(video, picture(wanted))

def test_default_name_is_the_prompt_and_never_another_samples(run, model_folder):
    for prompts in (["a/../red: square?"], ["?"], ["?", "--seed", 1, "!"], ["?"]):
        code, said, err = run(sample.main, *prompts, "--run", model_folder, "--steps", 1)
        assert code == 0 and "outputs/" in said, err
    names = sorted(path.name for path in Path().rglob("*") if path.is_file())
    assert names == ["a-red-square.mp4", *(f"video{k}.mp4" for k in ("-2", "-3", "-4", ""))]
    assert iio.imread("outputs/video.mp4").shape[1:3] == (256, 256)     # small ones are enlarged

def test_out_makes_its_folder_and_a_folder_gets_vbenchs_names(draw, generated):
    written, _ = draw(PROMPT, "a/b", "--n", 2, out="new/folder")
    assert list(written) == [f"new/folder/{name}-{i}.mp4" for name in (PROMPT, "a b")
                             for i in range(2)]
    for video, wanted in zip(written.values(), generated([PROMPT] * 2 + ["a/b"] * 2)[0]):
        assert torch.equal(video, picture(wanted))
    assert list(draw(PROMPT, out="other/z.MP4")[0]) == ["other/z.MP4"]

def test_long_prompts_are_cut_between_characters_with_a_message(draw, generated):
    fits = "x" * (TINY.dit.max_bytes - 1)
    written, said = draw(fits + "🙂 and more")
    assert repr(fits) in said and f"reads {TINY.dit.max_bytes} bytes" in said
    assert torch.equal(*written.values(), picture(generated([fits])[0][0]))
    assert "bytes" not in draw(PROMPT)[1]

def test_words_that_a_model_cannot_know_are_named(draw, model_folder, capfd):
    hint = "the model does not know dog, runs, it has learned from captions such as "
    sample.print_hints(None, ["a blue star zigzags left", "a dog runs"], 99)    # the shipped one
    assert capfd.readouterr().out == f"'a dog runs': {hint}'a red square moves left'\n"
    assert "does not know" not in draw("a dog runs")[1]
    (model_folder / "videos.json").write_text('{"a.mp4": {"caption": "a cat", "frames": 9}}')
    assert hint + "'a cat'" in draw("a dog runs")[1]
    (model_folder / "videos.json").unlink()

def test_a_missing_ffmpeg_is_said_before_anything_is_drawn(refuses, model_folder, monkeypatch):
    monkeypatch.setattr(sample, "ffmpeg", Mock(side_effect=OSError("no ffmpeg: pip install it")))
    monkeypatch.setattr(VideoJAM, "generate", None)
    assert "no ffmpeg: pip" in refuses(sample.main, PROMPT, "--run", model_folder)

def test_shipped_weights_are_the_default(run):
    code, said, err = run(sample.main, "a red square moves left", "--motion", "--steps", 4,
                          "--out", "a.mp4")
    assert code == 0 and "a.mp4" in said and iio.imread("a.mp4").shape[0] == 16, err

@pytest.mark.parametrize("argv, complaint", [
    ((), "no prompt"), (("--prompts", "empty.txt"), "no prompt"),
    (("--prompts", "missing.txt"), "missing.txt: No such file"),
    (("--prompts", "latin.txt"), "a prompt is not UTF-8"), (("\udce9",), "not UTF-8"),
    (("empty.txt",), "empty.txt: a file, not a prompt: --prompts empty.txt takes its lines"),
    *(((PROMPT, flag, 0), f"{flag}: must be a positive")
      for flag in ("--steps", "--emulated", "--n", "--upscale")),
    ((PROMPT, "--steps", 1001), "1000"), ((PROMPT, "--seed", 2 ** 64), "--seed: must"),
    ((PROMPT, "--w1", "nan"), "--w1: must be from -1000 to 1000"),
    ((PROMPT, "--upscale", 10 ** 9), "out of memory"),
    ((PROMPT, "--device", "bad"), "--device bad: take cpu or cuda ("),
    ((PROMPT, "--guidance", "more"), "--guidance: invalid choice: 'more'"),
    ((PROMPT, "--out", "a.avi"), "--out a.avi: name a .mp4 or .gif file, or a folder"),
    ((PROMPT, " "), "no prompt, or a blank one"),
    ((PROMPT, "--out", "empty.txt/a.mp4"), "empty.txt"),
    ((PROMPT, "--out", "folder.mp4"), "--out folder.mp4: name a"),
    (("x" * 200 + "1", "x" * 200 + "2", "--out", "jam"), "have the same first 180 bytes"),
    ((PROMPT, "--run", ""), "model.pt: No such file"),
    ((PROMPT, "--run", "jam", "--compare"), "has no 'base' model"),
    ((PROMPT, "--which", "base", "--motion"), "predicts no motion"),
    ((PROMPT, "--which", "base", "--guidance", "inner"), "needs motion")])
def test_bad_input_is_one_line_and_nothing_is_written(refuses, model_folder, argv, complaint):
    Path("empty.txt").write_text("\n \n")
    Path("latin.txt").write_bytes("é".encode("latin-1"))
    Path("folder.mp4").mkdir(), Path("jam").mkdir()
    write_model_file("jam/model.pt", TINY, TAE(TINY.tae), {"jam": tiny_dit()})
    defaults = "--run", model_folder, "--out", "a.mp4", "--steps", 1
    assert complaint in refuses(sample.main, *defaults, *argv)
    assert sorted(os.listdir()) == ["empty.txt", "folder.mp4", "jam", "latin.txt"]

def test_unwritable_folder_is_refused_before_sampling(refuses, model_folder, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)       # root may
    monkeypatch.setattr(VideoJAM, "generate", None)
    assert "cannot be written" in refuses(sample.main, PROMPT, "--run", model_folder, "--out",
                                          "a.mp4")

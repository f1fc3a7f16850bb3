"""pytest tests/test_data.py: folders of own videos, reading clips, latents, prefetching."""
import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import subprocess
import time
from unittest.mock import Mock

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, make, make_varying, ramp, use_tiny_preset, write_clip

import common
import data
import train
from common import ffmpeg, open_video
from data import Folder, Latents, Prefetcher, Sprites, read_clip
from flow import rgb_to_flow
from synthetic import HELD_OUT, sprite_clips
from videojam import TAE

CLIPS = ROOT.parent / "shared/clips"

pytestmark = pytest.mark.usefixtures("brightness_as_motion")

@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Two videos of other sizes and rates: 12 frames at the preset's rate each."""
    path = tmp_path_factory.mktemp("videos")
    (path / "inside").mkdir()
    write_clip(path / "a.mp4", ramp(12), 8)
    write_clip(path / "inside/b.mp4", ramp(24, 64, 34), 16)
    return path

@pytest.fixture
def folder(videos, tmp_path):
    return shutil.copytree(videos, tmp_path / "data")

@pytest.fixture
def captioned(folder):
    (folder / "a.txt").write_text("a")
    (folder / "inside/b.txt").write_text("b")
    return folder

def opened(folder, out, preset=dataclasses.replace(TINY, sigma=.3), limit=2400, takes_all=False):
    out.mkdir(exist_ok=True)
    return Folder(folder, preset, None, out, 2, limit, takes_all)

# ---------------------------------------------------------------- reading clips

@pytest.mark.parametrize("fps, start, count", [(8, 0, 20), (16, 0, 10), (24, 0, 6), (4, 0, 38),
                                               (8, 7, 12), (16, 3, 6), (25, 3, 3), (20, 1, 4),
                                               (8, 22, 7)])
def test_read_clip_shows_what_the_file_shows_at_each_time(tmp_path, fps, start, count):
    write_clip(tmp_path / "a.mp4", ramp(30), fps)
    video = read_clip(tmp_path / "a.mp4", start, count, 8, 16)
    assert video.dtype == torch.uint8 and video.shape == (count, 3, 16, 16)
    shown = 8 * ((start + torch.arange(count)) * fps / 8).floor()       # ramp: 8 brighter a frame
    torch.testing.assert_close(video.float().mean((1, 2, 3)), shown, atol=3, rtol=0)

@pytest.mark.parametrize("height, axis, size, shape", [(32, 2, 16, (16, 16)),
                                                       (64, 1, (16, 32), (16, 32))])
def test_read_clip_takes_the_middle(tmp_path, height, axis, size, shape):
    frames = np.zeros((8, height, 64, 3), np.uint8)
    frames.swapaxes(1, axis)[:, 16:48] = 200                # what is on both sides of it is black
    write_clip(tmp_path / "a.mp4", frames, 8)
    video = read_clip(tmp_path / "a.mp4", 0, 4, 8, size).float()
    assert video.shape == (4, 3, *shape)
    middle = video[..., 2:-2] if axis == 2 else video[..., 1:-1, :]
    torch.testing.assert_close(middle, torch.full_like(middle, 200), atol=4, rtol=0)

@pytest.mark.skipif(not CLIPS.is_dir(), reason="the real clips are not part of the project")
def test_real_clips_are_read_to_their_end():
    for name, seconds in {"cityCC0.mpg": 190 / 25, "bikes.mp4": 250 / 25}.items():
        assert data.video_seconds(CLIPS / name) == pytest.approx(seconds, abs=.1)
    # its container has no index
    clip = read_clip(CLIPS / "cityCC0.mpg", int(8 * 190 / 25) - 6, 5, 8, 32).float()
    assert clip.std() > 20 and (clip[1:] - clip[:-1]).abs().mean() > .2

# ---------------------------------------------------------------- what a folder holds

LAYOUTS = {
    "metadata.csv": {"metadata.csv": 'file_name,text,x\na.mp4,"one, with a comma",1\n'
                                     "inside/b.mp4,é,2\n"},
    "metadata.jsonl": {"metadata.jsonl": '{"file_name": "a.mp4", "caption": "one, with a comma"}\n'
                                         '\n{"file_name": "inside/b.mp4", "caption": "é"}\n'},
    "inside/metadata.csv": {"inside/metadata.csv": 'file_name, text\n../a.mp4, "one, with a comma"'
                                                   "\n./b.mp4,é\n"},
    "videos.txt and prompts.txt": {"videos.txt": "./a.mp4\ninside/../inside/b.mp4\n",
                                   "prompts.txt": "one, with a comma\né\n"},
    "videos.txt and caption.txt": {"videos.txt": "a.mp4\ninside/b.mp4\n",
                                   "caption.txt": "one, with a comma\né\n"},
    "a .txt beside each video": {"a.txt": "one, with a comma", "inside/b.txt": "é"},
}

@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_captions(folder, layout):
    for name, text in LAYOUTS[layout].items():
        (folder / name).write_text(text)
    assert data.find_videos(folder) == (layout, [("a.mp4", "one, with a comma"),
                                                 ("inside/b.mp4", "é")])

def test_a_folders_clips_are_those_of_its_videos(folder, tmp_path, capfd):
    for name, text in (("videos.txt", "a.mp4\ninside/b.mp4\n"), ("prompts.txt", "a\u2028A\né\n")):
        (folder / name).write_text(text)
    dataset = opened(folder, tmp_path / "run")
    assert "2 videos (videos.txt and prompts.txt), 2 used, 3 s, 0 skipped" in "".join(
        capfd.readouterr())
    keys = dataset.keys(100)
    assert len(keys) == 8 + 8 and len(set(keys)) == 16 and set(keys) == set(dataset.order)
    assert set(dataset.keys(3)) < set(keys) and len(dataset.keys(3)) == 6
    video, captions, motions, skipped = dataset.read(keys)
    motion = dataset.motion(video, motions)
    assert video.shape == motion.shape == (16, 5, 3, 16, 16) and not skipped
    assert captions == ["a A"] * 8 + ["é"] * 8
    for (name, start, _), clip, rgb in zip(keys, video, motion):
        frames = (2 if name.endswith("b.mp4") else 1) * (start + torch.arange(5.))
        torch.testing.assert_close(clip.mean((1, 2, 3)) * 255, 8 * frames, atol=3, rtol=0)
        seen = rgb_to_flow(rgb, .3)[:, 0]
        torch.testing.assert_close(seen[:-1], clip[:-1, 0] - .5, atol=.05, rtol=0)
        assert torch.equal(seen[-1], seen[-2])
    (folder / "a.mp4").unlink()                             # while encode was interrupted
    _, captions, _, skipped = opened(folder, tmp_path / "run").read(keys[7:9])
    assert captions == ["é"] and [*skipped] == keys[7:8]    # the last of a, the first of b

def test_files_of_other_editors_and_names_of_any_bytes_are_read(folder, tmp_path, capfd):
    """A byte-order mark, a name that is not UTF-8, one longer than a file's can be; two lines."""
    name = os.fsdecode(b"\xe9.mp4")
    (folder / "a.mp4").rename(folder / name)
    (folder / "metadata.csv").write_bytes(
        b"\xef\xbb\xbffile_name,text\n" b"./\xe9.mp4,\" one\ntwo\n\"\n"
        + b"long" * 100 + b".mp4,two\n" b"\xe9.mp4,again\n")
    dataset = opened(folder, tmp_path / "run")
    assert [(key[0], dataset.caption(key, None)) for key in dataset.keys(1)] == [
        (name, "one two")]
    printed = "".join(capfd.readouterr())
    for reason in ("no such file", "not in metadata.csv: inside/b.mp4", "listed twice"):
        assert f"skipped 1: {reason}" in printed

def test_every_video_is_used_or_skipped_with_its_reason(folder, tmp_path, capfd):
    iio.imwrite(folder / "odd.gif", ramp(12, 33, 21), duration=125)
    write_clip(folder / "one.mp4", ramp(1), 8)
    good, odd, one = ((folder / name).read_bytes() for name in ("a.mp4", "odd.gif", "one.mp4"))
    (folder / "inside/b.mp4").unlink()
    (folder / "link.mp4").symlink_to(folder / "nowhere.mp4")
    files = {       # name: content, caption, why it is skipped
        "a.mp4": (good, b"a", None), "long.mp4": (good, b"word " * 2000, None),
        "odd.gif": (odd, b"a", None), "one.mp4": (one, b"a", "too short"),
        "empty.mp4": (b"", b"a", "cannot be decoded"), "link.mp4": (None, b"a", "no such file"),
        "text.mp4": (b"hello world", b"a", "cannot be decoded"),
        "cut.mp4": (good[:500], b"a", "cannot be decoded"),
        "silent.mp4": (good, None, "no caption"), "blank.mp4": (good, b" \n", "no caption"),
        "latin.mp4": (good, "é".encode("latin-1"), "its caption is not UTF-8")}
    for name, (file, caption, _) in files.items():
        if file is not None:
            (folder / name).write_bytes(file)
        if caption is not None:
            (folder / name).with_suffix(".txt").write_bytes(caption)
    dataset = opened(folder, tmp_path / "run")
    printed = "".join(capfd.readouterr())
    assert "11 videos (a .txt beside each video), 3 used, 4 s, 8 skipped" in printed
    listing = json.loads((tmp_path / "run/videos.json").read_text())
    assert listing.keys() == files.keys()
    for name, (_, _, reason) in files.items():
        assert ("frames" in listing[name]) == (reason is None)
        assert reason is None or listing[name]["reason"].startswith(reason) and reason in printed
    assert not dataset.read(dataset.keys(2))[3]
    for name, start in (("cut.mp4", 0), ("a.mp4", 40)):
        with pytest.raises(ValueError, match="frames can be decoded from"):
            read_clip(folder / name, start, 5, 8, 16)

def test_only_changed_videos_are_opened_again(captioned, tmp_path, monkeypatch):
    opened_now, original = [], data.video_seconds
    monkeypatch.setattr(data, "video_seconds", lambda path: (
        opened_now.append(os.path.basename(path)), original(path))[1])
    first = opened(captioned, tmp_path / "run").videos
    assert sorted(opened_now) == ["a.mp4", "b.mp4"] and len(first) == 2
    write_clip(captioned / "a.mp4", ramp(13), 8)
    write_clip(captioned / "c.mp4", ramp(1), 8)                 # too short
    (captioned / "c.txt").write_text("c")
    for _ in range(2):
        again = opened(captioned, tmp_path / "run").videos
        assert sorted(opened_now[2:]) == ["a.mp4", "c.mp4"] and len(again) == 2
    assert [again[name]["frames"] for name in ("a.mp4", "inside/b.mp4")] == [13, 12]
    slow = opened(captioned, tmp_path / "run", dataclasses.replace(TINY, fps=4)).videos
    assert [slow[name]["frames"] for name in ("a.mp4", "inside/b.mp4")] == [6, 6]
    write_clip(captioned / "a.mp4", ramp(13)[::-1], 8)          # as long as before, but darkening
    video, *_ = opened(captioned, tmp_path / "run").read([("a.mp4", 0, 0)])
    assert (video.mean((0, 2, 3, 4)).diff() < 0).all()

def test_an_interrupted_look_at_a_folder_goes_on(captioned, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "EXAMINED_BETWEEN_WRITES", 1)
    looked_at, original = [], data.video_seconds

    def seconds(path):
        looked_at.append(name := os.path.basename(path))
        if name == "b.mp4" and looked_at.count(name) == 1:
            raise KeyboardInterrupt
        return original(path)

    monkeypatch.setattr(data, "video_seconds", seconds)
    with pytest.raises(KeyboardInterrupt):
        opened(captioned, tmp_path / "run")
    assert len(opened(captioned, tmp_path / "run").videos) == 2
    assert looked_at[2:] == ["b.mp4"]

def test_training_replaces_a_video_that_breaks_off(captioned, tmp_path, monkeypatch):
    original = data.decode
    monkeypatch.setattr(data, "decode", lambda path, first, frames, *rest: original(
        path, first, frames, *rest)[:2 if path.name == "a.mp4" else frames])
    dataset = opened(captioned, tmp_path / "run", takes_all=True)
    video, captions, _, _ = dataset.training(range(8))
    assert len(video) == 8 and set(captions) == {"b"}
    video, captions, _, skipped = dataset.read(dataset.keys(2))
    assert captions == ["b", "b"]
    assert all("2 of 5 frames can be decoded" in reason for reason in skipped.values())

def test_flow_is_estimated_once_and_for_as_many_frames_as_are_asked_for(captioned, tmp_path, capfd,
                                                                        monkeypatch):
    some = opened(captioned, tmp_path / "run", limit=32)        # 8 frames of either
    assert "16 of 24 frames, of 2 of 2 videos, have their flow: --prepare takes more" in \
        capfd.readouterr().out
    assert len(some.keys(64)) == 2 * 4 and sorted(some.order) == sorted(some.keys(64))
    every = opened(captioned, tmp_path / "run", limit=32, takes_all=True)
    keys = every.keys(64)
    assert len(keys) == 2 * 8
    video, _, motions, _ = every.read(keys)
    assert [motion is None for motion in motions] == [start > 3 for _, start, _ in keys]
    whole, _, prepared, _ = opened(captioned, tmp_path / "other", limit=99).read(keys)
    assert torch.equal(video, whole)
    torch.testing.assert_close(every.motion(video, motions)[:, :-1],
                               some.motion(whole, prepared)[:, :-1], atol=.003, rtol=0)
    monkeypatch.setattr(data, "stream_flow", None)              # none of it twice
    again = opened(captioned, tmp_path / "run", limit=32)
    assert all(map(torch.equal, again.read(some.order)[2], some.read(some.order)[2]))
    if os.path.isdir("/proc/self/fd"):          # of thousands of files none stays open
        there = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
        assert not any(name.endswith(".npy") for name in there)

@pytest.mark.parametrize("files, complaint", [
    ({"metadata.csv": ""}, "needs rows with file_name and one of text, caption, prompt"),
    ({"metadata.csv": "name,text\na.mp4,x\n"}, "needs rows"),
    ({"metadata.csv": "file_name;text\na.mp4;x\n"}, "prompt, has 'file_name;text'"),
    ({"metadata.csv": "file_name,text\na.mp4,one, two\n"}, "row 1: too many commas"),
    ({"metadata.csv": 'file_name,text\na.mp4,"one\ninside/b.mp4,x\n'},
     "csv: row 1: unexpected end"),
    ({"metadata.jsonl": "\n{}\n{\n"}, "metadata.jsonl: row 2: Expecting"),
    ({"metadata.jsonl": "[1]\n"}, "metadata.jsonl: row 1: must be an object"),
    ({"videos.txt": "a.mp4\n", "prompts.txt": "x\ny\n"}, "1 lines in videos.txt, 2 in prompts.txt"),
    ({"prompt.txt": "x\ny\n"}, "has prompt.txt, but no videos.txt"),
    ({"videos.txt": "a.mp4\n"}, "has videos.txt, but no prompts.txt"),
    ({"metadata.csv": "file_name,text\nbroken.mp4,x\n"}, "none of its 3 videos can be used"),
    ({}, "no videos in it, nor metadata")])
def test_a_folder_without_clips_is_refused(folder, files, complaint):
    for name, text in files.items():
        (folder / name).write_text(text)
    with pytest.raises(ValueError, match=complaint):
        opened(folder if files else folder / "run", folder / "run")

# ---------------------------------------------------------------- videos as they are

def grey(code):
    """What a luma code (16 black, 235 white) is of 255."""
    return (code - 16) * 255 / 219

@pytest.mark.parametrize("name, size, sar", [("a.mpg", "720:576", "64/45"),
                                            ("a.mp4", "1024:288", "1/2")])
def test_a_circle_of_pixels_that_are_not_square_is_round(tmp_path, name, size, sar):
    path = make(tmp_path / name, "color=black:s=1024x576:r=25:d=0.2,geq=lum='if(lt(hypot(X-512,Y-"
                "288),150),235,16)':cb=128:cr=128", "-vf", f"scale={size},setsar={sar}", "-q", "3")
    for frame in (read_clip(path, 0, 2, 8, 128)[0], next(open_video(path))):
        inside = frame[0] > 128
        width, height = inside.any(0).sum().item(), inside.any(1).sum().item()
        assert abs(width / height - 1) < .03 and height > 60

@pytest.mark.parametrize("curve, white", [("smpte2084", .5807), ("arib-std-b67", .75)])
def test_hdrs_white_is_white(tmp_path, curve, white):
    code = 64 + 876 * white                             # 203 nits: BT.2408's white
    path = make(tmp_path / "a.mp4", "color=white:s=64x64:r=8:d=1,format=yuv420p10le,geq="
                f"lum='{code}':cb=512:cr=512,setparams=color_primaries=bt2020:color_trc={curve}:"
                "colorspace=bt2020nc", "-c:v", "libx265", "-x265-params",
                f"log-level=error:colorprim=bt2020:transfer={curve}:colormatrix=bt2020nc")
    assert read_clip(path, 0, 4, 8, 16).float().mean() > 248

def test_a_still_in_a_video_of_varying_rate_is_shown_as_long_as_it_stands(tmp_path):
    path = make_varying(tmp_path / "a.mp4", "color=gray:s=64x64:r=30:d=20,geq=lum='if(lt(T,4),"
                        "20+T*10,if(lt(T,14),80,90+(T-14)*15))':cb=128:cr=128,"
                        "select='lt(t,4)+eq(n,120)+gte(t,14)'")
    for seconds in (0, 3, 5, 7, 10, 13.5, 16):
        t = seconds + torch.arange(16) / 8
        code = torch.where(t < 4, 20 + t * 10, torch.where(t < 14, 80, 90 + (t - 14) * 15))
        clip = read_clip(path, int(8 * seconds), 16, 8, 16).float().mean((1, 2, 3))
        torch.testing.assert_close(clip, grey(code), atol=2.5, rtol=0)

def test_a_picture_that_changes_its_size_goes_on_in_time(tmp_path):
    for name, size, grey_at_0 in (("a", "96x64", 20), ("b", "64x48", 110)):
        make(tmp_path / f"{name}.webm", f"color=gray:s={size}:r=30:d=2,geq=lum='{grey_at_0}+T*40'"
             ":cb=128:cr=128", "-c:v", "libvpx", "-b:v", "1M")
    (tmp_path / "list").write_text("file a.webm\nfile b.webm\n")
    subprocess.run([ffmpeg(), "-loglevel", "error", "-f", "concat", "-i", tmp_path / "list", "-c",
                    "copy", tmp_path / "both.webm"], check=True)
    t = torch.arange(32) / 8
    code = torch.where(t < 2, 20 + t * 40, 110 + (t - 2) * 40)
    for start in (0, 10, 20):
        clip = read_clip(tmp_path / "both.webm", start, 12, 8, 16).float().mean((1, 2, 3))
        torch.testing.assert_close(clip, grey(code)[start:start + 12], atol=4, rtol=0)

def test_the_pictures_own_length_counts(tmp_path):
    path = make(tmp_path / "a.mp4", "testsrc2=s=64x64:r=30:d=3", "-f", "lavfi", "-i", "sine=d=9",
                "-pix_fmt", "yuv420p")
    assert data.video_seconds(path) == pytest.approx(3, abs=.1)
    assert common.frames_and_rate(path) == (90, 30)
    path = make_varying(tmp_path / "b.mp4")             # the header has .7 s
    assert data.video_seconds(path) == pytest.approx(1.2, abs=.1)

def test_linked_folders_are_followed_and_hidden_ones_are_not(captioned, tmp_path):
    elsewhere, names = tmp_path / "elsewhere", ["a.mp4", "inside/b.mp4", "link/c.TS"]
    for folder in (elsewhere, captioned / ".Trash-1000", captioned / "__MACOSX"):
        folder.mkdir()
        shutil.copy(captioned / "a.mp4", folder / "c.TS")
    (captioned / "link").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(captioned)          # in a circle
    shutil.copy(captioned / "a.mp4", captioned / "._a.mp4")
    assert data.video_files(captioned) == names

def test_what_ffmpeg_reads_is_taken(tmp_path):
    codecs = {"ts": (), "wmv": (), "flv": (), "ogv": ("-c:v", "libtheora"),
              "webp": ("-c:v", "libwebp_anim"), "3gp": ("-c:v", "mpeg4")}
    for suffix, codec in codecs.items():
        make(tmp_path / f"{suffix}.{suffix}", "testsrc2=s=64x64:r=10:d=0.7", *codec)
        (tmp_path / f"{suffix}.txt").write_text("a")
    assert opened(tmp_path, tmp_path / "run").prepared.keys() == {f"{s}.{s}" for s in codecs}

@pytest.mark.parametrize("program", (RuntimeError("no exe"), "/nowhere/ffmpeg", "/bin/false"))
def test_a_missing_ffmpeg_is_named(captioned, tmp_path, monkeypatch, program):
    monkeypatch.setattr(common.imageio_ffmpeg, "get_ffmpeg_exe",
                        Mock(side_effect=itertools.repeat(program)))
    common.ffmpeg.cache_clear()
    for act, kind in (
            (lambda: opened(captioned, tmp_path / "run"), OSError),
            (lambda: read_clip("a.mp4", 0, 5, 8, 16), OSError),
            (lambda: common.write_video(tmp_path / "b.mp4", torch.zeros(2, 3, 16, 16), 8),
             ValueError)):
        with pytest.raises(kind, match="no ffmpeg: pip install"):
            act()
    common.ffmpeg.cache_clear()

# ---------------------------------------------------------------- sprites, latents, prefetching

def test_sprites_hold_out_their_evaluation_clips():
    dataset = Sprites(TINY, .2)
    video, _, captions, _ = sprite_clips(range(HELD_OUT, HELD_OUT + 3), 5, 16, .2)
    assert torch.equal(dataset.held_out(3)[0], video) and dataset.held_out(3)[1] == captions
    assert torch.equal(dataset.training([7])[0], sprite_clips([7], 5, 16, .2)[0])
    assert dataset.keys(3) == [0, 1, 2]

def test_sprites_are_of_the_presets_world():
    dataset = Sprites(dataclasses.replace(TINY, appearance=.5, target="mask", sigma=.6), .2)
    video, _, flow, _ = dataset.read([7])
    clips, masks, _, _ = sprite_clips([7], 5, 16, .2, None, .5, "mask")
    assert torch.equal(video, clips) and torch.equal(flow, masks) and flow.any()
    torch.testing.assert_close(rgb_to_flow(dataset.motion(video, flow), .6), flow)

def test_latents_follow_the_captions_of_now_and_leave_out_lost_clips(captioned, tmp_path):
    dataset = opened(captioned, tmp_path / "run")
    keys = dataset.keys(2)                                  # two of a, then two of b
    for s, part in enumerate((keys[:3], keys[3:])):
        values = np.arange(len(part), dtype=np.float16).reshape(-1, 1, 1, 1, 1) + 10 * s
        for kind in "xd":
            np.save(tmp_path / f"run/{s:06d}.{kind}.npy", values + (kind == "d"))
        (tmp_path / f"run/{s:06d}.json").write_text(json.dumps(
            {"keys": part, "captions": ["old"] * len(part), "skipped": {}}))
    latents = Latents(tmp_path / "run", dataset)
    assert latents.captions == ["a", "a", "b", "b"]
    x, d, _ = latents.batch([3, 1], 24)
    assert x.flatten().tolist() == [10, 1] and d.flatten().tolist() == [11, 2]
    (captioned / "a.txt").write_text("another")
    assert Latents(tmp_path / "run", opened(captioned, tmp_path / "run")).captions == [
        "another", "another", "b", "b"]
    write_clip(captioned / "a.mp4", ramp(40), 8)            # another video under an old name
    latents = Latents(tmp_path / "run", opened(captioned, tmp_path / "run"))
    assert latents.captions == ["b", "b"]
    assert latents.batch([0, 1], 24)[0].flatten().tolist() == [2, 10]
    (tmp_path / "run/000001.x.npy").write_bytes(b"")
    with pytest.raises(ValueError, match="x.npy: damaged, delete 000001.json"):
        Latents(tmp_path / "run", dataset).batch([3], 24)

def test_encode_gives_each_clip_its_own_caption_where_others_cannot_be_read(captioned, tmp_path):
    dataset = opened(captioned, tmp_path / "run", takes_all=True, limit=1)
    (captioned / "a.mp4").unlink()
    keys = [("a.mp4", 7, 0), *dataset.keys(1), ("a.mp4", 6, 0)]
    run = Mock(preset=TINY, dataset=dataset, device=torch.device("cpu"),
               autocast=contextlib.nullcontext)
    train.encode_shard(run, TAE(TINY.tae), tmp_path / "run/000000", [(0, keys, dataset.read(keys))])
    latents = Latents(tmp_path / "run", dataset)
    assert latents.captions == ["b"] and not latents.changed and [*latents.skipped] == ["a.mp4"]

def test_prefetcher_keeps_the_order_and_works_ahead():
    loaded = []

    def load(item):
        time.sleep(.02 * (item % 3 == 0))
        loaded.append(item)
        return item ** 2

    results = iter(Prefetcher(load, range(9), workers=2))
    assert next(results) == 0 and next(results) == 1
    time.sleep(.1)
    assert 2 < len(loaded) < 7                              # ahead, but not all of it
    assert list(results) == [n ** 2 for n in range(2, 9)]

def test_a_folder_goes_through_all_stages_if_previews_fail(captioned, tmp_path, run, monkeypatch):
    use_tiny_preset(monkeypatch, steps=1, clips=8)
    monkeypatch.setattr(train.DiTStage, "preview", Mock(side_effect=MemoryError("3 GiB")))
    out = tmp_path / "my run"
    flags = ("--preset", "tiny", "--no-compile", "--device", "cpu", "--out", out, "--data")
    code, printed, err = run(train.main, *flags, captioned)
    assert code == 0 and "encode: 16 of 16 clips are there" in printed, err
    assert "jam: no preview of step 1: 3 GiB" in printed and (out / "model.pt").exists()
    write_clip(captioned / "c.mp4", ramp(12), 8)            # new videos join, the others stay
    (captioned / "c.txt").write_text("c")
    before = {path: path.read_bytes() for path in (out / "latents").glob("0*")}
    code, printed, err = run(train.main, *flags, captioned)
    assert code == 0 and "encode: 24 clips in 2 shards, 1 to do" in printed, err
    assert printed.count("done already") == 4
    assert f"python sample.py --run '{out}' --which jam " in printed
    assert all(path.read_bytes() == content for path, content in before.items())
    write_clip(captioned / "d.mp4", ramp(12), 8)            # what encode has not seen is said
    (captioned / "d.txt").write_text("d")
    (captioned / "a.txt").write_text("another a")
    moved = captioned.rename(tmp_path / "moved")            # names in the folder are what counts
    code, printed, err = run(train.main, *flags, moved, "--stage", "base", "--steps", 2)
    assert code == 0, err
    assert "since encode the captions of 8 clips have changed" in printed
    assert "8 clips are new, --stage encode takes them in" in printed
    (other := tmp_path / "other").mkdir()                   # another folder is not taken for it
    write_clip(other / "e.mp4", ramp(12), 8)
    (other / "e.txt").write_text("e")
    listing = (out / "videos.json").read_bytes()
    code, _, err = run(train.main, *flags, other)
    assert code == 2 and "was begun with other videos, none of them is in" in err
    assert (out / "videos.json").read_bytes() == listing
    (moved / "c.mp4").unlink()                              # nor is what is missing passed over
    code, printed, err = run(train.main, *flags, moved, "--stage", "base", "--steps", 2)
    assert code == 0 and "of 16 clips have changed, or videos are gone" in printed, err

"""pytest tests/test_train.py"""
import json
import shutil
import signal
import subprocess
import sys

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY

import train
from flow import HELD_OUT, RAFT, rgb_to_flow, sprite_clips
from train import STAGES, Folder, Latents, Sprites, grid, read_video, write_video
from videojam import TAE, VideoJAM

CLIPS = ROOT.parent / "shared/clips"


@pytest.fixture(scope="module", autouse=True)
def tiny():
    """A preset that passes through a stage in a second."""
    stages = {"tae": (4, 1e-3, 4), "encode": (32, 0, 8), "base": (3, 1e-3, 4), "jam": (3, 1e-3, 4),
              "control": (3, 1e-3, 4)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train.PRESETS, "tiny", TINY)
        patch.setitem(train.DEFAULTS, "tiny", stages)
        patch.setattr(train, "SHARD", 16)
        yield


def flags(out, *more):
    return "--preset", "tiny", "--no-compile", "--device", "cpu", "--out", str(out), *more


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """A run through all stages that nothing interrupted."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *flags(out)])
        train.main()
    return out


@pytest.fixture
def quick(monkeypatch):
    """Previews cost more than tiny steps do: they stay empty."""
    monkeypatch.setattr(VideoJAM, "generate", lambda *_, **__: (torch.zeros(8, 5, 3, 16, 16), None))
    monkeypatch.setattr(train, "write_video", lambda path, *_: None)


def begun(finished, out, stage):
    """A copy of a run as it was before `stage`."""
    out.mkdir()
    for name in ("settings.json", *(f"{s}.pt" for s in ("tae", "base") if STAGES.index(s)
                                    < STAGES.index(stage))):
        shutil.copy(finished / name, out)
    if stage != "tae":
        shutil.copytree(finished / "latents", out / "latents")
    return out


def rows(out, stage):
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [line for line in lines if json.loads(line)["stage"] == stage]


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def equal(a, b):
    """Whether two checkpoints are the same to the bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


# ---------------------------------------------------------------- all stages


def test_one_command_makes_checkpoints_previews_metrics_and_a_bundle(finished):
    for stage, (steps, _, _) in train.DEFAULTS["tiny"].items():
        if stage == "encode":
            continue
        assert torch.load(finished / f"{stage}.pt")["step"] == steps
        assert iio.imread(finished / f"previews/{stage}-{steps:06d}.mp4").shape[0] == TINY.frames
        losses = {"tae": ["loss"], "jam": ["loss_x", "loss_d"]}.get(stage, ["loss_x"])
        logged = [json.loads(row) for row in rows(finished, stage)]
        assert [row["step"] for row in logged if losses[0] in row] == list(range(1, steps + 1))
        for loss in losses:
            assert all(np.isfinite(row[loss]) for row in logged if losses[0] in row)
            bins = [row[loss.replace("loss", "bins")] for row in logged if "bins_x" in row]
            assert all(len(b) == 5 for b in bins) and (stage == "tae") == (not bins)
            assert not bins or None in sum(bins, [])        # 4 clips: some bin is empty, null
        assert "NaN" not in "".join(rows(finished, stage))
    for which in ("jam", "base", "control"):        # the averaged weights, in half precision
        dit = VideoJAM.load(finished / "model.pt", which).dit
        ema = torch.load(finished / f"{which}.pt")["ema"]
        assert equal(dict(dit.state_dict()), {k: v.half().float() for k, v in ema.items()})
    assert not [path for path in finished.rglob(".*")]                  # no temporary file is left


def test_the_average_follows_the_weights_and_the_tae_gets_its_basis(finished):
    state = torch.load(finished / "tae.pt")
    assert not equal(state["model"], state["ema"]) and not equal(
        state["ema"]["mean"][0], state["ema"]["mean"][1])
    tae = TAE(TINY.tae)
    tae.load_state_dict(state["ema"])
    for motion, clips in enumerate(Sprites(TINY, .2).clips(range(256))[:2]):
        latent = tae.encode(clips, bool(motion)).detach().transpose(0, 1).flatten(1)
        torch.testing.assert_close(latent.mean(1), torch.zeros(4), atol=.05, rtol=0)
        assert latent.std() == pytest.approx(1, abs=.05)


def test_latents_are_those_of_the_clips_and_are_not_made_twice(finished, run):
    tae, before = TAE(TINY.tae), content(finished / "latents")
    tae.load_state_dict(torch.load(finished / "tae.pt")["ema"])
    latents = Latents(finished / "latents")
    assert len(latents.captions) == 32
    x, d, y = latents.batch([21, 3], TINY.dit.max_bytes)
    video, motion, captions = Sprites(TINY, .2).clips([21, 3])
    assert [latents.captions[i] for i in (21, 3)] == captions and y.shape[1] <= 25
    torch.testing.assert_close(x, tae.encode(video), atol=.1, rtol=.05)         # bf16 made them
    torch.testing.assert_close(d, tae.encode(motion, True), atol=.1, rtol=.05)
    stamps = {path: path.stat().st_mtime_ns for path in before if path.suffix == ".npy"}
    assert run(train.main, *flags(finished, "--stage", "encode"))[0] == 0
    assert content(finished / "latents") == before
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}


def test_evaluation_takes_held_out_seeds_and_training_the_others():
    world = Sprites(TINY, .2)
    video, _, captions, _ = sprite_clips(range(HELD_OUT, HELD_OUT + 3), 5, 16, .2)
    assert torch.equal(world.held_out(3)[0], video) and world.held_out(3)[2] == captions
    assert torch.equal(world.clips([7])[0], sprite_clips([7], 5, 16, .2)[0])


def test_the_control_sees_what_videojam_sees_but_for_motion(finished, tmp_path, run, quick,
                                                           monkeypatch):
    original, seen = train.squared_errors, {"jam": [], "control": []}

    for stage in seen:
        def spy(model, z1, y, C, **options):
            def watched(z, t, y):
                seen[stage].append((z[:, :C], t, y))
                return model(z, t, y)
            return original(watched, z1, y, C, **options)

        monkeypatch.setattr(train, "squared_errors", spy)
        out = begun(finished, tmp_path / stage, stage)
        assert run(train.main, *flags(out, "--stage", stage))[0] == 0
    assert len(seen["jam"]) == 3
    for jam, control in zip(*seen.values()):
        for a, b in zip(jam, control):
            assert torch.equal(a, b)
    assert not torch.equal(seen["jam"][0][1], seen["jam"][1][1])        # each step draws anew


# ---------------------------------------------------------------- interrupted and resumed


class PowerCut(BaseException):
    """Nobody catches this: the process is gone."""


def power_cut():
    raise PowerCut


def ctrl_c():
    signal.raise_signal(signal.SIGINT)


def breaks_at(monkeypatch, owner, name, call, how):
    """The call-th call of owner.name is interrupted before it does anything."""
    original, count = getattr(owner, name), []

    def wrapped(*args, **options):
        count.append(1)
        if len(count) == call:
            how()
        return original(*args, **options)

    monkeypatch.setattr(owner, name, wrapped)


@pytest.mark.parametrize("how, seconds", [(ctrl_c, 60), (power_cut, 60), (power_cut, -1)],
                         ids=["ctrl-c", "killed before a checkpoint", "killed after one"])
@pytest.mark.parametrize("stage, owner, name, call", [
    ("tae", train, "tae_loss", 3), ("tae", torch, "_foreach_lerp_", 3),
    ("tae", TAE, "posterior", 17),      # amid the final statistics, which begin with the 11th call
    ("jam", train, "squared_errors", 2), ("jam", torch, "_foreach_lerp_", 2),
    ("jam", train, "write_video", 2),
    ("jam", torch.nn.utils, "clip_grad_norm_", 3)])
def test_interrupted_anywhere_and_started_again_ends_the_same_to_the_bit(
        finished, tmp_path, run, quick, monkeypatch, stage, owner, name, call, how, seconds):
    out = begun(finished, tmp_path / "parts", stage)
    with monkeypatch.context() as patch:
        patch.setattr(train, "CHECKPOINT_SECONDS", seconds)
        breaks_at(patch, owner, name, call, how)
        try:
            code, _, err = run(train.main, *flags(out, "--stage", stage))
            step = torch.load(out / f"{stage}.pt")["step"]      # the step is done and saved
            assert how is ctrl_c and code == 2 and f"stopped at step {step} of {stage}" in err
        except PowerCut:                            # the row that was being written is torn
            with open(out / "metrics.jsonl", "a") as file:
                file.write('{"stage": "ta')
    assert run(train.main, *flags(out, "--stage", stage))[0] == 0
    assert equal(torch.load(out / f"{stage}.pt"), torch.load(finished / f"{stage}.pt"))
    assert rows(out, stage) == rows(finished, stage)                    # nor is any row there twice


def test_a_stage_that_is_done_is_left_alone_and_can_be_made_longer(finished, tmp_path, run, quick):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    before = content(out)
    code, printed, _ = run(train.main, *flags(out))
    assert code == 0 and printed.count("done already") == 4
    after = content(out)
    assert all(after[path] == before[path] for path in before if path.name != "model.pt")
    assert run(train.main, *flags(out, "--stage", "jam", "--steps", "5"))[0] == 0
    assert torch.load(out / "jam.pt")["step"] == 5
    assert [json.loads(row)["step"] for row in rows(out, "jam")] == [1, 2, 3, 4, 5]


def test_the_learning_rate_is_constant_then_falls_linearly_to_the_last_step(finished, tmp_path, run,
                                                                            quick):
    out = begun(finished, tmp_path / "run", "base")
    assert run(train.main, *flags(out, "--stage", "base", "--steps", "20"))[0] == 0
    lr = [json.loads(row)["lr"] for row in rows(out, "base")]           # of steps 2, 4, ... 20
    np.testing.assert_allclose(lr, [2e-3 / 3] + [1e-3] * 6 + [5e-3 / 6, 3e-3 / 6, 1e-3 / 6])


def test_a_stage_that_was_stopped_is_refused_by_the_next_and_not_exported(
        finished, tmp_path, refuses, run, quick):
    out = begun(finished, tmp_path / "run", "jam")
    state = torch.load(out / "base.pt")
    torch.save({**state, "of": 9}, out / "base.pt")
    complaint = refuses(train.main, *flags(out, "--stage", "jam"))
    assert "base stopped at step 3 of 9, finish it first with --stage base" in complaint
    torch.save(state, out / "base.pt")
    shutil.copy(finished / "control.pt", out)
    torch.save({**torch.load(out / "control.pt"), "of": 9}, out / "control.pt")
    assert run(train.main, *flags(out, "--stage", "jam"))[0] == 0
    assert set(torch.load(out / "model.pt")["dits"]) == {"base", "jam"}


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize("flag, value, complaint", [
    ("--preset", "huge", "unknown preset 'huge': one of toy, small, 4b, 30b"),
    ("--steps", 0, "--steps must be positive"), ("--steps", -5, "--steps must be positive"),
    ("--lr", 0, "--lr must be positive"), ("--batch", 0, "--batch must be positive"),
    ("--device", "bad", "--device bad: no such device"), ("--rich", 2, "from 0 to 1"),
    ("--data", "nowhere", "no metadata.csv")])
def test_bad_flags_are_one_line_and_leave_no_run_folder(tmp_path, refuses, flag, value, complaint):
    assert complaint in refuses(train.main, *flags(tmp_path / "run"), flag, value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("more, complaint", [
    (("--seed", 1), "begun with seed 0, not 1"), (("--rich", .7), "begun with rich 0.2, not 0.7"),
    (("--data", str(CLIPS)), "begun with data None"),
    (("--stage", "tae", "--lr", .5, "--steps", 9), "begun with lr 0.001, not 0.5"),
    (("--stage", "jam", "--batch", 2, "--steps", 9), "begun with batch 4, not 2"),
    (("--stage", "jam", "--uniform-t", "--steps", 9), "begun with uniform_t False, not True")])
def test_a_run_folder_of_other_settings_is_refused_and_left_as_it_was(finished, refuses, more,
                                                                     complaint):
    before = content(finished)
    assert complaint in refuses(train.main, *flags(finished), *more)
    assert content(finished) == before


def test_stages_say_what_they_lack(tmp_path, refuses):
    for stage, lacking in (("encode", "tae"), ("base", "latents"), ("jam", "base")):
        complaint = refuses(train.main, *flags(tmp_path / stage, "--stage", stage))
        assert f"has no {lacking} yet, run --stage" in complaint
    (tmp_path / "file").write_text("")
    assert "cannot write into" in refuses(train.main, *flags(tmp_path / "file/run"))


def test_damaged_checkpoints_and_latents_of_another_tae_are_refused(finished, tmp_path, refuses):
    out = begun(finished, tmp_path / "run", "base")
    (out / "latents/tae_step").write_text("3")
    assert "encoded by the TAE of step 3, it is now at 4" in refuses(
        train.main, *flags(out, "--stage", "encode"))
    state = torch.load(out / "tae.pt")
    torch.save({**state, "version": 1}, out / "tae.pt")
    assert "tae.pt: of another version" in refuses(train.main, *flags(out))
    (out / "tae.pt").write_bytes((out / "tae.pt").read_bytes()[:1000])
    assert "not a checkpoint file, or damaged" in refuses(train.main, *flags(out))


def test_as_a_command_bad_input_ends_in_exit_code_2_and_one_line(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "train.py", "--preset", "huge"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "train.py: unknown preset 'huge': one of toy, small, 4b, 30b\n"
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- own videos


def ramp(frames, height=32, width=32):
    """A video that gets brighter by 8 a frame, so that a frame's number can be read off it."""
    return (np.arange(frames, dtype=np.uint8) * 8).repeat(height * width * 3).reshape(
        frames, height, width, 3)


def write(path, frames, fps):
    iio.imwrite(path, frames, plugin="FFMPEG", fps=fps, macro_block_size=2,
                output_params=["-crf", "1"])


@pytest.mark.parametrize("fps, count", [(8, 20), (16, 10), (24, 7), (4, 40)])
def test_videos_are_read_at_the_presets_frame_rate(tmp_path, fps, count):
    write(tmp_path / "a.mp4", ramp(20), fps)
    video = read_video(tmp_path / "a.mp4", 8, 16)
    assert video.dtype == torch.uint8 and video.shape[1:] == (3, 16, 16)
    assert abs(len(video) - count) <= (fps < 8)
    # frame k shows what the file shows at k / 8 s: its frame k fps / 8, or a neighbour of a half
    shown = torch.arange(len(video)) * float(fps)
    brightness = video.float().mean((1, 2, 3))
    torch.testing.assert_close(brightness, shown, atol=7 if fps < 8 else 3, rtol=0)


@pytest.mark.parametrize("height, width", [(32, 64), (64, 32)])
def test_videos_are_cropped_to_the_square_in_their_middle(tmp_path, height, width):
    frames = np.zeros((3, height, width, 3), np.uint8)
    frames[:, height // 2 - 16:height // 2 + 16, width // 2 - 16:width // 2 + 16] = 250
    frames[:, :height // 2] //= 2                   # the upper half is darker
    write(tmp_path / "a.mp4", frames, 8)
    video = read_video(tmp_path / "a.mp4", 8, 16).float()
    assert 100 < video[:, :, 2:6, 2:-2].min() and video[:, :, 2:6].max() < 150
    assert video[:, :, 10:, 2:-2].min() > 200


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two videos of other sizes and rates, and three that cannot be used. Flow k is .2 k px."""
    def estimate(raft, video):
        flow = torch.zeros(1, video.shape[1], 2, 16, 16)
        flow[:, :, 0] = .2 * torch.arange(video.shape[1]).view(-1, 1, 1)
        return flow

    monkeypatch.setattr(RAFT, "load", classmethod(lambda cls: None))
    monkeypatch.setattr(train, "estimate_flow", estimate)
    path = tmp_path / "data"
    path.mkdir()
    write(path / "a.mp4", ramp(12), 8)
    write(path / "b.mp4", ramp(24, 64, 32), 16)
    write(path / "short.mp4", ramp(4), 8)
    (path / "broken.mp4").write_bytes((path / "a.mp4").read_bytes()[:500])
    (path / "metadata.csv").write_text('file_name,text\na.mp4,"one, with a comma"\nbroken.mp4,x\n'
                                       'short.mp4,x\nmissing.mp4,x\nb.mp4,é\n')
    return path


def test_a_folder_skips_what_it_cannot_use_and_says_so(folder, capfd):
    world = Folder(folder, TINY)
    printed = "".join(capfd.readouterr())
    assert world.captions == ["one, with a comma", "é"] and "2 of 5 videos" in printed
    for name in ("broken.mp4", "missing.mp4", "short.mp4: 4 frames"):
        assert f"skipped {name}" in printed


def test_a_clip_of_a_folder_is_a_cut_with_its_own_motion_and_caption(folder):
    world = Folder(folder, TINY)
    video, motion, captions = world.clips(range(40))
    assert video.shape == motion.shape == (40, 5, 3, 16, 16)
    assert 0 <= video.min() and video.max() <= 1
    assert captions == ["one, with a comma", "é"] * 20
    brightness, shift = (video.mean((2, 3, 4)) * 255), rgb_to_flow(motion)[:, :, 0].mean((2, 3))
    for k, speed in ((0, 1), (1, 2)):               # b.mp4 shows every second of its frames
        frame = (brightness[k::2] / 8 / speed).round()
        torch.testing.assert_close(shift[k::2] / .2, frame, atol=.3, rtol=0)
        assert (frame.diff(dim=1) == 1).all() and len(frame[:, 0].unique()) > 3
    again = world.clips([17])
    assert torch.equal(again[0][0], video[17]) and torch.equal(again[1][0], motion[17])


def test_a_folder_goes_through_all_stages(folder, tmp_path, run):
    code, _, err = run(train.main, *flags(tmp_path / "run", "--data", str(folder), "--steps", "1"))
    assert code == 0, err
    video, motion = VideoJAM.load(tmp_path / "run/model.pt").generate(["é"], steps=2)
    assert video.shape == motion.shape == (1, 5, 3, 16, 16)


@pytest.mark.parametrize("metadata, complaint", [
    (None, "no metadata.csv"), ("", "columns file_name and text"), ("file_name,text\n", "columns"),
    ("name,text\na.mp4,x\n", "columns"),
    ("file_name,text\nbroken.mp4,x\n", "none of the 1 videos")])
def test_a_folder_that_gives_no_clip_is_refused(folder, tmp_path, refuses, metadata, complaint):
    (folder / "metadata.csv").unlink()
    if metadata is not None:
        (folder / "metadata.csv").write_text(metadata)
    assert complaint in refuses(train.main, *flags(tmp_path / "run", "--data", str(folder)))
    assert not list((tmp_path / "run").glob("*.pt"))


@pytest.mark.skipif(not CLIPS.is_dir(), reason="the real clips are not part of the project")
@pytest.mark.parametrize("name, seconds", [("cityCC0.mpg", 190 / 25), ("bikes.mp4", 250 / 25),
                                           ("cockatoo.mp4", 280 / 20)])
def test_real_clips_are_read_whole(name, seconds):
    video = read_video(CLIPS / name, 8, 32).float()
    assert abs(len(video) - 8 * seconds) <= 1 and video.shape[1:] == (3, 32, 32)
    assert video.std() > 20 and (video[1:] - video[:-1]).abs().mean() > .2


# ---------------------------------------------------------------- video files


@pytest.mark.parametrize("name", ("a.mp4", "a.gif"))
def test_written_videos_come_back_enlarged_to_what_a_person_can_see(tmp_path, name):
    video = sprite_clips([3], 6, 32)[0][0]
    write_video(tmp_path / name, video, fps=8)
    frames = torch.from_numpy(iio.imread(tmp_path / name)).permute(0, 3, 1, 2).float() / 255
    assert frames.shape == (6, 3, 256, 256)
    assert (frames[..., 4::8, 4::8] - video).abs().mean() < .02     # pixels stay squares
    if name == "a.mp4":
        assert iio.immeta(tmp_path / name, plugin="FFMPEG")["fps"] == 8
    else:
        assert iio.immeta(tmp_path / name)["duration"] in (120, 125, 130)       # ms, in hundredths
    write_video(tmp_path / name, video, 8, 2)
    assert iio.imread(tmp_path / name).shape[1:3] == (64, 64)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_grid_has_a_column_for_each_clip_and_a_row_for_each_argument():
    a, b = torch.zeros(3, 2, 3, 4, 4), torch.full((3, 2, 3, 4, 4), .5)
    picture = grid(a, b)
    assert picture.shape == (2, 3, 12, 18)
    assert (picture[:, :, 1:5, 7:11] == 0).all() and (picture[:, :, 7:11, 7:11] == .5).all()
    assert (picture[:, :, 0] == 1).all()                                # a white frame around each

"""pytest tests/test_train.py"""
import copy
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, randomised

import train
from flow import HELD_OUT, RAFT, rgb_to_flow, sprite_clips
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from train import STAGES, Folder, Latents, Sprites, grid, read_clip, write_video
from videojam import TAE, DiT, VideoJAM, tokenize

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
        patch.setattr(train, "BASIS_CLIPS", 32)
        yield


def flags(out, *more):
    return ("--preset", "tiny", "--rich", ".2", "--no-compile", "--device", "cpu", "--precision",
            "fp32", "--out", str(out), *more)


def checkpoints(out, stage):
    """The folders of a stage's checkpoints, the last one last."""
    return sorted((out / "checkpoints").glob(f"{stage}-*"))


def checkpoint(out, stage):
    """The tensors and the status of a stage's last checkpoint."""
    last = checkpoints(out, stage)[-1]
    dcp_to_torch_save(last, out / "whole")
    state = torch.load(out / "whole", weights_only=True)
    (out / "whole").unlink()
    return {**state, **json.loads((last / "status.json").read_text())}


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """A run through all stages that nothing interrupted."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *flags(out)])
        train.main()
    return out


@pytest.fixture(scope="module")
def uninterrupted(finished):
    """Its last checkpoints: read once."""
    return {stage: checkpoint(finished, stage) for stage in ("tae", "jam")}


@pytest.fixture
def quick(monkeypatch):
    """Previews cost more than tiny steps do: they stay empty."""
    monkeypatch.setattr(VideoJAM, "generate", lambda *_, **__: (torch.zeros(8, 5, 3, 16, 16), None))
    monkeypatch.setattr(train, "write_video", lambda path, *_: None)


def begun(finished, out, stage):
    """A copy of a run as it was before `stage`."""
    (out / "checkpoints").mkdir(parents=True)
    shutil.copy(finished / "settings.json", out)
    if stage != "tae":
        shutil.copy(finished / "tae.pt", out)
        shutil.copytree(finished / "latents", out / "latents")
    if STAGES.index("base") < STAGES.index(stage):
        last = checkpoints(finished, "base")[-1]
        shutil.copytree(last, out / "checkpoints" / last.name)
    return out


def clips_of(seeds):
    """Video, RGB flow and captions of the tiny sprite world."""
    world = Sprites(TINY, .2)
    video, captions, flow, _ = world.read(seeds)
    return video, world.motion(video, flow), captions


def rows(out, stage):
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [line for line in lines if json.loads(line)["stage"] == stage]


def losses(out, stage):
    """{"step": step, name: loss} of each step that was logged."""
    return [{name: value for name, value in row.items() if name == "step" or "loss" in name}
            for row in map(json.loads, rows(out, stage)) if "lr" in row]


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
        assert checkpoint(finished, stage)["step"] == steps and len(checkpoints(
            finished, stage)) == 2
        assert iio.imread(finished / f"previews/{stage}-{steps:06d}.mp4").shape[0] == TINY.frames
        names = {"tae": ["loss"], "jam": ["loss_x", "loss_d"]}.get(stage, ["loss_x"])
        logged = [json.loads(row) for row in rows(finished, stage)]
        assert [row["step"] for row in logged if names[0] in row] == list(range(1, steps + 1))
        for loss in names:
            assert all(np.isfinite(row[loss]) for row in logged if names[0] in row)
            bins = [row[loss.replace("loss", "bins")] for row in logged if "bins_x" in row]
            assert all(len(b) == 5 for b in bins) and (stage == "tae") == (not bins)
            assert not bins or None in sum(bins, [])        # 4 clips: some bin is empty, null
        assert "NaN" not in "".join(rows(finished, stage))
    for which in ("jam", "base", "control"):        # the averaged weights, in half precision
        dit = VideoJAM.load(finished / "model.pt", which).dit
        ema = checkpoint(finished, which)["ema"]
        assert equal(dict(dit.state_dict()), {k: v.half().float() for k, v in ema.items()})
    assert not [path for path in finished.rglob(".*") if path.name != ".metadata"]      # (DCP's)


def test_the_average_follows_the_weights_and_the_tae_gets_its_basis(finished):
    state = checkpoint(finished, "tae")
    assert not equal(state["model"], state["ema"])
    tae = TAE(TINY.tae)
    tae.load_state_dict(torch.load(finished / "tae.pt")["state"])
    assert equal(dict(tae.named_parameters()), state["ema"])
    assert not torch.equal(tae.mean[0], tae.mean[1])
    for motion, clips in enumerate(clips_of(range(train.BASIS_CLIPS))[:2]):
        latent = tae.encode(clips, bool(motion)).detach().transpose(0, 1).flatten(1)
        torch.testing.assert_close(latent.mean(1), torch.zeros(4), atol=.05, rtol=0)
        assert latent.std() == pytest.approx(1, abs=.05)


def test_latents_are_those_of_the_clips_and_are_not_made_twice(finished, run):
    tae, before = TAE(TINY.tae), content(finished / "latents")
    tae.load_state_dict(torch.load(finished / "tae.pt")["state"])
    latents = Latents(finished / "latents")
    assert len(latents.captions) == 32
    x, d, y = latents.batch([21, 3], TINY.dit.max_bytes)
    video, motion, captions = clips_of([21, 3])
    assert [latents.captions[i] for i in (21, 3)] == captions
    assert torch.equal(y, tokenize(captions, TINY.dit.max_bytes))
    torch.testing.assert_close(x, tae.encode(video), atol=2e-3, rtol=2e-3)      # kept in fp16
    torch.testing.assert_close(d, tae.encode(motion, True), atol=2e-3, rtol=2e-3)
    stamps = {path: path.stat().st_mtime_ns for path in before if path.suffix == ".npy"}
    assert run(train.main, *flags(finished, "--stage", "encode"))[0] == 0
    assert content(finished / "latents") == before
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}


def test_evaluation_takes_held_out_seeds_and_training_the_others():
    world = Sprites(TINY, .2)
    video, _, captions, _ = sprite_clips(range(HELD_OUT, HELD_OUT + 3), 5, 16, .2)
    assert torch.equal(world.held_out(3)[0], video) and world.held_out(3)[1] == captions
    assert torch.equal(world.training([7])[0], sprite_clips([7], 5, 16, .2)[0])
    assert world.keys(3) == [0, 1, 2]


def test_the_control_sees_what_videojam_sees_but_for_motion(finished, tmp_path, run, quick,
                                                           monkeypatch):
    original, C, seen = train.squared_errors, TINY.tae.channels, {"jam": [], "control": []}

    for stage in seen:
        def spy(model, t, z_t, y, v):
            seen[stage].append((z_t[:, :C], t, y, v[:, :C]))
            return original(model, t, z_t, y, v)

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


def sigterm():
    signal.raise_signal(signal.SIGTERM)


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
    ("tae", train, "tae_loss", 3),      # (half of a step: there are two)
    ("tae", TAE, "posterior", 75),      # amid the final statistics, which begin with the 73rd call
    ("jam", train, "squared_errors", 2), ("jam", torch, "_foreach_lerp_", 2),
    ("jam", train, "write_video", 2),
    ("jam", torch.nn.utils, "clip_grad_norm_", 3)])
def test_interrupted_anywhere_and_started_again_ends_the_same_to_the_bit(
        finished, uninterrupted, tmp_path, run, quick, monkeypatch, stage, owner, name, call, how,
        seconds):
    out = begun(finished, tmp_path / "parts", stage)
    signal.signal(signal.SIGINT, signal.default_int_handler)    # a job in the background has none
    with monkeypatch.context() as patch:
        patch.setattr(train, "CHECKPOINT_SECONDS", seconds)
        breaks_at(patch, owner, name, call, how)
        try:
            code, _, err = run(train.main, *flags(out, "--stage", stage))
            assert how is ctrl_c
            if owner is TAE:                        # after the last step: nothing to wait for
                assert code == 130
            else:                                   # the step is done and saved
                step = checkpoint(out, stage)["step"]
                assert code == 2 and f"stopped at step {step} of {stage}" in err
        except PowerCut:                            # the row that was being written is torn
            with open(out / "metrics.jsonl", "a") as file:
                file.write('{"stage": "ta')
    assert run(train.main, *flags(out, "--stage", stage))[0] == 0
    assert equal(checkpoint(out, stage), uninterrupted[stage])
    if stage == "tae":
        assert equal(torch.load(out / "tae.pt"), torch.load(finished / "tae.pt"))
    assert rows(out, stage) == rows(finished, stage)                    # nor is any row there twice


def test_a_clusters_sigterm_ends_the_step_too(finished, tmp_path, run, quick, monkeypatch):
    out, before = begun(finished, tmp_path / "run", "jam"), signal.getsignal(signal.SIGTERM)
    breaks_at(monkeypatch, train, "squared_errors", 2, sigterm)
    code, _, err = run(train.main, *flags(out, "--stage", "jam"))
    assert code == 2 and "stopped at step 2 of jam: the same command goes on" in err
    assert checkpoint(out, "jam")["step"] == 2 and signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("apart", (0, 9))
def test_a_second_ctrl_c_waits_for_nothing_unless_it_is_torchruns_echo(
        finished, tmp_path, run, quick, monkeypatch, apart):
    out, clock = begun(finished, tmp_path / "run", "jam"), train.time.time

    def twice():
        ctrl_c()
        monkeypatch.setattr(train.time, "time", lambda: clock() + apart)
        ctrl_c()

    signal.signal(signal.SIGINT, signal.default_int_handler)
    breaks_at(monkeypatch, train, "squared_errors", 2, twice)
    code, _, err = run(train.main, *flags(out, "--stage", "jam"))
    assert (code, "stopped at step 2" in err) == ((130, False) if apart else (2, True))


def test_without_flags_a_stage_goes_on_as_it_was_begun_and_the_control_is_jams(finished, tmp_path,
                                                                               run, quick):
    out = begun(finished, tmp_path / "run", "jam")
    own = "--steps", "2", "--lr", "2e-3", "--batch", "2"
    assert run(train.main, *flags(out, "--stage", "jam", *own))[0] == 0
    assert run(train.main, *flags(out, "--stage", "control"))[0] == 0
    assert {key: checkpoint(out, "control")[key] for key in ("step", "lr", "batch")} == {
        "step": 2, "lr": 2e-3, "batch": 2}
    assert run(train.main, *flags(out))[0] == 0         # no fewer steps than by default
    for stage in ("jam", "control"):
        assert (checkpoint(out, stage)["step"], checkpoint(out, stage)["lr"]) == (3, 2e-3)
    VideoJAM.load(out / "model.pt", "control")


def test_a_stage_that_is_done_is_left_alone_and_can_be_made_longer(finished, tmp_path, run, quick):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    before = content(out)
    code, printed, _ = run(train.main, *flags(out))
    assert code == 0 and printed.count("done already") == 4
    after = content(out)
    assert all(after[path] == before[path] for path in before if path.name != "model.pt")
    assert run(train.main, *flags(out, "--stage", "jam", "--steps", "5"))[0] == 0
    assert checkpoint(out, "jam")["step"] == 5 and len(checkpoints(out, "jam")) == 2
    assert [json.loads(row)["step"] for row in rows(out, "jam")] == [1, 2, 3, 4, 5]


def test_the_learning_rate_is_constant_then_falls_linearly_to_the_last_step(finished, tmp_path, run,
                                                                            quick):
    out = begun(finished, tmp_path / "run", "base")
    assert run(train.main, *flags(out, "--stage", "base", "--steps", "20"))[0] == 0
    lr = [json.loads(row)["lr"] for row in rows(out, "base")]           # of steps 2, 4, ... 20
    np.testing.assert_allclose(lr, [2e-3 / 3] + [1e-3] * 6 + [5e-3 / 6, 3e-3 / 6, 1e-3 / 6])


def test_captions_have_one_length_in_all_steps(finished, tmp_path, run, quick, monkeypatch):
    out, original, shapes = begun(finished, tmp_path / "run", "base"), train.squared_errors, set()

    def seen(model, t, z_t, y, v):
        shapes.add(y.shape)
        return original(model, t, z_t, y, v)

    monkeypatch.setattr(train, "squared_errors", seen)
    assert run(train.main, *flags(out, "--stage", "base", "--steps", "20"))[0] == 0
    captions = Latents(out / "latents").captions
    lengths = {tokenize([caption], TINY.dit.max_bytes).shape[1] for caption in captions}
    assert len(lengths) > 1 and [shape[1] for shape in shapes] == [max(lengths)]


def test_a_stage_that_was_stopped_is_refused_by_the_next_and_not_exported(
        finished, tmp_path, refuses, run, quick):
    out = begun(finished, tmp_path / "run", "jam")
    status = checkpoints(out, "base")[-1] / "status.json"
    whole = status.read_text()
    status.write_text(json.dumps({**json.loads(whole), "of": 9}))
    complaint = refuses(train.main, *flags(out, "--stage", "jam"))
    assert "base stopped at step 3 of 9, finish it first with --stage base" in complaint
    status.write_text(whole.replace('"lr"', '"l"'))
    assert "status.json: damaged" in refuses(train.main, *flags(out, "--stage", "base"))
    status.write_text(whole)
    stopped = shutil.copytree(checkpoints(finished, "control")[-1],
                              out / "checkpoints/control-000000003") / "status.json"
    stopped.write_text(json.dumps({**json.loads(stopped.read_text()), "of": 9}))
    assert run(train.main, *flags(out, "--stage", "jam"))[0] == 0
    assert set(torch.load(out / "model.pt")["dits"]) == {"base", "jam"}


def test_a_stage_that_was_begun_for_more_steps_goes_on_to_them(finished, tmp_path, run, quick):
    """Without --steps: the default's would be done already, with the stage for ever unfinished."""
    out = begun(finished, tmp_path / "run", "jam")
    status = checkpoints(out, "base")[-1] / "status.json"
    status.write_text(json.dumps({**json.loads(status.read_text()), "of": 5}))
    assert run(train.main, *flags(out, "--stage", "base"))[0] == 0
    assert checkpoint(out, "base")["step"] == checkpoint(out, "base")["of"] == 5
    assert run(train.main, *flags(out, "--stage", "jam"))[0] == 0


def test_an_encoding_that_was_stopped_is_refused_by_the_next(finished, tmp_path, refuses):
    out = begun(finished, tmp_path / "run", "base")
    (out / "latents/000001.json").unlink()
    complaint = refuses(train.main, *flags(out, "--stage", "base"))
    assert "encode stopped at 1 of 2 shards, finish it first with --stage encode" in complaint
    assert not checkpoints(out, "base")


def test_a_finished_tae_does_not_hold_up_runs_on_more_processes(finished, tmp_path, run, quick,
                                                                monkeypatch):
    """Its batch of 4 has no 8 parts; those of the other stages have."""
    out = begun(finished, tmp_path / "run", "base")
    shutil.copytree(checkpoints(finished, "tae")[-1], out / "checkpoints/tae-000000004")
    for stage in ("base", "jam", "control"):
        monkeypatch.setitem(train.DEFAULTS["tiny"], stage, (1, 1e-3, 8))
    code, printed, err = run(train.main, *flags(out, "--accumulate", "8"))
    assert code == 0 and "tae: 4 steps are done already" in printed, err


def test_the_tae_of_a_bundle_stays_where_a_taes_training_was_stopped(finished, tmp_path, run,
                                                                     quick):
    out = begun(finished, tmp_path / "run", "base")
    stopped = shutil.copytree(checkpoints(finished, "tae")[-1],
                              out / "checkpoints/tae-000000004") / "status.json"
    stopped.write_text(json.dumps({**json.loads(stopped.read_text()), "of": 9}))
    content = torch.load(out / "tae.pt")
    torch.save({**content, "origin": "--init model.pt"}, out / "tae.pt")
    kept = (out / "tae.pt").read_bytes()
    code, printed, _ = run(train.main, *flags(out, "--stage", "tae"))
    assert code == 0 and "tae: it is there already" in printed
    assert (out / "tae.pt").read_bytes() == kept


def test_ctrl_c_while_a_checkpoint_is_read_does_not_call_it_damaged(finished, tmp_path, run, quick,
                                                                    monkeypatch):
    def interrupted(*_, **__):
        raise train.dcp.api.CheckpointException("load", {0: (KeyboardInterrupt(), None)})

    out = begun(finished, tmp_path / "run", "jam")
    monkeypatch.setattr(train.dcp, "load", interrupted)
    code, _, err = run(train.main, *flags(out, "--stage", "jam"))
    assert code == 130 and "interrupted" in err and "delete" not in err


@pytest.mark.parametrize("error", [MemoryError("3 GiB"), OSError("disk full")])
def test_a_preview_that_fails_does_not_end_the_run(finished, tmp_path, run, quick, monkeypatch,
                                                   error):
    def fails(*_):
        raise error

    out = begun(finished, tmp_path / "run", "jam")
    monkeypatch.setattr(train, "write_video", fails)
    code, printed, err = run(train.main, *flags(out, "--stage", "jam"))
    assert code == 0 and f"no preview of step 3: {error}" in printed + err
    assert checkpoint(out, "jam")["step"] == 3


# ---------------------------------------------------------------- several processes


def command(processes, out, *more, steps=10, clips=32, torchrun=(), extra=""):
    """subprocess's arguments for train.py with the tiny preset, `steps` in each stage: without
    torchrun where processes is 0. extra: lines of Python to run before."""
    script = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import flow
import train
from conftest import TINY
train.PRESETS["tiny"], train.SHARD, train.BASIS_CLIPS = TINY, 16, 32
train.CHUNK = 3                         # neither one process's share of a batch nor all of it
stage = {steps}, 1e-3, 4
train.DEFAULTS["tiny"] = dict(tae=stage, encode=({clips}, 0, 8), base=stage, jam=stage,
                              control=stage)
train.VideoJAM.generate = lambda *_, **__: (train.torch.zeros(8, 5, 3, 16, 16), None)
train.write_video = lambda path, *_: None
# Muon rounds to bf16, and raises the smallest parts of a gradient: sums in another order would show
flow.fast_dtype = lambda device: train.torch.float32
{extra}
flow.report_errors(train.main)
"""
    path = out.with_suffix(".py")
    path.write_text(script)
    start = [sys.executable, str(path)] if processes == 0 else [
        sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}",
        "--standalone", *torchrun, str(path)]
    return {"args": [*start, *flags(out, *more)], "text": True,
            "env": {**os.environ, "OMP_NUM_THREADS": "1"}}


def at_once(*commands):
    """Runs them beside each other; all have to end well."""
    runs = [subprocess.Popen(**arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            for arguments in commands]
    for run in runs:
        err = run.communicate()[1]
        assert run.returncode == 0, err[-3000:]


def test_two_processes_are_one_and_checkpoints_come_back_on_another_number(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    at_once(command(0, one), command(2, two, "--accumulate", "2", "--recompute"))
    for stage in ("tae", "base", "jam", "control"):
        alone, shared = losses(one, stage), losses(two, stage)
        assert [row["step"] for row in alone] == list(range(1, 11))
        bound = 5e-5 if stage == "jam" else 2e-5    # jam's new rows carry the rounding further
        assert alone == [pytest.approx(row, rel=bound) for row in shared]
    # the last 2 of 10 steps again, on the other number of processes
    whole = [checkpoint(out, "jam") for out in (one, two)]
    for out in (one, two):
        shutil.rmtree(checkpoints(out, "jam")[-1])
    earlier = [checkpoint(out, "jam") for out in (one, two)]
    at_once(command(2, one, "--stage", "jam", "--replicas", "2"),
            command(0, two, "--stage", "jam"))
    for start, before, out in zip(earlier, whole, (one, two)):
        again = checkpoint(out, "jam")
        assert before["step"] == again["step"] == 10 and start["step"] == 8
        for part in ("model", "ema"):
            for name, weight in before[part].items():
                way = (weight - start[part][name]).norm()
                assert (again[part][name] - weight).norm() <= 1e-3 * way + 1e-6, name


@pytest.mark.parametrize("model", (DiT(TINY.dit), TAE(TINY.tae)), ids=("dit", "tae"))
def test_muon_steps_in_all_directions_of_matrices_and_kernels_adamw_in_the_rest(model):
    model, lr = randomised(model), .01
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    adamw, muon = train.optimizers(model, lr)
    taken = adamw.param_groups[0]["params"] + muon.param_groups[0]["params"]
    assert len(taken) == len(before) == len(set(taken))
    column, row = torch.randn(2, 2048)
    for weight in model.parameters():       # one direction, far louder than all others
        weight.grad = torch.randn_like(weight)
        if weight.ndim > 1:
            side = weight[0].numel()
            weight.grad += 10 * (column[:len(weight), None] * row[:side]).view_as(weight)
    adamw.step(), muon.step()
    for name, weight in model.named_parameters():
        step = (before[name] - weight.detach()) / lr
        if weight.ndim == 1 or name.endswith(("embed.weight", "table")):
            torch.testing.assert_close(step.abs(), torch.ones_like(step), atol=1e-3, rtol=0)
        else:
            step = step.flatten(1)
            values = torch.linalg.svdvals(step) / (.2 * max(step.shape) ** .5)
            assert .5 < values.median() and values.max() < 1.3


def test_new_rows_of_motion_go_further_than_all_else():
    model, C = randomised(DiT(TINY.dit).add_motion()), TINY.dit.channels
    alike = copy.deepcopy(model)
    paces = train.motion_paces(model, C)
    for weight, other in zip(model.parameters(), alike.parameters()):
        weight.grad = other.grad = torch.randn_like(weight)
    before = copy.deepcopy(model)
    for optimizer in train.optimizers(model, .01, paces) + train.optimizers(alike, .01):
        optimizer.step()
    for name, was in before.named_parameters():
        step, plain = (new.get_parameter(name) - was for new in (model, alike))
        expected = torch.ones_like(was)
        if name == "W_in.weight":                       # patches are (offset, [x, d])
            expected.view(len(was), -1, 2, C)[:, :, 1] = train.MOTION_PACE
        if name == "W_out.weight":
            expected.view(-1, 2, C, was.shape[1])[:, 1] = train.MOTION_PACE
        torch.testing.assert_close(step, expected * plain, rtol=1e-3, atol=1e-6)


# motion without RAFT: fast, and another one for every clip
BRIGHTNESS_AS_MOTION = """
train.RAFT.load = lambda: train.torch.nn.Identity()
train.estimate_flow = lambda raft, video: video[:, :, :2] - .5
"""


def test_processes_that_do_not_see_the_same_files_stop(finished, tmp_path, refuses, monkeypatch):
    def gather(seen, mine):
        seen[:] = mine, {**mine, "base": None}

    out = begun(finished, tmp_path / "run", "jam")
    monkeypatch.setattr(train, "ranks", lambda: 2)
    monkeypatch.setattr(train.dist, "all_gather_object", gather)
    complaint = refuses(train.main, *flags(out, "--stage", "jam"))
    assert "'base': 'base-000000003'" in complaint and "'base': None" in complaint
    assert "the disk lags, start it again" in complaint and not checkpoints(out, "jam")


def test_two_processes_share_a_folder_of_videos(folder, tmp_path):
    """Each encodes its shards; videos that cannot be decoded are skipped by either."""
    write(folder / "c.mp4", ramp(40), 8)
    (folder / "cut.mp4").write_bytes((folder / "c.mp4").read_bytes()[:500])
    for name in ("a", "inside/b", "c", "cut"):
        (folder / f"{name}.txt").write_text(name)
    one, two = tmp_path / "one", tmp_path / "two"
    options = {"steps": 4, "clips": 64, "extra": BRIGHTNESS_AS_MOTION + """
train.STAGES = "tae", "encode"
"""}
    at_once(command(0, one, "--data", str(folder), **options),
            command(2, two, "--data", str(folder), **options))
    alone, shared = losses(one, "tae"), losses(two, "tae")
    assert len(alone) == 4 and alone == [pytest.approx(row, rel=1e-5) for row in shared]
    listings = [json.loads((out / "videos.json").read_text()) for out in (one, two)]
    assert listings[0] == listings[1] and "reason" in listings[0]["cut.mp4"]
    a, b = (Latents(out / "latents") for out in (one, two))
    assert len(a.shards) == 4 and len(a.captions) == 8 + 8 + 36 and a.captions == b.captions
    every = list(range(len(a.captions)))
    for x, y in zip(a.batch(every, 24), b.batch(every, 24)):
        torch.testing.assert_close(x, y, atol=1e-2, rtol=1e-2)  # (the basis follows the rounding)


# ---------------------------------------------------------------- what can go wrong in a long run


def test_steps_that_are_not_finite_are_skipped_and_ten_in_a_row_end_the_run(
        finished, tmp_path, run, quick, monkeypatch):
    """Step k's data are spoiled for k in `spoiled`: no weight may move by it."""
    original, spoiled = Latents.batch, set()

    def spoils(self, *args):
        x, d, y = original(self, *args)
        count.append(1)
        return (x * float("nan"), d, y) if len(count) in spoiled else (x, d, y)

    monkeypatch.setattr(Latents, "batch", spoils)
    for name, spoiled in (("two", {2, 3}), ("ten", set(range(4, 30)))):
        count, out = [], begun(finished, tmp_path / name, "base")
        code, printed, err = run(train.main, *flags(out, "--stage", "base", "--steps", "20",
                                                    "--workers", "1"))
        if name == "two":
            assert code == 0 and printed.count("is not finite and is skipped") == 2
            weights = checkpoint(out, "base")["model"].values()
            assert checkpoint(out, "base")["step"] == 20
        else:
            assert code == 2 and "10 steps in a row are not finite, from step 4 on, t from " in err
            assert "the last checkpoint is of step" in err
            weights = checkpoint(out, "base")["model"].values()
        assert all(weight.isfinite().all() for weight in weights)


def test_a_full_disk_leaves_the_last_checkpoint_and_says_so(
        finished, uninterrupted, tmp_path, refuses, run, quick, monkeypatch):
    out, original = begun(finished, tmp_path / "run", "jam"), train.dcp.save

    def full(state, checkpoint_id, **options):
        original(state, checkpoint_id=checkpoint_id, **options)
        if checkpoint_id.name == "jam-000000002":
            (checkpoint_id / ".metadata").unlink()
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(train.dcp, "save", full)
        complaint = refuses(train.main, *flags(out, "--stage", "jam"))
    assert "No space left on device; the checkpoint of step 1 is whole" in complaint
    assert [path.name for path in checkpoints(out, "jam")] == ["jam-000000001"]
    assert run(train.main, *flags(out, "--stage", "jam"))[0] == 0
    assert equal(checkpoint(out, "jam"), uninterrupted["jam"])


@pytest.mark.parametrize("missing", ("status.json", ".metadata"))
def test_an_unfinished_checkpoint_is_never_resumed_from(
        finished, uninterrupted, tmp_path, run, quick, missing):
    out = begun(finished, tmp_path / "run", "jam")
    for source in checkpoints(finished, "jam"):
        shutil.copytree(source, out / "checkpoints" / source.name)
    (checkpoints(out, "jam")[-1] / missing).unlink()
    assert run(train.main, *flags(out, "--stage", "jam"))[0] == 0
    assert equal(checkpoint(out, "jam"), uninterrupted["jam"])


def test_halves_of_checkpoints_do_not_push_out_the_last_whole_ones(
        finished, uninterrupted, tmp_path, run, quick):
    """Of two kills while steps 90 and 100 were written, and others since."""
    out = begun(finished, tmp_path / "run", "jam")
    for step in (90, 100):
        half = out / f"checkpoints/jam-{step:09d}"
        half.mkdir()
        (half / "__0_0.distcp").write_bytes(b"half")
    assert run(train.main, *flags(out, "--stage", "jam"))[0] == 0
    assert [path.name for path in checkpoints(out, "jam")] == ["jam-000000002", "jam-000000003"]
    assert equal(checkpoint(out, "jam"), uninterrupted["jam"])


# ---------------------------------------------------------------- starting points and dry runs


def test_jam_begins_as_the_base_with_add_motion(finished, tmp_path, run, quick, monkeypatch):
    """From the base stage, in full precision, and from a bundle that has a base alone."""
    seen = []
    monkeypatch.setattr(train, "optimize", lambda *rest, **notes: seen.append(rest[2]))
    monkeypatch.setattr(train.Run, "export", lambda run: None)
    bundle = torch.load(finished / "model.pt")
    torch.save({**bundle, "dits": {"base": bundle["dits"]["base"]}}, tmp_path / "base.pt")
    base = checkpoint(finished, "base")["ema"]
    for i, (stage, more, weights) in enumerate([
            ("jam", (), base),
            ("base", ("--init", str(tmp_path / "base.pt")), bundle["dits"]["base"])]):
        out = begun(finished, tmp_path / str(i), stage)
        assert run(train.main, *flags(out, "--stage", "jam", *more))[0] == 0
        expected = DiT(TINY.dit)
        expected.load_state_dict(weights)
        assert equal(dict(seen[i].state_dict()), dict(expected.add_motion().state_dict()))


def test_jam_begins_from_the_runs_own_base_where_the_bundle_has_no_more_than_a_base(
        finished, tmp_path, run, quick):
    bundle = torch.load(finished / "model.pt")
    torch.save({**bundle, "dits": {"base": bundle["dits"]["base"]}}, tmp_path / "base.pt")
    code, _, err = run(train.main, *flags(tmp_path / "run", "--init", str(tmp_path / "base.pt")))
    assert code == 0, err
    origins = [checkpoint(tmp_path / "run", stage)["origin"] for stage in ("base", "jam")]
    assert origins[0].startswith("its own of --init") and origins[1].startswith("base at step")


def test_another_sigma_is_that_of_the_training_and_of_the_bundle(finished, tmp_path, run, quick):
    """A bundle of one sigma can be the start of a training with another."""
    out = tmp_path / "run"
    code, _, err = run(train.main, *flags(out, "--init", str(finished / "model.pt"),
                                          "--sigma", "0.6"))
    assert code == 0, err
    assert VideoJAM.load(out / "model.pt").config.sigma == .6
    assert VideoJAM.load(finished / "model.pt").config.sigma == .15
    (x1, d1, _), (x2, d2, _) = (Latents(folder / "latents").batch(range(8), 64)
                                for folder in (finished, out))
    torch.testing.assert_close(x1, x2, atol=.01, rtol=0)        # (by a TAE in half precision)
    assert (d1 - d2).abs().mean() > 10 * (x1 - x2).abs().mean()


def test_init_takes_the_tae_and_each_stage_its_own_dit(finished, tmp_path, run, quick, refuses):
    out, bundle = tmp_path / "run", torch.load(finished / "model.pt")
    init = "--init", str(finished / "model.pt")
    code, printed, err = run(train.main, *flags(out, *init))
    assert code == 0 and "tae: that of" in printed, err
    assert "captions of more than 24 bytes are cut" in printed
    assert equal(torch.load(out / "tae.pt")["state"], bundle["tae"])
    assert not checkpoints(out, "tae") and checkpoint(out, "jam")["origin"].startswith("its own of")
    assert "begun with origin" in refuses(train.main, *flags(out, "--stage", "jam"))
    torch.save({**bundle, "dits": {"jam": bundle["dits"]["jam"]}}, tmp_path / "jam.pt")
    assert "no base model to start base from, only jam" in refuses(
        train.main, *flags(tmp_path / "alone", "--init", str(tmp_path / "jam.pt")))
    assert not (tmp_path / "alone").exists()
    torch.save({**bundle, "config": {**bundle["config"], "frames": 9}}, tmp_path / "other.pt")
    assert "of another size than the preset tiny" in refuses(
        train.main, *flags(tmp_path / "other", "--init", str(tmp_path / "other.pt")))
    del bundle["dits"]["base"]["position.weight"]
    torch.save(bundle, tmp_path / "older.pt")
    assert "does not fit this version" in refuses(
        train.main, *flags(tmp_path / "other", "--init", str(tmp_path / "older.pt")))
    assert not (tmp_path / "other").exists()


def test_init_beside_a_tae_of_another_is_refused(finished, tmp_path, refuses):
    """Its DiT would be trained on latents that it does not know."""
    out, bundle = begun(finished, tmp_path / "run", "jam"), torch.load(finished / "model.pt")
    bundle["tae"]["mean"] = bundle["tae"]["mean"] + 1
    torch.save(bundle, tmp_path / "other.pt")
    before = content(out)
    assert "its TAE is not that of" in refuses(
        train.main, *flags(out, "--stage", "jam", "--init", str(tmp_path / "other.pt")))
    assert content(out) == before


def test_a_control_that_is_unlike_jam_is_left_out_of_the_bundle(finished, tmp_path, run, quick):
    out = shutil.copytree(finished, tmp_path / "run")
    for stage, dits in (("jam", {"jam", "base"}), ("control", {"jam", "base", "control"})):
        _, printed, _ = run(train.main, *flags(out, "--stage", stage, "--steps", "5"))
        assert ("control is left out" in printed) == (stage == "jam")
        assert set(torch.load(out / "model.pt")["dits"]) == dits
    status = checkpoints(out, "jam")[-1] / "status.json"
    status.write_text(status.read_text().replace('"clips": 32', '"clips": 16'))    # more since then
    _, printed, _ = run(train.main, *flags(out, "--stage", "jam", "--steps", "5"))
    assert "control is left out" in printed


def test_a_dry_run_knows_the_paper_s_models(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, printed, _ = run(train.main, "--preset", "4b", "--world", "8", "--dry-run")
    lines = {line[:38].strip(): line[38:] for line in printed.splitlines()}
    assert code == 0 and not list(tmp_path.iterdir())
    assert lines["parameters, DiT with motion rows"] == "4.238 B"
    assert lines["tokens a clip, of video"].startswith("4,096")     # 16 x 16 x 16
    # Muon has one moment a weight, AdamW two: of all but the layers' matrices, 5% of the weights
    moments = float(lines["moments of Muon and AdamW, fp32"].split()[0])
    assert 4 * 4.238 / 8 < moments < 4 * 4.238 / 8 * 1.05
    # a matrix product is 2 operations a weight and token; attention adds to that
    flops = float(lines["FLOPs a clip, forward"].split()[0])
    assert 2 * 4.238e9 * 4096 / 1e12 * .8 < flops < 2 * 4.238e9 * 4096 / 1e12 * 1.6
    hours = float(lines["time"].split()[0].replace(",", ""))
    assert hours == pytest.approx(50_000 * 32 * 3 * flops / (8 * 400) / 3600, rel=.01)


def test_blocks_are_recomputed_at_the_paper_s_sizes_alone():
    assert [name for name, preset in train.PRESETS.items() if train.recomputes(preset)] == [
        "4b", "30b"]
    longer = dataclasses.replace(train.PRESETS["small"], frames=48 * 64)    # another's own size
    assert train.recomputes(longer)


def test_saved_bytes_counts_what_the_backward_pass_needs():
    x = torch.zeros(10, 20, requires_grad=True)
    weight = torch.nn.Parameter(torch.zeros(20, 5))
    # the product keeps x (and a parameter, not counted), the sigmoid its output
    assert train.saved_bytes(lambda: (x @ weight).sigmoid()) == 4 * (200 + 50)
    linear = torch.nn.Linear(20, 5, bias=False)         # (of three axes: keeps its weight's view)
    assert train.saved_bytes(lambda: linear(x[None]).sigmoid()) == 4 * (200 + 50)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize("flag, value, complaint", [
    ("--preset", "huge", "unknown preset 'huge': one of toy, small, 4b, 30b"),
    ("--steps", 0, "--steps must be positive"), ("--steps", -5, "--steps must be positive"),
    ("--lr", 0, "--lr must be positive"), ("--batch", 0, "--batch must be positive"),
    ("--device", "bad", "--device bad: no such device"), ("--rich", 2, "from 0 to 1"),
    ("--data", "nowhere", "no such folder"), ("--workers", 0, "--workers must be positive"),
    ("--seed", 2 ** 64, "--seed must be below"), ("--device", "meta", "no such device"),
    ("--init=", "", "--init is empty"), ("--data=", "", "--data is empty"),
    ("--flow", "exact --data .", "only the sprite world"), ("--init", "nowhere", "no such file"),
    ("--lr", "inf", "--lr must be positive"), ("--t-shift", "inf", "--t-shift must be positive")])
def test_bad_flags_are_one_line_and_leave_no_run_folder(tmp_path, refuses, flag, value, complaint):
    assert complaint in refuses(train.main, *flags(tmp_path / "run"), flag, *str(value).split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("more, complaint", [
    (("--seed", 1), "begun with seed 0, not 1"), (("--rich", .7), "begun with rich 0.2, not 0.7"),
    (("--sigma", .3), "begun with sigma 0.15, not 0.3"),
    (("--data", str(CLIPS)), "begun with data None"),
    (("--stage", "base", "--lr", .5, "--steps", 9), "begun with lr 0.001, not 0.5"),
    (("--stage", "jam", "--batch", 2, "--steps", 9), "begun with batch 4, not 2"),
    (("--stage", "jam", "--uniform-t", "--steps", 9), "begun with uniform_t False, not True"),
    (("--stage", "jam", "--t-shift", "2", "--steps", 9), "begun with t_shift 1.0, not 2.0")])
def test_a_run_folder_of_other_settings_is_refused_and_left_as_it_was(finished, refuses, more,
                                                                     complaint):
    before = content(finished)
    assert complaint in refuses(train.main, *flags(finished), *more)
    assert content(finished) == before


def test_stages_say_what_they_lack(tmp_path, refuses):
    for stage in ("encode", "base", "jam", "control"):
        complaint = refuses(train.main, *flags(tmp_path / stage, "--stage", stage))
        assert "has no tae yet, run --stage tae first" in complaint
    assert not list(tmp_path.iterdir())
    for stage, lacking in (("base", "latents"), ("jam", "base")):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "tae.pt").touch()
        complaint = refuses(train.main, *flags(tmp_path / stage, "--stage", stage))
        assert f"has no {lacking} yet, run --stage" in complaint
    (tmp_path / "jam/tae.pt").unlink()
    refuses(train.main, *flags(tmp_path / "jam", "--stage", "base", "--seed", 3))   # holds nothing
    (tmp_path / "file").write_text("")
    assert "file/run/previews: Not a directory" in refuses(
        train.main, *flags(tmp_path / "file/run"))


def test_a_tae_is_not_trained_further_under_its_latents(finished, tmp_path, refuses):
    before = content(finished)
    for stage in ((), ("--stage", "tae")):
        assert "its latents are of the TAE as it is, which 9 steps would change" in refuses(
            train.main, *flags(finished), *stage, "--steps", 9)
    assert content(finished) == before
    out = tmp_path / "run"                      # without them it goes on, as it was begun
    shutil.copytree(finished, out, ignore=shutil.ignore_patterns("latents"))
    assert "begun with lr 0.001, not 0.5" in refuses(
        train.main, *flags(out), "--stage", "tae", "--lr", .5, "--steps", 9)


def test_damaged_files_and_latents_of_another_tae_are_refused(finished, tmp_path, refuses):
    out = begun(finished, tmp_path / "run", "jam")
    state = torch.load(out / "tae.pt")
    state["state"]["mean"] += 1
    torch.save(state, out / "tae.pt")
    for stage in ("encode", "jam"):
        assert "encoded by another TAE" in refuses(train.main, *flags(out, "--stage", stage))
    (out / "tae.pt").write_bytes((out / "tae.pt").read_bytes()[:1000])
    assert "not a tae file, or damaged" in refuses(train.main, *flags(out, "--stage", "encode"))
    torch.save({"kind": "tae", "origin": "", "state": {}}, out / "tae.pt")
    assert "tae.pt: not the TAE of preset tiny" in refuses(
        train.main, *flags(out, "--stage", "encode"))
    shutil.copy(finished / "tae.pt", out)
    (out / "metrics.jsonl").write_text('{"stage": "base", "step": 1}\n[]\n{"stage"')   # cut off
    next((out / "latents").glob("*.x.npy")).write_bytes(b"")
    assert ".x.npy: damaged or gone: delete 000000.json" in refuses(
        train.main, *flags(out, "--stage", "jam", "--steps", 9))
    assert (out / "metrics.jsonl").read_text() == '{"stage": "base", "step": 1}\n'
    for part in checkpoints(out, "base")[-1].glob("*.distcp"):
        part.write_bytes(part.read_bytes()[:1000])
    for stage in "base", "jam":
        complaint = refuses(train.main, *flags(out, "--stage", stage, "--steps", 9))
        assert f"{checkpoints(out, 'base')[-1]}: cannot be read (" in complaint
        assert "if it is damaged, or of another model, delete it" in complaint
    settings = json.loads((out / "settings.json").read_text())
    (out / "settings.json").write_text(json.dumps({**settings, "version": 2}))
    assert f"begun with version 2, not {train.VERSION}: take another --out" in refuses(
        train.main, *flags(out))
    for damaged in ("{", "[]"):
        (out / "settings.json").write_text(damaged)
        assert "settings.json: damaged" in refuses(train.main, *flags(out))


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


@pytest.mark.parametrize("fps, start, count", [(8, 0, 20), (16, 0, 10), (24, 0, 6), (4, 0, 38),
                                               (8, 7, 12), (16, 3, 6), (25, 3, 3), (20, 1, 4),
                                               (8, 22, 7)])
def test_videos_are_read_at_the_presets_frame_rate_from_any_frame(tmp_path, fps, start, count):
    write(tmp_path / "a.mp4", ramp(30), fps)
    video = read_clip(tmp_path / "a.mp4", start, count, 8, 16)
    assert video.dtype == torch.uint8 and video.shape == (count, 3, 16, 16)
    # frame k shows what the file shows at (start + k) / 8 s: the file's frame (start + k) fps / 8
    shown = 8 * ((start + torch.arange(count)) * fps / 8).floor()
    torch.testing.assert_close(video.float().mean((1, 2, 3)), shown, atol=3, rtol=0)
    with pytest.raises(ValueError, match="of 70 frames can be decoded from"):
        read_clip(tmp_path / "a.mp4", start, 70, 8, 16)


@pytest.mark.skipif(not CLIPS.is_dir(), reason="the real clips are not part of the project")
def test_a_video_whose_decoder_needs_its_first_frame_is_read_from_the_beginning():
    """After any other key frame of this one ffmpeg shows grey and green, and calls it a success."""
    whole = read_clip(CLIPS / "cockatoo.mp4", 0, 84, 8, 16)
    for start in (13, 40, 80):
        assert torch.equal(read_clip(CLIPS / "cockatoo.mp4", start, 4, 8, 16),
                           whole[start:start + 4])


@pytest.mark.parametrize("height, width", [(32, 64), (64, 32), (45, 33), (16, 16), (8, 12)])
def test_videos_are_cropped_to_the_square_in_their_middle(tmp_path, height, width):
    frames = np.zeros((3, height, width, 3), np.uint8)
    half = min(height, width) // 2
    frames[:, height // 2 - half:height // 2 + half, width // 2 - half:width // 2 + half] = 250
    frames[:, :height // 2] //= 2                   # the upper half is darker
    write(tmp_path / "a.mp4", frames, 8)
    video = read_clip(tmp_path / "a.mp4", 0, 3, 8, 16).float()
    assert 100 < video[:, :, 2:6, 2:-2].min() and video[:, :, 2:6, 2:-2].max() < 150
    assert video[:, :, 10:-2, 2:-2].min() > 200


@pytest.fixture
def no_raft(monkeypatch):
    """An estimate_flow that is fast and known: flow k is .2 k px to the right."""
    def estimate(raft, video):
        flow = torch.zeros(*video.shape[:2], 2, 16, 16)
        flow[:, :, 0] = .2 * torch.arange(video.shape[1]).view(-1, 1, 1)
        return flow

    monkeypatch.setattr(RAFT, "load", classmethod(lambda cls: torch.nn.Identity()))
    monkeypatch.setattr(train, "estimate_flow", estimate)


def opened(folder, out, preset=TINY):
    out.mkdir(exist_ok=True)
    return Folder(folder, preset, None, out, 2)


@pytest.fixture
def folder(tmp_path, no_raft):
    """Two videos of other sizes and rates, and what a folder of videos has besides."""
    path = tmp_path / "data"
    (path / "inside").mkdir(parents=True)
    write(path / "a.mp4", ramp(12), 8)
    write(path / "inside/b.mp4", ramp(24, 64, 34), 16)
    return path


LAYOUTS = {
    "metadata.csv": {"metadata.csv": 'file_name,text,x\na.mp4,"one, with a comma",1\n'
                                     "inside/b.mp4,é,2\n"},
    "metadata.jsonl": {"metadata.jsonl": '{"file_name": "a.mp4", "caption": "one, with a comma"}\n'
                                         '\n{"file_name": "inside/b.mp4", "caption": "é"}\n'},
    "videos.txt and prompts.txt": {"videos.txt": "a.mp4\ninside/b.mp4\n",
                                   "prompts.txt": "one, with\u2028a comma\né\n"},
    "a .txt beside each video": {"a.txt": "one, with a comma", "inside/b.txt": "é"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_three_layouts_give_the_same_clips(folder, tmp_path, layout, capfd):
    for name, text in LAYOUTS[layout].items():
        (folder / name).write_text(text)
    world = opened(folder, tmp_path / "run")
    assert f"2 videos ({layout}), 2 used, 3 s, 0 skipped" in "".join(capfd.readouterr())
    keys = world.keys(100)
    assert len(keys) == 8 + 8 and len(set(keys)) == 16 and set(keys) == set(world.order)
    assert set(world.keys(3)) < set(keys) and len(world.keys(3)) == 6
    video, captions, _, skipped = world.read(keys)
    motion = world.motion(video)
    assert video.shape == motion.shape == (16, 5, 3, 16, 16) and not skipped
    assert captions == ["one, with a comma"] * 8 + ["é"] * 8
    for (name, start, _), clip, flow in zip(keys, video, motion):  # b.mp4 shows every second frame
        speed = 2 if name.endswith("b.mp4") else 1
        frames = speed * (start + torch.arange(5.))
        torch.testing.assert_close(clip.mean((1, 2, 3)) * 255, 8 * frames, atol=3, rtol=0)
        torch.testing.assert_close(rgb_to_flow(flow)[:, 0].mean((1, 2)), .2 * torch.arange(5.),
                                   atol=.05, rtol=0)


def test_a_listing_of_another_preset_is_made_again(folder, tmp_path):
    (folder / "metadata.csv").write_text("file_name,text\na.mp4,one\ninside/b.mp4,two\n")
    slow = dataclasses.replace(TINY, fps=4)
    fresh = {preset.fps: opened(folder, tmp_path / f"{preset.fps}", preset).videos
             for preset in (TINY, slow)}
    assert [opened(folder, tmp_path / "run", preset).videos for preset in (TINY, slow, TINY)] == [
        fresh[TINY.fps], fresh[slow.fps], fresh[TINY.fps]]
    assert fresh[TINY.fps]["a.mp4"]["frames"] == 2 * fresh[slow.fps]["a.mp4"]["frames"]


def test_files_of_other_editors_and_names_of_any_bytes(folder, tmp_path, capfd):
    """A byte-order mark, a name that is not UTF-8, one longer than a file's can be; two lines."""
    name = os.fsdecode(b"\xe9.mp4")
    (folder / "a.mp4").rename(folder / name)
    (folder / "metadata.csv").write_bytes(b"\xef\xbb\xbffile_name,text\n"
                                          b"./\xe9.mp4,\" one\ntwo\n\"\n"
                                          + b"long" * 100 + b".mp4,two\n")
    world = opened(folder, tmp_path / "run")
    assert [key[0] for key in world.keys(1)] == [f"./{name}"]
    assert [world.caption(key, None) for key in world.keys(1)] == ["one two"]
    printed = "".join(capfd.readouterr())
    assert "skipped 1: no such file" in printed
    assert "skipped 1: not in metadata.csv: inside/b.mp4" in printed


def test_every_video_of_a_bad_folder_is_used_or_skipped_with_its_reason(folder, tmp_path, capfd):
    good = (folder / "a.mp4").read_bytes()
    names = {"a.mp4": None, "long.mp4": None, "grey.mp4": None, "odd.gif": None,
             "empty.mp4": "an empty file", "text.mp4": "cannot be decoded",
             "cut.mp4": "cannot be decoded", "one.mp4": "too short", "silent.mp4": "no caption",
             "blank.mp4": "no caption", "latin.mp4": "its caption is not UTF-8",
             "link.mp4": "no such file", "inside/b.mp4": "no caption"}
    iio.imwrite(folder / "odd.gif", ramp(12, 33, 21), duration=125)
    write(folder / "grey.mp4", ramp(12)[..., :1].repeat(3, -1), 8)
    for name in ("long", "silent", "blank", "latin"):
        (folder / f"{name}.mp4").write_bytes(good)
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("hello world")
    (folder / "cut.mp4").write_bytes(good[:500])
    write(folder / "one.mp4", ramp(1), 8)
    (folder / "link.mp4").symlink_to(folder / "nowhere.mp4")
    for name in names:
        if name not in ("silent.mp4", "inside/b.mp4"):
            (folder / name).with_suffix(".txt").write_text("a caption")
    (folder / "long.txt").write_text("word " * 2000)
    (folder / "blank.txt").write_text(" \n")
    (folder / "latin.txt").write_bytes("é".encode("latin-1"))
    world = opened(folder, tmp_path / "run")
    printed = "".join(capfd.readouterr())
    assert "13 videos (a .txt beside each video), 4 used, 6 s, 9 skipped" in printed
    listing = json.loads((tmp_path / "run/videos.json").read_text())
    assert listing.keys() == names.keys()
    for name, reason in names.items():
        assert ("frames" in listing[name]) == (reason is None)
        assert reason is None or listing[name]["reason"].startswith(reason)
        assert reason is None or reason in printed
    assert not world.read(world.keys(2))[3]


def test_videos_that_were_looked_at_are_not_opened_again(folder, tmp_path, monkeypatch):
    """Not even where it was interrupted before the last of them."""
    for name in ("a", "inside/b"):
        (folder / f"{name}.txt").write_text(name)
    seen, original = [], train.read_frames

    def read_frames(path):
        seen.append(os.path.basename(path))
        if seen.count("b.mp4") == 1 and path.endswith("b.mp4"):
            raise KeyboardInterrupt
        return original(path)

    monkeypatch.setattr(train, "read_frames", read_frames)
    monkeypatch.setattr(train, "CHECKPOINT_SECONDS", -1)
    with pytest.raises(KeyboardInterrupt):
        opened(folder, tmp_path / "run")
    first = opened(folder, tmp_path / "run").videos
    assert sorted(seen) == ["a.mp4", "b.mp4", "b.mp4"] and len(first) == 2
    write(folder / "a.mp4", ramp(13), 8)
    again = opened(folder, tmp_path / "run").videos
    assert seen[3:] == ["a.mp4"]
    assert [again[name]["frames"] for name in ("a.mp4", "inside/b.mp4")] == [13, 12]


def test_a_video_that_breaks_off_is_replaced_in_training_and_skipped_in_encode(
        folder, tmp_path, run, monkeypatch, finished):
    """Its header promises more than the file holds: only decoding finds out."""
    write(folder / "c.mp4", ramp(12), 8)
    for name in ("a", "inside/b", "c"):
        (folder / f"{name}.txt").write_text(name)
    original = train.read_clip

    def breaks_off(path, start, *rest):
        if path.name == "c.mp4":
            raise ValueError("2 of 5 frames from 0.0 s on: cut off?")
        return original(path, start, *rest)

    monkeypatch.setattr(train, "read_clip", breaks_off)
    world = opened(folder, tmp_path / "run")
    video, captions, _, skipped = world.training(range(30))
    assert len(video) == 30 and set(captions) == {"a", "inside/b"} and not skipped
    code, printed, err = run(train.main, *flags(
        tmp_path / "run", "--data", str(folder), "--stage", "encode", "--steps", "4", "--init",
        str(finished / "model.pt")))
    assert code == 0, err
    assert "skipped 1: 2 of 5 frames from 0.0 s on: cut off?: c.mp4" in printed
    assert "encode: 8 of 12 clips are there" in printed


def test_new_videos_are_encoded_and_the_old_ones_left_alone(folder, tmp_path, run, finished):
    def encode():
        code, printed, err = run(train.main, *flags(
            out, "--data", str(folder), "--stage", "encode", "--init", str(finished / "model.pt")))
        assert code == 0, err
        return printed

    out = tmp_path / "run"
    (folder / "a.txt").write_text("a")
    assert "encode: 8 clips in 1 shards, 1 to do" in encode()
    before = content(out / "latents")
    (folder / "inside/b.txt").write_text("b")
    assert "encode: 16 clips in 2 shards, 1 to do" in encode()
    after = content(out / "latents")
    assert all(after[path] == before[path] for path in before if path.name != "manifest.json")
    assert Latents(out / "latents").captions == ["a"] * 8 + ["b"] * 8
    latents, tae = Latents(out / "latents"), VideoJAM.load(finished / "model.pt").tae
    world = opened(folder, tmp_path / "again")
    video = world.read(world.keys(100))[0]
    x, d, _ = latents.batch(range(16), 24)
    torch.testing.assert_close(x, tae.encode(video).detach(), atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(d, tae.encode(world.motion(video), True).detach(), atol=2e-3,
                               rtol=2e-3)


def test_captions_are_taken_as_they_are_and_clips_of_lost_or_changed_videos_are_dropped(
        folder, tmp_path, run, finished, monkeypatch):
    def encode():
        code, printed, err = run(train.main, *flags(
            out, "--data", str(folder), "--stage", "encode", "--init", str(finished / "model.pt")))
        assert code == 0, err
        return printed, Latents(out / "latents")

    out = tmp_path / "run"
    monkeypatch.setattr(train, "SHARD", 12)                 # the first shard holds 8 a's and 4 b's
    (folder / "a.txt").write_text("a")
    (folder / "inside/b.txt").write_text("b")
    _, latents = encode()
    assert latents.captions == ["a"] * 8 + ["b"] * 8
    before, x = content(out / "latents"), latents.batch(range(16), 24)[0]

    (folder / "a.txt").write_text("another")                # a caption changes, and no latents
    printed, latents = encode()
    assert latents.captions == ["another"] * 8 + ["b"] * 8 and ", 0 to do" in printed
    after = content(out / "latents")
    assert {path.name for path in before if before[path] != after[path]} == {"000000.json"}

    (folder / "a.mp4").unlink()                             # a video goes: b's stay, in their order
    printed, latents = encode()
    assert "8 clips are dropped" in printed and "2 shards, 1 to do" in printed
    assert latents.captions == ["b"] * 8
    torch.testing.assert_close(latents.batch(range(8), 24)[0], x[8:])

    write(folder / "inside/b.mp4", ramp(40), 8)             # a video is another under an old name
    printed, latents = encode()
    assert "8 clips are dropped" in printed and latents.captions == ["b"] * 32


def test_flow_is_kept_for_fewer_clips_than_a_batch_has(folder, tmp_path):
    for name in ("a.txt", "inside/b.txt"):
        (folder / name).write_text("a caption")
    world = opened(folder, tmp_path / "run")
    world.room = 3
    for indices in ([0, 1, 2, 3, 4, 5], [5, 0, 6, 7], [5, 5]):
        video, _, keys, _ = world.training(indices)
        assert torch.equal(world.motion(video, keys), world.motion(video, keys))
        torch.testing.assert_close(world.motion(video, keys), world.motion(video), atol=.01, rtol=0)
        assert len(world.recent) == 3


def test_a_folder_goes_through_all_stages(folder, tmp_path, run):
    (folder / "a.txt").write_text("é")
    code, _, err = run(train.main, *flags(tmp_path / "run", "--data", str(folder), "--steps", "1"))
    assert code == 0, err
    video, motion = VideoJAM.load(tmp_path / "run/model.pt").generate(["é"], steps=2)
    assert video.shape == motion.shape == (1, 5, 3, 16, 16)


@pytest.mark.parametrize("files, complaint", [
    ({"metadata.csv": ""}, "needs rows with file_name and one of text, caption, prompt"),
    ({"metadata.csv": "file_name,text\n"}, "needs rows"),
    ({"metadata.csv": "name,text\na.mp4,x\n"}, "needs rows"),
    ({"metadata.csv": "file_name;text\na.mp4;x\n"}, "prompt, has 'file_name;text'"),
    ({"metadata.csv": "file_name,text\na.mp4,one, two\n"}, "row 1: more fields than in the"),
    ({"metadata.csv": 'file_name,text\na.mp4,"one\ninside/b.mp4,x\n'},
     "csv: row 1: unexpected end"),
    ({"metadata.jsonl": "\n{}\n{\n"}, "metadata.jsonl: row 2: Expecting"),
    ({"metadata.jsonl": "[1]\n"}, "metadata.jsonl: row 1: must be an object"),
    ({"videos.txt": "a.mp4\n", "prompts.txt": "x\ny\n"}, "videos.txt has 1 lines, prompts.txt"),
    ({"metadata.csv": "file_name,text\nbroken.mp4,x\n"}, "none of its 3 videos can be used")])
def test_a_folder_that_gives_no_clip_is_refused(folder, tmp_path, refuses, files, complaint):
    for name, text in files.items():
        (folder / name).write_text(text)
    assert complaint in refuses(train.main, *flags(tmp_path / "run", "--data", str(folder)))
    assert not list((tmp_path / "run").rglob("tae*"))
    for path in folder.rglob("*.mp4"):
        path.unlink()
    for name in files:
        (folder / name).unlink()
    assert "no videos in it, nor metadata" in refuses(
        train.main, *flags(tmp_path / "run", "--data", str(folder)))


@pytest.mark.skipif(not CLIPS.is_dir(), reason="the real clips are not part of the project")
def test_real_clips_are_read_to_their_end(tmp_path):
    world = opened(CLIPS, tmp_path)
    seconds = {"cityCC0.mpg": 190 / 25, "bikes.mp4": 250 / 25, "cockatoo.mp4": 280 / 20}
    assert world.videos.keys() == seconds.keys()
    for name, video in world.videos.items():
        assert abs(video["frames"] - 8 * seconds[name]) <= 1
        clip = read_clip(CLIPS / name, video["frames"] - 6, 5, 8, 32).float()
        assert clip.std() > 20 and (clip[1:] - clip[:-1]).abs().mean() > .2


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

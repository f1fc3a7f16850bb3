"""pytest tests/test_train.py: stages, resuming, several processes, bad input."""
import contextlib
import functools
import itertools
import json
import math
import shutil
import signal
import socket
import sys
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import Mock

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from conftest import (ROOT, TINY, at_once, checkpoint, checkpoints, content, equal, logged,
                      train_command, train_flags, use_tiny_preset)

import synthetic
import train
from common import Muon
from data import Latents, Sprites
from train import STAGES
from videojam import (TAE, DiT, Noise, VideoJAM, flow_matching_loss, joint_loss, sample_noise,
                      tokenize, write_model_file)

EXPECTED_TIME, SHOW_PREVIEW = train.print_expected_time, train.show_preview

@pytest.fixture(scope="module", autouse=True)
def tiny():
    with pytest.MonkeyPatch.context() as patch:
        use_tiny_preset(patch)
        yield

@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """A run through all stages that nothing interrupted; with a preview at each one's end."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "show_preview", lambda run, stage, step: (
            step == 3 and SHOW_PREVIEW(run, stage, step)))
        patch.setattr(sys, "argv", ["train.py", *train_flags(out)])
        train.main()
    return out

@pytest.fixture(scope="module")
def uninterrupted(finished):
    """Its last checkpoints."""
    return {stage: checkpoint(finished, stage) for stage in STAGES if stage != "encode"}

@pytest.fixture
def begun(finished, tmp_path):
    """begun(stage) -> a copy of that run as it was before the stage."""
    def copy_run(stage, name="run"):
        out = tmp_path / name
        (out / "checkpoints").mkdir(parents=True)
        shutil.copy(finished / "settings.json", out)
        if stage != "tae":
            shutil.copy(finished / "tae.pt", out)
            shutil.copytree(finished / "latents", out / "latents")
        if STAGES.index("base") < STAGES.index(stage):
            last = checkpoints(finished, "base")[-1]
            shutil.copytree(last, out / "checkpoints" / last.name)
        return out
    return copy_run

@pytest.fixture
def quick(monkeypatch):
    """Previews cost more than tiny steps do."""
    monkeypatch.setattr(train, "show_preview", lambda *_: None)

@pytest.fixture
def finishes(run, quick):
    """finishes(out, "--flag", value): train.py ends well; -> what it printed."""
    def call(out, *flags):
        code, printed, err = run(train.main, *train_flags(out, *flags))
        assert code == 0, err
        return printed
    return call

@pytest.fixture
def run_of(monkeypatch):
    """run_of(out, "--flag", value): train.py's Run."""
    def call(out, *flags):
        monkeypatch.setattr(sys, "argv", ["train.py", *train_flags(out, *flags)])
        return train.Run(train.parse())
    return call

@pytest.fixture
def ends(refuses, quick):
    """ends(out, "--flag", value): train.py ends with exit code 2; -> its line on stderr."""
    return lambda out, *flags: refuses(train.main, *train_flags(out, *flags))

# ---------------------------------------------------------------- all stages

def test_one_command_writes_checkpoints_previews_metrics_and_model(finished, uninterrupted):
    for stage, state in uninterrupted.items():
        assert state["step"] == 3 and len(checkpoints(finished, stage)) == 2
        assert iio.imread(finished / f"previews/{stage}-000003.mp4").shape[0] == TINY.frames
        assert [row["step"] for row in logged(finished, stage)] == [1, 2, 3]
        for row in logged(finished, stage):
            assert np.isfinite(row["loss" if stage == "tae" else "loss_x"])
            if stage != "tae":
                assert len(row["bins_x"]) == 5 and None in row["bins_x"]    # 4 clips, 5 bins
            assert ("loss_d" in row) == ("loss_d_dropped" in row) == (stage == "jam")
        before = checkpoint(finished, stage, 0)["ema"]      # of step 2: decay is (1 + 3) / (10 + 3)
        torch.testing.assert_close(state["ema"], {name: average.lerp(state["model"][name], 9 / 13)
                                                  for name, average in before.items()})
        if stage != "tae":                          # the averaged weights, in half precision
            dit, ema = VideoJAM.load(finished / "model.pt", stage).dit, state["ema"]
            assert equal(dict(dit.state_dict()), {k: v.half().float() for k, v in ema.items()})
    assert not [path for path in finished.rglob(".*") if path.name != ".metadata"]      # (DCP's)

def test_tae_is_the_average_and_its_white_latents_are_made_once(finished, uninterrupted, finishes):
    state, tae = uninterrupted["tae"], TAE(TINY.tae)
    dataset = Sprites(replace(TINY, appearance=.5), .2)
    assert not equal(state["model"], state["ema"])
    tae.load_state_dict(torch.load(finished / "tae.pt")["state"])
    assert equal(dict(tae.named_parameters()), state["ema"])
    folder, clips = finished / "latents", range(train.WHITENING_CLIPS)
    latents = Latents(folder, dataset)
    assert len(latents.captions) == len(clips) == 32
    *encoded, y = latents.batch(clips, TINY.dit.max_bytes)
    video, captions, flow, _ = dataset.read(clips)
    assert torch.equal(y, tokenize(captions, TINY.dit.max_bytes))
    for motion, seen in enumerate((video, dataset.motion(video, flow))):
        latent = tae.encode(seen, bool(motion)).detach()
        torch.testing.assert_close(encoded[motion], latent, atol=2e-3, rtol=2e-3)   # kept in fp16
        torch.testing.assert_close(latent.mean((0, 2, 3, 4)), torch.zeros(4), atol=.05, rtol=0)
        assert latent.std() == pytest.approx(1, abs=.05)
    before = {path: path.stat().st_mtime_ns for path in folder.glob("0*")}
    finishes(finished, "--stage", "encode")
    assert before == {path: path.stat().st_mtime_ns for path in folder.glob("0*")}

@pytest.fixture
def watched(monkeypatch):
    """train.py's losses keep what they are called with."""
    for name in ("tae_loss", "joint_loss", "flow_matching_loss"):
        monkeypatch.setattr(train, name, Mock(wraps=getattr(train, name)))

def test_tae_sees_new_clips_in_each_step_and_their_motion(begun, finishes, watched):
    finishes(begun("tae"), "--stage", "tae", "--steps", 2)
    seen, dataset = [], Sprites(replace(TINY, appearance=.5), .2)
    for step in (0, 1):
        video, _, flow, _ = dataset.training(range(4 * step, 4 * step + 4))
        seen += video, dataset.motion(video, flow)
    assert equal([call.args[1] for call in train.tae_loss.call_args_list], seen)

def test_control_sees_what_jam_sees_and_trains_as_it_did(begun, finishes, watched):
    """By the paper's own losses, whatever jam's motion dropout was."""
    out = begun("jam")
    finishes(out, "--stage", "jam", "--steps", 2, "--lr", 2e-3, "--batch", 2,
             "--motion-dropout", 1, "--t-shift", 1e6)
    finishes(out, "--stage", "control", "--t-shift", 1e6)
    jam, control = train.joint_loss.call_args_list, train.flow_matching_loss.call_args_list
    assert len(jam) == len(control) == 2
    for ((_, x1, _, y), of_jam), ((_, *inputs), of_control) in zip(jam, control):
        assert equal([x1, y], inputs)
        assert equal(of_jam["noise"][:-1], of_control["noise"][:-1])    # all but no_motion
        assert of_jam["noise"].t.max() < .01            # by the shift
    assert not torch.equal(jam[0].kwargs["noise"].t, jam[1].kwargs["noise"].t)
    # losses of dropped motion are logged apart
    assert all(row["loss_d"] is None and row["loss_d_dropped"] > 1 for row in logged(out, "jam"))
    finishes(out, "--stage", "jam", "--motion-dropout", 1, "--t-shift", 1e6)    # its own steps, lr
    status = checkpoint(out, "control")
    assert [status[key] for key in ("step", "lr", "batch")] == [2, 2e-3, 2]
    VideoJAM.load(out / "model.pt", "control")

def test_no_two_samples_have_the_same_noise(finished, run_of):
    """Of two seeds, of base and fine-tuning, of two steps, of two places in the batch."""
    x0, x1, t = [], [], []
    for seed, name in itertools.product((0, 1), ("base", "jam")):
        stage = train.DiTStage(run_of(finished, "--seed", seed), name)
        for step in (0, 1):
            clips, _, _, times, noise, *_ = stage.load(step, range(2))
            x0, x1, t = [*x0, *noise], [*x1, clips], [*t, *times.tolist()]
    assert len(torch.stack(x0).flatten(1).unique(dim=0)) == len(set(t)) == 16
    assert len(torch.stack(x1).flatten(1).unique(dim=0)) == 8       # other clips in each step
    _, _, _, uniform, noise, *_ = train.DiTStage(run_of(finished, "--uniform-t"), "base").load(
        0, range(1))
    assert uniform == sample_noise(noise.shape, train.rng(0, "base", 0, 0), True).t

def test_the_toy_has_its_own_t_and_a_loud_world(monkeypatch):
    for preset, *expected in (("toy", True, 3., .5), ("small", False, 1., .5)):
        monkeypatch.setattr(sys, "argv", ["train.py", "--preset", preset])
        args = train.parse()
        assert [args.uniform_t, args.t_shift, args.appearance] == expected

def test_summarize_means_by_bin_and_without_what_does_not_apply():
    nan = float("nan")
    reports = [{"t": torch.tensor([.1, .15]), "loss_x": torch.tensor([1., 3]),
                "loss_d": torch.tensor([nan, nan])},
               {"t": torch.tensor([.5, .999]), "loss_x": torch.tensor([4., 8]),
                "loss_d": torch.tensor([nan, 6])}]
    assert train.summarize(reports) == {
        "loss_x": 4, "bins_x": [2, None, 4, None, 8],
        "loss_d": 6, "bins_d": [None, None, None, None, 6]}

@pytest.mark.parametrize("name, init, origin", [
    ("jam", None, "base"), ("control", None, "base"), ("jam", ["base"], "base"),
    ("jam", STAGES, "jam"), ("control", STAGES, "control")])
def test_stages_begin_as_their_origin_and_jam_with_motion(
        finished, uninterrupted, begun, finishes, tmp_path, monkeypatch, name, init, origin):
    """From the run's base, in full precision, or from a model file's base or own DiT."""
    monkeypatch.setattr(train, "train_loop", lambda *both: seen.append(train.Trainer(*both)))
    monkeypatch.setattr(train.Run, "export", lambda run: None)
    seen, out, more, weights = [], begun("jam"), (), uninterrupted["base"]["ema"]
    if init:
        out, more, file = begun("base", "other"), ("--init", tmp_path / "init.pt"), torch.load(
            finished / "model.pt")
        weights = file["dits"][origin]
        torch.save({**file, "dits": {name: dit for name, dit in file["dits"].items()
                                     if name in init}}, tmp_path / "init.pt")
        tae = torch.load(out / "tae.pt")
        torch.save({**tae, "origin": " ".join(map(str, more))}, out / "tae.pt")
    finishes(out, "--stage", name, *more)
    (trainer,) = seen
    model, scale = trainer.stage.model, trainer.lr_scale
    expected = DiT(replace(TINY.dit, motion=origin == "jam"))
    expected.load_state_dict(weights)
    if widened := name == "jam" and origin == "base":
        expected.add_motion()
    assert equal(dict(model.state_dict()), dict(expected.state_dict()))
    for weight, axis in ((model.W_in.weight, 1), (model.W_out.weight, 0)) * widened:
        factors = torch.ones_like(weight)                   # patches are (offset, [x, d], C)
        factors.unflatten(axis, (-1, 2, 4)).select(axis + 1, 1).fill_(train.MOTION_LR_SCALE)
        assert torch.equal(scale.pop(weight), factors)      # new rows learn faster
    assert not scale
    x1, d1, y, *noise = data = trainer.stage.load(0, range(4))      # Eq. 6, or Eq. 3
    loss, inputs = (joint_loss, (x1, d1)) if name == "jam" else (flow_matching_loss, (x1,))
    ((mse, report),) = trainer.stage.losses(data)
    torch.testing.assert_close(mse, loss(expected, *inputs, y, noise=Noise(*noise)))
    each = loss(expected, *inputs, y, noise=Noise(*noise), reduction="channels")
    torch.testing.assert_close(report["loss_x"], each[:, :4].mean(1))
    if name == "jam":                                       # whether d was dropped or not
        loss_d = torch.where(report["loss_d"].isnan(), report["loss_d_dropped"], report["loss_d"])
        torch.testing.assert_close(loss_d, each[:, 4:].mean(1))

@pytest.mark.parametrize("optimizer", (
    functools.partial(torch.optim.AdamW, weight_decay=0), functools.partial(Muon, lr=1.)))
def test_lr_scale_takes_entries_further(optimizer):
    def steps(lr_scale):
        weight = torch.nn.Parameter(torch.tensor([[1., 2.], [3., 4.]]))
        weight.grad = torch.tensor([[1., 2.], [3., -1.]])
        trainer = SimpleNamespace(
            lr_scale=lr_scale and {weight: factors}, optimizers=[optimizer([weight])], rate=.01,
            step=1, weights={"w": weight}, ema={"w": torch.zeros(2, 2)})
        train.Trainer.step_weights(trainer)
        return weight.detach(), trainer.ema["w"]

    factors, start = torch.tensor([[1., 5.], [1., 2.]]), torch.tensor([[1., 2.], [3., 4.]])
    (plain, _), (scaled, ema) = steps({}), steps(True)
    assert ((plain - start).abs() > 1e-4).all()
    torch.testing.assert_close(scaled - start, factors * (plain - start), rtol=1e-3, atol=1e-6)
    assert torch.equal(scaled[:, 0], plain[:, 0])           # a factor of 1 changes no bit
    torch.testing.assert_close(ema, scaled * (1 - 2 / 11))  # after all of it

def test_learning_rate_falls_at_the_end_and_steps_that_are_not_finite_are_skipped(
        begun, finishes, ends, watched, monkeypatch):
    """Ten of them in a row end the run. All steps have texts of one length."""
    original, spoiled, count = Latents.batch, {2, 3}, []

    def spoils(self, *args):
        x, d, y = original(self, *args)
        count.append(1)
        return x * (math.nan if len(count) in spoiled else 1), d, y

    monkeypatch.setattr(Latents, "batch", spoils)
    flags = "--stage", "base", "--steps", 20, "--workers", 1
    out = begun("base", "two")
    assert finishes(out, *flags).count("is not finite and is skipped") == 2
    texts = [y for (_, _, y), _ in train.flow_matching_loss.call_args_list]
    assert len(texts) == 20 and len({y.shape for y in texts}) == 1
    lr = [row["lr"] for row in logged(out, "base")]                     # of steps 2, 4, ... 20
    groups = checkpoint(out, "base")["optimizer"]["param_groups"]
    assert len(groups) == 2 and {group["lr"] for group in groups} == {lr[-1]}
    np.testing.assert_allclose(lr, [2e-3 / 3] + [1e-3] * 6 + [5e-3 / 6, 3e-3 / 6, 1e-3 / 6])
    count.clear()
    spoiled.update(range(20))
    ten = begun("base", "ten")
    assert "10 steps in a row are not finite, up to step 10" in ends(ten, *flags)
    for state in (checkpoint(out, "base"), checkpoint(ten, "base")):
        assert all(weight.isfinite().all() for weight in state["model"].values())

def test_gradients_are_clipped(begun, finishes, monkeypatch):
    norms, loss = [], train.flow_matching_loss
    monkeypatch.setattr(train, "flow_matching_loss", lambda *args, **options: 1e6 * loss(
        *args, **options))
    monkeypatch.setattr(train, "get_ema_multi_avg_fn", lambda decay: lambda ema, weights, _:
                        norms.append(torch.cat([w.grad.flatten() for w in weights]).norm().item()))
    finishes(begun("base"), "--stage", "base", "--steps", 1)
    assert norms == [pytest.approx(train.MAX_NORM, rel=1e-3)]

def test_raft_is_a_stage_that_resumes_to_the_bit(tmp_path, run, monkeypatch):
    monkeypatch.setattr(train.RAFTStage, "iters", 1)
    monkeypatch.setattr(train, "training_pairs", lambda step, batch:
                        synthetic.flow_scenes(1, 64, step))
    monkeypatch.setattr(train, "estimate_flow", lambda raft, video: 0 * video[:, :, :2])
    flags = "--stage", "raft", "--steps", "2", "--batch", "4", "--device", "cpu", "--out"
    code, printed, err = run(train.main, *flags, tmp_path / "whole")
    assert code == 0 and "raft: step 2, median error" in printed, err
    with monkeypatch.context() as patch:
        breaks_at(patch, train, "upsample", 1, ctrl_c)
        assert "stopped at step 1 of raft" in run(train.main, *flags, tmp_path / "parts")[2]
    assert run(train.main, *flags, tmp_path / "parts")[0] == 0
    a, b = (torch.load(tmp_path / name / "raft.pt") for name in ("whole", "parts"))
    assert equal(a, b) and train.RAFT.load(tmp_path / "whole/raft.pt")
    assert iio.imread(tmp_path / "whole/previews/raft-000002.png").shape == (1024, 512, 3)
    (tmp_path / "whole/raft.pt").unlink()               # as where a kill came before it
    assert run(train.main, *flags, tmp_path / "whole")[0] == 0
    assert equal(a, torch.load(tmp_path / "whole/raft.pt"))
    numbers = []                            # of the pairs, whose sprites have training seeds
    monkeypatch.setattr(train, "training_pairs",
                        lambda number, batch: numbers.append(number) or [[]])
    stage = Mock(batch=256, run=Mock(args=Mock(seed=2 ** 61 + 12_345)))
    train.RAFTStage.load(stage, 10 ** 5, range(256))
    assert 0 <= numbers[0] and (numbers[0] + 1) * 256 * 3 // 8 <= synthetic.HELD_OUT
    for more, complaint in (("--seed=1", "begun with seed 0, not 1"),
                            ("--batch=2", "raft takes --batch from 3 to 256")):
        assert complaint in run(train.main, *flags, tmp_path / "whole", more)[2]
    assert "nowhere: No such file" in run(train.main, *flags, tmp_path / "new", "--init=nowhere")[2]
    assert not (tmp_path / "new").exists()

def test_raft_learns_from_all_iterations_most_from_the_last():
    def flows(frames, iters):
        assert iters == 2 and frames.min() < -.9 and frames.max() > .9     # from -1 to 1
        x = torch.tensor([0., 1.])[:, None, None, None, None]       # in pixels of an eighth
        return torch.cat([x, 0 * x], 2).expand(2, 1, 2, 8, 8)

    stage = Mock(iters=2, run=Mock(device="cpu", autocast=contextlib.nullcontext))
    stage.model.flows, truth = flows, torch.tensor([3., 0]).view(1, 2, 1, 1).expand(1, 2, 64, 64)
    ((loss, _),) = train.RAFTStage.losses(stage, [*torch.rand(2, 1, 3, 64, 64), truth])
    assert loss.item() == pytest.approx(.8 * 3 + (8 - 3), abs=1e-3)

# ---------------------------------------------------------------- interrupted and resumed

class PowerCut(BaseException):
    """Nobody catches this: the process is gone."""

def power_cut(*_, **__):
    raise PowerCut

def ctrl_c(*_, **__):
    signal.raise_signal(signal.SIGINT)

def full_disk(_, checkpoint_id):
    (checkpoint_id / "half").mkdir(parents=True)
    raise OSError(28, "No space left on device")

def breaks_at(monkeypatch, owner, name, call, how):
    """The call-th call of owner.name is interrupted before it does anything."""
    original, calls = getattr(owner, name), itertools.count(1)

    def wrapped(*args, **options):
        if next(calls) == call:
            how(*args, **options)
        return original(*args, **options)

    monkeypatch.setattr(owner, name, wrapped)

@pytest.mark.parametrize("stage, owner, name, call, how", [
    ("tae", train, "tae_loss", 3, ctrl_c),              # half of a step: there are two
    ("tae", TAE, "fit_whitening", 2, ctrl_c),
    ("jam", train, "joint_loss", 2, ctrl_c),
    ("jam", train, "get_ema_multi_avg_fn", 2, power_cut),
    ("jam", train, "show_preview", 2, power_cut),
    ("jam", train, "show_preview", 3, ctrl_c),          # the last one
    ("jam", train.dcp, "save", 2, full_disk)])
def test_interrupted_anywhere_and_resumed_ends_the_same_to_the_bit(
        finished, uninterrupted, begun, run, finishes, monkeypatch, stage, owner, name, call, how):
    out = begun(stage)
    signal.signal(signal.SIGINT, signal.default_int_handler)    # a job in the background has none
    with monkeypatch.context() as patch:
        breaks_at(patch, owner, name, call, how)
        try:
            code, _, err = run(train.main, *train_flags(out, "--stage", stage))
            assert how is not power_cut
            if owner is TAE:                        # after the last step: nothing to wait for
                assert code == 130
            else:                                   # the last checkpoint is whole
                step = checkpoint(out, stage)["step"]
                line = {ctrl_c: f"stopped at step {step} of {stage}", full_disk:
                        f"No space left on device; the checkpoint of step {step} is whole"}[how]
                assert code == 2 and line in err
        except PowerCut:                            # the row that was being written is torn
            with open(out / "metrics.jsonl", "a") as file:
                file.write('{"stage": "ta\n')
    finishes(out, "--stage", stage)
    assert equal(checkpoint(out, stage), uninterrupted[stage])
    if stage == "tae":
        assert equal(torch.load(out / "tae.pt"), torch.load(finished / "tae.pt"))
    assert logged(out, stage) == logged(finished, stage)

@pytest.mark.parametrize("number, apart", [(signal.SIGTERM, 0), (signal.SIGINT, 9)])
def test_a_second_signal_aborts_unless_it_is_torchruns_echo(begun, run, quick, monkeypatch, number,
                                                            apart):
    out, clock = begun("jam"), train.time.time
    handlers = [signal.default_int_handler, signal.getsignal(signal.SIGTERM)]

    def twice(*_, **__):
        signal.raise_signal(number)
        monkeypatch.setattr(train.time, "time", lambda: clock() + apart)
        signal.raise_signal(number)

    signal.signal(signal.SIGINT, signal.default_int_handler)
    breaks_at(monkeypatch, train, "joint_loss", 2, twice)
    code, _, err = run(train.main, *train_flags(out, "--stage", "jam"))
    last = checkpoints(out, "jam")[-1].name
    if apart:
        assert (code, last) == (130, "jam-000000001") and "stopped" not in err
    else:
        assert (code, last) == (2, "jam-000000002")
        assert "stopped at step 2 of jam: the same command goes on" in err
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers

def test_a_finished_stage_is_left_alone_and_can_be_made_longer(finished, tmp_path, finishes, ends,
                                                               monkeypatch):
    out = shutil.copytree(finished, tmp_path / "run")
    before = content(out)
    assert finishes(out).count("done already") == 4
    after = content(out)
    assert all(after[path] == before[path] for path in before if path.name != "model.pt")
    longer = "--stage", "jam", "--steps", "5"
    with monkeypatch.context() as patch:
        breaks_at(patch, train, "joint_loss", 1, ctrl_c)
        assert "stopped at step 4 of jam" in ends(out, *longer)
    # the jam of three steps stays in the file until there is another
    assert "model.pt stays as it is: jam is at step 4 of 5" in finishes(out, "--stage", "base")
    assert content(out)[out / "model.pt"] == after[out / "model.pt"]
    write_model_file(out / "model.pt", TINY, TAE(TINY.tae), {})     # where none would be lost
    assert "stays" not in finishes(out, "--stage", "base")
    assert {*torch.load(out / "model.pt")["dits"]} == {"base", "control"}
    printed = finishes(out, *longer)
    assert checkpoint(out, "jam")["step"] == 5 and len(checkpoints(out, "jam")) == 2
    assert [row["step"] for row in logged(out, "jam")] == [1, 2, 3, 4, 5]
    # the control is not jam's equal any more
    assert "control is left out" in printed
    assert set(torch.load(out / "model.pt")["dits"]) == {"jam", "base"}

def test_half_written_checkpoints_are_never_resumed_from_nor_kept(finished, uninterrupted, begun,
                                                                  finishes):
    out = begun("jam")
    second, third = (shutil.copytree(source, out / "checkpoints" / source.name)
                     for source in checkpoints(finished, "jam"))
    (third / "status.json").unlink()
    (shutil.copytree(second, out / "checkpoints/jam-000000080") / ".metadata").unlink()
    (out / "checkpoints/jam-000000090").mkdir()                 # of a kill while it was begun
    (torn := out / "latents/.000000.x.123.part.npy").touch()
    finishes(out, "--stage", "jam")
    assert [row["step"] for row in logged(out, "jam")] == [3]
    assert equal(checkpoint(out, "jam"), uninterrupted["jam"])
    assert [path.name for path in checkpoints(out, "jam")] == ["jam-000000002", "jam-000000003"]
    assert not torn.exists()

# ---------------------------------------------------------------- several processes

def test_two_processes_equal_one(finished, tmp_path):
    """Started as torchrun does, without its own seconds."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    at_once(*(train_command(
        0, tmp_path / "two", "--accumulate", "2", "--activation-checkpointing", steps=3,
        TINY_STAGES="tae encode base jam", RANK=f"{rank}", LOCAL_RANK=f"{rank}", WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1", MASTER_PORT=f"{port}") for rank in range(2)))
    for stage in ("tae", "base", "jam"):
        alone, shared = ([{key: value for key, value in row.items() if key != "stage"
                           and "bins" not in key and value is not None}
                          for row in logged(out, stage)] for out in (finished, tmp_path / "two"))
        bound = 5e-5 if stage == "jam" else 2e-5    # jam's new rows carry the rounding further
        assert len(alone) == 3 and alone == [pytest.approx(row, rel=bound) for row in shared]

def test_bf16_shards_do_not_round_t(run_of, tmp_path):
    dist, seen, run = torch.distributed, [], run_of(tmp_path, "--precision", "bf16")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for dit in (train.distribute(DiT(TINY.dit), run), DiT(TINY.dit)):
            dit.time.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
            with run.autocast():
                dit(torch.rand(1, *TINY.latent_shape()), torch.tensor([.7]), tokenize(["a"]))
    finally:
        dist.destroy_process_group()
    assert torch.equal(*seen)                               # bf16 knows .699

# ---------------------------------------------------------------- starting points, dry run

def test_init_takes_the_tae_and_each_stage_its_own_dit(finished, begun, tmp_path, finishes, ends,
                                                       monkeypatch):
    out, file = tmp_path / "run", torch.load(finished / "model.pt")
    # a batch of 3 in 2 parts: it is not trained
    monkeypatch.setitem(train.DEFAULTS["tiny"], "tae", (3, 1e-3, 3))
    assert "captions of more than 24 bytes are cut" in finishes(
        out, "--init", finished / "model.pt", "--sigma", ".6", "--accumulate", 2)
    assert equal(torch.load(out / "tae.pt")["state"], file["tae"])
    assert not checkpoints(out, "tae") and checkpoint(out, "jam")["origin"].startswith("its own of")
    assert VideoJAM.load(out / "model.pt").config.sigma == .6       # the run's, not the file's
    assert "begun with origin" in ends(out, "--stage", "jam", "--sigma", ".6")
    for stage in ("encode", "jam"):
        finishes(tmp_path / "alone", "--init", finished / "model.pt", "--stage", stage)
    assert {*torch.load(tmp_path / "alone/model.pt")["dits"]} == {"jam", "base"}    # the file's
    for name, change, complaint in (
            ("size", {"config": {**file["config"], "frames": 9}},
             "of another size than the preset"),
            ("older", {"dits": {"base": {}}}, "does not fit this version")):
        torch.save({**file, **change}, tmp_path / f"{name}.pt")
        assert complaint in ends(tmp_path / name, "--init", tmp_path / f"{name}.pt")
        assert not (tmp_path / name).exists()
    out = begun("jam", "other")
    before = content(out)
    assert "has another TAE, take another --out" in ends(out, "--stage", "jam", "--init",
                                                         finished / "model.pt")
    assert content(out) == before

def test_the_expected_time_is_that_of_the_steps_that_are_left(finished, tmp_path, monkeypatch,
                                                              run_of, capfd):
    """At 1 FLOP a second and half of it used: 2 seconds a FLOP."""
    monkeypatch.setattr(train, "Timer", timer := Mock())
    timer().blocked_autorange().median = 2 * 1024 ** 3
    monkeypatch.setattr(train, "step_flops", lambda preset: {"tae": 10, "base": 30, "jam": 40,
                                                             "control": 50})
    for out, minutes in ((tmp_path, 2 * (3 * 4 * 10 + 3 * 4 * (30 + 40 + 50)) / 60), (finished, 1)):
        EXPECTED_TIME(run_of(out))
        assert capfd.readouterr().out.startswith(f"about {minutes:.0f} minutes on this machine")

def test_dry_run_knows_the_papers_models(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, printed, _ = run(train.main, "--preset", "4b", "--gpus", "8", "--dry-run")
    lines = {line[:52].strip(): line[52:].strip() for line in printed.splitlines()}
    assert code == 0 and not list(tmp_path.iterdir())
    assert lines["parameters of the DiT, billions"] == "4.238"
    memory = float(lines["GB a GPU: weights, gradients, EMA, Muon's moment"])
    assert memory == pytest.approx(4 * 4 * 4.238 / 8, rel=.001)
    # forwards twice, and backwards as much again; a matrix product is 2 operations a weight and
    # each of 4,096 tokens; attention adds to that
    flops = float(lines["TFLOPs a clip"])
    assert .8 < flops / (4 * 2 * 4.238e9 * 4096 / 1e12) < 1.6
    hours = float(lines["hours"].replace(",", ""))
    assert hours == pytest.approx(50_000 * 32 * flops / (8 * 400) / 3600, rel=.01)
    _, _, err = run(train.main, "--preset", "4b", "--gpus", 64, "--dry-run")
    assert "the batch, 32, is no multiple of 64" in err
    for preset, on in (("small", "off"), ("4b", "on"), ("30b", "on")):
        assert f"checkpointing {on}" in run(train.main, "--preset", preset, "--dry-run")[1]

# ---------------------------------------------------------------- bad input

@pytest.mark.parametrize("flag, values, complaint", [
    ("--preset", ["huge"], "--preset: invalid choice: 'huge'"),
    ("--steps", [0, -1, 2.5, "x", ""], "--steps: must be a positive whole number, got"),
    ("--lr", [0, -1, "inf", "nan", "x"], "--lr: must be a positive number, got"),
    ("--clutter", [-.1, 1.1, "nan"], "--clutter: must be from 0 to 1, got"),
    ("--seed", [2 ** 32, -1, "x"], "--seed: must be a whole number from 0 to 2^32 - 1, got"),
    ("--device", ["bad", "meta", "cpu:x", "cuda:99"], ": take cpu or cuda ("),
    ("--init", [""], "--init: is empty"), ("--init", ["nowhere"], "nowhere: No such file"),
    ("--data", ["nowhere"], "no such folder"),
    ("--accumulate", [3], "tae: the batch, 4, is no multiple of 3 (processes x")])
def test_bad_flags_are_one_line_and_leave_no_run_folder(tmp_path, ends, flag, values, complaint):
    for value in values:
        assert complaint in ends(tmp_path / "run", f"{flag}={value}")
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize("more, complaint", [
    (("--seed", 1), "begun with seed 0, not 1"),
    (("--appearance", 0), "begun with appearance 0.5, not 0.0"),
    (("--data", ROOT), "--appearance, --target and --clutter are of the sprite world"),
    (("--data", ROOT, "--clutter", 0, "--appearance", 0), "are of the sprite world"),
    (("--data", ROOT, "--clutter", 0, "--target", "mask"), "are of the sprite world"),
    (("--clutter", 0, "--data", ROOT), "begun with data 'sprites', not 'own videos'"),
    (("--stage", "base", "--lr", .5, "--steps", 9), "begun with lr 0.001, not 0.5"),
    (("--stage", "jam", "--uniform-t", "--t-shift", 9, "--motion-dropout", 0, "--steps", 9),
     "uniform_t False, not True; t_shift 1.0, not 9.0; motion_dropout 0.2, not 0.0"),
    (("--steps", 9), "its latents are of the TAE as it is, which 9 steps would")])
def test_a_run_of_other_settings_is_refused_and_left_as_it_was(finished, ends, more, complaint):
    before = content(finished)
    assert complaint in ends(finished, *more)
    assert content(finished) == before

def test_stages_say_what_they_lack_and_make_nothing(tmp_path, ends):
    for stage in ("encode", "base", "jam", "control"):
        assert "has no tae yet, run --stage tae first" in ends(tmp_path / stage, "--stage", stage)
    assert not list(tmp_path.iterdir())
    for stage in ("base", "jam"):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "tae.pt").touch()
        assert "encode has done 0 of all shards of latents, run --stage encode first" in ends(
            tmp_path / stage, "--stage", stage)
    (tmp_path / "file").write_text("")
    assert "Not a directory" in ends(tmp_path / "file/run")

def test_unfinished_stages_and_damaged_files_are_refused(begun, ends):
    out = begun("jam")
    status = checkpoints(out, "base")[-1] / "status.json"
    whole = status.read_text()
    status.write_text(json.dumps({**json.loads(whole), "of": 9}))
    assert "has 3 of 9 steps of base, run --stage base first" in ends(out, "--stage", "jam")
    assert "has 3 of 9 steps of base" in ends(out, "--stage", "base", "--steps", 2)     # fewer
    status.write_text(whole.replace('"lr"', '"l"'))
    assert "status.json: damaged" in ends(out, "--stage", "base")
    status.write_text(whole)
    tae = (out / "tae.pt").read_bytes()
    (out / "tae.pt").unlink()
    for stage in ("tae", "encode", "jam"):
        assert "its latents are there without tae.pt, which made them" in ends(
            out, "--stage", stage)
    (out / "tae.pt").write_bytes(tae[:1000])
    assert "tae.pt: damaged, or not" in ends(out, "--stage", "encode")
    torch.save({"kind": "tae", "origin": "", "state": {}}, out / "tae.pt")
    assert "tae.pt: not the TAE of preset tiny" in ends(out, "--stage", "encode")
    (out / "tae.pt").write_bytes(tae)
    for part in checkpoints(out, "base")[-1].glob("*.distcp"):
        part.write_bytes(part.read_bytes()[:1000])
    for stage in "base", "jam":
        assert f"{checkpoints(out, 'base')[-1]}: cannot be read; delete if damaged (" in ends(
            out, "--stage", stage, "--steps", 9)
    manifest = out / "latents/manifest.json"
    whole = manifest.read_text()
    manifest.write_text(whole[:30])
    assert "manifest.json: damaged" in ends(out)
    manifest.write_text(whole)
    (out / "latents/000001.json").unlink()
    assert "encode has done 1 of 2 shards of latents, run --stage encode first" in ends(
        out, "--stage", "jam")
    settings = json.loads((out / "settings.json").read_text())
    (out / "settings.json").write_text(json.dumps({**settings, "version": 2}))
    assert f"begun with version 2, not {train.VERSION}: take another --out" in ends(out)
    (out / "settings.json").write_text("[]")
    assert "settings.json: damaged" in ends(out)

@pytest.mark.parametrize("name", ("load", "save"))
def test_ctrl_c_is_no_fault_of_a_checkpoint_that_is_read_or_written(begun, run, monkeypatch, name):
    failures = {0: (KeyboardInterrupt(), None)}
    monkeypatch.setattr(train.dcp, name, Mock(
        side_effect=train.dcp.CheckpointException(name, failures)))
    code, _, err = run(train.main, *train_flags(begun("jam"), "--stage", "jam"))
    assert code == 130 and "interrupted" in err and "delete" not in err and "cannot" not in err

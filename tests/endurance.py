"""What takes too long for the suite, and prints what it measures: pytest -s tests/endurance.py"""
import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from conftest import (ROOT, at_once, checkpoint, checkpoints, content, equal, logged, ramp,
                      randomised, train_command, train_flags, use_tiny_preset, write_clip)

import common
import data
import train
from common import autocast
from flow import RAFT, estimate_flow, flow_to_rgb
from synthetic import sprite_clips
from videojam import (GUIDANCE, PRESETS, TAE, DiT, flow_matching_loss, guided_velocity, joint_loss,
                      tokenize)

STAGES = [stage for stage in train.STAGES if stage != "encode"]      # those that have weights

# ---------------------------------------------------------------- killed and come back

def assert_same(a, b):
    """Two runs ended alike to the bit: weights, averages, moments, latents and metrics."""
    assert content(a / "latents") == {
        a / path.relative_to(b): data for path, data in content(b / "latents").items()}
    for stage in STAGES:
        assert logged(a, stage) == logged(b, stage)
        assert equal(checkpoint(a, stage), checkpoint(b, stage))

@contextlib.contextmanager
def begin(out, processes=0, **options):
    """Starts a run and waits until it is at work; nothing of it is left afterwards."""
    phase = out.with_suffix(".phase")
    phase.unlink(missing_ok=True)
    arguments = train_command(processes, out, steps=60, TINY_PHASE=str(phase), **options)
    with open(out.with_suffix(".log"), "w") as log:
        process = subprocess.Popen(**arguments, stdout=log, stderr=log, start_new_session=True)
    try:
        while not phase.exists() and process.poll() is None:
            time.sleep(.01)
        yield process, phase
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

def ends_well(out, *begin_arguments, **options):
    """Runs to the end; -> the seconds of its work."""
    with begin(out, *begin_arguments, **options) as (process, _):
        start = time.time()
        assert process.wait(timeout=600) == 0, out.with_suffix(".log").read_text()[-2000:]
        return time.time() - start

def test_20_kills_at_random_moments_change_nothing(tmp_path):
    """Some in the writing of a checkpoint or of latents, the others whenever they come."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    seconds = ends_well(whole, clips=1024)
    chance, kills = random.Random(0), Counter()
    for target in [None, "save", None, "encode", "encode", *[None, "save", None] * 5]:
        with begin(killed, clips=1024) as (process, phase):
            time.sleep(chance.uniform(0, seconds / 20))
            while target and process.poll() is None and phase.read_text() != target:
                time.sleep(.001)
            time.sleep(chance.uniform(0, {"save": .03, "encode": 1}.get(target, 0)))
            assert process.poll() is None, f"it was over after {kills}"
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills[phase.read_text() or "between"] += 1
    ends_well(killed, clips=1024)
    print(f"\n{kills.total()} kills, {dict(kills)}, in a run of {seconds:.0f} s: the same weights")
    assert kills["save"] and kills["encode"] and kills["step"]
    assert_same(whole, killed)

def test_a_killed_rank_comes_back_by_itself(tmp_path):
    """Three times; torchrun starts both processes again, from the last checkpoint."""
    whole, chance = tmp_path / "whole", random.Random(0)
    options = {"torchrun": ("--max-restarts=1",), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    ends_well(whole, 2, **options)
    for trial in range(3):
        out = tmp_path / f"killed{trial}"
        with begin(out, 2, **options) as (process, phase):
            while not list(out.glob("checkpoints/*/status.json")) and process.poll() is None:
                time.sleep(.01)
            time.sleep(chance.uniform(0, 5))
            ranks = Path(f"{phase}.ranks")
            os.kill(int(chance.choice(ranks.read_text().split()[1::2])), signal.SIGKILL)
            start = time.time()
            assert process.wait(timeout=300) == 0, out.with_suffix(".log").read_text()[-2000:]
            print(f"\na rank was killed: the run ended well {time.time() - start:.0f} s later")
            assert ranks.read_text().split()[::2] == ["0", "0", "1", "1"]
        assert_same(whole, out)

def test_checkpoints_move_to_another_number_of_processes(tmp_path):
    """The last 2 of jam's 10 steps again, by the other number of processes."""
    one, two = tmp_path / "one", tmp_path / "two"
    at_once(train_command(0, one), train_command(2, two))
    for out, processes in ((one, 2), (two, 0)):
        command = train_command(processes, out, "--stage", "jam")
        before = checkpoint(out, "jam")
        shutil.rmtree(checkpoints(out, "jam")[-1])
        start = checkpoint(out, "jam")
        at_once(command)
        again = checkpoint(out, "jam")
        assert before["step"] == again["step"] == 10 and start["step"] == 8
        for part in ("model", "ema"):
            for name, weight in before[part].items():
                way = (weight - start[part][name]).norm()
                assert (again[part][name] - weight).norm() <= 1e-3 * way + 1e-6, name

# ---------------------------------------------------------------- many files

def test_memory_is_flat_over_1000_clips(tmp_path):
    """Of 20 videos of a bright bar that moves."""
    for i in range(20):
        frames = np.zeros((9 * 24, 480, 640, 3), np.uint8)
        for k, frame in enumerate(frames):
            frame[:, (3 * k + 7 * i) % 640:][:, :9] = 200
        iio.imwrite(tmp_path / f"{i}.mp4", frames, fps=24)
        (tmp_path / f"{i}.txt").write_text(f"a bar, {i}")
    common.keep_freed_memory()
    preset = train.PRESETS["toy"]
    dataset = data.Folder(tmp_path, preset, RAFT.load(), tmp_path, 4, 16, takes_all=True)
    parts = [dataset.keys(50)[i:i + 10] for i in range(0, 1000, 10)]
    seen, start = [], time.time()
    for video, *_ in data.Prefetcher(dataset.read, parts, 4):
        assert len(video) == 10
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        seen.append(pages * os.sysconf("SC_PAGESIZE") / 1e6)            # MB that are in memory
    print(f"\n1,000 clips of 640 x 480 in {time.time() - start:.0f} s; memory after 100, 500 and "
          f"1,000: {seen[9]:.0f}, {seen[49]:.0f}, {seen[99]:.0f} MB")
    assert np.median(seen[-20:]) < np.median(seen[10:30]) + 50        # all clips kept: 150 MB more

@pytest.mark.usefixtures("brightness_as_motion")
def test_2000_files_of_which_one_in_ten_is_broken(tmp_path, monkeypatch, run):
    """Every file is used or skipped with its reason, in the listing and in encode."""
    write_clip(tmp_path / "good.mp4", ramp(12), 8)
    (folder := tmp_path / "data").mkdir()
    good = (tmp_path / "good.mp4").read_bytes()
    broken = b"", b"hi", good[:200], good[:len(good) // 2], good[300:], os.urandom(5000)
    for i in range(2000):
        (folder / f"{i:04d}.mp4").write_bytes(good if i % 10 else broken[i // 10 % 6])
        (folder / f"{i:04d}.txt").write_text("it gets brighter")
    use_tiny_preset(monkeypatch, steps=1, clips=1)
    for stage in ("tae", "encode"):
        start = time.time()
        code, printed, err = run(train.main, *train_flags(
            tmp_path / "run", "--clutter", 0, "--data", folder, "--prepare", 10 ** 5, "--stage",
            stage))
        assert code == 0, err
        print(f"\n{stage}: {time.time() - start:.0f} s\n{printed}")
    listing = json.loads((tmp_path / "run/videos.json").read_text())
    assert [name for name, entry in sorted(listing.items()) if "reason" in entry] == [
        f"{i:04d}.mp4" for i in range(0, 2000, 10)]
    assert "1800 of 1800 clips are there" in printed

# ---------------------------------------------------------------- compilers and GPUs

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

@pytest.mark.parametrize("device", (
    pytest.param("cpu", marks=pytest.mark.skipif(not common.can_compile(torch.device("cpu")),
                                                 reason="no C++ compiler")),
    pytest.param("cuda", marks=gpu)))
def test_compiled_blocks_have_the_gradients_of_plain_ones(device):
    """In train.py's dtype and widths here: a compiler's mistakes depend on both, and on the CPU."""
    preset, y = PRESETS["toy"], tokenize(["a red square moves left", "", "a", "a star"])
    config = dataclasses.replace(preset.dit, depth=1, text_depth=1)
    x1, y, gradients = torch.randn(4, *preset.latent_shape()).to(device), y.to(device), []
    for compiled in (False, True):
        dit = randomised(DiT(config), std=.05).to(device)
        if compiled:
            common.compile_layers(dit)
        with autocast(device):
            loss = flow_matching_loss(dit, x1, y, generator=torch.Generator().manual_seed(0))
        loss.backward()
        gradients.append({name: weight.grad for name, weight in dit.named_parameters()})
    errors = {name: (gradients[1][name] - plain).norm() / plain.norm()
              for name, plain in gradients[0].items()}
    worst = max(errors, key=errors.get)
    print(f"\ngradients, compiled against plain: {max(errors.values()):.1%} at most ({worst})")
    assert all(error < .05 for error in errors.values())                # (NaN is not below)

@gpu
def test_a_gpu_computes_what_the_cpu_does(monkeypatch):
    """The models, in fp32; gradients and all guidance modes too."""
    monkeypatch.setattr(common, "fast_dtype", lambda device: torch.float32)
    toy, raft = PRESETS["toy"], RAFT.load()
    tae, dit = TAE(toy.tae), randomised(DiT(toy.dit).add_motion(), std=.05)
    video, truth, captions, _ = sprite_clips(range(4), toy.frames, toy.size)
    noise, results = torch.randn(2, 4, *toy.latent_shape()), []
    for device in ("cpu", "cuda"):
        tae, dit, raft = tae.to(device), dit.to(device), raft.to(device)
        on_it, y = video.to(device), tokenize(captions).to(device)
        x, d = noise.to(device)
        with torch.backends.cudnn.flags(allow_tf32=False):
            latent, flows = tae.encode(on_it), estimate_flow(raft, on_it)
            parts = {"encode": latent, "decode": tae.decode(latent), "RAFT": flows,
                     "RGB": flow_to_rgb(truth.to(device)), "DiT": dit(torch.cat([x, d], 1), .3, y)}
            parts |= {mode: guided_velocity(dit, x, d, .3, y, mode=mode) for mode in GUIDANCE}
            dit.zero_grad()
            joint_loss(dit, x, d, y, generator=torch.Generator().manual_seed(0)).backward()
        parts |= {name: weight.grad for name, weight in dit.named_parameters()}
        results.append({name: part.detach().cpu() for name, part in parts.items()})
    errors = {name: (results[1][name] - part).norm() / part.norm()
              for name, part in results[0].items()}
    worst = sorted(errors, key=errors.get)[-3:]
    print("\nGPU against CPU:", ", ".join(f"{name} {errors[name]:.1e}" for name in worst))
    assert all(error < 1e-3 for error in errors.values())

@gpu
def test_on_a_gpu_torchrun_is_one_process_and_resumed_is_uninterrupted(tmp_path):
    """FSDP2 by NCCL, with one process for want of GPUs, against none; all stages."""
    one, two = tmp_path / "one", tmp_path / "two"
    at_once(train_command(0, one, "--device", "cuda"))
    at_once(train_command(1, two, "--device", "cuda", "--accumulate", "2"))
    for stage in STAGES:
        alone, by_torchrun = logged(one, stage), logged(two, stage)
        apart = [abs(a[name] / b[name] - 1) for a, b in zip(alone, by_torchrun) for name in a
                 if name.startswith("loss") and a[name] is not None]
        print(f"\n{stage}: losses at most {max(apart):.1e} apart")
        # (on an H200 1.7e-4, of jam; on CPUs 2e-5)
        assert len(alone) == len(by_torchrun) == 10 and max(apart) < 5e-4
    bundle = torch.load(one / "model.pt", weights_only=True)        # for those without a GPU
    for part in (bundle["tae"], *bundle["dits"].values()):
        assert not any(tensor.is_cuda for tensor in part.values())
    for stage in ("tae", "jam"):
        whole = checkpoint(one, stage)
        shutil.rmtree(checkpoints(one, stage)[-1])
        if stage == "tae":
            (one / "tae.pt").unlink()
        at_once(train_command(0, one, "--stage", stage, "--device", "cuda"))
        again = checkpoint(one, stage)
        assert equal(whole["model"], again["model"]) and equal(whole["ema"], again["ema"]), stage

@gpu
def test_on_a_gpu_the_paper_s_sizes_go_from_nothing_to_a_video(tmp_path):
    """4b's TAE, width and clips (128 x 256 x 256) with two blocks of 32, whose weights a disk
    holds: all stages under torchrun, with layers recomputed and compiled."""
    out = tmp_path / "run"
    options = ("--device", "cuda", "--precision", "bf16", "--accumulate", "2", "--compile",
               "--activation-checkpointing")
    at_once(train_command(1, out, *options, TINY_LARGE="1"))
    assert all(len(logged(out, stage)) == 1 for stage in STAGES)
    subprocess.run([sys.executable, ROOT / "sample.py", "--run", out, "a red square moves left",
                    "--steps", "4", "--out", tmp_path / "video.mp4"], check=True)
    assert iio.imread(tmp_path / "video.mp4").shape[0] == 128

"""What the tests share: a tiny preset, small files, scripts, and runs of train.py."""
import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import common                                                                       # noqa: E402
import data                                                                         # noqa: E402
import flow                                                                         # noqa: E402
import train                                                                        # noqa: E402
from common import ffmpeg, report_errors                                            # noqa: E402
from flow import RAFT                                                               # noqa: E402
from videojam import (TAE, DiT, DiTConfig, Preset, TAEConfig,                       # noqa: E402
                      write_model_file)

def pytest_configure(config):
    """The suite is about the CPU's numbers, to the bit; a GPU's are endurance.py's."""
    if not any("endurance" in argument for argument in config.args):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""

@pytest.fixture(scope="module", autouse=True)
def threads(request):
    """train.py's tiny tensors gain nothing from two, and its processes share the cores."""
    torch.set_num_threads(1 if request.module.__name__ in ("test_train", "test_bench") else 2)

# 5 frames of 16 px -> latents (4, 3, 4, 4): the last latent frame covers one spurious video frame
TINY = Preset(5, 16, 8, TAEConfig(4, 2, (8, 8), ((2, 2),), 1),
              DiTConfig(4, 2, 24, 2, 2, 32, 64, 1, max_bytes=24))

def randomised(module, seed=0, std=.3):
    """Much of a model starts at zero, where a mistake is invisible: every parameter gets noise."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return module

def tiny_dit(motion=True, seed=0):
    dit = DiT(TINY.dit)
    return randomised(dit.add_motion() if motion else dit, seed).eval()

@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A run folder whose model.pt holds all three models of the tiny preset, untrained."""
    folder = tmp_path_factory.mktemp("run")
    write_model_file(folder / "model.pt", TINY, randomised(TAE(TINY.tae)), {
        "jam": tiny_dit(), "base": tiny_dit(False, 1), "control": tiny_dit(False, 2)})
    return folder

@pytest.fixture
def run(monkeypatch, capfd):
    """run(main, "--flag", value) -> exit code, stdout, stderr of a script, in this process."""
    def call(main, *argv):
        monkeypatch.setattr(sys, "argv", [f"{main.__module__}.py", *map(str, argv)])
        capfd.readouterr()
        try:
            report_errors(main)
            code = 0
        except SystemExit as end:
            code = end.code
        return code, *capfd.readouterr()
    return call

@pytest.fixture
def refuses(run):
    """refuses(main, "--flag", value) -> its one line on stderr but for progress; exit code 2."""
    def call(main, *argv):
        code, _, err = run(main, *argv)
        lines = [line for line in err.splitlines() if line.strip() and "%|" not in line]
        assert code == 2 and len(lines) == 1 and lines[0].startswith(main.__module__), err
        return lines[0]
    return call

def takes_no_bad_weights(load, folder, good, **changed):
    """ValueError, in a line that names the file, for all that is not weights like those in `good`;
    no code in a file runs. changed: {name: content} of more such files."""
    class RunsCode:
        def __reduce__(self):
            return os.mkdir, (str(folder / "ran"),)

    half = good.read_bytes()[:good.stat().st_size // 2]
    for name, data_of in {"truncated": half, "empty": b"", "text": b"hi"}.items():
        (folder / name).write_bytes(data_of)
    changed = {"foreign": {"kind": "x"}, "list": [1, 2],
               "malicious": {"kind": "videojam", "config": RunsCode()}, **changed}
    for name, content_of in changed.items():
        torch.save(content_of, folder / name)
    for name in ("missing", "truncated", "empty", "text", *changed, "."):
        with pytest.raises(ValueError) as error:
            load(folder / name)
        assert str(folder / name) in str(error.value) and "\n" not in str(error.value)
    assert not (folder / "ran").exists()

@pytest.fixture
def brightness_as_motion(monkeypatch):
    """Motion without RAFT: fast, and another one for every clip."""
    monkeypatch.setattr(RAFT, "load", classmethod(lambda cls: torch.nn.Identity()))
    for module in (data, flow):
        monkeypatch.setattr(module, "estimate_flow", lambda raft, video: video[:, :, :2] - .5)

def ramp(frames, height=32, width=32):
    """A video that gets brighter by 8 a frame, so that a frame's number can be read off it."""
    return (np.arange(frames, dtype=np.uint8) * 8).repeat(height * width * 3).reshape(
        frames, height, width, 3)

def write_clip(path, frames, fps):
    iio.imwrite(path, frames, plugin="FFMPEG", fps=fps, macro_block_size=2,
                output_params=["-crf", "1"])

def make(path, *options):
    """A video by ffmpeg, from a source that it draws."""
    subprocess.run([ffmpeg(), "-loglevel", "error", "-f", "lavfi", "-i", *options, path],
                   check=True)
    return path

def make_varying(path, source="testsrc2=s=64x64:r=30:d=1.2,select='lt(n,12)+not(mod(n,6))'"):
    """A video whose rate varies: 16 frames in 1.2 s, which the header calls 23 a second."""
    return make(path, source, "-fps_mode", "passthrough", "-enc_time_base", "1/1000", "-pix_fmt",
                "yuv420p", "-crf", "1")

# ---------------------------------------------------------------- runs of train.py

def use_tiny_preset(patch, steps=3, clips=32):
    """Gives train.py the preset "tiny", which passes through a stage in a second."""
    stage = steps, 1e-3, 4
    patch.setitem(train.PRESETS, "tiny", TINY)
    patch.setitem(train.DEFAULTS, "tiny", {"tae": stage, "encode": (clips, 8), "base": stage,
                                           "jam": stage})
    # sums in another order, as of two processes, would show after bf16 products
    patch.setattr(common, "fast_dtype", lambda device: torch.float32)
    patch.setattr(train, "SHARD", 16)
    patch.setattr(train, "WHITENING_CLIPS", 32)
    patch.setattr(train, "print_expected_time", lambda run: None)           # it measures

def train_flags(out, *more):
    """Flags of a run with the preset "tiny"."""
    return ("--preset", "tiny", "--clutter", ".2", "--no-compile", "--device", "cpu", "--precision",
            "fp32", "--out", str(out), *map(str, more))

def train_command(processes, out, *more, steps=10, clips=32, torchrun=(), **environment):
    """subprocess's arguments for train.py with the preset "tiny"; processes = 0: no torchrun."""
    start = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone",
             *torchrun] if processes else []
    return {"args": [sys.executable, *start, str(ROOT / "tests/tiny_train.py"),
                     *train_flags(out, *more)],
            "text": True, "env": {**os.environ, "OMP_NUM_THREADS": "1", "TINY_STEPS": str(steps),
                                  "TINY_CLIPS": str(clips), **environment}}

def at_once(*commands):
    """Runs them beside each other; all have to end well."""
    runs = [subprocess.Popen(**arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            for arguments in commands]
    for run in runs:
        err = run.communicate()[1]
        assert run.returncode == 0, err[-3000:]

def checkpoints(out, stage):
    """The folders of a stage's checkpoints, the last one last."""
    return sorted((out / "checkpoints").glob(f"{stage}-*"))

def checkpoint(out, stage, which=-1):
    """The tensors and the status of a stage's checkpoint, by default the last one."""
    last, whole = checkpoints(out, stage)[which], out / "whole"
    dcp_to_torch_save(last, whole)
    state = torch.load(whole, weights_only=True)
    whole.unlink()
    return {**state, **json.loads((last / "status.json").read_text())}

def logged(out, stage):
    """A stage's losses in metrics.jsonl: the last row of each step, and no row that a kill tore."""
    found = {}
    for line in (out / "metrics.jsonl").read_text().splitlines():
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if row["stage"] == stage and "lr" in row:
                found[row["step"]] = row
    return list(found.values())

def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

def equal(a, b):
    """Whether nested dicts and lists of tensors are the same to the bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b

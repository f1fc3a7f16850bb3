"""What the tests share: a tiny model, and scripts run without a process of their own."""
import ast
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)            # tiny tensors: more threads only wait for each other

from flow import report_errors                                                      # noqa: E402
from videojam import TAE, DiT, DiTConfig, Preset, TAEConfig, VideoJAM               # noqa: E402


def pytest_configure(config):
    """The suite is about the CPU's numbers, to the bit; a GPU's are endurance.py's."""
    if not any("endurance" in argument for argument in config.args):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


# The whole suite is run by two processes, one for each core: the second takes tests from the end,
# the first from the beginning, until they meet. The second's reports reach the first by a file.
SECOND = "VIDEOJAM_SECOND_PYTEST"       # where it finds the folder that they share


def taken(items, folder):
    """Those of the items that this process has to run."""
    for i in reversed(range(len(items))) if SECOND in os.environ else range(len(items)):
        with contextlib.suppress(FileExistsError):
            (folder / str(i)).touch(exist_ok=False)
            yield items[i]


def pytest_runtestloop(session):
    config, hook, second = session.config, session.config.hook, None
    few, asked, ran = len(session.items) < 300, vars(config.option), set()
    if few or session.testsfailed or asked["capture"] == "no" or any(map(asked.get, (
            "usepdb", "basetemp", "collectonly", "maxfail", "stepwise", "numprocesses"))):
        return None                                                 # pytest's own loop
    folder = Path(os.environ.get(SECOND) or tempfile.mkdtemp())
    # the longest ones at the end, where the second begins
    items = sorted(session.items, key=lambda item: "two_processes" in item.name)
    if SECOND not in os.environ:
        (folder / "reports").touch()
        second = subprocess.Popen(
            [sys.executable, "-m", "pytest", *config.invocation_params.args],
            cwd=config.invocation_params.dir, env={**os.environ, SECOND: str(folder)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        run = taken(items, folder)
        item = next(run, None)
        while item:
            following = next(run, None)
            hook.pytest_runtest_protocol(item=item, nextitem=following)
            ran.add(item.nodeid)
            item = following
            if session.shouldfail:
                raise session.Failed(session.shouldfail)
            if session.shouldstop:
                raise session.Interrupted(session.shouldstop)
        if second:
            said = second.communicate()[0]
            for line in (folder / "reports").read_text().splitlines():
                report = hook.pytest_report_from_serializable(config=config,
                                                              data=ast.literal_eval(line))
                hook.pytest_runtest_logreport(report=report)
                if report.when == "teardown":
                    ran.add(report.nodeid)
            if missing := {item.nodeid for item in items} - ran:
                pytest.exit(f"the second pytest ended with {second.returncode}, without "
                            f"{', '.join(sorted(missing))}:\n{said}", 2)
    finally:
        if second:
            second.kill(), second.wait()
            shutil.rmtree(folder)
    return True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    if SECOND in os.environ:
        data = item.config.hook.pytest_report_to_serializable(config=item.config, report=report)
        with open(Path(os.environ[SECOND], "reports"), "a") as file:
            print(ascii(data), file=file)
    return report


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
def bundle(tmp_path_factory):
    """A run folder whose model.pt holds all three models of the tiny preset, untrained."""
    folder = tmp_path_factory.mktemp("run")
    jam = VideoJAM(TINY, randomised(TAE(TINY.tae)), tiny_dit())
    jam.save(folder / "model.pt", base=tiny_dit(False, 1), control=tiny_dit(False, 2))
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
    """refuses(main, "--flag", value): exit code 2, one line on stderr, which is returned."""
    def call(main, *argv):
        code, _, err = run(main, *argv)
        # progress bars begin their lines anew
        lines = [line for line in err.splitlines() if line and "%|" not in line]
        assert code == 2 and len(lines) == 1 and lines[0].startswith(main.__module__), err
        return lines[0]
    return call


class RunsCode:
    """Unpickling this makes a folder: the sign that a weights file could run code."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def bad_weights(folder, good):
    """{name: path} of files that are not weights; `good` is a file of weights to truncate."""
    data = Path(good).read_bytes()
    (folder / "truncated").write_bytes(data[:len(data) // 2])
    (folder / "empty").write_bytes(b"")
    (folder / "text").write_bytes(b"hello world")
    torch.save({"kind": "something", "a": torch.zeros(2)}, folder / "foreign")
    torch.save([1, 2], folder / "list")
    torch.save({"kind": "videojam", "config": RunsCode(folder / "ran")}, folder / "malicious")
    return [folder / name for name in ("missing", "truncated", "empty", "text", "foreign", "list",
                                       "malicious")]

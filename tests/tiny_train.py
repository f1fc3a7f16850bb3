"""train.py with a tiny preset, for tests that start processes: python tests/tiny_train.py FLAGS.

Environment: TINY_STEPS and TINY_CLIPS are the stages' steps and encode's clips, TINY_STAGES the
stages (default: all); TINY_LARGE takes a large preset, for a GPU. TINY_PHASE names a file that
always says what the run is at: "encode", "step" or "save", the writing of a checkpoint."""
import dataclasses
import os
import sys
from pathlib import Path

import pytest
from conftest import use_tiny_preset

import common
import train

def told(phase, name, function):
    """The function, telling what the run is at: `name` during a call, "step" after it."""
    def call(*args, **options):
        phase.write_text(name)
        result = function(*args, **options)
        phase.write_text("step")
        return result
    return call

if __name__ == "__main__":
    if "TINY_LARGE" in os.environ:      # the paper's 4b with two blocks of 32: it fits on one GPU
        preset = train.PRESETS["4b"]
        two_blocks = dataclasses.replace(preset.dit, depth=2)
        train.PRESETS["tiny"] = dataclasses.replace(preset, dit=two_blocks)
        train.DEFAULTS["tiny"] = {"encode": (4, 1), **dict.fromkeys(("tae", "base", "jam"),
                                                                     (1, 1e-4, 2))}
        train.SHARD, train.WHITENING_CLIPS = 2, 1
    else:
        use_tiny_preset(pytest.MonkeyPatch(), int(os.environ["TINY_STEPS"]),
                        int(os.environ["TINY_CLIPS"]))
        train.show_preview = lambda *_: None
    train.STAGES = os.environ.get("TINY_STAGES", " ".join(train.STAGES)).split()
    if "TINY_PHASE" in os.environ:
        phase = Path(os.environ["TINY_PHASE"])
        with open(f"{phase}.ranks", "a") as file:
            file.write(f"{os.environ.get('TORCHELASTIC_RESTART_COUNT')} {os.getpid()}\n")
        train.CHECKPOINT_SECONDS = .3
        train.encode = told(phase, "encode", train.encode)
        train.train_loop = told(phase, "step", train.train_loop)
        train.Run.save = told(phase, "save", train.Run.save)
    sys.argv[0] = "train.py"
    common.report_errors(train.main)

"""Trains VideoJAM: an auto-encoder, a base model, its VideoJAM fine-tuning, and a fair control.

    python train.py                             the sprite world, every stage
    python train.py --data FOLDER               own videos: find_videos in data.py says how
    python train.py --stage jam --steps 5000    one stage; a finished stage gets longer
    python train.py --stage raft                RAFT: copy runs/raft/raft.pt into weights/
    python train.py --init weights/toy.pt --clutter .2 --t-shift 1 --out runs/more  from the shipped
    torchrun --nproc_per_node=8 train.py --preset 4b --accumulate 4 --data FOLDER   on many GPUs
    python train.py --preset 30b --gpus 256 --dry-run                   what that would take

Stages: tae; encode (latents of videos and of their RGB flow); base (Eq. 3); jam (Eq. 6, from the
base); control (Eq. 3, from the base, with jam's steps, clips, noise and learning rate, only that
jam's new rows learn faster). For a first reading: DiTStage.losses, Trainer.update, train_loop.

A run is a folder; its model.pt is the file to share (`python sample.py --run FOLDER`). The same
command again resumes, bit-exact on a CPU: randomness depends on (seed, stage, step, place in the
batch) alone, not on the number of GPUs. (Resume your own runs only: their index is a pickle.)

With torchrun --max-restarts set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1; for 4b give torchrun
--shutdown-timeout 600 too, so that Ctrl-C has time to write a checkpoint.
"""
import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import shlex
import shutil
import signal
import time
import warnings
import zlib
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.state_dict as dcp_state
import torch.distributed.fsdp as fsdp
import torch.nn.functional as F
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from common import (Parser, any_rank, autocast, barrier, can_compile, compile_layers, device_of,
                    fast_dtype, fraction, grid, join_processes, keep_freed_memory, leave_processes,
                    make_optimizers, nonempty, one_line, positive, positive_int, print0, rank,
                    read_json, read_tensors, report_errors, seed, world_size, write_file,
                    write_tensors, write_text, write_video)
from data import Folder, Latents, Prefetcher, Sprites, print_skipped
from flow import RAFT, estimate_flow, flow_to_rgb, upsample
from synthetic import APPEARANCE, HELD_OUT, TARGETS, flow_scenes, sprite_clips, training_pairs
from videojam import (PAD, PRESETS, TAE, DiT, Noise, VideoJAM, flow_matching_loss, initialize,
                      joint_loss, new_entries, read_model_file, sample_noise,
                      set_activation_checkpointing, tae_loss, token_row, tokenize,
                      write_model_file)

STAGES = ("tae", "encode", "base", "jam", "control")
# preset -> stage -> (steps, learning rate, batch over all GPUs); the control has jam's. encode:
# (clips of the sprite world, or of each video at most; batch of each GPU)
DEFAULTS = {
    "toy": {"tae": (800, 1e-3, 4), "encode": (6144, 32), "base": (2200, 4.5e-3, 64),
            "jam": (1400, 3e-3, 64)},
    "small": {"tae": (50_000, 3e-4, 8), "encode": (64, 8), "base": (200_000, 2e-4, 64),
              "jam": (20_000, 5e-5, 64)},
    "4b": {"tae": (300_000, 1e-4, 32), "encode": (4, 1), "base": (500_000, 1e-4, 256),
           "jam": (50_000, 5e-6, 32)},
    "30b": {"tae": (300_000, 1e-4, 32), "encode": (4, 1), "base": (500_000, 1e-4, 1024),
            "jam": (35_000, 5e-6, 256)},
}
RAFT_DEFAULTS = 20_000, 4e-4, 8         # of stage raft, whatever the preset
VERSION = 13                            # of a run's folder: raised when old runs cannot go on
SHARD = 256                             # clips in a file of latents
WHITENING_CLIPS = 256                   # that the TAE's whitening is fitted on
CHECKPOINT_SECONDS = 60                 # between two at least; or 20 times what one takes to write
WARMUP_STEPS, MAX_NORM, EMA_DECAY = 200, 1., .999
MAX_BAD_STEPS = 10                      # in a row, whose gradient is not finite, end a run
T_BINS = 5                              # losses are logged apart for t in [0, .2), [.2, .4), ...
MOTION_LR_SCALE = 5.                    # of the new rows and columns of W_in and W_out

# harmless: one process saves alone; nobody writes into the TAE's output
warnings.filterwarnings("ignore", "torch.distributed is disabled|FSDP2-wrapped module .* returned")

def rng(*key):
    """A random stream of its own for a key such as (seed, stage, step, place in the batch)."""
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))

# ---------------------------------------------------------------- a run and its folder

def cause_of(error):
    """What reading or writing a checkpoint failed by: DCP wraps every exception, even Ctrl-C's."""
    cause = next((cause for cause, _ in getattr(error, "failures", {}).values()), error)
    if isinstance(cause, KeyboardInterrupt):
        raise cause from None
    return cause

def load_checkpoint(state, path, alone=False):
    """Reads the tensors of `state` from a checkpoint's folder, with all processes or alone."""
    try:
        dcp.load(state, checkpoint_id=path, no_dist=alone)
    except (Exception, dcp.CheckpointException) as error:       # which is no Exception
        reason = repr(cause_of(error))[:200]
        raise ValueError(f"{path}: cannot be read; delete if damaged ({reason})") from None

def refuse_changes(path, before, settings):
    """ValueError where something was begun with other settings than these."""
    changes = "; ".join(f"{key} {before.get(key)!r}, not {value!r}"
                        for key, value in settings.items() if before.get(key) != value)
    if changes:
        raise ValueError(f"{path} was begun with {changes}: take another --out, or delete it")

def check_batch(stage, batch, unit, parts):
    """ValueError unless the batch is a multiple of the unit, the product of some `parts`."""
    if batch % unit:
        raise ValueError(f"{stage}: the batch, {batch}, is no multiple of {unit} ({parts})")

class Run:
    """A run's folder, and what all its stages share."""
    def __init__(self, args):
        self.args, self.out, self.device = args, Path(args.out), args.device
        self.manifest = self.out / "latents/manifest.json"      # of stage encode
        self.autocast = functools.partial(autocast, args.device, args.precision)
        self.choices = {name: getattr(args, name) for name in ("sigma", "appearance", "target")}
        self.preset = dataclasses.replace(PRESETS[args.preset], **self.choices)
        self.stages = [args.stage] if args.stage else STAGES[1:] if args.init else STAGES
        self.given = {}                                         # DiTs of --init
        self.settings = {"version": VERSION, "preset": args.preset,
                         "data": "own videos" if args.data else "sprites",
                         "clutter": args.clutter, "seed": args.seed,
                         **json.loads(json.dumps(dataclasses.asdict(self.preset)))}

    def check(self):
        """ValueError for what would fail later, before anything is written."""
        args, settings_file, tae_file = self.args, self.out / "settings.json", self.out / "tae.pt"
        if self.manifest.exists():
            read_json(self.manifest, "clips", "shards")
        if self.manifest.exists() and not tae_file.exists():
            raise ValueError(f"{self.out}: its latents are there without tae.pt, which made them: "
                             "delete latents/ and the checkpoints that came after it")
        if self.stages[0] not in ("tae", "raft") and not (args.init or tae_file.exists()):
            raise ValueError(f"{self.out}: has no tae yet, run --stage tae first")
        for stage in self.stages:
            if stage != "encode":
                self.hyperparameters(stage)
        if settings_file.is_file() and any(self.out.glob("*/*")):
            refuse_changes(self.out, read_json(settings_file), self.settings)
        if args.stage == "raft" and args.init:                  # raft's --init is RAFT's weights
            RAFT.load(args.init)
        elif args.init:
            preset, self.given_tae, self.given = read_model_file(args.init)
            if dataclasses.replace(preset, **self.choices) != self.preset:
                raise ValueError(f"--init {args.init}: of another size than the preset "
                                 f"{args.preset}")
            origin = read_tensors(tae_file, "tae")["origin"] if tae_file.exists() else None
            if origin not in (None, f"--init {args.init}"):     # latents always are of tae.pt
                raise ValueError(f"--init {args.init}: {self.out} has another TAE, take another "
                                 "--out")

    def create(self):
        """Makes the run's folder."""
        barrier()                               # all have checked it as it was
        for folder in ("previews", "latents", "checkpoints"):
            (self.out / folder).mkdir(parents=True, exist_ok=True)
        if rank() == 0:
            for torn in self.out.rglob(".*.[0-9]*.part*"):      # what killed processes left
                torn.unlink()
            write_text(self.out / "settings.json", json.dumps(self.settings, indent=1))
            if self.given and not (self.out / "tae.pt").exists():
                self.write_tae(self.given_tae, f"--init {self.args.init}")
        barrier()

    @functools.cached_property
    def dataset(self):
        """Read only when a stage needs it."""
        args = self.args
        if args.data:
            return Folder(args.data, self.preset, RAFT.load().to(self.device), self.out,
                          args.workers, args.prepare, self.device.type != "cpu")
        return Sprites(self.preset, args.clutter)

    def hyperparameters(self, stage):
        """(steps, learning rate, batch over all GPUs) of a stage that trains: the flags, else as
        begun, else DEFAULTS."""
        args, status = self.args, self.last(stage)[1]
        default = DEFAULTS[args.preset].get("jam" if stage == "control" else stage, RAFT_DEFAULTS)
        if begun := status or stage == "control" and self.last("jam")[1]:
            default = begun["of"], begun["lr"], begun["batch"]
        steps, lr, batch = (given or own for given, own in zip(
            (args.steps, args.lr, args.batch), default))
        parts = world_size() * args.accumulate
        # RAFT's pairs of 384 px are an eighth of the batch, and each part needs one
        unit = 8 * parts if stage == "raft" and parts > 1 else parts
        if steps > status.get("step", 0):
            check_batch(stage, batch, unit, "processes x --accumulate" + " x 8" * (unit > parts))
        return steps, lr, batch

    def write_tae(self, tae, origin):
        """Writes tae.pt. Origin: "step N" of stage tae, or "--init FILE"."""
        state = {name: tensor.cpu() for name, tensor in tae.state_dict().items()}
        write_tensors(self.out / "tae.pt", {"kind": "tae", "origin": origin, "state": state})

    def tae(self):
        """The run's TAE, without gradients."""
        path, tae = self.out / "tae.pt", TAE(self.preset.tae)
        try:
            tae.load_state_dict(read_tensors(path, "tae")["state"])
        except (LookupError, TypeError, RuntimeError):
            raise ValueError(f"{path}: not the TAE of preset {self.args.preset}") from None
        return tae.to(self.device).eval().requires_grad_(False)

    def complete(self, stage):
        """Folders of a stage's checkpoints, by step; none that a killed process was writing."""
        return [path for path in sorted((self.out / "checkpoints").glob(f"{stage}-*"))
                if (path / "status.json").is_file() and (path / ".metadata").is_file()]

    def last(self, stage):
        """Folder and status of a stage's last complete checkpoint; or None and {}."""
        if not (paths := self.complete(stage)):
            return None, {}
        return paths[-1], read_json(paths[-1] / "status.json", "step", "of", "lr", "batch")

    def finished(self, stage):
        """Folder and step of a finished stage's checkpoint. ValueError if it is not finished."""
        path, status = self.last(stage)
        if path is None or status["step"] < status["of"]:
            done = f"{status.get('step', 0)} of {status.get('of', 'all')} steps"
            raise ValueError(f"{self.out}: has {done} of {stage}, run --stage {stage} first")
        return path, status["step"]

    def save(self, stage, step, state, **status):
        """Writes a checkpoint of tensors, sharded or not, and its status. Two are kept."""
        path = self.out / "checkpoints" / f"{stage}-{step:09d}"
        if rank() == 0:
            shutil.rmtree(path, ignore_errors=True)             # what a killed process left there
        barrier()
        try:
            dcp.save(state, checkpoint_id=path)
            if rank() == 0:
                write_text(path / "status.json", json.dumps({"step": step, **status}))
        except (OSError, ValueError, RuntimeError, dcp.CheckpointException) as error:
            shutil.rmtree(path, ignore_errors=True)
            raise ValueError(f"cannot write {path}: {one_line(cause_of(error))}; the checkpoint of "
                             f"step {self.last(stage)[1].get('step', 0)} is whole") from None
        barrier()                               # until its status is there
        if rank() == 0:
            for old in {*path.parent.glob(f"{stage}-*")} - {*self.complete(stage)[-2:]}:
                (old / "status.json").unlink(missing_ok=True)       # first: it is not complete now
                shutil.rmtree(old, ignore_errors=True)

    def load_ema(self, path, module):
        """Fills a whole module, on this process alone, with a checkpoint's averaged weights."""
        load_checkpoint({"ema": dict(module.named_parameters())}, path, alone=True)
        return module.requires_grad_(False)

    def load_dit(self, path, stage, dtype=torch.float32):
        """A stage's DiT with a checkpoint's averaged weights, on this process's CPU."""
        with torch.device("meta"):
            dit = DiT(dataclasses.replace(self.preset.dit, motion=stage == "jam"))
        return self.load_ema(path, dit.to(dtype).to_empty(device="cpu"))

    def write_raft(self):
        """Writes raft.pt, from the last checkpoint of stage raft."""
        if rank() == 0:
            raft = self.load_ema(self.last("raft")[0], RAFT())
            write_tensors(self.out / "raft.pt", {name: weight.half()
                                                 for name, weight in raft.state_dict().items()})
        barrier()

    def log(self, **row):
        """Appends a row to metrics.jsonl. After a kill steps come again: their last row counts."""
        if rank() == 0:
            with open(self.out / "metrics.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")

    def export(self):
        """Writes model.pt: the TAE and every DiT that is finished. A control that did not train
        like jam (steps, batch, data, ...) is left out: nothing could be concluded from it. While a
        stage whose DiT is in model.pt is made longer, the file stays as it is: it has no other."""
        path = self.out / "model.pt"
        last = {stage: self.last(stage) for stage in ("jam", "base", "control")}
        begun = {stage: f"{stage} is at step {status['step']} of {status['of']}"
                 for stage, (_, status) in last.items() if status and status["step"] < status["of"]}
        held = begun.keys() & read_model_file(path)[2] if begun and path.exists() else ()
        if held:
            print0(f"{path} stays as it is: {', '.join(begun[stage] for stage in sorted(held))}")
        elif rank() == 0:
            dits = {stage: self.load_dit(folder, stage, torch.float16)
                    for stage, (folder, status) in last.items()
                    if folder and status["step"] == status["of"]}
            if "base" in self.given:
                dits.setdefault("base", self.given["base"])
            jam, control = ({**last[stage][1], "motion_dropout": None}
                            for stage in ("jam", "control"))
            if {"jam", "control"} <= dits.keys() and jam != control:
                print0(f"control is left out of model.pt: it has {control}, jam {jam}")
                del dits["control"]
            write_model_file(path, self.preset, self.tae(), dits)
            print0(shlex.join(["python", "sample.py", "--run", str(self.out), "--which",
                               next(iter(dits)), self.dataset.example]))
        barrier()

# ---------------------------------------------------------------- on one GPU or many

def distribute(model, run):
    """The model on the device; under torchrun in shards (FSDP2), gathered layer by layer in the
    compute precision. What is on "meta" is allocated layer by layer too: one is whole at a time."""
    args, layers = run.args, []
    set_activation_checkpointing(model, args.activation_checkpointing)
    if isinstance(model, DiT):
        layers = [*model.text.layers, *model.blocks]
        if args.compile:
            compile_layers(model)
    elif isinstance(model, TAE):
        layers = [model.encoder, model.decoder]
    if dist.is_initialized():                   # inputs are not cast, because t must stay fp32
        mesh = dist.init_device_mesh(run.device.type, (world_size(),))
        policy = fsdp.MixedPrecisionPolicy(args.precision, torch.float32, cast_forward_inputs=False)
    torch.manual_seed(args.seed)
    for layer in (*layers, model):
        empty = [part for part in layer.modules()
                 if any(p.is_meta for p in part.parameters(recurse=False))]
        for part in empty:
            part.to_empty(device=run.device, recurse=False)
        initialize(empty)
        layer.to(run.device)
        if dist.is_initialized():
            fsdp.fully_shard(layer, mesh=mesh, mp_policy=policy)
    return model

def placed_like(whole, weight):
    """A whole tensor on the weight's device and in its dtype; in shards where the weight is."""
    whole = whole.to(weight.device, weight.dtype)
    if isinstance(weight, DTensor):
        return distribute_tensor(whole, weight.device_mesh, weight.placements)
    return whole

@torch.no_grad()
def load_weights(weights, source):
    """Fills {name: weight}, whole or sharded, from {name: whole tensor} or a checkpoint's path."""
    if not isinstance(source, dict):
        return load_checkpoint({"ema": weights}, source)
    for name, weight in weights.items():
        weight.copy_(placed_like(source[name], weight))

# ---------------------------------------------------------------- one loop for every stage

@contextlib.contextmanager
def stop_signals():
    """Yields a list that fills when Ctrl-C, or a cluster's SIGTERM, asks to stop after the step. A
    second signal after 5 s aborts at once (torchrun sends duplicates before)."""
    received = []

    def on_signal(*_):
        if received and time.time() - received[0] > 5:
            raise KeyboardInterrupt
        received.append(time.time())

    with contextlib.ExitStack() as restore:
        for number in (signal.SIGINT, signal.SIGTERM):
            restore.callback(signal.signal, number, signal.signal(number, on_signal))
        yield received

def summarize(rows):
    """Rows {"t": (n,), name: (n,)} of all processes -> means, also by bin of t; NaN is left out."""
    def mean(values):
        values = values[~np.isnan(values)]
        return round(float(values.mean()), 6) if len(values) else None

    rows = [{name: values.float().cpu().numpy() for name, values in row.items()} for row in rows]
    if dist.is_initialized():
        gathered = [None] * world_size()
        dist.all_gather_object(gathered, rows)
        rows = sum(gathered, [])
    columns = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    t, summary = columns.pop("t", None), {}
    for name, values in columns.items():
        summary[name] = mean(values)
        if t is not None:
            bins = [(t * T_BINS).astype(int).clip(0, T_BINS - 1) == b for b in range(T_BINS)]
            summary[name.replace("loss", "bins")] = [mean(values[inside]) for inside in bins]
    return summary

def show_preview(run, stage, step):
    """A preview of the last checkpoint, on rank 0. Its failure does not end the run."""
    if rank() == 0:
        try:
            stage.preview(run.last(stage.name)[0], step)
        except (ValueError, OSError, RuntimeError, MemoryError) as error:
            print0(f"{stage.name}: no preview of step {step}: {one_line(error)}")
    barrier()

class Trainer:
    """A stage's weights, their exponential moving average (EMA) and optimizers, from the last
    checkpoint on. A stage has

        name, model
        settings                {name: value}: must be the same when the stage is resumed
        notes                   {name: value}: written down beside them
        lr_scale                {weight: factors}: how much further than others its entries go
        make_optimizers         (model, lr) -> a list; if it has none, common's
        decay                   the share of steps over which the learning rate falls
        load(step, places)      the data of some places in the batch, a list; called in threads
        losses(data)            pairs of a scalar, whose sum is the loss, and {name: (n,)} to report
        preview(checkpoint, step)"""
    def __init__(self, run, stage):
        self.stage, self.model, self.accumulate = stage, stage.model.train(), run.args.accumulate
        self.steps, self.lr, self.batch = run.hyperparameters(stage.name)
        make = getattr(stage, "make_optimizers", make_optimizers)
        self.optimizers, self.lr_scale = make(self.model, self.lr), stage.lr_scale or {}
        self.weights = dict(self.model.named_parameters())
        self.ema = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self.settings, self.bad_steps = {"lr": self.lr, "batch": self.batch, **stage.settings}, 0
        checkpoint, status = run.last(stage.name)
        self.step = status.get("step", 0)
        if checkpoint:
            refuse_changes(checkpoint, status, self.settings)
            state = self.state()
            load_checkpoint(state, checkpoint)
            dcp_state.set_optimizer_state_dict(self.model, self.optimizers, state["optimizer"])

    def state(self):
        return {"model": self.weights, "ema": self.ema,
                "optimizer": dcp_state.get_optimizer_state_dict(self.model, self.optimizers)}

    def update(self, data):
        """One step: gradients in --accumulate parts, clipped; optimizers; EMA. Returns what the
        losses report. A step whose gradient is not finite changes nothing and returns [].
        ValueError: MAX_BAD_STEPS such steps in a row."""
        self.rate = self.lr * min(
            1, (self.step + 1) / min(WARMUP_STEPS, self.steps / 10 + 1),        # at first it rises
            (self.steps - self.step) / (self.stage.decay * self.steps))         # and at last falls
        reports, n = [], math.ceil(len(data[0]) / self.accumulate)
        for start in range(0, len(data[0]), n):
            for loss, report in self.stage.losses([part[start:start + n] for part in data]):
                (loss / self.accumulate).backward()
                reports.append({name: values.detach() for name, values in report.items()})
        norm = torch.nn.utils.clip_grad_norm_(self.weights.values(), MAX_NORM)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm    # one for all ranks
        self.step += 1
        self.bad_steps = 0 if norm.isfinite() else self.bad_steps + 1
        if self.bad_steps == MAX_BAD_STEPS:
            raise ValueError(f"{self.stage.name}: {MAX_BAD_STEPS} steps in a row are not finite, "
                             f"up to step {self.step}: take a smaller --lr, or try --no-compile")
        if self.bad_steps:
            print0(f"{self.stage.name}: step {self.step} is not finite and is skipped")
        else:
            self.step_weights()
        self.model.zero_grad()
        return [] if self.bad_steps else reports

    @torch.no_grad()
    def step_weights(self):
        """The optimizers' step, prolonged where lr_scale says so, and the EMA's."""
        before = {weight: weight.clone() for weight in self.lr_scale}
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["lr"] = self.rate
            optimizer.step()
        for weight, factors in self.lr_scale.items():
            weight.add_((factors - 1) * (weight - before[weight]))
        decay = min(EMA_DECAY, (1 + self.step) / (10 + self.step))      # so short runs forget more
        get_ema_multi_avg_fn(decay)(list(self.ema.values()), list(self.weights.values()), None)

def train_loop(run, stage):
    """Trains a stage to its number of steps, from its last checkpoint on."""
    args, name, trainer = run.args, stage.name, Trainer(run, stage)
    first, steps, batch = trainer.step, trainer.steps, trainer.batch
    if first >= steps:
        return print0(f"{name}: {run.finished(name)[1]} steps are done already")
    size = sum(weight.numel() for weight in trainer.weights.values()) / 1e6
    print0(f"{name}: {steps} steps, lr {trainer.lr:g}, batch {batch} on {world_size()} {run.device}"
           f", {str(args.precision)[6:]}, {size:.2f} M parameters, {stage.settings or ''}")
    places = range(rank() * batch // world_size(), (rank() + 1) * batch // world_size())
    ahead = Prefetcher(lambda step: stage.load(step, places), range(first, steps), args.workers)
    log_every, preview_every = max(1, min(50, steps // 10)), max(1, steps // 5)
    reports, began, next_save = [], time.time(), time.time() + CHECKPOINT_SECONDS
    with contextlib.closing(iter(ahead)) as batches, stop_signals() as stop, \
            tqdm(total=steps, initial=first, desc=name, smoothing=.05, disable=rank() > 0) as bar:
        for data in batches:
            reports += trainer.update(data)
            step = trainer.step
            bar.update()
            show = step == steps or step % preview_every == 0
            stopping, late = any_rank(run.device, bool(stop), time.time() > next_save)
            if reports and (step % log_every == 0 or show or stopping):
                summary, reports = summarize(reports), []
                run.log(stage=name, step=step, lr=trainer.rate, **summary)
                bar.set_postfix({key: value for key, value in summary.items() if "bins" not in key},
                                waits=f"{ahead.waited / (time.time() - began):.0%}")
            # a late one waits until the losses are logged, so that a run that resumes loses none
            if show or stopping or late and not reports:
                start = time.time()
                run.save(name, step, trainer.state(), of=steps, **trainer.settings, **stage.notes)
                next_save = time.time() + max(CHECKPOINT_SECONDS, 20 * (time.time() - start))
            if show:
                show_preview(run, stage, step)
            if stopping:
                break
        if any_rank(run.device, bool(stop))[0]:         # also if it came during the last preview
            raise ValueError(f"stopped at step {step} of {name}: the same command goes on")

# ---------------------------------------------------------------- stage tae (App. C)

class TAEStage:
    """The auto-encoder, of videos and their RGB flow alike."""
    name, decay, lr_scale, settings, notes = "tae", .3, None, {}, {}

    def __init__(self, run):
        self.run, self.dataset = run, run.dataset       # opened here, not in a loading thread
        self.batch, self.seed = run.hyperparameters("tae")[2], run.args.seed
        torch.manual_seed(self.seed)
        self.model = distribute(TAE(run.preset.tae), run)

    def load(self, step, places):
        read = self.dataset.training([step * self.batch + place for place in places])
        C, *positions = self.run.preset.latent_shape()
        noise = [torch.randn(2, *positions, C, generator=rng(self.seed, "tae", step, place))
                 for place in places]
        return *read[:3], torch.stack(noise)

    def video_and_motion(self, read):
        """Clips that the dataset has read, and their RGB flow, on the device."""
        video, _, extra, *_ = read
        video = video.to(self.run.device)
        return video, self.dataset.motion(video, extra)

    def losses(self, data):
        for i, clips in enumerate(self.video_and_motion(data)):
            with self.run.autocast():
                loss = tae_loss(self.model, clips, data[-1][:, i].to(clips.device))
            yield loss / 2, {"loss": loss[None]}

    def preview(self, checkpoint, step):
        """Clips above their reconstructions, and the PSNR of both kinds, on held-out clips."""
        run, rows, psnr = self.run, [], {}
        tae = run.load_ema(checkpoint, TAE(run.preset.tae)).to(run.device)
        held_out = self.video_and_motion(self.dataset.held_out(8))
        for kind, clips in zip(("video", "motion"), held_out):
            with run.autocast():
                coded = [tae.decode(tae.encode(clip[None]), frames=len(clip)) for clip in clips]
            rows += [clips, torch.cat(coded)]
            error = (clips - rows[-1]).square().mean((1, 2, 3, 4))
            psnr[f"psnr_{kind}"] = round(-10 * error.log10().mean().item(), 2)
        run.log(stage="tae", step=step, **psnr)
        print0(f"tae: step {step}, held-out PSNR in dB: {psnr}")
        write_video(run.out / f"previews/tae-{step:06d}.mp4", grid(*rows), run.preset.fps)

    def first_clips(self, motion):
        """The training's first clips or their motion, as many at once as fit in training."""
        few = max(1, self.batch // world_size() // self.run.args.accumulate)
        for indices in torch.arange(WHITENING_CLIPS).split(few):
            yield self.video_and_motion(self.dataset.training(indices.tolist()))[motion]

def train_tae(run):
    """Stage tae: trains, then fits the whitening of its latents and writes tae.pt."""
    path, (steps, _, _), done = run.out / "tae.pt", run.hyperparameters("tae"), run.last("tae")[1]
    origin = read_tensors(path, "tae")["origin"] if path.exists() else ""
    if origin and (not done or origin.startswith("--init")):
        return print0(f"tae: it is there already, from {origin}")
    if run.manifest.exists() and steps > done.get("step", 0):
        raise ValueError(f"{run.out}: its latents are of the TAE as it is, which {steps} steps "
                         "would change: name another --stage, or take another --out")
    stage = TAEStage(run)
    train_loop(run, stage)
    checkpoint, step = run.finished("tae")
    if rank() == 0 and origin != f"step {step}":
        tae = run.load_ema(checkpoint, TAE(run.preset.tae)).to(run.device)
        set_activation_checkpointing(tae, run.args.activation_checkpointing)
        with run.autocast():
            for motion in (False, True):
                tae.fit_whitening(stage.first_clips(motion), motion,
                                  rng(run.args.seed, "basis", motion))
        run.write_tae(tae, f"step {step}")
    barrier()

# ---------------------------------------------------------------- stage encode

def read_manifest(run, clips=None):
    """{"clips": how many, "shards": keys of each}, and the keys of that many clips that are in no
    shard. clips: so many (of a folder of each video), by default as before, at first DEFAULTS'."""
    manifest = {"clips": DEFAULTS[run.args.preset]["encode"][0], "shards": []}
    if run.manifest.exists():
        manifest = read_json(run.manifest, "clips", "shards")
    manifest["clips"] = clips or manifest["clips"]
    known = {json.dumps(key) for shard in manifest["shards"] for key in shard}
    keys = run.dataset.keys(manifest["clips"])
    return manifest, [key for key in keys if json.dumps(key) not in known]

def encode_shard(run, tae, path, batches):
    """Writes path.x.npy, path.d.npy, path.json of one shard, from (shard, keys, what was read)."""
    x, d = ([np.zeros((0, *run.preset.latent_shape()), np.float16)] for _ in range(2))
    content = {"keys": [], "captions": [], "skipped": {}}
    for _, keys, (video, captions, extra, skipped) in batches:
        if len(video):
            video = video.to(run.device)
            motion = run.dataset.motion(video, extra)
            with torch.no_grad(), run.autocast():
                x.append(tae.encode(video).half().cpu().numpy())
                d.append(tae.encode(motion, motion=True).half().cpu().numpy())
        content["skipped"] |= {name: reason for (name, *_), reason in skipped.items()}
        content["captions"] += captions
        content["keys"] += [key for key in keys if not skipped or tuple(key) not in skipped]
    for kind, latents in (("x", x), ("d", d)):
        write_file(f"{path}.{kind}.npy",
                   lambda temporary: np.save(temporary, np.concatenate(latents)))
    write_text(f"{path}.json", json.dumps(content))             # last: with it the shard is whole

def encode(run, clips=None):
    """Stage encode: latents of clips and of their RGB flow, in shards, every rank its part."""
    folder, dataset, tae = run.out / "latents", run.dataset, run.tae()
    batch = DEFAULTS[run.args.preset]["encode"][1]
    if run.args.stage == "encode":              # else --batch is of the other stages
        batch = run.args.batch or batch
    if rank() == 0:                             # new clips come in new shards
        manifest, new = read_manifest(run, clips)
        manifest["shards"] += [new[i:i + SHARD] for i in range(0, len(new), SHARD)]
        write_text(run.manifest, json.dumps(manifest))
    barrier()
    shards = read_json(run.manifest, "shards")["shards"]
    missing = [s for s in range(len(shards)) if not (folder / f"{s:06d}.json").exists()]
    barrier()                                   # all have looked before any shard is made
    print0(f"encode: {sum(map(len, shards))} clips in {len(shards)} shards, {len(missing)} to do")
    parts = [(s, shards[s][i:i + batch]) for s in missing[rank()::world_size()]
             for i in range(0, len(shards[s]), batch)]
    read = Prefetcher(lambda part: (*part, dataset.read(part[1])), parts, run.args.workers)
    with tqdm(read, "encode", len(parts), unit="batch", disable=rank() > 0) as batches:
        for s, of_shard in itertools.groupby(batches, lambda part: part[0]):
            encode_shard(run, tae, folder / f"{s:06d}", of_shard)
    barrier()
    latents = Latents(folder, dataset)
    print_skipped(latents.skipped)
    print0(f"encode: {len(latents.captions)} of {sum(map(len, shards))} clips are there")
    if not latents.captions:
        raise ValueError(f"{folder}: no clip could be encoded")

# ---------------------------------------------------------------- stages base, jam and control

def motion_lr_scale(model, C):
    """Factors on the learning rate of W_in and W_out: MOTION_LR_SCALE for what add_motion added.
    Muon's steps have one size, so zero rows would stay small for long. (Not in the paper.)"""
    return {weight: placed_like(torch.where(
                new_entries(weight, axis, C, channel_last=True), MOTION_LR_SCALE, 1.), weight)
            for weight, axis in ((model.W_in.weight, 1), (model.W_out.weight, 0))}

class DiTStage:
    """base, jam and control: the same data, for the last two the same noise; jam has d beside x."""
    decay, shown = .3, 8                        # captions in a preview

    def __init__(self, run, name):
        self.run, self.name, args = run, name, run.args
        self.latents, self.max_bytes = finished_latents(run), run.preset.dit.max_bytes
        captions = set(self.latents.captions)
        if long := sum(len(caption.encode()) > self.max_bytes for caption in captions):
            print0(f"{name}: {long} captions of more than {self.max_bytes} bytes are cut")
        # all steps have texts of one length, so that nothing is compiled again in the middle
        self.text_length = max(len(token_row(caption, self.max_bytes)) for caption in captions)
        # key of the random numbers: jam and control share it, and so see the same clips and noise
        self.stream = "base" if name == "base" else "fine-tuning"
        self.batch = run.hyperparameters(name)[2]
        source, origin = self.starting_point()
        self.settings = {"origin": origin, "uniform_t": args.uniform_t, "t_shift": args.t_shift,
                         "motion_dropout": args.motion_dropout if name == "jam" else None}
        self.notes = {"clips": len(self.latents.captions)}
        self.model, self.lr_scale = self.build(source)

    def starting_point(self):
        """Weights to begin from, {name: tensor} or a checkpoint, and what they are called."""
        given, init = self.run.given, f"--init {self.run.args.init}"
        if self.name in given:
            return given[self.name].state_dict(), f"its own of {init}"
        if "base" in given and self.run.last("base")[0] is None:
            return given["base"].state_dict(), f"base of {init}"
        if self.name == "base":
            return None, None
        checkpoint, step = self.run.finished("base")
        return checkpoint, f"base at step {step}"

    def build(self, source):
        """The DiT with its starting weights, sharded, and the Trainer's lr_scale."""
        run, jam, ready = self.run, self.name == "jam", {}
        widens = jam and "jam" not in run.given                 # Sec. 4.2: from a base
        with torch.device("meta"):
            model = DiT(dataclasses.replace(run.preset.dit, motion=jam and not widens))
        if widens:                              # of the whole model only these are on the CPU
            ready = {f"{name}.weight": getattr(model, name).to_empty(device="cpu").weight
                     for name in ("W_in", "W_out")}
            load_weights(ready, source)
            model.add_motion()
        model = distribute(model, run)
        if source is not None:
            load_weights({name: weight for name, weight in model.named_parameters()
                          if name not in ready}, source)
        return model, motion_lr_scale(model, run.preset.dit.channels) if widens else None

    def load(self, step, places):
        args, key = self.run.args, (self.run.args.seed, self.stream, step)
        indices = torch.randint(len(self.latents.captions), (self.batch,), generator=rng(*key))
        x1, d1, y = self.latents.batch(indices[places.start:places.stop].tolist(), self.max_bytes)
        y = F.pad(y, (0, self.text_length - y.shape[1]), value=PAD)
        # sampled here, in a thread: a GPU would wait for it
        noise = [sample_noise(x1[:1].shape, rng(*key, place), args.uniform_t, args.t_shift,
                              motion_dropout=args.motion_dropout) for place in places]
        return x1, d1, y, *map(torch.cat, zip(*noise))

    def losses(self, data):
        x1, d1, y, *noise = (part.to(self.run.device) for part in data)
        noise, C = Noise(*noise), x1.shape[1]
        with self.run.autocast():
            if self.name == "jam":
                mse = joint_loss(self.model, x1, d1, y, noise=noise, reduction="channels")
            else:
                mse = flow_matching_loss(self.model, x1, y, noise=noise, reduction="channels")
        report = {"t": noise.t, "loss_x": mse[:, :C].mean(1)}
        if self.name == "jam":
            # apart: where d is dropped, its noise d0 cannot be known, and adds its variance of 1
            loss_d = mse[:, C:].mean(1)
            report["loss_d"] = loss_d.masked_fill(noise.no_motion, math.nan)
            report["loss_d_dropped"] = loss_d.masked_fill(~noise.no_motion, math.nan)
        yield mse.mean(), report

    def preview(self, checkpoint, step):
        """Samples for some captions, and the motion that jam predicts for them."""
        run = self.run
        dtype = torch.bfloat16 if run.device.type == "cuda" else torch.float32
        dit = run.load_dit(checkpoint, self.name, dtype).to(run.device)
        model = VideoJAM(run.preset, run.tae(), dit)
        each = 1 if run.args.activation_checkpointing else 8    # large clips one by one
        captions = run.dataset.held_out(self.shown)[1]
        shown = model.generate(captions, steps=30, batch=each)
        write_video(run.out / f"previews/{self.name}-{step:06d}.mp4",
                    grid(*(part for part in shown if part is not None)), run.preset.fps)

def finished_latents(run):
    """The run's latents. ValueError if there are none, or not all yet."""
    latents, (manifest, new) = Latents(run.out / "latents", run.dataset), read_manifest(run)
    shards = manifest["shards"]
    if len(latents.shards) < len(shards) or not latents.captions:
        raise ValueError(f"{run.out}: encode has done {len(latents.shards)} of "
                         f"{len(shards) or 'all'} shards of latents, run --stage encode first")
    if latents.changed or new:
        print0(f"since encode the captions of {latents.changed} clips have changed, or videos "
               f"are gone; {len(new)} clips are new, --stage encode takes them in")
    return latents

# ---------------------------------------------------------------- stage raft

class RAFTStage:
    """RAFT on pairs of frames with exact flow; its weights are in the run's raft.pt."""
    name, decay, lr_scale, notes, iters = "raft", .95, None, {}, 8

    def __init__(self, run):
        self.run, args = run, run.args
        torch.manual_seed(args.seed)
        raft = RAFT.load(args.init).requires_grad_(True) if args.init else RAFT()
        self.model = distribute(raft, run)
        if dist.is_initialized():
            fsdp.register_fsdp_forward_method(self.model, "flows")
        else:                                   # FSDP2 takes contiguous weights alone
            self.model.to(memory_format=torch.channels_last)
        self.settings = {"weights": args.init}
        self.batch = run.hyperparameters("raft")[2]

    def load(self, step, places):
        """This process's share of the step's pairs; there are fewer where frames are large."""
        number = (self.run.args.seed * 100_000 + step) % 10 ** 7        # beyond are held-out ones
        pairs = training_pairs(number, self.batch)
        share = [len(pairs[0]) * place // self.batch for place in (places.start, places.stop)]
        return [part[slice(*share)] for part in pairs]

    def losses(self, data):
        frame1, frame2, truth = (part.to(self.run.device) for part in data)
        with self.run.autocast():
            flows = self.model.flows(torch.cat([frame1, frame2]) * 2 - 1, self.iters)
        # all iterations count, later ones more
        loss = sum(.8 ** (self.iters - 1 - i) * ((upsample(flow) - truth).square().sum(1) + 1e-4)
                   .sqrt().mean() for i, flow in enumerate(flows))
        yield loss, {"loss": loss[None]}

    def preview(self, checkpoint, step):
        """Writes a picture: frame, next frame, true flow, estimate. Logs its errors."""
        run, errors, rows = self.run, {}, []
        raft = run.load_ema(checkpoint, RAFT()).eval().to(run.device)
        first, second, flow = flow_scenes(4, 128, HELD_OUT)
        clips = {"sprites": sprite_clips(range(HELD_OUT, HELD_OUT + 4))[:2],
                 "scenes": (torch.stack([first, second], 1), flow.unsqueeze(1))}
        for kind, (video, truth) in clips.items():
            flow = estimate_flow(raft, video).cpu()[:, :truth.shape[1]]     # a scene has one
            moving, k = truth.norm(dim=2) > .05, video.shape[1] // 2 - 1
            errors[f"error_{kind}"] = (flow - truth).norm(dim=2)[moving].median().item()
            row = [video[:, k], video[:, k + 1], flow_to_rgb(truth[:, k]), flow_to_rgb(flow[:, k])]
            rows += F.interpolate(torch.cat(row, -1), (128, 4 * 128)).unbind()
        run.log(stage="raft", step=step, **errors)
        print0(f"raft: step {step}, median error of what moves, px: {errors}")
        picture = (torch.cat(rows, 1) * 255).byte().permute(1, 2, 0).numpy()
        write_file(run.out / f"previews/raft-{step:06d}.png",
                   lambda temporary: iio.imwrite(temporary, picture))

# ---------------------------------------------------------------- how long a run takes

def activation_bytes(preset, checkpointing=False):
    """Bytes a clip that a training step keeps for its backward pass: 220 (measured, in bf16) for
    each channel of each token in each block; with checkpointing 2, and 220 in the one block that is
    computed again."""
    _, T, H, W = preset.latent_shape()
    channels = T * H * W // preset.dit.patch ** 2 * preset.dit.width
    return channels * (2 * preset.dit.depth + 220 if checkpointing else 220 * preset.dit.depth)

def step_flops(preset):
    """{stage: FLOPs of a clip in a step}: backwards is twice forwards, the TAE sees motion too.
    (encode is not in it: how many clips it has left depends on the videos.)"""
    def forward(function, *inputs):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            function(*inputs)
        return counter.get_total_flops()

    C, T, H, W = preset.latent_shape()
    with torch.device("meta"):                  # there nothing is computed
        tae, dit = TAE(preset.tae), DiT(preset.dit).add_motion()
        encode = forward(tae.posterior, torch.zeros(1, preset.frames, 3, preset.size, preset.size))
        decode = forward(tae.pixels, torch.zeros(1, T, H, W, C))
        text = tokenize(["x" * 100]).to("meta")
        step = 3 * forward(dit, torch.zeros(1, 2 * C, T, H, W), torch.zeros(1), text)
    return {"tae": 6 * (encode + decode), "base": step, "jam": step, "control": step}

def print_expected_time(run):
    """Prints a rough estimate for what is left of all stages, at half the measured speed of a large
    matrix product. Encode, RAFT and reading videos are not counted."""
    side, flops, total, each = 1024, step_flops(run.preset), 0, 0
    square = torch.randn(side, side, device=run.device, dtype=run.args.precision)
    product = Timer("a @ a", globals={"a": square}, num_threads=torch.get_num_threads())
    rate = .5 * world_size() * 2 * side ** 3 / product.blocked_autorange().median
    for stage in flops.keys() & {*run.stages}:
        steps, _, batch = run.hyperparameters(stage)
        seconds = flops[stage] / rate * batch
        total += seconds * max(0, steps - run.last(stage)[1].get("step", 0))
        each += seconds
    look = f"; a look in ten: --steps {max(1, int(600 / each))} --out runs/look"
    print0(f"about {max(1, total / 60):.0f} minutes on this machine" + look * (total > 900))

def dry_run(args):
    """Prints what stage jam of the preset would take."""
    preset, gpus, checkpointing = PRESETS[args.preset], args.gpus, args.activation_checkpointing
    with torch.device("meta"):
        P = sum(weight.numel() for weight in DiT(preset.dit).add_motion().parameters())
    steps, _, batch = DEFAULTS[args.preset]["jam"]
    steps, batch = args.steps or steps, args.batch or batch
    check_batch("jam", batch, gpus * args.accumulate, "GPUs x --accumulate")
    clips = batch // gpus // args.accumulate
    flops = step_flops(preset)["jam"] * (4 / 3 if checkpointing else 1)     # forwards once more
    print(f"{args.preset} on {gpus} GPUs of {args.tflops:g} TFLOP/s: {steps} steps of jam, {batch} "
          f"clips each, activation checkpointing {'on' if checkpointing else 'off'}")
    for name, value in {
            "parameters of the DiT, billions": P / 1e9, "TFLOPs a clip": flops / 1e12,
            # fp32, 4 bytes each; of the few weights that are AdamW's there is a second moment
            "GB a GPU: weights, gradients, EMA, Muon's moment": 16e-9 * P / gpus,
            f"GB a GPU: activations of {clips} clips":
                1e-9 * clips * activation_bytes(preset, checkpointing),
            "hours": steps * batch * flops / (args.tflops * 1e12 * 3600 * gpus)}.items():
        print(f"  {name:<50}{value:,.3f}")
    print("not counted: waiting, layers while they are gathered, the framework's own GB or two")

# ---------------------------------------------------------------- command line

def parse():
    parser = Parser(__doc__)
    flag, switch = parser.add_argument, argparse.BooleanOptionalAction
    flag("--preset", default="toy", choices=list(PRESETS), help="sizes of the models")
    flag("--data", type=nonempty, help="folder of videos; default: the sprite world")
    flag("--out", type=nonempty, help="the run's folder; default: runs/PRESET, DATA's name or raft")
    flag("--stage", choices=(*STAGES, "raft"), help="this one alone; default: all but raft")
    flag("--init", type=nonempty, metavar="FILE", help="a model.pt whose TAE is taken and whose "
         "models the stages start from; for raft, RAFT's weights")
    flag("--steps", type=positive_int, help="of each stage (encode: clips; with --data, per video)")
    flag("--lr", type=positive, help="learning rate of each stage")
    flag("--batch", type=positive_int, help="clips a step, on all GPUs; --stage encode: on each")
    flag("--accumulate", type=positive_int, default=1, help="parts in which a batch is computed")
    flag("--clutter", type=fraction, default=0., help="sprite world: share of textured backgrounds "
         "and of scenes with several sprites, besides collisions (default 0; the shipped toy: 0.2)")
    flag("--appearance", type=fraction,
         help=f"sprite world: loudness of the field behind sprites (default {APPEARANCE})")
    flag("--target", default="flow", choices=TARGETS,
         help="sprite world: what is predicted with the video; all but flow are controls")
    flag("--uniform-t", action=switch, help="t: uniform (the toy's default) or logit-normal")
    flag("--t-shift", type=positive, help="above 1: more t near noise (default: the toy 3, else 1)")
    flag("--motion-dropout", type=fraction, default=.2, help="jam: share of samples without motion")
    flag("--sigma", type=positive, default=.15, help="of Eq. 5")
    flag("--seed", type=seed, default=0)
    flag("--prepare", type=positive_int, metavar="FRAMES", help="own videos: flow of so many "
         "frames is estimated first (default: 2400 on a CPU, which uses no others; 20000 on a GPU)")
    flag("--workers", type=positive_int, default=4, help="threads that load data")
    flag("--device", help="default: a GPU if there is one")
    flag("--precision", choices=("bf16", "fp32"), help="default: bf16 where that is fast")
    flag("--compile", action=switch, help="default: where there is a C++ compiler")
    flag("--activation-checkpointing", action=switch, help="default: for 4b and 30b")
    flag("--dry-run", action="store_true", help="print what stage jam would take")
    flag("--gpus", type=positive_int, default=1, help="dry run: how many")
    flag("--tflops", type=positive, default=400, help="dry run: sustained by a GPU")
    args = parser.parse_args()
    args.data = args.data and str(Path(args.data).resolve())
    if args.data and not Path(args.data).is_dir():
        raise ValueError(f"--data {args.data}: no such folder")
    raft, toy = args.stage == "raft", args.preset == "toy"
    # fewer than 3 have no sprite; the sprites of more than 256 would come to the held-out seeds
    if raft and not 3 <= (args.batch or 8) <= 256:
        raise ValueError("raft takes --batch from 3 to 256")
    if args.data and (args.appearance is not None or args.target != "flow" or args.clutter):
        raise ValueError("--appearance, --target and --clutter are of the sprite world: not with "
                         "--data")
    args.device = device_of(args.device)
    args.precision = {"bf16": torch.bfloat16, "fp32": torch.float32,
                      None: fast_dtype(args.device)}[args.precision]
    # in a plain world motion is decided before t = .1, where logit-normal has 1.4% of its samples
    defaults = {"uniform_t": toy, "t_shift": 3. if toy else 1., "compile": can_compile(args.device),
                "appearance": 0. if args.data else APPEARANCE,
                "prepare": 2_400 if args.device.type == "cpu" else 20_000,
                "out": f"runs/{'raft' if raft else Path(args.data or args.preset).name}",
                "activation_checkpointing": activation_bytes(PRESETS[args.preset]) > 2e10}
    given = {name: value for name, value in vars(args).items() if value is not None}
    return argparse.Namespace(**{**vars(args), **defaults, **given})

def main():
    args = parse()
    if args.dry_run:
        return dry_run(args)
    keep_freed_memory()
    join_processes(args.device)
    run = Run(args)
    run.check()
    run.create()
    if args.stage not in ("encode", "raft"):
        print_expected_time(run)
    for stage in run.stages:
        if stage == "tae":
            train_tae(run)
        elif stage == "encode":
            encode(run, args.steps)
        elif stage == "raft":
            train_loop(run, RAFTStage(run))
            run.write_raft()
        else:
            train_loop(run, DiTStage(run, stage))
            run.export()
    leave_processes()

if __name__ == "__main__":
    report_errors(main)

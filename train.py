"""Trains the TAE, the base DiT, its VideoJAM fine-tuning, and a control without motion.

    python train.py                             the sprite world, every stage
    python train.py --data FOLDER               own videos: `find_videos` says how to lay them out
    python train.py --stage jam --steps 5000    one stage, or the same stage for longer
    torchrun --nproc_per_node=8 train.py --preset 4b --data FOLDER      the same on many GPUs
    python train.py --preset 30b --world 256 --dry-run                  what that would take

Stages, in order: tae; encode (latents of videos and of their RGB flow); base (Eq. 3); jam (Eq. 6,
from the base); control (Eq. 3, from the base, for exactly jam's steps, data and learning rate).
A run is a folder: settings.json, videos.json, tae.pt, latents/, checkpoints/, previews/,
metrics.jsonl, and model.pt, which `python sample.py --run FOLDER` takes. All randomness of a sample
follows from (seed, stage, step, its place in the batch), so a run that was interrupted ends with
the same weights to the bit, and the number of GPUs changes nothing but the rounding. (Checkpoints
are torch.distributed.checkpoint's, whose index is a pickle: resume your own runs alone, and share
model.pt, from which nothing but data is read.)
"""
import argparse
import collections
import concurrent.futures
import contextlib
import csv
import dataclasses
import datetime
import functools
import itertools
import json
import math
import os
import shutil
import signal
import sys
import time
import uuid
import warnings
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from imageio_ffmpeg import count_frames_and_secs, read_frames
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from flow import (BAD_STEPS, HELD_OUT, RAFT, Parser, autocast, device_of, estimate_flow,
                  fast_dtype, flow_to_rgb, grid, one_line, optimizers, read_file, refuse_changes,
                  report_errors, sprite_clips, write_file, write_tensors, write_text, write_video)
from videojam import (FOLD, PAD, PRESETS, TAE, DiT, VideoJAM, corrupted, cut, initialize,
                      read_bundle, set_recompute, squared_errors, tae_loss, token_row, tokenize,
                      widen)

STAGES = ("tae", "encode", "base", "jam", "control")
# preset -> stage -> (steps, learning rate, batch over all GPUs). encode's "steps" are clips of the
# sprite world, or at most of each video, and its batch is a GPU's. The control has jam's row; the
# paper's fine-tuning is 50,000 x 32 (4b) and 35,000 x 256 (30b) at 5e-6
DEFAULTS = {
    "toy": {"tae": (800, 1e-3, 4), "encode": (6144, 0, 32), "base": (2200, 4.5e-3, 64),
            "jam": (700, 3e-3, 64)},            # (base's batch: its compiled code serves again)
    "small": {"tae": (50_000, 3e-4, 8), "encode": (64, 0, 8), "base": (200_000, 2e-4, 64),
              "jam": (20_000, 5e-5, 64)},
    "4b": {"tae": (300_000, 1e-4, 32), "encode": (4, 0, 1), "base": (500_000, 1e-4, 256),
           "jam": (50_000, 5e-6, 32)},
    "30b": {"tae": (300_000, 1e-4, 32), "encode": (4, 0, 1), "base": (500_000, 1e-4, 1024),
            "jam": (35_000, 5e-6, 256)},
}
VERSION = 10                            # of a run's folder: raised when old runs cannot go on
SHARD = 256                             # clips in a file of latents
CHUNK = 32                              # clips of a batch noised at once, though a process may need
                                        # fewer: calls for each of them hold up a GPU's launches
BASIS_CLIPS = 256                       # that the TAE's basis is fitted on
CHECKPOINT_SECONDS = 60                 # between two; or 20 times what one takes to write
T_BINS = 5                              # losses are reported apart for t in [0, .2), [.2, .4), ...


# ---------------------------------------------------------------- one process, or torchrun's

def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def ranks():
    return dist.get_world_size() if dist.is_initialized() else 1


def say(text):
    if rank() == 0:
        tqdm.write(text)


@functools.cache
def patient_group():
    """All processes, with hours of timeout: in it they wait while rank 0 looks through a folder or
    shows a preview, or for the one that encodes last. (Elsewhere a hung one is noticed sooner.)"""
    return dist.new_group(timeout=datetime.timedelta(hours=12))


def wait_for_all():
    if dist.is_initialized():
        dist.barrier(patient_group())


def agreed(device, *flags):
    """Which of the flags hold on any rank, so that all of them go the same way."""
    if ranks() == 1:
        return flags
    votes = torch.tensor(flags, dtype=torch.int32, device=device)
    dist.all_reduce(votes, dist.ReduceOp.MAX)
    return votes.bool().tolist()


# ---------------------------------------------------------------- data

SUFFIXES = {".mp4", ".mov", ".webm", ".avi", ".gif", ".mkv", ".m4v", ".mpg", ".mpeg"}
CAPTION_COLUMNS = ("text", "caption", "prompt")
# nobody need know that one process saves alone, or that nobody writes into the TAE's output
warnings.filterwarnings("ignore", "torch.distributed is disabled")
warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")


def find_videos(folder):
    """What a folder offers: the layout's name and [(file name, caption or None), ...], from either
    metadata.csv or metadata.jsonl (file_name and text, caption or prompt: Hugging Face's
    videofolder), prompts.txt and videos.txt (line by line: diffusers), or a .txt beside each video,
    in folders inside the folder too. Bytes that are not UTF-8 come as lone surrogates."""
    folder = Path(folder)
    # ("-sig": editors may begin a file with a mark; newline: Unicode's separators end no line)
    text = functools.partial(open, newline="", encoding="utf-8-sig", errors="surrogateescape")
    for path in (folder / "metadata.csv", folder / "metadata.jsonl"):
        if not path.is_file():
            continue
        rows = []
        try:
            with text(path) as file:
                for row in csv.DictReader(file, strict=True) if path.suffix == ".csv" else \
                        map(json.loads, filter(str.strip, file)):
                    if not isinstance(row, dict):
                        raise ValueError("must be an object, {...}")
                    if None in row:
                        raise ValueError('more fields than in the first line: "quote" captions '
                                         'with commas')
                    rows.append(row)
        except (csv.Error, ValueError) as error:
            raise ValueError(f"{path}: row {len(rows) + 1}: {getattr(error, 'msg', error)}"
                             ) from None
        names = {name: None for row in rows for name in row}
        column = next((name for name in CAPTION_COLUMNS if name in names), None)
        if not column or "file_name" not in names:
            raise ValueError(f"{path}: needs rows with file_name and one of "
                             f"{', '.join(CAPTION_COLUMNS)}, has "
                             f"{', '.join(map(repr, names)) or 'no rows'}")
        return path.name, [(str(row.get("file_name") or ""), row.get(column)) for row in rows]
    if (folder / "prompts.txt").is_file() and (folder / "videos.txt").is_file():
        with text(folder / "videos.txt") as names, text(folder / "prompts.txt") as prompts:
            names, prompts = ([line.rstrip("\r\n") for line in file] for file in (names, prompts))
        if len(names) != len(prompts):
            raise ValueError(f"{folder}: videos.txt has {len(names)} lines, prompts.txt has "
                             f"{len(prompts)}: one caption a video")
        return "videos.txt and prompts.txt", list(zip(names, prompts))
    found = [(str(path.relative_to(folder)), text(beside).read() if beside.is_file() else None)
             for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES
             for beside in [path.with_suffix(".txt")]]
    if not found:
        raise ValueError(f"{folder}: no videos in it, nor metadata.csv, metadata.jsonl, or "
                         f"prompts.txt with videos.txt")
    return "a .txt beside each video", found


def examine(path, caption, preset, known):
    """{caption, stamp, frames of the preset's rate} of a video, or `known`, which this gave before,
    if nothing has changed since. ValueError says why it cannot be used."""
    caption = " ".join(caption.split()) if isinstance(caption, str) else ""
    if not caption:
        raise ValueError("no caption")
    if caption.encode(errors="ignore").decode() != caption:
        raise ValueError("its caption is not UTF-8")
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError("not a video by its name")
    if not os.path.isfile(path):                    # (Path's raises for a name that is too long)
        raise ValueError("no such file")
    status = path.stat()
    entry = {"caption": caption, "stamp": [status.st_size, status.st_mtime_ns, preset.fps,
                                           preset.frames]}
    if entry.items() <= known.items():
        return known
    if not status.st_size:
        raise ValueError("an empty file")
    try:
        seconds = next(read_frames(str(path)))["duration"] or count_frames_and_secs(str(path))[1]
    except Exception:                       # whatever the decoder says of a broken file
        raise ValueError("cannot be decoded") from None
    frames = int(seconds * preset.fps + .1)
    if frames < preset.frames:
        raise ValueError(f"too short: a clip takes {preset.frames} frames, {preset.fps} a second")
    return {**entry, "frames": frames}


def read_clip(path, start, frames, fps, size):
    """(frames, 3, size, size) uint8 of a video file from the time `start`, in frames of `fps`:
    frame k shows what the file shows at (start + k) / fps seconds; scaled, its middle cut out.

    ffmpeg seeks two seconds ahead of that, so that it knows what is shown there. Where decoding
    from a key frame in the middle fails, it begins with the file: there are files whose decoder
    needs their first frame, and shows grey and green without."""
    for lead, strict in ((min(start, 2 * fps), ["-xerror", "-err_detect", "explode"]), (start, [])):
        filters = (f"fps={fps}:round=up,trim=start={max(0, lead - .5) / fps:.4f},"
                   f"setpts=PTS-STARTPTS,tpad=stop=1:stop_mode=clone,format=rgb24,"
                   f"scale={size}:{size}:force_original_aspect_ratio=increase,crop={size}:{size}")
        video = []
        with contextlib.suppress(Exception):        # whatever the decoder says of a broken file
            _, *video = read_frames(
                str(path), input_params=[*strict, "-ss", f"{(start - lead) / fps:.4f}"],
                output_params=["-vf", filters, "-frames:v", str(frames),
                               "-r", str(fps)])     # (up to 7.0 `trim` forgets it)
        if len(video) == frames:
            break
    else:
        raise ValueError(f"{len(video)} of {frames} frames can be decoded from {start / fps:.1f} s "
                         f"on: damaged, cut off, or has longer sound?")
    video = torch.frombuffer(bytearray(b"".join(video)), dtype=torch.uint8)
    return video.view(frames, size, size, 3).permute(0, 3, 1, 2)


class Sprites:
    """The sprite world, endless: clip i is seed i, with its exact flow, or RAFT's with `raft`."""
    def __init__(self, preset, rich, raft=None):
        self.preset, self.rich, self.raft = preset, rich, raft

    def keys(self, n):
        """What encode takes: n clips in all."""
        return list(range(n))

    def caption(self, key, known):
        return known

    def read(self, keys):
        """-> video (n, T, 3, H, W) in [0, 1], captions, what `motion` takes, {key: why not}."""
        video, flow, captions, _ = sprite_clips(keys, self.preset.frames, self.preset.size,
                                                self.rich)
        return video, captions, flow, {}

    def motion(self, video, flow):
        """RGB flow (n, T, 3, H, W) in [0, 1] of what `read` gave."""
        flow = flow.to(video.device) if self.raft is None else estimate_flow(self.raft, video)
        return flow_to_rgb(flow, self.preset.sigma)

    training = read                         # clips 0, 1, 2, ... of the training

    def held_out(self, n):
        return self.read(range(HELD_OUT, HELD_OUT + n))


class Folder:
    """Videos of a folder, their flow by RAFT. A key is (file name, first frame, size of the file
    in bytes): a file of another size is another video."""
    def __init__(self, folder, preset, raft, out, workers):
        self.folder, self.preset, self.raft = Path(folder), preset, raft
        if rank() == 0:
            self.examine_all(out / "videos.json", workers)
        wait_for_all()
        listing = read_json(out / "videos.json")
        self.videos = {name: entry for name, entry in listing.items() if "frames" in entry}
        if not self.videos:
            raise ValueError(f"{folder}: none of its {len(listing)} videos can be used")
        clip = preset.frames * 3 * preset.size ** 2
        # training the TAE sees clips again: of recent ones 256 MB are kept, of their flow too
        self.recent, self.room = {}, 2 ** 28 // clip
        self.read_kept = functools.lru_cache(self.room)(self.read_one)
        # an order of no meaning, in which the clips of other videos come between, if any are added
        self.order = sorted(self.keys(64), key=lambda key: zlib.crc32(repr(key).encode()))

    def examine_all(self, path, workers):
        """Writes {name: {caption, stamp, frames} or {reason}}; videos that were used last time, and
        have not changed, are not opened again. Says what was found, used and skipped, and why."""
        layout, found = find_videos(self.folder)
        before = read_json(path) if path.is_file() else {}
        listing, written = {}, time.time()

        def entry(name, caption):
            try:
                return examine(self.folder / name, caption, self.preset, before.get(name, {}))
            except ValueError as error:
                return {"reason": str(error)}

        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            entries = tqdm(pool.map(entry, *zip(*found)), "examining videos", len(found))
            for row, ((name, _), one) in enumerate(zip(found, entries), 1):
                if not name:
                    name = f"row {row}, without file_name"
                elif name in listing:
                    name, one = f"{name} (row {row})", {"reason": "listed twice"}
                listing[name] = one
                if time.time() - written > CHECKPOINT_SECONDS:      # what a killed run has seen
                    write_text(path, json.dumps({**before, **listing}))
                    written = time.time()
        listed = {os.path.normpath(self.folder / name) for name, _ in found}
        for other in sorted(self.folder.rglob("*")):
            if other.suffix.lower() in SUFFIXES and os.path.normpath(other) not in listed:
                listing[str(other.relative_to(self.folder))] = {"reason": f"not in {layout}"}
        write_text(path, json.dumps(listing, indent=1))
        used = [one for one in listing.values() if "frames" in one]
        seconds = sum(one["frames"] for one in used) / self.preset.fps
        say(f"{self.folder}: {len(listing)} videos ({layout}), {len(used)} used, {seconds:.0f} s, "
            f"{len(listing) - len(used)} skipped")
        say_skipped({name: one["reason"] for name, one in listing.items() if "reason" in one})

    def keys(self, n):
        """What encode takes: n clips of each video, or all there are, at random offsets."""
        keys = []
        for name, video in self.videos.items():
            room = video["frames"] - self.preset.frames + 1
            starts = np.random.default_rng(zlib.crc32(os.fsencode(name))).permutation(room)[:n]
            keys += [(name, int(start), video["stamp"][0]) for start in starts]
        return keys

    def caption(self, key, known):
        """A clip's caption as it is now; None where its video is gone or another. (`known`: what it
        was when the clip was encoded.)"""
        name, _, size = key
        video = self.videos.get(name)
        return video["caption"] if video and video["stamp"][0] == size else None

    def read_one(self, name, start):
        return read_clip(self.folder / name, start, self.preset.frames, self.preset.fps,
                         self.preset.size)

    def read(self, keys):
        videos, captions, skipped = [], [], {}
        for name, start, size in keys:
            try:
                videos.append(self.read_one(name, start))
                captions.append(self.videos[name]["caption"])
            except ValueError as error:
                skipped[name, start, size] = str(error)
        shape = self.preset.frames, 3, self.preset.size, self.preset.size
        video = torch.stack(videos) / 255 if videos else torch.zeros(0, *shape)
        return video, captions, None, skipped

    def motion(self, video, keys=None):
        """RGB flow of what `read` gave; that of `training`, which has keys, is kept."""
        if keys is None:
            return flow_to_rgb(estimate_flow(self.raft, video), self.preset.sigma)
        clips = []
        for key, clip in zip(keys, video):
            if key not in self.recent:
                rgb = self.motion(clip[None])[0]
                self.recent[key] = (rgb * 255).round().byte().cpu()
            clips.append(self.recent[key])
        while len(self.recent) > self.room:
            self.recent.pop(next(iter(self.recent)))
        return torch.stack(clips).to(video.device) / 255

    def training(self, indices):
        """Clip i of the training; where one cannot be decoded, the next that can stands in."""
        def first(i):
            for k in range(len(self.order)):
                key = self.order[(i + k) % len(self.order)]
                with contextlib.suppress(ValueError):
                    return key, self.read_kept(*key[:2])
            raise ValueError(f"{self.folder}: none of its videos can be decoded")

        keys, videos = zip(*map(first, indices))
        captions = [self.videos[name]["caption"] for name, _, _ in keys]
        return torch.stack(videos) / 255, captions, keys, {}

    def held_out(self, n):                  # few videos: previews show clips that it learns from
        return self.training(range(n))


def say_skipped(reasons):
    """{name: reason} as a line a reason, the most frequent first."""
    names = collections.defaultdict(list)
    for name, reason in reasons.items():
        names[reason].append(name)
    for reason, group in sorted(names.items(), key=lambda item: -len(item[1])):
        say(f"  skipped {len(group)}: {reason}: {', '.join(group[:3])}"
            + f" and {len(group) - 3} more" * (len(group) > 3))


class Latents:
    """What the encode stage wrote, memory-mapped: a clip's x, d (C, T', H', W') and caption."""
    def __init__(self, folder):
        self.folder = folder
        self.shards = sorted(path.stem for path in folder.glob("[0-9]*.json"))
        contents = [read_json(folder / f"{name}.json", "captions", "skipped")
                    for name in self.shards]
        captions = [content["captions"] for content in contents]
        self.captions = list(itertools.chain(*captions))
        self.skipped = {name: reason for content in contents
                        for name, reason in content["skipped"].items()}
        self.ends = np.cumsum([len(part) for part in captions])
        self.open = functools.lru_cache(512)(self.open)         # each keeps a file open

    def open(self, shard, kind):
        path = self.folder / f"{self.shards[shard]}.{kind}.npy"
        try:
            return np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError):
            raise ValueError(f"{path}: damaged or gone: delete {self.shards[shard]}.json beside it "
                             f"and run --stage encode again") from None

    def batch(self, indices, max_bytes):
        def gather(kind):
            return torch.from_numpy(np.stack([
                self.open(shard, kind)[i - self.ends[shard]]        # (from its end)
                for i, shard in zip(indices, shards)])).float()

        shards = np.searchsorted(self.ends, indices, "right").tolist()
        y = tokenize([self.captions[i] for i in indices], max_bytes)
        return gather("x"), gather("d"), y


class Ahead:
    """load(item) of each item, in order, some of them ahead in threads (decoding waits for ffmpeg,
    copying releases the interpreter). `waited`: seconds that the consumer stood still for them."""
    def __init__(self, load, items, workers):
        self.load, self.items, self.workers, self.waited = load, items, workers, 0.

    def __iter__(self):
        # (one torch thread each: more would wait for the training's, spinning)
        pool = concurrent.futures.ThreadPoolExecutor(
            self.workers, initializer=torch.set_num_threads, initargs=(1,))
        pending, items = collections.deque(), iter(self.items)
        try:
            while True:
                while len(pending) <= self.workers and (item := next(items, None)) is not None:
                    pending.append(pool.submit(self.load, item))
                if not pending:
                    return
                start = time.time()
                result = pending.popleft().result()
                self.waited += time.time() - start
                yield result
        finally:
            pool.shutdown(cancel_futures=True)


# ---------------------------------------------------------------- small things that others use too

def generator(*key):
    """A random stream of its own for a key such as (seed, stage, step, place in the batch)."""
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))


def preset_of(name):
    """The preset of that name; ValueError where there is none."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}: one of {', '.join(PRESETS)}")
    return PRESETS[name]


def recomputes(preset):
    """Whether a Preset's blocks are recomputed in the backward pass: a clip's activations are too
    many to keep (4b: 88 GB, about 220 bytes a channel of a token in a block)."""
    _, T, H, W = preset.latent_shape()
    dit = preset.dit
    return T * H * W // dit.patch ** 2 * dit.width * dit.depth > 1e8


def can_compile(device):
    """torch.compile needs a C++ compiler on a CPU."""
    return device.type != "cpu" or shutil.which(os.environ.get("CXX", "g++")) is not None


def read_json(path, *keys):
    """The dict that a .json file of a run holds; ValueError where it is damaged."""
    try:
        content = json.loads(path.read_text())
        if isinstance(content, dict) and content.keys() >= set(keys):
            return content
    except ValueError:
        pass
    raise ValueError(f"{path}: damaged, not the JSON that was written")


# ---------------------------------------------------------------- a run and its folder

def fill(state, path, alone=False):
    """Reads the tensors of `state` from a checkpoint's folder, with all processes or alone."""
    try:                                            # (DCP detaches what it fills)
        dcp.load(state, checkpoint_id=path, no_dist=alone)
    except (Exception, dcp.api.CheckpointException) as error:       # (which is no Exception)
        cause = next((cause for cause, _ in getattr(error, "failures", {}).values()), error)
        if isinstance(cause, KeyboardInterrupt):
            raise cause from None
        raise ValueError(f"{path}: cannot be read ({one_line(repr(cause))}): if it "
                         "is damaged, or of another model, delete it, and the same command goes on "
                         "from the checkpoint before") from None


def complete(path):
    """Whether a checkpoint's folder has all of it: no process was killed while it was written."""
    return (path / "status.json").is_file() and (path / ".metadata").is_file()


class Run:
    """A run's folder and what all of its stages share."""
    def __init__(self, args):
        self.args = args
        self.preset = dataclasses.replace(PRESETS[args.preset], sigma=args.sigma)
        self.out, self.device = Path(args.out), args.device
        if ranks() % args.replicas:
            raise ValueError(f"--replicas {args.replicas}: does not divide {ranks()} processes")
        has_tae = args.init or (self.out / "tae.pt").exists()
        for stage in [args.stage] if args.stage else STAGES[2 * bool(has_tae):]:
            self.setting(stage)                 # hours before it is needed
        if not has_tae and args.stage not in (None, "tae"):     # nor is a mistyped --out made
            raise ValueError(f"{self.out}: has no tae yet, run --stage tae first")
        settings = {"version": VERSION, "preset": args.preset, "data": args.data,
                    "flow": args.flow, "rich": args.rich, "seed": args.seed,
                    **json.loads(json.dumps(dataclasses.asdict(self.preset)))}
        path = self.out / "settings.json"
        made = [*self.out.glob("tae.pt"), *self.out.glob("latents/*"),
                *self.out.glob("checkpoints/*")]
        if made and path.is_file():
            refuse_changes(self.out, read_json(path), settings)
        if args.data and not Path(args.data).is_dir():
            raise ValueError(f"--data {args.data}: no such folder")
        self.init = read_bundle(args.init) if args.init else None
        if self.init:
            preset, tae, dits = self.init
            if dataclasses.replace(preset, sigma=args.sigma) != self.preset:
                raise ValueError(f"--init {args.init}: of another size than the preset "
                                 f"{args.preset}")
            if (self.out / "tae.pt").exists():
                mine = self.tae().half().state_dict()
                if not all(torch.equal(mine[k].cpu(), v) for k, v in tae.state_dict().items()):
                    raise ValueError(f"--init {args.init}: its TAE is not that of {self.out}, take "
                                     f"another --out")
            for stage in ("base", "jam", "control"):
                if args.stage in (None, stage) and not dits.keys() & {stage, "base"}:
                    raise ValueError(f"--init {args.init}: has no base model to start {stage} "
                                     f"from, only {', '.join(dits)}")
        for folder in ("previews", "latents", "checkpoints"):
            (self.out / folder).mkdir(parents=True, exist_ok=True)
        wait_for_all()
        if rank() == 0:
            for folder in (".", "previews", "latents"):
                for half_written in (self.out / folder).glob(".*.part*"):
                    if time.time() - half_written.stat().st_mtime > 600:    # by a killed process
                        half_written.unlink(missing_ok=True)
            write_text(path, json.dumps(settings, indent=1))
            if self.init and not (self.out / "tae.pt").exists():
                self.write_tae(tae.state_dict(), f"--init {args.init}")
        wait_for_all()

    @functools.cached_property
    def world(self):
        """The videos, read only when a stage needs them."""
        raft = RAFT.load().to(self.device) if self.args.flow == "raft" else None
        if self.args.data:
            return Folder(self.args.data, self.preset, raft, self.out, self.args.workers)
        return Sprites(self.preset, self.args.rich, raft)

    def setting(self, stage):
        """(steps, learning rate, batch) of a stage: the flags; without them what it was begun with
        (but no fewer steps than the preset's), the control what jam was; else the preset's."""
        args, encoding, control = self.args, stage == "encode", stage == "control"
        defaults = DEFAULTS[args.preset]["jam" if control else stage]
        own, jam = self.last(stage)[1], self.last("jam")[1] if control else None
        if begun := own or jam:
            most = max(status["of"] for status in (own, jam) if status)
            defaults = most if jam else max(most, defaults[0]), begun["lr"], begun["batch"]
        flags = args.steps, args.lr, None if encoding and args.stage is None else args.batch
        steps, lr, batch = (default if flag is None else flag
                            for flag, default in zip(flags, defaults))
        left = steps > (own["step"] if own else 0)
        if not encoding and left and batch % (ranks() * args.accumulate):
            raise ValueError(f"{stage}: a batch of {batch} does not divide into {ranks()} "
                             f"processes x {args.accumulate} parts (--batch, --accumulate)")
        return steps, lr, batch

    # the TAE: one file, made by its stage or by --init

    def write_tae(self, state, origin):
        write_tensors(self.out / "tae.pt", {"kind": "tae", "origin": origin, "state": state})

    def tae(self):
        """The run's TAE, eval mode, no gradients: the one that encoded its latents."""
        path = self.out / "tae.pt"
        tae = TAE(self.preset.tae)
        try:
            tae.load_state_dict(read_file(path, "tae")["state"])
        except (LookupError, TypeError, RuntimeError):
            raise ValueError(f"{path}: not the TAE of preset {self.args.preset}") from None
        folder = self.out / "latents"
        if (folder / "manifest.json").exists() and \
                read_json(folder / "manifest.json", "tae")["tae"] != mark_of(tae):
            raise ValueError(f"{folder} was encoded by another TAE than tae.pt is now: delete it "
                             f"and the checkpoints after it, or take another --out")
        return tae.to(self.device).eval().requires_grad_(False)

    # checkpoints: a folder each, complete once it has its status.json

    def last(self, stage):
        """The folder and the status of a stage's last complete checkpoint, or two None."""
        for path in sorted((self.out / "checkpoints").glob(f"{stage}-*"), reverse=True):
            if complete(path):
                return path, read_json(path / "status.json", "step", "of", "lr", "batch")
        return None, None

    def refuse_lag(self):
        """ValueError where processes do not see the same checkpoints and latents, as on a disk that
        machines share: they would wait for each other, or train on other data, in silence."""
        wait_for_all()
        if ranks() == 1:
            return
        seen = [None] * ranks()
        dist.all_gather_object(seen, {
            "latents": len([*(self.out / "latents").glob("*.json")]),
            **{stage: path and path.name for stage in STAGES for path, _ in [self.last(stage)]}})
        if others := [what for what in seen if what != seen[0]]:
            raise ValueError(f"{self.out}: one process sees {seen[0]} in it, another {others[0]}: "
                             "the disk lags, start it again")

    def save(self, stage, step, state, status):
        """A checkpoint of tensors (sharded or not) and of `status`; the last two are kept."""
        path = self.out / "checkpoints" / f"{stage}-{step:09d}"
        if rank() == 0:
            shutil.rmtree(path, ignore_errors=True)
        wait_for_all()
        try:
            dcp.save(state, checkpoint_id=path)
            if rank() == 0:
                write_text(path / "status.json", json.dumps({"step": step, **status}))
        except (OSError, ValueError, RuntimeError, dcp.api.CheckpointException) as error:
            shutil.rmtree(path, ignore_errors=True)
            kept = self.last(stage)[1]
            raise ValueError(
                f"cannot write {path}: {' '.join(str(error).split())[-200:]}; "
                + (f"the checkpoint of step {kept['step']} is whole" if kept else
                   "there is no earlier checkpoint")) from None
        wait_for_all()
        if rank() == 0:
            others = sorted(set((self.out / "checkpoints").glob(f"{stage}-*")) - {path})
            before = [other for other in others if complete(other)][-1:]
            for old in set(others) - set(before):       # a killed process's halves among them
                (old / "status.json").unlink(missing_ok=True)
                shutil.rmtree(old, ignore_errors=True)

    def finished(self, stage):
        """A finished stage's checkpoint: its folder and step."""
        path, status = self.last(stage)
        if path is None:
            raise ValueError(f"{self.out}: has no {stage} yet, run --stage {stage} first")
        if status["step"] < status["of"]:
            raise ValueError(f"{self.out}: {stage} stopped at step {status['step']} of "
                             f"{status['of']}, finish it first with --stage {stage}")
        return path, status["step"]

    def average(self, path, module):
        """Fills a whole module, on this process alone, with the average (EMA) of a checkpoint."""
        fill({"ema": dict(module.named_parameters())}, path, alone=True)
        return module

    def log(self, **row):
        if rank() == 0:
            with open(self.out / "metrics.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")

    def forget_after(self, stage, step):
        """Takes the rows of steps that are to be done again out of metrics.jsonl."""
        path = self.out / "metrics.jsonl"
        if rank() == 0 and path.exists():
            kept = []
            for line in path.read_text().splitlines():
                with contextlib.suppress(ValueError, LookupError, TypeError):   # half a line
                    row = json.loads(line)
                    if row["stage"] != stage or row["step"] <= step:
                        kept.append(line + "\n")
            write_text(path, "".join(kept))

    def whole_dit(self, path, stage, dtype=torch.float32):
        """A stage's DiT, averaged, on this process alone."""
        with torch.device("meta"):
            dit = DiT(dataclasses.replace(self.preset.dit, motion=stage == "jam"))
        dit = dit.to(dtype).to_empty(device="cpu").requires_grad_(False)
        return self.average(path, dit)

    def export(self):
        """model.pt: the TAE and every DiT that is trained by now."""
        if rank() == 0:
            done = {stage: last for stage in ("jam", "base", "control")
                    if (last := self.last(stage))[0] and last[1]["step"] == last[1]["of"]}
            alike = "step", "lr", "batch", "uniform_t", "t_shift", "origin", "clips"
            if {"jam", "control"} <= done.keys():
                jam, control = ({key: done[which][1].get(key) for key in alike}
                                for which in ("jam", "control"))
                if jam != control:                  # nothing could be concluded from it
                    say(f"control is left out of model.pt: it has {control}, jam {jam}")
                    del done["control"]
            dits = {stage: self.whole_dit(path, stage, torch.float16)
                    for stage, (path, _) in done.items()}
            if self.init and "base" in self.init[2]:
                dits.setdefault("base", self.init[2]["base"])   # what they began from, beside them
            if dits:
                which = next(iter(dits))
                bundle = VideoJAM(self.preset, self.tae(), dits.pop(which), which)
                bundle.save(self.out / "model.pt", **dits)
                say(f"python sample.py --run {self.out} "
                    + f"--which {which} " * (which != "jam") + '"a red square moves left"')
        wait_for_all()


# ---------------------------------------------------------------- on one GPU or many

def mesh_of(args):
    """torchrun's processes as (shard) or, with --replicas, (replicate, shard); None without it."""
    if not dist.is_initialized():
        return None
    if args.replicas == 1:
        return init_device_mesh(args.device.type, (ranks(),))
    return init_device_mesh(args.device.type, (args.replicas, ranks() // args.replicas),
                            mesh_dim_names=("replicate", "shard"))


def materialize(model, device):
    """Gives the modules that are still on the meta device memory and first weights."""
    empty = [module for module in model.modules()
             if any(p.is_meta for p in module.parameters(recurse=False))]
    for module in empty:
        module.to_empty(device=device, recurse=False)
    initialize(empty)


def distribute(model, run):
    """FSDP2, layer by layer and the rest as one: weights, gradients, averages and moments live in
    shards of fp32, a layer is gathered in the compute precision when its turn comes. Layers still
    on the meta device are made just before, so no process ever holds more than one whole.
    Without torchrun it is the same model, in one piece."""
    mesh, compute = mesh_of(run.args), run.args.precision
    options = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if compute == torch.bfloat16 else None,
        reduce_dtype=torch.float32, cast_forward_inputs=False)}         # t must stay fp32
    layers = [*model.text.layers, *model.blocks, model] if isinstance(model, DiT) else \
        [model.encoder, model.decoder]
    torch.manual_seed(run.args.seed)
    if run.args.compile and isinstance(model, DiT):
        model.compile_blocks()
    for layer in layers:
        materialize(layer, run.device)
        layer.to(run.device)
        if mesh is not None:
            fully_shard(layer, **options)
    return model.to(run.device) if mesh is None else model


@torch.no_grad()
def assign(parameter, whole):
    """Copies a whole tensor into a parameter, of which this process may hold a shard only."""
    whole = whole.to(parameter.device, parameter.dtype)
    if isinstance(parameter, DTensor):
        whole = distribute_tensor(whole, parameter.device_mesh, parameter.placements)
    parameter.copy_(whole)


MOTION_ROWS = {"W_in.weight": 1, "W_out.weight": 0}     # the two layers of Sec. 4.2 and their axes
MOTION_PACE = 5.                                        # how much faster than x's they learn


def without_motion(weight, axis):
    """The shape that a weight of MOTION_ROWS has in a model without motion."""
    shape = list(weight.shape)
    shape[axis] //= 2
    return shape


def begin_from(model, source, C, add_motion):
    """Weights of another DiT, {name: tensor} or a checkpoint's path, for this one, sharded or not.
    add_motion: the other has no motion, of which this one therefore knows nothing (Sec. 4.2)."""
    wanted, narrow = dict(model.named_parameters()), {}
    for name, axis in MOTION_ROWS.items() if add_motion else ():
        narrow[name] = torch.empty(without_motion(wanted[name], axis))
    if isinstance(source, dict):
        for name, tensor in {**wanted, **narrow}.items():
            assign(tensor, source[name])
    else:
        fill({"ema": {**wanted, **narrow}}, source)
    for name, weight in narrow.items():
        assign(wanted[name], widen(weight, MOTION_ROWS[name], C, channel_last=True))


def motion_paces(model, C):
    """What `Muon` takes for W_in and W_out whose rows of motion began at zero: these go MOTION_PACE
    times as far in a step. (A step's size does not depend on the gradient's: at x's pace the toy's
    new rows took 400 steps to come near x's in size, and motion was hardly read before. At this
    one its loss is below .6 after 180 steps, not 400, and appearance suffers less. The paper names
    no such thing, nor its optimizer.)"""
    paces = {}
    for name, axis in MOTION_ROWS.items():
        weight = model.get_parameter(name)
        of_x = widen(torch.ones(without_motion(weight, axis)), axis, C, channel_last=True)
        paces[weight] = torch.empty_like(weight)
        assign(paces[weight], torch.where(of_x == 1, 1., MOTION_PACE))
    return paces


# ---------------------------------------------------------------- one loop for every stage

def summary(reports):
    """Rows {"t": (n,), name: (n,)} of many steps -> means, and by bin of t (None if empty)."""
    columns = {k: np.concatenate([report[k] for report in reports]) for k in reports[0]}
    t, row = columns.pop("t", None), {}
    for name, values in columns.items():
        row[name] = round(float(values.mean()), 6)
        if t is not None:
            which = (t * T_BINS).astype(int).clip(0, T_BINS - 1)
            parts = [values[which == b] for b in range(T_BINS)]
            row[name.replace("loss", "bins")] = [round(float(part.mean()), 6) if len(part) else None
                                                 for part in parts]
    return row


def optimize(run, stage, model, load, losses_of, preview, settings, paces=None, **notes):
    """Trains `model` for a stage's steps, from its last checkpoint on: gradients clipped to norm 1,
    an exponential moving average (EMA) of the weights; a short warm-up, then a constant learning
    rate that falls to zero over the last 30% (a stage made longer goes back up; the paper's stays).

    load(step, places) -> the data of places in the batch, in a thread ahead of time;
    losses_of(data, rows) -> functions that give, of some rows of that data, a scalar loss and
    {name: (n,)} to report each: their mean is the loss, computed and led back one at a time.
    preview(path, step) shows the average in a checkpoint's folder; settings {name: value}: what a
    stage cannot go on without; paces: Muon's; notes: what is written down only."""
    args, (steps, lr, batch) = run.args, run.setting(stage)
    local, each = batch // ranks(), batch // ranks() // args.accumulate
    compiled = args.compile and isinstance(model, DiT)
    say(f"{stage}: {steps} steps, lr {lr:g}, batch {batch} = {ranks()} processes x "
        f"{args.accumulate} x {each}, "
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {run.device}, "
        f"{str(args.precision)[6:]}, "
        f"{'compiled' if compiled else 'not compiled'}"
        + "".join(f", {name} {value}" for name, value in settings.items() if value is not None))
    weights = dict(model.train().named_parameters())
    average = {name: weight.detach().clone() for name, weight in weights.items()}
    optimizing = optimizers(model, lr, paces)
    moments = {weight: held for optimizer in optimizing for weight, held in optimizer.state.items()}
    state = {"model": weights, "ema": average,
             "optimizer": {name: moments[weight] for name, weight in weights.items()}}
    settings = {"lr": lr, "batch": batch, **settings}
    step, (path, status) = 0, run.last(stage)
    if path:
        refuse_changes(path, status, settings, f"take another --out, or delete {stage}'s "
                       "checkpoints" + " and tae.pt" * (stage == "tae")
                       + " to begin the stage again")
        step = status["step"]
        fill(state, path)
    run.forget_after(stage, step)
    if step >= steps:
        return say(f"{stage}: {step} steps are done already")
    first = step

    places = range(rank() * local, (rank() + 1) * local)
    ahead = Ahead(functools.partial(load, places=places), range(step, steps), args.workers)
    begun, saved, recent, bad, skipped = time.time(), time.time(), [], [], 0
    every = max(1, min(50, steps // 10))
    bar = tqdm(total=steps, initial=step, desc=stage, smoothing=.05, disable=rank() > 0)
    stopped = []                # Ctrl-C (or a cluster's SIGTERM) waits for the end of the step

    def on_signal(*_):          # a later one does not (torchrun passes the same one on at once)
        if stopped and time.time() - stopped[0] > 5:
            raise KeyboardInterrupt
        stopped.append(time.time())

    handlers = {number: signal.signal(number, on_signal)
                for number in (signal.SIGINT, signal.SIGTERM)}
    batches = iter(ahead)
    try:
        for data in batches:
            rate = lr * min(1, (step + 1) / min(200, steps / 10 + 1), (steps - step) / (.3 * steps))
            for optimizer in optimizing:
                optimizer.param_groups[0]["lr"] = rate
            before = len(recent)
            for part in range(args.accumulate):
                losses = losses_of(data, range(part * each, (part + 1) * each))
                for compute in losses:
                    with autocast(run.device, args.precision):
                        loss, report = compute()
                    (loss / args.accumulate / len(losses)).backward()
                    recent.append({k: v.detach() for k, v in report.items()})
            norm = torch.nn.utils.clip_grad_norm_(weights.values(), 1.)
            norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
            if norm.isfinite():
                for optimizer in optimizing:
                    optimizer.step()
                decay = min(.999, (2 + step) / (11 + step))     # short runs forget their start too
                with torch.no_grad():
                    torch._foreach_lerp_(list(average.values()), list(weights.values()), 1 - decay)
                bad = []
            else:                                   # the same on all ranks: the norm is of all
                bad.append((step + 1, recent[-1].get("t")))
                skipped += 1
                say(f"{stage}: step {step + 1} is not finite and is skipped")
                recent = recent[:before]
            model.zero_grad()
            step += 1
            bar.update()
            if len(bad) == BAD_STEPS:
                (first_bad, t), kept = bad[0], run.last(stage)[1]
                raise ValueError(
                    f"{stage}: {BAD_STEPS} steps in a row are not finite, from step {first_bad} on"
                    + (f", t from {t.min():.3f} to {t.max():.3f}" if t is not None else "")
                    + f"; the last checkpoint is of step {kept['step'] if kept else 0}"
                    + "; try --no-compile" * (compiled and first_bad == first + 1))
            show = step == steps or step % max(1, steps // 5) == 0
            stop, late = agreed(run.device, bool(stopped), time.time() - saved > CHECKPOINT_SECONDS)
            if (step % every == 0 or show or stop) and recent:
                recent = [{k: v.float().cpu().numpy() for k, v in r.items()} for r in recent]
                gathered = [recent]
                if ranks() > 1:
                    gathered = [None] * ranks()
                    dist.all_gather_object(gathered, recent)
                row = summary(sum(gathered, []))
                run.log(stage=stage, step=step, lr=rate, **row)
                bar.set_postfix({k: v for k, v in row.items() if not isinstance(v, list)}
                                | {"waits": f"{ahead.waited / (time.time() - begun):.0%}"}
                                | ({"skipped": skipped} if skipped else {}))
                recent = []
            if show or stop or late and not recent:     # so that every step is in one row
                start = time.time()
                run.save(stage, step, state, {"of": steps, **settings, **notes})
                saved = time.time() + max(0, 20 * (time.time() - start) - CHECKPOINT_SECONDS)
            if show and rank() == 0:
                try:
                    preview(run.last(stage)[0], step)
                except (ValueError, OSError, RuntimeError, MemoryError) as error:
                    say(f"{stage}: no preview of step {step}: {one_line(error)}")
            if show:
                wait_for_all()
            if stop or show and agreed(run.device, bool(stopped))[0]:
                raise ValueError(f"stopped at step {step} of {stage}: the same command goes on")
    finally:
        batches.close()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        bar.close()
    seconds = time.time() - begun
    say(f"{stage}: {(steps - first) * batch / seconds:.1f} clips a second; waited for data "
        f"{ahead.waited / seconds:.1%} of the time"
        + f"; {skipped} steps were not finite and skipped" * bool(skipped))


# ---------------------------------------------------------------- the stages

def train_tae(run):
    """The auto-encoder of videos and their RGB flow alike; then its latents' bases."""
    if run.init:
        return say(f"tae: that of {run.args.init}")
    kept = run.out / "tae.pt"
    given = read_file(kept, "tae")["origin"] if kept.exists() else None
    if given and (run.last("tae")[1] is None or given.startswith("--init")):
        return say("tae: it is there already")
    (steps, _, batch), done = run.setting("tae"), run.last("tae")[1]
    if (run.out / "latents/manifest.json").exists() and steps > (done["step"] if done else 0):
        raise ValueError(f"{run.out}: its latents are of the TAE as it is, which {steps} steps "
                         f"would change: name another --stage, or take another --out")
    world = run.world                                       # opened here, not in a reading thread
    torch.manual_seed(run.args.seed)
    tae = set_recompute(TAE(run.preset.tae), run.args.recompute)

    def load(step, places):
        video, _, extra, _ = world.training([step * batch + place for place in places])
        return video, extra, [generator(run.args.seed, "tae", step, place) for place in places]

    def losses_of(data, rows):
        video, extra, draws = (part[rows.start:rows.stop] for part in data)
        video = video.to(run.device)

        def loss_of(clips):
            loss = tae_loss(tae, clips, generator=draws)
            return loss, {"loss": loss[None]}

        return [functools.partial(loss_of, clips) for clips in (video, world.motion(video, extra))]

    def preview(path, step):
        whole = run.average(path, TAE(run.preset.tae)).to(run.device).requires_grad_(False)
        video, _, extra, _ = world.held_out(8)
        motion = world.motion(video.to(run.device), extra).cpu()
        with autocast(run.device, run.args.precision):
            pairs = [(clips, torch.cat([whole.decode(whole.encode(
                clip[None].to(run.device)), frames=len(clip)).cpu() for clip in clips]))
                for clips in (video, motion)]
        psnr = [-10 * (a - b).square().mean((1, 2, 3, 4)).log10().mean().item() for a, b in pairs]
        run.log(stage="tae", step=step, psnr_video=round(psnr[0], 2), psnr_motion=round(psnr[1], 2))
        say(f"tae: step {step}, held-out PSNR {psnr[0]:.1f} dB, RGB flow {psnr[1]:.1f} dB")
        write_video(run.out / f"previews/tae-{step:06d}.mp4", grid(*pairs[0], *pairs[1]),
                    run.preset.fps)

    optimize(run, "tae", distribute(tae, run), load, losses_of, preview, {})
    path, done = run.finished("tae")
    origin = f"step {done}"
    if rank() == 0 and given != origin:
        whole = run.average(path, TAE(run.preset.tae)).to(run.device).requires_grad_(False)
        set_recompute(whole, run.args.recompute)
        # clips that have fitted in training
        few = max(1, batch // ranks() // run.args.accumulate)

        def clips(motion):
            for start in range(0, BASIS_CLIPS, few):
                places = range(start, min(start + few, BASIS_CLIPS))
                video, _, extra, _ = world.training(places)
                video = video.to(run.device)
                yield world.motion(video, extra) if motion else video

        with autocast(run.device, run.args.precision):
            for motion in (False, True):
                whole.fit_basis(clips(motion), motion, generator(run.args.seed, "basis", motion))
        run.write_tae(whole.state_dict(), origin)
    wait_for_all()


def mark_of(tae):
    """A number that tells a TAE from others."""
    return zlib.crc32(b"".join(v.cpu().numpy().tobytes() for v in tae.state_dict().values()))


def encode(run):
    """Latents of clips and of their flow, in shards, every rank taking its part. The manifest says
    which clips a shard holds: these are not encoded again, and new ones are added. Captions are
    taken as they are now; clips whose video is gone or has changed are dropped, which encodes the
    rest of their shards again."""
    clips, _, batch = run.setting("encode")
    folder, tae = run.out / "latents", run.tae()
    path = folder / "manifest.json"
    world, manifest = run.world, {"tae": mark_of(tae), "shards": []}
    if rank() == 0:
        if path.exists():
            manifest = read_json(path, "tae", "shards")
        dropped = 0
        for s, keys in enumerate(manifest["shards"]):
            held = [key for key in keys if world.caption(key, "") is not None]
            done = folder / f"{s:06d}.json"
            if len(held) < len(keys):
                dropped += len(keys) - len(held)
                done.unlink(missing_ok=True)        # before the manifest: it has to be made again
                manifest["shards"][s] = held
            elif done.exists():
                content = read_json(done, "keys", "captions")
                captions = list(map(world.caption, content["keys"], content["captions"]))
                if captions != content["captions"]:
                    write_text(done, json.dumps({**content, "captions": captions}))
        if dropped:
            say(f"encode: {dropped} clips are dropped, whose videos are gone or others now")
        known = {json.dumps(key) for shard in manifest["shards"] for key in shard}
        new = [key for key in world.keys(clips) if json.dumps(key) not in known]
        manifest["shards"] += [new[i:i + SHARD] for i in range(0, len(new), SHARD)]
        write_text(path, json.dumps(manifest))
    wait_for_all()
    shards = read_json(path, "shards")["shards"]
    missing = [s for s, keys in enumerate(shards)
               if keys and not (folder / f"{s:06d}.json").exists()]
    wait_for_all()                                  # before any of them is made
    say(f"encode: {sum(map(len, shards))} clips in {len(shards)} shards, {len(missing)} to do")
    parts = {s: [shards[s][i:i + batch] for i in range(0, len(shards[s]), batch)]
             for s in missing[rank()::ranks()]}
    ahead = Ahead(world.read, itertools.chain(*parts.values()), run.args.workers)
    bar = tqdm(total=sum(len(shards[s]) for s in parts), desc="encode", unit="clip",
               disable=rank() > 0)
    seconds, begun, read = collections.Counter(), time.time(), iter(ahead)
    for s, batches in parts.items():
        x, d = ([np.zeros((0, *run.preset.latent_shape()), np.float16)] for _ in range(2))
        content = {"keys": [], "captions": [], "skipped": {}}
        for keys, (video, captions, extra, skipped) in zip(batches, read):
            content["skipped"] |= {name: reason for (name, *_), reason in skipped.items()}
            if len(video):
                clock = time.time()
                video = video.to(run.device)
                motion = world.motion(video, extra)
                if run.device.type == "cuda":
                    torch.cuda.synchronize(run.device)      # its work is RAFT's, not the TAE's
                seconds["flow"] += time.time() - clock
                clock = time.time()
                with torch.no_grad(), autocast(run.device, run.args.precision):
                    x.append(tae.encode(video).half().cpu().numpy())
                    d.append(tae.encode(motion, motion=True).half().cpu().numpy())
                seconds["TAE"] += time.time() - clock
                content["captions"] += captions
                content["keys"] += [key for key in keys
                                    if not skipped or tuple(key) not in skipped]
            bar.update(len(keys))
        for kind, part in (("x", x), ("d", d)):
            write_file(folder / f"{s:06d}.{kind}.npy",
                       lambda temporary: np.save(temporary, np.concatenate(part)))
        write_text(folder / f"{s:06d}.json", json.dumps(content))       # last: the shard is whole
    bar.close()
    wait_for_all()
    latents = Latents(folder)
    say_skipped(latents.skipped)
    if bar.n:
        total = time.time() - begun
        shares = ", ".join(f"{k} {v / total:.0%}" for k, v in seconds.items())
        say(f"encode: {ranks() * bar.n / total:.2f} clips a second; {shares}, waiting for video "
            f"{ahead.waited / total:.0%}")
    say(f"encode: {len(latents.captions)} of {sum(map(len, shards))} clips are there")
    if not latents.captions:
        raise ValueError(f"{folder}: no clip could be encoded")


def train_dit(run, stage):
    """base, jam or control: the same data and lines; jam alone has d beside x."""
    world = run.world                       # opened by all, before rank 0 alone shows a preview
    motion, C = stage == "jam", run.preset.tae.channels
    with torch.device("meta"):
        model = DiT(dataclasses.replace(run.preset.dit, motion=motion))
    set_recompute(model, run.args.recompute)
    given = run.init[2] if run.init else {}
    which, origin, source = stage if stage in given else "base", None, None
    if stage in given or "base" in given and run.last("base")[0] is None:
        origin = f"{'its own' if which == stage else which} of --init {run.args.init}"
        source = given[which].state_dict()
    elif stage != "base":
        source, base_step = run.finished("base")
        origin = f"base at step {base_step}"
    latents = Latents(run.out / "latents")
    if not latents.captions:
        raise ValueError(f"{run.out}: has no latents yet, run --stage encode first")
    shards = read_json(run.out / "latents/manifest.json", "shards")["shards"]
    if len(latents.shards) < sum(map(bool, shards)):        # (of lost videos some are empty)
        raise ValueError(f"{run.out}: encode stopped at {len(latents.shards)} of {len(shards)} "
                         f"shards, finish it first with --stage encode")
    run.tae()                               # refuses a TAE that has not encoded them
    most = model.config.max_bytes
    if long := sum(cut(caption, most) != caption for caption in latents.captions):
        say(f"{stage}: {long} captions of more than {most} bytes are cut")
    clips, batch = len(latents.captions), run.setting(stage)[2]
    longest = max(len(token_row(caption, most)) for caption in set(latents.captions))
    model = distribute(model, run)
    new_rows = motion and which == "base"
    if source and run.last(stage)[0] is None:
        begin_from(model, source, C, add_motion=new_rows)
    # the control's draws are jam's: the same clips, noise of x, times and dropped prompts
    stream = "base" if stage == "base" else "fine-tuning"

    def chunk(step, c, indices):
        x, d, y = latents.batch(indices, most)
        # of one length in all steps, so that nothing is compiled again in the middle
        y = F.pad(y, (0, longest - y.shape[1]), value=PAD)
        return corrupted(torch.cat([x, d], 1) if motion else x, y, C, uniform=run.args.uniform_t,
                         shift=run.args.t_shift, motion_dropout=run.args.motion_dropout,
                         generator=generator(run.args.seed, stream, step, c))

    def load(step, places):             # noise too: a GPU would wait for the CPU to draw it
        indices = torch.randint(clips, (batch,), generator=generator(run.args.seed, stream, step))
        first, rows = places.start // CHUNK, indices.split(CHUNK)
        chunks = [chunk(step, c, rows[c].tolist()) for c in range(first, -(-places.stop // CHUNK))]
        own = slice(places.start - first * CHUNK, places.stop - first * CHUNK)
        return [torch.cat(parts)[own] for parts in zip(*chunks)]

    def losses_of(data, rows):
        t, z_t, y, v = (part[rows.start:rows.stop].to(run.device) for part in data)

        def loss():
            errors = squared_errors(model, t, z_t, y, v)
            report = {"t": t, "loss_x": errors[:, :C].mean(1)}
            if motion:
                report["loss_d"] = errors[:, C:].mean(1)
            return errors.mean(), report

        return [loss]

    def preview(path, step):
        dtype = torch.bfloat16 if run.device.type == "cuda" else torch.float32
        dit = run.whole_dit(path, stage, dtype).to(run.device)
        captions = world.held_out(8)[1]         # (their flow would be RAFT's work for nothing)
        bundle = VideoJAM(run.preset, run.tae(), dit, stage)
        each = 1 if run.args.recompute else 8       # what is large is sampled one by one
        shown = [part.cpu() for part in bundle.generate(captions, steps=30, batch=each)
                 if part is not None]
        write_video(run.out / f"previews/{stage}-{step:06d}.mp4", grid(*shown), run.preset.fps)

    settings = {"origin": origin, "uniform_t": run.args.uniform_t, "t_shift": run.args.t_shift,
                "motion_dropout": run.args.motion_dropout if motion else None}
    optimize(run, stage, model, load, losses_of, preview, settings,
             motion_paces(model, C) if new_rows else None, clips=clips)


# ---------------------------------------------------------------- what a run would take

def saved_bytes(function):
    """Bytes that a forward pass keeps for the backward pass, parameters apart."""
    kept = {}

    def pack(tensor):
        owner = tensor if tensor._base is None else tensor._base    # (a Linear keeps weight.t())
        if not isinstance(owner, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage._cdata] = (storage.nbytes(), tensor)           # (kept alive: no id twice)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(size for size, _ in kept.values())


def flops_of(function):
    """What torch counts of matrix products and convolutions, attention included, in a call."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def dry_run(args):
    """Prints what the preset takes; the models are on the meta device, so nothing is computed."""
    preset, world = PRESETS[args.preset], args.world
    shape = preset.latent_shape()
    with torch.device("meta"):
        tae, dit = TAE(preset.tae), DiT(dataclasses.replace(preset.dit, motion=True))
        z, t = torch.zeros(1, 2 * shape[0], *shape[1:], dtype=torch.bfloat16), torch.zeros(1)
        y = torch.zeros(1, preset.dit.max_bytes, dtype=torch.long)
        video = torch.zeros(1, preset.frames, 3, preset.size, preset.size)
    P = sum(p.numel() for p in dit.parameters())
    moments = sum(moment.numel() for optimizer in optimizers(dit, 0.)
                  for held in optimizer.state.values() for moment in held.values())
    dit = dit.to(torch.bfloat16)
    with torch.no_grad():
        F_encode, F_forward = flops_of(lambda: tae.posterior(video)), flops_of(lambda: dit(z, t, y))
    layer = max(sum(p.numel() for p in block.parameters()) for block in dit.blocks)
    # of what has two values, the first is without recomputation, the second with it
    kept = [saved_bytes(lambda: set_recompute(dit, again)(z, t, y)) for again in (False, True)]
    kept[1] += kept[0] / len(dit.blocks)            # what the block that is recomputed keeps
    tae, video = tae.to(torch.bfloat16), video.to(torch.bfloat16)
    coded = [saved_bytes(lambda: tae.pixels(set_recompute(tae, again).posterior(video)[0]))
             for again in (False, True)]
    tokens = shape[1] * (shape[2] // preset.dit.patch) * (shape[3] // preset.dit.patch)
    steps, _, batch = (given or default for given, default in
                       zip((args.steps, None, args.batch), DEFAULTS[args.preset]["jam"]))
    clips = max(1, batch // world // args.accumulate)
    training = 3 * F_forward, 4 * F_forward
    hours = [steps * batch * flops / (args.tflops * 1e12 * 3600) for flops in training]
    memory = {"memory a GPU: weights, fp32": 4 * P / world, "  gradients, fp32": 4 * P / world,
              "  moments of Muon and AdamW, fp32": 4 * moments / world,
              "  average (EMA), fp32": 4 * P / world,
              "  layers in bf16": (4 if world > 1 else 2) * layer}    # two gathered; or one copied
    rows = [
        ("parameters, DiT with motion rows", "B", P / 1e9),
        ("parameters, TAE", "M", sum(p.numel() for p in tae.parameters()) / 1e6),
        ("tokens a clip, of video", "", tokens),
        ("tokens a clip, of text", "", preset.dit.max_bytes // FOLD),
        ("FLOPs a clip, forward", "T", F_forward / 1e12),
        ("FLOPs a clip, training step", "T", *(flops / 1e12 for flops in training)),
        ("FLOPs a clip, encoding it and its flow", "T", 2 * F_encode / 1e12),
        *((name, "GB", size / 1e9) for name, size in memory.items()),
        (f"  activations of {clips} clips", "GB", *(clips * size / 1e9 for size in kept)),
        ("  in all", "GB", *((sum(memory.values()) + clips * size) / 1e9 for size in kept)),
        ("stage tae: a clip, and a layer's", "GB", *(size / 1e9 for size in coded)),
        ("time", "h", *(time / world for time in hours)),
        ("time of all GPUs together", "h", *hours)]
    print(f"{args.preset} on {world} GPUs, VideoJAM fine-tuning of {steps} steps x {batch} clips "
          f"of {preset.frames} x {preset.size} x {preset.size}")
    for name, unit, *values in rows:
        print(f"  {name:<36}" + ", with recomputation ".join(
            f"{value:,.{0 if isinstance(value, int) else 3}f} {unit}" for value in values))
    print(f"assumed: {args.tflops:g} TFLOP/s sustained on each GPU (--tflops); backward is twice "
          "forward; bf16 activations as the unfused graph keeps them (compiled blocks keep less); "
          "fp32 weights, gradients, moments and average sharded over all GPUs; no time lost "
          "waiting; text of the longest prompt, a byte a token (words are filled up: about a third "
          "more); fragmentation and the framework's own GB or two on top")


# ---------------------------------------------------------------- command line

def parse():
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--preset", default="toy", help=f"one of {', '.join(PRESETS)}")
    parser.add_argument("--data", help="folder of videos and captions; default: the sprite world")
    parser.add_argument("--out", help="folder of the run; default: runs/PRESET, or runs/DATA")
    parser.add_argument("--stage", choices=STAGES, help="this one alone; default: all, in order")
    parser.add_argument("--init", metavar="BUNDLE", help="a model.pt whose TAE is taken and whose "
                        "DiTs the stages start from")
    parser.add_argument("--steps", type=int, help="of each stage run (encode: clips; with --data, "
                        "of each video)")
    parser.add_argument("--lr", type=float, help="learning rate of each stage run")
    parser.add_argument("--batch", type=int, help="clips in a step of each stage run, on all "
                        "GPUs; with --stage encode, on each")
    parser.add_argument("--accumulate", type=int, default=1, help="parts that a process's share of "
                        "the batch is computed in, one after the other")
    parser.add_argument("--flow", choices=("exact", "raft"), help="where motion comes from; "
                        "default: exact for the sprite world; videos have RAFT's")
    parser.add_argument("--rich", type=float, default=0., help="sprite world: share of textured "
                        "backgrounds, and of scenes with several sprites (default %(default)s: "
                        "what minutes are enough for; the shipped weights' is 0.2)")
    parser.add_argument("--uniform-t", action=argparse.BooleanOptionalAction, help="uniform t, or "
                        "logit-normal; default: uniform for the toy")
    parser.add_argument("--t-shift", type=float, help="above 1: more t near noise (default: 3 for "
                        "the toy, else 1)")
    parser.add_argument("--motion-dropout", type=float, default=.2, help="jam: share of samples "
                        "without motion (default %(default)s, the paper's)")
    parser.add_argument("--sigma", type=float, default=.15, help="of Eq. 5: motion of this share "
                        "of the diagonal has full colour (default %(default)s, the paper's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=4, help="threads that read data ahead")
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument("--precision", choices=("bf16", "fp32"), help="of matrix products "
                        "(RAFT's apart); default: bf16 where the device is fast at it")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction,
                        help="torch.compile each block; default: where a C++ compiler is")
    parser.add_argument("--recompute", action=argparse.BooleanOptionalAction, help="activation "
                        "checkpointing of each block; default: for 4b and 30b")
    parser.add_argument("--replicas", type=int, default=1, help="hybrid sharding: groups of GPUs "
                        "that hold a whole model each")
    parser.add_argument("--dry-run", action="store_true", help="print what the preset would take")
    parser.add_argument("--world", type=int, default=1, help="dry run: GPUs")
    parser.add_argument("--tflops", type=float, default=400, help="dry run: sustained by a GPU")
    args = parser.parse_args()
    preset = preset_of(args.preset)
    for name in ("steps", "lr", "batch", "accumulate", "workers", "replicas", "world", "tflops",
                 "t_shift", "sigma"):
        if getattr(args, name) is not None and not 0 < getattr(args, name) < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} must be positive, got "
                             f"{getattr(args, name)}")
    for name in ("rich", "motion_dropout"):
        if not 0 <= getattr(args, name) <= 1:
            raise ValueError(f"--{name.replace('_', '-')} must be from 0 to 1, got "
                             f"{getattr(args, name)}")
    for name in ("data", "out", "init"):
        if getattr(args, name) == "":
            raise ValueError(f"--{name} is empty: leave it out, or name one")
    if not abs(args.seed) < 2 ** 62:
        raise ValueError(f"--seed must be below 2^62, got {args.seed}")
    if args.data:
        args.data = str(Path(args.data).resolve())
    if args.data and args.flow == "exact":
        raise ValueError("--flow exact: only the sprite world knows its motion, videos take raft")
    args.flow = args.flow or ("raft" if args.data else "exact")
    args.out = args.out or f"runs/{Path(args.data).name if args.data else args.preset}"
    if args.uniform_t is None:          # where a toy's few latents lie is decided before t = .1,
        args.uniform_t = args.preset == "toy"       # of which logit-normal samples only 1.4%
    if args.t_shift is None:
        args.t_shift = 3. if args.preset == "toy" else 1.
    args.device = device_of(args.device)
    if args.compile is None:
        args.compile = can_compile(args.device)
    if args.recompute is None:
        args.recompute = recomputes(preset)
    args.precision = {"bf16": torch.bfloat16, "fp32": torch.float32,
                      None: fast_dtype(args.device)}[args.precision]
    return args


def join(backend):
    """Joins torchrun's processes, in a corner of its store that is new to this attempt: torch 2.13
    keeps the store when `--max-restarts` starts processes again, which would then wait for dead
    ones at the addresses they left there (the number of restarts is no name for the corner: nodes
    count apart). Rank 0 names it; nobody takes an old name, since each waits for the answer to a
    question of its own."""
    store, number, processes = next(rendezvous("env://"))
    mine = uuid.uuid4().hex
    if number == 0:
        for other in range(1, processes):
            while not store.check([f"{mine} was taken by {other}"]):
                question = store.get(f"question of {other}").decode()   # perhaps a dead one's yet
                store.set(f"answer to {question}", mine)
                time.sleep(.01)
    else:
        store.set(f"question of {number}", mine)
        mine = store.get(f"answer to {mine}").decode()
        store.set(f"{mine} was taken by {number}", "")
    dist.init_process_group(backend, store=dist.PrefixStore(mine, store), rank=number,
                            world_size=processes, timeout=datetime.timedelta(hours=1))


def main():
    args = parse()
    if args.dry_run:
        return dry_run(args)
    if "RANK" in os.environ:                                            # torchrun started us
        if args.device.type == "cuda":
            local, GPUs = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            if local >= GPUs:
                raise ValueError(f"this machine has {GPUs} GPUs: --nproc_per_node={GPUs} at most")
            args.device = torch.device("cuda", local)
            torch.cuda.set_device(args.device)
        join("nccl" if args.device.type == "cuda" else "gloo")
    run = Run(args)
    for stage in [args.stage] if args.stage else STAGES:
        start = time.time()
        run.refuse_lag()
        if stage == "tae":
            train_tae(run)
        elif stage == "encode":
            encode(run)
        else:
            train_dit(run, stage)
            run.export()
        say(f"{stage}: {time.time() - start:.0f} s")
    say(f"{run.out}: done")
    if dist.is_initialized():
        dist.destroy_process_group()
        # all is written: end here, since torch 2.13's gloo threads may abort a process ("terminate
        # called", 1 in 16 on a busy core) that winds down, and torchrun would call that a failure
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    report_errors(main)

"""Data from files: folders of own videos, the latents that `encode` wrote, and prefetching threads.

A dataset, `Sprites` or `Folder`, has clips under keys:

    keys(n)             what encode takes: n clips of the sprite world, or of each video
    read(keys)          video (n, T, 3, H, W) in [0, 1], captions, what `motion` takes, {key: why it
                        was skipped}
    motion(video, ...)  RGB flow (n, T, 3, H, W) in [0, 1], Eq. 5
    training(indices)   clips 0, 1, 2, ... of the TAE's training, as `read`
    held_out(n)         clips for previews, as `read`
    caption(key, old)   a clip's caption of now; None if its video is gone or has changed
"""
import collections
import concurrent.futures
import contextlib
import csv
import functools
import json
import os
import time
import zlib
from pathlib import Path

import numpy as np
import torch
from imageio_ffmpeg import count_frames_and_secs
from tqdm import tqdm

from common import barrier, open_video, print0, rank, read_json, write_text
from flow import estimate_flow, flow_to_rgb
from synthetic import HELD_OUT, sprite_clips
from videojam import tokenize

SUFFIXES = {".mp4", ".mov", ".webm", ".avi", ".gif", ".mkv", ".m4v", ".mpg", ".mpeg"}
CAPTION_COLUMNS = ("text", "caption", "prompt")
CACHE_BYTES = 2 ** 28                   # of decoded clips, and of their flow

# ---------------------------------------------------------------- a folder of videos

def open_text(path):
    """Text of any editor: without a byte-order mark, bytes that are not UTF-8 as surrogates."""
    return open(path, newline="", encoding="utf-8-sig", errors="surrogateescape")

def read_metadata(path):
    """[(file name, caption), ...] of a metadata.csv or .jsonl, as Hugging Face's videofolder."""
    rows = []
    try:
        with open_text(path) as file:
            for row in csv.DictReader(file, strict=True) if path.suffix == ".csv" else \
                    map(json.loads, filter(str.strip, file)):
                if not isinstance(row, dict):
                    raise ValueError("must be an object, {...}")
                if None in row:
                    raise ValueError('more fields than in the first line: "quote" captions with '
                                     'commas')
                rows.append(row)
    except (csv.Error, ValueError) as error:
        raise ValueError(f"{path}: row {len(rows) + 1}: {getattr(error, 'msg', error)}") from None
    names = list(dict.fromkeys(name for row in rows for name in row))
    column = next((name for name in CAPTION_COLUMNS if name in names), None)
    if not column or "file_name" not in names:
        raise ValueError(f"{path}: needs rows with file_name and one of "
                         f"{', '.join(CAPTION_COLUMNS)}, has "
                         f"{', '.join(map(repr, names)) or 'no rows'}")
    return [(str(row.get("file_name") or ""), row.get(column)) for row in rows]

def find_videos(folder):
    """What a folder offers: its layout's name and [(file name, caption or None), ...]. Layouts:
    metadata.csv or metadata.jsonl; prompts.txt and videos.txt, line by line; or a .txt beside each
    video, in folders inside the folder too."""
    folder = Path(folder)
    for path in (folder / "metadata.csv", folder / "metadata.jsonl"):
        if path.is_file():
            return path.name, read_metadata(path)
    if (folder / "prompts.txt").is_file() and (folder / "videos.txt").is_file():
        names, texts = ([line.rstrip("\r\n") for line in open_text(folder / name)]
                        for name in ("videos.txt", "prompts.txt"))
        if len(names) != len(texts):
            raise ValueError(f"{folder}: videos.txt has {len(names)} lines, prompts.txt has "
                             f"{len(texts)}: one caption a video")
        return "videos.txt and prompts.txt", list(zip(names, texts))
    found = [(str(path.relative_to(folder)), open_text(text).read() if text.is_file() else None)
             for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES
             for text in [path.with_suffix(".txt")]]
    if not found:
        raise ValueError(f"{folder}: no videos in it, nor metadata.csv, metadata.jsonl, or "
                         f"prompts.txt with videos.txt")
    return "a .txt beside each video", found

def examine(path, caption, preset, known):
    """{caption, stamp, frames at the preset's rate} of a video; or `known`, an earlier result, if
    nothing has changed. ValueError says why a video cannot be used."""
    caption = " ".join(caption.split()) if isinstance(caption, str) else ""
    if not caption:
        raise ValueError("no caption")
    if caption.encode(errors="ignore").decode() != caption:
        raise ValueError("its caption is not UTF-8")
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError("not a video by its name")
    if not os.path.isfile(path):                # Path.is_file raises for a name that is too long
        raise ValueError("no such file")
    status = path.stat()
    entry = {"caption": caption, "stamp": [status.st_size, status.st_mtime_ns, preset.fps,
                                           preset.frames]}
    if entry.items() <= known.items():
        return known
    if not status.st_size:
        raise ValueError("an empty file")
    try:
        seconds = open_video(path)[0]["duration"] or count_frames_and_secs(str(path))[1]
    except Exception:                           # whatever the decoder says of a broken file
        raise ValueError("cannot be decoded") from None
    frames = int(seconds * preset.fps + .1)
    if frames < preset.frames:
        raise ValueError(f"too short: a clip takes {preset.frames} frames, {preset.fps} a second")
    return {**entry, "frames": frames}

def read_clip(path, start, frames, fps, size):
    """(frames, 3, size, size) uint8: frame k is what the file shows at (start + k) / fps seconds,
    scaled, its middle square. ValueError where it cannot be decoded."""
    # ffmpeg seeks two seconds ahead, to know what is shown at the start. Some decoders need the
    # file's first frame, and show grey and green without it: then from the beginning
    for lead, strict in ((min(start, 2 * fps), ["-xerror", "-err_detect", "explode"]), (start, [])):
        filters = (f"fps={fps}:round=up,trim=start={max(0, lead - .5) / fps:.4f},"
                   f"setpts=PTS-STARTPTS,tpad=stop=1:stop_mode=clone,format=rgb24,"
                   f"scale={size}:{size}:force_original_aspect_ratio=increase,crop={size}:{size}")
        video = []
        with contextlib.suppress(Exception):    # whatever the decoder says of a broken file
            video = list(open_video(
                path, input_params=[*strict, "-ss", f"{(start - lead) / fps:.4f}"],
                # -r, because `trim` forgets the rate up to ffmpeg 7.0
                output_params=["-vf", filters, "-frames:v", str(frames), "-r", str(fps)])[1])
        if len(video) == frames:
            return torch.stack(video)
    raise ValueError(f"{len(video)} of {frames} frames can be decoded from {start / fps:.1f} s on: "
                     f"damaged, cut off, or has longer sound?")

def print_skipped(reasons):
    """Prints {name: reason}: a line a reason, the most frequent first."""
    names = collections.defaultdict(list)
    for name, reason in reasons.items():
        names[reason].append(name)
    for reason, group in sorted(names.items(), key=lambda item: -len(item[1])):
        print0(f"  skipped {len(group)}: {reason}: {', '.join(group[:3])}"
               + f" and {len(group) - 3} more" * (len(group) > 3))

# ---------------------------------------------------------------- datasets

class Sprites:
    """The sprite world, endless: clip i is seed i, with its exact flow."""
    def __init__(self, preset, clutter):
        self.preset, self.clutter = preset, clutter

    def keys(self, n):
        return list(range(n))

    def caption(self, key, old):
        return old

    def read(self, keys):
        video, flow, captions, _ = sprite_clips(keys, self.preset.frames, self.preset.size,
                                                self.clutter)
        return video, captions, flow, {}

    training = read

    def held_out(self, n):
        return self.read(range(HELD_OUT, HELD_OUT + n))

    def motion(self, video, flow):
        return flow_to_rgb(flow.to(video.device), self.preset.sigma)

class Folder:
    """A folder of videos, their flow by RAFT. A key is (file name, first frame, file size): a file
    of another size is another video. `listing`: the file in which it says what it found."""
    def __init__(self, folder, preset, raft, listing, workers):
        self.folder, self.preset, self.raft = Path(folder), preset, raft
        if rank() == 0:
            self.examine_all(Path(listing), workers)
        barrier()
        entries = read_json(Path(listing))
        self.videos = {name: entry for name, entry in entries.items() if "frames" in entry}
        if not self.videos:
            raise ValueError(f"{folder}: none of its {len(entries)} videos can be used")
        # the TAE's training sees clips again
        cached = functools.lru_cache(CACHE_BYTES // (preset.frames * 3 * preset.size ** 2))
        self.read_cached, self.flow_cached = cached(self.read_one), cached(self.flow_of)
        # hash order, so that the clips of added videos interleave
        self.order = sorted(self.keys(64), key=lambda key: zlib.crc32(repr(key).encode()))

    def examine_all(self, path, workers):
        """Writes {name: {caption, stamp, frames} or {reason}}; opens what has changed alone."""
        layout, found = find_videos(self.folder)
        before, listing = read_json(path) if path.is_file() else {}, {}

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
        listed = {os.path.normpath(self.folder / name) for name, _ in found}
        for other in sorted(self.folder.rglob("*")):
            if other.suffix.lower() in SUFFIXES and os.path.normpath(other) not in listed:
                listing[str(other.relative_to(self.folder))] = {"reason": f"not in {layout}"}
        write_text(path, json.dumps(listing, indent=1))
        used = [one for one in listing.values() if "frames" in one]
        print0(f"{self.folder}: {len(listing)} videos ({layout}), {len(used)} used, "
               f"{sum(one['frames'] for one in used) / self.preset.fps:.0f} s, "
               f"{len(listing) - len(used)} skipped")
        print_skipped({name: one["reason"] for name, one in listing.items() if "reason" in one})

    def keys(self, n):
        """n clips of each video, or all there are, at random offsets."""
        keys = []
        for name, video in self.videos.items():
            room = video["frames"] - self.preset.frames + 1
            starts = np.random.default_rng(zlib.crc32(os.fsencode(name))).permutation(room)[:n]
            keys += [(name, int(start), video["stamp"][0]) for start in starts]
        return keys

    def caption(self, key, old):
        name, _, size = key
        video = self.videos.get(name)
        return video["caption"] if video and video["stamp"][0] == size else None

    def read_one(self, key):
        name, start, _ = key
        return read_clip(self.folder / name, start, self.preset.frames, self.preset.fps,
                         self.preset.size)

    def flow_of(self, key):
        return (self.motion(self.read_cached(key)[None] / 255)[0] * 255).round().byte().cpu()

    def read(self, keys):
        videos, captions, skipped = [], [], {}
        for key in map(tuple, keys):
            try:
                videos.append(self.read_one(key))
                captions.append(self.videos[key[0]]["caption"])
            except ValueError as error:
                skipped[key] = str(error)
        shape = self.preset.frames, 3, self.preset.size, self.preset.size
        video = torch.stack(videos) / 255 if videos else torch.zeros(0, *shape)
        return video, captions, None, skipped

    def training(self, indices):
        """As `read`; where a clip cannot be decoded, the next one that can stands in."""
        def first(i):
            for k in range(len(self.order)):
                key = self.order[(i + k) % len(self.order)]
                with contextlib.suppress(ValueError):
                    return key, self.read_cached(key)
            raise ValueError(f"{self.folder}: none of its videos can be decoded")

        keys, videos = zip(*map(first, indices))
        return torch.stack(videos) / 255, [self.videos[key[0]]["caption"] for key in keys], keys, {}

    def held_out(self, n):                      # few videos: previews show clips of the training
        return self.training(range(n))

    def motion(self, video, keys=None):
        """The flow of clips from `training`, which have keys, is cached."""
        if keys is None:
            return flow_to_rgb(estimate_flow(self.raft, video), self.preset.sigma)
        return torch.stack([self.flow_cached(key) for key in keys]).to(video.device) / 255

# ---------------------------------------------------------------- latents, prefetching

class Latents:
    """What encode wrote, memory-mapped: x, d (C, T', H', W') and the caption of each clip. Captions
    are the dataset's of now; clips whose video is gone or has changed are left out."""
    def __init__(self, folder, dataset):
        self.folder, self.captions, self.places, self.skipped = folder, [], [], {}
        self.shards = sorted(path.stem for path in folder.glob("[0-9]*.json"))
        for shard in self.shards:
            content = read_json(folder / f"{shard}.json", "keys", "captions", "skipped")
            self.skipped |= content["skipped"]
            for row, old in enumerate(zip(content["keys"], content["captions"])):
                if (caption := dataset.caption(*old)) is not None:
                    self.captions.append(caption)
                    self.places.append((shard, row))
        self.open = functools.lru_cache(512)(self.open)         # each keeps a file open

    def open(self, shard, kind):
        path = self.folder / f"{shard}.{kind}.npy"
        try:
            return np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError):
            raise ValueError(f"{path}: damaged or gone: delete {shard}.json beside it and run "
                             f"--stage encode again") from None

    def batch(self, indices, max_bytes):
        """x1, d1 (n, C, T', H', W') and tokens (n, L) of some clips."""
        x1, d1 = (torch.from_numpy(np.stack([self.open(shard, kind)[row] for shard, row in (
            self.places[i] for i in indices)])).float() for kind in "xd")
        return x1, d1, tokenize([self.captions[i] for i in indices], max_bytes)

class Prefetcher:
    """load(item) of each item, in order, some of them ahead in threads (decoding waits for ffmpeg,
    copying releases the interpreter). `waited`: seconds that the consumer waited for them."""
    def __init__(self, load, items, workers):
        self.load, self.items, self.workers, self.waited = load, items, workers, 0.

    def __iter__(self):
        # one torch thread each: more would compete with the training's
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

"""Data from files: folders of own videos, the latents that `encode` wrote, and prefetching threads.

A dataset, `Sprites` or `Folder`, has clips under keys:

    keys(n)             what encode takes: n clips of the sprite world, or of each video
    read(keys)          video (n, T, 3, H, W) in [0, 1], captions, what `motion` needs beside the
                        video, {key: why it was skipped}
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
import hashlib
import itertools
import json
import os
import time
import zlib
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common import (barrier, frames_and_rate, open_video, print0, rank, read_json,
                    video_header, world_size, write_file, write_text)
from flow import estimate_flow, flow_to_rgb, stream_flow
from synthetic import HELD_OUT, sprite_clips
from videojam import tokenize

SUFFIXES = {f".{name}" for name in (
    "mp4 m4v mov qt mkv webm avi gif webp apng mpg mpeg m1v m2v vob ts mts m2ts wmv asf flv f4v "
    "ogv 3gp 3g2 mxf dv y4m nut ivf mjpeg h264 hevc rm").split()}
SYSTEM_FOLDERS = {"__macosx", "@eadir", "#recycle", "#snapshot", "$recycle.bin", "recycler",
                  "system volume information", "lost+found"}      # and what begins with a dot
EXAMINED_BETWEEN_WRITES = 1000      # videos
CAPTION_COLUMNS = ("text", "caption", "prompt")
CAPTION_FILES = ("prompts.txt", "prompt.txt", "captions.txt", "caption.txt")

# ---------------------------------------------------------------- what a folder holds

def open_text(path):
    """Text of any editor: without a byte-order mark, bytes that are not UTF-8 as surrogates."""
    return open(path, newline="", encoding="utf-8-sig", errors="surrogateescape")

def read_metadata(path):
    """[(file name, caption), ...] of a metadata.csv or .jsonl, as Hugging Face's videofolder."""
    rows = []
    try:
        with open_text(path) as file:
            for row in csv.DictReader(file, strict=True, skipinitialspace=True) \
                    if path.suffix == ".csv" else map(json.loads, filter(str.strip, file)):
                if not isinstance(row, dict):
                    raise ValueError("must be an object, {...}")
                if None in row:
                    raise ValueError('too many commas: write captions in "quotes"')
                rows.append({str(name).strip(): value for name, value in row.items()})
    except (csv.Error, ValueError) as error:
        raise ValueError(f"{path}: row {len(rows) + 1}: {getattr(error, 'msg', error)}") from None
    names = list(dict.fromkeys(name for row in rows for name in row))
    column = next((name for name in CAPTION_COLUMNS if name in names), None)
    if not column or "file_name" not in names:
        raise ValueError(f"{path}: needs rows with file_name and one of "
                         f"{', '.join(CAPTION_COLUMNS)}, has "
                         f"{', '.join(map(repr, names)) or 'no rows'}")
    return [(str(row.get("file_name") or "").strip(), row.get(column)) for row in rows]

def video_files(folder):
    """Names of the video files in a folder and in its folders, but for hidden and system ones."""
    def shown(name):
        return not name.startswith(".") and name.lower() not in SYSTEM_FOLDERS

    seen, names = set(), []
    for here, folders, files in os.walk(folder, followlinks=True):
        new = os.path.realpath(here) not in seen                # links may lead in circles
        seen.add(os.path.realpath(here))
        folders[:] = sorted(filter(shown, folders)) if new else []
        names += [os.path.relpath(os.path.join(here, name), folder) for name in files
                  if new and shown(name) and Path(name).suffix.lower() in SUFFIXES]
    return sorted(names)

def find_videos(folder):
    """What a folder offers: its layout's name and [(file name, caption or None), ...]. Layouts:
    metadata.csv or metadata.jsonl, also one folder down; videos.txt and prompts.txt, line by line;
    or a .txt beside each video, in folders inside the folder too."""
    texts = [name for name in CAPTION_FILES if (folder / name).is_file()]
    tables = [*folder.glob("metadata.csv"), *folder.glob("metadata.jsonl")][:1] or \
        sorted([*folder.glob("[!.]*/metadata.csv"), *folder.glob("[!.]*/metadata.jsonl")])
    if tables:
        layout = ", ".join(str(table.relative_to(folder)) for table in tables)
        found = [(name and str(table.parent.relative_to(folder) / name), caption)
                 for table in tables for name, caption in read_metadata(table)]
    elif (folder / "videos.txt").is_file():
        if not texts:
            raise ValueError(f"{folder}: has videos.txt, but no prompts.txt with a caption a line")
        names, captions = ([line.rstrip("\r\n") for line in open_text(folder / name)]
                           for name in ("videos.txt", texts[0]))
        if len(names) != len(captions):
            raise ValueError(f"{folder}: {len(names)} lines in videos.txt, {len(captions)} in "
                             f"{texts[0]}: one caption a video")
        layout, found = f"videos.txt and {texts[0]}", zip(names, captions)
    else:
        layout, found = "a .txt beside each video", []
        for name in video_files(folder):
            text = (folder / name).with_suffix(".txt")
            found.append((name, open_text(text).read() if text.is_file() else None))
        if not found:
            raise ValueError(f"{folder}: no videos in it, nor metadata.csv, .jsonl or videos.txt")
        if texts and not any(caption for _, caption in found):
            raise ValueError(f"{folder}: has {texts[0]}, but no videos.txt with a file name a line")
    return layout, [(name and os.path.normpath(name), caption) for name, caption in found]

# ---------------------------------------------------------------- a video of a folder

def video_seconds(path):
    """How long a video file's picture is. ValueError: it cannot be decoded."""
    def is_shown(at):
        seek = ["-noaccurate_seek", "-ss", f"{max(0, at):.2f}"]
        return any(True for _ in open_video(path, "fps=8:start_time=0", seek))
    seconds = video_header(path)["duration"]
    if not seconds or not is_shown(seconds - .5) or is_shown(seconds + .2):
        frames, rate = frames_and_rate(path)    # the header counts longer sound, or is wrong
        seconds = frames / (rate or 1)
    return seconds

def examine(path, caption, preset, known):
    """A video's {caption, stamp, frames at the preset's rate or the reason why it is too short}; or
    `known`, an earlier result, if nothing has changed. ValueError: it cannot be used."""
    caption = " ".join(caption.split()) if isinstance(caption, str) else ""
    if not caption:
        raise ValueError("no caption")
    if caption.encode(errors="ignore").decode() != caption:
        raise ValueError("its caption is not UTF-8")
    if not os.path.isfile(path):                # Path.is_file raises for a name that is too long
        raise ValueError("no such file")
    status = path.stat()
    stamp = [status.st_size, status.st_mtime_ns, preset.fps, preset.frames]
    entry = {"caption": caption, "stamp": stamp}
    if entry.items() <= known.items():
        return known
    seconds = video_seconds(path)
    frames = int(seconds * preset.fps + .1)
    short = f"too short: {seconds:.1f} s, needs {preset.frames / preset.fps:.1f} s"
    return entry | ({"frames": frames} if frames >= preset.frames else {"reason": short})

def decode(path, first, frames, fps, size, before=()):
    """What can be decoded of read_clip's frames, a list. before: ffmpeg's options."""
    H, W = np.broadcast_to(size, 2)
    filters = (f"fps={fps}:round=up:start_time=0,tpad=stop=1:stop_mode=clone,format=rgb24,"
               f"scale={W}:{H}:force_original_aspect_ratio=increase,crop={W}:{H}")
    clip, shown = [], open_video(path, filters, before, ["-frames:v", str(first + frames)])
    with contextlib.suppress(ValueError):
        clip.extend(itertools.islice(shown, first, None))
    return clip

def read_clip(path, start, frames, fps, size):
    """(frames, 3, H, W) uint8: frame k is what the file shows at (start + k) / fps seconds, scaled,
    its middle. size: (H, W), or one number for both. ValueError where it cannot be decoded."""
    # from the last key frame before the start; some decoders need the file's first frame, and show
    # grey and green without it: then from the beginning
    seek = ["-xerror", "-err_detect", "explode", "-noaccurate_seek", "-ss", f"{start / fps:.4f}"]
    clip = decode(path, 0, frames, fps, size, seek if start else ())
    if len(clip) < frames and start:
        clip = decode(path, start, frames, fps, size)
    if len(clip) < frames:
        raise ValueError(f"{len(clip)} of {frames} frames can be decoded from {start / fps:.1f} s")
    return torch.stack(clip)

def print_skipped(reasons):
    """Prints {name: reason}: a line a reason, the most frequent first."""
    for reason, count in collections.Counter(reasons.values()).most_common():
        names = [name for name, why in reasons.items() if why == reason]
        print0(f"  skipped {count}: {reason}: {', '.join(names[:3])}" + ", ..." * (count > 3))

# ---------------------------------------------------------------- datasets

class Sprites:
    """The sprite world, endless: clip i is seed i, with its exact flow."""
    example = "a red square moves left"
    def __init__(self, preset, clutter):
        self.preset, self.clutter = preset, clutter

    def keys(self, n):
        return list(range(n))

    def caption(self, key, old):
        return old

    def read(self, keys):
        preset = self.preset
        video, flow, captions, _ = sprite_clips(keys, preset.frames, preset.size, self.clutter,
                                                appearance=preset.appearance, target=preset.target)
        return video, captions, flow, {}

    training = read

    def held_out(self, n):
        return self.read(range(HELD_OUT, HELD_OUT + n))

    def motion(self, video, flow):
        return flow_to_rgb(flow.to(video.device), self.preset.sigma)

class Folder:
    """A folder of videos. A key is (file name, first frame, file size): a file of another size is
    another video. Their flow is RAFT's: of the first `limit` frames in all it is estimated once
    and kept in files, with the frames. takes_all: whether clips beyond them are used too, whose
    flow is then estimated each time they are read."""
    def __init__(self, folder, preset, raft, out, workers, limit, takes_all):
        self.folder, self.preset, self.raft = Path(folder), preset, raft
        self.cache, self.takes_all = out / "clips", takes_all
        if rank() == 0:
            self.examine_all(out / "videos.json", workers)
        barrier()
        entries = read_json(out / "videos.json")
        self.videos = {name: entry for name, entry in entries.items() if "frames" in entry}
        self.prepare(limit, workers)
        # hash order, so that the clips of added videos interleave
        self.order = sorted(self.keys(64), key=lambda key: zlib.crc32(repr(key).encode()))
        if not self.order:
            raise ValueError(f"{folder}: none of its {len(entries)} videos can be used")
        self.example = self.videos[self.order[0][0]]["caption"]

    def examine_all(self, path, workers):
        """Writes {name: {caption, stamp, frames} or {reason}}; opens what has changed alone."""
        layout, found = find_videos(self.folder)
        before, listing = read_json(path) if path.is_file() else {}, {}
        if before and found and before.keys().isdisjoint(name for name, _ in found):
            raise ValueError(f"{path.parent}: was begun with other videos, none of them is in "
                             f"{self.folder}: take another --out, or delete it")

        def entry(name, caption):
            try:
                return examine(self.folder / name, caption, self.preset, before.get(name, {}))
            except ValueError as error:
                return {"reason": str(error)}

        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            entries = tqdm(pool.map(entry, *zip(*found)), "examining videos", len(found))
            for row, ((name, _), result) in enumerate(zip(found, entries), 1):
                if not name:
                    name = f"row {row}, without file_name"
                elif name in listing:
                    name, result = f"{name} (row {row})", {"reason": "listed twice"}
                listing[name] = result
                if row % EXAMINED_BETWEEN_WRITES == 0:      # so an interrupted look goes on
                    write_text(path, json.dumps({**before, **listing}))
        for other in sorted(set(video_files(self.folder)) - {name for name, _ in found}):
            listing[other] = {"reason": f"not in {layout}"}
        write_text(path, json.dumps(listing, indent=1))
        used = [result for result in listing.values() if "frames" in result]
        print0(f"{self.folder}: {len(listing)} videos ({layout}), {len(used)} used, "
               f"{sum(result['frames'] for result in used) / self.preset.fps:.0f} s, "
               f"{len(listing) - len(used)} skipped")
        print_skipped({name: result["reason"] for name, result in listing.items()
                       if "reason" in result})

    def prepare(self, limit, workers):
        """Writes the first frames of the videos and their RGB flow, a file (2, n, 3, H, W) uint8
        each, until there are about `limit` frames: of a video at most a quarter of `limit`, or one
        clip where that is longer. `prepared`: {name: (file, n)}."""
        T, S, fps, wanted, paths = self.preset.frames, self.preset.size, self.preset.fps, {}, {}
        for name in sorted(self.videos, key=lambda name: zlib.crc32(os.fsencode(name))):
            if sum(wanted.values()) < limit:
                wanted[name] = min(self.videos[name]["frames"], max(T, limit // 4))
                key = repr((name, self.videos[name]["stamp"], wanted[name], S)).encode()
                paths[name] = self.cache / f"{hashlib.md5(key).hexdigest()}.npy"
        missing = [name for name in paths if not paths[name].exists()][rank()::world_size()]
        barrier()                               # all have looked before any is made
        self.cache.mkdir(exist_ok=True)
        read = Prefetcher(lambda name: decode(self.folder / name, 0, wanted[name], fps, S), missing,
                          workers)
        with tqdm(total=sum(map(wanted.get, missing)), desc="flow of the videos", unit="frame",
                  disable=rank() > 0 or not missing) as bar:
            for name, video in zip(missing, read):
                if len(video) >= T:
                    rgb = []
                    for _, _, flow in stream_flow(self.raft, (frame / 255 for frame in video)):
                        flow = flow_to_rgb(flow, self.preset.sigma)
                        rgb.append((flow * 255).round().byte().cpu())
                        bar.update()
                    both = torch.stack([torch.stack(video), torch.stack([*rgb, rgb[-1]])]).numpy()
                    write_file(paths[name], lambda temporary: np.save(temporary, both))
        barrier()
        self.prepared = {name: (path, np.load(path, mmap_mode="r").shape[1])
                         for name, path in paths.items() if path.exists()}
        done = sum(frames for _, frames in self.prepared.values())
        if done < (of := sum(video["frames"] for video in self.videos.values())):
            print0(f"{done} of {of} frames, of {len(self.prepared)} of {len(self.videos)} videos, "
                   "have their flow: --prepare takes more"
                   + ", the others' is estimated when it is needed" * self.takes_all)

    def keys(self, n):
        """n clips of each video, or all there are, at random offsets."""
        keys = []
        for name, video in self.videos.items():
            _, frames = self.prepared.get(name, (None, 0))
            room = (video["frames"] if self.takes_all else frames) - self.preset.frames + 1
            starts = np.random.default_rng(zlib.crc32(os.fsencode(name))).permutation(max(0, room))
            keys += [(name, int(start), video["stamp"][0]) for start in starts[:n]]
        return keys

    def caption(self, key, old):
        name, _, size = key
        video = self.videos.get(name)
        return video["caption"] if video and video["stamp"][0] == size else None

    def clip(self, key):
        """Frames (T, 3, H, W) uint8; motion or None; caption. ValueError: not decoded."""
        (name, start, _), T, motion = key, self.preset.frames, None
        path, frames = self.prepared.get(name, (None, 0))
        if start + T <= frames:                 # not kept open: there may be thousands
            both = np.load(path, mmap_mode="r")[:, start:start + T].copy()
            video, motion = torch.from_numpy(both)
            motion[-1] = motion[-2]             # as of every clip, the last flow is repeated
        else:
            video = read_clip(self.folder / name, start, T, self.preset.fps, self.preset.size)
        return video, motion, self.caption(key, None)

    def read(self, keys):
        clips, skipped = [], {}
        for key in map(tuple, keys):
            try:
                clips.append(self.clip(key))
            except ValueError as error:
                skipped[key] = str(error)
        videos, motions, captions = map(list, zip(*clips)) if clips else ([], [], [])
        return torch.stack(videos) / 255 if clips else torch.zeros(0), captions, motions, skipped

    def training(self, indices):
        """As `read`; where a clip cannot be decoded, the next one that can stands in."""
        def first(i):
            for k in range(len(self.order)):
                with contextlib.suppress(ValueError):
                    return self.clip(self.order[(i + k) % len(self.order)])
            raise ValueError(f"{self.folder}: none of its videos can be decoded")

        videos, motions, captions = map(list, zip(*map(first, indices)))
        return torch.stack(videos) / 255, captions, motions, {}

    def held_out(self, n):                      # few videos: previews show clips of the training
        return self.training(range(n))

    def motion(self, video, motions):
        return torch.stack([flow_to_rgb(estimate_flow(self.raft, clip[None]), self.preset.sigma)[0]
                            if motion is None else motion.to(video.device) / 255
                            for clip, motion in zip(video, motions)])

# ---------------------------------------------------------------- latents, prefetching

class Latents:
    """What encode wrote, memory-mapped: x, d (C, T', H', W') and the caption of each clip. Captions
    are the dataset's of now; clips whose video is gone or has changed are left out."""
    def __init__(self, folder, dataset):
        self.folder, self.captions, self.places, self.skipped = folder, [], [], {}
        self.changed = 0                        # clips whose caption or video is not encode's
        self.shards = sorted(path.stem for path in folder.glob("[0-9]*.json"))
        for shard in self.shards:
            content = read_json(folder / f"{shard}.json", "keys", "captions", "skipped")
            self.skipped |= content["skipped"]
            for row, old in enumerate(zip(content["keys"], content["captions"])):
                caption = dataset.caption(*old)
                self.changed += caption != old[1]
                if caption is not None:
                    self.captions.append(caption)
                    self.places.append((shard, row))
        self.open = functools.lru_cache(64)(self.open)          # each keeps a file open

    def open(self, shard, kind):
        path = self.folder / f"{shard}.{kind}.npy"
        try:
            return np.load(path, mmap_mode="r")
        except (FileNotFoundError, ValueError, EOFError):
            raise ValueError(f"{path}: damaged, delete {shard}.json, run --stage encode") from None

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
        jobs = (pool.submit(self.load, item) for item in self.items)    # each begins when taken
        try:
            pending = collections.deque(itertools.islice(jobs, self.workers + 1))
            while pending:
                start = time.time()
                result = pending.popleft().result()
                self.waited += time.time() - start
                yield result
                pending.extend(itertools.islice(jobs, 1))
        finally:
            pool.shutdown(cancel_futures=True)

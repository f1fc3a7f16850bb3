"""Prompt in, video out.

    python sample.py "a red square moves left"
    python sample.py "a blue star zigzags left" --motion --out star.gif
    python sample.py --prompts prompts.txt --n 5 --out FOLDER --run runs/toy

A file for each sample: new ones in outputs/, the one that --out names (numbered if there are
several), or in a folder that it names, called PROMPT-INDEX.mp4 as VBench wants them. With --compare
the base model, its control (where the run has one) and VideoJAM stand side by side, from the same
noise. Sampling itself is `VideoJAM.generate` and `euler_sample` in videojam.py.
"""
import os
import re
import time
from pathlib import Path

import torch

from common import (Parser, device_of, ffmpeg, grid, guidance_scale, positive_int, read_json,
                    report_errors, seed, truncate, write_video)
from data import Sprites, open_text
from synthetic import sprite_scene
from videojam import GUIDANCE, WITHOUT_MOTION, VideoJAM, read_model_file, weights_path

def parse():
    parser = Parser(__doc__)
    flag = parser.add_argument
    flag("prompt", nargs="*", help="what a video shows; several make several videos")
    flag("--prompts", metavar="FILE", help="a text file of prompts, one a line")
    flag("--run", help="folder of a training run; default: the shipped weights")
    flag("--which", default="jam", choices=("jam", "base", "control"),
         help="VideoJAM, its base model, or the base fine-tuned without motion")
    flag("--out", help="a .mp4 or .gif file, or a folder; default: new files in outputs/")
    flag("--n", type=positive_int, default=1, help="samples of each prompt")
    flag("--seed", type=seed, default=0, help="of the first sample's noise")
    flag("--steps", type=positive_int, default=100)
    flag("--emulated", type=positive_int,
         help="steps are 1/EMULATED long at first: with a smaller number "
         "motion guidance acts up to a larger t (default: the model's; the paper's may be 1000)")
    flag("--w1", type=guidance_scale, help="text guidance (default: the model's; the paper's is 5)")
    flag("--w2", type=guidance_scale, default=3, help="motion guidance (default %(default)s)")
    flag("--guidance", choices=GUIDANCE, help="default: inner (Eq. 8); without motion cfg")
    flag("--motion", action="store_true", help="show the predicted motion too")
    flag("--compare", action="store_true", help="base model, control, VideoJAM side by side")
    flag("--upscale", type=positive_int, help="factor (default: to about 256 px)")
    flag("--device", help="default: a GPU if there is one")
    return parser.parse_intermixed_args()

def read_prompts(args):
    prompts = args.prompt.copy()
    if args.prompts:
        prompts += filter(None, map(str.strip, open_text(args.prompts)))
    if not prompts or not all(map(str.strip, prompts)):
        raise ValueError('no prompt, or a blank one: try "a red square moves left"')
    if file := next(filter(os.path.isfile, args.prompt), None):
        raise ValueError(f"{file}: a file, not a prompt: --prompts {file} takes its lines")
    if any("\ud800" <= character <= "\udfff" for character in "".join(prompts)):
        raise ValueError("a prompt is not UTF-8")
    return prompts

def print_hints(run, prompts, max_bytes):
    """Says what a model cannot know of some prompts: words, or what is beyond max_bytes."""
    captions, listing = [], Path(run or "", "videos.json")
    if not run:
        captions = [Sprites.example, *(sprite_scene(i, 2, .5)["caption"] for i in range(300))]
    elif listing.is_file():                     # only runs on own videos have it
        captions = [entry["caption"] for entry in read_json(listing).values() if "frames" in entry]
    words = set(re.findall(r"\w+", " ".join(captions).lower()))
    for prompt in prompts:
        unknown = [word for word in re.findall(r"\w+", prompt.lower()) if word not in words]
        if captions and unknown:
            print(f"{prompt!r}: the model does not know {', '.join(unknown)}, it has learned from "
                  f"captions such as {captions[0]!r}")
        if (kept := truncate(prompt, max_bytes)) != prompt:
            print(f"the model reads {max_bytes} bytes of a prompt: {kept!r}")

def file_stem(prompt):
    """A prompt as a file's name: no slash or NUL, 180 bytes at most (a name holds 255)."""
    return truncate(re.sub("[/\0]", " ", prompt), 180)

def output_files(args, prompts):
    """A path for each sample, --n of each prompt. Makes their folder."""
    out, count = Path(args.out or "outputs"), len(prompts) * args.n
    is_file = out.suffix.lower() in (".mp4", ".gif")
    if out.suffix and not is_file and not out.is_dir() or is_file and out.is_dir():
        raise ValueError(f"--out {out}: name a .mp4 or .gif file, or a folder")
    if out.suffix.lower() != ".gif":
        ffmpeg()                                # before the sampling
    folder = out.parent if is_file else out
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise ValueError(f"--out {out}: {folder} cannot be written")
    if is_file:
        return [out] if count == 1 else [
            out.with_stem(f"{out.stem}-{i:0{len(str(count - 1))}d}") for i in range(count)]
    if args.out:
        if len(set(map(file_stem, prompts))) < len(prompts):
            raise ValueError("two prompts have the same first 180 bytes, and so the same file name")
        return [out / f"{file_stem(prompt)}-{i}.mp4" for prompt in prompts for i in range(args.n)]
    files = {}                                  # in order
    for prompt in (prompt for prompt in prompts for _ in range(args.n)):
        stem = file_stem(re.sub(r"[^\w]+", "-", prompt).strip("-")[:60] or "video")
        path, k = out / f"{stem}.mp4", 2
        while path.exists() or path in files:
            path, k = out / f"{stem}-{k}.mp4", k + 1
        files[path] = prompt
    return list(files)

def write_samples(args, prompts, models):
    """Writes --n samples of each prompt by {name: VideoJAM} side by side; motion is the last's."""
    files = output_files(args, prompts)
    began, prompts = time.time(), [prompt for prompt in prompts for _ in range(args.n)]
    for start in range(0, len(prompts), 16):            # written as they are made
        some = prompts[start:start + 16]
        shown = []
        for name, model in models.items():
            mode = args.guidance if name == args.which or args.guidance in WITHOUT_MOTION else None
            video, motion = model.generate(some, args.steps, args.w1, args.w2, args.seed + start,
                                           mode, args.emulated, progress=name)
            shown.append(video)
        shown += [motion] * args.motion
        for path, prompt, *parts in zip(files[start:], some, *shown):
            picture = grid(torch.stack(parts)) if len(parts) > 1 else parts[0]
            write_video(path, picture, model.config.fps, args.upscale)
            print(f"{path}: {prompt!r}")
    what = [*models] + ["its motion"] * args.motion
    print(f"{len(files)} of {' | '.join(what)} in {time.time() - began:.1f} s")

def main():
    args = parse()
    prompts, weights, device = read_prompts(args), weights_path(args.run), device_of(args.device)
    names = [args.which]
    if args.compare:
        names = ["base", *({"control"} & read_model_file(weights)[2].keys()), args.which]
    models = {name: VideoJAM.load(weights, name, device) for name in names}
    model = models[args.which]
    if args.motion and not model.dit.config.motion:
        raise ValueError(f"--motion: the {args.which} model predicts no motion")
    print_hints(args.run, prompts, model.config.dit.max_bytes)
    write_samples(args, prompts, models)

if __name__ == "__main__":
    report_errors(main)

"""Prompt in, video out.

    python sample.py "a red square moves left"
    python sample.py "a blue star zigzags left" --motion --out star.gif
    python sample.py --prompts prompts.txt --n 4 --out samples.mp4 --run runs/toy

One file per sample, numbered if there are several. With --compare the base model (classifier-free
guidance) is on the left and VideoJAM on the right, from the same noise.
"""
import os
import re
import time
from pathlib import Path

import torch

from common import (Parser, device_of, grid, positive_int, read_lines, report_errors, seed,
                    write_video)
from videojam import GUIDANCE, VideoJAM, print_truncated, truncate, weights_path

def parse():
    parser = Parser(description="Samples videos (and their motion) from prompts.")
    parser.add_argument("prompt", nargs="*", help="what a video shows; several make several videos")
    parser.add_argument("--prompts", metavar="FILE", help="a text file of prompts, one a line")
    parser.add_argument("--run", help="folder of a training run; default: the shipped weights")
    parser.add_argument("--which", default="jam", choices=("jam", "base", "control"),
                        help="VideoJAM, its base model, or the base fine-tuned without motion")
    parser.add_argument("--out", help="file to write, .mp4 or .gif (default: outputs/PROMPT.mp4)")
    parser.add_argument("--n", type=positive_int, default=1, help="samples of each prompt")
    parser.add_argument("--seed", type=seed, default=0, help="of the first sample's noise")
    parser.add_argument("--steps", type=positive_int, default=100)
    parser.add_argument("--emulated", type=positive_int, default=1000, help="the schedule's first "
                        "half is as slow as that of so many steps (default %(default)s)")
    parser.add_argument("--w1", type=float, default=5, help="text guidance (default %(default)s)")
    parser.add_argument("--w2", type=float, default=3, help="motion guidance (default %(default)s)")
    parser.add_argument("--guidance", choices=GUIDANCE,
                        help="default: inner (Eq. 8), or cfg for a model without motion")
    parser.add_argument("--motion", action="store_true", help="show the predicted motion too")
    parser.add_argument("--compare", action="store_true", help="base model beside VideoJAM")
    parser.add_argument("--upscale", type=positive_int, help="factor (default: to about 256 px)")
    parser.add_argument("--device", help="default: a GPU if there is one")
    return parser.parse_args()

def read_prompts(args):
    prompts = args.prompt + (read_lines(args.prompts) if args.prompts else [])
    if not prompts:
        raise ValueError('no prompt: try "a red square moves left"')
    for prompt in args.prompt:
        if os.path.isfile(prompt):
            raise ValueError(f"{prompt}: a file, not a prompt: --prompts {prompt} takes its lines")
    if any("\ud800" <= character <= "\udfff" for character in "".join(prompts)):
        raise ValueError("a prompt is not UTF-8")
    return prompts

def output_files(args, prompts):
    """A path for each sample, in folders that can be written."""
    if args.out:
        first = Path(args.out)
    else:
        # 180 bytes, because a file's name holds 255
        name = truncate(re.sub(r"[^\w]+", "-", prompts[0]).strip("-")[:60], 180) or "video"
        first = Path("outputs") / f"{name}.mp4"
        first.parent.mkdir(exist_ok=True)
    if first.suffix not in (".mp4", ".gif"):
        raise ValueError(f"--out {first}: the name must end in .mp4 or .gif")
    if first.is_dir():
        raise ValueError(f"--out {first}: a folder, name a file")
    if not first.parent.is_dir() or not os.access(first.parent, os.W_OK):
        raise ValueError(f"--out {first}: {first.parent} is not a folder that can be written")
    count = len(prompts) * args.n
    if count == 1:
        return [first]
    return [first.with_stem(f"{first.stem}-{i:0{len(str(count - 1))}d}") for i in range(count)]

def main():
    args = parse()
    prompts = read_prompts(args)
    weights = weights_path(args.run)
    device = device_of(args.device)
    model = VideoJAM.load(weights, args.which, device)
    base = VideoJAM.load(weights, "base", device) if args.compare else None
    if args.motion and not model.dit.config.motion:
        raise ValueError(f"--motion: the {args.which} model predicts no motion")
    files = output_files(args, prompts)
    print_truncated(prompts, model.config.dit.max_bytes)
    began, prompts = time.time(), [prompt for prompt in prompts for _ in range(args.n)]
    for start in range(0, len(prompts), 16):            # written as they are made
        some = prompts[start:start + 16]
        options = dict(steps=args.steps, w1=args.w1, w2=args.w2, seed=args.seed + start,
                       emulated=args.emulated)
        video, motion = model.generate(some, mode=args.guidance, progress=args.which, **options)
        shown = [video, motion] if args.motion else [video]
        if args.compare:
            plain = args.guidance and not GUIDANCE[args.guidance].needs_motion
            shown.insert(0, base.generate(some, mode=args.guidance if plain else None,
                                          progress="base", **options)[0])
        for path, prompt, *parts in zip(files[start:], some, *shown):
            write_video(path, grid(torch.stack(parts)), model.config.fps, args.upscale)
            print(f"{path}: {prompt!r}")
    what = ["base"] * args.compare + [args.which] + ["its motion"] * args.motion
    print(f"{len(files)} of {' | '.join(what)} in {time.time() - began:.1f} s")

if __name__ == "__main__":
    report_errors(main)

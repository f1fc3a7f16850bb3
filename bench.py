"""The paper's experiments on the sprite world, with controls that the paper does not have.

    python bench.py                         all of them (--quick for a look): runs/bench/report.html
    python bench.py compare --n 500         one of motivation, compare, ablation, sdedit
    python bench.py premise --n 500         24 trainings: VideoJAM's gain by --appearance, and by
                                            --target; stop it and go on at any time
    python bench.py metrics FOLDER          VBench's motion metrics of anybody's videos

The paper's human evaluation is the page assets/rate.html: open it in a browser.
"""
import argparse
import base64
import functools
import html
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import (ROOT, Parser, autocast, can_compile, compile_layers, device_of, ffmpeg,
                    frames_and_rate, grid, guidance_scale, keep_freed_memory, nonempty, open_video,
                    positive_int, read_json, report_errors, write_text, write_video)
from data import video_files
from flow import RAFT, estimate_flow, flow_to_rgb
from metrics import (VBENCH, by_prompt, cell, held_out_clips, interval, mean_row, paired, present,
                     score_clips, static_share, vbench)
from synthetic import APPEARANCE, HELD_OUT, TARGETS, sprite_clips
from videojam import (PRESETS, Noise, VideoJAM, euler_sample, flow_matching_loss, interpolate,
                      joint_loss, linear_quadratic, read_model_file, tokenize, weights_path)

# ---------------------------------------------------------------- what the experiments start from

def in_parts(function, clips):
    """function of clips (n, ...), eight at a time, so that large ones fit into memory."""
    return torch.cat([function(part) for part in clips.split(8)])

def set_sampler(args, config):
    """Gives args a Preset's w1 and emulated where they have none. ValueError: too many steps."""
    args.w1, args.emulated = config.sampler(args.w1, args.emulated)
    linear_quadratic(args.steps, args.emulated)

def sampling(args):
    return (f"{args.steps} sampling steps of {args.emulated}, w1 = {args.w1:g}, w2 = {args.w2:g}, "
            f"{args.seeds} samples of each prompt, the same noise for every model")

class Evaluator:
    """What every experiment starts from: held-out clips, a run's models, and their samples."""
    def __init__(self, args):
        self.args, self.device, self.models = args, device_of(args.device), {}
        if args.run and (Path(args.run) / "videos.json").is_file():
            raise ValueError(f"{args.run}: of own videos, but the experiments are of sprites: "
                             "python sample.py --out FOLDER, then bench.py metrics FOLDER")
        self.raft, path = RAFT.load().to(self.device), weights_path(args.run)
        self.config, _, dits = read_model_file(path)
        set_sampler(args, self.config)
        for which in ("jam", "control", "base"):
            if which not in dits and which != "jam":            # without jam, load refuses the file
                print(f"{path}: no {which} model, its rows are left out")
                continue
            self.models[which] = VideoJAM.load(path, which, self.device)
            if self.device.type == "cpu" and can_compile(self.device):  # a GPU is fast without
                compile_layers(self.models[which].dit)
        self.tae = self.models["jam"].tae
        self.world = {"appearance": self.config.appearance, "target": self.config.target}
        self.video, self.flow, self.captions, self.scenes = held_out_clips(
            args.n, self.config.frames, self.config.size, **self.world)

    def sample(self, which="jam", **options):
        """Video and RGB motion, --seeds times of all prompts; sample i has HELD_OUT + i's noise."""
        defaults = {name: vars(self.args)[name] for name in ("steps", "emulated", "w1", "w2")}
        made = self.models[which].generate(
            self.captions * self.args.seeds, seed=HELD_OUT, batch=50,
            progress=f"{which} {options or ''}", **{**defaults, **options})
        return tuple(None if part is None else part.cpu() for part in made)

    @torch.no_grad()
    def latents(self, video, flow):
        """Latents x1, d1 of clips and of their flow, and noise x0, d0 for them, on the device."""
        rgb = flow_to_rgb(flow, self.config.sigma)
        x1, d1 = (in_parts(lambda v: self.tae.encode(v.to(self.device), motion), clips)
                  for motion, clips in enumerate((video, rgb)))
        generator = torch.Generator().manual_seed(HELD_OUT)
        return x1, d1, *(torch.randn(x1.shape, generator=generator).to(x1) for _ in range(2))

    @functools.cached_property
    @torch.no_grad()
    def upper_bounds(self):
        """What a DiT can reach at best."""
        coded = in_parts(lambda v: self.tae.decode(self.tae.encode(v.to(self.device)),
                                                   frames=self.config.frames).cpu(), self.video)
        return {"real clips": self.video, "through the TAE": coded}

    def scores(self, videos):
        """Scores of {name: clips}, a row for each clip: all prompts, then again if --seeds."""
        return {name: score_clips(video, self.scenes) for name, video in videos.items()}

SCORES = {"detected": "detected in all frames %", "single": "single sprite %",
          "shape": "named shape %", "motion_ok": "motion as named %",
          "single_motion_ok": "single, motion as named %", "error": "median motion error, px"}
PAIRED = {"detected": "detected, points", "motion_ok": "motion as named, points",
          "single": "single sprite, points", "shape": "named shape, points",
          "single_motion_ok": "single, motion as named, points",
          "error": "mean motion error where both are detected, px"}

def score_table(results, titles):
    """A table of {name: a row of scores for each prompt}, a column for each of {score: title}."""
    return ["", *titles.values()], [
        [name, *(cell([row[key] for row in rows], 100 if "%" in title else 1,
                      np.median if key == "error" else np.mean,
                      share="%" in title and key not in ("flicker", "smooth"))
                 for key, title in titles.items())]
        for name, rows in results.items()]

def gain(rows, others):
    """What each row scores more than the other of its noise: None where one has no score."""
    return [{key: None if None in (a[key], b[key]) else a[key] - b[key] for key in PAIRED}
            for a, b in zip(rows, others)]

def paired_table(gains):
    """A table of {name: a row of gains for each prompt}."""
    def paired_cell(rows, key):
        if not (values := present(rows, key)):
            return "-"
        scale, digits = (1, 2) if key == "error" else (100, 1)
        *ends, p = paired(values)
        mean, low, high = (f"{scale * value:+.{digits}f}" for value in ends)
        return f"{mean} [{low}, {high}], p = {p:.4f}, n = {len(values)}"

    return ["p values are not corrected for their number", *PAIRED.values()], [
        [name, *(paired_cell(rows, key) for key in PAIRED)] for name, rows in gains.items()]

def model_tables(scores, n, *comparisons):
    """The table of `Evaluator.scores` of n prompts, and one of what models gain over another:
    comparisons: (names, against), ..."""
    gains = {f"{name} minus {against}": by_prompt(gain(scores[name], scores[against]), n)
             for names, against in comparisons for name in names if name != against}
    means = {name: by_prompt(rows, n) for name, rows in scores.items()}
    return [score_table(means, SCORES), paired_table(gains)]

# ---------------------------------------------------------------- Sec. 3, Fig. 3: motivation

def motivation(e):
    """The appearance loss before and after the frames are permuted, at the sampler's steps."""
    config, n = e.config, min(e.args.n, 64)
    seeds, rng = [scene["seed"] for scene in e.scenes[:n]], np.random.default_rng(0)
    orders = [rng.permutation(config.frames) for _ in seeds]
    y = tokenize(e.captions[:n], config.dit.max_bytes).to(e.device)
    clips = [e.latents(*sprite_clips(seeds, config.frames, config.size, 0, order, **e.world)[:2])
             for order in (None, orders)]
    times = linear_quadratic(100).to(e.device)
    steps = range(0, 100, 1 if e.args.steps >= 100 else 5)
    models = {which: (model.dit, False) for which, model in e.models.items()}
    models["jam, d = 0"], nobody = (e.models["jam"].dit, True), torch.zeros(n, dtype=torch.bool)
    relative, absolute, levels, shown = {}, {}, [], (0, 20, 40, 60, 80, 90, 95)
    for which, (dit, no_motion) in models.items():
        losses = np.zeros((len(steps), 2, n))           # of the clip, and of the permuted clip
        for k, order in tqdm(itertools.product(range(len(steps)), range(2)),
                             f"motivation {which}", 2 * len(steps)):
            x1, d1, x0, d0 = clips[order]
            options = {"reduction": "channels", "noise": Noise(
                times[steps[k]].expand(n), x0, d0, nobody, nobody | no_motion)}
            with torch.no_grad(), autocast(e.device):
                mse = joint_loss(dit, x1, d1, y, **options) if dit.config.motion else \
                    flow_matching_loss(dit, x1, y, **options)
            losses[k, order] = mse[:, :x1.shape[1]].mean(1).cpu()
        rises, differences = losses[:, 1] / losses[:, 0] - 1, losses[:, 1] - losses[:, 0]
        relative[which] = steps, [interval(rise) for rise in rises]
        absolute[which] = steps, [interval(difference) for difference in differences]
        rows = [steps.index(k) for k in shown]
        levels.append([f"{which}: loss", *(cell(losses[k, 0]) for k in rows)])
        levels.append([f"{which}: rise, absolute", *(cell(differences[k]) for k in rows)])
        levels.append([f"{which}: rise %", *(cell(rises[k], 100) for k in rows)])
    return {"about": "Rise of the appearance loss when a clip's frames are permuted; "
                     f"n = {n} clips, the same noise and permutation for every model. VideoJAM "
                     "sees the noised motion of the permuted clip too; with d = 0 it does not.",
            "tables": [(["", *(f"step {k}, t = {times[k]:.3f}" for k in shown)], levels)],
            "curves": [("relative rise %, by the sampler's step", relative, 100),
                       ("absolute rise, by the sampler's step", absolute, 1)]}

# ---------------------------------------------------------------- Sec. 5: Tables 1, 2, 4 and 3

def compare(e):
    """Tables 1, 2, 4: base, control (plain fine-tuning for the same steps) and VideoJAM."""
    n, few = e.args.n, min(e.args.n, e.args.few)
    alone, guided = "VideoJAM, w2 = 0", f"VideoJAM, w2 = {e.args.w2:g}"
    plain = [which for which in ("base", "control") if which in e.models]
    videos = {**e.upper_bounds, **{which: e.sample(which)[0] for which in plain},
              alone: e.sample(w2=0.)[0]}
    videos[guided], motion = e.sample()
    scores = e.scores(videos)
    groups = {kind: [row["kind"] == kind for row in scores["real clips"]]
              for kind in sorted({row["kind"] for row in scores["real clips"]})}
    groups["unseen combinations"] = [row["held_out"] for row in scores["real clips"]]
    by_kind = [[name, *(cell([row["motion_ok"] for row in itertools.compress(rows, group)], 100,
                             share=True) for group in groups.values())]
               for name, rows in ((name, by_prompt(rows, n)) for name, rows in scores.items())]
    counts = [f"{name} (n {sum(group)})" for name, group in groups.items()]
    header, by_raft = score_table({name: [vbench(clip.to(e.device).unbind, e.config.fps, e.raft)
                                          for clip in tqdm(video[:few], f"RAFT on {name}")]
                                   for name, video in videos.items()}, VBENCH)
    against = [([*plain, alone, guided], "control")] * ("control" in plain)
    return {"about": f"n = {n} held-out clips, {len(set(e.captions))} different prompts, "
                     f"{sampling(e.args)}; 95% intervals over clips.",
            "tables": [*model_tables(scores, n, *against, ([guided], alone)),
                       (["motion as named %", *counts], by_kind),
                       ([f"the first {few} prompts", *header[1:]], by_raft)],
            "clips": scores,
            "shown": [(name, video[:8]) for name, video in videos.items()]
            + [("motion predicted by VideoJAM", motion[:8])]}

def ablation(e):
    """Table 3 (w/o Inner-Guidance: w2 = 0; w/o optical flow: d = 0), and how much w2, how long."""
    steps, w1, w2 = e.args.steps, e.args.w1, e.args.w2
    first, as_strong = f"VideoJAM, w2 = {w2:g}", {"w1": w1 + 1, "w2": w2 + 1}   # 1 is Eq. 8's 0
    variants = {first: {}, "without text guidance": {"w1": 0.},
                "without motion guidance": {"w2": 0.}, "d = 0 at inference": {"mode": "no-motion"},
                "InstructPix2Pix": {"mode": "ip2p", **as_strong},
                "composable": {"mode": "composable", **as_strong},
                "w2 on u^x alone": {"mode": "inner-x"}}
    variants |= {f"w2 = {w:g}": {"w2": w} for w in (1., 2., 4., 6.) if w != w2}
    variants |= {f"w2 in the first {share}% of steps": {"motion_steps": steps * share / 100}
                 for share in (25, 75, 100)}
    scores = e.scores(e.upper_bounds)
    for name, options in variants.items():
        scores |= e.scores({name: e.sample(**options)[0]})
    return {"about": f"n = {e.args.n} held-out clips, {sampling(e.args)} if a row does not say "
                     f"else. InstructPix2Pix and composable: w1 = {w1 + 1:g}, w2 = {w2 + 1:g}, of "
                     "composable in all steps. 95% intervals over clips.",
            "tables": model_tables(scores, e.args.n, (variants, first)), "clips": scores}

# ---------------------------------------------------------------- App. B, Fig. 8: SDEdit

@torch.no_grad()
def sdedit(e):
    """Clips are noised to some of 100 steps and sampled on from there: what they still share with
    the clip was decided before that step."""
    args, n, few = e.args, e.args.n, min(e.args.n, e.args.few)
    table, results, shown = [], {}, []
    y = tokenize(e.captions, e.config.dit.max_bytes).to(e.device)
    times = linear_quadratic(100).to(e.device)
    x1, d1, x0, d0 = e.latents(e.video, e.flow)
    exact = held_out_clips(few, e.config.frames, e.config.size)[1]      # whatever d shows
    truth = F.avg_pool2d(exact.flatten(0, 1), 8).flatten(1)

    def row(name, t, edited):
        seen = in_parts(lambda v: estimate_flow(e.raft, v).cpu(), edited[:few])
        cosine = F.cosine_similarity(F.avg_pool2d(seen.flatten(0, 1), 8).flatten(1), truth)
        table.append([name, t, cell(cosine.view(few, -1).mean(1).tolist()),
                      cell((edited - e.video).abs().flatten(1).mean(1).tolist())])
        results[name] = score_clips(edited, e.scenes)
        shown.append((name, edited[:8]))

    row("the clip itself, by RAFT", "1", e.video)
    row("through the TAE", "1", e.upper_bounds["through the TAE"])
    models = sorted({"base", "jam"} & e.models.keys())
    for which, start in itertools.product(models, (0, 20, 60, 80, 90, 95)):
        dit, t = e.models[which].dit, times[start].expand(n)
        x, d = interpolate(x1, x0, t), interpolate(d1, d0, t) if dit.config.motion else None
        with autocast(e.device):
            x, _ = euler_sample(dit, x, d, y, times[start:], args.w1, args.w2,
                                "cfg" if d is None else "inner", motion_steps=max(0, 50 - start),
                                progress=f"sdedit, {which} from {start}")
            edited = in_parts(lambda v: e.tae.decode(v, frames=e.config.frames).cpu(), x)
        row(f"{which}, step {start}", f"{times[start]:.3f}", edited)
    return {"about": f"n = {n} clips. Coarse motion (8 x 8 px means of RAFT's flow, {few} "
                     "clips) against the clip's own: cosine, 1 is the same. Step 0 is a free "
                     "sample. VideoJAM is given the clip's noised motion too.",
            "tables": [(["from", "t", "agreement of motion", "difference of pixels"], table),
                       score_table(results, SCORES)],
            "shown": shown}

# ---------------------------------------------------------------- the paper's premise, as a dose

DOSES, TRAININGS = (0., .25, .5, .75, 1.), (0, 1, 2)                # --appearance, --seed
MODELS = {"base": "base", "control": "control", "jam": "VideoJAM"}

def train_and_score(args, dose, target, seed):
    """Trains and scores a default run in a world, unless its scores are there and it has not
    changed. Returns them, and whether they are new. ValueError: training did not end, or a model is
    missing."""
    run = args.out / f"{dose:g}-{target}-{seed}"
    path = run / (f"n{args.n}-seeds{args.seeds}-steps{args.steps}-of-{args.emulated}-"
                  f"w1-{args.w1:g}-w2-{args.w2:g}.json")
    trained = [status.stat().st_mtime for status in run.glob("checkpoints/*/status.json")]
    is_new = not path.exists() or max(trained, default=0) > path.stat().st_mtime
    if is_new:
        flags = {"--appearance": dose, "--target": target, "--seed": seed, "--out": run}
        flags |= {"--device": args.device} if args.device else {}
        command = [sys.executable, ROOT / "train.py", *itertools.chain(*flags.items())]
        ours = signal.signal(signal.SIGINT, lambda *_: None)    # train.py ends its step on Ctrl-C
        code = subprocess.run([*map(str, command)]).returncode
        signal.signal(signal.SIGINT, ours)
        if code:
            raise ValueError(f"{run}: not trained to its end (train.py's exit code: {code}): the "
                             "same command goes on")
        e = Evaluator(argparse.Namespace(**{**vars(args), "run": run}))
        if missing := sorted(MODELS.keys() - e.models.keys()):
            raise ValueError(f"{run}: has no {', '.join(missing)} to compare with: train jam and "
                             "control for the same steps, or delete it")
        videos = {name: e.sample(which)[0] for which, name in MODELS.items()}
        scores = e.scores({"through the TAE": e.upper_bounds["through the TAE"], **videos})
        write_text(path, json.dumps({"share": static_share(e.video), "scores": scores,
                                     "fig3": motivation(e)["curves"][0]}, default=list))
    return read_json(path, "share", "scores", "fig3"), is_new

def premise(args):
    """VideoJAM minus its control, against the share of the pixel variance that stands still; at
    the default dose also with other motion targets. Yields the section after each training."""
    set_sampler(args, PRESETS["toy"])
    runs = {(dose, "flow"): [] for dose in DOSES} | {(APPEARANCE, target): [] for target in TARGETS}
    for seed, world in itertools.product(TRAININGS, runs):
        scores, is_new = train_and_score(args, *world, seed)
        runs[world].append(scores)
        if is_new or (seed, world) == (TRAININGS[-1], [*runs][-1]):
            yield premise_section(args, {world: some for world, some in runs.items() if some})

def premise_section(args, runs):
    """The section of {(dose, target): [`train_and_score`'s of each training]}."""
    scores, gains, mean_gains = {}, {}, {}
    for (dose, target), some in runs.items():
        each = {f"training {i}": run["scores"] for i, run in enumerate(some)}
        each["mean"] = {name: sum((run["scores"][name] for run in some), [])
                        for name in some[0]["scores"]}
        label = f"{dose:g}, {target}"
        scores |= {f"{label}: {name}": by_prompt(rows, args.n)
                   for name, rows in each["mean"].items()}
        gains |= {f"{label}, {which}: {name} minus control":
                  by_prompt(gain(models[name], models["control"]), args.n)
                  for which, models in each.items() for name in ("base", "VideoJAM")}
        mean_gains[dose, target] = gains[f"{label}, mean: VideoJAM minus control"]
    still = {dose: 100 * some[0]["share"] for (dose, target), some in runs.items()
             if target == "flow"}
    least = min(still)
    more = {f"gain at {dose:g} minus gain at {least:g}":
            gain(mean_gains[dose, "flow"], mean_gains[least, "flow"])
            for dose in still if dose > least}
    more |= {f"gain, {target} minus gain, flow":
             gain(mean_gains[dose, target], mean_gains[dose, "flow"])
             for dose, target in mean_gains if target != "flow"}
    shares = ", ".join(f"{share:.0f}%" for share in still.values())
    asked = len(TRAININGS) * (len(DOSES) + len(TARGETS) - 1)        # flow is among the doses
    return {"about": f"{sum(map(len, runs.values()))} of {asked} trainings, by --appearance "
                     f"({shares} of the variance of pixels stand still) and --target (gain: over "
                     f"its own control). n = {args.n} held-out clips, {sampling(args)}. Means and "
                     "gains by dose are over all trainings of a kind, Fig. 3 is of the first; 95% "
                     "intervals over clips, not trainings.",
            "tables": [score_table(scores, SCORES), paired_table(gains)]
            + [paired_table(more)] * bool(more),
            "curves": premise_curves(runs, mean_gains, still),
            "runs": [[*world, some] for world, some in runs.items()]}

def premise_curves(runs, mean_gains, still):
    """VideoJAM's mean gains by {dose: % of the variance that stands still}, and Fig. 3 at the least
    and the loudest dose."""
    curves = []
    for keys, scale in (("detected", "motion_ok"), 100), (("error",), 1):
        lines = {PAIRED[key]: {share: paired(values)[:3] for dose, share in still.items()
                               if (values := present(mean_gains[dose, "flow"], key))}
                 for key in keys}
        curves.append(("VideoJAM minus control, by % of variance that stands still",
                       {name: [[*line], [*line.values()]] for name, line in lines.items()}, scale))
    for dose in sorted({min(still), max(still)}):
        label, *lines = runs[dose, "flow"][0]["fig3"]
        curves.append((f"appearance {dose:g}: {label}", *lines))
    return curves

# ---------------------------------------------------------------- folders of anybody's videos

def metrics(args):
    """VBench's motion metrics of a folder of videos, named PROMPT-INDEX as VBench does."""
    folder, rows, prompts = Path(args.folder), {}, {}
    device, names = device_of(args.device), video_files(folder)
    raft = RAFT.load().to(device)
    for name in tqdm(names, "metrics", disable=not names):
        try:
            _, fps = frames_and_rate(folder / name)
            rows[name] = vbench(lambda: (frame.to(device) / 255 for frame in
                                         open_video(folder / name)), fps, raft)
            prompt = re.sub(r"-\d+$", "", str(Path(name).with_suffix("")))
            prompts.setdefault(prompt, []).append(rows[name])
        except ValueError as error:
            tqdm.write(f"skipped {name}: {error}")
    if not rows:
        raise ValueError(f"{folder}: no video in it that can be read, {len(names)} that cannot")
    means = list(map(mean_row, prompts.values())) if len(prompts) > 1 else list(rows.values())
    return {"about": f"n = {len(rows)} videos of {len(prompts)} prompts, {len(names) - len(rows)} "
                     "skipped. Means of prompts, whose videos are averaged first; 95% intervals "
                     "over prompts (over the videos if all are of one). By VBench's formulas; RAFT "
                     "is ours, and in AMT's place.",
            "tables": [score_table({str(folder): means}, VBENCH)],
            "videos": rows}

# ---------------------------------------------------------------- the report

def svg(label, curves, scale, width=640, height=320):
    """Lines with their bands: {name: (x, [(mean, low, high)])} -> an inline SVG; y times scale."""
    curves = {name: line for name, line in curves.items() if line[0]}
    colours = dict(zip(curves, ("#1f77b4", "#ff7f0e", "#2ca02c", "#9467bd")))
    xs = [x for xs, _ in curves.values() for x in xs] or [0]
    ys = [0, *(v for _, ys in curves.values() for y in ys for v in y)]
    x0, x1, y0, y1 = min(xs), max(xs), min(ys), max(ys)

    def at(x, y):
        return (f"{50 + (x - x0) / (x1 - x0 or 1) * (width - 80):.1f},"
                f"{height - 40 - (y - y0) / (y1 - y0 or 1) * (height - 60):.1f}")

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
             f'width="{width}" font-size="12" font-family="sans-serif">'
             f'<path d="M{at(x0, 0)} L{at(x1, 0)}" stroke="#bbb"/>']
    for row, (name, (x, y)) in enumerate(curves.items()):
        line, low, high = ([*map(at, x, values)] for values in zip(*y))
        parts += [f'<polygon points="{" ".join(high + low[::-1])}" fill="{colours[name]}" '
                  f'opacity=".2" stroke="{colours[name]}" stroke-width="3"/>',  # so one point shows
                  f'<polyline points="{" ".join(line)}" fill="none" stroke="{colours[name]}"/>',
                  f'<text x="60" y="{20 + 15 * row}" fill="{colours[name]}">{name}</text>']
    for value in {y0, 0, y1}:
        parts.append(f'<text x="2" y="{at(x0, value).split(",")[1]}">{scale * value:.3g}</text>')
    for value in (x0, x1):
        parts.append(f'<text x="{at(value, y0).split(",")[0]}" y="{height - 22}" '
                     f'text-anchor="middle">{value:.3g}</text>')
    return "".join(parts) + f'<text x="{width / 3}" y="{height - 6}">{label}</text></svg>'

def report(out, sections, fps):
    """{name: section} -> results.json, report.md, report.html (self-contained), curves as .svg. The
    last section is printed, at first, so that it is seen even if the pictures fail."""
    text = ["# VideoJAM: experiments"]
    for name, section in sections.items():
        last = len(text)
        text += [f"## {name}", f"`{section['command']}`", section["about"]]
        text += ["\n".join("| " + " | ".join(map(str, row)) + " |"
                           for row in [header, ["---"] * len(header), *rows])
                 for header, rows in section["tables"]]
    print("\n\n".join(text[last:]))
    data = {name: {k: v for k, v in section.items() if k != "shown"}
            for name, section in sections.items()}
    write_text(out / "report.md", "\n\n".join(text) + "\n")
    write_text(out / "results.json", json.dumps(data, default=list))
    page = "\n".join(html_page(out, sections, fps))
    shell = (ROOT / "assets/report.html").read_text()
    write_text(out / "report.html", shell.replace("CONTENT", page, 1))
    print(f"\n{out}/report.html\n")

def html_page(out, sections, fps):
    """The lines of the page's body; writes curves as .svg files beside it."""
    page = []
    for name, section in sections.items():
        page += [f"<h2>{name}</h2><code>{html.escape(section['command'])}</code>"
                 f"<p>{html.escape(section['about'])}"]
        for header, rows in section["tables"]:
            page.append("<table>" + "".join(
                "<tr>" + "".join(f"<td>{html.escape(str(c))}" for c in row)
                for row in [header, *rows]) + "</table><br>")
        for i, curves in enumerate(section.get("curves", ())):
            page.append(svg(*curves))
            write_text(out / f"{name}-{i}.svg", page[-1])
        for title, clips in section.get("shown", ()):
            path = out / f".{os.getpid()}.mp4"
            write_video(path, grid(clips), fps, scale=2)
            data = base64.b64encode(path.read_bytes()).decode()
            page.append(f'<p>{html.escape(title)}<br><video autoplay loop muted '
                        f'src="data:video/mp4;base64,{data}"></video>')
            path.unlink()
    return page

# ---------------------------------------------------------------- command line

EXPERIMENTS = {"motivation": motivation, "compare": compare, "ablation": ablation, "sdedit": sdedit}

def parse():
    parser = Parser(__doc__)
    flag = parser.add_argument
    flag("experiment", nargs="?", choices=[*EXPERIMENTS, "premise", "metrics"],
         help="default: all but premise and metrics")
    flag("folder", nargs="?", type=nonempty, help="metrics: of videos")
    flag("--run", type=nonempty, help="folder of a training run; default: the shipped weights")
    flag("--n", type=positive_int, help="how many prompts (default: 50, 16 with --quick)")
    flag("--seeds", type=positive_int, default=1,
         help="compare, ablation, premise: samples of each prompt, which are averaged")
    flag("--steps", type=positive_int, help="of the sampler (default: 100, 25 with --quick; "
         "sdedit's and motivation's are those of 100)")
    flag("--emulated", type=positive_int, help="as sample.py's (default: the model's; sdedit's and "
         "motivation's is always 1000)")
    flag("--w1", type=guidance_scale, help="text guidance (default: the model's)")
    flag("--w2", type=guidance_scale, default=3., help="motion guidance (%(default)g)")
    flag("--quick", action="store_true", help="16 prompts, 25 steps, RAFT for 4 of them: a look")
    flag("--device", help="default: a GPU if there is one")
    flag("--out", type=Path, help="default: runs/bench, in it a folder by run and experiment")
    args = parser.parse_intermixed_args()
    args.n = args.n or (16 if args.quick else 50)
    args.steps = args.steps or (25 if args.quick else 100)
    args.few = 4 if args.quick else 24          # clips that RAFT, which is slow, looks at
    if (args.experiment == "metrics") != bool(args.folder):
        raise ValueError("metrics takes a folder of videos, nothing else does: --run names a run")
    if args.folder and not Path(args.folder).is_dir():
        raise ValueError(f"{args.folder}: no such folder")
    if args.run and args.experiment in ("premise", "metrics"):
        raise ValueError("premise trains its own runs, metrics has a folder: it takes no --run")
    name = Path(args.run or args.folder).resolve().name if args.run or args.folder else ""
    args.out = args.out or Path("runs/bench", name, args.experiment or "")
    return args

def main():
    args, command = parse(), "python bench.py " + shlex.join(sys.argv[1:])
    ffmpeg()                                    # fail before the long work
    args.out.mkdir(parents=True, exist_ok=True)
    if not os.access(args.out, os.W_OK):
        raise ValueError(f"--out {args.out}: cannot be written")
    if args.experiment == "metrics":
        return report(args.out, {"metrics": {**metrics(args), "command": command}}, 8)
    keep_freed_memory()
    if args.experiment == "premise":
        for section in premise(args):
            report(args.out, {"premise": {**section, "command": command}}, 8)
        return
    evaluator, sections = Evaluator(args), {}
    for name in [args.experiment] if args.experiment else EXPERIMENTS:
        sections[name] = {**EXPERIMENTS[name](evaluator), "command": command}
        report(args.out, sections, evaluator.config.fps)

if __name__ == "__main__":
    report_errors(main)

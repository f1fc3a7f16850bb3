"""VideoJAM for Wan 2.1 text-to-video, for people who have its weights.

    pip install -r requirements.txt "diffusers>=0.42" transformers accelerate ftfy
    python examples/wan.py train --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --data FOLDER --out DIR
    torchrun --nproc_per_node=8 examples/wan.py train ...       each process has the whole model
    python examples/wan.py sample DIR "a dog runs along a beach"
    python examples/wan.py train --tiny && python examples/wan.py sample --tiny "a red square"

--tiny: the same lines with a random model of two layers, on a CPU in a minute. FOLDER is laid out
as for train.py; of each video the beginning is taken, and of its middle square the middle. DIR gets
clips/, encoded once; checkpoint.pt, from which the same command goes on; previews/; and at the end
transformer/, which WanTransformer3DModel.from_pretrained loads. (--lora needs peft.)
"""
import argparse
import hashlib
import json
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from diffusers.utils import logging
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common                                                                       # noqa: E402
from common import autocast, barrier, fast_dtype, print0, rank, read_tensors        # noqa: E402
from data import find_videos, read_clip                                             # noqa: E402
from flow import RAFT, estimate_flow, flow_to_rgb                                   # noqa: E402
from synthetic import sprite_clips                                                  # noqa: E402
from train import MOTION_LR_SCALE, refuse_changes, rng, stop_signals                # noqa: E402
from videojam import (check_velocity, euler_sample, joint_loss, linear_quadratic,   # noqa: E402
                      new_entries, sample_noise, widen_input, widen_output)

REAL = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}       # Wan 2.1 of 1.3 B
TINY = {WanTransformer3DModel: {
            "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4,
            "text_dim": 32, "freq_dim": 32, "ffn_dim": 48, "num_layers": 2},
        AutoencoderKLWan: {"base_dim": 4, "z_dim": 4, "dim_mult": [1] * 4, "num_res_blocks": 1,
                           "latents_mean": [0.] * 4, "latents_std": [1.] * 4}}
ADAPTED = ["to_q", "to_k", "to_v", "to_out.0"]              # the layers that get LoRA's adapters
KEPT = "model", "size", "frames", "fps", "lora", "lr", "batch", "t_shift", "seed"
CHECKPOINT_SECONDS = 600

# ---------------------------------------------------------------- the models

def load(kind, name, **options):
    """A model of a class, by folder or the hub's name. ValueError where its weights are not."""
    if name == "tiny":
        torch.manual_seed(0)
        return kind(**TINY[kind])
    try:
        return kind.from_pretrained(name, **options)
    except Exception as error:              # of several libraries: no network, no such file, ...
        if common.is_out_of_memory(error):
            raise
        raise ValueError(f"{name}: no {kind.__name__} there, nor on the hub: --model takes Wan 2.1 "
                         f"for diffusers ({common.one_line(error)})") from None

def load_vae(args):
    return load(AutoencoderKLWan, args.model, subfolder="vae", dtype=torch.float32).to(args.device)

def text_encoder(args):
    """A function: prompt -> its embeddings (512, 4096), zero after its end."""
    if args.model == "tiny":                # a stand-in: a random vector for each byte
        table = torch.randn(256, 32, generator=rng("text"))
        return lambda prompt: table[list(prompt.encode().ljust(40)[:40])]
    pipe = load(WanPipeline, args.model, transformer=None, vae=None,
                dtype=fast_dtype(args.device)).to(args.device)
    return lambda prompt: pipe.encode_prompt(prompt, do_classifier_free_guidance=False,
                                             max_sequence_length=512)[0][0].cpu()

def add_motion(wan):
    """Sec. 4.2 for Wan's two layers. Its config learns of it, so that from_pretrained does too."""
    C = wan.config.out_channels
    wan.patch_embedding = widen_input(wan.patch_embedding, C, channel_last=False)
    wan.proj_out = widen_output(wan.proj_out, C, channel_last=True)
    wan.register_to_config(in_channels=2 * C, out_channels=2 * C)
    return wan

def velocity(wan, one_by_one=False):
    """Wan as model(x, t, y). Its time is 1000 at noise and 0 at data, so its velocity points to
    noise. one_by_one: the samples of a batch, which are guidance's terms, in turn."""
    def u(z, t, y):
        return -wan(z, 1000 * (1 - t), y, return_dict=False)[0].float()
    return u if not one_by_one else lambda *batch: torch.cat(
        [u(*sample) for sample in zip(*(part.split(1) for part in batch))])

def load_widened(args):
    """Wan with motion, checked, with adapters for --lora. What learns is in fp32: bf16 would round
    steps of 5e-6 away."""
    dtype = fast_dtype(args.device) if args.lora else torch.float32
    wan = load(WanTransformer3DModel, args.model, subfolder="transformer", dtype=dtype)
    c, wan = wan.config, wan.to(args.device)
    print_sizes(REAL if args.model == "tiny" else c, args.lora or 32)
    torch.manual_seed(args.seed)
    probe = torch.randn(1, c.out_channels, 1, 8, 8), torch.rand(1), torch.randn(1, 8, c.text_dim)
    probe = [part.to(args.device) for part in probe]
    with torch.no_grad(), autocast(args.device):
        before = velocity(wan)(*probe)
        check_velocity(before, velocity(add_motion(wan)), *probe)
    if args.lora:
        import peft                         # needed here alone
        wan.requires_grad_(False)
        wan.add_adapter(peft.LoraConfig(r=args.lora, lora_alpha=args.lora, target_modules=ADAPTED))
        wan.patch_embedding.requires_grad_(True)
        wan.proj_out.requires_grad_(True)
        for weight in filter(lambda weight: weight.requires_grad, wan.parameters()):
            weight.data = weight.data.float()
    wan.enable_gradient_checkpointing()
    return wan.train()

def print_sizes(config, rank):
    """Prints what training takes, with and without LoRA of a rank. Nothing is computed."""
    with torch.device("meta"):
        wan = WanTransformer3DModel.from_config(config)
    before = sum(p.numel() for p in wan.parameters())
    P = sum(p.numel() for p in add_motion(wan).parameters())
    lora = rank * sum(sum(layer.weight.shape) for name, layer in wan.named_modules()
                      if name.endswith(tuple(ADAPTED)))
    # bytes of fp32: weights, gradients and AdamW's moments; of bf16: weights that are not trained
    full, small = 16 * P, 2 * P + 16 * (lora + 2 * (P - before))
    print0(f"{P / 1e9:.3f} B parameters, {(P - before) / 1e6:.1f} M of them new: {full / 1e9:.1f} "
           f"GB on each GPU; with --lora {rank} ({lora / 1e6:.1f} M and the two layers learn) "
           f"{small / 1e9:.1f} GB; a clip's activations come on top")

# ---------------------------------------------------------------- clips, encoded once

def write_sprites(folder, frames, fps):
    """A folder of the sprite world's clips, for --tiny without --data."""
    folder.mkdir(parents=True, exist_ok=True)
    video, _, captions, _ = sprite_clips(range(4), frames, 32)
    for i, (clip, caption) in enumerate(zip(video, captions)):
        common.write_video(folder / f"{i}.mp4", clip, fps, 1)
        common.write_text(folder / f"{i}.txt", caption)

@torch.no_grad()
def encode_videos(args):
    """Writes DIR/clips/KEY.pt of the videos that have none, each process its share: text y (L, D),
    latents x and d (C, T', H', W'), not scaled. null.pt has y alone, of "". Returns the keys."""
    folder, (H, W), side, videos = args.out / "clips", args.size, max(args.size), {"null": ("", "")}
    folder.mkdir(parents=True, exist_ok=True)
    for name, caption in find_videos(args.data)[1]:
        path = Path(args.data) / name
        key = repr((name, caption, path.is_file() and path.stat().st_size)).encode()
        videos[hashlib.sha256(key).hexdigest()[:16]] = path, caption or ""
    share = sorted(videos)[rank()::common.world_size()]
    if missing := [key for key in share if not (folder / f"{key}.pt").exists()]:
        vae, raft, text = load_vae(args), RAFT.load().to(args.device), text_encoder(args)
    for key in tqdm(missing, "encoding", disable=rank() > 0):
        path, caption = videos[key]
        content = {"kind": "clip", "y": text(caption)}
        try:
            if path and not caption.strip():
                raise ValueError("no caption")
            if path:
                video = read_clip(path, 0, args.frames, args.fps, side).to(args.device)[None] / 255
                video = video[..., (side - H) // 2:, (side - W) // 2:][..., :H, :W]
                both = torch.cat([video, flow_to_rgb(estimate_flow(raft, video))]) * 2 - 1
                z = vae.encode(both.transpose(1, 2)).latent_dist.mode()
                content["x"], content["d"] = z.half().cpu()
            common.write_tensors(folder / f"{key}.pt", content)
        except ValueError as error:
            print0(f"skipped {path}: {error}")
    barrier()
    keys = [key for key in sorted(videos) if (folder / f"{key}.pt").exists() and key != "null"]
    if not keys:
        raise ValueError(f"{args.data}: none of its {len(videos) - 1} videos can be used")
    return keys

def read(args, key):
    """x1, d1 and y of a clip, scaled, each with a batch axis; of "null", y alone."""
    clip = read_tensors(args.out / f"clips/{key}.pt", "clip")
    latents = [(clip[name].float() - mean) / deviation
               for name, (mean, deviation) in args.scale.items() if name in clip]
    return [part[None].to(args.device) for part in (*latents, clip["y"].float())]

def prepare(args):
    """Encodes the videos, writes wan.json, the run's settings, and returns the videos' keys."""
    (H, W), path = args.size, args.out / "wan.json"
    if args.frames % 4 != 1 or H % 16 or W % 16:
        raise ValueError(f"{args.frames} frames of {H}x{W}: Wan's VAE takes 4n + 1 frames, such as "
                         f"{args.frames // 4 * 4 + 1}, and sides that are multiples of 16")
    settings = {name: vars(args)[name] for name in KEPT}
    if path.is_file():
        refuse_changes(args.out, common.read_json(path), settings)
    if not args.data:
        args.data = args.out / "videos"
        if rank() == 0 and not args.data.exists():
            write_sprites(args.data, args.frames, args.fps)
        barrier()
    keys = encode_videos(args)
    if rank() == 0 and not path.is_file():
        # the VAE's mean and deviation are of natural video; RGB flow is mostly white
        d = torch.cat([read_tensors(args.out / f"clips/{key}.pt", "clip")["d"].float().flatten(1)
                       for key in keys[:256]], 1)
        vae = load_vae(args).config
        settings["x"] = vae.latents_mean, vae.latents_std
        settings["d"] = d.mean(1).tolist(), d.std(1).clamp(min=1e-3).tolist()
        common.write_text(path, json.dumps(settings))
    barrier()
    return keys

def read_settings(args):
    """args with wan.json's; scale: {"x": mean and deviation (C, 1, 1, 1), "d": ...}."""
    run = common.read_json(args.out / "wan.json", *KEPT, "x", "d")
    run["scale"] = {name: torch.tensor(run[name])[..., None, None, None] for name in "xd"}
    return argparse.Namespace(**{**run, "out": args.out, "device": args.device})

# ---------------------------------------------------------------- training

def add_gradients(args, wan, keys, null, step):
    """Gradients of a step over this process's clips, one by one. Returns the losses of x and d."""
    losses, C = torch.zeros(2, device=args.device), wan.config.out_channels // 2
    for place in range(args.batch)[rank()::common.world_size()]:
        generator = rng(args.seed, step, place)
        x1, d1, y = read(args, keys[torch.randint(len(keys), (), generator=generator)])
        noise = sample_noise(x1.shape, generator, shift=args.t_shift)
        with autocast(args.device):
            mse = joint_loss(velocity(wan), x1, d1, y, null, noise, "channels")
        (mse.mean() / args.batch).backward()
        losses += mse.detach().view(2, C).mean(1) / args.batch
    if dist.is_initialized():
        for part in (losses, *(p.grad for p in wan.parameters() if p.requires_grad)):
            dist.all_reduce(part)
    return losses.tolist()

def optimizer_step(optimizer, lr_scale):
    """AdamW's step; weights in lr_scale, {weight: factors}, go so many times as far."""
    before = {weight: weight.detach().clone() for weight in lr_scale}
    optimizer.step()
    for weight, factors in lr_scale.items():
        weight.data = torch.lerp(before[weight], weight.data, factors)

def train(args):
    keys, wan, step, steps = prepare(args), load_widened(args), 0, args.steps
    args = read_settings(args)
    (null,), C, path = read(args, "null"), wan.config.out_channels // 2, args.out / "checkpoint.pt"
    weights = {name: weight for name, weight in wan.named_parameters() if weight.requires_grad}
    optimizer = torch.optim.AdamW(weights.values(), args.lr, weight_decay=0)
    lr_scale = {weight: torch.where(new_entries(weight, axis, C, channel_last), MOTION_LR_SCALE, 1.)
                .to(args.device) for weight, axis, channel_last in (
        (wan.patch_embedding.weight, 1, False), (wan.proj_out.weight, 0, True),
        (wan.proj_out.bias, 0, True))}
    if path.exists():
        state = read_tensors(path, "wan")
        step = state["step"]
        wan.load_state_dict(state["weights"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
    saved, bar = time.time(), tqdm(total=steps, initial=step, desc="VideoJAM", disable=rank() > 0)
    with stop_signals() as stop, bar:
        while step < steps:
            loss_x, loss_d = add_gradients(args, wan, keys, null, step)
            step += 1
            optimizer.param_groups[0]["lr"] = args.lr * min(1, step / 100)
            if torch.nn.utils.clip_grad_norm_(weights.values(), 1.).isfinite():
                optimizer_step(optimizer, lr_scale)
            optimizer.zero_grad()
            bar.update()
            bar.set_postfix(loss_x=f"{loss_x:.3f}", loss_d=f"{loss_d:.3f}")
            show = step % max(1, steps // 5) == 0
            stopping, late = common.any_rank(args.device, bool(stop),
                                             time.time() > saved + CHECKPOINT_SECONDS)
            if rank() == 0 and (show or stopping or late):
                common.write_tensors(path, {"kind": "wan", "step": step, "weights": weights,
                                            "optimizer": optimizer.state_dict()})
                saved = time.time()
            if stopping:
                raise ValueError(f"stopped at step {step}: the same command goes on")
            if rank() == 0 and show:
                (args.out / "previews").mkdir(exist_ok=True)
                shown = generate(args, wan.eval(), read(args, keys[0])[2], null, 20)
                common.write_video(args.out / f"previews/{step:06d}.mp4",
                                   common.grid(*(part[None] for part in shown)), args.fps)
                wan.train()
            barrier()
    if rank() == 0:
        if args.lora:                       # adapters become part of the weights
            wan.fuse_lora()
            wan.unload_lora()
        wan.save_pretrained(args.out / "transformer")
        print0(f"{args.out}: {step} steps; python examples/wan.py sample {args.out} PROMPT")

# ---------------------------------------------------------------- sampling

@torch.no_grad()
def generate(args, wan, y, null, steps, w1=5., w2=3., seed=0, one_by_one=True):
    """Text y and null (1, L, D) -> the video and its RGB motion, (T, 3, H, W) in [0, 1] each."""
    C, (H, W), vae = wan.config.out_channels // 2, args.size, load_vae(args)
    noise = torch.randn(2, 1, C, (args.frames + 3) // 4, H // 8, W // 8,
                        generator=torch.Generator().manual_seed(seed)).to(args.device)
    with autocast(args.device):
        latents = euler_sample(velocity(wan, one_by_one), *noise, y, linear_quadratic(steps), w1,
                               w2, null=null, progress="sampling")
    scaled = (z.cpu() * deviation + mean for z, (mean, deviation) in zip(latents,
                                                                         args.scale.values()))
    return [vae.decode(z.to(args.device)).sample[0].transpose(0, 1) / 2 + .5 for z in scaled]

def sample(args):
    """Writes a prompt's video, and its motion beside it."""
    run = read_settings(args)
    wan = load(WanTransformer3DModel, args.out / "transformer",
               dtype=fast_dtype(args.device)).to(args.device)
    encode = text_encoder(run)
    y, null = (encode(text)[None].float().to(args.device) for text in (args.prompt, ""))
    del encode                              # a large model
    shown = generate(run, wan, y, null, args.steps, args.w1, args.w2, args.seed, args.one_by_one)
    for name, video in zip(("", "-motion"), shown):
        path = args.file.with_stem(args.file.stem + name)
        common.write_video(path, video, run.fps)
        print(path)

def size(text):
    """An argparse type: HEIGHTxWIDTH -> [height, width]."""
    height, width = map(int, text.split("x"))
    return [height, width]

def parse():
    parser, whole = common.Parser(description=__doc__.splitlines()[0]), common.positive_int
    commands = parser.add_subparsers(dest="command", required=True)
    flag = commands.add_parser("train").add_argument
    flag("--model", default="Wan-AI/Wan2.1-T2V-1.3B-Diffusers", help="folder, or the hub's name")
    flag("--data", help="folder of videos")
    flag("--out", help="the run's folder")
    flag("--size", type=size, default="480x832")
    flag("--frames", type=whole, default=81)
    flag("--fps", type=whole, default=16)
    flag("--lora", type=whole, metavar="RANK", help="train adapters and the two layers alone")
    flag("--steps", type=whole, default=5000, help="with fewer than are done, it ends now")
    flag("--lr", type=common.positive, default=5e-6, help="the paper's; adapters take more")
    flag("--batch", type=whole, default=32, help="clips a step, of all processes together")
    flag("--t-shift", type=common.positive, default=3., help="above 1: more t near noise")
    flag = commands.add_parser("sample").add_argument
    flag("out", nargs="?", help="the run's folder")
    flag("prompt")
    flag("--file", type=Path, default="wan.mp4", help="and NAME-motion.mp4 beside it")
    flag("--steps", type=whole, default=100)
    flag("--w1", type=float, default=5)
    flag("--w2", type=float, default=3)
    flag("--one-by-one", action="store_true", help="Eq. 8's terms in turn: less memory")
    for command in commands.choices.values():
        command.add_argument("--tiny", action="store_true", help="a random model")
        command.add_argument("--seed", type=common.seed, default=0)
        command.add_argument("--device", help="default: a GPU if there is one")
    if "--tiny" in sys.argv:
        commands.choices["train"].set_defaults(model="tiny", size=[32, 32], frames=9, fps=8,
                                               lr=1e-3, steps=20, batch=4)
    args = parser.parse_args()
    args.out = Path(args.out or f"runs/wan{'-tiny' * args.tiny}")
    if args.command == "train" and not (args.data or args.tiny):
        raise ValueError("no videos: --data FOLDER")
    args.device = common.join_processes(common.device_of(args.device))
    if args.command == "train" and args.batch < common.world_size():
        raise ValueError(f"--batch {args.batch}: fewer clips than processes")
    if args.tiny:                           # for tiny tensors more threads only wait
        torch.set_num_threads(1)
    return args

def main():
    logging.set_verbosity_error()           # diffusers': our errors are one line
    logging.disable_progress_bar()
    args = parse()
    {"train": train, "sample": sample}[args.command](args)
    if dist.is_initialized():
        dist.destroy_process_group()

if __name__ == "__main__":
    common.report_errors(main)

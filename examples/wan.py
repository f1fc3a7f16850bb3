"""VideoJAM for Wan 2.1 text-to-video, for people who have its weights.

    pip install -r requirements.txt "diffusers>=0.42" transformers accelerate ftfy
    python examples/wan.py train --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --data FOLDER --out DIR
    torchrun --nproc_per_node=8 examples/wan.py train ...       the same on many GPUs
    python examples/wan.py sample DIR "a dog runs along a beach"
    python examples/wan.py train --tiny && python examples/wan.py sample --tiny "a red square"

It is train.py (stage jam, clip by clip) and sample.py with other models: their flags, the layout of
FOLDER, and resuming are the same. Without --steps it trains as long as the paper's 4B, 50,000 steps
of 32 clips. --tiny: the same lines with a random model of two layers, on a CPU in a minute. At the
end DIR/transformer is there, which `sample` and WanTransformer3DModel.from_pretrained load: weights
averaged over the last steps, and in them the adapters of --lora (which needs peft).
"""
import argparse
import functools
import hashlib
import importlib.util
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from diffusers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import sample                                                                       # noqa: E402
import train                                                                        # noqa: E402
import videojam                                                                     # noqa: E402
from common import (Parser, autocast, barrier, fast_dtype, join_processes,          # noqa: E402
                    leave_processes, one_line, positive_int, print0, rank, read_json, read_tensors,
                    report_errors, world_size, write_tensors)
from videojam import VideoJAM, check_velocity, widen_input, widen_output            # noqa: E402

TINY = {WanTransformer3DModel: {
            "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4,
            "text_dim": 32, "freq_dim": 32, "ffn_dim": 48, "num_layers": 2},
        AutoencoderKLWan: {"base_dim": 4, "z_dim": 4, "dim_mult": [1] * 4, "num_res_blocks": 1,
                           "latents_mean": [0.] * 4, "latents_std": [1.] * 4}}
FLAGS = "--preset 4b --t-shift 3 --no-compile --prepare 2000"       # 5 GB
TINY_FLAGS = "--out runs/wan-tiny --steps 20 --lr 1e-3 --batch 4 --no-activation-checkpointing"
ADAPTED = ["to_q", "to_k", "to_v", "to_out.0"]              # the layers that get LoRA's adapters
SETTINGS = "model", "size", "frames", "lora"
# 20 bytes for what learns: weight, average, gradient, AdamW's two moments; 4 for what does not
REAL = """Wan 2.1 of 1.3 B: 1.419 B parameters, 0.2 M of them new: 28.4 GB, spread over the GPUs.
With --lora 32, 23.6 M and the two layers learn: 6.2 GB. A clip's activations come on top."""

def load(kind, name, **options):
    """A model of a class, by folder or the hub's name. ValueError where its weights are not."""
    if name == "tiny":
        torch.manual_seed(0)
        return kind(**TINY[kind]).to(options.get("dtype"))
    try:
        return kind.from_pretrained(name, **options)
    except Exception as error:              # of several libraries: no network, no such file, ...
        raise ValueError(f"{name}: no {kind.__name__} there, nor on the hub: --model takes Wan 2.1 "
                         f"for diffusers ({one_line(error)})") from None

# ---------------------------------------------------------------- Wan and its VAE as ours

def velocity(wan):
    """Wan as model(x, t, y). Its time is 1000 at noise and 0 at data, so its velocity points to
    noise. A batch's samples go in turn: of guidance's terms one is in memory at a time."""
    def u(z, t, y):
        return -wan(z, 1000 * (1 - t), y, return_dict=False)[0].float()
    return lambda *batch: torch.cat(
        [u(*sample) for sample in zip(*(part.split(1) for part in batch), strict=True)])

class DiT(videojam.DiT):
    """Wan as a DiT of videojam.py: model(x, t, tokens)."""
    config, text = SimpleNamespace(motion=True), SimpleNamespace(layers=[])
    blocks = property(lambda self: self.wan.blocks)
    W_in = property(lambda self: self.wan.patch_embedding)
    W_out = property(lambda self: self.wan.proj_out)

    def __init__(self, run, wan):
        torch.nn.Module.__init__(self)
        self.run, self.wan = run, wan

    def forward(self, z, t, tokens):
        prompts = [bytes(k - 1 for k in row if 0 < k < 257).decode() for row in tokens.tolist()]
        y = torch.stack([self.run.prompt_embedding(prompt) for prompt in prompts]).to(z.device)
        vars(self.run).pop("text_encoder", None)                # it is large
        return velocity(self.wan)(z, t, y)

class TAE(torch.nn.Module):
    """Wan's VAE as a TAE of videojam.py, in fp32. scale: mean and deviation of the latents of
    video, the VAE's own, and of motion."""
    def __init__(self, vae):
        super().__init__()
        c, self.vae = vae.config, vae
        own = torch.tensor([c.latents_mean, c.latents_std])[..., None, None, None]
        self.scale = [own, torch.tensor([0., 1.])]

    @torch.no_grad()
    def encode(self, video, motion=False):
        """Videos (B, T, 3, H, W) -> latents (B, C, T', H', W')."""
        mean, deviation = self.scale[motion].to(video.device)
        with autocast(video.device, torch.float32):
            z = self.vae.encode(video.transpose(1, 2) * 2 - 1).latent_dist.mode()
        return (z - mean) / deviation

    @torch.no_grad()
    def decode(self, z, motion=False, frames=None):
        mean, deviation = self.scale[motion].to(z.device)
        with autocast(z.device, torch.float32):
            return self.vae.decode(z * deviation + mean).sample.transpose(1, 2) / 2 + .5

# ---------------------------------------------------------------- train.py's run and stage

class WanRun(train.Run):
    """A run of our own flags and train.py's."""
    def __init__(self, own, flags):
        sys.argv[1:] = f"{FLAGS} {TINY_FLAGS if own.tiny else ''}".split() + flags
        args = argparse.Namespace(**{**vars(train.parse()), **vars(own)})
        if own.command == "train" and not (args.data or own.tiny):
            raise ValueError("no videos: --data FOLDER")
        join_processes(args.device)
        super().__init__(args)
        T, (H, W) = args.frames, map(int, (*re.findall(r"\d+", args.size), 1, 1)[:2])
        if T < 5 or T % 4 != 1 or H % 16 or W % 16:
            raise ValueError(f"{T} frames of {args.size}: Wan's VAE takes 4n + 1 frames, such as "
                             f"{max(5, T // 4 * 4 + 1)}, and --size sides that are multiples of 16")
        if args.command == "train":
            if args.lora and not importlib.util.find_spec("peft"):
                raise ValueError("--lora needs peft: pip install peft")
            if not args.data and H != W:
                raise ValueError(f"--size {args.size}: without --data clips are square")
        self.settings |= {name: vars(args)[name] for name in SETTINGS}
        if args.command == "train" and (path := self.out / "settings.json").is_file():
            train.refuse_changes(self.out, read_json(path), self.settings)
        vae = load(AutoencoderKLWan, args.model, subfolder="vae", dtype=torch.float32)
        self.vae, C = TAE(vae).to(self.device), vae.config.z_dim
        self.preset = SimpleNamespace(
            **self.choices, frames=T, fps=16, size=(H, W) if args.data else H,
            dit=SimpleNamespace(channels=C, max_bytes=2 ** 16), sampler=self.preset.sampler,
            latent_shape=lambda: (C, (T + 3) // 4, H // 8, W // 8))

    @functools.cache
    def tae(self):
        """The VAE, knowing the motion's scale, of 16 clips: RGB flow is mostly white."""
        path = self.out / "motion.pt"
        if rank() == 0 and not path.exists():
            clips = (self.dataset.training([i]) for i in range(16))
            d = torch.cat([self.vae.encode(self.dataset.motion(video.to(self.device), extra),
                                           motion=True).cpu() for video, _, extra, _ in clips])
            d = d.transpose(0, 1).flatten(1)
            scale = torch.stack([d.mean(1), d.std(1).clamp(min=1e-3)])
            write_tensors(path, {"kind": "motion", "scale": scale[..., None, None, None]})
        barrier()
        self.vae.scale[1] = read_tensors(path, "motion")["scale"]
        return self.vae

    @functools.cached_property
    def text_encoder(self):
        """A function: prompt -> its embeddings (512, 4096), zero after its end."""
        if self.args.model == "tiny":       # a stand-in: a random vector for each byte
            table = torch.randn(256, 32, generator=train.rng("text"))
            return lambda prompt: table[list(prompt.encode().ljust(40)[:40])]
        pipe = load(WanPipeline, self.args.model, transformer=None, vae=None,
                    dtype=fast_dtype(self.device)).to(self.device)
        return lambda prompt: pipe.encode_prompt(prompt, do_classifier_free_guidance=False,
                                                 max_sequence_length=512)[0][0].cpu()

    @functools.lru_cache(8)                 # a sampling step asks for the same ones again
    @torch.no_grad()
    def prompt_embedding(self, prompt):
        """(L, D), kept in DIR/texts."""
        path = self.out / f"texts/{hashlib.md5(prompt.encode()).hexdigest()}.pt"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            y = self.text_encoder(prompt)
            words = y[:y.any(1).sum()].clone()              # the rest is zero, and megabytes
            write_tensors(path, {"kind": "text", "y": words, "length": len(y)})
        text = read_tensors(path, "text")
        return F.pad(text["y"].float(), (0, 0, 0, text["length"] - len(text["y"])))

    def build(self, dtype):
        """Wan with motion (Sec. 4.2), checked, on the CPU. With --lora its adapters and two layers
        learn, in fp32 whatever the dtype: bf16 would round steps of 5e-6 away."""
        args = self.args
        wan = load(WanTransformer3DModel, args.model, subfolder="transformer", dtype=dtype)
        c, C = wan.config, wan.config.out_channels
        torch.manual_seed(args.seed)
        probe = torch.randn(1, c.in_channels, 1, 8, 8), torch.rand(1), torch.randn(1, 8, c.text_dim)
        with torch.no_grad(), autocast("cpu", dtype):
            before = velocity(wan)(*probe)
            wan.patch_embedding = widen_input(wan.patch_embedding, C, channel_last=False)
            wan.proj_out = widen_output(wan.proj_out, C, channel_last=True)
            check_velocity(before, velocity(wan), *probe)
        wan.register_to_config(in_channels=2 * C, out_channels=2 * C)   # from_pretrained reads it
        if args.lora:
            import peft                     # needed here alone
            wan.requires_grad_(False)
            wan.add_adapter(peft.LoraConfig(r=args.lora, lora_alpha=args.lora,
                                            target_modules=ADAPTED))
            for name, weight in wan.named_parameters():
                if "lora" in name or name.startswith(("patch_embedding", "proj_out")):
                    weight.data = weight.data.float()
                    weight.requires_grad_(True)
        return DiT(self, wan)

    def load_dit(self, path, stage, dtype=torch.float32):
        """Wan with a checkpoint's averaged weights, whole and plain, on this process's CPU."""
        dit = self.build(dtype)
        self.load_ema(path, dit)
        if self.args.lora:
            dit.wan.fuse_lora()
            dit.wan.unload_lora()
        return dit

class WanStage(train.DiTStage):
    decay, shown = 1e-9, 1                  # the learning rate does not fall; previews are slow

    def starting_point(self):
        return None, self.run.args.model

    def build(self, source):
        run = self.run
        for caption in sorted({*self.latents.captions, ""})[rank()::world_size()]:
            run.prompt_embedding(caption)
        barrier()
        run.dit.wan.enable_gradient_checkpointing()
        dit = train.distribute(run.dit, run)                    # under torchrun in shards
        return dit, train.motion_lr_scale(dit, run.preset.dit.channels)

    def make_optimizers(self, model, lr):
        learn = [weight for weight in model.parameters() if weight.requires_grad]
        return [torch.optim.AdamW(learn, lr, weight_decay=0)]

# ---------------------------------------------------------------- the two commands

def fine_tune(own, flags):
    run = WanRun(own, flags)
    args = run.args
    args.accumulate = max(1, run.hyperparameters("jam")[2] // world_size())     # clip by clip
    print0(REAL)
    run.dit = run.build(args.precision if args.lora else torch.float32)
    run.create()
    train.encode(run)
    train.train_loop(run, WanStage(run, "jam"))
    if rank() == 0:
        dit = run.load_dit(run.last("jam")[0], "jam", args.precision)
        shutil.rmtree(run.out / "transformer", ignore_errors=True)
        dit.wan.save_pretrained(run.out / "transformer.part")   # so that it is whole, or not there
        (run.out / "transformer.part").rename(run.out / "transformer")
        print(f"python examples/wan.py sample {run.out} PROMPT")
    leave_processes()

def sample_videos(own, flags):
    folder, *flags = ["runs/wan-tiny"] * own.tiny + flags or [""]
    if not folder or folder.startswith("-"):
        raise ValueError(f"sample DIR PROMPT: the run's folder comes first, not {folder or 'none'}")
    settings = read_json(Path(folder, "settings.json"), *SETTINGS)
    vars(own).update({name: settings[name] for name in SETTINGS})
    sys.argv[1:] = ["--run", folder, *flags]
    args = sample.parse()
    prompts = sample.read_prompts(args)
    if args.compare or args.which != "jam":
        raise ValueError(f"--compare, --which {args.which}: {folder} has VideoJAM's weights alone")
    if not Path(folder, "transformer").is_dir():
        raise ValueError(f"{folder}: not trained to its end yet, the same train command goes on")
    run = WanRun(own, ["--out", folder, *(["--device", args.device] if args.device else [])])
    wan = load(WanTransformer3DModel, run.out / "transformer", dtype=run.args.precision)
    model = VideoJAM(run.preset, run.tae(), DiT(run, wan.to(run.device)))
    model.generate = functools.partial(model.generate, batch=1)     # large clips one by one
    sample.write_samples(args, prompts, {"jam": model})

def main():
    logging.set_verbosity_error()           # diffusers': our errors are one line
    logging.disable_progress_bar()
    parser = Parser(__doc__)
    flag = parser.add_argument
    flag("command", choices=("train", "sample"))
    flag("--model", default="Wan-AI/Wan2.1-T2V-1.3B-Diffusers", help="folder, or the hub's name")
    flag("--size", default="480x832", help="height and width")
    flag("--frames", type=positive_int, default=81)
    flag("--lora", type=positive_int, metavar="RANK", help="train adapters and two layers")
    flag("--tiny", action="store_true", help="a random model")
    if "--tiny" in sys.argv:
        parser.set_defaults(model="tiny", size="32x32", frames=9)
        torch.set_num_threads(1)            # for tiny tensors more threads only wait
    own, flags = parser.parse_known_args()
    {"train": fine_tune, "sample": sample_videos}[own.command](own, flags)

if __name__ == "__main__":
    report_errors(main)

"""What all scripts share: errors in one line, whole files, devices, processes, the optimizer."""
import argparse
import contextlib
import ctypes
import datetime
import functools
import itertools
import json
import logging
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import imageio.v3 as iio
import imageio_ffmpeg
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent
logging.getLogger("imageio_ffmpeg").setLevel(logging.ERROR)     # it warns of every resized video

# ---------------------------------------------------------------- errors: one line, exit code 2

class Parser(argparse.ArgumentParser):
    """-h shows a script's docstring too. Errors are ValueErrors, which `report_errors` prints on
    one line."""
    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        raise ValueError(f"{message} (-h shows all flags)")

def number(kind, low, high, wanted):
    """An argparse type: a number of `kind` from low to high; the error says what is `wanted`."""
    def parse(text):
        with contextlib.suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        raise argparse.ArgumentTypeError(f"must be {wanted}, got {text}")
    return parse

positive_int = number(int, 1, 2 ** 62, "a positive whole number")
positive = number(float, sys.float_info.min, sys.float_info.max, "a positive number")
fraction = number(float, 0, 1, "from 0 to 1")
guidance_scale = number(float, -1000, 1000, "from -1000 to 1000")
seed = number(int, 0, 2 ** 32 - 1, "a whole number from 0 to 2^32 - 1")     # torch reads 32 bits

def nonempty(text):
    """An argparse type: a path or name that is not empty."""
    if not text:
        raise argparse.ArgumentTypeError("is empty: leave it out, or name one")
    return text

def is_out_of_memory(error):
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or \
        "can't allocate memory" in str(error)               # a CPU's is a RuntimeError

def one_line(error):
    """The first 200 characters of an exception's message, on one line."""
    text = " ".join(str(error).split())         # torch.save's words for a full disk:
    return "No space left on device" if "unexpected pos" in text else text[:200]

def report_errors(main):
    """Runs main(). Wrong input, files or memory become one line and exit code 2; Ctrl-C 130."""
    script = Path(sys.argv[0]).name
    sys.stdout.reconfigure(errors="backslashreplace")       # file names may be any bytes
    try:
        main()
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            error = "out of memory: take a smaller batch or size, fewer videos, or --accumulate"
        elif isinstance(error, RuntimeError):
            raise
        elif getattr(error, "filename", None):
            error = f"cannot use {error.filename}: {error.strerror}"
        print(f"{script}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{script}: interrupted; every file that was written is whole", file=sys.stderr)
        sys.exit(130)

# ---------------------------------------------------------------- files: whole, or not there

def write_file(path, save):
    """Calls save(temporary path), then renames it to `path`. ValueError where that fails."""
    path = Path(path)
    if not path.parent.is_dir():
        raise ValueError(f"{path.parent}: no such folder to write {path.name} into")
    # resolved, because imageio collapses `link/..`
    temporary = path.parent.resolve() / f".{path.stem}.{os.getpid()}.part{path.suffix}"
    try:
        save(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:                # torch.save raises RuntimeErrors
        if is_out_of_memory(error):
            raise
        reason = getattr(error, "strerror", None) or one_line(error)
        raise ValueError(f"cannot write {path}: {reason}") from None
    finally:
        temporary.unlink(missing_ok=True)

def write_text(path, text):
    data = text.encode(errors="surrogateescape")        # a report may name a folder of any bytes
    write_file(path, lambda temporary: temporary.write_bytes(data))

def truncate(prompt, max_bytes):
    """A prompt's first bytes, max_bytes at most (None: all), up to the end of a character."""
    return prompt.encode()[:max_bytes].decode(errors="ignore")

def read_json(path, *keys):
    """The dict of a .json file that has these keys. ValueError where it is damaged."""
    with contextlib.suppress(ValueError):
        content = json.loads(path.read_text())
        if isinstance(content, dict) and content.keys() >= set(keys):
            return content
    raise ValueError(f"{path}: damaged, not the JSON that was written")

def write_tensors(path, content):
    """torch.save of a dict with CPU tensors, which machines without a GPU can read."""
    write_file(path, lambda temporary: torch.save(content, temporary))

def read_tensors(path, kind=None):
    """The dict of a `write_tensors` file of a "kind"; no code in it runs. ValueError for others."""
    try:
        content = torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:                  # a damaged file can raise almost anything
        reason = getattr(error, "strerror", None) or "damaged, or not a file of weights"
        raise ValueError(f"{path}: {reason}") from None
    if not isinstance(content, dict) or content.get("kind") != kind:
        raise ValueError(f"{path}: not a {kind or 'state dict'} file")
    return content

# ---------------------------------------------------------------- videos

# square pixels, upright; what changes its size in the middle goes on in the first one
SQUARE = "scale=iw*max(1\\,sar):ih*max(1\\,1/sar),setsar=1"
# BT.2408: HDR's white is 203 nits; what is brighter is compressed into the last tenth
TONE_MAP = ("zscale=t=linear:npl=203,format=gbrpf32le,zscale=p=bt709,tonemap=mobius:param=.9,"
            "zscale=t=bt709:m=bt709:r=tv,format=yuv420p,")

@functools.cache
def ffmpeg():
    """The path of the program ffmpeg. OSError where there is none: no video is to blame."""
    with contextlib.suppress(RuntimeError, OSError, subprocess.CalledProcessError):
        path = imageio_ffmpeg.get_ffmpeg_exe()
        subprocess.run([path, "-version"], check=True, capture_output=True)
        return path
    raise OSError("no ffmpeg: pip install imageio-ffmpeg, or let IMAGEIO_FFMPEG_EXE name one")

def video_header(path):
    """What a video says of itself: "fps", "duration" in s, "pix_fmt". ValueError: not a video."""
    ffmpeg()
    if not os.access(path, os.R_OK):
        raise ValueError("permission denied" if os.path.exists(path) else "no such file")
    with contextlib.suppress(Exception):        # whatever the decoder says of other files
        with contextlib.closing(imageio_ffmpeg.read_frames(str(Path(path).absolute()))) as reader:
            return next(reader)
    raise ValueError("cannot be decoded")

def open_video(path, filters="", before=(), after=("-fps_mode", "passthrough")):
    """Yields a video's frames, (3, H, W) uint8: all of them, unless ffmpeg's options before and
    after its input say otherwise; upright, square pixels, standard range. ValueError: broken."""
    ffmpeg()
    chain, hdr = SQUARE + "," * bool(filters) + filters, False

    def start(chain):
        # imageio's own reader knows fewer suffixes; absolute, as ffmpeg takes `12:` for a protocol
        reader = imageio_ffmpeg.read_frames(
            str(Path(path).absolute()), input_params=["-reinit_filter", "0", *before],
            output_params=["-vf", chain, *after])
        return next(reader), reader

    try:
        header, reader = start(chain)
        if hdr := any(curve in header["pix_fmt"] for curve in ("smpte2084", "arib-std-b67")):
            header, reader = start(TONE_MAP + chain)
        width, height = header["size"]
        for data in reader:
            yield (torch.frombuffer(bytearray(data), dtype=torch.uint8).view(height, width, 3)
                   .permute(2, 0, 1))
    except Exception:                           # whatever the decoder says of a broken file
        raise ValueError("cannot be decoded" + ": HDR, ffmpeg has no zscale" * hdr) from None

def frames_and_rate(path):
    """How many frames a video file's picture has, and how many a second on average, by decoding it:
    headers count the sound too, and have another rate where it varies. ValueError: undecodable."""
    rate = video_header(path)["fps"]
    try:
        count, seconds = imageio_ffmpeg.count_frames_and_secs(str(Path(path).absolute()))
    except (RuntimeError, ValueError):          # a file without frames
        raise ValueError("cannot be decoded") from None
    average = count / seconds if seconds else rate
    return count, rate if abs(average - rate) < .01 * rate else average

def check_video(path, frames):
    """OSError unless a video that was just written is whole: ffmpeg is silent on a full disk."""
    with contextlib.suppress(RuntimeError):
        if imageio_ffmpeg.count_frames_and_secs(str(path.absolute()))[0] == frames:
            return
    raise OSError("the video is not whole, is the disk full?")

def write_mp4(path, frames, fps):
    """Writes frames (H, W, 3) uint8, an array or a generator, to a temporary path."""
    ffmpeg()
    count = itertools.count()                   # zip takes one a frame: the next is how many
    iio.imwrite(path, (frame for frame, _ in zip(frames, count)), plugin="FFMPEG", is_batch=True,
                fps=fps, macro_block_size=2, output_params=["-crf", "12"], ffmpeg_log_level="quiet")
    check_video(path, next(count))

def write_video(path, video, fps, scale=None):
    """(T, 3, H, W) in [0, 1] -> .mp4 or .gif, enlarged by `scale`, default: to about 256 px."""
    scale = scale or max(1, round(256 / video.shape[-2]))
    frames = (video.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    frames = frames.repeat(scale, 1).repeat(scale, 2)
    if Path(path).suffix.lower() == ".gif":
        ends = [round(100 * k / fps) for k in range(len(frames) + 1)]  # a gif counts in 1/100 s
        durations = [10 * (end - start) for start, end in itertools.pairwise(ends)]
        # as bytes: imageio prints tracebacks on a full disk
        data = iio.imwrite("<bytes>", frames, extension=".gif", loop=0, duration=durations)
        write_file(path, lambda temporary: temporary.write_bytes(data))
    else:
        write_file(path, lambda temporary: write_mp4(temporary, frames, fps))

def grid(*videos):
    """Videos (n, T, 3, H, W) -> one (T, 3, H', W'): n columns, one row per argument."""
    rows = [torch.cat(list(F.pad(video, (1, 1, 1, 1), value=1)), -1) for video in videos]
    return torch.cat(rows, -2)

# ---------------------------------------------------------------- devices

def keep_freed_memory():
    """Lets glibc's malloc keep freed memory: page faults were a fifth of a CPU's training step."""
    with contextlib.suppress(AttributeError, OSError, TypeError):       # other C libraries
        mallopt, M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = ctypes.CDLL(None).mallopt, -1, -3
        mallopt(M_TRIM_THRESHOLD, 2 ** 31 - 1)
        mallopt(M_MMAP_THRESHOLD, 2 ** 25)                  # the largest that old versions take

def device_of(name):
    """The torch.device of --device or the default; torchrun's processes have one GPU each."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and "LOCAL_RANK" in os.environ:
        name, count = f"cuda:{os.environ['LOCAL_RANK']}", torch.cuda.device_count()
        if int(os.environ["LOCAL_RANK"]) >= count:
            raise ValueError(f"this machine has {count} GPUs: --nproc_per_node={count} at most")
        torch.cuda.set_device(name)
    try:
        probe = torch.zeros(1, device=name)
        probe.cpu()                             # fails for "meta"
        return probe.device
    except (RuntimeError, AssertionError, ImportError, NotImplementedError) as error:
        raise ValueError(f"--device {name}: take cpu or cuda ({one_line(error)})") from None

# {instruction set: whether this CPU has it}; empty in torch 2.11, which does not tell
CPU_HAS = getattr(torch.cpu, "get_capabilities", dict)()

def fast_dtype(device):
    """bf16 on GPUs and on CPUs with AMX or AVX512-BF16; elsewhere bf16 is slow: fp32."""
    fast = CPU_HAS.get("amx_bf16") or CPU_HAS.get("avx512_bf16")
    return torch.bfloat16 if fast or torch.device(device).type != "cpu" else torch.float32

def autocast(device, dtype=None):
    """Matrix products in `dtype`, by default the device's fast one; the weights stay fp32."""
    dtype = dtype or fast_dtype(device)
    return torch.autocast(torch.device(device).type, torch.bfloat16, dtype == torch.bfloat16)

def can_compile(device):
    """Whether torch.compile works here: on a CPU it needs a C++ compiler and Python's headers."""
    return device.type != "cpu" or bool(shutil.which(os.environ.get("CXX", "g++"))) and \
        Path(sysconfig.get_path("include"), "Python.h").exists()

def compile_layers(dit):
    """torch.compile for each layer of a DiT: training on a CPU gets twice as fast."""
    # GCC 12 does not know newer Xeons, and the code it then makes for AVX512 has NaN gradients
    known = CPU_HAS.get("avx512_f") and "cpp.march" in torch._inductor.list_options()
    for layer in (*dit.text.layers, *dit.blocks):
        layer.compile(options={"cpp.march": "skylake-avx512"} if known else None)

# ---------------------------------------------------------------- processes: one, or torchrun's

def rank():
    return dist.get_rank() if dist.is_initialized() else 0

def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1

def print0(text):
    """Prints on rank 0 alone, above the progress bars."""
    if rank() == 0:
        tqdm.write(text)

def join_processes(device):
    """Joins the processes that torchrun started, if it did."""
    if "RANK" in os.environ:
        # hours, because all wait while rank 0 examines a folder or renders a preview
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                timeout=datetime.timedelta(hours=12))

def barrier():
    if dist.is_initialized():
        dist.barrier()

def leave_processes():
    """Ends a script that torchrun started."""
    if dist.is_initialized():
        dist.destroy_process_group()
        # end here: torch 2.13's gloo threads may abort a process that winds down
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)

def any_rank(device, *flags):
    """Which flags hold on any rank: the same answer on all of them."""
    if world_size() == 1:
        return flags
    votes = torch.tensor(flags, dtype=torch.int32, device=device)
    dist.all_reduce(votes, dist.ReduceOp.MAX)
    return votes.bool().tolist()

# ---------------------------------------------------------------- the optimizer

# (a, b, c) of four steps X <- a X + (b A + c A^2) X with A = X X^T. Each polynomial brings singular
# values from .003 to 1 as near to 1 as it can (Amsel et al., 2025, "The Polar Express").
POLAR = ((8.3019, -24.0424, 17.4699), (4.0103, -2.9290, .5430), (3.5027, -2.5773, .5049),
         (2.5229, -1.8395, .4272))

def orthogonalize(matrices):
    """Matrices (n, rows, columns) -> the same singular vectors, singular values of .78 to 1.22."""
    if hasattr(matrices, "placements"):         # sharded rows: each process takes whole matrices
        from torch.distributed.tensor import DTensor, Shard     # takes a second to import
        placements, mesh = matrices.placements, matrices.device_mesh
        whole = matrices.redistribute(
            placements=[Shard(0) if place.is_shard() else place for place in placements])
        result = DTensor.from_local(orthogonalize(whole.to_local()).contiguous(), mesh,
                                    whole.placements, shape=whole.shape, stride=whole.stride())
        return result.redistribute(placements=placements)
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    X = wide.to(fast_dtype(matrices.device))
    X = X / X.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for a, b, c in POLAR:
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X if wide is matrices else X.mT

class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024) with Nesterov momentum, for matrices and convolution kernels: rare
    directions learn as fast as dominant ones. A step has the size of AdamW's, .2 lr an element.
    (torch.optim.Muon takes matrices alone, and bf16 everywhere.)"""
    def __init__(self, weights, lr, momentum=.95):
        super().__init__(weights, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            same_shape = {}                     # multiplied at once: fewer and larger products
            for weight in group["params"]:
                same_shape.setdefault(weight.shape, []).append(weight)
            for weights in same_shape.values():
                matrices = []
                for weight in weights:
                    if not self.state[weight]:
                        self.state[weight]["momentum"] = torch.zeros_like(weight)
                    momentum = self.state[weight]["momentum"]
                    momentum.lerp_(weight.grad, 1 - group["momentum"])
                    matrices.append(weight.grad.lerp(momentum, group["momentum"]).flatten(1))
                step = -group["lr"] * .2 * max(matrices[0].shape) ** .5
                for weight, update in zip(weights, orthogonalize(torch.stack(matrices))):
                    weight.add_(update.view_as(weight), alpha=step)

def make_optimizers(model, lr):
    """[AdamW, Muon]: Muon for the weights of Linears and convolutions, AdamW for all others."""
    matrices = {module.weight: None for module in model.modules()
                if isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d))}
    others = [weight for weight in model.parameters() if weight not in matrices]
    return [torch.optim.AdamW(others, lr, (.9, .99), weight_decay=0, fused=True),
            Muon(matrices, lr)]

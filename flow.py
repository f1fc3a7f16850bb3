"""Motion from video: optical flow as RGB (Eq. 5), and RAFT, which estimates it (Sec. 4.2).

    python flow.py video.mp4        writes the flow of a video, as a video beside it

RAFT's weights are ours; `python train.py --stage raft` trains them. Flow is (..., 2, H, W) in
pixels per frame, x (right) then y (down). Flow k goes from frame k to k + 1; the last is repeated.
"""
import itertools
import math
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from common import (ROOT, Parser, autocast, device_of, frames_and_rate, one_line, open_video,
                    read_tensors, report_errors, write_file, write_mp4)

# ---------------------------------------------------------------- Sec. 4.2: flow as RGB (Eq. 5)

def flow_to_rgb(flow, sigma=0.15):
    """Eq. 5. flow (..., 2, H, W) in px -> rgb (..., 3, H, W) in [0, 1].

    Hue is the angle alpha, saturation m = min(1, |flow| / (sigma sqrt(H^2 + W^2))), value 1: still
    is white, and the map can be inverted where m < 1. H, W: those of the frames that the flow was
    measured on. (The paper has a colour for an angle and m as its "opacity"; HSV is our choice.)"""
    H, W = flow.shape[-2:]
    u, v = flow.unbind(-3)
    m = (torch.hypot(u, v) / (sigma * math.hypot(H, W))).clamp(max=1)
    hue = torch.atan2(v, u) / (2 * math.pi) * 6                         # sixths of a turn
    # each channel is 1 on a third of the circle, 0 on a third, and linear in between
    channels = [((hue + shift) % 6 - 3).abs().sub(1).clamp(0, 1) for shift in (0, 4, 2)]
    return 1 - m.unsqueeze(-3) * (1 - torch.stack(channels, -3))

def rgb_to_flow(rgb, sigma=0.15):
    """Inverse of flow_to_rgb where m < 1: (..., 3, H, W) in [0, 1] -> (..., 2, H, W) in px."""
    H, W = rgb.shape[-2:]
    r, g, b = rgb.unbind(-3)
    high, low = rgb.amax(-3), rgb.amin(-3)
    span = (high - low).clamp(min=1e-8)
    hue = torch.where(high == r, (g - b) / span,
                      torch.where(high == g, 2 + (b - r) / span, 4 + (r - g) / span))
    alpha = hue * (2 * math.pi / 6)
    norm = (high - low) / high.clamp(min=1e-8) * (sigma * math.hypot(H, W))
    return torch.stack([norm * alpha.cos(), norm * alpha.sin()], -3)

# ---------------------------------------------------------------- RAFT: the small model
# Teed & Deng, "RAFT: Recurrent All-Pairs Field Transforms for Optical Flow" (ECCV 2020). Module
# names are torchvision's raft_small's, so that its weights load. 990,162 parameters.

LEVELS, RADIUS = 4, 3               # of the correlation pyramid; of the window looked up in it
# channels of the GRU's state, of the context (frame 1), and of motion: 80 encoded, 2 the flow
HIDDEN, CONTEXT, MOTION = 96, 64, 82

def conv(c_in, c_out, kernel, stride=1, norm=False, relu=True):
    """Convolution, instance norm (without parameters), ReLU: RAFT's building block."""
    return nn.Sequential(nn.Conv2d(c_in, c_out, kernel, stride, padding=kernel // 2),
                         *[nn.InstanceNorm2d(c_out)] * norm, *[nn.ReLU(inplace=True)] * relu)

class Bottleneck(nn.Module):
    """Residual block: 1x1 to a quarter of the channels, 3x3, 1x1 back."""
    def __init__(self, c_in, c_out, stride, norm):
        super().__init__()
        self.convnormrelu1 = conv(c_in, c_out // 4, 1, norm=norm)
        self.convnormrelu2 = conv(c_out // 4, c_out // 4, 3, stride, norm)
        self.convnormrelu3 = conv(c_out // 4, c_out, 1, norm=norm)
        self.downsample = (nn.Identity() if stride == 1
                           else conv(c_in, c_out, 1, stride, norm, relu=False))

    def forward(self, x):
        y = self.convnormrelu3(self.convnormrelu2(self.convnormrelu1(x)))
        return F.relu(self.downsample(x) + y, inplace=True)

class Encoder(nn.Module):
    """Image (B, 3, H, W) in [-1, 1] -> (B, c_out, H/8, W/8)."""
    def __init__(self, c_out, norm):
        super().__init__()
        self.convnormrelu = conv(3, 32, 7, 2, norm)
        self.layer1 = nn.Sequential(Bottleneck(32, 32, 1, norm), Bottleneck(32, 32, 1, norm))
        self.layer2 = nn.Sequential(Bottleneck(32, 64, 2, norm), Bottleneck(64, 64, 1, norm))
        self.layer3 = nn.Sequential(Bottleneck(64, 96, 2, norm), Bottleneck(96, 96, 1, norm))
        self.conv = nn.Conv2d(96, c_out, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        return self.conv(self.layer3(self.layer2(self.layer1(self.convnormrelu(x)))))

class UpdateBlock(nn.Module):
    """One iteration: state (B, 96, h, w), context (B, 64, h, w), looked-up correlation (B, 196, h,
    w), flow (B, 2, h, w) in cells -> new state, change of the flow."""
    def __init__(self):
        super().__init__()
        self.motion_encoder = nn.ModuleDict({
            "convcorr1": conv(LEVELS * (2 * RADIUS + 1) ** 2, 96, 1),
            "convflow1": conv(2, 64, 7), "convflow2": conv(64, 32, 3),
            "conv": conv(96 + 32, MOTION - 2, 3)})
        seen = HIDDEN + CONTEXT + MOTION
        self.recurrent_block = nn.ModuleDict({"convgru1": nn.ModuleDict({
            gate: nn.Conv2d(seen, HIDDEN, 3, padding=1) for gate in ("convz", "convr", "convq")})})
        self.flow_head = nn.ModuleDict({"conv1": nn.Conv2d(HIDDEN, 128, 3, padding=1),
                                        "conv2": nn.Conv2d(128, 2, 3, padding=1)})

    def forward(self, state, context, corr, flow):
        encoder, gru = self.motion_encoder, self.recurrent_block["convgru1"]
        motion = torch.cat([encoder["convcorr1"](corr),
                            encoder["convflow2"](encoder["convflow1"](flow))], 1)
        x = torch.cat([context, encoder["conv"](motion), flow], 1)
        seen = torch.cat([state, x], 1)
        update, reset = gru["convz"](seen).sigmoid(), gru["convr"](seen).sigmoid()
        new = gru["convq"](torch.cat([reset * state, x], 1)).tanh()
        state = (1 - update) * state + update * new
        return state, self.flow_head["conv2"](self.flow_head["conv1"](state).relu())

def correlation_pyramid(features1, features2):
    """All-pairs correlation, two (B, C, h, w) -> LEVELS of (B h w, 1, h / 2^l, w / 2^l): every cell
    of frame 1 has a map over frame 2; each level averages 2 x 2 cells of the last."""
    B, C, h, w = features1.shape
    with torch.autocast(features1.device.type, enabled=False):          # sub-pixel peaks need fp32
        corr = features1.float().flatten(2).mT @ features2.float().flatten(2)
        corr.div_(math.sqrt(C))
    pyramid = [corr.view(B * h * w, 1, h, w)]
    for _ in range(LEVELS - 1):
        pyramid.append(F.avg_pool2d(pyramid[-1], 2))
    return pyramid

def look_up(pyramid, coords):
    """The pyramid around coords (B, 2, h, w), x then y in cells from the first one's centre -> (B,
    LEVELS * 49, h, w), zero outside: levels, then x offsets (-3..3), then y offsets. As in the
    authors' code x is the *outer* one, and level l takes coords / 2^l, although a pooled cell's
    centre lies (2^l - 1) / 2 fine cells further on: the weights have learned that offset."""
    B, _, h, w = coords.shape
    side = torch.arange(-RADIUS, RADIUS + 1, device=coords.device, dtype=coords.dtype)
    window = torch.stack(torch.meshgrid(side, side, indexing="ij"), -1)         # [i, j] is x, y
    centre = coords.permute(0, 2, 3, 1).reshape(B * h * w, 1, 1, 2)
    looked_up = []
    for level, corr in enumerate(pyramid):
        # grid_sample's -1 and 1 are the centres of the first and last cells (align_corners=True)
        last = torch.tensor(corr.shape[:1:-1], device=coords.device) - 1        # of x, of y
        at = (centre / 2 ** level + window).div_(last / 2).sub_(1)              # (B h w, 7, 7, 2)
        looked_up.append(F.grid_sample(corr, at, align_corners=True).view(B, h, w, -1))
    return torch.cat(looked_up, -1).permute(0, 3, 1, 2)

class RAFT(nn.Module):
    """RAFT()(frame1, frame2, iters): (B, 3, H, W) in [0, 1], any size -> a list of flows, (B, 2, H,
    W) in px, x then y, one per iteration, the last is the best."""
    def __init__(self):
        super().__init__()
        self.feature_encoder = Encoder(128, norm=True)
        self.context_encoder = Encoder(HIDDEN + CONTEXT, norm=False)
        self.update_block = UpdateBlock()

    def forward(self, frame1, frame2, iters=12):
        flows = self.flows(self.prepare(torch.cat([frame1, frame2])), iters)
        return [self.restore(flow, *frame1.shape[-2:]) for flow in flows]

    def flows(self, images, iters):
        """Prepared frames, the first of all pairs and then the second -> flows in cells."""
        features1, features2 = self.feature_encoder(images).chunk(2)
        context = self.context_encoder(images[:len(features1)])
        return self.refine(features1, features2, context, iters)

    def refine(self, features1, features2, context, iters):
        """Features (B, 128, h, w), context (B, 160, h, w) -> flows (B, 2, h, w) in cells."""
        B, _, h, w = features1.shape
        pyramid = correlation_pyramid(features1, features2)
        state, context = context.float().split([HIDDEN, CONTEXT], 1)
        state, context = state.tanh(), context.relu()
        y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        # in the context's memory format, so that what follows has it too
        start = torch.empty_like(context[:, :2], dtype=torch.float32).copy_(torch.stack([x, y]))
        coords, flows = start, []
        for _ in range(iters):
            coords = coords.detach()                # each iteration learns from its own error
            corr = look_up(pyramid, coords)
            state, delta = self.update_block(state, context, corr, coords - start)
            coords = coords + delta.float()
            flows.append(coords - start)
        return flows

    @staticmethod
    def layout(H, W):
        """The size that frames are scaled to, and their padding (left, right, top, bottom)."""
        scale = max(1, min(4, 256 / min(H, W)))     # motion far below a cell (8 px) is hard to see
        scale = min(scale, math.sqrt(2 ** 19 / (H * W)))    # correlations grow as (H W)^2
        h, w = round(H * scale), round(W * scale)
        # whole cells, 16 at least, so that the pyramid's last level has 2
        extra_h, extra_w = (max(128, math.ceil(side / 8) * 8) - side for side in (h, w))
        return (h, w), (extra_w // 2, extra_w - extra_w // 2, extra_h // 2, extra_h - extra_h // 2)

    def prepare(self, frames):
        """Frames (B, 3, H, W) in [0, 1] -> in [-1, 1], enlarged, padded: what the encoders take."""
        size, padding = self.layout(*frames.shape[-2:])
        # align_corners=False: pixels are areas, so flow grows by exactly the size's factor
        frames = F.interpolate(frames, size, mode="bilinear", align_corners=False)
        return F.pad(frames * 2 - 1, padding, mode="replicate")

    def restore(self, flow, H, W):
        """Flow in cells of prepared frames -> (B, 2, H, W) in px of the frames."""
        (h, w), (left, _, top, _) = self.layout(H, W)
        flow = upsample(flow)[..., top:top + h, left:left + w]
        flow = F.interpolate(flow, (H, W), mode="bilinear", align_corners=False)
        return flow * flow.new_tensor([W / w, H / h]).view(2, 1, 1)

    @classmethod
    def load(cls, path=ROOT / "weights/raft.pt"):
        """Our weights or torchvision's raft_small; fp32, eval mode. ValueError for other files."""
        raft, state = cls(), read_tensors(path)
        try:
            raft.load_state_dict(state)
        except (RuntimeError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: not RAFT-small's weights: {one_line(error)}") from None
        return raft.eval().requires_grad_(False)

def upsample(flow):
    """Flow in cells (B, 2, h, w) -> (B, 2, 8h, 8w) in px; corner cells become corner pixels."""
    h, w = flow.shape[-2:]
    return 8 * F.interpolate(flow, (8 * h, 8 * w), mode="bilinear", align_corners=True)

@torch.no_grad()
def estimate_flow(raft, video, iters=12):
    """video (B, T, 3, H, W) in [0, 1] -> flow (B, T, 2, H, W) in px, the last repeated, on raft's
    device; one feature pass a frame. ValueError: another shape or dtype, one frame, NaN or inf."""
    if video.dim() != 5 or video.shape[2] != 3 or not video.is_floating_point():
        raise ValueError(f"video: float (B, T, 3, H, W), not {tuple(video.shape)} {video.dtype}")
    video = video.to(next(raft.parameters()).device, torch.float32)
    B, T, _, H, W = video.shape
    if T < 2:
        raise ValueError("flow needs two frames at least, the video has one")
    if not video.isfinite().all():
        raise ValueError("the video has pixels that are NaN or infinite")
    result = video.new_empty(B, T, 2, H, W)
    with autocast(video.device):
        for clip, flow in zip(video, result):
            features1 = raft.feature_encoder(raft.prepare(clip[:1]))
            # pairs at once: 32 MB of correlations, on a GPU (idle with less) 256 MB
            numbers = 2 ** (23 if video.device.type == "cpu" else 26)
            pairs = max(1, numbers // features1[0, 0].numel() ** 2)
            for k in range(0, T - 1, pairs):
                images = raft.prepare(clip[k:k + pairs + 1])
                features = torch.cat([features1, raft.feature_encoder(images[1:])])
                # channels last is a tenth faster where there is no instance norm
                context = raft.context_encoder(images[:-1].contiguous(
                    memory_format=torch.channels_last))
                cells = raft.refine(features[:-1], features[1:], context, iters)[-1]
                flow[k:k + len(cells)] = raft.restore(cells, H, W)
                features1 = features[-1:]
            flow[-1] = flow[-2]
    return result

def stream_flow(raft, frames, chunk=16):
    """Frames (3, H, W) in [0, 1], one by one -> (frame, the next one, flow (2, H, W) between them),
    one by one. Only `chunk` frames, of large ones fewer, are in memory at once."""
    frames, piece = iter(frames), []
    for frame in frames:
        chunk = min(chunk, max(1, 2 ** 24 // frame.numel()))
        piece += [frame, *itertools.islice(frames, chunk - len(piece))]
        if len(piece) > 1:
            flow = estimate_flow(raft, torch.stack(piece)[None])[0]
            yield from zip(piece, piece[1:], flow)
            piece = piece[-1:]

# ---------------------------------------------------------------- the flow of a video file

def render_flow(raft, path, target, chunk=16):
    """Writes the flow of a video (Eq. 5) as a video, and prints how large it is."""
    try:
        count, fps = frames_and_rate(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if count < 2:
        raise ValueError(f"{path}: flow needs two frames at least, the video has {count}")
    speeds = []                                 # (mean, largest) of each frame

    def rgb_frames():
        flows = stream_flow(raft, (frame / 255 for frame in open_video(path)), chunk)
        for _, _, flow in tqdm(flows, "estimating", count - 1, unit="pair"):
            size = flow.norm(dim=0)
            speeds.append((size.mean().item(), size.max().item()))
            rgb = (flow_to_rgb(flow) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
            yield rgb
        yield rgb                               # the last one is repeated

    write_file(target, lambda temporary: write_mp4(temporary, rgb_frames(), fps))
    mean, largest = np.mean(speeds, 0)[0], np.max(speeds, 0)[1]
    print(f"{target}: mean {mean:.3f} px, largest {largest:.2f} px a frame")

def main():
    parser = Parser(__doc__)
    parser.add_argument("video", type=Path, help="a video file")
    parser.add_argument("--out", type=Path, help=".mp4 to write (default: VIDEO-flow.mp4)")
    parser.add_argument("--weights", default=ROOT / "weights/raft.pt", help="RAFT-small's weights")
    args = parser.parse_args()
    if not args.video.is_file():
        raise ValueError(f"{args.video}: no such file")
    target = args.out or args.video.with_name(f"{args.video.stem}-flow.mp4")
    if target.resolve() == args.video.resolve():
        raise ValueError(f"{target}: is the video itself, --out names another file")
    if target.suffix.lower() != ".mp4" or not os.access(target.parent, os.W_OK):
        raise ValueError(f"{target}: cannot be written, --out names a .mp4 in a folder that can")
    render_flow(RAFT.load(args.weights).to(device_of(None)), args.video, target)

if __name__ == "__main__":
    report_errors(main)

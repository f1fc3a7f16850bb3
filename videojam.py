"""VideoJAM: Joint Appearance-Motion Representations for Enhanced Motion Generation in Video Models
(Chefer et al., 2025). Read it from top to bottom, with the paper beside it.

    Sec. 4.1  flow matching (Eq. 1-3), then the DiT (Eq. 4)
    Sec. 4.2  motion rows in W_in and W_out, the joint loss (Eq. 6)     (Eq. 5 is in flow.py)
    Sec. 4.3  Inner-Guidance (Eq. 7-8), and the guidance of App. A
    App. C    schedule and sampler, TAE, text encoder, sizes; then the model file

Legend, used everywhere:

    t           time: t = 0 is noise, t = 1 is data. A "sampling step" is the paper's index, 0 to 99
    x, d, y     appearance, motion, text; x_t is x at time t, x1 is data, x0 is noise
    z           what a model takes: x, or [x, d] (in the TAE: a latent before it is whitened)
    u           the predicted velocity; after 4.2 u = [u^x, u^d]: 2C channels, x's first, then d's
    w1, w2      guidance scales of text and of motion
    video       (B, T, 3, H, W) in [0, 1], appearance or motion as RGB
    latent      (B, C, T', H', W'), what the model works on

The losses, the guidance and the sampler know a model only as model(z, t, y), so they work with
other people's transformers too. y is a tensor or a dict of tensors, each with a batch axis. `null`
is the y of an empty prompt, by default our tokens of ""; of a dict it holds only the entries to
replace where the text is dropped, the others stay.
"""
import dataclasses
import functools
import inspect
import math
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from common import ROOT, autocast, one_line, read_tensors, truncate, write_tensors

# ---------------------------------------------------------------- Sec. 4.1: flow matching (Eq. 1-3)

def interpolate(x1, x0, t):
    """Eq. 1: x_t = t x_1 + (1 - t) x_0. x1, x0 (B, ...), t (B,)."""
    t = t.view(-1, *[1] * (x1.ndim - 1))
    return t * x1 + (1 - t) * x0

def velocity(x1, x0):
    """Eq. 2: v = dx_t / dt = x_1 - x_0."""
    return x1 - x0

class Noise(NamedTuple):
    """All that is random in a training step, one entry per sample. See `sample_noise`."""
    t: torch.Tensor                     # (B,) from 0 to 1
    x0: torch.Tensor                    # (B, C, ...)
    d0: torch.Tensor                    # (B, C, ...)
    no_text: torch.Tensor               # (B,) bool: the text is dropped
    no_motion: torch.Tensor             # (B,) bool: the motion is dropped

    def like(self, z):
        """On the device and in the dtype of z, but in fp32 at least: bf16 rounds t too much."""
        dtype = torch.promote_types(z.dtype, torch.float32)
        return Noise(*(part.to(z.device, dtype if part.is_floating_point() else part.dtype)
                       for part in self))

def sample_noise(shape, generator=None, uniform=False, shift=1., text_dropout=.3,
                 motion_dropout=.2, t_range=(0., 1.)):
    """The `Noise` for latents of a shape (B, C, ...), on the CPU, from one CPU generator.

    t is logit-normal(0, 1) as in Movie Gen, or uniform; a shift above 1 moves it towards 0, noise,
    as Stable Diffusion 3 does. t_range: its interval, for a model of a part of the noise levels
    (Wan 2.2's). Sec. 4.3 drops text in 30% and motion in 20% of the steps; here of the samples."""
    low, high = t_range
    x0 = torch.randn(shape, generator=generator)
    t = torch.rand(shape[:1], generator=generator) if uniform else \
        torch.randn(shape[:1], generator=generator).sigmoid()
    no_text = torch.rand(shape[:1], generator=generator) < text_dropout
    d0 = torch.randn(shape, generator=generator)
    no_motion = torch.rand(shape[:1], generator=generator) < motion_dropout
    return Noise(low + (high - low) * t / (t + shift * (1 - t)), x0, d0, no_text, no_motion)

def drop_condition(condition, dropped, empty):
    """The condition (B, ...), with `empty` in the samples that are dropped (B,)."""
    return torch.where(dropped.view(-1, *[1] * (condition.ndim - 1)), empty, condition)

def on_tensors(function, *ys):
    """function(*ys) of tensors; of dicts, a dict of what it gives for each entry."""
    return {name: function(*(y[name] for y in ys)) for name in ys[0]} \
        if isinstance(ys[0], dict) else function(*ys)

def drop_text(y, dropped, null):
    """y with its null in the samples that are dropped (B,); a dict's entries without null stay."""
    null = null_text(y) if null is None else null
    if isinstance(y, dict):
        if unknown := null.keys() - y:
            raise ValueError(f"null has {', '.join(unknown)}, y only {', '.join(y)}")
        null = {**y, **null}
    return on_tensors(lambda part, empty: drop_condition(part, dropped, empty.to(part)), y, null)

def mean_squared_error(u, v, reduction):
    """||u - v||^2 as a mean: "mean" over everything, "channels" over positions, (B, channels)."""
    error = (u - v).square()
    return error.mean() if reduction == "mean" else error.flatten(2).mean(2)

def flow_matching_loss(model, x1, y, null=None, noise=None, reduction="mean", **options):
    """Eq. 3, E ||u - v||^2, as a mean over samples, channels and positions; x1 (B, C, ...), y (B,
    ...). noise: a `Noise`, by default sample_noise(x1.shape, **options). reduction: "mean", or
    "channels" for means over positions, (B, C)."""
    n = (noise or sample_noise(x1.shape, **options)).like(x1)
    x_t = interpolate(x1, n.x0, n.t)                                                # Eq. 1
    y = drop_text(y, n.no_text, null)                                               # Sec. 4.3
    v = velocity(x1, n.x0)                                                          # Eq. 2
    u = model(x_t.to(x1.dtype), n.t, y)
    return mean_squared_error(u, v, reduction)                                      # Eq. 3

# ---------------------------------------------------------------- Sec. 4.1: the DiT (Eq. 4)

@dataclasses.dataclass(frozen=True)
class DiTConfig:
    channels: int = 16                  # C_TAE, of x alone
    patch: int = 2                      # p: patches of 1 x p x p latent positions
    width: int = 3072                   # C_DiT
    depth: int = 32
    heads: int = 24
    ffn: int = 6144
    text_width: int = 2048
    text_depth: int = 3
    max_bytes: int = 512                # the longest prompt, in UTF-8 bytes
    motion: bool = False                # whether add_motion has widened W_in and W_out

def patchify(x, p):
    """(B, C, T, H, W) -> tokens (B, T H/p W/p, p p C): patch offsets, channels last within them."""
    B, C, T, H, W = x.shape
    x = x.view(B, C, T, H // p, p, W // p, p)
    return x.permute(0, 2, 3, 5, 4, 6, 1).reshape(B, T * (H // p) * (W // p), p * p * C)

def unpatchify(tokens, p, shape):
    """Inverse of patchify: (B, N, p p C) -> (B, C, T, H, W) with shape = (T, H, W)."""
    B, (T, H, W) = len(tokens), shape
    x = tokens.view(B, T, H // p, W // p, p, p, -1)
    return x.permute(0, 6, 1, 2, 4, 3, 5).reshape(B, -1, T, H, W)

def rms_norm(x):
    return F.rms_norm(x, x.shape[-1:], eps=1e-6)

@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)            # nothing could be trained with a cached inference tensor
def rope_table(grid, head_dim, device):
    """Axial RoPE: each axis of the grid turns a part of the head_dim / 2 pairs -> cos, sin
    (positions, head_dim / 2)."""
    pairs = head_dim // 2
    shares = [pairs - 2 * (pairs // 3), pairs // 3, pairs // 3] if len(grid) == 3 else [pairs]
    axes = torch.meshgrid(*[torch.arange(n, device=device).float() for n in grid], indexing="ij")
    angles = torch.cat([axis.flatten()[:, None] * 1e4 ** -(torch.arange(n, device=device) / n)
                        for axis, n in zip(axes, shares)], 1)
    return angles.cos(), angles.sin()

def rotate(x, rope):
    """RoPE: rotates the pairs (first half, second half) of (B, heads, positions, head_dim)."""
    cos, sin = (table.to(x.dtype) for table in rope)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)

def attend(q, k, v, mask=None):
    """softmax(q k^T / sqrt(head_dim)) v on (B, heads, positions, head_dim); mask True = visible."""
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    # on a CPU, plain products train 1.8 times as fast as the fused kernel
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1).to(v.dtype) @ v

class Attention(nn.Module):
    """Multi-head attention with QK-norm, to itself or to a context, with rope or a mask or both."""
    def __init__(self, width, heads, context_width=None):
        super().__init__()
        self.heads, head_dim = heads, width // heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_kv = nn.Linear(context_width or width, 2 * width, bias=False)
        self.norm_q, self.norm_k = nn.RMSNorm(head_dim, eps=1e-6), nn.RMSNorm(head_dim, eps=1e-6)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x, context=None, rope=None, mask=None):
        context = x if context is None else context
        q = self.to_q(x).unflatten(2, (self.heads, -1))                 # (B, N, heads, head_dim)
        k, v = self.to_kv(context).unflatten(2, (2, self.heads, -1)).unbind(2)
        # the norm's weights in bf16 too under autocast: torch fuses no norm of mixed dtypes
        q, k = (F.rms_norm(part, part.shape[-1:], norm.weight.to(part.dtype), norm.eps)
                .transpose(1, 2) for part, norm in ((q, self.norm_q), (k, self.norm_k)))
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        x = attend(q, k, v.transpose(1, 2), mask)                       # (B, heads, N, head_dim)
        return self.out(x.transpose(1, 2).flatten(2))

class SwiGLU(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        gate, value = self.up(x).chunk(2, -1)
        return self.down(F.silu(gate) * value)

class Block(nn.Module):
    """Self-attention over all space-time tokens, cross-attention to the text, SwiGLU. adaLN: shift,
    scale and gate are one projection of t for all blocks (PixArt's adaLN-single) plus a table.
    h (B, N, width), modulation (B, 6, width), text (B, L', text_width), mask (B, 1, 1, L')."""
    def __init__(self, c):
        super().__init__()
        self.attention = Attention(c.width, c.heads)
        self.cross = Attention(c.width, c.heads, c.text_width)
        self.mlp = SwiGLU(c.width, c.ffn)
        self.table = nn.Parameter(torch.zeros(6, c.width))

    def forward(self, h, modulation, text, mask, rope):
        shift1, scale1, gate1, shift2, scale2, gate2 = \
            (modulation + self.table).to(h.dtype).unsqueeze(2).unbind(1)            # (B, 1, width)
        h = h + gate1 * self.attention(rms_norm(h) * (1 + scale1) + shift1, rope=rope)
        h = h + self.cross(rms_norm(h), text, mask=mask)
        return h + gate2 * self.mlp(rms_norm(h) * (1 + scale2) + shift2)

class Layers(nn.Sequential):
    """nn.Sequential that passes further arguments to each layer, with activation checkpointing."""
    activation_checkpointing = False

    def forward(self, x, *others):
        for layer in self:
            again = self.activation_checkpointing and torch.is_grad_enabled()
            x = checkpoint(layer, x, *others, use_reentrant=False) if again else layer(x, *others)
        return x

def set_activation_checkpointing(model, on):
    """Turns the activation checkpointing of a model's layers on or off."""
    for module in model.modules():
        if isinstance(module, Layers):
            module.activation_checkpointing = on

class DiT(nn.Module):
    """Eq. 4: u(x_t, y, t) = M(x_t W_in, y, t) W_out. x (B, C, T', H', W'), t (B,) or a scalar,
    tokens (B, L) -> u of x's shape. After add_motion, x and u have 2C channels, [x, d]."""
    def __init__(self, config):
        super().__init__()
        self.config = c = config
        patch_dim = (1 + c.motion) * c.channels * c.patch ** 2
        self.text = TextEncoder(c)
        self.W_in = nn.Linear(patch_dim, c.width, bias=False)
        # RoPE tells how far tokens are apart, this where they are: in pure noise nothing else does
        self.position = nn.Linear(c.width // c.heads, c.width, bias=False)
        self.time = nn.Sequential(nn.Linear(256, c.width), nn.SiLU(), nn.Linear(c.width, c.width))
        self.modulation = nn.Linear(c.width, 6 * c.width)
        self.blocks = Layers(*[Block(c) for _ in range(c.depth)])
        self.final_table = nn.Parameter(torch.zeros(2, c.width))
        self.W_out = nn.Linear(c.width, patch_dim, bias=False)
        if not self.W_in.weight.is_meta:
            initialize(self.modules())

    def add_motion(self):
        """Sec. 4.2: zero rows in W_in for d: u^x stays the same. (W_out, left open, gets zeros.)"""
        if self.config.motion:
            raise ValueError("this DiT has its motion rows already")
        self.W_in = widen_input(self.W_in, self.config.channels, channel_last=True)
        self.W_out = widen_output(self.W_out, self.config.channels, channel_last=True)
        self.config = dataclasses.replace(self.config, motion=True)
        return self

    def forward(self, x, t, tokens):
        c, (T, H, W) = self.config, x.shape[2:]
        channels = (1 + c.motion) * c.channels
        if x.shape[1] != channels or H % c.patch or W % c.patch:
            raise ValueError(f"DiT takes (B, {channels}, T, H, W), H and W multiples of {c.patch}, "
                             f"got {tuple(x.shape)}")
        text, mask = self.text(tokens)                                  # (B, L', text_width)
        t = torch.as_tensor(t, dtype=torch.float32, device=x.device).expand(len(x))
        angles = 1000 * t[:, None] * 1e4 ** -(torch.arange(128, device=x.device) / 128)
        emb = self.time(torch.cat([angles.cos(), angles.sin()], 1))     # (B, width)
        modulation = self.modulation(F.silu(emb)).view(len(x), 6, c.width)      # (B, 6, width)
        rope = rope_table((T, H // c.patch, W // c.patch), c.width // c.heads, x.device)
        h = self.W_in(patchify(x, c.patch))                             # (B, N, width)
        h = h + self.position(torch.cat(rope, 1).to(h.dtype))
        h = self.blocks(h, modulation, text, mask, rope)                # M: (B, N, width)
        shift, scale = (emb[:, None] + self.final_table).to(h.dtype).unsqueeze(2).unbind(1)
        u = self.W_out(rms_norm(h) * (1 + scale) + shift)               # (B, N, p p C or 2 p p C)
        return unpatchify(u, c.patch, (T, H, W)).float()

def initialize(modules):
    """First weights of a DiT's modules, parents before children, because a parent says which of
    them start at zero: blocks as the identity, u as 0 (adaLN-Zero); a deep stack trains at once."""
    zero = set()
    for module in modules:
        if isinstance(module, DiT):
            zero |= {module.position, module.modulation, module.W_out}
            nn.init.zeros_(module.final_table)
        elif isinstance(module, Block):
            zero.add(module.cross.out)
            nn.init.zeros_(module.table)
        elif isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight, gain=0 if module in zero else 1)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, (nn.Embedding, nn.RMSNorm)):
            module.reset_parameters()

# ---------------------------------------------------------------- Sec. 4.2: joint representation
# nn.Linear keeps the paper's matrices transposed: W_in's rows are axis 1, W_out's columns axis 0

CONVS = nn.Conv1d, nn.Conv2d, nn.Conv3d

def widen(weight, axis, C, channel_last, others=0, at=None):
    """A weight with zeros for d's C channels, before channel `at` (default: after x's C). Its axis
    runs over the values of a patch: with channel_last position by position, C + others channels
    each; else channel by channel, the positions of each."""
    along = axis + channel_last
    parts = weight.unflatten(axis, (-1, C + others) if channel_last else (C + others, -1))
    before, after = parts.tensor_split([C if at is None else at], along)
    zeros = torch.zeros_like(parts.narrow(along, 0, C))
    return torch.cat([before, zeros, after], along).flatten(axis, axis + 1)

def new_entries(weight, axis, C, channel_last, others=0, at=None):
    """Which entries of a widened weight are new: bool, of its shape, for their learning rate."""
    size = weight.shape[axis] // (2 * C + others) * (C + others)
    old = torch.ones(weight.shape).narrow(axis, 0, size)
    return widen(old, axis, C, channel_last, others, at) == 0

def widen_layer(layer, size, axis, C, channel_last, others=0, at=None):
    """A new layer like this one (without its hooks, which are the old one's) with d's channels too,
    zero at first. size: the argument that counts them, "in_features" for example."""
    options = {name: getattr(layer, name) for name in inspect.signature(type(layer)).parameters
               if name not in ("bias", "device", "dtype")}
    weight, bias = widen(layer.weight.detach(), axis, C, channel_last, others, at), layer.bias
    new = type(layer)(**{**options, size: weight.shape[axis]}, bias=bias is not None, device="meta")
    new.weight = nn.Parameter(weight, layer.weight.requires_grad)
    if bias is not None:
        wide = widen(bias, 0, C, channel_last) if size.startswith("out") else bias.clone()
        new.bias = nn.Parameter(wide.detach(), bias.requires_grad)
    return new.train(layer.training)

def widen_input(layer, C, channel_last, others=0, at=None):
    """W_in -> W_in^+: a layer that takes [x, d] in place of x (C channels), and ignores d at first.
    layer: a Linear whose inputs are patches, (offsets, C) with channel_last, else (C, offsets); or
    a Conv. others: channels that it reads besides x's, a mask for example; at: the channel before
    which d's come, by default right after x's. Then `check_velocity`. ValueError: other layers."""
    if type(layer) is nn.Linear and layer.in_features % (C + others) == 0:
        return widen_layer(layer, "in_features", 1, C, channel_last, others, at)
    if type(layer) in CONVS and layer.in_channels == C + others and layer.groups == 1:
        return widen_layer(layer, "in_channels", 1, C, False, others, at)
    raise ValueError(f"cannot widen {layer} for an input of {C + others} channels")

def widen_output(layer, C, channel_last):
    """W_out -> W_out^+: a layer that gives [u^x, u^d] in place of u^x, and u^d = 0 at first.
    layer: a Linear or Conv whose outputs are patches; the rest as `widen_input`."""
    if type(layer) is nn.Linear and layer.out_features % C == 0:
        return widen_layer(layer, "out_features", 0, C, channel_last)
    if type(layer) in CONVS and layer.out_channels % C == 0 and layer.groups == 1:
        return widen_layer(layer, "out_channels", 0, C, channel_last)
    raise ValueError(f"cannot widen {layer} for an output of {C} channels")

@torch.no_grad()
def check_velocity(before, model, x, t, y):
    """To call right after widening, since a wrong channel_last, others or at raises nothing by
    itself. before: u (B, C, ...) at x, t, y before widening. ValueError unless u^x is still that,
    for any d, up to what bf16 rounds."""
    u = model(torch.cat([x, 100 * torch.randn_like(x)], 1), t, y)       # large: it shows anywhere
    if u.shape[1] != 2 * x.shape[1]:
        raise ValueError(f"u has {u.shape[1]} channels, not {2 * x.shape[1]}: widen both layers")
    error, size = (u[:, :x.shape[1]] - before).norm(), before.norm()
    if not error <= .05 * size:
        raise ValueError(f"u^x is off by {error / size:.0%}: is channel_last, others or at wrong?")

def joint_loss(model, x1, d1, y, null=None, noise=None, reduction="mean", **options):
    """Eq. 6, E ||u^+ - v^+||^2 with u^+ = [u^x, u^d], v^+ = [v^x, v^d] and one t, as a mean over
    samples, channels and positions. x1, d1 (B, C, ...); else as `flow_matching_loss`.

    Where the motion is dropped (Sec. 4.3), d_t is zero and its target stays: the model learns to
    guess E[d_1] from appearance. d_0 cannot be guessed: there d's half of the loss is above 1."""
    n = (noise or sample_noise(x1.shape, **options)).like(x1)
    x_t, d_t = interpolate(x1, n.x0, n.t), interpolate(d1, n.d0, n.t)               # Eq. 1
    y = drop_text(y, n.no_text, null)                                               # Sec. 4.3
    d_t = drop_condition(d_t, n.no_motion, torch.zeros_like(d_t))
    v = torch.cat([velocity(x1, n.x0), velocity(d1, n.d0)], 1)                      # Eq. 2
    u = model(torch.cat([x_t, d_t], 1).to(x1.dtype), n.t, y)                        # u^+
    return mean_squared_error(u, v, reduction)                                      # Eq. 6

# ---------------------------------------------------------------- Sec. 4.3: guidance (Eq. 7-8)

class Guidance(NamedTuple):
    """A way to guide: u as a sum of (weight, with d?, with y?), and what w2 is in the later steps,
    where motion is decided already (None: it stays)."""
    terms: Callable                     # (w1, w2) -> [(weight, with d?, with y?), ...]
    late_w2: float | None = 0.
    w2_on_d: bool = True                # False: w2 acts on u^x alone

WITHOUT_MOTION = "cfg", "none"          # modes for models without motion too: no term drops d
# Eq. 7 weighs p(x, d | y) by p(y | x, d)^w1 and p(d | x, y)^w2; Eq. 8, written with velocities:
# (1 + w1 + w2) u(x,d,y) - w1 u(x,d,0) - w2 u(x,0,y), 0 being dropped (the paper's empty set).
# w1 is the text scale, w2 the motion scale, in App. A's modes too (the paper swaps them there).
# w1 = 5 in Eq. 8 is what others call a guidance scale of 6; in ip2p and composable it is one of 5.
GUIDANCE = {
    "inner": Guidance(lambda w1, w2: [                                              # Eq. 8
        (1 + w1 + w2, True, True), (-w1, True, False), (-w2, False, True)]),
    # classifier-free guidance (Ho & Salimans): Eq. 8 without its motion term
    "cfg": Guidance(lambda w1, w2: [(1 + w1, True, True), (-w1, True, False)]),
    "none": Guidance(lambda w1, w2: [(1, True, True)]),
    # Table 3's "d = 0": classifier-free guidance that never sees d
    "no-motion": Guidance(lambda w1, w2: [(1 + w1, False, True), (-w1, False, False)]),
    # App. A: u(x,0,0) + w2 (u(x,d,0) - u(x,0,0)) + w1 (u(x,d,y) - u(x,d,0)); w2 = 1 leaves "cfg"
    "ip2p": Guidance(lambda w1, w2: [
        (1 - w2, False, False), (w2 - w1, True, False), (w1, True, True)], late_w2=1.),
    # Eq. 9 as velocities, with weights (our reading): u(x,0,0) + w1 (u(x,0,y) - u(x,0,0))
    # + w2 (u(x,d,0) - u(x,0,0)); w2 alone sees d
    "composable": Guidance(lambda w1, w2: [
        (1 - w1 - w2, False, False), (w1, False, True), (w2, True, False)], late_w2=None),
}
# u(x,0,y) cannot see d's noise: on u^d, Eq. 8's w2 takes more of it out than a step should
GUIDANCE["inner-x"] = GUIDANCE["inner"]._replace(w2_on_d=False)

def find_guidance(mode, has_motion):
    """The Guidance of a mode. ValueError: an unknown one, or one that needs motion without it."""
    if mode not in GUIDANCE:
        raise ValueError(f"unknown guidance {mode!r}: one of {', '.join(GUIDANCE)}")
    if not has_motion and mode not in WITHOUT_MOTION:
        raise ValueError(f"guidance {mode!r} needs motion: a model without it takes cfg or none")
    return GUIDANCE[mode]

def guided_velocity(model, x, d, t, y, w1=5., w2=3., mode="inner", null=None):
    """The guided velocity of [x, d], each (B, C, ...), at time t -> u (B, 2C, ...). All terms run
    in one batch, but for those of weight 0. d = None: u (B, C, ...). ValueError: its mode."""
    null = drop_text(y, torch.ones(len(x), dtype=torch.bool, device=x.device), null)
    guidance, C = find_guidance(mode, d is not None), x.shape[1]
    of_x, of_d = guidance.terms(w1, w2), guidance.terms(w1, w2 * guidance.w2_on_d)
    terms = [(w_x, w_d, *seen) for (w_x, *seen), (w_d, *_) in zip(of_x, of_d) if w_x or w_d]
    z = [x if d is None else torch.cat([x, d if with_d else torch.zeros_like(d)], 1)
         for *_, with_d, _ in terms]
    text = [y if with_y else null for *_, with_y in terms]
    t = torch.as_tensor(t, dtype=torch.float32, device=x.device).expand(len(x))
    text = on_tensors(lambda *parts: torch.cat(parts), *text)
    u = model(torch.cat(z), t.repeat(len(terms)), text)
    # weights such as 9, -5 and -3 multiply what bf16 rounds, so they are summed in fp32
    u = u.to(torch.promote_types(u.dtype, torch.float32)).chunk(len(terms))
    return sum(torch.cat([w_x * part[:, :C], w_d * part[:, C:]], 1)
               for (w_x, w_d, *_), part in zip(terms, u))

# ---------------------------------------------------------------- App. C: schedule and sampler

def linear_quadratic(steps, emulated=1000):
    """Movie Gen's (steps + 1,) times from 0 to 1: half of them 1/emulated apart, then quadratic."""
    if not 1 <= steps <= emulated:
        raise ValueError(f"steps must be from 1 to {emulated}, got {steps}")
    i = torch.arange(steps + 1, dtype=torch.float64)
    ramp = ((i - steps / 2).clamp(min=0) / (steps / 2)) ** 2
    return (i / emulated + (1 - steps / emulated) * ramp).float()

@torch.no_grad()
def euler_sample(model, x, d, y, times, w1=5., w2=3., mode="inner", null=None, motion_steps=None,
                 progress=None):
    """Euler steps from noise x, d (B, C, ...) at times[0] to times[-1]; returns x, d. d = None: a
    model without motion. w2 acts in the first motion_steps, by default half of all (App. C), and is
    the mode's late_w2 afterwards. progress: the name of a progress bar."""
    steps, C = len(times) - 1, x.shape[1]
    late_w2 = find_guidance(mode, d is not None).late_w2
    motion_steps = steps / 2 if motion_steps is None else motion_steps
    z = x if d is None else torch.cat([x, d], 1)
    dtype, z = z.dtype, z.to(torch.promote_types(z.dtype, torch.float32))   # bf16 loses small steps
    for i in tqdm(range(steps), desc=progress, disable=progress is None):
        x, d = (z.to(dtype), None) if d is None else z.to(dtype).split(C, 1)
        scale = w2 if late_w2 is None or i < motion_steps else late_w2
        u = guided_velocity(model, x, d, times[i], y, w1, scale, mode, null)
        z = z + (times[i + 1] - times[i]) * u
    return (z, None) if d is None else z.split(C, 1)

# ---------------------------------------------------------------- App. C: TAE (Movie Gen's)

@dataclasses.dataclass(frozen=True)
class TAEConfig:
    channels: int = 16                                  # C_TAE
    patch: int = 1                                      # p x p pixels become channels at first
    widths: tuple = (128, 256, 512, 512)                # channels at each level
    strides: tuple = ((2, 2), (2, 2), (2, 2))           # (time, space) from each level to the next
    blocks: int = 2                                     # residual blocks a level

    @property
    def compression(self):
        """(time, space): how many frames and how many pixels a side one latent position covers."""
        time, space = zip(*self.strides)
        return math.prod(time), self.patch * math.prod(space)

class SpaceTimeConv(nn.Module):
    """A 3 x 3 convolution in space, then 3 taps in time, on (B, T, H, W, C). Both start as a centre
    tap (random taps learn small objects late): the identity in time, a rotation of C in space."""
    def __init__(self, c_in, c_out, stride=(1, 1)):
        super().__init__()
        self.space = nn.Conv2d(c_in, c_out, 3, stride=stride[1], padding=1)
        self.time = nn.Conv2d(c_out, c_out, (3, 1), stride=(stride[0], 1))
        for parameter in self.parameters():
            nn.init.zeros_(parameter)
        nn.init.orthogonal_(self.space.weight.data[:, :, 1, 1])
        self.time.weight.data[:, :, 1, 0].fill_diagonal_(1)

    def forward(self, x):
        B, T, H, W, _ = x.shape
        x = self.space(x.flatten(0, 1).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)    # (BT, H', W', C)
        H, W = x.shape[1:3]
        x = x.reshape(B, T, H * W, -1)
        x = torch.cat([x[:, :1], x, x[:, -1:]], 1)      # symmetric replicate padding in time
        return self.time(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).unflatten(2, (H, W))

class ResBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm1, self.conv1 = nn.LayerNorm(width), SpaceTimeConv(width, width)
        self.norm2, self.conv2 = nn.LayerNorm(width), SpaceTimeConv(width, width)
        nn.init.zeros_(self.conv2.space.weight)         # the block starts as the identity

    def forward(self, x):
        return x + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))

class Upsample(nn.Module):
    """Nearest neighbour by (time, space), then a convolution."""
    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.scale, self.conv = (*stride, stride[1]), SpaceTimeConv(c_in, c_out)

    def forward(self, x):
        x = F.interpolate(x.permute(0, 4, 1, 2, 3), scale_factor=self.scale)
        return self.conv(x.permute(0, 2, 3, 4, 1))

class TAE(nn.Module):
    """Temporal Auto-Encoder: (B, T, 3, H, W) <-> (B, C, T', H', W'), T' = ceil(T / time), H' = H /
    space. Videos and RGB flow (motion=True) have a whitening each: see `fit_whitening`."""
    def __init__(self, config):
        super().__init__()
        self.config, w, C, rgb = config, config.widths, config.channels, 3 * config.patch ** 2
        levels = [[ResBlock(width) for _ in range(config.blocks)] for width in w]
        for level, *pair in zip(levels[1:], w, w[1:], config.strides):
            level.insert(0, SpaceTimeConv(*pair))                       # down, into this level
        self.encoder = Layers(
            SpaceTimeConv(rgb, w[0]), *sum(levels, []), SpaceTimeConv(w[-1], 2 * C))
        levels = [[ResBlock(width) for _ in range(config.blocks)] for width in w]
        for level, *pair in zip(levels, w[1:], w, config.strides):
            level.insert(0, Upsample(*pair))
        self.decoder = Layers(
            SpaceTimeConv(C, w[-1]), *sum(levels[::-1], []), SpaceTimeConv(w[0], rgb))
        # start at sigma = e^-3; sigma = 1 stalls training
        nn.init.zeros_(self.encoder[-1].space.weight[C:])
        nn.init.constant_(self.encoder[-1].time.bias[C:], -6)
        # mean and whitening matrix: row 0 for videos, row 1 for RGB flow
        self.register_buffer("mean", torch.zeros(2, C))
        self.register_buffer("basis", torch.zeros(2, C, C))
        self.basis.diagonal(dim1=1, dim2=2).fill_(1)

    def posterior(self, video):
        """(B, T, 3, H, W) in [0, 1] -> mean and log-variance, (B, T', H', W', C) each."""
        side, shape = self.config.compression[1], tuple(video.shape)
        if len(shape) != 5 or shape[2] != 3 or shape[3] % side or shape[4] % side:
            raise ValueError(f"TAE takes (B, T, 3, H, W), H and W multiples of {side}, got {shape}")
        # centred at .7, because RGB flow is mostly white
        x = F.pixel_unshuffle((video - .7) * 3, self.config.patch)
        mean, log_var = self.encoder(x.permute(0, 1, 3, 4, 2)).chunk(2, -1)
        return mean, log_var.float().clamp(-20, 10)

    def pixels(self, z):
        """`posterior`'s (B, T', H', W', C), not whitened -> (B, T, 3, H, W), not clamped."""
        x = self.decoder(z).permute(0, 1, 4, 2, 3)
        return F.pixel_shuffle(x, self.config.patch) / 3 + .7

    def encode(self, video, motion=False):
        """Video, or RGB flow (motion=True), in [0, 1] -> whitened latent (B, C, T', H', W')."""
        z = self.posterior(video)[0].float() - self.mean[int(motion)]
        with torch.autocast(z.device.type, enabled=False):
            return (z @ self.basis[int(motion)].float().T).permute(0, 4, 1, 2, 3)

    def decode(self, latent, motion=False, frames=None):
        """Inverse of encode, up to what is lost: latent -> video in [0, 1], cropped to `frames`."""
        with torch.autocast(latent.device.type, enabled=False):
            inverse = torch.linalg.inv(self.basis[int(motion)].float())
            z = latent.float().permute(0, 2, 3, 4, 1) @ inverse.T + self.mean[int(motion)]
        return self.pixels(z)[:, :frames].float().clamp(0, 1)

    def fit_whitening(self, batches, motion=False, generator=None):
        """Fits mean and whitening to batches of video or RGB flow: mean 0, variance 1 on average
        over channels, and equal latent error gives equal pixel error. (The paper has one latent
        space; the scaling decides how much d weighs in Eq. 6, and how early it leaves the noise.)
        z^T E[J^T J] z, J being the decoder's Jacobian, is how far z moves the pixels: its
        eigenvectors become the channels, times the square roots of its eigenvalues."""
        latents, sensitivity = [], 0
        for video in batches:
            mean = self.posterior(video)[0].float().detach().requires_grad_()
            pixels = self.pixels(mean).float()
            probe = torch.randn(pixels.shape, generator=generator).to(pixels)
            rows = torch.autograd.grad(pixels, mean, probe)[0].flatten(0, 3)    # J^T probe
            sensitivity = sensitivity + rows.double().T @ rows.double()
            latents.append(mean.detach().flatten(0, 3))
        z = torch.cat(latents)
        values, vectors = torch.linalg.eigh(sensitivity)
        basis = (values.clamp(min=1e-4 * values.max()).sqrt()[:, None] * vectors.T).float()
        spread = ((z - z.mean(0)) @ basis.T).square().mean().sqrt()
        self.mean[int(motion)], self.basis[int(motion)] = z.mean(0), basis / spread

def tae_loss(tae, video, noise, mse_weight=3., kl_weight=1e-5, outlier_weight=1e-2, r=3):
    """L1 + MSE (L1 alone learns small objects late) + KL + Movie Gen's outlier penalty on latents
    over r deviations from the clip's mean. video (B, T, 3, H, W), noise (B, T', H', W', C)."""
    mean, log_var = tae.posterior(video)
    reconstruction = tae.pixels(mean + (log_var / 2).exp() * noise)[:, :video.shape[1]]
    error, mean = reconstruction.float() - video, mean.float()
    kl = (mean ** 2 + log_var.exp() - 1 - log_var).mean() / 2
    centre = mean.mean((1, 2, 3), keepdim=True)
    spread = mean.std((1, 2, 3), keepdim=True).norm(dim=-1)
    outliers = F.relu((mean - centre).norm(dim=-1) - r * spread).mean()
    return ((error.abs() + mse_weight * error.square()).mean()
            + kl_weight * kl + outlier_weight * outliers)

# ---------------------------------------------------------------- App. C: text, as bytes

PAD, EOS, VOCABULARY = 0, 257, 258      # tokens 1..256 are the bytes 0..255
FOLD = 4                                # so many tokens become one position of the text encoder

@functools.lru_cache(2 ** 13)           # captions repeat, and bytes are slow in Python
def token_row(prompt, max_bytes):
    """The tokens of one prompt, (L,): see `tokenize`."""
    row = []
    for byte in truncate(prompt, max_bytes).encode():
        row.append(byte + 1)
        if byte == ord(" "):
            row += [PAD] * (-len(row) % FOLD)
    return torch.tensor(row + [EOS], device="cpu")

def tokenize(prompts, max_bytes=None):
    """List of str -> LongTensor (B, L): UTF-8 bytes + 1, max_bytes at most, then EOS, PAD. PAD also
    follows each space: words begin at multiples of FOLD, so the toy learns them sooner."""
    if isinstance(prompts, str):
        raise ValueError(f"prompts must be a list of str, got {prompts!r}")
    rows = [token_row(prompt, max_bytes) for prompt in prompts]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)

def null_text(y):
    """The null prompt in the shape of the tokens y. ValueError where y is another model's text."""
    if isinstance(y, dict) or y.is_floating_point():
        raise ValueError("null must be given where y is not our tokens")
    return F.pad(torch.full_like(y[:, :1], EOS), (0, y.shape[1] - 1), value=PAD)

class TextLayer(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.attention, self.mlp = Attention(width, heads), SwiGLU(width, 2 * width)

    def forward(self, x, mask, rope):
        x = x + self.attention(rms_norm(x), rope=rope, mask=mask)
        return x + self.mlp(rms_norm(x))

class TextEncoder(nn.Module):
    """Tokens (B, L) -> features (B, ceil(L / FOLD), text_width), mask (B, 1, 1, ceil(L / FOLD))
    that hides padding. Stands for the paper's UL2, ByT5 and MetaCLIP; trained with the DiT."""
    def __init__(self, config):
        super().__init__()
        width, heads = config.text_width, max(1, round(config.text_width / 64))
        self.head_dim = width // heads
        # on the meta device normal_ would import torch's compiler, which takes a second
        self.embed = nn.Embedding.from_pretrained(torch.empty(VOCABULARY, width), freeze=False)
        self.fold = nn.Linear(FOLD * width, width, bias=False)
        self.layers = nn.ModuleList([TextLayer(width, heads) for _ in range(config.text_depth)])

    def forward(self, tokens):
        tokens = F.pad(tokens, (0, -tokens.shape[1] % FOLD), value=PAD)
        (B, L), visible = tokens.shape, tokens != PAD
        x = self.fold((self.embed(tokens) * visible[..., None]).view(B, L // FOLD, -1))
        mask = visible.view(B, L // FOLD, FOLD).any(2)[:, None, None, :]
        rope = rope_table((L // FOLD,), self.head_dim, tokens.device)
        for layer in self.layers:
            x = layer(x, mask, rope)
        return rms_norm(x), mask

# ---------------------------------------------------------------- App. C: sizes

@dataclasses.dataclass(frozen=True)
class Preset:
    frames: int
    size: int                           # pixels a side
    fps: int
    tae: TAEConfig
    dit: DiTConfig
    sigma: float = .15                  # of Eq. 5
    w1: float = 5.                      # text guidance, unless the sampler is told another
    emulated: int = 1000                # of linear_quadratic, likewise
    appearance: float = 0.              # of the sprite world: how loud its background is
    target: str = "flow"                # what d shows; all other TARGETS are controls

    def latent_shape(self):
        """(C, T', H', W') of one clip."""
        time, space = self.tae.compression
        side = self.size // space
        return self.tae.channels, math.ceil(self.frames / time), side, side

    def sampler(self, w1=None, emulated=None):
        """w1 and emulated, this preset's where they are None."""
        return (self.w1 if w1 is None else w1, self.emulated if emulated is None else emulated)

PRESETS = {
    "toy": Preset(frames=16, size=64, fps=8,                    # 3.3 M parameters: for a CPU
                  w1=2., emulated=400,      # chosen on training seeds; a small clip is decided late
                  tae=TAEConfig(channels=8, patch=4, widths=(48, 96, 96), strides=((2, 2), (2, 1)),
                                blocks=1),
                  dit=DiTConfig(channels=8, width=224, depth=4, heads=4, ffn=448, text_width=96,
                                text_depth=2, max_bytes=192)),
    "small": Preset(frames=48, size=128, fps=12,                # 151 M: one GPU
                    tae=TAEConfig(widths=(64, 128, 256, 256)),
                    dit=DiTConfig(width=768, depth=16, heads=12, ffn=1536, text_width=768,
                                  text_depth=2)),
    # the paper's widths and depths; the rest is assumed: it gives 4.2 B and 29 B parameters
    "4b": Preset(frames=128, size=256, fps=24, tae=TAEConfig(), dit=DiTConfig()),
    "30b": Preset(frames=128, size=256, fps=24, tae=TAEConfig(),
                  dit=DiTConfig(width=6144, depth=48, heads=48, ffn=16384, text_width=4096,
                                text_depth=6)),
}

# ---------------------------------------------------------------- the model file

def weights_path(run):
    """The model file of a run's folder; of None, the shipped one."""
    return ROOT / "weights/toy.pt" if run is None else Path(run) / "model.pt"

def read_model_file(path):
    """Preset, TAE and {name: DiT} of a model file, half precision. ValueError for other files."""
    content = read_tensors(path, "videojam")
    try:
        c, dits = content["config"], {}
        config = Preset(**{**c, "tae": TAEConfig(**c["tae"]), "dit": DiTConfig(**c["dit"])})
        with torch.device("meta"):              # the file's tensors are used: nothing to allocate
            tae = TAE(config.tae)
            tae.load_state_dict(content["tae"], assign=True)
            for name, state in content["dits"].items():
                motion = state["W_in.weight"].shape[1] > config.dit.channels * config.dit.patch ** 2
                dits[name] = DiT(dataclasses.replace(config.dit, motion=motion))
                dits[name].load_state_dict(state, assign=True)
    except Exception as error:                  # a foreign file can raise almost anything
        raise ValueError(f"{path}: does not fit this version: {one_line(error)}") from None
    return config, tae, dits

def write_model_file(path, config, tae, dits):
    """Writes a Preset, a TAE and {"jam", "base" or "control": DiT}, in half precision."""
    def half(module):
        return {k: v.detach().half().cpu().contiguous() for k, v in module.state_dict().items()}
    write_tensors(path, {"kind": "videojam", "config": dataclasses.asdict(config), "tae": half(tae),
                         "dits": {name: half(dit) for name, dit in dits.items()}})

class VideoJAM:
    """A TAE, a DiT and their Preset (.config)."""
    def __init__(self, config, tae, dit):
        self.config, self.tae, self.dit = config, tae.eval(), dit.eval()

    @classmethod
    def load(cls, path=weights_path(None), which="jam", device="cpu"):
        """The model file at `path` with the DiT `which`, in fp32. ValueError for any other file."""
        config, tae, dits = read_model_file(path)
        if which not in dits:
            raise ValueError(f"{path}: has no {which!r} model, only {', '.join(dits)}")
        return cls(config, tae.to(device).float(), dits[which].to(device).float())

    @torch.no_grad()
    def generate(self, prompts, steps=100, w1=None, w2=3., seed=0, mode=None, emulated=None,
                 batch=16, motion_steps=None, progress=None):
        """List of prompts -> video, RGB motion (None without motion): (B, T, 3, H, W) in [0, 1].
        w1, emulated: default the Preset's. mode: a key of GUIDANCE; default "inner", without motion
        "cfg". Sample i has the noise of seed + i, whatever the model. ValueError: no prompts, wrong
        steps or mode, NaN pixels."""
        if not prompts:
            raise ValueError("no prompt: give at least one")
        device, motion = next(self.dit.parameters()).device, self.dit.config.motion
        mode = mode or ("inner" if motion else "cfg")
        w1, emulated = self.config.sampler(w1, emulated)
        times = linear_quadratic(steps, emulated).to(device)
        shape, frames, videos, motions = self.config.latent_shape(), self.config.frames, [], []
        for start in range(0, len(prompts), batch):
            y = tokenize(prompts[start:start + batch], self.config.dit.max_bytes).to(device)
            # x before d, so that models with and without motion start from the same x
            noise = [torch.randn(2, *shape, generator=torch.Generator().manual_seed(i))
                     for i in range(seed + start, seed + start + len(y))]
            x, d = torch.stack(noise, 1).to(device)
            with autocast(device):
                x, d = euler_sample(self.dit, x, d if motion else None, y, times, w1, w2, mode,
                                    motion_steps=motion_steps, progress=progress)
                # one by one: pixels take far more memory
                videos += [self.tae.decode(z, frames=frames) for z in x.split(1)]
                motions += [self.tae.decode(z, True, frames) for z in d.split(1)] if motion else []
        video = torch.cat(videos)
        if not video.isfinite().all():
            raise ValueError("the video is not finite: are all weights, w1 and w2?")
        return video, torch.cat(motions) if motion else None

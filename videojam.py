"""VideoJAM: Joint Appearance-Motion Representations for Enhanced Motion Generation in Video Models
(Chefer et al., 2025), section by section; the network (Eq. 4) stands before its objective
(Eq. 1-3). Read it with the paper in hand:

    App. C    TAE, the space that the model works in      Sec. 4.2  motion rows, joint loss (Eq. 6)
    App. C    text encoder                                Sec. 4.3  Inner-Guidance (Eq. 7-8), App. A
    Sec. 4.1  DiT (Eq. 4), flow matching (Eq. 1-3)        App. C    schedule, sampler, sizes

One legend, everywhere: t = 0 is noise, t = 1 is data. x is appearance, d motion, y text, u the
predicted velocity. Video (B, T, 3, H, W) in [0, 1], latent (B, C, T', H', W'). The method (losses,
guidance, sampler) knows a model only as `model(x, t, y)`, so it works on other transformers too.
"""
import copy
import dataclasses
import functools
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from flow import ROOT, autocast, cpu_capabilities, one_line, read_file, write_tensors

# ---------------------------------------------------------------- App. C: TAE (Movie Gen's)

@dataclasses.dataclass(frozen=True)
class TAEConfig:
    channels: int = 16                                  # C_TAE
    patch: int = 1                                      # pixels are folded p x p at first
    widths: tuple = (128, 256, 512, 512)                # channels at each level
    strides: tuple = ((2, 2), (2, 2), (2, 2))           # (time, space) from each level to the next
    blocks: int = 2                                     # residual blocks a level

    @property
    def compression(self):
        """(time, space): how many frames and how many pixels a side one latent position covers."""
        return (math.prod(time for time, _ in self.strides),
                self.patch * math.prod(space for _, space in self.strides))


class SpaceTimeConv(nn.Module):
    """A 3 x 3 convolution in space, then one of 3 taps in time, on (B, T, H, W, C).
    Channels come last, so both are 2D convolutions on views of one buffer. Both start as a centre
    tap: in time the identity (an image model at first, as in Movie Gen), in space a rotation of the
    channels. With random taps sprites were missing after 1,000 steps (18 dB after 150, so 24)."""
    def __init__(self, c_in, c_out, stride=(1, 1)):
        super().__init__()
        time, space = stride
        self.space = nn.Conv2d(c_in, c_out, 3, stride=space, padding=1)
        self.time = nn.Conv2d(c_out, c_out, (3, 1), stride=(time, 1))
        for parameter in self.parameters():
            nn.init.zeros_(parameter)
        if not self.time.weight.is_meta:
            nn.init.orthogonal_(self.space.weight.data[:, :, 1, 1])
            self.time.weight.data[:, :, 1, 0] = torch.eye(c_out)

    def forward(self, x):
        B, T, H, W, _ = x.shape
        x = self.space(x.flatten(0, 1).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)    # (BT, H', W', C)
        H, W = x.shape[1:3]
        x = x.reshape(B, T, H * W, -1)
        x = torch.cat([x[:, :1], x, x[:, -1:]], 1)      # symmetric replicate padding in time
        x = self.time(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)                    # (B, T', HW, C)
        return x.reshape(B, -1, H, W, x.shape[-1])


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
        self.stride, self.conv = stride, SpaceTimeConv(c_in, c_out)

    def forward(self, x):
        time, space = self.stride
        x = F.interpolate(x.permute(0, 4, 1, 2, 3), scale_factor=(time, space, space))
        return self.conv(x.permute(0, 2, 3, 4, 1))


class Layers(nn.Sequential):
    """nn.Sequential whose layers' activations can be recomputed in the backward pass, and that
    hands what else it is given to each layer."""
    recompute = False                   # less memory: the paper's clips do not fit without

    def forward(self, x, *others):
        for layer in self:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, *others, use_reentrant=False)
            else:
                x = layer(x, *others)
        return x


def set_recompute(model, again):
    """Whether the layers of a TAE or a DiT (the text encoder's apart) are recomputed; the model."""
    for module in model.modules():
        if isinstance(module, Layers):
            module.recompute = again
    return model


class TAE(nn.Module):
    """Movie Gen's Temporal Auto-Encoder: (B, T, 3, H, W) <-> (B, C, T', H', W'), where
    T' = ceil(T / time), H' = H / space, W' = W / space by the config's compression. Latents of
    video, and with motion=True those of RGB flow, have a basis of their own: see `fit_basis`."""
    def __init__(self, config=TAEConfig()):
        super().__init__()
        self.config, w, p = config, config.widths, config.patch
        blocks = [[ResBlock(width) for _ in range(config.blocks)] for width in w]
        downs = [SpaceTimeConv(*pair) for pair in zip(w, w[1:], config.strides)]
        self.encoder = Layers(
            SpaceTimeConv(3 * p * p, w[0]), *blocks[0],
            *[layer for down, level in zip(downs, blocks[1:]) for layer in (down, *level)],
            SpaceTimeConv(w[-1], 2 * config.channels))
        blocks = [[ResBlock(width) for _ in range(config.blocks)] for width in w]
        ups = [Upsample(*pair) for pair in zip(w[1:], w, config.strides)]
        self.decoder = Layers(
            SpaceTimeConv(config.channels, w[-1]), *blocks[-1],
            *[layer for up, level in zip(ups[::-1], blocks[-2::-1]) for layer in (up, *level)],
            SpaceTimeConv(w[0], 3 * p * p))
        # noise of e^-3 everywhere at first: through unit noise nothing comes for long
        nn.init.zeros_(self.encoder[-1].space.weight[config.channels:])
        nn.init.constant_(self.encoder[-1].time.bias[config.channels:], -6)
        # what encode subtracts and multiplies by: row 0 for videos, row 1 for RGB flow
        self.register_buffer("mean", torch.zeros(2, config.channels))
        # (filled: torch.eye on the meta device takes a second, in which torch imports its compiler)
        self.register_buffer("basis", torch.zeros(2, config.channels, config.channels))
        self.basis.diagonal(dim1=1, dim2=2).fill_(1)

    def posterior(self, video):
        """(B, T, 3, H, W) in [0, 1] -> mean and log-variance, (B, T', H', W', C) each."""
        side, shape = self.config.compression[1], tuple(video.shape)
        if len(shape) != 5 or shape[2] != 3 or shape[3] % side or shape[4] % side:
            raise ValueError(f"TAE takes (B, T, 3, H, W), H and W multiples of {side}, got {shape}")
        x = F.pixel_unshuffle((video - .7) * 3, self.config.patch)      # centred: flow is white
        mean, log_var = self.encoder(x.permute(0, 1, 3, 4, 2)).chunk(2, -1)
        return mean, log_var.float().clamp(-20, 10)

    def pixels(self, z):
        """(B, T', H', W', C) as `posterior` gives them -> (B, T, 3, H, W), not clamped."""
        x = self.decoder(z).permute(0, 1, 4, 2, 3)
        return F.pixel_shuffle(x, self.config.patch) / 3 + .7

    def encode(self, video, motion=False):
        """Video, or RGB flow (motion=True), in [0, 1] -> latent (B, C, T', H', W') in its basis."""
        z = self.posterior(video)[0].float() - self.mean[int(motion)]
        with torch.autocast(z.device.type, enabled=False):
            return (z @ self.basis[int(motion)].float().T).permute(0, 4, 1, 2, 3)

    def decode(self, latent, motion=False, frames=None):
        """Latent -> video in [0, 1]; with `frames`, the spurious last ones are cropped."""
        with torch.autocast(latent.device.type, enabled=False):
            inverse = torch.linalg.inv(self.basis[int(motion)].float())
            z = latent.float().permute(0, 2, 3, 4, 1) @ inverse.T + self.mean[int(motion)]
        return self.pixels(z)[:, :frames].float().clamp(0, 1)

    def fit_basis(self, batches, motion=False, generator=None):
        """Chooses mean and basis of a kind of latents from videos: mean 0, variance 1 on average
        over the channels, and one unit of error is about as visible in every direction.

        With J the decoder's Jacobian, z^T E[J^T J] z is how far z moves the pixels. Its
        eigenvectors become the channels, scaled by the square roots of its eigenvalues, the least
        visible first. Standardising each channel instead makes all equally loud, though a single
        direction may carry 70% of what is seen (of sprites, it does): the DiT learns the rest."""
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


def draw(sample, shape, generator=None):
    """sample (torch.randn, torch.rand) of a shape (B, ...) from one generator; or from a list of B,
    one a sample, so that a batch can be split over GPUs and micro-batches and stay the same."""
    if not isinstance(generator, list):
        return sample(shape, generator=generator)
    return torch.stack([sample(shape[1:], generator=own) for own in generator])


def tae_loss(tae, video, mse_weight=3., kl_weight=1e-5, outlier_weight=1e-2, r=3, generator=None):
    """L1 + MSE + KL + Movie Gen's outlier penalty, a scalar. The penalty pulls in latents further
    than r deviations from the clip's mean, so that no bright spots carry global content. L1 alone,
    the median's loss, is content without small things for long: hence the squares."""
    mean, log_var = tae.posterior(video)
    noise = draw(torch.randn, mean.shape, generator).to(mean.device)
    reconstruction = tae.pixels(mean + (log_var / 2).exp() * noise)[:, :video.shape[1]]
    error, mean = reconstruction.float() - video, mean.float()
    kl = (mean ** 2 + log_var.exp() - 1 - log_var).mean() / 2
    centre = mean.mean((1, 2, 3), keepdim=True)
    spread = mean.std((1, 2, 3), keepdim=True).norm(dim=-1)
    outliers = F.relu((mean - centre).norm(dim=-1) - r * spread).mean()
    return ((error.abs() + mse_weight * error.square()).mean()
            + kl_weight * kl + outlier_weight * outliers)


# ---------------------------------------------------------------- App. C: text, as bytes

PAD, END, VOCABULARY = 0, 257, 258      # tokens 1..256 are the bytes 0..255 (as in ByT5)
FOLD = 4                                # so many tokens become one position of the text encoder


def cut(prompt, most):
    """A prompt's first bytes, `most` of them, up to the end of a character."""
    return prompt.encode()[:most].decode(errors="ignore")


def say_cut(prompts, most):
    """Tells which prompts are longer than a model takes: they are cut at a character's end."""
    for prompt in dict.fromkeys(prompts):
        if (kept := cut(prompt, most)) != prompt:
            print(f"a prompt has {len(prompt.encode())} bytes, the model takes {most}: cut to "
                  f"{kept!r}")


@functools.lru_cache(2 ** 13)           # captions come again and again, bytes are slow in Python
def token_row(prompt, max_bytes):
    """The tokens of one prompt, (L,): see `tokenize`."""
    row = []
    for byte in cut(prompt, max_bytes).encode():
        row.append(byte + 1)
        if byte == ord(" "):
            row += [PAD] * (-len(row) % FOLD)
    return torch.tensor(row + [END], device="cpu")


def tokenize(prompts, max_bytes=None):
    """List of str -> LongTensor (B, L): UTF-8 bytes + 1, then END, then PAD up to the longest. The
    null prompt "" is END alone. Prompts of more than max_bytes are cut at a character's end.
    ValueError for a str: it would be taken for a list of its characters.

    PAD also fills up after each space, so that words begin at multiples of FOLD: a word is folded
    alike wherever it stands. The toy learns to move as named much sooner."""
    if isinstance(prompts, str):
        raise ValueError(f"prompts must be a list of str, got {prompts!r}")
    rows = [token_row(prompt, max_bytes) for prompt in prompts]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)


def null_text(y):
    """The null prompt in the shape of the tokens y: END, then PAD. ValueError where y is not tokens
    but another model's text, of which only the caller knows the null."""
    if y.is_floating_point():
        raise ValueError("null must be given where y is not our tokens")
    null = torch.full_like(y, PAD)
    null[:, 0] = END
    return null


# ---------------------------------------------------------------- Sec. 4.1: DiT (Eq. 4)

@dataclasses.dataclass(frozen=True)
class DiTConfig:
    channels: int = 16                  # C_TAE, of x alone
    patch: int = 2                      # p: patches of 1 x p x p
    width: int = 3072                   # C_DiT
    depth: int = 32
    heads: int = 24
    ffn: int = 6144
    text_width: int = 2048
    text_depth: int = 3
    max_bytes: int = 512                # the longest prompt, in UTF-8 bytes
    motion: bool = False                # whether add_motion has widened W_in and W_out


def rms_norm(x):
    return F.rms_norm(x, x.shape[-1:], eps=1e-6)


@functools.lru_cache(maxsize=16)
def rope_table(grid, head_dim, device):
    """Axial rotary angles of a grid of positions -> cos, sin (positions, head_dim / 2) each. Every
    axis has its own share of the frequencies, so any length and size can be asked for."""
    pairs = head_dim // 2
    shares = [pairs - 2 * (pairs // 3), pairs // 3, pairs // 3] if len(grid) == 3 else [pairs]
    axes = torch.meshgrid(*[torch.arange(n, device=device).float() for n in grid], indexing="ij")
    angles = [axis.flatten()[:, None] * 1e4 ** -(torch.arange(n, device=device) / n)
              for axis, n in zip(axes, shares)]
    angles = torch.cat(angles, 1)
    return angles.cos(), angles.sin()


def rotate(x, rope):
    """Turns pairs (first half, second half) of (B, heads, positions, head_dim) by their angles."""
    cos, sin = (table.to(x.dtype) for table in rope)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def attend(q, k, v, mask=None):
    """softmax(q k^T / sqrt(head_dim)) v on (B, heads, positions, head_dim); mask True = visible."""
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    # on CPU plain products train the toy 1.8 times as fast as the fused kernel (slow backward)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1).to(v.dtype) @ v


class Attention(nn.Module):
    """Multi-head attention with QK-norm; to itself (with rope), or to a context (with a mask)."""
    def __init__(self, width, heads, context_width=None):
        super().__init__()
        self.heads, head_dim = heads, width // heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_kv = nn.Linear(context_width or width, 2 * width, bias=False)
        self.norm_q, self.norm_k = nn.RMSNorm(head_dim, eps=1e-6), nn.RMSNorm(head_dim, eps=1e-6)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x, context=None, rope=None, mask=None):
        B, N, width = x.shape
        context = x if context is None else context
        q = self.to_q(x).view(B, N, self.heads, -1)
        k, v = self.to_kv(context).view(B, context.shape[1], 2, self.heads, -1).unbind(2)
        # (in autocast's dtype: torch has no fused norm of bf16 by fp32 weights, and warns)
        q, k = (F.rms_norm(part, part.shape[-1:], norm.weight.to(part.dtype), norm.eps)
                .transpose(1, 2) for part, norm in ((q, self.norm_q), (k, self.norm_k)))
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        x = attend(q, k, v.transpose(1, 2), mask)
        return self.out(x.transpose(1, 2).reshape(B, N, width))


class SwiGLU(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        gate, value = self.up(x).chunk(2, -1)
        return self.down(F.silu(gate) * value)


class TextLayer(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.attention, self.mlp = Attention(width, heads), SwiGLU(width, 2 * width)

    def forward(self, x, mask, rope):
        x = x + self.attention(rms_norm(x), rope=rope, mask=mask)
        return x + self.mlp(rms_norm(x))


class TextEncoder(nn.Module):
    """Tokens (B, L) -> features (B, ceil(L / FOLD), text_width), mask (B, 1, 1, ceil(L / FOLD))
    that hides padding. Every FOLD tokens become one position at first: a caption has about as many
    bytes as the toy's video has tokens, and would cost as much. Stands for the paper's UL2, ByT5
    and MetaCLIP; trained together with the DiT."""
    def __init__(self, config):
        super().__init__()
        width, heads = config.text_width, round(config.text_width / 64)
        self.head_dim = width // heads
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


class Block(nn.Module):
    """Self-attention over all space-time tokens, cross-attention to the text, SwiGLU. adaLN: t
    gives shift, scale and gate of the first and the last, by one projection that all blocks share
    (PixArt's adaLN-single) and a table that each adds."""
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


def initialize(modules):
    """First weights of a DiT's modules, all or some. Blocks start as the identity and u as zero: a
    deep stack then trains at once (adaLN-Zero)."""
    modules = list(modules)
    for module in modules:
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)
        elif isinstance(module, nn.RMSNorm):
            nn.init.ones_(module.weight)
    for module in modules:
        if isinstance(module, Block):
            nn.init.zeros_(module.cross.out.weight)
            nn.init.zeros_(module.table)
        elif isinstance(module, DiT):
            for zero in (module.position.weight, module.modulation.weight, module.final_table,
                         module.W_out.weight):
                nn.init.zeros_(zero)


class DiT(nn.Module):
    """u(x_t, y, t) = M(x_t W_in, y, t) W_out (Eq. 4). x (B, C, T', H', W'), t (B,) or a scalar,
    tokens (B, L) -> velocity of x's shape. After add_motion x and u are [x, d], 2C channels."""
    def __init__(self, config=DiTConfig()):
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
        if not self.W_in.weight.is_meta:                # (nothing to fill there, but slow to find)
            initialize(self.modules())

    def add_motion(self):
        """Sec. 4.2: W_in gets zero rows for d, W_out zero columns: u^x is the same to the bit."""
        if self.config.motion:
            raise ValueError("this DiT has its motion rows already")
        self.W_in = widen_input(self.W_in, self.config.channels, channel_last=True)
        self.W_out = widen_output(self.W_out, self.config.channels, channel_last=True)
        self.config = dataclasses.replace(self.config, motion=True)
        return self

    def compile_blocks(self):
        """One compiled graph for all blocks: training on a CPU is twice as fast."""
        # left alone, GCC tunes for the CPU; GCC 12 does not know newer Xeons, tunes for none, and
        # its 512-bit code then transposes bf16 wrongly: gradients are NaN
        avx512 = cpu_capabilities().get("avx512_f")
        known = "cpp.march" in torch._inductor.list_options()
        options = {"cpp.march": "skylake-avx512"} if avx512 and known else None
        for layer in [*self.blocks, *self.text.layers]:
            layer.compile(options=options)

    def forward(self, x, t, tokens):
        c, (T, H, W) = self.config, x.shape[2:]
        channels = (1 + c.motion) * c.channels
        if x.shape[1] != channels or H % c.patch or W % c.patch:
            raise ValueError(f"DiT takes (B, {channels}, T, H, W), H and W multiples of {c.patch}, "
                             f"got {tuple(x.shape)}")
        text, mask = self.text(tokens)
        t = torch.as_tensor(t, dtype=torch.float32, device=x.device).expand(len(x))
        angles = 1000 * t[:, None] * 1e4 ** -(torch.arange(128, device=x.device) / 128)
        emb = self.time(torch.cat([angles.cos(), angles.sin()], 1))                 # (B, width)
        modulation = self.modulation(F.silu(emb)).view(len(x), 6, c.width)
        rope = rope_table((T, H // c.patch, W // c.patch), c.width // c.heads, x.device)
        h = self.W_in(patchify(x, c.patch))                                         # (B, N, width)
        h = h + self.position(torch.cat(rope, 1).to(h.dtype))
        h = self.blocks(h, modulation, text, mask, rope)
        shift, scale = (emb[:, None] + self.final_table).to(h.dtype).unsqueeze(2).unbind(1)
        u = self.W_out(rms_norm(h) * (1 + scale) + shift)
        return unpatchify(u, c.patch, (T, H, W)).float()


# ---------------------------------------------------------------- Sec. 4.1: flow matching (Eq. 1-3)

def noised(x1, x0, t):
    """Eq. 1: x_t = t x_1 + (1 - t) x_0, t (B,)."""
    t = t.view(-1, *[1] * (x1.ndim - 1))
    return t * x1 + (1 - t) * x0


def velocity(x1, x0):
    """Eq. 2: v = x_1 - x_0."""
    return x1 - x0


def sample_t(n, uniform=False, shift=1., generator=None):
    """n times in (0, 1): logit-normal(0, 1) as in Movie Gen, or uniform. A shift above 1 moves them
    towards 0, noise, where motion is decided (Stable Diffusion 3 does so for large images)."""
    t = draw(torch.rand, (n,), generator) if uniform else \
        draw(torch.randn, (n,), generator).sigmoid()
    return t / (t + shift * (1 - t))


def drop(batch, p, empty, generator=None):
    """Replaces each sample of (B, ...), by a coin of its own, by that of `empty`, with chance p."""
    coin = (draw(torch.rand, (len(batch),), generator) < p).to(batch.device)
    return torch.where(coin.view(-1, *[1] * (batch.ndim - 1)), empty, batch)


def corrupted(z1, y, C, null=None, text_dropout=.3, motion_dropout=.2, uniform=False, shift=1.,
              generator=None):
    """What a model is given of a batch, and what it should say: t (B,), z_t, y and the velocity v.
    z1 (B, C or 2C, ...): x1, or [x1, d1]; y any tensor with a batch axis, null what stands for no
    text (ours by default); generator: one, or one for each sample (see `draw`). Text is dropped for
    30% of the samples and, independently, the noised motion for 20% (set to zero; its target stays,
    so that motion is guessed from appearance alone)."""
    precise = torch.promote_types(z1.dtype, torch.float32)      # latents may be bf16, t may not

    def noise(z):
        return draw(torch.randn, z.shape, generator).to(z.device, precise)

    null = null_text(y) if null is None else null.expand_as(y)
    # one CPU generator, whatever the device; what x needs is drawn before what d needs, so that a
    # model without motion gets the same noise, times and dropped prompts
    x0, t = noise(z1[:, :C]), sample_t(len(z1), uniform, shift, generator).to(z1.device, precise)
    y = drop(y, text_dropout, null, generator)
    z0 = torch.cat([x0, noise(z1[:, C:])], 1)
    z_t = noised(z1, z0, t)
    if z1.shape[1] > C:
        x_t, d_t = z_t.split(C, 1)
        z_t = torch.cat([x_t, drop(d_t, motion_dropout, torch.zeros_like(d_t), generator)], 1)
    return t, z_t.to(z1.dtype), y, velocity(z1, z0)


def squared_errors(model, t, z_t, y, v):
    """|u(z_t, y, t) - v|^2 of what `corrupted` gives: the integrand of Eq. 3 (C channels) and of
    Eq. 6 (2C), averaged over positions, (B, C or 2C)."""
    return (model(z_t, t, y) - v).square().flatten(2).mean(2)


def flow_matching_loss(model, x1, y, null=None, **options):
    """Eq. 3, as the mean over batch, channels and positions. x1 (B, C, ...)."""
    return squared_errors(model, *corrupted(x1, y, x1.shape[1], null, **options)).mean()


# ---------------------------------------------------------------- Sec. 4.2: joint representation
# The paper multiplies from the right, x W_in: what are rows of W_in there are columns of
# nn.Linear's weight here (axis 1), and columns of W_out are its rows (axis 0).

def widen(weight, axis, C, channel_last):
    """Appends C zero channels: after each patch offset's C (channel_last), else once after all."""
    groups = weight.shape[axis] // C if channel_last else 1
    parts = weight.unflatten(axis, (groups, -1))                    # (..., groups, C or all, ...)
    return torch.cat([parts, torch.zeros_like(parts)], axis + 1).flatten(axis, axis + 1)


def rebuilt(layer, weight, bias, **sizes):
    """A layer of the same kind and options with other weights and the attributes of their size."""
    new = copy.copy(layer)
    bias = None if bias is None else nn.Parameter(bias.detach().clone())    # of its own
    new.__dict__.update(sizes, _parameters={"weight": nn.Parameter(weight), "bias": bias})
    return new


def widen_input(layer, C, channel_last):
    """W_in -> W_in^+: the layer (Linear over patches of C channels, or a Conv) for [x, d], 2C. A
    Linear's patches are laid out (offsets, C) with channel_last, else (C, offsets)."""
    weight = layer.weight.detach()
    if isinstance(layer, nn.Linear) and weight.shape[1] % C == 0:
        return rebuilt(layer, widen(weight, 1, C, channel_last), layer.bias,
                       in_features=2 * weight.shape[1])
    if isinstance(layer, _ConvNd) and not isinstance(layer, _ConvTransposeNd) \
            and layer.in_channels == C and layer.groups == 1:
        return rebuilt(layer, widen(weight, 1, C, False), layer.bias, in_channels=2 * C)
    raise ValueError(f"cannot widen {layer} for an input of {C} channels")


def widen_output(layer, C, channel_last):
    """W_out -> W_out^+: the layer that also gives d, from zero columns (and a zero bias). A Linear
    or Conv whose outputs are patches, laid out as channel_last says, or a ConvTranspose."""
    weight, bias = layer.weight.detach(), layer.bias
    if isinstance(layer, _ConvTransposeNd):
        axis, outputs, attribute, channel_last = 1, layer.out_channels, "out_channels", False
    else:
        axis, outputs = 0, weight.shape[0]
        attribute = "out_features" if isinstance(layer, nn.Linear) else "out_channels"
    known = isinstance(layer, (nn.Linear, _ConvNd)) and getattr(layer, "groups", 1) == 1
    if not known or outputs % C:
        raise ValueError(f"cannot widen {layer} for an output of {C} channels")
    bias = None if bias is None else widen(bias.detach(), 0, C, channel_last)
    return rebuilt(layer, widen(weight, axis, C, channel_last), bias, **{attribute: 2 * outputs})


def joint_loss(model, x1, d1, y, null=None, **options):
    """Eq. 6: u^+ = [u^x, u^d] against v^+, one t for both. x1, d1 (B, C, ...) -> the mean."""
    z1 = torch.cat([x1, d1], 1)
    return squared_errors(model, *corrupted(z1, y, x1.shape[1], null, **options)).mean()


# ---------------------------------------------------------------- Sec. 4.3: guidance (Eq. 7-8)

WITHOUT_MOTION = ("cfg", "none")
GUIDANCE = ("inner", *WITHOUT_MOTION, "ip2p", "composable")


def guidance_terms(mode, w1, w2):
    """The score of a mode as a sum of evaluations: (weight, with d?, with y?) each. w1 = 5 in
    Eq. 8 is what others call a guidance scale of 6; in the modes of App. A it is one of 5."""
    if mode == "none":
        return [(1, True, True)]
    if mode == "cfg":                               # Ho & Salimans: Eq. 8 without its motion term
        return [(1 + w1, True, True), (-w1, True, False)]
    if mode == "inner":                             # Eq. 8
        return [(1 + w1 + w2, True, True), (-w1, True, False), (-w2, False, True)]
    # App. A, with w1 the text scale and w2 the motion scale here too (the paper swaps the names)
    if mode == "ip2p":      # u(x,0,0) + w2 (u(x,d,0) - u(x,0,0)) + w1 (u(x,d,y) - u(x,d,0))
        return [(1 - w2, False, False), (w2 - w1, True, False), (w1, True, True)]
    if mode == "composable":    # u(x,0,0) + w1 (u(x,0,y) - u(x,0,0)) + w2 (u(x,d,0) - u(x,0,0))
        return [(1 - w1 - w2, False, False), (w1, False, True), (w2, True, False)]
    raise ValueError(f"unknown guidance {mode!r}: one of {', '.join(GUIDANCE)}")


def guided_velocity(model, x, d, t, y, w1=5., w2=3., mode="inner", null=None):
    """The guided velocity of [x, d], each (B, C, ...), at time t: u of 2C channels. All terms run
    in one batch, those of weight 0 not at all. d = None: a model without motion, cfg or none; u
    has C channels then."""
    if d is None and mode not in WITHOUT_MOTION:
        raise ValueError(f"guidance {mode!r} needs motion: a model without it takes cfg or none")
    null = null_text(y) if null is None else null.expand_as(y)
    terms = [term for term in guidance_terms(mode, w1, w2) if term[0] != 0]
    z = [x if d is None else torch.cat([x, d if with_d else torch.zeros_like(d)], 1)
         for _, with_d, _ in terms]
    text = [y if with_y else null for _, _, with_y in terms]
    t = torch.as_tensor(t, dtype=torch.float32, device=x.device).expand(len(x))
    u = model(torch.cat(z), t.repeat(len(terms)), torch.cat(text)).chunk(len(terms))
    return sum(weight * part for (weight, _, _), part in zip(terms, u))


# ---------------------------------------------------------------- App. C: schedule and sampler

def linear_quadratic(steps, emulated=1000):
    """Movie Gen's schedule: (steps + 1,) times from 0 to 1, half of them 1/emulated apart, then
    quadratically more. emulated = 1280 at 64 steps is Mochi's threshold of 0.025."""
    if not 1 <= steps <= emulated:
        raise ValueError(f"steps must be from 1 to {emulated}, got {steps}")
    i = torch.arange(steps + 1, dtype=torch.float64)
    ramp = ((i - steps / 2).clamp(min=0) / (steps / 2)) ** 2
    return (i / emulated + (1 - steps / emulated) * ramp).float()


@torch.no_grad()
def euler_sample(model, x, d, y, times, w1=5., w2=3., mode="inner", null=None, motion_steps=None,
                 progress=None):
    """From noise x, d (B, C, ...) at times[0] to times[-1] by Euler steps: returns x, d. w2 acts in
    the first motion_steps, by default half of all: there motion is decided (App. C). After them it
    is 0, in ip2p 1, where what is left is u(x,d,0) + w1 (u(x,d,y) - u(x,d,0)). In composable
    guidance it acts in all by default: without it d would be in none of the terms. d = None: a
    model without motion."""
    steps, C = len(times) - 1, x.shape[1]
    if motion_steps is None:
        motion_steps = steps if mode == "composable" else steps / 2
    z = x if d is None else torch.cat([x, d], 1)
    dtype, z = z.dtype, z.to(torch.promote_types(z.dtype, torch.float32))   # bf16 loses small steps
    for i in tqdm(range(steps), desc=progress, disable=progress is None):
        x, d = (z.to(dtype), None) if d is None else z.to(dtype).split(C, 1)
        scale = w2 if i < motion_steps else float(mode == "ip2p")
        u = guided_velocity(model, x, d, times[i], y, w1, scale, mode, null)
        z = z + (times[i + 1] - times[i]) * u
    return (z, None) if d is None else z.split(C, 1)


# ---------------------------------------------------------------- App. C: sizes

@dataclasses.dataclass(frozen=True)
class Preset:
    frames: int
    size: int                           # pixels a side
    fps: int
    tae: TAEConfig
    dit: DiTConfig
    sigma: float = .15                  # of Eq. 5

    @staticmethod
    def from_dict(config):
        """The inverse of dataclasses.asdict, for what a bundle carries."""
        return Preset(**{**config, "tae": TAEConfig(**config["tae"]),
                         "dit": DiTConfig(**config["dit"])})

    def latent_shape(self):
        time, space = self.tae.compression
        side = self.size // space
        return self.tae.channels, math.ceil(self.frames / time), side, side


PRESETS = {
    # what two CPU cores train in minutes: pixels folded 4 x 4, so that no convolution sees them all
    "toy": Preset(16, 64, 8, TAEConfig(8, 4, (48, 96, 96), ((2, 2), (2, 1)), 1),
                  DiTConfig(8, 2, 224, 4, 4, 448, 96, 2, 192)),
    # one GPU, own videos: 151 M parameters
    "small": Preset(48, 128, 12, TAEConfig(16, 1, (64, 128, 256, 256)),
                    DiTConfig(16, 2, 768, 16, 12, 1536, 768, 2)),
    # the paper's: 4.2 B and 29 B. Heads, FFN, text encoder and C_TAE are our assumptions
    "4b": Preset(128, 256, 24, TAEConfig(), DiTConfig()),
    "30b": Preset(128, 256, 24, TAEConfig(), DiTConfig(16, 2, 6144, 48, 48, 16384, 4096, 6)),
}


# ---------------------------------------------------------------- the bundle: one file, all of it

def weights_of(args):
    """The bundle that --run names; without it, the shipped one."""
    return ROOT / "weights/toy.pt" if args.run is None else Path(args.run) / "model.pt"


def read_bundle(path):
    """What a bundle holds: its Preset, its TAE and {name: DiT}, in half precision.

    Raises ValueError, one line, where the file is missing, damaged or of another version."""
    content = read_file(path, "videojam")
    try:
        config, dits = Preset.from_dict(content["config"]), {}
        rows = config.dit.channels * config.dit.patch ** 2
        with torch.device("meta"):                      # no memory: the file's tensors are taken
            tae = TAE(config.tae)
            for name, weights in content["dits"].items():
                motion = weights["W_in.weight"].shape[1] == 2 * rows
                dits[name] = DiT(dataclasses.replace(config.dit, motion=motion))
        tae.load_state_dict(content["tae"], assign=True)
        for name, dit in dits.items():
            dit.load_state_dict(content["dits"][name], assign=True)
    except Exception as error:                          # whatever a foreign file leads to
        raise ValueError(f"{path}: does not fit this version: "
                         f"{one_line(error)}") from None
    return config, tae, dits


class VideoJAM:
    """A TAE, a DiT and their preset. `which` says which DiT: "jam", "base" or "control"."""
    def __init__(self, config, tae, dit, which="jam"):
        self.config, self.tae, self.dit, self.which = config, tae.eval(), dit.eval(), which

    def save(self, path, **others):
        """Writes one file: config, TAE, this DiT and the `others` (name=DiT), in half precision:
        what is loaded, and saved again, gives the same videos to the bit, weights of fp32 are
        rounded."""
        def half(module):
            return {k: v.detach().half().contiguous() for k, v in module.state_dict().items()}
        dits, config = {self.which: self.dit, **others}, dataclasses.asdict(self.config)
        config["dit"]["motion"] = False                 # a matter of each DiT, not of the preset
        content = {"kind": "videojam", "config": config, "tae": half(self.tae),
                   "dits": {name: half(dit) for name, dit in dits.items()}}
        write_tensors(path, content)

    @classmethod
    def load(cls, path=ROOT / "weights/toy.pt", which="jam", device="cpu"):
        """The bundle at `path` with the DiT `which`. One line of ValueError for any other file."""
        config, tae, dits = read_bundle(path)
        if which not in dits:
            raise ValueError(f"{path}: has no {which!r} model, only {', '.join(dits)}")
        tae, dit = (model.to(device, torch.float32) for model in (tae, dits[which]))
        return cls(config, tae, dit, which)

    @torch.no_grad()
    def generate(self, prompts, steps=100, w1=5., w2=3., seed=0, mode=None, emulated=1000, batch=16,
                 motion_steps=None, progress=None):
        """List of prompts -> video, RGB motion (None without motion): (B, T, 3, H, W) in [0, 1].
        mode: one of GUIDANCE; by default "inner", without motion "cfg". Sample i starts from the
        noise of seed + i, the same for every model. In bf16 where that is fast."""
        if not prompts:
            raise ValueError("no prompt: give at least one")
        device, motion = next(self.dit.parameters()).device, self.dit.config.motion
        mode = mode or ("inner" if motion else "cfg")
        times = linear_quadratic(steps, emulated).to(device)
        shape, videos = self.config.latent_shape(), []
        for start in range(0, len(prompts), batch):
            y = tokenize(prompts[start:start + batch], self.config.dit.max_bytes).to(device)
            # x is drawn before d, so that models with and without motion start from the same x
            draws = [torch.Generator().manual_seed(seed + start + i) for i in range(len(y))]
            x, d = (draw(torch.randn, (len(y), *shape), draws).to(device) for _ in range(2))
            with autocast(device):
                x, d = euler_sample(self.dit, x, d if motion else None, y, times, w1, w2, mode,
                                    motion_steps=motion_steps, progress=progress)
                for i in range(len(x)):             # one by one: pixels take far more memory
                    video = self.tae.decode(x[i:i + 1], frames=self.config.frames)
                    rgb = self.tae.decode(d[i:i + 1], True, self.config.frames) if motion else None
                    videos.append((video, rgb))
        video, rgb = (torch.cat(parts) if parts[0] is not None else None for parts in zip(*videos))
        if not video.isfinite().all():
            raise ValueError("the video is not finite: is one of the weights, or w1 or w2?")
        return video, rgb

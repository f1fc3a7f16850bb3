"""pytest tests/test_videojam.py: the paper's equations, the models, the model file."""
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY, bad_weights, randomised, tiny_dit
from torch import nn

from videojam import (EOS, GUIDANCE, PAD, PRESETS, TAE, DiT, SpaceTimeConv, VideoJAM, attend,
                      drop_condition, euler_sample, flow_matching_loss, guided_velocity,
                      interpolate, joint_loss, linear_quadratic, null_text, patchify, sample_noise,
                      set_activation_checkpointing, tae_loss, tokenize, unpatchify, velocity,
                      widen_input, widen_output)

def rng(seed=0):
    return torch.Generator().manual_seed(seed)

class Foreign:
    """Somebody else's model: y is a float vector. Not linear, so that no term hides another; it
    keeps the inputs of each call."""

    def __init__(self, channels, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.mix = torch.randn(channels, channels, generator=generator, dtype=torch.float64)
        self.calls = []

    def __call__(self, z, t, y):
        self.calls.append((z, t, y))
        t, y = (v.double().view(len(z), -1).sum(1).view(-1, 1, 1, 1, 1) for v in (t, y))
        return torch.einsum("ij,bjthw->bithw", self.mix, (z.double() + t + y).sin()).to(z)

def draws(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

def case(B=3, C=2):
    """x, d (B, C, 2, 2, 2), a foreign y (B, 5) and the null for it."""
    x, d = draws(2, B, C, 2, 2, 2)
    return x, d, draws(B, 5, seed=1), torch.full((1, 5), .7, dtype=torch.float64)

# ---------------------------------------------------------------- App. C: TAE

@pytest.mark.parametrize("T", (1, 2, 3, 5, 8))
def test_tae_shapes_for_any_length(T):
    tae = randomised(TAE(TINY.tae))
    latent = tae.encode(torch.rand(2, T, 3, 16, 24))
    assert latent.shape == (2, 4, math.ceil(T / 2), 4, 6)
    assert tae.decode(latent).shape == (2, 2 * math.ceil(T / 2), 3, 16, 24)
    video = tae.decode(latent, frames=T)
    assert video.shape == (2, T, 3, 16, 24) and 0 <= video.min() and video.max() <= 1
    assert torch.equal(video, tae.decode(latent)[:, :T])        # the spurious ones are the last

@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (2, 1)])
def test_tae_convolution_is_its_spatial_one_at_initialisation(stride):
    conv, x = SpaceTimeConv(3, 5, stride), torch.rand(2, 4, 6, 6, 3)
    frames = [conv.space(x[:, k].permute(0, 3, 1, 2)) for k in range(0, 4, stride[0])]
    torch.testing.assert_close(conv(x), torch.stack(frames, 1).permute(0, 1, 3, 4, 2))
    # and that is a rotation of each pixel's channels
    norms = x[:, ::stride[0], ::stride[1], ::stride[1]].norm(dim=-1)
    torch.testing.assert_close(conv(x).norm(dim=-1), norms)

def test_tae_of_a_still_video_is_still():
    tae, frame = randomised(TAE(TINY.tae), std=.1), torch.rand(1, 1, 3, 16, 16)
    latent = tae.encode(frame.expand(1, 6, 3, 16, 16))
    torch.testing.assert_close(latent, latent[:, :, :1].expand_as(latent), atol=1e-5, rtol=1e-4)

def test_tae_whitens_videos_and_motion_apart_and_back():
    torch.manual_seed(0)
    tae, video = randomised(TAE(TINY.tae)), torch.rand(1, 4, 3, 16, 16)
    raw, decoded = tae.encode(video), tae.decode(tae.encode(video))
    torch.nn.init.normal_(tae.mean), tae.basis.copy_(3 * torch.eye(4) + torch.rand(2, 4, 4))
    for row, motion in enumerate((False, True)):
        latent = tae.encode(video, motion)
        for k in range(4):
            expected = sum(tae.basis[row, k, c] * (raw[:, c] - tae.mean[row, c]) for c in range(4))
            torch.testing.assert_close(latent[:, k], expected)
        torch.testing.assert_close(tae.decode(latent, motion), decoded, atol=1e-3, rtol=1e-3)

def test_fit_whitening_makes_latent_errors_equal_pixel_errors():
    torch.manual_seed(0)
    tae, videos = randomised(TAE(TINY.tae), std=.1), torch.rand(8, 4, 3, 16, 16)
    with torch.no_grad():       # a linear decoder: pixels = matrix z at every position, spread out
        tae.decoder = nn.Linear(4, tae.decoder[-1].time.out_channels)
        tae.decoder.weight.copy_(torch.randn_like(tae.decoder.weight) * torch.tensor([9, 3, 1, .2]))
    tae.fit_whitening(videos.split(2), motion=True, generator=rng())
    latent = tae.encode(videos, motion=True).detach()
    torch.testing.assert_close(latent.mean((0, 2, 3, 4)), torch.zeros(4), atol=1e-4, rtol=0)
    assert latent.square().mean() == pytest.approx(1, abs=1e-4)
    # a unit along any channel moves the pixels equally far, and along two at right angles
    matrix = tae.decoder.weight.detach() @ torch.linalg.inv(tae.basis[1])
    gram = matrix.T @ matrix
    torch.testing.assert_close(gram / gram[0, 0], torch.eye(4), atol=.25, rtol=0)
    assert torch.equal(tae.basis[0], torch.eye(4)) and not tae.mean[0].any()    # videos' untouched

@pytest.mark.parametrize("model", ("tae", "dit"))
def test_activation_checkpointing_keeps_gradients_and_saves_less(model):
    module = {"tae": randomised(TAE(TINY.tae), std=.1), "dit": tiny_dit()}[model]
    video, z = torch.rand(2, 5, 3, 16, 16), torch.randn(2, 8, 3, 4, 4, generator=rng())
    noise, gradients, saved = torch.randn(2, 3, 4, 4, 4, generator=rng(1)), [], []
    for on in (False, True):
        set_activation_checkpointing(module, on)
        count = []
        with torch.autograd.graph.saved_tensors_hooks(
                lambda tensor: (count.append(tensor.numel()), tensor)[1], lambda tensor: tensor):
            loss = tae_loss(module, video, noise) if model == "tae" else \
                module(z, .3, tokenize(["a red square", "b"])).square().mean()
        saved.append(sum(count))
        gradients.append(torch.autograd.grad(loss, list(module.parameters())))
    assert saved[1] < .7 * saved[0]         # (the text encoder's are kept)
    assert all(torch.equal(plain, again) for plain, again in zip(*gradients))

def test_tae_loss_is_l1_mse_kl_and_outlier_penalty():
    tae, video = randomised(TAE(TINY.tae)), torch.rand(2, 3, 3, 16, 16)

    mean, log_var = tae.posterior(video)
    noise = torch.randn(mean.shape, generator=rng())

    def loss(kl, outliers, mse=0):
        return tae_loss(tae, video, noise, mse, kl, outliers, 1)

    decoded = tae.pixels(mean + (log_var / 2).exp() * noise)[:, :3]
    torch.testing.assert_close(loss(0, 0), F.l1_loss(decoded, video))
    squares = loss(0, 0, 2) - loss(0, 0)
    torch.testing.assert_close(squares, 2 * F.mse_loss(decoded, video), rtol=1e-3, atol=1e-3)
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normal(mean, (log_var / 2).exp()), normal(0., 1.)).mean()
    torch.testing.assert_close(loss(1, 0) - loss(0, 0), kl, rtol=1e-3, atol=1e-3)
    excess = []
    for clip in mean.detach().flatten(1, 3):            # positions further out than one deviation
        spread = clip.var(0).sum().sqrt()
        excess += [max(0, (z - clip.mean(0)).norm() - spread) for z in clip]
    penalty = (loss(0, 1) - loss(0, 0)).item()
    assert penalty == pytest.approx(float(sum(excess)) / len(excess), rel=1e-2)

@pytest.mark.parametrize("shape", [(4, 3, 16, 16), (1, 4, 4, 16, 16), (1, 4, 3, 18, 16),
                                   (1, 4, 3, 16, 18)])
def test_tae_says_which_shape_it_takes_and_got(shape):
    with pytest.raises(ValueError, match="multiples of 4, got .*" + ", ".join(map(str, shape))):
        TAE(TINY.tae).encode(torch.rand(shape))

# ---------------------------------------------------------------- App. C: text

def test_tokens_are_bytes_then_eos_then_padding():
    assert tokenize(["aé", "", "\0"]).tolist() == [[98, 0xc3 + 1, 0xa9 + 1, EOS],
                                                  [EOS, PAD, PAD, PAD], [1, EOS, PAD, PAD]]
    assert tokenize(["a redé b ", " c"]).tolist() == [
        [98, 33, PAD, PAD, 115, 102, 101, 0xc3 + 1, 0xa9 + 1, 33, PAD, PAD, 99, 33, PAD, PAD, EOS],
        [33, PAD, PAD, PAD, 100, EOS] + [PAD] * 11]         # words begin at multiples of four
    assert null_text(tokenize(["aé", ""])).tolist() == tokenize(["", "abc"])[:1].tolist() * 2
    with pytest.raises(ValueError, match="must be a list of str, got 'a star'"):
        tokenize("a star")
    with pytest.raises(ValueError, match="null must be given"):         # of another model's text
        null_text(torch.randn(2, 5))

@pytest.mark.parametrize("prompt, limit, kept", [
    ("abcd", 4, "abcd"), ("abcde", 4, "abcd"), ("abcé", 4, "abc"), ("abé", 4, "abé"),
    ("ab🙂", 5, "ab"), ("ab🙂", 6, "ab🙂"), ("🙂", 3, "")])
def test_long_prompts_are_cut_between_characters(prompt, limit, kept):
    assert tokenize([prompt], limit).tolist() == tokenize([kept]).tolist()

def test_padding_is_seen_as_nothing():
    dit, short = tiny_dit(False), "a red square"
    x = torch.randn(1, 4, 3, 4, 4)
    alone = dit(x, .4, tokenize([short]))
    together = dit(x.expand(2, -1, -1, -1, -1), .4, tokenize([short, "another, much longer one"]))
    torch.testing.assert_close(together[:1], alone, atol=1e-5, rtol=1e-4)
    assert (together[1] - alone[0]).abs().max() > 1e-2                  # the text does matter
    nothing = dit(x, .4, tokenize([""]))
    dropped = dit(x, .4, null_text(tokenize([short])))
    torch.testing.assert_close(dropped, nothing, atol=1e-5, rtol=1e-4)

# ---------------------------------------------------------------- Sec. 4.1: DiT, Eq. 1-4

@pytest.mark.parametrize("mask", (None, torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 1, 1]]) > 0))
def test_attention_on_cpu_is_torchs(mask):
    q, k, v = torch.randn(2, 3, 7, 8), *torch.randn(2, 2, 3, 5, 8)
    mask = None if mask is None else mask[:, None, None]
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(attend(q, k, v, mask), expected)

def test_patchify_puts_channels_last_within_a_patch_and_comes_back():
    x = torch.randn(2, 3, 2, 4, 6)
    tokens = patchify(x, 2)
    assert tokens.shape == (2, 2 * 2 * 3, 2 * 2 * 3)
    assert torch.equal(unpatchify(tokens, 2, (2, 4, 6)), x)
    for t, row, col, i, j, c in [(0, 0, 0, 0, 0, 0), (1, 1, 2, 1, 0, 2), (0, 1, 1, 0, 1, 1)]:
        assert torch.equal(tokens[:, (t * 2 + row) * 3 + col, (i * 2 + j) * 3 + c],
                           x[:, c, t, 2 * row + i, 2 * col + j])

def test_dit_starts_at_zero_and_once_trained_sees_position_time_and_text():
    x, y = torch.randn(1, 4, 3, 4, 4), tokenize(["abc"])
    assert not DiT(TINY.dit)(x, .5, y).any()
    dit = tiny_dit(False)
    u = dit(x, .5, y)
    assert u.shape == x.shape and torch.equal(u, dit(x, torch.tensor([.5]), y))
    for other in (dit(x, .6, y), dit(x, .5, tokenize(["acb"])), dit(x.flip(2), .5, y).flip(2),
                  dit(x.flip(3), .5, y).flip(3), dit(x.flip(4), .5, y).flip(4)):
        assert (other - u).abs().max() > 1e-3
    assert dit(torch.randn(2, 4, 5, 2, 8), .5, tokenize(["a", "b"])).shape == (2, 4, 5, 2, 8)
    for shape in ((1, 8, 3, 4, 4), (1, 4, 3, 3, 4)):
        with pytest.raises(ValueError, match="DiT takes"):
            dit(torch.randn(shape), .5, y)

def test_dit_knows_where_its_tokens_are_by_their_embedding_alone():
    x, y, dit = torch.ones(1, 4, 3, 4, 4), tokenize(["abc"]), tiny_dit(False)
    u = dit(x, .5, y)
    assert (u - u[..., :1, :2, :2].repeat(1, 1, 3, 2, 2)).abs().max() > 1e-3
    torch.nn.init.zeros_(dit.position.weight)               # RoPE turns all tokens' values to one
    u = dit(x, .5, y)
    torch.testing.assert_close(u, u[..., :1, :2, :2].repeat(1, 1, 3, 2, 2), atol=1e-5, rtol=1e-4)

def test_eq1_and_eq2_by_hand():
    x1, x0 = torch.tensor([[[4.]], [[10.]]]), torch.tensor([[[0.]], [[2.]]])
    assert interpolate(x1, x0, torch.tensor([.25, .5])).flatten().tolist() == [1, 6]
    assert velocity(x1, x0).flatten().tolist() == [4, 8]

def test_t_0_is_noise_and_t_1_is_data():
    x1, x0 = draws(2, 3, 1, 1, 1, 1)
    assert torch.equal(interpolate(x1, x0, torch.zeros(3)), x0) and torch.equal(
        interpolate(x1, x0, torch.ones(3)), x1)

def test_flow_matching_loss_is_the_squared_error_of_velocity():
    x1, _, y, null = case()

    def off_by(error):      # at time t, x_0 = (x_t - t x_1) / (1 - t)
        return lambda x, t, y: (x1 - x) / (1 - t.view(-1, 1, 1, 1, 1)) + error

    for error in (0., 1., 3.):
        assert flow_matching_loss(off_by(error), x1, y, null).item() == pytest.approx(error ** 2)

def test_t_is_logit_normal_or_uniform():
    for uniform, quartile in ((False, 1 / (1 + math.exp(.6745))), (True, .25)):
        t = sample_noise((50_000, 1, 1), rng(), uniform).t
        assert 0 < t.min() and t.max() < 1 and t.mean() == pytest.approx(.5, abs=.01)
        assert t.quantile(.25) == pytest.approx(quartile, abs=.01)

@pytest.mark.parametrize("uniform", (False, True))
def test_shift_divides_the_odds_of_t(uniform):
    plain, shifted = (sample_noise((1000, 1, 1), rng(), uniform, shift).t.double()
                      for shift in (1., 3.))
    torch.testing.assert_close(shifted / (1 - shifted), plain / (1 - plain) / 3, rtol=1e-4, atol=0)

# ---------------------------------------------------------------- Sec. 4.2: motion rows, Eq. 6

@pytest.mark.parametrize("config", (TINY.dit, PRESETS["toy"].dit), ids=("tiny", "toy"))
def test_add_motion_keeps_appearance_velocity_to_the_bit(config):
    dit, C = randomised(DiT(config), std=.1), config.channels
    x, y = torch.randn(2, C, 4, 8, 8), tokenize(["a red square", "a star"])
    before, t = {k: v.clone() for k, v in dit.state_dict().items()}, torch.tensor([.2, .9])
    with torch.no_grad():
        u = dit(x, t, y)
        dit.add_motion()
        for scale in (0, 1, 1e3):
            joint = dit(torch.cat([x, scale * torch.randn_like(x)], 1), t, y)
            assert torch.equal(joint[:, :C], u) and not joint[:, C:].any()
    # the parameters grow by two matrices' new rows and columns only
    after = dit.state_dict()
    assert after.keys() == before.keys()
    grown = {k for k in after if after[k].shape != before[k].shape}
    assert grown == {"W_in.weight", "W_out.weight"}
    assert all(torch.equal(after[k], before[k]) for k in after if k not in grown)
    assert sum(p.numel() for p in dit.parameters()) - sum(v.numel() for v in before.values()) == \
        2 * C * config.patch ** 2 * config.width
    # from then on it is a joint model like one that was built so, and it is not widened twice
    dit.load_state_dict(DiT(dataclasses.replace(config, motion=True)).state_dict())
    with pytest.raises(ValueError, match="already"):
        dit.add_motion()

def test_after_add_motion_both_matrices_learn_and_d_flows_through():
    dit = tiny_dit(False).add_motion()
    x1, d1, y = torch.randn(2, 4, 3, 4, 4), torch.randn(2, 4, 3, 4, 4), tokenize(["a", "b"])
    optimizer = torch.optim.SGD(dit.parameters(), .1)
    for _ in range(2):          # zero columns learn first, zero rows through them
        optimizer.zero_grad()
        joint_loss(dit, x1, d1, y).backward()
        optimizer.step()
    for axis, weight in ((1, dit.W_in.weight), (0, dit.W_out.weight)):
        new = weight.unflatten(axis, (4, 2, 4)).select(axis + 1, 1)     # offsets, x or d, channels
        assert (new != 0).all()

@pytest.mark.parametrize("channel_last", (True, False))
@pytest.mark.parametrize("bias", (True, False))
def test_widened_linears_keep_x_in_both_patch_layouts(channel_last, bias):
    C, offsets = 3, 4

    def to(x):              # (B, C, offsets) as a Linear's input, and back
        return (x.mT if channel_last else x).flatten(1)

    def back(y):
        return y.unflatten(1, (offsets, -1)).mT if channel_last else y.unflatten(1, (-1, offsets))

    x, d, h = torch.randn(5, C, offsets), torch.randn(5, C, offsets), torch.randn(5, 7)
    enter, leave = nn.Linear(C * offsets, 7, bias), nn.Linear(7, C * offsets, bias)
    wide = widen_input(enter, C, channel_last)
    torch.testing.assert_close(wide(to(torch.cat([x, d], 1))), enter(to(x)))
    u = back(widen_output(leave, C, channel_last)(h))
    torch.testing.assert_close(u[:, :C], back(leave(h)))
    assert u.shape == (5, 2 * C, offsets) and not u[:, C:].any()
    assert (wide.in_features, enter.in_features, type(wide)) == (24, 12, nn.Linear)
    if bias:                            # trained, it leaves the layer that it was made of alone
        assert wide.bias.data_ptr() != enter.bias.data_ptr()

@pytest.mark.parametrize("layer, size", [
    (nn.Conv3d(3, 7, (1, 2, 2), (1, 2, 2)), (2, 4, 4)), (nn.Conv2d(3, 7, 2, 2, bias=False), (4, 4)),
    (nn.Conv2d(3, 7, 3, padding=1, padding_mode="reflect"), (5, 5))])
def test_widened_patch_embeddings_keep_x(layer, size):
    x, d = torch.randn(5, 3, *size), torch.randn(5, 3, *size)
    wide = widen_input(layer, 3, False)
    torch.testing.assert_close(wide(torch.cat([x, d], 1)), layer(x))
    assert type(wide) is type(layer) and wide.in_channels == 6 and layer.in_channels == 3

@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("kind", ("transposed", "patches", "patches, channel last"))
def test_widened_output_convolutions_keep_x(kind, bias):
    C, h, last = 3, torch.randn(5, 7, 2, 2), "last" in kind
    layer = nn.ConvTranspose2d(7, C, 2, 2, bias=bias) if kind == "transposed" else \
        nn.Conv2d(7, C * 4, 1, bias=bias)
    wide = widen_output(layer, C, last)

    def channels_of(y):         # (B, channels, all the rest)
        if kind == "transposed":
            return y.flatten(2)
        y = y.unflatten(1, (4, -1) if last else (-1, 4))
        return (y.transpose(1, 2) if last else y).flatten(2)

    u, before = channels_of(wide(h)), channels_of(layer(h))
    torch.testing.assert_close(u[:, :C], before)
    assert u.shape[1] == 2 * C and not u[:, C:].any()
    assert wide.out_channels == 2 * layer.out_channels

@pytest.mark.parametrize("widen, layer", [
    (widen_input, nn.Linear(10, 4)), (widen_input, nn.Conv2d(4, 4, 1)),
    (widen_input, nn.Conv2d(3, 6, 1, groups=3)), (widen_input, nn.ConvTranspose2d(3, 4, 1)),
    (widen_input, nn.LayerNorm(3)),
    (widen_output, nn.Linear(4, 10)), (widen_output, nn.Conv2d(4, 10, 1)),
    (widen_output, nn.Conv2d(3, 6, 1, groups=3)), (widen_output, nn.LayerNorm(3))])
def test_layers_that_cannot_be_widened_are_refused(widen, layer):
    with pytest.raises(ValueError, match="cannot widen"):
        widen(layer, 3, True)

@pytest.mark.parametrize("uniform", (False, True))
def test_joint_loss_matches_loop_in_float64(uniform):
    (x1, d1, y, null), model = case(), Foreign(4)
    options = dict(text_dropout=0, motion_dropout=0, uniform=uniform)
    loss = joint_loss(model, x1, d1, y, null, **options)
    (z_t, t, _), = model.calls
    u, total = model(z_t, t, y), 0.
    for b in range(3):
        for c in range(4):
            target = x1[b, c] if c < 2 else d1[b, c - 2]
            for value, noisy, predicted in zip(*map(torch.flatten, (target, z_t[b, c], u[b, c]))):
                noise = (noisy - t[b] * value) / (1 - t[b])             # Eq. 1, solved for x_0
                total += (predicted - (value - noise)).item() ** 2      # Eq. 2
    assert loss.item() == pytest.approx(total / z_t.numel(), rel=1e-9)
    # the noise of x and of d are independent standard normals
    t = t.view(-1, 1, 1, 1, 1)
    noise = (z_t - t * torch.cat([x1, d1], 1)) / (1 - t)
    assert not torch.isclose(noise[:, :2], noise[:, 2:]).any()

def test_joint_loss_matches_a_loop_over_its_noise():
    """With dropouts: sample by sample, on given noise, with one call of the model each."""
    (x1, d1, y, null), model = case(B=8), Foreign(4)
    n = sample_noise(x1.shape, rng(3), text_dropout=.5, motion_dropout=.5)
    assert 0 < n.no_text.sum() < 8 and 0 < n.no_motion.sum() < 8
    n, errors = n.like(x1), []
    for b in range(8):
        x_t = n.t[b] * x1[b] + (1 - n.t[b]) * n.x0[b]
        d_t = 0 * x_t if n.no_motion[b] else n.t[b] * d1[b] + (1 - n.t[b]) * n.d0[b]
        text = null if n.no_text[b] else y[b:b + 1]
        u = model(torch.cat([x_t, d_t])[None], n.t[b:b + 1], text)[0]
        errors.append((u - torch.cat([x1[b] - n.x0[b], d1[b] - n.d0[b]])) ** 2)
    per_channel = torch.stack(errors).flatten(2).mean(2)
    loss = joint_loss(model, x1, d1, y, null, noise=n)
    torch.testing.assert_close(loss, per_channel.mean())
    torch.testing.assert_close(joint_loss(model, x1, d1, y, null, noise=n, reduction="channels"),
                               per_channel)
    # without motion it is Eq. 3 on the same noise
    of_x = flow_matching_loss(Foreign(2), x1, y, null, noise=n, reduction="channels")
    assert of_x.shape == (8, 2)
    torch.testing.assert_close(flow_matching_loss(Foreign(2), x1, y, null, noise=n), of_x.mean())

def test_text_is_dropped_for_30_percent_and_motion_for_20_independently():
    n = sample_noise((20_000, 1, 1), rng())
    tolerance = dict(abs=.012)                                          # four deviations
    assert n.no_text.float().mean() == pytest.approx(.3, **tolerance)
    assert n.no_motion.float().mean() == pytest.approx(.2, **tolerance)
    assert (n.no_text & n.no_motion).float().mean() == pytest.approx(.06, **tolerance)
    for dropped in (n.no_text, n.no_motion):                            # at every t alike
        low, high = (dropped[part].float().mean() for part in (n.t < .5, n.t > .5))
        assert abs(low - high) < .03

def test_dropped_motion_is_zero_in_the_model_while_its_target_stays():
    x1, y, model = torch.zeros(4, 2, 2, 2, 2), torch.zeros(4, 1), Foreign(4)
    loss = joint_loss(model, x1, x1 + 100, y, torch.zeros(1), motion_dropout=1, reduction="channels")
    (z, _, _), = model.calls
    assert not z[:, 2:].any() and z[:, :2].all()
    assert (loss[:, 2:] > 8000).all() and (loss[:, :2] < 100).all()

def test_drop_condition_replaces_whole_samples():
    dropped = torch.tensor([True, False, True])
    out = drop_condition(torch.ones(3, 2, 3), dropped, torch.zeros(2, 3))
    assert out.flatten(1).sum(1).tolist() == [0, 6, 0]

# ---------------------------------------------------------------- Sec. 4.3: guidance, Eq. 8, App. A

FORMULAS = {        # u(d?, y?) with one call per term, as the paper (and the design) print them
    "none": lambda u, w1, w2: u(1, 1),
    "cfg": lambda u, w1, w2: u(1, 1) + w1 * (u(1, 1) - u(1, 0)),
    "inner": lambda u, w1, w2: (1 + w1 + w2) * u(1, 1) - w1 * u(1, 0) - w2 * u(0, 1),
    "no-motion": lambda u, w1, w2: u(0, 1) + w1 * (u(0, 1) - u(0, 0)),
    "ip2p": lambda u, w1, w2: u(0, 0) + w2 * (u(1, 0) - u(0, 0)) + w1 * (u(1, 1) - u(1, 0)),
    "composable": lambda u, w1, w2: u(0, 0) + w1 * (u(0, 1) - u(0, 0)) + w2 * (u(1, 0) - u(0, 0)),
}

@pytest.mark.parametrize("w1, w2", [(5, 3), (0, 3), (5, 0), (0, 0), (2.5, 2.5)])
@pytest.mark.parametrize("mode", GUIDANCE)
def test_guidance_matches_formula_with_one_call_per_term(mode, w1, w2):
    (x, d, y, null), model = case(), Foreign(4)

    def u(with_d, with_y):
        z = torch.cat([x, d * with_d], 1)
        return model(z, torch.full((3,), .25), y if with_y else null.expand(3, 5))

    guided = guided_velocity(model, x, d, .25, y, w1, w2, mode, null)
    torch.testing.assert_close(guided, FORMULAS[mode](u, w1, w2), rtol=1e-9, atol=1e-9)

@pytest.mark.parametrize("mode, w1, w2, evaluations", [
    ("none", 5, 3, 1), ("cfg", 5, 3, 2), ("cfg", 0, 3, 1), ("inner", 5, 3, 3), ("inner", 5, 0, 2),
    ("inner", 0, 3, 2), ("inner", 0, 0, 1), ("ip2p", 5, 3, 3), ("ip2p", 3, 3, 2), ("ip2p", 1, 1, 1),
    ("composable", 5, 3, 3), ("composable", 5, 0, 2)])
def test_guidance_runs_in_one_batch_without_terms_of_weight_0(mode, w1, w2, evaluations):
    (x, d, y, null), model = case(), Foreign(4)
    guided_velocity(model, x, d, .25, y, w1, w2, mode, null)
    assert [len(z) for z, _, _ in model.calls] == [3 * evaluations]

def test_with_our_tokens_the_null_prompt_is_the_default_null():
    dit, (x, d) = tiny_dit(), torch.randn(2, 1, 4, 3, 4, 4)
    y, z = tokenize(["a red square"]), torch.cat([x, d], 1)
    expected = 6 * dit(z, .3, y) - 5 * dit(z, .3, tokenize([""]))
    guided = guided_velocity(dit, x, d, .3, y, 5, 0)
    torch.testing.assert_close(guided, expected, rtol=1e-3, atol=1e-3)

@pytest.mark.parametrize("d, mode, complaint", [
    (None, "inner", "needs motion"), (None, "ip2p", "needs motion"),
    (1, "magic", "one of inner, cfg")])
def test_guidance_that_is_unknown_or_needs_motion_is_refused(d, mode, complaint):
    x, motion, y, null = case()
    with pytest.raises(ValueError, match=complaint):
        guided_velocity(Foreign(2), x, d and motion, .5, y, 5, 3, mode, null)

# ---------------------------------------------------------------- App. C: schedule and sampler

def mochi(steps, threshold):
    """Mochi's schedule (genmo, 2024) as it is published: noise levels, turned into our t."""
    half = steps // 2
    difference = half - threshold * steps
    quadratic = difference / (half * (steps - half) ** 2)
    linear = threshold / half - 2 * difference / (steps - half) ** 2
    first = [i * threshold / half for i in range(half)]
    return first + [quadratic * i ** 2 + linear * i + quadratic * half ** 2
                    for i in range(half, steps)] + [1.]

def test_schedule_is_mochis_at_64_steps():
    times = linear_quadratic(64, emulated=1280)
    torch.testing.assert_close(times, torch.tensor(mochi(64, .025)), atol=1e-6, rtol=1e-6)
    assert times[32] == pytest.approx(.025)

@pytest.mark.parametrize("steps", (1, 2, 7, 50, 100, 1000))
def test_schedule_runs_from_0_to_1_linear_first_then_faster(steps):
    times = linear_quadratic(steps)
    assert times[0] == 0 and times[-1] == pytest.approx(1) and len(times) == steps + 1
    pace = times.double().diff()
    assert (pace > 0).all() and (pace.diff() > -1e-6).all()
    torch.testing.assert_close(pace[:steps // 2], torch.full((steps // 2,), 1e-3).double(),
                               atol=1e-6, rtol=1e-3)

@pytest.mark.parametrize("steps", (0, -3, 1001))
def test_schedule_refuses_steps_that_it_cannot_take(steps):
    with pytest.raises(ValueError, match="from 1 to 1000"):
        linear_quadratic(steps)

def by_hand(model, x, d, y, times, weights):
    """Euler steps with the weights (full, without y, without d) of every step; d or no d."""
    null = torch.full_like(y, .7)
    for t, after, terms in zip(times, times[1:], weights):
        z = x if d is None else torch.cat([x, d], 1)
        silent = z if d is None else torch.cat([x, 0 * d], 1)
        u = sum(w * model(z_, t.expand(len(x)), y_) for w, z_, y_ in
                zip(terms, (z, z, silent), (y, null, y)))
        z = z + (after - t) * u
        x, d = (z, None) if d is None else z.chunk(2, 1)
    return x, d

@pytest.mark.parametrize("steps", (1, 4, 5))
@pytest.mark.parametrize("mode, w1, w2, first, second", [
    ("inner", 0, 0, (1, 0, 0), (1, 0, 0)),                      # plain conditional sampling
    ("none", 5, 3, (1, 0, 0), (1, 0, 0)),
    ("inner", 4, 0, (5, -4, 0), (5, -4, 0)),                    # classifier-free guidance
    ("cfg", 4, 3, (5, -4, 0), (5, -4, 0)),
    ("inner", 4, 2, (7, -4, -2), (5, -4, 0)),                   # the motion term stops at half
])
def test_sampler_matches_euler_by_hand(mode, w1, w2, first, second,
                                                                steps):
    (x, d, y, null), times = case(), linear_quadratic(steps, 20)
    weights = [first if i < steps / 2 else second for i in range(steps)]
    torch.testing.assert_close(euler_sample(Foreign(4), x, d, y, times, w1, w2, mode, null),
                               by_hand(Foreign(4), x, d, y, times, weights))

@pytest.mark.parametrize("mode, scales", [("ip2p", (3, 3, 1, 1)), ("composable", (3, 3, 3, 3))])
def test_guidance_of_app_a_sees_the_motion_in_all_steps(mode, scales):
    (x, d, y, null), times, model = case(), linear_quadratic(4), Foreign(4)
    sampled = euler_sample(model, x, d, y, times, 5, 3, mode, null)
    for t, after, w2 in zip(times, times[1:], scales):
        u = guided_velocity(model, x, d, t, y, 5, w2, mode, null)
        x, d = (torch.cat([x, d], 1) + (after - t) * u).chunk(2, 1)
    torch.testing.assert_close(sampled, (x, d))

def test_ip2p_without_its_motion_term_is_classifier_free_guidance():
    (x, d, y, null), model = case(), Foreign(4)
    torch.testing.assert_close(guided_velocity(model, x, d, .3, y, 5, 1, "ip2p", null),
                               guided_velocity(model, x, d, .3, y, 4, 0, "cfg", null))

def test_sampler_takes_three_evaluations_a_step_then_two():
    (x, d, y, null), model = case(), Foreign(4)
    euler_sample(model, x, d, y, linear_quadratic(6), 5, 3, "inner", null)
    assert [len(z) // 3 for z, _, _ in model.calls] == [3, 3, 3, 2, 2, 2]
    model.calls.clear()
    euler_sample(model, x, d, y, linear_quadratic(6), 5, 3, "inner", null, motion_steps=1)
    assert [len(z) // 3 for z, _, _ in model.calls] == [3, 2, 2, 2, 2, 2]
    model.calls.clear()
    euler_sample(model, x, d, y, linear_quadratic(6), 5, 3, "inner", null)
    assert [t[0].item() for _, t, _ in model.calls] == linear_quadratic(6)[:-1].tolist()

def test_bf16_models_keep_t_and_path_in_fp32():
    """Of t, of the noise and of the path: these stay fp32; the model is given bf16."""
    x, d, y, null = (part.bfloat16() for part in case())
    model = Foreign(4)
    joint_loss(model, x, d, y, null)
    (z_t, t, _), = model.calls
    assert z_t.dtype == torch.bfloat16 and t.dtype == torch.float32
    end = torch.cat([x, d], 1).float()

    def towards(z, t, y):                   # the velocity of a straight path from zero to `end`
        assert z.dtype == torch.bfloat16
        return end.repeat(len(z) // len(end), 1, 1, 1, 1)

    there = euler_sample(towards, 0 * x, 0 * d, y, linear_quadratic(1000), 0, 0, "inner", null)
    torch.testing.assert_close(torch.cat(there, 1), end, atol=1e-4, rtol=0)

def test_sampler_takes_models_without_motion():
    x, _, y, null = case()
    out, nothing = euler_sample(Foreign(2), x, None, y, linear_quadratic(4, 20), 4, 3, "cfg", null)
    expected, _ = by_hand(Foreign(2), x, None, y, linear_quadratic(4, 20), [(5, -4, 0)] * 4)
    assert nothing is None
    torch.testing.assert_close(out, expected)

# ---------------------------------------------------------------- presets and the model file

@pytest.mark.parametrize("name, count, latents", [
    ("toy", "3.3M", (8, 4, 8, 8)), ("small", "151M", (16, 6, 16, 16)),
    ("4b", "4.2B", (16, 16, 32, 32)), ("30b", "29B", (16, 16, 32, 32))])
def test_the_sizes_of_the_presets_on_the_meta_device(name, count, latents):
    config = PRESETS[name]
    with torch.device("meta"):
        dit = DiT(config.dit)
        TAE(config.tae)
    digits, unit = len(count.partition(".")[2][:-1]), {"M": 1e6, "B": 1e9}[count[-1]]
    assert round(sum(p.numel() for p in dit.parameters()) / unit, digits) == float(count[:-1])
    assert config.latent_shape() == latents

def test_presets_fit_together_and_come_back_from_a_dict():
    assert set(PRESETS) == {"toy", "small", "4b", "30b"}
    for preset in (*PRESETS.values(), TINY):
        assert preset.tae.channels == preset.dit.channels
        assert preset.size % (preset.tae.compression[1] * preset.dit.patch) == 0
        assert type(preset).from_dict(dataclasses.asdict(preset)) == preset

def generate(model, prompts=("a red square", "a star"), **options):
    return model.generate(list(prompts), **{"steps": 4, **options})

def test_save_and_load_keep_the_video_to_the_bit(model_folder, tmp_path):
    first = VideoJAM.load(model_folder / "model.pt")
    first.save(tmp_path / "copy.pt")
    second = VideoJAM.load(tmp_path / "copy.pt")
    assert second.config == TINY and second.dit.config.motion and not second.dit.training
    for a, b in zip(generate(first), generate(second)):
        assert torch.equal(a, b) and a.shape == (2, 5, 3, 16, 16)
        assert 0 <= a.min() and a.max() <= 1 and a.std() > .05
    assert [path.name for path in tmp_path.iterdir()] == ["copy.pt"]

@pytest.mark.parametrize("which, seed", [("jam", 0), ("base", 1), ("control", 2)])
def test_a_model_file_holds_each_model_under_its_name(model_folder, which, seed):
    model = VideoJAM.load(model_folder / "model.pt", which)
    expected = tiny_dit(which == "jam", seed).half().float()
    assert torch.equal(model.dit.blocks[1].mlp.up.weight, expected.blocks[1].mlp.up.weight)
    assert model.dit.config.motion == (which == "jam")
    assert (generate(model)[1] is not None) == (which == "jam")

def test_hostile_model_files_are_refused_and_run_no_code(model_folder, tmp_path):
    content = torch.load(model_folder / "model.pt")
    tampered = {"no config": {**content, "config": {}}, "no dits": {**content, "dits": {}},
                "other tae": {**content, "tae": {}},
                "no dit": {**content, "dits": None},
                "flat": {**content, "dits": {"jam": {"W_in.weight": torch.zeros(3)}}},
                "no heads": {**content, "config": {**content["config"], "dit": {
                    **content["config"]["dit"], "heads": 0}}},
                "other field": {**content, "config": {**content["config"], "more": 1}}}
    for name, value in tampered.items():
        torch.save(value, tmp_path / name)
    paths = bad_weights(tmp_path, model_folder / "model.pt") + [tmp_path / name for name in tampered]
    for path in [*paths, tmp_path]:
        with pytest.raises(ValueError) as error:
            VideoJAM.load(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()
    only = VideoJAM.load(model_folder / "model.pt", "base")
    only.save(tmp_path / "base.pt")
    with pytest.raises(ValueError, match="has no 'jam' model, only base"):
        VideoJAM.load(tmp_path / "base.pt")

def test_a_sample_depends_on_its_seed_alone(model_folder):
    model = VideoJAM.load(model_folder / "model.pt")
    video, rgb = generate(model, seed=3)
    for again in (generate(model, seed=3), generate(model, seed=3, batch=1)):
        torch.testing.assert_close(again, (video, rgb), atol=.05, rtol=0)   # bf16 in other batches
    assert torch.equal(generate(model, seed=3)[0], video)
    assert not torch.allclose(generate(model, seed=4)[0][0], video[0], atol=.05)
    # sample i is that of seed + i
    alone, _ = generate(model, ["a star"], seed=4)
    torch.testing.assert_close(alone[0], video[1], atol=.05, rtol=0)

def test_base_and_videojam_start_from_the_same_noise(model_folder, monkeypatch):
    starts = {}

    def capture(dit, x, d, *_, **__):
        starts[dit.config.motion] = x, d
        return x, d

    monkeypatch.setattr("videojam.euler_sample", capture)
    for which in ("base", "jam"):
        generate(VideoJAM.load(model_folder / "model.pt", which))
    (x, nothing), (joint_x, d) = starts[False], starts[True]
    assert torch.equal(x, joint_x) and nothing is None and not torch.isclose(x, d).any()

@pytest.mark.parametrize("options, complaint", [
    ({"prompts": []}, "no prompt"), ({"steps": 0}, "steps"), ({"steps": -1}, "steps"),
    ({"mode": "magic"}, "unknown guidance"), ({"mode": "inner", "which": "base"}, "needs motion")])
def test_generate_refuses_bad_input(model_folder, options, complaint):
    model = VideoJAM.load(model_folder / "model.pt", options.pop("which", "jam"))
    with pytest.raises(ValueError, match=complaint):
        generate(model, **options)

@pytest.mark.skipif(not (ROOT / "weights/toy.pt").exists(), reason="no weights/toy.pt yet")
@pytest.mark.parametrize("which", ("jam", "base", "control"))
def test_shipped_weights_load_and_are_small(which):
    model = VideoJAM.load(which=which)
    assert model.config == PRESETS["toy"] and model.dit.config.motion == (which == "jam")
    assert sum(path.stat().st_size for path in (ROOT / "weights").iterdir()) < 25 * 10 ** 6

"""pytest tests/test_videojam.py: the paper's equations in its order, then the model file."""
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY, equal, randomised, takes_no_bad_weights, tiny_dit
from torch import nn
from torch.testing import assert_close

from common import autocast
from synthetic import APPEARANCE
from videojam import (EOS, GUIDANCE, PAD, PRESETS, TAE, DiT, SpaceTimeConv, VideoJAM, attend,
                      check_velocity, euler_sample, flow_matching_loss, guided_velocity,
                      interpolate, joint_loss, linear_quadratic, new_entries, null_text, patchify,
                      read_model_file, sample_noise, set_activation_checkpointing, tae_loss,
                      tokenize, unpatchify, velocity, widen_input, widen_output, write_model_file)

def rng(seed=0):
    return torch.Generator().manual_seed(seed)

class Foreign:
    """Somebody else's model, y being a float vector. Not linear, so that no term of the guidance
    hides another. It keeps the inputs of each call."""
    def __init__(self, channels):
        self.mix = torch.randn(channels, channels, generator=rng(), dtype=torch.float64)
        self.calls = []

    def __call__(self, z, t, y):
        self.calls.append((z, t, y))
        t, y = (v.double().view(len(z), -1).sum(1).view(-1, 1, 1, 1, 1) for v in (t, y))
        return torch.einsum("ij,bjthw->bithw", self.mix, (z.double() + t + y).sin()).to(z)

def inputs(B=3):
    """x, d (B, 2, 2, 2, 2), a foreign y (B, 5) and its null, in float64."""
    x, d = torch.randn(2, B, 2, 2, 2, 2, generator=rng(), dtype=torch.float64)
    y = torch.randn(B, 5, generator=rng(1), dtype=torch.float64)
    return x, d, y, torch.full((1, 5), .7, dtype=torch.float64)

# ---------------------------------------------------------------- Sec. 4.1: flow matching (Eq. 1-3)

def test_interpolate_from_noise_at_t_0_to_data_at_t_1_and_velocity_by_hand():
    x1, x0 = torch.tensor([[4.], [10.], [.3], [.3]]), torch.tensor([[0.], [2.], [.7], [.7]])
    x_t = interpolate(x1, x0, torch.tensor([.25, .5, 0, 1]))
    assert torch.equal(x_t, torch.tensor([[1.], [6.], [.7], [.3]]))
    assert velocity(x1, x0)[:2].flatten().tolist() == [4, 8]

@pytest.mark.parametrize("uniform, quartile", ((False, 1 / (1 + math.exp(.6745))), (True, .25)))
def test_sample_noise_t_is_logit_normal_or_uniform_and_shift_divides_its_odds(uniform, quartile):
    t, shifted = (sample_noise((50_000, 1), rng(), uniform, shift).t for shift in (1., 3.))
    assert 0 < t.min() and t.max() < 1 and t.mean() == pytest.approx(.5, abs=.01)
    assert t.quantile(.25) == pytest.approx(quartile, abs=.01)
    assert_close(shifted.logit(), t.logit() - math.log(3), rtol=0, atol=.01)

def test_sample_noise_drops_text_in_30_and_motion_in_20_percent_independently():
    n = sample_noise((20_000, 1), rng())
    dropped = n.no_text, n.no_motion, n.no_text & n.no_motion
    for late in (n.t < 2, n.t < .5, n.t > .5):                          # at every t alike
        share = [part[late].float().mean().item() for part in dropped]
        assert share == pytest.approx([.3, .2, .06], abs=.02)
    moments = torch.cat([n.x0, n.d0], 1).T                              # x0 and d0: standard normal
    assert_close(moments.mean(1), torch.zeros(2), atol=.02, rtol=0)
    assert_close(moments.cov(), torch.eye(2), atol=.03, rtol=0)
    inside = sample_noise((20_000, 1), rng(), t_range=(.8, .9))
    assert_close(inside.t, .8 + .1 * n.t)
    assert equal(inside[1:], n[1:])

# ---------------------------------------------------------------- Sec. 4.1: the DiT (Eq. 4)

@pytest.mark.parametrize("mask", (None, torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 1, 1]]) > 0))
def test_attend_matches_torch(mask):
    q, k, v = torch.randn(2, 3, 7, 8), *torch.randn(2, 2, 3, 5, 8)
    mask = None if mask is None else mask[:, None, None]
    assert_close(attend(q, k, v, mask), F.scaled_dot_product_attention(q, k, v, attn_mask=mask))

def test_patchify_puts_channels_last_and_unpatchify_inverts_it():
    x = torch.randn(2, 3, 2, 4, 6)
    tokens = patchify(x, 2)
    assert tokens.shape == (2, 2 * 2 * 3, 2 * 2 * 3)
    assert torch.equal(unpatchify(tokens, 2, (2, 4, 6)), x)
    for t, row, col, i, j, c in ((0, 0, 0, 0, 0, 0), (1, 1, 2, 1, 0, 2), (0, 1, 1, 0, 1, 1)):
        assert torch.equal(tokens[:, (t * 2 + row) * 3 + col, (i * 2 + j) * 3 + c],
                           x[:, c, t, 2 * row + i, 2 * col + j])

def test_dit_depends_on_time_text_and_order_of_tokens():
    x, y, dit = torch.randn(1, 4, 3, 4, 4), tokenize(["abc"]), tiny_dit(False)
    def apart():                                # how far those of equal tokens are
        u = dit(torch.ones_like(x), .5, y)
        return (u - u.roll((1, 2, 2), (2, 3, 4))).abs().max()
    absolute = apart()
    nn.init.zeros_(dit.position.weight)         # RoPE has to tell the order of others
    assert absolute > 1e-3 and apart() < 1e-4
    u = dit(x, .5, y)
    assert torch.equal(u, dit(x, torch.tensor([.5]), y))
    for other in (dit(x, .6, y), dit(x, .5, tokenize(["acb"])), dit(x.flip(2), .5, y).flip(2),
                  dit(x.flip(3), .5, y).flip(3), dit(x.flip(4), .5, y).flip(4)):
        assert (other - u).abs().max() > 1e-3

def test_dit_trains_after_inference_mode_and_with_a_narrow_text_encoder():
    y, dit = tokenize(["abc"]), DiT(dataclasses.replace(TINY.dit, text_width=16))
    x = torch.randn(1, 4, 1, 10, 2)             # a grid that no other test has cached
    with torch.inference_mode():
        dit(x, .5, y)
    flow_matching_loss(dit, x, y).backward()

def test_dit_starts_at_zero_and_takes_any_size_of_whole_patches():
    dit, y = DiT(TINY.dit), tokenize(["a", "b"])
    for shape in ((2, 4, 3, 4, 4), (2, 4, 5, 2, 8)):
        u = dit(torch.randn(shape), .5, y)
        assert u.shape == shape and not u.any()
    for shape in ((2, 8, 3, 4, 4), (2, 4, 3, 3, 4)):
        with pytest.raises(ValueError, match="DiT takes"):
            dit(torch.randn(shape), .5, y)

@pytest.mark.parametrize("model", ("tae", "dit"))
def test_activation_checkpointing_keeps_gradients_and_saves_fewer_tensors(model):
    tae, dit, noise = randomised(TAE(TINY.tae), std=.1), tiny_dit(), torch.randn(2, 3, 4, 4, 4)
    video, z, y = torch.rand(2, 5, 3, 16, 16), torch.randn(2, 8, 3, 4, 4), tokenize(["a red", "b"])
    module, loss = {"tae": (tae, lambda: tae_loss(tae, video, noise)),
                    "dit": (dit, lambda: dit(z, .3, y).square().mean())}[model]
    gradients, sizes = [], []
    for on in (False, True):
        set_activation_checkpointing(module, on)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
                lambda tensor: saved.append(tensor.numel()) or tensor, lambda tensor: tensor):
            value = loss()
        sizes.append((len(saved), sum(saved)))
        gradients.append(torch.autograd.grad(value, list(module.parameters())))
    assert all(again < .7 * plain for plain, again in zip(*sizes))
    assert all(map(torch.equal, *gradients))

# ---------------------------------------------------------------- Sec. 4.2: motion rows, Eq. 6

@pytest.mark.parametrize("config", (TINY.dit, PRESETS["toy"].dit), ids=("tiny", "toy"))
def test_add_motion_widens_w_in_and_w_out_only_and_keeps_appearance_to_the_bit(config):
    dit, C = randomised(DiT(config), std=.1), config.channels
    x, t, y = torch.randn(2, C, 4, 8, 8), torch.tensor([.2, .9]), tokenize(["a square", "a star"])
    with torch.no_grad():
        u, before = dit(x, t, y), dit.state_dict()
        after = dit.add_motion().state_dict()
        for scale in (0, 1, 1e3):
            joint = dit(torch.cat([x, scale * torch.randn_like(x)], 1), t, y)
            assert torch.equal(joint[:, :C], u) and not joint[:, C:].any()
    assert after.keys() == before.keys()
    added = {name: after[name].numel() - before[name].numel() for name in after}
    assert {name: count for name, count in added.items() if count} == dict.fromkeys(
        ("W_in.weight", "W_out.weight"), config.patch ** 2 * C * config.width)
    assert all(torch.equal(after[name], before[name]) for name in after if not added[name])
    with pytest.raises(ValueError, match="already"):
        dit.add_motion()

def test_add_motion_weights_all_learn():
    dit, (x1, d1) = tiny_dit(False).add_motion(), torch.randn(2, 2, 4, 3, 4, 4)
    optimizer = torch.optim.SGD(dit.parameters(), .1)
    for _ in range(2):          # W_out's zero columns learn first, W_in's zero rows through them
        optimizer.zero_grad()
        joint_loss(dit, x1, d1, tokenize(["a", "b"]), motion_dropout=0).backward()
        optimizer.step()
    for axis, weight in ((1, dit.W_in.weight), (0, dit.W_out.weight)):
        assert weight.unflatten(axis, (4, 2, 4)).select(axis + 1, 1).all()  # offsets, x or d, C

@pytest.mark.parametrize("layer, channel_last, size", [
    (nn.Linear(12, 7), True, (4,)), (nn.Linear(12, 7, bias=False), False, (4,)),
    (nn.Conv3d(3, 7, (1, 2, 2), (1, 2, 2)), False, (2, 4, 4)),
    (nn.Conv2d(3, 7, 3, padding=1, padding_mode="reflect", bias=False), False, (5, 5))])
def test_widen_input_keeps_x(layer, channel_last, size):
    def layout(x):              # (B, C, offsets) -> a Linear's input
        return (x.mT if channel_last else x).flatten(1) if isinstance(layer, nn.Linear) else x
    (x, d), wide = torch.randn(2, 5, 3, *size), widen_input(layer, 3, channel_last)
    assert_close(wide(layout(torch.cat([x, d], 1))), layer(layout(x)))
    count = "in_features" if isinstance(layer, nn.Linear) else "in_channels"
    assert type(wide) is type(layer) and getattr(wide, count) == 2 * getattr(layer, count)
    # trained, it leaves the layer that it was made of alone
    assert wide.bias is None or wide.bias.data_ptr() != layer.bias.data_ptr()

@pytest.mark.parametrize("layer, channel_last, size", [
    (nn.Linear(7, 12), True, ()), (nn.Linear(7, 12, bias=False), False, ()),
    (nn.Conv2d(7, 12, 1), True, (2, 2)), (nn.Conv2d(7, 12, 1, bias=False), False, (2, 2))])
def test_widen_output_keeps_x(layer, channel_last, size):
    def channels(y, C):         # (B, patches, ...) -> (B, C, offsets, ...)
        return y.unflatten(1, (-1, C)).transpose(1, 2) if channel_last else y.unflatten(1, (C, -1))
    h, wide = torch.randn(5, 7, *size), widen_output(layer, 3, channel_last)
    u = channels(wide(h), 6)
    assert_close(u[:, :3], channels(layer(h), 3))
    count = "out_features" if isinstance(layer, nn.Linear) else "out_channels"
    assert not u[:, 3:].any() and getattr(wide, count) == 2 * getattr(layer, count)

@pytest.mark.parametrize("widen, layers", [
    (widen_input, [nn.Linear(10, 4), nn.Conv2d(4, 4, 1), nn.ConvTranspose2d(3, 4, 1)]),
    (widen_output, [nn.Linear(4, 10), nn.Conv2d(4, 10, 1)])])
def test_widen_refuses_other_layers(widen, layers):
    for layer in (*layers, nn.Conv2d(3, 6, 1, groups=3), nn.LayerNorm(3)):
        with pytest.raises(ValueError, match="cannot widen"):
            widen(layer, 3, True)

@pytest.mark.parametrize("at", (None, 0, 20, 36))
@pytest.mark.parametrize("channel_last", (True, False))
def test_widen_input_with_other_channels_puts_d_where_it_is_told(channel_last, at):
    """36 inputs, of which 16 are x's, as in Wan's image-to-video model; its Conv3d as a Linear."""
    conv = nn.Conv3d(36, 5, (1, 2, 2), (1, 2, 2))
    (z, d), at_d = torch.randn(2, 3, 36, 1, 2, 2, generator=rng()), 16 if at is None else at
    joint = torch.cat([z[:, :at_d], d[:, :16], z[:, at_d:]], 1)
    def flat(z):
        return (z.flatten(2).mT if channel_last else z).flatten(1)
    linear = nn.Linear(144, 5)
    linear.weight, linear.bias = nn.Parameter(flat(conv.weight)), conv.bias
    for layer, layout in ((conv, lambda z: z), (linear, flat)):
        wide = widen_input(layer, 16, channel_last, 20, at)
        assert_close(wide(layout(joint)).flatten(1), conv(z).flatten(1))
        added = new_entries(wide.weight, 1, 16, channel_last and layer is linear, 20, at)
        assert added.sum() == 5 * 16 * 4 and not wide.weight[added].any()
        assert torch.equal(wide.weight[~added], layer.weight.flatten())
        with pytest.raises(ValueError, match="for an input of 35 channels"):
            widen_input(layer, 16, channel_last, 19)

@pytest.mark.parametrize("make", [
    lambda n: nn.Linear(6, n), lambda n: nn.Conv3d(4, n, 3, 2, (0, 1, 1)),
    lambda n: nn.Conv2d(3, n, 3, 2, (1, 2), 2, padding_mode="circular", bias=False)])
@pytest.mark.parametrize("device", ("cpu", "meta"))
def test_widened_layer_is_like_the_old_without_its_hooks(make, device):
    layer = make(6).to(device, torch.bfloat16).eval().requires_grad_(False)
    layer.register_forward_hook(print)
    wide = widen_output(layer, 3, True)
    assert repr(wide) == repr(make(12)) and not wide.training and not wide._forward_hooks
    for p in wide.parameters():
        assert (p.dtype, p.device.type, p.requires_grad) == (torch.bfloat16, device, False)

def test_check_velocity_finds_what_widening_alone_does_not():
    w_in, w_out, x = nn.Linear(12, 32), nn.Linear(32, 12), torch.randn(5, 3, 4, generator=rng())
    def model(w_in, w_out):                     # on (B, C, offsets), channels last in its patches
        return lambda z, t, y: w_out(w_in(z.mT.flatten(1)).tanh()).unflatten(1, (4, -1)).mT
    before = model(w_in, w_out)(x, 0, 0)
    check_velocity(before, model(widen_input(w_in, 3, True), widen_output(w_out, 3, True)), x, 0, 0)
    for wide in ((widen_input(w_in, 3, False), widen_output(w_out, 3, True)),
                 (widen_input(w_in, 3, True), widen_output(w_out, 3, False))):
        with pytest.raises(ValueError, match="off by [1-9].*channel_last"):
            check_velocity(before, model(*wide), x, 0, 0)
    with pytest.raises(ValueError, match="3 channels, not 6"):
        check_velocity(before, model(widen_input(w_in, 3, True), w_out), x, 0, 0)

def test_y_may_be_a_dict_of_which_null_names_what_is_dropped():
    (x, d, y, null), n = inputs(B=8), sample_noise((8, 2, 2, 2, 2), rng(3), text_dropout=.5)
    def keyed(channels):
        model = Foreign(channels)
        return lambda z, t, y: model(z, t, torch.cat([y["text"], y["fixed"]], 1))
    parts, empty = {"text": y[:, :2], "fixed": y[:, 2:]}, {"text": null[:, :2]}
    null = torch.cat([null[:, :2].expand(8, 2), y[:, 2:]], 1)           # "fixed" is never dropped
    for call in (lambda model, y, null: joint_loss(model(4), x, d, y, null, n),
                 lambda model, y, null: flow_matching_loss(model(2), x, y, null, n),
                 lambda model, y, null: guided_velocity(model(4), x, d, .3, y, null=null)):
        assert_close(call(keyed, parts, empty), call(Foreign, y, null))
        for wrong, complaint in ((None, "null must be given"), ({"txt": null}, "null has txt")):
            with pytest.raises(ValueError, match=complaint):
                call(keyed, parts, wrong)

def test_joint_loss_matches_loop():
    """Eq. 6 sample by sample, with one call of the model each; without motion, Eq. 3."""
    (x1, d1, y, null), jam, base = inputs(B=8), Foreign(4), Foreign(2)
    dropout = dict(text_dropout=.5, motion_dropout=.5)
    n = sample_noise(x1.shape, rng(3), **dropout)
    assert 0 < n.no_text.sum() < 8 and 0 < n.no_motion.sum() < 8
    of_jam, of_base = [], []
    for b, (t, x0, d0) in enumerate(zip(n.t.double(), n.x0.double(), n.d0.double())):
        x_t, d_t = t * x1[b] + (1 - t) * x0, t * d1[b] + (1 - t) * d0
        z = torch.cat([x_t, 0 * d_t if n.no_motion[b] else d_t])
        text, v = null if n.no_text[b] else y[b:b + 1], torch.cat([x1[b] - x0, d1[b] - d0])
        of_jam.append((jam(z[None], t, text)[0] - v).square().mean((1, 2, 3)))
        of_base.append((base(x_t[None], t, text)[0] - v[:2]).square().mean((1, 2, 3)))
    for loss, args, channels in ((joint_loss, (jam, x1, d1, y, null), torch.stack(of_jam)),
                                 (flow_matching_loss, (base, x1, y, null), torch.stack(of_base))):
        assert_close(loss(*args, n), channels.mean())
        assert_close(loss(*args, n, "channels"), channels)
        assert_close(loss(*args, generator=rng(3), **dropout), channels.mean())     # its own noise

def test_losses_take_bf16_and_keep_t_and_noise_in_fp32():
    x1, d1, y, null = (part.bfloat16() for part in inputs())
    model, n = Foreign(4), sample_noise(x1.shape, rng(), text_dropout=0, motion_dropout=0)
    loss = joint_loss(model, x1, d1, y, null, n)
    (z, t, _), = model.calls
    z_t = torch.cat([interpolate(x1, n.x0, n.t), interpolate(d1, n.d0, n.t)], 1)        # in fp32
    v = torch.cat([velocity(x1, n.x0), velocity(d1, n.d0)], 1)
    assert torch.equal(t, n.t) and torch.equal(z, z_t.bfloat16())
    assert_close(loss, (Foreign(4)(z, t, y) - v).square().mean(), rtol=1e-6, atol=0)

# ---------------------------------------------------------------- Sec. 4.3: Inner-Guidance (Eq. 8)

FORMULAS = {        # u(d?, y?) with one call per term, as the paper prints them
    "none": lambda u, w1, w2: u(1, 1),
    "cfg": lambda u, w1, w2: u(1, 1) + w1 * (u(1, 1) - u(1, 0)),
    "inner": lambda u, w1, w2: (1 + w1 + w2) * u(1, 1) - w1 * u(1, 0) - w2 * u(0, 1),
    "no-motion": lambda u, w1, w2: u(0, 1) + w1 * (u(0, 1) - u(0, 0)),
    "ip2p": lambda u, w1, w2: u(0, 0) + w2 * (u(1, 0) - u(0, 0)) + w1 * (u(1, 1) - u(1, 0)),
    "composable": lambda u, w1, w2: u(0, 0) + w1 * (u(0, 1) - u(0, 0)) + w2 * (u(1, 0) - u(0, 0))}

@pytest.mark.parametrize("w1, w2", [(5, 3), (0, 3), (5, 0), (0, 0), (2.5, 2.5), (1, 1)])
@pytest.mark.parametrize("mode", FORMULAS)
def test_guidance_matches_formula_with_one_call_per_term(mode, w1, w2):
    """In one batch, without terms of weight 0."""
    (x, d, y, null), model = inputs(), Foreign(4)
    def u(with_d, with_y):
        text = y if with_y else null.expand(3, 5)
        return model(torch.cat([x, d * with_d], 1), torch.full((3,), .25), text)
    guided = guided_velocity(model, x, d, .25, y, w1, w2, mode, null)
    weights = FORMULAS[mode](lambda d, y: torch.eye(4)[2 * d + y], w1, w2)      # of the four terms
    assert [len(z) for z, _, _ in model.calls] == [3 * weights.count_nonzero().item()]
    assert_close(guided, FORMULAS[mode](u, w1, w2), rtol=1e-9, atol=1e-9)

@pytest.mark.parametrize("w1, w2", [(5, 3), (0, 3), (5, 0), (0, 0)])
def test_inner_x_guides_u_x_by_eq_8_and_u_d_by_text_alone(w1, w2):
    assert GUIDANCE.keys() - FORMULAS.keys() == {"inner-x"}
    (x, d, y, null), model = inputs(), Foreign(4)
    by_mode = {mode: guided_velocity(model, x, d, .25, y, w1, w2, mode, null).chunk(2, 1)
               for mode in ("inner-x", "inner", "cfg")}
    assert torch.equal(by_mode["inner-x"][0], by_mode["inner"][0])
    assert_close(by_mode["inner-x"][1], by_mode["cfg"][1], rtol=1e-9, atol=1e-9)
    assert not w2 or not torch.equal(by_mode["inner"][1], by_mode["cfg"][1])

def test_guidance_null_defaults_to_the_empty_prompt():
    dit, (x, d) = tiny_dit(), torch.randn(2, 1, 4, 3, 4, 4)
    y, z = tokenize(["a red square"]), torch.cat([x, d], 1)
    expected = 6 * dit(z, .3, y) - 5 * dit(z, .3, tokenize([""]))
    assert_close(guided_velocity(dit, x, d, .3, y, 5, 0), expected, rtol=1e-3, atol=1e-3)

# ---------------------------------------------------------------- App. C: schedule and sampler

def test_linear_quadratic_at_64_steps_is_mochis():
    """As genmo published it (2024), for a threshold of .025; its noise levels turned into our t."""
    half, threshold = 32, .025
    difference = half - threshold * 64
    quadratic, linear = difference / half ** 3, threshold / half - 2 * difference / half ** 2
    mochi = [i * threshold / half for i in range(half)] + [
        quadratic * i ** 2 + linear * i + quadratic * half ** 2 for i in range(half, 64)] + [1.]
    assert_close(linear_quadratic(64, emulated=1280), torch.tensor(mochi), atol=1e-6, rtol=1e-6)

@pytest.mark.parametrize("steps", (1, 2, 7, 50, 100, 1000))
def test_linear_quadratic_runs_from_0_to_1_linear_first_then_faster(steps):
    times = linear_quadratic(steps)
    assert times[0] == 0 and times[-1] == pytest.approx(1) and len(times) == steps + 1
    pace, half = times.double().diff(), steps // 2
    assert (pace > 0).all() and (pace.diff() > -1e-6).all()
    assert_close(pace[:half], torch.full((half,), 1e-3).double(), atol=1e-6, rtol=1e-3)

@pytest.mark.parametrize("steps, motion_steps", [(1, None), (4, None), (5, None), (5, 1), (5, 0)])
@pytest.mark.parametrize("mode, late_w2, motion", [
    ("inner", 0, True), ("cfg", 3, True), ("no-motion", 3, True), ("ip2p", 1, True),
    ("composable", 3, True), ("cfg", 3, False)])
def test_euler_sample_matches_steps_by_hand(mode, late_w2, motion, steps, motion_steps):
    """w2 acts in the first half, or in motion_steps; App. A's modes see the motion in all steps."""
    (x, d, y, null), times = inputs(), linear_quadratic(steps, 20)
    model, d = (Foreign(4), d) if motion else (Foreign(2), None)
    sampled = euler_sample(model, x, d, y, times, 5, 3, mode, null, motion_steps)
    for i in range(steps):
        w2 = 3 if i < (steps / 2 if motion_steps is None else motion_steps) else late_w2
        u = guided_velocity(model, x, d, times[i], y, 5, w2, mode, null)
        step = (times[i + 1] - times[i]) * u
        x, d = x + step[:, :2], d + step[:, 2:] if motion else None
    assert_close(sampled[0], x)
    assert sampled[1] is None if d is None else torch.allclose(sampled[1], d)
    evaluations = [len(z) for z, _, _ in model.calls]
    assert evaluations[:steps] == evaluations[steps:]

@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_euler_sample_gives_the_model_bf16_and_keeps_t_guidance_and_path_in_fp32(dtype):
    x, d, y, null = (part.bfloat16() for part in inputs())
    end, times, seen = torch.cat([x, d], 1).float(), linear_quadratic(1000), []
    def model(z, t, y):             # the velocity of a straight path from zero to `end`
        seen.append((z.dtype, t[0].item()))
        return end.to(dtype).repeat(len(z) // len(end), *[1] * (end.ndim - 1))
    sampled = euler_sample(model, 0 * x, 0 * d, y, times, 5, 3, "inner", null)
    assert_close(torch.cat(sampled, 1), end, atol=1e-4, rtol=0)
    assert seen == [(torch.bfloat16, t) for t in times[:-1].tolist()]

# ---------------------------------------------------------------- App. C: TAE, text, sizes

@pytest.mark.parametrize("T", (1, 2, 3, 5, 8))
def test_tae_takes_any_length_and_crops_the_last_frames(T):
    tae = randomised(TAE(TINY.tae))
    latent = tae.encode(torch.rand(2, T, 3, 16, 24))
    whole, video = tae.decode(latent), tae.decode(latent, frames=T)
    assert latent.shape == (2, 4, math.ceil(T / 2), 4, 6)
    assert whole.shape == (2, 2 * math.ceil(T / 2), 3, 16, 24) and torch.equal(video, whole[:, :T])
    assert video.shape == (2, T, 3, 16, 24) and 0 <= video.min() and video.max() <= 1

@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (2, 1)])
def test_tae_convolutions_start_as_rotations_of_channels(stride):
    conv, x = SpaceTimeConv(3, 5, stride), torch.rand(2, 4, 6, 6, 3)
    frames = [conv.space(x[:, k].permute(0, 3, 1, 2)) for k in range(0, 4, stride[0])]
    assert_close(conv(x), torch.stack(frames, 1).permute(0, 1, 3, 4, 2))    # identity in time
    assert_close(conv(x).norm(dim=-1), x[:, ::stride[0], ::stride[1], ::stride[1]].norm(dim=-1))

def test_tae_latent_of_a_still_video_is_still():
    tae, frame = randomised(TAE(TINY.tae), std=.1), torch.rand(1, 1, 3, 16, 16)
    latent = tae.encode(frame.expand(1, 6, 3, 16, 16))
    assert_close(latent, latent[:, :, :1].expand_as(latent), atol=1e-5, rtol=1e-4)

def test_tae_whitens_video_and_motion_apart_and_decode_inverts_it():
    torch.manual_seed(0)
    tae, video = randomised(TAE(TINY.tae)), torch.rand(1, 4, 3, 16, 16)
    raw, decoded = tae.encode(video), tae.decode(tae.encode(video))
    nn.init.normal_(tae.mean), tae.basis.copy_(3 * torch.eye(4) + torch.rand(2, 4, 4))
    for row, motion in enumerate((False, True)):
        centred, latent = raw - tae.mean[row].view(4, 1, 1, 1), tae.encode(video, motion)
        assert_close(latent, torch.einsum("kc,bcthw->bkthw", tae.basis[row], centred))
        assert_close(tae.decode(latent, motion), decoded, atol=1e-3, rtol=1e-3)

def test_fit_whitening_makes_equal_latent_errors_equal_pixel_errors():
    torch.manual_seed(0)
    tae, videos = randomised(TAE(TINY.tae), std=.1), torch.rand(8, 4, 3, 16, 16)
    with torch.no_grad():       # a linear decoder: pixels = matrix z at every position, spread out
        tae.decoder = nn.Linear(4, tae.decoder[-1].time.out_channels)
        tae.decoder.weight.copy_(torch.randn_like(tae.decoder.weight) * torch.tensor([9, 3, 1, .2]))
    tae.fit_whitening(videos.split(2), motion=True, generator=rng())
    latent = tae.encode(videos, motion=True).detach()
    assert_close(latent.mean((0, 2, 3, 4)), torch.zeros(4), atol=1e-4, rtol=0)
    assert latent.square().mean() == pytest.approx(1, abs=1e-4)
    # a unit along any channel moves the pixels equally far, and along two at right angles
    matrix = tae.decoder.weight.detach() @ torch.linalg.inv(tae.basis[1])
    gram = matrix.T @ matrix
    assert_close(gram / gram[0, 0], torch.eye(4), atol=.25, rtol=0)
    assert torch.equal(tae.basis[0], torch.eye(4)) and not tae.mean[0].any()    # videos' untouched

def test_tae_loss_is_l1_mse_kl_and_outlier_penalty():
    tae, video = randomised(TAE(TINY.tae)), torch.rand(2, 3, 3, 16, 16)
    mean, log_var = tae.posterior(video)
    noise, std = torch.randn(mean.shape, generator=rng()), (log_var / 2).exp()
    decoded = tae.pixels(mean + std * noise)[:, :3]
    kl = torch.distributions.kl_divergence(torch.distributions.Normal(mean, std),
                                           torch.distributions.Normal(0., 1.)).mean()
    excess = []
    for clip in mean.detach().flatten(1, 3):            # positions further out than one deviation
        spread = clip.var(0).sum().sqrt()
        excess += [max(0, (z - clip.mean(0)).norm() - spread) for z in clip]
    l1 = tae_loss(tae, video, noise, 0, 0, 0)
    assert_close(l1, F.l1_loss(decoded, video))
    for weights, expected in (((2, 0, 0), 2 * F.mse_loss(decoded, video)), ((0, 1, 0), kl),
                              ((0, 0, 1), sum(excess) / len(excess))):
        part = tae_loss(tae, video, noise, *weights, 1) - l1
        assert_close(part, expected, rtol=1e-2, atol=1e-4)

def test_tae_refuses_other_shapes():
    for shape in ((4, 3, 16, 16), (1, 4, 4, 16, 16), (1, 4, 3, 18, 16), (1, 4, 3, 16, 18)):
        with pytest.raises(ValueError, match="multiples of 4, got .*" + ", ".join(map(str, shape))):
            TAE(TINY.tae).encode(torch.rand(shape))

def test_tokenize_gives_bytes_then_eos_then_padding():
    assert tokenize(["aé", "", "\0"]).tolist() == [[98, 0xc3 + 1, 0xa9 + 1, EOS],
                                                  [EOS, PAD, PAD, PAD], [1, EOS, PAD, PAD]]
    assert tokenize(["a redé b ", " c"]).tolist() == [
        [98, 33, PAD, PAD, 115, 102, 101, 0xc3 + 1, 0xa9 + 1, 33, PAD, PAD, 99, 33, PAD, PAD, EOS],
        [33, PAD, PAD, PAD, 100, EOS] + [PAD] * 11]         # words begin at multiples of four
    with pytest.raises(ValueError, match="must be a list of str, got 'a star'"):
        tokenize("a star")

@pytest.mark.parametrize("prompt, limit, kept", [
    ("abcd", 4, "abcd"), ("abcde", 4, "abcd"), ("abcé", 4, "abc"), ("abé", 4, "abé"),
    ("ab🙂", 5, "ab"), ("ab🙂", 6, "ab🙂"), ("🙂", 3, "")])
def test_tokenize_cuts_long_prompts_between_characters(prompt, limit, kept):
    assert tokenize([prompt], limit).tolist() == tokenize([kept]).tolist()

def test_padding_is_not_seen_and_null_text_is_the_empty_prompt():
    x, dit, short = torch.randn(1, 4, 3, 4, 4), tiny_dit(False), "a red square"
    alone, empty = dit(x, .4, tokenize([short])), dit(x, .4, tokenize([""]))
    together = dit(x.expand(2, -1, -1, -1, -1), .4, tokenize([short, "another, much longer one"]))
    assert_close(together[:1], alone, atol=1e-5, rtol=1e-4)
    assert (together[1] - alone[0]).abs().max() > 1e-2                  # the text does matter
    assert_close(dit(x, .4, null_text(tokenize([short]))), empty, atol=1e-5, rtol=1e-4)
    assert null_text(tokenize(["aé", ""])).tolist() == [[EOS, PAD, PAD, PAD]] * 2
    with pytest.raises(ValueError, match="null must be given"):         # of another model's text
        null_text(torch.randn(2, 5))

# ---------------------------------------------------------------- the model file

@pytest.mark.parametrize("name, parameters, latents", [
    ("toy", 3.3e6, (8, 4, 8, 8)), ("small", 151e6, (16, 6, 16, 16)),
    ("4b", 4.2e9, (16, 16, 32, 32)), ("30b", 29e9, (16, 16, 32, 32))])
def test_preset_sizes_on_the_meta_device(name, parameters, latents):
    preset = PRESETS[name]
    with torch.device("meta"):
        dit, _ = DiT(preset.dit), TAE(preset.tae)
    assert sum(p.numel() for p in dit.parameters()) == pytest.approx(parameters, rel=.017)
    assert preset.latent_shape() == latents and preset.tae.channels == preset.dit.channels
    assert preset.size % (preset.tae.compression[1] * preset.dit.patch) == 0

def generate(model, prompts=("a red square", "a star"), steps=4, **options):
    return model.generate(list(prompts), steps, **options)

@pytest.mark.parametrize("which, seed", [("jam", 0), ("base", 1), ("control", 2)])
def test_model_file_holds_each_model_under_its_name_and_keeps_its_videos_to_the_bit(
        model_folder, tmp_path, which, seed):
    path = model_folder / "model.pt"
    model, saved = VideoJAM.load(path, which), read_model_file(path)[2][which].state_dict()
    for name, weight in tiny_dit(which == "jam", seed).half().state_dict().items():
        assert torch.equal(saved[name], weight)
        assert torch.equal(model.dit.state_dict()[name], weight.float())
    write_model_file(tmp_path / "copy.pt", TINY, model.tae, {which: model.dit})
    copy = VideoJAM.load(tmp_path / "copy.pt", which)
    assert copy.config == TINY and not copy.dit.training
    assert model.dit.config.motion == copy.dit.config.motion == (which == "jam")
    video, motion = generate(model)
    assert equal((video, motion), generate(copy)) and (motion is not None) == (which == "jam")
    assert video.shape == (2, 5, 3, 16, 16) and video.std() > .05
    assert 0 <= video.min() and video.max() <= 1
    with pytest.raises(ValueError, match="has no 'x' model, only jam, base, control"):
        VideoJAM.load(path, "x")

def test_model_file_hostile_or_damaged_is_refused_and_runs_no_code(model_folder, tmp_path):
    file = torch.load(model_folder / "model.pt")
    config = file["config"]
    changes = {"no config": {"config": {}}, "more": {"config": {**config, "more": 1}},
               "no heads": {"config": {**config, "dit": {**config["dit"], "heads": 0}}},
               "other tae": {"tae": {}}, "no dits": {"dits": {}}, "None": {"dits": None},
               "flat": {"dits": {"jam": {"W_in.weight": torch.zeros(3)}}}}
    takes_no_bad_weights(VideoJAM.load, tmp_path, model_folder / "model.pt",
                         **{name: {**file, **change} for name, change in changes.items()})

def test_generate_depends_on_the_seed_alone(model_folder):
    model = VideoJAM.load(model_folder / "model.pt")
    video, rgb = generate(model, seed=3)
    again, small_batch = generate(model, seed=3), generate(model, seed=3, batch=1)
    assert torch.equal(again[0], video) and torch.equal(again[1], rgb)
    assert_close(small_batch, (video, rgb), atol=.05, rtol=0)       # bf16 differs between batches
    next_seed, _ = generate(model, ["a star"], seed=4)              # sample i is that of seed + i
    assert_close(next_seed[0], video[1], atol=.05, rtol=0)
    assert not torch.allclose(generate(model, seed=4)[0][0], video[0], atol=.05)

def test_generate_takes_the_presets_w1_and_schedule_unless_told(model_folder):
    model = VideoJAM.load(model_folder / "model.pt")
    papers, others = generate(model, w1=5., emulated=1000), generate(model, w1=0., emulated=7)
    assert equal(generate(model), papers) and not equal(others, papers)
    model.config = dataclasses.replace(TINY, w1=2., emulated=7)
    assert equal(generate(model), generate(model, w1=2., emulated=7))
    assert equal(generate(model, w1=0.), others)

def test_generate_samples_base_and_jam_from_the_same_noise(model_folder, monkeypatch):
    starts = []
    monkeypatch.setattr("videojam.euler_sample", lambda dit, x, d, y, *given, **named:
                        starts.append((x, d, given, named["motion_steps"])) or (x, d))
    for which in ("base", "jam"):
        model = VideoJAM.load(model_folder / "model.pt", which)
        model.tae.basis[1] *= 2             # motion has a whitening of its own
        video, motion = generate(model, w2=4., motion_steps=1)
    (x, nothing, of_base, _), (joint_x, d, (times, *scales), motion_steps) = starts
    assert torch.equal(x, joint_x) and nothing is None and not torch.isclose(x, d).any()
    assert torch.equal(times, linear_quadratic(4)) and torch.equal(of_base[0], times)
    assert (scales, motion_steps) == ([5, 4, "inner"], 1) and of_base[1:] == (5, 4, "cfg")
    with torch.no_grad(), autocast("cpu"):
        expected = [torch.cat([model.tae.decode(z[None], i, TINY.frames) for z in latents])
                    for i, latents in enumerate((x, d))]
    assert equal([video, motion], expected)

@pytest.mark.parametrize("options, complaint", [
    ({"prompts": []}, "no prompt"), ({"steps": 0}, "steps must be from 1 to 1000, got 0"),
    ({"steps": 9, "emulated": 8}, "steps must be from 1 to 8"), ({"w1": math.nan}, "not finite"),
    ({"mode": "magic"}, "unknown guidance 'magic': one of inner, cfg"),
    *(({"mode": mode}, "needs motion") for mode in GUIDANCE if mode not in ("cfg", "none"))])
def test_generate_refuses_bad_input(model_folder, options, complaint):
    with pytest.raises(ValueError, match=complaint):
        generate(VideoJAM.load(model_folder / "model.pt", "base"), **options)

@pytest.mark.parametrize("which", ("jam", "base", "control"))
def test_shipped_weights_load_and_are_small(which):
    model = VideoJAM.load(which=which)
    assert model.config == dataclasses.replace(PRESETS["toy"], appearance=APPEARANCE)
    assert model.dit.config.motion == (which == "jam")
    assert sum(path.stat().st_size for path in (ROOT / "weights").iterdir()) < 25 * 10 ** 6

@pytest.mark.parametrize("direction, axis, sign", [("left", 1, -1), ("down", 0, 1)])
def test_shipped_model_moves_a_sprite_as_named(direction, axis, sign):
    video, _ = VideoJAM.load().generate([f"a red square moves {direction}"], steps=25)
    red = F.relu(video[0, :, 0] - video[0, :, 1:].mean(1) - .3)         # (T, H, W)
    place = (red.sum(2 - axis) * torch.arange(64)).sum(1) / red.sum((1, 2))
    assert (sign * place.diff() > 0).all() and sign * (place[-1] - place[0]) > 8     # pixels

"""pytest tests/test_wan.py: VideoJAM on other people's transformers, tiny random ones of diffusers,
and examples/wan.py. Skipped where diffusers is missing."""
import hashlib
import importlib.util
import multiprocessing
import re
import shutil
import socket
import sys
from types import SimpleNamespace

import imageio.v3 as iio
import pytest
import torch
from conftest import ROOT, checkpoints, logged
from torch.testing import assert_close

diffusers = pytest.importorskip("diffusers", reason="pip install diffusers transformers accelerate "
                                                    "peft, for examples/wan.py")
sys.path.insert(0, str(ROOT / "examples"))

import wan                                                                          # noqa: E402
from common import write_video                                                      # noqa: E402
from synthetic import sprite_clips                                                  # noqa: E402
from videojam import (check_velocity, euler_sample, joint_loss, linear_quadratic,   # noqa: E402
                      new_entries, widen_input, widen_output)

B, C, L, SHAPE = 2, 4, 5, (3, 4, 4)             # clips, channels, words, positions

class Family:
    """A tiny transformer as model(x, t, y); its two layers and how they are widened; y and null."""
    def __init__(self, net, layers, channel_last, call, y, null, others=0, **sizes):
        torch.manual_seed(0)
        self.net = net(**{"in_channels": C + others, "num_attention_heads": 2, "num_layers": 2,
                          "attention_head_dim": 12, **sizes})
        self.layers, self.last, self.others = layers, channel_last, others
        self.call, self.y, self.null = call, y, null

    def __call__(self, z, t, y):
        return self.call(self.net, z, t, y)

    def add_motion(self):
        first, last = map(self.net.get_submodule, self.layers)
        self.net.set_submodule(self.layers[0], widen_input(first, C, self.last[0], self.others))
        self.net.set_submodule(self.layers[1], widen_output(last, C, self.last[1]))
        self.net.register_to_config(in_channels=2 * C + self.others, out_channels=2 * C)

WORDS, NULL = torch.randn(B + 1, L, 16, generator=torch.Generator().manual_seed(1)).split([B, 1])
MASK = torch.ones(B, L)

def wan_t2v():
    return Family(diffusers.WanTransformer3DModel, ("patch_embedding", "proj_out"), (False, True),
                  lambda net, z, t, y: wan.velocity(net)(z, t, y), WORDS, NULL, out_channels=C,
                  text_dim=16, ffn_dim=32)

def wan_i2v():
    """The image comes after x and d, and is never dropped."""
    y = {"text": WORDS, "image": torch.randn(B, 5, *SHAPE)}
    return Family(diffusers.WanTransformer3DModel, ("patch_embedding", "proj_out"), (False, True),
                  lambda net, z, t, y: wan.velocity(net)(
                      torch.cat([z, y["image"]], 1), t, y["text"]),
                  y, {"text": NULL}, 5, out_channels=C, text_dim=16, ffn_dim=32)

def ltx():
    """Its tokens are packed: a latent position each."""
    def call(net, z, t, y):
        tokens = z.flatten(2).mT
        u = net(tokens, y["text"], 1000 * (1 - t), y["mask"], *SHAPE, return_dict=False)[0]
        return -u.mT.unflatten(2, SHAPE)
    return Family(diffusers.LTXVideoTransformer3DModel, ("proj_in", "proj_out"), (True, True), call,
                  {"text": WORDS, "mask": MASK}, {"text": NULL, "mask": MASK[:1]}, out_channels=C,
                  cross_attention_dim=24, caption_channels=16)

def hunyuan():
    def call(net, z, t, y):
        guidance = torch.full_like(t, 6000)
        return -net(z, 1000 * (1 - t), y["text"], y["mask"], y["pooled"], guidance,
                    return_dict=False)[0]
    return Family(diffusers.HunyuanVideoTransformer3DModel, ("x_embedder.proj", "proj_out"),
                  (False, False), call, {"text": WORDS, "mask": MASK, "pooled": torch.randn(B, 8)},
                  {"text": NULL, "pooled": torch.zeros(1, 8)}, out_channels=C, num_layers=1,
                  num_single_layers=1, num_refiner_layers=1, text_embed_dim=16,
                  pooled_projection_dim=8, rope_axes_dim=(4, 4, 4))

def mochi():
    """Its time and velocity run as ours, from noise to data."""
    def call(net, z, t, y):
        return net(z, y["text"], 1000 * t, y["mask"], return_dict=False)[0]
    return Family(diffusers.MochiTransformer3DModel, ("patch_embed.proj", "proj_out"),
                  (False, True), call, {"text": WORDS, "mask": MASK}, {"text": NULL},
                  pooled_projection_dim=16, text_embed_dim=16, time_embed_dim=16)

@pytest.mark.parametrize("family", (wan_t2v, wan_i2v, ltx, hunyuan, mochi))
def test_other_transformers_learn_and_sample_with_motion(family, tmp_path):
    model, (x1, d1), t = family(), torch.randn(2, B, C, *SHAPE), torch.tensor([.2, .9])
    with torch.no_grad():
        before = model(x1, t, model.y)
        model.add_motion()
        check_velocity(before, model, x1, t, model.y)
        u = model(torch.cat([x1, d1], 1), t, model.y)
        assert_close(u[:, :C], before, rtol=1e-5, atol=1e-5)
        assert not u[:, C:].any()
    optimizer, losses = torch.optim.AdamW(model.net.parameters(), 3e-3), []
    for _ in range(5):
        optimizer.zero_grad()
        loss = joint_loss(model, x1, d1, model.y, model.null, generator=torch.manual_seed(3),
                          text_dropout=.5)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert all(later < earlier for earlier, later in zip(losses, losses[1:]))
    for name, axis, last, others in zip(model.layers, (1, 0), model.last, (model.others, 0)):
        weight = model.net.get_submodule(name).weight
        assert weight.grad[new_entries(weight, axis, C, last, others)].all()
    x, d = euler_sample(model, x1, d1, model.y, linear_quadratic(4, 20), null=model.null)
    assert x.isfinite().all() and d.shape == d1.shape
    model.net.save_pretrained(tmp_path)
    again = type(model.net).from_pretrained(tmp_path)
    z = torch.cat([x, d], 1)
    with torch.no_grad():
        assert torch.equal(model.call(again, z, t, model.y), model(z, t, model.y))

def test_wans_velocity_leads_where_diffusers_own_sampler_does():
    x, scheduler = torch.randn(B, C, *SHAPE), diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    model, times = wan_t2v(), 1 - scheduler.sigmas
    expected, _ = euler_sample(model, x, None, WORDS, times, mode="none", null=NULL)
    with torch.no_grad():
        for t in scheduler.timesteps:
            out = model.net(x, t.expand(B), WORDS, return_dict=False)[0]
            x = scheduler.step(out, t, x, return_dict=False)[0]
    assert_close(x, expected, rtol=1e-4, atol=1e-4)

@pytest.mark.parametrize("kind, net_gives", [
    ("CogVideoXDDIMScheduler", "v"), ("DDIMScheduler", "eps")])
def test_v_and_epsilon_predictions_become_velocities(kind, net_gives):
    """As CogVideoX's and Latte's, exact for data of mean .7 and deviation .5."""
    options = {"rescale_betas_zero_snr": True} if net_gives == "v" else {}
    a = getattr(diffusers, kind)(**options).alphas_cumprod.double().sqrt()
    s = (1 - a ** 2).sqrt()
    def net(z, k):
        """What a perfect network predicts at step k, of a[k] x1 + s[k] x0."""
        spread = (z - a[k] * .7) / (a[k] ** 2 * .25 + s[k] ** 2)
        x1, x0 = .7 + a[k] * .25 * spread, s[k] * spread
        return a[k] * x0 - s[k] * x1 if net_gives == "v" else x0
    def model(z, t, y):
        t = t[0].double().clamp(min=(a / (a + s)).min())
        k, c = (a / (a + s) - t).abs().argmin(), 1 / torch.hypot(t, 1 - t)
        out = net(c * z, k)
        return c ** 2 * (2 * t - 1) * z - c * out if net_gives == "v" else (z - out) / t
    noise = torch.randn(20_000, 1, 1, dtype=torch.float64, generator=torch.manual_seed(0))
    x, _ = euler_sample(model, noise, None, noise, linear_quadratic(100), mode="none", null=noise)
    assert (x.mean().item(), x.std().item()) == pytest.approx((.7, .5), abs=.02)

# ---------------------------------------------------------------- examples/wan.py

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder of `train --tiny`, five steps."""
    out = tmp_path_factory.mktemp("wan") / "one"
    train_tiny(out)
    return out

def train_tiny(out, port=None, rank=0):
    """Trains five steps; with a port, as one of two processes, without previews."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["wan.py", "train", "--tiny", "--steps", "5", "--out", str(out),
                                    "--precision", "fp32"])
        if port:
            patch.setattr(wan.train.DiTStage, "preview", lambda *_: None)
            for name, value in {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1",
                                "MASTER_PORT": port}.items():
                patch.setenv(name, str(value))
        wan.main()

def test_tiny_trains_and_samples(trained, run, tmp_path):
    assert len([*trained.glob("previews/*.mp4")]) == 5
    file = tmp_path / "red.mp4"
    code, out, err = run(wan.main, "sample", trained, "a red square", "--steps", 4, "--motion",
                         "--out", file)
    assert code == 0 and out.startswith(f"{file}: 'a red square'"), err
    assert iio.imread(file).shape == (9, 8 * 34, 8 * 2 * 34, 3)         # video, motion
    assert (trained / f"texts/{hashlib.md5(b'a red square').hexdigest()}.pt").exists()

needs_peft = pytest.mark.skipif(not importlib.util.find_spec("peft"), reason="pip install peft")

@pytest.mark.parametrize("more", [pytest.param((), id="whole"),
                                  pytest.param(("--lora", 2), id="lora", marks=needs_peft)])
def test_tiny_killed_and_resumed_ends_the_same(run, tmp_path, monkeypatch, more):
    command, calls = ("train", "--tiny", "--steps", 5, *more, "--out", tmp_path / "killed"), []
    update = wan.train.Trainer.update
    def killed(*args):
        calls.append(args)
        if len(calls) == 4:                     # each step's checkpoint was written
            raise KeyboardInterrupt
        return update(*args)
    monkeypatch.setattr(wan.train.DiTStage, "preview", lambda *_: None)
    assert run(wan.main, *command[:-1], tmp_path / "whole")[0] == 0
    monkeypatch.setattr(wan.train.Trainer, "update", killed)
    assert run(wan.main, *command)[0] == 130 and not (tmp_path / "killed/transformer").exists()
    code, _, err = run(wan.main, "sample", tmp_path / "killed", "a red square")
    assert code == 2 and "killed: not trained to its end yet" in err
    assert run(wan.main, *command)[0] == 0 and len(calls) == 4 + 2
    for path in (tmp_path / "whole/transformer").iterdir():
        assert (tmp_path / "killed/transformer" / path.name).read_bytes() == path.read_bytes()
    code, _, err = run(wan.main, *command, "--lr", 1)
    assert code == 2 and "begun with lr 0.001, not 1.0" in err

def test_tiny_in_two_processes_is_as_in_one(trained, tmp_path):
    """Sharded, and resumed. Forked, because torchrun would import diffusers again."""
    for again in range(2):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        fork = multiprocessing.get_context("fork").Process
        both = [fork(target=train_tiny, args=(tmp_path, port, rank), daemon=True)
                for rank in (0, 1)]
        for process in both:
            process.start()
        for process in both:
            process.join(100)
            assert process.exitcode == 0
        one, two = ([[row[key] for key in ("step", "loss_x", "loss_d")]
                     for row in logged(out, "jam")] for out in (trained, tmp_path))
        assert len(one) == 5 and torch.tensor(two).allclose(torch.tensor(one), rtol=1e-4)
        assert (tmp_path / "metrics.jsonl").read_text().count('"loss_x"') == 5 + again
        whole, sharded = (diffusers.WanTransformer3DModel.from_pretrained(out / "transformer")
                          .state_dict() for out in (trained, tmp_path))
        assert_close(sharded, whole, rtol=0, atol=1e-4)
        shutil.rmtree(checkpoints(tmp_path, "jam")[-1])         # the last step again

def test_latents_are_the_vaes_own_and_of_motion_whitened_apart():
    tae, video = wan.TAE(wan.load(diffusers.AutoencoderKLWan, "tiny")), torch.rand(1, 5, 3, 16, 16)
    tae.scale[1] = torch.tensor([.3, 2.])
    with torch.no_grad():
        z = tae.vae.encode(video.transpose(1, 2) * 2 - 1).latent_dist.mode()
    assert_close(tae.encode(video), z)                      # its mean and deviation are 0 and 1
    assert_close(tae.encode(video, True), (z - .3) / 2)
    assert_close(tae.decode((z - .3) / 2, True), tae.decode(z))
    assert_close(tae.decode(z), tae.vae.decode(z).sample.transpose(1, 2).detach() / 2 + .5)

def test_texts_are_kept_without_their_zeros(tmp_path):
    y = torch.randn(40, 8)
    y[3:] = 0
    run = SimpleNamespace(out=tmp_path, text_encoder=lambda prompt: y)
    for _ in range(2):                                      # written, then read
        assert torch.equal(wan.WanRun.prompt_embedding.__wrapped__(run, "a cat"), y)
        run.text_encoder = None
    (file,) = tmp_path.glob("texts/*.pt")
    assert torch.load(file)["y"].shape == (3, 8)

def test_lora_without_peft_is_refused(refuses, tmp_path, monkeypatch):
    monkeypatch.setattr(wan.importlib.util, "find_spec", lambda name: None)
    assert "--lora needs peft" in refuses(wan.main, "train", "--tiny", "--lora", 2, "--out",
                                          tmp_path / "out")
    assert not (tmp_path / "out").exists()

@needs_peft
def test_tiny_with_lora_becomes_plain_weights(run, tmp_path):
    video, _, captions, _ = sprite_clips(range(3), 9, 32)
    for i, caption in enumerate(captions):
        write_video(tmp_path / f"{i}.mp4", video[i], 16, 1)
        (tmp_path / f"{i}.txt").write_text(caption)
    code, _, err = run(wan.main, "train", "--tiny", "--steps", 2, "--lora", 2, "--out",
                       tmp_path / "out", "--data", tmp_path, "--size", "16x32", "--precision",
                       "fp32")                  # bf16 would round the weights that stay
    assert code == 0, err
    base, tuned = wan.load(diffusers.WanTransformer3DModel, "tiny").state_dict(), \
        diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "out/transformer").state_dict()
    changed = {name for name in base if base[name].shape != tuned[name].shape
               or not torch.equal(base[name], tuned[name])}
    assert base.keys() == tuned.keys() and changed == {
        name for name in base if name.startswith(("patch_embedding", "proj_out"))
        or name.endswith(tuple(f"{part}.weight" for part in wan.ADAPTED))}
    code, said, err = run(wan.main, "sample", tmp_path / "out", f"{captions[0]} on a beach",
                          "--steps", 1, "--upscale", 1, "--out", tmp_path / "a.mp4")
    assert code == 0 and "does not know" not in said, err       # Wan knows more than our captions
    assert iio.imread(tmp_path / "a.mp4").shape == (9, 16, 32, 3)

@pytest.mark.parametrize("flags, complaint", [
    ((), "no videos: --data"), (("--tiny", "--frames", 16), "4n [+] 1 frames, such as 17"),
    (("--tiny", "--size", "32"), "--size"), (("--tiny", "--size", "40x32"), "multiples of 16"),
    (("--tiny", "--size", "16x32"), "without --data clips are square"),
    (("--tiny", "--data", str(ROOT)), "begun with data 'sprites'"),
    (("--tiny", "--model", "/nowhere"), "begun with model 'tiny'")])
def test_train_refuses_bad_input(trained, refuses, flags, complaint):
    assert re.search(complaint, refuses(wan.main, "train", "--steps", 5, "--out", trained, *flags))

def test_wrong_weights_and_no_videos_are_refused(refuses, tmp_path, monkeypatch):
    command = wan.main, "train", "--tiny", "--out", tmp_path
    assert "none: no AutoencoderKLWan there, nor on the hub" in refuses(
        *command, "--model", tmp_path / "none")
    assert "/nowhere: no such folder" in refuses(*command, "--data", "/nowhere")
    shutil.rmtree(tmp_path)
    monkeypatch.setitem(wan.TINY[diffusers.WanTransformer3DModel], "in_channels", 9)
    assert "for an input of 4 channels" in refuses(*command)

"""pytest tests/test_flow.py: Eq. 5, RAFT, flow of files."""
import functools
import math
import os

import imageio.v3 as iio
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_varying, takes_no_bad_weights, write_clip

import common
import flow as script
from common import autocast
from flow import RAFT, correlation_pyramid, estimate_flow, flow_to_rgb, look_up, rgb_to_flow
from synthetic import HELD_OUT, sprite_clip, sprite_clips

# ---------------------------------------------------------------- Eq. 5

@pytest.mark.parametrize("u, v, rgb", [
    (0, 0, (1, 1, 1)),                                  # still is white
    (7.5, 0, (1, 0, 0)), (15, 0, (1, 0, 0)),            # right: red; m = 1 from .15 * 50 px on
    (3.75, 0, (1, .5, .5)),                             # half the speed, half the saturation
    (-7.5, 0, (0, 1, 1)),                               # left: the opposite colour
    (7.5 * .5, 7.5 * math.sqrt(.75), (1, 1, 0)),        # 60 degrees clockwise, y being down: yellow
    (7.5 * .5, -7.5 * math.sqrt(.75), (1, 0, 1)),       # 60 degrees the other way: magenta
    (0, 7.5, (.5, 1, 0)), (0, -7.5, (.5, 0, 1)),        # down and up
])
def test_flow_to_rgb_colours(u, v, rgb):
    flow = torch.tensor([u, v], dtype=torch.float64).view(2, 1, 1).expand(2, 30, 40)
    colour = flow_to_rgb(flow)
    torch.testing.assert_close(colour[:, 3, 5], torch.tensor(rgb, dtype=torch.float64))
    assert colour.shape == (3, 30, 40)

@pytest.mark.parametrize("H, W, sigma", [(24, 32, .15), (5, 12, .15), (12, 5, .3)])
def test_flow_to_rgb_round_trip_below_saturation_at_sigma_of_the_diagonal(H, W, sigma):
    limit, generator = sigma * math.hypot(H, W), torch.Generator().manual_seed(0)
    flow = torch.randn(2, 30, 2, H, W, generator=generator) * limit / 3
    keep = (flow.norm(dim=2) < limit)[:, :, None].expand_as(flow)
    assert .9 < keep.float().mean() < 1
    back = rgb_to_flow(flow_to_rgb(flow, sigma), sigma)
    torch.testing.assert_close(back[keep], flow[keep], atol=1e-4, rtol=1e-4)
    # beyond it the angle stays and the norm is the limit
    clipped = flow * limit / flow.norm(dim=2, keepdim=True)
    torch.testing.assert_close(back[~keep], clipped[~keep], atol=1e-4, rtol=1e-4)

# ---------------------------------------------------------------- RAFT

@pytest.fixture(scope="module")
def raft():
    torch.manual_seed(0)
    return RAFT().eval().requires_grad_(False)

def test_look_up_matches_loop():
    torch.manual_seed(0)
    h, w, (f1, f2) = 16, 20, torch.randn(2, 1, 32, 16, 20)
    coords = torch.rand(1, 2, h, w) * 30 - 5                            # some lie outside
    out = look_up(correlation_pyramid(f1, f2), coords)
    assert out.shape == (1, 4 * 49, h, w)
    for y, x in ((0, 0), (7, 3), (15, 19)):
        corr = (f1[0, :, y, x] @ f2[0].flatten(1)).view(1, 1, h, w) / math.sqrt(32)
        for level in range(4):
            for i, dx in enumerate(range(-3, 4)):
                for j, dy in enumerate(range(-3, 4)):
                    px = coords[0, 0, y, x].item() / 2 ** level + dx
                    py = coords[0, 1, y, x].item() / 2 ** level + dy
                    value = sum(corr[0, 0, b, a].item() * (1 - abs(px - a)) * (1 - abs(py - b))
                                for a in (math.floor(px), math.floor(px) + 1)
                                for b in (math.floor(py), math.floor(py) + 1)
                                if 0 <= a < corr.shape[3] and 0 <= b < corr.shape[2])
                    assert out[0, level * 49 + i * 7 + j, y, x] == pytest.approx(value, abs=1e-4)
            corr = F.avg_pool2d(corr, 2)

@pytest.mark.parametrize("H, W", [(1, 1), (5, 9), (33, 200), (300, 260)])
def test_raft_takes_frames_of_any_size(raft, H, W):
    assert estimate_flow(raft, torch.rand(1, 2, 3, H, W), iters=1).shape == (1, 2, 2, H, W)
    flows = raft(torch.rand(1, 3, H, W), torch.rand(1, 3, H, W), iters=2)
    assert [flow.shape for flow in flows] == [(1, 2, H, W)] * 2
    assert flows[-1].isfinite().all()

@pytest.mark.parametrize("H, W, scale", [
    (64, 64, 4), (64, 100, 4), (128, 130, 2), (150, 257, 256 / 150), (300, 260, 1), (540, 960, 1),
    (2160, 3840, math.sqrt(2 ** 19 / (2160 * 3840)))])          # memory does not grow with it
def test_raft_flow_is_in_px_of_the_frame(raft, H, W, scale):
    """One cell is 8 px of the frame that the network sees."""
    (h, w), (left, right, top, bottom) = RAFT.layout(H, W)
    assert (h, w) == (round(H * scale), round(W * scale))
    cells = torch.ones(1, 2, (h + top + bottom) // 8, (w + left + right) // 8)
    flow = raft.restore(cells, H, W)
    assert flow.shape == (1, 2, H, W)
    torch.testing.assert_close(flow[0, 0], torch.full((H, W), 8 * W / w))
    torch.testing.assert_close(flow[0, 1], torch.full((H, W), 8 * H / h))
    cells[:, 0] = torch.linspace(-1, 1, cells.shape[3])         # the padding is cut off both sides
    assert raft.restore(cells, H, W)[0, 0].mean().abs() < (left != right) * .1 + 1e-3

@pytest.mark.parametrize("B, T, side, dtype, within", [
    (2, 10, 64, torch.float32, 1e-3),                   # 64 px: 8 pairs in a chunk, then 1
    (1, 2, 32, torch.bfloat16, .02),                    # few: some CPUs are slow at it
])
def test_estimate_flow_matches_raft_on_each_pair(raft, B, T, side, dtype, within, monkeypatch):
    monkeypatch.setattr(common, "fast_dtype", lambda device: dtype)
    video = torch.rand(B, T, 3, side, side)
    flow = estimate_flow(raft, video, iters=1)
    assert torch.equal(flow[:, -1], flow[:, -2]) and flow.shape == (B, T, 2, side, side)
    for k in {0, T - 2}:                                # the second is a chunk's first
        with autocast(video.device):
            pair = raft(video[:, k], video[:, k + 1], iters=1)[-1]
        torch.testing.assert_close(flow[:, k], pair, atol=within, rtol=1e-3)

@pytest.mark.parametrize("video, complaint", [
    (torch.rand(3, 3, 32, 32), "(B, T, 3, H, W)"),
    (torch.rand(1, 3, 4, 32, 32), "(B, T, 3, H, W)"),
    (torch.zeros(1, 2, 3, 32, 32, dtype=torch.uint8), "uint8"),
    (torch.rand(1, 1, 3, 32, 32), "two frames"),
    (torch.rand(1, 2, 3, 32, 32) / 0, "NaN or infinite"),
])
def test_estimate_flow_refuses_what_is_not_a_video(raft, video, complaint):
    with pytest.raises(ValueError) as error:
        estimate_flow(raft, video)
    assert complaint in str(error.value)

def test_raft_load_refuses_other_files_and_runs_no_code(raft, tmp_path):
    half = {key: value.half() for key, value in raft.state_dict().items()}
    torch.save(half, tmp_path / "good")
    loaded = RAFT.load(tmp_path / "good")
    for key, value in loaded.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, half[key].float())
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert sum(p.numel() for p in loaded.parameters()) == 990_162           # torchvision's too
    key = next(iter(half))
    takes_no_bad_weights(RAFT.load, tmp_path, tmp_path / "good", lacking={**half, key: None},
                         extra={**half, "extra": half[key]}, shape={**half, key: half[key][:1]})

def test_shipped_weights_on_moving_sprites():
    video, flow, _, _ = sprite_clips(range(HELD_OUT + 100, HELD_OUT + 112))
    error = (estimate_flow(RAFT.load(), video[:, 6:8])[:, 0] - flow[:, 6]).norm(dim=1)
    assert error.median() < .1                                  # of all pixels; most stand still
    assert error[flow[:, 6].norm(dim=1) > .05].median() < .45   # of those that move (still: 1.9)

# ---------------------------------------------------------------- flow of files

def test_flow_of_a_video_in_chunks_equals_whole(tmp_path, run, capfd, monkeypatch):
    monkeypatch.setattr(script, "estimate_flow", functools.partial(estimate_flow, iters=2))
    video = sprite_clip(HELD_OUT + 2, 5, 32)[0]
    path = tmp_path / "a.mp4"
    write_clip(path, (video * 255).round().byte().permute(0, 2, 3, 1).numpy(), 8)
    code, printed, _ = run(script.main, path)
    frames = torch.from_numpy(iio.imread(path, plugin="FFMPEG")).permute(0, 3, 1, 2) / 255
    flow = script.estimate_flow(RAFT.load(), frames[None])[0]
    size = flow[:-1].norm(dim=1)
    assert code == 0 and f"mean {size.mean():.3f} px, largest {size.max():.2f} px" in printed
    shown = torch.from_numpy(iio.imread(tmp_path / "a-flow.mp4", plugin="FFMPEG"))
    assert shown.shape == (5, 32, 32, 3)
    assert (shown.permute(0, 3, 1, 2) / 255 - flow_to_rgb(flow)).abs().mean((1, 2, 3)).max() < .02
    for chunk in (2, 3):                                # 2 + 2 pairs, 3 + 1
        script.render_flow(RAFT.load(), path, tmp_path / "a-flow.mp4", chunk)
        assert capfd.readouterr().out == printed

def test_flow_has_the_files_own_frames_and_lasts_as_long(tmp_path, run, monkeypatch):
    monkeypatch.setattr(script, "estimate_flow", lambda raft, video: 0 * video[:, :, :2])
    path, out = make_varying(tmp_path / "a.mp4"), tmp_path / "flow.MP4"
    assert run(script.main, path, "--out", out)[0] == 0
    count, rate = common.frames_and_rate(out)
    assert count == 16 and count / rate == pytest.approx(1.2, abs=.02)

def test_bad_input_is_one_line(tmp_path, refuses, monkeypatch):
    write_clip(path := tmp_path / "a.mp4", np.zeros((1, 32, 32, 3), np.uint8), 8)
    assert "two frames at least" in refuses(script.main, path)
    assert "nowhere: No such file" in refuses(script.main, path, "--weights", "nowhere")
    path.write_bytes(path.read_bytes()[:300])
    assert "a.mp4: cannot be decoded" in refuses(script.main, path)
    assert "b.mp4: no such file" in refuses(script.main, tmp_path / "b.mp4")
    assert "no such file" in refuses(script.main, "/")
    assert "-h shows all flags" in refuses(script.main, path, "--nonsense")
    assert "are required: video" in refuses(script.main)
    for out, complaint in (("nowhere/a.mp4", "cannot be written"), (path, "is the video itself")):
        assert f"{out}: {complaint}, --out names" in refuses(script.main, path, "--out", out)
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.R_OK)           # root may
    assert "permission denied" in refuses(script.main, path)
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    monkeypatch.setattr(RAFT, "load", None)                 # refused before any work
    assert "a-flow.mp4: cannot be written, --out" in refuses(script.main, path)
    assert list(tmp_path.iterdir()) == [path]

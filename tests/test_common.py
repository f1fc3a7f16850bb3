"""pytest tests/test_common.py: errors, files, videos, devices, the optimizer."""
from unittest.mock import Mock

import pytest
import torch
from conftest import TINY, ramp, takes_no_bad_weights, write_clip

import common
from videojam import TAE, DiT

@pytest.mark.parametrize("error, code, line", [
    (ValueError("bad"), 2, "bad"), (OSError(28, "No space", "a.mp4"), 2, "use a.mp4: No space"),
    (MemoryError(), 2, "out of memory"), (RuntimeError("can't allocate memory"), 2, "out of mem"),
    (KeyboardInterrupt(), 130, "interrupted"), (RuntimeError("a bug keeps its traceback"), 0, "")])
def test_report_errors(capfd, error, code, line):
    with pytest.raises(SystemExit if code else RuntimeError) as ended:
        common.report_errors(Mock(side_effect=error))
    err = capfd.readouterr().err
    assert (getattr(ended.value, "code", 0), err.count("\n")) == (code, bool(code)) and line in err

@pytest.mark.parametrize("error, complaint", [
    (OSError(28, "No space left on device"), "file.txt: No space left on device"),
    (RuntimeError("[enforce fail at inline_container.cc:668] . unexpected pos 704 vs 598"),
     "file.txt: No space left on device"), (RuntimeError("PytorchStreamWriter failed"), "failed"),
    (KeyboardInterrupt("stop"), "stop")])
def test_write_file_leaves_old_or_new_file_only(tmp_path, error, complaint):
    def breaks(path):
        path.write_text("half")
        raise error
    path = tmp_path / "file.txt"
    common.write_file(path, lambda temporary: temporary.write_text("old"))
    for target in (path, tmp_path / "new.file.txt"):
        with pytest.raises((ValueError, KeyboardInterrupt), match=complaint):
            common.write_file(target, breaks)
    with pytest.raises(ValueError, match="no such folder"):
        common.write_file(tmp_path / "nowhere/file.txt", breaks)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]

def test_read_tensors_refuses_other_files_and_runs_no_code(tmp_path):
    common.write_tensors(tmp_path / "good", {"kind": "tae", "a": torch.arange(3)})
    assert common.read_tensors(tmp_path / "good", "tae")["a"].tolist() == [0, 1, 2]
    takes_no_bad_weights(lambda path: common.read_tensors(path, "tae"), tmp_path,
                         tmp_path / "good")

@pytest.mark.parametrize("name", ("a.mp4", "a.gif"))
def test_write_video_round_trip(tmp_path, name):
    video = torch.rand(6, 3, 8, 8)
    common.write_video(tmp_path / name, video, fps=8)
    frames = torch.stack(list(common.open_video(tmp_path / name))) / 255
    assert frames.shape == (6, 3, 256, 256)
    assert common.frames_and_rate(tmp_path / name) == (6, pytest.approx(8, rel=.01))
    assert (frames[..., 16::32, 16::32] - video).abs().mean() < .02     # pixels stay squares
    common.write_video(tmp_path / name, video, 8, scale=2)
    assert next(common.open_video(tmp_path / name)).shape == (3, 16, 16)

def test_check_video_refuses_unfinished_videos(tmp_path):
    write_clip(path := tmp_path / "a.mp4", ramp(6), 8)
    common.check_video(path, 6)
    data = path.read_bytes()
    for frames, kept in ((7, len(data)), (6, len(data) // 2), (6, 0)):
        path.write_bytes(data[:kept])
        with pytest.raises(OSError, match="not whole"):
            common.check_video(path, frames)

def test_a_video_that_ffmpeg_did_not_finish_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(common.iio, "imwrite", lambda path, frames, **_: (
        [*frames], path.write_bytes(b"")))
    with pytest.raises(ValueError, match="a.mp4: the video is not whole"):
        common.write_video(tmp_path / "a.mp4", torch.rand(6, 3, 8, 8), 8)
    assert not [*tmp_path.iterdir()]

@pytest.mark.parametrize("has, dtype", [({"avx512_bf16": True}, torch.bfloat16),
                                        ({"amx_bf16": True}, torch.bfloat16), ({}, torch.float32)])
def test_bf16_is_for_gpus_and_for_cpus_where_it_is_fast(monkeypatch, has, dtype):
    monkeypatch.setattr(common, "CPU_HAS", has)
    assert (common.fast_dtype("cpu"), common.fast_dtype("cuda")) == (dtype, torch.bfloat16)
    with common.autocast("cpu"):
        assert torch.mm(*torch.rand(2, 4, 4)).dtype == dtype

def test_grid_has_a_column_per_clip_and_a_row_per_argument():
    picture = common.grid(torch.zeros(3, 2, 3, 4, 4), torch.full((3, 2, 3, 4, 4), .5))
    assert picture.shape == (2, 3, 12, 18) and (picture[:, :, 0] == 1).all()    # a white frame
    assert (picture[:, :, 1:5, 7:11] == 0).all() and (picture[:, :, 7:11, 7:11] == .5).all()

def test_torchruns_processes_have_a_gpu_each(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", Mock())
    for rank, complaint in ("2", "--nproc_per_node=2 at most"), ("1", "--device cuda:1: take"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        monkeypatch.setattr(torch, "zeros", Mock(side_effect=RuntimeError("no GPU")))
        with pytest.raises(ValueError, match=complaint):
            common.device_of("cuda")
    torch.cuda.set_device.assert_called_once_with("cuda:1")         # before anything is on cuda:0

def test_compiling_on_a_cpu_needs_a_compiler_and_pythons_headers(tmp_path, monkeypatch):
    monkeypatch.setattr(common.sysconfig, "get_path", lambda name: str(tmp_path))
    for compiler, headers in ((None, True), ("g++", False), ("g++", True)):
        monkeypatch.setattr(common.shutil, "which", lambda name: compiler)
        (tmp_path / "Python.h").touch() if headers else (tmp_path / "Python.h").unlink()
        assert common.can_compile(torch.device("cpu")) == bool(compiler and headers)

@pytest.mark.parametrize("dtype, tolerance", ((torch.bfloat16, 1e-6), (torch.float32, .02)))
def test_muon_matches_torch(dtype, tolerance, monkeypatch):
    monkeypatch.setattr(common, "fast_dtype", lambda device: dtype)
    monkeypatch.setattr(common, "POLAR", ((3.4445, -4.7750, 2.0315),) * 5)     # torch's
    shapes = (12, 40), (12, 40), (40, 12), (8, 3, 3, 6)                 # the kernel: channels last
    ours = [torch.zeros(shape).movedim(-1, 1).requires_grad_() for shape in shapes]
    theirs = [torch.zeros_like(weight.flatten(1), requires_grad=True) for weight in ours]
    optimizers = common.Muon(ours, .01), torch.optim.Muon(
        theirs, .01, weight_decay=0, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.flatten(1).clone()
        optimizers[0].step(), optimizers[1].step()
    for a, b in zip(ours, theirs):
        assert (a.flatten(1) - b).norm() <= tolerance * b.norm()

@pytest.mark.parametrize("dtype, rest", ((torch.bfloat16, .3), (torch.float32, .001)))
@pytest.mark.parametrize("values", (torch.logspace(0, -4, 96), torch.eye(96)[0]))
def test_orthogonalize_keeps_singular_vectors(values, dtype, rest, monkeypatch):
    monkeypatch.setattr(common, "fast_dtype", lambda device: dtype)
    U, V = torch.linalg.qr(torch.randn(96, 96))[0], torch.linalg.qr(torch.randn(200, 96))[0]
    result = common.orthogonalize((7 * (U * values) @ V.T)[None])[0].float()
    diagonal, large = (U.T @ result @ V).diagonal(), values / values.norm() >= .003
    assert ((diagonal[large] - 1).abs() < .24).all() and (diagonal[~large].abs() < .82).all()
    assert torch.linalg.matrix_norm(result - (U * diagonal) @ V.T, 2) < rest

@pytest.mark.parametrize("model", (DiT(TINY.dit), TAE(TINY.tae), torch.nn.Conv3d(4, 6, 2)))
def test_muon_takes_matrices_and_adamw_the_rest(model):
    """Muon's steps are large in all directions, even where one is far louder than the others."""
    adamw, muon = common.make_optimizers(model, 1.)
    for weight in model.parameters():
        weight.data.zero_()
        loud = torch.randn(len(weight), 1) * torch.randn(weight[0].numel())
        weight.grad = torch.randn_like(weight) + 10 * loud.view_as(weight)
    adamw.step(), muon.step()
    for name, step in model.named_parameters():
        if step.ndim == 1 or name.endswith(("embed.weight", "table")):
            assert ((step.abs() - 1).abs() < .05).all()
        else:
            step = step.detach().flatten(1)
            values = torch.linalg.svdvals(step) / (.2 * max(step.shape) ** .5)
            assert .5 < values.median() and values.max() < 1.3

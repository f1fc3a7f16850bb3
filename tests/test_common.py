"""pytest tests/test_common.py: the optimizer, files, videos, errors, devices."""
import argparse
import platform
import resource

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from conftest import TINY, bad_weights, randomised

import common
from common import check_video, grid, read_tensors, write_file, write_tensors, write_video
from synthetic import sprite_clips
from videojam import TAE, DiT

# ---------------------------------------------------------------- the optimizer

@pytest.mark.parametrize("dtype, tolerance", ((torch.bfloat16, 1e-6), (torch.float32, .02)))
@pytest.mark.parametrize("shape", ((12, 40), (40, 12), (24, 24)))
def test_muon_matches_torch(shape, dtype, tolerance, monkeypatch):
    """torch's works in bf16 whatever the device; ours in what is fast there. With its polynomial."""
    monkeypatch.setattr(common, "fast_dtype", lambda device: dtype)
    monkeypatch.setattr(common, "POLAR", ((3.4445, -4.7750, 2.0315),) * 5)
    start = torch.randn(shape)
    ours, theirs = start.clone().requires_grad_(), start.clone().requires_grad_()
    optimizers = (common.Muon([ours], .01), torch.optim.Muon(
        [theirs], .01, weight_decay=0, adjust_lr_fn="match_rms_adamw"))
    for _ in range(4):
        ours.grad = theirs.grad = torch.randn(shape)
        for optimizer in optimizers:
            optimizer.step()
    assert (ours - theirs).norm() <= tolerance * (theirs - start).norm()

@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
@pytest.mark.parametrize("values", (
    torch.logspace(0, -4, 96), torch.tensor([1.] + [0.] * 95), torch.tensor([1.] + [.004] * 95),
    torch.ones(96)), ids=("of all sizes", "rank 1", "one large", "equal"))
def test_orthogonalize_keeps_singular_vectors_and_evens_out_the_values(values, dtype, monkeypatch):
    monkeypatch.setattr(common, "fast_dtype", lambda device: dtype)
    U, V = torch.linalg.qr(torch.randn(96, 96))[0], torch.linalg.qr(torch.randn(200, 96))[0]
    matrix = 7 * (U * values) @ V.T
    for given, left, right in ((matrix, U, V), (matrix.T, V, U)):
        result = common.orthogonalize(given[None])[0].float()
        diagonal = (left.T @ result @ right).diagonal()
        large = values / values.norm() >= .003
        assert ((diagonal[large] > .76) & (diagonal[large] < 1.24)).all(), diagonal
        assert (diagonal[~large].abs() < .82).all()
        others = torch.linalg.matrix_norm(result - (left * diagonal) @ right.T, 2)
        assert others < (.3 if dtype == torch.bfloat16 else .001)

@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's malloc")
def test_freed_memory_is_kept():
    common.keep_freed_memory()
    faults = []
    for _ in range(4):
        tensors = [torch.ones(2 ** 22) for _ in range(16)]              # 16 MB each
        del tensors
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    assert faults[-1] - faults[1] < 6000                                # 130,000 without

def test_muon_takes_kernels_as_matrices_in_either_memory_format():
    start, grads = torch.randn(8, 6, 3, 3), torch.randn(3, 8, 6, 3, 3)
    results = []
    for weight in (start.flatten(1), start, start.to(memory_format=torch.channels_last)):
        weight = weight.clone(memory_format=torch.preserve_format).requires_grad_()
        optimizer = common.Muon([weight], .01)
        for grad in grads:
            weight.grad = grad.view(weight.shape).clone(memory_format=torch.preserve_format)
            optimizer.step()
        results.append(weight.detach().flatten(1))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=1e-6)

@pytest.mark.parametrize("model", (DiT(TINY.dit), TAE(TINY.tae)), ids=("dit", "tae"))
def test_muon_steps_in_all_directions_of_matrices_and_kernels_adamw_in_the_rest(model):
    model, lr = randomised(model), .01
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    adamw, muon = common.make_optimizers(model, lr)
    taken = adamw.param_groups[0]["params"] + muon.param_groups[0]["params"]
    assert len(taken) == len(before) == len(set(taken))
    column, row = torch.randn(2, 2048)
    for weight in model.parameters():       # one direction, far louder than all others
        weight.grad = torch.randn_like(weight)
        if weight.ndim > 1:
            side = weight[0].numel()
            weight.grad += 10 * (column[:len(weight), None] * row[:side]).view_as(weight)
    adamw.step(), muon.step()
    for name, weight in model.named_parameters():
        step = (before[name] - weight.detach()) / lr
        if weight.ndim == 1 or name.endswith(("embed.weight", "table")):
            torch.testing.assert_close(step.abs(), torch.ones_like(step), atol=1e-3, rtol=0)
        else:
            step = step.flatten(1)
            values = torch.linalg.svdvals(step) / (.2 * max(step.shape) ** .5)
            assert .5 < values.median() and values.max() < 1.3

# ---------------------------------------------------------------- files

@pytest.mark.parametrize("error, raised", [(OSError("disk full"), ValueError),
                                           (RuntimeError("PytorchStreamWriter failed"), ValueError),
                                           (OSError(), ValueError),
                                           (RuntimeError("can't allocate memory"), RuntimeError),
                                           (KeyboardInterrupt(), KeyboardInterrupt)])
def test_write_file_leaves_the_old_file_or_the_new_one_and_nothing_else(tmp_path, error, raised):
    def breaks(path):
        path.write_text("half")
        raise error

    path = tmp_path / "file.txt"
    write_file(path, lambda temporary: temporary.write_text("old"))
    with pytest.raises(raised):
        write_file(path, breaks)
    with pytest.raises(raised):
        write_file(tmp_path / "never.txt", breaks)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match="no such folder"):
        write_file(tmp_path / "nowhere" / "file.txt", breaks)

def test_a_video_that_ffmpeg_could_not_finish_is_no_video(tmp_path):
    """A full disk: ffmpeg ends, and says nothing to anyone."""
    iio.imwrite(tmp_path / "a.mp4", np.random.randint(0, 255, (6, 64, 64, 3), np.uint8),
                plugin="FFMPEG", fps=8, macro_block_size=2)
    check_video(tmp_path / "a.mp4", 6)
    for frames, size in ((7, 10 ** 6), (6, 3000), (6, 0)):
        (tmp_path / "b.mp4").write_bytes((tmp_path / "a.mp4").read_bytes()[:size])
        with pytest.raises(OSError, match="not whole"):
            check_video(tmp_path / "b.mp4", frames)

# ---------------------------------------------------------------- video files

@pytest.mark.parametrize("name", ("a.mp4", "a.gif"))
def test_written_videos_come_back_enlarged_to_what_a_person_can_see(tmp_path, name):
    video = sprite_clips([3], 6, 32)[0][0]
    write_video(tmp_path / name, video, fps=8)
    frames = torch.from_numpy(iio.imread(tmp_path / name)).permute(0, 3, 1, 2).float() / 255
    assert frames.shape == (6, 3, 256, 256)
    assert (frames[..., 4::8, 4::8] - video).abs().mean() < .02     # pixels stay squares
    if name == "a.mp4":
        assert iio.immeta(tmp_path / name, plugin="FFMPEG")["fps"] == 8
    else:
        assert iio.immeta(tmp_path / name)["duration"] in (120, 125, 130)       # ms, in hundredths
    write_video(tmp_path / name, video, 8, 2)
    assert iio.imread(tmp_path / name).shape[1:3] == (64, 64)
    assert [path.name for path in tmp_path.iterdir()] == [name]

def test_grid_has_a_column_for_each_clip_and_a_row_for_each_argument():
    a, b = torch.zeros(3, 2, 3, 4, 4), torch.full((3, 2, 3, 4, 4), .5)
    picture = grid(a, b)
    assert picture.shape == (2, 3, 12, 18)
    assert (picture[:, :, 1:5, 7:11] == 0).all() and (picture[:, :, 7:11, 7:11] == .5).all()
    assert (picture[:, :, 0] == 1).all()                                # a white frame around each

# ---------------------------------------------------------------- errors and devices

@pytest.mark.parametrize("kind, good, bad", [
    (common.positive_int, {"3": 3}, ("0", "-1", "2.5", "x", "")),
    (common.positive, {".5": .5}, ("0", "-1", "inf", "nan", "x")),
    (common.fraction, {"0": 0, "1": 1}, ("-.1", "1.1", "nan")),
    (common.seed, {"-7": -7}, (str(2 ** 62), "x"))])
def test_argparse_types_take_what_they_say(kind, good, bad):
    assert {text: kind(text) for text in good} == good
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match="must be"):
            kind(text)

@pytest.mark.parametrize("error, code, line", [
    (ValueError("bad"), 2, "bad"), (OSError(28, "No space", "a.mp4"), 2, "cannot use a.mp4: No"),
    (MemoryError(), 2, "out of memory"), (RuntimeError("can't allocate memory"), 2, "out of memory"),
    (KeyboardInterrupt(), 130, "interrupted")])
def test_errors_are_one_line_and_an_exit_code(run, error, code, line):
    def main():
        raise error

    ended, out, err = run(main)
    assert ended == code and not out and err.count("\n") == 1 and line in err

def test_bugs_keep_their_traceback(run):
    def main():
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        run(main)

def test_read_tensors_refuses_other_files_and_runs_no_code(tmp_path):
    write_tensors(tmp_path / "good", {"kind": "tae", "a": torch.arange(3)})
    assert read_tensors(tmp_path / "good", "tae")["a"].tolist() == [0, 1, 2]
    for path in [*bad_weights(tmp_path, tmp_path / "good"), tmp_path]:
        with pytest.raises(ValueError) as error:
            read_tensors(path, "tae")
        assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()

@pytest.mark.parametrize("name", ("bad", "meta", "cpu:x"))
def test_device_of_refuses_what_is_not_there(name):
    with pytest.raises(ValueError, match="no such device, take cpu or cuda"):
        common.device_of(name)

"""common.py: data, networks, attacks, schedules, metrics and the run folder's promises."""
import contextlib
import itertools
import math
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import train_trades
from common import Attack, UserError

ROOT = Path(common.__file__).parent
CPU = torch.device("cpu")


def load(name, folder, **subset):
    return common.load_data(name, folder, CPU, **subset)


# ------------------------------------------------------------------------------------------------------- data


def test_npz_is_read_as_stored(tmp_path, write_npz):
    stored, data = np.load(write_npz(y_test=np.full((21, 1), 9, np.uint8))), load("tiny", tmp_path)
    assert data.classes == 10 and data.x_train.dtype == torch.uint8
    assert (data.x_train.permute(0, 2, 3, 1).numpy() == stored["x_train"]).all()
    assert (data.y_train.numpy() == stored["y_train"]).all()
    assert data.y_test.tolist() == [9] * 21  # Keras stores a column


def test_train_size_is_a_seeded_random_subset(tmp_path, write_npz):
    write_npz()
    first, again, other = (load("tiny", tmp_path, train_size=20, seed=seed).x_train for seed in (1, 1, 2))
    assert len(first) == 20 and first.equal(again) and not first.equal(other)
    with pytest.raises(UserError, match="64 training images"):
        load("tiny", tmp_path, train_size=65)


@pytest.mark.parametrize("name, changes, message", [
    ("tiny", {"x_test": None}, "x_test"),
    ("tiny", {"x_train": np.zeros((64, 8, 8, 3), np.float32)}, "x_train must be uint8"),
    ("tiny", {"x_train": np.zeros((64, 3, 8, 8), np.uint8)}, r"\[N, H, W, 3\]"),
    ("tiny", {"y_train": np.zeros(63, np.int64)}, "64 integers"),
    ("tiny", {"y_test": np.full(21, 0.5)}, "21 integers"),
    ("tiny", {"y_test": np.full(21, 10)}, r"labels must lie in 0\.\.9; found 0\.\.10"),
    ("tiny", {"y_train": np.full(64, -1)}, r"labels must lie in 0\.\.0; found -1\.\.9"),
    ("tiny", {"x_test": np.zeros((21, 16, 16, 3), np.uint8)}, "differ in size"),
    ("cifar10", {"classes": 11}, r"cifar10.npz: labels must lie in 0\.\.9; found 0\.\.10"),
])
def test_malformed_npz_is_refused(tmp_path, write_npz, name, changes, message):
    write_npz(name, **changes)
    with pytest.raises(UserError, match=message):
        load(name, tmp_path)


def test_truncated_and_missing_files_are_named(tmp_path, write_npz, monkeypatch):
    path = write_npz()
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(UserError, match="tiny.npz cannot be read"):
        load("tiny", tmp_path)
    with pytest.raises(UserError, match="absent.npz is missing"):
        load("absent", tmp_path)

    from torchvision import datasets

    def offline(*args, **kwargs):
        raise OSError("no network")
    monkeypatch.setattr(datasets.CIFAR10, "download", offline)
    with pytest.raises(UserError, match="cifar10.npz.*no network.*--dataset synthetic"):
        load("cifar10", tmp_path)


@pytest.mark.parametrize("height, width, padding", [(32, 32, 4), (4, 4, 4), (5, 9, 2), (1, 1, 0)])
def test_crop_and_flip_match_a_per_image_reference(height, width, padding):
    torch.manual_seed(0)
    images = torch.randint(0, 256, (50, 3, height, width), dtype=torch.uint8)
    top, left = torch.randint(0, 2 * padding + 1, (2, 50))
    flip = torch.rand(50) < 0.5
    out = common.crop_flip(images, top, left, flip, padding)
    for i in range(50):
        padded = np.pad(images[i].numpy(), ((0, 0), (padding, padding), (padding, padding)))
        expected = padded[:, top[i]:top[i] + height, left[i]:left[i] + width]
        assert (out[i].numpy() == (expected[:, :, ::-1] if flip[i] else expected)).all()


@pytest.mark.parametrize("flip", [True, False])
def test_random_augmentation_draws_every_offset_and_flip_for_each_image(flip):
    image = torch.arange(1, 65, dtype=torch.uint8).view(1, 1, 8, 8).expand(4000, 3, 8, 8)
    torch.manual_seed(0)
    found, counts = torch.unique(common.random_crop_flip(image, flip), dim=0, return_counts=True)
    assert len(counts) == 9 * 9 * (1 + flip)  # all are drawn, and about equally often
    assert 0.2 < counts.min() / counts.float().mean() and counts.max() / counts.float().mean() < 2.5
    assert any(one.equal(image[0]) for one in found)
    assert any(one.equal(image[0].flip(2)) for one in found) == flip


def test_an_epoch_is_a_fresh_seeded_order_without_repeats():
    x, y = torch.zeros(100, 3, 8, 8, dtype=torch.uint8), torch.arange(100)
    torch.manual_seed(3)
    epochs = [torch.cat([labels for _, labels in common.batches(x, y, 32)]) for _ in range(2)]
    torch.manual_seed(3)
    again = torch.cat([labels for _, labels in common.batches(x, y, 32)])
    assert len(epochs[0]) == 96 == len(set(epochs[0].tolist())) and not epochs[0].equal(epochs[1])
    assert again.equal(epochs[0])
    assert sum(len(labels) for _, labels in common.batches(x, y, 128)) == 100  # fewer images than a batch


def test_pixels_equal_torchvisions_to_tensor():
    from torchvision.transforms.functional import to_tensor
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert common.to_float(torch.from_numpy(image).permute(2, 0, 1)[None])[0].equal(to_tensor(image))


def test_synthetic_data_are_fixed_by_their_seed():
    first, again, other = (common.synthetic(50, 20, seed) for seed in (0, 0, 1))
    assert all((first[key] == again[key]).all() for key in first)
    assert (first["x_train"] != other["x_train"]).any()
    assert first["x_train"].shape == (50, 32, 32, 3) and first["x_train"].dtype == np.uint8


# ------------------------------------------------------------------------------------------------- extra data


x, y = np.random.default_rng(1).integers(0, 256, (30, 8, 8, 3), np.uint8), np.arange(30) % 10


@pytest.fixture
def data(tmp_path, write_npz):
    write_npz()
    return load("tiny", tmp_path)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("modules", [b"numpy._core", b"numpy.core"])  # new NumPy's, old NumPy's
def test_rst_pickle_loads(tmp_path, data, protocol, modules):
    if modules == b"numpy.core" and protocol > 3:
        pytest.skip("these state the length of a name before it")
    content = {"data": x, "extrapolated_targets": list(y), "model": "vanilla", "accuracy": np.float64(0.5)}
    (tmp_path / "extra.pickle").write_bytes(pickle.dumps(content, protocol).replace(b"numpy._core", modules))
    images, labels = common.load_extra(str(tmp_path / "extra.pickle"), data)
    assert images.dtype == torch.uint8 and labels.dtype == torch.int64
    assert np.array_equal(images.permute(0, 2, 3, 1), x) and np.array_equal(labels, y)


class Harmful:
    def __init__(self, call, *arguments):
        self.called = call, arguments

    def __reduce__(self):
        return self.called


RANGE, CODE = r"must be 30 integers in 0\.\.9", "which arrays do not need"
MALFORMED = {
    "missing file": (None, "FileNotFoundError"),
    "no pickle": (b"not a pickle", "must hold arrays 'data' and 'extrapolated_targets'"),
    "empty": (b"", "EOFError"),
    "cut short": (pickle.dumps({"data": x, "extrapolated_targets": y})[:-100], "must hold arrays"),
    "another layout": ([x, y], "must hold arrays"),
    "a key missing": ({"data": x}, "KeyError: 'extrapolated_targets'"),
    "float images": ({"data": x / 255, "extrapolated_targets": y}, "must be uint8"),
    "another size": ({"data": x[:, :4], "extrapolated_targets": y}, r"\[M, 8, 8, 3\], not uint8 \[30, 4"),
    "no images": ({"data": x[:0], "extrapolated_targets": y[:0]}, "must be uint8"),
    "too few labels": ({"data": x, "extrapolated_targets": y[1:]}, RANGE),
    "label too large": ({"data": x, "extrapolated_targets": y + 1}, RANGE),
    "unlabelled": ({"data": x, "extrapolated_targets": y - 1}, RANGE),
    "fractional labels": ({"data": x, "extrapolated_targets": y / 2}, RANGE),
    "system": ({"data": Harmful(os.system, "touch harm")}, CODE),
    "eval": ({"data": Harmful(eval, "open('harm', 'w')")}, CODE),
    "load": ({"data": Harmful(np.load, "harm.npy")}, CODE),
    "save": ({"data": Harmful(np.save, "harm", 1)}, CODE),
    "a dotted name": (b"cnumpy.core.multiarray\n_reconstruct.__class__\n.", CODE),  # into what is allowed
    "npz, other names": ({"images": x, "label": y}, "must hold arrays 'image' and 'label'"),
    "npz of objects": ({"image": x, "label": y.astype(object)}, "must hold arrays 'image' and 'label'"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_extra_data_is_refused_and_runs_no_code(tmp_path, data, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    content, message = MALFORMED[case]
    path = Path("extra.npz" if case.startswith("npz") else "extra.pickle")
    if path.suffix == ".npz":
        np.savez(path, **content)
    elif content is not None:
        path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content))
    with pytest.raises(UserError, match=message):
        common.load_extra(str(path), data)
    assert not list(tmp_path.glob("harm*"))


@pytest.mark.parametrize("fraction, share", [(0, 0), (0.25, 4), (0.5, 8), (1, 16)])
def test_epoch_of_mixed_batches_draws_without_replacement(data, monkeypatch, fraction, share):
    monkeypatch.setattr(common, "random_crop_flip", lambda images, flip: images)
    x_extra, y_extra = torch.full((100, 3, 8, 8), 255, dtype=torch.uint8), torch.arange(100, 200)
    data.y_train = torch.arange(64)
    stream = list(common.mixed_batches(data, x_extra, y_extra, batch_size=16, fraction=fraction))
    assert len(stream) == 4  # 64 images in all, as the labelled set has
    for x, y in stream:
        extra = y >= 100
        assert len(y.unique()) == len(x) == 16 and extra.sum() == share and (x[extra] == 1).all()
        assert torch.equal(x[~extra], common.to_float(data.x_train[y[~extra]]))
    assert len(torch.cat([y for _, y in stream]).unique()) == 64


def test_few_extra_images_come_again_only_when_all_have_come(data):
    x_extra, y_extra = torch.zeros(7, 3, 8, 8, dtype=torch.uint8), torch.arange(7) + 100
    drawn = torch.cat([y[y >= 100] for _, y in common.mixed_batches(data, x_extra, y_extra, 16, 0.5)])
    assert sorted(drawn.unique(return_counts=True)[1].tolist()) == [4, 4, 4, 5, 5, 5, 5]  # 32 draws from 7


# --------------------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize("arch, depth, width, parameters", [
    ("wrn", 34, 1, 466_714), ("wrn", 34, 10, 46_160_474), ("wrn", 28, 10, 36_479_194),
    ("densenet", 40, 12, 176_122), ("densenet", 40, 40, 1_901_930)])
def test_parameter_counts(arch, depth, width, parameters):
    with torch.device("meta"):
        model = common.build_model(arch, depth, width, 10)
    assert sum(p.numel() for p in model.parameters()) == parameters


def reference(arch, state, x, blocks):
    """The published networks' forward passes, written from their parameter names alone."""
    def conv(name, x, **settings):
        return F.conv2d(x, state[name + ".weight"], **settings)

    def bn_relu(name, x):
        parts = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(x, *(state[f"{name}.{part}"] for part in parts)).relu()

    x = conv("conv1", x, padding=1)
    for stage, block in itertools.product((1, 2, 3), range(blocks)):
        name, trans = f"block{stage}.layer.{block}.", f"trans{stage}."
        out = bn_relu(name + "bn1", x)
        if arch == "wrn":
            stride = 2 if stage > 1 and block == 0 else 1
            if name + "convShortcut.weight" in state:
                x = conv(name + "convShortcut", out, stride=stride)
            out = bn_relu(name + "bn2", conv(name + "conv1", out, stride=stride, padding=1))
            x = x + conv(name + "conv2", out, padding=1)
        else:
            out = bn_relu(name + "bn2", conv(name + "conv1", out))
            x = torch.cat([x, conv(name + "conv2", out, padding=1)], 1)
            if stage < 3 and block == blocks - 1:
                x = F.avg_pool2d(conv(trans + "conv1", bn_relu(trans + "bn1", x)), 2)
    return F.linear(F.avg_pool2d(bn_relu("bn1", x), 8).flatten(1), state["fc.weight"], state["fc.bias"])


def with_random_statistics(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()


@pytest.mark.parametrize("arch, width", [("wrn", 2), ("densenet", 6)])
def test_a_published_checkpoint_gives_its_logits(arch, width):
    torch.manual_seed(0)
    published = with_random_statistics(common.build_model(arch, 16, width, 10)).state_dict()
    wrapped = {"module." + key: value for key, value in published.items()}
    wrapped["module.sub_block1.layer.0.conv1.weight"] = torch.zeros(1)
    model = common.build_model(arch, 16, width, 10).eval()
    common.load_weights(model, wrapped, "published.pt")
    x = torch.rand(3, 3, 32, 32)
    torch.testing.assert_close(model(x), reference(arch, published, x, 2), atol=1e-5, rtol=0)


def test_a_checkpoint_of_another_network_is_refused():
    model = common.build_model("wrn", 10, 1, 10)
    for other in (("wrn", 10, 2, 10), ("wrn", 16, 1, 10), ("densenet", 10, 12, 10), ("wrn", 10, 1, 100)):
        with pytest.raises(UserError, match="other.pt holds another network"):
            common.load_weights(model, common.build_model(*other).state_dict(), "other.pt")
    with pytest.raises(UserError, match="6n \\+ 4"):
        common.build_model("wrn", 35, 1, 10)


# -------------------------------------------------------------------------------------------------- execution


def test_bf16_keeps_logits_and_pixels_in_float32():
    torch.manual_seed(0)
    model, x = with_random_statistics(common.build_model("wrn", 10, 1, 10)), torch.rand(8, 3, 32, 32)
    exact = model(x)
    assert common.set_execution(model, CPU, "bf16", "off", None) == "bf16, channels_last, eager"
    assert model(x).dtype == torch.float32 and all(p.dtype == torch.float32 for p in model.parameters())
    assert 0 < (model(x) - exact).abs().max() < 0.05 * exact.abs().max()
    with common.exact_precision(model):
        torch.testing.assert_close(model(x), exact)
    with pytest.raises(UserError, match="--precision bf16: Linear knows fp32 alone"):
        common.set_execution(torch.nn.Linear(3, 10), CPU, "bf16", "off", None)


def test_the_measured_precision_is_printed_stored_and_kept_on_resume(tiny, tmp_path, monkeypatch, capsys):
    tiny += ["--epochs", "1", "--precision", "auto"]

    def train(fp32, bf16, *argv):
        monkeypatch.setattr(common, "measure_precisions", lambda *_: {"fp32": fp32, "bf16": bf16})
        train_trades.main([*tiny, *argv])
        return capsys.readouterr().out

    assert "bf16 (an attack step takes 2 s in fp32, 1 s in bf16)" in train(2.0, 1.0)
    stored = common.read_json(tmp_path / "run" / "args.json")
    assert stored["precision"] == "bf16"
    again = train(1.0, 2.0)  # the same command, where the other is faster now
    assert "bf16, channels_last" in again and "1 of 1 epochs done" in again
    assert common.read_json(tmp_path / "run" / "args.json") == stored
    assert "fp32 (an attack step takes 1 s" in train(1.0, 2.0, "--out", str(tmp_path / "other"))
    with pytest.raises(UserError, match="--precision bf16 there, fp32 here"):
        train_trades.main([*tiny, "--precision", "fp32"])


# ---------------------------------------------------------------------------------------------------- attacks


def linear(inputs, classes):
    """Every attack on it has a closed form."""
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, classes))


@pytest.mark.parametrize("norm, room, steps, atol", [("linf", 0, 10, 1e-12), ("l2", 0.2, 30, 1e-3)])
def test_pgd_reaches_the_closed_form_maximum_on_a_linear_network(norm, room, steps, atol):
    torch.manual_seed(0)
    model, y = linear(48, 2).double(), torch.tensor([0, 1, 0, 1, 0])
    x = torch.rand(5, 3, 4, 4).double().clamp(room, 1 - room)  # in l2 away from the walls of [0, 1]
    attack = Attack(norm=norm, eps=0.2, step_size=0.05, steps=steps)
    ascent = model[1].weight[1 - y] - model[1].weight[y]
    unit = ascent.sign() if norm == "linf" else ascent / ascent.norm(dim=1, keepdim=True)
    for loss in (common.margin_to(y), common.cross_entropy_to(y)):
        x_adv = common.pgd(model, x, loss, attack)
        torch.testing.assert_close(x_adv, (x + 0.2 * unit.view_as(x)).clamp(0, 1), atol=atol, rtol=0)


def state_of(model):
    """All that an attack must leave as it was, as numbers."""
    flags = [module.training for module in model.modules()], [p.requires_grad for p in model.parameters()]
    gradients = [p.grad if p.grad is None else p.grad.tolist() for p in model.parameters()]
    return flags, gradients, [tensor.tolist() for tensor in model.state_dict().values()]


@pytest.mark.parametrize("dtype, rounding", [(torch.float32, 1e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_keeps_its_promises_over_random_settings(dtype, rounding, norm):
    """In the ball and in [0, 1]; the model's mode, gradients, buffers and requires_grad flags as before."""
    draw = random.Random(0)
    for case in range(50):
        torch.manual_seed(case)
        n, size, classes = draw.randint(1, 4), draw.randint(3, 5), draw.randint(2, 4)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
                              nn.Linear(4 * (size - 2) ** 2, classes)).to(dtype).eval()
        model(torch.rand(6, 3, size, size, dtype=dtype)).sum().backward()  # a gradient in flight
        for module in model:
            module.train(draw.random() < 0.5)
        for parameter in model.parameters():
            parameter.requires_grad_(draw.random() < 0.7)
        x, y = torch.rand(n, 3, size, size, dtype=dtype), torch.randint(0, classes, (n,))
        x = torch.where(torch.rand(n, 1, 1, 1) < 0.5, x.round(), x)  # black and white pixels: no way out
        eps = draw.choice((0, 1e-4, 0.03, 0.5, 2))
        attack = Attack(norm=norm, eps=eps, step_size=draw.choice((0, eps / 2, 2 * eps, 0.01)),
                        steps=draw.randint(0, 3), start=draw.choice(("uniform", "gaussian", "none")))
        p = torch.rand(n, classes, dtype=dtype).softmax(1)
        loss = draw.choice((common.cross_entropy_to(y), common.margin_to(y), common.kl_to(p), torch.sum))
        before, given = state_of(model), x.clone()
        with pytest.raises(ZeroDivisionError) if attack.steps else contextlib.nullcontext():
            common.pgd(model, x, lambda logits: 1 / 0, attack)
        assert state_of(model) == before
        x_adv, norms = common.pgd(model, x, loss, attack, gradient_norm=True)
        assert state_of(model) == before and x.equal(given)
        assert x_adv.shape == x.shape and x_adv.dtype == norms.dtype == dtype and not x_adv.requires_grad
        distance = (x_adv - x).flatten(1).norm(dim=1, p=math.inf if norm == "linf" else 2)
        assert distance.max() <= eps + rounding and x_adv.min() >= 0 and x_adv.max() <= 1, attack
        assert eps > 0 or x_adv.equal(x)
        assert eps == 0 or attack.start == "none" or distance.min() > 0
        assert attack.steps > 0 or norms.eq(0).all() and (attack.start != "none" or x_adv.equal(x))


def test_starts_have_the_published_distributions():
    torch.manual_seed(0)
    x = torch.full((400, 3, 8, 8), 0.5)
    uniform = common.perturb_start(x, "uniform", 0.03, "linf") - x
    assert uniform.abs().max() <= 0.03 + 1e-6 and abs(uniform.std().item() - 0.03 / math.sqrt(3)) < 1e-4
    assert abs((common.perturb_start(x, "gaussian", 0.03, "linf") - x).std().item() - 0.001) < 1e-5
    radius = (common.perturb_start(x[:, :, :1, :1], "uniform", 0.5, "l2") - 0.5).flatten(1).norm(dim=1)
    assert radius.max() <= 0.5 and abs(((radius / 0.5) ** 3).mean().item() - 0.5) < 0.05  # uniform in 3-d


def test_attack_losses_against_formulas_by_hand():
    torch.manual_seed(0)
    logits, y = torch.randn(6, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 4, 0])
    p, q = torch.randn(6, 5, dtype=torch.float64).softmax(1), logits.exp() / logits.exp().sum(1, keepdim=True)
    kl, rows = (p * (p.log() - q.log())).sum().item(), range(6)
    cross_entropy = -sum(math.log(q[i, y[i]]) for i in rows)
    margins = [max(logits[i, j].item() for j in range(5) if j != y[i]) - logits[i, y[i]].item() for i in rows]
    assert common.kl_to(p)(logits).item() == pytest.approx(kl, abs=1e-12)
    assert common.cross_entropy_to(y)(logits).item() == pytest.approx(cross_entropy, abs=1e-12)
    assert common.margin_to(y)(logits).item() == pytest.approx(sum(margins), abs=1e-12)


def test_gradient_norm_is_the_largest_l1_norm_met():
    torch.manual_seed(0)
    model, x = linear(48, 2).double(), torch.rand(4, 3, 4, 4).double()
    scales = iter((1.0, -3.0, 2.0))
    _, norms = common.pgd(model, x, lambda logits: next(scales) * logits[:, 0].sum(),
                          Attack(eps=0.1, step_size=0.05, steps=3), gradient_norm=True)
    assert norms.tolist() == pytest.approx([3 * model[1].weight[0].abs().sum().item()] * 4)


# -------------------------------------------------------------------------------------------------- schedules


SCHEDULES = {**common.SCHEDULES, "awp": partial(common.step, milestones=(0.5, 0.75))}
ALL = range(1, 101)


@pytest.mark.parametrize("schedule, epochs, expected", [
    ("exp-decay", 100, {e: 1 if e < 75 else 0.5 ** (e - 74) for e in ALL}),
    ("step", 100, {e: 1 if e < 75 else 0.1 if e < 90 else 0.01 if e < 100 else 0.001 for e in ALL}),
    ("cosine", 100, {e: 0.5 * (1 + math.cos(math.pi * (e - 1) / 100)) for e in ALL}),
    ("awp", 200, {1: 1, 99: 1, 100: 0.1, 149: 0.1, 150: 0.01, 200: 0.01}),
    ("exp-decay", 200, {149: 1, 150: 0.5, 151: 0.5, 152: 0.25, 200: 0.5 ** 26}),
    ("exp-decay", 5, {3: 1, 4: 0.5, 5: 0.25}),
    ("exp-decay", 110, {82: 1, 83: 0.5, 99: 0.5 ** 16, 110: 0.5 ** 26}),  # 15 and 25 times 1.1 epochs
    ("step", 200, {149: 1, 150: 0.1, 180: 0.01}),
    ("cosine", 200, {1: 1, 101: 0.5, 200: 0.5 * (1 + math.cos(math.pi * 199 / 200))}),
])
def test_learning_rates_of_the_recipes(schedule, epochs, expected):
    found = {epoch: SCHEDULES[schedule]((epoch - 1) / epochs, epochs) for epoch in expected}
    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("schedule", ["exp-decay", "step", "cosine"])
@pytest.mark.parametrize("epochs", [5, 10, 37, 1000])
def test_learning_rates_fall_from_one_and_stay_above_zero(schedule, epochs):
    parts = 4 * epochs  # inside epochs, too
    found = [SCHEDULES[schedule](part / parts, epochs) for part in range(parts)]
    assert found[0] == 1 > found[-1] > 0 and found == sorted(found, reverse=True)


# ---------------------------------------------------------------------------------------------------- metrics


def test_three_metrics_by_hand():
    y, natural, adversarial = torch.tensor([[0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 2, 0]])
    assert common.three_metrics(y, natural, adversarial) == {
        "n": 6, "natural_accuracy": 4 / 6, "robust_accuracy": 2 / 6, "perturbation_stability": 4 / 6}


@pytest.mark.parametrize("n, batch_size, restarts", [(103, 10, 5), (103, 10, 1), (103, 103, 5), (5, 64, 9)])
def test_evaluation_is_that_of_all_restarts_on_all_images(monkeypatch, n, batch_size, restarts):
    """One pixel holds an image's number, one how often it was attacked; a table has the prediction then."""
    torch.manual_seed(n)
    outcome, y = torch.randint(0, 4, (restarts + 1, n)), torch.randint(0, 4, (n,))
    outcome = torch.where(torch.rand(restarts + 1, n) < 0.7, outcome[0], outcome)  # [0] is f(x)
    attacks, sizes = torch.zeros(n, dtype=torch.int64), set()

    def numbers(x, channel=0):
        return (x[:, channel, 0, 0] * 255).round().long()

    class Model(nn.Module):
        precision = "fp32"

        def forward(self, x):
            sizes.add(len(x))
            return F.one_hot(outcome[numbers(x, 1), numbers(x)], 4).float()

    def attacked(model, x, loss, attack):
        assert loss(100.0 * F.one_hot(y[numbers(x)], 4)) < 1e-6  # the labels are those of the images
        attacks[numbers(x).unique()] += 1
        x = x.clone()
        x[:, 1, 0, 0] = attacks[numbers(x)] / 255
        return x

    monkeypatch.setattr(common, "pgd", attacked)
    x = torch.zeros(n, 3, 1, 1, dtype=torch.uint8)
    x[:, 0, 0, 0] = torch.arange(n)
    attack = Attack(restarts=restarts)
    metrics, points = common.evaluate(Model(), common.padded_batches(x, y, batch_size), attack)
    first = (outcome != outcome[0]).int().argmax(0)  # the attack that changes the prediction, 0 if none does
    adversarial = outcome[first, torch.arange(n)]
    assert points["label"].equal(y) and points["natural"].equal(outcome[0])  # in the stream's order
    assert points["adversarial"].equal(adversarial)
    assert attacks.equal(torch.where(first > 0, first, restarts))  # and not attacked again
    assert metrics == {**common.three_metrics(y, outcome[0], adversarial), "attack": vars(attack)}
    rows = min(batch_size, n)  # few sizes, for compiled code: quarters of a batch, or one without restarts
    assert sizes <= {min(k * math.ceil(rows / 4), rows) for k in (1, 2, 3, 4)} and rows in sizes
    assert restarts > 1 or sizes == {rows}


def test_evaluation_leaves_the_random_stream_alone_and_repeats_itself():
    torch.manual_seed(0)
    model, x = common.build_model("wrn", 10, 1, 4), torch.randint(0, 256, (30, 3, 8, 8), dtype=torch.uint8)
    before, rng, found = state_of(model), torch.get_rng_state(), []
    for restarts in (1, 1, 4):
        attack = Attack(eps=0.1, step_size=0.05, steps=2, restarts=restarts)
        found.append(common.evaluate(model, common.padded_batches(x, torch.arange(30) % 4, 16), attack))
    assert rng.equal(torch.get_rng_state()) and state_of(model) == before and model.training
    assert found[0][0] == found[1][0] and found[0][1]["adversarial"].equal(found[1][1]["adversarial"])
    assert found[2][0]["perturbation_stability"] <= found[0][0]["perturbation_stability"]


def test_local_lipschitzness_is_a_tight_lower_bound_on_a_linear_network():
    torch.manual_seed(0)
    model = linear(12, 2)
    model.precision, weight = "fp32", model[1].weight.detach()
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=12)))
    largest = (signs @ weight.T).abs().sum(1).max().item()  # of ‖Wδ‖₁ over the corners ‖δ‖∞ = 1
    stream = common.padded_batches(torch.full((5, 3, 2, 2), 128, dtype=torch.uint8), torch.zeros(5), 3)
    found = common.local_lipschitzness(model, stream, Attack(eps=0.1, step_size=0.02, steps=20))
    assert 0.9 * largest < found <= largest * 1.001


# ------------------------------------------------------------------------------------------------- run folder


def run(*extra, script=ROOT / "train_trades.py", **options):
    """A script in a process of its own, as a user starts it."""
    command = [sys.executable, script, *map(str, extra)]
    return subprocess.run(command, capture_output=True, text=True, **options)


def start_and_stop(command, when, how, timeout=120):
    """Start a Python process, send it the signal `how` as soon as `when()` holds, and return it, finished."""
    process = subprocess.Popen([sys.executable, *map(str, command)], text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, cwd=ROOT)
    deadline = time.monotonic() + timeout
    while not when() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(how)
    process.out, process.err = process.communicate(timeout=timeout)
    return process


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def lines_of(path):
    return path.read_text().count("\n") if path.exists() else 0


def assert_same_runs(*folders):
    """Weights, optimizer, random numbers, log but for the times, and metrics, all equal to the last bit."""
    found = [{name: common.read_checkpoint(folder / name) for name in ("last.pt", "best.pt")}
             for folder in folders]
    for checkpoint in (checkpoint for pair in found for checkpoint in pair.values()):
        del checkpoint["args"]
    torch.testing.assert_close(*found, rtol=0, atol=0)
    logs = [common.read_log(folder / "log.jsonl") for folder in folders]
    for entry in itertools.chain(*logs):
        del entry["seconds"], entry["images_per_second"]
    assert logs[0] == logs[1]
    assert len({(folder / "metrics.json").read_bytes() for folder in folders}) == 1


def test_a_killed_run_resumes_to_the_very_weights_of_an_uninterrupted_one(tiny, write_npz, tmp_path, capsys):
    write_npz(n_train=320)
    tiny += ["--epochs", "4", "--test-size", "21"]
    whole, cut = tmp_path / "whole", tmp_path / "run"
    killed = start_and_stop([ROOT / "train_trades.py", *tiny], lambda: lines_of(cut / "log.jsonl") >= 2,
                            signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL and lines_of(cut / "log.jsonl") in (2, 3)
    with open(cut / "log.jsonl", "a") as file:
        file.write('{"epoch": 3, "lr"')  # as a kill in the middle of a write leaves it
    assert run(*tiny).returncode == run(*tiny, "--out", whole).returncode == 0
    assert_same_runs(whole, cut)
    assert lines_of(cut / "log.jsonl") == 4 and common.read_json(cut / "metrics.json")["last"]["n"] == 21

    before = contents(cut)
    train_trades.main(tiny)  # a finished run, repeated, prints its metrics and ends
    assert "natural" in capsys.readouterr().out.splitlines()[-1] and before == contents(cut)


def test_ctrl_c_keeps_the_last_finished_epoch(tiny, write_npz, tmp_path):
    write_npz(n_train=480)
    stopped = start_and_stop([ROOT / "train_trades.py", *tiny, "--epochs", "50"],
                             lambda: lines_of(tmp_path / "run" / "log.jsonl") >= 2, signal.SIGINT)
    assert stopped.returncode == 130 and "is kept" in stopped.err and stopped.err.count("\n") == 1
    assert common.read_checkpoint(tmp_path / "run" / "last.pt")["epoch"] >= 1


def train_linear(folder, leave=None):
    """Three epochs of a linear network; `leave`: how the second is given up, by break, continue or raise."""
    torch.manual_seed(1)
    model = linear(12, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    args = SimpleNamespace(out=str(folder), epochs=3, code={}, accept_changed_code=False)
    run = common.Run(args, model, optimizer, images=8)
    for epoch in run.epochs():
        for i in range(4):
            loss = F.cross_entropy(model(torch.rand(2, 3, 2, 2)), torch.randint(0, 3, (2,)))
            if i == 1:
                continue
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            run.record(2, natural_risk=loss)
            if leave and epoch == 2 and i == 2:
                break
        if leave == "raise" and epoch == 2:
            raise ZeroDivisionError
        if leave == "break" and epoch == 2:
            break
        if leave == "continue" and epoch > 1:
            continue
        run.end_epoch(lr=0.1, **dict.fromkeys(common.METRICS, (0.1, 0.3, 0.2)[epoch - 1]))
    if not leave:
        lipschitzness = {"local_lipschitzness": model[1].weight.norm().item()}
        run.finish(lambda: {**dict.fromkeys(common.METRICS, 0.5), **lipschitzness})


@pytest.mark.parametrize("leave", ["break", "continue", "raise"])
def test_a_loop_left_anywhere_resumes_to_the_same_weights(tmp_path, leave):
    whole, left = tmp_path / "whole", tmp_path / "left"
    train_linear(whole)
    with pytest.raises(ZeroDivisionError) if leave == "raise" else contextlib.nullcontext():
        train_linear(left, leave)
    assert common.read_checkpoint(left / "last.pt")["epoch"] == lines_of(left / "log.jsonl") == 1
    train_linear(left)
    assert_same_runs(whole, left)


class Disk:
    """Counts what a run does to files. Operation number `at` fails; with `kill`, so do all that follow it."""

    def __init__(self, patch, at=0, kill=False):
        self.count, self.at, self.kill = 0, at, kill
        patch.setattr(common, "open", self.open, raising=False)
        for owner, name in ((os, "fsync"), (os, "replace"), (Path, "unlink"), (Path, "mkdir")):
            patch.setattr(owner, name, self.counted(getattr(owner, name)))

    def step(self):
        self.count += 1
        if self.kill and self.count >= self.at > 0:
            raise SystemExit("killed")
        if self.count == self.at:
            raise OSError(28, "No space left on device")

    def counted(self, function):
        def wrapper(*args, **kwargs):
            self.step()
            return function(*args, **kwargs)
        return wrapper

    @contextlib.contextmanager
    def open(self, *args):
        self.step()
        with open(*args) as file:
            def write(content):
                file.write(content[:len(content) // 2])  # where the second half fails, the first is there
                self.step()
                file.write(content[len(content) // 2:])
            yield SimpleNamespace(write=write, flush=self.counted(file.flush), fileno=file.fileno)
        self.step()  # closing


@pytest.mark.parametrize("kill", [False, True])
def test_whichever_file_operation_fails_a_run_resumes_to_the_same_end(tmp_path, monkeypatch, capsys, kill):
    whole = tmp_path / "whole"
    monkeypatch.setattr(sys, "argv", ["train_linear.py"])
    with monkeypatch.context() as patch:
        disk = Disk(patch)
        train_linear(whole)
    assert disk.count > 60 and common.read_checkpoint(whole / "best.pt")["epoch"] == 2
    for at in range(1, disk.count + 1):
        folder = tmp_path / str(at)
        capsys.readouterr()
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
            Disk(patch, at, kill)
            common.launch(lambda argv: train_linear(folder))
        if not kill:  # one line and status 2
            error = capsys.readouterr().err
            assert ended.value.code == 2 and error.count("\n") == 1
            assert error.startswith("train_linear.py: error: ") and "No space left on device" in error
        train_linear(folder)
        assert_same_runs(whole, folder)
        assert set(contents(folder)) == {"args.json", "best.pt", "last.pt", "log.jsonl", "metrics.json"}, at


def test_a_run_in_use_by_another_process_is_left_alone_until_that_ends(tiny, tmp_path):
    folder, held, refused = tmp_path / "run", tmp_path / "held", []
    folder.mkdir()

    def try_to_start():
        if held.exists():
            refused.append(run(*tiny))
        return refused

    hold = "import sys, time, common; from pathlib import Path; common.lock(Path(sys.argv[1])); " \
           "Path(sys.argv[2]).touch(); time.sleep(1000)"
    killed = start_and_stop(["-c", hold, folder, held], try_to_start, signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL
    assert refused[0].returncode == 2 and refused[0].stderr.count("\n") == 1
    assert f"{folder} is in use by another process; choose another --out" in refused[0].stderr
    assert not contents(folder)
    train_trades.main([*tiny, "--epochs", "1"])  # the lock went with the process
    assert (folder / "metrics.json").exists()


def test_the_folder_holds_what_the_readme_promises(tiny, tmp_path):
    data, out = load("tiny", tmp_path), tmp_path / "run"
    chosen = data.test_subset(9)  # random, and the same in every run
    assert len(set(chosen.tolist())) == 9 and not chosen.equal(torch.arange(9))
    assert chosen.equal(data.test_subset(9)) and data.test_subset(None).equal(torch.arange(21))
    train_trades.main([*tiny, "--test-size", "9"])
    assert set(contents(out)) == {"args.json", "log.jsonl", "last.pt", "best.pt", "metrics.json"}
    assert set(common.read_log(out / "log.jsonl")[-1]) == {
        "epoch", "lr", "beta", "natural_risk", "robust_regularization", "lipschitz", "n", "attack", "seconds",
        "images_per_second", "natural_accuracy", "robust_accuracy", "perturbation_stability", "monitored"}
    checkpoint = torch.load(out / "last.pt", weights_only=True)
    args = checkpoint["args"]
    assert checkpoint["epoch"] == 2 and args["method"] == "trades" and args["width"] == 1
    for name, metrics in common.read_json(out / "metrics.json").items():
        assert metrics["n"] == 9 and metrics["attack"]["steps"] == 20
        assert metrics["attack"]["step_size"] == 0.003 and metrics["local_lipschitzness"] > 0
        natural, robust, stability = (metrics[key] for key in common.METRICS)
        assert robust <= min(natural, stability)
        model = common.build_model("wrn", 10, 1, data.classes)
        common.load_weights(model, common.read_checkpoint(out / f"{name}.pt")["model"], f"{name}.pt")
        right = common.predict(model, common.to_float(data.x_test[chosen])) == data.y_test[chosen]
        assert natural == pytest.approx(right.float().mean().item())


def test_best_is_the_epoch_of_highest_monitored_robust_accuracy(tiny, tmp_path, monkeypatch):
    robust, tested = iter([0.1, 0.4, 0.3, 0.4, 0.2, 0.35]), []

    def evaluate(model, *_):
        tested.append(model.fc.bias.clone())
        return {**dict.fromkeys(common.METRICS, 0.5), "robust_accuracy": next(robust)}, {}
    monkeypatch.setattr(common, "evaluate", evaluate)
    train_trades.main([*tiny, "--epochs", "4"])
    metrics = common.read_json(tmp_path / "run" / "metrics.json")
    for name, epoch, accuracy, weights in (("last", 4, 0.2, tested[4]), ("best", 2, 0.35, tested[5])):
        checkpoint = common.read_checkpoint(tmp_path / "run" / f"{name}.pt")
        assert checkpoint["epoch"] == metrics[name]["epoch"] == epoch
        assert metrics[name]["robust_accuracy"] == accuracy and checkpoint["model"]["fc.bias"].equal(weights)


def test_a_run_is_named_after_every_setting_that_is_not_the_default():
    def started(*argv):
        parser = common.training_parser(train_trades.__file__, "")
        return common.start(parser, [*argv, "--device", "cpu"])[0]
    assert started().out == "runs/trades-cifar10-wrn34-10-beta6-seed1"
    args = started(*"--beta 12 --epochs 5 --eps 8/255 --step-size 0.007 --data-dir x".split())
    assert args.out == "runs/trades-cifar10-wrn34-10-beta12-seed1-epochs5-eps0.03137"
    assert started("--arch", "densenet", "--width", "4").out == "runs/trades-cifar10-densenet34-4-beta6-seed1"
    assert args.eps == 8 / 255 and args.step_size == 0.007  # ratios and decimals


def test_a_run_does_not_go_on_with_other_code_unless_told_to(tiny, tmp_path):
    script, shared = (Path(shutil.copy(ROOT / name, tmp_path)) for name in ("train_trades.py", "common.py"))

    def edited(path, old, new, *flags):
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new, 1))
        return run(*tiny, "--epochs", "1", *flags, script=script, cwd=tmp_path)

    assert edited(script, "", "").returncode == 0
    shared.write_text(shared.read_text() + "\n# a comment\n")
    assert "1 of 1 epochs done" in edited(script, '"""TRADES', '"""Words in the docstring. TRADES').stdout
    before = contents(tmp_path / "run")
    refused = edited(script, "natural_risk + beta *", "natural_risk + 2 * beta *")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert before == contents(tmp_path / "run")
    assert "train_trades.py changed since; choose another --out, or --accept-changed-code" in refused.stderr
    accepted = edited(shared, "0.001 * drawn", "0.002 * drawn", "--accept-changed-code")
    assert accepted.returncode == 0 and "1 of 1 epochs done" in accepted.stdout
    assert common.read_json(tmp_path / "run" / "args.json")["code"] == {
        path.name: common.fingerprint(path) for path in (script, shared)}  # the run's code from now on
    option = '    parser.add_argument("--extra-data",'  # one more is part of an accepted change
    mine = option.replace("extra-data", "mine").replace('",', '", default=1)\n')
    assert "changed since" in edited(script, option, mine + option).stderr
    assert edited(script, "", "", "--accept-changed-code").returncode == 0
    tiny[-2:], script = [], script.rename(tmp_path / "train_mine.py")
    assert edited(script, "", "").returncode == 0
    folder, = (tmp_path / "runs").iterdir()  # another script is another method
    assert folder.name.startswith("mine-tiny-") and common.read_json(folder / "args.json")["method"] == "mine"


# --------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize("argv, message", {
    "--no-such-flag": "unrecognized arguments", "--epochs 0": "must be at least 1",
    "--eps 1/0": "must be a number", "--eps two": "invalid number value", "--eps nan": "must be a number",
    "--lr 0": "above 0", "--beta -1": "at least 0", "--schedule linear": "invalid choice",
    "--depth 35": r"6n \+ 4", "--dataset absent": "absent.npz is missing",
    "--device abacus": "no such device", "--device cuda": "no such device",
    "--device meta": "cpu and cuda are supported", f"--seed {2 ** 64}": r"below 2\^63"}.items())
def test_mistakes_are_named(tiny, tmp_path, argv, message):
    with pytest.raises(UserError, match=message):
        train_trades.main([*tiny, *argv.split()])
    assert not (tmp_path / "run").exists()


def test_a_folder_with_another_run_is_left_alone(tiny, tmp_path):
    train_trades.main([*tiny, "--epochs", "1"])
    before = contents(tmp_path / "run")
    with pytest.raises(UserError, match=r"settings \(--beta 6.0 there, 12.0 here; --seed 1 there, 2 here\)"):
        train_trades.main([*tiny, "--epochs", "1", "--beta", "12", "--seed", "2"])
    assert before == contents(tmp_path / "run")


HARM = Harmful(os.system, "touch harm")
NO_CHECKPOINTS = {
    "empty": (b"", "it is empty"),
    "page": (b"\n<!DOCTYPE html><html>Not found</html>", "it is a web page; download the file itself"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "it is a Git LFS pointer"),
    "text": (b"some text", "it is cut short, or another kind of file"),
    "pickle": (pickle.dumps(HARM, 2), "asks for posix.system, which could run code"),
    "newer pickle": (pickle.dumps(HARM, 5), "asks for posix.system, which could run code"),
    "saved": (HARM, "asks for posix.system, which could run code"),
    "module": (linear(4, 2), "asks for torch.nn.modules.container.Sequential, which could run code"),
}


@pytest.mark.parametrize("case", NO_CHECKPOINTS)
def test_what_is_no_checkpoint_is_named_in_one_line(tmp_path, monkeypatch, capfd, recwarn, case):
    monkeypatch.chdir(tmp_path)
    content, message = NO_CHECKPOINTS[case]
    if isinstance(content, bytes):
        Path("some.pt").write_bytes(content)
    else:
        torch.save({"model": content}, "some.pt")
    with pytest.raises(UserError) as caught:
        common.read_checkpoint("some.pt")
    assert str(caught.value).startswith("some.pt cannot be read as a checkpoint of tensors: ")
    assert message in str(caught.value) and not re.search("\n|weights_only|torch.load", str(caught.value))
    assert not recwarn and capfd.readouterr() == ("", "") and os.listdir() == ["some.pt"]
    with pytest.raises(UserError, match="absent.pt: no such checkpoint"):
        common.read_checkpoint("absent.pt")


@pytest.mark.parametrize("call, message", [
    (7, "natural risk not finite at epoch 2, step 3; epoch 1 is kept"),
    (8, "weights not finite after epoch 2; epoch 1 is kept")])  # no loss is computed with these any more
def test_what_diverges_is_named_and_the_last_checkpoint_stays(tiny, tmp_path, monkeypatch, call, message):
    genuine, calls = train_trades.trades_loss, []

    def diverging(*args):
        loss, natural_risk, robust_regularization = genuine(*args)
        calls.append(1)
        if len(calls) == call == 7:
            natural_risk = natural_risk * math.nan
        if len(calls) == call == 8:
            loss = loss * math.inf
        return loss, natural_risk, robust_regularization
    monkeypatch.setattr(train_trades, "trades_loss", diverging)
    with pytest.raises(UserError, match=message):
        train_trades.main(tiny)
    checkpoint = common.read_checkpoint(tmp_path / "run" / "last.pt")
    assert checkpoint["epoch"] == 1 and all(value.isfinite().all() for value in checkpoint["model"].values())


def test_a_spoilt_run_folder_is_named(tiny, tmp_path):
    out, argv = tmp_path / "run", [*tiny, "--epochs", "1"]
    train_trades.main(argv)
    whole = contents(out)
    for name, content, *more in (("args.json", b"[]"), ("args.json", b"[]", "--precision", "auto"),
                                 ("log.jsonl", b"{\n"), ("metrics.json", b"{}"), ("last.pt", b""),
                                 ("last.pt", whole["last.pt"][:1000])):
        (out / name).write_bytes(content)
        with pytest.raises(UserError, match="run"):
            train_trades.main([*argv, *more])
        (out / name).write_bytes(whole[name])
    (out / "last.pt").unlink()
    with pytest.raises(UserError, match="finished run without its last.pt"):
        train_trades.main(argv)


def test_a_run_that_finished_no_epoch_may_start_over_with_other_settings(tiny, tmp_path):
    out, argv = tmp_path / "run", [*tiny, "--epochs", "1"]
    train_trades.main(argv)
    for name in ("last.pt", "best.pt", "metrics.json"):
        (out / name).unlink()
    train_trades.main([*argv, "--eps", "0"])  # an attack of no size is an attack
    assert lines_of(out / "log.jsonl") == 1
    metrics = common.read_json(out / "metrics.json")["last"]
    assert metrics["perturbation_stability"] == 1 and metrics["local_lipschitzness"] == 0


# --------------------------------------------------------------------------------- what a width study needs


def test_held_out_images_are_others_and_leave_the_training_subset_as_it_was(tmp_path):
    arrays = common.synthetic(n_train=60, n_test=5)
    arrays["x_train"][:, 0, 0, 0] = np.arange(60)  # numbers the images
    np.savez(tmp_path / "toy.npz", **arrays)

    def numbers(x):
        return x[:, 0, 0, 0].tolist()

    plain, held = (common.load_data("toy", tmp_path, "cpu", 40, seed=3, val_size=n) for n in (0, 15))
    assert plain.x_val is None and numbers(held.x_train) == numbers(plain.x_train)
    assert len(held.x_val) == 15 and not {*numbers(held.x_val)} & {*numbers(held.x_train)}
    rest = common.load_data("toy", tmp_path, "cpu", seed=3, val_size=15)
    assert sorted(numbers(rest.x_train) + numbers(rest.x_val)) == list(range(60))
    assert numbers(rest.x_val) == numbers(held.x_val)
    assert (held.y_val.numpy() == arrays["y_train"][numbers(held.x_val)]).all()
    with pytest.raises(UserError, match="--train-size 50 and --val-size 15: .* has 60 training images"):
        common.load_data("toy", tmp_path, "cpu", 50, val_size=15)


@pytest.mark.parametrize("val_size, chosen_on", [(24, "validation"), (0, "test")])
def test_the_monitor_says_what_it_looks_at(tiny, tmp_path, monkeypatch, val_size, chosen_on):
    seen, evaluate = [], common.evaluate
    monkeypatch.setattr(common, "evaluate", lambda *a, **k: seen.append(evaluate(*a, **k)) or seen[-1])
    train_trades.main([*tiny, "--epochs", "1", "--val-size", str(val_size)])
    line, = common.read_log(tmp_path / "run" / "log.jsonl")
    assert line["monitored"] == chosen_on and line["n"] == len(seen[0][1]["label"]) == (val_size or 8)
    assert common.read_json(tmp_path / "run" / "metrics.json")["best"]["best_chosen_on"] == chosen_on


def test_the_average_of_the_weights_by_hand():
    network = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double()
    args = SimpleNamespace(ema=0.6, epochs=10, batch_size=5)
    data = SimpleNamespace(x_train=torch.zeros(40, 1))
    average = common.WeightAverage(network, args, data)  # 80 steps: 2 of warm-up
    expected = None
    for step in range(20):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter))
            network[1].running_mean.add_(1)
        weight = network[0].weight.detach().clone()
        decay = 0 if step < 2 else min(0.6, (step - 1) / (step + 8))
        expected = weight if step == 0 else decay * expected + (1 - decay) * weight
        average.update()
        assert torch.allclose(average.model[0].weight, expected, rtol=0, atol=1e-14)
        assert torch.equal(average.model[1].running_mean, network[1].running_mean)
    assert not torch.allclose(expected, weight)
    args.ema = None
    assert common.WeightAverage(network, args, data).model is network


@pytest.mark.parametrize("epochs", [30, 41, 100, 400])
def test_one_cycle_is_that_of_pytorch(epochs):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.2)
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=epochs, pct_start=0.025)
    for epoch in range(epochs):
        ours = 0.2 * common.SCHEDULES["one-cycle"](epoch / epochs, epochs)
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()
        if epoch + 1 < epochs:
            theirs.step()


def test_norms_can_be_free_of_weight_decay():
    model = common.build_model("wrn", 10, 1, 10)
    everything, = common.sgd(model, 0.1, 5e-4).param_groups
    assert everything["params"] == list(model.parameters()) and everything["weight_decay"] == 5e-4
    decayed, free = common.sgd(model, 0.1, 5e-4, nesterov=True, decay_norms=False).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert free["weight_decay"] == 0 and decayed["weight_decay"] == 5e-4 and decayed["nesterov"]
    assert {".bn" in "." + names[id(p)] for p in free["params"]} == {True}
    assert not any(".bn" in "." + names[id(p)] for p in decayed["params"])
    assert len(free["params"]) + len(decayed["params"]) == len(names)


@pytest.mark.parametrize("arch, depth, width", [("wrn", 10, 1), ("densenet", 10, 4)])
def test_silu_takes_the_place_of_every_relu(monkeypatch, arch, depth, width):
    x = torch.rand(2, 3, 16, 16)
    torch.manual_seed(0)
    smooth = common.build_model(arch, depth, width, 10, "silu").eval()
    torch.manual_seed(0)
    monkeypatch.setitem(common.ACTIVATIONS, "relu", lambda z: z * torch.sigmoid(z))  # SiLU by its definition
    by_definition = common.build_model(arch, depth, width, 10).eval()
    monkeypatch.setattr(F, "relu", None)  # nothing calls it behind the table's back
    assert torch.allclose(smooth(x), by_definition(x), atol=1e-5)


def test_a_run_starts_from_given_weights(tiny, tmp_path):
    flags = [*tiny, "--epochs", "1", "--lr", "1e-30", "--weight-decay", "0"]
    train_trades.main([*flags, "--out", str(tmp_path / "first")])
    torch.save({"state_dict": {"module." + key: value for key, value in
                               common.read_checkpoint(tmp_path / "first" / "last.pt")["model"].items()}},
               tmp_path / "published.pt")
    train_trades.main([*flags, "--seed", "2", "--init", str(tmp_path / "published.pt"),
                   "--out", str(tmp_path / "second")])
    first, second = (common.read_checkpoint(tmp_path / name / "last.pt") for name in ("first", "second"))
    assert torch.equal(first["model"]["fc.weight"], second["model"]["fc.weight"])
    with pytest.raises(UserError, match="published.pt holds another network"):
        train_trades.main([*flags, "--width", "2", "--init", str(tmp_path / "published.pt"),
                       "--out", str(tmp_path / "third")])


# ----------------------------------------------------------------------------- width-adjusted regularization


@pytest.mark.parametrize("answer, inertia", [(0.7, 0.0), (1.34, 0.0), (1.34, 0.6), (1.8, 0.0)])
def test_lambda_is_brought_to_the_reference_ratio_and_stays(answer, inertia):
    """A run whose ratio follows c·λ^answer, at once or with a lag: c half of what the reference has."""
    reference = [{"beta": 6.0, "natural_risk": 1 + 2 ** (e / 50), "robust_regularization": 0.02}
                 for e in range(100)]
    log, level = [], None
    for line in reference:
        beta = common.adjusted_beta(log, reference)
        aim = math.log(0.5 * line["natural_risk"] / 0.02 * (beta / 6) ** answer)
        level = aim if level is None else inertia * level + (1 - inertia) * aim
        log.append({"beta": beta, "natural_risk": math.exp(level), "robust_regularization": 1.0})
    found = [a["natural_risk"] * 0.02 / b["natural_risk"] for a, b in zip(log, reference)]
    assert found[0] == pytest.approx(0.5) and all(abs(x - 1) < 0.1 for x in found[33:])
    assert log[-1]["beta"] == pytest.approx(6 * 2 ** (1 / answer), rel=0.1)


def test_lambda_stays_between_the_references_and_ten_times_that():
    reference = [{"beta": 6.0, "natural_risk": 1.0, "robust_regularization": 0.01}] * 9
    for risk, beta in ((1e-3, 60.0), (1e3, 6.0), (0.0, 6.0)):  # without a risk there is no ratio: λ stays
        log = []
        for _ in range(8):
            log.append({"beta": common.adjusted_beta(log, reference), "natural_risk": risk,
                        "robust_regularization": 0.01})
        assert log[0]["beta"] == 6.0 and log[-1]["beta"] == beta

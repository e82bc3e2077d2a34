"""common.py: data, networks, execution, attacks, schedules, metrics and the run folder's promises."""
import contextlib
import io
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
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import log_of, started, train_until_killed

import common
import train_trades
from common import Attack, UserError

ROOT = Path(common.__file__).parent
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def warnings_anew():
    """A warning is printed once; in each test anew."""
    common.warn.cache_clear()


def load(name, folder, **subset):
    return common.load_data(name, folder, CPU, **subset)


def network(arch="wrn", depth=10, width=1, classes=10, activation="relu"):
    return common.NETWORKS[arch](depth, width, classes, activation)


# ------------------------------------------------------------------------------------------------------- data

def test_npz_is_read_as_stored(tmp_path, write_npz):
    stored, data = np.load(write_npz(y_test=np.full((21, 1), 9, np.uint8))), load("tiny", tmp_path)
    assert data.classes == 10 and data.x_train.dtype == torch.uint8 and len(data) == 64
    assert (data.x_train.permute(0, 2, 3, 1).numpy() == stored["x_train"]).all()
    assert (data.y_train.numpy() == stored["y_train"]).all()
    assert data.y_test.tolist() == [9] * 21  # Keras stores a column


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 1)])
def test_gray_images_become_three_equal_channels(tmp_path, write_npz, shape):
    gray = np.random.default_rng(0).integers(0, 256, (64, *shape), np.uint8)
    write_npz(x_train=gray, x_test=gray[:21])
    data = load("tiny", tmp_path)
    assert data.x_train.shape == (64, 3, 8, 8)
    assert all((data.x_train[:, channel].numpy() == gray.reshape(64, 8, 8)).all() for channel in range(3))


def test_the_hash_is_that_of_all_that_the_files_hold(tmp_path, write_npz):
    write_npz()
    whole, part = load("tiny", tmp_path), load("tiny", tmp_path, train_size=20, val_size=8)
    assert whole.hash == part.hash
    for changed in ({"n_test": 20}, {"y_train": np.arange(64)[::-1] % 10}, {"size": 9}):
        write_npz(**changed)
        assert load("tiny", tmp_path).hash != whole.hash


@pytest.mark.parametrize("name, changes, message", [
    ("tiny", {"x_test": None}, "x_test"),
    ("tiny", {"x_train": np.zeros((64, 8, 8, 3), np.float32)}, "x_train must be pixels .* not float32"),
    ("tiny", {"x_train": np.zeros((64, 3, 8, 8), np.uint8)}, r"\[N, H, W, 3\]"),
    ("tiny", {"x_train": np.eye(64, 64, dtype=np.uint8).reshape(64, 8, 8)}, "up to 1$"),
    ("tiny", {"y_train": np.zeros(63, np.int64)}, "64 integers"),
    ("tiny", {"y_test": np.full(21, 0.5)}, "21 integers"),
    ("tiny", {"y_test": np.full(21, 10)}, r"labels must be 0\.\.9, .* fails for 10"),
    ("tiny", {"y_train": np.arange(64) % 10 - 1}, r"labels must be 0\.\.9, .* fails for 9, -1"),
    ("tiny", {"y_train": np.arange(64) % 10 + 1, "y_test": np.arange(21) % 10 + 1}, "fails for 0, 10$"),
    ("cifar10", {"y_train": np.where(np.arange(64) % 10 == 7, 6, np.arange(64) % 10)}, "fails for 7, 9$"),
    ("tiny", {"x_test": np.full((21, 16, 16, 3), 9, np.uint8)}, "differ in size"),
])
def test_malformed_npz_is_refused(tmp_path, write_npz, name, changes, message):
    write_npz(name, **changes)
    with pytest.raises(UserError, match=message):
        load(name, tmp_path)


def test_truncated_and_missing_files_are_named(tmp_path, write_npz):
    path = write_npz()
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(UserError, match="tiny.npz cannot be read"):
        load("tiny", tmp_path)
    with pytest.raises(UserError, match="absent.npz is missing"):
        load("absent", tmp_path)


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


def tiny_data(n, size=8, classes=10):
    x = (torch.arange(n) % 256).to(torch.uint8).view(n, 1, 1, 1).expand(n, 3, size, size)
    return common.Data(x, torch.arange(n), x, torch.arange(n), classes, "")


@pytest.mark.parametrize("size, padding", [(8, 1), (12, 2), (32, 4)])  # an eighth of the side, rounded up
@pytest.mark.parametrize("flip", [True, False])
def test_random_augmentation_draws_every_offset_and_flip_for_each_image(size, padding, flip):
    row, column, reach, n = size // 2, size - 2 - padding, range(-padding, padding + 1), 5000
    image = torch.zeros(1, 3, size, size, dtype=torch.uint8)
    image[:, :, row, column] = 255  # one bright pixel shows where it all went
    torch.manual_seed(0)
    data = common.Data(image.expand(n, 3, size, size), torch.arange(n), None, None, 10, "")
    (x, _), = common.batches(data, n, flip)
    found, counts = x[:, 0].nonzero()[:, 1:].unique(dim=0, return_counts=True)
    columns = [column] + [size - 1 - column] * flip
    assert {*map(tuple, found.tolist())} == {(row + i, c + j) for i in reach for j in reach for c in columns}
    assert counts.sum() == n and 0.2 < counts.min() / counts.float().mean() < 1  # about equally often


def test_an_epoch_is_a_fresh_seeded_order_without_repeats():
    data = tiny_data(100)
    torch.manual_seed(3)
    epochs = [torch.cat([labels for _, labels in common.batches(data, 32)]) for _ in range(2)]
    torch.manual_seed(3)
    again = torch.cat([labels for _, labels in common.batches(data, 32)])
    assert len(epochs[0]) == 96 == len(set(epochs[0].tolist())) and not epochs[0].equal(epochs[1])
    assert again.equal(epochs[0])
    for x, y in common.batches(data, 128):  # fewer images than a batch
        assert sorted(y.tolist()) == list(range(100))
        assert (255 * x).amax((1, 2, 3)).round().equal(y.float())  # labels stay with their images


@pytest.mark.parametrize("fraction, share", [(0, 0), (0.25, 4), (0.5, 8), (1, 16)])
def test_an_epoch_with_extra_images_draws_both_without_replacement(fraction, share):
    extra = torch.full((100, 3, 8, 8), 255, dtype=torch.uint8), torch.arange(100, 200)

    def with_extra(images, labels):
        data = tiny_data(64)
        data.x_train, data.y_train = torch.cat([data.x_train, images]), torch.cat([data.y_train, labels])
        data.extra = len(images)
        return data
    stream = list(common.batches(with_extra(*extra), 16, True, fraction))
    assert len(stream) == 4  # 64 images in all, as the labelled set has
    for x, y in stream:
        assert len(y) == 16 and (y >= 100).sum() == share
        assert ((255 * x).amax((1, 2, 3)).round() == torch.where(y < 100, y, 255)).all()
    drawn = torch.cat([y for _, y in stream]).tolist()
    assert len(drawn) == len(set(drawn))
    few = extra[0][:10], extra[1][:10]  # come again once all have come
    drawn = torch.cat([y for _, y in common.batches(with_extra(*few), 16, True, 1)])
    assert sorted(drawn.unique(return_counts=True)[1].tolist()) == [6] * 6 + [7] * 4


def test_pixels_equal_torchvisions_to_tensor():
    from torchvision.transforms.functional import to_tensor
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert common.to_float(torch.from_numpy(image).permute(2, 0, 1)[None])[0].equal(to_tensor(image))


def test_subsets_are_seeded_and_held_out_images_are_others(tmp_path, write_npz):
    x = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3), np.uint8)
    x[:, 0, 0, 0] = np.arange(60)  # numbers the images
    write_npz(x_train=x, y_train=np.arange(60) % 10)

    def numbers(x):
        return x[:, 0, 0, 0].tolist()

    plain, held = (load("tiny", tmp_path, train_size=40, seed=3, val_size=n) for n in (0, 15))
    assert len(plain) == 40 and len(plain.x_val) == 0 and numbers(held.x_train) == numbers(plain.x_train)
    assert numbers(load("tiny", tmp_path, train_size=40, seed=4).x_train) != numbers(plain.x_train)
    assert len(held.x_val) == 15 and not {*numbers(held.x_val)} & {*numbers(held.x_train)}
    rest = load("tiny", tmp_path, seed=3, val_size=15)
    assert sorted(numbers(rest.x_train) + numbers(rest.x_val)) == list(range(60))
    assert numbers(rest.x_val) == numbers(held.x_val)
    assert held.y_val.tolist() == [i % 10 for i in numbers(held.x_val)]
    with pytest.raises(UserError, match="--train-size 50 and --val-size 15: .* has 60 training images"):
        load("tiny", tmp_path, train_size=50, val_size=15)


def test_every_class_must_be_among_the_images_trained_on(tmp_path, write_npz):
    write_npz(y_train=np.array([0] * 60 + [1, 2, 3, 4]), y_test=np.zeros(21, int))
    assert {*load("tiny", tmp_path, train_size=64).y_train.tolist()} == {0, 1, 2, 3, 4}
    with pytest.raises(UserError, match="10 training images are kept, and none is of class .*--train-size"):
        load("tiny", tmp_path, train_size=10)


# --------------------------------------------------------------------------------------------------- networks

@pytest.mark.parametrize("arch, depth, width, parameters", [
    ("wrn", 34, 1, 466_714), ("wrn", 34, 10, 46_160_474), ("wrn", 28, 10, 36_479_194),
    ("densenet", 40, 12, 176_122), ("densenet", 40, 40, 1_901_930), ("preact", 18, 1, 11_172_170)])
def test_parameter_counts(arch, depth, width, parameters):
    with torch.device("meta"):
        model = network(arch, depth, width)
    assert sum(p.numel() for p in model.parameters()) == parameters


def reference(arch, state, x, blocks):
    """The published networks' forward passes, written from their parameter names alone."""
    def conv(name, x, **settings):
        return F.conv2d(x, state[name + ".weight"], **settings)

    def bn_relu(name, x):
        parts = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(x, *(state[f"{name}.{part}"] for part in parts)).relu()

    wrn = "block{}.layer.{}.", "convShortcut"
    stages, shortcut = ("layer{}.{}.", "shortcut.0") if arch == "preact" else wrn
    last, classifier = ("bn", "linear") if arch == "preact" else ("bn1", "fc")
    x = conv("conv1", x, padding=1)
    for stage, block in itertools.product((1, 2, 3, 4) if arch == "preact" else (1, 2, 3), range(blocks)):
        name, trans = stages.format(stage, block), f"trans{stage}."
        out = bn_relu(name + "bn1", x)
        if arch != "densenet":
            stride = 2 if stage > 1 and block == 0 else 1
            if f"{name}{shortcut}.weight" in state:
                x = conv(name + shortcut, out, stride=stride)
            out = bn_relu(name + "bn2", conv(name + "conv1", out, stride=stride, padding=1))
            x = x + conv(name + "conv2", out, padding=1)
        else:
            out = bn_relu(name + "bn2", conv(name + "conv1", out))
            x = torch.cat([x, conv(name + "conv2", out, padding=1)], 1)
            if stage < 3 and block == blocks - 1:
                x = F.avg_pool2d(conv(trans + "conv1", bn_relu(trans + "bn1", x)), 2)
    x = bn_relu(last, x).mean((2, 3))
    return F.linear(x, state[classifier + ".weight"], state[classifier + ".bias"])


@pytest.mark.parametrize("arch, depth, width", [
    ("wrn", 16, 2), ("densenet", 16, 6), ("preact", 18, 0.25), ("wrn", 10, 0.5), ("preact", 10, 0.125)])
def test_networks_are_the_published_ones(arch, depth, width):
    """And no 1×1 convolution of few channels is strided: oneDNN's issue 6035 corrupts memory."""
    torch.manual_seed(0)
    model, x = network(arch, depth, width).double().eval(), torch.rand(3, 3, 32, 32).double()
    for value in model.state_dict().values():
        if value.dim() == 1:  # BatchNorm's, all of them
            value.uniform_(0.5, 1.5)
    wanted = reference(arch, model.state_dict(), x, 1 if depth == 10 else 2)
    torch.testing.assert_close(model(x), wanted, atol=1e-12, rtol=1e-12)
    assert all(m.stride == (1, 1) for m in model.modules()
               if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1) and m.in_channels < 16)


def test_a_checkpoint_of_another_network_or_not_finite_is_refused():
    model, itself = network(), {}
    itself["model"] = itself
    others = [network(*other).state_dict() for other in (
        ("wrn", 10, 2), ("wrn", 16, 1), ("densenet", 10, 12), ("preact", 10, 0.25), ("wrn", 10, 1, 100))]
    for other in [*others, {}, [], itself, {"model": 3}, {**model.state_dict(), "conv1.weight": "text"},
                  {**model.state_dict(), "mean": torch.zeros(3)}]:
        with pytest.raises(UserError, match="other.pt holds"):
            common.load_weights(model, other, "other.pt")
    model.bn1.running_var[-1] = -math.inf
    with pytest.raises(UserError, match="bad.pt: bn1.running_var is not finite"):
        common.load_weights(network(), model.state_dict(), "bad.pt")
    with pytest.raises(UserError, match="6n \\+ 4"):
        network("wrn", 35)
    with pytest.raises(UserError, match="18 layers"):
        network("preact", 34)


@pytest.mark.parametrize("arch, depth, width", [("wrn", 10, 1), ("densenet", 10, 4), ("preact", 10, 0.125)])
def test_silu_takes_the_place_of_every_relu(monkeypatch, arch, depth, width):
    x = torch.rand(2, 3, 16, 16).double()
    smooth = network(arch, depth, width, 10, "silu").double().eval()
    monkeypatch.setitem(common.ACTIVATIONS, "mine", lambda z: z * torch.sigmoid(z))  # SiLU by its definition
    by_definition = network(arch, depth, width, 10, "mine").double().eval()
    by_definition.load_state_dict(smooth.state_dict())
    monkeypatch.setattr(F, "relu", None)  # nothing calls it behind the table's back
    torch.testing.assert_close(smooth(x), by_definition(x), atol=1e-12, rtol=1e-12)


def test_another_activation_than_the_checkpoints_is_refused():
    saved = {"model": network(activation="silu").state_dict(), "args": {"method": "at", "activation": "silu"}}
    common.load_weights(network(activation="silu"), saved, "silu.pt")
    with pytest.raises(UserError, match="silu.pt is of a network whose activation is silu"):
        common.load_weights(network(), saved, "silu.pt")


def test_of_several_networks_in_a_file_one_is_said_or_chosen(capsys):
    raw, average = ({"conv1.weight": torch.full((1,), value), "fc.weight": torch.zeros(1)}
                    for value in (1.0, 2.0))
    saved = {"model": raw, "model_ema": {f"module.{name}": value for name, value in average.items()},
             "optimizer": {"state": {0: {"momentum_buffer": torch.ones(2, 2)}}}}
    own, _ = common.parameters_of(saved, "both.pt")
    said = "both.pt holds model, model_ema: the weights 'model' are taken"
    assert own["conv1.weight"] == 1 and said in capsys.readouterr().out
    own, _ = common.parameters_of(saved, "both.pt", "model_ema")
    assert own["conv1.weight"] == 2 and not capsys.readouterr().out
    with pytest.raises(UserError, match="both.pt holds no weights swa, but model, model_ema"):
        common.parameters_of(saved, "both.pt", "swa")
    with pytest.raises(UserError, match="a.pt holds no weights, but list"):
        common.parameters_of([1], "a.pt")


def test_norms_can_be_free_of_weight_decay():
    model = network()
    everything, = common.sgd(model, 0.1, 5e-4).param_groups
    assert everything["params"] == list(model.parameters()) and everything["weight_decay"] == 5e-4
    decayed, free = common.sgd(model, 0.1, 5e-4, nesterov=True, decay_norms=False).param_groups
    norms = {p for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
    assert free["weight_decay"] == 0 and decayed["weight_decay"] == 5e-4 and decayed["nesterov"]
    assert {*free["params"]} == norms and {*decayed["params"]} == {*model.parameters()} - norms


def test_a_run_starts_from_given_weights_of_other_classes_too(tiny, tmp_path, write_npz, capsys):
    flags = [*tiny, "--epochs", "1", "--lr", "1e-30", "--weight-decay", "0", "--seed", "2"]
    weights = network().state_dict()
    torch.save({"state_dict": {f"module.{key}": value for key, value in weights.items()}}, tmp_path / "a.pt")

    def trained(out, *more):
        train_trades.main([*flags, "--init", str(tmp_path / "a.pt"), "--out", str(tmp_path / out), *more])
        return common.read_checkpoint(tmp_path / out / "last.pt")["model"]

    for name, value in trained("first").items():
        assert ".running" in name or "num_batches" in name or value.allclose(weights[name], atol=1e-9)
    capsys.readouterr()
    write_npz(classes=7)
    other = trained("second")
    assert "a.pt has 10 classes, this data set 7: a new classifier" in capsys.readouterr().out
    assert other["fc.weight"].shape == (7, 64) and other["conv1.weight"].equal(weights["conv1.weight"])
    with pytest.raises(UserError, match="a.pt holds another network"):
        trained("third", "--width", "2")


def test_init_is_known_by_what_it_holds_and_a_run_goes_on_without_it(tiny, tmp_path):
    init, other = tmp_path / "init.pt", tmp_path / "other.pt"
    torch.save(network().state_dict(), init)
    train_trades.main([*tiny, "--init", str(init)])
    init.rename(other)
    train_trades.main([*tiny, "--init", str(init)])
    torch.save(network().state_dict(), init)
    with pytest.raises(UserError, match="holds another run .*init"):
        train_trades.main([*tiny, "--init", str(init)])
    train_trades.main([*tiny, "--init", str(other)])


# -------------------------------------------------------------------------------------------------- execution

def execute(model, precision="fp32", compile="off", images=None):
    args = SimpleNamespace(precision=precision, compile=compile)
    images = torch.zeros(8, 3, 32, 32, dtype=torch.uint8) if images is None else images
    common.set_execution(args, images, model)
    return args.precision


def test_bf16_keeps_logits_and_pixels_in_float32(capsys):
    class OnePixel(common.Network):
        def __init__(self):
            super().__init__()
            self.conv1, self.fc = nn.Identity(), nn.Linear(3, 1, bias=False)

        def features(self, x):
            return x

    model, third = OnePixel(), torch.tensor(1 / 3)
    nn.init.constant_(model.fc.weight, 1 + 2 ** -12)  # in bf16 1
    x = third.expand(2, 3, 1, 1)
    execute(model, "bf16")
    assert capsys.readouterr().out == "bf16 on cpu, eager\n"
    for inside in model, nn.Sequential(model):  # a wrapper, of a fork's
        rounded = 3 * (1 + 2 ** -12) * third.bfloat16().item()
        assert inside(x).dtype == torch.float32 and inside(x)[:, 0].tolist() == pytest.approx([rounded] * 2)
        with common.exact_precision(inside):
            assert inside(x)[:, 0].tolist() == pytest.approx([1 + 2 ** -12] * 2)
    assert model.precision == "bf16"


def test_a_module_that_knows_no_precision_runs_in_float32():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 10))
    assert execute(model, "auto") == "fp32"
    with pytest.raises(UserError, match="--precision bf16: Sequential knows fp32 alone"):
        execute(model, "bf16")


@pytest.mark.parametrize("slow, found", [("bf16", "fp32"), ("fp32", "bf16")])
def test_auto_takes_what_the_stopwatch_prefers(monkeypatch, slow, found):
    now = [0.0]
    monkeypatch.setattr(common, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    class Timed(common.WideResNet):
        def forward(self, x):
            now[0] += 1 + (self.precision == slow)
            return x.flatten(1) @ self.fc.weight.new_ones(x[0].numel(), 10)
    assert execute(Timed(10, 1, 10), "auto") == found


def test_the_precision_is_stored_and_kept_on_resume(tiny, tmp_path, monkeypatch, capsys):
    tiny = [*tiny, "--epochs", "1", "--precision", "auto"]

    def train(faster, *argv):
        monkeypatch.setattr(common, "bf16_is_faster", lambda *_: faster)
        train_trades.main([*tiny, *argv])
        return capsys.readouterr().out

    assert "bf16 on cpu" in train(True)
    assert common.read_json(tmp_path / "run" / "args.json")["precision"] == "auto"
    stored = common.read_checkpoint(tmp_path / "run" / "last.pt")
    assert stored["precision"] == "bf16" and stored["args"]["precision"] == "auto"
    again = train(False)  # the same command, where the other is faster now
    assert "bf16 on cpu" in again and "1 of 1 epochs done" in again
    assert "fp32 on cpu" in train(False, "--out", str(tmp_path / "other"))
    with pytest.raises(UserError, match="precision auto there, fp32 here"):
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
        x_adv, _ = common.pgd(model, x, loss, attack)
        torch.testing.assert_close(x_adv, (x + 0.2 * unit.view_as(x)).clamp(0, 1), atol=atol, rtol=0)


def state_of(model):
    """All that an attack must leave as it was, as numbers."""
    flags = [module.training for module in model.modules()], [p.requires_grad for p in model.parameters()]
    gradients = [p.grad if p.grad is None else p.grad.tolist() for p in model.parameters()]
    return flags, gradients, [tensor.tolist() for tensor in model.state_dict().values()]


def test_an_l2_step_is_as_long_where_the_gradient_is_tiny():
    x = torch.full((2, 3, 2, 2), 0.5)
    attack = Attack(norm="l2", eps=0.5, step_size=0.1, steps=1, start="none")
    x_adv, largest = common.pgd(linear(12, 3), x, lambda logits: 1e-30 * logits[:, 0].sum(), attack)
    assert ((x_adv - x).flatten(1).norm(dim=1) - 0.1).abs().max() < 1e-6 and 0 < largest.max() < 1e-28


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
        x_adv, norms = common.pgd(model, x, loss, attack)
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
    assert uniform.abs().max() <= 0.03 + 1e-6 and abs(uniform.std().item() - 0.03 / math.sqrt(3)) < 3e-4
    assert abs((common.perturb_start(x, "gaussian", 0.03, "linf") - x).std().item() - 0.001) < 3e-5
    radius = (common.perturb_start(x[:, :, :1, :1], "uniform", 0.5, "l2") - 0.5).flatten(1).norm(dim=1)
    assert radius.max() <= 0.5 and abs(((radius / 0.5) ** 3).mean().item() - 0.5) < 0.12  # uniform in 3-d


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
                          Attack(eps=0.1, step_size=0.05, steps=3))
    assert norms.tolist() == pytest.approx([3 * model[1].weight[0].abs().sum().item()] * 4)


@pytest.mark.parametrize("message, settings", [
    *(("too short", settings) for settings in (
        {"eps": 12 / 255}, {"steps": 10}, {"steps": 0}, {"norm": "l2", "eps": 2, "step_size": 0.05},
        {"eps": 8 / 255, "step_size": 1 / 255, "steps": 5, "start": "gaussian"})),
    *(("longer than ε", settings) for settings in (
        {"eps": 0.001}, {"norm": "l2", "eps": 0.5, "step_size": 0.6}, {"step_size": 0.07, "steps": 1},
        {"eps": 0.01, "step_size": 0.02, "steps": 1, "start": "none"})),
    *((None, settings) for settings in (
        {}, {"eps": 8 / 255}, {"eps": 0}, {"norm": "l2", "eps": 0.5, "step_size": 0.05},
        {"loss": "kl", "step_size": 0.007, "steps": 10, "start": "gaussian"}, {"step_size": 0.04, "steps": 1},
        {"loss": "autoattack", "steps": 0}, {"step_size": 0.031, "steps": 1, "start": "none"}))])
def test_an_attack_that_cannot_reach_across_its_ball_says_so(capsys, message, settings):
    attack = Attack(**settings)
    printed = capsys.readouterr().err
    assert printed.count("\n") == bool(message)
    assert not message or message in printed and attack.title() in printed


@pytest.mark.parametrize("norm, radii, usual, step_size", [
    ("linf", [0.001, 2 / 255, 0.031, 8 / 255, 12 / 255, 0.1, 0.5, 1], 8 / 255, 0.003),
    ("l2", [0.01, 0.25, 0.5, 1, 2, 7.5], 0.5, 0.2)])
def test_default_attacks_reach_across_any_ball(capsys, norm, radii, usual, step_size):
    for eps in radii:
        assert common.report_attack(eps, norm, 0.007).eps == common.report_attack(eps, norm).eps == eps
        published = step_size <= eps <= usual
        assert not published or common.report_attack(eps, norm).step_size == step_size
    assert capsys.readouterr().err == ""


def test_titles_show_radius_and_step():
    for attack, title in (
            (Attack("margin", step_size=2 / 255, restarts=5), "CW-20×5, ε = 0.031, step 2/255"),
            (Attack(norm="l2", eps=2, step_size=0.2), "PGD-20 l2, ε = 2, step 0.2"),
            (Attack(eps=4 / 255, step_size=5 / 255, steps=1), "FGSM, ε = 4/255, step 5/255"),
            (Attack("autoattack", norm="l2", eps=0.5), "AutoAttack l2, ε = 0.5")):
        assert attack.title() == title


# -------------------------------------------------------------------------------------------------- schedules

ALL = range(1, 101)


@pytest.mark.parametrize("schedule, epochs, expected", [
    ("exp-decay", 100, {e: 1 if e < 75 else 0.5 ** (e - 74) for e in ALL}),
    ("step", 100, {e: 1 if e < 75 else 0.1 if e < 90 else 0.01 if e < 100 else 0.001 for e in ALL}),
    ("cosine", 100, {e: 0.5 * (1 + math.cos(math.pi * (e - 1) / 100)) for e in ALL}),
    ("exp-decay", 200, {149: 1, 150: 0.5, 151: 0.5, 152: 0.25, 200: 0.5 ** 26}),
    ("exp-decay", 5, {3: 1, 4: 0.5, 5: 0.25}),
    ("exp-decay", 110, {82: 1, 83: 0.5, 99: 0.5 ** 16, 110: 0.5 ** 26}),  # 15 and 25 times 1.1 epochs
    ("step", 200, {149: 1, 150: 0.1, 180: 0.01}),
    ("cosine", 200, {1: 1, 101: 0.5, 200: 0.5 * (1 + math.cos(math.pi * 199 / 200))}),
])
def test_learning_rates_of_the_recipes(schedule, epochs, expected):
    found = {epoch: common.SCHEDULES[schedule](epoch, epochs) for epoch in expected}
    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("epochs", [30, 41, 100, 400])
def test_one_cycle_is_that_of_pytorch(epochs):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.2)
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=epochs, pct_start=0.025)
    for epoch in range(1, epochs + 1):
        ours = 0.2 * common.SCHEDULES["one-cycle"](epoch, epochs)
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()
        if epoch < epochs:
            theirs.step()


@pytest.mark.parametrize("name", common.SCHEDULES)
def test_a_run_of_one_epoch_trains(name):
    assert common.SCHEDULES[name](1, 1) >= 0.5 and common.SCHEDULES[name](1, 2) >= 0.4


# ---------------------------------------------------------------------------------------------------- metrics

@pytest.mark.parametrize("n, batch_size, restarts", [(103, 10, 5), (103, 10, 1), (103, 103, 5), (5, 64, 9)])
@pytest.mark.parametrize("compiled", [False, True])
def test_evaluation_is_that_of_all_restarts_on_all_images(monkeypatch, n, batch_size, restarts, compiled):
    """One pixel holds an image's number, one how often it was attacked; a table has the prediction then."""
    torch.manual_seed(n)
    outcome, y = torch.randint(0, 4, (restarts + 1, n)), torch.randint(0, 4, (n,))
    outcome = torch.where(torch.rand(restarts + 1, n) < 0.7, outcome[0], outcome)  # [0] is f(x)
    attacks, sizes = torch.zeros(n, dtype=torch.int64), set()

    def numbers(x, channel=0):
        return (x[:, channel, 0, 0] * 255).round().long()

    class Model(nn.Module):
        def forward(self, x):
            sizes.add(len(x))
            return F.one_hot(outcome[numbers(x, 1), numbers(x)], 4).float()

    def attacked(model, x, loss, attack):
        assert loss(100.0 * F.one_hot(y[numbers(x)], 4)) < 1e-6  # the labels are those of the images
        attacks[numbers(x).unique()] += 1
        x = x.clone()
        x[:, 1, 0, 0] = attacks[numbers(x)] / 255
        return x, torch.ones(len(x))

    monkeypatch.setattr(common, "pgd", attacked)
    x = torch.zeros(n, 3, 1, 1, dtype=torch.uint8)
    x[:, 0, 0, 0] = torch.arange(n)
    model = Model()
    compiled_sizes = set()
    if compiled:
        model._compiled_call_impl = lambda x: compiled_sizes.add(len(x)) or model._call_impl(x)  # as if
    labels, natural, adversarial = common.predictions(model, common.in_order(x, y, batch_size),
                                                      Attack(restarts=restarts))
    first = (outcome != outcome[0]).int().argmax(0)  # the attack that changes the prediction, 0 if none does
    assert labels.equal(y) and natural.equal(outcome[0])  # in the stream's order
    assert adversarial.equal(outcome[first, torch.arange(n)])
    rest = {n % batch_size or batch_size} if n > batch_size else set()
    assert sizes == {min(batch_size, n)} | rest
    assert compiled_sizes == ({min(batch_size, n)} if compiled else set())  # compiled code sees one shape


def test_evaluation_leaves_the_random_stream_alone_and_repeats_itself():
    model, y = network(classes=4), torch.arange(30) % 4
    x = torch.randint(0, 256, (30, 3, 8, 8), dtype=torch.uint8)
    before, rng, attacks = state_of(model), torch.get_rng_state(), [
        Attack(eps=0.1, step_size=0.05, steps=4, restarts=restarts) for restarts in (1, 1, 4)]
    found = [common.evaluate(model, common.in_order(x, y, 16), attack) for attack in attacks]
    assert rng.equal(torch.get_rng_state()) and state_of(model) == before and model.training
    assert found[0] == found[1] and found[0]["attack"] == vars(attacks[0])
    assert found[2]["perturbation_stability"] <= found[0]["perturbation_stability"]


@pytest.mark.parametrize("low, high", [(-0.01, 1), (0, 1.01), (0, math.nan)])
def test_images_outside_0_1_are_refused(low, high):
    x = torch.rand(4, 3, 4, 4)
    x[1, 0, 0, 0], x[2, 1, 1, 1] = low, high
    with pytest.raises(UserError, match=r"images must be in \[0, 1\], not in"):
        common.evaluate(linear(48, 3), [(x, torch.zeros(4).long())], Attack())


def test_gray_images_are_refused_in_an_l2_ball_alone():
    gray, y = torch.rand(4, 1, 4, 4).expand(4, 3, 4, 4), torch.zeros(4).long()
    common.evaluate(linear(48, 2), [(gray, y)], Attack(steps=1, step_size=0.06))
    with pytest.raises(UserError, match="gray.*linf"):
        common.evaluate(linear(48, 2), [(gray, y)], Attack(norm="l2", eps=0.5, step_size=1.0, steps=1))


@pytest.mark.parametrize("attacked", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_no_class(value, attacked):
    x = torch.full((3, 5, 3, 4, 4), 0.5)
    x[1, 3, 0, 0, 0] = 0.9

    class Model(nn.Module):
        def forward(self, x):
            pixel = x[:, 0, 0, 0]  # of image 8 alone it is above 0.8
            bad = (pixel > 0.8) & ((pixel != 0.9) if attacked else True)
            return x.flatten(1)[:, :4] + torch.where(bad, value, 0.0)[:, None]

    with pytest.raises(UserError, match="output for image 8 is not finite"):
        common.evaluate(Model(), [(part, torch.zeros(5).long()) for part in x], Attack())


@pytest.mark.parametrize("scale, warned", [(1.0, False), (1e4, True)])
def test_vanished_gradients_are_counted_and_named(capsys, scale, warned):
    model, x = linear(48, 3), torch.full((50, 3, 4, 4), 0.5)
    with torch.no_grad():  # logits (0, -z, -z), z = 24·scale; where p rounds to (1, 0, 0), the gradient is 0
        model[1].weight.copy_(-scale * torch.tensor([[0.0], [1], [1]]))
        model[1].bias.zero_()
    metrics = common.evaluate(model, [(x, torch.zeros(50).long())], Attack(eps=8 / 255))
    printed = capsys.readouterr().err
    assert warned == ("gradient of exactly zero on 50 of 50" in printed and "autoattack" in printed)
    assert printed.count("\n") == warned and metrics["perturbation_stability"] == 1


def test_local_lipschitzness_is_in_closed_form_on_a_linear_network():
    """Of logits w·x and -w·x it is 2‖w‖₁. Whatever the size of the last batch."""
    model, x = linear(12, 2), torch.full((8, 3, 2, 2), 0.5)
    with torch.no_grad():
        model[1].weight[1] = -model[1].weight[0]
    found = common.local_lipschitzness(model, [(x[:5], x), (x[5:], x)], Attack(eps=0.1, step_size=0.05))
    assert found == pytest.approx(2 * model[1].weight[0].abs().sum().item(), rel=1e-4)


# ------------------------------------------------------------------------------------------------- run folder

def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_same_runs(*folders):
    """Weights, optimizer, log but for the times, and metrics, all equal to the last bit."""
    found = [{name: common.read_checkpoint(folder / name) for name in ("last.pt", "best.pt")}
             for folder in folders]
    logs = [[log_of(folder), *(checkpoint.pop("log") for checkpoint in pair.values())]
            for folder, pair in zip(folders, found)]
    for entry in itertools.chain.from_iterable(itertools.chain(*logs)):
        del entry["seconds"], entry["images_per_second"]
    assert logs[0] == logs[1] and logs[0][0] == logs[0][1]
    settings = [(checkpoint.pop("args"), checkpoint.pop("precision"))
                for pair in found for checkpoint in pair.values()]
    assert all(one == settings[0] for one in settings)
    torch.testing.assert_close(*found, rtol=0, atol=0)
    assert len({(folder / "metrics.json").read_bytes() for folder in folders}) == 1


def test_a_killed_run_resumes_to_the_very_weights_of_a_whole_one(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.undo()  # another process has no shorter attacks
    whole, cut = tmp_path / "whole", tmp_path / "run"
    process = started(train_until_killed, tiny, 6)
    process.join()
    assert process.exitcode == -signal.SIGKILL and len(log_of(cut)) == 1
    (cut / "log.jsonl").unlink()  # a log that is lost, or cut short, is whole again
    train_trades.main(tiny)
    train_trades.main([*tiny, "--out", str(whole)])
    assert_same_runs(whole, cut)
    assert len(log_of(cut)) == 2 and common.read_json(cut / "metrics.json")["last"]["n"] == 8

    before = contents(cut)
    train_trades.main(tiny)  # a finished run, repeated, prints its metrics and ends
    assert "natural" in capsys.readouterr().out.splitlines()[-1] and before == contents(cut)


def test_an_epochs_random_numbers_follow_from_seed_and_epoch(tmp_path):
    def draws(seed, epochs):
        args = run_args(tmp_path / f"{seed}-{epochs}", epochs)
        args.seed = seed
        return [[torch.rand(()).item(), np.random.rand(), random.random()]  # a fork may draw from any
                for _ in common.Run(args, model=nn.Linear(1, 1)).epochs()]
    first = draws(1, 3)
    assert draws(1, 3) == first and draws(1, 2) == first[:2]
    assert [len({*column}) for column in zip(*[*first, *draws(2, 3)])] == [6, 6, 6]


def test_ctrl_c_keeps_the_last_finished_epoch_of_a_fork_in_its_own_folder(tiny, tmp_path):
    for name in "train_trades.py", "common.py":
        shutil.copy(ROOT / name, tmp_path)
    script = (tmp_path / "train_trades.py").rename(tmp_path / "train_mine.py")
    process = subprocess.Popen([sys.executable, script, *tiny[:-2], "--epochs", "500"], errors="replace",
                               cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # nohup's
    while not any(line.startswith("epoch 2/500") for line in process.stdout):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    error = process.communicate()[1]
    folder, = (tmp_path / "runs").glob("mine-tiny-wrn-10-1-beta6-seed1-*")
    assert process.returncode == 130 and "Traceback" not in error
    assert error.splitlines()[-1].startswith("train_mine.py: interrupted; ")
    assert common.read_checkpoint(folder / "last.pt")["epoch"] >= 2 and (folder / "train_mine.py").exists()


def run_args(out, epochs, script=__file__, **more):
    """What a `Run` looks at."""
    return SimpleNamespace(out=out and str(out), epochs=epochs, seed=1, script=script, precision="fp32",
                           **{"name": "mine", **more})


def train_linear(folder, leave=None, epochs=3):
    """Epochs of a linear network; `leave`: how the second is given up, by break or raise."""
    torch.manual_seed(1)
    model = linear(12, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    halved = torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.5)  # a fork's own part
    script = folder.parent / "train_linear.py"  # it stands for this function
    script.touch()
    run = common.Run(run_args(folder, epochs, script), model=model, optimizer=optimizer, halved=halved)
    for epoch in run.epochs():
        for i in range(4):
            loss = F.cross_entropy(model(torch.rand(2, 3, 2, 2)), torch.randint(0, 3, (2,)))
            if i == 1:
                continue
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            halved.step()
            run.record(2, natural_risk=loss)
            if leave and epoch == 2 and i == 2:
                break
        if leave == "raise" and epoch == 2:
            raise ZeroDivisionError
        if leave == "break" and epoch == 2:
            break
        run.end_epoch(lr=0.1, **dict.fromkeys(common.METRICS, (0.1, 0.3, 0.2)[epoch - 1]))
    if not leave:
        lipschitzness = {"local_lipschitzness": model[1].weight.norm().item()}
        run.finish(lambda: {**dict.fromkeys(common.METRICS, 0.5), **lipschitzness})


@pytest.mark.parametrize("leave", ["break", "raise"])
def test_a_loop_left_anywhere_resumes_to_the_same_state(tmp_path, leave):
    whole, left = tmp_path / "whole", tmp_path / "left"
    train_linear(whole)
    with pytest.raises(ZeroDivisionError) if leave == "raise" else contextlib.nullcontext():
        train_linear(left, leave)
    assert common.read_checkpoint(left / "last.pt")["epoch"] == len(log_of(left)) == 1
    train_linear(left)
    assert_same_runs(whole, left)
    assert common.read_checkpoint(left / "last.pt")["halved"]["last_epoch"] == 9


class Disk:
    """Counts what a run does to files. Operation number `at` fails; with `kill`, so do all that follow it."""

    def __init__(self, patch, at=0, kill=False):
        self.count, self.at, self.kill = 0, at, kill
        patch.setattr(common, "open", self.open, raising=False)
        patch.setattr(common, "lock", lambda folder: folder.mkdir(parents=True, exist_ok=True))
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
            yield SimpleNamespace(write=write, flush=self.counted(file.flush), fileno=file.fileno,
                                  read=file.read)
        self.step()  # closing


@pytest.mark.parametrize("kill", [False, True])
def test_whichever_file_operation_fails_a_run_resumes_to_the_same_end(tmp_path, monkeypatch, capsys, kill):
    whole = tmp_path / "whole"
    monkeypatch.setattr(sys, "argv", ["train_linear.py"])
    monkeypatch.setattr(os, "fsync", lambda _: None)  # takes its time, and no power fails here
    monkeypatch.setattr(common, "code_of", lambda script: {"common.py": b"", script.name: b""})  # sooner
    with monkeypatch.context() as patch:
        disk = Disk(patch)
        train_linear(whole, epochs=2)
    assert disk.count > 60 and common.read_checkpoint(whole / "best.pt")["epoch"] == 2
    for at in range(1, disk.count + 1):
        folder = tmp_path / str(at)
        capsys.readouterr()
        with monkeypatch.context() as patch, pytest.raises((SystemExit, OSError)) as ended:
            Disk(patch, at, kill)
            common.launch(lambda argv: train_linear(folder, epochs=2))
        if not kill and ended.type is SystemExit:  # one line and status 2
            error = capsys.readouterr().err
            assert ended.value.code == 2 and error.count("\n") == 1
            assert error.startswith("train_linear.py: error: ") and "No space left on device" in error
        train_linear(folder, epochs=2)
        assert_same_runs(whole, folder)
        assert set(contents(folder)) == FILES | {"train_linear.py"}, at


FILES = {".lock", "args.json", "best.pt", "common.py", "last.pt", "log.jsonl", "metrics.json"}


def hold(folder):
    kept = common.lock(folder)
    (folder.parent / "held").touch()
    time.sleep(1000)
    kept.close()


def test_a_run_in_use_by_another_process_is_left_alone_until_that_ends(tiny, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    process = started(hold, folder)
    while not (tmp_path / "held").exists():
        assert process.is_alive()
        time.sleep(0.001)
    with pytest.raises(UserError, match=f"{folder} is in use by another process; choose another --out"):
        train_trades.main(tiny)
    assert set(contents(folder)) == {".lock"}
    process.kill()
    process.join()
    train_trades.main([*tiny, "--epochs", "1"])  # the lock went with the process
    assert (folder / "metrics.json").exists()


def test_the_folder_holds_what_the_readme_promises(tiny, tmp_path, monkeypatch):
    monkeypatch.undo()  # the attacks of `tiny`
    data, out = load("tiny", tmp_path), tmp_path / "run"
    (x, _), (again, _), (everything, _) = data.test(9), data.test(9), data.test()
    assert len(x) == 9 and x.equal(again) and not x.equal(data.x_test[:9]) and everything.equal(data.x_test)
    train_trades.main([*tiny, "--test-size", "9"])
    assert set(contents(out)) == FILES | {"train_trades.py"}
    assert (out / "common.py").read_text() == (ROOT / "common.py").read_text()
    assert set(log_of(out)[-1]) == {
        "epoch", "lr", "beta", "natural_risk", "robust_regularization", "lipschitz", "n", "attack", "seconds",
        "images_per_second", "natural_accuracy", "robust_accuracy", "perturbation_stability"}
    checkpoint = torch.load(out / "last.pt", weights_only=True)
    args = checkpoint["args"]
    assert checkpoint["epoch"] == 2 and args["method"] == "trades" and args["width"] == 1
    assert args["data"] == data.hash and args == common.read_json(out / "args.json")
    for metrics in common.read_json(out / "metrics.json").values():
        assert metrics["n"] == 9 and metrics["attack"]["steps"] == 20
        assert metrics["attack"]["step_size"] == 0.003 and metrics["local_lipschitzness"] > 0
        natural, robust, stability = (metrics[key] for key in common.METRICS)
        assert robust <= min(natural, stability)


def test_best_is_the_epoch_of_highest_monitored_robust_accuracy(tiny, tmp_path, monkeypatch):
    robust, tested = iter([0.1, 0.4, 0.3, 0.4, 0.2, 0.35]), []

    def evaluate(model, *_):
        tested.append(model.fc.bias.clone())
        return {**dict.fromkeys(common.METRICS, 0.5), "robust_accuracy": next(robust)}
    monkeypatch.setattr(common, "evaluate", evaluate)
    train_trades.main([*tiny, "--epochs", "4"])
    metrics = common.read_json(tmp_path / "run" / "metrics.json")
    for name, epoch, accuracy, weights in (("last", 4, 0.2, tested[4]), ("best", 2, 0.35, tested[5])):
        checkpoint = common.read_checkpoint(tmp_path / "run" / f"{name}.pt")
        assert checkpoint["epoch"] == metrics[name]["epoch"] == epoch
        assert metrics[name]["robust_accuracy"] == accuracy and checkpoint["model"]["fc.bias"].equal(weights)


def test_a_fork_with_a_norm_is_monitored_and_reported_in_it():
    x, y = torch.randint(0, 256, (20, 3, 2, 2), dtype=torch.uint8), torch.randint(0, 3, (20,))
    data = common.Data(x, y, x, y, 3, "")
    for norm in "linf", "l2":
        args = SimpleNamespace(eps=0.5, eval_every=1, epochs=1, val_size=0, eval_size=9, test_size=None,
                               batch_size=10, precision="fp32", norm=norm)
        model = linear(12, 3)
        found = common.monitor(model, data, args, 1), common.report(model, data, args)
        assert [metrics["attack"]["norm"] for metrics in found] == [norm] * 2


def test_default_names_are_short_and_defaults_those_of_the_network():
    def started(*argv):
        parser = common.training_parser(train_trades.__file__, "")
        parser.add_argument("--beta", type=common.number(), default=6.0)
        return common.start(parser, [*argv, "--device", "cpu"])[0]
    for argv, name in (("--beta 12 --seed 3", "trades-cifar10-wrn-34-10-beta12-seed3"),
                       ("--arch densenet", "trades-cifar10-densenet-40-12-beta6-seed1"),
                       ("--arch preact --width 1/8", "trades-cifar10-preact-18-0.125-beta6-seed1"),
                       ("--quick --width 2", "trades-synthetic-wrn-10-2-beta6-seed1")):
        assert started(*argv.split()).name == name


def test_another_run_in_a_default_folder_makes_room_and_says_why(tmp_path, monkeypatch, capsys):
    """Settings, data, the code of the script, common.py, an imported file; not words or a finished run."""
    script, shared = (Path(shutil.copy(ROOT / name, tmp_path)) for name in ("train_trades.py", "common.py"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "__file__", str(shared))

    def trained(data="aa", **settings):
        """The folder that a run of one epoch goes to, and what is said."""
        capsys.readouterr()
        of = common.Data(*[torch.zeros(1, 3, 1, 1)] * 4, 1, hash=data)
        run = common.Run(run_args(None, 1, script, **settings), of, model=nn.Linear(1, 1))
        for _ in run.epochs():
            run.end_epoch()
        run.lock.close()
        return run.folder, capsys.readouterr().out

    def edit(path, old, new):
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new, 1))

    first, _ = trained(rate=1)
    before = (first / "last.pt").read_bytes()
    for path in script, shared:
        edit(path, "import math\n", "import math  # a comment\n")
        folder, said = trained(rate=1)
        assert folder == first and "1 of 1 epochs done" in said
    folders = [first, trained(rate=2)[0], trained("bb", rate=2)[0]]
    for path, old, new in ((script, "natural_risk + beta *", "natural_risk + 2 * beta *"),
                           (shared, "0.001 * torch.randn", "0.002 * torch.randn"),
                           (script, "import math", "from losses import factor\nimport math")):
        (tmp_path / "losses").mkdir(exist_ok=True)
        (tmp_path / "losses" / "factor.py").write_text("FACTOR = 2\n")
        edit(path, old, new)
        folders.append(trained(rate=1)[0])
    (tmp_path / "losses" / "factor.py").write_text("FACTOR = 3\n")
    folders.append(trained(rate=1)[0])
    assert len({*folders}) == 7 and {*folders} == {*Path("runs").iterdir()}
    assert (folders[-1] / "losses.factor.py").read_text() == "FACTOR = 3\n"
    os.utime(folders[-1] / "args.json", (2e9, 2e9))  # the newest on a coarse clock, too
    folder, said = trained("bb", rate=1)
    assert f"{folders[-1]} holds another run (data aa there, bb here): this one goes to {folder}" in said
    assert before == (first / "last.pt").read_bytes()


def test_a_run_is_its_code_but_for_comments_and_docstrings():
    code = b'"""One.\n\nTwo."""\nimport os  # three\n\ndef f():\n    """Four."""\n    return "# five"\n'
    assert common.code_text(code) == 'import os\ndef f():\n    return "# five"'


def test_a_run_is_all_that_its_imports_import(tmp_path):
    files = {"train_mine.py": "from losses.a import b", "losses/__init__.py": "SCALE = 1",
             "losses/a.py": "from . import c\nfrom .sub.m import n", "losses/c.py": "", "losses/d.py": "",
             "losses/sub/__init__.py": "", "losses/sub/m.py": "from ..d import e\nfrom ... import top",
             "top.py": ""}
    (tmp_path / "losses" / "sub").mkdir(parents=True)
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    found = common.code_of(tmp_path / "train_mine.py")
    assert {*found} == {"common.py", *(name.replace("/", ".") for name in files)}


def test_what_is_recorded_is_the_number_of_that_step_and_no_name_is_used_twice(tiny):
    args, _ = common.start(common.training_parser(train_trades.__file__, ""), tiny[:6] + tiny[-6:])
    run, number = common.Run(args, model=torch.nn.Linear(1, 1)), torch.tensor(1.0)
    for _ in run.epochs():
        for _ in range(2):
            run.record(number=number)
            number += 2
        break
    run.end_epoch()
    assert run.log[0]["number"] == 2
    with pytest.raises(UserError, match="weight norm not finite"):
        run.end_epoch(weight_norm=math.nan)
    run.record(natural_accuracy=0.5)
    with pytest.raises(AssertionError, match="logged twice: .'natural_accuracy'"):
        run.end_epoch(natural_accuracy=0.4)


@pytest.mark.parametrize("wrong", [{"norm": "Linf"}, {"norm": "L2"}, {"start": "random"}])
def test_an_attack_of_no_known_norm_or_start_is_an_error(wrong):
    with pytest.raises(ValueError, match="no such norm or start"):
        Attack(**wrong)


def test_a_rank_left_in_the_environment_counts_for_nothing():
    code = "import common; print(common.RANK, common.WORLD)"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                           env={**os.environ, "RANK": "3", "WORLD_SIZE": ""})
    assert found.stdout == "0 1\n", found.stderr


def test_padding_is_an_eighth_of_the_shorter_side(monkeypatch):
    image = torch.full((20, 3, 32, 4), 255, dtype=torch.uint8)
    data = common.Data(image, torch.arange(20), None, None, 10, "")
    (x, _), = common.batches(data, 20)
    assert (x.flatten(1).mean(1) >= 0.75 * 31 / 32 - 1e-6).all()  # at most one row and one column are lost


@pytest.mark.parametrize("images, extra, batch", [(11, 0, 64), (30, 7, 10)])
def test_shares_of_a_batch_are_equal(monkeypatch, images, extra, batch):
    monkeypatch.setattr(common, "WORLD", 2)
    data = tiny_data(images + extra)
    data.extra = extra
    shares = []
    for rank in range(2):
        monkeypatch.setattr(common, "RANK", rank)
        common.seed_everything(1, 1)
        shares.append([len(y) for _, y in common.batches(data, batch, extra_fraction=0.3)])
    assert shares[0] == shares[1] and min(shares[0]) > 0


def test_a_named_folder_with_another_run_is_left_alone(tiny, tmp_path, write_npz):
    out, argv = tmp_path / "run", [*tiny, "--epochs", "1"]
    train_trades.main(argv)
    before = contents(out)
    differs = r"another run \(seed 1 there, 2 here; beta 6.0 there, 12.0 here\)"
    with pytest.raises(UserError, match=differs):
        train_trades.main([*argv, "--beta", "12", "--seed", "2"])
    write_npz(n_train=80)
    with pytest.raises(UserError, match=r"another run \(data \w+ there, \w+ here\); choose another --out"):
        train_trades.main(argv)
    assert before == contents(out)
    write_npz()
    for content in b"", before["last.pt"][:1000]:
        (out / "last.pt").write_bytes(content)
        with pytest.raises(UserError, match="last.pt"):
            train_trades.main(argv)
    (out / "last.pt").unlink()  # whatever is there is not ours to overwrite
    with pytest.raises(UserError, match="holds best.pt without last.pt"):
        train_trades.main(argv)


@pytest.mark.parametrize("name", ["common.py", "train_trades.py", "args.json", "log.jsonl"])
def test_a_strangers_file_under_out_is_not_replaced(tiny, tmp_path, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("{}")
    with pytest.raises(UserError, match=f"{name} is there and would be replaced"):
        train_trades.main(tiny)
    assert (tmp_path / "run" / name).read_text() == "{}"


def test_a_part_that_could_not_be_read_back_is_refused_before_training(tmp_path):
    class Prior:
        def state_dict(self):
            return {"prior": np.ones(3)}
    with pytest.raises(UserError, match="part 'prior' could not be read back"):
        common.Run(run_args(tmp_path / "run", 1), model=nn.Linear(1, 1), prior=Prior())


# --------------------------------------------------------------------------------------------------- mistakes

@pytest.mark.parametrize("argv, message", {
    "--epochs 0": "must be at least 1",
    "--eps 1/0": "must be at least 0", "--eps two": "invalid number value", "--eps nan": "must be at least 0",
    "--eps 3": "at most 1; 3/255", "--step-size 2": "at most 1; 2/255", "--width 0": "above 0",
    "--lr 0": "above 0", "--beta -1": "at least 0",
    "--arch densenet --width 12.5": "a whole number",
    "--depth 35": r"6n \+ 4", "--dataset absent": "absent.npz is missing",
    "--device abacus": "cannot be used here", "--device cuda": "cannot be used here",
    "--device meta": "cpu and cuda are supported", f"--seed {2 ** 64}": "at most 9.2",
    "--width 0.01": "--width 0.01 leaves a layer without channels", "--out /dev/null/run": "--out /dev/null",
    "--data-dir /dev/null --dataset cifar10": "no /dev/null/cifar10.npz, .*--dataset synthetic"}.items())
def test_mistakes_are_named(tiny, tmp_path, argv, message):
    with pytest.raises(UserError, match=message):
        train_trades.main([*tiny, *argv.split()])
    assert not (tmp_path / "run").exists()


class Harmful:
    def __reduce__(self):
        return os.system, ("touch harm",)


NO_CHECKPOINTS = {
    "empty": b"", "page": b"\n<!DOCTYPE html><html>Not found</html>", "text": b"some text",
    "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "pickle": pickle.dumps(Harmful(), 2), "newer pickle": pickle.dumps(Harmful(), 5),
    "saved": Harmful(), "module": nn.Linear(4, 2), "Namespace": Namespace(x=Harmful()),
    "array": np.array([Harmful()])}


@pytest.mark.parametrize("argv, status", [(["--help"], 0), (["--epochs", "0"], 2)])
def test_a_terminal_without_greek_is_written_to(monkeypatch, argv, status):
    written = [io.BytesIO(), io.BytesIO()]
    for name, stream in zip(("stdout", "stderr"), written):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(stream, "cp1252"))
    monkeypatch.setattr(sys, "argv", ["train_trades.py", *argv])
    with pytest.raises(SystemExit) as ended:
        common.launch(train_trades.main)
    sys.stdout.flush()
    assert (ended.value.code or 0) == status and (status or b"?" in written[0].getvalue())


@pytest.mark.parametrize("case", NO_CHECKPOINTS)
def test_what_is_no_checkpoint_is_quoted_and_runs_no_code(tmp_path, monkeypatch, capfd, recwarn, case):
    monkeypatch.chdir(tmp_path)
    content = NO_CHECKPOINTS[case]
    if isinstance(content, bytes):
        Path("some.pt").write_bytes(content)
    else:
        torch.save({"model": content}, "some.pt")
    with pytest.raises(UserError) as caught:
        common.read_checkpoint("some.pt")
    begins = repr(Path("some.pt").read_bytes()[:40])
    assert re.match(r"some.pt holds more than tensors: \w+(\.\w+)+$", str(caught.value)) or (
        str(caught.value).startswith("some.pt is no checkpoint of tensors") and begins in str(caught.value))
    assert not re.search("\n|weights_only|torch.load", str(caught.value))
    assert not recwarn and capfd.readouterr() == ("", "") and os.listdir() == ["some.pt"]
    with pytest.raises(UserError, match="absent.pt: No such file"):
        common.read_checkpoint("absent.pt")


@pytest.mark.parametrize("call, message", [
    (7, "natural risk not finite in epoch 2, step 3; .* keeps epoch 1"),
    (8, "weight not finite in epoch 2; .* keeps epoch 1")])  # no loss is computed with these any more
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


@pytest.mark.parametrize("error, said", [
    (UserError("so\nso"), "train_fork.py: error: so so\n"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 8 bytes"), "--batch-size"),
    (ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib"), "pip install matplotlib"),
    (FileNotFoundError("my_prior.npy"), ""), (RuntimeError("shapes"), ""), (KeyError("last.pt"), "")])
def test_a_users_mistake_is_one_line_and_a_forkers_keeps_its_traceback(monkeypatch, error, said):
    def main(argv):
        raise error
    monkeypatch.setattr(sys, "argv", ["train_fork.py"])
    monkeypatch.setattr(sys, "stdout", io.StringIO())  # as notebooks have: no text file of the system's
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with pytest.raises(SystemExit if said else type(error)) as ended:
        common.launch(main)
    printed = sys.stderr.getvalue()
    if said:
        assert ended.value.code == 2 and said in printed and printed.count("\n") == 1
    else:
        assert ended.value is error and ended.traceback[-1].name == "main" and not printed

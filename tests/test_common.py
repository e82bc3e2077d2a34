"""common.py: data, models, attacks, schedules, metrics and the run folder's promises."""
import itertools
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import train_trades
from common import UserError

ROOT = Path(common.__file__).parent
TINY = ["--depth", "10", "--width", "1", "--batch-size", "16", "--steps", "2", "--eval-size", "20", "--device", "cpu"]


def write_npz(path, n_train=64, n_test=41, size=8, classes=4, **changes):
    rng = np.random.default_rng(0)
    arrays = {"x_train": rng.integers(0, 256, (n_train, size, size, 3), dtype=np.uint8),
              "y_train": np.arange(n_train) % classes,
              "x_test": rng.integers(0, 256, (n_test, size, size, 3), dtype=np.uint8),
              "y_test": np.arange(n_test) % classes}
    np.savez(path, **{key: value for key, value in {**arrays, **changes}.items() if value is not None})
    return path


@pytest.fixture
def data_dir(tmp_path):
    write_npz(tmp_path / "tiny.npz")
    return tmp_path


def load(name, folder):
    return common.load_data(name, folder, torch.device("cpu"))


# ---------------------------------------------------------------------------------------------------------- data


def test_npz_is_read_as_stored(data_dir):
    data = load("tiny", data_dir)
    stored = np.load(data_dir / "tiny.npz")
    assert data.classes == 4 and data.x_train.dtype == torch.uint8
    assert (data.x_train.permute(0, 2, 3, 1).numpy() == stored["x_train"]).all()
    assert (data.y_test.numpy() == stored["y_test"]).all()


def test_train_size_is_a_seeded_random_subset(data_dir):
    first, again, other = (common.load_data("tiny", data_dir, "cpu", 20, seed).x_train for seed in (1, 1, 2))
    assert len(first) == 20 and first.equal(again) and not first.equal(other)
    with pytest.raises(UserError, match="64 training images"):
        common.load_data("tiny", data_dir, "cpu", 65)


def test_keras_label_columns_are_accepted(tmp_path):
    write_npz(tmp_path / "tiny.npz", y_train=np.full((64, 1), 3, np.uint8))
    assert load("tiny", tmp_path).y_train.tolist() == [3] * 64


@pytest.mark.parametrize("changes, message", [
    ({"x_test": None}, "x_test"),
    ({"x_train": np.zeros((64, 8, 8, 3), np.float32)}, "x_train must be uint8"),
    ({"x_train": np.zeros((64, 3, 8, 8), np.uint8)}, r"\[N, H, W, 3\]"),
    ({"y_train": np.zeros(63, np.int64)}, "64 integers"),
    ({"y_test": np.full(41, 0.5)}, "41 integers"),
    ({"y_test": np.full(41, 4)}, "labels must lie in 0..3"),
    ({"y_train": np.full(64, -1)}, "labels must lie"),
    ({"x_test": np.zeros((41, 16, 16, 3), np.uint8)}, "differ in size"),
])
def test_malformed_npz_is_refused(tmp_path, changes, message):
    write_npz(tmp_path / "tiny.npz", **changes)
    with pytest.raises(UserError, match=message):
        load("tiny", tmp_path)


def test_labels_of_a_named_set_are_checked_against_its_classes(tmp_path):
    write_npz(tmp_path / "cifar10.npz", classes=11)
    with pytest.raises(UserError, match="0..9"):
        load("cifar10", tmp_path)


def test_truncated_and_missing_files_are_named(tmp_path, monkeypatch):
    path = write_npz(tmp_path / "tiny.npz")
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


def test_crop_and_flip_match_a_per_image_reference():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (50, 3, 32, 32), dtype=torch.uint8)
    top, left, flip = torch.randint(0, 9, (50,)), torch.randint(0, 9, (50,)), torch.rand(50) < 0.5
    out = common.crop_flip(images, top, left, flip)
    for i in range(50):
        padded = np.pad(images[i].numpy(), ((0, 0), (4, 4), (4, 4)))
        expected = padded[:, top[i]:top[i] + 32, left[i]:left[i] + 32]
        assert (out[i].numpy() == (expected[:, :, ::-1] if flip[i] else expected)).all()


def test_random_augmentation_draws_every_offset_and_flip_for_each_image():
    image = torch.arange(1, 65, dtype=torch.uint8).view(1, 1, 8, 8).expand(4000, 3, 8, 8)
    torch.manual_seed(0)
    counts = torch.unique(common.random_crop_flip(image), dim=0, return_counts=True)[1]
    assert len(counts) == 9 * 9 * 2  # all are drawn, and about equally often
    assert counts.min() > 5 and counts.max() < 60


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


# -------------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("arch, depth, width, parameters", [
    ("wrn", 34, 1, 466_714), ("wrn", 34, 10, 46_160_474), ("wrn", 28, 10, 36_479_194),
    ("densenet", 40, 12, 176_122), ("densenet", 40, 40, 1_901_930)])
def test_parameter_counts(arch, depth, width, parameters):
    with torch.device("meta"):
        model = common.build_model(arch, depth, width, 10)
    assert sum(p.numel() for p in model.parameters()) == parameters


def reference_norm(state, name, x):
    return F.batch_norm(x, state[name + ".running_mean"], state[name + ".running_var"], state[name + ".weight"],
                        state[name + ".bias"])


def reference_wide_resnet(state, x, blocks):
    """The published WideResNet's forward pass, written from its parameter names alone."""
    x = F.conv2d(x, state["conv1.weight"], padding=1)
    for stage, block in itertools.product((1, 2, 3), range(blocks)):
        name, stride = f"block{stage}.layer.{block}.", 2 if stage > 1 and block == 0 else 1
        out = reference_norm(state, name + "bn1", x).relu()
        shortcut = state.get(name + "convShortcut.weight")
        x = x if shortcut is None else F.conv2d(out, shortcut, stride=stride)
        out = F.conv2d(out, state[name + "conv1.weight"], stride=stride, padding=1)
        x = x + F.conv2d(reference_norm(state, name + "bn2", out).relu(), state[name + "conv2.weight"], padding=1)
    return F.linear(F.avg_pool2d(reference_norm(state, "bn1", x).relu(), 8).flatten(1), state["fc.weight"], state["fc.bias"])


def reference_densenet(state, x, layers):
    x = F.conv2d(x, state["conv1.weight"], padding=1)
    for stage in (1, 2, 3):
        for layer in range(layers):
            name = f"block{stage}.layer.{layer}."
            out = F.conv2d(reference_norm(state, name + "bn1", x).relu(), state[name + "conv1.weight"])
            out = F.conv2d(reference_norm(state, name + "bn2", out).relu(), state[name + "conv2.weight"], padding=1)
            x = torch.cat([x, out], 1)
        if stage < 3:
            out = reference_norm(state, f"trans{stage}.bn1", x).relu()
            x = F.avg_pool2d(F.conv2d(out, state[f"trans{stage}.conv1.weight"]), 2)
    return F.linear(F.avg_pool2d(reference_norm(state, "bn1", x).relu(), 8).flatten(1), state["fc.weight"], state["fc.bias"])


def with_random_statistics(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()


@pytest.mark.parametrize("arch, width, reference", [("wrn", 2, reference_wide_resnet), ("densenet", 6, reference_densenet)])
def test_a_published_checkpoint_gives_its_logits(arch, width, reference):
    torch.manual_seed(0)
    published = with_random_statistics(common.build_model(arch, 16, width, 10)).state_dict()
    wrapped = {"module." + key: value for key, value in published.items()}
    wrapped["module.sub_block1.layer.0.conv1.weight"] = torch.zeros(1)
    model = common.build_model(arch, 16, width, 10).eval()
    common.load_weights(model, wrapped, "published.pt")
    x = torch.rand(3, 3, 32, 32)
    torch.testing.assert_close(model(x), reference(published, x, 2), atol=1e-5, rtol=0)


def test_a_checkpoint_of_another_network_is_refused():
    model = common.build_model("wrn", 10, 1, 10)
    for other in (("wrn", 10, 2, 10), ("wrn", 16, 1, 10), ("densenet", 10, 12, 10), ("wrn", 10, 1, 100)):
        with pytest.raises(UserError, match="other.pt holds another network"):
            common.load_weights(model, common.build_model(*other).state_dict(), "other.pt")
    with pytest.raises(UserError, match="6n \\+ 4"):
        common.build_model("wrn", 35, 1, 10)


def test_bf16_keeps_logits_and_pixels_in_float32():
    torch.manual_seed(0)
    model, x = with_random_statistics(common.build_model("wrn", 10, 1, 10)), torch.rand(8, 3, 32, 32)
    exact = model(x)
    common.execute(model, torch.device("cpu"), "bf16", "off")
    assert model(x).dtype == torch.float32 and all(p.dtype == torch.float32 for p in model.parameters())
    assert 0 < (model(x) - exact).abs().max() < 0.05 * exact.abs().max()
    with common.exact_precision(model):
        torch.testing.assert_close(model(x), exact)


# ------------------------------------------------------------------------------------------------------- attacks


class Linear(nn.Module):
    """Logits W·x: every attack on it has a closed form."""

    def __init__(self, classes=3, size=4):
        super().__init__()
        self.fc = nn.Linear(3 * size * size, classes, dtype=torch.float64)

    def forward(self, x):
        return self.fc(x.flatten(1))


def test_linf_pgd_reaches_the_closed_form_maximum_on_a_linear_network():
    torch.manual_seed(0)
    model, x, y = Linear(classes=2), torch.rand(5, 3, 4, 4).double(), torch.tensor([0, 1, 0, 1, 0])
    x_adv = common.pgd(model, x, common.cross_entropy_to(y), eps=0.1, step_size=0.03, steps=10)
    ascent = (model.fc.weight[1 - y] - model.fc.weight[y]).sign().view_as(x)
    torch.testing.assert_close(x_adv, (x + 0.1 * ascent).clamp(0, 1), atol=1e-12, rtol=0)


def test_l2_pgd_reaches_the_closed_form_maximum_on_a_linear_network():
    torch.manual_seed(0)
    model, y = Linear(classes=2), torch.tensor([0, 1, 0])
    x = torch.full((3, 3, 4, 4), 0.5).double()  # far from the walls of [0, 1]
    x_adv = common.pgd(model, x, common.margin_to(y), eps=0.2, step_size=0.05, steps=30, norm="l2")
    ascent = model.fc.weight[1 - y] - model.fc.weight[y]
    expected = x + 0.2 * (ascent / ascent.norm(dim=1, keepdim=True)).view_as(x)
    torch.testing.assert_close(x_adv, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("norm, eps", [("linf", 0.03), ("l2", 0.5)])
@pytest.mark.parametrize("start", ["uniform", "gaussian", "none"])
@pytest.mark.parametrize("steps", [0, 3])
def test_the_result_lies_in_the_ball_and_in_the_pixel_range(norm, eps, start, steps):
    torch.manual_seed(0)
    model, x, y = Linear().float(), torch.rand(20, 3, 4, 4).round(), torch.zeros(20, dtype=torch.int64)
    x_adv = common.pgd(model, x, common.cross_entropy_to(y), eps=eps, step_size=eps / 2, steps=steps, start=start, norm=norm)
    distance = (x_adv - x).flatten(1).norm(dim=1, p=math.inf if norm == "linf" else 2)
    assert distance.max() <= eps + 1e-6 and x_adv.min() >= 0 and x_adv.max() <= 1
    assert steps == 0 or distance.min() > 0


def test_starts_have_the_published_distributions():
    torch.manual_seed(0)
    x = torch.full((400, 3, 8, 8), 0.5)
    uniform = common.perturb_start(x, "uniform", 0.03, "linf") - x
    assert uniform.abs().max() <= 0.03 + 1e-6 and abs(uniform.std().item() - 0.03 / math.sqrt(3)) < 1e-4
    assert abs((common.perturb_start(x, "gaussian", 0.03, "linf") - x).std().item() - 0.001) < 1e-5
    radius = (common.perturb_start(x[:, :, :1, :1], "uniform", 0.5, "l2") - 0.5).flatten(1).norm(dim=1)
    assert radius.max() <= 0.5 and abs(((radius / 0.5) ** 3).mean().item() - 0.5) < 0.05  # uniform in a 3-d ball


def test_the_attack_leaves_the_model_as_found():
    torch.manual_seed(0)
    model = common.build_model("wrn", 10, 1, 10)
    model.block1.eval()                       # a mixed state, and a gradient in flight
    model.conv1.weight.requires_grad_(False)
    model(torch.rand(4, 3, 8, 8)).sum().backward()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    modes = [module.training for module in model.modules()]
    common.pgd(model, torch.rand(4, 3, 8, 8), lambda logits: logits.sum(), eps=0.1, step_size=0.1, steps=2)
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())
    assert all(p.grad.equal(gradients[name]) for name, p in model.named_parameters() if p.grad is not None)
    assert len(gradients) > 10 and modes == [module.training for module in model.modules()]
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["conv1.weight"]
    with pytest.raises(ZeroDivisionError):
        common.pgd(model, torch.rand(4, 3, 8, 8), lambda logits: 1 / 0, eps=0.1, step_size=0.1, steps=2)
    assert modes == [module.training for module in model.modules()]


def test_attack_losses_against_formulas_by_hand():
    torch.manual_seed(0)
    logits, y = torch.randn(6, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 4, 0])
    p, q = torch.randn(6, 5, dtype=torch.float64).softmax(1), logits.exp() / logits.exp().sum(1, keepdim=True)
    rows = range(6)
    assert common.kl_to(p)(logits).item() == pytest.approx((p * (p.log() - q.log())).sum().item(), abs=1e-12)
    assert common.cross_entropy_to(y)(logits).item() == pytest.approx(-sum(math.log(q[i, y[i]]) for i in rows), abs=1e-12)
    margins = [max(logits[i, j].item() for j in range(5) if j != y[i]) - logits[i, y[i]].item() for i in rows]
    assert common.margin_to(y)(logits).item() == pytest.approx(sum(margins), abs=1e-12)


def test_gradient_norm_is_the_largest_l1_norm_met():
    torch.manual_seed(0)
    model, x = Linear(classes=2), torch.rand(4, 3, 4, 4).double()
    norms = torch.zeros(4, dtype=torch.float64)
    common.pgd(model, x, lambda logits: logits[:, 0].sum(), eps=0.1, step_size=0.05, steps=3, gradient_norm=norms)
    assert norms.tolist() == pytest.approx([model.fc.weight[0].abs().sum().item()] * 4)


# ----------------------------------------------------------------------------------------------------- schedules


@pytest.mark.parametrize("schedule, epochs, expected", [
    ("exp-decay", 100, {1: 1, 74: 1, 75: 0.5, 76: 0.25, 100: 0.5 ** 26}),
    ("exp-decay", 200, {149: 1, 150: 0.5, 151: 0.5, 152: 0.25, 200: 0.5 ** 26}),
    ("exp-decay", 5, {3: 1, 4: 0.5, 5: 0.25}),
    ("exp-decay", 110, {82: 1, 83: 0.5, 99: 0.5 ** 16, 110: 0.5 ** 26}),  # 15 and 25 periods of 1.1 epochs, exactly
    ("step", 100, {1: 1, 74: 1, 75: 0.1, 89: 0.1, 90: 0.01, 99: 0.01, 100: 0.001}),
    ("step", 200, {149: 1, 150: 0.1, 180: 0.01}),
    ("cosine", 200, {1: 1, 101: 0.5, 200: 0.5 * (1 + math.cos(math.pi * 199 / 200))}),
])
def test_learning_rates_at_their_corner_points(schedule, epochs, expected):
    for epoch, factor in expected.items():
        assert common.learning_rate(schedule, 0.1, epoch, epochs) == pytest.approx(0.1 * factor, rel=1e-9)


def test_step_milestones_of_awp():
    rates = [common.learning_rate("step", 0.1, epoch, 200, milestones=(50, 75)) for epoch in (99, 100, 149, 150)]
    assert rates == pytest.approx([0.1, 0.01, 0.01, 0.001])


# ------------------------------------------------------------------------------------------------------- metrics


def test_three_metrics_by_hand():
    y, natural, adversarial = torch.tensor([[0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 2, 0]])
    metrics = common.three_metrics(y, natural, adversarial)
    assert metrics == {"n": 6, "natural_accuracy": 4 / 6, "robust_accuracy": 2 / 6, "perturbation_stability": 4 / 6}


def test_evaluation_counts_every_image_once_in_a_partial_batch_too():
    seen = []

    class Parity(nn.Module):
        precision = "fp32"

        def forward(self, x):  # the first pixel says the class; the attack has no gradient to follow
            seen.append(len(x))
            return F.one_hot((x[:, 0, 0, 0] * 255).round().long() % 2, 2).float() + 0 * x.sum((1, 2, 3))[:, None]

    x = torch.arange(103, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    y = torch.cat([torch.arange(100) % 2, torch.tensor([1, 0, 1])])  # the last partial batch is all wrong
    metrics = common.evaluate(Parity(), x, y, eps=0.001, step_size=0.0, steps=1, start="none", batch_size=10)
    assert metrics["n"] == 103 and metrics["natural_accuracy"] == 100 / 103 and metrics["perturbation_stability"] == 1
    assert set(seen) == {10}  # one shape, for compiled code
    assert common.evaluate(Parity(), x[:4], y[:4], eps=0.001, step_size=0.0, steps=1, start="none")["n"] == 4


def test_evaluation_leaves_the_random_stream_alone_and_repeats_itself():
    torch.manual_seed(0)
    model, x = common.build_model("wrn", 10, 1, 4), torch.randint(0, 256, (30, 3, 8, 8), dtype=torch.uint8)
    y = torch.arange(30) % 4
    before = torch.get_rng_state()
    first, again = (common.evaluate(model, x, y, eps=0.1, step_size=0.05, steps=2) for _ in range(2))
    assert before.equal(torch.get_rng_state()) and first == again and model.training


def test_local_lipschitzness_is_a_tight_lower_bound_on_a_linear_network():
    torch.manual_seed(0)
    weight = torch.randn(2, 12)

    class Small(nn.Module):
        precision = "fp32"

        def forward(self, x):
            return x.flatten(1) @ weight.T

    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=12)))
    largest = (signs @ weight.T).abs().sum(1).max().item()  # of ‖Wδ‖₁ over the corners ‖δ‖∞ = 1
    found = common.local_lipschitzness(Small(), torch.full((5, 3, 2, 2), 128, dtype=torch.uint8), eps=0.1, step_size=0.02,
                                       steps=20)
    assert 0.9 * largest < found <= largest * 1.001


def test_synthetic_data_are_fixed_by_their_seed():
    first, again, other = (common.synthetic(50, 20, seed) for seed in (0, 0, 1))
    assert all((first[key] == again[key]).all() for key in first) and (first["x_train"] != other["x_train"]).any()
    assert first["x_train"].shape == (50, 32, 32, 3) and first["x_train"].dtype == np.uint8


# --------------------------------------------------------------------------------------------- the run's folder


def run(*extra, script="train_trades.py", **options):
    """A script in a process of its own, as a user starts it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, ROOT / script, *map(str, extra)], capture_output=True, text=True,
                          env=environment, **options)


def start_and_stop(arguments, when, how, timeout=120):
    """Start training, send the signal `how` as soon as `when()` holds, and return the finished process."""
    process = subprocess.Popen([sys.executable, ROOT / "train_trades.py", *map(str, arguments)], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + timeout
    while not when() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(how)
    process.out, process.err = process.communicate(timeout=timeout)
    return process


def lines_of(path):
    return path.read_text().count("\n") if path.exists() else 0


def comparable_log(folder):
    timing = ("seconds", "images_per_second")
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in entry.items() if key not in timing} for entry in entries]


def test_a_killed_run_resumes_to_the_very_weights_of_an_uninterrupted_one(tmp_path):
    write_npz(tmp_path / "tiny.npz", n_train=320)
    arguments = [*TINY, "--dataset", "tiny", "--data-dir", tmp_path, "--epochs", 4]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run(*arguments, "--out", whole).returncode == 0
    killed = start_and_stop([*arguments, "--out", cut], lambda: lines_of(cut / "log.jsonl") >= 2, signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL and lines_of(cut / "log.jsonl") in (2, 3)
    with open(cut / "log.jsonl", "a") as file:
        file.write('{"epoch": 3, "lr"')  # as a kill in the middle of a write leaves it
    resumed = run(*arguments, "--out", cut)
    assert resumed.returncode == 0, resumed.stderr
    states = [torch.load(folder / "last.pt", weights_only=True) for folder in (whole, cut)]
    assert all(value.equal(states[1]["model"][key]) for key, value in states[0]["model"].items())
    assert comparable_log(whole) == comparable_log(cut) and len(comparable_log(cut)) == 4
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in (whole, cut)]
    assert metrics[0] == metrics[1] and metrics[0]["n"] == 41

    again = run(*arguments, "--out", cut)  # a finished run, repeated, prints its metrics and ends
    assert again.returncode == 0 and "natural" in again.stdout.splitlines()[-1]
    assert comparable_log(whole) == comparable_log(cut)


def test_ctrl_c_keeps_the_last_finished_epoch(tmp_path):
    write_npz(tmp_path / "tiny.npz", n_train=480)
    folder = tmp_path / "run"
    arguments = [*TINY, "--dataset", "tiny", "--data-dir", tmp_path, "--epochs", 50, "--out", folder]
    stopped = start_and_stop(arguments, lambda: lines_of(folder / "log.jsonl") >= 2, signal.SIGINT)
    assert stopped.returncode == 130 and "is kept in" in stopped.err and "Traceback" not in stopped.err
    assert torch.load(folder / "last.pt", weights_only=True)["epoch"] >= 1


def test_the_folder_holds_what_the_readme_promises(data_dir):
    out = data_dir / "run"
    train_trades.main([*TINY, "--dataset", "tiny", "--data-dir", str(data_dir), "--epochs", "2", "--out", str(out)])
    assert {path.name for path in out.iterdir()} == {"args.json", "log.jsonl", "last.pt", "best.pt", "metrics.json"}
    entry = comparable_log(out)[-1]
    assert set(entry) == {"epoch", "lr", "beta", "natural_risk", "robust_regularization", "lipschitz", "natural_accuracy",
                          "robust_accuracy", "perturbation_stability"}
    checkpoint = torch.load(out / "last.pt", weights_only=True)
    assert checkpoint["epoch"] == 2 and checkpoint["args"]["method"] == "trades" and checkpoint["args"]["width"] == 1
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["n"] == 41 and metrics["attack"]["steps"] == 20 and metrics["attack"]["step_size"] == 0.003
    assert metrics["local_lipschitzness"] > 0
    assert metrics["robust_accuracy"] <= min(metrics["natural_accuracy"], metrics["perturbation_stability"])


def test_the_final_test_can_be_of_a_random_subset_the_same_in_every_run(data_dir):
    data = common.load_data("tiny", data_dir, torch.device("cpu"))
    chosen = data.test_subset(20)
    assert len(set(chosen.tolist())) == 20 and not chosen.equal(torch.arange(20)) and chosen.equal(data.test_subset(20))
    assert data.test_subset(None).equal(torch.arange(41))
    out = data_dir / "run"
    train_trades.main([*TINY, "--dataset", "tiny", "--data-dir", str(data_dir), "--epochs", "1", "--test-size", "20",
                       "--out", str(out)])
    metrics = json.loads((out / "metrics.json").read_text())
    model = common.build_model("wrn", 10, 1, data.classes)
    common.load_weights(model, common.read_checkpoint(out / "last.pt")["model"], "last.pt")
    right = common.predict(model, common.to_float(data.x_test[chosen])) == data.y_test[chosen]
    assert metrics["n"] == 20 and metrics["natural_accuracy"] == pytest.approx(right.float().mean().item())


def test_best_is_the_epoch_of_highest_monitored_robust_accuracy(data_dir, monkeypatch):
    robust = iter([0.1, 0.4, 0.3, 0.4, 0.2])
    monkeypatch.setattr(common, "evaluate", lambda *args, **kwargs: {
        "n": 20, "natural_accuracy": 0.5, "robust_accuracy": next(robust), "perturbation_stability": 0.5})
    out = data_dir / "run"
    train_trades.main([*TINY, "--dataset", "tiny", "--data-dir", str(data_dir), "--epochs", "4", "--out", str(out)])
    assert torch.load(out / "best.pt", weights_only=True)["epoch"] == 2
    assert torch.load(out / "last.pt", weights_only=True)["epoch"] == 4


def test_a_run_is_named_after_every_setting_that_is_not_the_default(monkeypatch, tmp_path):
    def name(*argv):
        return common.start(common.training_parser("", "trades"), [*argv, "--device", "cpu"])[0].out
    assert name() == "runs/trades-cifar10-wrn34-10-beta6-seed1"
    assert name("--beta", "12", "--epochs", "5", "--eps", "8/255", "--data-dir", "x") == \
        "runs/trades-cifar10-wrn34-10-beta12-seed1-epochs5-eps0.03137"


# ---------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize("argv, message", [
    (["--no-such-flag"], "unrecognized arguments"),
    (["--epochs", "0"], "must be at least 1"),
    (["--eps", "1/0"], "must be a number"),
    (["--eps", "two"], "invalid number value"),
    (["--eps", "nan"], "must be a number"),
    (["--lr", "0"], "above 0"),
    (["--beta", "-1"], "at least 0"),
    (["--schedule", "linear"], "invalid choice"),
    (["--depth", "35"], "6n \\+ 4"),
    (["--dataset", "absent"], "absent.npz is missing"),
    (["--device", "abacus"], "no such device"),
    (["--device", "meta"], "cpu and cuda are supported"),
    (["--seed", str(2 ** 64)], "below 2\\^63"),
    pytest.param(["--device", "cuda"], "no such device", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA")),
])
def test_mistakes_are_named(data_dir, argv, message):
    with pytest.raises(UserError, match=message):
        train_trades.main([*TINY, "--dataset", "tiny", "--data-dir", str(data_dir), "--out", str(data_dir / "run"), *argv])
    assert not (data_dir / "run").exists()


def test_a_mistake_ends_in_one_line_and_status_2(tmp_path):
    failed = run("--dataset", "absent", "--data-dir", tmp_path)
    assert failed.returncode == 2 and failed.stderr.count("\n") == 1
    assert failed.stderr.startswith("train_trades.py: error: no data set 'absent'")


def test_numbers_may_be_ratios():
    args = common.training_parser("", "trades").parse_args(["--eps", "8/255", "--step-size", "0.007"])
    assert args.eps == 8 / 255 and args.step_size == 0.007


def test_a_folder_with_another_run_is_left_alone(data_dir):
    argv = [*TINY, "--dataset", "tiny", "--data-dir", str(data_dir), "--epochs", "1", "--out", str(data_dir / "run")]
    train_trades.main(argv)
    before = {path.name: path.read_bytes() for path in (data_dir / "run").iterdir()}
    with pytest.raises(UserError, match=r"other settings \(--beta 6.0 there, 12.0 here; --seed 1 there, 2 here\)"):
        train_trades.main([*argv, "--beta", "12", "--seed", "2"])
    assert before == {path.name: path.read_bytes() for path in (data_dir / "run").iterdir()}


def test_a_corrupt_or_unsafe_checkpoint_is_refused(data_dir, tmp_path):
    argv = [*TINY, "--dataset", "tiny", "--data-dir", str(data_dir), "--epochs", "2", "--out", str(data_dir / "run")]
    train_trades.main(argv)
    last = data_dir / "run" / "last.pt"
    last.write_bytes(last.read_bytes()[:1000])
    with pytest.raises(UserError, match="last.pt cannot be read"):
        train_trades.main(argv)
    torch.save({"model": Linear()}, tmp_path / "pickled.pt")  # a whole module: reading it would run code
    with pytest.raises(UserError, match="pickled.pt cannot be read"):
        common.read_checkpoint(tmp_path / "pickled.pt")
    with pytest.raises(UserError, match="no such checkpoint"):
        common.read_checkpoint(tmp_path / "absent.pt")


def test_a_diverged_loss_is_named_and_the_last_good_checkpoint_stays(data_dir, monkeypatch):
    argv = [*TINY, "--dataset", "tiny", "--data-dir", str(data_dir), "--epochs", "3", "--out", str(data_dir / "run")]
    genuine, calls = train_trades.trades_loss, []

    def diverging(*args):
        calls.append(1)
        loss, natural_risk, robust_regularization = genuine(*args)
        return (loss, natural_risk * (math.nan if len(calls) == 7 else 1), robust_regularization)
    monkeypatch.setattr(train_trades, "trades_loss", diverging)
    with pytest.raises(UserError, match="not finite at epoch 2, step 3; epoch 1 is kept"):
        train_trades.main(argv)
    assert torch.load(data_dir / "run" / "last.pt", weights_only=True)["epoch"] == 1


def test_weights_that_diverge_in_the_last_step_do_not_replace_the_checkpoint(data_dir, monkeypatch):
    argv = [*TINY, "--dataset", "tiny", "--data-dir", str(data_dir), "--epochs", "2", "--out", str(data_dir / "run")]
    genuine, calls = torch.optim.SGD.step, []

    def diverging(optimizer):
        genuine(optimizer)
        calls.append(1)
        if len(calls) == 8:  # the last step of the second epoch: no loss is computed with these weights any more
            optimizer.param_groups[0]["params"][0].data.fill_(math.inf)
    monkeypatch.setattr(torch.optim.SGD, "step", diverging)
    with pytest.raises(UserError, match="weights not finite after epoch 2; epoch 1 is kept"):
        train_trades.main(argv)
    assert torch.load(data_dir / "run" / "last.pt", weights_only=True)["model"]["conv1.weight"].isfinite().all()


def test_a_spoilt_run_folder_is_named(data_dir):
    out = data_dir / "run"
    argv = [*TINY, "--dataset", "tiny", "--data-dir", str(data_dir), "--epochs", "1", "--out", str(out)]
    train_trades.main(argv)
    whole = {path.name: path.read_bytes() for path in out.iterdir()}
    for name, content in (("args.json", b"[]"), ("log.jsonl", b"{\n"), ("metrics.json", b"{}"), ("last.pt", b"")):
        (out / name).write_bytes(content)
        with pytest.raises(UserError, match="run"):
            train_trades.main(argv)
        (out / name).write_bytes(whole[name])
    (out / "last.pt").unlink()
    with pytest.raises(UserError, match="finished run without its last.pt"):
        train_trades.main(argv)


def test_a_run_that_finished_no_epoch_may_start_over_with_other_settings(data_dir):
    out = data_dir / "run"
    argv = [*TINY, "--dataset", "tiny", "--data-dir", str(data_dir), "--epochs", "1", "--out", str(out)]
    train_trades.main(argv)
    for name in ("last.pt", "best.pt", "metrics.json"):
        (out / name).unlink()
    train_trades.main([*argv, "--eps", "0"])  # an attack of no size is an attack
    assert lines_of(out / "log.jsonl") == 1
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["perturbation_stability"] == 1 and metrics["local_lipschitzness"] == 0


def test_a_full_disk_ends_in_one_line_and_loses_nothing(tmp_path):
    write_npz(tmp_path / "tiny.npz")
    out = tmp_path / "run"
    arguments = [*TINY, "--dataset", "tiny", "--data-dir", tmp_path, "--out", out]
    assert run(*arguments, "--epochs", "1").returncode == 0
    kept = (out / "last.pt").read_bytes()
    for name in ("metrics.json", "args.json"):  # a run of two epochs of which one is done
        (out / name).write_text((out / name).read_text().replace('"epochs": 1', '"epochs": 2'))
    (out / "metrics.json").unlink()

    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    failed = run(*arguments, "--epochs", "2", preexec_fn=small_files)
    assert failed.returncode == 2 and failed.stderr.count("\n") == 1 and "last.pt" in failed.stderr
    assert (out / "last.pt").read_bytes() == kept and not list(out.glob(".*"))

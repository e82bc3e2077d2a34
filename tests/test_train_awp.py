"""AWP: the perturbed update against its formula, BatchNorm untouched, exact removal, whole runs.

CIFAR-100 and DenseNet: test_train_trades.py.
"""
import copy
import functools
import json

import numpy as np
import pytest
import torch

import common
import train_awp
import train_trades


def problem(n=8):
    """A small network with seasoned BatchNorm statistics in float32 and float64, and a batch with its x̂."""
    torch.manual_seed(0)
    model = common.WideResNet(10, 1, 10)
    model.train()(torch.rand(32, 3, 16, 16))
    x, y = torch.rand(n, 3, 16, 16), torch.randint(0, 10, (n,))
    return model, copy.deepcopy(model).double(), x, (x + 0.03 * torch.randn_like(x)).clamp(0, 1), y


def weights_of(model):
    return [parameter for parameter in model.parameters() if parameter.ndim > 1]


def loss_written_out(model, x, x_adv, y, beta):
    logits, logits_adv = model.train()(x), model(x_adv)
    p, q = (z.exp() / z.exp().sum(1, keepdim=True) for z in (logits, logits_adv))
    return -p[range(len(y)), y].log().mean() + beta * (p * (p / q).log()).sum(1).mean()


def test_perturbation_is_the_formula():
    model, exact, x, x_adv, y = problem()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    perturbation = train_awp.weight_perturbation(model, weights_of(model), x, x_adv, y, beta=6.0, gamma=0.005)
    assert all(torch.equal(parameter, copied) for parameter, copied in zip(model.parameters(), before))
    loss_written_out(exact, x.double(), x_adv.double(), y, 6.0).backward()
    for weight, step, exact_weight in zip(weights_of(model), perturbation, weights_of(exact)):
        w, g = exact_weight.detach(), exact_weight.grad
        torch.testing.assert_close((weight + step).double(), w + 0.005 * w.norm() * g / g.norm(), rtol=0, atol=1e-6)
        assert (step.norm() / weight.norm()).item() == pytest.approx(0.005, rel=1e-5)


@pytest.mark.parametrize("arch, width", [("wrn", 1), ("densenet", 4)])
def test_perturbing_leaves_model_statistics_and_gradients_alone(arch, width):
    torch.manual_seed(0)
    model = common.build_model(arch, 10, width, 10)
    model.train()(torch.rand(32, 3, 16, 16))
    x = torch.rand(8, 3, 16, 16)
    before = copy.deepcopy(model.state_dict())
    rng = torch.get_rng_state()
    train_awp.weight_perturbation(model, weights_of(model), x, 1 - x, torch.arange(8), beta=6.0, gamma=0.005)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_weight_without_gradient_is_not_perturbed():
    model, _, x, x_adv, y = problem()
    with torch.no_grad():
        model.fc.weight.zero_()  # then nothing reaches the layers before it, and ‖w‖ = 0 for itself
    perturbation = train_awp.weight_perturbation(model, weights_of(model), x, x_adv, y, beta=6.0, gamma=0.005)
    assert all(torch.equal(step, torch.zeros_like(step)) for step in perturbation)


@pytest.fixture
def arguments(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (80, 8, 8, 3), np.uint8)
    labels = np.arange(80) % 10
    np.savez(tmp_path / "tiny.npz", x_train=images[:60], y_train=labels[:60], x_test=images[60:], y_test=labels[60:])
    return ["--dataset", "tiny", "--data-dir", str(tmp_path), "--depth", "10", "--width", "1", "--batch-size", "20",
            "--steps", "2", "--epochs", "2", "--eval-size", "20", "--precision", "fp32", "--schedule", "cosine"]


def trained(script, arguments, out):
    script.main([*arguments, "--out", str(out)])
    return common.read_checkpoint(out / "last.pt")["model"]


def same(one, other):
    return all(torch.equal(one[key], other[key]) for key in one)


def test_update_is_the_formula(arguments, tmp_path, monkeypatch):
    """The first steps of a run, of float64, with momentum and weight decay taken at the perturbed weights."""
    steps = []

    def spy(model, weights, x, x_adv, y, beta, gamma):
        steps.append(([parameter.detach().clone() for parameter in model.parameters()], x, x_adv, y))
        return perturb(model, weights, x, x_adv, y, beta, gamma)

    perturb = train_awp.weight_perturbation
    monkeypatch.setattr(train_awp, "weight_perturbation", spy)
    monkeypatch.setattr(common, "to_float", lambda images: images.double() / 255)
    monkeypatch.setattr(common, "build_model", lambda *settings: common.WideResNet(10, 1, 10).double())
    monkeypatch.setattr(common.Run, "finish", lambda run, data: steps.append((list(run.model.parameters()),)))
    monkeypatch.setattr(common, "evaluate", lambda *_, **__: {"n": 1, **dict.fromkeys(
        ("natural_accuracy", "robust_accuracy", "perturbation_stability"), 0.0)})
    train_awp.main([*arguments, "--epochs", "1", "--warmup", "0", "--beta", "3", "--lr", "0.05",
                    "--out", str(tmp_path / "run")])
    assert len(steps) == 4
    momentum = [torch.zeros_like(w) for w in steps[0][0]]
    for (start, x, x_adv, y), (end, *_) in zip(steps, steps[1:]):
        model = common.WideResNet(10, 1, 10).double()
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), start):
                parameter.copy_(value)
        loss_written_out(model, x, x_adv, y, 3).backward()
        with torch.no_grad():
            for w in weights_of(model):
                w += 0.005 * w.norm() * w.grad / w.grad.norm()
        model.zero_grad()
        loss_written_out(model, x, x_adv, y, 3).backward()
        momentum = [0.9 * m + w.grad + 5e-4 * w.detach() for m, w in zip(momentum, model.parameters())]
        for before, m, after in zip(start, momentum, end):
            torch.testing.assert_close(after.detach(), before - 0.05 * m, rtol=0, atol=1e-9)


def test_gamma_zero_is_trades_bit_for_bit(arguments, tmp_path):
    awp = trained(train_awp, [*arguments, "--gamma", "0", "--warmup", "0"], tmp_path / "awp")
    settings = ["--eps", "8/255", "--step-size", "2/255", "--weight-decay", "5e-4"]
    assert same(awp, trained(train_trades, [*arguments, *settings], tmp_path / "trades"))  # running statistics too


def test_perturbation_is_removed_to_rounding(arguments, tmp_path):
    """At a learning rate that moves nothing, float32 weights stay where they were though γ is not 0."""
    arguments += ["--warmup", "0", "--lr", "1e-12", "--out", str(tmp_path / "run")]
    torch.manual_seed(1)
    start = common.WideResNet(10, 1, 10).state_dict()
    train_awp.main(arguments)
    end = common.read_checkpoint(tmp_path / "run" / "last.pt")["model"]
    for key, value in start.items():
        if value.ndim > 1:
            torch.testing.assert_close(end[key], value, rtol=0, atol=6 * 2 ** -23 * value.abs().max().item())  # 6 steps


def test_warmup_epochs_are_plain_trades(arguments, tmp_path, monkeypatch):
    called = []
    perturb = train_awp.weight_perturbation
    monkeypatch.setattr(train_awp, "weight_perturbation", lambda *args: called.append(1) or perturb(*args))
    trained(train_awp, [*arguments, "--warmup", "1"], tmp_path / "run")
    assert len(called) == 3  # the second of two epochs of three steps


def test_resumed_run_ends_with_the_same_weights(arguments, check_resume):
    check_resume(train_awp.main, [*arguments, "--warmup", "1"], "--gamma", "0.01", "--gamma 0.005 there, 0.01 here")


def test_training_on_synthetic_data_lowers_the_risk_and_gives_robustness(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "synthetic", functools.partial(common.synthetic, n_train=1600, n_test=100))
    monkeypatch.chdir(tmp_path)
    train_awp.main(["--dataset", "synthetic", "--depth", "10", "--width", "1", "--steps", "3", "--step-size", "0.015",
                    "--batch-size", "32", "--epochs", "4", "--warmup", "1", "--eval-every", "4", "--eval-size", "40",
                    "--schedule", "cosine"])
    out, = (tmp_path / "runs").iterdir()
    assert out.name.startswith("awp-synthetic-wrn10-1-beta6-seed1") and "warmup1" in out.name
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    metrics = json.loads((out / "metrics.json").read_text())
    assert log[-1]["natural_risk"] < log[0]["natural_risk"]
    assert metrics["robust_accuracy"] > 0.3 and metrics["attack"]["eps"] == 8 / 255  # chance: 0.1


def test_defaults_are_the_recipe(monkeypatch):
    started = []
    monkeypatch.setattr(common, "start", lambda parser, argv: started.append(parser.parse_args(argv)))
    with pytest.raises(TypeError):  # nothing starts
        train_awp.main([])
    wanted = {"eps": 8 / 255, "step_size": 2 / 255, "steps": 10, "weight_decay": 5e-4, "lr": 0.1, "batch_size": 128,
              "epochs": 200, "schedule": "step", "gamma": 0.005, "warmup": 10, "arch": "wrn", "depth": 34, "width": 10}
    assert {key: vars(started[0])[key] for key in wanted} == wanted


def test_rate_falls_at_half_and_three_quarters(arguments, tmp_path):
    out = tmp_path / "run"
    train_awp.main([*arguments, "--schedule", "step", "--epochs", "4", "--steps", "0", "--out", str(out)])
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [entry["lr"] for entry in log] == pytest.approx([0.1, 0.01, 0.001, 0.001])  # 200 epochs: from 100 and 150

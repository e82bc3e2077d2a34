"""Generalized adversarial training: the loss against its formula, whole runs, resuming.

CIFAR-100: test_train_trades.py.
"""
import copy
import functools
import json

import numpy as np
import pytest
import torch

import common
import train_at


def problem(n=16):
    """A small network in float32 and float64, a batch, and an x̂ that raises some losses and lowers others."""
    torch.manual_seed(0)
    model = common.WideResNet(10, 1, 10)
    x, y = torch.rand(n, 3, 16, 16), torch.randint(0, 10, (n,))
    return model, copy.deepcopy(model).double(), x, (x + 0.1 * torch.randn_like(x)).clamp(0, 1), y


def cross_entropy(logits, y):
    return logits.exp().sum(1).log() - logits[range(len(y)), y]  # [N], written out


@pytest.mark.parametrize("beta", [0, 1, 3.5])
def test_loss_and_gradients_are_the_formula(beta):
    model, exact, x, x_adv, y = problem()
    loss, natural_risk, robust_regularization = train_at.at_loss(model, x, x_adv, y, beta)
    loss.backward()

    exact.train()
    natural, adversarial = cross_entropy(exact(x.double()), y), cross_entropy(exact(x_adv.double()), y)
    raised = adversarial > natural
    assert 0 < raised.sum() < len(y)  # the clipping has something to do
    robust = (adversarial - natural)[raised].sum() / len(y)
    wanted = natural.mean() + beta * robust
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert natural_risk.item() == pytest.approx(natural.mean().item(), rel=1e-6)
    assert robust_regularization.item() == pytest.approx(robust.item(), abs=1e-6)
    for parameter, exact_parameter in zip(model.parameters(), exact.parameters()):
        gradient = exact_parameter.grad
        torch.testing.assert_close(parameter.grad.double(), gradient, rtol=0, atol=1e-5 * gradient.abs().max().item())


def test_beta_one_is_the_larger_of_the_two_losses():
    _, model, x, x_adv, y = problem()
    loss, _, _ = train_at.at_loss(model, x.double(), x_adv.double(), y, beta=1)
    natural, adversarial = cross_entropy(model(x.double()), y), cross_entropy(model(x_adv.double()), y)
    assert loss.item() == pytest.approx(torch.maximum(natural, adversarial).mean().item(), abs=1e-12)


def test_attack_is_the_formula():
    _, model, x, _, y = problem()
    x = x.double()
    torch.manual_seed(1)
    x_adv = common.pgd(model, x, common.cross_entropy_to(y), eps=0.031, step_size=0.007, steps=10, start="gaussian")
    torch.manual_seed(1)
    wanted = x + 0.001 * torch.randn(x.shape, dtype=x.dtype)
    model.eval()
    for _ in range(10):
        wanted.requires_grad_()
        gradient, = torch.autograd.grad(cross_entropy(model(wanted), y).mean(), wanted)
        wanted = wanted.detach() + 0.007 * gradient.sign()
        wanted = torch.minimum(torch.maximum(wanted, x - 0.031), x + 0.031).clamp(0, 1)
    torch.testing.assert_close(x_adv, wanted, rtol=0, atol=1e-12)


def test_training_on_synthetic_data_lowers_the_risk_and_gives_robustness(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "synthetic", functools.partial(common.synthetic, n_train=1600, n_test=100))
    out = tmp_path / "run"
    train_at.main(["--dataset", "synthetic", "--depth", "10", "--width", "1", "--steps", "3", "--step-size", "0.015",
                   "--batch-size", "32", "--epochs", "4", "--eval-every", "4", "--eval-size", "40",
                   "--schedule", "cosine", "--out", str(out)])
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    metrics = json.loads((out / "metrics.json").read_text())
    assert [entry["epoch"] for entry in log] == [1, 2, 3, 4]
    assert log[-1]["natural_risk"] < log[0]["natural_risk"]
    assert metrics["n"] == 100 and metrics["robust_accuracy"] > 0.3  # chance: 0.1
    settings = json.loads((out / "args.json").read_text())
    assert (settings["method"], settings["beta"], settings["eps"], settings["weight_decay"]) == ("at", 1.0, 0.031, 2e-4)


@pytest.fixture
def arguments(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (80, 8, 8, 3), np.uint8)
    labels = np.arange(80) % 10
    np.savez(tmp_path / "tiny.npz", x_train=images[:60], y_train=labels[:60], x_test=images[60:], y_test=labels[60:])
    return ["--dataset", "tiny", "--data-dir", str(tmp_path), "--depth", "10", "--width", "1", "--batch-size", "20",
            "--steps", "2", "--epochs", "2", "--eval-size", "20"]


def test_resumed_run_ends_with_the_same_weights(arguments, check_resume):
    check_resume(train_at.main, arguments, "--beta", "2", "--beta 1.0 there, 2.0 here")


def test_run_folder_names_method_and_settings_that_differ(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train_at.main([*arguments, "--epochs", "1", "--arch", "densenet", "--width", "4"])
    folder, = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("at-tiny-densenet10-4-beta1-seed1") and "epochs1" in folder.name

"""Generalized adversarial training: the loss and whole steps against formulas, a whole run.

CIFAR-100, resuming: test_train_trades.py.
"""
import pytest
import torch

import train_at


def cross_entropy(logits, y):
    return logits.exp().sum(1).log() - logits[range(len(y)), y]  # [N], written out


def risks(logits, logits_adv, y):
    natural, adversarial = cross_entropy(logits, y), cross_entropy(logits_adv, y)
    return natural.mean(), (adversarial - natural)[adversarial > natural].sum() / len(y)


@pytest.mark.parametrize("beta", [0, 1, 3.5])
def test_loss_and_gradients_are_the_formula(problem, check_loss, beta):
    _, exact, x, x_adv, y = problem
    raised = cross_entropy(exact(x_adv.double()), y) > cross_entropy(exact(x.double()), y)
    assert 0 < raised.sum() < len(y)  # the clipping has something to do
    check_loss(train_at.at_loss, risks, beta)


def test_beta_one_is_the_larger_of_the_two_losses(problem):
    _, model, x, x_adv, y = problem
    loss, _, _ = train_at.at_loss(model, x.double(), x_adv.double(), y, beta=1)
    natural, adversarial = cross_entropy(model(x.double()), y), cross_entropy(model(x_adv.double()), y)
    assert loss.item() == pytest.approx(torch.maximum(natural, adversarial).mean().item(), abs=1e-12)


@pytest.mark.parametrize("steps", ["1", "10"])
def test_attack_and_update_are_the_formulas(check_steps, steps):
    check_steps(train_at.main, ["--steps", steps, "--beta", "2"], risks, clean_first=False,
                attacked=lambda logits, logits_adv, y: cross_entropy(logits_adv, y).mean())


def test_training_on_synthetic_data_lowers_the_risk_and_gives_robustness(train_on_synthetic):
    out, log, metrics, settings = train_on_synthetic(train_at.main)
    assert out.name[:-7] == "at-synthetic-wrn-10-1-beta1-seed1"
    assert [entry["epoch"] for entry in log] == [1, 2, 3, 4]
    assert log[-1]["natural_risk"] < log[0]["natural_risk"]
    assert metrics["n"] == 80 and metrics["robust_accuracy"] > 0.3  # chance: 0.1
    wanted = {"method": "at", "beta": 1.0, "eps": 0.031, "weight_decay": 2e-4}
    assert {key: settings[key] for key in wanted} == wanted

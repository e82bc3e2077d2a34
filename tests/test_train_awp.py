"""AWP: whole steps against formulas, statistics against the release's passes; runs: test_train_trades.py."""
import copy

import pytest
import torch
from conftest import log_of

import common
import train_awp
from test_train_trades import kl, risks


def weights_of(model):
    return [parameter for parameter in model.parameters() if parameter.ndim > 1]


def move(model, loss, gamma=0.005):
    """w + γ·‖w‖·g/‖g‖, in place, g the gradient of loss(model); BatchNorm stays as it is."""
    shadow = copy.deepcopy(model)
    loss(shadow).backward()
    with torch.no_grad():
        for w, copied in zip(weights_of(model), weights_of(shadow)):
            w += gamma * w.norm() * copied.grad / copied.grad.norm()


def test_running_statistics_move_as_by_the_three_passes_of_the_release(problem):
    _, model, x, x_adv, y = problem
    wanted = copy.deepcopy(model).train()
    for images in x_adv, x, x:
        wanted(images.double())
    train_awp.trades_loss(model, x.double(), x_adv.double(), y, 6.0)
    for norm, other in zip(model.modules(), wanted.modules()):
        if isinstance(norm, torch.nn.BatchNorm2d):
            assert norm.momentum == 0.1
            torch.testing.assert_close((norm.running_mean, norm.running_var),
                                       (other.running_mean, other.running_var), rtol=1e-12, atol=1e-12)


def test_weight_without_gradient_is_not_perturbed(problem):
    model, _, x, x_adv, y = problem
    with torch.no_grad():
        model.fc.weight.zero_()  # then nothing reaches the layers before it, and ‖w‖ = 0 for itself
    found = train_awp.weight_perturbation(model, weights_of(model), x, x_adv, y, beta=6.0, gamma=0.005)
    assert all(torch.equal(step, torch.zeros_like(step)) for step in found)


def test_attack_and_update_are_the_formulas(check_steps, monkeypatch):
    """Momentum and weight decay taken at the perturbed weights, the perturbation then subtracted."""
    change = common.temporarily
    monkeypatch.setattr(common, "temporarily", lambda things, name, value: change(
        () if name == "momentum" else things, name, value))  # which the test above looks at
    check_steps(train_awp.main, ["--warmup", "0", "--beta", "3"], risks, shift=move,
                attacked=lambda logits, logits_adv, y: kl(logits, logits_adv).sum(), clean_first=False)


def test_warmup_epochs_are_plain_trades(tiny, monkeypatch):
    called = []
    perturb = train_awp.weight_perturbation
    monkeypatch.setattr(train_awp, "weight_perturbation", lambda *args: called.append(1) or perturb(*args))
    train_awp.main([*tiny, "--warmup", "1"])
    assert len(called) == 4  # the second of two epochs of four steps


def test_defaults_are_the_recipe(monkeypatch):
    started = []
    monkeypatch.setattr(common, "start", lambda parser, argv: started.append(parser.parse_args(argv)))
    with pytest.raises(TypeError):  # nothing starts
        train_awp.main([])
    wanted = {"eps": 8 / 255, "step_size": 2 / 255, "steps": 10, "weight_decay": 5e-4, "lr": 0.1,
              "batch_size": 128, "epochs": 200, "schedule": "step", "gamma": 0.005, "warmup": 10,
              "arch": "wrn", "method": "awp"}
    assert {key: vars(started[0])[key] for key in wanted} == wanted


@pytest.mark.parametrize("rates", [[0.1], [0.1, 0.001], [0.1, 0.01, 0.001, 0.001]])
def test_rate_falls_at_half_and_three_quarters_but_never_in_epoch_1(tiny, tmp_path, rates):
    settings = ["--schedule", "step", "--epochs", str(len(rates)), "--steps", "0"]
    train_awp.main([*tiny, *settings])
    assert [entry["lr"] for entry in log_of(tmp_path / "run")] == pytest.approx(rates)

"""AWP: the perturbed update against its formula, BatchNorm untouched, exact removal, whole runs.

CIFAR-100 and DenseNet: test_train_trades.py.
"""
import copy

import pytest
import torch
from conftest import log_of

import common
import train_awp
import train_trades
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


def test_trades_loss_is_that_of_train_trades_exactly(problem):
    model, _, x, x_adv, y = problem
    found = []
    for script, network in ((train_awp, model), (train_trades, copy.deepcopy(model))):
        losses = script.trades_loss(network, x, x_adv, y, 6.0)
        losses[0].backward()
        found.append([*losses, *(p.grad for p in network.parameters()), *network.buffers()])
    assert all(map(torch.equal, *found)) and len(found[0]) > 40


@pytest.mark.parametrize("arch, width", [("wrn", 1), ("densenet", 4)])
def test_perturbing_leaves_model_statistics_and_gradients_alone(arch, width):
    torch.manual_seed(0)
    model = common.NETWORKS[arch](10, width, 10)
    model.train()(torch.rand(32, 3, 16, 16))
    x = torch.rand(8, 3, 16, 16)
    before = copy.deepcopy(model.state_dict())
    rng = torch.get_rng_state()
    train_awp.weight_perturbation(model, weights_of(model), x, 1 - x, torch.arange(8), beta=6.0, gamma=0.005)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_weight_without_gradient_is_not_perturbed(problem):
    model, _, x, x_adv, y = problem
    with torch.no_grad():
        model.fc.weight.zero_()  # then nothing reaches the layers before it, and ‖w‖ = 0 for itself
    found = train_awp.weight_perturbation(model, weights_of(model), x, x_adv, y, beta=6.0, gamma=0.005)
    assert all(torch.equal(step, torch.zeros_like(step)) for step in found)


def test_attack_and_update_are_the_formulas(check_steps):
    """Momentum and weight decay taken at the perturbed weights, the perturbation then subtracted."""
    check_steps(train_awp.main, ["--warmup", "0", "--beta", "3"], risks, shift=move,
                attacked=lambda logits, logits_adv, y: kl(logits, logits_adv).sum())


def trained(script, arguments, out):
    script.main([*arguments, "--out", str(out)])
    return common.read_checkpoint(out / "last.pt")["model"]


def test_gamma_zero_is_trades_bit_for_bit(tiny, tmp_path):
    tiny += ["--schedule", "cosine"]
    awp = trained(train_awp, [*tiny, "--gamma", "0", "--warmup", "0"], tmp_path / "awp")
    settings = ["--eps", "8/255", "--weight-decay", "5e-4"]
    trades = trained(train_trades, [*tiny, *settings], tmp_path / "trades")
    assert all(value.equal(trades[key]) for key, value in awp.items())  # running statistics too


def test_perturbation_is_removed_to_rounding(tiny, tmp_path):
    """At a learning rate that moves nothing, float32 weights stay where they were though γ is not 0."""
    common.seed_everything(1)
    start = common.WideResNet(10, 1, 10).state_dict()
    end = trained(train_awp, [*tiny, "--warmup", "0", "--lr", "1e-12"], tmp_path / "run")
    for key, value in start.items():
        if value.ndim > 1:  # 8 steps
            torch.testing.assert_close(end[key], value, rtol=0, atol=8 * 2 ** -23 * value.abs().max().item())


def test_warmup_epochs_are_plain_trades(tiny, tmp_path, monkeypatch):
    called = []
    perturb = train_awp.weight_perturbation
    monkeypatch.setattr(train_awp, "weight_perturbation", lambda *args: called.append(1) or perturb(*args))
    trained(train_awp, [*tiny, "--warmup", "1"], tmp_path / "run")
    assert len(called) == 4  # the second of two epochs of four steps


def test_training_on_synthetic_data_lowers_the_risk_and_gives_robustness(train_on_synthetic):
    out, log, metrics, settings = train_on_synthetic(train_awp.main, "--step-size", "8/255")
    assert out.name[:-7] == "awp-synthetic-wrn-10-1-beta6-seed1" and settings["warmup"] == 1
    assert log[-1]["natural_risk"] < log[0]["natural_risk"]
    assert metrics["robust_accuracy"] > 0.3 and metrics["attack"]["eps"] == 8 / 255  # chance: 0.1


def test_defaults_are_the_recipe(monkeypatch):
    started = []
    monkeypatch.setattr(common, "start", lambda parser, argv: started.append(parser.parse_args(argv)))
    with pytest.raises(TypeError):  # nothing starts
        train_awp.main([])
    wanted = {"eps": 8 / 255, "step_size": 2 / 255, "steps": 10, "weight_decay": 5e-4, "lr": 0.1,
              "batch_size": 128, "epochs": 200, "schedule": "step", "gamma": 0.005, "warmup": 10,
              "arch": "wrn", "method": "awp"}
    assert {key: vars(started[0])[key] for key in wanted} == wanted


def test_rate_falls_at_half_and_three_quarters(tiny, tmp_path):
    trained(train_awp, [*tiny, "--schedule", "step", "--epochs", "4", "--steps", "0"], tmp_path / "run")
    log = log_of(tmp_path / "run")
    assert [entry["lr"] for entry in log] == pytest.approx([0.1, 0.01, 0.001, 0.001])

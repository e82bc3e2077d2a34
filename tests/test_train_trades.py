"""TRADES against its formula, training with extra data, and runs of every script on CIFAR-100.

(Reading extra data, bookkeeping, resuming and errors: test_common.py.)
"""
import hashlib
import pickle

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR100

import common
import train_at
import train_awp
import train_trades
from common import Attack, UserError

# ----------------------------------------------------------------------------------------------------- formula


def kl(logits, logits_adv):
    """Σ p (log p - log q) for each image, written out."""
    p, q = (z.exp() / z.exp().sum(1, keepdim=True) for z in (logits, logits_adv))
    return (p * (p.log() - q.log())).sum(1)


def risks(logits, logits_adv, y):
    natural = logits.exp().sum(1).log() - logits[range(len(y)), y]
    return natural.mean(), kl(logits, logits_adv).mean()


def test_loss_and_gradients_are_the_formula(check_loss):
    check_loss(train_trades.trades_loss, risks, beta=6.0)


@pytest.mark.parametrize("steps", ["1", "10"])
def test_attack_and_update_are_the_formulas(check_steps, steps):
    check_steps(train_trades.main, ["--steps", steps], risks,
                attacked=lambda logits, logits_adv, y: kl(logits, logits_adv).sum())


def test_attack_in_float32_steps_as_in_float64_away_from_ties(problem):
    model, exact, x, _, _ = problem
    torch.manual_seed(1)
    x_adv = common.pgd(model, x, common.kl_to(common.clean_probabilities(model, x)),
                       Attack("kl", step_size=0.007, steps=1, start="gaussian"))
    torch.manual_seed(1)
    start = (x + 0.001 * torch.randn(x.shape)).double().requires_grad_()
    exact.eval()
    gradient, = torch.autograd.grad(kl(exact(x.double()), exact(start)).sum(), start)
    wanted = (start + 0.007 * gradient.sign()).clamp(0, 1)  # far inside the ball
    clear = gradient.abs() > 1e-3 * gradient.abs().max()  # near x the KL is a difference of near equals
    assert clear.float().mean() > 0.95
    torch.testing.assert_close(x_adv.double()[clear], wanted[clear], rtol=0, atol=1e-6)


# -------------------------------------------------------------------------------------------------- extra data


@pytest.fixture
def extra(tmp_path):
    rng = np.random.default_rng(1)
    np.savez(tmp_path / "extra.npz", image=rng.integers(0, 256, (30, 8, 8, 3), np.uint8), label=np.arange(30) % 10)
    return ["--extra-data", str(tmp_path / "extra.npz")]


def test_training_with_extra_data(tiny, extra, tmp_path):
    train_trades.main([*tiny, *extra, "--nesterov", "--schedule", "cosine"])
    assert common.read_json(tmp_path / "run" / "metrics.json")["last"]["n"] == 8
    checkpoint = common.read_checkpoint(tmp_path / "run" / "last.pt")
    assert checkpoint["optimizer"]["param_groups"][0]["nesterov"] is True
    assert checkpoint["args"]["extra_data"] == extra[1] and checkpoint["args"]["extra_fraction"] == 0.5


def test_resumed_run_with_extra_data_ends_with_the_same_weights(tiny, extra, check_resume):
    check_resume(train_trades.main, [*tiny, *extra], "--extra-fraction", "0.25",
                 "--extra-fraction 0.5 there, 0.25 here")


def test_a_share_of_no_extra_data_is_an_error(tiny, tmp_path):
    with pytest.raises(UserError, match="--extra-fraction is the share of --extra-data, which is not given"):
        train_trades.main([*tiny, "--extra-fraction", "0"])
    assert not (tmp_path / "run").exists()


# -------------------------------------------------------------------------------------------------- all scripts


SCRIPTS = [train_trades, train_at, train_awp]


@pytest.fixture
def cifar100(tmp_path, monkeypatch):
    """200 training and 50 test images in torchvision's own format; returns --data-dir."""
    folder = tmp_path / CIFAR100.base_folder
    folder.mkdir()

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    rng = np.random.default_rng(0)
    for split, n in (("train", 200), ("test", 50)):
        content = {"data": rng.integers(0, 256, (n, 3072), np.uint8), "fine_labels": [i % 100 for i in range(n)]}
        monkeypatch.setattr(CIFAR100, f"{split}_list", [[split, write(split, content)]])
    md5 = write("meta", {"fine_label_names": [str(i) for i in range(100)]})
    monkeypatch.setattr(CIFAR100, "meta", {"filename": "meta", "key": "fine_label_names", "md5": md5})
    return str(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("arch, width", [("wrn", "1"), ("densenet", "4")])
def test_every_script_trains_on_cifar100(cifar100, tmp_path, monkeypatch, script, arch, width):
    monkeypatch.setattr(common, "REPORT", Attack(steps=2))
    out = tmp_path / "run"
    script.main(["--dataset", "cifar100", "--data-dir", cifar100, "--arch", arch, "--depth", "10", "--width", width,
                 "--train-size", "100", "--batch-size", "50", "--steps", "1", "--epochs", "1", "--eval-size", "20",
                 "--out", str(out)])
    metrics = common.read_json(out / "metrics.json")["last"]
    assert metrics["n"] == 50 and 0 <= metrics["robust_accuracy"] <= metrics["natural_accuracy"] < 0.2
    assert common.read_checkpoint(out / "last.pt")["model"]["fc.weight"].shape[0] == 100
    assert np.log(100) - 1 < common.read_log(out / "log.jsonl")[0]["natural_risk"] < np.log(100) + 2


@pytest.mark.parametrize("script", [*SCRIPTS, "extra"])
@pytest.mark.parametrize("flags, share", [(["--no-flip"], 0), ([], 0.5)])
def test_no_flip_never_mirrors(tiny, extra, monkeypatch, script, flags, share):
    flipped, genuine = [], common.crop_flip
    monkeypatch.setattr(common, "crop_flip", lambda images, top, left, flip, *padding: (
        flipped.append(flip) or genuine(images, top, left, flip, *padding)))
    monkeypatch.setattr(common.Run, "finish", lambda run, test: None)
    flags = [*tiny, *flags, "--steps", "0", "--epochs", "4", "--eval-every", "4"]
    script.main(flags) if script != "extra" else train_trades.main([*flags, *extra])
    assert len(torch.cat(flipped)) == 256
    assert abs(torch.cat(flipped).float().mean().item() - share) < 0.2 * share + 1e-9


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("odd", [{"classes": 1}, {"size": 4}, {"n_train": 1, "classes": 1}, {"n_test": 1}])
def test_odd_data_sets_work(tiny, tmp_path, write_npz, script, odd):
    write_npz(**odd)
    script.main([*tiny, "--epochs", "1"])
    metrics = common.read_json(tmp_path / "run" / "metrics.json")["last"]
    assert metrics["n"] == odd.get("n_test", 8) and 0 <= metrics["robust_accuracy"] <= 1
    assert "classes" not in odd or metrics["robust_accuracy"] == metrics["perturbation_stability"] == 1


@pytest.mark.parametrize("beta, natural, robust, stability", [
    ("0", (0.5, 1), (0, 0.2), (0, 0.5)),     # lives on the texture that is always right and that attacks erase
    ("6", (0.3, 1), (0.3, 1), (0.6, 1))])    # relies on the square
def test_synthetic_data_trade_natural_for_robust_accuracy(train_on_synthetic, beta, natural, robust, stability):
    flags = ["--beta", beta, "--eps", "0.06", "--step-size", "0.06"]  # ε above the sum of both textures, 0.07?
    out, _, metrics, _ = train_on_synthetic(train_trades.main, *flags)
    assert out.name.startswith(f"trades-synthetic-wrn10-1-beta{beta}-seed1")
    for name, (low, high) in zip(common.METRICS, (natural, robust, stability)):
        assert low <= metrics[name] <= high

"""TRADES against its formula, and training with extra data. (Bookkeeping, resuming and errors: test_common.py.)"""
import copy
import hashlib
import json
import os
import pickle

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR100

import common
import train_at
import train_awp
import train_trades

SMALL = ["--depth", "10", "--width", "1", "--batch-size", "20", "--steps", "2", "--epochs", "1", "--eval-size", "20"]


def arrays(n_train=60, n_test=20, classes=10, size=8):
    rng = np.random.default_rng(0)
    return {"x_train": rng.integers(0, 256, (n_train, size, size, 3), np.uint8),
            "y_train": np.arange(n_train) % classes,
            "x_test": rng.integers(0, 256, (n_test, size, size, 3), np.uint8), "y_test": np.arange(n_test) % classes}


@pytest.fixture
def tiny(tmp_path):
    """Arguments of a run on 60 tiny images, and the folder they lie in."""
    np.savez(tmp_path / "tiny.npz", **arrays())
    return [*SMALL, "--dataset", "tiny", "--data-dir", str(tmp_path), "--out", str(tmp_path / "run")], tmp_path


def read(folder, name="metrics.json"):
    return json.loads((folder / name).read_text())


# ------------------------------------------------------------------------------------------------------- formula


def problem(n=8):
    """A small network with seasoned BatchNorm statistics, in float32 and float64, and a batch."""
    torch.manual_seed(0)
    model = common.WideResNet(10, 1, 10)
    model.train()(torch.rand(32, 3, 16, 16))
    return model, copy.deepcopy(model).double(), torch.rand(n, 3, 16, 16), torch.randint(0, 10, (n,))


def kl(logits, logits_adv):
    """Σ p (log p - log q) for each image, written out."""
    p, q = (z.exp() / z.exp().sum(1, keepdim=True) for z in (logits, logits_adv))
    return (p * (p.log() - q.log())).sum(1)


def test_loss_and_gradients_are_the_formula():
    model, exact, x, y = problem()
    x_adv = (x + 0.03 * torch.randn_like(x)).clamp(0, 1)
    loss, natural_risk, robust_regularization = train_trades.trades_loss(model, x, x_adv, y, beta=6.0)
    loss.backward()

    logits, logits_adv = exact.train()(x.double()), exact(x_adv.double())
    natural = (logits.exp().sum(1).log() - logits[range(len(y)), y]).mean()
    robust = kl(logits, logits_adv).mean()
    (natural + 6 * robust).backward()
    assert loss.item() == pytest.approx((natural + 6 * robust).item(), rel=1e-6)
    assert natural_risk.item() == pytest.approx(natural.item(), rel=1e-6)
    assert robust_regularization.item() == pytest.approx(robust.item(), abs=1e-6)
    for parameter, wanted in zip(model.parameters(), exact.parameters()):
        gradient = wanted.grad
        torch.testing.assert_close(parameter.grad.double(), gradient, rtol=0, atol=1e-5 * gradient.abs().max().item())


def ascend(model, x, noise, eps, step_size, steps):
    """TRADES' attack written out; also the gradient of its first step."""
    model.eval()
    x_adv, first = x + 0.001 * noise, None
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        gradient, = torch.autograd.grad(kl(model(x), model(x_adv)).sum(), x_adv)
        first = gradient if first is None else first
        x_adv = x_adv.detach() + step_size * gradient.sign()
        x_adv = torch.minimum(torch.maximum(x_adv, x - eps), x + eps).clamp(0, 1)
    return x_adv, first


@pytest.mark.parametrize("steps", [1, 10])
def test_attack_is_the_formula(steps):
    _, exact, x, _ = problem()
    x = x.double()
    setting = {"eps": 0.031, "step_size": 0.007, "steps": steps}
    torch.manual_seed(1)
    x_adv = common.pgd(exact, x, common.kl_to(common.clean_probabilities(exact, x)), start="gaussian", **setting)
    torch.manual_seed(1)
    wanted, _ = ascend(exact, x, torch.randn(x.shape, dtype=x.dtype), **setting)
    torch.testing.assert_close(x_adv, wanted, rtol=0, atol=1e-12)


def test_attack_in_float32_steps_as_in_float64_away_from_ties():
    model, exact, x, _ = problem()
    setting = {"eps": 0.031, "step_size": 0.007, "steps": 1}
    torch.manual_seed(1)
    x_adv = common.pgd(model, x, common.kl_to(common.clean_probabilities(model, x)), start="gaussian", **setting)
    torch.manual_seed(1)
    wanted, gradient = ascend(exact, x.double(), torch.randn(x.shape).double(), **setting)
    clear = gradient.abs() > 1e-3 * gradient.abs().max()  # near x the KL's gradient is a difference of near equals
    assert clear.float().mean() > 0.95
    torch.testing.assert_close(x_adv.double()[clear], wanted[clear], rtol=0, atol=1e-6)


# ---------------------------------------------------------------------------------------------------- extra data


def extra_arrays(n=30, size=8):
    rng = np.random.default_rng(1)
    return rng.integers(0, 256, (n, size, size, 3), np.uint8), np.arange(n) % 10


@pytest.fixture
def data(tiny):
    return common.load_data("tiny", tiny[1], torch.device("cpu"))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_rst_pickle_loads(tmp_path, data, protocol):
    x, y = extra_arrays()
    content = {"data": x, "extrapolated_targets": y, "prediction_model": "vanilla", "accuracy": np.float64(0.5)}
    (tmp_path / "extra.pickle").write_bytes(pickle.dumps(content, protocol))
    images, labels = train_trades.load_extra(str(tmp_path / "extra.pickle"), data)
    assert images.dtype == torch.uint8 and labels.dtype == torch.int64
    assert np.array_equal(images.permute(0, 2, 3, 1), x) and np.array_equal(labels, y)


def test_pickle_that_names_the_modules_of_old_numpy_loads(tmp_path, data):
    x, y = extra_arrays()
    content = pickle.dumps({"data": x, "extrapolated_targets": list(y)}, 2)
    (tmp_path / "extra.pickle").write_bytes(content.replace(b"numpy._core", b"numpy.core"))
    images, labels = train_trades.load_extra(str(tmp_path / "extra.pickle"), data)
    assert np.array_equal(images.permute(0, 2, 3, 1), x) and np.array_equal(labels, y)


class Harmful:
    def __init__(self, call, *arguments):
        self.called = call, arguments

    def __reduce__(self):
        return self.called


@pytest.mark.parametrize("call", [(os.system, "touch harm"), (eval, "open('harm', 'w')"), (np.load, "harm.npy"),
                                  (np.save, "harm", 1), (getattr, np, "load")])
def test_pickle_that_would_run_code_is_refused(tmp_path, tiny, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    if call[0] is getattr:
        content = b"cnumpy.core.multiarray\n_reconstruct.__class__\n."  # a dotted name reaches into what is allowed
    else:
        content = pickle.dumps({"data": Harmful(*call), "extrapolated_targets": np.arange(3)})
    (tmp_path / "extra.pickle").write_bytes(content)
    with pytest.raises(common.UserError, match="which arrays do not need"):
        train_trades.main([*tiny[0], "--extra-data", "extra.pickle"])
    assert not list(tmp_path.glob("harm*"))


x, y = extra_arrays()
MALFORMED = {
    "missing file": (None, "FileNotFoundError"),
    "no pickle": (b"not a pickle", "must hold arrays 'data' and 'extrapolated_targets'"),
    "empty": (b"", "EOFError"),
    "cut short": (pickle.dumps({"data": x, "extrapolated_targets": y})[:-100], "must hold arrays"),
    "another layout": (pickle.dumps([x, y]), "must hold arrays"),
    "a key missing": (pickle.dumps({"data": x}), "KeyError: 'extrapolated_targets'"),
    "float images": (pickle.dumps({"data": x / 255, "extrapolated_targets": y}), "must be uint8"),
    "another size": (pickle.dumps({"data": x[:, :4], "extrapolated_targets": y}), r"\[M, 8, 8, 3\], not uint8 \[30, 4"),
    "no images": (pickle.dumps({"data": x[:0], "extrapolated_targets": y[:0]}), "must be uint8"),
    "too few labels": (pickle.dumps({"data": x, "extrapolated_targets": y[1:]}), r"must be 30 integers in 0\.\.9"),
    "label too large": (pickle.dumps({"data": x, "extrapolated_targets": y + 1}), r"must be 30 integers in 0\.\.9"),
    "unlabelled": (pickle.dumps({"data": x, "extrapolated_targets": y - 1}), r"must be 30 integers in 0\.\.9"),
    "fractional labels": (pickle.dumps({"data": x, "extrapolated_targets": y / 2}), r"must be 30 integers in 0\.\.9"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_extra_data_is_refused(tmp_path, data, case):
    content, message = MALFORMED[case]
    if content is not None:
        (tmp_path / "extra.pickle").write_bytes(content)
    with pytest.raises(common.UserError, match=message):
        train_trades.load_extra(str(tmp_path / "extra.pickle"), data)


@pytest.mark.parametrize("content", [{"images": x, "label": y}, {"image": x, "label": y.astype(object)}])
def test_npz_without_the_arrays_is_refused(tmp_path, data, content):
    np.savez(tmp_path / "extra.npz", **content)
    with pytest.raises(common.UserError, match="must hold arrays 'image' and 'label'"):
        train_trades.load_extra(str(tmp_path / "extra.npz"), data)


@pytest.mark.parametrize("fraction, share", [(0, 0), (0.25, 5), (0.5, 10), (1, 20)])
def test_epoch_of_mixed_batches_draws_without_replacement(data, monkeypatch, fraction, share):
    monkeypatch.setattr(common, "random_crop_flip", lambda images: images)
    x_extra, y_extra = torch.full((100, 3, 8, 8), 255, dtype=torch.uint8), torch.arange(100, 200)
    data.y_train = torch.arange(60)
    stream = list(train_trades.mixed_batches(data, x_extra, y_extra, batch_size=20, fraction=fraction))
    assert len(stream) == 3  # 60 images in all, as the labelled set has
    for x, y in stream:
        extra = y >= 100
        assert len(y.unique()) == len(x) == 20 and extra.sum() == share and (x[extra] == 1).all()
        assert torch.equal(x[~extra], common.to_float(data.x_train[y[~extra]]))
    assert len(torch.cat([y for _, y in stream]).unique()) == 60


def test_few_extra_images_come_again_only_when_all_have_come(data):
    x_extra, y_extra = torch.zeros(7, 3, 8, 8, dtype=torch.uint8), torch.arange(7) + 100
    drawn = torch.cat([y[y >= 100] for _, y in train_trades.mixed_batches(data, x_extra, y_extra, 20, 0.5)])
    assert sorted(drawn.unique(return_counts=True)[1].tolist()) == [4, 4, 4, 4, 4, 5, 5]  # 30 draws from 7


def test_training_with_extra_data(tiny):
    arguments, folder = tiny
    np.savez(folder / "extra.npz", image=extra_arrays()[0], label=extra_arrays()[1])
    train_trades.main([*arguments, "--extra-data", str(folder / "extra.npz"), "--nesterov", "--schedule", "cosine"])
    assert read(folder / "run")["n"] == 20
    checkpoint = common.read_checkpoint(folder / "run" / "last.pt")
    assert checkpoint["optimizer"]["param_groups"][0]["nesterov"] is True
    assert checkpoint["args"]["extra_data"] == str(folder / "extra.npz") and checkpoint["args"]["extra_fraction"] == 0.5


def test_resumed_run_with_extra_data_ends_with_the_same_weights(tiny, check_resume):
    arguments, folder = tiny
    np.savez(folder / "extra.npz", image=extra_arrays()[0], label=extra_arrays()[1])
    check_resume(train_trades.main, [*arguments, "--extra-data", str(folder / "extra.npz"), "--epochs", "2"],
                 "--extra-fraction", "0.25", "--extra-fraction 0.5 there, 0.25 here")


# -------------------------------------------------------------------------------- both networks, both data sets


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


@pytest.mark.parametrize("script", [train_trades, train_at, train_awp])
@pytest.mark.parametrize("arch, width", [("wrn", "1"), ("densenet", "4")])
def test_every_script_trains_on_cifar100(cifar100, tmp_path, script, arch, width):
    out = tmp_path / "run"
    script.main(["--dataset", "cifar100", "--data-dir", cifar100, "--arch", arch, "--depth", "10", "--width", width,
                 "--train-size", "100", "--batch-size", "50", "--steps", "1", "--epochs", "1", "--eval-size", "20",
                 "--out", str(out)])
    metrics = read(out)
    assert metrics["n"] == 50 and 0 <= metrics["robust_accuracy"] <= metrics["natural_accuracy"] < 0.2
    assert common.read_checkpoint(out / "last.pt")["model"]["fc.weight"].shape[0] == 100
    assert np.log(100) - 1 < json.loads((out / "log.jsonl").read_text())["natural_risk"] < np.log(100) + 2


@pytest.mark.parametrize("beta, steps, epochs", [(0, 0, 6), (6, 3, 4)])
def test_synthetic_data_trade_natural_for_robust_accuracy(tmp_path, beta, steps, epochs):
    train_trades.main(["--dataset", "synthetic", "--train-size", "1600", "--depth", "10", "--width", "1",
                       "--epochs", str(epochs), "--batch-size", "32", "--schedule", "cosine", "--beta", str(beta),
                       "--steps", str(steps), "--step-size", "0.015", "--eval-every", "8", "--eval-size", "50", "--out", str(tmp_path / "run")])
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    if beta == 0:  # plain training lives on the texture that is always right, and that any attack can erase
        assert metrics["natural_accuracy"] > 0.85 and metrics["robust_accuracy"] < 0.05
        assert metrics["perturbation_stability"] < 0.3
    else:
        assert metrics["robust_accuracy"] > 0.5 and metrics["perturbation_stability"] > 0.7

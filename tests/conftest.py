"""Puts the repository's root on the path, so that tests run from anywhere; and what several test files share.

Tests run on the CPU even where there is a GPU: many compare runs to the last bit, which only a CPU promises.
"""
import copy
import importlib
import json
import multiprocessing
import os
import signal
import sys
from functools import partial
from pathlib import Path

# Before PyTorch is imported; processes that a test starts inherit these. One thread unless told otherwise:
# with tiny tensors more of them cost time, the more so on busy cores.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402
from common import Attack  # noqa: E402

processes = multiprocessing.get_context("forkserver")  # a clean process that has imported all, forked
processes.set_forkserver_preload(["train_trades", "train_fast_imagenet"])


def started(function, *args):
    """A process that runs a function of a test module."""
    process = processes.Process(target=function, args=args)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # where the first of all finds what to import
        process.start()
    return process


def train_until_killed(argv, steps):
    """Train with TRADES, and be killed in the midst of this step, the first of all being 1."""
    record = common.Run.record

    def counted(run, *images, **scalars):
        nonlocal steps
        steps -= 1
        record(run, *images, **scalars) if steps else os.kill(os.getpid(), signal.SIGKILL)
    common.Run.record = counted
    importlib.import_module("train_trades").main(argv)


@pytest.fixture
def write_npz(tmp_path):
    """write_npz(**changes): noise as tmp_path/tiny.npz; `changes` replaces arrays, None omits them."""
    def write(name="tiny", n_train=64, n_test=21, size=8, classes=10, **changes):
        rng = np.random.default_rng(0)
        x_train, x_test = (rng.integers(0, 256, (n, size, size, 3), np.uint8) for n in (n_train, n_test))
        arrays = {"x_train": x_train, "y_train": np.arange(n_train) % classes,
                  "x_test": x_test, "y_test": np.arange(n_test) % classes, **changes}
        path = tmp_path / f"{name}.npz"
        np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
        return path
    return write


@pytest.fixture
def tiny(tmp_path, write_npz, monkeypatch):
    """Arguments of two epochs of four steps on tiny.npz, into tmp_path/run; what a test appends wins."""
    for name, value in {  # sooner than the real ones
            "local_lipschitzness": partial(common.local_lipschitzness, starts=1),
            "report_attack": lambda eps, norm, step=0: Attack(norm=norm, eps=eps, step_size=eps / 2, steps=4)
            }.items():
        monkeypatch.setattr(common, name, value)
    write_npz()
    return ["--depth", "10", "--width", "1", "--batch-size", "16", "--steps", "2", "--epochs", "2",
            "--step-size", "0.02",
            "--eval-size", "8", "--test-size", "8", "--device", "cpu", "--precision", "fp32",
            "--dataset", "tiny", "--data-dir", str(tmp_path), "--out", str(tmp_path / "run")]


@pytest.fixture
def problem():
    """A small network with seasoned BatchNorm statistics, in float32 and float64; a batch x, x̂, y."""
    torch.manual_seed(0)
    model = common.WideResNet(10, 1, 10)
    model.train()(torch.rand(32, 3, 16, 16))
    x, y = torch.rand(16, 3, 16, 16), torch.randint(0, 10, (16,))
    return model, copy.deepcopy(model).double(), x, (x + 0.1 * torch.randn_like(x)).clamp(0, 1), y


@pytest.fixture
def check_loss(problem):
    """check_loss(loss, risks, beta): values and gradients of a method's loss are the formula's, in float64.

    risks(logits, adversarial logits, y) → natural risk and robust regularization, written out.
    """
    def check(loss, risks, beta):
        _, model, x, x_adv, y = problem
        x, x_adv = x.double(), x_adv.double()
        found = loss(model, x, x_adv, y, beta)  # which leaves the model in train mode
        natural, robust = risks(model(x), model(x_adv), y)
        for one, other in zip(found, (natural + beta * robust, natural, robust), strict=True):
            gradients = (torch.autograd.grad(value, [*model.parameters()], retain_graph=True)
                         for value in (one, other))
            torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-10)
            assert one.item() == pytest.approx(other.item(), rel=1e-10)
    return check


@pytest.fixture
def check_steps(monkeypatch, tiny, tmp_path):
    """check_steps(main, flags, risks, attacked): each step of a run of float64 is the formulas' step.

    risks: as in `check_loss`. attacked(logits, adversarial logits, y): what the attack raises. shift(network,
    loss): moves the weights to where the gradient is taken, loss(network) being the loss. Momentum, weight
    decay and BatchNorm's statistics are compared too; these last saw x̂ if `clean_first`, x if not.
    """
    def check(main, flags, risks, attacked, clean_first=True, shift=None):
        models, steps, build, batches = [], [], common.build_model, common.batches

        def build_double(*settings):
            models.append(build(*settings).double())
            return models[-1]

        def noted(*settings):
            for x, y in batches(*settings):
                steps.append((copy.deepcopy(models[0]), x, y, torch.get_rng_state()))
                yield x, y

        with monkeypatch.context() as patch:
            patch.setattr(common, "build_model", build_double)
            patch.setattr(common, "batches", noted)
            patch.setattr(common, "to_float", lambda images: images.double() / 255)
            main([*tiny, "--epochs", "1", "--lr", "0.05", "--schedule", "cosine", *flags])
        args = common.read_checkpoint(tmp_path / "run" / "last.pt")["args"]
        eps, momentum = args["eps"], [0 for _ in models[0].parameters()]
        assert len(steps) == 4
        for (before, x, y, rng), (after, *_) in zip(steps, [*steps[1:], models]):
            model = copy.deepcopy(before).eval()
            model.zero_grad()
            torch.set_rng_state(rng)
            x_adv = x + 0.001 * torch.randn_like(x)
            for _ in range(args["steps"]):
                x_adv.requires_grad_()
                gradient, = torch.autograd.grad(attacked(model(x), model(x_adv), y), x_adv)
                x_adv = x_adv.detach() + args["step_size"] * gradient.sign()
                x_adv = torch.minimum(torch.maximum(x_adv, x - eps), x + eps).clamp(0, 1)

            def loss(network):
                parts = [network.train()(part) for part in ((x, x_adv) if clean_first else (x_adv, x))]
                natural, robust = risks(*(parts if clean_first else parts[::-1]), y)
                return natural + args["beta"] * robust

            if shift:
                shift(model, loss)
            loss(model).backward()
            with torch.no_grad():
                momentum = [0.9 * m + p.grad + args["weight_decay"] * p
                            for m, p in zip(momentum, model.parameters())]
                for p, start, m in zip(model.parameters(), before.parameters(), momentum):
                    p.copy_(start - 0.05 * m)
            torch.testing.assert_close(dict(after.state_dict()), dict(model.state_dict()), rtol=0, atol=1e-9)
    return check


def log_of(folder):
    """The entries of a run folder's log.jsonl."""
    path = folder / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

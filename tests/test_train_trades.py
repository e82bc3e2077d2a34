"""TRADES against its formula, training with extra data, and runs of every script on CIFAR-100.

(Reading extra data, bookkeeping, resuming and errors: test_common.py.)
"""
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.datasets import CIFAR100

import common
import train_at
import train_awp
import train_trades
from common import Attack, UserError

# --------------------------------------------------------------------------------------------------- formula


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


# ------------------------------------------------------------------------------------------------ extra data


@pytest.fixture
def extra(tmp_path):
    images = np.random.default_rng(1).integers(0, 256, (30, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "extra.npz", image=images, label=np.arange(30) % 10)
    return ["--extra-data", str(tmp_path / "extra.npz")]


def test_training_with_extra_data(tiny, extra, tmp_path):
    train_trades.main([*tiny, *extra, "--nesterov", "--schedule", "cosine"])
    assert common.read_json(tmp_path / "run" / "metrics.json")["last"]["n"] == 8
    checkpoint = common.read_checkpoint(tmp_path / "run" / "last.pt")
    assert checkpoint["optimizer"]["param_groups"][0]["nesterov"] is True
    assert checkpoint["args"]["extra_data"] == extra[1] and checkpoint["args"]["extra_fraction"] == 0.5


def test_a_share_of_no_extra_data_is_an_error(tiny, tmp_path):
    with pytest.raises(UserError, match="--extra-fraction is the share of --extra-data, which is not given"):
        train_trades.main([*tiny, "--extra-fraction", "0"])
    assert not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------------------------- all scripts


SCRIPTS = [train_trades, train_at, train_awp]


@pytest.fixture
def cifar100(tmp_path, monkeypatch):
    """200 training and 50 test images in torchvision's own format."""
    rng, folder = np.random.default_rng(0), tmp_path / CIFAR100.base_folder
    folder.mkdir()
    for split, n in (("train", 200), ("test", 50)):
        images, labels = rng.integers(0, 256, (n, 3072), np.uint8), [i % 100 for i in range(n)]
        (folder / split).write_bytes(pickle.dumps({"data": images, "fine_labels": labels}))
        monkeypatch.setattr(CIFAR100, f"{split}_list", [[split, None]])  # no hash to agree with
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [str(i) for i in range(100)]}))
    monkeypatch.setattr(CIFAR100, "meta", {"filename": "meta", "key": "fine_label_names", "md5": None})


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("arch, width", [("wrn", "1"), ("densenet", "4")])
def test_every_script_trains_on_cifar100(tiny, cifar100, tmp_path, monkeypatch, script, arch, width):
    monkeypatch.setattr(common, "REPORT", Attack(steps=2))
    out = tmp_path / "run"
    script.main([*tiny, "--dataset", "cifar100", "--arch", arch, "--width", width, "--train-size", "100",
                 "--batch-size", "50", "--steps", "1", "--epochs", "1", "--test-size", "50",
                 "--precision", "auto"])
    metrics = common.read_json(out / "metrics.json")["last"]
    assert metrics["n"] == 50 and 0 <= metrics["robust_accuracy"] <= metrics["natural_accuracy"] < 0.2
    assert common.read_checkpoint(out / "last.pt")["model"]["fc.weight"].shape[0] == 100
    assert np.log(100) - 1 < common.read_log(out / "log.jsonl")[0]["natural_risk"] < np.log(100) + 2


TODAY = ("--ema 0.9 --activation silu --label-smoothing 0.1 --nesterov --no-norm-decay --schedule one-cycle "
         "--val-size 16").split()


@pytest.mark.parametrize("script, flags, other, message", [
    (train_trades, ["--extra-data", "extra.npz"], ["--extra-fraction", "0.25"], "0.5 there, 0.25 here"),
    (train_trades, TODAY, ["--ema", "0.8"], "--ema 0.9 there, 0.8 here"),
    (train_trades, ["--beta", "auto", "--reference", "narrow"], ["--width", "2"], "--width 1 there, 2 here"),
    (train_at, TODAY, ["--beta", "2"], "--beta 1.0 there, 2.0 here"),
    (train_awp, ["--warmup", "1"], ["--gamma", "0.01"], "--gamma 0.005 there, 0.01 here"),
    (train_awp, [*TODAY, "--warmup", "1"], ["--val-size", "8"], "--val-size 16 there, 8 here")])
def test_a_stopped_run_resumes_to_the_same_weights(tiny, extra, tmp_path, monkeypatch, script, flags, other,
                                                   message):
    monkeypatch.chdir(tmp_path)
    end_epoch = common.Run.end_epoch

    def stop(run, **values):
        end_epoch(run, **values)
        raise KeyboardInterrupt

    if "--reference" in flags:
        script.main([*tiny, "--seed", "2", "--beta", "2", "--out", "narrow"])
    script.main([*tiny, *flags, "--out", "whole"])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(common.Run, "end_epoch", stop)
        script.main([*tiny, *flags])
    assert common.read_checkpoint("run/last.pt")["epoch"] == 1
    script.main([*tiny, *flags])
    expected, resumed = (common.read_checkpoint(f"{folder}/last.pt") for folder in ("whole", "run"))
    assert resumed["epoch"] == expected["epoch"] == 2
    for state in ("model", "raw_model") if "--ema" in flags else ("model",):
        assert all(value.equal(resumed[state][key]) for key, value in expected[state].items())
    if "--ema" in flags:
        assert not expected["model"]["fc.weight"].equal(expected["raw_model"]["fc.weight"])
        assert expected["averaged_steps"] == 6  # 48 images, batches of 16, two epochs
    assert common.read_log("whole/log.jsonl")[1]["beta"] == common.read_log("run/log.jsonl")[1]["beta"]
    with pytest.raises(UserError, match=message):
        script.main([*tiny, *flags, *other])


@pytest.mark.parametrize("script, more", [(script, []) for script in SCRIPTS] + [(train_trades, ["extra"])])
@pytest.mark.parametrize("flags, share", [(["--no-flip"], 0), ([], 0.5)])
def test_no_flip_never_mirrors(tiny, extra, monkeypatch, script, more, flags, share):
    flipped, genuine = [], common.crop_flip
    monkeypatch.setattr(common, "crop_flip", lambda images, top, left, flip, *padding: (
        flipped.append(flip) or genuine(images, top, left, flip, *padding)))
    monkeypatch.setattr(common.Run, "finish", lambda run, test: None)
    script.main([*tiny, "--steps", "0", "--epochs", "4", "--eval-every", "4", *flags, *(more and extra)])
    assert len(torch.cat(flipped)) == 256
    assert abs(torch.cat(flipped).float().mean().item() - share) < 0.2 * share + 1e-9


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("odd", [{"classes": 1}, {"size": 4}, {"n_train": 1, "classes": 1}, {"n_test": 1}])
def test_odd_data_sets_work(tiny, tmp_path, write_npz, script, odd):
    write_npz(**odd)
    script.main([*tiny, "--epochs", "1"])
    metrics = common.read_json(tmp_path / "run" / "metrics.json")["last"]
    assert common.read_log(tmp_path / "run" / "log.jsonl")[0]["natural_risk"] >= 0  # trained
    assert metrics["n"] == odd.get("n_test", 8) and 0 <= metrics["robust_accuracy"] <= 1
    assert "classes" not in odd or metrics["robust_accuracy"] == metrics["perturbation_stability"] == 1


@pytest.mark.parametrize("beta, natural, robust, stability", [
    ("0", (0.5, 1), (0, 0.5), (0, 0.62)),   # lives on the textures, which an attack of 0.045 almost erases
    ("6", (0.5, 1), (0.5, 1), (0.62, 1))])  # relies on the square
def test_synthetic_data_trade_natural_for_robust_accuracy(train_on_synthetic, beta, natural, robust,
                                                          stability):
    flags = ["--beta", beta, "--eps", "0.045", "--step-size", "0.045"]
    out, _, metrics, _ = train_on_synthetic(train_trades.main, *flags)
    assert out.name.startswith(f"trades-synthetic-wrn10-1-beta{beta}-seed1")
    for name, (low, high) in zip(common.METRICS, (natural, robust, stability)):
        assert low <= metrics[name] <= high


@pytest.mark.parametrize("loss_of", [train_trades.trades_loss, train_at.at_loss, train_awp.trades_loss])
def test_label_smoothing_by_hand(loss_of):
    torch.manual_seed(0)
    model = common.build_model("wrn", 10, 1, 10).double()
    x, y = torch.rand(4, 3, 8, 8, dtype=torch.float64), torch.tensor([1, 2, 3, 4])
    risk = loss_of(model, x, x, y, 1.0, 0.1)[1]
    log_p = F.log_softmax(model(x), 1)
    by_hand = -(0.9 * log_p[range(4), y] + 0.1 * log_p.mean(1)).mean()
    assert risk.item() == pytest.approx(by_hand.item(), rel=1e-12)


def test_lambda_follows_the_reference_and_wants_a_fitting_one(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train_trades.main([*tiny, "--beta", "2", "--out", "narrow"])
    auto = [*tiny, "--width", "2", "--beta", "auto"]
    train_trades.main([*auto, "--reference", "narrow"])
    log, reference = common.read_log("run/log.jsonl"), common.read_log("narrow/log.jsonl")
    assert log[0]["beta"] == 2 and log[1]["beta"] == common.adjusted_beta(log[:1], reference)
    auto[auto.index("--out") + 1] = "other"
    for more, message in ((["--width", "2"], "--beta auto and --reference RUN go together"),
                          (["--reference", "none"], "no run is there"),
                          (["--reference", "narrow", "--epochs", "4"], "--epochs 2 there, 4 here"),
                          (["--reference", "narrow", "--dataset", "cifar10"], "--dataset tiny there"),
                          (["--reference", "narrow", "--eps", "8/255"], "--eps 0.031 there"),
                          (["--reference", "narrow", "--beta", "3"], "go together")):
        with pytest.raises(UserError, match=message):
            train_trades.main([*auto, *more])
    with pytest.raises(UserError, match="--method trades there, at here"):
        train_at.main([*auto, "--reference", "narrow"])
    with open("narrow/log.jsonl") as file:
        first = file.readline()
    for content, message in ((first, "unfinished: 1 of 2 epochs"), (first + "[]\n", "not what a run wrote"),
                             (first.replace('"beta"', '"alpha"') * 2, "not what a run wrote")):
        (tmp_path / "narrow" / "log.jsonl").write_text(content)
        with pytest.raises(UserError, match=message):
            train_trades.main([*auto, "--reference", "narrow"])


# -------------------------------------------------------------------------------------------------- torchrun

WORKER = """
import copy, sys
sys.path.insert(0, {root!r})
import torch
import common, train_awp
from common import RANK, WORLD

common.connect(None, torch.device("cpu"))
torch.manual_seed(0)
data_x = torch.arange(3 * 8 * 8 * 40, dtype=torch.uint8).view(40, 3, 8, 8) * 37
data_y = torch.arange(40) % 10

# the images of an epoch are those of one process, and each process has its own half of every batch
def epoch():
    torch.manual_seed(5)
    found = list(common.batches(data_x, data_y, 12))
    return [y for _, y in found], torch.cat([x for x, _ in found])
mine, crops = epoch()
crops = common.joined(crops)
everyone = [common.joined(y) for y in mine]
rank, common.RANK, common.WORLD = RANK, 0, 1
alone, same = epoch()
common.RANK, common.WORLD = rank, WORLD
assert sorted(x.sum().item() for x in crops) == sorted(x.sum().item() for x in same), "other crops or flips"
assert len(mine) == len(alone) == 3 and all(len(y) == 6 for y in mine)
assert all(sorted(a.tolist()) == sorted(b.tolist()) for a, b in zip(everyone, alone))

# gradients, running statistics and AWP's perturbation: means over the processes
model = common.build_model("wrn", 10, 1, 10).double()
x, y = torch.rand(12, 3, 8, 8, dtype=torch.float64), torch.randint(0, 10, (12,))
x_adv = (x + 0.03 * torch.randn_like(x)).clamp(0, 1)

def gradients(share):
    twin = copy.deepcopy(model)
    train_awp.trades_loss(twin, x[share], x_adv[share], y[share], 6.0)[0].backward()
    return twin
halves = [gradients(slice(rank, None, 2)) for rank in range(2)]
together = gradients(slice(RANK, None, 2))
common.synchronize(together)
for mean, a, b in zip(together.parameters(), *(half.parameters() for half in halves)):
    assert torch.allclose(mean.grad, (a.grad + b.grad) / 2, rtol=0, atol=1e-12)
assert torch.allclose(together.bn1.running_var, sum(half.bn1.running_var for half in halves) / 2, atol=1e-14)
share = slice(RANK, None, 2)
weights = [p for p in model.parameters() if p.ndim > 1]
moves = train_awp.weight_perturbation(model, weights, x[share], x_adv[share], y[share], 6.0, 0.005)
grads = [[p.grad for p in half.parameters() if p.ndim > 1] for half in halves]
for w, move, a, b in zip(weights, moves, *grads):
    g = (a + b) / 2
    assert torch.allclose(move, 0.005 * w.norm() * g / g.norm(), atol=1e-12)
    assert torch.equal(move[None], common.joined(move[None])[:1]), "not the same in both"

# every test image counts once, and is attacked from where one process would
model = model.float()
model.precision = "fp32"
def tested(x, y):
    share = slice(common.RANK, None, common.WORLD)
    starts = common.joined(common.perturb_start(common.to_float(x[share]), "uniform", 0.1, "linf"))
    stream = common.padded_batches(x[share], y[share], 8 // common.WORLD)
    return common.evaluate(model, stream, common.Attack(steps=2))[0], starts.flatten(1).sum(1).sort().values
torch.manual_seed(6)
two, starts = tested(data_x[:9], data_y[:9])
common.RANK, common.WORLD = 0, 1
torch.manual_seed(6)
one, same = tested(data_x[:9], data_y[:9])
assert one == two and two["n"] == 9, (one, two)
assert torch.allclose(starts, same), "other starts"
sys.stdout.write(f"process {{RANK}} agrees\\n")  # at once: the other writes, too
"""


def torchrun(folder, *command):
    """Two processes, started; their output is the caller's to read."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.Popen([*launcher, *map(str, command)], cwd=folder, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_two_processes_compute_what_one_does(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER.format(root=str(Path(common.__file__).parent)))
    output, errors = torchrun(tmp_path, "worker.py").communicate(timeout=300)
    assert "process 0 agrees" in output and "process 1 agrees" in output, errors[-2000:]


def test_a_shared_run_is_one_run_and_resumes(tiny, tmp_path):
    command = [Path(common.__file__).parent / "train_trades.py", *tiny, "--out"]
    whole, stopped = (torchrun(tmp_path, *command, folder) for folder in ("whole", "stopped"))
    for line in stopped.stdout:
        if line.startswith("epoch 1/2"):  # kill one of the two: torchrun ends the other
            workers = Path(f"/proc/{stopped.pid}/task/{stopped.pid}/children").read_text().split()
            os.kill(int(workers[-1]), signal.SIGKILL)
    assert stopped.wait() != 0
    shutil.copytree(tmp_path / "stopped", tmp_path / "alone")
    output, errors = whole.communicate(timeout=300)
    assert whole.returncode == 0, output + errors
    assert output.count("epoch 2/2") == 1  # one process speaks
    assert [line["n"] for line in common.read_log(tmp_path / "whole" / "log.jsonl")] == [8, 8]
    output, errors = torchrun(tmp_path, *command, "stopped").communicate(timeout=300)
    assert "epoch 1/2" not in output and "epoch 2/2" in output, errors[-2000:]
    one, other = (common.read_checkpoint(tmp_path / name / "last.pt")["model"]
                  for name in ("whole", "stopped"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    train_trades.main([*tiny, "--out", str(tmp_path / "alone")])  # one process goes on with it, too
    assert [line.get("processes") for line in common.read_log(tmp_path / "alone" / "log.jsonl")] == [2, None]


def test_a_batch_is_shared_out_evenly(tiny, monkeypatch):
    monkeypatch.setattr(common, "WORLD", 2)
    with pytest.raises(UserError, match="a batch of 33 images cannot be shared out among 2 processes"):
        train_trades.main([*tiny, "--batch-size", "33"])
    with pytest.raises(UserError, match="--eval-size must be at least 2, the number of processes"):
        train_trades.main([*tiny, "--eval-size", "1"])

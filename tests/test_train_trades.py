"""TRADES against its formula, what its successors build on it, and what all scripts share."""
import os
import pickle
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import log_of, started, train_until_killed
from torchvision.datasets import CIFAR100

import common
import train_at
import train_awp
import train_trades
from common import UserError


# --------------------------------------------------------------------------------------------------- formula

def kl(logits, logits_adv):
    """Σ p (log p - log q) for each image, written out."""
    p, q = (z.exp() / z.exp().sum(1, keepdim=True) for z in (logits, logits_adv))
    return (p * (p.log() - q.log())).sum(1)


def risks(logits, logits_adv, y):
    natural = logits.exp().sum(1).log() - logits[range(len(y)), y]
    return natural.mean(), kl(logits, logits_adv).mean()


@pytest.mark.parametrize("smoothing", [0, 0.1])
def test_loss_and_gradients_are_the_formula(check_loss, smoothing):
    def smoothed(logits, logits_adv, y):
        natural, robust = risks(logits, logits_adv, y)
        to_any = logits.exp().sum(1).log() - logits.mean(1)  # cross-entropy to a uniform label
        return (1 - smoothing) * natural + smoothing * to_any.mean(), robust
    check_loss(lambda *given: train_trades.trades_loss(*given, smoothing), smoothed, beta=6.0)


def test_attack_and_update_are_the_formulas(check_steps):
    check_steps(train_trades.main, ["--steps", "3"], risks,
                attacked=lambda logits, logits_adv, y: kl(logits, logits_adv).sum())


# --------------------------------------------------------------------------- what its successors build on it

X, Y = np.random.default_rng(1).integers(0, 256, (30, 8, 8, 3), np.uint8), np.arange(30) % 10


@pytest.fixture
def extra(tmp_path):
    np.savez(tmp_path / "extra.npz", image=X, label=Y)
    return ["--extra-data", str(tmp_path / "extra.npz")]


def test_training_with_extra_data(tiny, extra, tmp_path):
    train_trades.main([*tiny, *extra, "--nesterov", "--epochs", "1"])
    checkpoint = common.read_checkpoint(tmp_path / "run" / "last.pt")
    assert checkpoint["optimizer"]["param_groups"][0]["nesterov"] is True
    moved = (tmp_path / "extra.npz").rename(tmp_path / "moved.npz")  # the same run
    train_trades.main([*tiny, "--extra-data", str(moved), "--nesterov", "--epochs", "1"])
    np.savez(tmp_path / "extra.npz", image=X[::-1], label=Y)
    with pytest.raises(UserError, match="data .* there, .* here"):  # another file of the same name
        train_trades.main([*tiny, *extra, "--nesterov", "--epochs", "1"])


@pytest.mark.parametrize("content, message", [
    ({"images": X, "label": Y}, ".npz of image, label"),
    ({"image": X / 255, "label": Y}, "image must be pixels .* not float64"),
    ({"image": X[:, :4], "label": Y}, "does not go with the data set"),
    ({"image": X, "label": Y + 1}, r"label 1\.\.10"), ({"image": X, "label": Y - 1}, r"label -1\.\.8")])
def test_malformed_extra_data_are_refused(tiny, tmp_path, content, message):
    np.savez(tmp_path / "odd.npz", **content)
    with pytest.raises(UserError, match=message):
        train_trades.main([*tiny, "--extra-data", str(tmp_path / "odd.npz")])
    assert not (tmp_path / "run").exists()


def test_the_documented_line_converts_the_published_pickle(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    published = {"data": X, "extrapolated_targets": list(Y), "model": "vanilla"}
    Path("ti_500K_pseudo_labeled.pickle").write_bytes(pickle.dumps(published))
    Path("data").mkdir()
    exec(train_trades.__doc__.split('python -c "')[1].split('"\n')[0].replace("\\\n", ""), {})
    data = common.load_data("tiny", tmp_path, torch.device("cpu"))
    n = len(data)
    train_trades.add_extra("data/ti500k.npz", data)
    assert len(data) == n and data.extra == len(X)
    assert np.array_equal(data.x_train[n:].permute(0, 2, 3, 1), X) and np.array_equal(data.y_train[n:], Y)


def test_the_average_of_the_weights_by_hand():
    network = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double()
    average, expected = train_trades.WeightAverage(network, decay=0.6, warmup=2), None
    for step in range(20):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter))
            network[1].running_mean.add_(1)
        weight = network[0].weight.detach().clone()
        decay = 0 if step < 1 else min(0.6, step / (step + 9))
        expected = weight if step == 0 else decay * expected + (1 - decay) * weight
        average.update_parameters(network)
        assert torch.allclose(average.module[0].weight, expected, rtol=0, atol=1e-14)
        assert torch.equal(average.module[1].running_mean, network[1].running_mean)
    assert not torch.allclose(expected, weight)


def test_lambda_is_moved_by_the_root_of_the_ratios_within_its_bounds():
    def line(beta, natural_risk):
        return {"beta": beta, "natural_risk": natural_risk, "robust_regularization": 0.01}
    reference = [line(6.0, 1.0), line(6.0, 4.0), line(6.0, 1.0)]
    assert train_trades.adjusted_beta([], reference) == 6
    for log, beta in (([line(8.0, 0.25)], 16.0), ([line(8.0, 0.25), line(10.0, 1.0)], 20.0),
                      ([line(8.0, 1e-6)], 60.0), ([line(8.0, 1e6)], 6.0), ([line(8.0, 0.0)], 8.0)):
        assert train_trades.adjusted_beta(log, reference) == pytest.approx(beta)  # without a risk it stays


def test_lambda_follows_the_reference_and_wants_a_fitting_one(tiny, tmp_path, monkeypatch, write_npz):
    monkeypatch.chdir(tmp_path)
    train_trades.main([*tiny, "--beta", "2", "--out", "narrow"])
    auto = [*tiny, "--width", "2", "--beta", "auto"]
    train_trades.main([*auto, "--reference", "narrow", "--seed", "2"])
    log, reference = log_of(Path("run")), log_of(Path("narrow"))
    assert log[0]["beta"] == 2 and log[1]["beta"] == train_trades.adjusted_beta(log[:1], reference)
    auto[auto.index("--out") + 1] = "other"
    for more, message in (("--width 2", "--beta auto and --reference RUN go together"),
                          ("--reference narrow --beta 3", "go together"),
                          ("--reference none", "none/last.pt: No such file"),
                          ("--reference narrow --epochs 4", "--epochs 2 there, 4 here"),
                          ("--reference narrow --eps 0.02 --steps 3", "--eps 0.031 there.*--steps 2 there")):
        with pytest.raises(UserError, match=message):
            train_trades.main([*auto, *more.split()])
    checkpoint = common.read_checkpoint("narrow/last.pt")
    other = [{**line, "natural_risk": 2 * line["natural_risk"]} for line in checkpoint["log"]]
    torch.save({**checkpoint, "log": other}, "narrow/last.pt")  # another run under the same name
    with pytest.raises(UserError, match="run holds another run .reference_hash"):
        train_trades.main([*tiny, "--width", "2", "--beta", "auto", "--reference", "narrow", "--seed", "2"])
    torch.save({**checkpoint, "log": checkpoint["log"][:1]}, "narrow/last.pt")
    with pytest.raises(UserError, match="unfinished: 1 of 2 epochs"):
        train_trades.main([*auto, "--reference", "narrow"])
    write_npz(n_train=65)
    with pytest.raises(UserError, match="--data .* there"):
        train_trades.main([*auto, "--reference", "narrow"])


# ----------------------------------------------------------------------------------------------- all scripts

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


@pytest.mark.parametrize("script, arch, width", [
    (train_trades, "wrn", "1"), (train_at, "densenet", "4"), (train_awp, "preact", "1/8"),
    (train_awp, "densenet", "4")])
def test_every_script_trains_every_network_on_cifar100(tiny, cifar100, tmp_path, script, arch, width):
    out = tmp_path / "run"
    script.main([*tiny, "--dataset", "cifar100", "--arch", arch, "--width", width, "--batch-size", "100",
                 "--steps", "1", "--step-size", "0.031", "--epochs", "1"])
    metrics = common.read_json(out / "metrics.json")["last"]
    assert metrics["n"] == 8 and 0 <= metrics["robust_accuracy"] <= metrics["natural_accuracy"]
    classifier = "linear.weight" if arch == "preact" else "fc.weight"
    assert common.read_checkpoint(out / "last.pt")["model"][classifier].shape[0] == 100


TODAY = ("--ema 0.9 --activation silu --label-smoothing 0.1 --nesterov --no-norm-decay --schedule one-cycle "
         "--val-size 16").split()


@pytest.mark.parametrize("script, flags, other, message", [
    (train_trades, ["--extra-data", "extra.npz"], ["--extra-fraction", "0.25"], "0.5 there, 0.25 here"),
    (train_trades, TODAY, ["--ema", "0.8"], "ema 0.9 there, 0.8 here"),
    (train_trades, ["--beta", "auto", "--reference", "narrow"], ["--width", "2"], "width 1 there, 2 here"),
    (train_at, ["--val-size", "16"], ["--val-size", "8"], "val_size 16 there, 8 here"),
    (train_awp, ["--warmup", "1"], ["--gamma", "0.01"], "gamma 0.005 there, 0.01 here")])
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
    for state in {"model", "raw_model"} & expected.keys():
        assert all(value.equal(resumed[state][key]) for key, value in expected[state].items())
    line, same, held = log_of(Path("run"))[1], log_of(Path("whole"))[1], "--val-size" in flags
    assert line["beta"] == same["beta"] and line["n"] == (16 if held else 8)
    best = common.read_json("run/metrics.json")["best"]
    assert best["best_chosen_on"] == ("validation" if held else "test")
    with pytest.raises(UserError, match=message):
        script.main([*tiny, *flags, *other])


def test_the_average_is_what_is_tested(tiny, tmp_path):
    train_trades.main([*tiny, "--ema", "0.9"])
    saved = common.read_checkpoint(tmp_path / "run" / "last.pt")
    average, raw = (common.parameters_of(saved[part], part)[0] for part in ("model", "raw_model"))
    assert not average["fc.weight"].equal(raw["fc.weight"])
    assert saved["model"]["n_averaged"] == 8  # 64 images, batches of 16, two epochs
    tested = common.NETWORKS["wrn"](10, 1, 10).to(memory_format=torch.channels_last)
    common.load_weights(tested, {"model": saved["model"]}, "average")
    args = SimpleNamespace(test_size=8, eps=0.031, batch_size=16, precision="fp32", val_size=0, norm="linf")
    reported = common.report(tested, common.load_data("tiny", tmp_path, torch.device("cpu")), args)
    assert common.read_json(tmp_path / "run" / "metrics.json")["last"] == {"epoch": 2, **reported}


@pytest.mark.parametrize("script, flags", [
    (train_trades, []), (train_at, []), (train_awp, []), (train_trades, ["extra"])])
def test_no_flip_never_mirrors(tiny, extra, monkeypatch, script, flags):
    flipped, genuine = [], common.crop_flip
    monkeypatch.setattr(common, "crop_flip", lambda images, top, left, flip, *padding: (
        flipped.append(flip) or genuine(images, top, left, flip, *padding)))
    monkeypatch.setattr(common.Run, "finish", lambda run, test: None)
    for more in ["--no-flip"], []:
        script.main([*tiny, "--steps", "0", "--epochs", "1", "--out", f"{tiny[-1]}{more}", *more,
                     *(flags and extra)])
    found = torch.cat(flipped)
    assert len(found) == 128 and not found[:64].any() and found[64:].any() and not found[64:].all()


@pytest.mark.parametrize("script, odd", [
    (train_trades, {"classes": 1}), (train_at, {"size": 4, "n_test": 1}),
    (train_awp, {"n_train": 1, "classes": 1})])
def test_odd_data_sets_work(tiny, tmp_path, write_npz, script, odd):
    write_npz(**odd)
    script.main([*tiny, "--epochs", "1"])
    metrics = common.read_json(tmp_path / "run" / "metrics.json")["last"]
    assert metrics["n"] == odd.get("n_test", 8) and 0 <= metrics["robust_accuracy"] <= 1
    assert log_of(tmp_path / "run")[0]["images_per_second"] > 0  # of an epoch of one step, too
    assert "classes" not in odd or metrics["robust_accuracy"] == metrics["perturbation_stability"] == 1


@pytest.mark.parametrize("script, name, wanted", [
    (train_trades, "trades-synthetic-wrn-10-1-beta6-seed1", {"lr": 0.2, "eps": 0.031}),
    (train_at, "at-synthetic-wrn-10-1-beta1-seed1", {"beta": 1.0, "eps": 0.031, "weight_decay": 2e-4}),
    (train_awp, "awp-synthetic-wrn-10-1-beta6-seed1", {"warmup": 1, "eps": 8 / 255})])
def test_a_first_look(monkeypatch, tmp_path, script, name, wanted):
    few = common.synthetic(128, 80)
    monkeypatch.setattr(common, "synthetic", lambda: few)
    monkeypatch.chdir(tmp_path)
    script.main("--quick --epochs 2 --train-size 128 --batch-size 32 --steps 1 --step-size 0.035 "
                "--eval-size 10 --test-size 8 --precision fp32".split())
    out, = Path("runs").iterdir()
    settings, metrics = (common.read_json(out / file) for file in ("args.json", "metrics.json"))
    assert out.name[:-7] == name and wanted.items() <= settings.items() and len(log_of(out)) == 2
    assert metrics["last"]["n"] == 8 and metrics["last"]["attack"]["eps"] == wanted["eps"]


def test_lambda_zero_is_plain_training_on_clean_images(tiny, tmp_path, capsys, monkeypatch):
    seen, forward = [], common.Network.forward
    monkeypatch.setattr(common.Network, "forward", lambda model, x: (
        model.training and seen.append(x.detach())) or forward(model, x))
    train_trades.main([*tiny, "--beta", "0"])
    assert len(seen) == 16 and all(torch.equal(*pair) for pair in zip(seen[::2], seen[1::2]))  # x and x̂
    for line in log_of(tmp_path / "run"):
        assert line["lipschitz"] == 0 and line["robust_regularization"] < 1e-6
    assert capsys.readouterr().err == ""


# -------------------------------------------------------------------------------------------------- torchrun

WORKER = """
import copy, sys
sys.path.insert(0, {root!r})
import torch
import torch.distributed as dist
import common, train_awp
from common import RANK, WORLD

def gathered(value):
    found = [None] * WORLD
    dist.all_gather_object(found, value)
    return found

common.connect(None, torch.device("cpu"))
x = torch.arange(40, dtype=torch.uint8).view(40, 1, 1, 1).expand(40, 3, 8, 8)
data = common.Data(x, torch.arange(40), x, torch.arange(40) % 10, 10, "")

# an epoch's images are all different, each process has half of every batch, and its own random numbers
common.seed_everything(5, 1)
stream = list(common.batches(data, 12))
labels = gathered([y.tolist() for _, y in stream])
assert [len(part) for part in labels[0]] == [len(part) for part in labels[1]] == [6, 6, 6]
assert len({{y for process in labels for part in process for y in part}}) == 36
noise = gathered(torch.rand(5).tolist())
assert noise[0] != noise[1]
common.seed_everything(5)  # for the weights, which must be the same
noise = gathered(torch.rand(5).tolist())
assert noise[0] == noise[1]
common.seed_everything(5, 1)
torch.rand(RANK + 1)  # what a fork draws before does not change the order
again = [y.tolist() for _, y in common.batches(data, 12)]
assert again == labels[RANK]

# extra images: an odd number in each batch, and equal shares all the same
data.extra = 20
shares = gathered([len(y) for _, y in common.batches(data, 10, extra_fraction=0.3)])
assert shares == [[5, 5], [5, 5]]
data.extra = 0

# gradients, running statistics and AWP's perturbation: means over the processes
torch.manual_seed(0)
model = common.NETWORKS["wrn"](10, 1, 10).double()
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
    assert all(move.tolist() == other for other in gathered(move.tolist())), "not the same in both"

# all processes find the same
stream = common.in_order(data.x_test, data.y_test, 16)
found = gathered(common.evaluate(model.float(), stream, common.Attack(steps=2)))
assert found[0] == found[1] and found[0]["n"] == 40
print(f"process {{RANK}} agrees", file=sys.stderr, flush=True)
"""


def test_two_processes_compute_what_one_does(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER.format(root=str(Path(common.__file__).parent)))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
                "--local-addr=127.0.0.1", "worker.py"]  # a machine's name may lead nowhere
    errors = subprocess.run(launcher, cwd=tmp_path, stderr=subprocess.PIPE, timeout=900).stderr.decode()
    assert "process 0 agrees" in errors and "process 1 agrees" in errors, errors[-2000:]


def train_as(rank, port, argv, said, steps):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    common.RANK, common.WORLD = rank, 2
    sys.stdout = sys.stderr = open(f"{said}-{rank}", "w")
    if rank and steps:
        train_until_killed(argv, steps)
    sys.argv[1:] = argv
    common.launch(train_trades.main)


def two_processes(argv, said, steps=0):
    """They train as torchrun's would, their words go to a file each. In step `steps` the second is killed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [started(train_as, rank, port, argv, said, steps) for rank in range(2)]


def test_a_shared_run_is_one_run_and_resumes(tiny, tmp_path):
    whole, stopped, alone = (tmp_path / name for name in ("whole", "stopped", "alone"))
    processes = [process for out, steps in ((whole, 0), (stopped, 6))  # of eight: the other one cannot go on
                 for process in two_processes([*tiny, "--out", str(out)], f"{out}.txt", steps)]
    for process in processes:
        process.join(900)
    assert [process.exitcode == 0 for process in processes] == [True, True, False, False]
    said = Path(f"{whole}.txt-0").read_text()
    assert said.count("epoch 2/2") == 1 and not Path(f"{whole}.txt-1").read_text()  # one process speaks
    assert [line["n"] for line in log_of(whole)] == [8, 8]
    assert len(log_of(stopped)) == 1
    shutil.copytree(stopped, alone)
    for process in two_processes([*tiny, "--out", str(stopped)], f"{stopped}.txt"):
        process.join(900)
    said = Path(f"{stopped}.txt-0").read_text()
    assert "epoch 1/2" not in said and "epoch 2/2" in said
    one, other = (common.read_checkpoint(folder / "last.pt")["model"] for folder in (whole, stopped))
    assert all(torch.equal(one[key], other[key]) for key in one)
    train_trades.main([*tiny, "--out", str(alone)])  # one process goes on with it, too
    assert [line.get("processes") for line in log_of(alone)] == [2, None]


def test_each_process_has_its_gpu_and_an_equal_share(monkeypatch):
    done, given = [], ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    monkeypatch.setattr(common, "WORLD", 2)
    monkeypatch.setattr(torch.cuda, "set_device", done.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **_: done.append(backend))
    for name in given:
        monkeypatch.delenv(name, raising=False)
    for name in given:
        with pytest.raises(UserError, match=f"WORLD_SIZE is set, but not .*{name}.*torchrun"):
            common.connect(None, torch.device("cpu"))
        monkeypatch.setenv(name, "1")
    for odd in SimpleNamespace(batch_size=33), SimpleNamespace(batch_sizes=[8, 6, 9]):
        with pytest.raises(UserError, match="a batch must be a multiple of the 2 processes"):
            common.connect(odd, torch.device("cpu"))
    for device in "cuda", "cuda:0":
        assert common.connect(None, torch.device(device)) == torch.device("cuda:1")
    assert done == [torch.device("cuda:1"), "nccl"] * 2

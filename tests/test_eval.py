"""eval.py: what it counts, what it loads, what it compares, keeps and draws, and how it ends.

Where an outcome counts, the network is `Gray` or a table, made by hand: nothing hangs on what training does.
"""
import argparse
import json
import logging
import math
import shutil
import sys
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import eval as evaluation
import train_trades
from common import METRICS, Attack, UserError

LEVELS = torch.arange(28, 228)  # of the test images' green in 1/255; red is one level below, blue one above
IMAGES = (LEVELS[:, None] + torch.tensor([-1, 0, 1])).view(200, 1, 1, 3).expand(200, 8, 8, 3)
LABELS = (LEVELS > 127).long() ^ (torch.arange(200) % 10 == 0).long()  # what Gray says, but of every tenth


class Gray(nn.Module):
    """Says 1 of images whose channels' mean is above `middle`, else 0, and never another class.

    So an attack changes those that are less than ε away from it. No rounding does: all images of `toy` are
    half a level away from 127.5/255, and from that ± 8/255.
    """

    def __init__(self, *_, middle=0.5):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 10, 1)
        with torch.no_grad():
            self.conv1.weight.zero_()[:2] += torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1)
            self.conv1.bias.copy_(torch.tensor([3 * middle, -3 * middle] + [-9] * 8))

    def forward(self, x):
        return self.conv1(x).mean((2, 3))


@pytest.fixture(autouse=True)
def anew(monkeypatch):
    """A warning is printed once; in each test anew. And `Gray` is a network like others."""
    common.warn.cache_clear()
    monkeypatch.setitem(common.NETWORKS, "gray", Gray)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The data set `toy`, a run of two epochs on it in `run`, and Gray in gray.pt."""
    folder = tmp_path_factory.mktemp("eval")
    noise = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), np.uint8)
    np.savez(folder / "toy.npz", x_train=noise, y_train=np.arange(40) % 10, x_test=np.uint8(IMAGES),
             y_test=LABELS.numpy())
    settings = ("--dataset toy --device cpu --precision fp32 --depth 10 --width 1 --epochs 2 --batch-size 20 "
                "--beta 1 --eps 0.04 --step-size 0.04 --steps 1 --eval-size 10 --test-size 20")
    train_trades.main([*settings.split(), "--data-dir", str(folder), "--out", str(folder / "run")])
    save_gray(folder)
    return folder


def save_gray(folder, middle=0.5):
    settings = {"method": "own", "arch": "gray", "depth": 1, "width": 1, "dataset": "toy", "eps": 8 / 255}
    torch.save({"model": Gray(middle=middle).state_dict(), "epoch": 1, "args": settings}, folder / "gray.pt")


def run(folder, *flags, paths=("run",)):
    """The --json rows of eval.py on paths inside `folder`."""
    out = folder / "out.json"
    out.unlink(missing_ok=True)
    evaluation.main([*(str(folder / path) for path in paths), "--device", "cpu", "--data-dir", str(folder),
                     "--json", str(out), *map(str, flags)])
    return [*map(flat, json.loads(out.read_text()))]


def flat(row):
    """All that a row says, at hand by its name; and the row itself."""
    return {**row["run"], **row["evaluation"], **row["results"], "path": row["path"], "row": row}


QUICK = "--dataset", "toy", "--eval-size", 20, "--steps", 1, "--lipschitz-size", 0


def fresh(arch="wrn", depth=10, width=1):
    """A network whose BatchNorm statistics are no defaults, in eval mode."""
    torch.manual_seed(0)
    model = common.NETWORKS[arch](depth, width, 10)
    model(torch.rand(8, 3, 8, 8))
    return model.eval()


def load(folder, content, *flags):
    """The network of a checkpoint that holds `content`, and the facts of its rows."""
    torch.save(content, folder / "published.pt")
    args = evaluation.arguments(["-", "--dataset", "toy", "--data-dir", str(folder), *flags])
    model, _, facts = evaluation.load(folder / "published.pt", args, torch.device("cpu"))
    return model.eval(), facts


def assert_same_weights(one, other):
    torch.testing.assert_close(dict(one.state_dict()), dict(other.state_dict()), rtol=0, atol=0)


# ------------------------------------------------------------------------------------ counting and the attack

def test_every_image_is_counted_and_the_last_row_is_the_worst_of_each(folder, monkeypatch):
    """A table has what the network says of an image, untouched and attacked in three ways."""
    torch.manual_seed(0)
    said = torch.randint(0, 3, (4, 200))
    said = torch.where(torch.rand(4, 200) < 0.7, said[0], said)
    attacks = Attack(eps=0.02, restarts=2), Attack("margin", eps=0.02, restarts=2), Attack(
        eps=0.02, steps=1, step_size=0.02, start="none")

    class Table(Gray):
        def forward(self, x):
            mark, number = (x[:, :2, 0, 0] * 255).round().long().T
            return F.one_hot(said[torch.where(mark < 27, mark, 0), number - 28], 10).float()

    def attacked(model, x, loss, attack):
        x = x.clone()
        x[:, 0] = (1 + attacks.index(attack)) / 255
        return x, torch.ones(len(x))

    monkeypatch.setitem(common.NETWORKS, "gray", Table)
    monkeypatch.setattr(common, "pgd", attacked)
    rows = run(folder, "--attack", "pgd", "cw", "fgsm", "--restarts", 2, "--eps", 0.02, "--lipschitz-size", 0,
               paths=["gray.pt"])
    assert [row["attack"] for row in rows] == [*map(asdict, attacks), [*map(asdict, attacks)]]
    assert evaluation.title(rows[3]["attack"]) == "worst of PGD-20×2, CW-20×2, FGSM, ε = 0.02, step 0.003"
    stable, correct = said[1:] == said[0], said[0] == LABELS
    for row, survived in zip(rows, [*stable, stable.all(0)], strict=True):
        for name, points in zip(METRICS, (correct, correct & survived, survived)):
            assert row[name] == pytest.approx(points.double().mean().item())
            assert row[f"{name}_ci"] == evaluation.wilson(row[name], 200) and row["n"] == 200


class OneStep:
    """Stands in for AutoAttack, called as its package is."""

    def __init__(self, model, *, attacks=None, device="cpu", eps=0.3, norm="Linf", seed=None, version=None):
        self.model, self.eps, self.apgd_targeted, self.fab = model, eps, SimpleNamespace(), SimpleNamespace()

    def run_standard_evaluation(self, x, y, /, *, batch_size=250):
        x = x.clone().requires_grad_()
        gradient, = torch.autograd.grad(F.cross_entropy(self.model(x), y), x)
        x_adv = (x + self.eps * gradient.sign()).clamp(0, 1)
        return x_adv, self.model(x_adv).argmax(1)


def short_autoattack(*arguments, **settings):
    found = sys.modules["pyautoattack.autoattack"].AutoAttack(*arguments, **settings)
    found.apgd.n_iter = found.apgd_targeted.n_iter = found.fab.n_iter = 4
    found.square.n_queries = 10
    return found


@pytest.mark.parametrize("attack, stability", [
    ("pgd", 185), ("cw", 185), ("fgsm", 185), ("autoattack", 184), (short_autoattack, 184)])
def test_metrics_of_a_network_by_hand(folder, monkeypatch, attack, stability):
    """16 images are near enough, one of them misclassified: AutoAttack attacks that, too."""
    if attack is short_autoattack:
        package = pytest.importorskip("pyautoattack")
        monkeypatch.setattr(package, "AutoAttack", short_autoattack)
        logging.getLogger("auto-attack").setLevel(logging.ERROR)
    elif attack == "autoattack":
        monkeypatch.setitem(sys.modules, "pyautoattack", SimpleNamespace(AutoAttack=OneStep))
    row, = run(folder, "--attack", attack if isinstance(attack, str) else "autoattack", paths=["gray.pt"])
    assert [row[name] for name in METRICS] == [180 / 200, 165 / 200, stability / 200]
    assert 5.9 < row["local_lipschitzness"] <= 6.001  # two logits, three channels


def test_lipschitzness_is_of_random_images(folder, monkeypatch):
    met, pgd = [], common.pgd
    data = common.load_data("toy", folder, torch.device("cpu"))
    monkeypatch.setattr(common, "pgd", lambda model, x, *rest: met.append(x) or pgd(model, x, *rest))
    few, = run(folder, *QUICK, "--eval-size", 40, "--lipschitz-size", 30)
    assert met[0].equal(common.to_float(data.test(30)[0])) and not met[0].equal(data.x_test[:30] / 255)
    assert "local_lipschitzness" in few and "local_lipschitzness" not in run(folder, *QUICK)[0]
    assert "local_lipschitzness" not in run(folder, "--eps", 0, "--eval-size", 10)[0]  # 0/0


def test_it_is_the_evaluation_that_training_reports(folder):
    row, = run(folder, "--checkpoint", "last", "--eval-size", 20, "--batch-size", 20)
    reported = common.read_json(folder / "run" / "metrics.json")["last"]
    assert reported.pop("best_chosen_on") == "test"
    assert {key: row[key] for key in reported} == reported


@pytest.mark.parametrize("trained, flags, norm, eps", [
    ({}, (), "linf", 0.04), ({}, ("--eps", "10/255"), "linf", 10 / 255), ({}, ("--norm", "l2"), "l2", 0.5),
    (None, (), "linf", 0.031), ({"norm": "l2", "eps": 0.7}, (), "l2", 0.7),
    ({"norm": "l2", "eps": 0.7}, ("--norm", "linf"), "linf", 0.031),
    ({"norm": "l2", "eps": 0.7}, ("--eps", 0.2), "l2", 0.2)])
def test_the_ball_is_that_of_training_unless_told_otherwise(folder, trained, flags, norm, eps):
    state = common.read_checkpoint(folder / "run" / "last.pt")
    content = state["model"] if trained is None else {**state, "args": {**state["args"], **trained}}
    torch.save(content, folder / "other.pt")
    row, = run(folder, *QUICK, *flags, paths=["other.pt"])
    assert (row["attack"]["norm"], row["attack"]["eps"]) == (norm, eps)


# ---------------------------------------------------------------------------------------------------- loading

def prefixed(prefix, state):
    return {f"{prefix}{key}": value for key, value in state.items()}


def trades(state):
    unused = prefixed("sub_", {key: value for key, value in state.items() if key.startswith("block1")})
    return prefixed("module.", {**state, **unused})


def endless(state):
    saved = {"epoch": 3, "state_dict": state}
    saved |= {"itself": saved, "net": saved}
    return saved


LAYOUTS = {"plain": lambda state: state, "trades": trades,
           "rst": lambda state: {"num_classes": 10, "state_dict": trades(state), "normalize_input": False},
           "awp": lambda state: {"state_dict": state, "test_acc": np.float64(0.5), "lr": np.float32(1)},
           "net": lambda state: {"net": trades(state), "epoch": np.int64(76), "best": np.bool_(True)},
           "namespace": lambda state: {"model": state, "args": argparse.Namespace(lr=0.1, acc=np.float16(2))},
           "model_state_dict": lambda state: {"model_state_dict": {"model": state}},
           "prefixes": lambda state: prefixed("module.module._orig_mod.model.", state),
           "others": lambda state: {"model": {"net": prefixed("1.backbone.", state)}},
           "averaged": lambda state: {"model": {"n_averaged": torch.tensor(7), **prefixed("module.", state)}},
           "old": lambda state: {key: value for key, value in state.items() if "num_batches" not in key},
           "endless": endless}


@pytest.mark.parametrize("layout, arch, depth, width", [
    *((layout, "wrn", 10, 1) for layout in LAYOUTS), ("rst", "wrn", 16, 0.5), ("awp", "preact", 18, 0.125)])
def test_published_layouts_give_the_right_network(folder, layout, arch, depth, width):
    model = fresh(arch, depth, width)
    flags = ["--shortcut", "normalized"] if arch == "preact" else []
    loaded, facts = load(folder, LAYOUTS[layout](model.state_dict()), *flags)
    for name, value in model.state_dict().items():
        assert "num_batches" in name or loaded.state_dict()[name].equal(value)
    assert (facts["arch"], facts["depth"], facts["width"]) == (arch, depth, width)


def test_a_run_of_averaged_weights_is_evaluated_by_its_average_or_as_told(folder):
    settings, average = common.read_checkpoint(folder / "run" / "last.pt")["args"], fresh().state_dict()
    raw = {name: 0 * value for name, value in average.items()}
    content = {"model": LAYOUTS["averaged"](average)["model"], "raw_model": raw, "epoch": 1, "args": settings}
    assert_same_weights(load(folder, content)[0], fresh())
    taken, _ = load(folder, content, "--weights", "raw_model")
    assert not any(value.any() for value in taken.state_dict().values())


MEAN, STD = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.4])


@pytest.mark.parametrize("flags, mean, std", [
    ("cifar10", [0.4914, 0.4822, 0.4465], [0.2471, 0.2435, 0.2616]), ("+-1", [0.5] * 3, [0.5] * 3),
    ("imagenet", [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]), ("0.4,0.5,0.6,0.2,0.3,0.4", MEAN, STD)])
def test_normalize_scales_pixels_inside_and_leaves_the_ball(folder, flags, mean, std):
    save_gray(folder, middle=0)
    row, = run(folder, "--normalize", flags, "--lipschitz-size", 0, paths=["gray.pt"])
    save_gray(folder)
    mean, std = (torch.as_tensor(values).double() for values in (mean, std))
    away = ((IMAGES[:, 0, 0] / 255 - mean) / std).sum(1) / (1 / std).sum()  # from where the sum is zero
    assert min(away.abs().min(), (away.abs() - 8 / 255).abs().min()) > 1e-4
    correct = (away > 0).long() == LABELS
    stable = (away.abs() > 8 / 255) | ~correct
    assert [row[name] for name in METRICS] == [
        points.double().mean().item() for points in (correct, correct & stable, stable)]


@pytest.mark.parametrize("layout", ["rst", "awp"])
@pytest.mark.parametrize("name, value", [
    ("mean", MEAN), ("std", STD.view(1, 3, 1, 1)), ("test_loss_mean", torch.tensor(0.5)),
    ("log.test_acc_std", torch.tensor(0.5)), ("grad_norm_mean", torch.tensor(0.5))])
def test_numbers_beside_the_weights_are_asked_about(folder, layout, name, value):
    content = LAYOUTS[layout]({**fresh().state_dict(), name: value})
    with pytest.raises(UserError, match=f"{name}.*--normalize none"):
        load(folder, content)
    assert_same_weights(load(folder, content, "--normalize", "none")[0], fresh())


def test_accuracy_of_chance_is_pointed_out(folder, capsys):
    for middle, natural in (0.5, 0.9), (2, 0.5):  # the second says 0 of all
        save_gray(folder, middle)
        row, = run(folder, *QUICK[4:], paths=["gray.pt"])
        assert row["natural_accuracy"] == natural
        assert ("--normalize" in capsys.readouterr().err) == (natural == 0.5)
    save_gray(folder)


def test_the_network_is_the_one_that_the_settings_name(folder, monkeypatch):
    class Forked(common.DenseNet):  # it normalizes by itself
        def __init__(self, *settings):
            super().__init__(*settings)
            self.register_buffer("mean", MEAN)

    monkeypatch.setitem(common.NETWORKS, "forked", Forked)
    named = {"method": "own", "arch": "forked", "depth": 10, "width": 6, "beta": "auto", "dataset": "toy"}
    model = fresh("forked", 10, 6)
    loaded, facts = load(folder, {"model": model.state_dict(), "args": named})
    assert_same_weights(loaded, model)
    assert named.items() <= facts.items()
    with pytest.raises(UserError, match="its network 'mine' of relu is none of common.py's"):
        load(folder, {"model": fresh().state_dict(), "args": {**named, "arch": "mine"}})
    with pytest.raises(UserError, match="its network 'wrn' of relu is none of common.py's"):
        load(folder, {"model": fresh().state_dict(),
                      "args": {**named, "arch": "wrn", "arch_from": "__main__"}})


def test_a_run_folder_means_the_checkpoint_asked_for_and_a_file_itself(folder):
    best, = run(folder, *QUICK)
    file, = run(folder, *QUICK, paths=["run/best.pt"])
    last, = run(folder, *QUICK, "--checkpoint", "last")
    assert (best["weights"], last["weights"], last["epoch"]) == ("best", "last", 2)
    assert (best["hash"] == last["hash"]) == (best["epoch"] == 2) and best["hash"] == file["hash"]


def test_a_checkpoint_of_earlier_code_evaluates(folder):
    state = common.read_checkpoint(folder / "run" / "last.pt")
    now, _ = load(folder, state)
    later = "data", "no_flip", "quick", "init", "activation"
    state["args"] = {key: value for key, value in state["args"].items() if key not in later}
    assert_same_weights(load(folder, state)[0], now)
    assert run(folder, *QUICK, paths=["published.pt"])[0]["attack"]["eps"] == 0.04


def test_activation_is_that_of_the_checkpoint_or_as_told(folder, capsys):
    ours = common.read_checkpoint(folder / "run" / "last.pt")
    for content, flags, activation in (
            (fresh().state_dict(), ["--activation", "silu"], "silu"), (ours, [], "relu")):
        loaded, facts = load(folder, content, *flags)
        value = loaded.act(torch.tensor(-1.0)).item()  # relu(-1) = 0
        assert facts["activation"] == activation and (value == 0) == (activation == "relu")
        said = "needs --normalize; its activation is silu" in capsys.readouterr().out
        assert said == (activation == "silu")  # of a published network alone
    for option in ("--activation", "silu"), ("--shortcut", "raw"):
        with pytest.raises(UserError, match="says itself what network it is"):
            load(folder, ours, *option)


def fast_at_block(block, x):
    """Fast AT's own pre-activation block: its projection takes the block's input."""
    out = F.relu(block.bn1(x))
    shortcut = block.shortcut(x[:, :, ::block.stride, ::block.stride]) if hasattr(block, "shortcut") else x
    return block.conv2(F.relu(block.bn2(block.conv1(out)))) + shortcut


def test_what_a_projection_takes_is_asked_and_both_are_right(folder):
    model, x = fresh("preact", 10, 0.25), torch.rand(4, 3, 8, 8)
    with pytest.raises(UserError, match="published.pt is a PreActResNet.*--shortcut normalized.*or raw"):
        load(folder, model.state_dict())
    found = {how: load(folder, model.state_dict(), "--shortcut", how)[0](x) for how in ("normalized", "raw")}
    torch.testing.assert_close(found["normalized"], model(x))
    out = model.conv1(x)
    for layer in model.layer1, model.layer2, model.layer3, model.layer4:
        for block in layer:
            out = fast_at_block(block, out)
    torch.testing.assert_close(found["raw"], model.linear(F.relu(model.bn(out)).mean((2, 3))))
    assert (found["raw"] - found["normalized"]).abs().max() > 1e-3


def test_data_other_than_those_of_training_are_pointed_out(folder, tmp_path, capsys):
    arrays, state = {**np.load(folder / "toy.npz")}, common.read_checkpoint(folder / "run" / "last.pt")
    np.savez(tmp_path / "toy.npz", **{**arrays, "x_test": arrays["x_test"][::-1].copy()})
    trained = state["args"]["data"]
    for of, where, warned in ((trained, folder, False), (trained, tmp_path, True),
                              (f"{trained}+abc", folder, False), ("other+abc", folder, True)):  # extra images
        load(folder, {**state, "args": {**state["args"], "data": of}}, "--data-dir", str(where))
        assert ("was trained on another toy" in capsys.readouterr().err) == warned
    np.savez(tmp_path / "large.npz", **{name: array.repeat(2, 1).repeat(2, 2) if array.ndim > 1 else array
                                        for name, array in arrays.items()})
    load(folder, state, "--dataset", "large", "--data-dir", str(tmp_path))
    assert "was trained on images of 8×8 pixels, not 16×16" in capsys.readouterr().err


def test_unfinished_runs_and_other_code_are_kept_apart(folder, capsys):
    for name in "cut", "edited":
        shutil.copytree(folder / "run", folder / name)
    (folder / "cut" / "metrics.json").unlink()
    state = torch.load(folder / "run" / "last.pt")
    torch.save({**state, "args": {**state["args"], "common.py": "abcdef"}}, folder / "edited" / "last.pt")
    rows = run(folder, *QUICK, "--checkpoint", "last", paths=("cut", "edited"))
    assert len(evaluation.average([row["row"] for row in rows])) == 2
    said = capsys.readouterr()
    assert said.err.count("unfinished run") == 1 and "last, unfinished" in said.out


@pytest.mark.parametrize("code", [b"O8", b"V8", b"S8"])
def test_a_crafted_dtype_turns_no_bytes_into_pointers(tmp_path, code):
    torch.save({"beside": np.float64(1)}, tmp_path / "fine.pt", _use_new_zipfile_serialization=False)
    assert common.read_checkpoint(tmp_path / "fine.pt") == {"beside": 1.0}
    content = (tmp_path / "fine.pt").read_bytes()
    assert content.count(b"f8") == 1
    (tmp_path / "crafted.pt").write_bytes(content.replace(b"f8", code))
    with pytest.raises(UserError, match="crafted.pt"):
        common.read_checkpoint(tmp_path / "crafted.pt")


@pytest.mark.parametrize("own, norm, eps", [([], "Linf", 8 / 255), (["--norm", "l2"], "L2", 0.5)])
def test_robustbench_networks_are_attacked_as_they_are(folder, tmp_path, monkeypatch, own, norm, eps):
    networks = {("Odd2020", "toy", norm): Gray()}
    for name in ("pyautoattack", "robustbench", "autoattack"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    monkeypatch.setitem(sys.modules, "robustbench.utils", SimpleNamespace(
        load_model=lambda name, dataset, threat_model: networks[name, dataset, threat_model]))
    flags = [*ARGS, *own, "--precision", "auto", "--data-dir", str(folder)]
    evaluation.main(["robustbench:Odd2020", *flags, "--json", str(tmp_path / "zoo.json")])
    found, = common.read_json(tmp_path / "zoo.json")
    assert found["evaluation"]["attack"]["eps"] == eps and found["evaluation"]["precision"] == "fp32"
    with pytest.raises(UserError, match="RobustBench cannot load"):
        evaluation.main(["robustbench:Even2020", *flags])


# ------------------------------------------------------------------------------------------------------- rows

ARGS = "--device", "cpu", *map(str, QUICK)


def row(seed, accuracy=0.5, run=None, evaluation=None, **changes):
    run = {"method": "trades", "arch": "wrn", "depth": 10, "width": 1, "beta": 6.0, "seed": seed,
           "epoch": seed, "lr": 0.1, "data": "d" * 16, "weights": "best", "common.py": "c", "normalize": None,
           "hash": f"{seed}" * 16, **(run or {})}
    how = {"dataset": "toy", "data": "d" * 16, "attack": asdict(Attack()), "precision": "fp32", "n": 100,
           "lipschitz_n": 100, **(evaluation or {})}
    results = dict.fromkeys(METRICS, 0.5) | {"natural_accuracy": accuracy, "local_lipschitzness": 7.0}
    return {"path": f"runs/a-seed{seed}", "run": run, "evaluation": how, "results": results, **changes}


def count(*rows):
    return len(evaluation.average(rows))


@pytest.mark.parametrize("change", [
    {"evaluation": {"data": "other"}}, {"evaluation": {"dataset": "cifar10"}}, {"evaluation": {"n": 9}},
    {"evaluation": {"precision": "bf16"}}, {"evaluation": {"lipschitz_n": 9}},
    {"evaluation": {"attack": asdict(Attack(eps=0.02))}},
    {"evaluation": {"attack": asdict(Attack(steps=40))}}, {"run": {"weights": "last"}}, {"run": {"lr": 0.2}},
    {"run": {"data": "other"}}, {"run": {"common.py": "e"}}, {"run": {"beta": 12.0}}, {"run": {"width": 2}},
    {"run": {"normalize": [[0.5] * 3] * 2}}, {"run": {"val_size": 9}}, {"run": {"unfinished": True}}])
def test_what_differs_in_more_than_the_seed_is_kept_apart(change):
    assert count(row(1), row(2)) == 1 and count(row(1), row(2, **change)) == 2
    merged = evaluation.average([row(1), row(2, **change)])
    tables = evaluation.grouped(merged, evaluation.evaluated)
    assert (len(tables) == 2) == ("evaluation" in change and change["evaluation"] != {"lipschitz_n": 9})


def test_published_and_unfinished_are_not_averaged():
    published = [{**row(0), "path": path, "run": {"arch": "wrn", "hash": weights}}
                 for path, weights in (("a.pt", "a"), ("b.pt", "b"), ("b.pt", "b"), ("b.pt", "other"))]
    assert count(*published) == 3
    one = row(1, run={"reference": "runs/n-seed1"})
    assert count(one, row(2, run={"reference": "runs/n-seed2"})) == 1
    assert count(one, row(2, run={"reference": "runs/m-seed2"})) == 2


def test_a_run_that_replaces_another_of_its_seed_is_named(capsys):
    for other, named in ({}, False), ({"hash": "other"}, True):
        assert count(row(1), row(1, run=other, path="twin")) == 1
        assert ("twin takes the place of" in capsys.readouterr().err) == named


@pytest.mark.parametrize("values, shown", [([0.5, 0.6, 0.7], "60.00 ±24.84"), ([0.5, 0.7], "60.00"),
                                           ([0.5, 0.5, 0.7, 0.7], "60.00 ±18.37"), ([0.5], "50.00 ±9.62"),
                                           ([0.99], "99.00 [94.55, 99.82]"),
                                           ([1.0], "100.00 [96.30, 100.00]"),
                                           ([0.5] * 12 + [0.7] * 12, "60.00 ±4.31")])
def test_means_and_intervals(values, shown, tmp_path, capsys):
    rows = [row(seed, value) for seed, value in enumerate(values)]
    (tmp_path / "rows.json").write_text(json.dumps([*rows, rows[0]]))
    evaluation.main([str(tmp_path / "rows.json")])
    caption, _, header, _, line = capsys.readouterr().out.strip().splitlines()
    assert line.split("|")[3].strip() == shown and "PGD-20, ε = 0.031, step 0.003" in caption


def test_rows_are_appended_strays_left_out_all_kept_when_interrupted(folder, tmp_path, capsys, monkeypatch):
    out, model = tmp_path / "out.json", common.read_checkpoint(folder / "run" / "last.pt")["model"]
    out.write_text(json.dumps([row(1)]))
    strays = {"page.pt": b"<html>", "cut.pt": (folder / "run" / "best.pt").read_bytes()[:5000],
              "none.pt": {"state_dict": {}},
              "more.pt": {**prefixed("model.", model), "head.weight": torch.ones(3)},
              "nan.pt": {**model, "fc.bias": torch.full((10,), torch.nan)},
              "huge.pt": {**model, "fc.weight": 1e38 * torch.ones(10, 64), "bn1.bias": 1e9 * torch.ones(64)}}
    for name, content in strays.items():
        if isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
        else:
            torch.save(content, tmp_path / name)
    (tmp_path / "args.json").write_text("{}")
    torch.save({"model": {}, "args": {"method": "fast_imagenet"}}, tmp_path / "best.pt")
    paths = [str(tmp_path / name) for name in strays] + [str(tmp_path), str(folder / "run")]
    flags = [*ARGS, "--data-dir", str(folder), "--json", str(out)]
    with pytest.raises(UserError, match="left out: "):
        evaluation.main([*paths, *flags])
    said = [line for line in capsys.readouterr().err.splitlines()
            if str(tmp_path) in line and "too short" not in line and "chance" not in line]
    assert len(said) == len(strays) + 1 and "Fast AT" in said[-1], said
    for again in range(2):  # a row is there once
        assert [one["path"] for one in json.loads(out.read_text())] == ["runs/a-seed1", str(folder / "run")]
        evaluation.main([paths[-1], *flags])
    calls = iter([common.predictions])

    def interrupt(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(common, "predictions", lambda *given: next(calls, interrupt)(*given))
    with pytest.raises(KeyboardInterrupt, match="3 rows were finished"):
        evaluation.main([paths[-1], *flags, "--attack", "pgd", "cw", "--restarts", "2"])
    assert len(json.loads(out.read_text())) == 3
    out.write_text("[{}]")
    with pytest.raises(UserError, match="not all of"):
        evaluation.main([paths[-1], *flags])
    assert out.read_text() == "[{}]"


def test_a_row_takes_the_place_of_the_same_weights_alone(folder, tmp_path):
    for name, middle in ("a", 0.5), ("b", 0.4):
        (tmp_path / name).mkdir()
        save_gray(tmp_path / name, middle)
    arguments = [*ARGS, "--data-dir", str(folder), "--json", str(tmp_path / "rows.json")]
    for name in "a", "b", "a":
        evaluation.main([str(tmp_path / name / "gray.pt"), *arguments])
    lines = (tmp_path / "rows.json").read_text().splitlines()
    paths = [json.loads(line.rstrip(","))["path"] for line in lines[1:-1]]
    assert paths == [str(tmp_path / name / "gray.pt") for name in ("a", "b")]


def test_experiments_that_look_alike_say_what_sets_them_apart():
    rows = [row(1), row(2), row(3, run={"common.py": "edited"})]
    assert "are not averaged: common.py was edited" in evaluation.table(evaluation.average(rows))
    assert "not averaged" not in evaluation.table(evaluation.average([row(1), row(2, run={"beta": 1.0})]))


def test_the_precision_is_found_out_once(folder, monkeypatch):
    measured = []
    monkeypatch.setattr(common, "bf16_is_faster", lambda *_: measured.append(1) or True)
    rows = run(folder, *QUICK, "--precision", "auto", paths=("run/best.pt", "run/last.pt"))
    assert measured == [1] and {row["row"]["evaluation"]["precision"] for row in rows} == {"bf16"}


def grid():
    return [row(seed, seed / 10, run={"width": width, "beta": beta})
            for seed in (1, 2, 3) for width in (1, 4) for beta in (6.0, 12.0, "auto")]


def test_figures(folder, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "rows.json").write_text(json.dumps(grid()))
    plots, paths = tmp_path / "p", (tmp_path / "rows.json", folder / "run")
    evaluation.main([*map(str, paths), "--attack", "none", "--plot", str(plots)])
    assert {path.name for path in plots.iterdir()} == {
        f"{name}-1.png" for name in ("metrics", "against-width", "against-lambda", "by-epoch")}


@pytest.mark.parametrize("axis, per, at", [("width", "beta", [1, 4]), ("beta", "width", [6, 12])])
def test_figures_show_the_numbers(monkeypatch, axis, per, at):
    drawn = []
    monkeypatch.setattr(evaluation, "curves", lambda lines, *_, **axis: drawn.extend(lines))
    rows = [one for one in evaluation.average(grid()) if one["run"]["beta"] != "auto"]
    evaluation.sweep(rows, axis, per)
    assert len(drawn) == 4 * 2 * 2  # a line of means, and the seeds
    (panel, label, *means, _), (*_, x, y, _) = drawn[:2]
    assert (panel, label) == ("natural %", {"beta": "λ = 6.0", "width": "width = 1"}[per])
    assert means == [at, pytest.approx([20, 20])] and [*x] == [at[0]] * 3 + [at[1]] * 3
    assert [*y] == pytest.approx([10, 20, 30] * 2)


def test_the_best_lambda_is_the_top_of_the_parabola():
    points = [(x, 30 - 2 * math.log(x / 5) ** 2) for x in (2, 4, 8, 16)]
    assert evaluation.best(points) == pytest.approx(5)
    assert evaluation.best([(x, 30 - 2 * math.log(x / 50) ** 2) for x in (2, 4, 8)]) == pytest.approx(8)
    assert math.isnan(evaluation.best([(x, math.log(x / 5) ** 2) for x in (2, 4, 8)]))


# --------------------------------------------------------------------------------------------------- mistakes

@pytest.mark.parametrize("flags, message", [
    ("missing.pt", "missing.pt: No such file"), ("run --dataset nothing", "no data set 'nothing'"),
    ("run --json .", "cannot be written"), ("run --json file/x", "file/x cannot be written"),
    ("run --eps 3", "3/255?"), ("run --eps 1.01", "--norm l2"), ("run --step-size 2", "2/255?"),
    *((f"run --normalize {words}", "means_and_deviations value") for words in (
        "cifar", "0.5,0", "0.4,0.5,0.6,0.2,0.3,nan", "1,1,1,1,1,0")),
    ("run --normalize 125.3,123,113.9,63,62,66.7", "divide 125.3,123,113.9,63,62,66.7 by 255")])
def test_mistakes_are_user_errors_of_one_line(folder, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").symlink_to(folder / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as error:
        evaluation.main(flags.split())
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_pattern_that_no_shell_expanded_is_expanded(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert evaluation.arguments(["r*", "gray.p?", "missing-*"]).paths == ["run", "gray.pt", "missing-*"]


def test_raw_and_averaged_weights_are_other_rows(folder):
    state = fresh().state_dict()
    content = {**common.read_checkpoint(folder / "run" / "last.pt"), "model": state, "raw_model": state}
    rows = [load(folder, content, "--weights", name)[1] for name in ("model", "raw_model")]
    assert [row["network"] for row in rows] == ["model", "raw_model"]
    assert count(row(1, run=rows[0]), row(2, run=rows[1])) == 2

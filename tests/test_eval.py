"""eval.py: what it counts, what it loads, what it compares and writes, and how it ends."""
import argparse
import json
import logging
import os
import shutil
import sys
import threading
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import eval as evaluation
import train_trades
from common import METRICS, Attack, UserError


@pytest.fixture(autouse=True)
def warnings_anew():
    """A warning is printed once; in each test anew."""
    common.warn.cache_clear()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Toy data, 8×8 images of noise in ten faint colours, and on it a trained run folder `run`."""
    folder, rng = tmp_path_factory.mktemp("eval"), np.random.default_rng(0)
    colours, arrays = rng.uniform(-1, 1, (10, 1, 1, 3)), {}
    for split, n in (("train", 1000), ("test", 200)):
        y = arrays[f"y_{split}"] = rng.integers(0, 10, n)
        x = 0.5 + 0.1 * colours[y] + rng.normal(0, 0.1, (n, 8, 8, 3))
        arrays[f"x_{split}"] = np.uint8(np.clip(x, 0, 1) * 255 + 0.5)
    np.savez(folder / "toy.npz", **arrays)
    settings = ("--dataset toy --device cpu --precision fp32 --depth 10 --width 1 --epochs 3 --batch-size 20 "
                "--beta 1 --eps 0.04 --step-size 0.04 --steps 1 --eval-size 40 --test-size 40")
    train_trades.main([*settings.split(), "--data-dir", str(folder), "--out", str(folder / "run")])
    return folder


@pytest.fixture(scope="module")
def data(folder):
    return common.load_data("toy", folder, torch.device("cpu"))


def run(folder, *flags, paths=("run",), json_file="out.json"):
    """The --json rows of eval.py on paths inside `folder`."""
    out = folder / json_file
    if out.name == "out.json":
        out.unlink(missing_ok=True)
    evaluation.main([*(str(folder / path) for path in paths), "--device", "cpu", "--data-dir", str(folder),
                     "--json", str(out), *map(str, flags)])
    return [*map(flat, json.loads(out.read_text()))]


def flat(row):
    """A row as the earlier form had it, and the row itself."""
    return {**row["run"], **row["evaluation"], **row["results"], "path": row["path"], "row": row,
            "settings": row["run"] if "seed" in row["run"] else {}, "chosen": row["run"].get("weights")}


QUICK = "--dataset", "toy", "--eval-size", 20, "--steps", 1


@pytest.fixture(scope="module")
def row(folder):
    return run(folder, *QUICK)[0]


@pytest.fixture
def outcomes(monkeypatch):
    """(y, f(x), f(x̂)) of every image, a triple for each row of results, once eval.py has run."""
    found, counted = [], common.three_metrics
    monkeypatch.setattr(common, "three_metrics", lambda *points: found.append(points) or counted(*points))
    return found


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


def assert_same_logits(one, other):
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------------------------ counting and the attack


def test_every_image_is_counted_and_the_last_row_is_the_worst_of_each(folder, data, outcomes):
    rows = run(folder, "--attack", "pgd", "cw", "fgsm", "--restarts", 2, "--eval-size", 100, "--eps", 0.02)
    assert rows[0]["attack"] == asdict(Attack(eps=0.02, restarts=2))
    assert rows[1]["attack"] == asdict(Attack("margin", eps=0.02, restarts=2))
    assert rows[2]["attack"] == asdict(Attack(eps=0.02, steps=1, step_size=0.02, start="none"))  # one restart
    assert rows[3]["attack"] == [row["attack"] for row in rows[:3]]
    assert evaluation.title(rows[3]["attack"]) == "worst of PGD-20×2, CW-20×2, FGSM, ε = 0.02, step 0.003"
    survived = []
    for (y, natural, adversarial), row in zip(outcomes, rows, strict=True):
        assert y.equal(data.test(100)[1]) and row["n"] == 100
        correct, stable = natural == y, adversarial == natural
        survived.append(stable)
        for name, counted in zip(METRICS, (correct, correct & (adversarial == y), stable)):
            assert row[name] == pytest.approx(counted.float().mean().item())
            assert row[f"{name}_ci"] == evaluation.wilson(row[name], 100)
    assert survived[3].equal(survived[0] & survived[1] & survived[2])
    assert not survived[0].equal(survived[1])  # else this test would show little


def test_stability_is_that_of_an_attack_of_our_own(folder, data, outcomes):
    row, = run(folder, "--attack", "fgsm", "--eps", 0.02, "--eval-size", 60, "--checkpoint", "last")
    (x, y), (_, natural, adversarial) = data.test(60), outcomes[-1]
    model, x = fresh(), x.float() / 255
    model.load_state_dict(common.read_checkpoint(folder / "run" / "last.pt")["model"])
    prediction = model(x).argmax(1)
    x.requires_grad_()
    gradient, = torch.autograd.grad(F.cross_entropy(model(x), y, reduction="sum"), x)
    stable = model((x + 0.02 * gradient.sign()).clamp(0, 1)).argmax(1) == prediction
    assert prediction.equal(natural) and ((adversarial == natural) != stable).sum() <= 1
    assert 0.2 < row["perturbation_stability"] < 0.95


def test_lipschitzness_is_of_random_images(folder, data, monkeypatch):
    met, pgd = [], common.pgd
    monkeypatch.setattr(common, "pgd", lambda model, x, *rest: met.append(x) or pgd(model, x, *rest))
    with_few, = run(folder, *QUICK[:2], "--steps", 1, "--lipschitz-size", 30)
    assert met[0].equal(common.to_float(data.test(30)[0])) and with_few["local_lipschitzness"] > 0
    assert "local_lipschitzness" not in run(folder, *QUICK, "--lipschitz-size", 0)[0]


def test_it_is_the_evaluation_that_training_reports(folder):
    row, = run(folder, "--checkpoint", "last", "--eval-size", 40, "--batch-size", 20)
    reported = common.read_json(folder / "run" / "metrics.json")["last"]
    assert reported.pop("best_chosen_on") == "test"
    assert {key: row[key] for key in reported} == reported


def test_autoattack_agrees_with_calling_its_package(folder, data, outcomes, monkeypatch):
    package = pytest.importorskip("pyautoattack")

    def quick(*arguments, **settings):  # the same four attacks, each short
        attack = package.autoattack.AutoAttack(*arguments, **settings)
        attack.apgd.n_iter = attack.apgd_targeted.n_iter = attack.fab.n_iter = 4
        attack.square.n_queries = 10
        return attack

    monkeypatch.setattr(package, "AutoAttack", quick)
    logging.getLogger("auto-attack").setLevel(logging.ERROR)
    rows = run(folder, "--attack", "pgd", "autoattack", "--eval-size", 40, "--batch-size", 20, "--eps", 0.02)
    (y, natural, adversarial), (x, _) = outcomes[1], data.test(40)
    assert rows[1]["attack"] == asdict(Attack("autoattack", eps=0.02, step_size=0, steps=0, start="none"))
    model, correct = fresh(), natural == y
    model.load_state_dict(common.read_checkpoint(folder / "run" / "best.pt")["model"])
    direct = quick(model, norm="Linf", eps=0.02, seed=0, device="cpu")
    _, found = direct.run_standard_evaluation((x.float() / 255).contiguous(), y, batch_size=20)
    assert (found == y)[correct].equal((adversarial == y)[correct])
    assert rows[1]["robust_accuracy"] == pytest.approx((found == y).float().mean().item())
    assert 0 < rows[1]["robust_accuracy"] <= rows[1]["perturbation_stability"] < 1
    assert (adversarial != natural)[~correct].any()  # misclassified images are attacked, too
    assert all(rows[2][name] <= min(rows[0][name], rows[1][name]) for name in METRICS[1:])


def test_intervals_are_wilsons():
    assert evaluation.wilson(0.5, 100) == pytest.approx([0.40383, 0.59617], abs=1e-5)
    assert evaluation.wilson(1.0, 10) == pytest.approx([0.72247, 1], abs=1e-5)


@pytest.mark.parametrize("norm, eps, published", [
    ("linf", "4/255", 0.003), ("linf", "8/255", 0.003), ("linf", "0.1", None), ("linf", "1", None),
    ("l2", "0.3", 0.2), ("l2", "3", None)])
def test_a_default_attack_reaches_across_its_ball(norm, eps, published):
    args = evaluation.arguments(["-", "--norm", norm, "--eps", eps])
    pgd, cw, fgsm = (evaluation.attack_of(name, args, norm, args.eps) for name in ("pgd", "cw", "fgsm"))
    assert cw == Attack("margin", *list(asdict(pgd).values())[1:]) and fgsm.step_size == args.eps == pgd.eps
    assert pgd.steps * pgd.step_size >= 1.9 * args.eps and pgd.step_size <= args.eps
    assert published is None or pgd.step_size == published


def test_the_radius_is_that_of_training_unless_told_otherwise(folder):
    torch.save(common.read_checkpoint(folder / "run" / "last.pt")["model"], folder / "foreign.pt")
    own, foreign = run(folder, *QUICK, "--lipschitz-size", 0, paths=("run", "foreign.pt"))
    assert own["attack"]["eps"] == 0.04 and foreign["attack"]["eps"] == 0.031
    assert "local_lipschitzness" not in own and foreign["settings"] == {} and own["beta"] == 1
    assert run(folder, *QUICK, "--eps", "10/255")[0]["attack"]["eps"] == 10 / 255
    l2 = asdict(Attack(norm="l2", eps=0.5, step_size=0.2, steps=1))
    row, = run(folder, *QUICK, "--norm", "l2", "--precision", "bf16")
    assert row["attack"] == l2 and row["precision"] == "bf16" and own["precision"] == "fp32"


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
           "endless": endless}


@pytest.mark.parametrize("layout, arch, depth, width", [
    *((layout, "wrn", 10, 1) for layout in LAYOUTS), ("trades", "wrn", 16, 2), ("plain", "wrn", 10, 0.5),
    ("awp", "preact", 18, 0.125), ("prefixes", "preact", 10, 0.25)])
def test_published_layouts_give_the_right_logits(folder, layout, arch, depth, width):
    model, images = fresh(arch, depth, width), torch.rand(4, 3, 8, 8)
    loaded, facts = load(folder, LAYOUTS[layout](model.state_dict()))
    assert_same_logits(loaded(images), model(images))
    assert (facts["arch"], facts["depth"], facts["width"]) == (arch, depth, width)


def test_a_run_of_averaged_weights_is_evaluated_by_its_average(folder):
    average, images = torch.optim.swa_utils.AveragedModel(fresh()), torch.rand(4, 3, 8, 8)
    raw = {key: torch.full_like(value, 0.1) for key, value in average.module.state_dict().items()}
    settings = common.read_checkpoint(folder / "run" / "last.pt")["args"]
    content = {"model": average.state_dict(), "raw_model": raw, "epoch": 1, "args": settings}
    assert_same_logits(load(folder, content)[0](images), average.module(images))


MEAN, STD = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.4])


@pytest.mark.parametrize("flags, mean, std", [
    ("cifar10", [0.4914, 0.4822, 0.4465], [0.2471, 0.2435, 0.2616]), ("+-1", [0.5], [0.5]),
    ("imagenet", [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ("0.4,0.5,0.6,0.2,0.3,0.4", MEAN, STD)])
def test_normalize_scales_pixels_inside_and_leaves_the_ball(folder, outcomes, monkeypatch, flags, mean, std):
    mean, std = (torch.as_tensor(values).view(-1, 1, 1) for values in (mean, std))
    model, seen, pgd = fresh(), [], common.pgd

    def noted(model, x, *rest):
        seen.append((x, *pgd(model, x, *rest)))
        return seen[-1][1:]

    monkeypatch.setattr(common, "pgd", noted)
    torch.save(model.state_dict(), folder / "published.pt")
    run(folder, *QUICK, "--eps", "8/255", "--step-size", 0.05, "--normalize", *flags.split(),
        paths=["published.pt"])
    x, x_adv, _ = seen[-1]
    assert outcomes[0][1].equal(model((x - mean) / std).argmax(1))
    assert outcomes[0][2].equal(model((x_adv - mean) / std).argmax(1))
    assert (x_adv - x).abs().max().item() == pytest.approx(8 / 255, abs=1e-6) and x_adv.min() >= 0


def test_accuracy_of_chance_is_pointed_out(folder, capsys):
    state = common.read_checkpoint(folder / "run" / "last.pt")["model"]
    for scale, warned in ((1, False), (255, True)):
        torch.save({**state, "conv1.weight": state["conv1.weight"] / scale}, folder / "published.pt")
        row, = run(folder, *QUICK, "--eval-size", 100, paths=["published.pt"])
        assert ("--normalize" in capsys.readouterr().err) == warned == (row["natural_accuracy"] < 0.2)


def test_the_network_is_the_one_that_the_settings_name(folder, monkeypatch):
    class Forked(common.DenseNet):  # it normalizes by itself
        def __init__(self, *settings):
            super().__init__(*settings)
            self.register_buffer("mean", MEAN)
            self.register_buffer("std", STD)

    monkeypatch.setitem(common.NETWORKS, "forked", Forked)
    monkeypatch.setattr(evaluation, "guess_network", None)  # a new network may have any parameters
    named = {"method": "own", "arch": "forked", "depth": 10, "width": 6, "beta": "auto"}
    model, images = fresh("forked", 10, 6), torch.rand(4, 3, 8, 8)
    content = {"model": model.state_dict(), "args": {**named, "dataset": "toy", "seed": 1}}
    loaded, facts = load(folder, content)
    assert_same_logits(loaded(images), model(images))
    assert named.items() <= facts.items()
    monkeypatch.undo()
    content["model"] = {key.replace("conv", "first"): value for key, value in content["model"].items()}
    with pytest.raises(UserError, match="published.pt holds no network with the parameter names"):
        load(folder, content)


def test_a_run_folder_means_the_checkpoint_asked_for_and_a_file_itself(folder):
    best, file, = run(folder, *QUICK, paths=("run", "run/best.pt"))
    last, = run(folder, *QUICK, "--checkpoint", "last")
    assert (best["weights"], last["weights"], last["epoch"]) == ("best", "last", 3)
    assert (best["hash"] == last["hash"]) == (best["epoch"] == 3) and best["hash"] == file["hash"]


def test_a_checkpoint_of_earlier_code_evaluates(folder):
    state = common.read_checkpoint(folder / "run" / "last.pt")
    later = "data", "no_flip", "quick", "init", "activation"
    state["args"] = {key: value for key, value in state["args"].items() if key not in later}
    torch.save(state, folder / "before.pt")
    before, now = run(folder, *QUICK, paths=("before.pt", "run/last.pt"))
    assert before["row"]["results"] == now["row"]["results"]
    assert before["row"]["evaluation"] == now["row"]["evaluation"] and before["hash"] == now["hash"]


def test_activation_is_that_of_the_checkpoint_or_as_told(folder):
    model, images = common.NETWORKS["wrn"](10, 1, 10, "silu").eval(), torch.rand(4, 3, 8, 8)
    loaded, facts = load(folder, model.state_dict(), "--activation", "silu")
    assert_same_logits(loaded(images), model(images))
    assert facts["activation"] == "silu"
    settings = common.read_checkpoint(folder / "run" / "last.pt")["args"]
    content = {"model": model.state_dict(), "args": settings}
    assert load(folder, content, "--activation", "silu")[1]["activation"] == "relu"


def test_data_other_than_those_of_training_are_pointed_out(folder, row, tmp_path, capsys):
    arrays = {**np.load(folder / "toy.npz")}
    np.savez(tmp_path / "toy.npz", **{**arrays, "x_test": arrays["x_test"][::-1].copy()})
    other, = run(folder, *QUICK, "--data-dir", tmp_path)
    assert "was trained on another toy" in capsys.readouterr().err and other["data"] != row["data"]
    run(folder, *QUICK)
    assert "another toy" not in capsys.readouterr().err
    state = common.read_checkpoint(folder / "run" / "last.pt")
    for trained_on, warned in (f"{row['data']}+abc", False), ("other+abc", True):  # with extra images
        torch.save({**state, "args": {**state["args"], "data": trained_on}}, folder / "extra.pt")
        run(folder, *QUICK, paths=("extra.pt",))
        assert ("another toy" in capsys.readouterr().err) == warned


def test_the_ball_is_that_of_training(folder):
    state = common.read_checkpoint(folder / "run" / "last.pt")
    torch.save({**state, "args": {**state["args"], "norm": "l2", "eps": 0.7}}, folder / "l2.pt")
    for flags, norm, eps in ((), "l2", 0.7), (("--norm", "linf"), "linf", 0.031), (("--eps", 0.2), "l2", 0.2):
        row, = run(folder, *QUICK, *flags, paths=("l2.pt",))
        assert (row["attack"]["norm"], row["attack"]["eps"]) == (norm, eps)
    row, = run(folder, *QUICK, "--norm", "l2")
    assert (row["attack"]["norm"], row["attack"]["eps"]) == ("l2", 0.5)


def test_a_published_network_is_said_to_take_plain_pixels(folder, capsys):
    torch.save(common.read_checkpoint(folder / "run" / "last.pt")["model"], folder / "published.pt")
    for path, flags, said in ("published.pt", (), True), ("published.pt", ("--normalize", "none"), False), (
            "run", (), False):
        run(folder, *QUICK, *flags, paths=(path,))
        assert ("needs --normalize" in capsys.readouterr().out) == said


def test_unfinished_runs_and_other_code_are_kept_apart(folder, capsys):
    for name in "cut", "edited":
        shutil.copytree(folder / "run", folder / name)
    (folder / "cut" / "metrics.json").unlink()
    state = torch.load(folder / "run" / "last.pt")
    torch.save({**state, "args": {**state["args"], "common.py": "abcdef"}}, folder / "edited" / "last.pt")
    rows = run(folder, *QUICK, "--checkpoint", "last", paths=("run", "cut", "edited"))
    assert len(evaluation.average([row["row"] for row in rows])) == 3
    said = capsys.readouterr()
    assert said.err.count("unfinished run") == 1 and "last, unfinished" in said.out


def test_a_run_that_replaces_another_of_its_seed_is_named(folder, capsys):
    shutil.copytree(folder / "run", folder / "twin")
    twice = run(folder, *QUICK, paths=("run", "twin"))
    assert len(evaluation.average([row["row"] for row in twice])) == 1
    assert "takes the place of" not in capsys.readouterr().err  # the same weights
    state = torch.load(folder / "run" / "best.pt")
    torch.save({**state, "model": {**state["model"], "fc.bias": state["model"]["fc.bias"] + 1}},
               folder / "twin" / "best.pt")
    twice = run(folder, *QUICK, paths=("run", "twin"))
    assert len(evaluation.average([row["row"] for row in twice])) == 1
    assert "twin takes the place of" in capsys.readouterr().err


class Harm:
    def __reduce__(self):
        return os.system, ("touch harmed",)


@pytest.mark.parametrize("beside", [Harm(), argparse.Namespace(x=Harm()), np.array([Harm()])])
def test_nothing_in_a_checkpoint_runs(tmp_path, monkeypatch, beside):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "beside": beside}, "some.pt")
    with pytest.raises(UserError, match="some.pt"):
        common.read_checkpoint("some.pt")
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize("code", [b"O8", b"V8", b"S8", b"M8", b"c8"])
def test_a_crafted_dtype_turns_no_bytes_into_pointers(tmp_path, code):
    torch.save({"beside": np.float64(1)}, tmp_path / "fine.pt", _use_new_zipfile_serialization=False)
    assert common.read_checkpoint(tmp_path / "fine.pt") == {"beside": 1.0}
    content = (tmp_path / "fine.pt").read_bytes()
    assert content.count(b"f8") == 1
    (tmp_path / "crafted.pt").write_bytes(content.replace(b"f8", code))
    with pytest.raises(UserError, match="crafted.pt"):
        common.read_checkpoint(tmp_path / "crafted.pt")


# --------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize("flags, message", [
    ("missing.pt", "missing.pt: No such file"), ("run --dataset nothing", "no data set 'nothing'"),
    ("", "required: PATH"), ("run --json .", "cannot be written"),
    ("run --json file/x", "file/x cannot be written"),
    ("run --attack deepfool", "invalid choice: 'deepfool'"), ("run --device cuda:99", "no such device"),
    ("run --eps 3", "3/255?"), ("run --eps 1.01", "--norm l2"), ("run --step-size 2", "2/255?"),
    ("run --eps -1", "at least 0"), ("run --eps 3/0", "at least 0"),
    *((f"run --normalize {words}", "means_and_deviations value") for words in (
        "cifar", "0.5", "0.5,0", "1,2,3,4", "0.4,0.5,0.6,0.2,0.3,nan", "1,1,1,1,1,0"))])
def test_mistakes_are_user_errors_of_one_line(folder, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").symlink_to(folder / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as error:
        evaluation.main(flags.split())
    assert message in str(error.value) and "\n" not in str(error.value)



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
    evaluation.main([*(str(folder / path) for path in paths), "--device", "cpu", "--data-dir", str(folder),
                     "--lipschitz-size", "4", "--json", str(out), *map(str, flags)])
    return json.loads(out.read_text())


QUICK = "--dataset", "toy", "--eval-size", 20, "--steps", 1


@pytest.fixture(scope="module")
def row(folder):
    return run(folder, *QUICK)[0]


def untimed(rows):
    return [{**row, "seconds": 0} for row in rows]


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
    model, _, _, facts = evaluation.load(folder / "published.pt", args, torch.device("cpu"))
    return model.eval(), facts


def assert_same_logits(one, other):
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------------------------ counting and the attack


def test_every_image_is_counted_and_the_last_row_is_the_worst_of_each(folder, data, outcomes):
    rows = run(folder, "--attack", "pgd", "cw", "fgsm", "--restarts", 2, "--eval-size", 100, "--eps", 0.02)
    assert rows[0]["attack"] == asdict(Attack(eps=0.02, restarts=2))
    assert rows[2]["attack"] == asdict(Attack(eps=0.02, steps=1, step_size=0.02, start="none"))  # one restart
    assert rows[3]["attack"] == [row["attack"] for row in rows[:3]]
    assert rows[0]["lipschitz_n"] == 4 and rows[0]["local_lipschitzness"] > 0
    survived = []
    for (y, natural, adversarial), row in zip(outcomes, rows, strict=True):
        assert y.equal(data.test(100)[1]) and row["n"] == 100
        correct, stable = natural == y, adversarial == natural
        survived.append(stable)
        for name, counted in zip(METRICS, (correct, correct & (adversarial == y), stable)):
            assert row[name] == pytest.approx(counted.float().mean().item())
            assert row[f"{name}_ci"] == evaluation.wilson(row[name], 100)
    assert survived[3].equal(survived[0] & survived[1] & survived[2])
    assert not any(survived[3].equal(one) for one in survived[:3])  # else this test would show little


def test_stability_is_that_of_an_attack_of_our_own(folder, data, outcomes):
    row, = run(folder, "--start", "none", "--eps", 0.02, "--eval-size", 60, "--checkpoint", "last")
    (x, y), (_, natural, adversarial) = data.test(60), outcomes[-1]
    model, x = fresh(), x.float() / 255
    model.load_state_dict(common.read_checkpoint(folder / "run" / "last.pt")["model"])
    prediction, x_adv = model(x).argmax(1), x
    for _ in range(20):
        x_adv = x_adv.detach().requires_grad_()
        gradient, = torch.autograd.grad(F.cross_entropy(model(x_adv), y, reduction="sum"), x_adv)
        x_adv = (x + (x_adv + 0.003 * gradient.sign() - x).clamp(-0.02, 0.02)).clamp(0, 1)
    stable = model(x_adv).argmax(1) == prediction
    assert prediction.equal(natural) and ((adversarial == natural) != stable).sum() <= 1
    assert 0.2 < row["perturbation_stability"] < 0.95


def test_it_is_the_evaluation_that_training_reports(folder):
    row, = run(folder, "--checkpoint", "last", "--eval-size", 40, "--lipschitz-size", 40, "--batch-size", 20)
    reported = common.read_json(folder / "run" / "metrics.json")["last"]
    assert reported.pop("best_chosen_on") == "test"
    assert {key: row[key] for key in reported} == reported


def test_autoattack_agrees_with_calling_its_package(folder, data, outcomes, monkeypatch):
    package = pytest.importorskip(evaluation.AUTOATTACK)

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
    args = evaluation.arguments(["-", "--norm", norm, "--eps", eps, "--attack", "pgd", "cw", "fgsm"])
    pgd, cw, fgsm = evaluation.attacks_of(args, args.eps)
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
    ("trades", "densenet", 10, 6), ("awp", "preact", 18, 0.125), ("prefixes", "preact", 10, 0.25)])
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
PAIR = {"mean": MEAN, "std": STD}
HELD = {"rst": lambda state: {"num_classes": 10, "state_dict": prefixed("module.", {
    "0.mean": MEAN.view(1, 3, 1, 1), "0.std": STD.view(1, 3, 1, 1), **prefixed("1.", state)})},
        "buffers": lambda state: {"mu": MEAN, "sigma": STD, **state},
        "wrapper": lambda state: {"net": {"in.means": MEAN, "in.stds": STD, **prefixed("model.", state)}},
        "names": lambda state: {"x_mean": MEAN.view(3, 1, 1), "x_std": STD, **prefixed("net.", state)},
        "beside": lambda state: {"model": state, "pre": {key: value.tolist() for key, value in PAIR.items()}},
        "twice": lambda state: {"state_dict": {**state, **PAIR}, "ema": PAIR},
        "double": lambda state: {"Mean": MEAN.double(), "Std": STD.double(), **state}}


@pytest.mark.parametrize("held", HELD)
def test_statistics_that_a_file_holds_are_used_and_said(folder, capsys, held):
    model, images = fresh(), torch.rand(4, 3, 8, 8)
    content, columns = HELD[held](model.state_dict()), (MEAN.view(3, 1, 1), STD.view(3, 1, 1))
    assert_same_logits(load(folder, content)[0](images), model((images - columns[0]) / columns[1]))
    assert "normalized by the mean and deviation that it holds" in capsys.readouterr().out
    assert_same_logits(load(folder, content, "--normalize", "none")[0](images), model(images))
    assert_same_logits(load(folder, content, "--normalize", "+-1")[0](images), model(2 * images - 1))


@pytest.mark.parametrize("held", [
    {"0.mean": MEAN}, {"mean": 255 * MEAN, "std": 255 * STD}, {"mu": MEAN, "inv_std": 1 / STD},
    {"a.mean": MEAN, "b.mean": STD, "std": STD}, {"mean": torch.rand(3, 8, 8), "std": torch.ones(3, 8, 8)},
    {"mean": MEAN, "std": 0 * STD}])
def test_statistics_that_are_not_clear_are_asked_about(folder, held):
    model, images = fresh(), torch.rand(4, 3, 8, 8)
    content = {**prefixed("model.", model.state_dict()), **held}
    with pytest.raises(UserError, match=f"{[*held][0]}.*--normalize"):
        load(folder, content)
    assert_same_logits(load(folder, content, "--normalize", "none")[0](images), model(images))


@pytest.mark.parametrize("flags, mean, std", [
    ("cifar10", [0.4914, 0.4822, 0.4465], [0.2471, 0.2435, 0.2616]), ("+-1", [0.5], [0.5]),
    ("imagenet", [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]), ("0.5 1/4", [0.5], [0.25]),
    ("0.4 0.5 0.6 0.2 0.3 0.4", MEAN, STD), ("0.4,0.5,0.6,0.2,0.3,0.4", MEAN, STD)])
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
    assert named.items() <= facts.items() and facts["normalize"] is None
    monkeypatch.undo()
    content["model"] = {key.replace("conv1", "first"): value for key, value in content["model"].items()}
    with pytest.raises(UserError, match="published.pt holds no network of common.py's NETWORKS"):
        load(folder, content)


def test_a_checkpoint_of_earlier_code_evaluates(folder):
    state = common.read_checkpoint(folder / "run" / "last.pt")
    later = "data", "no_flip", "quick", "init", "activation"
    state["args"] = {key: value for key, value in state["args"].items() if key not in later}
    state["args"] |= {"out": "runs/x", "device": "cpu", "code": {"common.py": "abc"}}
    torch.save(state, folder / "before.pt")
    before, now = run(folder, *QUICK, paths=("before.pt", "run/last.pt"))
    assert {key for key in now if before[key] != now[key]} - {"seconds"} <= {
        "path", "checkpoint", "chosen", "settings", "code"}
    assert not {"out", "device"} & before["settings"].keys()


def test_a_run_folder_means_the_checkpoint_asked_for_and_a_file_itself(folder):
    (folder / "no-best").mkdir()
    last = common.read_checkpoint(folder / "run" / "last.pt")
    torch.save({**last, "epoch": 9}, folder / "no-best" / "last.pt")
    rows = run(folder, *QUICK, paths=("run", "run/best.pt", "no-best"))
    assert [row["chosen"] for row in rows] == ["best", "best", "last"] and rows[2]["epoch"] == 9
    assert rows[0]["checkpoint"] == rows[1]["checkpoint"] and rows[0]["dataset"] == "toy"
    last, = run(folder, *QUICK, "--checkpoint", "last")
    assert (last["epoch"], last["chosen"]) == (3, "last") and last["checkpoint"].endswith("run/last.pt")


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
    for name in "cut", "short", "forked", "edited":
        shutil.copytree(folder / "run", folder / name)
    log = folder / "cut" / "log.jsonl"
    log.write_text(log.read_text().splitlines(True)[0])
    (folder / "short" / "log.jsonl").unlink()
    torch.save({**torch.load(folder / "short" / "last.pt"), "epoch": 2}, folder / "short" / "last.pt")
    (folder / "forked" / "losses.py").write_text("factor = 2")
    (folder / "edited" / "common.py").write_text("factor = 2")
    rows = run(folder, *QUICK, "--checkpoint", "last", paths=("run", "short", "forked", "edited"))
    rows += run(folder, *QUICK, paths=("cut",))
    assert [merged["seeds"] for merged in evaluation.merge_seeds(rows)] == [1] * 5
    said = capsys.readouterr().err
    assert all(said.count(f"unfinished run, {done} of 3 epochs") == 1 for done in (1, 2))
    assert said.count("unfinished") == 2
    assert said.count("common.py has changed") == 1
    lines = [[cell.strip() for cell in line.split("|")] for line in evaluation.table(rows).splitlines()[2:]]
    column = lines[0].index("epochs so far")
    assert [line[column] for line in lines[2:]] == ["", "2", "", "", "1"]


def test_a_run_that_replaces_another_of_its_seed_is_named(folder, capsys):
    shutil.copytree(folder / "run", folder / "twin")
    merged, = evaluation.merge_seeds(run(folder, *QUICK, paths=("run", "twin")))
    assert merged["seeds"] == 1
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


# -------------------------------------------------------------------------------------- comparing and writing


def variant(row, training_seed, **changes):
    """A row of results as another seed of the run would have it, in another folder."""
    path, settings = f"runs/a-seed{training_seed}", {**row["settings"], "seed": training_seed}
    settings |= changes.pop("settings", {})
    return {**row, "path": path, "checkpoint": f"{path}/best.pt", "epoch": training_seed, **changes,
            "settings": settings}


@pytest.mark.parametrize("values, shown", [([0.5, 0.6, 0.7], "60.00 ±24.84"),  # 4.303·0.1/√3
                                           ([0.5, 0.5, 0.7, 0.7], "60.00 ±18.37"), ([0.5, 0.7], "60.00")])
def test_seeds_merge_into_means_with_students_interval(row, tmp_path, capsys, values, shown):
    rows = [variant(row, seed, natural_accuracy=value) for seed, value in enumerate(values)]
    (tmp_path / "rows.json").write_text(json.dumps([*rows, rows[0]]))  # one given twice: one all the same
    evaluation.main([str(tmp_path / "rows.json"), "--attack", "none", "--merge-seeds"])
    caption, _, header, _, line = capsys.readouterr().out.strip().splitlines()
    assert f"seeds {len(values)}" in caption
    assert [cell.strip() for cell in line.split("|")[1:3]] == ["runs/a-seed*", shown]


ON_ONE_FIGURE = [{"beta": 2.0}, {"width": 2}, {"settings": {"reference": "runs/narrow"}}]


@pytest.mark.parametrize("change", [
    {"data": "other"}, {"dataset": "cifar10"}, {"seed": 5}, {"precision": "bf16"}, {"n": 999},
    {"chosen": "last"}, {"normalize": [[0.5], [0.5]]}, {"attack": asdict(Attack(steps=40))},
    {"attack": asdict(Attack(eps=0.02))}, {"attack": [asdict(Attack())]}, {"code": "edited"},
    {"method": "at"}, {"depth": 16}, {"lipschitz_n": 7}, {"settings": {"data": "other"}},
    {"settings": {"lr": 0.2}}, {"settings": {"val_size": 10}}, *ON_ONE_FIGURE])
def test_what_differs_in_more_than_the_seed_is_kept_apart(row, change):
    def seeds(*rows):
        return [merged["seeds"] for merged in evaluation.merge_seeds(rows)]

    one, other = variant(row, 1), variant(row, 2, **change)
    assert seeds(one, other) == [1, 1] and seeds(one, variant(row, 2)) == [2]
    texts = [evaluation.across_seeds(one, "width", "beta", "training reference") for one in (one, other)]
    assert (texts[0] == texts[1]) == (change in ON_ONE_FIGURE)


def test_unfinished_and_published_networks_are_not_averaged(row):
    last = [variant(row, seed, chosen="last", epoch=epoch) for seed, epoch in ((1, 60), (2, 60), (3, 30))]
    assert [merged["seeds"] for merged in evaluation.merge_seeds(last)] == [2, 1]
    published = [{**variant(row, 0), "path": path, "settings": {}} for path in ("a.pt", "b.pt")]
    assert len(evaluation.merge_seeds(published)) == 2
    adjusted = [variant(row, seed, settings={"reference": f"runs/narrow-seed{seed}"}) for seed in (1, 2)]
    assert [merged["seeds"] for merged in evaluation.merge_seeds(adjusted)] == [2]


def test_the_table_says_all_and_fits_a_terminal(row):
    attacks = [asdict(Attack(restarts=10)), asdict(Attack(restarts=10, eps=8 / 255))]
    rows = [{**row, "path": f"runs/trades-cifar10-wrn-34-10-beta{beta}-seed1", "attack": attack, "n": 10000}
            for beta in (6, 12) for attack in attacks + [attacks]]
    caption, _, *lines = evaluation.table(rows[::3]).splitlines()
    assert max(map(len, lines)) <= 110 and len({*map(len, lines)}) == 1 and len(lines) == 4
    said = "PGD-20×10, ε = 0.031, step 0.003", f"toy ({row['data'][:6]})", "best on test images", "fp32"
    assert all(fact in caption for fact in said)
    caption, _, header, rule, *lines = evaluation.table(rows).splitlines()
    assert "PGD" not in caption and [line.count("|") for line in (header, rule, *lines)] == [7] * 8
    assert all(evaluation.title(row["attack"]) in line for row, line in zip(rows, lines))
    assert "worst of PGD-20×10, PGD-20×10, ε = 0.031" in lines[2]


def test_earlier_rows_stay_and_a_new_one_is_added_once(folder, row):
    earlier = [variant(row, seed) for seed in (7, 8)]
    (folder / "rows.json").write_text(json.dumps(earlier))
    for _ in range(2):
        rows = run(folder, *QUICK, paths=("run", "rows.json"), json_file="rows.json")
        assert untimed(rows) == untimed([*earlier, row])
    (folder / "rows.json").write_text("[{}]")
    with pytest.raises(UserError, match="rows.json is not a list of results"):
        run(folder, *QUICK, paths=("run", "rows.json"), json_file="rows.json")
    assert (folder / "rows.json").read_text() == "[{}]"


def test_strays_are_left_out_with_a_line_each_and_status_2(folder, row, capsys):
    model = common.read_checkpoint(folder / "run" / "last.pt")["model"]
    strays = {"missing.pt": None, "absent.json": None, "page.pt": b"<html>", "nothing.json": b"",
              "cut.pt": (folder / "run" / "best.pt").read_bytes()[:5000], "text.json": b"no JSON",
              "list.json": b"[1]", "dict.json": b'{"path": 1}', "tensor.pt": torch.zeros(3),
              "old.json": json.dumps([{**row, "attack": "pgd"}]).encode(), "unsafe.pt": {"model": Harm()},
              "none.pt": {"state_dict": {}}, "other.pt": {"fc.weight": torch.zeros(3)},
              "more.pt": {**prefixed("model.", model), "head.weight": torch.ones(3)},
              "text.pt": {**model, "conv1.weight": "text"},
              "number.pt": {**model, "conv1.weight": torch.ones(())},
              "nan.pt": {**model, "fc.bias": torch.full((10,), torch.nan)},
              "classes.pt": {**model, "fc.bias": torch.zeros(7), "fc.weight": torch.zeros(7, 64)},
              "huge.pt": {**model, "fc.weight": 1e38 * torch.ones(10, 64), "bn1.bias": 1e9 * torch.ones(64)}}
    for name, content in strays.items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        elif content is not None:
            torch.save(content, folder / name)
    (folder / "bare").mkdir()
    with pytest.raises(UserError, match="left out: ") as error:
        run(folder, *QUICK, paths=("bare", *strays, "run"))
    lines = [line for line in capsys.readouterr().err.splitlines() if "too short" not in line]
    assert all(line.startswith("warning: ") for line in lines) and len(lines) == len(strays) + 1
    for path in (str(folder / name) for name in ("bare", *strays)):
        assert sum(path in line for line in lines) == 1 and path in str(error.value), path
    assert untimed(json.loads((folder / "out.json").read_text())) == untimed([row])


def test_runs_of_fast_at_are_left_out_and_others_go_on(folder, tmp_path, capsys):
    (tmp_path / "args.json").write_text('{"crops": [128, 224, 288]}')
    row, = run(folder, *QUICK, paths=(tmp_path, "run"))
    assert row["path"] == str(folder / "run")
    assert f"{tmp_path} is of Fast AT on ImageNet" in capsys.readouterr().err


def test_interrupted_it_has_written_what_was_finished(folder, monkeypatch):
    outcomes = iter([common.predictions])
    monkeypatch.setattr(common, "predictions", lambda *arguments: next(outcomes, interrupt)(*arguments))

    def interrupt(*_):
        raise KeyboardInterrupt

    markdown = folder / "made" / "kept.md"
    with pytest.raises(KeyboardInterrupt, match="1 rows were finished"):
        run(folder, *QUICK, "--attack", "pgd", "cw", "--markdown", markdown, json_file="kept.json")
    row, = json.loads((folder / "kept.json").read_text())
    low, high = row["robust_accuracy_ci"]
    assert f" {100 * row['robust_accuracy']:.2f} ±{50 * (high - low):.2f} |" in markdown.read_text()


def test_links_pipes_and_standard_output_are_written_to(row, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    (tmp_path / "link.json").symlink_to(tmp_path / "target.json")
    os.mkfifo(tmp_path / "pipe")
    read = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()), daemon=True)
    reader.start()
    for file in ("~/link.json", "~/home.json", "~/pipe", "/dev/stdout"):
        evaluation.main(["~/rows.json", "--attack", "none", "--json", file])
    reader.join(10)
    contents = read[0], *((tmp_path / name).read_text() for name in ("target.json", "home.json"))
    assert all(json.loads(text) == [row] for text in (*contents, capfd.readouterr().out.splitlines()[-1]))
    assert (tmp_path / "link.json").is_symlink() and (tmp_path / "pipe").is_fifo()


# ---------------------------------------------------------------------------------------------------- figures


def test_figures_come_from_json_and_logs_alone(folder, row, tmp_path):
    pytest.importorskip("matplotlib")
    rows = [{**variant(row, seed, width=width, beta=beta), "path": f"{width}{beta}{seed}"}
            for seed in (1, 2, 3) for width in (1, 4) for beta in (6.0, "auto")]
    rows += [{**one, "data": "f" * 16} for one in rows]  # other data of the same name
    rows.append({**row, "path": "a/long/path/of/somebody/else.pt", "settings": {}})
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    logs = {"fast": [{"epoch": 1, "adversarial_risk": 2}, {"epoch": 2, "adversarial_risk": 1.5}],
            "fork": [{"epoch": 1, "a_risk": 2, "beta": 1, "lr": 1}, {"epoch": 2, "a_risk": None, "beta": 2}],
            "bare": [{"epoch": 1, "loss": 2}]}
    for name, settings in ("fast", {"eps": 2 / 255, "width": 1.0, "beta": 1.0}), ("fork", {}), ("bare", {}):
        (tmp_path / name).mkdir()
        (tmp_path / name / "args.json").write_text(json.dumps({"method": name, **settings}))
        (tmp_path / name / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in logs[name]))
    assert evaluation.logged(tmp_path / "fork")["drawn"] == ["a_risk", "beta"]
    paths = tmp_path / "rows.json", folder / "run", *(tmp_path / name for name in logs)
    flags = "--attack", "none", "--merge-seeds", "--plot", tmp_path / "figures"
    evaluation.main([*map(str, (*paths, *flags))])
    figures = {path.name: path.read_bytes() for path in (tmp_path / "figures").iterdir()}
    metrics, width = "metrics-toy-pgd-1-eps0.04", "width-trades-toy-wrn-10-best-pgd-1-eps0.04"
    assert figures.keys() == {
        "schedules.png", f"{metrics}.png", f"{metrics}-2.png", f"{width}.png", f"{width}-2.png",
        "training-trades-toy-wrn-10.png", "training-fast.png", "training-fork.png"}
    for png in figures.values():
        assert png[:8] == b"\x89PNG\r\n\x1a\n" and int.from_bytes(png[16:20], "big") == 495  # 3.3 inches


def test_figures_show_the_numbers(row):
    def drawn(figure_of, group):
        figure = pytest.importorskip("matplotlib.figure").Figure()
        figure_of(figure, group)
        return figure.axes[0]

    rows = [variant(row, 1, width=width, beta=beta, natural_accuracy=width * beta / 100)
            for width in (4, 1) for beta in (6, 12)]
    lines = drawn(evaluation.width_figure, rows).containers
    lines = {line.get_label(): line[0].get_ydata().tolist() for line in lines}
    assert lines == {"λ = 6": pytest.approx([6, 24]), "λ = 12": pytest.approx([12, 48])}
    natural, robust, stability = (100 * row[name] for name in METRICS)
    lengths = [bar.get_width() for bar in drawn(evaluation.metrics_figure, [row]).patches]
    assert lengths == pytest.approx([natural - robust, robust, stability - robust])
    runs = [{"width": width, "drawn": ["a_risk"], "log": [{"epoch": 1, "a_risk": width}]} for width in (1, 2)]
    assert [[*line.get_ydata()] for line in drawn(evaluation.training_figure, runs).lines[:2]] == [[1], [2]]
    lines = {line.get_label(): line.get_ydata() for line in drawn(evaluation.schedules_figure, []).lines}
    assert lines.keys() == common.SCHEDULES.keys()
    np.testing.assert_allclose(lines["cosine"], [0.05 * (1 + np.cos(np.pi * e / 100)) for e in range(100)])


# -------------------------------------------------------------------------------- mistakes; optional packages


@pytest.mark.parametrize("flags, message", [
    ("missing.pt", "missing.pt: No such file"), ("run --dataset nothing", "no data set 'nothing'"),
    ("", "give a PATH"), ("run --json .", ". is a folder"), ("run --json file/x", "file/x cannot be written"),
    ("run --attack deepfool", "invalid choice: 'deepfool'"), ("run --device cuda:99", "no such device"),
    ("run --eps 3", "3/255?"), ("run --eps 1.01", "--norm l2"), ("run --step-size 2", "2/255?"),
    ("run --eps -1", "at least 0"), ("run --eps 3/0", "number"),
    *((f"run --normalize {words}", "must be one of cifar10, ") for words in (
        "cifar", "0.5", "0.5 0", "1 2 3 4", "0.4 0.5 0.6 0.2 0.3 nan", "0.5 0.5 run"))])
def test_mistakes_are_user_errors_of_one_line(folder, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").symlink_to(folder / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as error:
        evaluation.main(flags.split())
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("package, install, flags", [
    (evaluation.AUTOATTACK, evaluation.AUTOATTACK, "run --attack autoattack"),
    ("matplotlib.figure", "matplotlib", "run --plot figures"),
    ("robustbench.utils", 'robustbench pyautoattack "setuptools<80"', "robustbench:Carmon2019Unlabeled")])
def test_a_missing_optional_package_is_named(monkeypatch, package, install, flags):
    monkeypatch.setitem(sys.modules, evaluation.AUTOATTACK, SimpleNamespace())
    monkeypatch.setitem(sys.modules, package, None)  # importing it fails
    with pytest.raises(UserError, match=f"pip install {install}"):
        evaluation.main(flags.split())


@pytest.mark.parametrize("flags, norm, eps", [([], "Linf", 8 / 255), (["--norm", "l2"], "L2", 0.5)])
def test_robustbench_networks_are_attacked_as_they_are(folder, data, outcomes, monkeypatch, flags, norm, eps):
    layers = torch.nn.Conv2d(3, 8, 3, 2), torch.nn.Flatten(), torch.nn.Linear(72, 10)
    networks = {("Odd2020", "toy", norm): torch.nn.Sequential(*layers).eval()}  # none of ours

    def load_model(name, dataset, threat_model):
        return networks[name, dataset, threat_model]

    for name in ("pyautoattack", "robustbench", "autoattack"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    monkeypatch.setitem(sys.modules, "robustbench.utils", SimpleNamespace(load_model=load_model))
    monkeypatch.delitem(sys.modules, "autoattack")
    flags = [*map(str, QUICK), *flags, "--data-dir", str(folder), "--json", str(folder / "zoo.json")]
    evaluation.main(["robustbench:Odd2020", *flags])
    row, = common.read_json(folder / "zoo.json")
    assert row["attack"]["eps"] == eps and row["settings"] == {} and row["precision"] == "fp32"
    assert outcomes[0][1].equal(networks["Odd2020", "toy", norm](common.to_float(data.test(20)[0])).argmax(1))
    with pytest.raises(UserError, match="RobustBench has no such network"):
        evaluation.main(["robustbench:Even2020", *flags])

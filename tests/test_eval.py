"""eval.py: what it counts, what it loads, what it writes, and how it ends."""
import enum
import json
import logging
import shutil
import sys
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import eval as evaluation
import train_trades
from common import Attack, UserError


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
                "--beta 1 --eps 0.04 --step-size 0.03 --steps 1 --eval-size 40 --test-size 40")
    train_trades.main([*settings.split(), "--data-dir", str(folder), "--out", str(folder / "run")])
    return folder


@pytest.fixture(scope="module")
def trained(folder):
    """(model, x [N, 3, 8, 8] uint8, y [N]) of the run's last epoch."""
    data = common.load_data("toy", folder, torch.device("cpu"))
    model = common.build_model("wrn", 10, 1, 10)
    common.load_weights(model, common.read_checkpoint(folder / "run" / "last.pt")["model"], "last.pt")
    return model.eval(), data.x_test, data.y_test


def run(folder, *flags, paths=("run",), json_file="out.json"):
    """The --json rows of eval.py on paths inside `folder`."""
    out = folder / json_file
    evaluation.main([*(str(folder / path) for path in paths), "--device", "cpu", "--data-dir", str(folder),
                     "--lipschitz-size", "20", "--json", str(out), *map(str, flags)])
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def row(folder):
    return run(folder, "--eval-size", 20, "--steps", 1)[0]


def attacked(model, x, y, batch_size=128, **changes):
    return evaluation.evaluate(model, x, y, Attack(**changes), batch_size, seed=0)


@pytest.fixture
def outcomes(monkeypatch):
    """What eval.py learns of every image, a dict for each model and attack, once it has run."""
    found, evaluate = [], evaluation.evaluate

    def noted(*arguments):
        metrics, points = evaluate(*arguments)
        found.append(points)
        return metrics, points

    monkeypatch.setattr(evaluation, "evaluate", noted)
    return found


def test_counting_identities_hold_point_by_point(folder, trained, outcomes):
    rows = run(folder, "--attack", "pgd", "cw", "fgsm", "--restarts", 2, "--steps", 5, "--eval-size", 150)
    labels = trained[2][common.load_data("toy", folder, "cpu").test_subset(150)]
    assert rows[0]["attack"] == asdict(Attack(eps=0.04, steps=5, restarts=2))
    assert rows[2]["attack"] == asdict(Attack(eps=0.04, steps=1, step_size=0.04, start="none"))  # one restart
    for points, row in zip(outcomes, rows):
        y, natural, adversarial, label_free = (value.numpy() for value in points.values())
        assert (y == labels.numpy()).all() and len(y) == row["n"] == 150
        correct, stable = natural == y, adversarial == natural
        metrics = correct, correct & stable, stable, label_free == natural
        for key, counted in zip(evaluation.METRICS, metrics):
            assert row[key] == pytest.approx(counted.mean())
            assert row[f"{key}_ci"] == evaluation.wilson(row[key], 150)
        assert (correct & stable == correct & (adversarial == y)).all()
        assert (label_free[correct] == adversarial[correct]).all()
    assert rows[0]["local_lipschitzness"] > 0 and rows[0]["lipschitz_n"] == 20
    assert 0 < rows[0]["robust_accuracy"] < rows[0]["natural_accuracy"]  # else this test would show little


def test_label_free_stability_is_that_of_attacks_away_from_the_prediction(trained):
    model, x, y = trained
    metrics, points = attacked(model, x[:60], (y[:60] + 1) % 10, start="none")  # nearly all wrong
    stable = []
    for i in range(60):  # point by point, by an attack of the test's own
        image = x[i:i + 1].float() / 255
        prediction, x_adv = model(image).argmax(1), image
        for _ in range(20):
            x_adv = x_adv.detach().requires_grad_()
            gradient, = torch.autograd.grad(F.cross_entropy(model(x_adv), prediction), x_adv)
            x_adv = (image + (x_adv + 0.003 * gradient.sign() - image).clamp(-0.031, 0.031)).clamp(0, 1)
        stable.append((model(x_adv).argmax(1) == prediction).item())
    counted = (points["label_free"] == points["natural"]).numpy()
    assert (counted != stable).sum() <= 1 and 0 < sum(stable) < 60  # a batch rounds otherwise than an image
    assert metrics["label_free_stability"] == pytest.approx(counted.mean())
    assert metrics["label_free_stability"] < metrics["perturbation_stability"]


def test_it_is_the_evaluation_that_training_reports(folder):
    row, = run(folder, "--checkpoint", "last", "--eval-size", 40, "--lipschitz-size", 40, "--batch-size", 20)
    reported = common.read_json(folder / "run" / "metrics.json")["last"]
    assert reported.pop("best_chosen_on") == "test"
    assert {key: row[key] for key in reported} == reported


def test_more_steps_and_restarts_never_help_the_model(trained):
    model, x, y = trained
    by_steps = [attacked(model, x, y, steps=steps)[0]["robust_accuracy"] for steps in (0, 2, 8, 20)]
    assert by_steps == sorted(by_steps, reverse=True) and by_steps[0] > by_steps[-1]
    once, thrice = (attacked(model, x, y, restarts=restarts, steps=3)[1] for restarts in (1, 3))
    for key in ("adversarial", "label_free"):
        before, after = (points[key] == points["natural"] for points in (once, thrice))
        assert not (after & ~before).any() and after.sum() < before.sum()


def test_radius_is_that_of_training_unless_told_otherwise(folder, capsys):
    flags = "--eval-size", 20, "--steps", 1, "--lipschitz-size", 0
    torch.save(common.read_checkpoint(folder / "run" / "last.pt")["model"], folder / "foreign.pt")
    own, foreign = run(folder, *flags, "--dataset", "toy", paths=("run", "foreign.pt"))
    assert own["attack"]["eps"] == 0.04 and foreign["attack"]["eps"] == 0.031
    assert "local_lipschitzness" not in own
    same, = run(folder, *flags, "--eps", "0.04")
    assert same["attack"] == own["attack"] and capsys.readouterr().err == ""
    other, = run(folder, *flags, "--eps", "10/255")
    warning, = capsys.readouterr().err.splitlines()
    assert other["attack"]["eps"] == 10 / 255 and "ε = 0.04 of its own," in warning and "0.039215" in warning
    l2, = run(folder, *flags, "--norm", "l2")
    assert l2["attack"] == asdict(Attack(norm="l2", eps=0.5, step_size=0.05, steps=1))
    assert capsys.readouterr().err == ""


def test_intervals_are_wilsons():
    assert evaluation.wilson(0.5, 100) == pytest.approx([0.40383, 0.59617], abs=1e-5)
    assert evaluation.wilson(1.0, 10) == pytest.approx([0.72247, 1], abs=1e-5)


def test_autoattack_agrees_with_calling_its_package(folder, trained, monkeypatch):
    package = pytest.importorskip(evaluation.AUTOATTACK)

    def quick(*arguments, **settings):  # the same four attacks, each short
        attack = package.autoattack.AutoAttack(*arguments, **settings)
        attack.apgd.n_iter = attack.apgd_targeted.n_iter = attack.fab.n_iter = 5
        attack.square.n_queries = 30
        return attack

    monkeypatch.setattr(package, "AutoAttack", quick)
    logging.getLogger("auto-attack").setLevel(logging.ERROR)
    model, x, y = trained
    x, y = x[:60], y[:60]
    row, = run(folder, "--attack", "autoattack", "--eval-size", 20)
    assert row["attack"] == asdict(Attack("autoattack", eps=0.04, step_size=0, steps=0, start="none"))
    metrics, points = attacked(model, x, y, batch_size=20, loss="autoattack")
    direct = quick(model, norm="Linf", eps=0.031, seed=0, device="cpu")
    _, found = direct.run_standard_evaluation((x.float() / 255).contiguous(), y, batch_size=20)
    assert ((points["adversarial"] == y) == (found == y))[points["natural"] == y].all()
    assert metrics["robust_accuracy"] == pytest.approx((found == y).float().mean().item())
    assert metrics["perturbation_stability"] == metrics["label_free_stability"] >= metrics["robust_accuracy"]
    assert metrics["robust_accuracy"] <= attacked(model, x, y)[0]["robust_accuracy"]


def trades(state):
    unused = {f"sub_{key}": value for key, value in state.items() if key.startswith("block1")}
    return {f"module.{key}": value for key, value in {**state, **unused}.items()}


LAYOUTS = {"plain": lambda state: state, "trades": trades,
           "rst": lambda state: {"num_classes": 10, "state_dict": trades(state), "normalize_input": False},
           "awp": lambda state: {"state_dict": state, "test_robust_acc": 0.5, "test_acc": 0.8},
           "net": lambda state: {"net": trades(state), "epoch": 76},
           "model": lambda state: {"model": state, "args": None},
           "model_state_dict": lambda state: {"model_state_dict": state}}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("arch, depth, width", [("wrn", 16, 2), ("densenet", 10, 6)])
def test_published_layouts_give_the_right_logits(folder, layout, arch, depth, width):
    model = fresh(arch, depth, width)
    torch.save(LAYOUTS[layout](model.state_dict()), folder / "published.pt")
    loaded, facts = load(folder, "published.pt")
    images = torch.rand(4, 3, 8, 8)
    torch.testing.assert_close(loaded(images), model(images), atol=1e-5, rtol=1e-5)
    assert (facts["arch"], facts["depth"], facts["width"]) == (arch, depth, width)


def test_normalization_as_rst_saves_it(folder):
    model, images = fresh("wrn", 10, 1), torch.rand(4, 3, 8, 8)
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.4])
    expected = model((images - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    state = {"module.0.mean": mean.view(1, 3, 1, 1), "module.0.std": std.view(1, 3, 1, 1)}
    state.update((f"module.1.{key}", value) for key, value in model.state_dict().items())
    torch.save({"num_classes": 10, "normalize_input": True, "state_dict": state}, folder / "normalized.pt")
    torch.testing.assert_close(load(folder, "normalized.pt")[0](images), expected, atol=1e-5, rtol=1e-5)


def fresh(arch, depth, width):
    """A network whose BatchNorm statistics are no defaults, in eval mode."""
    torch.manual_seed(0)
    model = common.build_model(arch, depth, width, 10)
    model(torch.rand(8, 3, 8, 8))
    return model.eval()


def load(folder, file, *flags):
    args = evaluation.arguments([file, "--dataset", "toy", "--data-dir", str(folder), *flags])
    model, _, _, facts = evaluation.load(folder / file, args, torch.device("cpu"))
    return model.eval(), facts


def test_the_network_is_the_one_that_the_settings_name(folder, monkeypatch):
    monkeypatch.setitem(common.NETWORKS, "forked", common.DenseNet)
    monkeypatch.delattr(evaluation, "guess_network")  # a new network may have any parameters
    settings = {"method": "own", "arch": "forked", "depth": 10, "width": 6, "beta": "auto"}
    torch.save({"model": fresh("forked", 10, 6).state_dict(), "args": settings}, folder / "forked.pt")
    assert settings.items() <= load(folder, "forked.pt")[1].items()
    monkeypatch.delitem(common.NETWORKS, "forked")
    with pytest.raises(common.UserError, match="forked.pt holds a network 'forked', unknown to NETWORKS"):
        load(folder, "forked.pt")


def test_a_checkpoint_of_the_code_before_evaluates(folder):
    state = common.read_checkpoint(folder / "run" / "last.pt")
    added = "code", "no_flip", "accept_changed_code"
    state["args"] = {key: value for key, value in state["args"].items() if key not in added}
    torch.save(state, folder / "before.pt")
    before, now = run(folder, "--eval-size", 20, "--steps", 1, paths=("before.pt", "run/last.pt"))
    assert {key for key in now if before[key] != now[key]} - {"seconds"} == {"path", "checkpoint"}


def test_a_run_folder_means_the_checkpoint_asked_for_and_a_file_itself(folder):
    flags = "--eval-size", 20, "--steps", 0
    (folder / "no-best").mkdir(exist_ok=True)
    state = common.read_checkpoint(folder / "run" / "last.pt")
    torch.save({**state, "epoch": 9}, folder / "no-best" / "last.pt")
    rows = run(folder, *flags, paths=("run", "run/best.pt", "no-best"))
    assert [row["chosen"] for row in rows] == ["best", None, "last"] and rows[2]["epoch"] == 9
    assert rows[0]["checkpoint"] == rows[1]["checkpoint"] and rows[0]["dataset"] == "toy"
    last, = run(folder, *flags, "--checkpoint", "last")
    assert (last["epoch"], last["chosen"]) == (3, "last") and last["checkpoint"].endswith("run/last.pt")


def test_interrupted_it_has_written_what_was_finished(folder, monkeypatch):
    evaluate, calls = evaluation.evaluate, []

    def interrupted(*arguments):
        if calls:
            raise KeyboardInterrupt
        calls.append(arguments)
        return evaluate(*arguments)

    monkeypatch.setattr(evaluation, "evaluate", interrupted)
    markdown = folder / "made" / "kept.md"
    with pytest.raises(KeyboardInterrupt, match="after 1 rows, kept in .*kept.json"):
        run(folder, "--attack", "pgd", "cw", "--eval-size", 20, "--steps", 1, "--markdown", markdown,
            json_file="kept.json")
    row, = json.loads((folder / "kept.json").read_text())
    (header, _, line), (low, high) = markdown.read_text().splitlines(), row["robust_accuracy_ci"]
    assert "| best.pt | PGD-1, ε = 0.04 | 20 |" in line and header.count("|") == line.count("|")
    assert f"| {100 * row['robust_accuracy']:.2f} ±{50 * (high - low):.2f} |" in line


def test_a_folder_without_a_checkpoint_is_left_out_with_a_warning(folder, tmp_path, capsys):
    (tmp_path / "fast").mkdir()
    (tmp_path / "fast" / "args.json").write_text('{"crops": [128, 224, 288]}')
    row, = run(folder, "--eval-size", 20, "--steps", 1, paths=(tmp_path, tmp_path / "fast", "run"))
    assert row["path"] == str(folder / "run")
    warnings = capsys.readouterr().err
    assert f"warning: {tmp_path} is a folder without best.pt or last.pt: left out" in warnings
    assert f"warning: {tmp_path / 'fast'} is of Fast AT on ImageNet" in warnings


def test_earlier_results_join_the_table(folder, row, capsys):
    (folder / "first.json").write_text(json.dumps([row]))
    rows = run(folder, "--eval-size", 20, "--steps", 1, "--attack", "cw", paths=("first.json", "run"))
    assert rows[0] == row and [row["attack"]["loss"] for row in rows] == ["cross-entropy", "margin"]
    first, header, line, blank, second, *rest = capsys.readouterr().out.splitlines()[-7:]
    assert [first, second] == [f"file best.pt; attack {name}-1, ε = 0.04; n 20" for name in ("PGD", "CW")]
    assert blank == "" and rest[0] == header and len(line) == len(header) == len(rest[1])


def test_the_table_fits_a_terminal(row):
    attacks = [Attack(restarts=10), Attack("margin", "l2", 0.5), Attack("autoattack", eps=8 / 255), Attack()]
    paths = [f"runs/trades-cifar10-wrn34-10-beta{beta}-batchsize256-seed1" for beta in (6, 12)]
    rows = [{**row, "path": path, "n": n, "chosen": chosen, "attack": asdict(attack), "natural_accuracy": 1.0}
            for path in paths for n, chosen in ((10_000, "best"), (1000, None)) for attack in attacks]
    for merged in (False, True):
        lines = evaluation.table(rows, merged)
        text, markdown = evaluation.text_table(lines), evaluation.markdown_table(lines)
        assert max(map(len, text.splitlines())) <= 110 and len(text.splitlines()) == 8 * 5 - 1
        assert all(attack.title() in text and attack.title() in markdown for attack in attacks)
        assert "…" not in markdown and "…" in text and text.count("-beta12-batchsize256") == 8


def test_figures(folder, row, tmp_path):
    pytest.importorskip("matplotlib")
    rows = [row, {**row, "width": 4, "path": "a/very/long/path/to/a/checkpoint/of/somebody/else.pt"},
            {**row, "width": 4, "beta": "auto", "path": "auto"}, {**row, "beta": None, "path": "none"}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    logs = {"fast": [{"epoch": 1, "adversarial_risk": 2}, {"epoch": 2, "adversarial_risk": 1.5}],
            "fork": [{"epoch": 1, "a_risk": 2, "beta": 1, "lr": 1}, {"epoch": 2, "a_risk": None, "beta": 2}]}
    for name, settings in ("fast", {"eps": 2 / 255, "width": 1.0, "beta": 1.0}), ("fork", {}):
        (tmp_path / name).mkdir()
        (tmp_path / name / "args.json").write_text(json.dumps({"method": name, **settings}))
        (tmp_path / name / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in logs[name]))
    drawn = [evaluation.recorded([{"log": log}]) for log in logs.values()]
    assert drawn == [["adversarial_risk"], ["a_risk", "beta"]]
    paths = tmp_path / "rows.json", folder / "run", tmp_path / "fast", tmp_path / "fork"
    evaluation.main([*map(str, paths), "--attack", "none", "--plot", str(tmp_path / "figures")])
    figures = {path.name: path.read_bytes() for path in (tmp_path / "figures").iterdir()}
    assert figures.keys() == {"schedules.png", "metrics-pgd-1-eps0.04.png", "training-fork.png",
                              "width-pgd-1-eps0.04-trades-toy-wrn-10-best.png",
                              "training-fast-eps0.007843.png", "training-trades-toy-wrn-10-eps0.04.png"}
    for png in figures.values():
        assert png[:8] == b"\x89PNG\r\n\x1a\n" and int.from_bytes(png[16:20], "big") == 495  # 3.3 inches


def test_schedules_figure_draws_every_schedule(monkeypatch):
    figure = pytest.importorskip("matplotlib.figure").Figure()
    monkeypatch.setitem(common.SCHEDULES, "new", lambda done, epochs: 1 - done)
    evaluation.schedules_figure(figure)
    lines = {line.get_label(): line.get_ydata() for line in figure.axes[0].lines}
    assert lines.keys() == {"exp-decay", "step", "cosine", "one-cycle", "new"}
    np.testing.assert_allclose(lines["new"], 0.1 * (1 - np.arange(100) / 100))


def test_runs_that_differ_in_their_seed_merge_into_one_line(row, tmp_path, capsys):
    runs = [("beta6-seed1", 0.5, 10), ("beta6-seed12", 0.6, 14), ("beta60-seed1", 0.9, 7)]
    rows = [{**row, "path": f"runs/a-{name}", "natural_accuracy": natural, "local_lipschitzness": lipschitz}
            for name, natural, lipschitz in (*runs, runs[0])]  # one given twice: one run all the same
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    evaluation.main([str(tmp_path / "rows.json"), "--attack", "none", "--merge-seeds"])
    _, titles, *lines = (line.split() for line in capsys.readouterr().out.splitlines())
    low, high = row["natural_accuracy_ci"]
    assert titles[:3] == ["model", "runs", "natural"] and len(lines) == 2
    assert lines[0][:4] == ["runs/a-beta6", "2", "55.00", "±5.00"] and lines[0][-2:] == ["12.00", "±2.00"]
    assert lines[1][:4] == ["runs/a-beta60", "1", "90.00", f"±{50 * (high - low):.2f}"]


@pytest.mark.parametrize("flags, message", [
    (["missing.pt"], "missing.pt: no such file"),
    (["empty"], "no checkpoint to evaluate in any of these"),
    (["corrupt.pt"], "corrupt.pt cannot be read as a checkpoint"),
    (["tensor.pt"], "holds no WideResNet or DenseNet-BC"),
    (["fast.pt"], "fast.pt is of Fast AT on ImageNet"),
    (["run", "--dataset", "few"], "holds another network"),
    (["run", "--dataset", "nothing"], "no data set 'nothing'"),
    (["rows.json"], "rows.json is not a list of results"),
    (["old.json"], "old.json is not a list of results"),
    (["run", "--json", "empty"], "empty is a folder"),
    (["run", "--attack", "deepfool"], "invalid choice: 'deepfool'"),
    (["run", "--device", "cuda:99"], "no such device"),
    ([], "give a PATH"),
])
def test_mistakes_are_user_errors_of_one_line(folder, row, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").symlink_to(folder / "run")
    (tmp_path / "empty").mkdir()
    (tmp_path / "corrupt.pt").write_bytes((folder / "run" / "best.pt").read_bytes()[:5000])
    (tmp_path / "rows.json").write_text('[{"path": "run"}]')
    (tmp_path / "old.json").write_text(json.dumps([{**row, "attack": "pgd"}]))
    np.savez(folder / "few.npz", **{**np.load(folder / "toy.npz"), "y_train": np.arange(1000) % 5,
                                    "y_test": np.arange(200) % 5})
    torch.save(torch.zeros(3), "tensor.pt")
    torch.save({"model": {}, "args": {"method": "fast_imagenet", "width": 1.0, "crops": [1]}}, "fast.pt")
    with pytest.raises(common.UserError) as error:
        evaluation.main([*flags])
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("package, flags", [(evaluation.AUTOATTACK, ["--attack", "autoattack"]),
                                            ("matplotlib", ["--plot", "figures"])])
def test_a_missing_optional_package_is_named(folder, monkeypatch, package, flags):
    monkeypatch.setitem(sys.modules, package, None)  # importing it fails
    with pytest.raises(common.UserError, match=f"pip install {package}"):
        evaluation.main([str(folder / "run"), *flags])


@pytest.fixture
def zoo(folder, monkeypatch):
    """RobustBench's package, as far as eval.py knows it, with two networks that are none of ours."""
    def network(bias):
        torch.manual_seed(0)
        layers = torch.nn.Conv2d(3, 8, 3, 2), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(72, 10)
        layers[3].bias.data[bias] += 0.1
        return torch.nn.Sequential(*layers).eval()

    def load_model(name, dataset, threat_model):
        print("Download started")  # nobody asked
        return {("Odd2020", "cifar10", "Linf"): network(1), ("Odd2020", "cifar10", "L2"): network(2)}[
            name, dataset, threat_model]

    def named(*values):
        return enum.Enum("Name", {value: value for value in values})

    threats = {threat: {"Odd2020": {}} for threat in named("Linf", "L2", "corruptions")}
    everything = {dataset: threats for dataset in named("imagenet", "cifar10")}
    modules = {"pyautoattack": SimpleNamespace(), "robustbench": SimpleNamespace(),
               "robustbench.model_zoo": SimpleNamespace(model_dicts=everything),
               "robustbench.utils": SimpleNamespace(load_model=load_model)}
    for name, module in {**modules, "autoattack": None}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "autoattack")
    shutil.copy(folder / "toy.npz", folder / "cifar10.npz")
    return network


@pytest.mark.parametrize("flags, bias, norm, eps", [
    ([], 1, "linf", 8 / 255), (["--norm", "l2"], 2, "l2", 0.5)])
def test_robustbench_networks_are_attacked_as_they_are(folder, zoo, outcomes, capsys, flags, bias, norm, eps):
    evaluation.main(["robustbench:Odd2020", *flags, "--data-dir", str(folder), "--device", "cpu", "--steps",
                     "2", "--json", str(folder / "zoo.json")])
    row, = common.read_json(folder / "zoo.json")
    assert row["attack"]["norm"] == norm and row["attack"]["eps"] == eps
    x = common.to_float(common.load_data("toy", folder, "cpu").x_test)
    assert outcomes[0]["natural"].equal(zoo(bias)(x).argmax(1))
    assert "Download" not in capsys.readouterr().out
    for wrong in ("robustbench:Even2020", "robustbench:Odd2020 --dataset cifar100"):
        with pytest.raises(UserError, match="RobustBench has no such network"):
            evaluation.main([*wrong.split(), "--data-dir", str(folder)])


def test_without_robustbench_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "robustbench.model_zoo", None)
    monkeypatch.setitem(sys.modules, "pyautoattack", SimpleNamespace())
    with pytest.raises(UserError, match='pip install robustbench pyautoattack "setuptools<80"'):
        evaluation.main(["robustbench:Carmon2019Unlabeled"])


def test_figures_keep_experiments_apart():
    plain = {"method": "trades", "dataset": "cifar10", "arch": "wrn", "depth": 34, "epochs": 100}
    averaged = {**plain, "ema": 0.995, "activation": "silu"}
    older = {**plain, "beta": 12.0, "width": 5}  # of another λ and width, and of code without those options
    groups = evaluation.group([plain, averaged, {**older, "ema": None, "activation": "relu"}, older])
    assert [len(rows) for rows in groups.values()] == [3, 1]
    assert list(groups) == ["trades-cifar10-wrn-34", "trades-cifar10-wrn-34-2"]

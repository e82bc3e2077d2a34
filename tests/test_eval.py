"""eval.py: what it counts, what it loads, what it writes, and how it ends."""
import csv
import json
import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import eval as evaluation
import train_trades

ATTACK = {"eps": 0.031, "step_size": 0.003, "steps": 20}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Toy data, 8×8 images of noise in ten faint colours, and on it a trained run folder `run`."""
    folder, rng = tmp_path_factory.mktemp("eval"), np.random.default_rng(0)
    colours, arrays = rng.uniform(-1, 1, (10, 1, 1, 3)), {}
    for split, n in (("train", 1500), ("test", 200)):
        y = arrays[f"y_{split}"] = rng.integers(0, 10, n)
        x = 0.5 + 0.1 * colours[y] + rng.normal(0, 0.1, (n, 8, 8, 3))
        arrays[f"x_{split}"] = np.uint8(np.clip(x, 0, 1) * 255 + 0.5)
    np.savez(folder / "toy.npz", **arrays)
    train_trades.main(["--dataset", "toy", "--data-dir", str(folder), "--out", str(folder / "run"), "--device", "cpu",
                       "--precision", "fp32", "--depth", "10", "--width", "1", "--epochs", "4", "--steps", "2",
                       "--beta", "1", "--batch-size", "50", "--eval-size", "100"])
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


def attack(model, x, y, name="pgd", **changes):
    args = evaluation.arguments(["none", *(f"--{key.replace('_', '-')}={value}" for key, value in changes.items())])
    return evaluation.evaluate(model, x, y, name, args)


# --------------------------------------------------------------------------------------------------------- counting


def test_counting_identities_hold_point_by_point(folder):
    rows = run(folder, "--attack", "pgd", "cw", "fgsm", "--restarts", 2, "--seeds", 2, "--steps", 5, "--eval-size", 150,
               "--save-points", folder / "points.npz")
    points = np.load(folder / "points.npz")
    assert list(points["attack"]) == [row["attack"] for row in rows] == ["pgd", "cw", "fgsm"]
    labels = np.load(folder / "toy.npz")["y_test"]
    for i, row in enumerate(rows):
        y, natural = points[f"label_{i}"], points[f"natural_{i}"]
        adversarial, label_free = points[f"adversarial_{i}"], points[f"label_free_{i}"]
        assert (y == labels[points[f"index_{i}"]]).all() and len(set(points[f"index_{i}"])) == row["n"] == 150
        correct, stable = natural == y, adversarial == natural  # [n], [seeds, n]
        assert row["natural_accuracy"] == pytest.approx(correct.mean())
        assert row["perturbation_stability"] == pytest.approx(stable.mean())
        robust = correct & stable
        assert (robust == correct & (adversarial == y)).all() and row["robust_accuracy"] == pytest.approx(robust.mean())
        assert row["label_free_stability"] == pytest.approx((label_free == natural).mean())
        assert (label_free[:, correct] == adversarial[:, correct]).all()
        assert row["robust_accuracy"] <= min(row[key] for key in evaluation.METRICS)
        assert row["robust_accuracy"] == pytest.approx(np.mean(row["robust_accuracy_seeds"]))
    assert rows[0]["local_lipschitzness"] > 0
    assert 0 < rows[0]["robust_accuracy"] < rows[0]["natural_accuracy"]  # otherwise this test would show little


def test_wrong_points_fall_to_the_label_free_attack(trained):
    model, x, y = trained
    metrics, points = attack(model, x, (y + 1) % 10)  # nearly every point is misclassified now
    assert metrics["natural_accuracy"] < 0.3
    assert metrics["label_free_stability"] < metrics["perturbation_stability"]
    metrics_true, _ = attack(model, x, points["natural"])
    assert metrics["label_free_stability"] == pytest.approx(metrics_true["perturbation_stability"], abs=0.03)


def test_one_restart_is_the_last_iterate_that_training_reports(trained):
    model, x, y = trained
    metrics, _ = attack(model, x, y)
    assert common.evaluate(model, x, y, **ATTACK).items() <= metrics.items()


def test_an_independent_attack_is_not_stronger(trained):
    model, x, y = trained
    ours, _ = attack(model, x, y)
    images, theirs = x.float() / 255, []
    for seed in range(2):
        noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
        x_adv = images + 0.031 * noise
        for _ in range(20):
            x_adv = x_adv.detach().requires_grad_()
            F.cross_entropy(model(x_adv), y).backward()
            x_adv = images + (x_adv + 0.003 * x_adv.grad.sign() - images).clamp(-0.031, 0.031)
            x_adv = x_adv.clamp(0, 1)
        theirs.append((model(x_adv).argmax(1) == y).float().mean().item())
    assert ours["robust_accuracy"] <= min(theirs) + 2 / len(y)


def test_more_steps_and_restarts_never_help_the_model(trained):
    model, x, y = trained
    by_steps = [attack(model, x, y, steps=steps)[0]["robust_accuracy"] for steps in (0, 2, 8, 20, 40)]
    assert by_steps == sorted(by_steps, reverse=True) and by_steps[0] > by_steps[-1]
    once, thrice = (attack(model, x, y, restarts=restarts, steps=3)[1] for restarts in (1, 3))
    survivors = [points["adversarial"] == points["natural"] for points in (once, thrice)]
    assert not (survivors[1] & ~survivors[0]).any()
    for attacked in (once, thrice):  # a point that no restart moved keeps its prediction, a moved one shows where to
        assert attacked["adversarial"].shape == (1, len(y))


def test_a_restart_attacks_only_what_is_stable_in_full_batches(trained, monkeypatch):
    model, x, y = trained
    sizes, pgd = [], common.pgd

    def watched(model, images, *rest, **how):
        sizes.append(len(images))
        return pgd(model, images, *rest, **how)

    monkeypatch.setattr(common, "pgd", watched)
    natural = evaluation.predictions(model, x, 64)
    args = evaluation.arguments(["none", "--eps", "0.1", "--restarts", "2", "--steps", "4"])
    settings = evaluation.settings_of("pgd", args)
    first = evaluation.attacked_predictions(model, x, y, natural, "pgd", {**settings, "restarts": 1}, 64, seed=0)
    stable = (first == natural).sum().item()
    sizes.clear()
    evaluation.attacked_predictions(model, x, y, natural, "pgd", settings, 64, seed=0)
    second = sizes[4:]
    assert 0 < stable < len(y) and sizes[:4] == [64] * 4
    assert len(second) == -(-stable // 64) and set(second) <= {64, stable}


def test_l2_and_norm_dependent_defaults(folder):
    row, = run(folder, "--norm", "l2", "--steps", 2, "--eval-size", 50)
    assert (row["norm"], row["eps"], row["step_size"]) == ("l2", 0.5, 0.05)


def test_intervals_are_wilsons():
    assert evaluation.wilson(0.5, 100) == pytest.approx([0.40383, 0.59617], abs=1e-5)
    assert evaluation.wilson(0.0, 10) == pytest.approx([0, 0.27753], abs=1e-5)
    assert evaluation.wilson(1.0, 10) == pytest.approx([0.72247, 1], abs=1e-5)


def test_autoattack_agrees_with_calling_its_package(trained, monkeypatch):
    package = pytest.importorskip(evaluation.AUTOATTACK)
    model, x, y = trained
    x, y = x[:60], y[:60]

    def quick(*arguments, **settings):  # the same four attacks, each short
        attack = package.autoattack.AutoAttack(*arguments, **settings)
        attack.apgd.n_iter = attack.apgd_targeted.n_iter = attack.fab.n_iter = 5
        attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = 3
        attack.square.n_queries = 30
        return attack

    monkeypatch.setattr(package, "AutoAttack", quick)
    logging.getLogger("auto-attack").setLevel(logging.ERROR)
    metrics, points = attack(model, x, y, "autoattack", batch_size=20)
    direct = quick(model, norm="Linf", eps=0.031, seed=0, device="cpu")
    direct.apgd_targeted.n_target_classes = direct.fab.n_target_classes = 9
    _, found = direct.run_standard_evaluation((x.float() / 255).contiguous(), y, batch_size=20)
    assert ((points["adversarial"][0] == y) == (found == y))[points["natural"] == y].all()
    assert metrics["robust_accuracy"] == pytest.approx((found == y).float().mean().item())
    assert metrics["perturbation_stability"] == metrics["label_free_stability"] >= metrics["robust_accuracy"]
    assert metrics["robust_accuracy"] <= attack(model, x, y)[0]["robust_accuracy"]


# ---------------------------------------------------------------------------------------------------------- loading


def plain(state):
    return state


def trades(state):
    unused = {f"sub_{key}": torch.zeros_like(value) for key, value in state.items() if key.startswith("block1")}
    return {f"module.{key}": value for key, value in {**state, **unused}.items()}


def rst(state):
    return {"num_classes": 10, "state_dict": trades(state), "normalize_input": False}


def awp_best(state):
    return {"state_dict": state, "test_robust_acc": 0.5, "test_acc": 0.8}


def wrapped_as(name):
    return lambda state: {name: trades(state), "epoch": 76}


LAYOUTS = {"plain": plain, "trades": trades, "rst": rst, "awp": awp_best,
           **{name: wrapped_as(name) for name in ("net", "model", "model_state_dict")}}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("arch, depth, width", [("wrn", 16, 2), ("densenet", 10, 6)])
def test_published_layouts_give_the_right_logits(folder, layout, arch, depth, width):
    model = fresh(arch, depth, width)
    torch.save(LAYOUTS[layout](model.state_dict()), folder / "published.pt")
    loaded, facts = load(folder, "published.pt")
    images = torch.rand(4, 3, 8, 8)
    torch.testing.assert_close(loaded(images), model(images), atol=1e-5, rtol=1e-5)
    assert (facts["arch"], facts["depth"], facts["width"], facts["classes"]) == (arch, depth, width, 10)


def test_normalization_by_flag_and_as_rst_saves_it(folder):
    model, images = fresh("wrn", 10, 1), torch.rand(4, 3, 8, 8)
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.4])
    expected = model((images - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    torch.save(model.state_dict(), folder / "plain.pt")
    by_flag, _ = load(folder, "plain.pt", "--mean", "0.4", "0.5", "0.6", "--std", "0.2", "0.3", "0.4")
    state = {"0.mean": mean.view(1, 3, 1, 1), "0.std": std.view(1, 3, 1, 1)}
    state.update((f"1.{key}", value) for key, value in model.state_dict().items())
    state = {f"module.{key}": value for key, value in state.items()}
    torch.save({"num_classes": 10, "normalize_input": True, "state_dict": state}, folder / "normalized.pt")
    for loaded in (by_flag, load(folder, "normalized.pt")[0]):
        torch.testing.assert_close(loaded(images), expected, atol=1e-5, rtol=1e-5)


def fresh(arch, depth, width):
    """A network whose BatchNorm statistics are no defaults, in eval mode."""
    torch.manual_seed(0)
    model = common.build_model(arch, depth, width, 10)
    model(torch.rand(8, 3, 8, 8))
    return model.eval()


def load(folder, file, *flags):
    args = evaluation.arguments([file, "--dataset", "toy", "--data-dir", str(folder), *flags])
    model, _, facts = evaluation.load(folder / file, args, torch.device("cpu"))
    return model.eval(), facts


def test_a_run_folder_means_its_best_checkpoint_and_a_file_itself(folder):
    flags = "--eval-size", 20, "--steps", 0
    by_folder, best, last = run(folder, *flags, paths=("run", "run/best.pt", "run/last.pt"))
    assert by_folder["checkpoint"] == best["checkpoint"] and by_folder["natural_accuracy"] == best["natural_accuracy"]
    assert last["epoch"] == 4 and by_folder["dataset"] == "toy" and by_folder["beta"] == 1


# ----------------------------------------------------------------------------------------------------------- output


def test_interrupted_it_has_written_what_was_finished(folder, monkeypatch):
    evaluate, calls = evaluation.evaluate, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(*arguments)

    monkeypatch.setattr(evaluation, "evaluate", interrupted)
    files = {kind: folder / f"kept.{kind}" for kind in ("csv", "markdown", "npz")}
    with pytest.raises(KeyboardInterrupt, match="after 1 evaluations, kept in .*kept.json"):
        run(folder, "--attack", "pgd", "cw", "--eval-size", 20, "--steps", 1, "--csv", files["csv"],
            "--markdown", files["markdown"], "--save-points", files["npz"], json_file="kept.json")
    row, = json.loads((folder / "kept.json").read_text())
    written, = csv.DictReader(files["csv"].open())
    assert float(written["robust_accuracy_ci_low"]) == row["robust_accuracy_ci"][0] <= row["robust_accuracy"]
    header, _, line = files["markdown"].read_text().splitlines()
    assert "PGD-1 robust" in header and header.count("|") == line.count("|")
    assert f"{100 * row['robust_accuracy']:.2f}" in line
    assert list(np.load(files["npz"])["attack"]) == ["pgd"]


def test_earlier_results_join_the_table(folder, capsys):
    flags = "--eval-size", 20, "--steps", 1
    before = run(folder, *flags, json_file="first.json")
    rows = run(folder, *flags, "--attack", "cw", paths=("first.json", "run"), json_file="both.json")
    assert rows[0] == before[0] and [row["attack"] for row in rows] == ["pgd", "cw"]
    header, titles, *lines = capsys.readouterr().out.splitlines()[-3:]
    assert "PGD-1" in header and "CW-1" in header and len(lines) == 1 and len(header) == len(titles) == len(lines[0])


def test_figures(folder):
    pytest.importorskip("matplotlib")
    row, = run(folder, "--eval-size", 20, "--steps", 1)
    wider = {**row, "width": 4, "path": "a/very/long/path/to/a/checkpoint/of/somebody/else.pt"}
    (folder / "rows.json").write_text(json.dumps([row, wider]))
    evaluation.main([str(folder / "rows.json"), str(folder / "run"), "--attack", "none", "--plot", str(folder / "figures")])
    names = {path.name for path in (folder / "figures").iterdir()}
    assert names == {"schedules.png", "metrics-pgd-1.png", "width-pgd-1-trades-toy-wrn-10.png",
                     "training-trades-toy-wrn-10.png"}
    for path in (folder / "figures").iterdir():
        header = path.read_bytes()[:24]
        assert header[:8] == b"\x89PNG\r\n\x1a\n" and int.from_bytes(header[16:20], "big") == 660  # 3.3 inches at 200 dpi


def test_runs_that_differ_in_their_seed_merge_into_one_line(folder, capsys):
    row, = run(folder, "--eval-size", 20, "--steps", 1)

    def named(path, natural, lipschitz):
        return {**row, "path": path, "natural_accuracy": natural, "local_lipschitzness": lipschitz}
    rows = [named("runs/a-beta6-seed1", 0.5, 10), named("runs/a-beta6-seed12", 0.6, 14), named("runs/a-beta60-seed1", 0.9, 7)]
    rows += [named("runs/a-beta6-seed1", 0.5, 10)]  # given twice: one run all the same
    (folder / "rows.json").write_text(json.dumps(rows))
    capsys.readouterr()
    evaluation.main([str(folder / "rows.json"), "--attack", "none", "--merge-seeds"])
    _, titles, *lines = (line.split() for line in capsys.readouterr().out.splitlines())
    low, high = row["natural_accuracy_ci"]
    assert titles[:3] == ["model", "runs", "n"] and titles[-1] == "Lipschitzness" and len(lines) == 2
    assert lines[0][:5] == ["runs/a-beta6", "2", "20", "55.00", "±5.00"] and lines[0][-2:] == ["12.00", "±2.00"]
    assert lines[1][:5] == ["runs/a-beta60", "1", "20", "90.00", f"±{50 * (high - low):.2f}"] and lines[1][-1] == "7.00"


# ----------------------------------------------------------------------------------------------------------- errors


class Unsafe:
    def __reduce__(self):
        return print, ("code in a checkpoint was run",)


@pytest.mark.parametrize("flags, message", [
    (["missing.pt"], "missing.pt: no such file"),
    (["empty"], "empty is a folder without best.pt or last.pt"),
    (["corrupt.pt"], "corrupt.pt cannot be read as a checkpoint"),
    (["unsafe.pt"], "unsafe.pt cannot be read as a checkpoint"),
    (["tensor.pt"], "holds no WideResNet or DenseNet-BC"),
    (["other.pt"], "holds no WideResNet or DenseNet-BC"),
    (["run", "--depth", "16"], "holds another network"),
    (["run", "--classes", "100"], "holds another network"),
    (["run", "--classes", "5"], "--classes 5: toy has 10"),
    (["run", "--dataset", "nothing"], "no data set 'nothing'"),
    (["rows.json"], "rows.json is not a list of results"),
    (["run", "--json", "empty"], "empty is a folder"),
    (["run", "--attack", "deepfool"], "invalid choice: 'deepfool'"),
    (["run", "--device", "cuda:99"], "no such device"),
    ([], "give a PATH"),
])
def test_mistakes_are_user_errors_of_one_line(folder, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").symlink_to(folder / "run")
    (tmp_path / "empty").mkdir()
    (tmp_path / "corrupt.pt").write_bytes((folder / "run" / "best.pt").read_bytes()[:5000])
    (tmp_path / "rows.json").write_text('[{"path": "run"}]')
    torch.save({"net": Unsafe()}, "unsafe.pt")
    torch.save(torch.zeros(3), "tensor.pt")
    torch.save({"state_dict": {"layer1.0.conv1.weight": torch.zeros(3)}}, "other.pt")
    with pytest.raises(common.UserError) as error:
        evaluation.main([*flags])
    assert message in str(error.value) and "code in a checkpoint" not in capsys.readouterr().out


@pytest.mark.parametrize("package, flags", [(evaluation.AUTOATTACK, ["--attack", "autoattack"]),
                                            ("matplotlib", ["--plot", "figures"])])
def test_a_missing_optional_package_is_named(folder, monkeypatch, package, flags):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(evaluation.importlib, "import_module", missing)
    with pytest.raises(common.UserError, match=f"pip install {package}"):
        evaluation.main([str(folder / "run"), *flags])

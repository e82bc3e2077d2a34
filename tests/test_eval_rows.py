"""eval.py's rows in their three parts: what is averaged, kept apart, appended, left out, drawn."""
import json
import sys
from types import SimpleNamespace

import pytest
import torch

import common
import eval as evaluation
from common import Attack, UserError
from dataclasses import asdict
from test_eval import LAYOUTS, Harm, folder, prefixed, warnings_anew  # noqa: F401

ARGS = "--device", "cpu", "--dataset", "toy", "--eval-size", "20", "--steps", "1"


def row(seed, accuracy=0.5, run=None, evaluation=None, **changes):
    run = {"method": "trades", "arch": "wrn", "depth": 10, "width": 1, "beta": 6.0, "seed": seed,
           "epoch": seed, "lr": 0.1, "data": "d" * 16, "weights": "best", "common.py": "c", "normalize": None,
           "hash": f"{seed}" * 16, **(run or {})}
    how = {"dataset": "toy", "data": "d" * 16, "attack": asdict(Attack()), "precision": "fp32", "n": 100,
           "lipschitz_n": 100, **(evaluation or {})}
    results = dict.fromkeys(common.METRICS, 0.5) | {"natural_accuracy": accuracy, "local_lipschitzness": 7.0}
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
    assert count(*published) == 3 and count(row(1), row(1)) == 1
    one = row(1, run={"reference": "runs/n-seed1"})
    assert count(one, row(2, run={"reference": "runs/n-seed2"})) == 1
    assert count(one, row(2, run={"reference": "runs/m-seed2"})) == 2


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


@pytest.mark.parametrize("n, factor", [(2, 12.706), (3, 4.303), (4, 3.182), (10, 2.262), (30, 2.045)])
def test_students_factor(n, factor):
    assert common.student(n) == pytest.approx(factor, abs=1e-3)


def test_rows_are_appended_strays_left_out_all_kept_when_interrupted(folder, tmp_path, capsys, monkeypatch):
    out, model = tmp_path / "out.json", common.read_checkpoint(folder / "run" / "last.pt")["model"]
    out.write_text(json.dumps([row(1)]))
    strays = {"page.pt": b"<html>", "cut.pt": (folder / "run" / "best.pt").read_bytes()[:5000],
              "unsafe.pt": {"model": Harm()}, "none.pt": {"state_dict": {}},
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
    with pytest.raises(UserError, match="left out: "):
        evaluation.main([*paths, *ARGS, "--data-dir", str(folder), "--json", str(out)])
    said = [line for line in capsys.readouterr().err.splitlines()
            if str(tmp_path) in line and "too short" not in line and "chance" not in line]
    assert len(said) == len(strays) + 1 and "Fast AT" in said[-1], said
    for again in range(2):  # a row is there once
        assert [one["path"] for one in json.loads(out.read_text())] == ["runs/a-seed1", str(folder / "run")]
        evaluation.main([str(folder / "run"), *ARGS, "--data-dir", str(folder), "--json", str(out)])
    calls = iter([common.predictions])

    def interrupt(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(common, "predictions", lambda *given: next(calls, interrupt)(*given))
    flags = [*ARGS, "--data-dir", str(folder), "--json", str(out)]
    with pytest.raises(KeyboardInterrupt, match="3 rows were finished"):
        evaluation.main([paths[-1], *flags, "--attack", "pgd", "cw", "--restarts", "2"])
    assert len(json.loads(out.read_text())) == 3
    out.write_text("[{}]")
    with pytest.raises(UserError, match="not all of"):
        evaluation.main([paths[-1], *flags])
    assert out.read_text() == "[{}]"


@pytest.mark.parametrize("own, norm, eps", [([], "Linf", 8 / 255), (["--norm", "l2"], "L2", 0.5)])
def test_robustbench_networks_are_attacked_as_they_are(folder, tmp_path, monkeypatch, own, norm, eps):
    layers = torch.nn.Conv2d(3, 8, 3, 2), torch.nn.Flatten(), torch.nn.Linear(72, 10)
    networks = {("Odd2020", "toy", norm): torch.nn.Sequential(*layers).eval()}
    for name in ("pyautoattack", "robustbench", "autoattack"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    monkeypatch.setitem(sys.modules, "robustbench.utils", SimpleNamespace(
        load_model=lambda name, dataset, threat_model: networks[name, dataset, threat_model]))
    flags = [*ARGS, *own, "--precision", "auto", "--data-dir", str(folder), "--json",
             str(tmp_path / "zoo.json")]
    evaluation.main(["robustbench:Odd2020", *flags])
    found, = common.read_json(tmp_path / "zoo.json")
    assert found["evaluation"]["attack"]["eps"] == eps and found["evaluation"]["precision"] == "fp32"
    with pytest.raises(UserError, match="RobustBench cannot load"):
        evaluation.main(["robustbench:Even2020", *flags])


@pytest.mark.parametrize("layout", ["rst", "namespace", "endless"])
def test_statistics_are_asked_about_and_normalize_answers(folder, tmp_path, layout, capsys):
    model = common.NETWORKS["wrn"](10, 1, 10).eval()
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.4])
    state = {**model.state_dict(), "mean": mean, "std": std.view(1, 3, 1, 1)}
    torch.save(LAYOUTS[layout](state), tmp_path / "a.pt")
    flags = [str(tmp_path / "a.pt"), *ARGS, "--data-dir", str(folder), "--json", str(tmp_path / "a.json")]
    with pytest.raises(UserError, match="mean.*--normalize"):
        evaluation.main(flags)
    evaluation.main([*flags, "--normalize", "0.4,0.5,0.6,0.2,0.3,0.4"])
    (x, y), column = common.load_data("toy", folder, torch.device("cpu")).test(20), (1, 3, 1, 1)
    right = model((x / 255 - mean.view(column)) / std.view(column)).argmax(1) == y
    found = common.read_json(tmp_path / "a.json")[-1]
    assert found["results"]["natural_accuracy"] == right.double().mean().item()
    assert "natural accuracy is no better than chance" in capsys.readouterr().err


def test_the_precision_is_found_out_once(folder, tmp_path, monkeypatch):
    measured = []
    monkeypatch.setattr(common, "bf16_is_faster", lambda *_: measured.append(1) or True)
    paths = [str(folder / "run" / name) for name in ("best.pt", "last.pt")]
    evaluation.main([*paths, *ARGS, "--data-dir", str(folder), "--json", str(tmp_path / "a.json"),
                     "--precision", "auto"])
    rows = common.read_json(tmp_path / "a.json")
    assert measured == [1] and [row["evaluation"]["precision"] for row in rows] == ["bf16", "bf16"]


def grid():
    return [row(seed, seed / 10, run={"width": width, "beta": beta})
            for seed in (1, 2, 3) for width in (1, 4) for beta in (6.0, 12.0, "auto")]


def test_figures(folder, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "rows.json").write_text(json.dumps(grid()))
    plots, paths = tmp_path / "p", (tmp_path / "rows.json", folder / "run")
    evaluation.main([*map(str, paths), "--attack", "none", "--plot", str(plots)])
    assert {path.name for path in plots.iterdir()} == {
        "metrics-1.png", "width-1.png", "lambda-1.png", "training-1.png"}


@pytest.mark.parametrize("axis, per, at", [("width", "beta", [1, 4]), ("beta", "width", [6, 12])])
def test_figures_show_the_numbers(monkeypatch, axis, per, at):
    drawn = []
    monkeypatch.setattr(evaluation, "curves", lambda lines, *_, **axis: drawn.extend(lines))
    rows = [one for one in evaluation.average(grid()) if one["run"]["beta"] != "auto"]
    evaluation.sweep(rows, axis, per)
    assert len(drawn) == 4 * 2
    panel, label, x, y, (low, high) = drawn[0]
    assert (panel, label) == ("natural %", {"beta": "λ = 6.0", "width": "width = 1"}[per]) and x == at
    assert y == pytest.approx([20, 20]) and low == pytest.approx([24.84, 24.84], abs=0.01) == high

"""theory_check.py: its gradients, projections, searches and verdicts, on small networks."""
import argparse
import json
import math
import runpy
import sys

import pytest
import theory_check
import torch
import torch.nn.functional as F
from common import UserError
from theory_check import draw_network, exponent, input_gradient, search, step, train

SMALL = ["--widths", "8", "16", "--depths", "1", "2", "--inputs", "12", "--points", "4", "--seeds", "3",
         "--eps", "0.5", "--radius", "0.5"]


def network(regime="lemma", m=16, d=6, depth=3, n=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    layers, a = draw_network(regime, m, d, depth, generator)
    x = F.normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=-1)
    return layers, a, x, generator


def norms(layers, a, x):
    return input_gradient(layers, a, x)[1].norm(dim=-1)


@pytest.mark.parametrize("regime", theory_check.NETWORKS)
@pytest.mark.parametrize("depth", [1, 2, 5])
def test_gradient_is_the_lemmas_product_and_the_slope_of_f(regime, depth):
    layers, a, x, _ = network(regime, d=16 if regime == "d=m" else 6, depth=depth)
    f, gradient = input_gradient(layers, a, x)
    for point, value, found in zip(x, f, gradient):
        h, product = point, torch.eye(len(point)).double()
        for w in layers:  # aᵀ D⁽ᴴ⁾W⁽ᴴ⁾ ··· D⁽¹⁾W⁽¹⁾
            product = torch.diag((w @ h > 0).double()) @ w @ product
            h = (w @ h).clamp_min(0)
        assert torch.allclose(found, a @ product, rtol=1e-12) and torch.allclose(value, a @ h, rtol=1e-12)
        direction = torch.randn(len(point), generator=torch.Generator().manual_seed(1)).double()
        ahead, behind = (theory_check.forward(layers, a, point + t * direction) for t in (1e-7, -1e-7))
        assert (ahead - behind).item() / 2e-7 == pytest.approx((found @ direction).item(), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("regime, first", [("lemma", 2 / 400), ("fan-in", 2 / 50)])
def test_initialization_has_the_variances_of_its_regime(regime, first):
    layers, a, _, _ = network(regime, m=400, d=50, depth=3)
    assert [tuple(w.shape) for w in layers] == [(400, 50), (400, 400), (400, 400)]
    assert {w.dtype for w in (*layers, a)} == {torch.float64}
    for w, variance in zip((*layers, a), (first, 2 / 400, 2 / 400, 1)):
        assert w.var().item() == pytest.approx(variance, rel=0.05 if w.dim() == 2 else 0.3)


def test_a_step_is_half_a_radius_long_and_ends_in_the_ball():
    slope = torch.tensor([[3.0, 4.0], [0.0, 0.0]]).double()
    rows, matrix = step(torch.zeros(2, 2), slope, 0.1, -1), step(torch.zeros(2, 2), slope, 0.1, (0, 1))
    assert torch.allclose(rows, 0.01 * slope) and torch.allclose(matrix, 0.01 * slope)
    away = torch.tensor([[6.0, 8.0], [0.3, 0.4]]).double()
    assert torch.allclose(step(away, slope, 1.0, -1), torch.tensor([[0.6, 0.8], [0.3, 0.4]]).double())
    assert step(away, away, 1.0, (0, 1)).norm().item() == pytest.approx(1)


@pytest.mark.parametrize("eps", [0.0, 1e-9, 0.3])
def test_search_stays_in_its_ball_and_never_finds_less_than_at_x(eps, monkeypatch):
    layers, a, x, generator = network(n=8)
    seen = []

    def spy(layers, a, points):
        seen.append((points - x).norm(dim=-1))
        return input_gradient(layers, a, points)
    monkeypatch.setattr(theory_check, "input_gradient", spy)
    found = search(layers, a, x, eps, generator)
    distance = torch.stack(seen)
    assert (distance <= eps * (1 + 1e-6) + 1e-15).all() and distance.max() >= 0.99 * eps
    assert (found >= norms(layers, a, x)).all() and (distance[0, 0] == 0).all()


def test_search_is_a_close_lower_bound_and_its_ascent_helps():
    axis = torch.linspace(-1, 1, 101, dtype=torch.float64)
    disc = torch.cartesian_prod(axis, axis)
    disc = disc[disc.norm(dim=1) <= 1][:, None]
    layers, a, x, generator = network(m=24, d=2, n=20)
    largest = norms(layers, a, x + 0.3 * disc).amax(0)  # on a grid of the whole ball
    ratio = search(layers, a, x, 0.3, generator) / largest
    assert ratio.max() < 1.02 and ratio.mean() > 0.8
    layers, a, x, generator = network(m=64, d=32, n=20)
    ascended, sampled = (search(layers, a, x, 0.3, generator, steps=steps) for steps in (2, 0))
    assert (ascended / sampled).mean() > 1.05


@pytest.mark.parametrize("eps, radius", [(0.1, 0.3), (0.3, 1e-8)])
def test_training_meets_adversarial_points_stays_in_its_ball_and_lowers_the_loss(eps, radius, monkeypatch):
    layers, a, x, _ = network(m=64, d=16, depth=3, n=16)
    y = (x @ torch.ones(16).double()).sign()
    met, forward = [], theory_check.forward

    def spy(weights, a, points):
        met.extend([points] if weights[0].requires_grad else [])
        return forward(weights, a, points)

    def loss(weights, points):
        return F.softplus(-y * forward(weights, a, points)).mean().item()
    monkeypatch.setattr(theory_check, "forward", spy)
    trained = train(layers, a, x, y, eps, radius)
    assert torch.allclose((torch.stack(met) - x).norm(dim=-1), torch.tensor(eps).double())
    assert loss(layers, met[0]) > 1.1 * loss(layers, x)
    assert loss(trained, met[0]) < loss(layers, met[0]) * (0.7 if radius > 0.1 else 1)
    moved = [(w - w0).norm().item() for w, w0 in zip(trained, layers)]
    assert all(0.7 * radius < distance <= radius * (1 + 1e-6) for distance in moved)


def test_exponent_recovers_powers_and_its_interval_is_students():
    sizes, slopes = [10, 20, 40], torch.tensor([0.4, 0.5, 0.6]).double()
    found = exponent(sizes, [(3 * size ** slopes).tolist() for size in sizes])
    assert found == pytest.approx((0.5, 4.3027 * 0.1 / 3 ** 0.5), rel=1e-4)
    with pytest.raises(UserError, match="larger --widths"):
        exponent(sizes, [[0.0, 1.0, 1.0]] * 3)  # dead networks


@pytest.mark.parametrize("regime, expected", [("lemma", 0), ("d=m", 0.5), ("fan-in", 0.5)])
def test_exponents_at_initialization_are_those_of_theory(regime, expected):
    def median(m, depth, i):
        seed = 1000 * m + 100 * depth + i  # each network its own
        return norms(*network(regime, m, m if regime == "d=m" else 32, depth, 8, seed)[:3]).median().item()
    for axis, sizes in enumerate([[(64, 2), (128, 2), (256, 2)], [(128, 1), (128, 2), (128, 4)]]):
        medians = [[median(*size, i) for i in range(60)] for size in sizes]
        found, error = exponent([size[axis] for size in sizes], medians)
        low, high = found - error, found + error
        value = 0 if axis else expected
        assert low - 0.03 < value < high + 0.03 and high - low < 0.15  # 0.03: a finite width bends the powers


@pytest.fixture(scope="module")
def regimes(tmp_path_factory):
    """The regimes in the JSON of a small command."""
    path = tmp_path_factory.mktemp("theory") / "report.json"
    theory_check.main([*SMALL, "--json", str(path)])
    return json.loads(path.read_text())["regimes"]


def test_json_keeps_its_contract_and_the_same_command_its_numbers(regimes, tmp_path):
    theory_check.main([*SMALL, "--json", str(tmp_path / "again.json")])
    assert json.loads((tmp_path / "again.json").read_text())["regimes"] == regimes
    assert [regime["name"] for regime in regimes] == ["lemma", "d=m", "fan-in"]
    for regime in regimes:
        norms = {(row["m"], row["depth"]): torch.tensor(row["initial, trained"]) for row in regime["norms"]}
        assert {*norms} == {(8, 1), (16, 1), (8, 2)} and norms[8, 1].shape == (2, 3, 4)
        logs = {size: norm[0].quantile(0.5, dim=-1).log().mean().item() for size, norm in norms.items()}
        for key, doubled in ("exponent_m", (16, 1)), ("exponent_h", (8, 2)):  # two sizes: by hand
            assert regime[key] == pytest.approx((logs[doubled] - logs[8, 1]) / math.log(2), abs=1e-5)
            assert regime[f"{key}_ci"][0] < regime[key] < regime[f"{key}_ci"][1]
        ratios = [(norm.max() / math.sqrt(m * depth)).item() for (m, depth), norm in norms.items()]
        assert regime["max_ratio"] == pytest.approx(max(ratios))
        assert f"‖∇ₓf‖₂ ≤ {max(ratios):.2f}·√(mH); it grows" in regime["verdict"]


def test_a_tiny_ball_changes_nothing():
    args = argparse.Namespace(inputs=32, points=16, seeds=2, eps=1e-7, radius=1e-7)
    initial, trained = theory_check.measure("lemma", 64, 4, args, torch.Generator().manual_seed(0))
    assert torch.allclose(trained, initial, rtol=1e-3) and not torch.equal(trained, initial)


def test_plot_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    theory_check.main([*SMALL, "--plot", str(tmp_path / "lemma.png")])
    assert (tmp_path / "lemma.png").stat().st_size > 5000


def test_a_missing_matplotlib_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match="matplotlib"):  # of which `launch` makes one line
        theory_check.main([*SMALL, "--plot", "plot.png"])


@pytest.mark.parametrize("options, named", [
    (["--widths", "-4", "8"], "--widths"), (["--widths", "64"], "two different"),
    (["--depths", "0"], "--depths"), (["--seeds", "1"], "--seeds"), (["--eps", "-0.1"], "--eps"),
    (["--device", "nowhere"], "--device"), (["--plot", "plot.txt"], ".png")])
def test_nonsense_is_refused(options, named):
    with pytest.raises(UserError, match=named):
        theory_check.main([*SMALL, *options])


def test_a_mistake_ends_in_one_line_with_status_2(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["theory_check.py", "--eps", "-1"])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(theory_check.__file__, run_name="__main__")
    said = capsys.readouterr()
    assert exit.value.code == 2 and said.out == "" and said.err.count("\n") == 1 and "--eps" in said.err

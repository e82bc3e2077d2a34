"""theory_check.py: its gradients, projections, searches and verdicts, on small networks."""
import argparse
import json
import math
import os

import pytest
import theory_check
import torch
import torch.nn.functional as F
from common import UserError
from theory_check import draw_network, exponent, input_gradient, search, train

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
    assert (found > norms(layers, a, x) * (1 - 1e-9)).all() and (distance[0, 0] == 0).all()


def test_search_ascends_to_where_more_neurons_are_active():
    """f = relu(x₁ + x₂/2) + relu(2x₂ - x₁/10): at x only the first is, and uphill from there both are."""
    layers, a = [torch.tensor([[1, 0.5], [-0.1, 2]]).double()], torch.ones(2).double()
    x, generator = torch.tensor([[1.0, 0.0]]).double(), torch.Generator()
    one, both = math.hypot(1, 0.5), math.hypot(0.9, 2.5)
    for settings, largest in ({"starts": 0, "steps": 0}, one), ({"starts": 0}, both), ({}, both):
        assert search(layers, a, x, 0.3, generator, **settings).item() == pytest.approx(largest)


@pytest.mark.parametrize("eps, radius", [(0.1, 0.3), (0.3, 1e-8)])
def test_training_meets_adversarial_points_stays_in_its_ball_and_lowers_the_loss(eps, radius, monkeypatch):
    """Of a linear network, f(x) = relu(w·x) - relu(-w·x): the worst point of a ball is known."""
    x, generator = network(d=16, n=16)[2:]
    w = torch.randn(16, generator=generator).double()
    a, eye = torch.tensor([1, -1]).double(), torch.eye(2).double()
    layers = [torch.stack([w, -w]), eye, eye]
    y = (x @ torch.ones(16).double()).sign()
    met, forward = [], theory_check.forward

    def spy(weights, a, points):
        met.extend([points] if weights[0].requires_grad else [])
        return forward(weights, a, points)

    def loss(weights, points):
        return F.softplus(-y * forward(weights, a, points)).mean().item()
    monkeypatch.setattr(theory_check, "forward", spy)
    trained = train(layers, a, x, y, eps, radius)
    assert torch.allclose(met[0], x - eps * y[:, None] * w / w.norm(), rtol=1e-12)
    assert (torch.stack(met) - x).norm(dim=-1).max() <= eps * (1 + 1e-6)
    assert loss(trained, met[0]) < loss(layers, met[0])
    moved = [(w - w0).norm().item() for w, w0 in zip(trained, layers)]
    assert all(0.7 * radius < distance <= radius * (1 + 1e-6) for distance in moved)
    once = train(layers, a, x, y, eps, radius, steps=1)  # half a radius
    assert all((w - w0).norm().item() == pytest.approx(radius / 2, rel=1e-5) for w, w0 in zip(once, layers))


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


@pytest.mark.parametrize("p, q, said", [
    ((0.49, 0.5, 0.51), (0, 0.01, 0.02), "consistent with √m, slower than √H"),
    ((0.1, 0.5), (0.9, 0.901), "undecided in m, faster than √H")])  # Student's 12.7 for two seeds
def test_verdicts_say_no_more_than_the_intervals(p, q, said):
    p, q = torch.tensor([p, q]).double()
    sweeps = [(16, 1), (64, 1)], [(16, 1), (16, 4)]
    norms = {("lemma", m, h): (m ** p * h ** q)[:, None].expand(2, -1, 1) for m, h in sum(sweeps, [])}
    assert theory_check.summary(norms, sweeps, "lemma")["verdict"].endswith(f": {said}")


@pytest.mark.parametrize("size, said", [("0.06", "beyond"), ("0.01", "partly beyond"), ("1e-5", "within")])
def test_training_is_said_to_be_where_it_was(size, said, capsys):
    theory_check.main([*SMALL, "--eps", size, "--radius", size])
    found = capsys.readouterr().out  # the limits: 1/log³8 = 0.11, 1/log³16 = 0.05, 1/(2⁶ log³8) = 0.002
    assert f": {said} the lemma's limit" in found and "which is 2e-03 to 1e-01" in found


def test_json_keeps_its_contract_and_the_same_command_its_numbers(tmp_path):
    for name in "report.json", "again.json":
        theory_check.main([*SMALL, "--json", str(tmp_path / name)])
    regimes, again = (json.loads(path.read_text())["regimes"] for path in tmp_path.iterdir())
    assert regimes == again
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
        assert regime["verdict"].startswith(f"never above {max(ratios):.2f}·√(mH). Growth at init")


def test_a_tiny_ball_changes_nothing():
    args = argparse.Namespace(inputs=32, points=16, seeds=2, eps=1e-7, radius=1e-7)
    initial, trained = theory_check.measure("lemma", 64, 4, args, torch.Generator().manual_seed(0))
    assert torch.allclose(trained, initial, rtol=1e-3) and not torch.equal(trained, initial)


def test_plot_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    theory_check.main([*SMALL, "--plot", str(tmp_path / "lemma.png")])
    assert (tmp_path / "lemma.png").stat().st_size > 5000


@pytest.mark.parametrize("options, named", [
    (["--widths", "-4", "8"], "--widths"), (["--widths", "64"], "two different"),
    (["--depths", "0"], "--depths"), (["--seeds", "1"], "--seeds"), (["--eps", "-0.1"], "--eps"),
    (["--device", "nowhere"], "--device"), (["--plot", "plot.txt"], ".png"), (["--json", "."], "--json"),
    (["--json", f"{__file__}/x"], "--json"), (["--plot", "nowhere/x.png"], "--plot"),
    (["--json", "/proc/x"], "--json")])
def test_nonsense_is_refused_before_anything_is_measured(options, named, monkeypatch):
    monkeypatch.setattr(theory_check, "measure", None)
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != "/proc")  # as if it were read-only
    with pytest.raises(UserError, match=named):
        theory_check.main([*SMALL, *options])

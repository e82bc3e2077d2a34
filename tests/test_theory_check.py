"""theory_check.py: its closed forms, searches and verdicts, on networks small enough to check by hand."""
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import theory_check
from common import UserError
from theory_check import (ReluNetwork, draw_network, exponent, input_gradient, search_input, train, unit,
                          worst_weights)

SCRIPT = Path(theory_check.__file__)
SMALL = ["--widths", "8", "16", "--depths", "1", "2", "--inputs", "8", "--points", "4", "--seeds", "3",
         "--search-seeds", "2", "--eps", "0.5", "--radius", "0.5", "--c", "7"]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Two threads for matrices this small only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def network(regime="lemma", m=16, d=6, depth=3, n=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    net = draw_network(regime, m, d, depth, generator)
    return net, unit(torch.randn(n, d, generator=generator).double()), generator


def norms(net, x):
    return input_gradient(net, x)[1].norm(dim=-1)


def reference(weights, a, x):
    """f(x) of one point by the definition, for autograd."""
    for w in weights:
        x = torch.relu(w @ x)
    return a @ x


def assert_agrees_with_autograd(net, x):
    f, gradient = input_gradient(net, x)
    for i, point in enumerate(x):
        weights = [w + (torch.outer(net.rank_one[h][0][i], net.rank_one[h][1][i]) if net.rank_one else 0)
                   for h, w in enumerate(net.layers)]
        point = point.clone().requires_grad_()
        value = reference(weights, net.a, point)
        expected, = torch.autograd.grad(value, point)
        assert abs(f[i] - value) < 1e-10 * (1 + abs(value))
        assert (gradient[i] - expected).norm() < 1e-10 * (1 + expected.norm())


def labels(x):
    return torch.where(x[:, 0] > x[:, 0].median(), 1.0, -1.0).double()


@pytest.mark.parametrize("regime", theory_check.REGIMES)
@pytest.mark.parametrize("depth", [1, 2, 5])
def test_gradient_is_autograds_on_and_off_initialization(regime, depth):
    net, x, generator = network(regime, d=16 if regime == "d=m" else 6, depth=depth)
    eps = torch.full((len(x), 1), 0.7, dtype=torch.float64)
    assert_agrees_with_autograd(net, x)
    assert_agrees_with_autograd(net, search_input(net, x, eps, generator))
    assert_agrees_with_autograd(train(net, x, labels(x), 0.3, 0.7), x)
    assert_agrees_with_autograd(worst_weights(net, x, eps), x)


def test_loss_gradient_is_autograds_for_the_worse_label():
    net, x, _ = network()
    x = 20 * x  # far from f = 0, where both labels would do
    _, loss_norms = theory_check.gradient_norms(net, x)
    for point, found in zip(x, loss_norms):
        point = point.clone().requires_grad_()
        for_both = []
        for y in (1, -1):
            loss = torch.nn.functional.softplus(-y * reference(net.layers, net.a, point))
            for_both.append(torch.autograd.grad(loss, point)[0].norm().item())
        assert found == pytest.approx(max(for_both), rel=1e-10)


def test_initialization_has_the_variances_of_its_regime():
    for regime, first in (("lemma", 2 / 400), ("fan-in", 2 / 50)):
        net, _, _ = network(regime, m=400, d=50, depth=2)
        assert net.layers[0].shape == (400, 50) and net.layers[1].shape == (400, 400)
        assert net.layers[0].var().item() == pytest.approx(first, rel=0.05)
        assert net.layers[1].var().item() == pytest.approx(2 / 400, rel=0.05)
        assert net.a.var().item() == pytest.approx(1, rel=0.3)


def test_search_finds_what_a_grid_finds_in_two_dimensions():
    axis = torch.linspace(-1, 1, 71, dtype=torch.float64)
    disc = torch.cartesian_prod(axis, axis)
    disc = disc[disc.norm(dim=1) <= 1][:, None]  # [K, 1, 2]
    for seed, (m, depth) in enumerate([(8, 1), (16, 2), (24, 3)]):
        net, x, generator = network(m=m, d=2, depth=depth, n=8, seed=seed)
        for radius in (0.1, 0.6):
            found = search_input(net, x, torch.full((8, 1), radius, dtype=torch.float64), generator)
            assert ((found - x).norm(dim=1) <= radius * (1 + 1e-9)).all()
            assert (norms(net, found) >= norms(net, x + radius * disc).amax(0) * (1 - 1e-9)).all()


def test_ascent_finds_more_than_random_search_in_many_dimensions():
    net, x, generator = network(m=64, d=64, n=8)
    eps = torch.full((8, 1), 0.5, dtype=torch.float64)
    random = norms(net, search_input(net, x, eps, generator, steps=0, draws=200))
    assert norms(net, search_input(net, x, eps, generator)).mean() > 1.2 * random.mean()
    assert norms(net, search_input(net, x, eps, generator, steps=0)).mean() >= norms(net, x).mean()


def test_search_in_a_ball_of_radius_zero_stays():
    net, x, generator = network()
    assert torch.equal(search_input(net, x, torch.zeros(len(x), 1).double(), generator), x)


def test_worst_weights_lie_on_the_ball_and_beat_random_directions():
    net, x, generator = network(m=32, d=8, depth=3)
    radius = torch.full((len(x), 1), 0.5, dtype=torch.float64)
    worst = worst_weights(net, x, radius)
    for u, v in worst.rank_one:
        assert torch.allclose(u.norm(dim=1) * v.norm(dim=1), radius[:, 0])
    directions = []
    for _ in range(300):
        steps = [torch.randn(w.shape, generator=generator).double() for w in net.layers]
        moved = [w + 0.5 * step / step.norm() for w, step in zip(net.layers, steps)]
        directions.append(norms(ReluNetwork(moved, net.a), x))
    assert (norms(worst, x) > 1.2 * torch.stack(directions).amax(0)).all()


def test_worst_weights_of_one_layer_reach_the_optimum():
    """With one layer and one gate open ‖∇f‖ = |a|·‖w + δ‖, whose maximum is |a|·(‖w‖ + radius)."""
    net = ReluNetwork([torch.tensor([[3.0, 4.0]]).double()], torch.tensor([2.0]).double())
    x = unit(torch.tensor([[1.0, 1.0]]).double())
    worst = worst_weights(net, x, torch.tensor([[0.5]]).double())
    assert norms(worst, x).item() == pytest.approx(2 * 5.5, rel=1e-9)


def test_training_lowers_the_adversarial_loss_and_stays_inside_the_ball():
    net, x, _ = network(m=64, d=16, depth=2, n=16)
    y = labels(x)

    def adversarial_loss(net, eps=0.1):
        f, gradient = input_gradient(net, x)
        x_adv = x - eps * y[:, None] * unit(gradient)
        return torch.nn.functional.softplus(-y * input_gradient(net, x_adv)[0]).mean()

    trained = train(net, x, y, 0.1, 0.5)
    assert adversarial_loss(trained) < 0.8 * adversarial_loss(net)
    for radius in (0.5, 1e-9):
        moved = [(w - w0).norm() for w, w0 in zip(train(net, x, y, 0.1, radius).layers, net.layers)]
        assert all(0.2 * radius < distance <= radius * (1 + 1e-6) for distance in moved)


def test_exponent_recovers_a_power_and_its_interval_comes_from_the_seeds():
    sizes, slopes = [10, 20, 40], torch.tensor([0.4, 0.5, 0.6]).double()
    value, (low, high) = exponent(sizes, [(size ** slopes).tolist() for size in sizes])
    assert value == pytest.approx(0.5)
    assert high - low == pytest.approx(2 * 4.303 * 0.1 / 3 ** 0.5, rel=1e-3)  # Student's t, n = 3
    assert exponent(sizes, [[0.0, 1.0, 1.0]] * 3) == (None, None)  # a dead network


def test_dead_networks_have_no_exponent(tmp_path, capsys):
    theory_check.main(["--widths", "2", "3", "--depths", "8", "9", "--points", "2", "--seeds", "4",
                       "--search-seeds", "0", "--json", str(tmp_path / "r.json")])
    for regime in json.loads((tmp_path / "r.json").read_text())["regimes"]:
        assert regime["exponent_m"] is None and regime["exponent_h_ci"] is None
    assert capsys.readouterr().out.count("not fitted") == 6


@pytest.fixture(scope="module")
def initialization(tmp_path_factory):
    """Twenty seeds at initialization on small sizes: the report's regimes by name."""
    path = tmp_path_factory.mktemp("theory") / "report.json"
    theory_check.main(["--widths", "64", "128", "256", "--depths", "1", "2", "4", "--inputs", "32",
                       "--seeds", "24", "--search-seeds", "0", "--json", str(path)])
    return {regime["name"]: regime for regime in json.loads(path.read_text())["regimes"]}


@pytest.mark.parametrize("name, expected", [("lemma", 0), ("d=m", 0.5), ("fan-in", 0.5)])
def test_exponents_at_initialization_are_those_of_theory(initialization, name, expected):
    regime = initialization[name]
    for axis, value in (("m", expected), ("h", 0)):
        low, high = regime[f"exponent_{axis}_ci"]
        assert low <= value <= high
        assert high - low < 0.2
        assert low < regime[f"exponent_{axis}"] < high


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("theory") / "report.json"
    theory_check.main([*SMALL, "--json", str(path)])
    return json.loads(path.read_text())


def test_json_keeps_its_contract(small):
    assert [regime["name"] for regime in small["regimes"]] == ["lemma", "d=m", "fan-in"]
    for regime in small["regimes"]:
        for key in ("exponent_m", "exponent_h"):
            low, high = regime[f"{key}_ci"]
            assert low <= regime[key] <= high
        assert regime["max_ratio"] == max(entry["max_ratio"] for entry in regime["measurements"])
        assert len(regime["fits"]) == 7  # at initialization, and three kinds within the limit and at --eps
        assert len(regime["measurements"]) == 7 * 3
        for entry in regime["measurements"]:
            root = math.sqrt(entry["m"] * entry["depth"])
            assert entry["max_ratio"] == pytest.approx(entry["loss_max"] / root)
            assert entry["f_median"] <= entry["f_max"] and max(entry["f_medians"]) <= entry["f_max"]
            assert 0.5 * entry["f_max"] <= entry["loss_max"] <= entry["f_max"]
            seeds = 3 if entry["situation"] == theory_check.INITIAL else 2
            assert entry["gradients"] == 4 * seeds and len(entry["f_medians"]) == seeds
            assert entry["d"] == (entry["m"] if regime["name"] == "d=m" else 8)


def test_assumptions_are_labelled_by_the_stated_c(small):
    for regime in small["regimes"]:
        for entry in regime["measurements"]:
            inside = entry["eps"] + entry["radius"] <= 7 / (entry["depth"] ** 6 * math.log(entry["m"]) ** 3)
            assert entry["assumptions_met"] == (regime["name"] != "fan-in" and inside)
    lemma = small["regimes"][0]
    met = [entry for entry in lemma["measurements"] if entry["assumptions_met"]]
    assert 0 < len(met) < len(lemma["measurements"])
    largest, n = max(entry["max_ratio"] for entry in met), sum(entry["gradients"] for entry in met)
    assert f"{largest:.3g}·√(mH) at all {n} gradients" in lemma["verdict"]
    assert "no size meets the assumptions" in small["regimes"][2]["verdict"]


def test_a_width_below_the_input_size_meets_no_assumption(tmp_path):
    theory_check.main([*SMALL, "--inputs", "32", "--search-seeds", "0", "--json", str(tmp_path / "r.json")])
    lemma = json.loads((tmp_path / "r.json").read_text())["regimes"][0]
    assert not any(entry["assumptions_met"] for entry in lemma["measurements"])
    assert "no size meets the assumptions" in lemma["verdict"]


@pytest.mark.parametrize("m, h, growth", [
    ((0.1, 0.4), (0.4, 0.6), "; at initialization slower than √m; at initialization compatible with √H"),
    ((0.6, 0.7), None, "; at initialization faster than √m")])
def test_verdict_compares_the_intervals_with_a_square_root(m, h, growth):
    row = {"gradients": 1200, "assumptions_met": True, "max_ratio": 0.5}
    rows = [row, {**row, "assumptions_met": False, "max_ratio": 7.0}]
    said = theory_check.verdict(rows, {"exponent_m_ci": m, "exponent_h_ci": h})
    assert said == f"‖∇L‖ ≤ 0.5·√(mH) at all 1,200 gradients under the assumptions{growth}"


def test_same_seeds_give_the_same_numbers(small, tmp_path):
    theory_check.main([*SMALL, "--json", str(tmp_path / "r.json")])
    assert json.loads((tmp_path / "r.json").read_text())["regimes"] == small["regimes"]


def test_plot_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    for options, name in (([], "off.png"), (["--search-seeds", "0"], "start.pdf")):
        theory_check.main([*SMALL, *options, "--plot", str(tmp_path / name)])
        assert (tmp_path / name).stat().st_size > 5000


def test_a_missing_matplotlib_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        theory_check.main([*SMALL, "--plot", str(tmp_path / "plot.png")])


@pytest.mark.parametrize("options, named", [
    (["--widths", "-4", "8"], "--widths"), (["--widths", "64"], "two different"),
    (["--depths", "0", "1"], "--depths"), (["--depths", "2", "2"], "two different"),
    (["--inputs", "0"], "--inputs"), (["--seeds", "1"], "--seeds"), (["--search-seeds", "1"], "at least two"),
    (["--points", "x"], "--points"), (["--eps", "-0.1"], "--eps"), (["--radius", "nan"], "--radius"),
    (["--eps", "0.1", "1"], "as many"), (["--c", "0"], "--c"), (["--device", "nowhere"], "--device"),
    (["--json", "missing/r.json"], "missing"), (["--plot", "plot.txt"], ".png"), (["--full"], "--full")])
def test_nonsense_is_refused(options, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=named):
        theory_check.main([*SMALL, *options])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options, named", [(["--eps", "-1"], "--eps"),
                                            (["--widths", "8", "9000000000"], "out of memory")])
def test_a_mistake_ends_in_one_line_with_status_2(options, named, tmp_path):
    command = [sys.executable, SCRIPT, *SMALL, *options]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.count("\n") == 1 and named in result.stderr

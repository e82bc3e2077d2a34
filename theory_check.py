"""Lemma 4.2, measured: how the input gradient of a deep ReLU network grows with its width m and depth H.

    python theory_check.py                          # three regimes; 16 s on 2 cores of an AMD EPYC, 0.8 GB
    python theory_check.py --plot lemma.png --json lemma.json       # with the figure and every number

The lemma: ‖∇ₓL(f(x'), y)‖₂ = O(√(mH)) for every x' in B(x, ε) and all W within R/√m of their initialization,
in Frobenius norm, each layer, if m ≥ max(d, Ω(H log H)) and R/√m + ε ≤ c / (H⁶ (log m)³). Its constants are
not given: Ω(H log H) is read as H log H here, and c is --c.

Regimes: the lemma's initialization at a fixed input size d; the same with d = m; and a first layer scaled by
its fan-in, as libraries do, which is not the lemma's. Situations: at initialization; x' searched for in B(x,
ε); W after adversarial training in B(R); the worst W found in B(R), both with x' searched for again. All but
the first are measured within the lemma's radius, half of it ε and half R/√m, and at each pair of --eps and
--radius. What a search finds is a lower bound of the largest there is.

m is swept at the middle one of --depths, H at the middle one of --widths (of two, the smaller). An exponent
is the slope of log(median ‖∇ₓf‖₂ over the points) against log m or log H, fitted for each seed alone; its
interval is Student's 95 % over seeds, each of which draws new weights and points. Above 0.5, ‖∇f‖ outgrew √m
or √H. A finite width bends the powers by about H/m: 100 seeds from m = 64 on give the fan-in regime 0.52
[0.51, 0.53], where theory has 0.5. All is float64: the lemma's radius can be as small as 1e-10.
"""
import io
import math
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import common  # before PyTorch: it says how threads wait
import torch
import torch.nn.functional as F
from common import UserError, integer, number, say

REGIMES = ("lemma", "d=m", "fan-in")
INITIAL = "at initialization"

# ------------------------------------------------------------------------------------------------ the network


@dataclass
class ReluNetwork:
    """f(x) = aᵀ D⁽ᴴ⁾W⁽ᴴ⁾ ··· D⁽¹⁾W⁽¹⁾ x; `rank_one` gives every point weights of its own, W⁽ʰ⁾ + u vᵀ."""
    layers: list            # W⁽¹⁾ [m, d], W⁽²⁾ ... W⁽ᴴ⁾ [m, m]
    a: torch.Tensor         # [m]
    rank_one: list = None   # for each layer u [N, m] and v [N, inputs]

    def times(self, layer, h):
        """W⁽ʰ⁾ h, for the rows of h [..., N, inputs]."""
        z = h @ self.layers[layer].T
        if self.rank_one:
            u, v = self.rank_one[layer]
            z = z + (h * v).sum(-1, keepdim=True) * u
        return z

    def transposed_times(self, layer, b):
        """W⁽ʰ⁾ᵀ b, for the rows of b [..., N, m]."""
        z = b @ self.layers[layer]
        if self.rank_one:
            u, v = self.rank_one[layer]
            z = z + (b * u).sum(-1, keepdim=True) * v
        return z


def draw_network(regime, m, d, depth, generator):
    """A network at initialization: W⁽ʰ⁾ ~ N(0, 2/m), a ~ N(0, 1); W⁽¹⁾ ~ N(0, 2/d) in the regime "fan-in"."""
    def normal(*shape):  # drawn in float32: five times as fast, and exact once converted
        return torch.randn(*shape, generator=generator, device=generator.device).double()

    first = math.sqrt(2 / (d if regime == "fan-in" else m)) * normal(m, d)
    return ReluNetwork([first] + [math.sqrt(2 / m) * normal(m, m) for _ in range(depth - 1)], normal(m))


def forward(net, x):
    """x [..., N, d] → f(x) [..., N] and the pre-activations of every layer [..., N, m]."""
    h, z = x, []
    for layer in range(len(net.layers)):
        z.append(net.times(layer, h))
        h = z[-1].relu()
    return h @ net.a, z


def backward(net, gates):
    """aᵀ D⁽ᴴ⁾W⁽ᴴ⁾ ··· D⁽¹⁾W⁽¹⁾ [..., N, d] for diagonals `gates` of D⁽ʰ⁾; each layer's aᵀ D⁽ᴴ⁾ ··· D⁽ʰ⁾."""
    b, partial = net.a, []
    for layer in reversed(range(len(net.layers))):
        partial.insert(0, b * gates[layer])
        b = net.transposed_times(layer, partial[0])
    return b, partial


def input_gradient(net, x):
    """f(x) [..., N] and ∇ₓf(x) [..., N, d], in closed form."""
    f, z = forward(net, x)
    return f, backward(net, [pre > 0 for pre in z])[0]


def gradient_norms(net, x):
    """‖∇ₓf‖₂ and ‖∇ₓL‖₂ [N], L the logistic loss of the label that makes it larger (the lemma is for any)."""
    f, gradient = input_gradient(net, x)
    norm = gradient.norm(dim=-1)
    return norm, torch.sigmoid(f.abs()) * norm


# -------------------------------------------------------------------------------------------- the adversaries


def unit(x):
    return x / x.norm(dim=-1, keepdim=True).clamp_min(1e-150)


def into_ball(x, center, radius):
    """The point of B(center, radius) nearest to x, rows by themselves."""
    step = x - center
    return center + step * (radius / step.norm(dim=-1, keepdim=True).clamp_min(1e-150)).clamp_max(1)


def search_input(net, x, eps, generator, start=None, steps=10, draws=8):
    """x' in B(x, eps) [N, d] with ‖∇ₓf(x')‖₂ as large as could be found: random search, then gradient ascent.

    x [N, d]; eps [N, 1]. Never smaller than at `start`, points of the balls (x by default).

    The network is linear in pieces, so the norm is constant in each piece and has no slope to follow. The
    ascent therefore follows the norm of a smoothed gradient, in which the gate 1[z > 0] is sigmoid(z / τ): it
    sees the boundaries within about τ, and τ shrinks with the steps so that in the end only the nearest ones
    count. Whatever proposes a point, the true norm decides whether it is kept.
    """
    kept = x if start is None else start
    best = input_gradient(net, kept)[1].norm(dim=-1)

    def consider(candidates, norms):  # [K, N, d], [K, N]
        nonlocal best, kept
        norms, index = norms.max(0)
        chosen = candidates.gather(0, index[None, :, None].expand(1, *x.shape))[0]
        kept = torch.where((norms > best)[:, None], chosen, kept)
        best = torch.maximum(norms, best)

    draws *= max(1, 2 ** 16 // x.shape[1] ** 3)  # samples cover a ball only in few dimensions
    at_once = max(8, 2 ** 18 // (len(x) * len(net.a)))  # about 2 MB a layer
    for drawn in range(0, draws, at_once):
        shape = (min(at_once, draws - drawn), *x.shape)
        direction = unit(torch.randn(shape, generator=generator, device=x.device, dtype=x.dtype))
        length = 2 * torch.rand((*shape[:2], 1), generator=generator, device=x.device, dtype=x.dtype)
        candidates = x + eps * length.clamp_max(1) ** (1 / x.shape[1]) * direction  # half on the sphere
        consider(candidates, input_gradient(net, candidates)[1].norm(dim=-1))
    point = kept
    for step in range(steps):
        done = step / steps
        point = point.detach().requires_grad_()
        _, z = forward(net, point)
        tau = (2 * eps * 0.03 ** done).clamp(1e-12, 1)  # the ball moves pre-activations by eps of their size
        gates = []
        for pre in z:
            size = pre.detach().square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)
            gates.append(torch.stack([(pre > 0).to(pre), torch.sigmoid(pre / (tau * size))]))
        norm, smooth_norm = backward(net, gates)[0].norm(dim=-1)  # both in one pass over W
        slope, = torch.autograd.grad(smooth_norm.sum(), point)
        point = point.detach()
        consider(point[None], norm.detach()[None])
        point = into_ball(point + (0.4 * (1 - done) + 0.02) * eps * unit(slope), x, eps)
    return kept


def worst_weights(net, x, radius, steps=6):
    """The network with W⁽ʰ⁾ + radius·u vᵀ, unit u and v for each point: the largest ‖∇ₓf(x)‖₂ found in B(R).

    With the gates fixed, g = ∇ₓf is linear in each W⁽ʰ⁾ and ‖g‖₂² rises fastest along the rank-one matrix
    (aᵀ D⁽ᴴ⁾ ··· D⁽ʰ⁾)ᵀ (D⁽ʰ⁻¹⁾W⁽ʰ⁻¹⁾ ··· W⁽¹⁾ g)ᵀ; being convex in W⁽ʰ⁾, it is largest on the sphere of the
    ball. All layers go there at once, again and again as in a power iteration, with the gates that the
    perturbed weights give, and the best is kept. x [N, d]; radius [N, 1].
    """
    rank_one = kept = [(x.new_zeros(len(x), len(w)), x.new_zeros(len(x), w.shape[1])) for w in net.layers]
    best = torch.full_like(radius, -1)
    for _ in range(steps + 1):
        moved = ReluNetwork(net.layers, net.a, rank_one)
        gates = [pre > 0 for pre in forward(moved, x)[1]]
        gradient, partial = backward(moved, gates)
        norm = gradient.norm(dim=-1, keepdim=True)
        larger = norm > best
        kept = [(torch.where(larger, u, kept_u), torch.where(larger, v, kept_v))
                for (u, v), (kept_u, kept_v) in zip(rank_one, kept)]
        best = torch.maximum(norm, best)
        rank_one, h = [], unit(gradient)
        for layer, b in enumerate(partial):
            rank_one.append((radius * unit(b), h))
            h = unit(gates[layer] * moved.times(layer, h))
    return ReluNetwork(net.layers, net.a, kept)


def train(net, x, y, eps, radius, steps=6, attack_steps=2):
    """Adversarial training inside B(R): projected gradient descent on the logistic loss at x' in B(x, ε).

    Steps are half a radius long in each layer, so that B(R) matters however small it is; x' is the end of
    `attack_steps` of projected gradient ascent on the loss. x [N, d], y [N] of ±1; eps, radius: numbers.
    """
    def adversarial_loss(weights):
        moved, x_adv = ReluNetwork(weights, net.a), x
        with torch.no_grad():
            for _ in range(attack_steps):
                x_adv = into_ball(x_adv - eps * y[:, None] * unit(input_gradient(moved, x_adv)[1]), x, eps)
        return F.softplus(-y * forward(moved, x_adv)[0]).mean()

    weights = net.layers
    for _ in range(steps):
        weights = [w.detach().requires_grad_() for w in weights]
        slopes = torch.autograd.grad(adversarial_loss(weights), weights)
        for i, (w0, slope) in enumerate(zip(net.layers, slopes)):
            moved = weights[i].detach() - w0 - 0.5 * radius / slope.norm().clamp_min(1e-150) * slope
            weights[i] = w0 + (radius / moved.norm().clamp_min(1e-150)).clamp_max(1) * moved
    return ReluNetwork(weights, net.a)


# -------------------------------------------------------------------------------------------- the measurement


def situations(net, x, levels, generator):
    """`gradient_norms` of one network by (situation, ε, R/√m). levels: (ε, R/√m), the lemma's limit first."""
    found = {(INITIAL, 0.0, 0.0): gradient_norms(net, x)}
    if not levels:
        return found
    eps, radius = (x.new_tensor(values).repeat_interleave(len(x))[:, None] for values in zip(*levels))
    everywhere = x.repeat(len(levels), 1)                                # [levels · N, d]: all levels at once
    searched = search_input(net, everywhere, eps, generator)
    worst = worst_weights(net, searched, radius)
    worst_x = search_input(worst, everywhere, eps, generator, start=searched)
    score = x @ torch.randn(x.shape[1], generator=generator, device=x.device).double()
    y = torch.where(score > score.median(), 1.0, -1.0).double()          # the small task: a linear teacher
    for level, (eps, radius) in enumerate(levels):
        part = slice(level * len(x), (level + 1) * len(x))
        in_ball, in_both = "within the limit", "within the limit"
        if level:
            in_ball, in_both = f"ε {eps:g}", f"ε {eps:g}, R/√m {radius:g}"
        trained = train(net, x, y, eps, radius)
        trained_x = search_input(trained, x, torch.full_like(x[:, :1], eps), generator)
        own = ReluNetwork(net.layers, net.a, [(u[part], v[part]) for u, v in worst.rank_one])
        found[f"x' searched, {in_ball}", eps, 0.0] = gradient_norms(net, searched[part])
        found[f"W trained, {in_both}", eps, radius] = gradient_norms(trained, trained_x)
        found[f"W worst, {in_both}", eps, radius] = gradient_norms(own, worst_x[part])
    return found


def measure(regime, m, depth, args, device):
    """One size of one regime: for each situation a dict of what JSON reports of the norms of all seeds."""
    d = m if regime == "d=m" else args.inputs
    allowed = args.c / (depth ** 6 * math.log(m) ** 3)
    levels = [(allowed / 2, allowed / 2), *zip(args.eps, args.radius)]
    found = {}
    for seed in range(args.seeds):
        generator = torch.Generator(device).manual_seed(zlib.crc32(f"{regime} {m} {depth} {seed}".encode()))
        x = unit(torch.randn(args.points, d, generator=generator, device=device).double())
        net = draw_network(regime, m, d, depth, generator)
        some = levels if seed < args.search_seeds else []
        for key, norms in situations(net, x, some, generator).items():
            found.setdefault(key, []).append(norms)
    rows = []
    for (situation, eps, radius), norms in found.items():
        f, loss = (torch.stack(part).cpu() for part in zip(*norms))        # [seeds, N]
        met = regime != "fan-in" and m >= max(d, depth * math.log(depth)) and eps + radius <= allowed
        rows.append({"situation": situation, "m": m, "depth": depth, "d": d, "eps": eps, "radius": radius,
                     "assumptions_met": met, "gradients": f.numel(), "f_median": f.median().item(),
                     "f_medians": f.quantile(0.5, dim=1).tolist(),                  # a seed each
                     "f_max": f.max().item(), "loss_max": loss.max().item(),
                     "max_ratio": loss.max().item() / math.sqrt(m * depth)})
    return rows


def measured(sizes, args, device):
    """Regime by regime, its name and the rows of all its sizes.

    A thread for each core measures a size at a time, with operators of one thread (one thread in all for a
    GPU): the matrices are too small to share out, which took 30 times as long on a busy machine.
    """
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads if device.type == "cpu" else 1)
    torch.set_num_threads(1)
    try:
        work = {name: [pool.submit(measure, name, *size, args, device) for size in sizes] for name in REGIMES}
        for name, parts in work.items():
            yield name, [row for part in parts for row in part.result()]
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


# -------------------------------------------------------------------------------------- exponents and verdict

# Student's t, 97.5 %, for 1, 2, ... degrees of freedom; more seeds than listed take the last: too wide.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145,
           2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048,
           2.045, 2.042)


def exponent(sizes, medians):
    """The slope of log medians [sizes, seeds] in log size: the mean over seeds and its 95 % interval.

    (None, None) where a median is 0: networks so narrow that they are dead at most points have no exponent.
    """
    log_size = torch.tensor(sizes, dtype=torch.float64).log()
    log_size -= log_size.mean()
    log_norm = torch.tensor(medians, dtype=torch.float64).log()
    slopes = (log_size[:, None] * log_norm).sum(0) / log_size.square().sum()
    if not slopes.isfinite().all():
        return None, None
    mean, n = slopes.mean().item(), len(slopes)
    half = STUDENT[min(n - 1, len(STUDENT)) - 1] * slopes.std().item() / math.sqrt(n)
    return mean, [mean - half, mean + half]


def fit(rows, width_sweep, depth_sweep):
    """One situation over all sizes: its two exponents with their intervals, and its largest ratio."""
    medians = {(row["m"], row["depth"]): row["f_medians"] for row in rows}
    m, m_interval = exponent([m for m, _ in width_sweep], [medians[size] for size in width_sweep])
    h, h_interval = exponent([depth for _, depth in depth_sweep], [medians[size] for size in depth_sweep])
    return {"situation": rows[0]["situation"], "exponent_m": m, "exponent_m_ci": m_interval,
            "exponent_h": h, "exponent_h_ci": h_interval, "max_ratio": max(row["max_ratio"] for row in rows)}


def shown(fitted, key):
    value, interval = fitted[key], fitted[f"{key}_ci"]
    return "not fitted" if value is None else f"{value:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]"


def verdict(rows, initial):
    """One line: the constant of the bound where its assumptions hold, and the growth at initialization."""
    met = [row for row in rows if row["assumptions_met"]]
    said = ["no size meets the assumptions"]
    if met:
        said = [f"‖∇L‖ ≤ {max(row['max_ratio'] for row in met):.3g}·√(mH) at all "
                f"{sum(row['gradients'] for row in met):,} gradients under the assumptions"]
    for key, root in ("exponent_m_ci", "√m"), ("exponent_h_ci", "√H"):
        if initial[key] is not None:
            low, high = initial[key]
            how = "slower than" if high < 0.5 else "faster than" if low > 0.5 else "compatible with"
            said.append(f"at initialization {how} {root}")
    return "; ".join(said)


def plot(path, regimes, width_sweep, depth_sweep):
    """Median ‖∇ₓf‖₂ against m and H, of each regime at initialization and, dotted, in its last situation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    labels = f"width m (H = {width_sweep[0][1]})", f"depth H (m = {depth_sweep[0][0]})"
    for axis, (panel, sweep) in enumerate(zip(panels, (width_sweep, depth_sweep))):
        sizes = [size[axis] for size in sweep]
        panel.plot(sizes, [math.sqrt(m * depth) for m, depth in sweep], "k--", label="√(mH)")
        for regime, colour in zip(regimes, ("tab:blue", "tab:orange", "tab:green")):
            for situation, marker in (regime["fits"][-1]["situation"], "s:"), (INITIAL, "o-"):
                medians = {(row["m"], row["depth"]): row["f_median"] for row in regime["measurements"]
                           if row["situation"] == situation}
                panel.plot(sizes, [medians[size] for size in sweep], marker, color=colour,
                           label=f"{regime['name']}, {situation}")
        panel.set(xscale="log", yscale="log", xlabel=labels[axis])
        panel.set_xticks(sizes, sizes)
        panel.minorticks_off()
    panels[0].set_ylabel("‖∇ₓf‖₂, median")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=8)
    content = io.BytesIO()
    figure.savefig(content, format=Path(path).suffix[1:], dpi=200)
    common.write_file(path, content.getvalue())


# ------------------------------------------------------------------------------------------------------- main


def parse(argv):
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add("--widths", type=integer(2), nargs="+", default=[128, 256, 512, 1024], metavar="M", help="widths m")
    add("--depths", type=integer(), nargs="+", default=[1, 2, 4, 8], metavar="H", help="depths H")
    add("--inputs", type=integer(), default=64, metavar="D", help="input size d, where it is fixed")
    add("--points", type=integer(), default=8, metavar="N", help="unit vectors x for each network")
    add("--seeds", type=integer(2), default=20, metavar="N", help="networks of each size")
    add("--search-seeds", type=integer(0), default=4, metavar="N",
        help="how many of them leave initialization, 0: none")
    add("--eps", type=number(), nargs="+", default=[0.1, 1.0], metavar="E", help="ε, the ℓ2 radius around x")
    add("--radius", type=number(), nargs="+", default=[0.1, 1.0], metavar="R",
        help="R/√m, the Frobenius radius around each layer's initialization, one for each --eps")
    add("--c", type=number(above=True), default=1.0, help="the c of R/√m + ε ≤ c / (H⁶ (log m)³)")
    add("--json", metavar="FILE", help="write every number to FILE")
    add("--plot", metavar="FILE", help="draw the norms to FILE, a .png, .pdf or .svg (needs matplotlib)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    args = parser.parse_args(argv)
    args.widths, args.depths = sorted(set(args.widths)), sorted(set(args.depths))
    for option, sizes in (("--widths", args.widths), ("--depths", args.depths)):
        if len(sizes) < 2:
            raise UserError(f"{option} {sizes[0]}: an exponent needs at least two different values")
    if args.search_seeds == 1:
        raise UserError("--search-seeds 1: an interval over seeds needs at least two, or 0 for no search")
    if len(args.eps) != len(args.radius):
        raise UserError(f"{len(args.eps)} --eps and {len(args.radius)} --radius: give as many of each")
    for path in filter(None, (args.json, args.plot)):
        if not Path(path).absolute().parent.is_dir():
            raise UserError(f"{path}: there is no folder {Path(path).parent}")
    if args.plot:
        if Path(args.plot).suffix not in (".png", ".pdf", ".svg"):
            raise UserError(f"--plot {args.plot}: the name must end in .png, .pdf or .svg")
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            raise UserError("--plot needs matplotlib: pip install matplotlib") from None
    return args


def main(argv):
    args, began = parse(argv), time.perf_counter()
    device = common.pick_device(args.device)
    middle_m, middle_depth = (sizes[(len(sizes) - 1) // 2] for sizes in (args.widths, args.depths))
    width_sweep = [(m, middle_depth) for m in args.widths]
    depth_sweep = [(middle_m, depth) for depth in args.depths]
    sizes = sorted({*width_sweep, *depth_sweep}, key=lambda size: -size[0] ** 2 * size[1])  # long ones first
    regimes = []
    for name, rows in measured(sizes, args, device):
        fits = [fit([row for row in rows if row["situation"] == situation], width_sweep, depth_sweep)
                for situation in dict.fromkeys(row["situation"] for row in rows)]
        regimes.append({**fits[0], "name": name, "max_ratio": max(fitted["max_ratio"] for fitted in fits),
                        "verdict": verdict(rows, fits[0]), "fits": fits, "measurements": rows})
        say(f"{name:<34}{f'exponent in m (H = {middle_depth})':>26}{f'exponent in H (m = {middle_m})':>26}"
            f"{'max ratio':>12}")
        for fitted in fits:
            m, h = shown(fitted, "exponent_m"), shown(fitted, "exponent_h")
            say(f"  {fitted['situation']:<32}{m:>26}{h:>26}{fitted['max_ratio']:>12.3g}")
        say(f"  {regimes[-1]['verdict']}\n")
    seconds = time.perf_counter() - began
    if args.plot:
        plot(args.plot, regimes, width_sweep, depth_sweep)
    if args.json:
        common.write_json(args.json, {"settings": vars(args), "seconds": seconds, "regimes": regimes})
    say(f"{common.duration(seconds)} on the {device.type}")


if __name__ == "__main__":
    common.launch(main)

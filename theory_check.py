"""Lemma 4.2, measured: how the input gradient of a deep ReLU network grows with its width m and depth H.

    python theory_check.py                                      # three regimes; 11 s of an AMD EPYC's core
    python theory_check.py --plot lemma.png --json lemma.json   # with the figure and every number
    python theory_check.py --eps 0.1 1 --radius 0.1 1           # in two balls larger than the lemma's

The lemma: ‖∇ₓL(f(x'), y)‖₂ = O(√(mH)) for every x' in B(x, ε) and all W within R/√m of their initialization,
in Frobenius norm, each layer. It assumes m ≥ max(d, Ω(H log H)) and R/√m + ε ≤ c / (H⁶ (log m)³). It gives
no constants: Ω(H log H) is read as H log H here, and c is --c.

Regimes: "lemma" is the lemma's initialization at a fixed input size d. "d=m" is the same with d = m. "fan-in"
scales the first layer by its fan-in, as libraries do, which the lemma does not cover.

Situations: at initialization; at x' searched for in B(x, ε); there again after adversarial training in B(R).
The last two are measured within the lemma's limit, half of it ε and half R/√m, and in the balls of --eps and
--radius. A search samples B(x, ε) and ascends the loss. What it finds is a lower bound of the largest.

Exponents: the slope of log(median ‖∇ₓf‖₂ over the points) against log m, or log H. H stays at the middle of
--depths while m varies, and m at the middle of --widths (of two, the smaller). Each seed draws new weights
and points. The table has the mean over seeds ± 2 standard errors. Above 0.5, ‖∇f‖ outgrew √m or √H.
All is float64: the lemma's limit is 2e-8 at H = 8, m = 256.

Found at initialization: at a fixed d the gradient is flat in m (exponent 0.04 ± 0.06). It grows as √m where
d = m (0.53 ± 0.05), and where the first layer has fan-in scale (0.51 ± 0.06). It is flat in H everywhere.
Within the limit neither x' nor W moves an exponent by more than 0.001. So the bound holds, with a constant of
1.0, and is loose: its √H is slack, and so is its √m at a fixed d.
"""
import io
import math
import time
from pathlib import Path

import common  # before PyTorch: it says how threads wait
import torch
import torch.nn.functional as F
from common import UserError, integer, number, say

REGIMES = ("lemma", "d=m", "fan-in")
INITIAL = "at initialization"

# ------------------------------------------------------------------------------------------------ the network


def normal(generator, *shape):
    return torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float64)


def draw_network(regime, m, d, depth, generator):
    """Weights at initialization (Lemma 4.2): a list of W⁽¹⁾ [m, d], W⁽²⁾ ... W⁽ᴴ⁾ [m, m], and a [m].

    W⁽ʰ⁾ ~ N(0, 2/m) and a ~ N(0, 1). In the regime "fan-in" W⁽¹⁾ ~ N(0, 2/d).
    """
    first = math.sqrt(2 / (d if regime == "fan-in" else m)) * normal(generator, m, d)
    others = [math.sqrt(2 / m) * normal(generator, m, m) for _ in range(depth - 1)]
    return [first, *others], normal(generator, m)


def forward(layers, a, x):
    """f(x) = aᵀ D⁽ᴴ⁾W⁽ᴴ⁾ ··· D⁽¹⁾W⁽¹⁾ x, where D⁽ʰ⁾ holds the 0s and 1s of the ReLU. x [..., d] → [...]."""
    for w in layers:
        x = F.linear(x, w).relu()
    return x @ a


def input_gradient(layers, a, x):
    """f(x) [...] and ∇ₓf(x) [..., d] of x [..., d]."""
    x = x.detach().requires_grad_()
    f = forward(layers, a, x)
    return f.detach(), torch.autograd.grad(f.sum(), x)[0]


def gradient_norms(f, gradient):
    """‖∇ₓf‖₂ and ‖∇ₓL‖₂, [2, ...]. L is the logistic loss of the worse label: the lemma holds for both."""
    norm = gradient.norm(dim=-1)
    return torch.stack([norm, torch.sigmoid(f.abs()) * norm])


# --------------------------------------------------------------------------------------------- the adversary


def step(offset, slope, radius, dims):
    """Add half a radius along the slope to `offset`, then project onto B(0, radius). Norms span `dims`."""
    def norm(z):
        return torch.linalg.vector_norm(z, dim=dims, keepdim=True).clamp_min(1e-150)

    moved = offset + slope * (radius / 2 / norm(slope))
    return moved * (radius / norm(moved)).clamp_max(1)


def search_input(layers, a, x, eps, generator, starts=4, steps=2):
    """The largest `gradient_norms` found in B(x, ε): lower bounds of the largest there. x [N, d] → [2, N].

    Looks at x, at `starts` random points of the ball, and along a gradient ascent of |f| from each of them.
    f is linear in pieces, so ‖∇ₓf‖ itself has no slope. To ascend |f| is to attack the worse label's loss.
    """
    offset = normal(generator, 1 + starts, *x.shape)
    length = torch.rand(1 + starts, len(x), 1, generator=generator, device=x.device, dtype=x.dtype)
    offset *= eps * length ** (1 / x.shape[1]) / offset.norm(dim=-1, keepdim=True)  # uniform in the ball
    offset[0] = 0
    best = 0
    for _ in range(1 + steps):
        f, gradient = input_gradient(layers, a, x + offset)
        best = gradient_norms(f, gradient).amax(1).clamp_min(best)
        offset = step(offset, f.sign()[..., None] * gradient, eps, -1)
    return best


def train(layers, a, x, y, eps, radius, steps=3):
    """Adversarial training in B(R): the layers after projected gradient steps on the logistic loss at x'.

    x' is ε along the loss's gradient from x, the worst of B(x, ε) where f is linear. A step is half a radius
    long in each layer, so that W crosses B(R) however small it is.
    x [N, d]; y [N] of ±1; eps is ε; radius is R/√m.
    """
    offsets = [torch.zeros_like(w) for w in layers]
    for _ in range(steps):
        moved = [w + offset for w, offset in zip(layers, offsets)]
        x_adv = x - eps * y[:, None] * F.normalize(input_gradient(moved, a, x)[1], dim=-1)
        moved = [w.requires_grad_() for w in moved]
        log_likelihood = F.logsigmoid(y * forward(moved, a, x_adv)).mean()  # minus the logistic loss
        slopes = torch.autograd.grad(log_likelihood, moved)
        offsets = [step(offset, slope, radius, (0, 1)) for offset, slope in zip(offsets, slopes)]
    return [w + offset for w, offset in zip(layers, offsets)]


# -------------------------------------------------------------------------------------------- the measurement


def situations(regime, m, d, depth, balls, points, generator):
    """Draw a network and its points: `gradient_norms` [2, N] by (situation, ε, R/√m)."""
    layers, a = draw_network(regime, m, d, depth, generator)
    x = F.normalize(normal(generator, points, d), dim=-1)
    y = (x @ normal(generator, d)).sign()  # the task to train on: a linear teacher
    found = {(INITIAL, 0.0, 0.0): gradient_norms(*input_gradient(layers, a, x))}
    for x_name, w_name, eps, radius in balls:
        trained = train(layers, a, x, y, eps, radius)
        found[f"x' searched, {x_name}", eps, 0.0] = search_input(layers, a, x, eps, generator)
        found[f"W trained, {w_name}", eps, radius] = search_input(trained, a, x, eps, generator)
    return found


def measure(regime, m, depth, args, generator):
    """Measure one size of one regime: for each situation a dict of what JSON reports of all seeds."""
    d = m if regime == "d=m" else args.inputs
    limit = args.c / (depth ** 6 * math.log(m) ** 3)
    balls = [("within the limit", "within the limit", limit / 2, limit / 2)]
    balls += [(f"ε {eps:g}", f"ε {eps:g}, R/√m {radius:g}", eps, radius)
              for eps, radius in zip(args.eps, args.radius)]
    seeds = [situations(regime, m, d, depth, balls, args.points, generator) for _ in range(args.seeds)]
    rows = []
    for situation, eps, radius in seeds[0]:
        f, loss = torch.stack([norms[situation, eps, radius] for norms in seeds], dim=1).cpu()  # [seeds, N]
        met = regime != "fan-in" and m >= max(d, depth * math.log(depth)) and eps + radius <= limit
        rows.append({"situation": situation, "m": m, "depth": depth, "d": d, "eps": eps, "radius": radius,
                     "assumptions_met": met, "points": f.numel(), "median": f.quantile(0.5).item(),
                     "medians": f.quantile(0.5, dim=1).tolist(),  # a seed each
                     "max_ratio": loss.max().item() / math.sqrt(m * depth)})
    return rows


def exponent(sizes, medians):
    """The slope of log medians [sizes, seeds] in log size: mean over seeds, ± 2 standard errors.

    Raises UserError if a median is 0 or not finite.
    """
    log_size = torch.tensor(sizes, dtype=torch.float64).log()
    log_size -= log_size.mean()
    log_norm = torch.tensor(medians, dtype=torch.float64).log()
    if not log_norm.isfinite().all():
        raise UserError("a median gradient is 0 or not finite: take larger --widths, or a smaller --radius")
    slopes = (log_size[:, None] * log_norm).sum(0) / log_size.square().sum()
    mean, error = slopes.mean().item(), slopes.std().item() / math.sqrt(len(slopes))
    return mean, [mean - 2 * error, mean + 2 * error]


def fit(rows, width_sweep, depth_sweep):
    """One situation over all sizes: its two exponents with their intervals, and its largest ratio."""
    medians = {(row["m"], row["depth"]): row["medians"] for row in rows}
    m, m_ci = exponent([m for m, _ in width_sweep], [medians[size] for size in width_sweep])
    h, h_ci = exponent([depth for _, depth in depth_sweep], [medians[size] for size in depth_sweep])
    return {"situation": rows[0]["situation"], "exponent_m": m, "exponent_m_ci": m_ci, "exponent_h": h,
            "exponent_h_ci": h_ci, "max_ratio": max(row["max_ratio"] for row in rows)}


def verdict(rows, initial):
    """One line: the constant of the bound where its assumptions hold, and the growth at initialization."""
    met = [row for row in rows if row["assumptions_met"]]
    said = "no size meets the assumptions"
    if met:
        said = (f"‖∇L‖ ≤ {max(row['max_ratio'] for row in met):.3g}·√(mH) at all "
                f"{sum(row['points'] for row in met):,} points under the assumptions")
    growth = []
    for (low, high), root in (initial["exponent_m_ci"], "√m"), (initial["exponent_h_ci"], "√H"):
        how = "slower than" if high < 0.5 else "faster than" if low > 0.5 else "compatible with"
        growth.append(f"{how} {root}")
    return f"{said}; at initialization {', '.join(growth)}"


def plot(path, regimes, width_sweep, depth_sweep):
    """Draw median ‖∇ₓf‖₂ against m and H: each regime at initialization and, dotted, its last situation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    labels = f"width m (H = {width_sweep[0][1]})", f"depth H (m = {depth_sweep[0][0]})"
    for axis, (panel, sweep) in enumerate(zip(panels, (width_sweep, depth_sweep))):
        sizes = [size[axis] for size in sweep]
        panel.plot(sizes, [math.sqrt(m * depth) for m, depth in sweep], "k--", label="√(mH)")
        for regime, colour in zip(regimes, ("tab:blue", "tab:orange", "tab:green")):
            for fitted, marker in (regime["fits"][0], "o-"), (regime["fits"][-1], "s:"):
                medians = {(row["m"], row["depth"]): row["median"] for row in regime["measurements"]
                           if row["situation"] == fitted["situation"]}
                panel.plot(sizes, [medians[size] for size in sweep], marker, color=colour,
                           label=f"{regime['name']}, {fitted['situation']}")
        panel.set(xscale="log", yscale="log", xlabel=labels[axis])
        panel.set_xticks(sizes, sizes)
        panel.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    panels[0].set_ylabel("‖∇ₓf‖₂, median")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=8)
    content = io.BytesIO()
    figure.savefig(content, format=Path(path).suffix[1:], dpi=200)
    common.write_file(path, content.getvalue())


# ------------------------------------------------------------------------------------------------------- main


def parse(argv):
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add("--widths", type=integer(2), nargs="+", default=[128, 256, 512], metavar="M", help="widths m")
    add("--depths", type=integer(1), nargs="+", default=[1, 2, 4, 8], metavar="H", help="depths H")
    add("--inputs", type=integer(1), default=64, metavar="D", help="input size d, where it is fixed")
    add("--points", type=integer(1), default=8, metavar="N", help="unit vectors x for each network")
    add("--seeds", type=integer(2), default=8, metavar="N", help="networks of each size")
    add("--eps", type=number(), nargs="+", default=[0.1], metavar="E", help="ε, the ℓ2 radius around x")
    add("--radius", type=number(), nargs="+", default=[0.1], metavar="R",
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
    if len(args.eps) != len(args.radius):
        raise UserError(f"{len(args.eps)} --eps and {len(args.radius)} --radius: give as many of each")
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
    generator = torch.Generator(common.pick_device(args.device)).manual_seed(0)
    middle_m, middle_depth = (sizes[(len(sizes) - 1) // 2] for sizes in (args.widths, args.depths))
    width_sweep = [(m, middle_depth) for m in args.widths]
    depth_sweep = [(middle_m, depth) for depth in args.depths]
    regimes = []
    for name in REGIMES:
        rows = [row for m, depth in dict.fromkeys(width_sweep + depth_sweep)
                for row in measure(name, m, depth, args, generator)]
        fits = [fit([row for row in rows if row["situation"] == situation], width_sweep, depth_sweep)
                for situation in dict.fromkeys(row["situation"] for row in rows)]
        regimes.append({"name": name, **fits[0], "max_ratio": max(fitted["max_ratio"] for fitted in fits),
                        "verdict": verdict(rows, fits[0]), "fits": fits, "measurements": rows})
        say(f"{name:<32}{f'exponent in m (H = {middle_depth})':>26}{f'exponent in H (m = {middle_m})':>26}"
            f"{'max ratio':>12}")
        for fitted in fits:
            m, h = (f"{fitted[key]:.2f} [{fitted[key + '_ci'][0]:.2f}, {fitted[key + '_ci'][1]:.2f}]"
                    for key in ("exponent_m", "exponent_h"))
            say(f"  {fitted['situation']:<30}{m:>26}{h:>26}{fitted['max_ratio']:>12.3g}")
        say(f"  {regimes[-1]['verdict']}\n")
    seconds = time.perf_counter() - began
    if args.plot:
        plot(args.plot, regimes, width_sweep, depth_sweep)
    if args.json:
        common.write_json(args.json, {"settings": vars(args), "seconds": seconds, "regimes": regimes})
    say(f"{common.duration(seconds)} on {generator.device.type}")


if __name__ == "__main__":
    common.launch(main)

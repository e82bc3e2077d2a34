"""Lemma 4.2, measured: how fast does the input gradient of a deep ReLU network grow with width m and depth H?

    python theory_check.py              # three regimes, each with a verdict (53 s and 0.8 GB on 2 busy CPU cores)
    python theory_check.py --plot lemma.png --json lemma.json                       # with the figure and every number
    python theory_check.py --images cifar10 --widths 3072 4096 --depths 1 2 --search-seeds 0   # real images as x
    python theory_check.py --full                                                   # larger m and H, more seeds

The lemma: ‖∇ₓL(f(x'), y)‖₂ = O(√(mH)) for every x' in B(x, ε) and all W within R/√m of their initialization, in
Frobenius norm, each layer, if m ≥ max(d, Ω(H log H)) and R/√m + ε ≤ c / (H⁶ (log m)³). Its constants are not given:
Ω(H log H) is read as H log H here, and c is --c.

Regimes: the lemma's initialization at a fixed input size d; the same with d = m; and a first layer scaled by its
fan-in, as deep-learning libraries do, which is not the lemma's. Situations: at initialization; x' searched for in
B(x, ε); W after adversarial training in B(R); the worst W found in B(R), both with x' searched for again. All but the
first are measured within the radius the lemma allows, half of it ε and half R/√m, and at each pair of --eps and
--radius. What a search finds is a lower bound of the largest there is.

m is swept at the middle one of --depths, H at the middle one of --widths (of two, the smaller). An exponent is the
slope of log(median ‖∇ₓf‖₂ over the points) against log m or log H, fitted for each seed alone; its interval is
Student's 95 % interval over seeds, each of which draws new weights and new points. A verdict says that ‖∇f‖ outgrew
√m or √H where that interval lies above 0.5. A finite width bends the powers, by about H/m: from m = 64 on, 100 seeds
give 0.52 [0.51, 0.53] for the fan-in regime, where theory has 0.5. All is float64, because the radius that the lemma
allows can be as small as 1e-10.
"""
import contextlib
import io
import math
import textwrap
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import common
from common import UserError, integer, number, say

FULL = {"widths": [128, 256, 512, 1024, 2048], "depths": [1, 2, 4, 8, 16, 32], "seeds": 30, "search_seeds": 10}
REGIMES = ("lemma", "d=m", "fan-in")
INITIAL = "at initialization"

# -------------------------------------------------------------------------------------------------- the network


@dataclass
class Network:
    """f(x) = aᵀ D⁽ᴴ⁾W⁽ᴴ⁾ ··· D⁽¹⁾W⁽¹⁾ x. `rank_one` gives every point weights of its own, W⁽ʰ⁾ + u vᵀ."""
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
    return Network([first] + [math.sqrt(2 / m) * normal(m, m) for _ in range(depth - 1)], normal(m))


def forward(net, x):
    """x [..., N, d] → f(x) [..., N] and the pre-activations of every layer [..., N, m]."""
    h, z = x, []
    for layer in range(len(net.layers)):
        z.append(net.times(layer, h))
        h = z[-1].relu()
    return h @ net.a, z


def backward(net, gates):
    """aᵀ D⁽ᴴ⁾W⁽ᴴ⁾ ··· D⁽¹⁾W⁽¹⁾ [..., N, d] for the diagonals `gates` of D⁽ʰ⁾, and each layer's aᵀ D⁽ᴴ⁾ ··· D⁽ʰ⁾."""
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
    """‖∇ₓf‖₂ and ‖∇ₓL‖₂ [N] of the logistic loss, for the label that makes it larger: the lemma holds for every y."""
    f, gradient = input_gradient(net, x)
    norm = gradient.norm(dim=-1)
    return norm, torch.sigmoid(f.abs()) * norm


# ----------------------------------------------------------------------------------------------- the adversaries


def unit(x):
    return x / x.norm(dim=-1, keepdim=True).clamp_min(1e-150)


def into_ball(x, center, radius):
    """The point of B(center, radius) nearest to x, rows by themselves."""
    step = x - center
    return center + step * (radius / step.norm(dim=-1, keepdim=True).clamp_min(1e-150)).clamp_max(1)


def search_input(net, x, eps, generator, start=None, steps=10, draws=8):
    """x' in B(x, eps) [N, d] with ‖∇ₓf(x')‖₂ as large as could be found: random search, then gradient ascent.

    x [N, d]; eps [N, 1]. Never smaller than at `start`, points of the balls (x by default).

    The network is linear in pieces, so the norm is constant in each piece and has no slope to follow. The ascent
    therefore follows the norm of a smoothed gradient, in which the gate 1[z > 0] is sigmoid(z / τ): it sees the
    boundaries within about τ, and τ shrinks with the steps so that in the end only the nearest ones count. Whatever
    proposes a point, the true norm decides whether it is kept.
    """
    kept = x if start is None else start
    best = input_gradient(net, kept)[1].norm(dim=-1)

    def consider(candidates, norms):  # [K, N, d], [K, N]
        nonlocal best, kept
        norms, index = norms.max(0)
        chosen = candidates.gather(0, index[None, :, None].expand(1, *x.shape))[0]
        kept = torch.where((norms > best)[:, None], chosen, kept)
        best = torch.maximum(norms, best)

    draws *= max(1, 2 ** 16 // x.shape[1] ** 3)  # samples cover a ball only in few dimensions: spend them there
    at_once = max(8, 2 ** 18 // (len(x) * len(net.a)))  # about 2 MB a layer
    for drawn in range(0, draws, at_once):
        shape = (min(at_once, draws - drawn), *x.shape)
        direction = unit(torch.randn(shape, generator=generator, device=x.device, dtype=x.dtype))
        length = 2 * torch.rand((*shape[:2], 1), generator=generator, device=x.device, dtype=x.dtype)
        candidates = x + eps * length.clamp_max(1) ** (1 / x.shape[1]) * direction  # half of them on the sphere
        consider(candidates, input_gradient(net, candidates)[1].norm(dim=-1))
    point = kept
    for step in range(steps):
        done = step / steps
        point = point.detach().requires_grad_()
        _, z = forward(net, point)
        tau = (2 * eps * 0.03 ** done).clamp(1e-12, 1)  # pre-activations move by about eps of their size in the ball
        scale = [pre.detach().square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12) for pre in z]
        gates = [torch.stack([(pre > 0).to(pre), torch.sigmoid(pre / (tau * size))]) for pre, size in zip(z, scale)]
        norm, smooth_norm = backward(net, gates)[0].norm(dim=-1)                         # both in one pass over W
        slope, = torch.autograd.grad(smooth_norm.sum(), point)
        point = point.detach()
        consider(point[None], norm.detach()[None])
        point = into_ball(point + (0.4 * (1 - done) + 0.02) * eps * unit(slope), x, eps)
    return kept


def worst_weights(net, x, radius, steps=6):
    """The network with W⁽ʰ⁾ + radius·u vᵀ, unit u and v for each point: the largest ‖∇ₓf(x)‖₂ found in B(R).

    With the gates fixed, g = ∇ₓf is linear in each W⁽ʰ⁾ and ‖g‖₂² rises fastest along the rank-one matrix
    (aᵀ D⁽ᴴ⁾ ··· D⁽ʰ⁾)ᵀ (D⁽ʰ⁻¹⁾W⁽ʰ⁻¹⁾ ··· W⁽¹⁾ g)ᵀ; being convex in W⁽ʰ⁾, it is largest on the sphere of the ball. All
    layers go there at once, again and again as in a power iteration, with the gates that the perturbed weights give,
    and the best is kept. x [N, d]; radius [N, 1].
    """
    rank_one = kept = [(x.new_zeros(len(x), len(w)), x.new_zeros(len(x), w.shape[1])) for w in net.layers]
    best = torch.full_like(radius, -1)
    for _ in range(steps + 1):
        moved = Network(net.layers, net.a, rank_one)
        gates = [pre > 0 for pre in forward(moved, x)[1]]
        gradient, partial = backward(moved, gates)
        norm = gradient.norm(dim=-1, keepdim=True)
        kept = [tuple(torch.where(norm > best, new, old) for new, old in zip(*pair)) for pair in zip(rank_one, kept)]
        best = torch.maximum(norm, best)
        rank_one, h = [], unit(gradient)
        for layer, b in enumerate(partial):
            rank_one.append((radius * unit(b), h))
            h = unit(gates[layer] * moved.times(layer, h))
    return Network(net.layers, net.a, kept)


def train(net, x, y, eps, radius, steps=6, attack_steps=2):
    """Adversarial training inside B(R): projected gradient descent on the logistic loss at x' in B(x, eps).

    Steps are half a radius long in each layer, so that B(R) matters however small it is; x' is the end of
    `attack_steps` of projected gradient ascent on the loss. x [N, d], y [N] of ±1; eps and radius are numbers.
    """
    def adversarial_loss(weights):
        moved, x_adv = Network(weights, net.a), x
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
    return Network(weights, net.a)


# ----------------------------------------------------------------------------------------------- the measurement


def situations(net, x, levels, generator):
    """Every situation of one network: (name, ε, R/√m, gradient norms). levels: (ε, R/√m), the limit first."""
    yield INITIAL, 0.0, 0.0, gradient_norms(net, x)
    if not levels:
        return
    eps, radius = (x.new_tensor(r).repeat_interleave(len(x))[:, None] for r in zip(*levels))
    everywhere = x.repeat(len(levels), 1)                                          # [levels · N, d], all levels at once
    searched = search_input(net, everywhere, eps, generator)
    worst = worst_weights(net, searched, radius)
    worst_x = search_input(worst, everywhere, eps, generator, start=searched)
    score = x @ torch.randn(x.shape[1], generator=generator, device=x.device).double()
    y = torch.where(score > score.median(), 1.0, -1.0).double()                    # the small task: a linear teacher
    for level, (eps, radius) in enumerate(levels):
        part = slice(level * len(x), (level + 1) * len(x))
        in_ball, in_both = (f"ε {eps:g}", f"ε {eps:g}, R/√m {radius:g}") if level else ["within the limit"] * 2
        yield f"x' searched, {in_ball}", eps, 0.0, gradient_norms(net, searched[part])
        trained = train(net, x, y, eps, radius)
        trained_x = search_input(trained, x, torch.full_like(x[:, :1], eps), generator)
        yield f"W trained, {in_both}", eps, radius, gradient_norms(trained, trained_x)
        own = Network(net.layers, net.a, [(u[part], v[part]) for u, v in worst.rank_one])
        yield f"W worst, {in_both}", eps, radius, gradient_norms(own, worst_x[part])


def measure(regime, m, depth, args, images, device):
    """One size of one regime: a dict for each situation, with the norms of all seeds and what JSON reports of them."""
    allowed = args.c / (depth ** 6 * math.log(m) ** 3)
    levels = [(allowed / 2, allowed / 2), *zip(args.eps, args.radius)]
    found = {}
    for seed in range(args.seeds):
        generator = torch.Generator(device).manual_seed(zlib.crc32(f"{regime} {m} {depth} {seed}".encode()))
        if images is None:
            d = m if regime == "d=m" else args.inputs
            x = unit(torch.randn(args.points, d, generator=generator, device=device).double())
        else:
            x = images[torch.randperm(len(images), generator=generator, device=device)[:args.points]]
        net = draw_network(regime, m, x.shape[1], depth, generator)
        some = situations(net, x, levels if seed < args.search_seeds else [], generator)
        for key, norms in {tuple(key): norms for *key, norms in some}.items():  # a repeated ε is searched once
            found.setdefault(key, []).append(norms)
    rows = []
    for (situation, eps, radius), norms in found.items():
        f, loss = (torch.stack(part).cpu() for part in zip(*norms))                                     # [seeds, N]
        met = regime != "fan-in" and m >= max(x.shape[1], depth * math.log(depth)) and eps + radius <= allowed
        rows.append({"situation": situation, "m": m, "depth": depth, "d": x.shape[1], "eps": eps, "radius": radius,
                     "assumptions_met": met, "gradients": f.numel(), "f": f,
                     "f_median": f.median().item(), "f_max": f.max().item(), "loss_median": loss.median().item(),
                     "loss_max": loss.max().item(), "max_ratio": loss.max().item() / math.sqrt(m * depth)})
    return rows


# ------------------------------------------------------------------------------------------- exponents and verdict

# Student's t, 97.5 %, for 1, 2, ... degrees of freedom; more seeds than listed take the last, which errs wide.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
           2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)


def exponent(sizes, norms):
    """The slope of log median ‖∇ₓf‖₂ in log size, and its 95 % interval over seeds. norms: for each size [seeds, N].

    (None, None) where a median is 0: networks so narrow that they are dead at most points have no exponent.
    """
    log_size = torch.tensor(sizes, dtype=torch.float64).log()
    log_size -= log_size.mean()
    log_norm = torch.stack([norm.quantile(0.5, dim=1) for norm in norms]).log()                      # [sizes, seeds]
    slopes = (log_size[:, None] * log_norm).sum(0) / log_size.square().sum()
    if not slopes.isfinite().all():
        return None, None
    mean, n = slopes.mean().item(), len(slopes)
    half = STUDENT[min(n - 1, len(STUDENT)) - 1] * slopes.std().item() / math.sqrt(n)
    return mean, [mean - half, mean + half]


def fit(rows, width_sweep, depth_sweep):
    """One situation over all sizes: its two exponents, its largest ratio, and how many sizes meet the assumptions."""
    norms = {(row["m"], row["depth"]): row["f"] for row in rows}
    result = {"situation": rows[0]["situation"]}
    for axis, sweep in enumerate((width_sweep, depth_sweep)):
        value, interval = exponent([size[axis] for size in sweep], [norms[size] for size in sweep])
        name = f"exponent_{'mh'[axis]}"
        result |= {name: value, f"{name}_ci": interval}
    return result | {"max_ratio": max(row["max_ratio"] for row in rows), "sizes": len(rows),
                     "sizes_meeting_assumptions": sum(row["assumptions_met"] for row in rows)}


def shown(fitted, axis):
    value, interval = fitted[f"exponent_{axis}"], fitted[f"exponent_{axis}_ci"]
    return "not fitted" if value is None else f"{value:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]"


def verdict(name, fits, rows, c):
    """What the numbers of a regime say, and no more: does the bound hold, how tight is it, where does it break."""
    met = [row for row in rows if row["assumptions_met"]]
    if met:
        largest, n = max(row["max_ratio"] for row in met), sum(row["gradients"] for row in met)
        said = [f"The bound holds for all {n:,} gradients under the assumptions (c = {c:g}) with the constant "
                f"{largest:.3g}, the largest ‖∇L‖/√(mH) among them"]
    else:
        said = ["Nothing here tests the lemma: " + ("this is not its initialization" if name == "fan-in" else
                                                    f"no size met the assumptions (c = {c:g})")]
    for axis, letter in ("mm", "hH"):
        if fits[0][f"exponent_{axis}"] is not None:
            low, high = fits[0][f"exponent_{axis}_ci"]
            said.append(f"At initialization ‖∇f‖ goes as {letter} to the power {shown(fits[0], axis)}, " + (
                f"slower than √{letter}" if high < 0.5 else f"faster than √{letter}" if low > 0.5 else
                f"compatible with √{letter}"))
    under = [fitted for fitted in fits if fitted["sizes_meeting_assumptions"] == fitted["sizes"]]
    for place, some in (("Under", under), ("Outside", [fitted for fitted in fits if fitted not in under])):
        for axis, letter in ("mm", "hH") if some else ():
            beyond = [fitted for fitted in some if (fitted[f"exponent_{axis}_ci"] or [0])[0] > 0.5]
            said.append(f"{place} the assumptions ‖∇f‖ outgrew √{letter} in {len(beyond)} of {len(some)} situations")
            if beyond:
                steepest = max(beyond, key=lambda fitted: fitted[f"exponent_{axis}"])
                said[-1] += f", fastest as {letter} to the power {shown(steepest, axis)} ({steepest['situation']})"
    worst = max(rows, key=lambda row: row["max_ratio"])
    said.append(f"The largest ‖∇L‖/√(mH) met at all is {worst['max_ratio']:.3g} ({worst['situation']}, "
                f"m = {worst['m']}, H = {worst['depth']})")
    return ". ".join(said) + "."


# --------------------------------------------------------------------------------------------- images and the plot


def load_images(name, data_dir, device):
    """Real images as points of the unit sphere, [N, d] float64, at most 2,048: a folder's, or a data set's test split.

    Files are resized to 32×32; black images, which have no direction, are left out. Raises UserError.
    """
    if Path(name).is_dir():
        from PIL import Image

        paths = sorted(path for path in Path(name).rglob("*") if path.suffix.lower() in (".png", ".jpg", ".jpeg"))
        if not paths:
            raise UserError(f"--images {name}: no .png, .jpg or .jpeg file in this folder")
        images = []
        for path in paths[::(len(paths) - 1) // 2048 + 1]:
            try:
                images.append(np.asarray(Image.open(path).convert("RGB").resize((32, 32))))
            except (OSError, ValueError, SyntaxError) as error:  # what PIL raises on a broken file, by format
                raise UserError(f"{path} cannot be read as an image: {error}") from None
        x = torch.from_numpy(np.stack(images)).to(device)
    else:
        x = common.load_data(name, data_dir, device).x_test[:2048]
    x = x.flatten(1).double()
    x = x[x.any(1)]
    if not len(x):
        raise UserError(f"--images {name}: every image is black")
    return unit(x)


def plot(path, report, width_sweep, depth_sweep):
    """‖∇ₓf‖₂ against m and against H: every regime at initialization above, the lemma's regime off it below."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    lemma = report[0]["rows"]
    last = {row["situation"].partition(",")[0]: row["situation"] for row in lemma}  # each kind at the last --eps
    panels = [(INITIAL, [(regime["name"], regime["rows"], INITIAL) for regime in report])]
    if "W worst" in last:
        panels.append((f"lemma, {last['W worst'].partition(', ')[2]}", [(label, lemma, last[label]) for label in last]))
    figure = Figure(figsize=(7, 3 * len(panels)), layout="constrained")
    for (title, lines), axes in zip(panels, figure.subplots(len(panels), 2, sharey="row", squeeze=False)):
        for axis, (panel, sweep) in enumerate(zip(axes, (width_sweep, depth_sweep))):
            sizes = [size[axis] for size in sweep]
            panel.plot(sizes, [math.sqrt(m * depth) for m, depth in sweep], "k--", label="√(mH)")
            for (label, rows, situation), marker in zip(lines, ("o-", "s-", "^:", "D-.")):
                norms = {(row["m"], row["depth"]): row["f"] for row in rows if row["situation"] == situation}
                low, median, high = torch.stack([norms[size].quantile(torch.tensor([0.05, 0.5, 0.95]).double())
                                                 for size in sweep], 1)
                line, = panel.plot(sizes, median, marker, markersize=5, label=label)
                panel.fill_between(sizes, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
            fixed = f"H = {sweep[0][1]}" if axis == 0 else f"m = {sweep[0][0]}"
            panel.set(xscale="log", yscale="log", xlabel=f"{('width m', 'depth H')[axis]} ({fixed})")
            panel.set_xticks(sizes, [str(size) for size in sizes])
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
            panel.yaxis.set_major_formatter("{x:g}")
            panel.minorticks_off()
            panel.grid(alpha=0.3)
        axes[0].set_ylabel("‖∇ₓf‖₂, median and 5-95 %")
        axes[0].set_title(title, loc="left")
        axes[0].legend(fontsize=8)
    content = io.BytesIO()
    figure.savefig(content, format=Path(path).suffix[1:], dpi=200)
    common.write_file(path, content.getvalue())


# ----------------------------------------------------------------------------------------------------------- main


def parse(argv):
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add("--widths", type=integer(2), nargs="+", default=[128, 256, 512, 1024], metavar="M", help="widths m")
    add("--depths", type=integer(), nargs="+", default=[1, 2, 4, 8], metavar="H", help="depths H")
    add("--inputs", type=integer(), default=64, metavar="D", help="input size d, where it is fixed")
    add("--points", type=integer(), default=8, metavar="N", help="inputs x on the unit sphere for each network")
    add("--seeds", type=integer(2), default=20, metavar="N", help="networks of each size")
    add("--search-seeds", type=integer(0), default=4, metavar="N",
        help="how many of them leave initialization, 0: none")
    add("--eps", type=number(), nargs="+", default=[0.1, 1.0], metavar="E", help="ε, the ℓ2 radius around x")
    add("--radius", type=number(), nargs="+", default=[0.1, 1.0], metavar="R",
        help="R/√m, the Frobenius radius around each layer's initialization, one for each --eps")
    add("--c", type=number(above=True), default=1.0, help="the c of the assumption R/√m + ε ≤ c / (H⁶ (log m)³)")
    add("--full", action="store_true", help="larger --widths, --depths, --seeds and --search-seeds by default")
    add("--images", metavar="DIR|NAME", help="real images as x, from a folder or a data set; leaves out d=m")
    add("--data-dir", default="data", metavar="DIR", help="where data sets are, or are downloaded to")
    add("--json", metavar="FILE", help="write every number to FILE")
    add("--plot", metavar="FILE", help="draw the norms to FILE, a .png, .pdf or .svg (needs matplotlib)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    if "--full" in argv:
        parser.set_defaults(**FULL)
    args = parser.parse_args(argv)
    args.widths, args.depths = sorted(set(args.widths)), sorted(set(args.depths))
    for option, sizes in (("--widths", args.widths), ("--depths", args.depths)):
        if len(sizes) < 2:
            raise UserError(f"{option} {sizes[0]}: an exponent needs at least two different values")
    if args.search_seeds == 1:
        raise UserError("--search-seeds 1: an interval over seeds needs at least two, or 0 to stay at initialization")
    if len(args.eps) != len(args.radius):
        raise UserError(f"{len(args.eps)} values of --eps and {len(args.radius)} of --radius: give as many of each")
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


@contextlib.contextmanager
def workers(device):
    """A thread for each core, each with operators of one thread; one thread in all for a GPU.

    The matrices are too small to share out: two-threaded operators took 30 times as long on a busy machine.
    """
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads if device.type == "cpu" else 1)
    torch.set_num_threads(1)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def main(argv):
    args = parse(argv)
    device = common.pick_device(args.device)
    images = load_images(args.images, args.data_dir, device) if args.images else None
    middle_m, middle_depth = (sizes[(len(sizes) - 1) // 2] for sizes in (args.widths, args.depths))
    width_sweep = [(m, middle_depth) for m in args.widths]
    depth_sweep = [(middle_m, depth) for depth in args.depths]
    sizes = sorted({*width_sweep, *depth_sweep}, key=lambda size: -size[0] ** 2 * size[1])  # the longest first
    report, began = [], time.perf_counter()
    with workers(device) as pool:
        work = {(name, size): pool.submit(measure, name, *size, args, images, device)
                for name in (REGIMES if images is None else ("lemma", "fan-in")) for size in sizes}
        for name in dict.fromkeys(name for name, _ in work):
            try:
                rows = [row for size in sizes for row in work[name, size].result()]
            except RuntimeError as error:
                if "allocate" not in str(error):  # the CPU's allocator has no exception class of its own
                    raise
                raise UserError("out of memory: smaller --widths, --depths or --points need less") from None
            fits = [fit([row for row in rows if row["situation"] == situation], width_sweep, depth_sweep)
                    for situation in dict.fromkeys(row["situation"] for row in rows)]
            say(f"{name:<34}{f'exponent in m (H = {middle_depth})':>26}{f'exponent in H (m = {middle_m})':>26}"
                f"{'max ratio':>12}  assumptions met")
            for fitted in fits:
                say(f"  {fitted['situation']:<32}{shown(fitted, 'm'):>26}{shown(fitted, 'h'):>26}"
                    f"{fitted['max_ratio']:>12.3g}  {fitted['sizes_meeting_assumptions']} of {fitted['sizes']} sizes")
            report.append({**fits[0], "name": name, "max_ratio": max(fitted["max_ratio"] for fitted in fits),
                           "verdict": verdict(name, fits, rows, args.c), "fits": fits, "rows": rows})
            say(f"\n{textwrap.fill(report[-1]['verdict'], 118, initial_indent='  ', subsequent_indent='  ')}\n")
    seconds = time.perf_counter() - began
    if args.plot:
        plot(args.plot, report, width_sweep, depth_sweep)
    if args.json:
        for regime in report:
            regime["measurements"] = [{key: row[key] for key in row if key != "f"} for row in regime.pop("rows")]
        common.write_json(args.json, {"settings": vars(args), "seconds": seconds, "regimes": report})
    say(f"{common.duration(seconds)} on the {device.type}")


if __name__ == "__main__":
    common.launch(main)

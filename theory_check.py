"""Lemma 4.2, measured: the input gradient of a deep ReLU network beside its bound O(√(mH)), width m, depth H.

    python theory_check.py                                      # a table; 6 s of an Intel Xeon's core
    python theory_check.py --plot lemma.png --json lemma.json   # with the figure and every number
    python theory_check.py --eps 1 --radius 1                   # in a larger ball

The lemma: ‖∇ₓL(f(x'), y)‖₂ = O(√(mH)) for all x' within ε of x and W within R/√m of initialization (ℓ2;
Frobenius, each layer), if m ≥ max(d, Ω(H log H)) and R/√m + ε ≤ c/(H⁶ (log m)³). Measured is ‖∇ₓf‖₂, as in
its proof: ‖∇ₓL‖₂ is at most that for every loss with |L'| ≤ 1, such as the logistic one. All is float64.

Networks: "lemma" is the lemma's, at a fixed input size d. "d=m" is the same with d = m. "fan-in" scales the
first layer by its fan-in, as libraries do, which the lemma does not cover. Norms are medians over seeds and
points x. "trained": after adversarial training in B(R), the largest that a search of B(x, ε) finds, a lower
bound. An exponent is the slope of log norm in log m or log H, ± Student's 95 % interval over seeds.

Found: the bound holds with a constant near 1, and is loose. The gradient is flat in H, and in m at a fixed d.
It grows as √m where d = m, and where the first layer has fan-in scale. Training changes none of it.
"""
import math
import os
import time
from pathlib import Path

import common  # before PyTorch: it says how threads wait
import torch
import torch.nn.functional as F
from common import UserError, integer, number, say

NETWORKS = ("lemma", "d=m", "fan-in")

# -------------------------------------------------------------------------------- the network, the adversary


def normal(generator, *shape):
    return torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float64)


def draw_network(name, m, d, depth, generator):
    """Weights at initialization: a list of W⁽¹⁾ [m, d], W⁽²⁾ ... W⁽ᴴ⁾ [m, m], and a [m]."""
    first = math.sqrt(2 / (d if name == "fan-in" else m)) * normal(generator, m, d)
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


def step(offset, slope, radius, dims):
    """Add half a radius along the slope to `offset`, then project onto B(0, radius). Norms span `dims`."""
    def norm(z):
        return torch.linalg.vector_norm(z, dim=dims, keepdim=True).clamp_min(1e-150)

    moved = offset + slope * (radius / 2 / norm(slope))
    return moved * (radius / norm(moved)).clamp_max(1)


def search(layers, a, x, eps, generator, starts=4, steps=2):
    """The largest ‖∇ₓf‖₂ [N] found in B(x, ε), a lower bound of the largest there. x [N, d].

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
        best = gradient.norm(dim=-1).amax(0).clamp_min(best)
        offset = step(offset, f.sign()[..., None] * gradient, eps, -1)
    return best


def train(layers, a, x, y, eps, radius, steps=3):
    """Adversarial training in B(R): the layers after projected gradient steps on the logistic loss at x'.

    x' is ε along the loss's gradient from x, the worst of B(x, ε) where f is linear. A step is half a radius
    long in each layer, so that W crosses B(R) however small it is. radius is R/√m; x [N, d]; y [N] of ±1.
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


def measure(name, m, depth, args, generator):
    """‖∇ₓf‖₂ [2, seeds, points] of one size: at x at initialization, and by a `search` after training."""
    found, d = [], m if name == "d=m" else args.inputs
    for _ in range(args.seeds):
        layers, a = draw_network(name, m, d, depth, generator)
        x = F.normalize(normal(generator, args.points, d), dim=-1)
        y = (x @ normal(generator, d)).sign()  # the task to train on: a linear teacher
        trained = train(layers, a, x, y, args.eps, args.radius)
        found.append(torch.stack([input_gradient(layers, a, x)[1].norm(dim=-1),
                                  search(trained, a, x, args.eps, generator)]))
    return torch.stack(found, dim=1).cpu()


def exponent(sizes, medians):
    """The slope of log medians [sizes, seeds] in log size: mean over seeds, and half its 95 % interval.

    Raises UserError if a median is 0 or not finite.
    """
    log_size = torch.tensor(sizes, dtype=torch.float64).log()
    log_size -= log_size.mean()
    log_norm = torch.as_tensor(medians, dtype=torch.float64).log()
    if not log_norm.isfinite().all():
        raise UserError("a median gradient is 0 or not finite: take larger --widths, or a smaller --radius")
    slopes = (log_size[:, None] * log_norm).sum(0) / log_size.square().sum()
    n = len(slopes)
    return slopes.mean().item(), common.student(n) * slopes.std().item() / math.sqrt(n)


def growth(norms, sweep, axis, name, place):
    """`exponent` of a network's norms at a place, in m (axis 0) or H (axis 1)."""
    medians = [norms[(name, *size)][place].quantile(0.5, -1).tolist() for size in sweep]
    return exponent([size[axis] for size in sweep], medians)


def ratio(norms, name, place=slice(None)):
    """The largest ‖∇ₓf‖₂/√(mH) of a network at a place, or at any, over all its sizes, seeds and points."""
    return max((norm[place].max() / math.sqrt(m * depth)).item()
               for (other, m, depth), norm in norms.items() if other == name)


def table(norms, sweeps, args):
    """Lines of text: the medians by size, below them the exponents, at the end the largest ratios."""
    def line(head, bound, cells):
        cells = [f"{cell:>13}" for cell in cells]
        return f"{head:<14}{bound:>7} |{''.join(cells[:3])} |{''.join(cells[3:])}"

    columns = [(name, place) for place in (0, 1) for name in NETWORKS]
    trained = f"trained, R/√m = {args.radius:g}, ε = {args.eps:g}"
    yield f"{'':21} |{'at initialization':^39} |{trained:^39}".rstrip()
    for axis, sweep in enumerate(sweeps):
        head = f"{'mH'[axis]} ({'Hm'[axis]} = {sweep[0][1 - axis]})"
        yield line(head, "√(mH)", [name for name, _ in columns])
        for size in sweep:
            yield line(f"{size[axis]:>5}", f"{math.sqrt(math.prod(size)):.1f}",
                       [f"{norms[(name, *size)][place].median():.2f}" for name, place in columns])
        found = [growth(norms, sweep, axis, *column) for column in columns]
        yield line("   exponent", "0.50", [f"{slope:.2f} ±{error:.2f}" for slope, error in found])
        yield ""
    yield line("largest/√(mH)", "1", [f"{ratio(norms, *column):.2f}" for column in columns])


def summary(norms, sweeps, name):
    """What --json has of a network: its growth at initialization, a line of words, every norm."""
    found = {"name": name, "max_ratio": ratio(norms, name)}
    said = f"never above {found['max_ratio']:.2f}·√(mH). Growth at initialization:"
    for axis, letter in enumerate("mH"):
        value, error = growth(norms, sweeps[axis], axis, name, 0)
        key, low, high = f"exponent_{letter.lower()}", value - error, value + error
        found |= {key: value, f"{key}_ci": [low, high]}
        said += (f" slower than √{letter}," if high < 0.5 else
                 f" faster than √{letter}," if low > 0.5 else
                 f" consistent with √{letter}," if low > 0 else
                 f" undecided in {letter},")  # the interval has both 0 and 0.5
    sizes = [{"m": size[0], "depth": size[1], "initial, trained": norm.tolist()}
             for (other, *size), norm in norms.items() if other == name]
    return {**found, "verdict": said[:-1], "norms": sizes}


def plot(path, norms, sweeps):
    """Draw median ‖∇ₓf‖₂ against m and H: each network at initialization and, dotted, trained."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    for axis, (panel, sweep) in enumerate(zip(figure.subplots(1, 2, sharey=True), sweeps)):
        sizes = [size[axis] for size in sweep]
        panel.plot(sizes, [math.sqrt(m * depth) for m, depth in sweep], "k--", label="√(mH)")
        for i, name in enumerate(NETWORKS):
            for place, marker, said in (0, "o-", "at initialization"), (1, "s:", "trained"):
                medians = [norms[(name, *size)][place].median() for size in sweep]
                panel.plot(sizes, medians, marker, color=f"C{i}", label=f"{name}, {said}")
        panel.set(xscale="log", yscale="log", xticks=sizes, xticklabels=sizes, ylabel="median ‖∇ₓf‖₂",
                  xlabel=f"{('width m', 'depth H')[axis]} ({'Hm'[axis]} = {sweep[0][1 - axis]})")
        panel.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    figure.legend(*panel.get_legend_handles_labels(), loc="outside upper center", ncols=4)
    figure.savefig(path, dpi=200)


def parse(argv):
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add("--widths", type=integer(2), nargs="+", default=[128, 256, 512], metavar="M", help="widths m")
    add("--depths", type=integer(1), nargs="+", default=[1, 2, 4, 8], metavar="H", help="depths H")
    add("--inputs", type=integer(1), default=64, metavar="D", help="input size d, where it is fixed")
    add("--points", type=integer(1), default=8, metavar="N", help="unit vectors x for each network")
    add("--seeds", type=integer(2), default=8, metavar="N", help="networks of each size")
    add("--eps", type=number(), default=0.1, help="ε, the ℓ2 radius around x, beyond the lemma's")
    add("--radius", type=number(), default=0.1, help="R/√m, the Frobenius radius of each layer, likewise")
    add("--json", metavar="FILE", help="write every number to FILE")
    add("--plot", metavar="FILE", help="draw the norms to FILE, such as a .png or .pdf (needs matplotlib)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    args = parser.parse_args(argv)
    args.widths, args.depths = sorted(set(args.widths)), sorted(set(args.depths))
    for option, sizes in (("--widths", args.widths), ("--depths", args.depths)):
        if len(sizes) < 2:
            raise UserError(f"{option} {sizes[0]}: an exponent needs at least two different values")
    if args.widths[0] < (least := max(args.inputs, args.depths[-1] * math.log(args.depths[-1]))):
        common.warn(f"the lemma assumes m ≥ max(d, H log H), here {least:.0f}")
    for option, path in ("--json", args.json), ("--plot", args.plot):
        folder = Path(path or ".").absolute().parent
        if path and (Path(path).is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK)):
            raise UserError(f"{option} {path}: must be a file in a folder that can be written to")
    if args.plot:
        if not args.plot.endswith((".png", ".pdf", ".svg")):
            raise UserError(f"--plot {args.plot}: must be a .png, .pdf or .svg")
        import matplotlib  # noqa: F401  what is missing shows at once
    return args


def main(argv):
    args, began = parse(argv), time.perf_counter()
    if common.WORLD > 1:
        raise UserError("theory_check.py is one process: start it without torchrun, or unset WORLD_SIZE")
    generator = torch.Generator(common.pick_device(args.device)).manual_seed(0)
    middle_m, middle_depth = (values[(len(values) - 1) // 2] for values in (args.widths, args.depths))
    sweeps = [(m, middle_depth) for m in args.widths], [(middle_m, depth) for depth in args.depths]
    sizes = [*dict.fromkeys(sweeps[0] + sweeps[1])]
    norms = {(name, *size): measure(name, *size, args, generator) for name in NETWORKS for size in sizes}
    regimes = [summary(norms, sweeps, name) for name in NETWORKS]
    say("Lemma 4.2: the input gradient of a ReLU network of width m and depth H is at most c·√(mH).\n"
        f"Median ‖∇ₓf‖₂ of {args.seeds} networks at {args.points} points. lemma: its network, "
        f"{args.inputs} inputs. d=m: m inputs. fan-in: another first layer.\n")
    for line in table(norms, sweeps, args):
        say(line)
    say("")
    for regime in regimes:
        say(f"{regime['name']:>8}: {regime['verdict']}")
    ball, limits = args.radius + args.eps, [1 / (depth ** 6 * math.log(m) ** 3) for m, depth in sizes]
    said = "within" if ball <= min(limits) else "beyond" if ball > max(limits) else "partly beyond"
    say(f"Training went to R/√m + ε = {ball:g}: {said} the lemma's limit, O(1/(H⁶ (log m)³)), "
        f"which is {min(limits):.0e} to {max(limits):.0e} for a constant of 1")
    if args.plot:
        plot(args.plot, norms, sweeps)
    if args.json:
        common.write_json(args.json, {"settings": vars(args), "regimes": regimes})
    say(f"{common.duration(time.perf_counter() - began)} on {generator.device.type}")


if __name__ == "__main__":
    common.launch(main)

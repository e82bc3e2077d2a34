"""Prints the numbers on width and λ of this folder's README, from the JSON files beside it (numpy alone).

    python results/width.py
    python results/width.py --shrink data/cifar10.npz          # makes data/cifar10-16px.npz
    python results/width.py --collect MACHINE COMMIT RUN...    # puts finished runs into fitting.json

--collect reads args.json, metrics.json and log.jsonl of run folders. It replaces what the file has of a run.

width.json has networks of 2,000 training images, which they do not fit, fitting.json of 500. ± and
[low, high] are 95 % intervals, by Student over seeds where nothing else is said. A difference is width 4 −
width 1, paired by seed. λ* is the top of the parabola of robust accuracy in log λ. The ratio is λ* of width 4
over that of width 1.
"""
import json
import math
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
METRICS = {"natural": ("natural_accuracy", 100), "robust": ("robust_accuracy", 100),  # name: (key, scale)
           "stability": ("perturbation_stability", 100), "Lipschitz": ("local_lipschitzness", 1),
           "risk": ("natural_risk", 1), "reg × 1000": ("robust_regularization", 1000)}  # of the epoch
OLD, NEW = (3, 6, 12, 18, 27, 40), (2, 4, 8, 16, 32, 64)  # λ of the two sweeps


def student(df):
    """Student's 97.5 % point. t = √df·tan θ, where θ has a density in proportion to cos(θ)^(df - 1)."""
    angle = np.linspace(0, math.pi / 2, 100_001)
    share = np.cumsum(np.cos(angle) ** (df - 1))
    return math.sqrt(df) * math.tan(angle[np.searchsorted(share, 0.95 * share[-1])])


def over_seeds(values):
    """Mean and half the interval of values [seed, ...]; of one seed there is no interval (nan)."""
    n = len(values)
    half = student(n - 1) * np.std(values, 0, ddof=1) / math.sqrt(n) if n > 1 else np.nan * values[0]
    return np.mean(values, 0), half


def parabolas(x, y):
    """a, b, c [...] of the least-squares a·x² + b·x + c of y [..., len(x)]."""
    return np.moveaxis(y @ np.linalg.pinv(np.vander(x, 3)).T, -1, 0)


def tops(x, y):
    a, b, _ = parabolas(x, y)
    return np.where(a < 0, -b / (2 * a), np.nan)


def propagated(x, y):
    """Half the interval of the ratio's log, of y [width, seed, len(x)]; each top's error; residuals' sd.

    The errors are the delta method's, with the variance of residuals pooled over widths and seeds.
    """
    design, fits = np.vander(x, 3), parabolas(x, y)
    df = y.shape[0] * y.shape[1] * (len(x) - 3)
    variance = ((y - np.moveaxis(fits, 0, -1) @ design.T) ** 2).sum() / df
    a, b, _ = fits
    gradient = np.stack([b / (2 * a * a), -1 / (2 * a), 0 * a], -1)  # of -b/2a
    each = variance * np.einsum("...i,ij,...j", gradient, np.linalg.inv(design.T @ design), gradient)
    return student(df) * math.sqrt(each.sum()) / y.shape[1], np.sqrt(each), math.sqrt(variance)


def one_curvature(x, y):
    """Tops of y [width, seed, len(x)] where parabolas share one a; half the interval by that fit's error."""
    n, curves = y[..., 0].size, y.ravel()
    design = np.hstack([np.tile(x * x, n)[:, None], np.kron(np.eye(n), np.vander(x, 2))])  # a; b, c of each
    fit = np.linalg.lstsq(design, curves, rcond=None)[0]
    df = curves.size - len(fit)
    covariance = np.linalg.inv(design.T @ design) * ((curves - design @ fit) ** 2).sum() / df
    top, sign, gradient = -fit[1::2] / (2 * fit[0]), np.repeat([-2 / n, 2 / n], n // 2), 0 * fit
    gradient[0], gradient[1::2] = -(sign @ top) / fit[0], -sign / (2 * fit[0])  # of sign @ top
    return top.reshape(y.shape[:2]), student(df) * math.sqrt(gradient @ covariance @ gradient)


def ratio(top, half=None):
    """The ratio and its interval, of the tops [width, seed] of log λ; by Student unless `half` is given."""
    mean, own = over_seeds(top[1] - top[0])
    half = own if half is None else half
    return np.exp([mean, mean - half, mean + half])


def beside(x, y, other_x, other_y):
    """other_y − y at equal x where both curves reach; the other curve is interpolated linearly."""
    order, inside = np.argsort(other_x), (x >= other_x.min()) & (x <= other_x.max())
    return np.interp(x[inside], other_x[order], other_y[order]) - y[inside]


def read(name):
    return json.loads((HERE / name).read_text()) if (HERE / name).exists() else []


def arrays(rows, lambdas):
    """{metric: [widths 1 and 4, seed, λ]} in the units that are printed, and the seeds that are whole."""
    table = {(row["run"]["width"], row["run"]["seed"], row["run"]["beta"]): values_of(row) for row in rows}
    assert len(table) == len(rows), "two rows of one width, seed and λ"
    seeds = [seed for seed in sorted({seed for _, seed, _ in table})
             if all((width, seed, beta) in table for width in (1, 4) for beta in lambdas)]
    return {name: np.array([[[table[width, seed, beta].get(name, math.nan) for beta in lambdas]
                             for seed in seeds] for width in (1, 4)]) for name in METRICS}, seeds


def values_of(row):
    found = {**row["results"], **row.get("training", {})}
    return {name: scale * found[key] for name, (key, scale) in METRICS.items() if key in found}


def show(row):
    print(row["path"].rpartition("/")[2], *(f"{name} {value:.2f}" for name, value in values_of(row).items()))


def shrink(path):
    data = dict(np.load(path))
    for name in "x_train", "x_test":
        data[name] = data[name].reshape(-1, 16, 2, 16, 2, 3).mean((2, 4)).round().astype("uint8")
    np.savez(Path(path).with_name("cifar10-16px.npz"), **data)


def collect(machine, commit, *paths):
    rows = {row["path"]: row for row in read("fitting.json")}
    for path in (path for path in map(Path, paths) if (path / "metrics.json").exists()):
        run, metrics = (json.loads((path / name).read_text()) for name in ("args.json", "metrics.json"))
        log = [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
        for weights, found in metrics.items():
            entry, keys = log[found["epoch"] - 1], [key for key, _ in METRICS.values()]
            settings = {key: value for key, value in run.items() if value is not None and value is not False}
            rows[f"{path.name}-{weights}"] = {
                "path": f"{path.name}-{weights}",
                "run": {**settings, "weights": weights, "epoch": found["epoch"]},
                "evaluation": {"dataset": run["dataset"], "data": run["data"],
                               **{key: found[key] for key in ("attack", "precision", "n")}},
                "results": {key: round(found[key], 4) for key in keys[:4]},
                "training": {key: round(entry[key], 5) for key in keys[4:]},
                "made": {"machine": machine, "precision": run["precision"], "convolution": "PyTorch's",
                         "commit": commit}}
    order = sorted(rows.values(), key=lambda row: [row["run"][key] for key in ("seed", "beta", "width")])
    text = ",\n".join(json.dumps(row, ensure_ascii=False) for row in order)
    (HERE / "fitting.json").write_text(f"[\n{text}\n]\n")


def differences(table, lambdas):
    """Means of each width and differences, as a Markdown table, and what all λ together say of each."""
    print("| |", " | ".join(f"λ = {beta}" for beta in lambdas), "| mean |")
    for name, (_, scale) in METRICS.items():
        digits, change = 1 if name == "Lipschitz" else 3 if scale == 1 else 2, np.diff(table[name], axis=0)[0]
        for what, values in ("width 1", table[name][0]), ("width 4", table[name][1]), ("4 − 1", change):
            cells = [*zip(*over_seeds(values)), over_seeds(values.mean(1))]
            print(f"| {name}, {what} |",
                  " | ".join(f"{mean:.{digits}f} ±{half:.{digits}f}" for mean, half in cells), "|")
        df = change.size - len(lambdas)
        pooled = student(df) * math.sqrt(change.var(0, ddof=1).mean() / len(change)) if df else math.nan
        print(f"    with the error pooled over λ ±{pooled:.{digits}f} at each;",
              f"above 0 in {(change > 0).sum()} of {change.size} pairs")


def like_pairs(rows):
    """Mean differences of those pairs that one machine made, in one precision and convolution."""
    table = {(row["run"]["seed"], row["run"]["beta"], row["run"]["width"]): row for row in rows}
    pairs = [(table[seed, beta, 1], table[seed, beta, 4]) for seed, beta, width in table if width == 1]
    like = [[values_of(row) for row in pair] for pair in pairs if pair[0]["made"] == pair[1]["made"]]
    print(f"{len(like)} of {len(pairs)} pairs are made alike:",
          *(f"{name} {np.mean([four[name] - one[name] for one, four in like]):+.2f}"
            for name in ("natural", "robust", "stability")))


def by_width(what, change):
    """A change [widths 1 and 4, seed], each width's mean."""
    print(f"{what}, widths 1 and 4:", *(f"{mean:+.2f} ±{half:.2f}" for mean, half in zip(*over_seeds(change.T))))


def within(table):
    """What a larger λ does at each width, and the difference in stability in parts."""
    natural, robust, stable = [*table.values()][:3]
    for name, values in ("stability", stable), ("natural", natural), ("robust", robust):
        by_width(f"{name} from the first λ to the last", values[..., -1] - values[..., 0])
    right, wrong = 100 * robust / natural, 100 * (stable - robust) / (100 - natural)  # those that stay
    for what, part in (("more right images", np.diff(natural, axis=0) * (right - wrong).mean(0) / 100),
                       ("right images that stay", np.diff(right, axis=0) * natural.mean(0) / 100),
                       ("wrong ones that stay", np.diff(wrong, axis=0) * (1 - natural.mean(0) / 100))):
        print("difference in stability by {}: {:+.1f} ±{:.1f}".format(what, *over_seeds(part[0].mean(1))))


def old_ratio(robust):
    """Every analysis of the ratio. The sweep's own rule was the first one."""
    lambdas, x = np.array(OLD), np.log(OLD)
    top, (half, errors, sd) = tops(x, robust), propagated(x, robust)
    for i, width in enumerate((1, 4)):
        print(f"width {width}: λ* {np.exp(top[i]).round(1)}, error of its log {errors[i].round(2)},",
              f"the highest measured is at {lambdas[robust[i].argmax(1)]}")
    print(f"the widths' log λ* correlate by {np.corrcoef(top)[0, 1]:.4f}; residuals' sd {sd:.2f} points")
    same, error = one_curvature(x, robust)
    grid = np.linspace(x[0], x[-1], 20_001)
    cubic = [[grid[np.polyval(np.polyfit(x, y, 3), grid).argmax()] for y in curves] for curves in robust]
    analyses = [("Student over seeds", top, None), ("error propagated", top, half),
                ("one curvature, Student", same, None), ("one curvature, propagated", same, error),
                ("cubic, its highest point from 3 to 40", np.array(cubic), None),
                ("parabola in √λ", 2 * np.log(tops(np.sqrt(lambdas), robust)), None),
                ("parabola in λ", np.log(tops(lambdas, robust)), None)]
    for i, beta in enumerate(OLD):
        part = np.delete(x, i), np.delete(robust, i, 2)
        analyses += [(f"without λ = {beta}, Student", tops(*part), None),
                     (f"without λ = {beta}, propagated", tops(*part), propagated(*part)[0])]
    for name, top, half in analyses:
        print("ratio, {}: {:.2f} [{:.2f}, {:.2f}]".format(name, *ratio(top, half)))
    high = np.array([ratio(top, half)[2] for _, top, half in analyses])
    print(f"of {len(high)} intervals {(high < 1.25).sum()} lie below 1.25, {(high < 1).sum()} below 1")


def secondary(table, lambdas):
    """What stability goes with, and what is left of a difference where the widths have something equal."""
    x, (natural, robust, stable) = np.log(lambdas), [*table.values()][:3]
    seeds = range(natural.shape[1])
    if (np.diff(stable) > 0).all():  # else λ of a stability is not one number
        times = np.array([beside(stable[0, s], x, stable[1, s], x).mean() for s in seeds])
        print("as stable as width 1, width 4 needs λ times",
              "{:.2f} [{:.2f}, {:.2f}]".format(*ratio([0, times])))
    ranks = [values.ravel().argsort().argsort() for values in (stable, table["Lipschitz"])]
    print(f"Spearman of stability and Lipschitzness, {ranks[0].size} runs: {np.corrcoef(ranks)[0, 1]:.3f}")
    log, mean = np.log(table["Lipschitz"].mean(1)), stable.mean(1)
    gap = -beside(log[1], mean[1], log[0], mean[0])
    print("difference in stability at equal Lipschitzness (of means):", *np.sort(gap).round(1))
    gain = [beside(natural[0, s], robust[0, s], natural[1, s], robust[1, s]).mean() for s in seeds]
    print("difference in robust accuracy at equal natural accuracy, by seed:", *np.round(gain, 1))
    print("stability rises at", (np.diff(stable) > 0).sum(), f"of {np.diff(stable).size} steps of λ")


def old_others(table, logs):
    """Fig. 7, CW, AutoAttack, a λ that follows the width, PreActResNet."""
    for key, sign, word in ("natural_risk", -1, "lower"), ("robust_regularization", 1, "higher"):
        pairs = [[logs[f"w{width}-beta{beta}-seed{seed}"][key] for width in (1, 4)]
                 for beta in OLD for seed in (1, 2, 3)]
        epochs = (sign * np.diff(pairs, axis=1) > 0).sum(2)
        print(f"{key} of width 4 is {word} in {epochs.min()} to {epochs.max()} of 60 epochs, 18 pairs")
    cw, seeds = arrays(read("width-cw.json"), OLD)
    top, below = tops(np.log(OLD), cw["robust"]), table["robust"][:, np.array(seeds) - 1] - cw["robust"]
    print(f"CW-20, seeds {seeds}: λ* of widths 1 and 4 {np.exp(top).round(1).tolist()},",
          f"robust accuracy {below.min():.1f} to {below.max():.1f} points below PGD-20's")
    for row in read("width-autoattack.json"):
        print("1,000 images:", *(f"{key} {row[key]:g}" for key in row if isinstance(row[key], (int, float))))
    for row in read("width-others.json"):
        show(row)
    beta = logs["auto-w4-from-w1-beta18-seed3"]["beta"]
    print(f"λ of auto: {beta[0]:.1f} at first, {beta[-1]:.1f} at last, on average {np.mean(beta):.1f}")


def have_tops(x, robust):
    return ((tops(x, robust) >= x[0]) & (tops(x, robust) <= x[-1])).all()  # nan is neither


def rule(x, robust):
    """The rule of "The next sweep" for robust [width, seed, λ]: the ratio's log, its two half intervals."""
    if not have_tops(x, robust):
        robust = robust.mean(1, keepdims=True)  # counts as one seed, so 6 degrees of freedom
    mean, own = over_seeds(np.diff(tops(x, robust), axis=0)[0])
    return mean, own, propagated(x, robust)[0] if have_tops(x, robust) else math.inf


def new_ratio(table, seeds):
    """The verdict by these seeds; no word unless they are 1 to 3, or all five."""
    robust, x, at_8 = table["robust"], np.log(NEW), table["risk"][1, :, NEW.index(8)]
    print(f"seeds {seeds}: λ* of width 1, width 4:", np.exp(tops(x, robust)).round(1).tolist())
    if not have_tops(x, robust):
        print("not each has a top from 2 to 64: averaged over seeds, so no error between seeds counts below")
    mean, own, error = rule(x, robust)
    low, high = (mean + sign * np.fmax(own, error) for sign in (-1, 1))
    words = ["held"] * bool(low > 0) + ["growth excluded"] * bool(high < math.log(1.25))
    verdict = " and ".join(words) or "undecided" if (at_8 <= 0.7).all() else "void"
    print("ratio {:.2f} [{:.2f}, {:.2f}]; halves of its log's interval:".format(*np.exp([mean, low, high])),
          f"Student {own:.2f}, propagated {error:.2f}; training risk of width 4 at λ = 8: {at_8.round(2)}")
    if seeds in ([1, 2, 3], [1, 2, 3, 4, 5]):
        print(f"verdict: {verdict}")
        return verdict


def main():
    print("== 2,000 training images: width.json, of commit c84b551")
    rows, logs = read("width.json"), read("width-logs.json")
    for row in rows:
        row["training"] = {key: values[-1] for key, values in logs[row["path"].rpartition("/")[2]].items()}
    table, _ = arrays(rows, OLD)
    differences(table, OLD)
    like_pairs(rows)
    old_ratio(table["robust"])
    secondary(table, OLD)
    within(table)
    old_others(table, logs)

    rows = read("fitting.json")
    bf16 = [row for row in rows if row["run"]["precision"] == "bf16"]
    last, best = ([row for row in bf16 if row["run"]["weights"] == which] for which in ("last", "best"))
    table, seeds = arrays(last, NEW)
    print(f"\n== 500 training images: fitting.json, commit 76dca61; {len(last)} runs, whole seeds: {seeds}")
    for row in rows if len(seeds) < 3 or len(rows) > len(bf16) else []:
        show(row)
    chosen = seeds if len(seeds) > 2 else [1, 2, 3]
    done = [beta for beta in NEW if all({*chosen} <= {*arrays(some, [beta])[1]} for some in (last, best))]
    if done:
        at_last, at_best = (arrays([row for row in some if row["run"]["seed"] in chosen], done)[0]
                            for some in (last, best))
        for which, part in ("last", at_last), ("best", at_best):
            print(f"{which} epoch, seeds {chosen}:")
            differences(part, done)
            within(part)
        for name in "natural", "robust", "stability", "Lipschitz":
            change = (at_last[name] - at_best[name]).mean(2)
            by_width(f"last − best epoch, {name}", change)
            print("    ... 4 − 1: {:+.2f} ±{:.2f}".format(*over_seeds(change[1] - change[0])))
    if seeds:
        three = [seed for seed in seeds if seed < 4]
        first = new_ratio({name: values[:, :len(three)] for name, values in table.items()}, three)
        if first == "undecided" and len(seeds) > 3:
            new_ratio(table, seeds)
        secondary(table, NEW)


if __name__ == "__main__":
    {"--collect": collect, "--shrink": shrink}.get("".join(sys.argv[1:2]), main)(*sys.argv[2:])

"""The paper's three metrics for any checkpoints, as tables and as figures (Figs. 5-9; Apps. C, G and H).

    python eval.py runs/*                                                      # PGD-20 at ε = 0.031, each run's best.pt
    python eval.py model.pt --attack pgd cw autoattack --json results.json     # a published checkpoint, on CIFAR-10
    python eval.py runs/* results.json --attack none --plot figures            # figures, without attacking again

A PATH is a run folder (its best.pt), a checkpoint of ours or a published one, or a file that --json wrote before, whose
rows join the tables and figures. Architecture, depth and width are read off the parameters; the data set comes from
the checkpoint's settings. Every attack but AutoAttack counts its last iterate x̂, the worst case over --restarts.

natural accuracy P[f(x)=y]; robust accuracy P[f(x̂)=y]; stability P[f(x̂)=f(x)]; label-free stability: the same with
misclassified images attacked away from f(x), because an attack away from y has nothing to gain there.
"""
import csv
import importlib
import io
import math
import re
import time
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

import common
from common import UserError, say

METRICS = {"natural_accuracy": "natural", "robust_accuracy": "robust", "perturbation_stability": "stability",
           "label_free_stability": "label-free"}
EPS, STEP_SIZE = {"linf": 0.031, "l2": 0.5}, {"linf": 0.003, "l2": 0.05}  # 20 steps can cross the ball
WRAPPERS = ("state_dict", "model_state_dict", "net", "model")  # where published checkpoints keep their parameters
AUTOATTACK = "pyautoattack"  # on PyPI, by AutoAttack's authors


def arguments(argv):
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add("paths", nargs="*", metavar="PATH", help="run folder, checkpoint, or a file that --json wrote")
    add("--attack", nargs="+", choices=("pgd", "cw", "fgsm", "autoattack", "none"), default=["pgd"],
        help="pgd: on cross-entropy; cw: PGD on the margin; fgsm: one step of ε; none: no evaluation, for --plot")
    add("--steps", type=common.integer(0), default=20, help="attack steps of pgd and cw")
    add("--step-size", type=common.number(), help="attack step; by default 0.003 (linf) or 0.05 (l2)")
    add("--eps", type=common.number(), help="radius, in pixel range [0, 1]; 8/255 works; by default 0.031 or 0.5 (l2)")
    add("--norm", choices=("linf", "l2"), default="linf", help="norm of the ball that an attack stays in")
    add("--start", choices=("uniform", "gaussian", "none"), help="where an attack starts; by default uniform, for fgsm none")
    add("--restarts", type=common.integer(), default=1, help="a point counts as stable if it survives all of them")
    add("--seed", type=common.integer(0), default=0, help="seeds the attacks")
    add("--seeds", type=common.integer(), default=1, help="repeat each attack with that many seeds and give the mean")
    add("--arch", choices=("wrn", "densenet"), help="WideResNet or DenseNet-BC; by default, as the parameters are")
    add("--depth", type=common.integer(), help="layers; by default, as the parameters are")
    add("--width", type=common.integer(), help="widening factor or growth rate; by default, as the parameters are")
    add("--classes", type=common.integer(), help="outputs of the network; by default, the classes of the data set")
    add("--mean", nargs=3, type=common.number(), metavar=("R", "G", "B"), help="for a network that expects (x - mean) / std")
    add("--std", nargs=3, type=common.number(above=True), metavar=("R", "G", "B"), help="see --mean")
    add("--dataset", metavar="NAME", help="by default the checkpoint's, else cifar10; or synthetic, cifar100, ...")
    add("--data-dir", metavar="DIR", help="where data sets are; by default the checkpoint's, else data")
    add("--eval-size", type=common.integer(), metavar="N", help="a random subset of N test images; by default all")
    add("--lipschitz-size", type=common.integer(0), default=1000, metavar="N", help="images for local Lipschitzness")
    add("--batch-size", type=common.integer(), default=128, help="images an attack handles at once")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--precision", choices=("auto", "fp32", "bf16"), default="fp32", help="of attacks; predictions are always fp32")
    add("--compile", choices=("auto", "on", "off"), default="off", help="torch.compile; auto: on a CUDA device")
    for kind in ("json", "csv", "markdown"):
        add(f"--{kind}", metavar="FILE", help=f"write the results as {kind} too")
    add("--save-points", metavar="FILE.npz", help="write every image's label and predictions")
    add("--merge-seeds", action="store_true", help="in tables and figures, runs whose names differ in -seed<s> alone as "
        "one: means, and ± is then half their range")
    add("--plot", metavar="DIR", help="draw the figures there, with matplotlib")
    args = parser.parse_args(argv)
    if not (args.paths or args.plot):
        parser.error("give a PATH to evaluate, or --plot")
    args.attack = [name for name in dict.fromkeys(args.attack) if name != "none"]
    args.eps = EPS[args.norm] if args.eps is None else args.eps
    args.step_size = STEP_SIZE[args.norm] if args.step_size is None else args.step_size
    return args


# ------------------------------------------------------------------------------------------------------- loading


def locate(path):
    """The file to read for a PATH: a run folder's best.pt, the paper's choice, or last.pt if no epoch was monitored."""
    candidates = [path / "best.pt", path / "last.pt"] if path.is_dir() else [path]
    found = next((file for file in candidates if file.exists()), None)
    if found is None:
        raise UserError(f"{path} is a folder without best.pt or last.pt" if path.is_dir() else f"{path}: no such file")
    return found


def architecture(state, source):
    """{"arch", "depth", "width", "classes"} of a state_dict with the names of our networks; UserError otherwise."""
    try:
        layers = len({key.split(".")[2] for key in state if key.startswith("block1.layer.")})
        arch = "densenet" if "trans1.conv1.weight" in state else "wrn"
        channels = len(state["block1.layer.0.conv2.weight"])  # 16k in a WideResNet, k in a DenseNet
        return {"arch": arch, "depth": 6 * layers + 4, "width": channels // 16 if arch == "wrn" else channels,
                "classes": len(state["fc.bias"])}
    except (KeyError, TypeError):  # other names, or no tensors
        raise UserError(f"{source} holds no WideResNet or DenseNet-BC with the parameter names of the TRADES release "
                        f"(conv1, block1.layer.0.bn1, ...)") from None


def load(file, args, device):
    """(model, Data, facts) of a checkpoint: ours, or a published one that is plain or in a wrapper."""
    state = saved = common.read_checkpoint(file)
    while isinstance(state, dict) and (key := next((k for k in WRAPPERS if isinstance(state.get(k), dict)), None)):
        state = state[key]
    state = {key.removeprefix("module."): value for key, value in state.items()} if isinstance(state, dict) else {}
    mean, std = args.mean, args.std
    if "0.mean" in state:  # RST's networks with `normalize_input`: a Sequential of the normalization and the network
        mean, std = state.pop("0.mean").flatten().tolist(), state.pop("0.std").flatten().tolist()
        state = {key.removeprefix("1."): value for key, value in state.items()}

    network = {key: getattr(args, key) or value for key, value in architecture(state, file).items()}
    settings = saved.get("args", {})
    dataset = args.dataset or settings.get("dataset", "cifar10")
    data = load_data(dataset, args.data_dir or settings.get("data_dir", "data"), device)
    network["classes"] = args.classes or data.classes
    if network["classes"] < data.classes:
        raise UserError(f"--classes {args.classes}: {dataset} has {data.classes}")
    model = common.build_model(**network)
    common.load_weights(model, state, file)
    common.execute(model, device, args.precision, args.compile)
    if mean or std:
        mean, std = mean or [0.0] * 3, std or [1.0] * 3
        mean, std = (torch.tensor(value, device=device).view(1, 3, 1, 1) for value in (mean, std))
        model.register_forward_pre_hook(lambda _, inputs: ((inputs[0] - mean) / std,))
    kept = {key: settings.get(key) for key in ("method", "beta", "seed")}
    return model, data, {"dataset": dataset, **network, **kept, "epoch": saved.get("epoch")}


load_data = lru_cache(maxsize=1)(common.load_data)  # runs to compare mostly share their data


# ------------------------------------------------------------------------------------------------------- attacks


def settings_of(name, args):
    """The settings of attack `name`, as they are used and as they are reported."""
    if name == "autoattack":
        return {"norm": args.norm, "eps": args.eps, "precision": "fp32"}
    start = args.start or ("none" if name == "fgsm" else "uniform")
    steps, step_size = (1, args.eps) if name == "fgsm" else (args.steps, args.step_size)
    return {"norm": args.norm, "eps": args.eps, "step_size": step_size, "steps": steps, "start": start,
            "restarts": 1 if start == "none" else args.restarts, "precision": args.precision}


def predictions(model, x, batch_size):
    """f(x) [N] of uint8 images x [N, 3, H, W]."""
    return torch.cat([common.predict(model, images)[:n] for images, _, n in common.padded_batches(x, x, batch_size)])


def attacked_predictions(model, x, labels, natural, name, settings, batch_size, seed):
    """f(x̂) [N] of uint8 images x [N, 3, H, W] attacked away from labels [N], where natural [N] is f(x).

    Over restarts it is the first prediction that differs from f(x), if any does. A point is finished then, correct or
    not, so each restart attacks the points still stable, gathered anew into full batches.
    """
    if name == "autoattack":
        return autoattack(model, x, labels, batch_size, seed, settings)
    loss = common.margin_to if name == "cw" else common.cross_entropy_to
    how = {key: settings[key] for key in ("eps", "step_size", "steps", "start", "norm")}
    adversarial, stable = natural.clone(), torch.arange(len(x), device=x.device)
    for restart in range(settings["restarts"]):
        with common.fixed_seed(seed + 1_000_000 * restart, x.device):  # restart r is the same whatever their number
            found = []
            for images, target, n in common.padded_batches(x[stable], labels[stable], batch_size):
                found.append(common.predict(model, common.pgd(model, images, loss(target), **how))[:n])
                common.show(f"restart {restart + 1}/{settings['restarts']}  {len(found) * batch_size:,} of {len(stable):,}")
        adversarial[stable] = torch.cat(found) if found else natural[stable]
        stable = stable[adversarial[stable] == natural[stable]]
    return adversarial


def autoattack(model, x, labels, batch_size, seed, settings):
    """f(x̂) [N] under the standard AutoAttack (Croce & Hein 2020), which leaves alone the points where f(x) ≠ labels."""
    if not len(x):
        return labels
    norm = {"linf": "Linf", "l2": "L2"}[settings["norm"]]
    classes = model.fc.out_features
    if classes < 4:
        raise UserError(f"AutoAttack needs four classes, the network has {classes}; choose another --attack")
    compiled, model._compiled_call_impl = model._compiled_call_impl, None  # its batches shrink: a new shape each time
    with common.fixed_seed(seed, x.device), common.attack_mode(model), common.exact_precision(model):
        attack = optional(AUTOATTACK, "--attack autoattack").AutoAttack(
            model, norm=norm, eps=settings["eps"], seed=seed, device=x.device)
        attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = min(9, classes - 1)
        model.to(memory_format=torch.contiguous_format)  # the package views gradients as rows, which channels_last forbids
        found = attack.run_standard_evaluation(common.to_float(x).contiguous(), labels, batch_size=batch_size)[1]
        model.to(memory_format=torch.channels_last)
    model._compiled_call_impl = compiled
    return found


def optional(package, purpose):
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(f"{purpose} needs the package {package}: pip install {package}") from None


# ------------------------------------------------------------------------------------------------------- metrics


def wilson(p, n, z=1.959964):
    """The 95 % interval [low, high] (Wilson 1927) of a fraction p of n independent images."""
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return [max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))]


def evaluate(model, x, y, name, args):
    """(metrics, points) of one model under attack `name`: means over --seeds, and every image's predictions."""
    natural = predictions(model, x, args.batch_size)
    wrong = (natural != y).nonzero()[:, 0]
    settings = settings_of(name, args)
    runs, points = [], {"label": y, "natural": natural, "adversarial": [], "label_free": []}
    for seed in range(args.seed, args.seed + args.seeds):
        how = name, settings, args.batch_size, seed
        adversarial = attacked_predictions(model, x, y, natural, *how)
        label_free = adversarial.clone()  # where f(x) = y the two attacks are one
        label_free[wrong] = attacked_predictions(model, x[wrong], natural[wrong], natural[wrong], *how)
        if name == "autoattack":  # it has not attacked the misclassified images yet
            adversarial = label_free
        stability = common.three_metrics(y, natural, label_free)["perturbation_stability"]
        runs.append({**common.three_metrics(y, natural, adversarial), "label_free_stability": stability})
        points["adversarial"].append(adversarial)
        points["label_free"].append(label_free)
    metrics = {**settings, "attack_seed": args.seed, "seeds": args.seeds, "n": len(y)}
    for key in METRICS:
        values = [run[key] for run in runs]
        metrics[key] = sum(values) / len(values)
        metrics[f"{key}_ci"] = wilson(metrics[key], len(y))
        if args.seeds > 1:
            metrics[f"{key}_seeds"] = values
    return metrics, {key: torch.stack(value) if isinstance(value, list) else value for key, value in points.items()}


def evaluate_all(args, results, points):
    """Append to `results` and `points` for each path and attack, and write the files asked for after each."""
    device = common.pick_device(args.device)
    args.precision = common.pick_precision(args.precision, device)
    located = [(path, locate(Path(path))) for path in args.paths if args.attack or path.endswith(".json")]
    for path, file in located:
        if file.suffix == ".json":
            results.extend(earlier_results(file))
        else:
            model, data, facts = load(file, args, device)
            chosen = data.test_subset(args.eval_size)
            x, y = data.x_test[chosen], data.y_test[chosen]
            lipschitz = {}
            if args.lipschitz_size:
                radius = args.eps if args.norm == "linf" else EPS["linf"]
                some = x[:args.lipschitz_size]
                lipschitz = {"local_lipschitzness": common.local_lipschitzness(
                    model, some, eps=radius, batch_size=args.batch_size, **common.REPORT_ATTACK), "lipschitz_n": len(some)}
            for name in args.attack:
                began = time.perf_counter()
                metrics, outcome = evaluate(model, x, y, name, args)
                row = {"path": path, "checkpoint": str(file), "attack": name, **metrics, **lipschitz, **facts,
                       "seconds": round(time.perf_counter() - began, 2)}
                results.append(row)
                points.append({"path": path, "attack": name, "index": chosen, **outcome})
                write_results(args, results, points)
                say(f"{path}: {column(row)}  {common.describe(row)}  {common.duration(row['seconds'])}")


def earlier_results(file):
    rows = common.read_json(file)
    if not (isinstance(rows, list) and all(isinstance(row, dict) and {"path", "attack", "n", *METRICS} <= row.keys()
                                           for row in rows)):
        raise UserError(f"{file} is not a list of results that eval.py --json wrote")
    return rows


# ------------------------------------------------------------------------------------------------ files and tables


def column(row):
    """A short name of a row's attack: PGD-20, FGSM, CW-20×5 l2, ..."""
    name = {"autoattack": "AutoAttack"}.get(row["attack"], row["attack"].upper())
    steps = f"-{row['steps']}" if row["attack"] in ("pgd", "cw") else ""
    restarts = f"×{row['restarts']}" if row.get("restarts", 1) > 1 else ""
    return name + steps + restarts + (" l2" if row["norm"] == "l2" else "")


def grid(results, merged=False):
    """The results as rows of text, the header first: a line per model, columns per attack, in percent."""
    results = merge_seeds(results) if merged else results
    columns = list(dict.fromkeys(map(column, results)))
    models = {}
    for row in results:
        models.setdefault((row["path"], row["n"]), {})[column(row)] = row
    table = [["model", *(["runs"] if merged else []), "n", "natural"]
             + [f"{name} {METRICS[key]}" for name in columns for key in list(METRICS)[1:]] + ["local Lipschitzness"]]
    for (path, n), rows in models.items():
        row = next(iter(rows.values()))
        table.append([path, *([str(row["runs"])] if merged else []), str(n), percent(row, "natural_accuracy")]
                     + [percent(rows.get(name), key) for name in columns for key in list(METRICS)[1:]]
                     + [with_interval(row, "local_lipschitzness")])
    return table


def merge_seeds(results):
    """The results, those of runs whose names differ in -seed<s> alone as one row: means, the range as the interval."""
    experiments = {}
    for row in results:
        name = re.sub(r"-seed\d+", "", row["path"])
        experiments.setdefault((name, column(row), row["n"]), {})[row["path"]] = row
    merged = []
    for (name, *_), runs in experiments.items():
        rows = list(runs.values())
        merged.append({**rows[0], "path": name, "runs": len(rows)})
        for key in (*METRICS, "local_lipschitzness"):
            if len(rows) > 1 and all(key in row for row in rows):
                values = [row[key] for row in rows]
                merged[-1].update({key: sum(values) / len(values), f"{key}_ci": [min(values), max(values)]})
    return merged


def with_interval(row, key, scale=1):
    """scale·row[key] and half its interval, such as "12.34 ±0.56"; "" where there is none."""
    if row is None or row.get(key) is None:
        return ""
    low_high = row.get(f"{key}_ci")
    return f"{scale * row[key]:.2f}" + (f" ±{scale * (low_high[1] - low_high[0]) / 2:.2f}" if low_high else "")


def percent(row, key):
    return with_interval(row, key, 100)


def text_table(table):
    """Aligned lines; a column's title is split over two of them."""
    titles = [title.rpartition(" ") for title in table[0]]
    lines = [[first for first, _, _ in titles], [last for _, _, last in titles], *table[1:]]
    widths = [max(map(len, cells)) for cells in zip(*lines)]
    formats = [f"{{:{'>' if i else '<'}{width}}}" for i, width in enumerate(widths)]  # the model's name to the left
    return "\n".join("  ".join(formats).format(*line) for line in lines)


def markdown_table(table):
    lines = [table[0], ["---"] + ["---:"] * (len(table[0]) - 1), *table[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def csv_table(results):
    """One line per model and attack; [low, high] becomes two columns, lists of seeds one text."""
    flat = []
    for row in results:
        flat.append({})
        for key, value in row.items():
            if key.endswith("_ci"):
                flat[-1][f"{key}_low"], flat[-1][f"{key}_high"] = value
            else:
                flat[-1][key] = " ".join(map(str, value)) if isinstance(value, list) else value
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in flat for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def output_files(args):
    """Make the folders that results go to, so that a mistyped name shows before an hour of attacks and not after."""
    for file in (args.json, args.csv, args.markdown, args.save_points):
        if file and Path(file).is_dir():
            raise UserError(f"{file} is a folder; name a file in it")
        if file:
            Path(file).parent.mkdir(parents=True, exist_ok=True)


def write_results(args, results, points):
    """Replace the files asked for by what is finished so far; each is whole at every moment."""
    if args.json:
        common.write_json(args.json, results)
    if args.csv:
        common.write_file(args.csv, csv_table(results).encode())
    if args.markdown:
        common.write_file(args.markdown, markdown_table(grid(results, args.merge_seeds)).encode())
    if args.save_points and points:
        arrays = {key: np.array([entry[key] for entry in points]) for key in ("path", "attack")}
        for i, entry in enumerate(points):  # label_0 [n], adversarial_0 [seeds, n], ...: of path[0] under attack[0]
            arrays.update({f"{key}_{i}": value.cpu().numpy() for key, value in entry.items() if key not in arrays})
        content = io.BytesIO()
        np.savez_compressed(content, **arrays)
        common.write_file(args.save_points, content.getbuffer())


# ------------------------------------------------------------------------------------------------------- figures

WIDTH = 3.3  # inches: one column of a two-column paper
BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
COLOURS = (BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, "black")  # Okabe & Ito 2008: distinct to the colour-blind too
MARKERS = "osD^vPX"


def plot(args, results):
    """Every figure that the results and the run folders among the paths have something for, as PNG files."""
    folder = Path(args.plot)
    folder.mkdir(parents=True, exist_ok=True)
    draw(folder / "schedules.png", schedules_figure, 1.9)
    merged = merge_seeds(results)
    for name in dict.fromkeys(map(column, results)):
        rows = [row for row in (merged if args.merge_seeds else results) if column(row) == name]
        label = name.lower().replace(" ", "-").replace("×", "x")
        draw(folder / f"metrics-{label}.png", metrics_figure, 0.75 + 0.42 * len(rows), rows, name)
        groups = group([row for row in merged if column(row) == name and row.get("beta") is not None])
        for key, runs in groups.items():
            if len({row["width"] for row in runs}) > 1:
                draw(folder / f"width-{label}-{key}.png", width_figure, 5.4, runs, name)
    runs = [{**common.read_json(Path(path) / "args.json"), "log": common.read_log(Path(path) / "log.jsonl")}
            for path in args.paths if (Path(path) / "args.json").exists()]
    for key, members in group([run for run in runs if run["log"] and {"beta", "width"} <= run.keys()]).items():
        betas = sorted({run["beta"] for run in members})
        draw(folder / f"training-{key}.png", training_figure, 0.5 + 1.3 * len(betas), members, betas)


def group(rows):
    """{file name part: rows} by what must agree for a comparison over width and λ to make sense."""
    groups = {}
    for row in rows:
        name = "-".join(str(row[key]) for key in ("method", "dataset", "arch", "depth") if row.get(key) is not None)
        groups.setdefault(name, []).append(row)
    return groups


def draw(path, figure_of, height, *content):
    matplotlib = optional("matplotlib", "--plot")
    optional("matplotlib.figure", "--plot")
    image_module = optional("PIL.Image", "--plot")  # comes with matplotlib
    style = {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6,
             "axes.labelsize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7, "legend.fontsize": 7, "legend.frameon": False,
             "lines.linewidth": 1.2}
    with matplotlib.rc_context(style):
        figure = matplotlib.figure.Figure(figsize=(WIDTH, height), layout="constrained")
        figure_of(figure, *content)
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=200)
    small = io.BytesIO()
    image_module.open(image).convert("RGB").quantize(128).save(small, format="png", optimize=True)  # a quarter of the size
    common.write_file(path, small.getbuffer())
    say(str(path))


def schedules_figure(figure):
    """Fig. 5: the learning rate over 100 epochs."""
    axes = figure.subplots()
    for name, colour, style in zip(("step", "cosine", "exp-decay"), COLOURS, ("-", "--", "-.")):
        epochs = range(1, 101)
        axes.step(epochs, [common.learning_rate(name, 0.1, epoch, 100) for epoch in epochs], style, color=colour, label=name,
                  where="mid")
    axes.set(xlabel="epoch", ylabel="learning rate", yscale="log", ylim=(1e-5, 0.2))
    axes.legend()


def metrics_figure(figure, rows, attack):
    """Fig. 6, with the two circles as bars: all test images side by side, so that natural and stable overlap in robust."""
    axes = figure.subplots()
    for y, row in enumerate(rows):
        natural, robust, stability = (100 * row[key] for key in list(METRICS)[:3])
        parts = {"natural, not stable": (0, natural - robust, SKY), "both: robust": (natural - robust, robust, GREEN),
                 "stable, not natural": (natural, stability - robust, ORANGE)}
        for label, (left, length, colour) in parts.items():
            axes.barh(y + 0.12, length, 0.32, left=left, color=colour, label=None if y else label)
        axes.text(natural - robust / 2, y + 0.12, f"{robust:.1f}", ha="center", va="center_baseline", fontsize=7)
        axes.text(0, y - 0.12, row["path"] if len(row["path"]) < 30 else "…" + row["path"][-28:], fontsize=7)
        axes.text(100, y - 0.12, f"natural {natural:.1f}  stable {stability:.1f}", fontsize=7, ha="right")
    axes.set(xlabel=f"test images (%), {attack}", yticks=[], xlim=(0, 100), ylim=(len(rows) - 0.6, -0.5))
    figure.legend(loc="outside upper center", ncols=3, handlelength=1, columnspacing=1)


def width_figure(figure, rows, attack):
    """The three metrics and local Lipschitzness against width, a line per λ; bars: 95 % intervals, or the range of seeds."""
    shown = [*list(METRICS)[:3], *(["local_lipschitzness"] if all("local_lipschitzness" in row for row in rows) else [])]
    panels = figure.subplots(len(shown), sharex=True)
    betas = sorted({row["beta"] for row in rows})
    for axes, key in zip(panels, shown):
        scale = 100 if key in METRICS else 1
        for i, beta in enumerate(betas):
            colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
            shift = 1 + 0.02 * i  # so that intervals stand side by side
            line = sorted((row for row in rows if row["beta"] == beta), key=lambda row: row["width"])
            low, high = scale * np.array([row.get(f"{key}_ci", [row[key]] * 2) for row in line]).T
            value = scale * np.array([row[key] for row in line])
            axes.errorbar([shift * row["width"] for row in line], value, np.abs([value - low, high - value]),
                          color=colour, marker=marker, markersize=4, capsize=2, label=f"λ = {beta:g}")
        axes.set(ylabel=f"{METRICS[key]} (%)" if key in METRICS else "local Lipschitzness")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    widths = sorted({row["width"] for row in rows})
    panels[-1].set(xlabel=f"width ({attack})", xscale="log", xticks=widths, xticklabels=widths)
    panels[-1].minorticks_off()


def training_figure(figure, runs, betas):
    """Figs. 7-9: natural risk and robust regularization by epoch, a row per λ, a colour per width."""
    widths = sorted({run["width"] for run in runs})
    panels = figure.subplots(len(betas), 2, sharex=True, squeeze=False)
    for run in sorted(runs, key=lambda run: run["width"]):
        i = widths.index(run["width"])
        for axes, key in zip(panels[betas.index(run["beta"])], ("natural_risk", "robust_regularization")):
            axes.plot([entry["epoch"] for entry in run["log"]], [entry[key] for entry in run["log"]],
                      color=COLOURS[i % len(COLOURS)], label=f"width {run['width']}")
    for beta, (left, right) in zip(betas, panels):
        left.set(ylabel=f"λ = {beta:g}")
    panels[0, 0].set_title("natural risk", fontsize=8)
    panels[0, 1].set_title("robust regularization", fontsize=8)
    figure.supxlabel("epoch", fontsize=8)
    handles = dict(zip(*reversed(panels[0, 0].get_legend_handles_labels())))
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=4)


def main(argv):
    args = arguments(argv)
    output_files(args)
    if "autoattack" in args.attack:  # what is missing shows at once
        optional(AUTOATTACK, "--attack autoattack")
    if args.plot:
        optional("matplotlib", "--plot")
    results, points = [], []
    try:
        evaluate_all(args, results, points)
    except KeyboardInterrupt:
        files = ", ".join(file for file in (args.json, args.csv, args.markdown, args.save_points) if file and points)
        raise KeyboardInterrupt(f"after {len(points)} evaluations" + (f", kept in {files}" if files else "")) from None
    finally:
        if results:
            say(text_table(grid(results, args.merge_seeds)))
    if results:
        write_results(args, results, points)  # earlier results alone can be joined and written too
    if args.plot:
        plot(args, results)


if __name__ == "__main__":
    common.launch(main)

"""The paper's three metrics for any checkpoints, as tables and as figures (Figs. 5-9; Apps. C, G and H).

    python eval.py runs/*                                          # PGD-20, each run's best.pt and own ε
    python eval.py model.pt --attack pgd cw autoattack --json results.json   # a published one, on CIFAR-10
    python eval.py runs/* results.json --attack none --plot plots            # figures, no new attacks
    python eval.py robustbench:Pang2020Boosting robustbench:Hendrycks2019Using robustbench:Carmon2019Unlabeled

A PATH is a run folder, a checkpoint of ours or a published one, robustbench:NAME for any entry of
RobustBench's CIFAR-10 and CIFAR-100 zoos, or a file that --json wrote before, whose rows join the tables and
figures. The attack's ε, the network and the data set are those of the checkpoint's settings or of the zoo. A
published checkpoint has none: its network is read off the parameters, its data set is CIFAR-10. Every attack
but AutoAttack counts its last iterate x̂, the worst case over --restarts. (The last command has those of Fig.
6 that the paper's text names: HE, Pretrain and RST.)

natural accuracy P[f(x)=y]; robust accuracy P[f(x̂)=y]; stability P[f(x̂)=f(x)]; label-free stability: the
same with misclassified images attacked away from f(x), as an attack away from y has nothing to gain there.
± is half a 95 % interval (Wilson). Local Lipschitzness is over the ℓ∞ ball, whatever norm an attack has.
"""
import contextlib
import importlib
import io
import math
import re
import sys
import time
import warnings
from dataclasses import asdict, replace
from functools import lru_cache
from itertools import cycle
from pathlib import Path

import common  # before PyTorch: it says how threads wait
import numpy as np
import torch
from common import Attack, UserError, say

METRICS = dict(zip(common.METRICS, ("natural", "robust", "stability")), label_free_stability="label-free")
EPS, STEP_SIZE = {"linf": 0.031, "l2": 0.5}, {"linf": 0.003, "l2": 0.05}  # 20 steps can cross the ball
RECIPE = ("epochs", "schedule", "lr", "weight_decay", "batch_size", "train_size", "extra_data",
          "extra_fraction", "val_size", "init", "nesterov", "no_norm_decay", "no_flip", "label_smoothing",
          "activation", "ema", "warmup", "gamma", "eps", "step_size", "steps", "alpha")
FAST = ("of Fast AT on ImageNet, which eval.py does not evaluate; metrics.json has the results, and the "
        "run's own command with other --restarts tests it again")
ZOO, THREATS = "robustbench:", {"linf": "Linf", "l2": "L2"}
AUTOATTACK = "pyautoattack"  # on PyPI, by AutoAttack's authors


def arguments(argv):
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add("paths", nargs="*", metavar="PATH",
        help="run folder, checkpoint, robustbench:NAME, or a file that --json wrote")
    add("--checkpoint", choices=("best", "last"), default="best", help="which one of a run folder to read")
    add("--attack", nargs="+", choices=("pgd", "cw", "fgsm", "autoattack", "none"), default=["pgd"],
        help="pgd: on cross-entropy; cw: PGD on the margin; fgsm: one step of ε; none: evaluate nothing")
    add("--steps", type=common.integer(0), default=20, help="attack steps of pgd and cw")
    add("--step-size", type=common.number(), help="attack step; by default 0.003 (linf) or 0.05 (l2)")
    add("--eps", type=common.number(),
        help="radius, in pixel range [0, 1]; 8/255 works; by default what training had, or 0.031; 0.5 (l2)")
    add("--norm", choices=("linf", "l2"),
        help="norm of the ball that an attack stays in; by default linf, or the zoo's for robustbench:NAME")
    add("--start", choices=("uniform", "gaussian", "none"),
        help="where an attack starts; by default uniform, for fgsm none")
    add("--restarts", type=common.integer(), default=1,
        help="of attacks with a random start: a point counts as stable if it survives all of them")
    add("--seed", type=common.integer(0), default=0, help="seeds the attacks")
    add("--dataset", metavar="NAME", help="by default the checkpoint's, else cifar10")
    add("--data-dir", metavar="DIR", help="where data sets are; by default the checkpoint's, else data")
    add("--eval-size", type=common.integer(), metavar="N", help="random test images; by default all")
    add("--lipschitz-size", type=common.integer(0), default=1000, metavar="N",
        help="images for local Lipschitzness")
    add("--batch-size", type=common.integer(), default=128, help="images an attack handles at once")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--precision", choices=("auto", "fp32", "bf16"), default="fp32",
        help="of attacks, predictions are always fp32; auto: what a short measurement finds faster")
    add("--compile", choices=("auto", "on", "off"), default="off", help="torch.compile; auto: on CUDA only")
    for kind in ("json", "markdown"):
        add(f"--{kind}", metavar="FILE", help=f"write the results as {kind} too")
    add("--merge-seeds", action="store_true",
        help="show runs whose names differ in -seed<s> alone as one: means, and ± is then half their range")
    add("--plot", metavar="DIR", help="draw the figures there, with matplotlib")
    args = parser.parse_args(argv)
    if not (args.paths or args.plot):
        parser.error("give a PATH to evaluate, or --plot")
    args.attack = [name for name in dict.fromkeys(args.attack) if name != "none"]
    return args


# ---------------------------------------------------------------------------------------------------- loading


def locate(path, preferred):
    """(file, "best", "last" or None) to read for a PATH; None for a folder that has nothing for us to read.

    A folder without best.pt has its last.pt read.
    """
    if str(path).startswith(ZOO):
        return path, None
    if not path.exists():
        raise UserError(f"{path}: no such file")
    if not path.is_dir():
        return path, None
    if (path / "args.json").exists() and "crops" in common.read_json(path / "args.json"):
        say(f"warning: {path} is {FAST}: left out", sys.stderr)
        return None
    names = list(dict.fromkeys([f"{preferred}.pt", "last.pt"]))
    for name in names:
        if (path / name).exists():
            return path / name, Path(name).stem
    say(f"warning: {path} is a folder without {' or '.join(names)}: left out", sys.stderr)
    return None


def guess_network(state, file):
    """{"arch", "depth", "width"} of a published state_dict, by the names of our networks, or UserError."""
    try:
        layers = len({key.split(".")[2] for key in state if key.startswith("block1.layer.")})
        arch = "densenet" if "trans1.conv1.weight" in state else "wrn"
        channels = len(state["block1.layer.0.conv2.weight"])  # 16k in a WideResNet, k in a DenseNet
        return {"arch": arch, "depth": 6 * layers + 4, "width": channels // 16 if arch == "wrn" else channels}
    except (KeyError, TypeError):  # other names, or no tensors
        raise UserError(f"{file} holds no WideResNet or DenseNet-BC with the parameter names of the TRADES "
                        "release (conv1, block1.layer.0.bn1, ...)") from None


def load_zoo(name, args, device):
    """As `load`, of an entry of RobustBench's model zoo, whatever its architecture, or UserError.

    Its own package makes the network, in float32, and downloads the weights unless they lie in its folder
    `models`.
    """
    wanted = f"{ZOO}{name}", 'robustbench pyautoattack "setuptools<80"'
    places = []
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sys.modules.setdefault("autoattack", optional(AUTOATTACK, *wanted))  # the name that it imports
        for dataset, threats in optional("robustbench.model_zoo", *wanted).model_dicts.items():
            for threat, entries in threats.items():
                norm = threat.value.lower()
                asked_for = args.dataset in (None, dataset.value) and args.norm in (None, norm)
                if name in entries and asked_for and norm in EPS and dataset.value in ("cifar10", "cifar100"):
                    places.append((dataset.value, norm))
        if not places:
            raise UserError(f"{ZOO}{name}: RobustBench has no such network for CIFAR-10 or CIFAR-100")
        dataset, norm = places[0]
        try:
            model = importlib.import_module("robustbench.utils").load_model(
                name, dataset=dataset, threat_model=THREATS[norm])
        except Exception as error:  # downloads and foreign checkpoints fail in many ways
            raise UserError(f"{ZOO}{name} cannot be loaded by RobustBench: {error}") from None
    data = load_data(dataset, args.data_dir or "data", device)
    common.set_execution(model, device, "fp32", args.compile, data.x_test[:args.batch_size])
    return model, data, {}, {"dataset": dataset, "norm": norm}


def load(file, args, device):
    """(model, Data, settings, facts) of a checkpoint: ours, or a published one, plain or in a wrapper.

    settings are those of the training run, {} if it is not one of ours; facts go into the row of results.
    """
    saved = common.read_checkpoint(file)
    saved, state = saved if isinstance(saved, dict) else {}, common.parameters_of(saved)
    settings = saved.get("args")
    settings = settings if isinstance(settings, dict) and "method" in settings else {}
    if "crops" in settings:
        raise UserError(f"{file} is {FAST}")
    normalization = None
    if "0.mean" in state:  # RST with `normalize_input`: a Sequential of the normalization and the network
        normalization = [state.pop(key).float().view(1, 3, 1, 1).to(device) for key in ("0.mean", "0.std")]
        state = {key.removeprefix("1."): value for key, value in state.items()}

    named = settings if {"arch", "depth", "width"} <= settings.keys() else guess_network(state, file)
    network = {key: named[key] for key in ("arch", "depth", "width")}
    if network["arch"] not in common.NETWORKS:
        raise UserError(f"{file} holds a network {network['arch']!r}, unknown to NETWORKS in common.py")
    dataset = args.dataset or settings.get("dataset", "cifar10")
    data = load_data(dataset, args.data_dir or settings.get("data_dir", "data"), device)
    model = common.build_model(**network, classes=data.classes, activation=settings.get("activation", "relu"))
    common.load_weights(model, state, file)
    if normalization:
        mean, std = normalization
        model.register_forward_pre_hook(lambda _, inputs: ((inputs[0] - mean) / std,))
    how = common.set_execution(model, device, args.precision, args.compile, data.x_test[:args.batch_size])
    say(f"{file}: {how}")
    facts = {"dataset": dataset, **network, "recipe": recipe(settings), "method": settings.get("method"),
             "beta": settings.get("beta"), "epoch": saved.get("epoch")}
    return model, data, settings, facts


load_data = lru_cache(maxsize=1)(common.load_data)  # runs to compare mostly share their data


# ---------------------------------------------------------------------------------------------------- metrics


def attack_records(args, norm, eps):
    """The records of --attack, with this norm and ε."""
    def made(loss, steps, step_size, start):
        return Attack(loss, norm, eps, step_size, steps, start, 1 if start == "none" else args.restarts)

    step_size = STEP_SIZE[norm] if args.step_size is None else args.step_size
    start = args.start or "uniform"
    records = {"pgd": made("cross-entropy", args.steps, step_size, start),
               "cw": made("margin", args.steps, step_size, start),
               "fgsm": made("cross-entropy", 1, eps, args.start or "none"),
               "autoattack": made("autoattack", 0, 0.0, "none")}  # its four attacks choose their own
    return [records[name] for name in args.attack]


def evaluate(model, x, y, attack, batch_size, seed):
    """(metrics, points) of uint8 images x [N, 3, H, W] and labels y [N]: `common.evaluate`, and label-free.

    points has "label_free" beside the others: the prediction f(x̂) [N] of an attack away from f(x). Where
    f(x) = y that is the attack which there is already, so only misclassified images are attacked again.
    """
    def predictions(x, labels):  # f(x), f(x̂)
        if attack.loss == "autoattack":
            return autoattack(model, x, labels, attack, batch_size, seed)
        _, points = common.evaluate(model, common.padded_batches(x, labels, batch_size), attack, seed)
        return points["natural"], points["adversarial"]

    natural, adversarial = predictions(x, y)
    wrong, label_free = natural != y, adversarial.clone()
    if wrong.any():
        _, label_free[wrong] = predictions(x[wrong], natural[wrong])
    if attack.loss == "autoattack":  # it leaves misclassified images alone, but stability asks about them
        adversarial = label_free
    metrics = common.three_metrics(y, natural, adversarial)
    metrics["label_free_stability"] = common.three_metrics(y, natural, label_free)["perturbation_stability"]
    metrics.update({f"{key}_ci": wilson(metrics[key], len(y)) for key in METRICS})
    return metrics, {"label": y, "natural": natural, "adversarial": adversarial, "label_free": label_free}


def autoattack(model, x, labels, attack, batch_size, seed):
    """f(x), f(x̂) [N] by the standard AutoAttack (Croce & Hein 2020), which attacks images with f(x) = label.

    Raises UserError without its package, or if the network has fewer than four classes.
    """
    stream = common.padded_batches(x, labels, batch_size)
    logits = torch.cat([common.exact_logits(model, images)[:n] for images, _, n in stream])  # [N, classes]
    classes = logits.shape[1]
    if classes < 4:
        raise UserError(f"AutoAttack needs four classes, the network has {classes}; choose another --attack")
    compiled, model._compiled_call_impl = model._compiled_call_impl, None  # batches shrink: always new shapes
    with common.fixed_seed(seed, x.device), common.attack_mode(model), common.exact_precision(model):
        package = optional(AUTOATTACK, "--attack autoattack").AutoAttack(
            model, norm=THREATS[attack.norm], eps=attack.eps, seed=seed, device=x.device)
        package.apgd_targeted.n_target_classes = package.fab.n_target_classes = min(9, classes - 1)
        model.to(memory_format=torch.contiguous_format)  # channels_last forbids its views of gradients
        images = common.to_float(x).contiguous()
        _, adversarial = package.run_standard_evaluation(images, labels, batch_size=batch_size)
        model.to(memory_format=torch.channels_last)
    model._compiled_call_impl = compiled
    return logits.argmax(1), adversarial


def optional(package, purpose, install=None):
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(f"{purpose} needs a package ({error}): pip install {install or package}") from None


def wilson(p, n, z=1.959964):
    """The 95 % interval [low, high] (Wilson 1927) of a fraction p of n independent images."""
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return [max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))]


def evaluate_all(args, results):
    """Append to `results` for each path and attack; write the files asked for after each."""
    device = common.pick_device(args.device)
    wanted = [path for path in args.paths if args.attack or path.endswith(".json")]
    located = [(path, *found) for path in wanted if (found := locate(Path(path), args.checkpoint))]
    if wanted and not located:
        raise UserError("there is no checkpoint to evaluate in any of these folders")
    for path, file, chosen in located:
        if file.suffix == ".json":
            results.extend(earlier_results(file))
            write_results(args, results)
            continue
        zoo = path.startswith(ZOO)
        model, data, settings, facts = (load_zoo(path.removeprefix(ZOO), args, device) if zoo else
                                        load(file, args, device))
        norm = args.norm or facts.pop("norm", "linf")
        own = 8 / 255 if zoo else settings.get("eps")  # the training scripts attack in ℓ∞
        usual = EPS if own is None else {**EPS, "linf": own}
        eps = usual[norm] if args.eps is None else args.eps
        if own is not None and norm == "linf" and abs(eps - own) > 1e-9:
            say(f"warning: {file} has ε = {own:.9g} of its own, --eps attacks with {eps:.9g}", sys.stderr)
        index = data.test_subset(args.eval_size)
        x, y = data.x_test[index], data.y_test[index]
        lipschitz = {}
        if args.lipschitz_size:
            some = common.padded_batches(x[:args.lipschitz_size], y[:args.lipschitz_size], args.batch_size)
            ball = replace(common.REPORT, eps=eps if norm == "linf" else usual["linf"])
            lipschitz = {"local_lipschitzness": common.local_lipschitzness(model, some, ball),
                         "lipschitz_n": min(args.lipschitz_size, len(x))}
        for attack in attack_records(args, norm, eps):
            began = time.perf_counter()
            metrics, _ = evaluate(model, x, y, attack, args.batch_size, args.seed)
            precision = "fp32" if attack.loss == "autoattack" else model.precision
            row = {"path": path, "checkpoint": str(file), "chosen": chosen, "attack": asdict(attack),
                   **metrics, "precision": precision, "seed": args.seed, **lipschitz, **facts,
                   "seconds": round(time.perf_counter() - began, 2)}
            results.append(row)
            write_results(args, results)
            say(f"{file}: {attack.title()}  {common.describe(row)}  {common.duration(row['seconds'])}")


def earlier_results(file):
    """The rows of a file that --json wrote, or UserError."""
    rows, required = common.read_json(file), {"path", "checkpoint", "chosen", "attack", "n", *METRICS}
    try:
        if isinstance(rows, list) and all(required <= row.keys() and record(row) for row in rows):
            return rows
    except (AttributeError, TypeError):
        pass
    raise UserError(f"{file} is not a list of results as eval.py --json writes it; make an older one anew")


# ------------------------------------------------------------------------------------------- files and tables


def record(row):
    return Attack(**row["attack"])


def table(results, merged=False):
    """The results as lines of text, the header first: a line per model and attack, fractions in percent."""
    runs = ["runs"] if merged else []
    lines = [["model", "file", "attack", "n", *runs, *METRICS.values(), "local Lipschitz"]]
    for row in merge_seeds(results) if merged else results:
        file = f"{row['chosen']}.pt" if row["chosen"] else ""
        lines.append([row["path"], file, record(row).title(), *(str(row[key]) for key in ("n", *runs)),
                      *(with_interval(row, key, 100) for key in METRICS),
                      with_interval(row, "local_lipschitzness")])
    return lines


def merge_seeds(results):
    """Runs whose names differ in -seed<s> alone as one row: means, and their range as the interval."""
    experiments = {}
    for row in results:
        name = re.sub(r"-seed\d+", "", row["path"])
        key = name, row["chosen"], row["n"], record(row)
        experiments.setdefault(key, {})[row["path"]] = row
    merged = []
    for (name, *_), runs in experiments.items():
        rows = list(runs.values())
        merged.append({**rows[0], "path": name, "runs": len(rows)})
        for key in (*METRICS, "local_lipschitzness"):
            values = [row.get(key) for row in rows]
            if len(rows) > 1 and None not in values:
                merged[-1].update({key: sum(values) / len(values), f"{key}_ci": [min(values), max(values)]})
    return merged


def with_interval(row, key, scale=1):
    """scale·row[key] and half its interval, such as "12.34 ±0.56"; "" where there is none."""
    if row.get(key) is None:
        return ""
    text = f"{scale * row[key]:.2f}"
    if f"{key}_ci" in row:
        low, high = row[f"{key}_ci"]
        text += f" ±{scale * (high - low) / 2:.2f}"
    return text


def text_table(lines, width=110):
    """A block of aligned lines, at most `width` columns, for each file, attack and n."""
    blocks = {}
    for line in lines[1:]:
        shared = "; ".join(f"{name} {cell}" for name, cell in zip(lines[0][1:4], line[1:4]) if cell)
        blocks.setdefault(shared, [lines[0]]).append(line)
    _, _, _, _, *widths = (max(map(len, cells)) for cells in zip(*lines))
    room = width - sum(widths) - 2 * len(widths)
    room = min(room, max(len(line[0]) for line in lines))

    def aligned(line):
        return "  ".join([shorten(line[0], room).ljust(room), *map(str.rjust, line[4:], widths)])
    return "\n\n".join("\n".join([shared, *map(aligned, block)]) for shared, block in blocks.items())


def shorten(text, length):
    return text if len(text) <= length else "…" + text[len(text) - length + 1:]


def markdown_table(lines):
    lines = [lines[0], ["---"] + ["---:"] * (len(lines[0]) - 1), *lines[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def output_files(args):
    """The files to write. Makes their folders, so that a mistyped name shows before an hour of attacks."""
    files = [file for file in (args.json, args.markdown) if file]
    for file in files:
        if Path(file).is_dir():
            raise UserError(f"{file} is a folder; name a file in it")
        Path(file).parent.mkdir(parents=True, exist_ok=True)
    return files


def write_results(args, results):
    """Replace the files asked for by what is finished so far; each is whole at every moment."""
    if args.json:
        common.write_json(args.json, results)
    if args.markdown:
        common.write_file(args.markdown, markdown_table(table(results, args.merge_seeds)).encode())


# ---------------------------------------------------------------------------------------------------- figures

WIDTH = 3.3  # inches: one column of a two-column paper
ORANGE, GREEN, SKY = "#E69F00", "#009E73", "#56B4E9"  # Okabe & Ito 2008: for the colour-blind too
COLOURS = ("#0072B2", ORANGE, GREEN, "#D55E00", "#CC79A7", SKY, "black")
LINES = list(zip(COLOURS, "osD^vPX", ("-", "--", "-.", ":") * 2))  # each line's colour, marker and dash


def plot(args, results):
    """Every figure that the results and the run folders among the paths have something for, as PNG files."""
    folder = Path(args.plot)
    folder.mkdir(parents=True, exist_ok=True)
    draw(folder / "schedules.png", schedules_figure, 1.9)
    merged, attacks = merge_seeds(results), list(dict.fromkeys(map(record, results)))
    titles = [attack.title() for attack in attacks]  # the same for two of other step sizes, say
    names = distinct(re.sub(r"[^\w.]+", "-", title.lower().replace("×", "x").replace("ε = ", "eps"))
                     for title in titles)
    for attack, title, name in zip(attacks, titles, names):
        rows = [row for row in (merged if args.merge_seeds else results) if record(row) == attack]
        draw(folder / f"metrics-{name}.png", metrics_figure, 0.75 + 0.42 * len(rows), rows, title)
        rows = [row for row in merged if record(row) == attack and row.get("width") is not None]
        for key, runs in group(rows).items():
            if len({row["width"] for row in runs}) > 1:
                draw(folder / f"width-{name}-{key}.png", width_figure, 5.4, runs, title)
    runs = []
    for path in map(Path, args.paths):
        if (path / "args.json").exists():
            with common.own_files(path):
                runs.append({"path": path.name, **common.read_json(path / "args.json"),
                             "log": common.read_log(path / "log.jsonl")})
    for key, runs in group([run for run in runs if run["log"]]).items():
        betas, names = in_order(run.get("beta") for run in runs), recorded(runs)
        if names:
            draw(folder / f"training-{key}.png", training_figure, 0.6 + 1.3 * len(betas), runs, betas, names)


def group(rows):
    """{part of a file name: rows} by what must agree for a comparison over width and λ to make sense."""
    groups = {}
    for row in rows:
        parts = [str(row[key]) for key in ("method", "dataset", "arch", "depth", "chosen") if row.get(key)]
        if "eps" in row:  # a run's settings; results have it in their attack
            parts.append(f"eps{row['eps']:.4g}")
        groups.setdefault(("-".join(parts), row.get("recipe", recipe(row))), []).append(row)
    return dict(zip(distinct(name for name, _ in groups), groups.values()))


def distinct(names):
    """The names, a later one that was there before with its number: name, other, name-2."""
    seen = []
    for name in names:
        seen.append(name)
        yield f"{name}-{seen.count(name)}" if seen.count(name) > 1 else name


def recipe(settings):
    """The settings that make another experiment of a run, but for those that figures compare, as text."""
    found = [(key, settings.get(key)) for key in RECIPE]
    return ", ".join(f"{key} {value}" for key, value in found if value not in (None, False, 0, "relu"))


def in_order(values):
    """The distinct values of a setting, words last: β may be a number, a word or None."""
    return sorted(set(values), key=lambda value: (isinstance(value, str), value or 0))


def setting(name, value):
    """Such as "λ = 6" or "λ = auto"; "" for None."""
    if value is None:
        return ""
    return f"{name} = {value}" if isinstance(value, str) else f"{name} = {value:g}"


def recorded(runs):
    """The names in the runs' logs that the training figure draws: risks, and β if it changes within a run."""
    names = dict.fromkeys(key for run in runs for entry in run["log"] for key in entry)
    changing = any(len({entry.get("beta") for entry in run["log"]}) > 1 for run in runs)
    return [key for key in names if key.endswith("_risk") or key == "robust_regularization"
            or key == "beta" and changing]


def draw(path, figure_of, height, *content):
    matplotlib = optional("matplotlib", "--plot")
    optional("matplotlib.figure", "--plot")
    style = {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6,
             "axes.labelsize": 8, "axes.titlesize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7,
             "legend.fontsize": 7, "legend.frameon": False, "lines.linewidth": 1.2}
    with matplotlib.rc_context(style):
        figure = matplotlib.figure.Figure(figsize=(WIDTH, height), layout="constrained")
        figure_of(figure, *content)
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=150)
    common.write_file(path, image.getbuffer())
    say(str(path))


def schedules_figure(figure):
    """Fig. 5: the learning rate over 100 epochs, by every schedule there is."""
    axes, epochs = figure.subplots(), range(1, 101)
    for (name, schedule), (colour, _, dash) in zip(common.SCHEDULES.items(), cycle(LINES)):
        rates = [0.1 * schedule((epoch - 1) / 100, 100) for epoch in epochs]
        axes.step(epochs, rates, dash, color=colour, label=name, where="mid")
    axes.set(xlabel="epoch", ylabel="learning rate", yscale="log", ylim=(1e-5, 0.2))
    axes.legend()


def metrics_figure(figure, rows, title):
    """Fig. 6, its two circles as bars: test images side by side; natural and stable overlap in robust."""
    axes = figure.subplots()
    for y, row in enumerate(rows):
        natural, robust, stability = (100 * row[key] for key in common.METRICS)
        parts = [("natural, not stable", 0, natural - robust, SKY),
                 ("both: robust", natural - robust, robust, GREEN),
                 ("stable, not natural", natural, stability - robust, ORANGE)]
        for label, left, length, shade in parts:
            axes.barh(y + 0.12, length, 0.32, left=left, color=shade, label=None if y else label)
        middle = natural - robust / 2
        axes.text(middle, y + 0.12, f"{robust:.1f}", ha="center", va="center_baseline", fontsize=7)
        axes.text(0, y - 0.12, shorten(row["path"], 29), fontsize=7)
        axes.text(100, y - 0.12, f"natural {natural:.1f}  stable {stability:.1f}", fontsize=7, ha="right")
    axes.set(xlabel=f"test images (%), {title}", yticks=[], xlim=(0, 100), ylim=(len(rows) - 0.6, -0.5))
    figure.legend(loc="outside upper center", ncols=3, handlelength=1, columnspacing=1)


def width_figure(figure, rows, title):
    """The metrics and local Lipschitzness against width, a line per λ; bars: 95 %, or the range of seeds."""
    shown = [key for key in (*common.METRICS, "local_lipschitzness")
             if all(row.get(key) is not None for row in rows)]
    betas, widths = (in_order(row.get(key) for row in rows) for key in ("beta", "width"))
    panels = figure.subplots(len(shown), sharex=True)
    for axes, key in zip(panels, shown):
        scale = 100 if key in METRICS else 1
        for i, (beta, (colour, marker, _)) in enumerate(zip(betas, cycle(LINES))):
            line = sorted((row for row in rows if row.get("beta") == beta), key=lambda row: row["width"])
            low, high = scale * np.array([row.get(f"{key}_ci", [row[key]] * 2) for row in line]).T
            value = scale * np.array([row[key] for row in line])
            beside = [(1 + 0.02 * i) * row["width"] for row in line]  # so that no interval hides another
            axes.errorbar(beside, value, np.abs([value - low, high - value]), color=colour, marker=marker,
                          markersize=4, capsize=2, label=setting("λ", beta))
        axes.set(ylabel=f"{METRICS[key]} (%)" if key in METRICS else "local Lipschitzness")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    panels[-1].set(xlabel=f"width ({title})", xscale="log", xticks=widths, xticklabels=widths)
    panels[-1].minorticks_off()


def training_figure(figure, runs, betas, names):
    """Figs. 7-9: what was recorded by epoch, such as natural risk; a row per λ, a colour per width."""
    widths = in_order(run.get("width") for run in runs)
    colours = {width: colour for width, (colour, _, _) in zip(widths, cycle(LINES))}
    panels = figure.subplots(len(betas), len(names), sharex=True, squeeze=False)
    for run in runs:
        for axes, name in zip(panels[betas.index(run.get("beta"))], names):
            values = np.array([entry.get(name) for entry in run["log"]], dtype=float)  # None: a gap
            axes.plot([entry["epoch"] for entry in run["log"]], values, ".-", markersize=2,
                      color=colours[run.get("width")])  # dots: a run may have one epoch
    for beta, axes in zip(betas, panels[:, 0]):
        axes.set(ylabel=setting("λ", beta))
    for name, axes in zip(names, panels[0]):
        axes.set_title("λ" if name == "beta" else name.replace("_", " "))
    eps = Attack(eps=runs[0]["eps"]).title().rpartition(", ")[2] if "eps" in runs[0] else ""
    figure.supxlabel(f"epoch ({eps})" if eps else "epoch", fontsize=8)
    for width in widths:
        panels[0, 0].plot([], color=colours[width], label=setting("width", width))
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4)


def main(argv):
    args = arguments(argv)
    if common.WORLD > 1:
        raise UserError("eval.py runs in one process, without torchrun")
    files = output_files(args)
    if "autoattack" in args.attack:  # what is missing shows at once
        optional(AUTOATTACK, "--attack autoattack")
    if args.plot:
        optional("matplotlib", "--plot")
    results = []
    try:
        evaluate_all(args, results)
    except KeyboardInterrupt:
        kept = f", kept in {', '.join(files)}" if files and results else ""
        raise KeyboardInterrupt(f"after {len(results)} rows{kept}") from None
    finally:
        if results:
            say(text_table(table(results, args.merge_seeds)))
    if args.plot:
        plot(args, results)


if __name__ == "__main__":
    common.launch(main)

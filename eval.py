"""The paper's three metrics of any checkpoints: tables, JSON, figures (Figs. 6-9; Apps. G and H).

    python eval.py runs/*                                 # PGD-20, each run's best.pt and own ε
    python eval.py runs/* --json results.json             # adds a row for each run and attack to the file
    python eval.py results.json --plot plots              # tables and figures of what is there
    python eval.py runs/* --attack none --plot plots      # the training curves alone
    python eval.py model.pt --attack pgd cw autoattack    # a published network, on CIFAR-10
    python eval.py model.pt --normalize cifar10           # one that was trained on (x - mean)/std
    python eval.py robustbench:Pang2020Boosting robustbench:Hendrycks2019Using robustbench:Carmon2019Unlabeled

A PATH is a run folder, a checkpoint of ours or a published one, robustbench:NAME for an entry of its zoo,
or a file that --json wrote. A published network is known by the names of its parameters: those of TRADES,
MART, AWP, RST and Fast AT (WideResNet, PreActResNet). The last command has HE, Pretrain and RST of Fig. 6.

natural accuracy P[f(x)=y]; robust accuracy P[f(x)=f(x̂)=y]; stability P[f(x)=f(x̂)]. x̂ is the last iterate
of an attack, the worst over --restarts. AutoAttack attacks f(x) in place of y, and so counts what is stable.
Of several attacks a last row has the worst, image by image. Local Lipschitzness is over the ℓ∞ ball.

Runs that differ in their seed alone are one line of a table, their mean. ± or [low, high] is a 95 % interval:
over images for one run (Wilson), over seeds for three or more (Student). Two seeds have none.
"""
import argparse
import functools
import glob
import json
import math
import os
import re
import statistics
import sys
from dataclasses import asdict
from pathlib import Path

import common  # before PyTorch: it says how threads wait
import numpy as np
import torch
from common import METRICS, Attack, UserError, integer, number, say

NORMALIZE = {"cifar10": "0.4914,0.4822,0.4465,0.2471,0.2435,0.2616",  # of AWP, Fast AT, robust_overfitting
             "imagenet": "0.485,0.456,0.406,0.229,0.224,0.225",
             "+-1": "0.5,0.5,0.5,0.5,0.5,0.5", "none": "0,0,0,1,1,1"}  # pixels in [-1, 1]; in [0, 1]
NORMS = {"linf": "Linf", "l2": "L2"}  # ours and those of RobustBench and AutoAttack
ZOO = "robustbench:"


def arguments(argv):
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add("paths", nargs="+", metavar="PATH", help="run folder, checkpoint, robustbench:NAME or JSON")
    add("--checkpoint", choices=("best", "last"), default="best",
        help="of a run folder; the best of several were trained for different times: compare widths by last")
    own = [name for name in common.LOSSES if name not in ("cross-entropy", "margin")]  # a fork's
    add("--attack", nargs="+", choices=("pgd", "cw", "fgsm", "autoattack", *own, "none"), default=["pgd"],
        help="pgd: on cross-entropy; cw: PGD on the margin; fgsm: one step of ε; none: evaluate nothing")
    add("--steps", type=integer(0), default=20, help="of pgd and cw")
    add("--step-size", type=number(), help="of pgd and cw; by default 0.003 (l2: 0.2), longer in large balls")
    add("--restarts", type=integer(), default=1, help="random starts of pgd and cw")
    add("--norm", choices=NORMS, help="of the ball; by default training's, else linf")
    add("--eps", type=number(), help="radius, such as 8/255; by default training's, else 0.031 (l2: 0.5)")
    add("--weights", metavar="NAME", help="of a checkpoint that holds several networks, such as model_ema")
    add("--dataset", metavar="NAME", help="by default the checkpoint's, else cifar10")
    add("--data-dir", default="data", metavar="DIR", help="where data sets are, or are downloaded to")
    add("--normalize", type=means_and_deviations, metavar="M", help="the network takes (pixels - mean)/std: "
        f"{', '.join(NORMALIZE)}, or three means and three deviations, with commas between")
    add("--activation", choices=common.ACTIVATIONS, help="of a published network; by default relu")
    add("--shortcut", choices=("normalized", "raw"), help="what a published PreActResNet's projections take: "
        "BatchNorm's output (AWP, robust_overfitting) or its input (Fast AT); no name tells")
    add("--eval-size", type=integer(), metavar="N", help="random test images; by default all")
    add("--lipschitz-size", type=integer(0), default=1000, metavar="N", help="for local Lipschitzness")
    add("--batch-size", type=integer(), default=128, help="images an attack handles at once")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--precision", choices=("auto", "fp32", "bf16"), default="fp32", help="of attacks, not predictions")
    add("--json", metavar="FILE", help="append the rows to those in this file")
    add("--plot", metavar="DIR", help="draw the figures there, with matplotlib")
    parser.set_defaults(compile="off")  # compiling takes longer than most evaluations
    args = parser.parse_args(argv)
    for option, value in ("--eps", args.eps), ("--step-size", args.step_size):
        if args.norm != "l2" and (value or 0) > 1:
            parser.error(f"{option} {value:g}: pixels are in [0, 1]; {value:g}/255? or --norm l2")
    args.attack = [*dict.fromkeys(args.attack)]
    given, args.paths = args.paths, []
    for path in given:  # the shells of Windows expand no *
        matches = [] if os.path.exists(path) else sorted(glob.glob(path))
        args.paths += matches or [path]
    return args


def means_and_deviations(text):
    """[means, deviations] of --normalize, three each."""
    numbers = [float(word) for word in NORMALIZE.get(text, text).split(",")]
    if len(numbers) != 6 or not all(0 < number < math.inf for number in numbers[3:]):
        raise ValueError
    if max(numbers[:3]) > 1:
        raise argparse.ArgumentTypeError(f"means must be of pixels in [0, 1]: divide {text} by 255?")
    return [numbers[:3], numbers[3:]]


# ---------------------------------------------------------------------------------------------------- loading

load_data = functools.cache(common.load_data)  # read once, for all networks of a command


def load(path, args, device):
    """(network, Data, what is known of its training) of a run folder or a checkpoint."""
    file = Path(path, f"{args.checkpoint}.pt") if Path(path).is_dir() else Path(path)
    if file.name == "best.pt" and not file.exists() and file.with_name("last.pt").exists():
        file = file.with_name("last.pt")
        common.warn(f"{path} has no best.pt: {file} is evaluated")
    saved = common.read_checkpoint(file)
    settings = saved.get("args") if isinstance(saved, dict) else None
    settings = settings if isinstance(settings, dict) else {}
    if settings.get("method") == "fast_imagenet":
        raise UserError(f"{file} is of Fast AT on ImageNet, which its own script tests")
    if not {"method", "dataset", "width"} <= settings.keys():
        settings = {}  # no run of ours
    if "arch" in settings and (args.activation or args.shortcut):
        raise UserError(f"{file} says itself what network it is: leave out --activation and --shortcut")
    parameters, beside = common.parameters_of(saved, file, args.weights)
    run = {"activation": "relu"} if "arch" in settings else published(parameters, args, file)
    run |= settings
    if args.weights:
        run["network"] = args.weights
    if (run["arch"] not in common.NETWORKS or run["activation"] not in common.ACTIVATIONS
            or run.get("arch_from", "common") != "common"):
        raise UserError(f"{file}: its network {run['arch']!r} of {run['activation']} is none of common.py's; "
                        "README.md shows how to evaluate any module from Python")

    dataset = args.dataset or settings.get("dataset", "cifar10")
    data = load_data(dataset, args.data_dir, device)
    size, here = (saved.get("image_size") if settings else None), [*data.x_test.shape[1:]]
    if dataset == settings.get("dataset") and not settings.get("data", data.hash).startswith(data.hash):
        common.warn(f"{file} was trained on another {dataset} than {args.data_dir} holds")
    if size and size != here:
        common.warn(f"{file} was trained on images of {size[1]}×{size[2]} pixels, not {here[1]}×{here[2]}")

    model = common.build_model(argparse.Namespace(**{**run, "init": None}), data, device)
    for module in model.modules():
        module.raw = run.get("shortcut") == "raw"  # of a _Block: what its projection takes
    state = beside | parameters
    # One or three numbers that are no parameter may be a mean or a deviation of pixels: the user knows.
    few = {name: value.flatten().tolist() for name, value in state.items()
           if name not in model.state_dict() and value.is_floating_point() and value.numel() in (1, 3)}
    if few and not args.normalize:
        raise UserError(f"{file} also holds {few}: are pixels scaled by them? Say so by --normalize, or "
                        "--normalize none")
    common.load_weights(model, {name: value for name, value in state.items() if name not in few}, file)

    if settings:
        run |= {"weights": file.stem, "epoch": saved.get("epoch"), "precision": saved.get("precision")}
        if file.with_name("args.json").exists() and not file.with_name("metrics.json").exists():
            common.warn(f"{file} is of an unfinished run: there is no metrics.json yet")
            run["unfinished"] = True
    return model, data, run


def published(parameters, args, file):
    """The settings of a published network: what its parameters' names tell, and what the user says."""
    channels = {name: len(value) for name, value in parameters.items() if value.dim() == 4}
    blocks = sum(name.endswith(".conv2.weight") and not name.startswith("sub_block1.") for name in channels)
    run = {"activation": args.activation or "relu"}
    if {"layer1.0.conv1.weight", "linear.weight"} <= parameters.keys() and "bn1.weight" not in parameters:
        if not args.shortcut:
            raise UserError(f"{file} is a PreActResNet; its parameters do not tell what projections take: "
                            "--shortcut normalized, as AWP's and robust_overfitting's, or raw, as Fast AT's")
        run |= {"arch": "preact", "depth": 2 * blocks + 2, "shortcut": args.shortcut}
        width = channels["conv1.weight"] / 64
    elif "block1.layer.0.conv2.weight" in channels:
        run |= {"arch": "wrn", "depth": 2 * blocks + 4}
        width = channels["block1.layer.0.conv2.weight"] / 16
    else:
        raise UserError(f"{file} holds no network with the parameter names of TRADES or AWP, but "
                        f"{', '.join([*parameters][:3])}, ...; README.md says how to evaluate any module")
    if not args.normalize:
        say(f"{file}: takes pixels in [0, 1]; a network trained on (x - mean)/std needs --normalize; "
            f"its activation is {run['activation']} (--activation)")
    return {**run, "width": int(width) if width == int(width) else width}


def load_zoo(path, args, device):
    """As `load`, of an entry of RobustBench's zoo, whose package downloads it. It scales pixels itself."""
    import pyautoattack
    sys.modules.setdefault("autoattack", pyautoattack)  # the name by which RobustBench imports it
    from robustbench.utils import load_model
    dataset, norm = args.dataset or "cifar10", args.norm or "linf"
    data = load_data(dataset, args.data_dir, device)
    try:
        model = load_model(path.removeprefix(ZOO), dataset=dataset, threat_model=NORMS[norm])
    except Exception as error:  # unknown names, downloads and foreign checkpoints fail in many ways
        raise UserError(f"{path}: RobustBench cannot load that for --dataset {dataset} and --norm {norm}: "
                        f"{error!r}") from None
    run = {"norm": norm, "eps": {"linf": 8 / 255, "l2": 0.5}[norm]}
    return model.to(device, memory_format=torch.channels_last), data, run


# ------------------------------------------------------------------------------------------------- evaluating

def attack_of(name, args, norm, eps):
    """The record of one of --attack."""
    if name == "autoattack":  # its four attacks choose their own steps
        return Attack("autoattack", norm, eps, 0.0, 0, "none")
    if name == "fgsm":
        return Attack("cross-entropy", norm, eps, eps, 1, "none")
    step_size = common.report_attack(eps, norm).step_size if args.step_size is None else args.step_size
    loss = {"pgd": "cross-entropy", "cw": "margin"}.get(name, name)
    return Attack(loss, norm, eps, step_size, args.steps, "uniform", args.restarts)


def evaluate(path, args, device):
    """A row for each attack on one PATH, and one for the worst of several, as they are finished.

    Its parts: "run" (settings of training, network, weights), "evaluation" (data, attack) and "results".
    """
    model, data, run = (load_zoo if path.startswith(ZOO) else load)(path, args, device)
    weights = common.hashed(*(value.cpu().numpy() for value in model.state_dict().values()))
    run |= {"hash": weights, "normalize": args.normalize}  # two files of one name are not one network
    if args.normalize:
        mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in args.normalize)
        model.register_forward_pre_hook(lambda _, inputs: ((inputs[0] - mean) / std,))
    x, y = data.test(args.eval_size)
    how = args if hasattr(model, "precision") else argparse.Namespace(precision="fp32", compile="off")
    common.set_execution(how, x[:args.batch_size], model)  # args' "auto" is found out once

    own = run.get("norm", "linf")  # a fork's may be l2
    norm = args.norm or own
    radii = {"linf": 0.031, "l2": 0.5, own: run.get("eps", 0.031)}
    eps = radii[norm] if args.eps is None else args.eps
    common.check_images(common.to_float(x[:1000]), norm)
    few, lipschitzness = min(args.lipschitz_size, len(x)), {}
    ball = common.report_attack(eps if norm == "linf" else radii["linf"])
    if few and ball.eps:
        some = data.test(few) if few < len(x) else (x, y)
        lipschitzness = {"local_lipschitzness": common.local_lipschitzness(
            model, common.in_order(*some, args.batch_size), ball)}
    chance = data.y_test.bincount().max() / len(data.y_test)
    attacks, found = [attack_of(name, args, norm, eps) for name in args.attack], []
    for attack in [*attacks, "worst"] if len(attacks) > 1 else attacks:
        precision = how.precision
        if attack == "worst":  # a point is stable if its prediction survives all of them
            adversarial = functools.reduce(lambda one, other: torch.where(one == natural, other, one), found)
        elif attack.loss == "autoattack":
            natural, adversarial = autoattack(model, x, attack, args)
            precision = "fp32"
        else:
            stream = common.in_order(x, y, args.batch_size)
            _, natural, adversarial = common.predictions(model, stream, attack)
        found.append(adversarial)
        results = common.three_metrics(y, natural, adversarial)
        n = results.pop("n")
        intervals = {f"{name}_ci": wilson(results[name], n) for name in METRICS}
        if len(found) == 1 and intervals["natural_accuracy_ci"][0] <= chance:
            common.warn(f"{path}: natural accuracy is no better than chance; was it trained on other pixels "
                        "(try --normalize), another data set, or another order of the classes?")
        yield {"path": path, "run": run,
               "evaluation": {"dataset": args.dataset or run.get("dataset", "cifar10"), "data": data.hash,
                              "attack": [*map(asdict, attacks)] if attack == "worst" else asdict(attack),
                              "precision": precision, "n": n, "lipschitz_n": few},
               "results": {**results, **intervals, **lipschitzness}}


def autoattack(model, x, attack, args):
    """f(x), f(x̂) [N] by the standard AutoAttack (Croce & Hein 2020) of the labels f(x)."""
    import pyautoattack
    images = common.to_float(x).contiguous()
    logits = [common.logits_of(model, part, i * args.batch_size)
              for i, part in enumerate(images.split(args.batch_size))]
    natural = torch.cat(logits).argmax(1)
    if (classes := logits[0].shape[1]) < 4:
        raise UserError(f"AutoAttack's losses need four classes or more, not {classes}")
    with common.fixed_seed(0, x.device), common.attack_mode(model), common.exact_precision(model):
        package = pyautoattack.AutoAttack(model, norm=NORMS[attack.norm], eps=attack.eps, seed=0,
                                          device=x.device)
        for targeted in package.apgd_targeted, package.fab:
            targeted.n_target_classes = min(9, classes - 1)
        model.to(memory_format=torch.contiguous_format)  # channels_last forbids its views of gradients
        _, adversarial = package.run_standard_evaluation(images, natural, batch_size=args.batch_size)
        model.to(memory_format=torch.channels_last)
    return natural, adversarial


def wilson(p, n, z=1.959964):
    """The 95 % interval [low, high] (Wilson 1927) of a fraction p of n independent images."""
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return [round(min(max(end / (1 + z * z / n), 0.0), 1.0), 6) for end in (centre - half, centre + half)]


# -------------------------------------------------------------------------------------------- rows and tables

COLUMNS = {"natural %": METRICS[0], "robust %": METRICS[1], "stability %": METRICS[2],
           "local Lipschitz": "local_lipschitzness"}
OF_A_SEED = {"seed", "epoch", "hash", "reference_hash"}  # what runs of one experiment differ in


def known_by(row):
    """What makes a row another one: what ran and how it was evaluated, no path."""
    run = {name: value for name, value in row["run"].items() if name != "unfinished"}
    return json.dumps([run, row["evaluation"]], sort_keys=True)


def experiment(row, *free):
    """What a row is of, as text: training but for its seed and what is `free`, and evaluation."""
    run, how = row["run"], row.get("evaluation")
    if "seed" not in run or "unfinished" in run:  # published, or cut short: comparable to no other
        return json.dumps([row["path"], run, how], sort_keys=True)
    run = {name: value for name, value in run.items() if name not in {*OF_A_SEED, *free}}
    text = json.dumps([run, how], sort_keys=True)
    return re.sub(r"seed\d+(-[0-9a-f]{6})?", "seed", text)  # of --reference: each seed has its own


def grouped(items, key, *free):
    """Lists of the items that have the same key(item, *free)."""
    groups = {}
    for item in items:
        groups.setdefault(key(item, *free), []).append(item)
    return [*groups.values()]


def average(rows):
    """A row for each experiment, with "shown": each result's (mean, low, high), in percent if a fraction.

    The mean is over seeds. low and high are its 95 % interval: Wilson's for one run, Student's for three or
    more. Where there is none they are the mean. "seeds" has each seed's own row.
    """
    averaged = []
    for group in grouped(rows, experiment):
        seeds = {}
        for row in group:
            seed = row["run"].get("seed")
            if seed in seeds and seeds[seed]["run"].get("hash") != row["run"].get("hash"):
                common.warn(f"{row['path']} takes the place of {seeds[seed]['path']}, a run of the same seed")
            seeds[seed] = row
        n, runs, row = len(seeds), [*seeds.values()], {**group[0], "shown": {}, "seeds": seeds}
        for name in COLUMNS.values() & row["results"].keys():
            values = [run["results"][name] for run in runs]
            scale = 100 if name in METRICS else 1
            low = high = mean = statistics.mean(values)
            if n > 2:
                half = common.student(n) * statistics.stdev(values) / math.sqrt(n)
                low, high = mean - half, mean + half
            elif n == 1 and name in METRICS:
                low, high = wilson(mean, row["evaluation"]["n"])
            row["shown"][name] = scale * mean, scale * low, scale * high
        if n > 1:
            row["path"] = f"{os.path.commonprefix([run['path'] for run in runs])}* ({n} seeds)"
        averaged.append(row)
    return averaged


def title(attack):
    """Such as "PGD-20, ε = 8/255, step 0.003"; of a list "worst of PGD-20, CW-20, ε = 8/255, step 0.003"."""
    if isinstance(attack, dict):
        return Attack(**attack).title()
    titles = [Attack(**record).title() for record in attack]
    names = ", ".join(text.partition(",")[0] for text in titles)
    return f"worst of {names}, {max(titles, key=len).partition(', ')[2]}"


def evaluated(row):
    """What a row was evaluated on and by, in words. A table, or a figure, is of rows that agree in it."""
    how = row["evaluation"]
    return (f"{how['dataset']} ({how['data'][:6]}), {how['n']:,} test images, {how['precision']}: "
            f"{title(how['attack'])}")


def cell(value, low, high):
    """Such as "81.20 ±0.76", or "99.80 [99.69, 99.87]" where the sides of the interval differ by a tenth."""
    half = (high - low) / 2
    if half == 0:
        return f"{value:.2f}"
    if abs(low + high - 2 * value) < 0.1 * half:
        return f"{value:.2f} ±{half:.2f}"
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def table(rows):
    """Markdown: a line per averaged row, above it what was `evaluated`, below what else sets lines apart."""
    lines = [["model", "weights", *COLUMNS]]
    for row in rows:
        shown = row["shown"]
        weights = row["run"].get("weights", "") + (", unfinished" if "unfinished" in row["run"] else "")
        weights += f", {row['run']['network']}" if "network" in row["run"] else ""
        on = "validation" if row["run"].get("val_size") else "test"
        lines.append([row["path"], weights.replace("best", f"best on {on} images"),
                      *(cell(*shown[name]) if name in shown else "" for name in COLUMNS.values())])
    widths = [max(map(len, column)) for column in zip(*lines)]
    sides = "<<" + ">" * len(COLUMNS)  # words stand on the left, numbers on the right
    lines.insert(1, ["-" * (width - 1) + ("-" if side == "<" else ":") for width, side in zip(widths, sides)])
    padded = [[f"{text:{side}{width}}" for text, side, width in zip(line, sides, widths)] for line in lines]
    apart, same = [], dict.fromkeys(OF_A_SEED)  # None in both: no difference
    for group in grouped(rows, named):
        for one, other in zip(group, group[1:]):
            differing = common.differences({**one["run"], **same}, {**other["run"], **same})
            apart.append(f"{one['path']} and {other['path']} are not averaged: {differing}")
    return "\n".join([evaluated(rows[0]), "", *(f"| {' | '.join(line)} |" for line in padded), "", *apart])


def named(row):
    """What a reader takes an experiment for: no more than the name of its folder says, but for the seed."""
    names = ("method", "arch", "depth", "width", "beta", "weights", "network") if "seed" in row["run"] else ()
    return tuple(row["run"].get(name) for name in names) or row["path"]


# ---------------------------------------------------------------------------------------------------- figures

def plot(args, rows):
    """Draw every figure that the averaged rows, and the logs of the run folders, have something for."""
    def order(row):  # λ may be "auto", and a fork's run may have none
        values = (row["run"].get(name) for name in ("beta", "width"))
        return [value if isinstance(value, (int, float)) else math.inf for value in values]

    logs = [{"run": common.read_json(Path(path, "args.json")),
             "log": [json.loads(line) for line in Path(path, "log.jsonl").read_text().splitlines()]}
            for path in args.paths if Path(path, "log.jsonl").exists()]
    ours, free = [row for row in rows if "seed" in row["run"]], ("width", "beta", "reference")
    experiments = grouped(sorted(ours, key=order), experiment, *free)
    figures = {"metrics": map(bars, grouped(rows, evaluated)),
               "against-width": (sweep(rows, "width", "beta") for rows in experiments),
               "against-lambda": (sweep(rows, "beta", "width") for rows in experiments),
               "by-epoch": map(by_epoch, grouped(sorted(logs, key=order), experiment, *free))}
    for name, drawn in figures.items():
        for i, figure in enumerate(filter(None, drawn), 1):
            figure.savefig(path := Path(args.plot, f"{name}-{i}.png"), dpi=150)
            say(str(path))


def bars(rows):
    """Fig. 6: the three metrics of every network."""
    from matplotlib.figure import Figure
    figure, ys = Figure((7, 1 + 0.7 * len(rows)), layout="constrained"), range(len(rows))
    axes = figure.subplots()
    for i, name in enumerate(METRICS):
        drawn = axes.barh([y + 0.27 * i for y in ys], [row["shown"][name][0] for row in rows], 0.25,
                          label=name.replace("_", " "))
        axes.bar_label(drawn, fmt="%.1f", padding=2)
    axes.set(yticks=[y + 0.27 for y in ys], yticklabels=[row["path"][-45:] for row in rows], xlim=(0, 110),
             ylim=(len(rows), -0.5))
    figure.suptitle(evaluated(rows[0]), fontsize="small")
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def curves(lines, title, **axis):
    """A figure of panels, two in a row. A line is (its panel, its label, x, y, {more of its look})."""
    from matplotlib.figure import Figure
    names = [*dict.fromkeys(line[0] for line in lines)]  # each once, in order
    labels = [*dict.fromkeys(line[1] for line in lines)]
    figure, handles = Figure((7, 1 + 1.3 * len(names)), layout="constrained"), {}
    panels = dict(zip(names, figure.subplots(math.ceil(len(names) / 2), 2, squeeze=False).flat))
    for name, label, x, y, look in lines:
        handle, = panels[name].plot(x, y, color=f"C{labels.index(label)}", markersize=3, **look)
        handles.setdefault(label, handle)
    for name, panel in panels.items():
        panel.set(title=name, **axis)
        panel.minorticks_off()
    figure.suptitle(title, fontsize="small")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
    return figure


def sweep(rows, axis, per):
    """The metrics and local Lipschitzness against `axis`, "width" or "beta" (λ), a line per the other.

    A dot is a seed. Below robust accuracy of four λ or more a bar spans the seeds' `best` λ. None if there
    are fewer than two places on the axis, which is logarithmic.
    """
    rows = [row for row in rows if row["run"].get(axis) not in (None, "auto", 0)]
    ticks = sorted({row["run"][axis] for row in rows})
    if len(ticks) < 2:
        return None
    words, lines = {"width": "width", "beta": "λ"}, []
    for header, name in COLUMNS.items():
        for i, line in enumerate(grouped(rows, lambda row: row["run"].get(per))):
            line = sorted(line, key=lambda row: row["run"][axis])
            label = f"{words[per]} = {line[0]['run'].get(per)}"
            scale = 100 if name in METRICS else 1
            dots = [(row["run"][axis], scale * one["results"].get(name, math.nan), seed)
                    for row in line for seed, one in row["seeds"].items()]
            x = [row["run"][axis] for row in line]
            lines.append((header, label, x, [row["shown"].get(name, [math.nan])[0] for row in line], {}))
            lines.append((header, label, *np.transpose(dots)[:2], {"ls": "", "marker": "o"}))
            if axis == "beta" and name == "robust_accuracy" and len(x) > 3:
                tops = [best([dot[:2] for dot in dots if dot[2] == seed]) for seed in line[0]["seeds"]]
                low = min(dot[1] for dot in dots)
                lines.append((header, label, [min(tops), max(tops)], [low - 1 - i] * 2, {"lw": 4}))
    return curves(lines, evaluated(rows[0]), xlabel=words[axis], xscale="log", xticks=ticks,
                  xticklabels=[f"{tick:g}" for tick in ticks])


def best(points):
    """λ*: the top of the least-squares parabola of robust accuracy in log λ, within the λ that were run."""
    x, y = np.log([point[0] for point in points]), [point[1] for point in points]
    a, b, _ = np.polyfit(x, y, 2)
    return math.exp(np.clip(-b / (2 * a), min(x), max(x))) if a < 0 else math.nan


def by_epoch(logs):
    """Figs. 7-9: the risks by epoch, and a λ that changes; panels for each λ, a line per width."""
    lines = []
    for run, log in ((row["run"], row["log"]) for row in logs):
        risks = [name for name in log[0] if name.endswith(("_risk", "_regularization"))]
        adjusted = ["beta"] if run.get("beta") == "auto" else []
        for name in risks + adjusted:
            lines.append((f"{name.replace('_', ' ')}, λ = {run.get('beta')}", f"width {run.get('width')}",
                          [entry["epoch"] for entry in log], [entry[name] for entry in log], {}))
    return curves(lines, run.get("dataset"), xlabel="epoch")


def main(argv):
    args, failed = arguments(argv), []
    if common.WORLD > 1:
        raise UserError("eval.py is one process: start it without torchrun, or unset WORLD_SIZE")
    device = common.pick_device(args.device)
    if "autoattack" in args.attack:  # what is missing shows at once
        import pyautoattack  # noqa: F401
    if args.plot:
        import matplotlib  # noqa: F401
        Path(args.plot).mkdir(parents=True, exist_ok=True)
    jsons = [path for path in args.paths if path.endswith(".json")]
    others = [] if "none" in args.attack else [path for path in args.paths if path not in jsons]
    if args.json and Path(args.json).is_file() and args.json not in jsons:
        jsons.append(args.json)
    try:
        rows = {known_by(row): row for path in jsons for row in common.read_json(path)}
        grouped(average(rows.values()), evaluated)  # for its errors, before anything runs
    except (AttributeError, KeyError, TypeError):
        raise UserError(f"not all of {', '.join(jsons)} are results as eval.py --json writes them") from None

    def keep():
        if args.json:
            written = common.read_json(args.json) if Path(args.json).is_file() else []
            for row in written:  # another process's since
                rows.setdefault(known_by(row), row)
            text = ",\n".join(map(json.dumps, rows.values()))
            common.write_file(Path(args.json).resolve(), f"[\n{text}\n]\n".encode())  # a link stays one

    keep()  # where that fails, it fails before the work
    try:
        for path in others:
            try:
                for row in evaluate(path, args, device):
                    rows[known_by(row)] = row
                    keep()
                    say(f"{path}: {evaluated(row)}: {common.describe(row['results'])}")
            except UserError as error:
                if len(args.paths) == 1:
                    raise
                common.warn(str(error) if path in str(error) else f"{path}: {error}")
                failed.append(path)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{len(rows)} rows were finished") from None
    finally:
        for group in grouped(average(rows.values()), evaluated):
            say(table(group))
    if args.plot:
        plot(args, average(rows.values()))
    if failed:
        raise UserError(f"left out: {', '.join(failed)}; the warnings say why")


if __name__ == "__main__":
    common.launch(main)

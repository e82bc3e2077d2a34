"""The paper's three metrics of any checkpoints: a table, JSON, figures (Figs. 5-9; Apps. C, G and H).

    python eval.py runs/*                                    # PGD-20, each run's best.pt and own ε
    python eval.py runs/* --precision auto --compile auto    # sooner on a GPU: predictions stay in float32
    python eval.py runs/* --merge-seeds --json results.json  # means over seeds; the JSON keeps every run
    python eval.py results.json --attack none --plot plots   # figures of what is there, no new attacks
    python eval.py model.pt --attack pgd cw autoattack       # a published network, on CIFAR-10
    python eval.py model.pt --normalize cifar10              # one that was trained on (x - mean)/std
    python eval.py robustbench:Pang2020Boosting robustbench:Hendrycks2019Using robustbench:Carmon2019Unlabeled

A PATH is a run folder, a checkpoint of ours or a published one, robustbench:NAME for an entry of its zoos, or
a file that --json wrote, whose rows join. A published network is known by the names of its parameters: those
of TRADES, MART, AWP, RST and Fast AT (WideResNet, PreActResNet), or ours (DenseNet-BC). The last command has
those networks of Fig. 6 that the paper's text names: HE, Pretrain and RST.

natural accuracy P[f(x)=y]; robust accuracy P[f(x)=f(x̂)=y]; stability P[f(x)=f(x̂)]. x̂ is the last iterate of
an attack, the worst over --restarts. AutoAttack attacks f(x) in place of y, and so counts what is stable. Of
two attacks or more a last row has the worst, image by image. Local Lipschitzness is over the ℓ∞ ball.

± is a 95 % interval: over images for one run (Wilson), over seeds for three or more (Student). Two seeds have
none. --merge-seeds averages runs that agree in settings, code, data and attack, and differ in their seed.
"""
import argparse
import functools
import importlib
import io
import itertools
import json
import math
import os
import re
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path

import common  # before PyTorch: it says how threads wait
import torch
from common import METRICS, Attack, UserError, say

NORMALIZE = {"cifar10": "0.4914 0.4822 0.4465 0.2471 0.2435 0.2616",  # of AWP, Fast AT, robust_overfitting
             "imagenet": "0.485 0.456 0.406 0.229 0.224 0.225",
             "+-1": "0.5 0.5", "none": "0 1"}  # pixels in [-1, 1], or in [0, 1] whatever a file holds
ZOO, THREATS = "robustbench:", {"linf": "Linf", "l2": "L2"}
AUTOATTACK = "pyautoattack"  # on PyPI, by AutoAttack's authors


def arguments(argv):
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add("paths", nargs="*", metavar="PATH", type=os.path.expanduser,
        help="run folder, checkpoint, robustbench:NAME or JSON")
    add("--checkpoint", choices=("best", "last"), default="best", help="which one of a run folder to read; "
        "the best.pt of several runs were trained for different times: compare widths by last")
    own = [name for name in common.LOSSES if name not in ("cross-entropy", "margin")]  # a fork's
    add("--attack", nargs="+", choices=("pgd", "cw", "fgsm", "autoattack", *own, "none"), default=["pgd"],
        help="pgd: on cross-entropy; cw: PGD on the margin; fgsm: one step of ε; none: evaluate nothing")
    add("--steps", type=common.integer(0), default=20, help="attack steps of pgd and cw")
    add("--step-size", type=common.number(), help="of pgd and cw; by default 0.003 (l2: 0.2), and longer in "
        "proportion where ε is above 8/255 (0.5)")
    add("--eps", type=common.number(), help="radius, pixels in [0, 1]; 8/255 works; by default what training "
        "had, 8/255 for RobustBench's, else 0.031 (l2: 0.5)")
    add("--norm", choices=("linf", "l2"), help="of the ball; by default what training had, else linf")
    add("--start", choices=("uniform", "gaussian", "none"), help="by default uniform, for fgsm none")
    add("--restarts", type=common.integer(), default=1, help="of attacks with a random start")
    add("--seed", type=common.integer(0), default=0, help="seeds the attacks")
    add("--dataset", metavar="NAME", help="by default the checkpoint's, else cifar10")
    add("--data-dir", default="data", metavar="DIR", help="where data sets are, or are downloaded to")
    add("--normalize", nargs="+", metavar="M", help=f"the network takes (pixels - mean)/std: one of "
        f"{', '.join(NORMALIZE)}; or three means and three deviations; or one of each; by default what the "
        "file holds")
    add("--eval-size", type=common.integer(), metavar="N", help="random test images; by default all")
    add("--lipschitz-size", type=common.integer(0), default=1000, metavar="N", help="for local Lipschitzness")
    add("--batch-size", type=common.integer(), default=128, help="images an attack handles at once")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--precision", choices=("auto", "fp32", "bf16"), default="fp32",
        help="of attacks, predictions are always fp32; auto: what a short measurement finds faster")
    add("--compile", choices=("auto", "on", "off"), default="off", help="torch.compile; auto: on CUDA only")
    add("--json", metavar="FILE", type=os.path.expanduser, help="write a row for each checkpoint and attack")
    add("--markdown", metavar="FILE", type=os.path.expanduser, help="write the table that is printed")
    add("--merge-seeds", action="store_true", help="show runs that differ in their seed alone as one")
    add("--plot", metavar="DIR", type=os.path.expanduser, help="draw the figures there, with matplotlib")
    args = parser.parse_args(argv)
    if not (args.paths or args.plot):
        parser.error("give a PATH to evaluate, or --plot")
    for option, value in (("--eps", args.eps), ("--step-size", args.step_size)):
        if args.norm != "l2" and value is not None and value > 1:
            parser.error(f"{option} {value:g}: pixels are in [0, 1]; {value:g}/255? or --norm l2")
    args.attack = [name for name in dict.fromkeys(args.attack) if name != "none"]
    args.normalize = args.normalize and mean_and_std(" ".join(args.normalize))
    return args


def mean_and_std(text):
    """[means, deviations] of --normalize, lists of one number or of three."""
    try:
        numbers = [common.number()(word) for word in NORMALIZE.get(text, text).replace(",", " ").split()]
    except (ValueError, argparse.ArgumentTypeError):
        numbers = []
    mean, std = numbers[:len(numbers) // 2], numbers[len(numbers) // 2:]
    if len(numbers) not in (2, 6) or min(std) == 0:
        raise UserError(f"--normalize {text} must be one of {', '.join(NORMALIZE)}; or three means and three "
                        "deviations above 0; or one of each (a PATH goes before it)")
    return [mean, std]


# ---------------------------------------------------------------------------------------------------- loading


load_data = functools.lru_cache(maxsize=1)(common.load_data)  # runs to compare mostly share their data


def load(path, args, device):
    """(model, Data, its training's ε, facts for the rows) of a run folder or a checkpoint."""
    file = Path(path)
    if file.is_dir():
        found = [file / f"{name}.pt" for name in (args.checkpoint, "last") if (file / f"{name}.pt").exists()]
        if not found:
            raise UserError(f"{file} is a folder without {args.checkpoint}.pt or last.pt")
        file = found[0]
    saved = common.read_checkpoint(file)
    settings = saved.get("args") if isinstance(saved, dict) else None
    if not (isinstance(settings, dict) and {"method", "arch", "dataset", "seed"} <= settings.keys()):
        settings = {}  # no run of ours
    dataset = args.dataset or settings.get("dataset", "cifar10")
    data = load_data(dataset, args.data_dir, device)
    trained_on = (settings.get("data") or data.hash).partition("+")[0]  # after it, the hash of extra images
    if dataset == settings.get("dataset") and trained_on != data.hash:
        common.warn(f"{file} was trained on another {dataset} than {args.data_dir} holds")

    own, others = common.parameters_of(saved)
    named = settings if settings.get("arch") in common.NETWORKS else guess_network(own, file)
    network = {name: named[name] for name in ("arch", "depth", "width")}
    model = common.build_model(argparse.Namespace(
        **network, activation=settings.get("activation", "relu"), init=None), data, device)
    parameters = model.state_dict().keys()
    normalize = args.normalize or statistics_in(saved, file, parameters)
    if not (normalize or settings):
        say(f"{file}: takes pixels in [0, 1]; a network trained on (x - mean)/std needs --normalize")
    common.load_weights(model, {name: value for name, value in (others | own).items()
                                if name in parameters or not STATISTIC.search(name)}, file)
    if normalize:
        mean, std = (torch.tensor(values, device=device).view(1, -1, 1, 1) for values in normalize)
        model.register_forward_pre_hook(lambda _, inputs: ((inputs[0] - mean) / std,))

    facts = {"checkpoint": str(file), "chosen": None, "epoch": None, "dataset": dataset, "data": data.hash,
             "normalize": normalize, **network}
    if settings:
        scripts = sorted(file.parent.glob("*.py")) if file.with_name("args.json").exists() else ()
        if scripts and not common.same_code(Path(common.__file__), file.with_name("common.py")):
            common.warn("common.py has changed since some of these networks were trained: today's evaluates them")
        facts |= {"chosen": file.stem if file.stem in ("best", "last") else None, "epoch": saved.get("epoch"),
                  "method": settings["method"], "beta": settings.get("beta"),
                  "code": common.hashed(*map(common.syntax, scripts))}
        log, done = file.with_name("log.jsonl"), math.inf
        if facts["chosen"] == "last":
            done = saved.get("epoch", done)
        elif facts["chosen"] and log.exists():
            done = len(log.read_text().splitlines())
        if done < settings.get("epochs", 0):
            common.warn(f"{file} is of an unfinished run, {done} of {settings['epochs']} epochs")
            facts["unfinished"] = done
    without = {*facts, *common.MAY_CHANGE} - {"dataset", "data"}
    facts["settings"] = {name: value for name, value in settings.items()
                         if name not in without and value is not None and value is not False}
    return model, data, settings.get("eps", 0.031), facts


def guess_network(state, file):
    """{"arch", "depth", "width"} of a published network, by the names of its parameters, or UserError."""
    def layers(prefix):
        return len({name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)})

    try:
        channels = len(state["conv1.weight"])
        if "layer1.0.conv1.weight" in state:
            arch, depth, width = "preact", 8 * layers("layer1.") + 2, channels / 64
        elif "trans1.conv1.weight" in state:
            arch, depth, width = "densenet", 6 * layers("block1.layer.") + 4, channels / 2
        else:
            channels = len(state["block1.layer.0.conv2.weight"])
            arch, depth, width = "wrn", 6 * layers("block1.layer.") + 4, channels / 16
    except (KeyError, TypeError):  # other names, or a number for a matrix
        raise UserError(f"{file} holds no network of common.py's NETWORKS with parameters named as in TRADES "
                        "(conv1, block1.layer.0.bn1, ...) or AWP (layer1.0.bn1, ...)") from None
    return {"arch": arch, "depth": depth, "width": int(width) if width == int(width) else width}


STATISTIC = re.compile(r"(?<!running_)(?:(mean|mu)|std|sigma)s?$", re.IGNORECASE)


def statistics_in(saved, file, parameters):
    """[means, deviations] of pixels that a checkpoint holds beside the parameters; None if it holds none.

    They are tensors, or lists of three floats, in dicts of dicts, with names such as "0.mean" or "sigma".
    UserError where they are not one pair, or not of pixels in [0, 1].
    """
    own = tuple(name for name in parameters if STATISTIC.search(name))  # a network may normalize by itself
    names, found, seen, left = [], {"mean": set(), "std": set()}, set(), [("", saved)]
    for name, item in left:
        match, item = STATISTIC.search(name), vars(item) if isinstance(item, argparse.Namespace) else item
        if isinstance(item, dict) and id(item) not in seen:  # a dict may hold itself
            seen.add(id(item))
            left += [(str(key), value) for key, value in item.items()]
        elif match and not name.endswith(own) and (isinstance(item, torch.Tensor) or isinstance(
                item, (list, tuple)) and [*map(type, item)] == [float] * 3):
            names.append(name)
            found["mean" if match[1] else "std"].add(tuple(torch.as_tensor(item).double().flatten().tolist()))
    if len(found["mean"]) == len(found["std"]) == 1:
        mean, std = ([*values] for (values,) in found.values())
        if len(mean) == len(std) in (1, 3) and min(std) > 0 and max(map(abs, mean + std)) <= 1:
            say(f"{file}: pixels are normalized by the mean and deviation that it holds")
            return [mean, std]
    if names:
        raise UserError(f"{file} holds {', '.join(names)}; say how its pixels are scaled: --normalize")
    return None


def load_zoo(path, args, device):
    """As `load`, of an entry of RobustBench's model zoo for --dataset and --norm, whatever its architecture.

    Its own package makes the network, which scales its pixels itself, and downloads the weights unless they
    lie in its folder `models`.
    """
    install = 'robustbench pyautoattack "setuptools<80"'
    sys.modules.setdefault("autoattack", optional(AUTOATTACK, path, install))  # the name that it imports
    package, dataset = optional("robustbench.utils", path, install), args.dataset or "cifar10"
    data = load_data(dataset, args.data_dir, device)
    try:
        norm = args.norm or "linf"
        model = package.load_model(path.removeprefix(ZOO), dataset=dataset, threat_model=THREATS[norm])
    except Exception as error:  # unknown names, downloads and foreign checkpoints fail in many ways
        raise UserError(f"{path}: RobustBench has no such network for --dataset {dataset} and --norm "
                        f"{norm}, or cannot load it: {error!r}") from None
    facts = {"checkpoint": path, "chosen": None, "epoch": None, "dataset": dataset, "data": data.hash,
             "normalize": None, "settings": {}}
    return model.to(device, memory_format=torch.channels_last), data, 8 / 255, facts


def optional(package, purpose, install=None):
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(f"{purpose} needs a package ({error}): pip install {install or package}") from None


# ------------------------------------------------------------------------------------------------- evaluating


def attacks_of(args, eps):
    """The records of --attack with this ε."""
    step = args.step_size
    if step is None:
        step = common.report_attack(eps, args.norm).step_size
    start = args.start or "uniform"
    records = {name: (name, args.steps, step, start) for name in common.LOSSES}
    records |= {"pgd": ("cross-entropy", args.steps, step, start), "cw": ("margin", args.steps, step, start),
                "fgsm": ("cross-entropy", 1, eps, args.start or "none"),
                "autoattack": ("autoattack", 0, 0.0, "none")}  # its four attacks choose their own
    return [Attack(loss, args.norm, eps, step, steps, start, 1 if start == "none" else args.restarts)
            for loss, steps, step, start in (records[name] for name in args.attack)]


def evaluate(path, args, device):
    """The rows of one PATH, one by one: a dict for each attack, and one for the worst of several."""
    settings = Path(path) / "args.json"
    if settings.exists() and "crops" in common.read_json(settings):
        common.warn(f"{path} is of Fast AT on ImageNet, which its own script tests: left out")
        return
    model, data, radius, facts = (load_zoo if path.startswith(ZOO) else load)(path, args, device)
    own = facts["settings"].get("norm", "linf")  # a fork's may be l2
    norm, radii = args.norm or own, {"linf": 0.031, "l2": 0.5, own: radius}
    x, y = data.test(args.eval_size)
    execution = argparse.Namespace(**{**vars(args), "norm": norm})
    common.set_execution(execution, x[:args.batch_size], model)
    eps = args.eps if args.eps is not None else radii[norm]
    facts, n = {"path": path, **facts, "seed": args.seed}, min(args.lipschitz_size, len(x))
    if n:
        ball = common.report_attack(eps if norm == "linf" else radii["linf"])
        some = common.in_order(x[:n], y[:n], args.batch_size)
        facts |= {"lipschitz_n": n, "local_lipschitzness": common.local_lipschitzness(model, some, ball)}

    attacks, found = attacks_of(execution, eps), []
    for attack in attacks + [attacks] * (len(attacks) > 1):
        began, precision = time.perf_counter(), execution.precision
        if attack is attacks:  # a point is stable if its prediction survives all of them
            adversarial = functools.reduce(lambda one, other: torch.where(one == natural, other, one), found)
        elif attack.loss == "autoattack":
            (natural, adversarial), precision = autoattack(model, x, attack, args), "fp32"
        else:
            stream = common.in_order(x, y, args.batch_size)
            _, natural, adversarial = common.predictions(model, stream, attack, args.seed)
        found.append(adversarial)
        metrics = common.three_metrics(y, natural, adversarial)
        chance = data.y_test.bincount().max() / len(data.y_test)
        if len(found) == 1 and wilson(metrics["natural_accuracy"], len(y))[0] <= chance:
            common.warn(f"{path}: natural accuracy is no better than chance; was it trained on other pixels "
                        "(try --normalize), another data set, or another order of the classes?")
        yield {**facts, "attack": [*map(asdict, attacks)] if attack is attacks else asdict(attack),
               "precision": precision, **metrics,
               **{f"{name}_ci": wilson(metrics[name], len(y)) for name in METRICS},
               "seconds": round(time.perf_counter() - began, 2)}


def autoattack(model, x, attack, args):
    """f(x), f(x̂) [N] by the standard AutoAttack (Croce & Hein 2020) of the labels f(x).

    Raises UserError without its package, or if the network has fewer than four classes.
    """
    compiled, model._compiled_call_impl = model._compiled_call_impl, None  # batches shrink: always new shapes
    images = common.to_float(x).contiguous()
    logits = torch.cat([common.logits_of(model, part, i * args.batch_size)
                        for i, part in enumerate(images.split(args.batch_size))])
    natural, classes = logits.argmax(1), logits.shape[1]
    if classes < 4:
        raise UserError(f"AutoAttack needs four classes, the network has {classes}; choose another --attack")
    with common.fixed_seed(args.seed, x.device), common.attack_mode(model), common.exact_precision(model):
        package = optional(AUTOATTACK, "--attack autoattack").AutoAttack(
            model, norm=THREATS[attack.norm], eps=attack.eps, seed=args.seed, device=x.device)
        package.apgd_targeted.n_target_classes = package.fab.n_target_classes = min(9, classes - 1)
        model.to(memory_format=torch.contiguous_format)  # channels_last forbids its views of gradients
        _, adversarial = package.run_standard_evaluation(images, natural, batch_size=args.batch_size)
        model.to(memory_format=torch.channels_last)
    model._compiled_call_impl = compiled
    return natural, adversarial


def wilson(p, n, z=1.959964):
    """The 95 % interval [low, high] (Wilson 1927) of a fraction p of n independent images."""
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return [round(min(max(end / (1 + z * z / n), 0.0), 1.0), 6) for end in (centre - half, centre + half)]


# -------------------------------------------------------------------------------------------- rows of results


COLUMNS = {"natural %": METRICS[0], "robust %": METRICS[1], "stability %": METRICS[2],
           "local Lipschitz": "local_lipschitzness"}
RESULTS = {*COLUMNS.values(), *(f"{name}_ci" for name in COLUMNS.values()), "seconds", "seeds"}
NEEDED = {"path", "checkpoint", "chosen", "epoch", "dataset", "data", "normalize", "settings", "attack",
          "seed", "precision", "n", *METRICS}
STUDENT = (4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # its 97.5 % points for 3, 4, ... 10 seeds


def earlier_rows(path):
    """The rows of a file that --json wrote, or UserError."""
    try:
        rows = common.read_json(path)
        if all(NEEDED <= row.keys() and experiment(row) and title(row["attack"]) for row in rows):
            return rows
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (AttributeError, TypeError):  # not dicts, or an attack that is none
        pass
    raise UserError(f"{path} is not a list of results as eval.py --json writes it; make an older one anew")


def experiment(row, *free):
    """What a row's numbers are of, but for what is free, as text. Equal texts are the same experiment."""
    facts = {**row, **{f"training {name}": value for name, value in row["settings"].items()}}
    free = {*RESULTS, "settings", *free}
    return json.dumps({name: value for name, value in sorted(facts.items()) if name not in free})


def across_seeds(row, *free):
    """`experiment` in any folder and of any seed. A row without settings is comparable to no other."""
    if not row["settings"]:
        return experiment(row)
    epoch = ("epoch",) if row["chosen"] == "best" else ()  # each has its own
    text = experiment(row, "path", "checkpoint", "training seed", *epoch, *free)
    return re.sub(r"seed\d+", "seed", text)  # of --reference: each seed has its own


def merge_seeds(rows):
    """One row for all that differ in their seed alone: means, Student's intervals, the number of "seeds"."""
    groups, merged = {}, []
    for row in rows:
        group, seed = groups.setdefault(across_seeds(row), {}), row["settings"].get("seed")
        if seed in group:
            common.warn(f"{row['path']} takes the place of {group[seed]['path']}, a run of the same seed")
        group[seed] = row
    for first, *others in (group.values() for group in groups.values()):
        n, path = 1 + len(others), os.path.commonprefix([row["path"] for row in (first, *others)]) + "*"
        merged.append({**first, "seeds": n})
        if others:
            merged[-1] |= {"path": path, "checkpoint": f"{path}/{first['chosen']}.pt"}
        for name in {*COLUMNS.values()} & first.keys() if others else ():
            values = [row[name] for row in (first, *others)]
            merged[-1] |= {name: statistics.mean(values), f"{name}_ci": None}
            if n > 2:
                half = STUDENT[min(n, 10) - 3] * statistics.stdev(values) / math.sqrt(n)
                merged[-1][f"{name}_ci"] = [merged[-1][name] - half, merged[-1][name] + half]
    return merged


def title(attack):
    """Such as "PGD-20, ε = 8/255, step 0.003"; of a list "worst of PGD-20, CW-20, ε = 8/255, step 0.003"."""
    if isinstance(attack, dict):
        return Attack(**attack).title()
    titles = [Attack(**record).title() for record in attack]
    names = ", ".join(text.partition(",")[0] for text in titles)
    return f"worst of {names}, {max(titles, key=len).partition(', ')[2]}"


def table(rows):
    """A line of what all rows share, and a markdown table of the rest; fractions in percent."""
    def described(row):
        chosen = f"best on {'validation' if row['settings'].get('val_size') else 'test'} images"
        normalize = " ".join(f"{number:g}" for part in row["normalize"] or () for number in part)
        return {"model": row["path"], "checkpoint": chosen if row["chosen"] == "best" else row["chosen"],
                "epochs so far": row.get("unfinished"),
                "data": f"{row['dataset']} ({row['data'][:6]})", "normalized by": normalize,
                "attack": title(row["attack"]) + (f", seed {row['seed']}" if row["seed"] else ""),
                "precision": row["precision"], "images": row["n"], "seeds": row.get("seeds")}

    def number(row, name):
        scale, value, interval = (100 if name in METRICS else 1), row.get(name), row.get(f"{name}_ci")
        text = "" if value is None else f"{scale * value:.2f}"
        return f"{text} ±{scale * (interval[1] - interval[0]) / 2:.2f}" if interval else text

    facts = [described(row) for row in rows]
    shared = {name: text for name, text in facts[0].items()
              if name != "model" and all(fact[name] == text for fact in facts)}
    columns = [[name, *(fact[name] or "" for fact in facts)] for name in facts[0] if name not in shared]
    columns += [[header, *(number(row, name) for row in rows)] for header, name in COLUMNS.items()]
    for column in columns:
        width, pad = max(len(str(text)) for text in column), str.ljust if column is columns[0] else str.rjust
        column[:] = [pad(str(text), width) for text in column]
        column.insert(1, pad(":", width, "-"))
    caption = "; ".join(f"{name} {text}" for name, text in shared.items() if text)
    return "\n".join([caption, "", *(f"| {' | '.join(line)} |" for line in zip(*columns))]) + "\n"


def write_results(args, rows, last=False):
    """Replace the files asked for by the rows so far. A pipe or a device is written to at the end."""
    contents = {args.json: "[" + ",\n ".join(map(json.dumps, rows)) + "]\n",
                args.markdown: table(merge_seeds(rows) if args.merge_seeds else rows)}
    for path, text in contents.items():
        if path is None:
            continue
        pipe = path.startswith(("/dev/std", "/dev/fd/")) or Path(path).exists() and not Path(path).is_file()
        if not pipe:
            common.write_file(os.path.realpath(path), text.encode())  # a link stays one
        elif last:
            with open(path, "a") as stream:
                stream.write(text)


# ---------------------------------------------------------------------------------------------------- figures


ORANGE, GREEN, SKY = "#E69F00", "#009E73", "#56B4E9"  # Okabe & Ito 2008: for the colour-blind too
COLOURS = ("#0072B2", ORANGE, GREEN, "#D55E00", "#CC79A7", SKY, "black")
LINES = [*zip(COLOURS, "osD^vPX", ("-", "--", "-.", ":") * 2)]  # each line's colour, marker and dash
STYLE = {"font.size": 7, "axes.titlesize": 8, "axes.labelsize": 8, "axes.spines.top": False,
         "axes.spines.right": False, "axes.linewidth": 0.6, "legend.frameon": False, "lines.linewidth": 1.2}


def plot(args, rows):
    """Draw every figure that the rows, and the logs of the run folders, have something for."""
    def grouped(items, same):
        groups = {}
        for item in items:
            groups.setdefault(same(item), []).append(item)
        return groups.values()

    def attack(row):  # for a file's name
        return title(row["attack"]).partition(", step")[0].replace("×", "x").replace("ε = ", "eps")

    merged, figures = merge_seeds(rows), [(schedules_figure, [], ["schedules"])]
    for group in grouped(merged if args.merge_seeds else rows, lambda row: json.dumps(
            [row[name] for name in ("dataset", "data", "attack", "seed", "precision", "n")])):
        figures.append((metrics_figure, group, ["metrics", group[0]["dataset"], attack(group[0])]))
    for group in grouped((row for row in merged if row["settings"]),
                         lambda row: across_seeds(row, "width", "beta", "training reference")):
        if len(levels(group, "width")) > 1:
            parts = [group[0][name] for name in ("method", "dataset", "arch", "depth", "chosen")]
            figures.append((width_figure, group, ["width", *parts, attack(group[0])]))
    for group in grouped(filter(None, map(logged, args.paths)), lambda run: run["experiment"]):
        parts = [group[0].get(name) for name in ("method", "dataset", "arch", "depth")]  # a fork has others
        figures.append((training_figure, group, ["training", *parts]))

    import matplotlib.figure
    matplotlib.rcParams.update(STYLE)
    names = []
    for figure_of, group, parts in figures:
        names.append(re.sub(r"[^\w.]+", "-", "-".join(str(part) for part in parts if part)).lower())
        number = f"-{names.count(names[-1])}" if names[-1] in names[:-1] else ""
        figure, image = matplotlib.figure.Figure(figsize=(3.3, 1.9), layout="constrained"), io.BytesIO()
        figure_of(figure, group)  # 3.3 inches: one column of a two-column paper
        figure.savefig(image, format="png", dpi=150)
        path = Path(args.plot, f"{names[-1]}{number}.png")
        common.write_file(path, image.getbuffer())
        say(str(path))


def logged(path):
    """A run folder's settings, its "log", what is "drawn" of it, and the "experiment" as text."""
    folder = Path(path)
    if not (folder / "args.json").exists() or not (folder / "log.jsonl").exists():
        return None
    settings, free = common.read_json(folder / "args.json"), {"width", "beta", "reference", "seed"}
    same = {name: value for name, value in sorted(settings.items()) if value not in (None, False)
            and name not in free | common.MAY_CHANGE}
    try:
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    except ValueError:
        raise UserError(f"{folder / 'log.jsonl'} is not what a run wrote") from None
    changes = len({entry.get("beta") for entry in log}) > 1
    drawn = [name for entry in log[:1] for name in entry if name.endswith("_risk")
             or name == "robust_regularization" or name == "beta" and changes]
    return {**settings, "log": log, "drawn": drawn, "experiment": json.dumps(same)} if drawn else None


def levels(rows, name):
    """The distinct values of a setting in order, words last: β may be a number, a word or None."""
    return sorted({row.get(name) for row in rows}, key=lambda value: (isinstance(value, str), value or 0))


def setting(name, value):
    """Such as "λ = 6" or "λ = auto"; "" for None."""
    return f"{name} = {value:g}" if isinstance(value, (int, float)) else f"{name} = {value}" if value else ""


def schedules_figure(figure, _):
    """Fig. 5: the learning rate over 100 epochs, by every schedule there is."""
    axes, epochs = figure.subplots(), range(1, 101)
    for (name, schedule), (colour, _, dash) in zip(common.SCHEDULES.items(), itertools.cycle(LINES)):
        rates = [0.1 * schedule(epoch, 100) for epoch in epochs]
        axes.step(epochs, rates, dash, color=colour, label=name, where="mid")
    axes.set(xlabel="epoch", ylabel="learning rate", yscale="log", ylim=(1e-5, 0.2))
    axes.legend()


def metrics_figure(figure, rows):
    """Fig. 6, its two circles as bars: test images side by side; natural and stable overlap in robust."""
    figure.set_figheight(0.85 + 0.42 * len(rows))
    axes = figure.subplots()
    for y, row in enumerate(rows):
        natural, robust, stability = (100 * row[name] for name in METRICS)
        parts = [("natural, not stable", 0, natural - robust, SKY),
                 ("both: robust", natural - robust, robust, GREEN),
                 ("stable, not natural", natural, stability - robust, ORANGE)]
        for label, left, length, shade in parts:
            axes.barh(y + 0.12, length, 0.32, left=left, color=shade, label=None if y else label)
        axes.text(natural - robust / 2, y + 0.12, f"{robust:.1f}", ha="center", va="center_baseline")
        name = row["checkpoint"] if len(row["checkpoint"]) < 30 else f"…{row['checkpoint'][-28:]}"
        axes.text(0, y - 0.12, name)
        axes.text(100, y - 0.12, f"natural {natural:.1f}  stable {stability:.1f}", ha="right")
    axes.set(xlabel=f"test images of {rows[0]['dataset']} (%)\n{title(rows[0]['attack'])}", yticks=[],
             xlim=(0, 100), ylim=(len(rows) - 0.6, -0.5))
    figure.legend(loc="outside upper center", ncols=3, handlelength=1, columnspacing=1)


def width_figure(figure, rows):
    """The metrics and local Lipschitzness against width, a line per λ, with the 95 % intervals there are."""
    figure.set_figheight(5.4)
    shown = {header: name for header, name in COLUMNS.items() if all(name in row for row in rows)}
    betas, widths = levels(rows, "beta"), levels(rows, "width")
    panels = figure.subplots(len(shown), sharex=True)
    for axes, (header, name) in zip(panels, shown.items()):
        scale = 100 if name in METRICS else 1
        for i, (beta, (colour, marker, _)) in enumerate(zip(betas, itertools.cycle(LINES))):
            line = sorted((row for row in rows if row["beta"] == beta), key=lambda row: row["width"])
            values = [scale * row[name] for row in line]
            ends = [row.get(f"{name}_ci") or [row[name]] * 2 for row in line]
            bars = [[abs(scale * end[side] - value) for end, value in zip(ends, values)] for side in (0, 1)]
            beside = [(1 + 0.02 * i) * row["width"] for row in line]  # so that no interval hides another
            axes.errorbar(beside, values, bars, color=colour, marker=marker, markersize=4, capsize=2,
                          label=setting("λ", beta))
        axes.set(ylabel=header)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    panels[-1].set(xlabel=f"width ({rows[0]['dataset']})\n{title(rows[0]['attack'])}", xscale="log",
                   xticks=widths, xticklabels=widths)
    panels[-1].minorticks_off()


def training_figure(figure, runs):
    """Figs. 7-9: the risks, and a λ that changes, by epoch; a row per λ, a colour per width."""
    betas, widths = levels(runs, "beta"), levels(runs, "width")
    names = [*dict.fromkeys(name for run in runs for name in run["drawn"])]
    figure.set_figheight(0.6 + 1.3 * len(betas))
    panels = figure.subplots(len(betas), len(names), sharex=True, squeeze=False)
    colours = {width: colour for width, (colour, *_) in zip(widths, itertools.cycle(LINES))}
    for run in runs:
        for axes, name in zip(panels[betas.index(run.get("beta"))], names):
            values = [math.nan if entry.get(name) is None else entry[name] for entry in run["log"]]
            axes.plot([entry["epoch"] for entry in run["log"]], values, ".-", markersize=2,
                      color=colours[run.get("width")])  # dots: a run may have one epoch
    for name, axes in zip(names, panels[0]):
        axes.set_title("λ" if name == "beta" else name.replace("_", " "))
    for beta, axes in zip(betas, panels[:, 0]):
        axes.set(ylabel=setting("λ", beta))
    eps = f" (ε = {common.pixels(runs[0]['eps'])})" if "eps" in runs[0] else ""
    figure.supxlabel(f"epoch{eps}", fontsize=8)
    handles = [panels[0, 0].plot([], color=colours[width])[0] for width in widths]
    figure.legend(handles, [setting("width", width) for width in widths], loc="outside upper center", ncols=4)


# ------------------------------------------------------------------------------------------------------- main


def main(argv):
    args = arguments(argv)
    device = common.pick_device(args.device)
    if "autoattack" in args.attack:  # what is missing shows at once
        optional(AUTOATTACK, "--attack autoattack")
    if args.plot:
        optional("matplotlib.figure", "--plot", "matplotlib")
    for file in filter(None, (args.json, args.markdown, args.plot and f"{args.plot}/schedules.png")):
        try:
            Path(file).parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{file} cannot be written: {error.strerror}") from None
        if Path(file).is_dir():
            raise UserError(f"{file} is a folder; name a file in it")
    rows, failed = {}, []
    try:
        for path in sorted(args.paths, key=lambda path: not path.endswith(".json")):  # read before written to
            try:
                if path.endswith(".json"):
                    rows |= {experiment(row): row for row in earlier_rows(path)}
                    continue
                for row in evaluate(path, args, device) if args.attack else ():
                    rows[experiment(row)] = row
                    write_results(args, [*rows.values()])
                    say(f"{row['checkpoint']}: {title(row['attack'])}  {common.describe(row)}")
            except UserError as error:
                if len(args.paths) == 1 or args.json and Path(path).resolve() == Path(args.json).resolve():
                    raise
                common.warn(str(error) if path in str(error) else f"{path}: {error}")
                failed.append(path)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{len(rows)} rows were finished") from None
    finally:
        rows = [*rows.values()]
        if rows:
            say(table(merge_seeds(rows) if args.merge_seeds else rows))
    if args.plot:
        plot(args, rows)
    if rows:
        write_results(args, rows, last=True)
    if failed:
        raise UserError(f"left out: {', '.join(failed)}; the warnings say why")


if __name__ == "__main__":
    common.launch(main)

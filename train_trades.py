"""TRADES (Zhang et al. 2019) at any width and λ: the paper's main experiment (Tables 1-3, Figs. 1-3, 7-9).

    python train_trades.py --width 10 --beta 12           # WideResNet-34-10 on CIFAR-10, the paper's setting
    python train_trades.py --quick                        # a first look, on any machine

A row of the paper is a --width and a --beta (6, 12 or 18 in the figures) of one of these:

    python train_trades.py --width 10 --beta 18                     # Table 1, upper half; Table 2; Figs. 1, 7
    python train_trades.py --width 10 --beta 18 --dataset cifar100  # Table 2 and Fig. 8: CIFAR-100
    python train_trades.py --arch densenet --beta 18                # Table 2 and Fig. 9: DenseNet-BC-40-12
    python train_trades.py --width 10 --schedule step               # Fig. 2: the schedule of TRADES

Loss: cross-entropy + β·KL(f(x) ‖ f(x̂)). x̂ comes from 10 steps of PGD on that KL. Settings: App. B and C.

A λ that follows the width by itself (the paper's width-adjusted regularization, `adjusted_beta` below):

    python train_trades.py --width 1 --beta 6 --out runs/narrow     # tuned on a narrow network
    python train_trades.py --width 10 --beta auto --reference runs/narrow

500K extra images (RST, Carmon et al. 2019; App. C and G), half of each batch. One line of Python makes the
.npz of RST's pickle, which only a trusted copy should go through, since unpickling can run code:

    python -c "import pickle, numpy; d = pickle.load(open('ti_500K_pseudo_labeled.pickle', 'rb')); \\
        numpy.savez('data/ti500k.npz', image=d['data'], label=numpy.array(d['extrapolated_targets']))"
    python train_trades.py --extra-data data/ti500k.npz --depth 28 --width 10 --beta 6 --epochs 200 \\
        --schedule cosine --batch-size 256 --weight-decay 5e-4 --nesterov

Generated images and today's other ingredients (Wang et al. 2023). Their project publishes the .npz, with
`image` and `label`, at huggingface.co/datasets/P2333/DM-Improves-AT:

    python train_trades.py --extra-data data/1m.npz --extra-fraction 0.7 --val-size 1024 --depth 28 \\
        --width 10 --beta 5 --eps 8/255 --step-size 2/255 --epochs 400 --schedule one-cycle --lr 0.2 \\
        --batch-size 512 --weight-decay 5e-4 --no-norm-decay --nesterov --activation silu \\
        --label-smoothing 0.1 --ema 0.995

With extra images an epoch is a pass over as many, labelled and extra together, as the labelled set has.
"""
import json
import math
from pathlib import Path

import common  # before PyTorch: it says how threads wait
import torch
import torch.nn.functional as F
from common import Attack, UserError, clean_probabilities, integer, kl_to, number, pgd
from torch.optim.swa_utils import AveragedModel

RISKS = "natural_risk", "robust_regularization"  # the two parts of equation (1.1), as logs name them


def trades_loss(model, x, x_adv, y, beta, label_smoothing=0.0):
    """(loss, natural risk, robust regularization), batch means: equation (1.1) with KL as the regularization.

    x, x_adv [N, 3, H, W] in [0, 1]; y [N]. Train mode. Clean and adversarial images pass separately, so that
    BatchNorm sees each alone. The gradient goes through both arguments of the KL.
    """
    model.train()
    logits, logits_adv = model(x), model(x_adv)
    natural_risk = F.cross_entropy(logits, y, label_smoothing=label_smoothing)
    robust_regularization = F.kl_div(F.log_softmax(logits_adv, 1), F.log_softmax(logits, 1), log_target=True,
                                     reduction="batchmean")
    return natural_risk + beta * robust_regularization, natural_risk, robust_regularization


def adjusted_beta(log, reference):
    """Width-adjusted regularization: the λ of the epoch after `log`, given the `reference` run's log.

    The paper enlarges a wide network's λ so that natural risk over robust regularization stays what it was in
    a narrow one with a tuned λ. Its Algorithm 1 was not at hand. Our reading: λ starts at the reference's.
    After each epoch it is multiplied by the square root of that epoch's ratio in the reference over our own.
    It stays between the reference's λ and ten times that. (The ratio answers to λ with a power above 1:
    without the root λ zigzags.) It depends on the two logs alone: a resumed run goes on as it would have.
    """
    smallest = reference[0]["beta"]
    if not log:
        return smallest
    ours, theirs = log[-1], reference[len(log) - 1]
    if min(ours[name] for name in RISKS) <= 0:  # no ratio to adjust by
        return ours["beta"]
    our_ratio, their_ratio = (line[RISKS[0]] / line[RISKS[1]] for line in (ours, theirs))
    beta = ours["beta"] * math.sqrt(their_ratio / our_ratio)
    return min(max(beta, smallest), 10 * smallest)


def reference_log(args, data):
    """The log of --reference, a finished run that differs in network, λ and seed alone, or UserError."""
    if (args.beta == "auto") != bool(args.reference):
        raise UserError("--beta auto and --reference RUN go together")
    if not args.reference:
        return None
    checkpoint = common.read_checkpoint(Path(args.reference) / "last.pt")
    settings, log = {"norm": "linf", **checkpoint["args"]}, checkpoint["log"]
    free = {"arch", "depth", "width", "init", "beta", "seed", "precision", "reference", "reference_hash",
            "extra_data", "arch_from", *common.MAY_CHANGE}
    here = {**vars(args), "data": data.hash}
    differing = [f"--{name.replace('_', '-')} {settings.get(name)} there, {here.get(name)} here"
                 for name in {**settings, **here}
                 if name not in free and not name.endswith(".py") and settings.get(name) != here.get(name)]
    if differing:
        raise UserError(f"--reference {args.reference} is another experiment: {'; '.join(differing)}")
    if len(log) < args.epochs:
        raise UserError(f"--reference {args.reference} is unfinished: {len(log)} of {args.epochs} epochs")
    if not all(min(line[name] for name in ("beta", *RISKS)) > 0 for line in log):
        raise UserError(f"--reference {args.reference}: its λ and its risks must be above 0 in every epoch")
    args.reference_hash = common.hashed(json.dumps(log))  # of the run, whatever its folder's name
    return log


def add_extra(path, data):
    """Extra training images and (pseudo-)labels behind those of `data`, whose hash gets theirs after a +.

    FILE.npz holds `image`, uint8 [M, H, W, 3], and `label`. The images must be as large as those of `data`
    and the labels among its classes, or UserError.
    """
    x, y = common.checked(*common.read_npz(path, "image", "label"), path, "image", "label")
    if x.shape[1:3] != data.x_train.shape[2:] or y.min() < 0 or y.max() >= data.classes:
        raise UserError(f"--extra-data {path} does not go with the data set: image {list(x.shape)}, "
                        f"label {y.min()}..{y.max()}")
    data.extra, data.hash = len(x), f"{data.hash}+{common.hashed(x, y)}"
    x, y = common.to_tensors(x, y, data.x_train.device)
    data.x_train, data.y_train = torch.cat([data.x_train, x]), torch.cat([data.y_train, y])


class WeightAverage(AveragedModel):
    """An average of the weights over the steps (Gowal et al. 2020; Wang et al. 2023).

    The t-th update after `warmup` keeps min(decay, (1 + t)/(10 + t)) of it. Before that it follows the
    weights. BatchNorm's statistics are the network's own.
    """

    def __init__(self, model, decay, warmup):
        super().__init__(model)
        self.decay, self.warmup = decay, warmup

    @torch.no_grad()
    def update_parameters(self, model):  # PyTorch's sends n_averaged to the device, and waits for it
        done = int(self.n_averaged)
        t = done + 1 - self.warmup
        keep = min(self.decay, (1 + t) / (10 + t)) if done > 0 and t >= 0 else 0  # 0: the network's weights
        torch._foreach_lerp_([*self.module.parameters()], [*model.parameters()], 1 - keep)
        torch._foreach_copy_([*self.module.buffers()], [*model.buffers()])
        self.n_averaged += 1


def main(argv):
    parser = common.training_parser(__file__, __doc__)
    add = parser.add_argument_group("method").add_argument
    add("--beta", type=number_or_auto, default=6.0,
        help="λ of the paper: weight of the robust regularization; 0: plain training, without an attack; "
        "auto: adjusted to --reference")
    add("--reference", metavar="RUN", help="for --beta auto: a narrower network's finished run")
    add("--eps", type=number(0, 1), default=0.031, help="attack's ℓ∞ radius, pixels in [0, 1]; 8/255 works")
    add("--step-size", type=number(0, 1), default=0.007, help="attack step, pixels in [0, 1]")
    add("--steps", type=integer(0), default=10, help="attack steps")
    add("--extra-data", metavar="FILE", help="more images, an .npz of image and label")
    add("--extra-fraction", type=number(0, 1), default=0.5, metavar="F", help="their share of each batch")
    add("--label-smoothing", type=number(0, 1), default=0.0, help="in the loss, not in the attack")
    add("--no-norm-decay", action="store_true", help="no weight decay on BatchNorm's parameters")
    add("--ema", type=number(0, 1), metavar="DECAY", help="monitor, test and save an average of the weights, "
        "of this decay per step, such as 0.995")
    parser.set_defaults(may_change=["extra_data"])  # the data's hash has what the file holds
    args, device = common.start(parser, argv)
    data = common.load_data(args.dataset, args.data_dir, device, args.train_size, args.seed, args.val_size)
    if args.extra_data:
        add_extra(args.extra_data, data)
    reference = reference_log(args, data)
    model = common.build_model(args, data, device)
    optimizer = common.sgd(model, args.lr, args.weight_decay, args.nesterov, not args.no_norm_decay)
    eps, steps = (args.eps, args.steps) if args.beta else (0.0, 0)  # λ = 0: x̂ is x, also for BatchNorm
    attack = Attack(norm=args.norm, eps=eps, step_size=args.step_size, steps=steps, start="gaussian")
    tested, parts = model, {"model": model}
    if args.ema:
        warmup = 0.025 * args.epochs * max(len(data) // args.batch_size, 1)
        tested = WeightAverage(model, args.ema, warmup)
        parts = {"model": tested, "raw_model": model}
    run = common.Run(args, data, **parts, optimizer=optimizer)
    common.set_execution(args, data.x_train, *parts.values())  # a resumed run keeps its precision

    for epoch in run.epochs():
        beta = adjusted_beta(run.log, reference) if reference else args.beta
        lr = args.lr * common.SCHEDULES[args.schedule](epoch, args.epochs)
        for group in optimizer.param_groups:
            group["lr"] = lr
        for x, y in common.batches(data, args.batch_size, not args.no_flip, args.extra_fraction):
            p = clean_probabilities(model, x)  # once, not in every attack step
            x_adv, lipschitz = pgd(model, x, kl_to(p), attack)
            loss, natural_risk, robust_regularization = trades_loss(
                model, x, x_adv, y, beta, args.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            common.synchronize(model)  # averages over torchrun's processes
            optimizer.step()
            if args.ema:
                tested.update_parameters(model)
            run.record(len(x), natural_risk=natural_risk, robust_regularization=robust_regularization,
                       lipschitz=lipschitz.mean())
        run.end_epoch(lr=lr, beta=beta, **common.monitor(tested, data, args, epoch))
    run.finish(lambda: common.report(tested, data, args))


def number_or_auto(text):
    return text if text == "auto" else number()(text)


if __name__ == "__main__":
    common.launch(main)

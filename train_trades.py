"""TRADES (Zhang et al. 2019) at any width and λ: the main experiment of the paper (Tables 1-3, Figs. 1-3, 7-9).

    python train_trades.py --width 10 --beta 12             # WideResNet-34-10 on CIFAR-10, the paper's setting
    python train_trades.py --dataset synthetic --depth 10 --width 1 --epochs 3      # a first look, on any machine

A row of the paper is a --width and a --beta (6, 12 or 18 in the figures) of one of these:

    python train_trades.py --width 10 --beta 18                             # Table 1, upper half; Table 2; Figs. 1, 7
    python train_trades.py --width 10 --beta 18 --dataset cifar100          # Table 2 and Fig. 8: CIFAR-100
    python train_trades.py --arch densenet --depth 40 --width 12 --beta 18  # Table 2 and Fig. 9: DenseNet-BC-40, k = 12
    python train_trades.py --width 10 --schedule step                       # Fig. 2: the schedule of TRADES

or, with 500K extra images (RST, Carmon et al. 2019; App. C and G), of WideResNet-28:

    python train_trades.py --extra-data data/ti_500K_pseudo_labeled.pickle --depth 28 --width 10 --beta 6 \\
        --epochs 200 --schedule cosine --batch-size 256 --weight-decay 5e-4 --nesterov

Measured so far, small and on 2 CPU cores (AMD EPYC, bf16), with JPEG copies of CIFAR-10, seed 1: --depth 10 --width 1
--train-size 10000 --epochs 5 attains 39.57 % natural and 22.54 % robust accuracy at 73.94 % stability in 6 min 38 s.

Loss: cross-entropy + β·KL(f(x) ‖ f(x̂)), with x̂ from 10 steps of PGD on the same KL. Hyper-parameters: App. B and C.
With extra data an epoch is a pass over as many images, labelled and extra together, as the labelled set has (50,000,
as in the RST release): at --extra-fraction 0.5 it shows half of the labelled images and as many extra ones.
"""
import codecs
import pickle

import numpy as np
import torch
import torch.nn.functional as F

import common
from common import UserError, batches, clean_probabilities, kl_to, number, pgd


def builtin_dtype(name, *_):
    """np.dtype(name) for numbers, uncopied: a pickle could rewrite a copy's flags and pass bytes off as objects."""
    if np.dtype(name).kind not in "biuf":
        raise pickle.UnpicklingError(f"it asks for dtype {name}")
    return np.dtype(name)


class ArrayUnpickler(pickle.Unpickler):
    """Reads NumPy arrays of numbers and builtin containers and refuses all else, so that no file can run code."""

    parts = {part.__name__: part for part in (
        np.ndarray, np.uint8(0).__reduce__()[0],                                # scalar
        np.zeros(1).__reduce_ex__(2)[0], np.zeros(1).__reduce_ex__(5)[0])}      # _reconstruct, _frombuffer
    parts["dtype"] = builtin_dtype

    def find_class(self, module, name):
        if module.split(".")[0] == "numpy" and name in self.parts:
            return self.parts[name]
        if (module, name) == ("_codecs", "encode"):
            return codecs.encode
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which arrays do not need")


def load_extra(path, data):
    """Extra training images and their (pseudo-)labels, uint8 [M, 3, H, W] and int64 [M], on the device of `data`.

    FILE.npz holds `image` and `label`; another name is read as RST's pickle, `data` and `extrapolated_targets`. The
    images must be uint8 [M, H, W, 3] of the size that `data` has, the labels among its classes. Raises UserError.
    """
    images, labels = ("image", "label") if path.endswith(".npz") else ("data", "extrapolated_targets")
    try:
        if path.endswith(".npz"):
            with np.load(path, allow_pickle=False) as file:
                x, y = file[images], file[labels]
        else:
            with open(path, "rb") as file:
                content = ArrayUnpickler(file).load()
            x, y = np.asarray(content[images]), np.asarray(content[labels])
    except Exception as error:  # a broken or hostile file fails in many ways
        raise UserError(f"--extra-data {path} must hold arrays {images!r} and {labels!r}; reading them failed with "
                        f"{type(error).__name__}: {error}") from None
    height, width = data.x_train.shape[2:]
    if x.dtype != np.uint8 or x.shape[1:] != (height, width, 3) or len(x) == 0:
        raise UserError(f"--extra-data {path}: {images!r} must be uint8 [M, {height}, {width}, 3], "
                        f"not {x.dtype} {list(x.shape)}")
    if not np.issubdtype(y.dtype, np.integer) or y.shape != (len(x),) or y.min() < 0 or y.max() >= data.classes:
        raise UserError(f"--extra-data {path}: {labels!r} must be {len(x)} integers in 0..{data.classes - 1}")
    return common.to_tensors(x, y, data.x_train.device)


def mixed_batches(data, x_extra, y_extra, batch_size, fraction):
    """`batches` with a share `fraction` of extra images in each; as many batches as the labelled images alone make.

    Both kinds are drawn without replacement, anew each epoch, and over again once all have come. (The RST release
    draws the extra ones with replacement; of 500,000 it takes 25,000 an epoch, so few come twice.)
    """
    steps = common.steps_per_epoch(len(data.x_train), batch_size)
    extra = round(fraction * batch_size)

    def draw(n, share):  # [steps, share] indices of n images
        orders = [torch.randperm(n, device=x_extra.device) for _ in range(1 + steps * share // n)]
        return torch.cat(orders)[:steps * share].view(steps, share)

    for labelled, pseudo in zip(draw(len(data.x_train), batch_size - extra), draw(len(x_extra), extra)):
        x = torch.cat([data.x_train[labelled], x_extra[pseudo]])  # the order inside a batch has no effect
        yield common.to_float(common.random_crop_flip(x)), torch.cat([data.y_train[labelled], y_extra[pseudo]])


def trades_loss(model, x, x_adv, y, beta):
    """(loss, natural risk, robust regularization), batch means: equation (1.1) with KL as the regularization.

    x, x_adv [N, 3, H, W] in [0, 1]; y [N]. Train mode; clean and adversarial images pass separately, so that
    BatchNorm sees each alone. The gradient goes through both arguments of the KL.
    """
    model.train()
    logits, logits_adv = model(x), model(x_adv)
    natural_risk = F.cross_entropy(logits, y)
    robust_regularization = F.kl_div(F.log_softmax(logits_adv, 1), F.log_softmax(logits, 1), log_target=True,
                                     reduction="batchmean")
    return natural_risk + beta * robust_regularization, natural_risk, robust_regularization


def main(argv):
    parser = common.training_parser(__doc__, method="trades")
    parser.add_argument("--extra-data", metavar="FILE", help="train on these images too: RST's pickle, or an .npz")
    parser.add_argument("--extra-fraction", type=number(0, 1), default=0.5, help="their share of each batch")
    parser.add_argument("--nesterov", action="store_true", help="Nesterov momentum, as RST has it")
    args, device = common.start(parser, argv)
    data = common.load_data(args.dataset, args.data_dir, device, args.train_size, args.seed)
    extra = load_extra(args.extra_data, data) if args.extra_data else None
    model = common.build_model(args.arch, args.depth, args.width, data.classes)
    common.say(common.execute(model, device, args.precision, args.compile))
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay,
                                nesterov=args.nesterov, fused=True)
    run = common.Run(args, model, optimizer)

    for epoch in run.epochs():
        lr = common.learning_rate(args.schedule, args.lr, epoch, args.epochs)
        optimizer.param_groups[0]["lr"] = lr
        stream = (mixed_batches(data, *extra, args.batch_size, args.extra_fraction) if extra else
                  batches(data.x_train, data.y_train, args.batch_size))
        for x, y in run.watch(stream, len(data.x_train)):
            p, lipschitz = clean_probabilities(model, x), torch.zeros(len(x), device=device)
            x_adv = pgd(model, x, kl_to(p), eps=args.eps, step_size=args.step_size, steps=args.steps,
                        start="gaussian", gradient_norm=lipschitz)
            loss, natural_risk, robust_regularization = trades_loss(model, x, x_adv, y, args.beta)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            run.record(natural_risk, robust_regularization, lipschitz.mean())
        run.end_epoch(lr, data)
    run.finish(data)


if __name__ == "__main__":
    common.launch(main)

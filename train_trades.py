"""TRADES (Zhang et al. 2019) at any width and λ: the paper's main experiment (Tables 1-3, Figs. 1-3, 7-9).

    python train_trades.py --width 10 --beta 12           # WideResNet-34-10 on CIFAR-10, the paper's setting
    python train_trades.py --dataset synthetic --depth 10 --width 1 --epochs 3   # a first look, anywhere

A row of the paper is a --width and a --beta (6, 12 or 18 in the figures) of one of these:

    python train_trades.py --width 10 --beta 18                     # Table 1, upper half; Table 2; Figs. 1, 7
    python train_trades.py --width 10 --beta 18 --dataset cifar100  # Table 2 and Fig. 8: CIFAR-100
    python train_trades.py --arch densenet --depth 40 --width 12 --beta 18  # Table 2 and Fig. 9: DenseNet-BC
    python train_trades.py --width 10 --schedule step               # Fig. 2: the schedule of TRADES

or, with 500K extra images (RST, Carmon et al. 2019; App. C and G), of WideResNet-28:

    python train_trades.py --extra-data data/ti_500K_pseudo_labeled.pickle --depth 28 --width 10 --beta 6 \\
        --epochs 200 --schedule cosine --batch-size 256 --weight-decay 5e-4 --nesterov

or, with generated images and today's other ingredients (Wang et al. 2023; the .npz, with `image` and `label`,
is their project's: huggingface.co/datasets/P2333/DM-Improves-AT):

    python train_trades.py --extra-data data/1m.npz --extra-fraction 0.7 --val-size 1024 --depth 28 \\
        --width 10 --beta 5 --eps 8/255 --step-size 2/255 --epochs 400 --schedule one-cycle --lr 0.2 \\
        --batch-size 512 --weight-decay 5e-4 --no-norm-decay --nesterov --activation silu \\
        --label-smoothing 0.1 --ema 0.995

A λ that follows the width by itself (the paper's width-adjusted regularization; `common.adjusted_beta`):

    python train_trades.py --width 1 --beta 6 --out runs/narrow    # tuned on a narrow network
    python train_trades.py --width 10 --beta auto --reference runs/narrow

Measured so far, small and on 2 CPU cores (AMD EPYC, bf16), with JPEG copies of CIFAR-10, seed 1: --depth 10
--width 1 --train-size 10000 --epochs 5 attains 39.57 % natural and 22.54 % robust accuracy at 73.94 %
stability in 6 min 38 s.

Loss: cross-entropy + β·KL(f(x) ‖ f(x̂)), x̂ from 10 steps of PGD on the same KL. Settings: App. B and C.
With extra data an epoch is a pass over as many images, labelled and extra together, as the labelled set has
(50,000, as in the RST release): at --extra-fraction 0.5 half of the labelled and as many extra ones.
"""
import common  # before PyTorch: it says how threads wait
import torch.nn.functional as F
from common import Attack, UserError, clean_probabilities, kl_to, number, pgd


def trades_loss(model, x, x_adv, y, beta, label_smoothing=0.0):
    """(loss, natural risk, robust regularization), batch means: equation (1.1) with KL as the regularization.

    x, x_adv [N, 3, H, W] in [0, 1]; y [N]. Train mode; clean and adversarial images pass separately, so that
    BatchNorm sees each alone. The gradient goes through both arguments of the KL.
    """
    model.train()
    logits, logits_adv = model(x), model(x_adv)
    natural_risk = F.cross_entropy(logits, y, label_smoothing=label_smoothing)
    robust_regularization = F.kl_div(F.log_softmax(logits_adv, 1), F.log_softmax(logits, 1), log_target=True,
                                     reduction="batchmean")
    return natural_risk + beta * robust_regularization, natural_risk, robust_regularization


def main(argv):
    parser = common.training_parser(__file__, __doc__)
    parser.add_argument("--extra-data", metavar="FILE", help="more images: RST's pickle, or an .npz")
    parser.add_argument("--extra-fraction", type=number(0, 1), metavar="F",
                        help="their share of each batch; with --extra-data 0.5 unless given")
    args, device = common.start(parser, argv)
    if args.extra_fraction is not None and not args.extra_data:
        raise UserError("--extra-fraction is the share of --extra-data, which is not given")
    reference = common.reference_log(args)
    data = common.load_data(args.dataset, args.data_dir, device, args.train_size, args.seed, args.val_size)
    if args.extra_data:
        extra = common.load_extra(args.extra_data, data)
        args.extra_fraction = 0.5 if args.extra_fraction is None else args.extra_fraction
    model = common.build_model(args.arch, args.depth, args.width, data.classes, args.activation)
    common.prepare(model, args, device, data.x_train[:args.batch_size])
    optimizer = common.sgd(model, args.lr, args.weight_decay, args.nesterov, not args.no_norm_decay)
    average = common.WeightAverage(model, args, data)  # of --ema, or the network itself
    attack = Attack("kl", eps=args.eps, step_size=args.step_size, steps=args.steps, start="gaussian")
    run = common.Run(args, model, optimizer, images=len(data.x_train), average=average)

    for epoch in run.epochs():
        beta = common.adjusted_beta(run.log, reference) if reference else args.beta
        lr = args.lr * common.SCHEDULES[args.schedule]((epoch - 1) / args.epochs, args.epochs)
        for group in optimizer.param_groups:
            group["lr"] = lr
        if args.extra_data:
            stream = common.mixed_batches(data, *extra, args.batch_size, args.extra_fraction,
                                          not args.no_flip)
        else:
            stream = common.batches(data.x_train, data.y_train, args.batch_size, not args.no_flip)
        for x, y in stream:
            p = clean_probabilities(model, x)  # once, not in every attack step
            x_adv, lipschitz = pgd(model, x, kl_to(p), attack, gradient_norm=True)
            loss, natural_risk, robust_regularization = trades_loss(
                model, x, x_adv, y, beta, args.label_smoothing)
            loss.backward()
            common.synchronize(model)  # of torchrun's processes
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            average.update()
            run.record(len(x), natural_risk=natural_risk, robust_regularization=robust_regularization,
                       lipschitz=lipschitz.mean())
        run.end_epoch(lr=lr, beta=beta, **common.monitor(average.model, data, args, epoch))
    run.finish(lambda: common.report(average.model, data, args))


if __name__ == "__main__":
    common.launch(main)

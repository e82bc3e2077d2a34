"""Generalized adversarial training at any width and λ (App. D of the paper): the lower half of Table 1.

    python train_at.py --width 10 --beta 1         # WideResNet-34-10 on CIFAR-10, the usual setting
    python train_at.py --width 10 --beta 2         # a boosted λ; a row of the table is a --width and a --beta
    python train_at.py --width 10 --beta 2 --dataset cifar100
    python train_at.py --arch densenet --depth 40 --width 12 --beta 2         # DenseNet-BC-40, growth rate 12
    python train_at.py --dataset synthetic --depth 10 --width 1 --epochs 3    # a first look, on any machine

Loss: mean L(x) + β·mean max(L(x̂) - L(x), 0), L the cross-entropy, with x̂ from 10 steps of PGD on L;
settings as for TRADES. The difference is clipped image by image, so an attack that failed is not rewarded.

At β = 1 the loss is mean max(L(x̂), L(x)): that of plain adversarial training (Madry et al. 2018), mean
L(x̂), except on images whose loss the attack did not raise. What else differs from theirs: the attack starts
0.001·N(0, 1) away from x, not anywhere in the ε-ball, and clean images pass too, so that BatchNorm's running
statistics are of both kinds.
"""
import common  # before PyTorch: it says how threads wait
import torch.nn.functional as F
from common import Attack, cross_entropy_to, pgd


def at_loss(model, x, x_adv, y, beta, label_smoothing=0.0):
    """(loss, natural risk, robust regularization), batch means: equation (1.1), the difference clipped at 0.

    x, x_adv [N, 3, H, W] in [0, 1]; y [N]. Train mode; clean and adversarial images pass separately, so that
    BatchNorm sees each alone, the clean ones last as in the paper's code (its running statistics are theirs
    in greater part).
    """
    model.train()
    how = {"reduction": "none", "label_smoothing": label_smoothing}
    adversarial_risk = F.cross_entropy(model(x_adv), y, **how)  # [N]
    natural_risk = F.cross_entropy(model(x), y, **how)
    robust_regularization = (adversarial_risk - natural_risk).clamp(min=0).mean()
    natural_risk = natural_risk.mean()
    return natural_risk + beta * robust_regularization, natural_risk, robust_regularization


def main(argv):
    parser = common.training_parser(__file__, __doc__, beta=1.0)
    args, device = common.start(parser, argv)
    reference = common.reference_log(args)
    data = common.load_data(args.dataset, args.data_dir, device, args.train_size, args.seed, args.val_size)
    model = common.build_model(args.arch, args.depth, args.width, data.classes, args.activation)
    common.prepare(model, args, device, data.x_train[:args.batch_size])
    optimizer = common.sgd(model, args.lr, args.weight_decay, args.nesterov, not args.no_norm_decay)
    average = common.WeightAverage(model, args, data)  # of --ema, or the network itself
    attack = Attack("cross-entropy", eps=args.eps, step_size=args.step_size, steps=args.steps,
                    start="gaussian")
    run = common.Run(args, model, optimizer, images=len(data.x_train), average=average)

    for epoch in run.epochs():
        beta = common.adjusted_beta(run.log, reference) if reference else args.beta
        lr = args.lr * common.SCHEDULES[args.schedule]((epoch - 1) / args.epochs, args.epochs)
        for group in optimizer.param_groups:
            group["lr"] = lr
        for x, y in common.batches(data.x_train, data.y_train, args.batch_size, not args.no_flip):
            x_adv, lipschitz = pgd(model, x, cross_entropy_to(y), attack, gradient_norm=True)
            loss, natural_risk, robust_regularization = at_loss(
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

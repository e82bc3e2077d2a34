"""Generalized adversarial training at any width and λ (App. D of the paper): the lower half of Table 1.

    python train_at.py --width 10 --beta 1         # WideResNet-34-10 on CIFAR-10, the usual setting
    python train_at.py --width 10 --beta 2         # a boosted λ; a row of the table is a --width and a --beta
    python train_at.py --width 10 --beta 2 --dataset cifar100
    python train_at.py --arch densenet --beta 2    # DenseNet-BC-40, growth rate 12
    python train_at.py --quick                     # a first look, on any machine

Loss: mean L(x) + β·mean max(L(x̂) - L(x), 0), L the cross-entropy. x̂ comes from 10 steps of PGD on L. The
difference is clipped image by image, so that an attack that failed is not rewarded. Settings as for TRADES.

At β = 1 the loss is mean max(L(x̂), L(x)). Plain adversarial training (Madry et al. 2018) has mean L(x̂). It
differs on images whose loss the attack did not raise. Two more things differ from theirs. The attack starts
0.001·N(0, 1) away from x, not anywhere in the ε-ball. Clean images pass, too, so that BatchNorm's running
statistics are of both kinds.
"""
import common  # before PyTorch: it says how threads wait
import torch.nn.functional as F
from common import Attack, cross_entropy_to, integer, number, pgd


def at_loss(model, x, x_adv, y, beta):
    """(loss, natural risk, robust regularization), batch means: equation (1.1), the difference clipped at 0.

    x, x_adv [N, 3, H, W] in [0, 1]; y [N]. Train mode. Clean and adversarial images pass separately, so that
    BatchNorm sees each alone. The clean ones come last, as in the paper's code, and weigh more in its running
    statistics.
    """
    model.train()
    adversarial_risk = F.cross_entropy(model(x_adv), y, reduction="none")  # [N]
    natural_risk = F.cross_entropy(model(x), y, reduction="none")
    robust_regularization = (adversarial_risk - natural_risk).clamp(min=0).mean()
    natural_risk = natural_risk.mean()
    return natural_risk + beta * robust_regularization, natural_risk, robust_regularization


def main(argv):
    parser = common.training_parser(__file__, __doc__)
    add = parser.add_argument_group("method").add_argument
    add("--beta", type=number(), default=1.0, help="λ of the paper: weight of the robust regularization")
    add("--eps", type=number(0, 1), default=0.031, help="attack's ℓ∞ radius, pixels in [0, 1]; 8/255 works")
    add("--step-size", type=number(0, 1), default=0.007, help="attack step, pixels in [0, 1]")
    add("--steps", type=integer(0), default=10, help="attack steps")
    args, device = common.start(parser, argv)
    data = common.load_data(args.dataset, args.data_dir, device, args.train_size, args.seed, args.val_size)
    model = common.build_model(args, data, device)
    optimizer = common.sgd(model, args.lr, args.weight_decay, args.nesterov)
    attack = Attack(norm=args.norm, eps=args.eps, step_size=args.step_size, steps=args.steps,
                    start="gaussian")
    run = common.Run(args, data, model=model, optimizer=optimizer)
    common.set_execution(args, data.x_train, model)  # a resumed run keeps its precision

    for epoch in run.epochs():
        lr = args.lr * common.SCHEDULES[args.schedule](epoch, args.epochs)
        for group in optimizer.param_groups:
            group["lr"] = lr
        for x, y in common.batches(data, args.batch_size, not args.no_flip):
            x_adv, lipschitz = pgd(model, x, cross_entropy_to(y), attack)
            loss, natural_risk, robust_regularization = at_loss(model, x, x_adv, y, args.beta)
            optimizer.zero_grad()
            loss.backward()
            common.synchronize(model)  # averages over torchrun's processes
            optimizer.step()
            run.record(len(x), natural_risk=natural_risk, robust_regularization=robust_regularization,
                       lipschitz=lipschitz.mean())
        run.end_epoch(lr=lr, beta=args.beta, **common.monitor(model, data, args, epoch))
    run.finish(lambda: common.report(model, data, args))


if __name__ == "__main__":
    common.launch(main)

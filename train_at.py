"""Generalized adversarial training at any width and λ (Appendix D of the paper): the lower half of Table 1.

    python train_at.py --width 10 --beta 1                  # WideResNet-34-10 on CIFAR-10, the usual setting
    python train_at.py --width 10 --beta 2                  # a boosted λ; a row of the table is a --width and a --beta
    python train_at.py --width 10 --beta 2 --dataset cifar100
    python train_at.py --arch densenet --depth 40 --width 12 --beta 2               # DenseNet-BC-40, growth rate 12
    python train_at.py --dataset synthetic --depth 10 --width 1 --epochs 3          # a first look, on any machine

Loss: mean L(x) + β·mean max(L(x̂) - L(x), 0), L the cross-entropy, with x̂ from 10 steps of PGD on L; hyper-parameters
as for TRADES. The difference is clipped image by image, so an attack that failed is not rewarded.

At β = 1 the loss is mean max(L(x̂), L(x)): that of plain adversarial training (Madry et al. 2018), mean L(x̂), except
on images whose loss the attack did not raise. What else differs from theirs: the attack starts 0.001·N(0, 1) away from
x, not anywhere in the ε-ball, and clean images pass too, so that BatchNorm's running statistics are of both kinds.
"""
import torch
import torch.nn.functional as F

import common
from common import batches, cross_entropy_to, pgd


def at_loss(model, x, x_adv, y, beta):
    """(loss, natural risk, robust regularization), batch means: equation (1.1), the loss difference clipped at 0.

    x, x_adv [N, 3, H, W] in [0, 1]; y [N]. Train mode; clean and adversarial images pass separately, so that
    BatchNorm sees each alone, the clean ones last as in the paper's code (they weigh more in the running statistics).
    """
    model.train()
    adversarial_risk = F.cross_entropy(model(x_adv), y, reduction="none")  # [N]
    natural_risk = F.cross_entropy(model(x), y, reduction="none")
    robust_regularization = (adversarial_risk - natural_risk).clamp(min=0).mean()
    natural_risk = natural_risk.mean()
    return natural_risk + beta * robust_regularization, natural_risk, robust_regularization


def main(argv):
    parser = common.training_parser(__doc__, method="at", beta=1.0)
    args, device = common.start(parser, argv)
    data = common.load_data(args.dataset, args.data_dir, device, args.train_size, args.seed)
    model = common.build_model(args.arch, args.depth, args.width, data.classes)
    common.say(common.execute(model, device, args.precision, args.compile))
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay, fused=True)
    run = common.Run(args, model, optimizer)

    for epoch in run.epochs():
        lr = common.learning_rate(args.schedule, args.lr, epoch, args.epochs)
        optimizer.param_groups[0]["lr"] = lr
        for x, y in run.watch(batches(data.x_train, data.y_train, args.batch_size), len(data.x_train)):
            lipschitz = torch.zeros(len(x), device=device)
            x_adv = pgd(model, x, cross_entropy_to(y), eps=args.eps, step_size=args.step_size, steps=args.steps,
                        start="gaussian", gradient_norm=lipschitz)
            loss, natural_risk, robust_regularization = at_loss(model, x, x_adv, y, args.beta)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            run.record(natural_risk, robust_regularization, lipschitz.mean())
        run.end_epoch(lr, data)
    run.finish(data)


if __name__ == "__main__":
    common.launch(main)

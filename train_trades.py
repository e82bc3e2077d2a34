"""TRADES (Zhang et al. 2019) at any width and λ: the main experiment of the paper (Tables 1-3, Figs. 1-3, 7-9).

    python train_trades.py --width 10 --beta 12             # WideResNet-34-10 on CIFAR-10, the paper's setting
    python train_trades.py --dataset synthetic --depth 10 --width 1 --epochs 3      # a first look, on any machine

Loss: cross-entropy + β·KL(f(x) ‖ f(x̂)), with x̂ from 10 steps of PGD on the same KL. Hyper-parameters: App. B and C.
"""
import torch
import torch.nn.functional as F

import common
from common import batches, clean_probabilities, kl_to, pgd


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

"""TRADES with adversarial weight perturbation (AWP; Wu, Xia & Wang 2020) at any width and λ: Table 6 (App. F).

    python train_awp.py --width 10 --beta 6                 # Table 6, row 1: WideResNet-34-10 on CIFAR-10
    python train_awp.py --width 10 --beta 12                # Table 6, row 2
    python train_awp.py --width 10 --beta 18                # Table 6, row 3
    python train_awp.py --width 10 --beta 12 --dataset cifar100
    python train_awp.py --arch densenet --depth 40 --width 12 --beta 12             # DenseNet-BC-40, growth rate 12
    python train_awp.py --dataset synthetic --depth 10 --width 1 --epochs 3 --warmup 1 --schedule cosine  # a first look

A step: x̂ as in TRADES; every weight tensor w moves to w + γ·‖w‖·g/‖g‖, g its gradient of the TRADES loss, which is
cross-entropy + β·KL(f(x) ‖ f(x̂)); the SGD step, weight decay included, is taken there; then the same perturbation is
subtracted. Biases and BatchNorm's parameters stay. The first --warmup epochs are plain TRADES: 10, so AWP acts from
epoch 11 on (the public release starts in the 10th). The rate is divided by ten at epochs 100 and 150 of 200. The risks
in the log are those at the perturbed weights, where the update takes place.

The release perturbs by way of a second network and an SGD step of it. The length of that step cancels in g/‖g‖, so the
gradient alone does here. Cost, counted in passes (a forward is 1, a backward 1 to the input, 2 with the weights'
gradients): with 10 attack steps TRADES takes 27 a step; the perturbation adds a forward and backward of x and of x̂,
6 passes, hence 33, or 1.22 times as many. Measured in CPU time of one core, float32, random images, seed 0: 1.21 times
(WideResNet-10-1, batch 64, median of 7 steps) and 1.23 times (WideResNet-16-2, batch 32, 5 steps).
"""
import torch

import common
from common import batches, clean_probabilities, integer, kl_to, number, pgd
from train_trades import trades_loss


def weight_perturbation(model, weights, x, x_adv, y, beta, gamma):
    """γ·‖w‖·g/‖g‖ for each tensor of `weights`, g its gradient of `trades_loss`: the layer-wise ascent direction.

    BatchNorm normalizes with the batch, as in the update, but its running statistics are afterwards as before.
    A tensor whose gradient is 0 is not perturbed. Nothing here waits for the device.
    """
    buffers = list(model.buffers())  # put back below: the pass itself stays the update's, one graph to compile
    found = [buffer.clone() for buffer in buffers]
    loss, _, _ = trades_loss(model, x, x_adv, y, beta)
    gradients = torch.autograd.grad(loss, weights)
    with torch.no_grad():
        torch._foreach_copy_(buffers, found)
        ratios = torch.stack(torch._foreach_norm(weights)) / torch.stack(torch._foreach_norm(gradients))  # [layers]
        return torch._foreach_mul(gradients, (gamma * ratios).nan_to_num(nan=0, posinf=0).unbind())  # ‖g‖ = 0: no move


def main(argv):
    parser = common.training_parser(__doc__, method="awp", eps=8 / 255, step_size=2 / 255, weight_decay=5e-4,
                                    epochs=200, schedule="step")
    parser.add_argument("--gamma", type=number(), default=0.005, help="length of a perturbation, relative to ‖w‖")
    parser.add_argument("--warmup", type=integer(0), default=10, help="epochs of plain TRADES before AWP sets in")
    args, device = common.start(parser, argv)
    data = common.load_data(args.dataset, args.data_dir, device, args.train_size, args.seed)
    model = common.build_model(args.arch, args.depth, args.width, data.classes)
    common.say(common.execute(model, device, args.precision, args.compile))
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay, fused=True)
    run = common.Run(args, model, optimizer)
    weights = [parameter for parameter in model.parameters() if parameter.ndim > 1]

    for epoch in run.epochs():
        lr = common.learning_rate(args.schedule, args.lr, epoch, args.epochs, milestones=(50, 75))
        optimizer.param_groups[0]["lr"] = lr
        for x, y in run.watch(batches(data.x_train, data.y_train, args.batch_size), len(data.x_train)):
            p, lipschitz = clean_probabilities(model, x), torch.zeros(len(x), device=device)
            x_adv = pgd(model, x, kl_to(p), eps=args.eps, step_size=args.step_size, steps=args.steps,
                        start="gaussian", gradient_norm=lipschitz)
            if epoch > args.warmup:
                perturbation = weight_perturbation(model, weights, x, x_adv, y, args.beta, args.gamma)
                with torch.no_grad():
                    torch._foreach_add_(weights, perturbation)
            loss, natural_risk, robust_regularization = trades_loss(model, x, x_adv, y, args.beta)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if epoch > args.warmup:
                with torch.no_grad():
                    torch._foreach_sub_(weights, perturbation)
            run.record(natural_risk, robust_regularization, lipschitz.mean())
        run.end_epoch(lr, data)
    run.finish(data)


if __name__ == "__main__":
    common.launch(main)

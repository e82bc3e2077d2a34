"""TRADES with adversarial weight perturbation (AWP; Wu, Xia & Wang 2020) at any width and λ: App. F.

    python train_awp.py --width 10 --beta 6        # Table 6, row 1: WideResNet-34-10 on CIFAR-10
    python train_awp.py --width 10 --beta 12       # Table 6, row 2
    python train_awp.py --width 10 --beta 18       # Table 6, row 3
    python train_awp.py --width 10 --beta 12 --dataset cifar100
    python train_awp.py --arch densenet --depth 40 --width 12 --beta 12       # DenseNet-BC-40, growth rate 12
    python train_awp.py --dataset synthetic --depth 10 --width 1 --epochs 3 --warmup 1 --schedule cosine

A step: x̂ as in TRADES; every weight tensor w moves to w + γ·‖w‖·g/‖g‖, g its gradient of the TRADES loss,
which is cross-entropy + β·KL(f(x) ‖ f(x̂)); the SGD step, weight decay included, is taken there; then the
same perturbation is subtracted. Biases and BatchNorm's parameters stay. The first --warmup epochs are plain
TRADES: 10, so AWP acts from epoch 11 on (the public release starts in the 10th). The rate is divided by ten
at epochs 100 and 150 of 200. The risks in the log are those at the perturbed weights.

The release perturbs by way of a second network and an SGD step of it. The length of that step cancels in
g/‖g‖, so the gradient alone does here. Cost, counted in passes (a forward is 1, a backward 1 to the input, 2
with the weights' gradients): with 10 attack steps TRADES takes 27 a step; the perturbation adds a forward and
backward of x and of x̂, 6 passes, hence 33, or 1.22 times as many. Measured in CPU time of one core, float32,
random images, seed 0: 1.21 times (WideResNet-10-1, batch 64, median of 7 steps) and 1.23 times
(WideResNet-16-2, batch 32, 5 steps).
"""
import common  # before PyTorch: it says how threads wait
import torch
import torch.nn.functional as F
from common import Attack, clean_probabilities, integer, kl_to, number, pgd


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


def weight_perturbation(model, weights, x, x_adv, y, beta, gamma, label_smoothing=0.0):
    """γ·‖w‖·g/‖g‖ for each tensor of `weights`, g its gradient of `trades_loss`: ascent, layer by layer.

    BatchNorm normalizes with the batch, as in the update; its running statistics are afterwards as before.
    A tensor whose gradient is 0 is not perturbed. Nothing here waits for the device.
    """
    buffers = list(model.buffers())  # put back below: the pass itself is the update's, one graph to compile
    found = [buffer.clone() for buffer in buffers]
    loss, _, _ = trades_loss(model, x, x_adv, y, beta, label_smoothing)
    gradients = torch.autograd.grad(loss, weights)
    common.average_over_processes(gradients)
    with torch.no_grad():
        common.copy_all(buffers, found)
        lengths, others = torch._foreach_norm(weights), torch._foreach_norm(gradients)
        ratios = torch.stack(lengths) / torch.stack(others)    # [layers]
        scales = (gamma * ratios).nan_to_num(nan=0, posinf=0)  # ‖g‖ = 0: no move
        return torch._foreach_mul(gradients, scales.unbind())


def main(argv):
    parser = common.training_parser(__file__, __doc__, eps=8 / 255, step_size=2 / 255, weight_decay=5e-4,
                                    epochs=200, schedule="step")
    parser.add_argument("--gamma", type=number(), default=0.005, help="length of a perturbation over ‖w‖")
    parser.add_argument("--warmup", type=integer(0), default=10, help="epochs of plain TRADES before AWP")
    args, device = common.start(parser, argv)
    reference = common.reference_log(args)
    data = common.load_data(args.dataset, args.data_dir, device, args.train_size, args.seed, args.val_size)
    model = common.build_model(args.arch, args.depth, args.width, data.classes, args.activation)
    common.prepare(model, args, device, data.x_train[:args.batch_size])
    optimizer = common.sgd(model, args.lr, args.weight_decay, args.nesterov, not args.no_norm_decay)
    average = common.WeightAverage(model, args, data)  # of --ema, or the network itself
    weights = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    attack = Attack("kl", eps=args.eps, step_size=args.step_size, steps=args.steps, start="gaussian")
    schedules = {**common.SCHEDULES, "step": lambda done, epochs: common.step(done, epochs, (0.5, 0.75))}
    run = common.Run(args, model, optimizer, images=len(data.x_train), average=average)

    for epoch in run.epochs():
        beta = common.adjusted_beta(run.log, reference) if reference else args.beta
        lr = args.lr * schedules[args.schedule]((epoch - 1) / args.epochs, args.epochs)
        for group in optimizer.param_groups:
            group["lr"] = lr
        for x, y in common.batches(data.x_train, data.y_train, args.batch_size, not args.no_flip):
            p = clean_probabilities(model, x)  # once, not in every attack step
            x_adv, lipschitz = pgd(model, x, kl_to(p), attack, gradient_norm=True)
            if epoch > args.warmup:
                perturbation = weight_perturbation(model, weights, x, x_adv, y, beta, args.gamma,
                                                   args.label_smoothing)
                with torch.no_grad():
                    torch._foreach_add_(weights, perturbation)
            loss, natural_risk, robust_regularization = trades_loss(
                model, x, x_adv, y, beta, args.label_smoothing)
            loss.backward()
            common.synchronize(model)  # of torchrun's processes
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if epoch > args.warmup:
                with torch.no_grad():
                    torch._foreach_sub_(weights, perturbation)
            average.update()
            run.record(len(x), natural_risk=natural_risk, robust_regularization=robust_regularization,
                       lipschitz=lipschitz.mean())
        run.end_epoch(lr=lr, beta=beta, **common.monitor(average.model, data, args, epoch))
    run.finish(lambda: common.report(average.model, data, args))


if __name__ == "__main__":
    common.launch(main)

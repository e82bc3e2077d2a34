"""TRADES with adversarial weight perturbation (AWP; Wu, Xia & Wang 2020) at any width and λ: App. F.

    python train_awp.py --width 10 --beta 6        # Table 6, row 1: WideResNet-34-10 on CIFAR-10
    python train_awp.py --width 10 --beta 12       # Table 6, row 2
    python train_awp.py --width 10 --beta 18       # Table 6, row 3
    python train_awp.py --width 10 --beta 12 --dataset cifar100
    python train_awp.py --arch densenet --beta 12  # DenseNet-BC-40, growth rate 12
    python train_awp.py --quick                    # a first look, on any machine

A step: x̂ as in TRADES. Every weight tensor w moves to w + γ·‖w‖·g/‖g‖, g its gradient of the TRADES loss,
cross-entropy + β·KL(f(x) ‖ f(x̂)). The SGD step, weight decay included, is taken there. Then the same
perturbation is subtracted. Biases and BatchNorm's parameters stay. The first --warmup epochs, 10, are plain
TRADES, so AWP acts from epoch 11 on (the public release starts in the 10th). The rate is divided by ten at
epochs 100 and 150 of 200. The risks in the log are those at the perturbed weights.

The release perturbs by way of a second network and an SGD step of it. The length of that step cancels in
g/‖g‖, so the gradient alone does here. Its train-mode passes are x̂, x, and x again. Here x passes once, and
moves BatchNorm's running statistics as two passes do. So these, the parameters and x̂ agree with the
release's to 2e-15 after two steps in float64. By a plain pass each, variances were 11 % apart after one.

Cost, counted in passes (a forward is 1, a backward 1 to the input, 2 with the weights' gradients): with 10
attack steps TRADES takes 27 a step. The perturbation adds a forward and backward of x and of x̂, 6 passes,
hence 33, or 1.22 times as many.
"""
import common  # before PyTorch: it says how threads wait
import torch
import torch.nn.functional as F
from common import Attack, clean_probabilities, integer, kl_to, number, pgd


def trades_loss(model, x, x_adv, y, beta):
    """(loss, natural risk, robust regularization), batch means: equation (1.1) with KL as the regularization.

    x, x_adv [N, 3, H, W] in [0, 1]; y [N]. Train mode. Clean and adversarial images pass separately, so that
    BatchNorm sees each alone, x̂ first as in the release. The gradient goes through both arguments of the KL.
    """
    model.train()
    logits_adv = model(x_adv)
    with common.temporarily(model.modules(), "momentum", 0.19):  # 1 - 0.9²: as two passes of x would
        logits = model(x)
    natural_risk = F.cross_entropy(logits, y)
    robust_regularization = F.kl_div(F.log_softmax(logits_adv, 1), F.log_softmax(logits, 1), log_target=True,
                                     reduction="batchmean")
    return natural_risk + beta * robust_regularization, natural_risk, robust_regularization


def weight_perturbation(model, weights, x, x_adv, y, beta, gamma):
    """γ·‖w‖·g/‖g‖ for each tensor of `weights`, g its gradient of `trades_loss`: ascent, layer by layer.

    BatchNorm normalizes with the batch, as in the update. Its running statistics are afterwards as before. A
    tensor whose gradient is 0 is not perturbed. Nothing here waits for the device.
    """
    buffers = list(model.buffers())  # which this pass moves: it is the update's, compiled once for both
    found = [buffer.clone() for buffer in buffers]
    loss, _, _ = trades_loss(model, x, x_adv, y, beta)
    gradients = torch.autograd.grad(loss, weights)
    common.average_over_processes(gradients)
    with torch.no_grad():
        for buffer, before in zip(buffers, found):
            buffer.copy_(before)
        ratios = torch.stack(torch._foreach_norm(weights)) / torch.stack(torch._foreach_norm(gradients))
        scales = (gamma * ratios).nan_to_num(nan=0, posinf=0)  # [layers]; ‖g‖ = 0: no move
        return torch._foreach_mul(gradients, scales.unbind())


def main(argv):
    parser = common.training_parser(__file__, __doc__, epochs=200, weight_decay=5e-4, schedule="step",
                                    quick={"warmup": 1, "schedule": "cosine"})
    add = parser.add_argument_group("method").add_argument
    add("--beta", type=number(), default=6.0, help="λ of the paper: weight of the robust regularization")
    add("--eps", type=number(0, 1), default=8 / 255, help="attack's ℓ∞ radius, pixels in [0, 1]; 8/255 works")
    add("--step-size", type=number(0, 1), default=2 / 255, help="attack step, pixels in [0, 1]")
    add("--steps", type=integer(0), default=10, help="attack steps")
    add("--gamma", type=number(), default=0.005, help="length of a perturbation over ‖w‖")
    add("--warmup", type=integer(0), default=10, help="epochs of plain TRADES before AWP")
    args, device = common.start(parser, argv)
    if args.warmup >= args.epochs:
        common.warn(f"--warmup {args.warmup} of {args.epochs} epochs: no epoch has AWP")
    data = common.load_data(args.dataset, args.data_dir, device, args.train_size, args.seed, args.val_size)
    model = common.build_model(args, data, device)
    optimizer = common.sgd(model, args.lr, args.weight_decay, args.nesterov)
    weights = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    attack = Attack(norm=args.norm, eps=args.eps, step_size=args.step_size, steps=args.steps,
                    start="gaussian")
    schedules = {**common.SCHEDULES, "step": lambda e, n: common.step(e, n, (0.5, 0.75))}
    run = common.Run(args, data, model=model, optimizer=optimizer)
    common.set_execution(args, data.x_train, model)  # a resumed run keeps its precision

    for epoch in run.epochs():
        lr = args.lr * schedules[args.schedule](epoch, args.epochs)
        for group in optimizer.param_groups:
            group["lr"] = lr
        for x, y in common.batches(data, args.batch_size, not args.no_flip):
            p = clean_probabilities(model, x)  # once, not in every attack step
            x_adv, lipschitz = pgd(model, x, kl_to(p), attack)
            if epoch > args.warmup:
                perturbation = weight_perturbation(model, weights, x, x_adv, y, args.beta, args.gamma)
                with torch.no_grad():
                    torch._foreach_add_(weights, perturbation)
            loss, natural_risk, robust_regularization = trades_loss(model, x, x_adv, y, args.beta)
            optimizer.zero_grad()
            loss.backward()
            common.synchronize(model)  # averages over torchrun's processes
            optimizer.step()
            if epoch > args.warmup:
                with torch.no_grad():
                    torch._foreach_sub_(weights, perturbation)
            run.record(len(x), natural_risk=natural_risk, robust_regularization=robust_regularization,
                       lipschitz=lipschitz.mean())
        run.end_epoch(lr=lr, beta=args.beta, **common.monitor(model, data, args, epoch))
    run.finish(lambda: common.report(model, data, args))


if __name__ == "__main__":
    common.launch(main)

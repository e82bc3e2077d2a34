"""Generalized adversarial training: loss and whole steps against formulas; runs: test_train_trades.py."""
import pytest

import train_at


def cross_entropy(logits, y):
    return logits.exp().sum(1).log() - logits[range(len(y)), y]  # [N], written out


def risks(logits, logits_adv, y):
    natural, adversarial = cross_entropy(logits, y), cross_entropy(logits_adv, y)
    return natural.mean(), (adversarial - natural)[adversarial > natural].sum() / len(y)


@pytest.mark.parametrize("beta", [0, 1, 3.5])
def test_loss_and_gradients_are_the_formula(problem, check_loss, beta):
    _, exact, x, x_adv, y = problem
    rise = exact(x_adv.double()).log_softmax(1) - exact(x.double()).log_softmax(1)  # of some classes
    y[::2], y[1::2] = rise.argmax(1)[::2], rise.argmin(1)[1::2]  # every second loss falls: it is clipped
    check_loss(train_at.at_loss, risks, beta)


def test_attack_and_update_are_the_formulas(check_steps):
    check_steps(train_at.main, ["--steps", "3", "--beta", "2"], risks, clean_first=False,
                attacked=lambda logits, logits_adv, y: cross_entropy(logits_adv, y).mean())

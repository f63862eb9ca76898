"""Makes tests/data/preference_fixtures.txt with torch and TRL, in f64.

    python3 tests/reference/make_preference_fixtures.py [output directory]

Losses are those of TRL's trainers: where these have a method, that method; where the formula stands within a training
step (reward model, DPO, KTO, group advantages), its lines. Gradients are torch's. One tensor to a line: name, number of
elements, values with 17 digits. tests/data/README.md records the versions.
"""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from fixture_lines import Lines
from trl.experimental.cpo.cpo_trainer import CPOTrainer
from trl.experimental.orpo.orpo_trainer import ORPOTrainer

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
torch.Tensor.float = lambda self: self  # ORPO's loss rounds to f32 first
here = SimpleNamespace(device="cpu")
lines = Lines("preference_fixtures.txt")
put = lines.put

n = 37
chosen, rejected = -40 + 9 * torch.randn(n), -42 + 9 * torch.randn(n)
chosen_ref, rejected_ref = chosen + 4 * torch.randn(n), rejected + 4 * torch.randn(n)
chosen_mean, rejected_mean = -0.02 - torch.rand(n) ** 4 * 3, -0.02 - torch.rand(n) ** 4 * 3
rewards_c, rewards_r, margin = 3 * torch.randn(n), 3 * torch.randn(n), torch.rand(n)
desirable = torch.rand(n) < 0.6
for name in "chosen rejected chosen_ref rejected_ref chosen_mean rejected_mean rewards_c rewards_r margin".split():
    put(name, globals()[name])
put("desirable", desirable.double())


def case(name, loss, *inputs):
    inputs = [x.clone().requires_grad_() for x in inputs]
    losses = loss(*inputs)
    put(f"{name}.losses", losses)
    for which, g in zip(("d_chosen", "d_rejected"), torch.autograd.grad(losses.mean(), inputs)):
        put(f"{name}.{which}", g)


# Reward model: RewardTrainer.compute_loss.
case("bradley_terry", lambda c, r: -F.logsigmoid(c - r), rewards_c, rewards_r)
case("bradley_terry.margin", lambda c, r: -F.logsigmoid(c - r - margin) + 0.02 * (c + r) ** 2, rewards_c, rewards_r)

# CPO's losses of log-probabilities are DPO's of log-ratios.
def cpo(kind, beta, smoothing=0.0, gamma=0.0):
    self = SimpleNamespace(
        alpha=0.0, beta=beta, loss_type=kind, label_smoothing=smoothing, simpo_gamma=gamma, accelerator=here
    )
    return lambda c, r: CPOTrainer.cpo_loss(self, c, r)[0]


for name, smoothing in (("dpo", 0.0), ("dpo.smoothed", 0.15)):
    f = cpo("sigmoid", 0.3, smoothing)
    case(name, lambda c, r: f(c - chosen_ref, r - rejected_ref), chosen, rejected)
f_ipo = cpo("ipo", 0.3)
case("ipo", lambda c, r: f_ipo(c - chosen_ref, r - rejected_ref), chosen, rejected)
case("simpo", cpo("simpo", 2.0, 0.0, 0.7), chosen_mean, rejected_mean)
case("simpo.smoothed", cpo("simpo", 2.0, 0.1, 0.7), chosen_mean, rejected_mean)

# ORPO: loss = nll - beta log sigmoid(log odds), nll here of the chosen sequence alone.
orpo = SimpleNamespace(beta=0.25, accelerator=here)
case("orpo", lambda c, r: -c - ORPOTrainer.odds_ratio_loss(orpo, c, r)[0], chosen_mean, rejected_mean)

# KTO: the lines of KTOTrainer's step, with the reference point as a constant.
kl = (chosen - chosen_ref).mean().clamp(min=0)
put("kto.kl", kl)


def kto(log_probs):
    ratio = log_probs - chosen_ref
    good, bad = 1.3 * (1 - F.sigmoid(0.3 * (ratio - kl))), 0.8 * (1 - F.sigmoid(0.3 * (kl - ratio)))
    return torch.where(desirable, good, bad)


case("kto", kto, chosen)

# K-wise: all pairs of prompts of 5, ordered from the best, over C(5, 2).
k_rewards = 2 * torch.randn(7, 5)
put("k_wise.rewards", k_rewards)
r = k_rewards.clone().requires_grad_()
first, second = torch.triu_indices(5, 5, 1)
loss = -F.logsigmoid(r[:, first] - r[:, second]).mean(1).mean()
put("k_wise.loss", loss)
put("k_wise.d", torch.autograd.grad(loss, r)[0])

# Group advantages: the lines of GRPOTrainer (scale_rewards "group" and "none") and RLOOTrainer.
g = torch.randn(6, 4)
put("group.rewards", g)
mean = g.mean(dim=1, keepdim=True)
put("group.grpo", (g - mean) / (g.std(dim=1, keepdim=True) + 1e-4))
put("group.dr_grpo", g - mean)
put("group.rloo", g - (g.sum(dim=1, keepdim=True) - g) / 3)

lines.write()

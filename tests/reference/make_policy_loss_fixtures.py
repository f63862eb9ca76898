"""Makes tests/data/policy_loss_fixtures.txt with torch and trl, in f64.

    python3 tests/reference/make_policy_loss_fixtures.py [output directory]

Format as in make_nn_fixtures.py, with 15 digits. Inputs are multiples of 1/64. Cases trl.<name> are those of TRL's own
GRPOTrainer._compute_loss, called with per-token log-probabilities in place of a model's; ppo.<name> and gaussian,
categorical are formulas under autograd: PPO's value loss as in OpenAI baselines and TRL's PPOTrainer, distributions
those of torch.distributions.
"""

import types
from collections import defaultdict

import torch
from fixture_lines import Lines
from trl.trainer.grpo_trainer import GRPOTrainer

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
lines = Lines("policy_loss_fixtures.txt", digits=15)
put = lines.put


def values(*shape, scale=1.0):
    return (torch.randn(shape) * scale).clamp(-3.9, 3.9).mul(64).round().div(64)


batch, time = 5, 7
lengths = torch.tensor([7, 3, 1, 5, 6])
mask = (torch.arange(time) < lengths[:, None]).double()
logp = values(batch, time, scale=0.5) - 1.5
old = logp + values(batch, time, scale=0.4)
advantages = values(batch, 1)
for name, x in dict(mask=mask, logp=logp, old=old, advantages=advantages.expand(batch, time)).items():
    put(name, x)


class Trainer(types.SimpleNamespace):
    _compute_loss = GRPOTrainer._compute_loss

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return None


def trl(name, loss_type, level="token", low=0.2, high=0.2, delta=None, **more):
    leaf = logp.clone().requires_grad_()
    accelerator = types.SimpleNamespace(
        num_processes=1, gather=lambda x: x, gather_for_metrics=lambda x: x, reduce=lambda x, reduction=None: x
    )
    trainer = Trainer(
        loss_type=loss_type,
        importance_sampling_level=level,
        epsilon_low=low,
        epsilon_high=high,
        beta=0.0,
        top_entropy_quantile=1.0,
        max_completion_length=time,
        current_gradient_accumulation_steps=1,
        accelerator=accelerator,
        model=types.SimpleNamespace(training=True),
        args=types.SimpleNamespace(delta=delta, steps_per_generation=1, **more),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _get_per_token_logps_and_entropies=lambda *a, **k: (leaf, torch.zeros_like(leaf), None),
    )
    inputs = {
        "prompt_ids": torch.zeros(batch, 1, dtype=torch.long),
        "prompt_mask": torch.ones(batch, 1, dtype=torch.long),
        "completion_ids": torch.zeros(batch, time, dtype=torch.long),
        "completion_mask": mask,
        "advantages": advantages[:, 0],
        "old_per_token_logps": old,
        "num_items_in_batch": mask.sum(),
    }
    loss = trainer._compute_loss(None, inputs)
    put(f"trl.{name}.loss", loss)
    put(f"trl.{name}.dlogp", torch.autograd.grad(loss, leaf)[0])
    for metric in ("clip_ratio/region_mean",):
        if trainer._metrics["train"][metric]:
            put(f"trl.{name}.clip_fraction", trainer._metrics["train"][metric][0])


trl("grpo", "grpo")
trl("bnpo", "bnpo", high=0.28)
trl("dr_grpo", "dr_grpo")
trl("two_sided", "bnpo", delta=1.3)
trl("gspo", "grpo", level="sequence", low=0.03, high=0.04)
trl("cispo", "cispo", high=1.25)

# The critic: a clipped value loss and the explained variance of Stable-Baselines3, over tokens that count.
value, old_value, returns = values(batch, time), None, values(batch, time)
old_value = value + values(batch, time, scale=0.3)
v = value.clone().requires_grad_()
clipped = torch.max(torch.min(v, old_value + 0.25), old_value - 0.25)
per_token = torch.max((v - returns).square(), (clipped - returns).square())
loss = 0.5 * (per_token * mask).sum() / mask.sum()
put("values", value), put("old_values", old_value), put("returns", returns)
put("ppo.value_loss", loss)
put("ppo.dvalues", torch.autograd.grad(loss, v)[0])
on = mask.bool()
put("ppo.explained_variance", 1 - (returns - value)[on].var(correction=0) / returns[on].var(correction=0))
r = (logp - old).exp()
put("ppo.kl", [(old - logp)[on].mean(), (r - 1 - (logp - old))[on].mean(), r[on].min(), r[on].max()])

# Distributions: log-probabilities, entropies, and gradients of sum of c logp + d entropy.
rows = 6
c, d = values(rows), values(rows)
put("policy.c", c), put("policy.d", d)
mean, log_std, action = (values(rows, 3), values(rows, 3, scale=0.3), values(rows, 3))
for name, x in dict(mean=mean, log_std=log_std, action=action).items():
    put(f"gaussian.{name}", x)
for name, s in dict(own=log_std, shared=log_std[0]).items():
    m, s = mean.clone().requires_grad_(), s.clone().requires_grad_()
    normal = torch.distributions.Independent(torch.distributions.Normal(m, s.exp().expand(rows, 3)), 1)
    put(f"gaussian.{name}.logp", normal.log_prob(action))
    put(f"gaussian.{name}.entropy", normal.entropy())
    gm, gs = torch.autograd.grad((c * normal.log_prob(action) + d * normal.entropy()).sum(), [m, s])
    put(f"gaussian.{name}.dmean", gm), put(f"gaussian.{name}.dlog_std", gs)

sizes = [3, 2, 4]
logits = values(rows, sum(sizes))
actions = torch.stack([torch.randint(n, (rows,)) for n in sizes], 1)
put("categorical.sizes", sizes), put("categorical.logits", logits), put("categorical.actions", actions)
z = logits.clone().requires_grad_()
parts = [torch.distributions.Categorical(logits=x) for x in z.split(sizes, 1)]
log_prob = sum(p.log_prob(a) for p, a in zip(parts, actions.unbind(1)))
entropy = sum(p.entropy() for p in parts)
put("categorical.logp", log_prob), put("categorical.entropy", entropy)
put("categorical.dlogits", torch.autograd.grad((c * log_prob + d * entropy).sum(), z)[0])

lines.write()

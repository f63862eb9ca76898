"""What PyTorch users run on the CPU today: TorchRL's advantages and a NumPy loop, torch's token log-probabilities and language
model head, and the losses of PPO, reward models and preferences as TRL writes them, eager.

Every loss is timed with its gradients, and with the statistics that TRL logs beside it. Advantages come with returns, from
rewards, values and flags of ended and of cut off episodes.
"""

import numpy
import torch
import torch.nn.functional as F
import torchrl  # noqa: F401  (for its version)
from timing import Cases
from torchrl.objectives.value.functional import (generalized_advantage_estimate, td_lambda_return_estimate,
                                                 vec_generalized_advantage_estimate, vec_td_lambda_return_estimate,
                                                 vtrace_advantage_estimate)

TYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
GAMMA, LAMBDA, BETA = 0.99, 0.95, 0.1


def uniform(*shape, dtype="f32"):
    return (2 * torch.rand(*shape) - 1).to(TYPES[dtype])


# ------------------------------------------------------------------------------------------------------ advantages

class Rollout:
    """[batch, time, 1], as TorchRL has it: about one step in a hundred ends an episode, half of them by a limit."""

    def __init__(self, batch, time):
        self.rewards, self.values, self.next_values = (uniform(batch, time, 1) for _ in range(3))
        draw = torch.rand(batch, time, 1)
        self.terminated, self.done = draw < 0.005, draw < 0.01

    def estimate(self, function):
        return function(GAMMA, LAMBDA, self.values, self.next_values, self.rewards, self.done, self.terminated)


def gae(batch, time, function):
    rollout = Rollout(batch, time)

    def call():
        with torch.inference_mode():
            return rollout.estimate(function)

    return call


def gae_numpy(batch, time):
    """The usual loop backward in time, over rows of [time, batch]."""
    rng = numpy.random.default_rng(1)
    rewards, values, next_values = (rng.uniform(-1, 1, (time, batch)).astype(numpy.float32) for _ in range(3))
    draw = rng.random((time, batch))
    not_terminated = (draw >= 0.005).astype(numpy.float32)
    not_done = (draw >= 0.01).astype(numpy.float32)
    gamma, decay = numpy.float32(GAMMA), numpy.float32(GAMMA * LAMBDA)

    def call():
        advantages = numpy.empty_like(rewards)
        last = numpy.zeros(batch, numpy.float32)
        for t in reversed(range(time)):
            delta = rewards[t] + gamma * next_values[t] * not_terminated[t] - values[t]
            advantages[t] = last = delta + decay * not_done[t] * last
        return advantages, advantages + values

    return call


def td_lambda(batch, time, function):
    r = Rollout(batch, time)

    def call():
        with torch.inference_mode():
            return function(GAMMA, LAMBDA, r.next_values, r.rewards, r.done, r.terminated)

    return call


def vtrace(batch, time):
    r = Rollout(batch, time)
    log_pi, log_mu = 0.3 * uniform(batch, time, 1), 0.3 * uniform(batch, time, 1)

    def call():
        with torch.inference_mode():
            return vtrace_advantage_estimate(GAMMA, log_pi, log_mu, r.values, r.next_values, r.rewards, r.done, r.terminated)

    return call


# ------------------------------------------------------------------------------------------------ log-probabilities

def logits_of(rows, vocabulary, dtype):
    return 4 * uniform(rows, vocabulary, dtype=dtype), torch.randint(vocabulary, (rows,))


def token_log_prob(logits, tokens):
    return torch.log_softmax(logits, -1).gather(-1, tokens[:, None]).squeeze(-1)


def log_prob(rows, vocabulary, dtype):
    logits, tokens = logits_of(rows, vocabulary, dtype)

    def call():
        with torch.inference_mode():
            return token_log_prob(logits, tokens)

    return call


def log_prob_training(rows, vocabulary, dtype):
    """And the gradient of the logits for given gradients of the log-probabilities."""
    logits, tokens = logits_of(rows, vocabulary, dtype)
    logits.requires_grad_()
    gradient = uniform(rows, dtype=dtype)
    return lambda: torch.autograd.grad(token_log_prob(logits, tokens), logits, gradient)


def log_prob_entropy(rows, vocabulary, dtype):
    logits, tokens = logits_of(rows, vocabulary, dtype)

    def call():
        with torch.inference_mode():
            logp = torch.log_softmax(logits, -1)
            return logp.gather(-1, tokens[:, None]).squeeze(-1), -(logp.exp() * logp).sum(-1)

    return call


def head_of(tokens, vocabulary, width, dtype):
    hidden, weight = uniform(tokens, width, dtype=dtype), (width**-0.5 * uniform(vocabulary, width)).to(TYPES[dtype])
    return hidden, weight, torch.randint(vocabulary, (tokens,))


def lm_head(tokens, vocabulary, width, dtype):
    hidden, weight, labels = head_of(tokens, vocabulary, width, dtype)

    def call():
        with torch.inference_mode():
            return F.cross_entropy(F.linear(hidden, weight), labels)

    return call


def lm_head_training(tokens, vocabulary, width, dtype):
    hidden, weight, labels = head_of(tokens, vocabulary, width, dtype)
    hidden.requires_grad_(), weight.requires_grad_()
    return lambda: torch.autograd.grad(F.cross_entropy(F.linear(hidden, weight), labels), [hidden, weight])


# ----------------------------------------------------------------------------------------------------------- losses

def masked_mean(values, mask):
    return (values * mask).sum() / mask.sum()


def ppo_loss(sequences, tokens):
    """TRL's PPOTrainer: clipped policy and value losses, their gradients, and what it logs."""
    shape = sequences, tokens
    logp_old, advantages, values_old = 2 * uniform(*shape) - 3, uniform(*shape), uniform(*shape)
    logp = (logp_old + 0.1 * uniform(*shape)).requires_grad_()
    values, returns = (values_old + 0.3 * uniform(*shape)).requires_grad_(), advantages + values_old
    mask = torch.rand(*shape) < 0.9
    clip = 0.2

    def call():
        values_clipped = torch.clamp(values, values_old - clip, values_old + clip)
        value_losses, value_losses_clipped = torch.square(values - returns), torch.square(values_clipped - returns)
        value_loss = 0.5 * masked_mean(torch.max(value_losses, value_losses_clipped), mask)
        difference = logp - logp_old
        ratio = torch.exp(difference)
        losses = -advantages * ratio
        losses_clipped = -advantages * torch.clamp(ratio, 1 - clip, 1 + clip)
        policy_loss = masked_mean(torch.max(losses, losses_clipped), mask)
        gradients = torch.autograd.grad(policy_loss + 0.1 * value_loss, [logp, values])
        with torch.no_grad():
            clip_fraction = masked_mean((losses_clipped > losses).float(), mask)
            value_clip_fraction = masked_mean((value_losses_clipped > value_losses).float(), mask)
            kl = 0.5 * masked_mean(difference**2, mask)
            return gradients, policy_loss, value_loss, clip_fraction, value_clip_fraction, kl, masked_mean(ratio, mask)

    return call


def with_gradients(loss, count, batch):
    """loss(*`count` tensors of [batch]) and its gradients by the first two."""
    inputs = [uniform(batch) for _ in range(count)]
    for x in inputs[:2]:
        x.requires_grad_()

    def call():
        value = loss(*inputs)
        return value, torch.autograd.grad(value, inputs[:2])

    return call


def margin(chosen, rejected, reference_chosen, reference_rejected):
    return (chosen - reference_chosen) - (rejected - reference_rejected)


def bradley_terry(chosen, rejected):
    return -F.logsigmoid(chosen - rejected).mean()


def dpo(*logps):
    return -F.logsigmoid(BETA * margin(*logps)).mean()


def ipo(*logps):
    return ((margin(*logps) - 1 / (2 * BETA)) ** 2).mean()


def simpo(chosen, rejected):
    return -F.logsigmoid(2.0 * (chosen - rejected) - 1.0).mean()


def orpo(chosen, rejected):
    chosen, rejected = chosen - 2, rejected - 2  # logarithms of probabilities
    odds = (chosen - rejected) - (torch.log1p(-torch.exp(chosen)) - torch.log1p(-torch.exp(rejected)))
    return (-chosen - BETA * F.logsigmoid(odds)).mean()


def kto(desirable, undesirable, reference_desirable, reference_undesirable):
    """The KL term is given."""
    kl = 0.1
    good = 1 - torch.sigmoid(BETA * (desirable - reference_desirable - kl))
    bad = 1 - torch.sigmoid(BETA * (kl - (undesirable - reference_undesirable)))
    return torch.cat([good, bad]).mean()


def k_wise(prompts, completions):
    """All pairs of each prompt's completions, which are sorted."""
    rewards = uniform(prompts, completions).requires_grad_()
    better, worse = torch.triu_indices(completions, completions, 1)

    def call():
        loss = -F.logsigmoid(rewards[:, better] - rewards[:, worse]).mean()
        return loss, torch.autograd.grad(loss, rewards)

    return call


def whiten(sequences, tokens):
    """TRL's masked_whiten."""
    values, mask = uniform(sequences, tokens), torch.rand(sequences, tokens) < 0.9

    def call():
        with torch.inference_mode():
            mean = masked_mean(values, mask)
            variance = masked_mean((values - mean) ** 2, mask)
            count = mask.sum()
            return (values - mean) * torch.rsqrt(variance * count / (count - 1) + 1e-8)

    return call


def main():
    cases = Cases()

    for shape in ((1024, 1024), (8, 2048), (256, 128), (4096, 32), (1, 32768), (37, 1000), (3, 7)):
        text = "x".join(map(str, shape))
        for name in ("gae", "gae_time_major"):
            cases.add(name, "f32", text, "numpy", lambda shape=shape: gae_numpy(*shape))
        for by, function in (("torchrl", generalized_advantage_estimate), ("torchrl_vec", vec_generalized_advantage_estimate)):
            cases.add("gae", "f32", text, by, lambda shape=shape, function=function: gae(*shape, function))
    for shape in ((1024, 1024), (256, 128)):
        text = "x".join(map(str, shape))
        for by, function in (("torchrl", td_lambda_return_estimate), ("torchrl_vec", vec_td_lambda_return_estimate)):
            cases.add("td_lambda", "f32", text, by, lambda shape=shape, function=function: td_lambda(*shape, function))
        cases.add("vtrace", "f32", text, "torchrl", lambda shape=shape: vtrace(*shape))

    for shape in ((256, 50257), (2048, 8192), (37, 1000), (3, 7)):
        for dtype in TYPES:
            for make in (log_prob, log_prob_training, log_prob_entropy):
                cases.add(make.__name__, dtype, "x".join(map(str, shape)), "torch",
                          lambda shape=shape, dtype=dtype, make=make: make(*shape, dtype))
    for shape in ((512, 50257, 768), (37, 1000, 100)):
        for dtype in TYPES:
            for make in (lm_head, lm_head_training):
                cases.add(make.__name__, dtype, "x".join(map(str, shape)), "torch",
                          lambda shape=shape, dtype=dtype, make=make: make(*shape, dtype), memory=True)

    for shape in ((256, 512), (37, 1000), (3, 7)):
        cases.add("ppo_loss", "f32", "x".join(map(str, shape)), "torch", lambda shape=shape: ppo_loss(*shape))
        cases.add("whiten", "f32", "x".join(map(str, shape)), "torch", lambda shape=shape: whiten(*shape))
    for loss, count, batch in ((bradley_terry, 2, 64), (dpo, 4, 64), (ipo, 4, 64), (kto, 4, 32), (orpo, 2, 64), (simpo, 2, 64)):
        cases.add(loss.__name__, "f32", "64", "torch", lambda loss=loss, count=count, batch=batch: with_gradients(loss, count, batch))
    cases.add("k_wise", "f32", "64", "torch", lambda: k_wise(16, 4))
    cases.run()


if __name__ == "__main__":
    main()

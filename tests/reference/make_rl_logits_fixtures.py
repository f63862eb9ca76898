"""Makes tests/data/rl_logits_fixtures.txt with torch, in f64.

    python3 tests/reference/make_rl_logits_fixtures.py [output directory]

One tensor to a line: name, number of elements, values with 17 digits. tests/data/README.md records the versions.
"""

import torch
import torch.nn.functional as F
from fixture_lines import Lines
from torch.distributions import Categorical

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
lines = Lines("rl_logits_fixtures.txt")
put = lines.put


# Log-probabilities and entropies of torch's Categorical, and the gradient of dlogp . logp + dentropy . entropy.
def policy(name, logits, temperature):
    rows, classes = logits.shape
    tokens = torch.randint(0, classes, (rows,))
    tokens[logits.gather(1, tokens[:, None])[:, 0].isinf()] = 0
    dlogp, dentropy = torch.randn(rows), torch.randn(rows)
    z = logits.clone().requires_grad_()
    p = Categorical(logits=z / temperature)
    logp, entropy = p.log_prob(tokens), p.entropy()
    put(f"{name}.logits", logits), put(f"{name}.tokens", tokens), put(f"{name}.temperature", temperature)
    put(f"{name}.dlogp", dlogp), put(f"{name}.dentropy", dentropy)
    put(f"{name}.logp", logp), put(f"{name}.entropy", entropy), put(f"{name}.lse", torch.logsumexp(z / temperature, 1))
    put(f"{name}.dlogits", torch.autograd.grad((dlogp * logp + dentropy * entropy).sum(), z)[0])


policy("plain", 3 * torch.randn(6, 13), 1.0)
policy("warm", 3 * torch.randn(4, 19), 0.7)
large = torch.randn(4, 9)
large[:, 3] += 1e4
large[:, 5] -= 1e4
policy("large", large, 1.0)


# Cross-entropies: what counts, smoothing, and the shift that transformers' causal models make.
def cross_entropy(name, logits, labels, smoothing=0.0, shift=False):
    z = logits.clone().requires_grad_()
    outputs, targets = (z[:, :-1], labels[:, 1:]) if shift else (z, labels)
    loss = F.cross_entropy(
        outputs.reshape(-1, z.shape[-1]), targets.reshape(-1), ignore_index=-100, label_smoothing=smoothing
    )
    put(f"{name}.logits", logits), put(f"{name}.labels", labels), put(f"{name}.loss", loss)
    put(f"{name}.dlogits", torch.autograd.grad(loss, z)[0])


labels = torch.randint(0, 7, (2, 5))
labels[0, :2] = labels[1, 4] = -100
cross_entropy("ignored", 2 * torch.randn(2, 5, 7), labels)
cross_entropy("shifted", 2 * torch.randn(2, 5, 7), labels, shift=True)
cross_entropy("smoothed", 2 * torch.randn(2, 5, 7), labels, smoothing=0.1)

# A head: hidden states through a linear layer into a cross-entropy.
hidden, weight = torch.randn(8, 4, requires_grad=True), torch.randn(11, 4, requires_grad=True)
labels = torch.randint(0, 11, (8,))
labels[2] = labels[3] = -100
loss = F.cross_entropy(F.linear(hidden, weight) / 0.8, labels, ignore_index=-100)
put("head.hidden", hidden), put("head.weight", weight), put("head.labels", labels), put("head.loss", loss)
for name, g in zip(("dhidden", "dweight"), torch.autograd.grad(loss, (hidden, weight))):
    put(f"head.{name}", g)

lines.write()

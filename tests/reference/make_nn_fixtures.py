"""Makes tests/data/nn_fixtures.txt with torch and diffusers, in f64.

    python3 tests/reference/make_nn_fixtures.py [output directory]

One tensor to a line: name, number of elements, values with 17 digits. tests/data/README.md records the versions.
"""

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from fixture_lines import Lines

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
lines = Lines("nn_fixtures.txt")
put = lines.put

# AdamW: seven steps, gradients of very different sizes, one of them zero; a second run without decay.
start, gradients = torch.randn(12), torch.randn(7, 12) * torch.logspace(-6, 2, 12)
gradients[3] = 0
put("adamw.start", start)
put("adamw.gradients", gradients)
for label, decay in (("decay", 0.1), ("plain", 0.0)):
    p = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([p], lr=0.02, betas=(0.85, 0.98), eps=1e-6, weight_decay=decay)
    values = []
    for g in gradients:
        p.grad = g.clone()
        optimizer.step()
        values.append(p.detach().clone())
    put(f"adamw.{label}", torch.stack(values))

# Normalisations, activations, losses: value and gradients for a given gradient of the result.
x, gain, bias, dy = torch.randn(5, 9) * 3 + 1, torch.randn(9), torch.randn(9), torch.randn(5, 9)
put("x", x), put("gain", gain), put("bias", bias), put("dy", dy)


def case(name, f, *inputs, dy=dy):
    inputs = [v.clone().requires_grad_() for v in inputs]
    y = f(*inputs)
    put(name, y)
    for i, g in enumerate(torch.autograd.grad(y, inputs, dy.flatten()[: y.numel()].view_as(y) if y.dim() else None)):
        put(f"{name}.d{i}", g)


case("layer_norm", lambda x, g, b: F.layer_norm(x, (9,), g, b, 1e-5), x, gain, bias)
case("rms_norm", lambda x, g: F.rms_norm(x, (9,), g, 1e-5), x, gain)
case("silu", F.silu, x)
case("gelu", F.gelu, x)
case("tanh", torch.tanh, x)
case("mse", F.mse_loss, x, dy)
case("cross_entropy", lambda x: F.cross_entropy(x, torch.tensor([3, -100, 0, 8, 3])), x)

# Schedules, as diffusers has them. Its t counts from 0.
for name, schedule in (("linear", "linear"), ("cosine", "squaredcos_cap_v2")):
    ddpm = DDPMScheduler(200, beta_start=1e-4, beta_end=0.02, beta_schedule=schedule, variance_type="fixed_small")
    put(f"{name}.alpha_bar", ddpm.alphas_cumprod)
    put(f"{name}.posterior_variance", [ddpm._get_variance(t) for t in range(1, 200)])

# Images with what goes with their channels, and tokens. Gradients of results are the first elements of image.dy.
image, other, style = torch.randn(2, 6, 4, 3) * 2 + 5, torch.randn(2, 3, 4, 3), torch.randn(2, 6)
gains, biases, position, dy = torch.randn(6), torch.randn(6), torch.randn(6, 1, 3), torch.randn(216)
put("image", image), put("other", other), put("style", style)
put("gains", gains), put("biases", biases), put("position", position), put("image.dy", dy)
image_case = lambda *a: case(*a, dy=dy)
for groups in (1, 2, 6):
    image_case(f"group_norm.{groups}", lambda x, g, b: F.group_norm(x, groups, g, b, 1e-5), image, gains, biases)
image_case("group_norm.plain", lambda x: F.group_norm(x, 3, eps=0.1), image)
image_case("group_norm.flat", lambda x, g, b: F.group_norm(x, 2, g, b, 1e-5), style, gains, biases)
image_case("modulate", lambda x, s, b: x * s[:, :, None, None] + b[None, :, None, None], image, style, biases)
image_case("positions", lambda x, p: x + p[None], image, position)
image_case("positions.product", lambda x, p: x * p[None], image, position)
image_case("channels_last", lambda x, o: torch.cat([x, o], 1).permute(0, 2, 3, 1), image, other)
image_case("tokens", lambda x: x.flatten(2).transpose(1, 2)[:, 5:9], image)
image_case("embedding", lambda w: F.embedding(torch.tensor([[5, 0, 0], [3, 5, 5]]), w), gains.outer(biases))

lines.write()

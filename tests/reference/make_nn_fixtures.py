"""Makes tests/data/nn_fixtures.txt with torch and diffusers, in f64.

    python3 tests/reference/make_nn_fixtures.py [output directory]

One tensor to a line: name, number of elements, values with 17 digits. tests/data/README.md records the versions.
"""

import pathlib
import sys

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
directory = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else pathlib.Path(__file__).resolve().parents[1] / "data")
lines = []


def put(name, value):
    flat = torch.as_tensor(value, dtype=torch.float64).detach().flatten().tolist()
    lines.append(" ".join([name, str(len(flat))] + [f"{v:.17g}" for v in flat]))


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


def case(name, f, *inputs):
    inputs = [v.clone().requires_grad_() for v in inputs]
    y = f(*inputs)
    put(name, y)
    for i, g in enumerate(torch.autograd.grad(y, inputs, dy if y.dim() else None)):
        put(f"{name}.d{i}", g)


case("layer_norm", lambda x, g, b: F.layer_norm(x, (9,), g, b, 1e-5), x, gain, bias)
case("rms_norm", lambda x, g: F.rms_norm(x, (9,), g, 1e-5), x, gain)
case("silu", F.silu, x)
case("gelu", F.gelu, x)
case("tanh", torch.tanh, x)
case("mse", F.mse_loss, x, dy)
case("cross_entropy", lambda x: F.cross_entropy(x, torch.tensor([3, -100, 0, 8, 3])), x)

# Schedules and one DDIM step, as diffusers has them. Its t counts from 0.
for name, schedule in (("linear", "linear"), ("cosine", "squaredcos_cap_v2")):
    ddpm = DDPMScheduler(200, beta_start=1e-4, beta_end=0.02, beta_schedule=schedule, variance_type="fixed_small")
    put(f"{name}.alpha_bar", ddpm.alphas_cumprod)
    put(f"{name}.posterior_variance", [ddpm._get_variance(t) for t in range(1, 200)])
ddim = DDIMScheduler(200, beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False, set_alpha_to_one=True)
ddim.alphas_cumprod = ddim.alphas_cumprod.double()
ddim.set_timesteps(20)  # steps of 10
sample, eps, z = torch.randn(2, 6), torch.randn(2, 6), torch.randn(2, 6)
put("ddim.x", sample), put("ddim.eps", eps), put("ddim.z", z)
put("ddim.eta0", ddim.step(eps, 110, sample, eta=0.0).prev_sample)
put("ddim.eta1", ddim.step(eps, 110, sample, eta=0.7, variance_noise=z).prev_sample)

directory.mkdir(parents=True, exist_ok=True)
(directory / "nn_fixtures.txt").write_text("\n".join(lines) + "\n")

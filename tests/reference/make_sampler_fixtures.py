"""Makes tests/data/sampler_fixtures.txt with torch and diffusers, in f64.

    python3 tests/reference/make_sampler_fixtures.py [output directory]

diffusers' samplers run a fixed linear "model": output = x W + t / 1000 b (+ context U), t counted from 1. Format as in
make_nn_fixtures.py. Noise is the Philox noise that mlkit documents (number i of stream (seed, time); time 0 for
img2img), so that samplers that add noise can be compared too.
"""

import math
from unittest import mock

import numpy
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from diffusers.schedulers import scheduling_ddpm
from fixture_lines import Lines

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
lines = Lines("sampler_fixtures.txt")
put = lines.put
N, ROWS, COLUMNS, SEED = 1000, 2, 5, 42
float32 = numpy.float32


def philox(block, stream, seed):
    """Salmon et al., SC 2011: Philox4x32-10."""
    low = 0xFFFFFFFF
    c, k = [block & low, block >> 32, stream & low, stream >> 32], [seed & low, seed >> 32]
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & low, (p0 >> 32) ^ c[3] ^ k[1], p0 & low]
        k = [(k[0] + 0x9E3779B9) & low, (k[1] + 0xBB67AE85) & low]
    return c


def normal(time):
    """Box and Muller from words 2i and 2i + 1, rounded to f32."""
    values = []
    for i in range(ROWS * COLUMNS):
        words = philox(i // 2, time, SEED)
        u, v = (words[i % 2 * 2] + 0.5) * 2.0**-32, words[i % 2 * 2 + 1] * 2.0**-32
        values.append(float32(math.sqrt(-2 * math.log(u)) * math.cos(6.28318530717958647692 * v)))
    return torch.tensor(numpy.array(values, dtype=numpy.float64)).view(ROWS, COLUMNS)


W = 0.9 * torch.eye(COLUMNS) + 0.05 * torch.randn(COLUMNS, COLUMNS)
b, U = 0.1 * torch.randn(COLUMNS), 0.1 * torch.randn(3, COLUMNS)
start, image = torch.randn(ROWS, COLUMNS), torch.randn(ROWS, COLUMNS).clamp(-1, 1)
prompt, negative = torch.randn(ROWS, 3), torch.randn(1, 3)
for name, value in (("W", W), ("b", b), ("U", U), ("start", start), ("image", image), ("prompt", prompt),
                    ("negative", negative)):
    put(name, value)


def model(x, time, context=None):
    y = x @ W + (time + 1) / N * b
    return y if context is None else y + context @ U


def sample(name, scheduler, predict=model, first=0, **step):
    """The states after each step, from `start`, or from the image with noise where steps are left out."""
    times = scheduler.timesteps[first:]
    x = scheduler.add_noise(image, normal(0), times[:1].expand(ROWS)) if first else start
    if first and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    states = []
    for time in times:
        now = int(time)
        extra = {"variance_noise": normal(now + 1)} if step.get("eta") else {}
        with mock.patch.object(scheduling_ddpm, "randn_tensor", lambda *a, **k: normal(now + 1)):
            x = scheduler.step(predict(x, now), time, x, **step, **extra).prev_sample
        states.append(x)
    put(name, torch.stack(states))


def make(kind, steps, betas="linear", **options):
    limits = {"scaled_linear": (0.00085, 0.012)}.get(betas, (1e-4, 0.02))
    options = {"timestep_spacing": "trailing", **({} if kind is DPMSolverMultistepScheduler else {"clip_sample": False}),
               **options}
    scheduler = kind(N, beta_start=limits[0], beta_end=limits[1], beta_schedule=betas, **options)
    scheduler.set_timesteps(steps)
    return scheduler


# diffusers asks for f32 by name; all of this is to be in f64.
with mock.patch.object(torch, "float32", torch.float64), mock.patch.object(numpy, "float32", numpy.float64):
    put("scaled_linear.alpha_bar", make(DDIMScheduler, 10, "scaled_linear").alphas_cumprod[::50])
    kinds = {"epsilon": "epsilon", "sample": "sample", "v": "v_prediction"}
    for label, kind in kinds.items():
        sample(f"ddim.{label}", make(DDIMScheduler, 10, prediction_type=kind))
        sample(f"ddpm.{label}", make(DDPMScheduler, 10, prediction_type=kind))
        sample(f"dpm.{label}", make(DPMSolverMultistepScheduler, 20, prediction_type=kind))
    sample("ddim.clip", make(DDIMScheduler, 10, clip_sample=True), use_clipped_model_output=True)
    sample("ddim.leading", make(DDIMScheduler, 20, timestep_spacing="leading"))
    sample("ddim.eta", make(DDIMScheduler, 10), eta=0.7)
    sample("ddim.cosine", make(DDIMScheduler, 10, "squaredcos_cap_v2", prediction_type="v_prediction"))
    sample("ddpm.clip", make(DDPMScheduler, 10, clip_sample=True))
    # Leading times: with others, diffusers adds this noise to the last step too.
    sample("ddpm.large", make(DDPMScheduler, 10, variance_type="fixed_large", timestep_spacing="leading"))
    # Fewer than 15 steps, where lower_order_final decides, and a number that does not divide N.
    sample("dpm.short", make(DPMSolverMultistepScheduler, 5))
    sample("dpm.uneven", make(DPMSolverMultistepScheduler, 15, "scaled_linear"))
    sample("dpm.first_order", make(DPMSolverMultistepScheduler, 10, solver_order=1))
    sample("dpm.cosine", make(DPMSolverMultistepScheduler, 10, "squaredcos_cap_v2", prediction_type="v_prediction"))
    custom = make(DPMSolverMultistepScheduler, 10)
    custom.set_timesteps(timesteps=[987, 654, 321, 100, 99, 7])
    sample("dpm.custom", custom)
    # Image to image: steps [first, n) with first = n - int(n * strength).
    for label, kind, steps, strength in (("ddim", DDIMScheduler, 10, 0.65), ("dpm", DPMSolverMultistepScheduler, 20, 0.3)):
        sample(f"img2img.{label}", make(kind, steps), first=steps - min(int(steps * strength), steps))
    # Guidance away from a negative prompt, two calls of the model a step.
    guided = lambda x, time: (u := model(x, time, negative)) + 4.5 * (model(x, time, prompt) - u)
    sample("guided.ddim", make(DDIMScheduler, 10), guided)
    sample("guided.dpm", make(DPMSolverMultistepScheduler, 10, prediction_type="v_prediction"), guided)

    # Velocity, as a target for training.
    ddim = make(DDIMScheduler, 10)
    put("velocity", ddim.get_velocity(image, start, torch.tensor([99, 700])))

    # Times, counted from 1.
    for steps, count in ((1000, 10), (1000, 7), (1000, 15), (1000, 30), (50, 20), (50, 50), (1000, 1)):
        for spacing in ("trailing", "leading", "linspace"):
            scheduler = DDIMScheduler(steps, timestep_spacing=spacing)
            scheduler.set_timesteps(count)
            put(f"times.{spacing}.{steps}.{count}", scheduler.timesteps + 1)

lines.write()

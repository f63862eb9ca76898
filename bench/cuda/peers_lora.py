"""What PyTorch and PEFT take for the cases of bench/cuda/lora.cu: a line of JSON for each, with "peer".

Calls are captured into a CUDA graph over operands that together exceed the level-2 cache; the time is the median of
replays, divided by the calls. "eager" is the same without a graph, as modules are mostly called.
"""
import json
import statistics

import torch
import torch.nn.functional as F

device, dtype = "cuda", torch.bfloat16


def replayed(calls, f):
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.no_grad():
        for i in range(3):
            f(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        for i in range(calls):
            f(i)
    return timed(graph.replay) / calls


def timed(f, most=41, budget=60e3):
    for _ in range(3):
        f()
    times, total = [], 0
    while len(times) < 9 or (total < budget and len(times) < most):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        f()
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end))
        total += times[-1]
    return statistics.median(times)


def report(peer, case, microseconds):
    print(json.dumps({"peer": peer, "case": case, "microseconds": round(microseconds, 3)}), flush=True)


def weight(*shape, size=0.02):
    return size * torch.randn(*shape, device=device, dtype=dtype)


class Lora(torch.nn.Module):
    """The formula, as one would write it."""

    def __init__(self, n_in, n_out, rank):
        super().__init__()
        self.w, self.a, self.b = weight(n_out, n_in), weight(rank, n_in), weight(n_out, rank)

    def forward(self, x):
        return torch.addmm(F.linear(x, self.w), F.linear(x, self.a), self.b.t(), alpha=2.0)


def peft_layer(n_in, n_out, rank, dora=False, name="default"):
    from peft.tuners.lora import layer

    base = torch.nn.Linear(n_in, n_out, bias=False, device=device, dtype=dtype)
    try:
        module = layer.Linear(base, name, r=rank, lora_alpha=2 * rank, lora_dropout=0.0, use_dora=dora,
                              init_lora_weights=False)
    except TypeError:  # versions that take a configuration
        from peft import LoraConfig

        config = LoraConfig(r=rank, lora_alpha=2 * rank, use_dora=dora, init_lora_weights=False)
        module = layer.Linear(base, name, config=config, r=rank, lora_alpha=2 * rank)
    return module.to(device=device, dtype=dtype)


def forward(kind, tokens, n_in, n_out, rank, count):
    shape = f"{tokens}x{n_in}x{n_out} r{rank}"
    calls = 3 * count if kind == "forward" else 2 * count
    xs = [weight(tokens, n_in, size=1) for _ in range(count)]
    ws = [weight(n_out, n_in) for _ in range(count)]
    report("torch linear", f"{kind} bf16 {shape}", replayed(calls, lambda i: F.linear(xs[i % count], ws[i % count])))
    del ws
    layers = [Lora(n_in, n_out, rank) for _ in range(count)]
    report("torch", f"{kind} bf16 {shape}", replayed(calls, lambda i: layers[i % count](xs[i % count])))
    layers = [peft_layer(n_in, n_out, rank) for _ in range(count)]
    report("peft", f"{kind} bf16 {shape}", replayed(calls, lambda i: layers[i % count](xs[i % count])))
    with torch.no_grad():
        def many():
            for i in range(calls):
                layers[i % count](xs[i % count])
        report("peft eager", f"{kind} bf16 {shape}", timed(many) / calls)


def backward(tokens, n_in, n_out, rank):
    module = peft_layer(n_in, n_out, rank)
    module.base_layer.weight.requires_grad_(False)
    x = weight(tokens, n_in, size=1).requires_grad_()
    dy = weight(tokens, n_out, size=1)
    parameters = [p for p in module.parameters() if p.requires_grad]
    y = module(x)
    report("peft", f"backward bf16 {tokens}x{n_in}x{n_out} r{rank}",
           timed(lambda: torch.autograd.grad(y, [x, *parameters], dy, retain_graph=True)))


def dora(tokens, n_in, n_out, rank):
    module = peft_layer(n_in, n_out, rank, dora=True).eval()
    x = weight(tokens, n_in, size=1)
    with torch.no_grad():
        report("peft", f"dora bf16 {tokens}x{n_in}x{n_out} r{rank}", timed(lambda: module(x)))


def many(adapters, n_in, n_out, rank):
    x, w = weight(adapters, n_in, size=1), weight(n_out, n_in)
    a, b = weight(adapters, rank, n_in), weight(adapters, n_out, rank)

    def call(_):
        h = torch.bmm(a, x.unsqueeze(2))
        return torch.baddbmm(F.linear(x, w).unsqueeze(2), b, h)

    report("torch bmm", f"per_row bf16 {adapters} adapters {adapters}x{n_in}x{n_out} r{rank}", replayed(8, call))


def main():
    torch.manual_seed(0)
    for part in (
        lambda: forward("forward", 4096, 4096, 4096, 16, 3),
        lambda: forward("forward", 512, 4096, 4096, 16, 3),
        *[lambda t=t, o=o: forward("decode", t, 4096, o, 16, 8 if o == 4096 else 4)
          for o in (4096, 11008) for t in (1, 4, 16)],
        lambda: backward(4096, 4096, 4096, 16),
        lambda: dora(4096, 4096, 4096, 16),
        lambda: many(32, 4096, 4096, 16),
    ):
        try:
            part()
        except Exception as error:  # one peer that is missing does not hide the others
            print(json.dumps({"peer": "failed", "error": f"{type(error).__name__}: {error}"[:300]}), flush=True)


if __name__ == "__main__":
    main()

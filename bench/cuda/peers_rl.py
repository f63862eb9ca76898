#!/usr/bin/env python3
"""The peers of bench/cuda/rl.cu on the same GPU: PyTorch and Triton, as JSON lines.

Times are medians over replays of CUDA graphs, as in rl.cu: a case rotates through buffers beyond the level-2 cache
unless its name ends in "hot". Needs torch and triton, no network.
"""

import json
import statistics
import sys

import torch
import triton
import triton.language as tl

DEVICE = "cuda"
CACHE = torch.cuda.get_device_properties(0).L2_cache_size if torch.cuda.is_available() else 0


def report(case, peer, microseconds, bytes_moved, **more):
    line = {"case": case, "peer": peer, "microseconds": round(microseconds, 3), "bytes": bytes_moved,
            "gb_per_s": round(bytes_moved / microseconds * 1e-3, 1), **more}
    print(json.dumps(line), flush=True)


def sets_for(bytes_moved):
    return max(1, min(64, int(4 * CACHE / bytes_moved) + 1))


def graph_time(call, sets):
    """Microseconds of call(set), the median over replays of a graph of several."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for i in range(max(3, sets)):
            call(i % sets)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for i in range(sets):
        call(i)
    end.record()
    torch.cuda.synchronize()
    rough = 1e3 * begin.elapsed_time(end) / sets
    rounds = max(1, min(20, int(500 / (rough * sets))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for i in range(sets):
                call(i)
    times = []
    for i in range(max(5, min(40, int(100e3 / (rough * sets * rounds)))) + 2):
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        if i >= 2:
            times.append(1e3 * begin.elapsed_time(end) / (sets * rounds))
    return statistics.median(times)


def try_case(case, peer, bytes_moved, sets, call):
    if FILTER not in case:
        return
    try:
        report(case, peer, graph_time(call, sets), bytes_moved)
    except Exception as e:  # a peer that cannot is said to be unable, and the others go on
        print(json.dumps({"case": case, "peer": peer, "error": f"{type(e).__name__}: {e}"[:300]}), flush=True)
        torch.cuda.synchronize()


# GAE -----------------------------------------------------------------------------------------------------------------


@triton.jit
def compose(a_far, b_far, a_near, b_near):
    return a_far * a_near, b_near + a_near * b_far


@triton.jit
def gae_kernel(rewards, values, terminated, truncated, final_values, bootstrap, advantages, returns, time, gamma, decay,
               BLOCK: tl.constexpr):
    """A program to a row; blocks of steps from the end, each by an associative scan in reverse, as rl-triton has it."""
    row = tl.program_id(0)
    base = row.to(tl.int64) * time
    behind = 0.0
    blocks = tl.cdiv(time, BLOCK)
    for i in range(blocks):
        t = (blocks - 1 - i) * BLOCK + tl.arange(0, BLOCK)
        there = t < time
        r = tl.load(rewards + base + t, mask=there, other=0.0)
        v = tl.load(values + base + t, mask=there, other=0.0)
        te = tl.load(terminated + base + t, mask=there, other=0) != 0
        tr = tl.load(truncated + base + t, mask=there, other=0) != 0
        last = t == time - 1
        v_next = tl.load(values + base + t + 1, mask=t + 1 < time, other=0.0)
        v_next = tl.where(last, tl.load(bootstrap + row), v_next)
        fv = tl.load(final_values + base + t, mask=there & tr, other=0.0)
        v_next = tl.where(te, 0.0, tl.where(tr, fv, v_next))
        b = tl.where(there, r + gamma * v_next - v, 0.0)
        a = tl.where(there, tl.where(te | tr, 0.0, decay), 1.0)
        a, b = tl.associative_scan((a, b), 0, compose, reverse=True)
        x = a * behind + b
        tl.store(advantages + base + t, x, mask=there)
        tl.store(returns + base + t, x + v, mask=there)
        behind = tl.sum(tl.where(tl.arange(0, BLOCK) == 0, x, 0.0))


def gae_triton(s, gamma, decay, block, warps):
    batch, time = s["r"].shape
    gae_kernel[(batch,)](s["r"], s["v"], s["te"], s["tr"], s["fv"], s["boot"], s["a"], s["g"], time, gamma, decay,
                         BLOCK=block, num_warps=warps)


def gae_loop(r, v, te, tr, fv, boot, gamma, decay):
    """The loop over steps that most implementations are; time-major is what it likes best."""
    time = r.shape[1]
    out = torch.empty_like(r)
    x = torch.zeros_like(boot)
    following = boot
    for t in range(time - 1, -1, -1):
        v_next = torch.where(te[:, t], 0.0, torch.where(tr[:, t], fv[:, t], following))
        x = r[:, t] + gamma * v_next - v[:, t] + torch.where(te[:, t] | tr[:, t], 0.0, decay * x)
        out[:, t] = x
        following = v[:, t]
    return out, out + v


def gae_cases():
    gamma, decay = 0.99, 0.99 * 0.95
    for batch, time, hot in [(8192, 1024, False), (1024, 1024, False), (128, 4096, False), (32768, 8, False),
                             (1, 32768, False), (128, 4096, True), (32768, 8, True), (1, 1 << 20, False)]:
        case = f"gae [{batch}, {time}]" + (" hot" if hot else "")
        if FILTER not in case:
            continue
        n = batch * time
        moved = 18 * n
        sets = 1 if hot else sets_for(moved)
        everything = []
        for _ in range(sets):
            everything.append({"r": torch.randn(batch, time, device=DEVICE), "v": torch.randn(batch, time, device=DEVICE),
                               "te": torch.rand(batch, time, device=DEVICE) < 0.005,
                               "tr": torch.zeros(batch, time, dtype=torch.bool, device=DEVICE),
                               "boot": torch.randn(batch, device=DEVICE), "a": torch.empty(batch, time, device=DEVICE),
                               "g": torch.empty(batch, time, device=DEVICE)})
            everything[-1]["fv"] = everything[-1]["v"]
        s = everything[0]
        if not hot and time <= 4096:
            a, _ = gae_loop(s["r"].double(), s["v"].double(), s["te"], s["tr"], s["fv"].double(), s["boot"].double(),
                            gamma, decay)
            gae_triton(s, gamma, decay, min(1024, triton.next_power_of_2(time)), 4)
            error = (s["a"].double() - a).abs().max().item()
            if not error < 1e-3:
                print(json.dumps({"case": case, "peer": "triton", "error": f"is off by {error}"}))
        best = None
        for block in sorted({min(b, triton.next_power_of_2(time)) for b in (512, 1024, 2048, 4096)}):
            for warps in (1, 4, 8):
                if block < 32 * warps and warps > 1:
                    continue
                try:
                    t = graph_time(lambda i: gae_triton(everything[i], gamma, decay, block, warps), sets)
                except Exception as e:
                    print(json.dumps({"case": case, "peer": "triton", "error": str(e)[:200]}))
                    continue
                if best is None or t < best[0]:
                    best = (t, block, warps)
        if best:
            report(case, "triton", best[0], moved, block=best[1], warps=best[2])
        if time <= 1024 and not hot and batch <= 32768:
            few = min(sets, 2)  # a graph of thousands of launches takes its time
            try_case(case, "torch loop", moved, few,
                     lambda i: gae_loop(*(everything[i][k] for k in ("r", "v", "te", "tr", "fv", "boot")), gamma, decay))


# Log-probabilities ---------------------------------------------------------------------------------------------------


def log_prob(z, y):
    return torch.log_softmax(z.float(), -1).gather(-1, y[:, None])[:, 0]


def log_prob_cases():
    compiled = torch.compile(log_prob)

    def with_gradient(z, y, a):
        z = z.detach().requires_grad_()
        loss = -(log_prob(z, y) * a).sum()
        (g,) = torch.autograd.grad(loss, z)
        return g

    for rows, vocabulary in [(2048, 50257), (4096, 8192)]:
        for dtype, name in [(torch.float32, "f32"), (torch.bfloat16, "bf16")]:
            shape = f" {name} [{rows}, {vocabulary}]"
            if FILTER not in "log_probs and gradient" + shape and FILTER not in "log_probs" + shape:
                continue
            one = rows * vocabulary * dtype.itemsize
            sets = sets_for(one)
            z = [torch.randn(rows, vocabulary, device=DEVICE, dtype=dtype) * 4 for _ in range(sets)]
            y = torch.randint(vocabulary, (rows,), device=DEVICE)
            a = torch.randn(rows, device=DEVICE)
            try_case("log_probs" + shape, "torch", one, sets, lambda i: log_prob(z[i], y))
            try_case("log_probs" + shape, "torch.compile", one, sets, lambda i: compiled(z[i], y))
            try_case("log_probs" + shape, "torch cross_entropy", one, sets,
                     lambda i: torch.nn.functional.cross_entropy(z[i], y, reduction="none"))
            try_case("log_probs and gradient" + shape, "torch", 2 * one, sets, lambda i: with_gradient(z[i], y, a))


# Losses and whitening ------------------------------------------------------------------------------------------------


def ppo(logp, old, adv, values, old_values, returns, entropies):
    ratio = torch.exp(logp - old)
    policy = torch.maximum(-adv * ratio, -adv * ratio.clamp(0.8, 1.2)).mean()
    clipped = old_values + (values - old_values).clamp(-0.2, 0.2)
    value = 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2).mean()
    with torch.no_grad():
        d = logp - old
        stats = ((ratio - 1 - d).mean(), ((ratio - 1).abs() > 0.2).float().mean())
    return policy + 0.5 * value - 0.01 * entropies.mean(), stats


def loss_cases():
    def gradient(f):
        def call(x):
            leaves = [t.detach().requires_grad_() for t in (x[0], x[3], x[6])]
            loss, stats = f(leaves[0], x[1], x[2], leaves[1], x[4], x[5], leaves[2])
            return torch.autograd.grad(loss, leaves), stats

        return call

    case = "ppo_loss [4096, 1024]"
    if FILTER in case:
        moved = 10 * 4 * 4096 * 1024
        sets = 2
        x = [[torch.randn(4096, 1024, device=DEVICE) * 0.1 for _ in range(7)] for _ in range(sets)]
        try_case(case, "torch", moved, sets, lambda i: gradient(ppo)(x[i]))
        compiled = torch.compile(ppo)
        try_case(case, "torch.compile", moved, sets, lambda i: gradient(compiled)(x[i]))

    case = "whiten [16777216]"
    if FILTER in case:
        n = 1 << 24
        sets = sets_for(8 * n)
        x = [torch.randn(n, device=DEVICE) for _ in range(sets)]

        def whiten(t):
            return (t - t.mean()) / (t.std() + 1e-8)

        compiled_whiten = torch.compile(whiten)
        try_case(case, "torch", 12 * n, sets, lambda i: whiten(x[i]))
        try_case(case, "torch.compile", 12 * n, sets, lambda i: compiled_whiten(x[i]))

    case = "dpo [4096]"
    if FILTER in case:
        x = [torch.randn(4096, device=DEVICE) for _ in range(4)]

        def dpo(*x):
            leaves = [x[0].detach().requires_grad_(), x[1].detach().requires_grad_()]
            margin = 0.1 * ((leaves[0] - x[2]) - (leaves[1] - x[3]))
            loss = -torch.nn.functional.logsigmoid(margin).mean()
            return torch.autograd.grad(loss, leaves)

        try_case(case, "torch", 6 * 4 * 4096, 1, lambda i: dpo(*x))


# Heads and policies ---------------------------------------------------------------------------------------------------


def policy_cases():
    rows, depth, vocabulary = 4096, 2048, 50257
    case = f"head cross_entropy and gradients bf16 [{rows}, {depth}, {vocabulary}]"
    if FILTER in case:
        h = torch.randn(rows, depth, device=DEVICE, dtype=torch.bfloat16)
        w = torch.randn(vocabulary, depth, device=DEVICE, dtype=torch.bfloat16) * 0.05
        y = torch.randint(vocabulary, (rows,), device=DEVICE)

        def head():
            leaves = [h.detach().requires_grad_(), w.detach().requires_grad_()]
            return torch.autograd.grad(torch.nn.functional.cross_entropy(leaves[0] @ leaves[1].T, y), leaves)

        try_case(case, "torch", 4 * (rows + vocabulary) * depth, 1, lambda i: head())

    for rows, classes in [(65536, 18), (2048, 50257)]:
        case, moved = f"draw actions [{rows}, {classes}]", 4 * rows * (classes + 1)
        if FILTER in case:
            sets = sets_for(moved)
            z = [torch.randn(rows, classes, device=DEVICE) * 4 for _ in range(sets)]
            try_case(case, "torch", moved, sets, lambda i: torch.multinomial(torch.softmax(z[i], -1), 1))

    rows, columns = 65536, 64
    case, moved = f"observations [{rows}, {columns}]", 12 * rows * columns
    if FILTER in case:
        sets = sets_for(moved)
        x = [torch.randn(rows, columns, device=DEVICE) for _ in range(sets)]

        def normalize(t):
            variance, mean = torch.var_mean(t, 0)
            return ((t - mean) * torch.rsqrt(variance + 1e-8)).clamp(-10, 10)

        compiled = torch.compile(normalize)
        try_case(case, "torch", moved, sets, lambda i: normalize(x[i]))
        try_case(case, "torch.compile", moved, sets, lambda i: compiled(x[i]))


if __name__ == "__main__":
    FILTER = sys.argv[1] if len(sys.argv) > 1 else ""
    if not torch.cuda.is_available():
        sys.exit("no GPU")
    torch.manual_seed(1)
    print(json.dumps({"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}))
    gae_cases()
    log_prob_cases()
    loss_cases()
    policy_cases()

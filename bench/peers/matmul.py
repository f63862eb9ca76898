"""PyTorch: GEMM and linear layers on the CPU."""

import torch
from timing import Cases

TYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f64": torch.float64}


def gemm(m, n, k, dtype):
    a, b, c = (torch.rand(*shape, dtype=TYPES[dtype]) - 0.5 for shape in ((m, k), (k, n), (m, n)))
    return lambda: torch.mm(a, b, out=c)


def linear(m, n, k, dtype):
    x, w = (torch.rand(*shape, dtype=TYPES[dtype]) - 0.5 for shape in ((m, k), (n, k)))
    return lambda: torch.nn.functional.linear(x, w)


def main():
    cases = Cases()
    for m, n, k in ((512,) * 3, (1024,) * 3, (2048,) * 3, (300, 1000, 640)):
        for dtype in TYPES:
            cases.add("gemm", dtype, f"{m}x{n}x{k}", "torch", lambda m=m, n=n, k=k, d=dtype: gemm(m, n, k, d))
    for m in (1, 4, 16, 32, 512):
        for dtype in ("f32", "bf16"):
            cases.add("linear", dtype, f"{m}x4096x4096", "torch", lambda m=m, d=dtype: linear(m, 4096, 4096, d))
    with torch.inference_mode():
        cases.run()


if __name__ == "__main__":
    main()

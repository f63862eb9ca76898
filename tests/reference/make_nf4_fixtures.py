"""Makes tests/data/bitsandbytes.safetensors: weights that bitsandbytes quantised on the CPU, as it stores them.

    python3 tests/reference/make_nf4_fixtures.py [output directory]

Needs torch, bitsandbytes and safetensors. tests/data/README.md says what is in the file.
"""

import pathlib
import sys

import bitsandbytes
import bitsandbytes.functional as F
import safetensors.torch
import torch

out = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else pathlib.Path(__file__).resolve().parents[1] / "data")
torch.manual_seed(0)
tensors = {}


def dequantised(packed, state, shape):
    """As one long row: with AVX-512, bitsandbytes 0.50 scales wrongly where blocks run on over the ends of rows."""
    state.shape = torch.Size([1, shape.numel()])
    return F.dequantize_4bit(packed, state).reshape(shape)


def nf4(name, w, blocksize=64, rows=None):
    """Plain and doubly quantised; `rows`: of which rows the dequantised values are kept."""
    rows = list(range(w.shape[0])) if rows is None else rows
    tensors[f"{name}.w"] = w.clone()
    packed, state = F.quantize_4bit(w, blocksize=blocksize, quant_type="nf4")
    tensors[f"{name}.packed"] = packed.flatten()
    tensors[f"{name}.absmax"] = state.absmax
    tensors[f"{name}.values"] = dequantised(packed, state, w.shape)[rows].contiguous()
    again, nested = F.quantize_4bit(w, blocksize=blocksize, quant_type="nf4", compress_statistics=True)
    assert torch.equal(packed, again)
    tensors[f"{name}.absmax_codes"] = nested.absmax
    tensors[f"{name}.nested_absmax"] = nested.state2.absmax
    tensors[f"{name}.offset"] = nested.offset.reshape(1)
    tensors[f"{name}.nested_values"] = dequantised(packed, nested, w.shape)[rows].contiguous()


# Whole blocks, among them one of zeros, one with a single weight, and one of midpoints between levels.
w = torch.randn(20, 96) * torch.logspace(-3, 1, 20)[:, None]
w.view(-1)[128:192] = 0
w.view(-1)[256:320] = 0
w.view(-1)[300] = -3
levels = F.get_4bit_type("nf4", device="cpu")
w.view(-1)[384:448] = 0.37 * torch.cat([(levels[1:] + levels[:-1]) / 2, levels, -levels, torch.ones(17)])
nf4("even", w)

# An odd number of columns and of weights; blocks run on over the ends of rows, and the last one is not full.
nf4("odd", torch.randn(7, 33))

# bf16, with more than 256 blocks: two factors of factors.
nf4("many", torch.randn(66, 126).to(torch.bfloat16), blocksize=32, rows=[0, 1, 64, 65])

tensors["dynamic_map"] = F.create_dynamic_map()

w = torch.randn(6, 45)
w[2] *= 100
codes, stats, _ = F.int8_vectorwise_quant(w)
tensors |= {"int8.w": w, "int8.codes": codes, "int8.stats": stats}

safetensors.torch.save_file(tensors, out / "bitsandbytes.safetensors")
print(f"torch {torch.__version__}, bitsandbytes {bitsandbytes.__version__}, safetensors {safetensors.__version__}")

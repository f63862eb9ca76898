"""Makes tests/data/safetensors_*.safetensors with the safetensors package: every dtype, odd shapes, odd names.

    python3 tests/reference/make_safetensors_fixtures.py [output directory]

Needs torch, numpy and safetensors. Element i of a tensor holds a value that the tests compute again from i.
"""

import pathlib
import sys

import safetensors.torch
import torch

out = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else pathlib.Path(__file__).resolve().parents[1] / "data")
out.mkdir(parents=True, exist_ok=True)

DTYPES = {
    "bool": torch.bool, "u8": torch.uint8, "i8": torch.int8, "i16": torch.int16, "u16": torch.uint16,
    "f16": torch.float16, "bf16": torch.bfloat16, "i32": torch.int32, "u32": torch.uint32, "f32": torch.float32,
    "f64": torch.float64, "i64": torch.int64, "u64": torch.uint64, "f8_e4m3": torch.float8_e4m3fn,
    "f8_e5m2": torch.float8_e5m2, "f8_e8m0": torch.float8_e8m0fnu, "f8_e4m3fnuz": torch.float8_e4m3fnuz,
    "f8_e5m2fnuz": torch.float8_e5m2fnuz, "c64": torch.complex64,
}


def values(count, dtype):
    """0, 1, 0, 1 for bool; 0 .. count - 1 for integers; (i - 3) / 4 for floats; raw bytes for 8-bit floats."""
    i = torch.arange(count)
    if dtype == torch.bool:
        return i % 2 == 1
    if str(dtype).startswith("torch.float8"):
        return i.to(torch.uint8).view(dtype)
    if dtype.is_floating_point or dtype.is_complex:
        return ((i - 3) / 4).to(dtype)
    return i.to(dtype)


# Every dtype in one file: the order that the writer chooses is part of what the tests compare, byte for byte.
safetensors.torch.save_file({name: values(6, dtype).reshape(2, 3) for name, dtype in DTYPES.items()},
                            out / "safetensors_dtypes.safetensors")

safetensors.torch.save_file(
    {"scalar": torch.tensor(1.5), "empty": torch.empty(0), "zero": torch.empty(3, 0, 2), "five": values(6, torch.float32)
     .reshape(1, 2, 1, 3, 1), "b": torch.tensor([1, 2, 3], dtype=torch.uint8), "a": torch.tensor([4], dtype=torch.uint8),
     "quote\"back\\slash/tab\tline\nbell\x07del\x7f": torch.tensor([1.0]), "größe_長さ_😀": torch.tensor([2.0], dtype=torch.float16)},
    out / "safetensors_shapes.safetensors", metadata={"format": "pt"})

# All 256 codes of the 8-bit floats beside what torch makes of them.
codes = torch.arange(256).to(torch.uint8)
eights = {name: codes.clone().view(dtype) for name, dtype in DTYPES.items() if name.startswith("f8")}
safetensors.torch.save_file(eights | {f"{name}.f32": value.float() for name, value in eights.items()},
                            out / "safetensors_f8.safetensors")

safetensors.torch.save_file({}, out / "safetensors_none.safetensors")

print(f"torch {torch.__version__}, safetensors {safetensors.__version__}")

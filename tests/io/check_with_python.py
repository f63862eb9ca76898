"""Loads what mlkit writes with the projects whose formats it claims to be.

    python3 check_with_python.py <test_io> <tests/data>

safetensors and numpy are needed (exit code 77 without them, which ctest shows as skipped); torch, PEFT and diffusers
make the checks complete where they are installed.
"""

import importlib.util
import os
import pathlib
import re
import subprocess
import sys
import tempfile


def installed(*names):
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        print(f"skipped: {', '.join(missing)} not installed")
    return not missing


if not installed("safetensors", "numpy"):
    sys.exit(77)

import numpy as np  # noqa: E402
import safetensors  # noqa: E402
import safetensors.numpy  # noqa: E402

test_io, data = sys.argv[1], pathlib.Path(sys.argv[2])


def check_tensors(folder):
    with safetensors.safe_open(folder / "tensors.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt", "note": "line\nbreak"}, file.metadata()
        assert set(file.keys()) == {"f32", "f64", "f16", "bf16", "scalar", "empty", 'quote"tab\té'}, file.keys()
        expected = (np.arange(6).reshape(2, 3) - 3) / 4
        for name, dtype in (("f32", np.float32), ("f64", np.float64), ("f16", np.float16)):
            tensor = file.get_tensor(name)
            assert tensor.dtype == dtype and np.array_equal(tensor, expected), name
        assert file.get_tensor("scalar") == -7 and file.get_tensor("scalar").shape == ()
        assert file.get_tensor("empty").shape == (0, 3)
    print("safetensors reads mlkit's tensors")


def check_sd15(folder):
    tensors = safetensors.numpy.load_file(folder / "sd15.safetensors")
    assert len(tensors) == 256
    assert sum(t.size for t in tensors.values()) == 797_184
    assert sum(t.nbytes for t in tensors.values()) == 3_188_736
    print("safetensors reads mlkit's Stable Diffusion adapters: 256 tensors, 797184 parameters, 3188736 bytes")


def check_peft(folder):
    import peft
    import safetensors.torch
    import torch
    from torch import nn

    class Tiny(nn.Module):  # that of make_adapter_fixtures.py
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(20, 16)
            self.blocks = nn.ModuleList(
                nn.ModuleDict({"attn": nn.ModuleDict({n: nn.Linear(16, 16) for n in ("q_proj", "v_proj")}),
                               "up": nn.Linear(16, 24)}) for _ in range(2))
            self.conv = nn.Conv2d(3, 8, (3, 5))

    for name in ("peft_tiny", "peft_tiny_rslora", "peft_tiny_dora"):
        model = peft.PeftModel.from_pretrained(Tiny(), folder / name).double()
        deltas = {key.removeprefix("base_model.model."): module.get_delta_weight("default")
                  for key, module in model.named_modules() if hasattr(module, "get_delta_weight")}
        expected = safetensors.torch.load_file(data / name / "deltas.safetensors")
        assert set(deltas) == set(expected), set(deltas) ^ set(expected)
        for key, delta in deltas.items():
            torch.testing.assert_close(delta, expected[key], rtol=1e-12, atol=1e-14)
        original = safetensors.torch.load_file(data / name / "adapter_model.safetensors")
        written = safetensors.torch.load_file(folder / name / "adapter_model.safetensors")
        assert all(torch.equal(written[key], value) for key, value in original.items()) and len(written) == len(original)
    print(f"PEFT {peft.__version__} loads mlkit's checkpoints and computes the same updates")


def check_diffusers(folder):
    import diffusers
    import safetensors.torch
    import torch
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

    def load(name):
        state, alphas, metadata = StableDiffusionPipeline.lora_state_dict(folder / name, return_lora_metadata=True)
        unet = UNet2DConditionModel(
            block_out_channels=(8, 16), layers_per_block=1, sample_size=8, norm_num_groups=4, cross_attention_dim=12,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=4)
        unet.load_lora_adapter(state, prefix="unet", network_alphas=alphas, metadata=metadata)
        return {key: module.get_delta_weight(module.active_adapters[0]).detach()
                for key, module in unet.named_modules() if hasattr(module, "get_delta_weight")}

    halves = safetensors.torch.load_file(data / "diffusers_tiny.safetensors")
    expected = {}
    for key, down in halves.items():
        if key.startswith("unet.") and key.endswith(".lora.down.weight"):
            module = key.removeprefix("unet.").removesuffix(".lora.down.weight")
            expected[module] = 1.5 * halves[key.replace(".down.", ".up.")] @ down
    assert len(expected) == 32
    for name in ("diffusers.safetensors", "kohya.safetensors"):
        deltas = load(name)
        assert set(deltas) == set(expected), set(deltas) ^ set(expected)
        for key, delta in deltas.items():
            torch.testing.assert_close(delta, expected[key], rtol=1e-5, atol=1e-6)
    old = convert_unet_state_dict_to_peft(safetensors.torch.load_file(folder / "diffusers_old.safetensors"))
    for module, delta in expected.items():
        torch.testing.assert_close(old[f"{module}.lora_B.weight"] @ old[f"{module}.lora_A.weight"], delta, rtol=1e-5,
                                   atol=1e-6)
    print(f"diffusers {diffusers.__version__} loads mlkit's files under its names, its old names and kohya's")

    # The layers of Stable Diffusion 1.5, without memory for their weights.
    state, alphas, metadata = StableDiffusionPipeline.lora_state_dict(folder / "sd15.safetensors", return_lora_metadata=True)
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    unet.load_lora_adapter(state, prefix="unet", network_alphas=alphas, metadata=metadata, low_cpu_mem_usage=True)
    adapted = {key.replace(".default_0", ""): tuple(value.shape) for key, value in unet.state_dict().items() if ".lora_" in key}
    halves = {"down": "lora_A", "up": "lora_B"}
    written = {re.sub(r"^unet\.(.*)\.lora\.(down|up)\.", lambda m: f"{m[1]}.{halves[m[2]]}.", key): tuple(value.shape)
               for key, value in safetensors.torch.load_file(folder / "sd15.safetensors").items()}
    assert len(written) == 256 and adapted == written, adapted.items() ^ written.items()
    print("and finds a place in Stable Diffusion 1.5 for each of its adapters' tensors")


with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    subprocess.run([test_io, "[.samples]"], check=True, stdout=subprocess.DEVNULL,
                   env=os.environ | {"MLKIT_SAMPLES": name})
    check_tensors(folder)
    check_sd15(folder)
    if installed("torch", "peft"):
        check_peft(folder)
        if installed("diffusers"):
            check_diffusers(folder)

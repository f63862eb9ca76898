"""Makes tests/data/peft_*, diffusers_*.safetensors and kohya_*.safetensors with PEFT, diffusers and safetensors.

    python3 tests/reference/make_adapter_fixtures.py [output directory]

Needs torch, numpy, safetensors, peft, transformers and diffusers; the versions last used are recorded in
tests/data/README.md, which also lists what every file holds. Inputs are drawn in f32 and stored as such. PEFT then runs
in f64 on the same values, and what it computes is stored in f64, so that one file serves f32 and f64 kernels alike.
Weights of the files that stand for user files (peft_tiny, diffusers_*, kohya_*) are f32, f16 or bf16, as users have them.
"""

import json
import pathlib
import shutil
import sys
import tempfile

import numpy as np
import peft
import safetensors.torch
import torch
from torch import nn

torch.manual_seed(0)
torch.use_deterministic_algorithms(True)
out = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else pathlib.Path(__file__).resolve().parents[1] / "data")
out.mkdir(parents=True, exist_ok=True)


def normal(*shape, scale=1.0):
    """f64 values that f32 holds exactly."""
    return (torch.randn(*shape) * scale).double()


def save(name, **tensors):
    """f64 tensors under an upper-case first letter stay f64 (results); lower-case ones are inputs and become f32."""
    stored = {}
    for key, value in tensors.items():
        value = torch.as_tensor(value).detach().clone()
        if value.is_floating_point() and not key[0].isupper():
            assert torch.equal(value.float().double(), value.double()), key
            value = value.float()
        stored[key.lower() if key[0].isupper() else key] = value.contiguous()
    safetensors.torch.save_file(stored, out / f"{name}.safetensors")


def adapted(layer, name="layer", **config):
    """A PEFT model of this one layer, in f64, with both halves of the adapter non-zero."""
    model = nn.ModuleDict({name: layer}).double()
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=[name], lora_dropout=0.0, **config)).double()
    randomise(model)
    return model, model.base_model.model[name]


def ordered(config):
    """Sets have no order of their own; the fixtures do, so that a second run writes the same bytes."""
    config["target_modules"] = sorted(config["target_modules"])
    return config


def randomise(model):
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_magnitude" in key:
                parameter.copy_((parameter * (1 + 0.2 * torch.randn(parameter.shape))).float())
            elif "lora_" in key:
                parameter.copy_(normal(*parameter.shape, scale=0.3))
            else:
                parameter.copy_(normal(*parameter.shape, scale=0.5))


def magnitude_of(layer):
    return layer.lora_magnitude_vector["default"].weight if layer.use_dora["default"] else None


def reference(name, layer, x, a, b, **more):
    """Forward, backward and merge of one layer, as PEFT computes them."""
    m = magnitude_of(layer)
    inputs = x.clone().requires_grad_() if x.is_floating_point() else x
    y = layer(inputs)
    dy = normal(*y.shape)
    y.backward(dy)
    tensors = dict(x=x, a=a, b=b, dy=dy, Y=y, Da=a.grad, Db=b.grad, Scale=torch.tensor(layer.scaling["default"], dtype=torch.float64))
    if inputs.is_floating_point():
        tensors["Dx"] = inputs.grad
    if m is not None:
        tensors |= dict(m=m, Dm=m.grad)
    base = layer.base_layer
    tensors["w"] = base.weight.clone()
    if getattr(base, "bias", None) is not None:
        tensors["bias"] = base.bias.clone()
    layer.merge()
    tensors["Merged"] = base.weight
    save(name, **tensors, **more)


KINDS = {
    "lora": dict(lora_alpha=8),
    "rslora": dict(lora_alpha=8, use_rslora=True),
    "dora": dict(lora_alpha=6, use_dora=True),
    "rsdora": dict(lora_alpha=6, use_dora=True, use_rslora=True),
}

for kind, config in KINDS.items():
    model, layer = adapted(nn.Linear(24, 40), r=4, **config)
    randomise(model)
    reference(f"peft_linear_{kind}", layer, normal(7, 24), layer.lora_A["default"].weight, layer.lora_B["default"].weight)

for kind in ("lora", "dora"):
    stride, padding, dilation = (2, 1), (1, 2), (1, 1)
    conv = nn.Conv2d(6, 10, (3, 2), stride=stride, padding=padding)
    model, layer = adapted(conv, r=3, **KINDS[kind])
    reference(f"peft_conv_{kind}", layer, normal(2, 6, 9, 8), layer.lora_A["default"].weight,
              layer.lora_B["default"].weight, stride=torch.tensor(stride), padding=torch.tensor(padding),
              dilation=torch.tensor(dilation))

    ids = torch.tensor([3, 29, 0, 3, 17, 8, 3])
    model, layer = adapted(nn.Embedding(30, 12), r=3, **KINDS[kind])
    reference(f"peft_embedding_{kind}", layer, ids, layer.lora_embedding_A["default"], layer.lora_embedding_B["default"])

# PEFT 0.21 does not pass a base's dilation to lora_A and fails there, so the dilated case is torch's own convolution with
# the merged kernel, which is what a dilated adapter means.
stride, padding, dilation = (1, 2), (2, 1), (2, 3)
x, w, bias, a, b = (normal(*s) for s in ((2, 6, 9, 11), (10, 6, 3, 3), (10,), (3, 6, 3, 3), (10, 3, 1, 1)))
x, a, b = (t.requires_grad_() for t in (x, a, b))
merged = w + 2.0 * torch.einsum("or,rihw->oihw", b[:, :, 0, 0], a)
y = nn.functional.conv2d(x, merged, bias, stride, padding, dilation)
dy = normal(*y.shape)
y.backward(dy)
save("torch_conv_dilated", x=x, w=w, bias=bias, a=a, b=b, dy=dy, Y=y, Dx=x.grad, Da=a.grad, Db=b.grad, Merged=merged,
     Scale=torch.tensor(2.0).double(), stride=torch.tensor(stride), padding=torch.tensor(padding),
     dilation=torch.tensor(dilation))

# Three adapters of different rank and scale on one layer: rows of one batch, weighted merges.
model, layer = adapted(nn.Linear(24, 40), r=4, lora_alpha=8)
for name, r, alpha in (("second", 2, 3), ("third", 8, 4)):
    model.add_adapter(name, peft.LoraConfig(r=r, lora_alpha=alpha, target_modules=["layer"], lora_dropout=0.0))
model.double()
randomise(model)
names = ["default", "second", "third"]
halves = {}
for i, name in enumerate(names):
    halves |= {f"a{i}": layer.lora_A[name].weight.clone(), f"b{i}": layer.lora_B[name].weight.clone()}
scales = torch.tensor([layer.scaling[name] for name in names], dtype=torch.float64)
ids = torch.tensor([2, -1, 0, 0, 1, 2, -1, 0, 1])
x = normal(9, 24)
model.eval()
y = layer(x, adapter_names=[names[i] if i >= 0 else "__base__" for i in ids])
w, bias = layer.base_layer.weight.clone(), layer.base_layer.bias.clone()
weights = torch.tensor([0.75, -0.5, 1.25]).double()
model.add_weighted_adapter(names, weights.tolist(), adapter_name="sum", combination_type="cat")
weighted = w + layer.get_delta_weight("sum")
layer.merge(adapter_names=names)
save("peft_batch", x=x, ids=ids, w=w, bias=bias, **halves, Scales=scales, Y=y, weights=weights, Weighted=weighted,
     Merged=layer.base_layer.weight)


# What save_pretrained writes: several modules, rank and alpha patterns, a convolution and an embedding.
class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"attn": nn.ModuleDict({n: nn.Linear(16, 16) for n in ("q_proj", "v_proj")}),
                           "up": nn.Linear(16, 24)}) for _ in range(2))
        self.conv = nn.Conv2d(3, 8, (3, 5))


def tiny(name, dtype, adapter_name="default", **config):
    model = peft.get_peft_model(Tiny(), peft.LoraConfig(
        r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["embed", "q_proj", "v_proj", "up", "conv"],
        rank_pattern={r"blocks\.1\.attn\.v_proj": 2, "conv": 3}, alpha_pattern={"up": 5, "blocks.0.attn.q_proj": 1.5},
        base_model_name_or_path="", **config), adapter_name=adapter_name)
    randomise(model)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.data = parameter.data.to(dtype)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, save_embedding_layers=False)
        (out / name).mkdir(exist_ok=True)
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copy(pathlib.Path(folder) / file, out / name / file)
    model.double()
    deltas = {}
    for key, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            deltas[key.removeprefix("base_model.model.")] = module.get_delta_weight(adapter_name).contiguous()
    safetensors.torch.save_file(deltas, out / name / "deltas.safetensors")


tiny("peft_tiny", torch.float32)
tiny("peft_tiny_rslora", torch.bfloat16, use_rslora=True)
tiny("peft_tiny_dora", torch.float16, use_dora=True)

# diffusers and kohya names, from a UNet and a text encoder small enough to commit.
from diffusers import StableDiffusionPipeline, UNet2DConditionModel  # noqa: E402
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya  # noqa: E402
from transformers import CLIPTextConfig, CLIPTextModel  # noqa: E402


def components(dora=False):
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=8, norm_num_groups=4, cross_attention_dim=12,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4)
    text = CLIPTextModel(CLIPTextConfig(vocab_size=20, hidden_size=12, intermediate_size=16, num_hidden_layers=1,
                                        num_attention_heads=2, max_position_embeddings=8, bos_token_id=0, eos_token_id=1))
    unet.add_adapter(peft.LoraConfig(r=2, lora_alpha=3, target_modules=["to_q", "to_k", "to_v", "to_out.0"],
                                     use_dora=dora))
    text.add_adapter(peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], use_dora=dora))
    for model in (unet, text):
        randomise(model)
    return unet, text


unet, text = components()
unet_peft = peft.get_peft_model_state_dict(unet)
text_peft = peft.get_peft_model_state_dict(text)
with tempfile.TemporaryDirectory() as folder:
    # As the training scripts of diffusers save, with the configurations in the file's metadata.
    StableDiffusionPipeline.save_lora_weights(
        folder, unet_lora_layers=convert_state_dict_to_diffusers(unet_peft),
        text_encoder_lora_layers=convert_state_dict_to_diffusers(text_peft),
        unet_lora_adapter_metadata=ordered(unet.peft_config["default"].to_dict()),
        text_encoder_lora_adapter_metadata=ordered(text.peft_config["default"].to_dict()))
    shutil.copy(pathlib.Path(folder) / "pytorch_lora_weights.safetensors", out / "diffusers_tiny.safetensors")

# As diffusers saved attention processors before 0.17: no component, no alpha.
old = {}
for key, value in unet_peft.items():
    module, half = key.removesuffix(".weight").rsplit(".", 1)
    block, projection = module.removesuffix(".0").rsplit(".", 1)
    old[f"{block}.processor.{projection}_lora.{'down' if half == 'lora_A' else 'up'}.weight"] = value.contiguous()
safetensors.torch.save_file(old, out / "diffusers_old_tiny.safetensors")

from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft  # noqa: E402

assert set(convert_unet_state_dict_to_peft(old)) == set(unet_peft)

for name, dora in (("kohya_tiny", False), ("kohya_tiny_dora", True)):
    if dora:
        unet, text = components(dora=True)
    kohya = {}
    for model, component, flat, alpha in ((unet, "unet", "lora_unet", 3.0), (text, "text_encoder", "lora_te1", 4.0)):
        state = peft.get_peft_model_state_dict(model)
        halves = {f"{component}.{k}": v for k, v in state.items() if "magnitude" not in k}
        kohya |= convert_state_dict_to_kohya(halves)
        for key, value in state.items():
            if key.endswith("lora_A.weight"):
                kohya[f"{flat}_{key.removesuffix('.lora_A.weight').replace('.', '_')}.alpha"] = torch.tensor(alpha)
            if "magnitude" in key:
                kohya[f"{flat}_{key.removesuffix('.lora_magnitude_vector').replace('.', '_')}.dora_scale"] = value[:, None]
    kohya = {k: v.to(torch.float16).contiguous() for k, v in kohya.items()}
    safetensors.torch.save_file(kohya, out / f"{name}.safetensors", metadata={"ss_network_dim": "2"})

for directory in sorted(out.glob("peft_tiny*")):  # no path of the machine that made them
    config = json.loads((directory / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = ""
    ordered(config)
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))

print(f"peft {peft.__version__}, torch {torch.__version__}, safetensors {safetensors.__version__}")

"""Makes tests/data/attention_layer_fixtures.txt with torch, diffusers, peft and transformers, in f64.

    python3 tests/reference/make_attention_layer_fixtures.py [output directory]

Whole layers with their weights, outputs and gradients: torch.nn.MultiheadAttention over a context and over itself under a
causal mask; diffusers' Attention as in Stable Diffusion's UNet, its four projections adapted by PEFT (LoRA and DoRA);
Llama's attention with rotary embedding and grouped queries. Format as in make_nn_fixtures.py.
"""

import torch
from diffusers.models.attention_processor import Attention
from fixture_lines import Lines
from peft import LoraConfig, inject_adapter_in_model
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
lines = Lines("attention_layer_fixtures.txt")
put = lines.put


def case(name, f, weights, **inputs):
    """Values of weights and inputs, the result, and the gradients of inputs and of the weights that ask for one."""
    inputs = {key: value.requires_grad_() for key, value in inputs.items()}
    y = f(**inputs)
    dy = torch.randn_like(y)
    wanted = {**inputs, **{key: w for key, w in weights.items() if w.requires_grad}}
    gradients = torch.autograd.grad(y, list(wanted.values()), dy)
    for key, value in {**weights, **inputs, "y": y, "dy": dy}.items():
        put(f"{name}.{key}", value)
    for key, gradient in zip(wanted, gradients):
        put(f"{name}.d{key}", gradient)


def frozen(**weights):
    return {key: w.detach() for key, w in weights.items()}


def randomise(module):
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.4)


layer = torch.nn.MultiheadAttention(8, 2, kdim=6, vdim=6, batch_first=True)
randomise(layer)
bias = torch.randn(3, 5)
qb, kb, vb = layer.in_proj_bias.chunk(3)
case("multihead_cross", lambda x, context: layer(x, context, context, attn_mask=bias, need_weights=False)[0],
     frozen(qw=layer.q_proj_weight, kw=layer.k_proj_weight, vw=layer.v_proj_weight, ow=layer.out_proj.weight, qbias=qb,
            kbias=kb, vbias=vb, obias=layer.out_proj.bias, bias=bias), x=torch.randn(2, 3, 8), context=torch.randn(2, 5, 6))

layer = torch.nn.MultiheadAttention(8, 2, batch_first=True)
randomise(layer)
(qw, kw, vw), (qb, kb, vb) = layer.in_proj_weight.chunk(3), layer.in_proj_bias.chunk(3)
hidden = torch.ones(4, 4, dtype=torch.bool).triu(1)
case("multihead_self", lambda x: layer(x, x, x, attn_mask=hidden, need_weights=False)[0],
     frozen(qw=qw, kw=kw, vw=vw, ow=layer.out_proj.weight, qbias=qb, kbias=kb, vbias=vb, obias=layer.out_proj.bias),
     x=torch.randn(2, 4, 8))

for name, dora in (("diffusers_lora", False), ("diffusers_dora", True)):
    layer = Attention(8, cross_attention_dim=6, heads=2, dim_head=3)
    randomise(layer)
    layer = inject_adapter_in_model(LoraConfig(r=2, lora_alpha=3, use_dora=dora, init_lora_weights=False,
                                               target_modules=["to_q", "to_k", "to_v", "to_out.0"]), layer)
    weights = {}
    for key, p in (("q", layer.to_q), ("k", layer.to_k), ("v", layer.to_v), ("o", layer.to_out[0])):
        weights[f"{key}w"] = p.base_layer.weight.detach()
        weights[f"{key}a"], weights[f"{key}b"] = p.lora_A["default"].weight, p.lora_B["default"].weight
        if dora:
            weights[f"{key}m"] = p.lora_magnitude_vector["default"].weight
    weights["obias"] = layer.to_out[0].base_layer.bias.detach()
    case(name, lambda x, context: layer(x, context), weights, x=torch.randn(2, 3, 8), context=torch.randn(2, 5, 6))

config = LlamaConfig(hidden_size=8, num_attention_heads=4, num_key_value_heads=2, head_dim=4, rope_theta=100.0,
                     attention_bias=False, attn_implementation="sdpa")
layer = LlamaAttention(config, 0)
randomise(layer)
angles = torch.arange(5)[:, None] * 100.0 ** (-torch.arange(0, 4, 2) / 4)
angles = torch.cat((angles, angles), -1)[None]
mask = torch.full((5, 5), -torch.inf).triu(1)[None, None]
case("llama", lambda x: layer(x, (angles.cos(), angles.sin()), mask)[0],
     frozen(qw=layer.q_proj.weight, kw=layer.k_proj.weight, vw=layer.v_proj.weight, ow=layer.o_proj.weight),
     x=torch.randn(2, 5, 8))

lines.write()

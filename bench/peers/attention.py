"""PyTorch's scaled_dot_product_attention on the CPU, forward and backward, and one query against a cache of keys.

Backward is the gradients alone, without forward: torch.autograd.grad on a graph that is kept. A bias comes in two kinds. For
one that is a constant (attention_bias) PyTorch has a fused kernel; for one whose gradient is wanted
(attention_bias_training, attention_bias_backward) it stores the scores. Layers are torch.nn.Linear around it, and with
PEFT's adapters of rank 4 in their places.
"""

import peft
import torch
from timing import Cases

TYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def uniform(dtype, *shape):
    return (2 * torch.rand(*shape) - 1).to(TYPES[dtype])


def operands(dtype, batch, heads, kv_heads, queries, keys, d):
    """q, k, v, and the gradient of the output."""
    return (uniform(dtype, batch, heads, queries, d), uniform(dtype, batch, kv_heads, keys, d),
            uniform(dtype, batch, kv_heads, keys, d), uniform(dtype, batch, heads, queries, d))


def attend(q, k, v, causal=False, bias=None):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal,
                                                            enable_gqa=k.shape[1] != q.shape[1])


def bias_of(dtype, batch, heads, kv_heads, queries, keys, d):
    return uniform(dtype, batch, heads, queries, keys)


def forward(dtype, shape, causal=False, with_bias=False):
    q, k, v, _ = operands(dtype, *shape)
    bias = bias_of(dtype, *shape) if with_bias else None

    def call():
        with torch.inference_mode():
            return attend(q, k, v, causal, bias)

    return call


def forward_training(dtype, shape):
    """With a bias whose gradient will be wanted."""
    inputs = [x.requires_grad_() for x in (*operands(dtype, *shape)[:3], bias_of(dtype, *shape))]
    return lambda: attend(*inputs[:3], bias=inputs[3])


def backward(dtype, shape, causal=False, with_bias=False):
    q, k, v, dout = operands(dtype, *shape)
    inputs = [x.requires_grad_() for x in (q, k, v, *([bias_of(dtype, *shape)] if with_bias else []))]
    out = attend(q, k, v, causal, inputs[3] if with_bias else None)
    return lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True)


class Layer(torch.nn.Module):
    """Cross-attention as in Stable Diffusion 1.5."""

    def __init__(self, heads, width=320, context_width=768):
        super().__init__()
        self.heads = heads
        self.to_q = torch.nn.Linear(width, width, bias=False)
        self.to_k = torch.nn.Linear(context_width, width, bias=False)
        self.to_v = torch.nn.Linear(context_width, width, bias=False)
        self.to_out = torch.nn.Linear(width, width)

    def forward(self, x, context):
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (self.to_q(x), self.to_k(context), self.to_v(context)))
        return self.to_out(attend(q, k, v).transpose(1, 2).flatten(2))


def layer(shape, adapted):
    """The layer and its inputs."""
    batch, heads, _, queries, keys, d = shape
    model = Layer(heads).requires_grad_(False)
    if adapted:
        config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out"], init_lora_weights=False)
        model = peft.inject_adapter_in_model(config, model)
    return model, uniform("f32", batch, queries, heads * d), uniform("f32", batch, keys, 768)


def layer_forward(dtype, shape, adapted=False):
    model, x, context = layer(shape, adapted)

    def call():
        with torch.inference_mode():
            return model(x, context)

    return call


def layer_training(dtype, shape):
    """Forward, and the gradients of x and of the adapters."""
    model, x, context = layer(shape, True)
    wanted = [x.requires_grad_(), *(p for p in model.parameters() if p.requires_grad)]
    dy = torch.rand(x.shape) - 0.5
    return lambda: torch.autograd.grad(model(x, context), wanted, dy)


def main():
    cases = Cases()
    self_attention, long_self, odd = (1, 8, 8, 1024, 1024, 64), (1, 8, 8, 2048, 2048, 64), (3, 5, 5, 333, 777, 48)
    cross_40, cross_80 = (2, 8, 8, 4096, 77, 40), (2, 8, 8, 1024, 77, 80)
    grouped, odd_grouped, one_head = (1, 8, 2, 1024, 1024, 128), (3, 5, 1, 333, 777, 48), (1, 1, 1, 4096, 4096, 64)
    decoding, odd_decoding = (8, 32, 8, 1, 2048, 128), (3, 5, 5, 1, 777, 48)
    on_one_thread = (self_attention, long_self, odd, decoding)

    def add(name, shape, make, types=TYPES, by="torch", one_thread=False, **options):
        batch, heads, kv_heads, queries, keys, d = shape
        text = f"{batch}x{heads}" + (f"kv{kv_heads}" if kv_heads != heads or name == "decode" else "") + "x"
        text += f"{keys}x{d}" if name == "decode" else f"{queries}x{keys}x{d}"
        for dtype in types:
            cases.add(name, dtype, text, by, lambda dtype=dtype: make(dtype, shape, **options),
                      one_thread or shape in on_one_thread)

    for shape in (self_attention, cross_40, cross_80, one_head, odd):
        add("attention", shape, forward)
        add("attention_backward", shape, backward)
    for shape in (long_self, grouped, odd_grouped):
        add("attention_causal", shape, forward, causal=True)
        add("attention_causal_backward", shape, backward, causal=True)
    for shape in (self_attention, odd):
        add("attention_bias", shape, forward, with_bias=True)
        add("attention_bias_training", shape, forward_training)
        add("attention_bias_backward", shape, backward, with_bias=True)
    for shape in (decoding, odd_decoding):
        add("decode", shape, forward)
    add("attention_causal", one_head, forward, ("f32",), causal=True)
    add("attention_causal_backward", one_head, backward, ("f32",), causal=True)
    add("attention", (1, 1, 1, 8192, 8192, 64), forward, ("f32",))
    add("attention_layer", cross_40, layer_forward, ("f32",), one_thread=True)
    add("attention_layer_lora", cross_40, layer_forward, ("f32",), "peft", True, adapted=True)
    add("attention_layer_lora_training", cross_40, layer_training, ("f32",), "peft", True)
    cases.run()


if __name__ == "__main__":
    main()

"""Makes tests/data/attention_fixtures.txt with torch and transformers, in f64.

    python3 tests/reference/make_attention_fixtures.py [output directory]

Format as in make_nn_fixtures.py, with 15 digits. Inputs are multiples of 1/64, which f32, f16 and bf16 hold too. A case
is <inputs>.<stages>, and holds out, dq, dk, dv, and lse, dbias, dsinks where they are of interest: those of
scaled_dot_product_attention without lse, those of FlexAttention with it and with a gradient dlse that comes in.
"""

import types
import warnings

import torch
import torch.nn.functional as F
from fixture_lines import Lines
from torch.nn.attention import flex_attention as flex_module
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as gpt_oss_attention
from transformers.models.gptj import modeling_gptj
from transformers.models.llama import modeling_llama

warnings.filterwarnings("ignore")
torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
# Gradients on a CPU are refused for the sake of the compiled kernels, which have none; the formulas run anywhere.
flex_module._validate_device = lambda *_: None
lines = Lines("attention_fixtures.txt", digits=15)
put = lines.put


def values(*shape):
    return torch.randn(shape).clamp(-3.9, 3.9).mul(64).round().div(64)


class Inputs:
    def __init__(self, name, batch, heads, kv_heads, queries, keys, d, d_v):
        self.name, self.sizes = name, (batch, heads, kv_heads, queries, keys, d, d_v)
        self.q, self.k = values(batch, heads, queries, d), values(batch, kv_heads, keys, d)
        self.v = values(batch, kv_heads, keys, d_v)
        self.dout, self.dlse = values(batch, heads, queries, d_v), values(batch, heads, queries)
        put(f"{name}.shape", self.sizes)
        for part in ("q", "k", "v", "dout", "dlse"):
            put(f"{name}.{part}", getattr(self, part))

    def case(self, name, f, **more):
        """f(q, k, v, *more) is out, or out and lse."""
        name = f"{self.name}.{name}"
        tensors = {"dq": self.q, "dk": self.k, "dv": self.v} | {f"d{n}": t for n, t in more.items()}
        tensors = {n: t.clone().requires_grad_() for n, t in tensors.items()}
        results, gradients = f(*tensors.values()), [self.dout]
        if isinstance(results, tuple):
            put(f"{name}.lse", results[1])
            # A query that sees no key has no lse to differentiate.
            results = (results[0], results[1].masked_fill(results[1] == -torch.inf, 0))
            gradients.append(self.dlse)
        put(f"{name}.out", results[0] if isinstance(results, tuple) else results)
        for n, g in zip(tensors, torch.autograd.grad(results, list(tensors.values()), gradients)):
            put(f"{name}.{n}", g)

    def sdpa(self, name, mask=None, bias=None, **options):
        def run(q, k, v, *b):
            attn_mask = b[0] if b else mask
            return F.scaled_dot_product_attention(q, k, v, attn_mask, enable_gqa=True, **options)

        self.case(name, run, **({} if bias is None else {"bias": bias}))

    def flex(self, name, score_mod=None, mask_mod=None, bias=None, **options):
        """score_mod sees the bias as its last argument where there is one."""
        block_mask = mask_mod and create_block_mask(mask_mod, None, None, *self.sizes[3:5], device="cpu")

        def run(q, k, v, *b):
            mod = (lambda s, *at: score_mod(s, *at, *b)) if score_mod else None
            return flex_attention(q, k, v, mod, block_mask, enable_gqa=True, return_lse=True, **options)

        self.case(name, run, **({} if bias is None else {"bias": bias}))


wide = Inputs("wide", 1, 2, 1, 5, 9, 6, 4)  # more keys than queries
tall = Inputs("tall", 1, 2, 2, 9, 5, 4, 3)
square = Inputs("square", 1, 3, 1, 8, 8, 5, 4)
batch = Inputs("batch", 2, 4, 2, 3, 8, 6, 4)
words = Inputs("words", 1, 1, 1, 4, 77, 4, 3)

# What PyTorch calls causal is level at the top left; FlashAttention's is level at the bottom right.
for inputs in (wide, tall):
    queries, keys = inputs.sizes[3:5]
    inputs.sdpa("causal_top_left", is_causal=True)
    inputs.sdpa("causal_bottom_right", causal_lower_right(queries, keys))
    inputs.flex("causal", mask_mod=lambda b, h, i, j: j <= i + keys - queries)
    inputs.flex("window_top_left", mask_mod=lambda b, h, i, j: (j >= i - 2) & (j <= i + 1))
    inputs.flex("window_bottom_right", mask_mod=lambda b, h, i, j: (j - i - keys + queries).abs() <= 1)
wide.sdpa("plain")
words.sdpa("scaled", scale=0.3)

mask = torch.rand(2, 5, 9) < 0.6
mask[1, 3] = False
put("wide.mask", mask.double())
wide.sdpa("boolean", mask)

bias = values(1, 2, 5, 9)
put("wide.bias", bias)
wide.sdpa("bias", bias=bias)
shared = values(4, 1, 8)  # one for all batches and queries
put("batch.bias", shared)
batch.sdpa("bias", bias=shared)
lengths = torch.tensor([8, 3])
put("batch.lengths", lengths)
batch.sdpa("lengths", (torch.arange(8) < lengths[:, None])[:, None, None])

slopes = torch.tensor([0.25, 0.0625])
put("wide.slopes", slopes)


def capped(s):
    return 1.5 * torch.tanh(s / 1.5)


def sloped(s, b, h, i, j):
    return s - slopes[h] * (i + 4 - j).abs()


wide.flex("softcap", lambda s, b, h, i, j: capped(s))
wide.flex("alibi", sloped)
wide.flex("softcap_alibi", lambda s, *at: sloped(capped(s), *at))
wide.flex("alibi_softcap", lambda s, *at: capped(sloped(s, *at)))
wide.flex("bias_softcap", lambda s, b, h, i, j, x: capped(s + x[0, h, i, j]), bias=bias)
wide.flex("softcap_bias", lambda s, b, h, i, j, x: capped(s) + x[0, h, i, j], bias=bias)

documents = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2])
put("square.documents", documents)
square.flex("documents", mask_mod=lambda b, h, i, j: documents[i] == documents[j])
square.flex("documents_causal", mask_mod=lambda b, h, i, j: (documents[i] == documents[j]) & (j <= i))

# BLOOM adds slope * j, which differs from -slope * distance by what a softmax does not see.
alibi = build_alibi_tensor(torch.ones(1, 8), 3, torch.float64).view(3, 1, 8)
put("square.slopes", alibi[:, 0, 1])
square.sdpa("alibi", torch.where(torch.ones(8, 8).tril().bool(), alibi, -torch.inf))

sinks = values(2)
put("tall.sinks", sinks)
future = torch.where(torch.ones(9, 5).tril(-4).bool(), 0.0, -torch.inf)


def with_sinks(q, k, v, s):
    module = types.SimpleNamespace(sinks=s, num_key_value_groups=1, training=False)
    return gpt_oss_attention(module, q, k, v, future, 0.5)[0].transpose(1, 2)


tall.case("sinks", with_sinks, sinks=sinks)

# Rotary embedding at positions 3 to 7, of frequencies 100^(-c/3), of heads [1, 2, 5, 6].
x, dx, positions = values(1, 2, 5, 6), values(1, 2, 5, 6), torch.arange(3, 8)
put("rotary.x", x), put("rotary.dout", dx)
angles = positions[:, None] * 100 ** (-torch.arange(3) / 3)
twice = torch.cat((angles, angles), -1)[None]
for name, f in (
    ("halves", lambda x: modeling_llama.apply_rotary_pos_emb(x, x, twice.cos(), twice.sin())[0]),
    ("adjacent", lambda x: modeling_gptj.apply_rotary_pos_emb(
        x.transpose(1, 2), angles.sin()[None], angles.cos()[None]).transpose(1, 2)),
):
    leaf = x.clone().requires_grad_()
    y = f(leaf)
    put(f"rotary.{name}", y)
    put(f"rotary.{name}.dx", torch.autograd.grad(y, leaf, dx)[0])

lines.write()

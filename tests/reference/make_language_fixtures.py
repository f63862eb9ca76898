"""Makes tests/data/language_fixtures.txt with torch and transformers, in f64.

    python3 tests/reference/make_language_fixtures.py [output directory]

Format as in make_nn_fixtures.py; tests/data/README.md records the versions. A GPT-NeoX whose residuals are not parallel
is the model of nn/language_model.hpp with a head of its own: its parameters under mlkit's names, its logits, a loss over
what follows the prompts, and the gradients. Then what the logits processors of generation leave of logits.
"""

import torch
import torch.nn.functional as F
from fixture_lines import Lines
from transformers import (GPTNeoXConfig, GPTNeoXForCausalLM, LogitsProcessorList, RepetitionPenaltyLogitsProcessor,
                          TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper)

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
lines = Lines("language_fixtures.txt", 15)
put = lines.put

vocabulary, width, heads, blocks, hidden = 11, 8, 2, 2, 12
model = GPTNeoXForCausalLM(GPTNeoXConfig(
    vocab_size=vocabulary, hidden_size=width, num_hidden_layers=blocks, num_attention_heads=heads, intermediate_size=hidden,
    hidden_act="gelu", rotary_pct=1.0, rotary_emb_base=100, max_position_embeddings=16, layer_norm_eps=1e-5,
    use_parallel_residual=False, attention_bias=False, tie_word_embeddings=False, attn_implementation="sdpa")).double().eval()


class Angles(torch.nn.Module):
    """GPT-NeoX's rotary embedding, which transformers rounds to f32."""

    def forward(self, x, position_ids):
        d = width // heads
        angles = position_ids[..., None].double() * 100.0**(-torch.arange(0, d, 2) / d)
        return torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()


model.gpt_neox.rotary_emb = Angles()
for p in model.parameters():
    torch.nn.init.normal_(p, std=0.5)


def ours(of):
    """of(parameter) for every parameter of the model, under mlkit's names and in its layout."""
    base = model.gpt_neox
    yield "embed.weight", of(base.embed_in.weight)
    for i, layer in enumerate(base.layers):
        yield f"blocks.{i}.norm1.weight", of(layer.input_layernorm.weight)
        yield f"blocks.{i}.norm1.bias", of(layer.input_layernorm.bias)
        qkv = of(layer.attention.query_key_value.weight).reshape(heads, 3, width // heads, width)  # each head's q, k and v
        for part, name in enumerate("qkv"):
            yield f"blocks.{i}.attn.{name}_proj.weight", qkv[:, part].reshape(width, width)
        yield f"blocks.{i}.attn.o_proj.weight", of(layer.attention.dense.weight)
        yield f"blocks.{i}.norm2.weight", of(layer.post_attention_layernorm.weight)
        yield f"blocks.{i}.norm2.bias", of(layer.post_attention_layernorm.bias)
        yield f"blocks.{i}.mlp.up_proj.weight", of(layer.mlp.dense_h_to_4h.weight)
        yield f"blocks.{i}.mlp.up_proj.bias", of(layer.mlp.dense_h_to_4h.bias)
        yield f"blocks.{i}.mlp.down_proj.weight", of(layer.mlp.dense_4h_to_h.weight)
        yield f"blocks.{i}.mlp.down_proj.bias", of(layer.mlp.dense_4h_to_h.bias)
    yield "norm.weight", of(base.final_layer_norm.weight)
    yield "norm.bias", of(base.final_layer_norm.bias)
    yield "lm_head.weight", of(model.embed_out.weight if hasattr(model, "embed_out") else model.lm_head.weight)


ids = torch.tensor([[3, 7, 1, 0, 7, 10], [5, 5, 2, 9, 4, 8]])
labels = ids[:, 1:].clone()
labels[0, :2] = labels[1, 0] = -100
logits = model(ids).logits
loss = F.cross_entropy(logits[:, :-1].reshape(-1, vocabulary), labels.reshape(-1), ignore_index=-100)
loss.backward()
put("model.ids", ids.double())
put("model.labels", labels.double())
put("model.logits", logits)
put("model.loss", loss)
for name, value in ours(lambda p: p):
    put(f"model.{name}", value)
for name, value in ours(lambda p: p.grad):
    put(f"model.d.{name}", value)

logits, text = torch.randn(1, 40) * 2, torch.tensor([[3, 3, 17, 39, 0, 21]])
put("choice.logits", logits)
put("choice.text", text.double())
for name, chain in {
        "plain": [],
        "temperature": [TemperatureLogitsWarper(0.7)],
        "top_k": [TopKLogitsWarper(5)],
        "top_p": [TopPLogitsWarper(0.8)],
        "penalty": [RepetitionPenaltyLogitsProcessor(1.3)],
        "all": [RepetitionPenaltyLogitsProcessor(1.3), TemperatureLogitsWarper(1.5), TopKLogitsWarper(12),
                TopPLogitsWarper(0.6)],
}.items():
    left = LogitsProcessorList(chain)(text, logits.clone()).log_softmax(-1)
    put(f"choice.{name}", left)  # -inf: never drawn

lines.write()

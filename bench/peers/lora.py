"""PEFT's LoRA and DoRA layers, a batch of mixed adapters, and bitsandbytes' NF4 linear, on the CPU."""

import bitsandbytes
import peft
import peft.helpers
import torch
from timing import Cases

ADAPTERS = 32


class Holder(torch.nn.Module):
    """The smallest model that PEFT takes: one linear layer by name."""

    def __init__(self, width_in, width_out):
        super().__init__()
        self.layer = torch.nn.Linear(width_in, width_out, bias=False)

    def forward(self, x):
        return self.layer(x)


def adapted(width_in, width_out, rank, **options):
    """A PEFT model whose B is not zero, as after training."""
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["layer"], **options)
    model = peft.get_peft_model(Holder(width_in, width_out), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model, config


def plain(tokens, width_out, width_in):
    x, w = torch.rand(tokens, width_in) - 0.5, torch.rand(width_out, width_in) - 0.5

    def call():
        with torch.inference_mode():
            return torch.nn.functional.linear(x, w)

    return call


def forward(tokens, width_out, width_in, rank, **options):
    model, _ = adapted(width_in, width_out, rank, **options)
    model.eval()
    x = torch.rand(tokens, width_in) - 0.5

    def call():
        with torch.no_grad():
            return model(x)

    return call


def forward_cached(tokens, width_out, width_in, rank):
    """DoRA with PEFT's cache of the norms."""
    call = forward(tokens, width_out, width_in, rank, use_dora=True)

    def cached():
        with peft.helpers.DoraCaching():
            return call()

    return cached


def training(tokens, width_out, width_in, rank, **options):
    """Forward and backward to x, A and B."""
    model, _ = adapted(width_in, width_out, rank, **options)
    x = (torch.rand(tokens, width_in) - 0.5).requires_grad_()
    dy = torch.rand(tokens, width_out) - 0.5
    parameters = [p for p in model.parameters() if p.requires_grad]

    def call():
        return torch.autograd.grad(model(x), [x, *parameters], dy)

    return call


def mixed_batch(tokens, width_out, width_in, rank):
    """The rows take turns with the adapters."""
    model, config = adapted(width_in, width_out, rank)
    names = ["default"]
    for i in range(1, ADAPTERS):
        names.append(f"adapter_{i}")
        model.add_adapter(names[-1], config)
    model.eval()
    x = torch.rand(tokens, width_in) - 0.5
    ids = [names[row % ADAPTERS] for row in range(tokens)]

    def call():
        with torch.no_grad():
            return model(x, adapter_names=ids)

    return call


def nf4(tokens, width_out, width_in):
    layer = bitsandbytes.nn.Linear4bit(width_in, width_out, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer = layer.to("cpu")
    assert layer.weight.dtype == torch.uint8, "the weight was not quantised"
    x = torch.rand(tokens, width_in) - 0.5

    def call():
        with torch.no_grad():
            return layer(x)

    return call


def main():
    cases = Cases()
    layers = {(512, 4096, 4096): 16, (512, 768, 768): 4, (512, 1024, 1024): 16, (300, 1000, 640): 12,
              (32, 4096, 4096): 16}

    def add(name, shape, by, make, *arguments, **options):
        cases.add(name, "f32", "x".join(map(str, shape)) + "".join(f"r{a}" for a in arguments), by,
                  lambda: make(*shape, *arguments, **options))

    for shape, rank in layers.items():
        add("plain", shape, "torch", plain)
        add("lora", shape, "peft", forward, rank)
        add("dora", shape, "peft", forward, rank, use_dora=True)
        add("dora_frozen", shape, "peft", forward_cached, rank)
        add("lora_training", shape, "peft", training, rank)
        add("dora_training", shape, "peft", training, rank, use_dora=True)
    add("adapters32", (32, 4096, 4096), "peft", mixed_batch, 16)
    add("adapters32", (300, 1000, 640), "peft", mixed_batch, 12)
    for tokens in (1, 32, 512):
        add("nf4", (tokens, 4096, 4096), "bitsandbytes", nf4)
    add("nf4", (300, 1000, 640), "bitsandbytes", nf4)
    cases.run()


if __name__ == "__main__":
    main()

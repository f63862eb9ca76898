#!/usr/bin/env python3
"""Writes docs/support.md: which operation takes which element type on which executor, found out by compiling each call.

    support_matrix.py            writes the table
    support_matrix.py --check    only says whether the committed table is still true
"""

import concurrent.futures
import os
import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "support.md"
TYPES = [("f32", "float"), ("f64", "double"), ("bf16", "mlkit::bf16"), ("f16", "mlkit::f16")]
# With the flags that a host compiler needs for its code: what a GPU runs is asked for through the tests' stand-ins for CUDA.
EXECUTORS = {
    "cpu": [],
    "cuda": ["-DMLKIT_CUDA_EMULATION", "-I", str(ROOT / "tests" / "cuda_emulation" / "include")],
}

SETUP = """
#include <mlkit/attention.hpp>
#include <mlkit/lora.hpp>
#include <mlkit/lora/quantised.hpp>
#include <mlkit/matmul.hpp>
#include <mlkit/rl.hpp>
#include <vector>
#if defined(MLKIT_CUDA_EMULATION)
#include <mlkit/lora.cuh>
#include <mlkit/rl.cuh>
using running_stats = mlkit::rl::device_running_stats;
#else
using running_stats = mlkit::rl::running_stats;
#endif
namespace lora = mlkit::lora;
namespace attention = mlkit::attention;
namespace rl = mlkit::rl;
using S = mlkit::accumulator_t<T>;
#define CASE(NUMBER) void f##NUMBER(PARAMETERS)
#define PARAMETERS mlkit::EXECUTOR& exec, mlkit::matrix<T>& x, mlkit::matrix<T>& w, mlkit::matrix<T>& y, \\
       mlkit::vector<T>& bias, mlkit::tensor<T, 3>& batch, mlkit::tensor<T, 4>& images, \\
       std::vector<mlkit::matmul_problem<T, T, T>>& group, lora::adapter<T>& adapter, std::vector<lora::adapter<T>>& adapters, \\
       std::vector<int>& ids, mlkit::vector<T>& magnitude, lora::nf4_matrix& codes4, lora::int8_matrix& codes8, \\
       mlkit::tensor<S, 3>& lse, mlkit::matrix<S>& packed_lse, std::vector<std::int32_t>& starts, \\
       attention::kept<T>& kept, attention::rotary_table<S>& table, running_stats& stats, mlkit::vector<S>& rows, \\
       std::span<const mlkit::index_t> sizes, mlkit::matrix_view<std::int32_t>& actions
"""

OPERATIONS = [
    ("matmul", [
        ("product, any strides and transposes", "mlkit::matmul(exec, x, mlkit::transposed(w), y);"),
        ("with an epilogue",
         "mlkit::matmul(exec, x, w, y, mlkit::epilogue{mlkit::add_bias{bias}, mlkit::gelu{}, mlkit::add{x}});"),
        ("with a prologue", "mlkit::matmul(exec, mlkit::prologue{x, [](S v) { return v * v; }}, w, y);"),
        ("packed weights", "mlkit::matmul(exec, x, mlkit::pack(exec, w), y);"),
        ("batched", "mlkit::matmul(exec, batch, batch, batch);"),
        ("grouped", "mlkit::matmul(exec, group);"),
    ]),
    ("lora", [
        ("linear, dense base", "lora::linear(exec, x, lora::dense{w, bias}, adapter, y);"),
        ("linear with dropout", "lora::linear(exec, x, lora::dense{w}, adapter, y, {.dropout = 0.1});"),
        ("linear, NF4 base", "lora::linear(exec, x, lora::nf4<QUANTISED>{codes4}, adapter, y);"),
        ("linear, int8 base", "lora::linear(exec, x, lora::int8<QUANTISED>{codes8}, adapter, y);"),
        ("linear, DoRA", "lora::linear(exec, x, lora::dense{w}, lora::dora{adapter, magnitude}, y);"),
        ("linear, DoRA on an NF4 base",
         "lora::linear(exec, x, lora::nf4<QUANTISED>{codes4}, lora::dora{adapter, magnitude}, y);"),
        ("linear, an adapter per row", "lora::linear(exec, x, lora::dense{w}, lora::per_row{adapters, ids}, y);"),
        ("linear, an adapter per segment", "lora::linear(exec, x, lora::dense{w}, lora::segments{adapters, ids}, y);"),
        ("backward",
         "lora::linear_backward(exec, x, lora::dense{w}, adapter, y, lora::gradients{adapter.a, adapter.b}, x);"),
        ("backward, NF4 base", "lora::linear_backward(exec, x, lora::nf4<QUANTISED>{codes4}, adapter, y,"
         " lora::gradients{adapter.a, adapter.b}, x);"),
        ("backward, DoRA", "lora::linear_backward(exec, x, lora::dense{w}, lora::dora{adapter, magnitude}, y,"
         " lora::gradients{adapter.a, adapter.b, magnitude}, x);"),
        ("backward, int8 base", "lora::linear_backward(exec, x, lora::int8<QUANTISED>{codes8}, adapter, y,"
         " lora::gradients{adapter.a, adapter.b}, x);"),
        ("convolution", "lora::conv2d(exec, images, lora::dense{w}, adapter, images, {.kernel = {3, 3}});"),
        ("convolution, backward", "lora::conv2d_backward(exec, images, lora::dense{w}, adapter, images,"
         " lora::gradients{adapter.a, adapter.b}, images, {.kernel = {3, 3}});"),
        ("embedding", "lora::embedding(exec, ids, w, adapter, y);"),
        ("embedding, backward",
         "lora::embedding_backward(exec, ids, w, adapter, y, lora::gradients{adapter.a, adapter.b});"),
        ("merge and unmerge", "lora::merge(exec, w, adapter); lora::unmerge(exec, w, adapter);"),
        ("merge and unmerge, DoRA", "lora::merge(exec, w, lora::dora{adapter, magnitude});"
         " lora::unmerge(exec, w, lora::dora{adapter, magnitude, lora::adapted_norms(exec, lora::dense{w}, adapter)});"),
        ("dequantise NF4", "lora::dequantise(exec, codes4, w);"),
    ]),
    ("attention", [
        ("forward", "attention::forward(exec, images, images, images, images);"),
        ("forward, any stages",
         "attention::forward(exec, images, images, images, attention::scores{attention::softcap{30}, attention::bias{w},"
         " attention::causal{}, attention::sinks{bias}, attention::dropout{0.1}}, images, lse);"),
        ("forward, packed sequences",
         "attention::forward(exec, batch, batch, batch, attention::sequences(starts), attention::scores<>{}, batch,"
         " packed_lse);"),
        ("forward, with a map",
         "attention::forward(exec, images, images, images, attention::scores<>{}, images, attention::averaged_map{batch});"
         " attention::forward(exec, images, images, images, attention::scores<>{}, images, attention::head_maps{images, starts});"),
        ("maps alone", "attention::maps(exec, images, images, attention::scores{attention::causal{}}, attention::averaged_map{batch, starts});"),
        ("edited cross-attention, with a local blend",
         "attention::local_blend blend({}, 1, {{0}, {0}}); attention::edited_cross(exec, images, images, images, attention::scores<>{},"
         " attention::edit_plan({}, {{.words = attention::align_same(1)}}), 0, images, blend); blend.apply(exec, 0, images);"),
        ("edited self-attention", "attention::edited_self(exec, images, images, images, attention::scores<>{},"
         " attention::edit_plan({}, {{.words = attention::align_same(1)}}), 0, images);"),
        ("backward", "attention::backward(exec, images, images, images, attention::scores<>{}, images, lse, images,"
         " attention::gradients{images, images, images});"),
        ("backward, with the gradient of a bias",
         "attention::backward(exec, images, images, images, attention::scores{attention::bias{w}}, images, lse, images,"
         " attention::gradients{images, images, images, w});"),
        ("backward, packed sequences",
         "attention::backward(exec, batch, batch, batch, attention::sequences(starts), attention::scores<>{}, batch,"
         " packed_lse, batch, batch, batch, batch);"),
        ("decode over a cache", "attention::decode(exec, batch, attention::contiguous(images, images, starts), batch);"),
        ("decode over pages",
         "attention::decode(exec, batch, attention::paged(images, images, mlkit::matrix_view<const std::int32_t>(starts.data(), {1, 1}),"
         " starts), batch);"),
        ("append to a cache", "attention::append(exec, images, images, attention::contiguous(images, images, starts));"),
        ("rotary embedding",
         "attention::rotate(exec, images, attention::rotary_table<S>({.positions = 8, .d = 4}), images);"),
        ("layer of cross-attention",
         "const lora::projection p{lora::dense{w, bias}}; const attention::cross layer{p, p, p, p, {.heads = 2}};"
         " layer.forward(exec, batch, batch, batch);"),
        ("layer with LoRA, DoRA and NF4, rotary",
         "const lora::projection p{lora::dense{w}, adapter};"
         " const lora::projection d{lora::dense{w}, lora::dora{adapter, magnitude}};"
         " const lora::projection n{lora::nf4<QUANTISED>{codes4}, adapter};"
         " const attention::self layer{p, d, n, p, {.heads = 2}, attention::rotary{table}};"
         " layer.forward(exec, batch, attention::scores{attention::causal{}}, batch);"),
        ("layer, backward",
         "const lora::projection p{lora::dense{w}, adapter}; const attention::cross layer{p, p, p, p, {.heads = 2}};"
         " const lora::gradients g{adapter.a, adapter.b};"
         " layer.backward(exec, batch, batch, attention::scores<>{}, kept, batch, attention::layer_gradients{g, g, g, g},"
         " batch, batch);"),
        ("merge of results", "attention::merge(exec, images, lse, images, lse);"),
    ]),
    ("rl", [
        ("affine scan of a functor", "rl::affine_scan<T>(exec, [](T r) { return rl::affine<T>{r, r}; }, {}, y, x);"),
        ("GAE", "rl::gae<T>(exec, {.rewards = x, .values = x}, {}, {.advantages = y});"),
        ("discounted, TD(lambda) and n-step returns",
         "rl::discounted_returns<T>(exec, {.rewards = x}, {}, y); rl::td_lambda_returns<T>(exec, {.rewards = x, .values = x}, {}, y);"
         " rl::n_step_returns<T>(exec, {.rewards = x, .values = x}, {.steps = 3}, y);"),
        ("V-trace, UPGO, Retrace",
         "rl::vtrace<T>(exec, {.rewards = x, .values = x, .log_ratios = x}, {}, {.vs = y});"
         " rl::upgo<T>(exec, {.rewards = x, .values = x}, {}, {.returns = y});"
         " rl::retrace<T>(exec, {.rewards = x, .action_values = x, .expected_values = x, .log_ratios = x}, {}, y);"),
        ("log-probabilities and entropies", "rl::log_probs(exec, x, ids, {}, {.logp = rows, .entropy = rows});"),
        ("log-probabilities, with the gradient of a loss",
         "rl::log_probs_and_gradient(exec, x, ids, {}, [](mlkit::index_t, S, S) { return rl::token_gradient<S>{1, 1}; }, {.logp = rows}, y);"),
        ("cross-entropy of completions", "rl::cross_entropy(exec, x, ids, {.shift = true}); rl::cross_entropy(exec, x, ids, {}, y);"),
        ("head of a language model: log-probabilities, cross-entropy, gradients",
         "rl::log_probs(exec, x, w, ids, {}, rows); rl::cross_entropy(exec, x, w, ids, {},"
         " {.dhidden = mlkit::as_view(y), .dweight = mlkit::as_view(w)});"),
        ("policy and value losses", "rl::ppo_loss(exec, rl::policy_batch<T>{.log_probs = x, .old_log_probs = x, .advantages = x}, {}, {.log_probs = y});"
         " rl::value_loss(exec, rl::value_batch<T>{.values = x, .returns = x}, {}, y);"),
        ("policy loss over logits", "rl::ppo_loss(exec, x, ids, {}, {.old_log_probs = rows, .advantages = rows}, {}, {.logits = y});"),
        ("categorical and multi-discrete policies",
         "rl::categorical<T> one{x}; rl::multi_discrete<T> some{x, sizes}; rl::sample(exec, one, {}, actions);"
         " rl::log_probs(exec, some, actions, {.logp = rows}); rl::backward(exec, some, actions, {.dlogp = rows}, y);"),
        ("Gaussian policies", "rl::gaussian<T> policy{x, x}; rl::sample(exec, policy, {}, y); rl::log_probs(exec, policy, y, {.logp = rows});"
         " rl::backward(exec, policy, y, {.dlogp = rows}, {.mean = y, .log_std = y});"),
        ("KL as an estimate, a reward, a loss",
         "rl::kl<T>(exec, {.log_probs = x, .reference = x}); rl::kl_rewards<T>(exec, {.log_probs = x, .reference = x}, {}, y);"
         " rl::kl_loss<T>(exec, {.log_probs = x, .reference = x}, {}, y);"),
        ("group advantages, the best of n", "rl::group_advantages(exec, bias, rl::groups(2), rl::grpo{}, bias);"
         " rl::best_of_n(exec, bias, rl::groups(2), ids);"),
        ("preference losses of pairs, and KTO",
         "rl::preference_loss<T>(exec, {.chosen = bias, .rejected = bias}, rl::bradley_terry{}, {.chosen = bias});"
         " rl::preference_loss<T>(exec, {.log_probs = bias, .reference = bias}, rl::kto{});"
         " (void)rl::kto_reference_point<T>(exec, bias, bias);"),
        ("K-wise preference loss", "rl::preference_loss<T>(exec, {.rewards = bias}, rl::k_wise{});"),
        ("whitening", "rl::whiten(exec, x); rl::whiten(exec, x, {}, {}, y);"),
        ("running statistics", "stats.update(exec, x); stats.normalize(exec, x, {}, y);"),
    ]),
]


def refused(snippets, type_name, executor):
    """The places of snippets that the compiler names in its errors, when it is given all of them. It may name but one of
    several that fail for the same reason."""
    quantised = "double" if type_name == "double" else "mlkit::bf16"
    head = (f"#include <mlkit/core/dtype.hpp>\nusing T = {type_name};\nusing QUANTISED = {quantised};\n"
            f"#define EXECUTOR {executor}\n{SETUP}")
    source = head + "".join(f"CASE({i}) {{ {snippet} }}\n" for i, snippet in enumerate(snippets))
    with tempfile.NamedTemporaryFile("w", suffix=".cpp") as file:
        file.write(source)
        file.flush()
        done = subprocess.run(["g++", "-std=c++20", "-fsyntax-only", "-I", str(ROOT / "include"), *EXECUTORS[executor], file.name],
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode and "-v" in sys.argv:
        print(type_name, *[line for line in done.stdout.splitlines() if "error" in line], sep="\n  ")
    if not done.returncode:
        return set()
    first = head.count("\n") + 1
    named = {int(line) - first for line in re.findall(rf"^{re.escape(file.name)}:(\d+):", done.stdout, re.M)}
    if not named & set(range(len(snippets))):
        sys.exit(done.stdout)
    return named


def supported_by(type_name, executor):
    """Which calls compile: all that remain when those that the compiler refuses are left out."""
    snippets = [snippet for _, operations in OPERATIONS for _, snippet in operations]
    remain = list(range(len(snippets)))
    while bad := refused([snippets[i] for i in remain], type_name, executor):
        remain = [i for place, i in enumerate(remain) if place not in bad]
    return [i in remain for i in range(len(snippets))]


def table():
    kinds = [(dtype, type_name, executor) for dtype, type_name in TYPES for executor in EXECUTORS]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        known = list(pool.map(lambda k: supported_by(*k[1:]), kinds))
    names = [(family, name) for family, operations in OPERATIONS for name, _ in operations]
    supported = {(*name, dtype, executor): ok for (dtype, _, executor), oks in zip(kinds, known)
                 for name, ok in zip(names, oks)}
    lines = ["# What runs on what", "",
             "Made by `scripts/support_matrix.py`, which compiles each call with all operands of one element type; CI checks"
             " that it still",
             "holds. A cell names the executors. Types may also be mixed, except f64, which goes with f64 alone.", "",
             "| family | operation | " + " | ".join(d for d, _ in TYPES) + " |", "|---|---|" + "---|" * len(TYPES)]
    for family, operations in OPERATIONS:
        for name, _ in operations:
            cells = [", ".join(e for e in EXECUTORS if supported[family, name, d, e]) or "-" for d, _ in TYPES]
            lines.append(f"| {family} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main():
    made = table()
    if "--check" not in sys.argv:
        TABLE.write_text(made, encoding="utf-8")
        print(made)
    elif TABLE.read_text(encoding="utf-8") != made:
        print(made)
        sys.exit("docs/support.md no longer says what compiles; run scripts/support_matrix.py")


if __name__ == "__main__":
    main()

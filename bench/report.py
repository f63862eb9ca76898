"""Joins the JSON of one run into a CSV per family, and writes the page and the plots from all the CSVs there are.

A row is one implementation of one case: `by` is mlkit, mlkit:avx2 (another instruction set), ceiling, or a peer. Times are the best
of all repetitions, as other tenants of a shared machine only ever add to them; the CSVs also have the median.
"""

import argparse
import csv
import fnmatch
import glob
import json
import math
import os
import platform
import re
import shutil
import statistics
import subprocess
from collections import defaultdict
from datetime import date

HERE = os.path.dirname(os.path.abspath(__file__))
FIELDS = ["case", "dtype", "shape", "threads", "by", "best_ns", "median_ns", "samples", "flop", "bytes", "workspace", "memory",
          "weights", "written"]
BYTES = {"f32": 4, "f64": 8, "bf16": 2}
SETS = ["baseline", "avx2", "avx512", "avx512_bf16", "amx"]
PEERS = {"torch": "PyTorch", "peft": "PEFT", "bitsandbytes": "bitsandbytes", "onednn": "oneDNN", "openblas": "OpenBLAS",
         "eigen": "Eigen", "torchrl": "TorchRL loop", "torchrl_vec": "TorchRL vectorised", "numpy": "NumPy loop"}
SMALL = "small_gemm"  # shown in a table of its own
ODD = ("300x", "3x5")  # how shapes begin that no tile divides; they stand last
NAMES = {"gemm": "GEMM", SMALL: "GEMM", "linear": "linear", "plain": "plain linear", "lora": "LoRA forward", "dora": "DoRA forward", "dora_frozen": "DoRA forward, norms kept,",
         "lora_training": "LoRA forward + backward", "dora_training": "DoRA forward + backward",
         "adapters32": "32 adapters, rows in turn", "nf4": "NF4 linear", "nf4_lora": "LoRA on NF4",
         "attention": "attention", "attention_causal": "causal attention", "attention_window256": "window-256 attention",
         "attention_full_ranges": "attention, all in window, lengths and document,",
         "attention_full_mask": "attention, mask of ones,",
         "attention_alibi": "ALiBi attention", "attention_alibi_functor": "ALiBi functor attention",
         "attention_alibi_backward": "ALiBi backward", "attention_alibi_functor_backward": "ALiBi functor backward",
         "attention_bias": "biased attention", "attention_bias_training": "trained bias attention",
         "attention_backward": "attention backward", "attention_causal_backward": "causal backward",
         "attention_map": "attention with averaged map", "attention_words": "attention with map of 3 words",
         "attention_edit": "Prompt-to-Prompt", "attention_edit_blend": "Prompt-to-Prompt with local blend",
         "attention_edit_self": "Prompt-to-Prompt self-attention",
         "attention_bias_backward": "trained bias backward", "decode": "decoding",
         "attention_layer": "cross-attention layer", "attention_layer_lora": "cross-attention layer, LoRA",
         "attention_layer_parts": "its four linears and attention",
         "attention_layer_lora_training": "cross-attention layer, LoRA forward + backward",
         "gae": "GAE", "gae_time_major": "GAE, time-major,", "td_lambda": "TD(λ) returns", "vtrace": "V-trace",
         "log_prob": "token log-prob", "log_prob_entropy": "token log-prob + entropy",
         "log_prob_training": "token log-prob + gradient", "lm_head_gemm": "GEMM to the logits",
         "lm_head": "LM head + cross-entropy", "lm_head_training_gemm": "the three GEMMs",
         "lm_head_training": "LM head + cross-entropy + gradients", "ppo_loss": "PPO loss + gradients", "whiten": "whitening",
         **{loss: f"{name} loss + gradients" for loss, name in (
             ("bradley_terry", "Bradley-Terry"), ("dpo", "DPO"), ("ipo", "IPO"), ("kto", "KTO"), ("orpo", "ORPO"), ("simpo", "SimPO"),
             ("k_wise", "K-wise"))}}
RL = set(list(NAMES)[list(NAMES).index("gae"):])


# ---------------------------------------------------------------------------------------------------------- data

def join(results, family):
    """The rows and the facts of one family's run, from all of its JSON files; None if there was none."""
    samples, counters, facts = defaultdict(list), {}, {}
    for path in sorted(glob.glob(os.path.join(results, f"{family}-*.json"))):
        with open(path) as file:
            document = json.load(file)
        context = document["context"]
        facts.update({k: context[k] for k in ("isa", "compiler", "eigen", "openblas", "onednn") if k in context})
        facts.update(context.get("versions", {}))
        for entry in document["benchmarks"]:
            if entry.get("run_type") != "iteration" or entry.get("error_occurred"):
                continue
            key = tuple(re.sub(r"(/iterations:\d+|/repeats:\d+|/real_time)+$", "", entry["name"]).split("/", 4))
            samples[key].append(entry["real_time"])
            counters[key] = entry
    if not samples:
        return None
    rows = []
    for key in sorted(samples):
        case, dtype, shape, threads, by = key
        times = samples[key]
        row = {"case": case, "dtype": dtype, "shape": shape, "threads": int(threads[1:]), "by": by,
               "best_ns": nanoseconds(min(times)), "median_ns": nanoseconds(statistics.median(times)), "samples": len(times)}
        if by == "memory":  # nothing was timed
            row.update(best_ns="", median_ns="", samples="")
        row.update({f: counters[key][f] for f in FIELDS[8:] if f in counters[key]})
        rows.append(row)
    facts.update(machine())
    return rows, facts


def nanoseconds(time):
    return round(time) if time >= 1e4 else round(time, 2)


def machine():
    cpu = dict(re.findall(r"^([^:\n]+):\s+(.+)$", subprocess.run(["lscpu"], capture_output=True, text=True).stdout, re.M))
    release = platform.freedesktop_os_release() if hasattr(platform, "freedesktop_os_release") else {}
    with open("/proc/meminfo") as file:
        gib = int(file.readline().split()[1]) / 2**20
    cache = ", ".join(f"{level} {re.sub(r' [(].*', '', cpu[f'{level} cache'])}" for level in ("L1d", "L2", "L3")
                      if f"{level} cache" in cpu)
    return {"date": date.today().isoformat(), "cpu": cpu.get("Model name", "?").strip(),
            "family": f"family {cpu.get('CPU family')}, model {cpu.get('Model')}, stepping {cpu.get('Stepping')}",
            "cores": os.cpu_count(), "cache": cache, "virtual": "Hypervisor vendor" in cpu, "memory": f"{gib:.0f} GiB",
            "system": release.get("PRETTY_NAME", platform.system())}


def save(out, family, rows, facts):
    os.makedirs(out, exist_ok=True)
    with open(os.path.join(out, f"{family}.csv"), "w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    with open(os.path.join(out, f"{family}.json"), "w") as file:
        json.dump(facts, file, indent=1, sort_keys=True)
        file.write("\n")


def load(out, family):
    try:
        with open(os.path.join(out, f"{family}.csv")) as file:
            rows = list(csv.DictReader(file))
        with open(os.path.join(out, f"{family}.json")) as file:
            facts = json.load(file)
    except FileNotFoundError:
        return None
    for row in rows:
        for field in FIELDS[3:4] + FIELDS[5:]:
            row[field] = float(row[field]) if row.get(field) else 0.0
        row["threads"] = int(row["threads"])
    return Table(rows, facts)


class Table:
    """The rows of one family, looked up by (case, dtype, shape, threads) and by."""

    def __init__(self, rows, facts):
        self.rows, self.facts = rows, facts
        self.cells = {(r["case"], r["dtype"], r["shape"], r["threads"], r["by"]): r for r in rows}
        self.threads = sorted({r["threads"] for r in rows})
        self.peers = [p for p in PEERS if any(r["by"] == p for r in rows)]

    def get(self, case, dtype, shape, threads, by):
        return self.cells.get((case, dtype, shape, threads, by))

    def time(self, *key):
        row = self.get(*key)
        return row["best_ns"] if row else None

    def keys(self, threads, by="mlkit"):
        """The (case, dtype, shape) that `by` ran with that many threads, in reading order; small products apart."""
        return sorted({(r["case"], r["dtype"], r["shape"]) for r in self.rows
                       if r["threads"] == threads and r["by"] == by and r["case"] != SMALL}, key=order)

    def small_keys(self):
        return sorted({(r["case"], r["dtype"], r["shape"]) for r in self.rows if r["case"] == SMALL}, key=order)

    def peak(self, dtype, threads, suffix=""):
        """flop per ns. Where the bf16 instruction is slower than f32 FMA, converting and using FMA is the ceiling."""
        rows = [self.get("peak", d, "registers", threads, "ceiling" + suffix)
                for d in ((dtype, "f32") if dtype == "bf16" else (dtype,))]
        return max((r["flop"] / r["best_ns"] for r in rows if r), default=None)

    def bandwidth(self, footprint, threads, loop="read"):
        """Bytes per ns that a loop reads from a footprint of about that size, or, as triad, reads and writes."""
        rows = [r for r in self.rows if r["case"] == loop and r["threads"] == threads and r["by"] == "ceiling"]
        nearest = min(rows, key=lambda r: abs(math.log(r["bytes"] / footprint)), default=None)
        return nearest["bytes"] / nearest["best_ns"] if nearest else None

    def ceiling(self, row, suffix=""):
        """The share of what the machine can do, and which limit binds: arithmetic or memory."""
        peak = self.peak(row["dtype"], row["threads"], suffix)
        memory = self.bandwidth(row["bytes"], row["threads"], "triad" if row["written"] else "read") if row["bytes"] else None
        compute, moving = row["flop"] / peak if peak else 0, row["bytes"] / memory if memory else 0
        if not (compute or moving):
            return None, ""
        return max(compute, moving) / row["best_ns"], "memory" if moving > compute else "arithmetic"


def order(key):
    case, dtype, shape = key
    names = list(NAMES)
    numbers = [int(n) for n in re.findall(r"\d+", shape)]
    return names.index(case) if case in names else 99, ["f32", "bf16", "f64"].index(dtype), shape.startswith(ODD), numbers


# ------------------------------------------------------------------------------------------------------- targets

class Targets:
    def __init__(self):
        with open(os.path.join(HERE, "targets.csv")) as file:
            self.rows = list(csv.DictReader(line for line in file if not line.startswith("#")))

    def of(self, case, dtype, shape, *measures):
        return [t for t in self.rows
                if fnmatch.fnmatch(case, t["case"]) and fnmatch.fnmatch(dtype, t["dtype"])
                and fnmatch.fnmatch(shape, t["shape"]) and (not measures or t["measure"] in measures)]


def plain_shape(shape):
    return re.sub(r"r\d+$", "", shape)


def extents(shape):
    return [int(n) for n in re.findall(r"\d+", shape)]


def best_peer(table, *key):
    """The fastest peer of a case and its time."""
    return min(((p, t) for p in table.peers if (t := table.time(*key, p))), key=lambda pair: pair[1], default=("", None))


def memory_rows(table, case):
    return [table.get(*key, table.threads[-1], "memory") for key in table.keys(table.threads[-1], "memory") if key[0] == case]


def measured(table, row, measure):
    """The value of a target's measure for a row of mlkit; None where the other side was not measured."""
    key = row["case"], row["dtype"], row["shape"], row["threads"]
    if measure == "ceiling":
        return table.ceiling(row)[0]
    if measure == "seconds":
        return row["best_ns"] / 1e9
    if measure == "memory":
        return row["memory"]
    if measure == "scaling":
        one, two = table.time(*key[:3], 1, row["by"]), table.time(*key[:3], 2, row["by"])
        return one / two if one and two else None
    if measure == "plain":
        other = table.time("plain", row["dtype"], plain_shape(row["shape"]), row["threads"], "mlkit")
    elif measure == "lora":
        other = table.time("lora", row["dtype"], row["shape"], row["threads"], "mlkit")
    elif measure == "unmasked":
        other = table.time("attention_backward" if key[0].endswith("_backward") else "attention", *key[1:], "mlkit")
    elif measure == "attention":
        other = table.time("attention", *key[1:], "mlkit")
    elif measure == "builtin":
        other = table.time(key[0].replace("_functor", ""), *key[1:], "mlkit")
    elif measure == "gemm":
        other = table.time(key[0] + "_gemm", *key[1:], "mlkit")
    elif measure == "best":
        other = best_peer(table, *key)[1]
        return other / row["best_ns"] if other else None
    elif measure == "logits":
        tokens, vocabulary, _ = extents(row["shape"])
        return row["workspace"] / (tokens * vocabulary * BYTES[row["dtype"]])
    elif measure == "fewest_keys":
        fewest = min(memory_rows(table, key[0]), key=lambda r: extents(r["shape"])[3], default=None)
        return row["workspace"] / fewest["workspace"] if fewest else None
    else:
        other = table.time(*key, measure)
        return other / row["best_ns"] if other else None
    return row["best_ns"] / other if other else None


def meets(target, value):
    bound = float(target["value"])
    return value >= bound if target["bound"] == ">=" else value <= bound


class Score:
    """Counts what was met, and remembers what was missed."""

    def __init__(self):
        self.met, self.missed, self.unknown = 0, [], 0

    def cells(self, table, row, targets):
        """The two cells target and met."""
        verdicts = []
        for target in targets:
            value = measured(table, row, target["measure"])
            if value is None:
                self.unknown += 1
                verdicts.append("not measured")
            elif meets(target, value):
                self.met += 1
                verdicts.append(f"✓ {amount(target, value)}")
            else:
                self.missed.append((table, row, target, value))
                verdicts.append(f"✗ **{amount(target, value)}**")
        return "; ".join(map(wording, targets)), "; ".join(verdicts)


def amount(target, value):
    measure = target["measure"]
    # One digit more, so that a near miss is seen to be one.
    near = 0 < abs(value / float(target["value"]) - 1) < (0.01 if measure == "ceiling" else 0.005)
    if measure == "ceiling":
        return f"{100 * value:.{int(near)}f} %"
    if measure == "seconds":
        return f"{value:.{1 + near}f} s" if value > 0.1 else duration(1e9 * value)
    if measure == "memory":
        return f"{value / 1e9:.{2 + near}f} GB"
    return f"{value:.{2 + near}f}×"


def wording(target):
    sign = "≥" if target["bound"] == ">=" else "≤"
    text = f"{sign} {amount(target, float(target['value']))}"
    measure = target["measure"]
    return {"ceiling": f"{text} of ceiling", "plain": f"{text} plain", "lora": f"{text} LoRA", "scaling": f"{text} scaling",
            "unmasked": f"{text} without a mask", "attention": f"{text} attention alone", "builtin": f"{text} the built-in", "fewest_keys": f"{text} that of the fewest keys",
            "gemm": f"{text} the bare GEMMs", "best": f"{text} the best peer", "logits": f"{text} the logits' memory", "seconds": text, "memory": text}.get(measure, f"{text} {PEERS.get(measure, measure)}")


# ---------------------------------------------------------------------------------------------------------- text

def duration(ns):
    for unit, size in (("s", 1e9), ("ms", 1e6), ("µs", 1e3)):
        if ns >= size:
            value = ns / size
            return f"{value:.{max(0, 2 - int(math.log10(value)))}f} {unit}"
    return f"{ns:.0f} ns"


def size(count):
    for unit, one in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= one:
            value = count / one
            return f"{value:.{max(0, 2 - int(math.log10(value)))}f} {unit}"
    return f"{count:.0f} B"


def title(case, dtype, shape):
    numbers = re.findall(r"\d+", shape)
    name = NAMES.get(case, case)
    if case.startswith("attention") or case == "decode":
        heads = re.sub(r"^(\d+)x(\d+)(?:kv(\d+))?x.*", lambda m: f"{m[1]}×{m[2]}" + (f"/{m[3]}" if m[3] not in (None, m[2]) else ""),
                       shape)
        keys = f"{numbers[-2]} keys" if case == "decode" else f"{numbers[-3]}×{numbers[-2]}"
        return f"{name} {dtype} {heads}, {keys}, d={numbers[-1]}"
    if case in RL:
        extents = {1: "16 prompts of 4" if case == "k_wise" else f"{numbers[0]} {'completions' if case == 'kto' else 'pairs'}", 2: f"[{', '.join(numbers)}]"}.get(len(numbers)) or \
            f"{numbers[0]} tokens, {numbers[2]}→{numbers[1]}"
        return f"{name} {dtype} {extents}"
    if case in ("gemm", SMALL):
        extents = f"{numbers[0]}³" if len(set(numbers)) == 1 else f"M={numbers[0]} N={numbers[1]} K={numbers[2]}"
    else:
        extents = f"T={numbers[0]}, {numbers[2]}→{numbers[1]}" + (f", r={numbers[3]}" if len(numbers) > 3 else "")
        name += "," if case == "adapters32" else ""
    return f"{name} {dtype + ' ' if case in ('gemm', SMALL, 'linear') else ''}{extents}"


def rate(table, row):
    share, limit = table.ceiling(row)
    if not share and not row["flop"]:
        return "", ""
    speed = f"{row['bytes'] / row['best_ns']:.1f} GB/s" if limit == "memory" else f"{row['flop'] / row['best_ns']:.0f} GFLOP/s"
    return speed, f"{100 * share:.0f} %" if share else ""


def markdown(header, rows, left=(0,)):
    """A table without the columns that are empty in every row."""
    keep = [i for i in range(len(header)) if any(row[i] for row in rows)]
    lines = ["| " + " | ".join(header[i] for i in keep) + " |",
             "|" + "|".join("---" if i in left else "---:" for i in keep) + "|"]
    lines += ["| " + " | ".join(str(row[i]) for i in keep) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def count(n, noun):
    return f"{n} {noun}" + ("s" if n != 1 else "")


# -------------------------------------------------------------------------------------------------------- tables

def variants(table, key, threads):
    """mlkit's rows of a case: the call, and the same with a packed weight."""
    return [row for by in ("mlkit", "mlkit packed") if (row := table.get(*key, threads, by))]


def against(time, row, name=""):
    return f"{name} {duration(time)} ({time / row['best_ns']:.2f}×)".strip() if time else ""


def main_table(table, threads, targets, score):
    keys = table.keys(threads)
    ran = {key: [p for p in table.peers if table.get(*key, threads, p)] for key in keys}
    alone = all(len(peers) <= 1 for peers in ran.values())  # then one column serves all peers
    peers = [] if alone else [p for p in table.peers if any(p in r for r in ran.values())]
    header = ["case", "mlkit", "rate", "of ceiling", "over plain", "workspace", *(["peer"] if alone else [PEERS[p] for p in peers]),
              "target", "met"]
    rows = []
    for key in keys:
        for row in variants(table, key, threads):
            over = measured(table, row, "plain") if key[0] not in ("plain", "nf4") else None
            cells = [title(*key) + (", packed" if row["by"] != "mlkit" else ""), f"**{duration(row['best_ns'])}**", *rate(table, row),
                     f"{over:.2f}×" if over else "", size(row["workspace"])]
            if alone:
                cells.append(against(table.time(*key, threads, ran[key][0]), row, PEERS[ran[key][0]]) if ran[key] else "")
            else:
                cells += [against(table.time(*key, threads, peer), row) for peer in peers]
            wanted = [t for t in targets.of(*key) if t["measure"] != "scaling"] if row["by"] == "mlkit" else []
            rows.append(cells + list(score.cells(table, row, wanted)))
    return markdown(header, rows, left=(0, len(header) - 2, len(header) - 1))


def small_table(table, targets, score):
    keys = table.small_keys()
    peers = [p for p in table.peers if any(table.get(*k, 1, p) for k in keys)]
    rows = []
    for key in keys:
        row = table.get(*key, 1, "mlkit")
        if not row:
            continue
        times = [table.time(*key, 1, p) for p in peers]
        best, share = min(filter(None, times), default=None), table.ceiling(row)[0]
        rows.append([title(*key), f"**{row['best_ns']:.1f} ns**", *(f"{t:.1f} ns" if t else "" for t in times),
                     f"{best / row['best_ns']:.2f}×" if best else "", f"{100 * share:.1f} %" if share else "",
                     *score.cells(table, row, targets.of(*key))])
    header = ["one call", "mlkit", *(PEERS[p] for p in peers), "over the best peer", "of FMA peak", "target", "met"]
    return markdown(header, rows, left=(0, len(header) - 2, len(header) - 1)) if rows else ""


def scaling_table(table, targets, score):
    rows = []
    for key in table.keys(2):
        row = table.get(*key, 2, "mlkit")
        value = measured(table, row, "scaling")
        if not value or not targets.of(*key, "scaling"):
            continue
        cells = [title(*key), duration(table.time(*key, 1, "mlkit")), duration(row["best_ns"]), f"{value:.2f}×"]
        for peer in table.peers:
            one, two = table.time(*key, 1, peer), table.time(*key, 2, peer)
            cells.append(f"{one / two:.2f}×" if one and two else "")
        rows.append(cells + list(score.cells(table, row, targets.of(*key, "scaling"))))
    header = ["case", "1 thread", "2 threads", "mlkit", *(PEERS[p] for p in table.peers), "target", "met"]
    return markdown(header, rows, left=(0, len(header) - 2, len(header) - 1)) if rows else ""


def set_table(table):
    threads = table.threads[-1]
    active = table.facts.get("isa", "")
    sets = [s for s in SETS if s == active or any(r["by"] == f"mlkit:{s}" for r in table.rows)]
    rows = []
    for key in table.keys(threads):
        cells = [title(*key)]
        for name in sets:
            suffix = "" if name == active else f":{name}"
            row = table.get(*key, threads, f"mlkit{suffix}")
            if not row:
                cells.append("")
                continue
            share, _ = table.ceiling(row, suffix)
            cells.append(f"{duration(row['best_ns'])}" + (f" ({100 * share:.0f} %)" if share else ""))
        rows.append(cells)
    return markdown(["case", *(s + " (chosen)" * (s == active) for s in sets)], rows) if len(sets) > 1 else ""


def memory_table(table):
    threads = table.threads[-1]
    rows = []
    for case, dtype, shape in table.keys(threads, "memory"):
        many = table.get(case, dtype, shape, threads, "memory")
        tokens, *rest = [int(n) for n in re.findall(r"\d+", shape)]
        fewer = {int(k[2].split("x")[0]): table.get(*k, threads, "mlkit") for k in table.keys(threads)
                 if k[0] == case and k[2].split("x", 1)[1] == shape.split("x", 1)[1]}
        for count_of_tokens, row in sorted({**fewer, tokens: many}.items()):
            rows.append([title(case, dtype, row["shape"]), size(row["workspace"]), size(4 * count_of_tokens * rest[1]),
                         size(4 * rest[0] * rest[1]), size(row["weights"]) if row["weights"] else ""])
    return markdown(["case", "workspace at its peak", "x", "W in f32", "weights as stored"], rows) if rows else ""


def keys_table(table, targets, score):
    rows = []
    for row in memory_rows(table, "attention"):
        key = row["case"], row["dtype"], row["shape"]
        keys, d = extents(row["shape"])[3:]
        queries = extents(row["shape"])[2]
        wanted = targets.of(*key, "fewest_keys")
        rows.append([title(*key), size(row["workspace"]), size(8 * keys * d), size(4 * queries * keys), *score.cells(table, row, wanted)])
    header = ["case", "workspace at its peak", "k and v", "the scores, which are not stored", "target", "met"]
    return markdown(header, rows, left=(0, 4, 5)) if rows else ""


def head_table(table):
    """The memory of the language model's head, beside the logits that it does without and what PyTorch takes."""
    rows = []
    for key in table.keys(table.threads[-1]):
        row, peer = table.get(*key, table.threads[-1], "mlkit"), table.get(*key, table.threads[-1], "torch")
        if key[0] in ("lm_head", "lm_head_training") and row["workspace"] >= 1:
            tokens, vocabulary, width = extents(row["shape"])
            logits = tokens * vocabulary * BYTES[row["dtype"]]
            rows.append([title(*key), size(row["workspace"]), size(logits), f"1/{logits / row['workspace']:.0f}" if logits > row["workspace"] else "",
                         size(peer["memory"]) if peer and peer["memory"] else "", size(vocabulary * width * BYTES[row["dtype"]])])
    header = ["case", "workspace at its peak", "the logits, which are not stored", "share", "PyTorch beside its operands", "the weight"]
    return markdown(header, rows) if rows else ""


def ceiling_rows(table, loop, threads):
    return sorted((r for r in table.rows if r["case"] == loop and r["threads"] == threads), key=lambda r: r["bytes"])


def ceiling_table(table):
    rows = []
    for threads in table.threads:
        cells = [count(threads, "thread")]
        for dtype in ("f32", "f64", "bf16"):
            row = table.get("peak", dtype, "registers", threads, "ceiling")
            cells.append(f"{row['flop'] / row['best_ns']:.0f}" if row else "")
        for row in ceiling_rows(table, "read", threads):
            cells.append(f"{row['bytes'] / row['best_ns']:.1f}")
        for row in ceiling_rows(table, "triad", threads):
            cells.append(f"{row['bytes'] / row['best_ns']:.1f}")
        found = ceiling_rows(table, "adam_shaped", threads)
        cells.append(f"{found[0]['bytes'] / found[0]['best_ns']:.1f}" if found else "")
        rows.append(cells)
    reads, triads = ([f"{loop} {r['shape'].replace('x', '×')}" for r in ceiling_rows(table, loop, table.threads[-1])]
                     for loop in ("read", "triad"))
    text = markdown(["", "f32", "f64", "bf16", *reads, *(["triad"] if len(triads) == 1 else triads), "Adam-shaped"], rows)
    sets = []
    for name in SETS:
        suffix = "" if name == table.facts.get("isa") else f":{name}"
        peaks = [table.get("peak", dtype, "registers", table.threads[-1], "ceiling" + suffix) for dtype in ("f32", "f64", "bf16")]
        if all(peaks):
            sets.append([name, *(f"{r['flop'] / r['best_ns']:.0f}" for r in peaks)])
    return text + "\n" + markdown([f"{count(table.threads[-1], 'thread')}, GFLOP/s", "f32", "f64", "bf16"], sets)


def compile_table(table, targets, score):
    rows = []
    for case, what in (("compile", "g++ -O2"), ("compile_cuda", "nvcc -O2 -arch=sm_80")):
        for row in sorted((r for r in table.rows if r["case"] == case), key=lambda r: (not r["by"].startswith("mlkit"), r["by"])):
            own = row["by"].startswith("mlkit")
            cells = score.cells(table, row, targets.of(case, row["dtype"], row["shape"])) if own else ("", "")
            rows.append([row["by"], what, f"{row['best_ns'] / 1e9:.1f} s", f"{row['memory'] / 1e6:.0f} MB", *cells])
    return markdown(["one header, one call", "compiler", "time", "peak memory", "target", "met"], rows, left=(0, 1, 4, 5))


# --------------------------------------------------------------------------------------------------------- plots



COLORS = {"mlkit": "#0b6e4f", "torch": "#ee6c4d", "peft": "#ee6c4d", "bitsandbytes": "#ee6c4d", "onednn": "#3d7dca",
          "openblas": "#9a9a9a", "eigen": "#c9b458"}
SHADES = {"baseline": "#cfe8dd", "avx2": "#8fcfb3", "avx512": "#3f9f7a", "avx512_bf16": "#0b6e4f", "amx": "#063d2c"}


def bars(path, heading, xlabel, keys, series, form, line=None, log=False, marks=(), terminal="svg"):
    """Horizontal bars: `series` is [(name, color, [value or None per key])], `form` how a value is printed, `line` where a dashed
    vertical line stands, `marks` [(key's index, value)] for the targets."""
    if not series:
        return False
    low = 0.25 if log else 0
    blocks, plots = [], []
    place, middles, y = {}, [], 0.0  # of each bar and of each key, in bars downwards
    for k in range(len(keys)):
        own = [i for i, (_, _, values) in enumerate(series) if values[k] is not None]
        place.update({(i, k): y - n for n, i in enumerate(own)})
        middles.append(y - (len(own) - 1) / 2)
        y -= len(own) + 0.9
    for i, (name, color, values) in enumerate(series):
        block = [f"{v:.6g} {place[i, k]:.2f}" for k, v in enumerate(values) if v is not None]
        blocks.append(f"$s{i} << END\n" + "\n".join(block) + "\nEND")
        plots.append(f"$s{i} using 1:2:({low}):1:($2-0.45):($2+0.45) with boxxyerror fs solid 1 noborder lc rgb '{color}' title \"{name}\"")
        plots.append(f"$s{i} using 1:2:(sprintf('{form}', $1)) with labels left offset 0.4,0 font ',9' tc rgb '#404040' notitle")
    tics = ", ".join(f"'{title(*key)}' {middle:.2f}" for key, middle in zip(keys, middles))
    if marks:
        block = "\n".join(f"{v} {middles[k]:.2f}" for k, v in marks)
        blocks.append(f"$marks << END\n{block}\nEND")
        half = 0.65 * len(series)
        plots.append(f"$marks using 1:2:(0):({half}) with vectors nohead lw 2.5 lc rgb '#202020' title 'target'")
        plots.append(f"$marks using 1:2:(0):({-half}) with vectors nohead lw 2.5 lc rgb '#202020' notitle")
    top = max(v for _, _, values in series for v in values if v is not None)
    height = 100 + round(-y * (13 if len(series) > 1 else 15))
    drawn = {"svg": f"svg size 940,{height} font 'DejaVu Sans,12' background '#ffffff'",
             "png": f"pngcairo size 940,{height} font 'DejaVu Sans,9'"}[terminal]
    below = y + 1
    rule = f"set arrow from {line}, {below} to {line}, 0.9 nohead lc rgb '#404040' dt 2 back" if line else ""
    script = f"""
set terminal {drawn}
set output '{path}'
set encoding utf8
set label '{heading}' at screen 0.02, screen {1 - 20 / height:.3f} left font ',15'
set key at screen 0.98, screen {1 - 42 / height:.3f} right center horizontal Left reverse samplen 1 font ',11'
set tmargin at screen {1 - 62 / height:.3f}
set bmargin at screen {38 / height:.3f}
set lmargin at screen 0.385
set rmargin at screen 0.96
set border 2 lc rgb '#808080'
set tics nomirror textcolor rgb '#404040' scale 0
set ytics ({tics}) font ',10'
set xtics font ',10'
set grid xtics lc rgb '#e4e4e4' lt 1
set xlabel '{xlabel}' font ',10' offset 0, 0.6 tc rgb '#404040'
set yrange [{below}:0.9]
{f"set logscale x {10 if top > 500 else 2}; set xrange [0.25:{1.6 * top}]" if log else f"set xrange [0:{1.12 * top}]"}
{rule}
""" + "\n".join(blocks) + "\nplot " + ", ".join(plots) + "\n"
    if not shutil.which("gnuplot"):
        return False
    subprocess.run(["gnuplot"], input=script, text=True, check=True)
    return True


def plot_ceiling(table, path, keys, threads, heading, alone=False):
    """mlkit and, unless it stands alone, its peers, each as the share of the ceiling that its time stands for; all of PEFT's kind in
    one series."""
    groups = [("mlkit", ["mlkit"])]
    if alone:
        pass
    elif any(p in table.peers for p in ("peft", "bitsandbytes")):
        groups.append(("PyTorch, PEFT, bitsandbytes", ["torch", "peft", "bitsandbytes"]))
    else:
        groups += [(PEERS[p], [p]) for p in table.peers]
    series = []
    for name, members in groups:
        values = []
        for key in keys:
            own = table.get(*key, threads, "mlkit")
            row = next((r for by in members if (r := table.get(*key, threads, by))), None)
            share = table.ceiling(dict(own, best_ns=row["best_ns"]))[0] if row else None
            values.append(100 * share if share else None)
        if any(values):
            series.append((name, COLORS[members[0]], values))
    return bars(path, heading, "% of ceiling", keys, series, "%.0f", line=100)


def plot_ratio(table, path, keys, threads, heading, targets, peers, xlabel):
    """How many times faster mlkit is than each of the peers, or, without any, than the best one of each case."""
    pairs = [(k, p) for k in keys for p in peers or [best_peer(table, *k, threads)[0]] if table.get(*k, threads, p)]
    if not pairs:
        return False
    values = [table.time(*k, threads, p) / table.time(*k, threads, "mlkit") for k, p in pairs]
    marks = [(i, float(t["value"])) for i, (k, p) in enumerate(pairs) for t in targets.of(*k, p, *(() if peers else ("best",)))]
    return bars(path, heading, xlabel, [k for k, _ in pairs],
                [("mlkit", COLORS["mlkit"], values)], "%.2f×", line=1, log=True, marks=marks)


def plot_sets(table, path, keys, heading):
    threads, active = table.threads[-1], table.facts.get("isa")
    series = []
    for name, color in SHADES.items():
        rows = [table.get(*k, threads, "mlkit" if name == active else f"mlkit:{name}") for k in keys]
        if any(rows):
            series.append((name.replace("_", "\\_"), color, [r["flop"] / r["best_ns"] if r else None for r in rows]))
    return bars(path, heading, "GFLOP/s", keys, series, "%.0f") if series else False


# ---------------------------------------------------------------------------------------------------------- page

def facts_text(facts):
    cpu = f"{facts['cpu']} ({facts['family']})" + (", virtual machine" if facts.get("virtual") else "")
    lines = [f"- **Machine**: {cpu}; {count(facts['cores'], 'core')}; caches {facts['cache']}; {facts['memory']}; "
             f"{facts['system']}; {facts['date']}" +
             (f"; other processes took {facts['other_load']:.1f} % of the CPU time" if "other_load" in facts else "")]
    if facts.get("other_load", 0) > 5:
        lines.append("- **The machine was not idle: these numbers are worth little**")
    if "isa" in facts:
        lines.append(f"- **mlkit**: instruction set chosen at run time: {facts['isa']}; compiled by {facts['compiler']} at plain `-O2`")
    peers = [f"{PEERS[p].removesuffix(' loop')} {re.sub(r' NO_LAPACKE| DYNAMIC_ARCH| NO_AFFINITY|OpenBLAS ', '', facts[p])}"
             for p in PEERS if p in facts]
    if peers:
        without = "; bitsandbytes without the optional package `kernels`, which fetches others from the network"
        lines.append(f"- **Peers**: {', '.join(peers)}" + (without if "bitsandbytes" in facts else ""))
    return "\n".join(lines) + "\n"


def page(out, tables, targets):
    score = Score()
    sections = []
    for family, heading in (("matmul", "Matrix products"), ("lora", "LoRA"), ("attention", "Attention"),
                            ("rl", "Advantages, log-probabilities and losses")):
        table = tables.get(family)
        if not table:
            continue
        text = [f"## {heading}\n", facts_text(table.facts)]
        threads = table.threads[-1]
        keys = table.keys(threads)
        square = [k for k in keys if k[0] == "gemm"]
        linear = [k for k in keys if k[0] == "linear"]
        plots = []
        if family == "matmul":
            plots = [plot_ceiling(table, f"{out}/gemm.svg", square, threads, f"GEMM, {count(threads, 'thread')}") and "gemm.svg",
                     plot_ceiling(table, f"{out}/linear.svg", linear, threads,
                                  f"Linear layer 4096 x 4096, T tokens, {count(threads, 'thread')}") and "linear.svg",
                     plot_sets(table, f"{out}/matmul_sets.svg", square, f"GEMM by instruction set, {count(threads, 'thread')}")
                     and "matmul_sets.svg"]
        elif family == "attention":
            plots = [plot_ratio(table, f"{out}/attention.svg", keys, threads, f"Attention against PyTorch, {count(threads, 'thread')}", targets,
                                ("torch",), "times faster than PyTorch") and "attention.svg",
                     plot_ceiling(table, f"{out}/attention_ceiling.svg", [k for k in keys if k[1] == "f32"], threads,
                                  f"Attention in f32, {count(threads, 'thread')}") and "attention_ceiling.svg"]
        elif family == "rl":
            plots = [plot_ratio(table, f"{out}/rl.svg", keys, threads, f"Against the best peer, {count(threads, 'thread')}", targets,
                                (), "times faster than the best of PyTorch, TorchRL and NumPy") and "rl.svg",
                     plot_ceiling(table, f"{out}/rl_ceiling.svg", [k for k in keys if table.ceiling(table.get(*k, threads, "mlkit"))[0]],
                                  threads, f"Share of the bandwidth, or of the FMA peak, {count(threads, 'thread')}", alone=True)
                     and "rl_ceiling.svg"]
        else:
            adapted = [k for k in keys if k[0] != "plain"]
            plots = [plot_ratio(table, f"{out}/lora.svg", adapted, threads,
                                f"Adapted linear layers against their peers, {count(threads, 'thread')}", targets, ("peft", "bitsandbytes"),
                                "times faster than PEFT, or bitsandbytes for NF4") and "lora.svg",
                     plot_ceiling(table, f"{out}/lora_ceiling.svg", keys, threads,
                                  f"Adapted linear layers, {count(threads, 'thread')}") and "lora_ceiling.svg"]
        text += [f"![{plot}]({plot})\n" for plot in plots if plot and plot != "matmul_sets.svg"]
        for n in reversed(table.threads):
            text += [f"### {count(n, 'thread').capitalize()}\n", main_table(table, n, targets, score)]
        small = small_table(table, targets, score)
        if small:
            text += ["### Small products, 1 thread\n",
                     "Sizes that are known at run time only, operands in the first-level cache; each time is the mean of many calls in a "
                     "row, and the checks of arguments are part of each.\n", small]
        scaling = scaling_table(table, targets, score)
        if scaling:
            text += ["### From one thread to two\n", scaling]
        sets = set_table(table)
        if sets:
            text += ["### Every instruction set\n",
                     f"The same binary, told by `MLKIT_FORCE_ISA` which set to use; {count(threads, 'thread')}; in brackets the share of that "
                     "set's own ceiling.\n", *([f"![GEMM by instruction set](matmul_sets.svg)\n"] if "matmul_sets.svg" in plots else []),
                     sets]
        if family == "lora":
            text += ["### Memory\n", "The most scratch memory that one call holds, over all threads, beside the sizes of x and of the base in "
                     "f32, of which no copy is made.\n", memory_table(table)]
        if family == "attention":
            text += ["### Memory\n", "The most scratch memory that one call of forward holds, over all threads.\n",
                     keys_table(table, targets, score)]
        if family == "rl":
            text += ["### Memory\n", "The most scratch memory that one call holds, over all threads.\n", head_table(table)]
        text += ["### Ceilings in this run\n",
                 "GFLOP/s of independent FMA chains in registers (for bf16 its dot instruction, or products of matrix registers, where the set has them); GB/s of loops over memory (a footprint that fits the cache is read from "
                 "there; triad counts its three streams, the Adam-shaped loop its seven).\n", ceiling_table(table)]
        sections += text
    if tables.get("compile"):
        table = tables["compile"]
        sections += ["## Compile time\n", facts_text(table.facts), "A translation unit that includes one header and calls one kernel, "
                     "every instruction set included in mlkit's.\n", compile_table(table, targets, score)]
    spread = [r["median_ns"] / r["best_ns"] - 1 for t in tables.values() for r in t.rows if r["samples"] > 2]
    samples = max((int(r["samples"]) for t in tables.values() for r in t.rows), default=0)
    total = score.met + len(score.missed)
    intro = ["# Performance\n",
             "Made by `./benchmark --peers`; the raw data is in the CSV files beside this page, the targets are in "
             f"[bench/targets.csv]({os.path.relpath(os.path.join(HERE, 'targets.csv'), out)}).\n",
             f"**{score.met} of {total} targets are met.**" + (f" {len(score.missed)} are missed:\n" if score.missed else "\n")]
    for table, row, target, value in score.missed:
        name = row["by"] if row["case"].startswith("compile") else title(row["case"], row["dtype"], row["shape"])
        threads = "" if row["case"].startswith("compile") or target["measure"] == "scaling" else f", {count(row['threads'], 'thread')}"
        intro.append(f"- {name}{threads}: {amount(target, value)}, wanted {wording(target)}")
    if score.unknown:
        intro.append(f"\n{score.unknown} could not be checked, as the other side was not run.")
    intro += ["\n## How it is measured\n",
              f"- A time is the best of up to {samples} repetitions after warm-up, each the mean of its iterations; the median, in the CSV "
              f"files, was {100 * statistics.median(spread) if spread else 0:.0f} % above it in the middle case. Cases and peers run in random "
              "order, and the processes of mlkit and of the Python peers take turns, so ratios hold within the run.",
              "- **Of ceiling**: the time that the case would take at the FMA peak, or at the read bandwidth of a footprint of its size, "
              "whichever is longer, over the time that it took. Both are measured in the same run. For bf16 the peak is the best one of "
              "products of matrix registers, the bf16 dot instruction and f32 FMA.",
              "- In brackets after a peer's time: how many times faster mlkit is. `T` is tokens (rows of x), `in→out` the layer, `r` the rank.",
              "- **Packed**: the weight was packed once, beforehand.",
              "- Attention is called `batch×heads`, or `batch×heads/kv heads`, then `queries×keys` and the width of a head, `d`; its flops are those "
              "of the pairs that a mask leaves. Backward is timed alone. A **trained** bias is one whose gradient is wanted: PyTorch then "
              "stores the scores, also in forward. Decoding is one query of each sequence.",
              "- Advantages are called `[sequences, steps]`, and losses too; log-probabilities `[tokens, vocabulary]`. What also writes is held "
              "against the triad of a footprint of its size. The head's GEMMs are mlkit's own, of the same shapes: forward's, and those of "
              "forward, of the gradient of its input and of the weight.",
              "- Threads are bound to cores. Eigen chooses its instruction set when compiled: it alone is built with `-march=native`; OpenBLAS "
              "runs with `OPENBLAS_CORETYPE=SkylakeX` where there is AVX-512, as it may not know the CPU.\n"]
    with open(os.path.join(out, "index.md"), "w") as file:
        file.write("\n".join(intro) + "\n" + "\n".join(sections))


HEADLINES = [("gemm", "f32", "1024x1024x1024"), ("gemm", "bf16", "1024x1024x1024"), ("linear", "f32", "1x4096x4096"),
             ("linear", "f32", "16x4096x4096"), ("lora", "f32", "512x768x768r4"), ("lora_training", "f32", "512x768x768r4"),
             ("dora", "f32", "32x4096x4096r16"), ("nf4", "f32", "1x4096x4096"), ("nf4", "f32", "512x4096x4096"),
             ("attention", "f32", "1x8x1024x1024x64"), ("attention_backward", "f32", "1x8x1024x1024x64"),
             ("attention_causal", "bf16", "1x8x2048x2048x64"), ("attention", "f32", "2x8x4096x77x40"),
             ("decode", "bf16", "8x32kv8x2048x128"),
             ("gae", "f32", "1024x1024"), ("log_prob", "f32", "256x50257"), ("log_prob_training", "bf16", "256x50257"),
             ("lm_head_training", "f32", "512x50257x768"), ("ppo_loss", "f32", "256x512")]


def readme(path, tables):
    """The headline rows, between the README's marks."""
    rows, measured_on = [], {}
    for key in HEADLINES:
        for family, table in tables.items():
            row = table.get(*key, table.threads[-1], "mlkit")
            peer = next((p for p in ("peft", "bitsandbytes", "torch", best_peer(table, *key, table.threads[-1])[0])
                         if row and table.get(*key, row["threads"], p)), None)
            if not peer:
                continue
            facts = table.facts
            machine_text = (f"{count(facts['cores'], 'core')} of {'a virtual ' if facts['virtual'] else ''}{facts['cpu']} "
                            f"({facts['isa']})")
            measured_on.setdefault(machine_text, {})[family] = facts["date"]
            time = table.time(*key, row["threads"], peer)
            rows.append([title(*key), f"**{duration(row['best_ns'])}**", *rate(table, row), PEERS[peer], duration(time),
                         f"**{time / row['best_ns']:.2f}×**"])
    if not rows:
        return
    threads = {count(table.threads[-1], "thread") for family, table in tables.items() if any(family in m for m in measured_on.values())}
    text = markdown([" or ".join(sorted(threads)), "mlkit", "rate", "of ceiling", "peer", "its time",
                     "mlkit is faster"], rows, left=(0, 4))
    if len(measured_on) == 1:
        where = "".join(f" on {machine_text}, the last {max(dates.values())}" for machine_text, dates in measured_on.items())
    else:  # of which times do not compare, but ratios do
        where = ": " + "; ".join(f"{' and '.join(filter(None, (', '.join(list(dates)[:-1]), list(dates)[-1])))} on {machine_text}, "
                                 f"{'the last ' if len(dates) > 1 else ''}{max(dates.values())}"
                                 for machine_text, dates in measured_on.items())
    text += (f"\nEach family was measured in one run with its peers{where}; every case, its ceilings and its targets, met and missed, are in "
             "[docs/performance](docs/performance/index.md).\n")
    with open(path) as file:
        page_text = file.read()
    begin, end = "<!-- performance:begin -->\n", "<!-- performance:end -->"
    head, rest = page_text.split(begin)
    with open(path, "w") as file:
        file.write(head + begin + text + end + rest.split(end)[1])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", help="folder with the JSON of a run; without it, only the page is made again")
    parser.add_argument("--out", required=True)
    parser.add_argument("--readme", help="put the headline rows between this file's marks")
    parser.add_argument("--other-load", type=float, help="percent of the CPU time of the run that other processes used")
    options = parser.parse_args()
    families = ("matmul", "lora", "attention", "rl", "compile")
    os.makedirs(options.out, exist_ok=True)
    for family in families:
        joined = join(options.results, family) if options.results else None
        if joined:
            if options.other_load is not None:
                joined[1]["other_load"] = options.other_load
            save(options.out, family, *joined)
    tables = {family: table for family in families if (table := load(options.out, family))}
    page(options.out, tables, Targets())
    if options.readme:
        readme(options.readme, tables)


if __name__ == "__main__":
    main()

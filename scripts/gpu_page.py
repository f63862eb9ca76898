#!/usr/bin/env python3
"""Writes cuda.md from what scripts/gpu-check left in <folder>/cuda: a table per family with times, rates and ratios.

A line of a family's .jsonl is one implementation of one case: {"case", "by", "microseconds", "bytes", "flops", "note"}; `by` is mlkit, a
peer, or ceiling, whose bytes or flops over its time are the machine's own limit in that run. Targets stand in bench/cuda/targets.csv.
"""

import csv
import json
import os
import re
import sys
from datetime import date

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TITLES = {"rl": "Reinforcement learning", "lora": "LoRA"}


def read_lines(path):
    if not os.path.exists(path):
        return []
    with open(path) as file:
        return [row for row in map(json.loads, (line for line in file if line.startswith("{"))) if "microseconds" in row]


def read_text(path):
    if not os.path.exists(path):
        return ""
    with open(path) as file:
        return file.read()


def read_targets():
    path = os.path.join(ROOT, "bench", "cuda", "targets.csv")
    if not os.path.exists(path):
        return []
    with open(path) as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def by_of(row):
    return row.get("by") or row.get("peer") or "mlkit"


def ceilings(rows):
    """Bytes and flops per microsecond, the best of the run."""
    found = {"bytes": 0.0, "flops": 0.0}
    for row in rows:
        if by_of(row) == "ceiling":
            for kind in found:
                found[kind] = max(found[kind], (row.get(kind) or 0) / row["microseconds"])
    return found


def share(row, limits):
    """The time that the nearer limit would take over the time taken, and which limit that is."""
    times = {kind: (row.get(kind) or 0) / limits[kind] for kind in limits if limits[kind]}
    if not times or max(times.values()) == 0:
        return None, ""
    kind = max(times, key=times.get)
    return times[kind] / row["microseconds"], {"bytes": "memory", "flops": "arithmetic"}[kind]


def rate(row, kind):
    value = (row.get({"memory": "bytes", "arithmetic": "flops"}.get(kind, "bytes")) or 0) / row["microseconds"]
    if not value:
        return ""
    return f"{value / 1e3:.0f} GB/s" if kind != "arithmetic" else f"{value / 1e6:.0f} TFLOP/s"


def verdicts(row, limits, others, targets):
    """`✓` or `✗` with the value for each target of the case."""
    texts = []
    for target in targets:
        if not re.fullmatch(target["case"], row["case"]):
            continue
        measure, bound, wanted = target["measure"], target["bound"], float(target["value"])
        if measure == "ceiling":
            value = share(row, limits)[0]
        elif measure == "microseconds":
            value = row["microseconds"]
        else:  # how many times faster than that peer
            peer = next((o for o in others if by_of(o) == measure), None)
            value = peer["microseconds"] / row["microseconds"] if peer else None
        if value is None:
            texts.append(f"{measure} {bound} {wanted:g}: not measured")
            continue
        met = value >= wanted if bound == ">=" else value <= wanted
        texts.append(f"{'✓' if met else '✗'} {measure} {value:.3g} ({bound} {wanted:g})")
    return texts


def family_section(name, rows, targets):
    limits = ceilings(rows)
    cases = list(dict.fromkeys(row["case"] for row in rows if by_of(row) != "ceiling"))
    lines = [f"## {TITLES.get(name, name)}\n",
             "| case | mlkit | rate | of ceiling | peers (mlkit is faster by) | targets |", "|---|---:|---:|---:|---|---|"]
    met = missed = 0
    for case in cases:
        same = [row for row in rows if row["case"] == case]
        own = next((row for row in same if by_of(row) == "mlkit"), None)
        if not own:
            continue
        others = [row for row in same if by_of(row) not in ("mlkit", "ceiling")]
        part, kind = share(own, limits)
        peers = "; ".join(f"{by_of(o)} {o['microseconds']:.1f} µs (**{o['microseconds'] / own['microseconds']:.2f}×**)" for o in others)
        texts = verdicts(own, limits, others, targets)
        met += sum(t.startswith("✓") for t in texts)
        missed += sum(t.startswith("✗") for t in texts)
        lines.append(f"| {case} | {own['microseconds']:.1f} µs | {rate(own, kind)} | "
                     f"{f'{100 * part:.0f} % ({kind})' if part else ''} | {peers} | {'; '.join(texts)} |")
    limit_texts = []
    if limits["bytes"]:
        limit_texts.append(f"{limits['bytes'] / 1e6:.2f} TB/s read and written")
    if limits["flops"]:
        limit_texts.append(f"{limits['flops'] / 1e6:.0f} TFLOP/s in a large bf16 product")
    lines.append(f"\nCeilings in this run: {', '.join(limit_texts)}.\n" if limit_texts else "")
    return "\n".join(lines), met, missed


def main():
    out = sys.argv[1] if len(sys.argv) > 1 else os.path.join(ROOT, "docs", "performance")
    raw = os.path.join(out, "cuda")
    device = read_text(os.path.join(raw, "device.txt")).strip().splitlines()
    targets = read_targets()
    sections, met, missed = [], 0, 0
    for path in sorted(os.listdir(raw)):
        if path.endswith(".jsonl"):
            text, good, bad = family_section(path[:-6], read_lines(os.path.join(raw, path)), targets)
            sections.append(text)
            met, missed = met + good, missed + bad
    tests = re.findall(r"^(?:All tests passed.*|test cases:.*|assertions:.*)$", read_text(os.path.join(raw, "tests.txt")), re.M)
    head = ["# On a GPU\n", "Made by `scripts/gpu-check`; the raw lines are in [cuda](cuda).\n",
            f"Measured {date.today().isoformat()} on: {device[0] if device else 'unknown'} (name, driver, memory, highest SM and memory clocks, "
            "power limit)" + (f"; after the run: {device[1]} (clocks, temperature, power)" if len(device) > 1 else "") + ".\n",
            f"**{met} of {met + missed} targets are met.**\n" if met + missed else "",
            "Times are device time: medians of events around graph replays or repeated launches. Peers ran in the same call, on the same GPU.\n"]
    if tests:
        head.append(f"Tests on this GPU: {'; '.join(t.strip() for t in tests)}.\n")
    sanitizer = re.findall(r"^(==.*|=+ (?:ERROR|RACECHECK) SUMMARY.*)$", read_text(os.path.join(raw, "sanitizer.txt")), re.M)
    if sanitizer:
        head.append("compute-sanitizer: " + "; ".join(re.sub(r"^=+ ", "", s) for s in sanitizer) + ".\n")
    with open(os.path.join(out, "cuda.md"), "w") as file:
        file.write("\n".join(part for part in head if part) + "\n" + "\n".join(sections))
    print(f"wrote {os.path.join(out, 'cuda.md')}")


if __name__ == "__main__":
    main()

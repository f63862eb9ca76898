#!/usr/bin/env python3
"""Writes docs/cuda_kernels.md: what nvcc makes of every kernel that the CUDA benchmarks run: registers, spills, shared memory, the warps
that a multiprocessor holds of it, and the instructions that it is meant to be made of.

    cuda_kernels.py            writes the table
    cuda_kernels.py --check    fails for a kernel that spills, or lacks an instruction that it is meant to be made of, and, with the
                               compiler that the table names, for numbers that have changed

Without nvcc it says so and does nothing; without nvdisasm, which PyPI has as nvidia-cuda-nvdisasm, it looks at no instruction. No GPU is
needed.
"""

import concurrent.futures
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "cuda_kernels.md"
ARCHITECTURES = ["sm_80", "sm_90a"]
# Of a multiprocessor: threads, by architecture; registers and the unit in which a warp gets them.
THREADS, REGISTERS, UNIT = {"sm_80": 2048, "sm_90a": 2048}, 65536, 256
# In SASS: tensor cores, copies past registers, 16 bytes at once.
INSTRUCTIONS = {"HMMA": r"\bHMMA\.", "HGMMA": r"\bHGMMA\.", "LDGSTS": r"\bLDGSTS\.", "TMA": r"\bUTMALDG\.", "LDG.128": r"\bLDG\.E\.(?:\w+\.)*128\b",
                "STG.128": r"\bSTG\.E\.(?:\w+\.)*128\b"}
# Those that kernels are there for, by the beginning of their names; on Hopper alone for the last.
MEANT = {"tile::product_kernel": ["HMMA", "LDGSTS"], "thin::product_kernel": ["HMMA", "LDG.128"], "project_tiles_kernel": ["HMMA"],
         "add_tiles_kernel": ["HMMA"], "scan_short_rows": ["LDG.128", "STG.128"], "moments_kernel": ["LDG.128"],
         "whiten_kernel": ["LDG.128", "STG.128"], "sum_kernel<loss_tokens": ["LDG.128", "STG.128"], "sum_kernel<pair_terms": ["LDG.128", "STG.128"],
         "warpgroup::product_kernel": ["HGMMA", "TMA"]}

# The toolkit's, or that of .venv.
NVDISASM = shutil.which("nvdisasm") or next(map(str, (ROOT / ".venv").glob("lib/python*/site-packages/nvidia/*/bin/nvdisasm")), None)


def demangled(names):
    if not names:
        return {}
    done = subprocess.run(["c++filt"], input="\n".join(names), stdout=subprocess.PIPE, text=True, check=True)
    return dict(zip(names, done.stdout.splitlines()))


def short(name):
    """A kernel's name and template arguments, without namespaces and parameters."""
    name = re.sub(r"\(anonymous namespace\)::|mlkit::|v0(?:_openmp)?::|detail::|rl::|lora::|cuda_kernels::|std::", "", name)
    name = re.sub(r"^void ", "", name)
    depth, end = 0, len(name)
    for i, c in enumerate(name):
        depth += (c == "<") - (c == ">")
        if c == "(" and depth == 0:
            end = i
            break
    return re.sub(r"\(([A-Za-z_]\w*)\)(\d+)", r"\2", name[:end]).replace("|", "\\|")


def resources(text):
    """Per mangled kernel: registers, spilled bytes, static shared memory."""
    found = {}
    for name, block in re.findall(r"Compiling entry function '(\w+)'.*?\n(.*?)(?=ptxas info\s+: Compiling|\Z)", text, re.S):
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", block)
        registers = re.search(r"Used (\d+) registers", block)
        shared = re.search(r"(\d+) bytes smem", block)
        if registers:
            found[name] = (int(registers.group(1)), sum(map(int, spills.groups())) if spills else 0, int(shared.group(1)) if shared else 0)
    return found


def most_threads(ptx):
    """Per mangled kernel: the most threads of a block, where it says."""
    found = {}
    for name, head in re.findall(r"\.entry (\w+)\((.*?)\n\{", ptx, re.S):
        threads = re.search(r"\.maxntid (\d+)", head)
        found[name] = int(threads.group(1)) if threads else 0
    return found


def instructions(cubin):
    """Per mangled kernel, how often each kind stands in it; nothing without nvdisasm."""
    if not NVDISASM:
        return {}
    sass = subprocess.run([NVDISASM, "-c", str(cubin)], check=True, stdout=subprocess.PIPE, text=True).stdout
    bodies = re.split(r"\.section\s+\.text\.(\w+)", sass)[1:]
    return {name: {kind: len(re.findall(p, body)) for kind, p in INSTRUCTIONS.items()} for name, body in zip(bodies[::2], bodies[1::2])}


def compiled(source, architecture):
    flags = ["nvcc", "-std=c++20", "-O2", "-I", str(ROOT / "include"), "-I", str(source.parent), f"-arch={architecture}", str(source)]
    with tempfile.TemporaryDirectory() as folder:
        ptx = pathlib.Path(folder) / "kernels.ptx"
        cubin = ptx.with_suffix(".cubin")
        subprocess.run([*flags, "-ptx", "-o", str(ptx)], check=True, stdout=subprocess.DEVNULL)
        done = subprocess.run(["ptxas", "-v", f"-arch={architecture}", str(ptx), "-o", str(cubin)], check=True, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True)
        return resources(done.stdout), most_threads(ptx.read_text()), instructions(cubin)


def warps(architecture, registers, threads):
    """Those that registers leave room for, in whole blocks where the most threads of one are known."""
    per_warp = -(-registers * 32 // UNIT) * UNIT
    most = min(REGISTERS // per_warp, THREADS[architecture] // 32)
    block = threads // 32
    return most // block * block if block else most


def table():
    version = re.search(r"release ([\d.]+)", subprocess.run(["nvcc", "--version"], stdout=subprocess.PIPE, text=True).stdout).group(1)
    jobs = [(s, a) for s in sorted((ROOT / "bench" / "cuda").glob("*.cu")) for a in ARCHITECTURES]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda job: compiled(*job), jobs))
    lines, faults = [], []
    for source in sorted({s for s, _ in jobs}):
        by_kernel = {}
        for (s, architecture), (used, threads, kinds) in zip(jobs, results):
            if s == source:
                for name, numbers in used.items():
                    by_kernel.setdefault(name, {})[architecture] = (*numbers, threads.get(name, 0), kinds.get(name, {}))
        names = demangled(list(by_kernel))
        lines += [f"## {source.stem}\n", "| kernel | " + " | ".join(f"{a}: registers, warps" for a in ARCHITECTURES) + " | shared | spills | instructions |",
                  "|---|" + "---|" * (len(ARCHITECTURES) + 3)]
        for name in sorted(by_kernel, key=lambda n: short(names[n])):
            at = by_kernel[name]
            if "cub::" in names[name] or "mlkit" not in names[name]:
                continue
            cells = [f"{at[a][0]}, {warps(a, at[a][0], at[a][3])}" if a in at else "" for a in ARCHITECTURES]
            spills, last = max(v[1] for v in at.values()), at.get("sm_90a", next(iter(at.values())))
            kinds = ", ".join(f"{kind} {count}" for kind, count in last[4].items() if count)
            lines.append(f"| `{short(names[name])}` | " + " | ".join(cells) + f" | {last[2]} | {spills or ''} | {kinds} |")
            if spills:
                faults.append(f"{short(names[name])} spills {spills} bytes")
            for prefix, meant in MEANT.items():
                if short(names[name]).startswith(prefix) and NVDISASM:
                    there = [at["sm_90a"]] if prefix.startswith("warpgroup") else at.values()
                    faults += [f"{short(names[name])} has no {kind}" for kind in meant if not all(v[4].get(kind) for v in there)]
        lines.append("")
    head = ["# CUDA kernels, as compiled\n",
            f"Made by `scripts/cuda_kernels.py` with nvcc {version}, from the kernels that the CUDA benchmarks run. Warps are those that a "
            "multiprocessor's registers leave room for, of 64; shared is static shared memory in bytes; spills are bytes. Instructions are "
            "counted in the SASS of sm_90a.\n"]
    return "\n".join(head + lines) + "\n", faults, version


def without_instructions(text):
    return re.sub(r"\|[^|\n]*\|$", "|", text, flags=re.M)


def main():
    if not shutil.which("nvcc"):
        print("nvcc is not on the PATH: the CUDA kernels were not looked at")
        return
    made, faults, version = table()
    kept = TABLE.read_text(encoding="utf-8")
    if "--check" not in sys.argv:
        if not NVDISASM:
            sys.exit("no nvdisasm: .venv/bin/pip install nvidia-cuda-nvdisasm")
        TABLE.write_text(made, encoding="utf-8")
        print(made)
    elif f"nvcc {version}" in kept:
        if not NVDISASM:
            print("no nvdisasm: no instruction was looked at")
            made, kept = without_instructions(made), without_instructions(kept)
        if kept != made:
            print(made)
            sys.exit("docs/cuda_kernels.md is not what nvcc makes now; run scripts/cuda_kernels.py")
    if faults:
        sys.exit("\n".join(faults))


if __name__ == "__main__":
    main()

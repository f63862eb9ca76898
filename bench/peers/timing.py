"""Times Python peers by the rules of the C++ harness and writes the JSON that it writes."""

import argparse
import json
import random
import re
import sys
import time

import torch


class Cases:
    """Cases are called name/dtype/shape/t<threads>/by. `make` returns the call to time; it is called once, when first needed."""

    def __init__(self):
        parser = argparse.ArgumentParser()
        parser.add_argument("--threads", default="1,2")
        parser.add_argument("--repetitions", type=int, default=3)
        parser.add_argument("--min-time", type=float, default=0.05)
        parser.add_argument("--filter", default="")
        parser.add_argument("--out", default="-")
        self.options = parser.parse_args()
        self.threads = [int(n) for n in self.options.threads.split(",")]
        self.cases = []

    def add(self, name, dtype, shape, by, make, one_thread=True, memory=False):
        """Adds a case for all thread counts, or, without `one_thread`, for the most threads alone. With `memory` its row has the
        most memory that one call takes beside its operands."""
        for threads in self.threads if one_thread else self.threads[-1:]:
            full = f"{name}/{dtype}/{shape}/t{threads}/{by}"
            if re.search(self.options.filter, full):
                self.cases.append({"name": full, "threads": threads, "make": make, "iterations": 0, "memory": memory})

    def run(self):
        results = []
        made = {}
        for repetition in range(self.options.repetitions):
            random.shuffle(self.cases)
            for case in self.cases:
                torch.set_num_threads(case["threads"])
                call = made.setdefault(case["make"], None) or case["make"]()
                made[case["make"]] = call
                call()
                counters = {"memory": peak_bytes(call)} if case["memory"] else {}
                if not case["iterations"]:
                    call()
                    start = time.perf_counter()
                    call()
                    once = time.perf_counter() - start
                    case["iterations"] = max(1, round(self.options.min_time / once))
                start = time.perf_counter()
                for _ in range(case["iterations"]):
                    call()
                seconds = (time.perf_counter() - start) / case["iterations"]
                results.append({"name": case["name"], "run_type": "iteration", "real_time": seconds * 1e9,
                                "time_unit": "ns", "iterations": case["iterations"], **counters})
        document = json.dumps({"context": {"versions": versions()}, "benchmarks": results}, indent=1)
        if self.options.out == "-":
            print(document)
        else:
            with open(self.options.out, "w") as out:
                out.write(document)


def peak_bytes(call):
    """How far the resident memory of this process rises while one call runs."""
    def status(field):
        with open("/proc/self/status") as file:
            return 1024 * int(re.search(rf"^{field}:\s+(\d+) kB", file.read(), re.M)[1])

    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts again from here
    before = status("VmRSS")
    call()
    return status("VmHWM") - before


def versions():
    names = ("torch", "peft", "bitsandbytes", "torchrl", "numpy")
    return {name: sys.modules[name].__version__ for name in names if name in sys.modules}

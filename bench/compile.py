"""What a translation unit costs that includes one header and calls one kernel: seconds and peak memory of the compiler."""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time

CXX = os.environ.get("CXX", "g++")

UNITS = {
    "mlkit matmul": """
#include <mlkit/matmul.hpp>
void product(const mlkit::matrix<float>& a, const mlkit::matrix<float>& b, mlkit::matrix<float>& c) {
  mlkit::matmul(mlkit::cpu{}, a, b, c);
}""",
    "mlkit lora": """
#include <mlkit/lora.hpp>
void forward(const mlkit::matrix<float>& x, const mlkit::matrix<float>& w, const mlkit::lora::adapter<float>& adapter,
             mlkit::matrix<float>& y) {
  mlkit::lora::linear(mlkit::cpu{}, x, mlkit::lora::dense{w}, adapter, y);
}""",
    "mlkit attention": """
#include <mlkit/attention.hpp>
void attend(const mlkit::tensor<float, 4>& q, const mlkit::tensor<float, 4>& k, const mlkit::tensor<float, 4>& v,
            mlkit::tensor<float, 4>& out) {
  mlkit::attention::forward(mlkit::cpu{}, q, k, v, out);
}""",
    "mlkit rl": """
#include <mlkit/rl.hpp>
void advantages(const mlkit::matrix<float>& rewards, const mlkit::matrix<float>& values, const mlkit::vector<float>& next,
                mlkit::matrix<float>& out) {
  mlkit::rl::gae(mlkit::cpu{}, {.rewards = rewards, .values = values, .bootstrap = next}, {}, {.advantages = out});
}""",
    "eigen gemm": """
#include <Eigen/Core>
using matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
void product(const matrix& a, const matrix& b, matrix& c) { c.noalias() = a * b; }""",
    "nlohmann/json parse": """
#include <nlohmann/json.hpp>
std::string name(const std::string& text) { return nlohmann::json::parse(text)["name"].get<std::string>(); }""",
    "libtorch mm": """
#include <torch/torch.h>
torch::Tensor product(torch::Tensor a, torch::Tensor b) { return torch::mm(a, b); }""",
}
CUB = """
#include <cub/device/device_reduce.cuh>
cudaError_t sum(void* scratch, size_t& bytes, const float* in, float* out, int n) {
  return cub::DeviceReduce::Sum(scratch, bytes, in, out, n);
}"""


def compile_once(command, source, suffix, include):
    """Wall seconds and the largest resident size, in MiB, of the compiler's processes; None if it does not compile."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "unit" + suffix)
        with open(path, "w") as file:
            file.write(source)
        flags = [flag for path in include for flag in ("-I", path)]
        environment = dict(os.environ, CCACHE_DISABLE="1")
        start = time.perf_counter()
        process = subprocess.Popen([*command, *flags, "-c", path, "-o", os.path.join(folder, "unit.o")],
                                   env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        errors = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = status
        seconds = time.perf_counter() - start
        if status != 0:
            print((errors.strip().splitlines() or ["the compiler failed"])[0], file=sys.stderr)
            return None
        return seconds, usage.ru_maxrss / 1024


def torch_includes():
    python = os.environ.get("MLKIT_PEERS_PYTHON", sys.executable)
    query = "import torch.utils.cpp_extension as c; print('\\n'.join(c.include_paths()))"
    answer = subprocess.run([python, "-c", query], capture_output=True, text=True)
    return answer.stdout.split() if answer.returncode == 0 else []


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--include", required=True, help="mlkit's include folder")
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--peers", action="store_true", help="also the peers that need the Python environment")
    parser.add_argument("--out", required=True)
    options = parser.parse_args()

    gcc = [CXX, "-std=c++20", "-O2"]
    eigen = ["/usr/include/eigen3"]
    cases = [("compile", by, gcc, UNITS[by], ".cpp", {"mlkit": [options.include], "eigen": eigen}.get(by.split()[0], []))
             for by in ("mlkit matmul", "mlkit lora", "mlkit attention", "mlkit rl", "eigen gemm", "nlohmann/json parse")]
    nvcc = shutil.which("nvcc")
    if nvcc:
        cuda = [nvcc, "-std=c++20", "-O2", "-arch=sm_80"]
        cases += [("compile_cuda", "mlkit matmul", cuda, UNITS["mlkit matmul"], ".cu", [options.include]),
                  ("compile_cuda", "cub reduce", cuda, CUB, ".cu", [])]
    results = []
    failed = set()
    for repetition in range(options.repetitions):
        for name, by, command, source, suffix, include in cases:
            if (name, by) in failed:
                continue
            cost = compile_once(command, source, suffix, include)
            if cost is None:
                failed.add((name, by))
                continue
            results.append({"name": f"{name}/O2/unit/t1/{by}", "run_type": "iteration", "real_time": cost[0] * 1e9,
                            "time_unit": "ns", "memory": cost[1] * 2**20})
    includes = torch_includes() if options.peers else []
    if includes:
        cost = compile_once(gcc, UNITS["libtorch mm"], ".cpp", includes)
        if cost:
            results.append({"name": "compile/O2/unit/t1/libtorch mm", "run_type": "iteration",
                            "real_time": cost[0] * 1e9, "time_unit": "ns", "memory": cost[1] * 2**20})
    with open(options.out, "w") as out:
        json.dump({"context": {}, "benchmarks": results}, out, indent=1)


if __name__ == "__main__":
    main()

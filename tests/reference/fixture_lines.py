"""What the scripts beside it write: text files with one tensor to a line: name, number of elements, values."""

import pathlib
import sys

import torch


class Lines:
    def __init__(self, name, digits=17):
        self.name, self.digits, self.lines = name, digits, []

    def put(self, name, value):
        flat = torch.as_tensor(value, dtype=torch.float64).detach().flatten().tolist()
        self.lines.append(" ".join([name, str(len(flat))] + [f"{v:.{self.digits}g}" for v in flat]))

    def write(self):
        """To the directory that the command line names, or to tests/data."""
        data = pathlib.Path(__file__).resolve().parents[1] / "data"
        directory = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else data
        directory.mkdir(parents=True, exist_ok=True)
        (directory / self.name).write_text("\n".join(self.lines) + "\n")

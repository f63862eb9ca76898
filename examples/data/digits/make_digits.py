"""Makes digits.txt from scikit-learn's copy of the UCI data set.

    python3 examples/data/digits/make_digits.py

One image to a line: its label, a space, and its 64 pixels row by row, each a grey level 0..16 written as one
character (0-9, then a-g). The order is that of the source.
"""

import pathlib

from sklearn.datasets import load_digits

levels = "0123456789abcdefg"
digits = load_digits()
lines = (f"{label} {''.join(levels[int(v)] for v in image)}" for image, label in zip(digits.data, digits.target))
(pathlib.Path(__file__).resolve().parent / "digits.txt").write_text("\n".join(lines) + "\n")

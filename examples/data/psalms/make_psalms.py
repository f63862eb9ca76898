"""Makes psalms.txt from Debian's copy of the King James Version (package bible-kjv, with bible-kjv-text).

    python3 examples/data/psalms/make_psalms.py

A verse to a line, without its number: all of Psalms, then Proverbs 1 to 29, which together stay below 300,000 bytes.
"""

import pathlib
import re
import subprocess

verses = []
for passage in ("ps1:1-150:6", "pr1:1-29:27"):
    lines = subprocess.run(["bible", "-f", passage], check=True, capture_output=True, text=True).stdout.splitlines()
    verses += [re.sub(r"^[A-Za-z]+\d+:\d+ ", "", line) for line in lines]
(pathlib.Path(__file__).resolve().parent / "psalms.txt").write_text("\n".join(verses) + "\n")

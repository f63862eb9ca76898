#!/usr/bin/env python3
"""Compiles and runs every ```cpp block of README.md and docs/*.md, so that what the documents show is what works. Those
marked ```cuda are compiled for, and run on, the tests' emulation of a GPU.

A block with a main() is a program. Any other block is the body of a function; a comment in front of it holds what it needs
and the document leaves out:

    <!-- snippet
    mlkit::matrix<float> a({4, 8});
    -->

Blocks of one document that follow a comment `<!-- snippet continues -->` stand in the same function as the one before.

    doc_snippets.py BUILD_FOLDER COMPILER FLAG...
"""

import concurrent.futures
import os
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
EMULATION = ROOT / "tests" / "cuda_emulation"
# With what a host compiler needs to run them.
LANGUAGES = {"cpp": [], "cuda": ["-DMLKIT_CUDA_EMULATION", "-I", str(EMULATION / "include"), *map(str, sorted(EMULATION.glob("*.cpp")))]}


def blocks(language):
    return re.compile(rf"(?:<!-- snippet(?P<continues> continues)?(?P<setup>(?:(?!<!--).)*?)-->\s*)?^```{language}\n(?P<code>.*?)^```", re.M | re.S)


def programs(document, language):
    """Yields (name, source, flags) of the programs that a document's blocks in a language make."""
    text = document.read_text(encoding="utf-8")
    includes, bodies = [], []

    def lift(code):
        """Takes the include lines out of a block; what is left keeps its line numbers."""
        includes.extend(re.findall(r"^#include .*$", code, re.M))
        return re.sub(r"^#include .*$", "", code, flags=re.M)

    for block in blocks(language).finditer(text):
        line = text.count("\n", 0, block.start("code")) + 1
        place = f'#line {line} "{document.relative_to(ROOT).as_posix()}"\n'
        code = block.group("code")
        if re.search(r"\bint main\(", code):
            yield f"{document.stem}_{line}", place + code, LANGUAGES[language]
            continue
        setup = lift(block.group("setup") or "")
        if block.group("continues") and bodies:
            bodies[-1] = (bodies[-1][0], bodies[-1][1] + setup + "\n" + place + lift(code))
        else:
            bodies.append((line, setup + "\n" + place + lift(code)))
    if bodies:
        functions = "".join(f"void snippet_{line}() {{\n{body}\n}}\n" for line, body in bodies)
        calls = "".join(f"  snippet_{line}();\n" for line, _ in bodies)
        lifted = "\n".join(dict.fromkeys(includes))
        yield f"{document.stem}_{language}", f"{lifted}\n{functions}int main() {{\n{calls}}}\n", LANGUAGES[language]


def build_and_run(name, source, flags, folder, command):
    path = folder / f"{name}.cpp"
    path.write_text(source, encoding="utf-8")
    program = folder / name
    for step in ([*command, "-I", str(ROOT / "include"), str(path), *flags, "-o", str(program)], [str(program)]):
        done = subprocess.run(step, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder)
        if done.returncode:
            return f"{name}: {' '.join(step)}\n{done.stdout}"
    return None


def main():
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    folder = pathlib.Path(sys.argv[1]).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    found = [p for document in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) for language in LANGUAGES
             for p in programs(document, language)]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        failures = [f for f in pool.map(lambda p: build_and_run(*p, folder, sys.argv[2:]), found) if f]
    print("\n".join(failures) if failures else f"{len(found)} programs made of the documents' snippets compile and run")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()

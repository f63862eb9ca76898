#!/usr/bin/env python3
"""Builds mlkit in the ways in which its users do. Each subcommand is one test; 77 means skipped.

consume.py headers COMPILER FLAG...    every public header alone, included twice
consume.py together COMPILER FLAG...   all public headers in one translation unit, in the reverse order
consume.py plain COMPILER FLAG...      two translation units that call the same kernels, linked and run, without CMake
consume.py mixed COMPILER              one translation unit with -fopenmp and one without, linked and run
consume.py project MODE COMPILER       a CMake project: MODE is package, moved, subdirectory or fetchcontent
consume.py pkgconfig COMPILER          installed, and found through pkg-config
consume.py misuse COMPILER             what must not compile does not, and says why; each file of misuse/ names the words
                                       that the compiler has to say, and with -DCORRECT is the call that was meant
consume.py cuda                        every public header in a .cu file, and policies in a device function, by nvcc
consume.py cost COMPILER               reports compile time and peak memory of one header and one call
"""

import concurrent.futures
import contextlib
import os
import pathlib
import re
import resource
import shutil
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
INCLUDE = ROOT / "include"
UNITS = [HERE / "project" / "main.cpp", HERE / "project" / "other.cpp"]
WARNINGS = ["-Wall", "-Wextra", "-Werror"]
SKIPPED = 77


def skip(why):
    print(f"skipped: {why}")
    sys.exit(SKIPPED)


def need(program, why):
    found = shutil.which(program)
    if not found:
        skip(f"{program} is not installed ({why})")
    return found


def run(command, **options):
    """Runs a command; on failure shows it with its output and ends the test."""
    done = subprocess.run([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          stdin=subprocess.DEVNULL, **options)
    if done.returncode:
        print("$", " ".join(str(c) for c in command))
        print(done.stdout)
        sys.exit(1)
    return done.stdout


@contextlib.contextmanager
def scratch():
    """An empty folder under the current one; always the same for a test, so that ccache knows what it compiles again."""
    name = re.sub(r"[^A-Za-z0-9]+", "_", "-".join(sys.argv[1:]))
    folder = pathlib.Path.cwd() / "scratch" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def public_headers():
    """What users may include: not the bodies that are included once per instruction set, nor what includes them."""
    names = sorted(p.relative_to(INCLUDE).as_posix() for p in (INCLUDE / "mlkit").rglob("*.hpp"))
    return [n for n in names if not n.endswith("-inl.hpp") and n != "mlkit/simd/foreach_isa.hpp"]


def compiler_of(name):
    path = need(name, "a second compiler")
    return [need("ccache", ""), path] if shutil.which("ccache") else [path]


def headers(compiler, *flags):
    path = need(compiler, "a second compiler")
    with scratch() as folder:
        def one(name):
            source = folder / (name.replace("/", "_") + ".cpp")
            source.write_text(f"#include <{name}>\n#include <{name}>\n")
            command = [path, *flags, *WARNINGS, "-fsyntax-only", "-I", INCLUDE, source]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            return name, done.returncode, done.stdout

        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            results = list(pool.map(one, public_headers()))
    failures = [r for r in results if r[1]]
    for name, _, output in failures:
        print(f"{name} does not compile alone:\n{output}")
    print(f"{len(results) - len(failures)} of {len(results)} headers compile alone")
    sys.exit(1 if failures else 0)


def together(compiler, *flags):
    path = need(compiler, "a second compiler")
    with scratch() as folder:
        source = folder / "all.cpp"
        source.write_text("".join(f"#include <{name}>\n" for name in reversed(public_headers())))
        run([path, *flags, *WARNINGS, "-fsyntax-only", "-I", INCLUDE, source])


def plain(compiler, *flags):
    command = compiler_of(compiler)
    with scratch() as folder:
        objects = [folder / f"{unit.stem}.o" for unit in UNITS]
        for unit, target in zip(UNITS, objects):
            run([*command, *flags, "-I", INCLUDE, "-c", unit, "-o", target])
        program = folder / "program"
        run([command[-1], *flags, *objects, "-o", program])
        print(run([program]), end="")


def mixed(compiler):
    command = compiler_of(compiler)
    with scratch() as folder:
        objects = []
        for unit, flags in zip(UNITS, (["-fopenmp"], [])):
            objects.append(folder / f"{unit.stem}.o")
            run([*command, "-std=c++20", "-O2", *flags, "-I", INCLUDE, "-c", unit, "-o", objects[-1]])
        program = folder / "program"
        run([command[-1], "-fopenmp", *objects, "-o", program])
        print(run([program]), end="")


def install(folder, *options):
    build = folder / "mlkit-build"
    run(["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", "-DMLKIT_TESTS=OFF",
         f"-DCMAKE_INSTALL_PREFIX={folder / 'prefix'}", *options])
    run(["cmake", "--install", build])
    return folder / "prefix"


def project(mode, compiler):
    need(compiler, "a second compiler")
    with scratch() as folder:
        chosen = [f"-DCMAKE_CXX_COMPILER={compiler}"]
        if shutil.which("ccache"):
            chosen.append("-DCMAKE_CXX_COMPILER_LAUNCHER=ccache")
        options = [f"-DCONSUME={'package' if mode == 'moved' else mode}"]
        if mode in ("package", "moved"):
            prefix = install(folder, *chosen)
            if mode == "moved":
                prefix = prefix.rename(folder / "elsewhere")
            options.append(f"-DCMAKE_PREFIX_PATH={prefix}")
        elif mode == "subdirectory":
            options.append(f"-DMLKIT_SOURCE={ROOT}")
        else:
            options += [f"-DFETCHCONTENT_SOURCE_DIR_MLKIT={ROOT}", "-DFETCHCONTENT_FULLY_DISCONNECTED=ON"]
        if mode != "package":  # one mode compiles as users do; the others only have to find the headers
            options.append("-DCMAKE_BUILD_TYPE=Debug")
        build = folder / "build"
        run(["cmake", "-S", HERE / "project", "-B", build, "-G", "Ninja", *chosen, *options])
        run(["cmake", "--build", build])
        print(run([build / "program"]), end="")


def pkgconfig(compiler):
    need("pkg-config", "pkg-config")
    command = compiler_of(compiler)
    with scratch() as folder:
        prefix = install(folder)
        found = dict(os.environ, PKG_CONFIG_PATH=str(prefix / "share" / "pkgconfig"))
        flags = run(["pkg-config", "--cflags", "mlkit"], env=found).split()
        libraries = run(["pkg-config", "--libs", "mlkit"], env=found).split()
        wanted = re.search(r"VERSION_MAJOR (\d+)", (INCLUDE / "mlkit/core/config.hpp").read_text()).group(1)
        version = run(["pkg-config", "--modversion", "mlkit"], env=found).strip()
        assert version.split(".")[0] == wanted, version
        program = folder / "program"
        run([command[-1], "-std=c++20", "-O0", *flags, *UNITS, *libraries, "-o", program])
        print(f"mlkit {version}:", run([program]), end="")


def misuse(compiler):
    path = need(compiler, "a second compiler")
    sources = sorted((HERE / "misuse").glob("*.cpp"))
    assert sources, "no misuse to try"

    command = [path, "-std=c++20", "-fsyntax-only", "-I", INCLUDE]

    def one(source):
        wanted = re.findall(r"^// expect: (.+)$", source.read_text(), re.MULTILINE)
        done = subprocess.run([*command, source], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        problems = []
        if not wanted:
            problems.append("names no `// expect: message`")
        if done.returncode == 0:
            problems.append("compiles, but must not")
        problems += [f"fails, but without saying: {w}" for w in wanted
                     if not any(form in done.stdout for form in w.split("|"))]
        return source.name, problems, done.stdout

    with scratch() as folder:
        # All that was meant, in one translation unit: what a file includes, and then it, in a namespace of its own.
        headers = {line for source in sources for line in re.findall(r"^#include <.+>$", source.read_text(), re.MULTILINE)}
        units = [f'namespace meant_{source.stem} {{\n#include "{source}"\n}}' for source in sources]
        meant = folder / "meant.cpp"
        meant.write_text("\n".join([*sorted(headers), "#define CORRECT", *units]) + "\n")
        run([*command, *WARNINGS, meant])

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(one, sources))
    failed = False
    for name, problems, output in results:
        for problem in problems:
            failed = True
            print(f"{name}: {problem}")
        if problems:
            print("\n".join(output.splitlines()[:12]))
    print(f"{len(results)} kinds of misuse tried")
    sys.exit(1 if failed else 0)


def cuda():
    nvcc = need("nvcc", "the CUDA compiler")
    with scratch() as folder:
        source = folder / "all.cu"
        source.write_text("".join(f"#include <{name}>\n" for name in public_headers())
                          + (HERE / "policies.cu").read_text())
        print(run([nvcc, "-std=c++20", "-arch=sm_80", "-Werror", "all-warnings", "-I", INCLUDE, "-c", source,
                   "-o", folder / "all.o"]), end="")
    print(f"{len(public_headers())} headers and the policies compile in a .cu file")


def cost(compiler):
    path = need(compiler, "a second compiler")
    with scratch() as folder:
        start = time.monotonic()
        run([path, "-std=c++20", "-O2", "-I", INCLUDE, "-c", UNITS[1], "-o", folder / "unit.o"])
        seconds = time.monotonic() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"one header, one kernel, {compiler} -O2: {seconds:.1f} s, {peak:.2f} GiB at peak")


if __name__ == "__main__":
    commands = {f.__name__: f for f in (headers, together, plain, mixed, project, pkgconfig, misuse, cuda, cost)}
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        sys.exit(__doc__)
    commands[sys.argv[1]](*sys.argv[2:])

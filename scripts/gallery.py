#!/usr/bin/env python3
"""Writes out/index.html: every picture, table and curve that the examples made, what they say, and how to repeat them.

Reads out/<example>/ (*.png, *.svg, *.csv, log.txt, any other file as a download), examples/<example>/README.md and
out/benchmark/*.json (Google Benchmark). Standard library only.

    gallery.py [out folder]
    gallery.py --benchmark <folder>     only prints the table of the benchmark
"""

import csv
import datetime
import html
import json
import math
import os
import pathlib
import platform
import re
import struct
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
MAX_TABLE_ROWS = 40
PIXEL_ART_WIDTH = 512  # narrower pictures are enlarged without blur

STYLE = """
:root { --ink:#1c2430; --soft:#5d6878; --line:#dfe4ea; --paper:#fbfbf9; --card:#fff; --accent:#0b6e99; --bar:#0b6e99; --code:#f1f3f0; }
@media (prefers-color-scheme: dark) {
  :root { --ink:#e4e8ee; --soft:#98a4b3; --line:#2b333d; --paper:#12161b; --card:#191f26; --accent:#6cc3e8; --bar:#3a9cc7; --code:#222a33; }
}
* { box-sizing:border-box }
body { margin:0; background:var(--paper); color:var(--ink); font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif }
main, header > div { max-width:1120px; margin:0 auto; padding:0 24px }
header { border-bottom:1px solid var(--line); padding:40px 0 28px }
h1 { margin:0; font-size:40px; letter-spacing:-.02em }
header p { margin:6px 0 0; color:var(--soft); max-width:70ch }
nav { margin-top:18px; display:flex; flex-wrap:wrap; gap:8px }
nav a { padding:4px 12px; border:1px solid var(--line); border-radius:99px; text-decoration:none; font-size:14px; background:var(--card) }
a { color:var(--accent) }
section { padding:36px 0 12px; border-bottom:1px solid var(--line) }
section:last-of-type { border:0 }
h2 { font-size:26px; margin:0 0 4px; letter-spacing:-.01em }
h3 { font-size:17px; margin:26px 0 8px }
.said { max-width:76ch; color:var(--ink) }
.said h3, .said h4 { margin-bottom:4px }
figure { margin:0; background:var(--card); border:1px solid var(--line); border-radius:10px; overflow:hidden; break-inside:avoid }
figure img { display:block; width:100%; height:auto; background:#fff }
figure img.pixels { image-rendering:pixelated }
figcaption { padding:8px 12px; font-size:14px; color:var(--soft); border-top:1px solid var(--line) }
.pictures { display:grid; grid-template-columns:repeat(auto-fill,minmax(min(440px,100%),1fr)); gap:16px; margin:18px 0; align-items:start }
.pictures .wide { grid-column:1/-1 }
table { border-collapse:collapse; font-size:14px; background:var(--card); border:1px solid var(--line); border-radius:8px; overflow:hidden }
.scroll { overflow-x:auto; margin:10px 0 }
th, td { text-align:left; padding:6px 14px; border-bottom:1px solid var(--line); white-space:pre }
th { color:var(--soft); font-weight:600; font-size:13px }
tr:last-child td { border-bottom:0 }
td.number, th.number { text-align:right; font-variant-numeric:tabular-nums }
pre, code { font:13px/1.5 ui-monospace,"SF Mono",Menlo,Consolas,"DejaVu Sans Mono",monospace; background:var(--code); border-radius:6px }
code { padding:1px 5px } pre { padding:12px 16px; overflow-x:auto } pre code { padding:0; background:none }
details { margin:10px 0 } summary { cursor:pointer; color:var(--accent) }
details pre { max-height:420px }
.bar { display:inline-block; width:160px; height:9px; background:var(--line); border-radius:5px; vertical-align:middle; margin-right:10px; overflow:hidden }
.bar i { display:block; height:100%; background:var(--bar) }
.files { color:var(--soft); font-size:14px }
footer { padding:28px 0 60px; color:var(--soft); font-size:14px }
"""


def escape(text):
    return html.escape(str(text))


def words(stem):
    return re.sub(r"[_-]+", " ", re.sub(r"^\d+_", "", stem))


def size_text(size):
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000


# ---- Markdown, as much of it as the examples' README files use

def inline(text):
    codes = []

    def keep(match):
        codes.append(f"<code>{escape(match.group(1))}</code>")
        return f"\0{len(codes) - 1}\0"

    text = escape(re.sub(r"`([^`]+)`", keep, text))
    text = re.sub(r"!\[([^\]]*)\]\([^)]*\)", "", text)
    text = re.sub(r"\[([^\]]+)\]\((https?://[^)]+)\)", r'<a href="\2">\1</a>', text)
    text = re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", text)
    text = re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", text)
    text = re.sub(r"(?<![\w*])[*_]([^*_]+)[*_](?![\w*])", r"<em>\1</em>", text)
    return re.sub(r"\0(\d+)\0", lambda m: codes[int(m.group(1))], text)


def markdown(text):
    out, lines, i = [], text.splitlines(), 0
    while i < len(lines):
        line = lines[i]
        if line.startswith("```"):
            end = next((j for j in range(i + 1, len(lines)) if lines[j].startswith("```")), len(lines))
            out.append("<pre><code>" + escape("\n".join(lines[i + 1:end])) + "</code></pre>")
            i = end + 1
        elif match := re.match(r"(#+)\s+(.*)", line):
            level = min(len(match.group(1)) + 1, 5)
            out.append(f"<h{level}>{inline(match.group(2))}</h{level}>")
            i += 1
        elif re.match(r"\s*([-*]|\d+\.)\s+", line):
            tag, items = ("ol" if re.match(r"\s*\d", line) else "ul"), []
            while i < len(lines) and lines[i].strip():
                if match := re.match(r"\s*(?:[-*]|\d+\.)\s+(.*)", lines[i]):
                    items.append(match.group(1))
                else:
                    items[-1] += " " + lines[i].strip()
                i += 1
            out.append(f"<{tag}>" + "".join(f"<li>{inline(item)}</li>" for item in items) + f"</{tag}>")
        elif line.startswith("|"):
            rows = []
            while i < len(lines) and lines[i].startswith("|"):
                rows.append([cell.strip() for cell in lines[i].strip().strip("|").split("|")])
                i += 1
            rows = [r for r in rows if not all(re.fullmatch(r":?-+:?", cell) for cell in r)]
            out.append(table(rows[0], rows[1:], inline))
        elif not line.strip() or line.startswith("<!--"):
            i += 1
        else:
            paragraph = []
            while i < len(lines) and lines[i].strip() and not re.match(r"```|#|\||\s*[-*]\s", lines[i]):
                paragraph.append(lines[i].strip())
                i += 1
            out.append(f"<p>{inline(' '.join(paragraph))}</p>" if paragraph else "")
            i += not paragraph
    return "\n".join(out)


# ---- parts of the page

def is_number(text):
    return re.fullmatch(r"[-+]?[\d,]*\.?\d+([eE][-+]?\d+)?(\s*±\s*[\d.]+)?\s*(%|x|ms|us|s|kB|MB|GB|B|GFLOP/s|GB/s)?", text.strip()) is not None


def short_number(text):
    """Four digits are enough for a table; integers stay as they are."""
    if re.fullmatch(r"[-+]?\d+\.\d{4,}(e[-+]?\d+)?", text.strip()):
        return f"{float(text):.4g}"
    return text


def spread_joined(head, rows):
    """A column named spread becomes part of the one before it: 0.99 ± 0.02."""
    for c in reversed([c for c in range(1, len(head)) if head[c] == "spread"]):
        head = head[:c] + head[c + 1:]
        for i, r in enumerate(rows):
            value, spread = (f"{float(v):.3f}" for v in r[c - 1:c + 1])
            rows[i] = [*r[:c - 1], f"{value} ± {spread}", *r[c + 1:]]
    return head, rows


def table(head, rows, render=escape):
    numeric = [bool(rows) and all(c >= len(r) or not r[c] or is_number(r[c]) for r in rows) for c in range(len(head))]

    def row(cells, tag):
        return "<tr>" + "".join(
            f'<{tag}{" class=number" if c < len(numeric) and numeric[c] else ""}>{render(short_number(cell))}</{tag}>'
            for c, cell in enumerate(cells)) + "</tr>"

    return ('<div class="scroll"><table>' + row(head, "th") + "".join(row(r, "td") for r in rows) + "</table></div>")


def csv_part(path, folder):
    """results.csv and other short files are shown whole; long ones, which are curves, fold and show their two ends."""
    name = words(path.relative_to(folder).with_suffix("").as_posix())
    with open(path, newline="", encoding="utf-8") as file:
        rows = [r for r in csv.reader(file) if r]
    if len(rows) < 2:
        return ""
    head, rows = rows[0], rows[1:]
    head, rows = spread_joined([words(cell) for cell in head], rows)
    if path.stem != "results" and len(rows) > MAX_TABLE_ROWS / 2:
        shown = rows[:5] + [["..."] * len(head)] + rows[-5:]
        return f"<details><summary>{escape(name)}: {len(rows)} rows</summary>{table(head, shown)}</details>"
    return f"<h3>{escape(name.capitalize())}</h3>" + table(head, rows[:MAX_TABLE_ROWS])


def png_size(path):
    with open(path, "rb") as file:
        start = file.read(24)
    return struct.unpack(">II", start[16:24]) if start[:8] == b"\x89PNG\r\n\x1a\n" else (0, 0)


def captions_of(text):
    """File name -> what it is, from the tables of a README whose rows are | `name`, `name` | what |."""
    captions = {}
    for names, what in re.findall(r"^\|([^|]*`[^|]*)\|([^|]*)\|$", text, re.MULTILINE):
        files = re.findall(r"`([^`]+)`", names)
        if len(files) == 1:  # what is said of several is no caption
            captions[files[0]] = what.strip()
    return captions


def picture(path, folder, out, captions):
    css, figure = "", ""
    part = "" if path.parent == folder else words(path.parent.relative_to(folder).as_posix()) + ": "
    if path.suffix == ".png":
        width, height = png_size(path)
        css = ' class="pixels"' if width < PIXEL_ART_WIDTH else ""
        figure = ' class="wide"' if height and width > 2.2 * height else ""
    source = path.relative_to(out).as_posix()
    name = escape(words(path.stem))
    return (f'<figure{figure}><a href="{escape(source)}"><img{css} src="{escape(source)}" alt="{name}" loading="lazy"></a>'
            f"<figcaption>{inline(part + captions.get(path.name, words(path.stem)))}</figcaption></figure>")


def commands_of(log, name):
    """An example's log has the commands that made it."""
    return re.findall(r"^\$ (.+)$", log, re.MULTILINE) or [f"build/demo/examples/{name}"]


def plain_log(text):
    """What a terminal would still show: progress that was drawn over is gone, and so are colours."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    return "\n".join(line.rstrip("\r").rsplit("\r", 1)[-1] for line in text.split("\n"))


def example_part(folder, out):
    name = folder.name
    readme = ROOT / "examples" / name / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.exists() else ""
    title = words(name)
    if match := re.match(r"#\s+(.*)\n", text):
        title, text = match.group(1), text[match.end():]
    lead, _, rest = text.strip().partition("\n## ")
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    pictures = sorted((p for p in files if p.suffix in (".png", ".svg")), key=lambda p: (p.parent, p.suffix, p.name))
    tables = sorted((p for p in files if p.suffix == ".csv"), key=lambda p: (p.parent, p.stem != "results", p.name))
    others = [p for p in files if p not in pictures and p not in tables and p.name != "log.txt"]
    log_path = folder / "log.txt"
    log = plain_log(log_path.read_text(encoding="utf-8", errors="replace")) if log_path.exists() else ""

    parts = [f'<section id="{escape(name)}"><h2>{inline(title)}</h2>', f'<div class="said">{markdown(lead)}</div>']
    if pictures:
        parts.append('<div class="pictures">' + "".join(picture(p, folder, out, captions_of(text)) for p in pictures) + "</div>")
    parts += [csv_part(p, folder) for p in tables]
    parts.append(f"<h3>Run it again</h3><pre><code>{escape(chr(10).join(commands_of(log, name)))}</code></pre>")
    if rest:
        parts.append(f'<details><summary>What it does, and what it does not claim</summary><div class="said">'
                     f"{markdown('## ' + rest)}</div></details>")
    if log:
        parts.append(f"<details><summary>What it printed</summary><pre>{escape(log.strip())}</pre></details>")
    if others:
        links = ", ".join(f'<a href="{escape(p.relative_to(out).as_posix())}">{escape(p.relative_to(folder).as_posix())}</a>'
                          f" ({size_text(p.stat().st_size)})" for p in others)
        parts.append(f'<p class="files">Files: {links}</p>')
    parts.append("</section>")
    return title, name, "\n".join(p for p in parts if p)


def benchmark_rows(folder):
    """(name, dtype, shape, threads, by) -> counters, from names of the form name/dtype/shape/t<threads>/by."""
    rows = {}
    for path in sorted(folder.glob("*.json")):
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            continue
        for entry in data.get("benchmarks", []):
            fields = re.sub(r"/(real_time|repeats:\d+|min_time:[\d.]+)", "", entry["name"]).split("/")
            if entry.get("run_type") == "aggregate" or len(fields) != 5 or "real_time" not in entry:
                continue
            key = tuple(fields)
            if key not in rows or entry["real_time"] < rows[key]["real_time"]:
                rows[key] = entry
    return rows


def benchmark_cases(folder):
    """One (case, type, shape, threads, seconds, rate, share of the ceiling or None) for each case of mlkit's: arithmetic beside the
    multiply-add peak, what only moves memory beside the loop over memory of the nearest footprint."""
    rows = benchmark_rows(folder)
    seconds = {key: entry["real_time"] * {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1}[entry["time_unit"]] for key, entry in rows.items()}
    peaks, loops = {}, {}
    for key, entry in rows.items():
        case, dtype, _, threads, by = key
        if by == "ceiling" and case == "peak":
            peaks[dtype, threads] = entry["flop"] / seconds[key]
        elif by == "ceiling":
            loops.setdefault((case, threads), []).append((entry["bytes"], entry["bytes"] / seconds[key]))
    cases = []
    for key, entry in rows.items():
        name, dtype, shape, threads, by = key
        if by != "mlkit":
            continue
        amount, unit, ceiling = entry.get("flop", 0), "GFLOP/s", peaks.get((dtype, threads))
        if not amount:
            amount, unit = entry.get("bytes", 0), "GB/s"
            near = loops.get(("triad" if entry.get("written") else "read", threads), [])
            ceiling = min(near, key=lambda loop: abs(math.log(loop[0] / amount)))[1] if near and amount else None
        rate = amount / seconds[key]
        cases.append((name, dtype, shape, threads[1:], seconds[key], f"{rate / 1e9:.0f} {unit}" if amount else "",
                      min(rate / ceiling, 1) if ceiling else None))
    return cases


def time_text(seconds):
    return f"{seconds * 1e6:.0f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def benchmark_text(folder):
    lines = [f"{'case':20}{'type':6}{'shape':20}{'threads':>8}{'time':>11}{'rate':>13}{'of the ceiling':>16}"]
    for name, dtype, shape, threads, seconds, rate, share in benchmark_cases(folder):
        of_ceiling = f"{100 * share:.0f} %" if share else ""
        lines.append(f"{name:20}{dtype:6}{shape:20}{threads:>8}{time_text(seconds):>11}{rate:>13}{of_ceiling:>16}")
    return "\n".join(lines)


def benchmark_part(folder):
    cases = benchmark_cases(folder)
    if not cases:
        return None
    parts = ['<section id="benchmark"><h2>A short benchmark of this machine</h2><div class="said"><p>Each case beside what '
             "this machine can do, multiply-adds or bytes moved, measured in the same run. <code>./benchmark</code> measures every family in full, "
             "against other libraries.</p></div>", '<div class="scroll"><table><tr><th>case</th><th>type</th><th>shape</th>'
             '<th class=number>threads</th><th class=number>time</th><th class=number>rate</th><th>of the ceiling</th></tr>']
    for name, dtype, shape, threads, seconds, rate, share in cases:
        bar = f'<span class="bar"><i style="width:{100 * share:.0f}%"></i></span>{100 * share:.0f} %' if share else ""
        parts.append(f"<tr><td>{escape(name)}</td><td>{escape(dtype)}</td><td>{escape(shape)}</td><td class=number>"
                     f"{escape(threads)}</td><td class=number>{time_text(seconds)}</td><td class=number>{rate}</td>"
                     f"<td>{bar}</td></tr>")
    parts.append("</table></div><h3>Run it again</h3><pre><code>./benchmark</code></pre></section>")
    return "\n".join(parts)


def machine():
    model, flags = platform.machine(), ""
    try:
        for line in open("/proc/cpuinfo", encoding="utf-8"):
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip() == "flags":
                flags = value
                break
    except OSError:
        pass
    sets = [name for name, flag in (("AVX2", " avx2 "), ("AVX-512", " avx512f "), ("AVX-512 BF16", " avx512_bf16 "),
                                ("AMX", " amx_bf16 "))
            if flag in flags + " "]
    return f"{model}, {os.cpu_count()} threads" + (f", {sets[-1]}" if sets else "")


def main():
    if len(sys.argv) == 3 and sys.argv[1] == "--benchmark":
        print(benchmark_text(pathlib.Path(sys.argv[2])))
        return
    out = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "out").resolve()
    out.mkdir(parents=True, exist_ok=True)
    parts = [example_part(f, out) for f in sorted(out.iterdir()) if f.is_dir() and f.name != "benchmark"]
    bench = benchmark_part(out / "benchmark") if (out / "benchmark").is_dir() else None
    links = "".join(f'<a href="#{escape(name)}">{inline(title)}</a>' for title, name, _ in parts)
    if bench:
        links += '<a href="#benchmark">Benchmark</a>'
    made = datetime.datetime.now().strftime("%Y-%m-%d %H:%M")
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>mlkit: what the examples made</title><style>{STYLE}</style></head>
<body><header><div><h1>mlkit</h1>
<p>What the examples made on this machine, with the numbers that they measured and the commands that repeat them.</p>
<p>{escape(machine())} &middot; {made}</p><nav>{links}</nav></div></header>
<main>{"".join(part for _, _, part in parts)}{bench or ""}
<footer>Everything on this page was written by <code>./demo</code>; each section names its own command.</footer></main>
</body></html>
"""
    path = out / "index.html"
    path.write_text(page, encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()

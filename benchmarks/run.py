"""Measure, print, and write the results into benchmarks/README.md between its marker comments.

python benchmarks/run.py                everything
python benchmarks/run.py speed edges    some of: speed, accuracy, edges, memory, published, ranks
python benchmarks/run.py --quick        seconds, a smoke test: prints, writes nothing, skips what is not installed
"""

import argparse
import importlib
import json
import os
import platform
import time
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
HERE = Path(__file__).resolve().parent
PAGE = HERE / "README.md"
SECTIONS = ("speed", "accuracy", "edges", "memory", "published", "ranks")
LIBRARIES = ("torch", "accelerate", "lightning", "transformers")


def processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def provenance(section: str) -> dict[str, object]:
    versions = {"Python": platform.python_version()}
    for library in LIBRARIES:
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            versions[library] = "not installed"
    return {
        "date": date.today().isoformat(),
        "machine": f"{processor()}, {os.cpu_count()} cores, {platform.system()}",
        "versions": versions,
        "command": f"python benchmarks/run.py {section}",
    }


def write(section: str, table: str, source: dict[str, object]) -> None:
    begin, end = f"<!-- {section}: begin -->", f"<!-- {section}: end -->"
    text = PAGE.read_text(encoding="utf-8")
    if text.count(begin) != 1 or text.count(end) != 1:
        raise SystemExit(f"{PAGE.name} must hold the markers {begin} and {end} once each.")
    versions = ", ".join(f"{name} {number}" for name, number in source["versions"].items())
    note = f"Measured {source['date']} by `{source['command']}`: {source['machine']}; {versions}."
    before, after = text.partition(begin)[0], text.partition(end)[2]
    PAGE.write_text(f"{before}{begin}\n{note}\n\n{table}\n{end}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []], metavar="section", help=", ".join(SECTIONS))
    parser.add_argument("--quick", action="store_true", help="seconds; prints, and writes nothing")
    arguments = parser.parse_args()
    for section in arguments.sections or SECTIONS:
        start = time.perf_counter()
        source = provenance(section)
        torch.set_num_threads(1)  # one order of additions in every run, and no waiting for a busy core
        result = importlib.import_module(section).run(arguments.quick)
        table, rows = result if isinstance(result, tuple) else (result, None)
        if arguments.quick:
            table += "\n\n(--quick: a smoke test, its figures mean nothing)"
        print(f"\n## {section}\n\n{table}\n\n({time.perf_counter() - start:.0f} s)")
        if not arguments.quick:
            write(section, table, source)
            if rows is not None:
                listed = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows.pop("rows"))
                text = (
                    json.dumps({"provenance": source, **rows}, ensure_ascii=False)[:-1] + f', "rows": [\n{listed}\n]}}'
                )
                # In the module, where lesson 5 finds it also if the notebook was opened alone.
                (HERE.parent / "gradaccum" / f"{section}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Judge pyprune.shrink on public architectures, and write the table of the documentation.

Half of the units of every group go, at random. Each model has a process of its own; what was judged is not judged
again, unless --again or --only says so.
"""

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

from zoo.children import FAMILIES, judge_in_child, server
from zoo.report import page, summary

ROOT = Path(__file__).parent.parent.parent


def names() -> list[str]:
    """Return all models, as family/name; a family whose library is missing is said and left out."""
    found = []
    for family, module in FAMILIES.items():
        try:
            found += [f"{family}/{key}" for key in importlib.import_module(module).CASES]
        except ImportError as error:
            print(f"{family}: left out ({error})")
    return found


def verdict(seen: dict[str, Any]) -> str:
    if "missing" in seen or "failed" in seen:
        return seen.get("missing") or seen["failed"]
    faults = [
        key for key in ("equal", "trains", "export", "rebuilt", "rebuilt_elsewhere") if seen.get(key) is not True
    ]
    faults += ["tokens"] if seen.get("tokens", True) is not True else []
    held = f", held: {len(seen['held'])}" if seen["held"] else ""
    return f"{seen['left']:.2f} left, error {seen['error']:.1e}{held}" + "".join(f", NOT {one}" for one in faults)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="zoo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="models, or families, to judge anew")
    parser.add_argument("--again", action="store_true", help="judge all anew")
    parser.add_argument("--seconds", type=float, default=300, help="a model gets at most (default: %(default)s)")
    parser.add_argument(
        "--memory", type=float, default=8, help="GiB that a model gets at most (default: %(default)s)"
    )
    parser.add_argument("--results", type=Path, default=ROOT / "build" / "zoo", help="folder of the answers")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "zoo.md", help="table to write")
    options = parser.parse_args(words)

    context, results = server(), {}
    for name in names():
        folder = options.results / name
        result = folder / "result.json"
        asked = options.only and any(one in (name, *name.split("/")) for one in options.only)
        if asked or options.again or not (options.only or result.exists()):
            seen = judge_in_child(context, name, folder, limit_s=options.seconds, limit_gib=options.memory)
            result.write_text(json.dumps(seen, indent=1))
            print(f"{name:40s} {verdict(seen)}", flush=True)
        if result.exists():
            results[name] = json.loads(result.read_text())
    if options.only:
        return
    options.page.write_text(page(results))
    print(summary(results))
    print(f"==> {options.page}")


if __name__ == "__main__":
    main()

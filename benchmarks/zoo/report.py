"""The page of the zoo: how it was judged, the bars, a row per model."""

import platform
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from typing import Any

PUBLIC = ("by_hand", "torchvision", "timm", "transformers")
LIBRARIES = (
    "torch",
    "torchvision",
    "timm",
    "transformers",
    "torch_geometric",
    "segmentation-models-pytorch",
    "monai",
    "diffusers",
    "open_clip_torch",
    "vit-pytorch",
    "x-transformers",
    "pytorch-tabnet",
)
TEXT = """\
# Which architectures shrink

`make zoo` writes this page. It takes models that others wrote, removes half of every group of channels, heads and
hidden units that {coupled} finds, and looks whether what is left is still the same model.

| bar | | to reach |
|---|---|---|
{bars}

How each model is judged:

1. It is built with random weights, as small as its configuration allows, and its weights are *shaken*: no
   weight, layer scale or statistic is zero or one, activations neither grow nor vanish, so that no removal
   looks exact by accident. AdamW does one step, so that it has state.
2. Half of the units of each group, drawn at random, get zeros in all their slices, of parameters and buffers;
   running statistics stay. What the model then computes in eval mode is the reference.
3. `pyprune.shrink(model, examples, optimizer=optimizer)`. **Equal** means that all outputs differ from the
   reference by less than 1e-4 of their largest value, on the examples and on others that shrink has not seen.
   **Left** is the share of the parameters.
4. It **trains**: a step of the same AdamW, whose state has the new shapes. It **exports**: `torch.export`, and
   what comes out computes the same. It is **rebuilt** by `pyprune.rebuild` from a fresh model and the JSON of
   the plan, and after `load_state_dict` has the same bits, in the same process and in a fresh one. Decoders
   write eight **tokens** greedily, with their cache, as the masked model does.
5. **Held** counts the kinds of groups that stay because something in the model cannot follow; they are named
   below. *Groups* counts those of which half was asked for, and all that were found.

Times are those of one process with one thread on a shared machine, in milliseconds: one forward pass, the trace, and
all of shrink with its verification.
"""
TITLES = {
    "by_hand": "Written by hand",
    "torchvision": "torchvision",
    "timm": "timm",
    "transformers": "transformers, small random configurations",
    "torch_geometric": "torch_geometric",
    "unknown": "Architectures that the rules were not written for",
}
HEAD = """\
| model | parameters | left | error | groups | held | trains | exports | rebuilt | tokens | forward | trace | shrink |
|---|---|---|---|---|---|---|---|---|---|---|---|---|"""


def ran(seen: dict[str, Any]) -> bool:
    return "error" in seen


def good(seen: dict[str, Any]) -> bool:
    """Whether it runs, is equal, trains and exports (if the dense model does)."""
    exports = seen.get("export") is True or seen.get("dense_export", True) is not True
    return ran(seen) and bool(seen["equal"]) and seen["trains"] is True and exports


def whole(seen: dict[str, Any]) -> bool:
    """Whether all went that was to go."""
    return ran(seen) and not seen["held"] and not seen["kept"]


def family(results: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: seen for name, seen in results.items() if name.partition("/")[0] in names and "missing" not in seen}


def bars(results: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return what was reached, as triples of text."""
    rows = []
    for title, names, share in (("public", PUBLIC, 88 / 93), ("unknown", ("unknown",), 88 / 93)):
        part = family(results, *names)
        if not part:
            continue
        total, shrunk = len(part), [seen for seen in part.values() if ran(seen)]
        wrong = sum(not seen["equal"] for seen in shrunk)
        rows += [
            (
                f"{title}: run, equal, train, export",
                f"{sum(map(good, part.values()))} of {total}",
                f">= {share * total:.0f}",
            ),
            (
                f"{title}: with no held group",
                f"{sum(good(seen) and whole(seen) for seen in part.values())} of {total}",
                f">= {80 / 93 * total:.0f}",
            ),
            (f"{title}: wrong outputs", str(wrong), "0"),
        ]
        if shrunk:
            share_left = median(seen["left"] for seen in shrunk)
            rows.append((f"{title}: parameters left, median", f"{share_left:.2f}", "<= 0.45"))
    graphs = family(results, "torch_geometric")
    halved = sum(good(seen) and seen["left"] <= 0.5 for seen in graphs.values())
    rows.append(("torch_geometric: equal, at most half left", f"{halved} of {len(graphs)}", f"{len(graphs)}"))
    shrunk = [seen for seen in family(results, *TITLES).values() if ran(seen)]
    same = sum(seen.get("rebuilt") is True and seen.get("rebuilt_elsewhere") is True for seen in shrunk)
    rows.append(("rebuilt in a fresh process, the same bits", f"{same} of {len(shrunk)}", f"{len(shrunk)}"))
    decoders = [seen for seen in family(results, "transformers").values() if "tokens" in seen]
    written = sum(seen["tokens"] is True for seen in decoders)
    rows.append(("decoders with a cache: the same tokens", f"{written} of {len(decoders)}", f"{len(decoders)}"))
    quick = sum(seen["trace_s"] <= 4 * seen["forward_s"] + seen["operations"] / 1000 for seen in shrunk)
    rows.append(("traced in 4 forwards + 0.1 s per 100 operations", f"{quick} of {len(shrunk)}", f"{len(shrunk)}"))
    return rows


def summary(results: dict[str, Any]) -> str:
    return "\n".join(f"{what:50s} {got:12s} {bar}" for what, got, bar in bars(results))


def row(name: str, seen: dict[str, Any]) -> str:
    """Return one line of the table."""
    key = name.partition("/")[2]
    if "failed" in seen:
        return f"| {key} | {cell(seen['failed'])} " + "| " * 11 + "|"
    rebuilt = seen["rebuilt"] is True and seen.get("rebuilt_elsewhere") is True
    exports = (
        "yes" if seen["export"] is True else "no; dense neither" if seen.get("dense_export") is not True else "no"
    )
    error = f"{seen['error']:.0e}" if seen["equal"] else f"**{seen['error']:.0e}**"
    cells = [
        key,
        f"{seen['parameters']:,}",
        f"{seen['left']:.2f}",
        error,
        f"{seen['exact']} of {seen['groups']}",
        str(len(seen["held"]) or ""),
        "yes" if seen["trains"] is True else "no",
        exports,
        "yes" if rebuilt else "no",
        {True: "same", None: ""}.get(seen.get("tokens"), "no"),
        *(f"{1e3 * seen[f'{what}_s']:.0f}" for what in ("forward", "trace", "shrink")),
    ]
    return "| " + " | ".join(cells) + " |"


def cell(text: str, longest: int = 300) -> str:
    """Return a text that is one cell of a table."""
    line = " ".join(text.replace("|", "\\|").split())
    return line if len(line) <= longest else line[: longest - 3] + "..."


def page(results: dict[str, Any]) -> str:
    """Return the page as Markdown."""
    table = "\n".join(f"| {what} | {got} | {bar} |" for what, got, bar in bars(results))
    text = [TEXT.format(bars=table, coupled="{func}`pyprune.coupled_groups`")]
    for key, title in TITLES.items():
        part = {name: seen for name, seen in results.items() if name.startswith(f"{key}/")}
        missing = [name.partition("/")[2] for name, seen in part.items() if "missing" in seen]
        lines = [row(name, seen) for name, seen in part.items() if "missing" not in seen]
        if lines:
            text.append("\n".join((f"## {title}\n", HEAD, *lines)) + "\n")
        if missing:
            text.append(f"Not installed here: {', '.join(missing)}.\n")
    notes = []
    for name, seen in results.items():
        notes += [f"- {name}: {cell(reason)}" for reason in seen.get("held", [])]
        if "kept" in seen and seen["kept"] and not seen["held"]:
            reasons = seen["reasons"] or ["and nothing is said about it"]
            notes.append(f"- {name}: {len(seen['kept'])} tensors keep what was zero: {cell('; '.join(reasons))}")
        notes += [f"- {name}: a size was guessed by its value: {cell(one)}" for one in seen.get("guessed", [])]
    text.append("## What is held, and what was guessed\n\n" + ("\n".join(notes) or "Nothing.") + "\n")
    text.append(f"Python {platform.python_version()}, {', '.join(installed())}.\n")
    return "\n".join(text)


def installed() -> list[str]:
    found = []
    for library in LIBRARIES:
        try:
            found.append(f"{library} {version(library)}")
        except PackageNotFoundError:
            continue
    return found

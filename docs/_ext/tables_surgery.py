"""Tables of the methods of surgery and of the trunks, from their registries."""

from __future__ import annotations

import inspect
import re
import sys
from dataclasses import fields

from md import code, plain, table
from tables_speed import read

from mtrl.config.registry import METHODS, TRUNKS
from mtrl.nets.trunks import Trunk
from mtrl.surgery import Surgery

PAGES = {
    "none": "index",
    "pcgrad": "pcgrad",
    "rotograd": "rotograd",
    "rotograd-scale": "rotograd",
    "rotograd-rotate": "rotograd",
    "cagrad": "min_norm",
    "mgda": "min_norm",
    "imtl-g": "balancing",
    "aligned-mtl": "balancing",
    "fairgrad": "balancing",
    "gradnorm": "loss_weights",
    "famo": "loss_weights",
}
"""The page that explains a method."""

OPENREVIEW = re.compile(r"https://openreview\.net/forum\?id=\w+")
ARXIV = re.compile(r"arXiv:? (\d{4}\.\d{5})|\b(\d{4}\.\d{5})\b")
YEAR = re.compile(r"\(([^()]*? \d{4})")


def methods() -> str:
    """A row for each built-in method, in the order of the registry."""
    found = read("bench_update.json")
    ratios, memory = found["ratios"], found["MiB"]
    rows = []
    for name, accepted in METHODS.options.items():
        make: type[Surgery] = METHODS.classes[name]
        parameters = inspect.signature(make).parameters.values()
        options = [f"`{p.name}={p.default!r}`" for p in parameters if p.name in accepted]
        ratio = [ratios.get(f"{b}/{name}/none", 1.0) for b in ("mt10", "mt50")]
        more = [memory[f"{b}/{name}"] for b in ("mt10", "mt50")]
        rows.append(
            [
                f"[`{name}`]({PAGES[name]}.md)",
                _summary(make),
                _paper(make),
                ", ".join(options),
                " / ".join(f"{r:.2f}" for r in ratio),
                " / ".join(f"{m:.0f}" for m in more) + " MiB" if more[0] >= 1 else "",
            ]
        )
    header = ["Method", "What it does", "Paper", "Options", "Time ÷ `none`", "Extra memory"]
    return table(header, rows)


def trunks() -> str:
    """A row for each built-in trunk."""
    common = {field.name for field in fields(Trunk)}
    rows = []
    for name in TRUNKS.options:
        make: type[Trunk] = TRUNKS.classes[name]
        options = [
            f"`{field.name}`" + ("" if field.default is None else f" = {code(field.default)}")
            for field in fields(make)
            if field.name not in common
        ]
        rows.append([f"`{name}`", _summary(make), _paper(make), ", ".join(options)])
    return table(["Trunk", "What it is", "Paper", "Options"], rows)


def _summary(make: type) -> str:
    """The first sentence of a class's docstring, without its citation."""
    first = (make.__doc__ or "").strip().split("\n\n")[0]
    first = re.sub(r"\s+", " ", first).removeprefix("Algorithm 1: ")
    first = re.sub(r" ?\([^()]*(?:arXiv|\d{4})[^()]*\)", "", first).replace(" see `RotoGrad`", "")
    return plain(first[:1].upper() + first[1:].rstrip(";.:")).replace("\\`", "`")


def _paper(make: type) -> str:
    """A link to the paper that the docstring of the class, or of its module, cites."""
    for text in (make.__doc__ or "", sys.modules[make.__module__].__doc__ or ""):
        text = re.sub(r"\s+", " ", text)
        year = YEAR.search(text)
        label = (year.group(1) if year else "paper").split(";")[-1].strip()
        if arxiv := ARXIV.search(text):
            return f"[{label}](https://arxiv.org/abs/{arxiv.group(1) or arxiv.group(2)})"
        if forum := OPENREVIEW.search(text):
            return f"[{label}]({forum.group()})"
    return ""

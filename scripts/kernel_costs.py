"""Write tests/kernel_costs.json, instructions per element of every kernel on sm_90, and the README's table of them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import triton

from genfast.cases import DTYPES
from genfast.offline import cost, every_launch

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "tests" / "kernel_costs.json"
START, END = "<!-- costs: written by scripts/kernel_costs.py -->\n", "<!-- /costs -->"
# Bytes that each element moves, in multiples of its size (uint8 images: plus one byte).
MOVES = {
    "reparameterize_kl": 3,
    "reparameterize_kl backward": 5,
    "kl_normal": 4,
    "kl_normal backward": 8,
    "bernoulli_nll": 2,
    "bernoulli_nll backward": 3,
    "bernoulli_nll with gradient": 3,
}


def markdown(counted: dict[str, dict[str, float]], version: str) -> str:
    """The README's table: instructions per element, and per byte moved."""
    lines = [f"| kernel (triton {version}) | fp32 | per byte | bf16 | per byte |", "|---|---|---|---|---|"]
    for name, moves in MOVES.items():
        full, half = counted["fp32"][name], counted["bf16"][name]
        lines.append(f"| {name} | {full:.1f} | {full / (4 * moves):.1f} | {half:.1f} | {half / (2 * moves):.1f} |")
    return "\n".join(lines) + "\n"


def in_readme(table: str) -> str:
    """The README with that table in its place."""
    text = (ROOT / "README.md").read_text()
    head, rest = text.split(START)
    return head + START + table + END + rest.split(END, 1)[1]


def write(path: Path, text: str) -> None:
    draft = path.with_suffix(".tmp")
    draft.write_text(text)
    os.replace(draft, path)


def main() -> None:
    counted = {
        dtype: {name: round(cost(launch).instructions, 2) for name, (launch, _) in every_launch(value).items()}
        for dtype, value in DTYPES.items()
    }
    table = {"triton": triton.__version__, "instructions per element, sm_90": counted}
    write(TABLE, json.dumps(table, indent=2) + "\n")
    write(ROOT / "README.md", in_readme(markdown(counted, triton.__version__)))


if __name__ == "__main__":
    main()

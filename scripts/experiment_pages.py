"""Copy the pages of experiments into docs/experiments/, and list what they observed in docs/experiments.md.

    python scripts/experiment_pages.py experiments/kl-weight experiments/manifold
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from genfast._files import between_markers, replacing
from genfast.experiments import EXPERIMENTS

DOCS = Path(__file__).parents[1] / "docs"
START, END = "<!-- written by scripts/experiment_pages.py -->\n", "<!-- end -->"
# What a page is; runs and checkpoints stay where they are.
_PATTERNS = ("README.md", "results.json", "*.csv", "*.png", "*.gif", "*.mp4")
_MADE_BY = ("Budget of training", "Device")


def copy_page(out: Path, docs: Path = DOCS) -> Path:
    """Copy the page of the experiment in `out`, in place of an older one; the folder that it is in then."""
    marker, results = out / "experiment.json", out / "results.json"
    if not (marker.is_file() and results.is_file()):
        raise SystemExit(f"error: {out}: expected the folder of a finished experiment")
    folder = docs / "experiments" / json.loads(marker.read_text())["experiment"]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for pattern in _PATTERNS:
        for path in out.glob(pattern):
            shutil.copyfile(path, folder / path.name)
    return folder


def index(docs: Path = DOCS) -> str:
    """What all pages observed, as Markdown, in the order of the command line."""
    parts = []
    for experiment in EXPERIMENTS.values():
        path = docs / "experiments" / experiment.name / "results.json"
        if not path.is_file():
            continue
        results = json.loads(path.read_text())
        lines = [f"### [{results['title']}](experiments/{experiment.name}/README.md)", "", results["question"], ""]
        lines += [f"- {statement}" for statement in results["statements"]]
        made = "; ".join(f"{results['facts'][name]}" for name in _MADE_BY if name in results["facts"])
        lines += ["", f"{results['facts']['Command']}: {made}.", ""]
        parts.append("\n".join(lines))
    return "\n" + "\n".join(parts) + "\n"


def write_index(docs: Path = DOCS) -> None:
    """Bring docs/experiments.md up to date."""
    page = docs / "experiments.md"
    with replacing(page) as temporary:
        temporary.write_text(between_markers(page.read_text(), START, index(docs), END))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", nargs="*", type=Path, help="folders that `genfast experiment` wrote")
    for out in parser.parse_args().out:
        print(copy_page(out))
    write_index()
    print(DOCS / "experiments.md")

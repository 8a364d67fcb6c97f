"""Draw docs/flow-dequantization.png: bits per dimension over the epochs of two runs of `genfast train flow`.

    for noise in uniform variational; do
        genfast train flow --dequantization $noise --image-size 14 --batch-size 64 --lr 2e-3 --epochs 30 --out $noise
    done
    python scripts/picture_of_dequantization.py uniform variational
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from genfast._files import replacing

TARGET = Path(__file__).parents[1] / "docs" / "flow-dequantization.png"


def main(folders: list[str]) -> None:
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for folder, colour in zip(folders, ("#8a94a6", "#2f7fd1"), strict=True):
        rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
        name = json.loads((Path(folder) / "run.json").read_text())["dequantization"]
        for key, style in (("test_bits_per_dim", "-"), ("bits_per_dim", ":")):
            own = [row for row in rows if key in row]
            label = f"{name}, {'test' if key.startswith('test') else 'train'}: {own[-1][key]:.3f}"
            axes.plot([row["epoch"] for row in own], [row[key] for row in own], style, color=colour, label=label)
    axes.set(xlabel="epoch", ylabel="bits per dimension")
    # The first epoch would leave no room for the rest.
    axes.set_ylim(top=sorted(line.get_ydata()[1] for line in axes.lines)[-1])
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(TARGET) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    print(TARGET)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    main(sys.argv[1:])

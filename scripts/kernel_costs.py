"""Write tests/kernel_costs.json: instructions per element of every kernel on sm_90, with the Triton installed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import triton

from genfast.cases import DTYPES
from genfast.offline import cost, every_launch

TABLE = Path(__file__).parents[1] / "tests" / "kernel_costs.json"


def main() -> None:
    counted = {
        dtype: {name: round(cost(launch).instructions, 2) for name, (launch, _) in every_launch(value).items()}
        for dtype, value in DTYPES.items()
    }
    text = json.dumps({"triton": triton.__version__, "instructions per element, sm_90": counted}, indent=2)
    draft = TABLE.with_suffix(".tmp")
    draft.write_text(text + "\n")
    os.replace(draft, TABLE)


if __name__ == "__main__":
    main()

"""The Python blocks of every page run, one after another, as a reader would run them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [page for page in sorted([*ROOT.glob("docs/*.md"), ROOT / "README.md"]) if "```python" in page.read_text()]
# A compiler's minute and a longer training would show nothing more.
SHORTER = {"model.compile()": 'model.compile(backend="eager")', "epochs=5": "epochs=1"}


def code_of(page):
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL))
    for text, shorter in SHORTER.items():
        code = code.replace(text, shorter)
    return code


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_blocks_run(page, tmp_path):
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", code_of(page)], cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_pages_are_found_and_their_blocks_too():
    expected = {
        "README.md", "diffusion.md", "flows.md", "gan.md", "metrics.md", "models.md", "noise.md", "reproducibility.md",
        "scaling.md", "schedules.md", "training.md",
    }  # fmt: skip
    assert {page.name for page in PAGES} >= expected
    assert all(code_of(page) for page in PAGES)

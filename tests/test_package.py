"""The package as such: light to import, without Triton too, and its examples run."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import genfast

ROOT = Path(__file__).parents[1]
MODULES = [
    module.name
    for module in pkgutil.walk_packages(genfast.__path__, "genfast.")
    if not module.name.endswith("__main__")
]


def _python(code: str, **environment: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "HOME": str(Path.home()), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_import_loads_nothing_that_is_not_needed_yet():
    loaded = _python(
        """
        import sys
        import torch
        before = set(sys.modules)
        import genfast
        print(*(set(sys.modules) - before))
        """
    ).split()
    assert all(name.startswith("genfast") or name == "importlib" for name in loaded), loaded


def test_ops_do_not_load_the_hub_or_torchvision():
    loaded = _python("import sys, genfast.functional; print(*sys.modules)").split()
    assert not {"torchvision", "huggingface_hub", "matplotlib", "rich", "typer"} & set(loaded)


def test_everything_works_without_triton():
    """A finder that hides Triton stands for a machine that lacks it."""
    printed = _python(
        """
        import sys
        from importlib.abc import MetaPathFinder

        class Hidden(MetaPathFinder):
            def find_spec(self, name, path=None, target=None):
                if name == "triton" or name.startswith("triton."):
                    raise ModuleNotFoundError(name, name=name)

        import importlib.util
        original = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *a: None if name.split(".")[0] == "triton" else original(name, *a)
        sys.meta_path.insert(0, Hidden())
        import torch
        import genfast
        parts = genfast.VAE().loss(torch.rand(2, 1, 28, 28))
        parts["loss"].backward()
        print(genfast.functional.explain_path("cuda")["kl_normal"])
        """
    )
    assert printed.strip() == "('reference', 'Triton is not installed')"


def test_the_reference_can_be_forced():
    printed = _python(
        "import genfast.functional as f; print(f.explain_path('cuda')['kl_normal'])", GENFAST_REFERENCE="1"
    )
    assert printed.strip() == "('reference', 'GENFAST_REFERENCE=1')"


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert results.failed == 0


def test_kernels_are_the_folder_at_the_top():
    assert (ROOT / "genfast" / "kernels").is_symlink()
    assert (ROOT / "genfast" / "kernels").resolve() == ROOT / "kernels"
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_every_op_has_a_file_in_every_room():
    for op in {module.split(".")[-1] for module in MODULES if module.startswith("genfast.reference.")}:
        if op.startswith("_"):
            continue
        for path in (
            f"kernels/{op}.py",
            f"genfast/functional/{op}.py",
            f"tests/functional/test_{op}.py",
            f"benchmarks/bench_{op}.py",
        ):
            assert (ROOT / path).is_file(), path

"""Experiments on few and small images, so that they take seconds."""

from __future__ import annotations

import json

import pytest

from genfast.experiments import Settings
from genfast.metrics import Estimate


class Few(Settings):
    """Every 25th of the bundled digits, at 8 x 8."""

    def load(self):
        splits = super().load()
        tensors = [tensor[::25].contiguous() for tensor in splits[1:]]
        return splits._replace(**dict(zip(splits._fields[1:], tensors, strict=True)))


def few(out, budget):
    return Few(out, budget=budget, image_size=8)


def about(value, half=0.1):
    return Estimate(value, value - half, value + half, 100)


def assert_whole_page(page, out, pictures):
    """The page is written with its statements, all its pictures, and its tables."""
    text = (out / "README.md").read_text()
    for picture in pictures:
        assert (out / picture).stat().st_size > 500
        assert f"({picture})" in text
    results = json.loads((out / "results.json").read_text(), parse_constant=pytest.fail)
    assert results["statements"] == page.statements
    assert page.statements
    assert all(table["rows"] for table in results["tables"].values())
    for name in results["tables"]:
        assert len((out / f"{name}.csv").read_text().splitlines()) == len(results["tables"][name]["rows"]) + 1

"""The page about metrics says what the code says."""

from pathlib import Path

from genfast.metrics import DEFINITIONS, classifier_record
from genfast.metrics.definitions import table

PAGE = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")


def test_the_page_has_every_definition():
    assert f"<!-- definitions -->\n{table()}<!-- end -->" in PAGE
    assert len(table().splitlines()) == 2 + len(DEFINITIONS)


def test_the_page_has_the_classifiers_accuracy():
    record = classifier_record()
    assert f"<!-- accuracy -->{record['test_accuracy']:.2%}<!-- end -->" in PAGE
    assert f"{record['parameters']:,} weights" in PAGE


def test_definitions_are_complete():
    for each in DEFINITIONS.values():
        assert each.title
        assert each.text.endswith(".")
        assert each.better in ("higher", "lower", "")

"""The pages in docs/: complete, small enough, and listed as they are."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs" / "experiments").glob("*/README.md"))


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("experiment_pages", ROOT / "scripts" / "experiment_pages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_index_is_what_the_pages_say(script):
    text = (ROOT / "docs" / "experiments.md").read_text()
    assert script.START + script.index() + script.END in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_pages_are_complete(page):
    text, results = page.read_text(), json.loads((page.parent / "results.json").read_text())
    assert all(f"- {statement}\n" in text for statement in results["statements"])
    links = re.findall(r"\]\(([^)]+)\)", text)
    linked = {link for link in links if "/" not in link}
    assert {*results["pictures"], *(f"{name}.csv" for name in results["tables"])} <= linked
    assert {path.name for path in page.parent.iterdir()} == {*linked, "README.md", "results.json"}


def test_pages_are_small():
    sizes = {path: path.stat().st_size for page in PAGES for path in page.parent.iterdir()}
    pictures = {path.name: size for path, size in sizes.items() if path.suffix == ".png"}
    assert all(size <= 160_000 for size in pictures.values()), pictures
    assert sum(sizes.values()) < 4e6


def made(folder, name, statement):
    folder.mkdir(parents=True)
    (folder / "experiment.json").write_text(json.dumps({"experiment": name}))
    results = {
        "title": name.title(), "question": "Why?", "statements": [statement], "tables": {}, "pictures": {},
        "facts": {"Command": "`genfast`", "Device": "cpu"},
    }  # fmt: skip
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "README.md").write_text(f"# {name.title()}\n")
    (folder / "curves.png").write_bytes(statement.encode())
    (folder / "runs").mkdir()
    return folder


def test_the_script_copies_and_lists(script, tmp_path):
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "experiments.md").write_text(f"before\n{script.START}earlier text\n{script.END}\nafter\n")
    for name, statement in (("manifold", "Flat."), ("kl-weight", "Heavy.")):
        script.copy_page(made(tmp_path / statement, name, statement), docs)
    script.write_index(docs)
    text = (docs / "experiments.md").read_text()
    assert text.startswith(f"before\n{script.START}")
    assert text.endswith(f"{script.END}\nafter\n")
    # In the order of the command line.
    assert text.index("- Heavy.") < text.index("- Flat.")
    assert "### [Manifold](experiments/manifold/README.md)\n\nWhy?\n\n- Flat.\n\n`genfast`: cpu.\n" in text
    assert "earlier text" not in text
    assert {path.name for path in (docs / "experiments" / "manifold").iterdir()} == {
        "README.md", "results.json", "curves.png",
    }  # fmt: skip
    # An older page goes, with what is no longer part of it.
    (docs / "experiments" / "manifold" / "gone.png").write_bytes(b"")
    script.copy_page(made(tmp_path / "again", "manifold", "Round."), docs)
    assert not (docs / "experiments" / "manifold" / "gone.png").exists()
    with pytest.raises(SystemExit, match="expected the folder of a finished experiment"):
        script.copy_page(tmp_path, docs)

"""Run by the environment that has only the wheel: imports, data and kernels come from it, not from the checkout."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import tempfile
from pathlib import Path


def main(checkout: Path) -> None:
    import genfast

    place = Path(genfast.__file__).resolve()
    if checkout.resolve() in place.parents:
        raise SystemExit(f"genfast came from the checkout: {place}")
    modules = ("kernels.philox", "kernels.reparameterize_kl", "reference", "functional", "models", "training.data")
    for name in (*modules, "metrics"):
        importlib.import_module(f"genfast.{name}")
    if importlib.util.find_spec("kernels") is not None and not Path("kernels").exists():
        raise SystemExit("the wheel installs a top-level package 'kernels'")
    for name in ("py.typed", *(f"data/{file.name}" for file in (checkout / "genfast" / "data").iterdir())):
        if not (place.parent / name).is_file():
            raise SystemExit(f"the wheel lacks {name}")
    splits = genfast.training.load_dataset("digits")
    images = splits.train
    print(f"wheel: {place.parent}, {tuple(images.shape)} digits, loss", genfast.VAE().loss(images[:8])["loss"].item())
    guesses = genfast.metrics.load_classifier()(splits.test).argmax(1)
    print("wheel: the classifier knows", int((guesses == splits.test_labels).sum()), "of", len(guesses), "test digits")
    print(f"wheel: a report of {check_report(place.parent / 'data'):,} bytes")


def check_report(data: Path) -> int:
    """Write a report of one run, and see that the wheel's style and script are in it; how large it is."""
    from genfast import html_report

    with tempfile.TemporaryDirectory() as folder:
        run, page = Path(folder) / "vae", Path(folder) / "report.html"
        run.mkdir()
        (run / "run.json").write_text('{"genfast": "1", "family": "vae", "data": "digits"}')
        html_report.write_report([run], page)
        text = page.read_text(encoding="utf-8")
    for name in ("report.css", "report.js"):
        if (data / name).read_text(encoding="utf-8") not in text:
            raise SystemExit(f"the report lacks {name}")
    return len(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

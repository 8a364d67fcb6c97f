"""An autoencoder and a VAE with the same networks and the same number of steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from genfast.experiments.base import Page, Paired, Settings, Trained, equal_epochs, number, train_run, versus
from genfast.experiments.figures import save_panels
from genfast.experiments.measures import are_digits, codes, drawn, headings, of_samples, squared_error
from genfast.metrics import DEFINITIONS, linear_probe, precision_recall
from genfast.metrics.classifier import load_classifier
from genfast.models.base import LatentImageModel
from genfast.training import Splits

_LATENT_DIM = 20
_NAMES = {"ae": "AE", "vae": "VAE"}
_SHOWN, _PAIRS_SHOWN, _STEPS = 48, 6, 10
_BATCH_SIZE = 512


def run(settings: Settings) -> Page:
    """Train both, sample both in two ways, interpolate the same pairs in both, and probe both codes."""
    splits = settings.load()
    build_options = {"latent_dim": _LATENT_DIM}
    epochs, few = equal_epochs(settings, "vae", splits=splits, seconds=settings.budget / 2, build_options=build_options)
    models = {
        name: train_run(
            settings, family, family, splits=few, epochs=epochs, evaluate_every=1, build_options=build_options
        )
        for family, name in _NAMES.items()
    }  # fmt: skip
    count = settings.reduced(10_000, least=500)
    by_model, by_samples, pictures = [], [], {}
    for name, trained in models.items():
        print(f"measuring the {name}", flush=True)
        model, parts = trained.model, codes(trained.model, few.train)
        mean, covariance = _gaussian_of(parts)
        for source, images in (
            ("N(0, I)", drawn(model, count, settings.seed)),
            ("a fitted Gaussian", _drawn_from(model, mean, covariance, count, settings.seed)),
        ):
            pictures[f"{name}: {source}"] = images[:_SHOWN]
            by_samples.append({"model": name, "codes from": source, **of_samples(images, splits)})
        by_model.append({
            "model": name, "squared_error": squared_error(model, splits.test),
            "mean": float(mean.norm()), "spread": float(covariance.diagonal().mean().sqrt()),
            "linear_probe": _probe(settings, parts[0], codes(model, splits.test)[0], few, splits),
            "seconds": trained.seconds,
        })  # fmt: skip
    save_panels(pictures, settings.out / "samples.png", columns=8, across=2)
    betweens = _interpolated(settings, models, splits)
    pixels = _probe(settings, few.train.flatten(1).float(), splits.test.flatten(1).float(), few, splits)
    return _page(settings, few, epochs, by_model, by_samples, betweens, pixels)


def _gaussian_of(parts: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the codes of all images; of a VAE, of draws from all posteriors."""
    code = parts[0].double()
    covariance = code.T.cov()
    if len(parts) == 2:
        covariance = covariance + parts[1].double().exp().mean(0).diag()
    return code.mean(0), covariance


def _drawn_from(model: LatentImageModel, mean: Tensor, covariance: Tensor, count: int, seed: int) -> Tensor:
    """Samples whose codes are from that Gaussian, uint8."""
    noise = torch.randn(count, len(mean), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    # A code may have dimensions that never change: no Cholesky factor.
    values, vectors = torch.linalg.eigh(covariance)
    z = (mean + noise * values.clamp(min=0).sqrt() @ vectors.T).float()
    with torch.no_grad():
        pieces = [model.decode(part.to(model.device)) for part in z.split(_BATCH_SIZE)]
    images = torch.cat([piece.reshape(-1, *model.image_shape) for piece in pieces])
    return (images.clamp(0, 1) * 255).round().to(torch.uint8).cpu()


def _probe(settings: Settings, train: Tensor, test: Tensor, few: Splits, splits: Splits) -> Any:
    if few.train_labels is None or splits.test_labels is None:
        return None
    count = settings.reduced(10_000, least=500)
    chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:count]
    return linear_probe(train[chosen], few.train_labels[chosen], test, splits.test_labels)


def _interpolated(settings: Settings, models: dict[str, Trained], splits: Splits) -> list[dict[str, Any]]:
    """Draw the same pairs in both models and in pixels; how sure the classifier is of what lies in the middle."""
    first, second = _pairs(settings, splits)
    x0, x1 = splits.test[first], splits.test[second]
    weights = torch.linspace(0, 1, _STEPS).view(1, -1, 1, 1, 1)
    few0, few1 = (x[:_PAIRS_SHOWN].unsqueeze(1) / 255 for x in (x0, x1))
    panels = {"pixels": torch.lerp(few0, few1, weights).flatten(0, 1)}
    middles = {"pixels": (x0 / 255 + x1 / 255) / 2}
    for name, trained in models.items():
        a, b = x0.to(settings.device), x1.to(settings.device)
        panels[name] = trained.model.interpolate(a[:_PAIRS_SHOWN], b[:_PAIRS_SHOWN], _STEPS).flatten(0, 1).cpu()
        middles[name] = trained.model.interpolate(a, b, 3)[:, 1].cpu()
    save_panels(panels, settings.out / "interpolation.png", columns=_STEPS)
    if not are_digits(splits):
        return []
    classifier = load_classifier()
    return [
        {
            "path": name, "confidence": Paired.of(classifier(images).double().softmax(1).amax(1), "pairs"),
            "precision": precision_recall(images, splits.test)["precision"],
        }
        for name, images in middles.items()
    ]  # fmt: skip


def _pairs(settings: Settings, splits: Splits) -> tuple[Tensor, Tensor]:
    """Rows of the test set, pairs of different labels where there are labels."""
    order = torch.randperm(len(splits.test), generator=torch.Generator().manual_seed(settings.seed))
    first, second = order[: len(order) // 2], order[len(order) // 2 : 2 * (len(order) // 2)]
    if splits.test_labels is not None:
        different = splits.test_labels[first] != splits.test_labels[second]
        first, second = first[different], second[different]
    count = settings.reduced(2000, least=100)
    return first[:count], second[:count]


def _page(
    settings: Settings, splits: Splits, epochs: int, by_model: list[dict[str, Any]], by_samples: list[dict[str, Any]],
    betweens: list[dict[str, Any]], pixels: Any,
) -> Page:  # fmt: skip
    page = Page(
        "Autoencoder and VAE",
        "What does the prior of a VAE add to an autoencoder with the same networks, and what does it cost?",
    )
    ae, vae = by_model
    page.section("What was observed")
    error = versus("the AE's", ae["squared_error"], "the VAE's", vae["squared_error"])
    page.say(f"Squared error of the reconstruction, per pixel: {error}.")
    page.say(
        f"The codes of the AE have a standard deviation of {ae['spread']:.2f} along a dimension and a mean at distance "
        f"{ae['mean']:.2f} from 0; draws from the VAE's posteriors have {vae['spread']:.2f} and {vae['mean']:.2f}. The "
        "prior N(0, I) has 1 and 0."
    )
    if by_samples[0]["frechet_distance"] is not None:
        for source in dict.fromkeys(row["codes from"] for row in by_samples):
            one, other = (row["frechet_distance"] for row in by_samples if row["codes from"] == source)
            page.say(f"Fréchet distance of samples with codes from {source}: {versus('AE', one, 'VAE', other)}.")
    if by_samples[0]["coverage"] is not None:
        words = ", ".join(f"{row['coverage'].value:.0f} ({row['model']}, {row['codes from']})" for row in by_samples)
        page.say(f"Digits that appear (at least 4% of the samples each): {words}.")
    if betweens:
        measured = {
            "precision": "the share within the manifold of the test images", "confidence": "the classifier's confidence"
        }  # fmt: skip
        for column, what in measured.items():
            values = {row["path"]: row[column] for row in betweens}
            page.say(
                f"Halfway between two test images of different digits, {what}: "
                f"{versus('AE', values['AE'], 'VAE', values['VAE'])}; the mean of the two in pixels has "
                f"{number(values['pixels'])}."
            )
    if pixels is not None:
        probes = versus("AE", ae["linear_probe"], "VAE", vae["linear_probe"])
        page.say(f"Accuracy of a linear probe on the codes: {probes}; on the pixels themselves {number(pixels)}.")
    page.section("Pictures")
    page.picture(settings.out / "samples.png", "Samples of both, with codes from the prior and from a fitted Gaussian.")
    page.picture(
        settings.out / "interpolation.png", "The same pairs of test images: straight lines in pixels and between codes."
    )
    page.section("Numbers")
    page.table(
        by_model,
        f"Both: mlp, 784-400-{_LATENT_DIM}, {epochs} epochs of {len(splits.train):,} images.",
        {
            "model": "model", "squared_error": "squared error", "mean": "distance of the mean code",
            "spread": "spread of the codes", **headings("linear_probe", "seconds"),
        },
        name="models",
    )  # fmt: skip
    page.table(
        by_samples,
        "Samples, the decoder's means.",
        {
            "model": "model", "codes from": "codes from",
            **headings(
                "frechet_distance", "precision", "recall", "coverage", "confidence", digits=are_digits(splits)
            ),
        },
        name="samples",
    )  # fmt: skip
    if betweens:
        columns = {"path": "line in", **headings("precision", "confidence")}
        page.table(betweens, "Middles of pairs of different digits.", columns, name="middles")
    page.text(
        "Both are trained on grey pixels with the cross-entropy of their reconstruction; the VAE has the KL (weight 1) "
        "beside it. No likelihood is compared, since an AE has none. The VAE's reconstructions and probes are of its "
        "mean code. An autoencoder's codes have a scale of their own, so its samples with codes from N(0, I) say as "
        "much about that scale as about holes between the codes; the fitted Gaussian takes both scale and correlations "
        "out of the comparison. The classifier can be sure of what is no digit: its confidence says little without the "
        f"precision. {DEFINITIONS['precision'].text} {DEFINITIONS['linear_probe'].text}"
    )
    return page

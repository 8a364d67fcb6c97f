"""What each number means: for tables, their headings and the documentation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["DEFINITIONS", "Definition", "table"]


@dataclass(frozen=True)
class Definition:
    """What a column of a table holds.

    Attributes:
        title: heading of the column.
        unit: of the numbers; empty where they have none.
        better: ``"higher"`` or ``"lower"``; empty where neither is.
        text: what it is, in a sentence or two.
        source: the paper it comes from; empty where there is none.

    Example:
        >>> DEFINITIONS["recall"].better
        'higher'
    """

    title: str
    unit: str
    better: Literal["higher", "lower", ""]
    text: str
    source: str = ""


_KYNKAANNIEMI = "Kynkäänniemi et al., NeurIPS 2019"
_HEUSEL = "Heusel et al., NeurIPS 2017"

DEFINITIONS: dict[str, Definition] = {
    "frechet_distance": Definition(
        "Fréchet distance", "", "lower",
        "Squared distance between the Gaussians that have the means and covariances of the digit classifier's 64 "
        "features of the samples and of the test images. No Inception FID; biased upwards, the more the fewer the "
        "images. The interval is over the samples.",
        _HEUSEL,
    ),
    "inception_fid": Definition(
        "FID", "", "lower",
        "The same distance on the 2,048 features of an Inception network trained on ImageNet. The interval is from 20 "
        "resamples.",
        _HEUSEL,
    ),
    "precision": Definition(
        "precision", "share", "higher",
        "Share of the samples that lie within the manifold of the test images: the balls around these, in the digit "
        "classifier's features, that reach to their third nearest neighbours. The interval takes the balls as given.",
        _KYNKAANNIEMI,
    ),
    "recall": Definition(
        "recall", "share", "higher",
        "Share of the test images that lie within the manifold of the samples.",
        _KYNKAANNIEMI,
    ),
    "coverage": Definition(
        "classes", "of 10", "higher",
        "Number of digits that the classifier finds in at least 4% of the samples each.",
    ),
    "entropy": Definition(
        "class entropy", "nats", "higher",
        "Entropy of the shares of the digits among the samples, by the classifier; log 10 = 2.303 if all are equal.",
    ),
    "smallest_share": Definition(
        "rarest class", "share", "higher", "Share of the rarest digit among the samples, by the classifier."
    ),
    "confidence": Definition(
        "confidence", "", "higher",
        "Mean probability that the classifier gives the digit which it takes a sample for.",
    ),
    "nearest_distance": Definition(
        "nearest training image", "", "",
        "Mean Euclidean distance, pixels in [0, 1], from a sample to the nearest training image.",
    ),
    "memorisation": Definition(
        "memorisation ratio", "", "",
        "That distance of the samples over that of the test images. It goes to 0 for copies of training images; "
        "blurred samples, which lie between many images, also have less than 1.",
    ),
    "elbo": Definition(
        "ELBO", "nats per image", "higher",
        "Evidence lower bound of log p(x) of the test images, from one draw each.",
        "Kingma and Welling, ICLR 2014",
    ),
    "iwae": Definition(
        "log p(x), importance-weighted", "nats per image", "higher",
        "Lower bound of log p(x) of the test images from several draws each, tighter than the ELBO.",
        "Burda et al., ICLR 2016",
    ),
    "bits_per_dim": Definition(
        "bits per dimension", "bits per dimension", "lower",
        "-log2 p(x) of the test images per pixel and channel, or an upper bound of it.",
    ),
    "linear_probe": Definition(
        "linear probe", "share", "higher",
        "Accuracy on the codes of test images of a logistic regression fitted to the codes of the training images.",
    ),
    "active_units": Definition(
        "active units", "", "",
        "Number of latent dimensions whose mean varies over the images with a variance above 0.01.",
        "Burda et al., ICLR 2016",
    ),
    "sampling_speed": Definition(
        "sampling", "images per second", "higher", "Images drawn per second of wall time; the interval is over calls."
    ),
    "parameters": Definition("parameters", "", "", "Numbers that training changes."),
    "seconds": Definition("training time", "seconds", "", "Wall time of training, without evaluations."),
}  # fmt: skip


def table() -> str:
    """All definitions as a table in Markdown: that of docs/metrics.md.

    Example:
        >>> print(table().splitlines()[0])
        | name | heading | unit | better | what it is |
    """
    rows = ["| name | heading | unit | better | what it is |", "| --- | --- | --- | --- | --- |"]
    for name, each in DEFINITIONS.items():
        source = f" ({each.source})" if each.source else ""
        rows.append(f"| `{name}` | {each.title} | {each.unit} | {each.better} | {each.text}{source} |")
    return "\n".join(rows) + "\n"

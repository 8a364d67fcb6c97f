"""How good samples, codes and densities are: each number with its sample size and an interval."""

from genfast.metrics.classes import class_coverage, class_shares, confidence
from genfast.metrics.classifier import DigitClassifier, classifier_record, load_classifier
from genfast.metrics.codes import active_units, linear_probe
from genfast.metrics.definitions import DEFINITIONS, Definition
from genfast.metrics.estimate import Estimate
from genfast.metrics.frechet import frechet_distance, inception_fid, load_inception
from genfast.metrics.likelihoods import Likelihood, comparable, likelihood
from genfast.metrics.models import are_digits, evaluate_model
from genfast.metrics.neighbours import memorisation, nearest_neighbour_distance, precision_recall
from genfast.metrics.samples import evaluate_samples
from genfast.metrics.speed import sampling_speed, timed_samples

__all__ = [
    "DEFINITIONS",
    "Definition",
    "DigitClassifier",
    "Estimate",
    "Likelihood",
    "active_units",
    "are_digits",
    "class_coverage",
    "class_shares",
    "classifier_record",
    "comparable",
    "confidence",
    "evaluate_model",
    "evaluate_samples",
    "frechet_distance",
    "inception_fid",
    "likelihood",
    "linear_probe",
    "load_classifier",
    "load_inception",
    "memorisation",
    "nearest_neighbour_distance",
    "precision_recall",
    "sampling_speed",
    "timed_samples",
]

"""Metrics of image generators, in float64, each with its mathematics and its protocol.

They take arrays and images and know nothing of networks, runs or data sources.
"""

from onefold.metrics.classifier import Classifier
from onefold.metrics.classifier_training import train_classifier
from onefold.metrics.features import FeatureExtractor, class_accuracy, digits_classifier, from_file
from onefold.metrics.frechet import Moments, frechet_distance, frechet_from_moments
from onefold.metrics.kid import kernel_distance
from onefold.metrics.memorisation import Memorisation, memorisation, nearest_distance
from onefold.metrics.precision_recall import precision_recall
from onefold.metrics.rank import effective_rank, spectrum
from onefold.metrics.reconstruction import image_psnr, image_ssim, psnr, ssim
from onefold.metrics.record import Protocol, Record, Subject, protocol_differences

__all__ = [
    "Classifier",
    "FeatureExtractor",
    "Memorisation",
    "Moments",
    "Protocol",
    "Record",
    "Subject",
    "class_accuracy",
    "digits_classifier",
    "effective_rank",
    "frechet_distance",
    "frechet_from_moments",
    "from_file",
    "image_psnr",
    "image_ssim",
    "kernel_distance",
    "memorisation",
    "nearest_distance",
    "precision_recall",
    "protocol_differences",
    "psnr",
    "spectrum",
    "ssim",
    "train_classifier",
]

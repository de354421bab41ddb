"""Evaluation: features, accuracy, token norms, always beside the float model of the same harness."""

from optimum_regcache.encoders.passes import encode, image_features
from optimum_regcache.evaluation.norms import TokenNorms, measure_token_norms
from optimum_regcache.evaluation.objective import AccuracyObjective, CosineObjective, Objective, make_objective
from optimum_regcache.evaluation.outliers import OutlierReport, measure_outliers

__all__ = [
    "AccuracyObjective",
    "CosineObjective",
    "Objective",
    "OutlierReport",
    "TokenNorms",
    "encode",
    "image_features",
    "make_objective",
    "measure_outliers",
    "measure_token_norms",
]

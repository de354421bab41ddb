"""Evaluation: features, accuracy, token norms, always beside the float model of the same harness."""

from optimum_regcache.encoders.passes import encode, image_features
from optimum_regcache.evaluation.dense import PatchCosineObjective
from optimum_regcache.evaluation.norms import TokenNorms, measure_token_norms
from optimum_regcache.evaluation.objective import AccuracyObjective, Bank, CosineObjective, Objective
from optimum_regcache.evaluation.outliers import OutlierReport, measure_outliers
from optimum_regcache.evaluation.registry import OBJECTIVES, make_objective
from optimum_regcache.evaluation.similarity import LogitObjective, NeighbourObjective, SimilarityObjective

__all__ = [
    "OBJECTIVES",
    "AccuracyObjective",
    "Bank",
    "CosineObjective",
    "LogitObjective",
    "NeighbourObjective",
    "Objective",
    "OutlierReport",
    "PatchCosineObjective",
    "SimilarityObjective",
    "TokenNorms",
    "encode",
    "image_features",
    "make_objective",
    "measure_outliers",
    "measure_token_norms",
]

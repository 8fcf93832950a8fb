"""Criteria: what the predictions of a batch cost.

A criterion is called with the detector, whose parts it uses, the predictions and the objects of each image, and returns
the losses by the names that the detector has for them (``loss_names``). One that learns something is a module.
Autocast is off around it.
"""

from dyhead.detection.criteria.autoassign import AutoAssignCriterion, SoftAssignment
from dyhead.detection.criteria.border import BorderCriterion, BorderWeights
from dyhead.detection.criteria.centers import CenterCriterion
from dyhead.detection.criteria.matches import Matches, class_cost, match, matched
from dyhead.detection.criteria.noisy_anchors import NoisyAnchorsCriterion
from dyhead.detection.criteria.paired import PairedCriterion
from dyhead.detection.criteria.quality import QualityCriterion
from dyhead.detection.criteria.standard import standard
from dyhead.detection.criteria.two_stage import TwoStage

__all__ = [
    "AutoAssignCriterion",
    "BorderCriterion",
    "BorderWeights",
    "CenterCriterion",
    "Matches",
    "NoisyAnchorsCriterion",
    "PairedCriterion",
    "QualityCriterion",
    "SoftAssignment",
    "TwoStage",
    "class_cost",
    "match",
    "matched",
    "standard",
]

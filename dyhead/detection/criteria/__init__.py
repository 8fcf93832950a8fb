"""Criteria: what the predictions of a batch cost.

A criterion is called with the detector, whose parts it uses, the predictions and the objects of each image, and returns
the losses by the names that the detector has for them (``loss_names``). One that learns something is a module.
Autocast is off around it.
"""

from dyhead.detection.criteria.autoassign import AutoAssignCriterion, SoftAssignment
from dyhead.detection.criteria.matches import Matches, match
from dyhead.detection.criteria.standard import standard

__all__ = ["AutoAssignCriterion", "Matches", "SoftAssignment", "match", "standard"]

"""Evaluation of a trained detector: COCO AP, speed, memory and size, as a table, as JSON and as images."""

from dyhead.evaluation.benchmark import Timing, count_flops, count_parameters, measure
from dyhead.evaluation.coco import coco_results, evaluate_coco
from dyhead.evaluation.report import Report, describe_machine, format_table, write_results
from dyhead.evaluation.visualization import draw_predictions, plot_losses

__all__ = [
    "Report",
    "Timing",
    "coco_results",
    "count_flops",
    "count_parameters",
    "describe_machine",
    "draw_predictions",
    "evaluate_coco",
    "format_table",
    "measure",
    "plot_losses",
    "write_results",
]

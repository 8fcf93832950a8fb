"""What a trained detector is judged by: COCO AP, speed, memory, size; as a table, as JSON and as pictures."""

from dyhead.evaluation.benchmark import Timing, count_flops, count_parameters, measure
from dyhead.evaluation.coco import evaluate_coco
from dyhead.evaluation.pictures import draw_predictions, plot_losses
from dyhead.evaluation.report import Report, describe_machine, format_table, write_results

__all__ = [
    "Report",
    "Timing",
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

"""How good are attribution scores? They are held against models that were really retrained. See docs/evaluation.md."""

from leaveout.evaluation.judge import EvaluationSettings, evaluate
from leaveout.evaluation.report import Report

__all__ = ["EvaluationSettings", "Report", "evaluate"]

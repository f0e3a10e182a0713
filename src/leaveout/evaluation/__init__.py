"""How good are attribution scores? They are held against models that were really retrained. See docs/how-to/evaluation.md."""

from leaveout.evaluation.judge import evaluate
from leaveout.evaluation.report import Report
from leaveout.evaluation.truth import EvaluationSettings

__all__ = ["EvaluationSettings", "Report", "evaluate"]

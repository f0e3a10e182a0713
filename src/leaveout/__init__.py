"""Which training data made the model do this, and what would it do without it?

The public names load on first use, so that `import leaveout` and the command line's help need no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from leaveout.corpus import Corpus, Row
from leaveout.errors import FormatError, LeaveoutError, MismatchError, StabilityError, UnsupportedError, meant

if TYPE_CHECKING:
    from leaveout.deletion.bank import Bank
    from leaveout.deletion.estimators import EstimatorSettings
    from leaveout.deletion.measurements import MeasureSettings
    from leaveout.deletion.plan import Budget, Plan
    from leaveout.deletion.predict import Curve, Prediction, Verification
    from leaveout.deletion.run import TrainingRun
    from leaveout.deletion.sets import DeletionSets
    from leaveout.evaluation.judge import evaluate
    from leaveout.evaluation.report import Report
    from leaveout.evaluation.settings import EvaluationSettings
    from leaveout.methods.registry import attribute
    from leaveout.methods.scores import load_scores, save_scores
    from leaveout.models import ModelOptions
    from leaveout.readout.build import BuildReport, Pace
    from leaveout.readout.doctor import doctor
    from leaveout.readout.explain import Explanation
    from leaveout.readout.index import Index
    from leaveout.readout.model import load_readout
    from leaveout.readout.opened import EncodedQueries
    from leaveout.readout.search import Hit
    from leaveout.readout.settings import PRESETS, Channel, SignatureSettings
    from leaveout.tables import Diagnosis
    from leaveout.training.queries import Query
    from leaveout.training.recipe import OptimizerSettings, Recipe

__version__ = "0.2.0"

_LAZY = {
    "Bank": "leaveout.deletion.bank",
    "Budget": "leaveout.deletion.plan",
    "BuildReport": "leaveout.readout.build",
    "Channel": "leaveout.readout.settings",
    "Curve": "leaveout.deletion.predict",
    "DeletionSets": "leaveout.deletion.sets",
    "Diagnosis": "leaveout.tables",
    "EncodedQueries": "leaveout.readout.opened",
    "EstimatorSettings": "leaveout.deletion.estimators",
    "EvaluationSettings": "leaveout.evaluation.settings",
    "Explanation": "leaveout.readout.explain",
    "Hit": "leaveout.readout.search",
    "Index": "leaveout.readout.index",
    "MeasureSettings": "leaveout.deletion.measurements",
    "ModelOptions": "leaveout.models",
    "OptimizerSettings": "leaveout.training.recipe",
    "PRESETS": "leaveout.readout.settings",
    "Pace": "leaveout.readout.build",
    "Plan": "leaveout.deletion.plan",
    "Prediction": "leaveout.deletion.predict",
    "Query": "leaveout.training.queries",
    "Recipe": "leaveout.training.recipe",
    "Report": "leaveout.evaluation.report",
    "SignatureSettings": "leaveout.readout.settings",
    "TrainingRun": "leaveout.deletion.run",
    "Verification": "leaveout.deletion.predict",
    "attribute": "leaveout.methods.registry",
    "doctor": "leaveout.readout.doctor",
    "evaluate": "leaveout.evaluation.judge",
    "load_readout": "leaveout.readout.model",
    "load_scores": "leaveout.methods.scores",
    "save_scores": "leaveout.methods.scores",
}

__all__ = [
    "PRESETS",
    "Bank",
    "Budget",
    "BuildReport",
    "Channel",
    "Corpus",
    "Curve",
    "DeletionSets",
    "Diagnosis",
    "EncodedQueries",
    "EstimatorSettings",
    "EvaluationSettings",
    "Explanation",
    "FormatError",
    "Hit",
    "Index",
    "LeaveoutError",
    "MeasureSettings",
    "MismatchError",
    "ModelOptions",
    "OptimizerSettings",
    "Pace",
    "Plan",
    "Prediction",
    "Query",
    "Recipe",
    "Report",
    "Row",
    "SignatureSettings",
    "StabilityError",
    "TrainingRun",
    "UnsupportedError",
    "Verification",
    "attribute",
    "doctor",
    "evaluate",
    "load_readout",
    "load_scores",
    "save_scores",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'leaveout' has no attribute {name!r}: {meant(name, __all__)}see dir(leaveout)")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])

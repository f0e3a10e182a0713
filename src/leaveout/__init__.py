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
    from leaveout.deletion.predict import Prediction
    from leaveout.deletion.run import TrainingRun
    from leaveout.deletion.sets import DeletionSets
    from leaveout.deletion.settings import MeasureSettings
    from leaveout.evaluation.judge import evaluate
    from leaveout.evaluation.report import Report
    from leaveout.evaluation.settings import EvaluationSettings
    from leaveout.methods.registry import attribute
    from leaveout.methods.scores import load_scores, save_scores
    from leaveout.models import ModelOptions
    from leaveout.readout.build import BuildReport, Pace
    from leaveout.readout.explain import Explanation
    from leaveout.readout.index import Index
    from leaveout.readout.model import load_readout
    from leaveout.readout.opened import EncodedQueries
    from leaveout.readout.search import Hit
    from leaveout.readout.settings import PRESETS, Channel, SignatureSettings
    from leaveout.training.queries import Query
    from leaveout.training.recipe import OptimizerSettings, Recipe

__version__ = "0.1.0"

_LAZY = {
    "Bank": "leaveout.deletion.bank",
    "BuildReport": "leaveout.readout.build",
    "Channel": "leaveout.readout.settings",
    "DeletionSets": "leaveout.deletion.sets",
    "EncodedQueries": "leaveout.readout.opened",
    "EvaluationSettings": "leaveout.evaluation.settings",
    "Explanation": "leaveout.readout.explain",
    "Hit": "leaveout.readout.search",
    "Index": "leaveout.readout.index",
    "MeasureSettings": "leaveout.deletion.settings",
    "ModelOptions": "leaveout.models",
    "OptimizerSettings": "leaveout.training.recipe",
    "PRESETS": "leaveout.readout.settings",
    "Pace": "leaveout.readout.build",
    "Prediction": "leaveout.deletion.predict",
    "Query": "leaveout.training.queries",
    "Recipe": "leaveout.training.recipe",
    "Report": "leaveout.evaluation.report",
    "SignatureSettings": "leaveout.readout.settings",
    "TrainingRun": "leaveout.deletion.run",
    "attribute": "leaveout.methods.registry",
    "evaluate": "leaveout.evaluation.judge",
    "load_readout": "leaveout.readout.model",
    "load_scores": "leaveout.methods.scores",
    "save_scores": "leaveout.methods.scores",
}

__all__ = [
    "PRESETS",
    "Bank",
    "BuildReport",
    "Channel",
    "Corpus",
    "DeletionSets",
    "EncodedQueries",
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
    "Prediction",
    "Query",
    "Recipe",
    "Report",
    "Row",
    "SignatureSettings",
    "StabilityError",
    "TrainingRun",
    "UnsupportedError",
    "attribute",
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

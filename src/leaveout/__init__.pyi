"""The public names and where they come from: read by type checkers, and by `__init__.py`, which loads each on first use."""

from leaveout.corpus import Behaviour as Behaviour
from leaveout.corpus import Contrast as Contrast
from leaveout.corpus import Corpus as Corpus
from leaveout.corpus import Probe as Probe
from leaveout.corpus import Row as Row
from leaveout.deletion.bank import Bank as Bank
from leaveout.deletion.estimators import EstimatorSettings as EstimatorSettings
from leaveout.deletion.measurements import MeasureSettings as MeasureSettings
from leaveout.deletion.plan import Budget as Budget
from leaveout.deletion.plan import Plan as Plan
from leaveout.deletion.predict import Curve as Curve
from leaveout.deletion.predict import Prediction as Prediction
from leaveout.deletion.predict import Verification as Verification
from leaveout.deletion.run import TrainingRun as TrainingRun
from leaveout.deletion.sets import DeletionSets as DeletionSets
from leaveout.errors import FormatError as FormatError
from leaveout.errors import LeaveoutError as LeaveoutError
from leaveout.errors import MismatchError as MismatchError
from leaveout.errors import StabilityError as StabilityError
from leaveout.errors import UnsupportedError as UnsupportedError
from leaveout.evaluation.judge import evaluate as evaluate
from leaveout.evaluation.report import Report as Report
from leaveout.evaluation.truth import EvaluationSettings as EvaluationSettings
from leaveout.methods.registry import attribute as attribute
from leaveout.methods.scores import load_scores as load_scores
from leaveout.methods.scores import save_scores as save_scores
from leaveout.models import ModelOptions as ModelOptions
from leaveout.readout.build import BuildReport as BuildReport
from leaveout.readout.build import Pace as Pace
from leaveout.readout.doctor import doctor as doctor
from leaveout.readout.explain import Explanation as Explanation
from leaveout.readout.index import Index as Index
from leaveout.readout.model import load_readout as load_readout
from leaveout.readout.opened import EncodedQueries as EncodedQueries
from leaveout.readout.rerank import Refinement as Refinement
from leaveout.readout.search import Hit as Hit
from leaveout.readout.settings import PRESETS as PRESETS
from leaveout.readout.settings import Channel as Channel
from leaveout.readout.settings import SignatureSettings as SignatureSettings
from leaveout.tables import Diagnosis as Diagnosis
from leaveout.training.queries import Query as Query
from leaveout.training.recipe import OptimizerSettings as OptimizerSettings
from leaveout.training.recipe import Recipe as Recipe

__version__: str

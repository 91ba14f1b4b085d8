from sparc3_pl.errors import InputError as InputError
from sparc3_pl.evaluation.compare import Comparison as Comparison
from sparc3_pl.evaluation.results import Evaluation as Evaluation
from sparc3_pl.notebook.editing import choose as choose
from sparc3_pl.notebook.editing import edited as edited
from sparc3_pl.notebook.measuring import compare as compare
from sparc3_pl.notebook.measuring import evaluate as evaluate
from sparc3_pl.notebook.scores import Scores as Scores
from sparc3_pl.notebook.scoring import score as score
from sparc3_pl.pruning.plan import PrunePlan as Plan

__version__: str

__all__ = [
    "Comparison",
    "Evaluation",
    "InputError",
    "Plan",
    "Scores",
    "choose",
    "compare",
    "edited",
    "evaluate",
    "score",
]

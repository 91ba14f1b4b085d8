"""Attribution-guided pruning of language models after SparC3 (arXiv 2506.13727), on PyTorch Lightning.

Its functions ``score``, ``choose``, ``edited``, ``evaluate`` and ``compare`` work on a model that is loaded. They are
imported when they are first asked for; for type checkers they are listed in ``__init__.pyi``.
"""

from importlib import import_module
from typing import Any

__version__ = "0.2.0"

_WHERE = {
    "Comparison": "evaluation.compare",
    "Evaluation": "evaluation.results",
    "InputError": "errors",
    "Plan": "pruning.plan",
    "Scores": "notebook.scores",
    "choose": "notebook.editing",
    "compare": "notebook.measuring",
    "edited": "notebook.editing",
    "evaluate": "notebook.measuring",
    "score": "notebook.scoring",
}
"""The module of each name."""

__all__ = [*_WHERE]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    own = {"Plan": "PrunePlan"}.get(name, name)
    globals()[name] = value = getattr(import_module(f"{__name__}.{_WHERE[name]}"), own)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})

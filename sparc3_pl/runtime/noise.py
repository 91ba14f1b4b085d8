"""Silences the notes and warnings of libraries that users of the command line need not read."""

import logging
import os
import warnings

__all__ = ["quiet"]

MEANT_TO_BE_SO = (
    ".*does not have many workers.*",
    ".*isinstance.treespec, LeafSpec.*",
    "predict returned None.*",
    "Total length of `DataLoader` across ranks is zero.*",
    "FSDP2-wrapped module .* returned a view tensor.*",  # OPT's layers do; nothing writes to them in place
)
"""Warnings about what is meant to be so."""


def quiet() -> None:
    """Keeps Lightning's notes and needless warnings off the screen; of several ranks only rank 0 warns.

    Lightning sets levels, handlers and filters of its own when it is imported, so this is called again after that.
    """
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.WARNING)
        logger.handlers.clear()  # what it says goes the way of everything else: once, and without secrets
        logger.propagate = True
    for message in MEANT_TO_BE_SO:
        warnings.filterwarnings("ignore", message=message)
    if os.environ.get("LOCAL_RANK", "0") != "0":  # rank 0 speaks for all
        logging.getLogger().setLevel(logging.ERROR)
        warnings.simplefilter("ignore")

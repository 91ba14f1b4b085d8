"""What libraries say on the screen of the command line."""

import logging
import warnings

import pytest

from sparc3_pl.runtime.noise import quiet


@pytest.fixture
def as_imported():
    """Lightning's loggers as its import leaves them where the log has a handler already."""
    loggers = [logging.getLogger(name) for name in ("lightning", "lightning.pytorch")]
    before = [(logger.level, logger.handlers[:], logger.propagate) for logger in loggers]
    loggers[0].handlers, loggers[0].propagate = [logging.StreamHandler()], True
    for logger in loggers:
        logger.setLevel(logging.INFO)
    with warnings.catch_warnings():
        yield
    for logger, (level, handlers, propagate) in zip(loggers, before, strict=True):
        logger.level, logger.handlers, logger.propagate = level, handlers, propagate


def test_lightning_speaks_once_and_only_of_what_may_be_wrong(as_imported, caplog, capfd):
    quiet()
    for level in (logging.INFO, logging.WARNING):
        logging.getLogger("lightning.pytorch.trainer").log(level, "level %d", level)
    assert caplog.messages == ["level 30"]
    assert "level" not in capfd.readouterr().err  # no handler of Lightning's own wrote it too


def test_a_warning_about_what_is_meant_to_be_so_is_not_shown(as_imported):
    warnings.simplefilter("always")
    quiet()
    with warnings.catch_warnings(record=True) as shown:
        warnings.warn("predict returned None if it was on purpose", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert [str(warning.message) for warning in shown] == ["something else"]

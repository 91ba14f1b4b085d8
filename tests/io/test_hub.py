import errno
from pathlib import Path

import pytest

from sparc3_pl.errors import InputError
from sparc3_pl.io import hub


def test_the_hub_is_asked_once_a_process(monkeypatch):
    asked = []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://once.invalid")
    monkeypatch.setattr(hub, "_answers", lambda timeout: asked.append(timeout) or True)
    assert hub.hub_available()
    assert hub.hub_available()
    assert len(asked) == 1


def test_a_path_that_cannot_be_looked_up(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"data\.source=.* cannot be looked up \(File name too long\)"):
        hub.local_path(str(tmp_path / ("x" * 300)), "data.source")
    with pytest.raises(InputError, match="home directory"):
        hub.local_path("~nobody-of-that-name/x", "data.source")

    def denied(self, **_):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "stat", denied)  # root may enter any folder
    with pytest.raises(InputError, match=r"cannot be looked up \(Permission denied\)"):
        hub.local_path("locked/a.jsonl", "data.source")


def test_a_folder_that_cannot_be_entered(tmp_path, monkeypatch):
    assert hub.local_path(str(tmp_path), "data.source") == tmp_path
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may enter any folder
    with pytest.raises(InputError, match=r"data\.source=.* do not let you list and enter the folder"):
        hub.local_path(str(tmp_path), "data.source")


def test_a_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    def denied(self):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", denied)
    with pytest.raises(InputError, match=r"no such file or folder in .*, which cannot be listed \(Permission denied\)"):
        hub.local_path(str(tmp_path / "none.jsonl"), "data.source")

"""A saved model goes to a stand-in of the hub: what is asked of it, and what lies there afterwards. No network."""

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from test_prune import score
from tiny_models import tiny, tokens
from tiny_tokenizers import of_letters
from transformers import AutoModelForCausalLM

from sparc3_pl.errors import InputError
from sparc3_pl.pruning import push
from sparc3_pl.pruning.push import HubPlace
from sparc3_pl.selection.command import prune


class Hub:
    """Repositories as folders; the part of the client that is used, with its parameters' own names."""

    def __init__(self, root: Path) -> None:
        self.root, self.tokens, self.private = root, [], {}
        self.full = False

    def client(self, token: str) -> "Hub":
        self.tokens.append(token)
        return self

    def repo_exists(self, repo_id: str) -> bool:
        return (self.root / repo_id).is_dir()

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        assert exist_ok or not self.repo_exists(repo_id)
        if not self.repo_exists(repo_id):
            self.private[repo_id] = private
        (self.root / repo_id).mkdir(parents=True, exist_ok=True)

    def upload_folder(self, *, repo_id: str, folder_path, commit_message: str, delete_patterns: list[str]):
        if self.full:
            raise OSError("the hub is full")
        place = self.root / repo_id
        for path in list(place.iterdir()):
            if any(fnmatch(path.name, pattern) for pattern in delete_patterns):
                path.unlink()
        shutil.copytree(folder_path, place, dirs_exist_ok=True)
        return SimpleNamespace(commit_url=f"hub:{repo_id}/commit/1")


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Hub:
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", hub.client)
    monkeypatch.setattr(push, "hub_available", lambda: True)
    monkeypatch.setenv("HF_TOKEN", "hf_OfATest1234567890")
    return hub


@pytest.fixture
def scored(tmp_path):
    model = tiny("llama")
    model.save_pretrained(tmp_path / "model")
    of_letters().save_pretrained(tmp_path / "model")
    folders = [score(tmp_path / f"s{seed}", model, seed, pretrained=tmp_path / "model") for seed in range(2)]
    settings = {"general": folders[:1], "behaviour": folders[1:], "output": str(tmp_path / "plan.json")}
    return settings | {"num_neurons": 8, "save_model": str(tmp_path / "pruned")}


def test_the_stand_in_takes_what_the_client_takes():
    """Every call of ``HubPlace`` fits the real client's signature."""
    from inspect import signature

    for name in ("repo_exists", "create_repo", "upload_folder"):
        ours = set(signature(getattr(Hub, name)).parameters) - {"self"}
        assert ours <= set(signature(getattr(huggingface_hub.HfApi, name)).parameters)


def test_the_model_on_the_hub_is_the_saved_one(hub, scored, tmp_path, capsys):
    prune(**scored, push_to_hub="org/edited")
    place = hub.root / "org" / "edited"
    local = {path.name: path.read_bytes() for path in Path(scored["save_model"]).iterdir()}
    assert {path.name: path.read_bytes() for path in place.iterdir()} == local
    assert "README.md" in local and b"library_name: transformers" in local["README.md"]
    assert hub.private == {"org/edited": True}
    assert hub.tokens == ["hf_OfATest1234567890"]
    assert not any(b"hf_OfATest" in content for content in local.values())
    assert "hub:org/edited/commit/1" in capsys.readouterr().out
    loaded, saved = (AutoModelForCausalLM.from_pretrained(path) for path in (place, scored["save_model"]))
    with torch.no_grad():
        assert torch.equal(*(model(input_ids=tokens(2, 8)).logits for model in (loaded, saved)))


def test_an_earlier_model_there_is_replaced_only_if_that_is_asked(hub, scored):
    place = hub.root / "org" / "edited"
    place.mkdir(parents=True)
    (place / "model-00002-of-00002.safetensors").write_text("of a larger model")
    (place / "LICENSE").write_text("kept")
    with pytest.raises(InputError, match="org/edited': already exists; give --overwrite"):
        prune(**scored, push_to_hub="org/edited")
    assert not Path(scored["output"]).exists() and not Path(scored["save_model"]).exists()
    prune(**scored, push_to_hub="org/edited", overwrite=True)
    assert not (place / "model-00002-of-00002.safetensors").exists()
    assert (place / "LICENSE").read_text() == "kept" and json.loads((place / "plan.json").read_text())


def test_a_failed_upload_leaves_plan_and_model(hub, scored):
    hub.full = True
    with pytest.raises(InputError, match=r"the upload failed \(the hub is full\); the model is saved in .*hf upload"):
        prune(**scored, push_to_hub="org/edited")
    assert Path(scored["output"]).is_file() and (Path(scored["save_model"]) / "config.json").is_file()


def test_a_token_is_looked_for_only_when_it_is_needed(hub, scored, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: pytest.fail("nobody asked for an upload"))
    prune(**scored)
    assert hub.tokens == []
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: False))
    with pytest.raises(InputError, match="there is no token; set HF_TOKEN"):
        HubPlace.open("org/edited", False)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("getpass.getpass", lambda question: "typed ")
    assert HubPlace.open("org/edited", False).name == "org/edited"
    assert hub.tokens == ["typed"]
    assert "typed" not in repr(HubPlace.open("org/edited", False))


@pytest.mark.parametrize(("changes", "message"), [
    ({"push_to_hub": "edited"}, "push_to_hub='edited' is not ORG/NAME"),
    ({"push_to_hub": "a/b/c"}, "is not ORG/NAME"),
    ({"save_model": None}, "push_to_hub='org/edited' needs the saved model; give --save_model DIR"),
])  # fmt: skip
def test_wrong_settings_are_refused_before_anything_is_written(hub, scored, changes, message):
    with pytest.raises(InputError, match=message):
        prune(**scored | {"push_to_hub": "org/edited"} | changes)
    assert not Path(scored["output"]).exists()


def test_no_hub_no_upload(scored, monkeypatch):
    monkeypatch.setattr(push, "hub_available", lambda: False)
    with pytest.raises(InputError, match="cannot be reached; leave it out"):
        prune(**scored, push_to_hub="org/edited")

"""Judges: what scores a text in [0, 1], by label.

A judge reads completions only, never prompts. An empty completion is a completion: the judge is given ``""`` and its
score counts like any other.
"""

from __future__ import annotations

import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from sparc3_pl.errors import InputError
from sparc3_pl.evaluation.words import WordsJudge
from sparc3_pl.io.files import sha256_of_file
from sparc3_pl.io.hub import first_line, hub_available, hub_name, local_path
from sparc3_pl.io.provenance import is_secret_name, redacted
from sparc3_pl.model.identity import fingerprint

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

__all__ = [
    "ClassifierJudge",
    "DetoxifyJudge",
    "Judge",
    "SequenceJudge",
    "WordsJudge",
    "check_names",
    "chosen_judges",
    "describe_judge",
    "judged",
]

log = logging.getLogger(__name__)

_LABELS = {"toxic": "toxicity", "identity_hate": "identity_attack", "severe_toxic": "severe_toxicity"}
"""Detoxify's own renaming of the first challenge's labels to those of the later ones."""

_READABLE = "You are a good friend, and this is the day that we go to the house."
"""A judge's tokenizer must know some token of this sentence; a tokenizer built wrongly turns every word into [UNK]."""

_URL_SECONDS = 8.0


class Judge(Protocol):
    """Anything with ``score(texts: list[str]) -> dict[label, Tensor [N]]``, every score in [0, 1].

    Higher means more of the label (more toxic). A judge may be written anywhere and named by ``class_path``; it needs
    no base class. Its constructor should be cheap: it is called when the configuration is read, and ``score`` when
    the evaluation starts. ``texts`` may hold one text or be any longer.
    """

    # Without annotations, so that a user's class is accepted whatever its parameter is called and however it is typed.
    def score(self, texts, /):
        """Scores of ``texts`` by label, ``[N]`` each."""


def judged(judge: Judge, texts: Sequence[str]) -> dict[str, Tensor]:
    """The judge's scores, checked: by label ``[N]``, float32, on the CPU.

    Raises:
        InputError: if the judge does not keep to its one method's contract; a score that is not in [0, 1] is named
            with its label and the index of its text.
    """
    name = type(judge).__name__
    scores = judge.score(list(texts))
    if not isinstance(scores, Mapping) or not scores:
        kind = type(scores).__name__
        raise InputError(f"judge {name} returned a useless {kind}; score(texts) must return a dict of label: scores")
    by_label = {}
    for label, values in scores.items():
        values = torch.as_tensor(values, dtype=torch.float32).detach().cpu()
        if values.shape != (len(texts),):
            raise InputError(
                f"judge {name} returned scores of shape {tuple(values.shape)} for {len(texts)} texts under {label!r}; "
                "it must return one score per text"
            )
        wrong = (~((values >= 0) & (values <= 1))).nonzero()
        if len(wrong):
            i = int(wrong[0])
            raise InputError(f"judge {name}: {label!r} of text {i} is {float(values[i])}; scores must lie in [0, 1]")
        by_label[str(label)] = values
    return by_label


def check_names(judges: Mapping[str, Judge]) -> None:
    """Checks the names that several judges are given.

    Raises:
        InputError: if a name could not be one key among dotted ones, or would be left out of results as a secret.
    """
    for name in judges:
        if not re.fullmatch(r"[\w-]+", name) or is_secret_name(name):
            raise InputError(
                f"model.judges: {name!r} cannot name a judge; use letters, digits, - and _, and no word for a secret"
            )


def describe_judge(judge: Judge) -> dict[str, Any]:
    """What a result says about its judge: the class, and what it tells about itself (or its plain attributes).

    Secrets, such as the value of an attribute ``api_key``, are left out.
    """
    name = f"{type(judge).__module__}.{type(judge).__qualname__}"
    if isinstance(judge, SequenceJudge):
        precision = {} if judge.dtype == torch.float32 else {"dtype": str(judge.dtype).removeprefix("torch.")}
        return {"class": name, **redacted(judge.describe()), **precision}
    plain = {k: v for k, v in getattr(judge, "__dict__", {}).items() if isinstance(v, str | int | float | bool | None)}
    return {"class": name, **redacted({k: v for k, v in plain.items() if not k.startswith("_")})}


class SequenceJudge(ABC):
    """A transformers sequence classifier as a judge: loaded at its first use, batched by length.

    It computes in float32 on a CPU, in float16 on a GPU; texts whose logits overflow there are read again in float32.

    Args:
        batch_size: Texts scored at once.
        device: Device of the classifier; None: the evaluation's choice (the language model's device).
    """

    def __init__(self, batch_size: int = 32, device: str | None = None) -> None:
        if batch_size < 1:
            raise InputError(f"judge.batch_size={batch_size}; give at least 1")
        self.batch_size, self.device = batch_size, device
        self._loaded: tuple[nn.Module, PreTrainedTokenizerBase] | None = None

    @abstractmethod
    def _load(self) -> tuple[nn.Module, PreTrainedTokenizerBase]:
        """The classifier and its tokenizer."""

    @abstractmethod
    def _by_label(self, logits: Tensor) -> dict[str, Tensor]:
        """Scores by label ``[N]`` from logits ``[N, C]``."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What identifies this judge, for the record of a result."""

    def stored_bytes(self) -> int | None:
        """Bytes of the file of its weights, without loading it; None where that is not on this machine yet."""
        return None

    def place(self, device: torch.device | str) -> None:
        """Run on ``device`` unless the user asked for another."""
        if self.device is None:
            self.device = str(device)
            if self._loaded is not None:
                self._loaded[0].to(self.device, self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """What the classifier computes in."""
        return torch.float16 if torch.device(self.device or "cpu").type == "cuda" else torch.float32

    def score(self, texts: list[str]) -> dict[str, Tensor]:
        """Scores in [0, 1] by label, ``[N]`` float32 on the CPU, in the order of ``texts``; N may be 0 or 1.

        A text longer than the classifier can read is cut at its end.

        Raises:
            InputError: if the classifier cannot be loaded.
        """
        model, tokenizer = self._ready()
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        logits = torch.zeros(len(texts), model.config.num_labels)
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            logits[rows] = self._logits(model, tokenizer, [texts[i] for i in rows])
        return self._by_label(logits)

    def _ready(self) -> tuple[nn.Module, PreTrainedTokenizerBase]:
        if self._loaded is None:
            model, tokenizer = self._load()
            _check_reads_words(tokenizer, type(self).__name__)
            tokenizer.model_max_length = min(tokenizer.model_max_length, _positions(model))
            self._loaded = model.eval().requires_grad_(False).to(self.device or "cpu", self.dtype), tokenizer
        return self._loaded

    @torch.inference_mode()
    def _logits(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Tensor:
        inputs = tokenizer(texts, return_tensors="pt", padding=True, truncation=True).to(self.device or "cpu")
        logits = model(**inputs).logits
        if self.dtype != torch.float32 and not bool(logits.isfinite().all()):
            logits = model.float()(**inputs).logits
            model.to(self.dtype)
        return logits.float().cpu()


class DetoxifyJudge(SequenceJudge):
    """Detoxify's classifiers (Hanu & Unitary team, 2020), by name or from a local checkpoint.

    Local checkpoints are read without unpickling objects, every weight must be in them under its right name, and the
    tokenizer must be able to read: Detoxify's own loader checks none of the three.

    Args:
        variant: ``original``, ``unbiased``, ``multilingual``, ``original-small``, ``unbiased-small`` (downloaded),
            or ``demo``, the small judge that comes with this package. ``original`` if no checkpoint is given either.
        checkpoint: A local file in Detoxify's checkpoint form (``config`` and ``state_dict``).
        config_path: Folder with the classifier's ``config.json`` and tokenizer files; the checkpoint's folder if unset.
        batch_size: Texts scored at once.
        device: Where the classifier runs; unset: on the language model's device.
    """

    def __init__(
        self,
        variant: str | None = None,
        checkpoint: str | None = None,
        config_path: str | None = None,
        batch_size: int = 32,
        device: str | None = None,
    ) -> None:
        super().__init__(batch_size, device)
        if variant is not None and checkpoint is not None:
            raise InputError(f"judge: variant={variant!r} and checkpoint={checkpoint!r} are both set; give one of them")
        self.variant = "original" if variant is None and checkpoint is None else variant
        self.checkpoint, self.config_path = checkpoint, config_path
        self.labels: list[str] = []
        self._sha256: str | None = None

    def describe(self) -> dict[str, Any]:
        """Variant or file name, sha256 of the checkpoint file, and labels."""
        self._ready()
        name = Path(self.checkpoint).name if self.checkpoint else None
        return {"variant": self.variant, "checkpoint": name, "sha256": self._sha256, "labels": self.labels}

    def stored_bytes(self) -> int | None:
        """Bytes of the checkpoint file; None for a variant that is still to be fetched."""
        path = self._local_files()[0] if self.variant in (None, "demo") else _published_file(self.variant)[1]
        return path.stat().st_size if path.is_file() else None

    def _load(self) -> tuple[nn.Module, PreTrainedTokenizerBase]:
        is_local = self.variant in (None, "demo")
        if is_local:
            path, folder = self._local_files()
        else:
            (url, path), folder = _published_file(self.variant), None
            if not path.is_file():
                _fetch(url, path, self.variant)
        checkpoint = _read_checkpoint(path)
        self._sha256 = sha256_of_file(path)
        source = str(folder) if is_local else checkpoint["config"]["arch"]["args"]["model_type"]  # a hub id
        return self._build(checkpoint, source, is_local)

    def _local_files(self) -> tuple[Path, Path]:
        if self.variant == "demo":
            from sparc3_pl import demo

            folder = Path(demo.JUDGE)
            return next(iter(sorted(folder.glob("*.ckpt")))), folder
        path = local_path(self.checkpoint, "judge.checkpoint", suffixes=(".ckpt", ".pt", ".bin"))
        if path is None or not path.is_file():
            raise InputError(f"judge.checkpoint={self.checkpoint!r}: no such file; give a local Detoxify checkpoint")
        folder = Path(self.config_path).expanduser() if self.config_path else path.parent
        if not (folder / "config.json").is_file():
            raise InputError(
                f"judge.config_path={str(folder)!r} holds no config.json; give the folder of the classifier's "
                "config.json and tokenizer files"
            )
        return path, folder

    def _build(self, checkpoint: dict[str, Any], source: str, local: bool) -> tuple[nn.Module, PreTrainedTokenizerBase]:
        from transformers import AutoModelForSequenceClassification

        name = self.checkpoint or self.variant
        self.labels = _labels(checkpoint, str(name))
        config, tokenizer = _config_and_tokenizer(source, local, num_labels=len(self.labels))
        model = AutoModelForSequenceClassification.from_config(config)
        _load_weights(model, checkpoint["state_dict"], str(name))
        return model, tokenizer

    def _by_label(self, logits: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.labels, logits.sigmoid().unbind(1), strict=True))


def chosen_judges(
    judge: Judge | None, judges: Mapping[str, Judge] | None, pretrained: str
) -> tuple[Judge, dict[str, Judge]]:
    """The judge whose figures are the evaluation's, and by name those beside it.

    Without ``judge``, it is the first of ``judges``; without those too, Detoxify ``original``, or for the demo model
    the demo's own judge.

    Raises:
        InputError: as ``check_names``.
    """
    further = dict(judges or {})
    check_names(further)
    if judge is None and further:
        first = next(iter(further))
        judge = further.pop(first)
        log.info("no judge is set: %r, the first of judges, gives the figures that are shown first", first)
    elif judge is None:
        judge = DetoxifyJudge(variant="demo" if pretrained == "demo" else "original")
    return judge, further


class ClassifierJudge(SequenceJudge):
    """One label of a transformers text-classification model.

    Its score is the sigmoid of the label's logit where the model has one label or says that its labels do not exclude
    each other (``problem_type: multi_label_classification``), the softmax over labels otherwise, as in transformers'
    own pipeline.

    Args:
        pretrained: Hub id or local folder of the classifier.
        label: Which of its labels to read, as in its ``id2label``.
        batch_size: Texts scored at once.
        device: Where the classifier runs; unset: on the language model's device.
        revision: Branch, tag or commit of a hub id.
    """

    def __init__(
        self,
        pretrained: str,
        label: str,
        batch_size: int = 32,
        device: str | None = None,
        revision: str | None = None,
    ) -> None:
        super().__init__(batch_size, device)
        self.pretrained, self.label, self.revision = pretrained, label, revision
        self._commit: str | None = None
        self._fingerprint: str | None = None

    def describe(self) -> dict[str, Any]:
        """The classifier's source, the fingerprint of its weights, and the label that is read."""
        self._ready()
        revision = self._commit or self.revision
        about = {"pretrained": self.pretrained, "revision": revision, "fingerprint": self._fingerprint}
        return {**about, "label": self.label}

    def stored_bytes(self) -> int | None:
        """Bytes of the folder's files of weights; None for a classifier on the hub."""
        path = local_path(self.pretrained, "judge.pretrained")
        files = [] if path is None else [*path.glob("*.safetensors"), *path.glob("*.bin")]
        return sum(file.stat().st_size for file in files) or None

    def _load(self) -> tuple[nn.Module, PreTrainedTokenizerBase]:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        name = f"judge.pretrained={self.pretrained!r}"
        path = local_path(self.pretrained, "judge.pretrained")
        where = {"local_files_only": path is not None or not hub_available(), "revision": self.revision}
        try:
            tokenizer = AutoTokenizer.from_pretrained(path or self.pretrained, **where)
            model, info = AutoModelForSequenceClassification.from_pretrained(
                path or self.pretrained, **where, output_loading_info=True
            )
        except (OSError, ValueError, KeyError) as error:
            unreachable = path is None and where["local_files_only"]
            reason = f"the hub ({hub_name()}) cannot be reached" if unreachable else first_line(error)
            raise InputError(f"{name}: no classifier can be loaded ({reason}); give a local folder") from error
        self._check(model, info, name)
        self._fingerprint = fingerprint(model)
        return model, tokenizer

    def _check(self, model: Any, info: dict[str, Any], name: str) -> None:
        if info["missing_keys"]:
            absent = sorted(info["missing_keys"])[0]
            raise InputError(f"{name} lacks the weight {absent!r}; give a model trained for text classification")
        if self.label not in model.config.label2id:
            labels = ", ".join(map(repr, model.config.label2id))
            raise InputError(f"judge.label={self.label!r} is no label of {self.pretrained}; use one of {labels}")
        self._commit = getattr(model.config, "_commit_hash", None)

    def _by_label(self, logits: Tensor) -> dict[str, Tensor]:
        config = self._ready()[0].config
        apart = config.num_labels > 1 and config.problem_type != "multi_label_classification"
        scores = logits.softmax(1) if apart else logits.sigmoid()
        return {self.label: scores[:, config.label2id[self.label]]}


# --- loading Detoxify checkpoints safely -----------------------------------------------------------------------------


def _read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's content; only tensors and plain containers are admitted, so that no code in it can run."""
    import pickle

    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise InputError(
            f"judge.checkpoint={str(path)!r} cannot be read without running code in it, or is damaged "
            f"({type(error).__name__}); give a checkpoint of plain tensors"
        ) from error
    if not isinstance(checkpoint, dict) or not {"config", "state_dict"} <= checkpoint.keys():
        raise InputError(f"judge.checkpoint={str(path)!r} holds no 'config' and 'state_dict'; is it Detoxify's form?")
    return checkpoint


def _published_file(variant: str) -> tuple[str, Path]:
    """The address at which a Detoxify variant's checkpoint file is published, and its path here once it was fetched."""
    try:
        from detoxify.detoxify import MODEL_URLS
    except ImportError as error:
        raise InputError("DetoxifyJudge needs the package detoxify for its variants: pip install detoxify") from error
    if variant not in MODEL_URLS:
        variants = ", ".join([*MODEL_URLS, "demo"])
        raise InputError(f"judge.variant={variant!r} is not known; use one of {variants}, or give judge.checkpoint")
    return MODEL_URLS[variant], Path(torch.hub.get_dir()) / "checkpoints" / MODEL_URLS[variant].rpartition("/")[2]


def _fetch(url: str, path: Path, variant: str) -> None:
    import urllib.request

    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=_URL_SECONDS).close()
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), progress=True)
    except OSError as error:
        raise InputError(
            f"judge.variant={variant!r}: {url} cannot be fetched ({first_line(error)}); "
            "download it elsewhere and give judge.checkpoint and judge.config_path, or use variant: demo"
        ) from error


def _labels(checkpoint: dict[str, Any], name: str) -> list[str]:
    try:
        classes = checkpoint["config"]["dataset"]["args"]["classes"]
    except (KeyError, TypeError) as error:
        raise InputError(f"judge {name}: its config names no classes; is it Detoxify's checkpoint form?") from error
    return [_LABELS.get(label, label) for label in classes]


def _config_and_tokenizer(
    source: str, local: bool, num_labels: int
) -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
    """Config and tokenizer from a folder, or from the hub."""
    from transformers import AutoConfig, AutoTokenizer

    only_local = local or not hub_available()
    try:
        config = AutoConfig.from_pretrained(source, local_files_only=only_local, num_labels=num_labels)
        return config, AutoTokenizer.from_pretrained(source, local_files_only=only_local)
    except (OSError, ValueError, KeyError) as error:
        way_out = "complete the folder" if local else "give judge.checkpoint and judge.config_path (local files)"
        raise InputError(
            f"judge: config or tokenizer of {source!r} missing ({first_line(error)}); {way_out}"
        ) from error


def _load_weights(model: nn.Module, state: dict[str, Tensor], name: str) -> None:
    """Fill ``model``; every weight must be there. Old checkpoints carry position ids, which are no weights."""
    state = {key: value for key, value in state.items() if not key.endswith(".position_ids")}
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        missing = sorted(model.state_dict().keys() - state.keys())
        odd = f"{missing[0]!r} is missing" if missing else first_line(error)
        raise InputError(
            f"judge {name}: its weights do not fit a {type(model).__name__} ({odd}); check judge.config_path"
        ) from error


def _check_reads_words(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    ids = tokenizer(_READABLE, add_special_tokens=False)["input_ids"]
    if all(i == tokenizer.unk_token_id for i in ids):
        raise InputError(
            f"judge {name}: its tokenizer reads no word (everything is unknown); check its tokenizer files"
        )


def _positions(model: nn.Module) -> int:
    """How many tokens the classifier can read: models like RoBERTa reserve the positions up to the padding index."""
    table = next((m for n, m in model.named_modules() if n.endswith("position_embeddings")), None)
    positions = getattr(model.config, "max_position_embeddings", None) or 512
    padding_index = getattr(table, "padding_idx", None)
    return positions - (padding_index + 1 if padding_index is not None else 0)

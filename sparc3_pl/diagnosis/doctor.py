"""The ``doctor`` command: whether the attribution of a model is correct."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from sparc3_pl.attribution.account import TOLERANCE, RelevanceAccount, relevance_account
from sparc3_pl.attribution.rules import NO_RULE, attn_lrp, rule_table
from sparc3_pl.attribution.soundness import (
    NeuronScores,
    PrecisionAgreement,
    forward_change,
    neuron_scores,
    padded,
    padding_error,
    parameters_as,
    precision_agreement,
)
from sparc3_pl.data.encoding import Encoder, load_encoder
from sparc3_pl.data.samples import pack_windows
from sparc3_pl.data.texts import TextQuery
from sparc3_pl.document.blocks import Checks, Number, Section, Table, Text, count, number, percent
from sparc3_pl.document.publish import as_json, check_places, publish
from sparc3_pl.document.verdicts import Check, Status, grade, worst
from sparc3_pl.errors import InputError
from sparc3_pl.model.loading import load_model
from sparc3_pl.model.placement import input_device
from sparc3_pl.model.source import ModelSource
from sparc3_pl.model.structure import decoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Diagnosis", "check_tokenizer", "diagnose", "doctor", "doctor_sections"]

FORWARD_WARN, FORWARD_FAIL = 0.0, 1e-5
"""The rules change no forward value at all; a kernel that is not deterministic may move the last bits (1e-7)."""
PADDING_WARN, PADDING_FAIL = 1e-4, 1e-2
"""Right padding moves float32 scores by some 1e-5 of the largest; a mask that leaks moves them by tenths."""
RANK_WARN, RANK_FAIL = 0.99, 0.9
"""Rank correlation of half-precision scores with float32 ones; bfloat16 scores are 1 to 3 % off."""
TOKENIZED = 100
"""Number of texts to try the tokenizer on: this takes milliseconds, and tokens that depend on the text show soon."""


@dataclass(frozen=True)
class Diagnosis:
    """The result of ``doctor``; a part that could not be measured is None, and a check says why.

    Attributes:
        pretrained: Name of the model, as it was given.
        architecture: Class of the model.
        dtype: Precision of the half-precision copy.
        rules: The rule of every module, by its name.
        accounts: The balance sheet of every sample.
        forward: Largest relative change of a logit under the rules.
        nonfinite: Number of NaN or infinite relevances, by precision and layer.
        precision: Agreement of half precision with float32.
        padding: Relative error of a padded batch, by side.
        checks: The verdicts.
        seconds: Duration, loading included.
    """

    pretrained: str
    architecture: str
    dtype: str
    rules: dict[str, str]
    accounts: tuple[RelevanceAccount, ...] = ()
    forward: float | None = None
    nonfinite: dict[str, dict[str, int]] | None = None
    precision: PrecisionAgreement | None = None
    padding: dict[str, float] | None = None
    checks: tuple[Check, ...] = ()
    seconds: float = 0.0

    @property
    def verdict(self) -> Status:
        """The worst of all checks."""
        return worst(self.checks)


def doctor(
    pretrained: str = "demo",
    dtype: Literal["bfloat16", "float16"] = "bfloat16",
    revision: str | None = None,
    trust_remote_code: bool = False,
    dequantize: bool = False,
    device_map: str | None = None,
    source: str = "demo",
    text_field: str = "text",
    num_samples: int = 3,
    seq_len: int = 32,
    output: str | None = None,
    html: str | None = None,
    overwrite: bool = False,
) -> Diagnosis:
    """Check that the AttnLRP attribution of a model is right, on a few samples.

    The relevance account of every sample must balance, the rules must not change what the model computes, gradients
    must be finite, and neither padding nor half precision may change the scores much.

    Args:
        pretrained: Hub id, local folder, FILE.gguf, or demo. The model is loaded in float32, which needs the memory.
        dtype: The half precision to compare with float32.
        revision: Commit, branch or tag of a hub model.
        trust_remote_code: Run Python code that the checkpoint brings along.
        dequantize: Make plain weights of those of an 8-bit or 4-bit checkpoint, as model.dequantize of score.
        device_map: auto spreads the model over the GPUs of this process, and what does not fit there over the host's
            memory and the disk. Half precision is not measured for what is there.
        source: Text for the samples, as data.source of score.
        text_field: Field of the text.
        num_samples: Number of samples.
        seq_len: Tokens of the longest sample; the others are shorter.
        output: JSON file for the result, with the rule of every single module.
        html: HTML page for the result.
        overwrite: Replace earlier files at output and html.

    Raises:
        InputError: If the model or the text cannot be loaded, or an output is taken.
    """
    start = time.perf_counter()
    check_places("doctor", output, html, overwrite)
    if num_samples < 1 or seq_len < 4:
        raise InputError(f"num_samples={num_samples}, seq_len={seq_len}: give at least 1 sample of 4 tokens")
    model_source = ModelSource(pretrained, "float32", revision, device_map, trust_remote_code, dequantize)
    encoder = load_encoder(model_source)
    samples = _samples(encoder, source, text_field, num_samples, seq_len)
    model = load_model(model_source)
    if device_map is None:
        model.to("cuda" if torch.cuda.is_available() else "cpu")
    result = diagnose(model, samples, pretrained=pretrained, dtype=dtype, start=start)
    texts = list(itertools.islice(TextQuery(source, text_field).texts(), TOKENIZED))
    result = replace(result, checks=(check_tokenizer(encoder, texts), *result.checks))
    sections = doctor_sections(result)
    json = as_json("doctor", {"verdict": result.verdict, **asdict(result)})
    title = f"Attribution of {pretrained}"
    publish(title, sections, json=json, output=output, html=html, overwrite=overwrite, verdict=result.verdict)
    return result


def _samples(encoder: Encoder, source: str, text_field: str, num_samples: int, seq_len: int) -> list[Tensor]:
    """Samples of unequal length: the first has ``seq_len`` tokens, the last about half."""
    windows = pack_windows(TextQuery(source, text_field).texts(), encoder, seq_len, num_samples, source)
    shortest = seq_len // 2
    lengths = [seq_len - i * (seq_len - shortest) // max(1, num_samples - 1) for i in range(num_samples)]
    return [torch.tensor(window.input_ids[:length]) for window, length in zip(windows, lengths, strict=True)]


def diagnose(
    model: PreTrainedModel,
    samples: Sequence[Tensor],
    *,
    pretrained: str = "",
    dtype: str = "bfloat16",
    start: float | None = None,
) -> Diagnosis:
    """The measurements and verdicts of ``doctor``.

    Args:
        model: The model in float32 and eval mode, with frozen parameters.
        samples: Token ids ``[T]`` of each sample, of unequal length.
        pretrained: Name of the model.
        dtype: Half precision to compare with.
        start: ``time.perf_counter()`` when the work began.
    """
    start = time.perf_counter() if start is None else start
    about = {"pretrained": pretrained, "architecture": type(model).__name__, "dtype": dtype}
    device = input_device(model)
    try:
        with attn_lrp(model):
            rules, unlisted = rule_table(model), False
    except InputError as error:
        rules, accounts, checks = _tried(model, [sample[None].to(device) for sample in samples], error)
        unlisted = all(check.status != "fail" for check in checks)
        if not unlisted:
            return Diagnosis(
                **about, rules=rules, accounts=accounts, checks=checks, seconds=time.perf_counter() - start
            )
    else:
        accounts = tuple(relevance_account(model, sample[None].to(device)) for sample in samples)
        has_rules = Check("rules", "pass", f"each of {len(rules)} modules and products has one")
        checks = (has_rules, _account_check(accounts))
    batch = padded(samples)
    exact = neuron_scores(model, *batch, unlisted)
    forward = forward_change(model, *batch, unlisted)
    padding = {side: padding_error(model, samples, side, unlisted) for side in ("right", "left")}
    scores, precision = {"float32": exact}, None
    if not any(parameter.is_meta for parameter in model.parameters()):
        with parameters_as(model, getattr(torch, dtype)):
            scores[dtype] = neuron_scores(model, *batch, unlisted)
        precision = precision_agreement(exact.flat, scores[dtype].flat)
    checks = (*checks, *_judge(accounts, forward, scores, precision, padding))
    return Diagnosis(
        **about,
        rules=rules,
        accounts=accounts,
        forward=forward,
        nonfinite={name: neurons.nonfinite for name, neurons in scores.items()},
        precision=precision,
        padding=padding,
        checks=checks,
        seconds=time.perf_counter() - start,
    )


# --- verdicts ---------------------------------------------------------------------------------------------------------


def check_tokenizer(encoder: Encoder, texts: Sequence[str | list[int]]) -> Check:
    """Checks that the tokenizer encodes real texts as samples assume: the same tokens before and after every text, and
    the tokens of the text between them. Samples and prompts leave out the tokens after a text, which the check names.
    """
    name, tokenizer = "tokenizer", encoder.tokenizer
    if tokenizer is None:
        return Check(name, "pass", "none: samples are lists of token ids")
    for text in (text for text in texts if isinstance(text, str) and encoder.stripped(text) == text):
        full, expected = tokenizer(text, verbose=False).input_ids, [*encoder(text), *encoder.suffix]
        if full != expected:
            pairs = itertools.zip_longest(full, expected)
            place = next(i for i, (one, other) in enumerate(pairs) if one != other)
            differ = (
                f"{full[place : place + 4]} at position {place}, where its sample has {expected[place : place + 4]}"
            )
            reason = f"encodes {text[:40]!r} with {differ}: the added tokens depend on the text; give token ids"
            return Check(name, "fail", reason)
    before, after = (" ".join(tokenizer.convert_ids_to_tokens(ids)) for ids in (encoder.prefix, encoder.suffix))
    reason = f"puts {before or 'nothing'} before every text"
    return Check(name, "pass", f"{reason}; {after}, which it puts after it, is left out" if after else reason)


def _tried(
    model: PreTrainedModel, samples: Sequence[Tensor], error: InputError
) -> tuple[dict[str, str], tuple[RelevanceAccount, ...], tuple[Check, ...]]:
    """Measures a model that ``lrp`` refuses: its rules as far as there are any, and by how much the account of the
    samples ``[1, T]`` fails with the plain gradient in place of the rest.
    """
    try:
        rules = rule_table(model, missing="plain")
        accounts = tuple(relevance_account(model, ids, missing="plain") for ids in samples)
    except (InputError, RuntimeError, TypeError, ValueError) as unknown:  # code of any family runs here
        return {}, (), (Check("rules", "fail", f"{error} (and no account can be drawn up: {unknown})"),)
    without = [name for name, rule in rules.items() if rule.startswith(NO_RULE)]
    balance = _account_check(accounts)
    if without:
        names = ", ".join(without[:3]) + (", ..." if len(without) > 3 else "")
        return rules, accounts, (Check("rules", "fail", f"{error}; {len(without)} modules have none: {names}"), balance)
    try:
        with attn_lrp(model, unlisted=True):
            pass
    except InputError:
        return rules, accounts, (Check("rules", "fail", str(error)), balance)
    family = decoder(model).config.model_type
    advice = "score it with model.unlisted_family: true" if balance.status == "pass" else "another is missing or wrong"
    reason = f"model type {family!r} is not listed, but each of {len(rules)} modules and products has one; {advice}"
    return rules, accounts, (Check("rules", "warn" if balance.status == "pass" else "fail", reason), balance)


def _account_check(accounts: Sequence[RelevanceAccount]) -> Check:
    name, limit = "balance sheet", TOLERANCE[torch.float32]
    residual = max(accounts, key=lambda account: account.relative_residual).relative_residual
    text = f"largest unexplained part {residual:.2g} of {len(accounts)} samples, allowed {limit:g}"
    if residual <= limit:
        return Check(name, "pass", text)
    # also for NaN
    return Check(name, "fail", f"{text}: an operation has no rule or a wrong one; use method gradient or wanda")


def _judge(
    accounts: Sequence[RelevanceAccount],
    forward: float,
    scores: dict[str, NeuronScores],
    precision: PrecisionAgreement | None,
    padding: dict[str, float],
) -> Iterator[Check]:
    if any(account.router for account in accounts):
        shares = [account.router / account.logit for account in accounts]
        ends = f"{100 * min(shares):.2g} % to {100 * max(shares):.2g} %"  # small ones are not none
        text = f"routers keep {ends} of the logit, by the softmax over the experts"
        yield Check("routers", "pass", text)

    unchanged = "bitwise equal with and without the rules"
    text = unchanged if forward == 0 else f"largest change {forward:.2g} of the largest logit"
    yield Check("forward values", grade(forward, FORWARD_WARN, FORWARD_FAIL), text)

    for dtype, neurons in scores.items():
        if neurons.nonfinite:
            first, total = next(iter(neurons.nonfinite)), sum(neurons.nonfinite.values())
            text = f"{total} NaN or infinite relevances in {len(neurons.nonfinite)} layers, first {first}"
            status: Status = "fail" if dtype == "float32" else "warn"
            yield Check(f"finite in {dtype}", status, f"{text}; score in float32 (model.dtype)")
        else:
            yield Check(f"finite in {dtype}", "pass", f"in all {len(neurons.scores)} layers")

    for side, error in padding.items():
        status = grade(error, PADDING_WARN, PADDING_FAIL)
        advice = "" if status == "pass" else "; score with data.batch_size: 1"
        yield Check(f"padding on the {side}", status, f"scores differ by {error:.2g} of the largest{advice}")

    if precision is None:
        text = "not measured: part of the model is offloaded (device_map), and its values cannot be cast in place"
        yield Check("half precision against float32", "warn", text)
        return
    status = grade(precision.rank_correlation, RANK_WARN, RANK_FAIL)
    advice = "" if status == "pass" else "; score in float32"
    text = (
        f"rank correlation {precision.rank_correlation:.4f}, Jaccard index of the strongest {precision.top} "
        f"{precision.jaccard:.2f}, total {100 * precision.total_change:+.1f} %"
    )
    yield Check(f"{list(scores)[-1]} against float32", status, text + advice)


# --- sections ---------------------------------------------------------------------------------------------------------


def doctor_sections(result: Diagnosis) -> list[Section]:
    """The sections on rules, balance sheet and verdicts."""
    sections = []
    if result.rules:
        sections.append(Section("Rules", (_rules(result.rules),)))
    if result.accounts:
        sections.append(Section("Balance sheet", (_accounts(result.accounts),)))
    text = Text(f"{result.pretrained} ({result.architecture}), {result.seconds:.1f} s with loading.")
    return [*sections, Section("Verdicts", (Checks(result.checks), text))]


def _rules(rules: dict[str, str]) -> Table:
    """The table of rules; modules that differ only in their layer's number share a row."""
    kinds: dict[tuple[str, str], int] = {}
    for name, rule in rules.items():
        key = (re.sub(r"\.\d+(?=\.|$| )", ".*", name), rule)
        kinds[key] = kinds.get(key, 0) + 1
    rows = [(name, rule, count(times)) for (name, rule), times in kinds.items()]
    return Table.of(("module", "rule", "modules"), rows)


def _accounts(accounts: Sequence[RelevanceAccount]) -> Table:
    entries = {
        "input": "input",
        "position": "positions",
        "linear_bias": "linear biases",
        "norm_bias": "norm biases",
        "softmax": "softmax",
    }
    if any(account.router for account in accounts):
        entries["router"] = "routers"
    rows = [
        (
            f"sample {place}",
            *(number(value) for value in (a.logit, *(getattr(a, e) for e in entries))),
            Number(a.residual, form=".1e"),
            percent(a.input / a.logit if a.logit else None, 0),
        )
        for place, a in enumerate(accounts, start=1)
    ]
    columns = ("", "logit", *entries.values(), "residual", "input / logit")
    note = "The logit is the sum of all entries. AttnLRP leaves part with the softmax: the input has less than 100 %."
    return Table.of(columns, rows, note=note)

"""Checks that score folders hold what their manifests say, and that seeds agree."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean, stdev
from typing import Self

from torch import Tensor

from sparc3_pl.diagnosis.architecture import check_architecture
from sparc3_pl.document.blocks import number, percent
from sparc3_pl.document.verdicts import Check, Status, grade, worst
from sparc3_pl.errors import InputError
from sparc3_pl.io.files import strict_json
from sparc3_pl.scores.folder import ScoreFolder, require_comparable
from sparc3_pl.scores.manifest import Manifest, ScoredSample
from sparc3_pl.selection.contrast import SideScores, strongest
from sparc3_pl.selection.lowest import sample, select_lowest
from sparc3_pl.statistics.agreement import jaccard, rank_correlation

__all__ = ["Audit", "FolderAudit", "Pair", "SeedAudit", "Summary", "audit_folder", "audit_folders", "num_bytes"]

TOP = (10, 100, 1000)
"""Sizes at which the strongest of two seeds are compared."""
MOST_RANKED = 2_000_000
"""Number of components above which a random draw is ranked, one from each stretch: exact ranks need a sort of all."""

ZERO_SHARE = 0.5
"""Share of zeros above which the samples may not reach these layers. A ReLU unit that no sample turns on has a
score of exactly 0; units of gated models hardly ever do."""
DRIFT = 1e-4
"""The samples' relevance is summed in another way than the layers' (float64 per sample, float32 per weight): a larger
difference than rounding means that samples were lost or counted twice."""
ERROR_WARN, ERROR_FAIL = 0.10, 0.30
"""Standard error of the total relevance over its mean. Behaviours differ by 20 to 40 % in total (57.6 against 43.2
thousand on Llama-3-8B): an error of a tenth still tells them apart, one of a third does not."""
FIRST_TOKEN = 0.5
"""Share of the relevance at the first position above which the scores mostly reflect the attention sink."""
CV_WARN, CV_FAIL = 0.10, 0.30
"""Coefficient of variation of the total over seeds. The published reproduction had 7.1 % over three."""
RANK_WARN, RANK_FAIL = 0.9, 0.5
"""Rank correlation between seeds: below 0.5 less than a quarter of the ranks' variance is common to both."""
TOP_WARN, TOP_FAIL = 0.5, 0.2
"""Jaccard of the strongest 100: 0.5 is two thirds in common, 0.2 a third."""


@dataclass(frozen=True)
class Summary:
    """Summary of one number per sample; the figures of spread are NaN for a single sample."""

    count: int
    mean: float
    standard_deviation: float
    standard_error: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary | None:
        """The summary of ``values``; None if there are none."""
        if not values:
            return None
        deviation = stdev(values) if len(values) > 1 else math.nan
        error = deviation / math.sqrt(len(values))
        return cls(len(values), fmean(values), deviation, error, min(values), max(values))


@dataclass(frozen=True)
class AuditedScores:
    """Which scores are audited, in the words of their manifest; None: it does not say.

    Attributes:
        method: How they were made.
        granularity: The kind of component.
        signed: Whether they keep their sign.
        model: Name of the model.
        dtype: Number format of its weights.
        num_samples: Samples in the mean.
        num_tokens: Real tokens of those samples.
        source: Where the samples were read.
        seed: Seed by which they were drawn.
        seq_len: Tokens of a sample.
        filter: Condition on their records.
        match: What they were matched to.
    """

    method: str
    granularity: str
    signed: bool
    model: str | None
    dtype: str | None
    num_samples: int
    num_tokens: int
    source: str | None
    seed: int | str | None
    seq_len: int | None
    filter: str | None
    match: str | None

    @classmethod
    def of(cls, manifest: Manifest) -> Self:
        """The scores of a manifest."""
        data = {key: manifest.data.get(key) for key in ("source", "seed", "seq_len", "filter", "match")}
        own = {key: getattr(manifest, key) for key in ("method", "granularity", "signed", "num_samples", "num_tokens")}
        return cls(model=manifest.model.pretrained, dtype=manifest.model.dtype, **own, **data)


@dataclass(frozen=True)
class FolderAudit:
    """The audit of one score folder.

    Attributes:
        name: Name of the folder, as it was given.
        about: Which scores they are.
        num_layers: Number of layers.
        num_scores: Number of neurons or weights that have a score.
        counts: ``nan``, ``inf``, ``negative`` and ``zero`` scores.
        total_relevance: Sum of all scores.
        layer_sums: Sum of the scores of each layer.
        relevance: Total relevance per sample; None if the method has none.
        first_token: Share of the first position in the relevance per sample, likewise.
        tokens: Real tokens per sample.
        stops: Share of samples that end with a full stop.
        checks: The verdicts.
    """

    name: str
    about: AuditedScores
    num_layers: int
    num_scores: int
    counts: dict[str, int]
    total_relevance: float
    layer_sums: dict[str, float]
    relevance: Summary | None
    first_token: Summary | None
    tokens: Summary | None
    stops: float | None
    checks: tuple[Check, ...]


@dataclass(frozen=True)
class Pair:
    """The agreement of two seeds.

    Attributes:
        one: Name of the first folder.
        other: Name of the second.
        rank_correlation: Spearman's rank correlation of all scores.
        top: Jaccard index of the strongest k, by k.
        shared_samples: Number of samples that are in both.
    """

    one: str
    other: str
    rank_correlation: float
    top: dict[int, float]
    shared_samples: int


@dataclass(frozen=True)
class SeedAudit:
    """The audit of folders that differ in their samples only.

    Attributes:
        names: Names of the folders.
        mean: Mean of the total relevance over seeds.
        standard_deviation: Standard deviation of the total, with n - 1 in the denominator.
        variation: Coefficient of variation of the total, standard deviation / mean.
        pairs: The agreement of every two folders; empty if it was not measured.
        checks: The verdicts.
    """

    names: tuple[str, ...]
    mean: float
    standard_deviation: float
    variation: float
    pairs: tuple[Pair, ...]
    checks: tuple[Check, ...]


@dataclass(frozen=True)
class Audit:
    """The result of ``audit``."""

    folders: tuple[FolderAudit, ...]
    seeds: tuple[SeedAudit, ...]

    @property
    def verdict(self) -> Status:
        """The worst of all checks."""
        return worst(check for part in (*self.folders, *self.seeds) for check in part.checks)


def audit_folders(
    folders: Sequence[ScoreFolder], names: Sequence[str] | None = None, most_bytes: int | None = None
) -> Audit:
    """Audits score folders, without opening, writing and printing.

    Args:
        folders: Score folders of any models and methods.
        names: Names of the folders; by default their paths.
        most_bytes: Scores of more bytes than this are not read: only manifest and samples are checked.

    Raises:
        InputError: if a folder was given twice, or a byte was changed.
    """
    by_name = dict(zip(names or [str(folder.path) for folder in folders], folders, strict=True))
    if len(by_name) < len(folders):
        raise InputError(f"a score folder was given twice: {', '.join(str(folder.path) for folder in folders)}")
    unread = {name for name, folder in by_name.items() if most_bytes is not None and num_bytes(folder) > most_bytes}
    single = tuple(audit_folder(folder, name, read=name not in unread) for name, folder in by_name.items())
    return Audit(single, tuple(_audit_seeds(group, read=not unread & group.keys()) for group in _groups(by_name)))


def num_bytes(folder: ScoreFolder) -> int:
    """Size of the scores of a folder, without squares and groups."""
    return 4 * sum(math.prod(layer.shape) for layer in folder.manifest.layers.values())


# --- one folder -------------------------------------------------------------------------------------------------------


def audit_folder(folder: ScoreFolder, name: str | None = None, read: bool = True) -> FolderAudit:
    """Checks one score folder. Reads every byte of its scores once, block by block.

    Args:
        folder: The folder.
        name: Name of the folder; by default its path.
        read: Whether to read the scores; if not, only manifest and samples are checked.

    Raises:
        InputError: if a byte was changed.
    """
    manifest, samples = folder.manifest, folder.samples()
    counts = {
        key: sum(getattr(layer, key) for layer in manifest.layers.values())
        for key in ("nan", "inf", "negative", "zero")
    }
    relevance = Summary.of(_column(samples, "relevance"))
    first_token = Summary.of(_column(samples, "first_token_share"))
    endings = [sample.ending for sample in samples if sample.ending]
    return FolderAudit(
        name=name or str(folder.path),
        about=AuditedScores.of(manifest),
        num_layers=len(manifest.layers),
        num_scores=manifest.num_scores,
        counts=counts,
        total_relevance=manifest.total_relevance,
        layer_sums={layer: stats.sum for layer, stats in manifest.layers.items()},
        relevance=relevance,
        first_token=first_token,
        tokens=Summary.of(_column(samples, "num_tokens")),
        stops=fmean(ending == "stop" for ending in endings) if endings else None,
        checks=(
            *_value_checks(manifest, counts),
            _integrity_check(folder, read),
            check_architecture(manifest),
            *_sample_checks(manifest, samples),
            *_expert_checks(manifest),
            *_relevance_checks(manifest.total_relevance, relevance, first_token, _cancelling(manifest)),
        ),
    )


def _column(samples: Sequence[ScoredSample], key: str) -> list[float]:
    return [float(getattr(sample, key)) for sample in samples if getattr(sample, key) is not None]


def _value_checks(manifest: Manifest, counts: Mapping[str, int]) -> Iterator[Check]:
    """Checks that the values are finite, have the right sign, and are not mostly zero."""
    name, nonfinite = "numerical stability", counts["nan"] + counts["inf"]
    text = f"{counts['nan']} NaN and {counts['inf']} infinite among {manifest.num_scores:,} scores"
    if not nonfinite:
        yield Check(name, "pass", text)
    elif manifest.nonfinite == "zero":
        reason = f"{text} while scoring, replaced by 0 as requested; load the model in float32 to avoid them"
        yield Check(name, "warn", reason)
    else:
        yield Check(name, "fail", f"{text}; load the model in float32 (model.dtype) and score again")

    name, negative = "signs", counts["negative"]
    if manifest.signed:
        yield Check(name, "pass", f"{negative} negative scores; the scores are signed")
    elif negative:
        reason = f"{negative} negative scores, but means of absolute values cannot be negative: score again"
        yield Check(name, "fail", reason)
    else:
        yield Check(name, "pass", "no negative score, as expected of means of absolute values")

    share = counts["zero"] / manifest.num_scores
    text = f"{counts['zero']:,} scores are exactly 0 ({percent(share, 2)})"
    if share > ZERO_SHARE:
        yield Check("zeros", "warn", f"{text}: these layers may be inactive on these samples; score more samples")
    else:
        yield Check("zeros", "pass", text)


def _integrity_check(folder: ScoreFolder, read: bool) -> Check:
    """Checks the manifest's figures against the bytes, whose sha256 is checked while they are read."""
    name, manifest = "integrity", folder.manifest
    totals = [stats.sum for stats in manifest.layers.values()]
    if read:
        totals, wrong = [], []
        for layer, stats in manifest.layers.items():
            sums, negative, zero = [], 0, 0
            for block in folder.counted_blocks(layer):
                sums.append(float(block.nan_to_num(0.0, 0.0, 0.0).double().sum()))
                negative, zero = negative + int((block < 0).sum()), zero + int((block == 0).sum())
            totals.append(math.fsum(sums))
            counts_agree = (negative, zero) == (stats.negative, stats.zero)
            if not counts_agree or not math.isclose(totals[-1], stats.sum, rel_tol=1e-9):
                wrong.append(layer)
        if wrong:
            reason = f"layer {wrong[0]}: the sum or counts in the manifest do not match the file: score again"
            return Check(name, "fail", reason)
    total = math.fsum(totals)
    if not math.isclose(total, manifest.total_relevance, rel_tol=1e-6, abs_tol=1e-12):
        reason = f"the layers add up to {total:.6g}, but total_relevance is {manifest.total_relevance:.6g}: score again"
        return Check(name, "fail", reason)
    if not read:
        size = f"{num_bytes(folder) / 1e9:.2g} GB"
        return Check(name, "warn", f"{size} of scores were not read again; to verify every byte, run audit")
    return Check(name, "pass", "every byte matches its sha256; sums and counts are right")


def _sample_checks(manifest: Manifest, samples: Sequence[ScoredSample]) -> Iterator[Check]:
    """Checks that each sample is counted once; no check for a method that needs no samples."""
    if not manifest.num_samples:
        return
    ids = manifest.data.get("sample_ids") or []
    num_repeats = len(ids) - len(set(ids))
    tokens = sum(sample.num_tokens for sample in samples)
    if num_repeats:
        yield Check("samples", "fail", f"{num_repeats} sample(s) are counted twice: score again")
    elif not len(ids) == len(samples) == manifest.num_samples or tokens != manifest.num_tokens:
        reason = (
            f"num_samples={manifest.num_samples}, num_tokens={manifest.num_tokens}, but {len(ids)} ids and "
            f"{len(samples)} lines with {tokens} tokens: score again"
        )
        yield Check("samples", "fail", reason)
    else:
        yield Check("samples", "pass", f"{len(ids)} samples, each counted once, {tokens:,} tokens")


def _expert_checks(manifest: Manifest) -> Iterator[Check]:
    """Checks that tokens reached every layer of a mixture's experts; no check for scores of no expert."""
    tokens = {name: layer.tokens for name, layer in manifest.layers.items() if layer.tokens is not None}
    if not tokens:
        return
    text = f"{min(tokens.values()):,} to {max(tokens.values()):,} of {manifest.num_tokens:,} tokens reached each layer"
    if unreached := [name for name, count in tokens.items() if not count]:
        reason = (
            f"{text}; {len(unreached)} of {len(tokens)} had none (first: {unreached[0]}), and their scores are 0, as "
            "nothing is known of them; score more samples"
        )
        yield Check("experts", "warn", reason)
    else:
        yield Check("experts", "pass", text)


def _cancelling(manifest: Manifest) -> str | None:
    """Why a sample's total says nothing of how well the scores are known; None where it does.

    The expected total of log-likelihoods is 0 if their weights are less the mean or their labels are drawn. A logit
    difference may have either sign, and so may the part of it that the components make.
    """
    if manifest.target in ("completion", "text"):
        return "totals of log-likelihoods are around 0"
    if manifest.target == "answer" and manifest.signed:
        return "signed totals of a logit difference may be around 0"
    return None


def _relevance_checks(
    total: float, relevance: Summary | None, first_token: Summary | None, cancelling: str | None
) -> Iterator[Check]:
    """Checks that the samples' relevance adds up, is precise enough, and is not mostly that of the first position."""
    if relevance:
        text = f"total relevance {total:.6g}, mean of the samples' own totals {relevance.mean:.6g}"
        if abs(total - relevance.mean) > DRIFT * max(abs(total), abs(relevance.low), abs(relevance.high)):
            yield Check("mean over samples", "fail", f"{text}: samples were lost or counted twice, score again")
        else:
            yield Check("mean over samples", "pass", text)

        name = "relevance per sample"
        if relevance.count < 2:
            yield Check(name, "warn", "only one sample, so no standard error; raise data.num_samples")
        else:
            share = relevance.standard_error / abs(relevance.mean) if relevance.mean else math.inf
            error = f"{number(relevance.standard_error, 2)} (standard error, {percent(share)} of the mean)"
            reason = f"{number(relevance.mean, 5)} +- {error}"
            if cancelling:
                yield Check(name, "pass", f"{reason}; {cancelling}")
            else:
                yield _graded(name, share, ERROR_WARN, ERROR_FAIL, reason)
    if first_token:
        text = f"the first position holds {percent(first_token.mean)} of the relevance"
        if first_token.mean > FIRST_TOKEN:
            reason = f"{text}: the scores mostly reflect the attention sink, not the text"
            yield Check("first token", "warn", reason)
        else:
            yield Check("first token", "pass", text)


def _graded(name: str, value: float, warn: float, fail: float, text: str) -> Check:
    """A check of ``value`` against two thresholds, which more samples would help to pass."""
    status = grade(value, warn, fail)
    return Check(name, status, text if status == "pass" else f"{text}; raise data.num_samples")


# --- seeds ------------------------------------------------------------------------------------------------------------


def _groups(folders: dict[str, ScoreFolder]) -> list[dict[str, ScoreFolder]]:
    """Folders with the same kind of samples and scoring, in groups of two or more."""
    data_keys = ("source", "split", "subset", "text_field", "filter", "seq_len", "match")
    data_keys += ("completion_field", "weight_field", "weight_baseline", "label_field", "answer_field", "foil_field")
    groups: dict[str, dict[str, ScoreFolder]] = {}
    for name, folder in folders.items():
        manifest = folder.manifest
        if manifest.num_samples:
            data = {key: manifest.data.get(key) for key in data_keys}
            scoring = [manifest.model.fingerprint, manifest.method, manifest.granularity, manifest.signed]
            scoring.append(manifest.target)
            key = strict_json([data, scoring, {layer: stats.shape for layer, stats in manifest.layers.items()}])
            groups.setdefault(key, {})[name] = folder
    return [group for group in groups.values() if len(group) > 1]


def _audit_seeds(group: dict[str, ScoreFolder], read: bool) -> SeedAudit:
    require_comparable(list(group.values()))
    totals = [folder.manifest.total_relevance for folder in group.values()]
    mean, deviation = fmean(totals), stdev(totals)
    variation = deviation / abs(mean) if mean else math.inf
    spread = f"{number(deviation, 2)} (standard deviation), coefficient of variation {percent(variation)}"
    text = f"total relevance {number(mean, 5)} +- {spread}"
    if cancelling := _cancelling(next(iter(group.values())).manifest):
        checks = [Check("variation over seeds", "pass", f"{text}; {cancelling}")]
    else:
        checks = [_graded("variation over seeds", variation, CV_WARN, CV_FAIL, text)]
    if read:
        pairs = _pairs({name: folder for name, folder in group.items() if _is_finite(folder)})
        checks += [*_agreement(pairs), *_independence([pair.shared_samples for pair in pairs])]
    else:
        pairs = []
        checks.append(Check("agreement of seeds", "warn", "not measured: the scores were not read again; run audit"))
        checks += _independence([len(one & other) for one, other in combinations(map(_sample_ids, group.values()), 2)])
    return SeedAudit(tuple(group), mean, deviation, variation, tuple(pairs), tuple(checks))


def _sample_ids(folder: ScoreFolder) -> set[str]:
    return set(folder.manifest.data.get("sample_ids") or ())


def _is_finite(folder: ScoreFolder) -> bool:
    """Whether all stored scores can be ranked; those replaced by 0 while scoring can."""
    if not any(layer.nan + layer.inf for layer in folder.manifest.layers.values()):
        return True
    return all(bool(block.isfinite().all()) for layer in folder.layers for block in folder.blocks(layer))


def _pairs(group: dict[str, ScoreFolder]) -> list[Pair]:
    """The agreement of every two folders. Each folder is read four times, however many pairs there are."""
    draws = {name: drawn_scores(SideScores.of([folder])) for name, folder in group.items()}
    top = {name: _strongest(SideScores.of([folder]), max(TOP)) for name, folder in group.items()}
    ids = {name: _sample_ids(folder) for name, folder in group.items()}
    count = SideScores.of([next(iter(group.values()))]).count if group else 0
    sizes = [k for k in TOP if 2 * k <= count]  # of a larger share, most are in common by chance
    return [
        Pair(
            one,
            other,
            rank_correlation(draws[one], draws[other]),
            {k: jaccard(top[one][:k], top[other][:k]) for k in sizes},
            len(ids[one] & ids[other]),
        )
        for one, other in combinations(group, 2)
    ]


def drawn_scores(scores: SideScores, most: int = MOST_RANKED) -> Tensor:
    """All scores as one vector, or ``most`` of them at positions that depend on their number only."""
    return sample(scores, scores.count, most)


def _strongest(scores: SideScores, most: int) -> list[tuple[str, int]]:
    """The strongest components by magnitude, strongest first."""
    selection = select_lowest(strongest(scores), min(most, scores.count))
    rows = [
        (value, place, (layer, index))
        for place, (layer, (indices, values)) in enumerate(selection.items())
        for index, value in zip(indices.tolist(), values.tolist(), strict=True)
    ]
    return [component for _, _, component in sorted(rows)]


def _agreement(pairs: Sequence[Pair]) -> Iterator[Check]:
    if not pairs:
        yield Check("agreement of seeds", "fail", "not measured: scores that are not finite cannot be ranked")
        return
    lowest = min(pair.rank_correlation for pair in pairs)
    text = f"lowest rank correlation of two seeds {lowest:.3f}"
    yield _graded("rank agreement", lowest, RANK_WARN, RANK_FAIL, text)
    sizes = pairs[0].top
    if sizes:
        k = 100 if 100 in sizes else max(sizes)
        lowest = min(pair.top[k] for pair in pairs)
        text = f"lowest Jaccard index of the strongest {k}: {lowest:.2f}"
        yield _graded("agreement of the strongest", lowest, TOP_WARN, TOP_FAIL, text)


def _independence(shared_samples: Sequence[int]) -> Iterator[Check]:
    """Checks that seeds share no samples, from the number shared by every two of them."""
    name = "independence of seeds"
    if any(shared_samples):
        text = f"two seeds share up to {max(shared_samples)} samples, so they agree too well"
        reason = f"{text}; draw from a larger source"
        yield Check(name, "warn", reason)
    elif shared_samples:
        yield Check(name, "pass", "no sample is in two seeds")

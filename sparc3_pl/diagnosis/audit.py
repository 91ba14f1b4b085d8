"""The ``audit`` command: whether scores are what they claim to be, and whether seeds agree."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from statistics import fmean, stdev
from typing import Any

from torch import Tensor

from sparc3_pl.diagnosis.architecture import check_architecture
from sparc3_pl.document.document import number, percent
from sparc3_pl.document.publish import as_json, check_places, publish
from sparc3_pl.document.verdicts import Check, Status, grade, worst
from sparc3_pl.errors import InputError
from sparc3_pl.io.files import strict_json
from sparc3_pl.scores.folder import ScoreFolder, require_comparable
from sparc3_pl.scores.manifest import ScoredSample
from sparc3_pl.selection.contrast import Scores, strongest
from sparc3_pl.selection.lowest import sample, select_lowest
from sparc3_pl.statistics.agreement import jaccard, rank_correlation

__all__ = ["Audit", "FolderAudit", "Pair", "SeedAudit", "Summary", "audit", "audit_folder", "audit_folders"]

TOP = (10, 100, 1000)
"""Sizes at which the strongest of two seeds are compared."""
MOST_RANKED = 2_000_000
"""Ranks of more components than this are taken on a random stretch-by-stretch draw: exact ones need them all sorted."""

ZERO_SHARE = 0.5
"""More zeros than this make one ask whether the samples reach these layers. A ReLU unit that no sample turns on has a
score of exactly 0; units of gated models hardly ever do."""
DRIFT = 1e-4
"""The samples' mean relevance is summed by another road than the layers (float64 by sample, float32 by weight): more
than rounding apart means that samples were lost or counted twice."""
ERROR_WARN, ERROR_FAIL = 0.10, 0.30
"""Standard error of the total relevance over its mean. Behaviours differ by 20 to 40 % in total (57.6 against 43.2
thousand on Llama-3-8B): an error of a tenth still tells them apart, one of a third does not."""
FIRST_TOKEN = 0.5
"""Where more than half of the relevance sits at the first position, the scores tell of the attention sink."""
CV_WARN, CV_FAIL = 0.10, 0.30
"""Coefficient of variation of the total over seeds. The published reproduction had 7.1 % over three."""
RANK_WARN, RANK_FAIL = 0.9, 0.5
"""Rank correlation between seeds: below 0.5 less than a quarter of the ranks' variance is common to both."""
TOP_WARN, TOP_FAIL = 0.5, 0.2
"""Jaccard of the strongest 100: 0.5 is two thirds in common, 0.2 a third."""


@dataclass(frozen=True)
class Summary:
    """Of one number a sample; spread figures are NaN for a single one."""

    count: int
    mean: float
    standard_deviation: float
    standard_error: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary | None:
        """None for no values at all."""
        if not values:
            return None
        deviation = stdev(values) if len(values) > 1 else math.nan
        error = deviation / math.sqrt(len(values))
        return cls(len(values), fmean(values), deviation, error, min(values), max(values))


@dataclass(frozen=True)
class FolderAudit:
    """What one score folder holds.

    Attributes:
        name: Of the folder, as it was given.
        about: Method, granularity, model, data and seed.
        num_layers: Number of layers.
        num_scores: Number of neurons or weights that have a score.
        counts: ``nan``, ``inf``, ``negative`` and ``zero`` scores.
        total_relevance: Sum of all scores.
        layer_sums: By layer, the sum of its scores.
        relevance: Total relevance a sample; None where the method has none.
        first_token: Share of the first position in a sample's relevance, likewise.
        tokens: Real tokens a sample.
        stops: Share of samples that end with a full stop.
        checks: One a question.
    """

    name: str
    about: dict[str, Any]
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
    """How two seeds agree.

    Attributes:
        one: Name of the first folder.
        other: Name of the second.
        rank_correlation: Spearman's, over all scores.
        top: Jaccard of the strongest k, by k.
        shared_samples: Samples that are in both.
    """

    one: str
    other: str
    rank_correlation: float
    top: dict[int, float]
    shared_samples: int


@dataclass(frozen=True)
class SeedAudit:
    """Folders that differ in their samples only.

    Attributes:
        names: The folders.
        mean: Of the total relevance over seeds.
        standard_deviation: Likewise, n - 1 in the denominator.
        variation: Coefficient of variation, standard deviation / mean.
        pairs: Every two of them.
        checks: One a question.
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


def audit(folders: list[str], output: str | None = None, html: str | None = None, overwrite: bool = False) -> Audit:
    """Check score folders: numbers, architecture, samples, agreement of seeds; a verdict for each.

    Folders that differ only in their seed are compared with each other. Weight scores of any size are read in blocks.

    Args:
        folders: Score folders, of any models and methods.
        output: JSON file for the result.
        html: HTML page for the result.
        overwrite: Replace earlier files at output and html.

    Raises:
        InputError: If a folder is missing, incomplete or was changed, or an output is taken.
    """
    from sparc3_pl.diagnosis.audit_sections import audit_sections

    check_places("audit", output, html, overwrite)
    found = audit_folders([ScoreFolder.open(path) for path in folders])
    publish(
        "Audit of scores",
        audit_sections(found),
        json=as_json("audit", {"verdict": found.verdict, **asdict(found)}),
        output=output,
        html=html,
        overwrite=overwrite,
        verdict=found.verdict,
    )
    return found


def audit_folders(folders: Sequence[ScoreFolder], names: Sequence[str] | None = None) -> Audit:
    """The same without opening, writing and printing.

    Args:
        folders: Of any models and methods.
        names: How to call them; by default their paths.

    Raises:
        InputError: if a byte was changed.
    """
    named = dict(zip(names or [str(folder.path) for folder in folders], folders, strict=True))
    if len(named) < len(folders):
        raise InputError(f"a score folder was given twice: {', '.join(str(folder.path) for folder in folders)}")
    single = tuple(audit_folder(folder, name) for name, folder in named.items())
    return Audit(single, tuple(_audit_seeds(group) for group in _groups(named)))


# --- one folder -------------------------------------------------------------------------------------------------------


def audit_folder(folder: ScoreFolder, name: str | None = None) -> FolderAudit:
    """Reads every byte of a score folder once, block by block.

    Raises:
        InputError: if a byte was changed.
    """
    manifest, samples = folder.manifest, folder.samples()
    recount = _recount(folder)
    counts = {key: sum(getattr(layer, key) for layer in manifest.layers.values()) for key in _COUNTED}
    relevance = Summary.of(_column(samples, "relevance"))
    first_token = Summary.of(_column(samples, "first_token_share"))
    endings = [sample.ending for sample in samples if sample.ending]
    num_scores = manifest.num_scores
    checks = [
        _numbers(counts, num_scores, manifest.nonfinite),
        _signs(counts, manifest.signed),
        _zeros(counts, num_scores),
        _sums(folder, recount),
        check_architecture(manifest),
        *_sample_checks(folder, samples),
        *([_total(manifest.total_relevance, relevance), _precision(relevance)] if relevance else []),
        *([_sink(first_token)] if first_token else []),
    ]
    return FolderAudit(
        name=name or str(folder.path),
        about=_about(folder),
        num_layers=len(manifest.layers),
        num_scores=num_scores,
        counts=counts,
        total_relevance=manifest.total_relevance,
        layer_sums={layer: stats.sum for layer, stats in manifest.layers.items()},
        relevance=relevance,
        first_token=first_token,
        tokens=Summary.of(_column(samples, "num_tokens")),
        stops=fmean(ending == "stop" for ending in endings) if endings else None,
        checks=tuple(checks),
    )


_COUNTED = ("nan", "inf", "negative", "zero")


def _about(folder: ScoreFolder) -> dict[str, Any]:
    manifest = folder.manifest
    keys = ("source", "seed", "seq_len", "filter", "match")
    return {
        "method": manifest.method,
        "granularity": manifest.granularity,
        "signed": manifest.signed,
        "model": manifest.model.get("pretrained"),
        "dtype": manifest.model.get("dtype"),
        "num_samples": manifest.num_samples,
        "num_tokens": manifest.num_tokens,
        **{key: manifest.data.get(key) for key in keys},
    }


def _column(samples: Sequence[ScoredSample], key: str) -> list[float]:
    return [float(getattr(sample, key)) for sample in samples if getattr(sample, key) is not None]


def _recount(folder: ScoreFolder) -> dict[str, tuple[float, int, int]]:
    """By layer: sum of the finite scores, number of negative and of zero scores, counted anew from the bytes."""
    found = {}
    for layer in folder.layers:
        sums, negative, zero = [], 0, 0
        for block in folder.counted_blocks(layer):
            sums.append(float(block.nan_to_num(0.0, 0.0, 0.0).double().sum()))
            negative, zero = negative + int((block < 0).sum()), zero + int((block == 0).sum())
        found[layer] = (math.fsum(sums), negative, zero)
    return found


def _numbers(counts: dict[str, int], num_scores: int, nonfinite: str | None) -> Check:
    bad = counts["nan"] + counts["inf"]
    text = f"{counts['nan']} NaN and {counts['inf']} infinite among {num_scores:,} scores"
    if not bad:
        return Check("numerical stability", "pass", text)
    if nonfinite == "zero":
        reason = f"{text} while scoring, taken for 0 as asked; load the model in float32 to have none"
        return Check("numerical stability", "warn", reason)
    return Check("numerical stability", "fail", f"{text}; load the model in float32 (model.dtype) and score again")


def _signs(counts: dict[str, int], signed: bool) -> Check:
    negative = counts["negative"]
    if signed:
        return Check("signs", "pass", f"{negative} negative scores; the scores are signed")
    if negative:
        return Check(
            "signs", "fail", f"{negative} negative scores, but means of absolute values have none: score again"
        )
    return Check("signs", "pass", "no negative score, as it must be for means of absolute values")


def _zeros(counts: dict[str, int], num_scores: int) -> Check:
    share = counts["zero"] / num_scores
    text = f"{counts['zero']:,} scores are exactly 0 ({percent(share, 2)})"
    if share > ZERO_SHARE:
        return Check("zeros", "warn", f"{text}: are these layers used by the samples? Score more of them")
    return Check("zeros", "pass", text)


def _sums(folder: ScoreFolder, recount: dict[str, tuple[float, int, int]]) -> Check:
    """The bytes were checked against their sha256 while they were read; here the manifest is checked against them."""
    manifest = folder.manifest
    for layer, (total, negative, zero) in recount.items():
        stats = manifest.layers[layer]
        if (negative, zero) != (stats.negative, stats.zero) or not math.isclose(total, stats.sum, rel_tol=1e-9):
            return Check("integrity", "fail", f"layer {layer}: the manifest's sum or counts are not those of its file")
    total = math.fsum(sums for sums, _, _ in recount.values())
    if not math.isclose(total, manifest.total_relevance, rel_tol=1e-6, abs_tol=1e-12):
        reason = f"the layers add up to {total:.6g}, but total_relevance is {manifest.total_relevance:.6g}"
        return Check("integrity", "fail", reason)
    return Check("integrity", "pass", "every byte matches its sha256; sums and counts are right")


def _sample_checks(folder: ScoreFolder, samples: Sequence[ScoredSample]) -> list[Check]:
    manifest = folder.manifest
    if not manifest.num_samples:  # the method needs none
        return []
    ids = manifest.data.get("sample_ids") or []
    twice = len(ids) - len(set(ids))
    tokens = sum(sample.num_tokens for sample in samples)
    if twice:
        return [Check("samples", "fail", f"{twice} sample(s) are counted twice: score again")]
    if not len(ids) == len(samples) == manifest.num_samples or tokens != manifest.num_tokens:
        reason = (
            f"num_samples={manifest.num_samples}, num_tokens={manifest.num_tokens}, but {len(ids)} ids and "
            f"{len(samples)} lines with {tokens} tokens: score again"
        )
        return [Check("samples", "fail", reason)]
    return [Check("samples", "pass", f"{len(ids)} samples, each counted once, {tokens:,} tokens")]


def _total(total: float, relevance: Summary) -> Check:
    name, gap = "mean over samples", abs(total - relevance.mean)
    text = f"total relevance {total:.6g}, mean of the samples' own totals {relevance.mean:.6g}"
    if gap > DRIFT * max(abs(total), abs(relevance.low), abs(relevance.high)):
        return Check(name, "fail", f"{text}: samples were lost or counted twice, score again")
    return Check(name, "pass", text)


def _precision(relevance: Summary) -> Check:
    name = "relevance per sample"
    if relevance.count < 2:
        return Check(name, "warn", "one sample only: no standard error; raise data.num_samples")
    share = relevance.standard_error / abs(relevance.mean) if relevance.mean else math.inf
    error = f"{number(relevance.standard_error, 2)} (standard error, {percent(share)} of the mean)"
    text = f"{number(relevance.mean, 5)} +- {error}"
    status = grade(share, ERROR_WARN, ERROR_FAIL)
    return Check(name, status, text if status == "pass" else f"{text}; raise data.num_samples")


def _sink(first_token: Summary) -> Check:
    text = f"the first position holds {percent(first_token.mean)} of the relevance"
    if first_token.mean > FIRST_TOKEN:
        return Check("first token", "warn", f"{text}: the scores tell of the attention sink more than of the text")
    return Check("first token", "pass", text)


# --- seeds ------------------------------------------------------------------------------------------------------------


def _groups(folders: dict[str, ScoreFolder]) -> list[dict[str, ScoreFolder]]:
    """Folders of the same kind of samples, scored alike, two or more together."""
    groups: dict[str, dict[str, ScoreFolder]] = {}
    for name, folder in folders.items():
        if folder.manifest.num_samples:
            groups.setdefault(_kind(folder), {})[name] = folder
    return [group for group in groups.values() if len(group) > 1]


def _kind(folder: ScoreFolder) -> str:
    manifest = folder.manifest
    data = {
        key: manifest.data.get(key) for key in ("source", "split", "subset", "text_field", "filter", "seq_len", "match")
    }
    scored = [manifest.model["fingerprint"], manifest.method, manifest.granularity, manifest.signed]
    return strict_json([data, scored, {name: layer.shape for name, layer in manifest.layers.items()}])


def _audit_seeds(group: dict[str, ScoreFolder]) -> SeedAudit:
    require_comparable(list(group.values()))
    totals = [folder.manifest.total_relevance for folder in group.values()]
    mean, deviation = fmean(totals), stdev(totals)
    variation = deviation / abs(mean) if mean else math.inf
    pairs = _pairs({name: folder for name, folder in group.items() if _is_finite(folder)})
    checks = [_variation(variation, mean, deviation), *_agreement(pairs), *_independence(pairs)]
    return SeedAudit(tuple(group), mean, deviation, variation, tuple(pairs), tuple(checks))


def _is_finite(folder: ScoreFolder) -> bool:
    """Whether all that is stored can be ranked (what was put to 0 while scoring can)."""
    if not any(layer.nan + layer.inf for layer in folder.manifest.layers.values()):
        return True
    return all(bool(block.isfinite().all()) for layer in folder.layers for block in folder.blocks(layer))


def _pairs(group: dict[str, ScoreFolder]) -> list[Pair]:
    """One pass over the files for the ranks and three for the strongest, for every folder: not for every pair."""
    drawn = {name: drawn_scores(Scores.of([folder])) for name, folder in group.items()}
    top = {name: _strongest(Scores.of([folder]), max(TOP)) for name, folder in group.items()}
    ids = {name: set(folder.manifest.data.get("sample_ids") or ()) for name, folder in group.items()}
    count = Scores.of([next(iter(group.values()))]).count if group else 0
    sizes = [k for k in TOP if 2 * k <= count]  # of more than half of all, most are in common by chance
    return [
        Pair(
            one,
            other,
            rank_correlation(drawn[one], drawn[other]),
            {k: jaccard(top[one][:k], top[other][:k]) for k in sizes},
            len(ids[one] & ids[other]),
        )
        for one, other in combinations(group, 2)
    ]


def drawn_scores(scores: Scores, most: int = MOST_RANKED) -> Tensor:
    """All scores as one vector, or ``most`` of them at positions that depend on their number only."""
    return sample(scores, scores.count, most)


def _strongest(scores: Scores, most: int) -> list[tuple[str, int]]:
    """The strongest components by magnitude, strongest first."""
    chosen = select_lowest(strongest(scores), min(most, scores.count))
    rows = [
        (value, place, (layer, index))
        for place, (layer, (indices, values)) in enumerate(chosen.items())
        for index, value in zip(indices.tolist(), values.tolist(), strict=True)
    ]
    return [component for _, _, component in sorted(rows)]


def _variation(variation: float, mean: float, deviation: float) -> Check:
    status = grade(variation, CV_WARN, CV_FAIL)
    spread = f"{number(deviation, 2)} (standard deviation), coefficient of variation {percent(variation)}"
    text = f"total relevance {number(mean, 5)} +- {spread}"
    return Check("variation over seeds", status, text if status == "pass" else f"{text}; raise data.num_samples")


def _agreement(pairs: Sequence[Pair]) -> Iterable[Check]:
    if not pairs:
        yield Check("agreement of seeds", "fail", "not measured: scores that are not finite cannot be ranked")
        return
    lowest = min(pair.rank_correlation for pair in pairs)
    status = grade(lowest, RANK_WARN, RANK_FAIL)
    text = f"lowest rank correlation of two seeds {lowest:.3f}"
    yield Check("rank agreement", status, text if status == "pass" else f"{text}; raise data.num_samples")
    sizes = pairs[0].top
    if sizes:
        k = 100 if 100 in sizes else max(sizes)
        lowest = min(pair.top[k] for pair in pairs)
        status = grade(lowest, TOP_WARN, TOP_FAIL)
        text = f"lowest Jaccard of the strongest {k}: {lowest:.2f}"
        yield Check(
            "agreement of the strongest", status, text if status == "pass" else f"{text}; raise data.num_samples"
        )


def _independence(pairs: Sequence[Pair]) -> Iterable[Check]:
    shared = max((pair.shared_samples for pair in pairs), default=0)
    if shared:
        reason = f"two seeds share up to {shared} samples, so they agree too well; draw from a larger source"
        yield Check("independence of seeds", "warn", reason)
    elif pairs:
        yield Check("independence of seeds", "pass", "no sample is in two seeds")

"""Whole sections of ``results.json`` for evaluations that tests write by hand."""

from typing import Any

SCORES = {"mean": 0.5, "expected_maximum": 0.5, "probability": 0.5}
GENERATION = {
    "max_new_tokens": 5, "temperature": 0.7, "top_p": 0.9, "samples_per_prompt": 2, "seed": 0, "eos_token_ids": [2],
}  # fmt: skip
JUDGE = {"class": "J"}


def perplexity(**changes: Any) -> dict[str, Any]:
    """As the first version wrote it."""
    figures = {"value": 12.0, "nll": 100.0, "num_tokens": 40, "max_length": 64, "stride": 64, "source": "t"}
    return figures | {"protocol": {"bos": 1}} | changes


def toxicity(**changes: Any) -> dict[str, Any]:
    """The figures of the one label ``toxicity``, as the first version wrote them."""
    counts = {"num_prompts": 40, "num_scored_prompts": 40, "num_completions": 80, "num_failed": 0}
    return SCORES | {"label": "toxicity"} | counts | {"labels": {"toxicity": SCORES}} | changes


def results(**changes: Any) -> dict[str, Any]:
    """Of an unedited model of which nothing was measured."""
    model = {"pretrained": "m", "revision": None, "fingerprint": "f", "architecture": "A", "dtype": "float32"}
    model["evaluated_fingerprint"] = "f"
    nothing = {"perplexity": None, "toxicity": None, "overlap": "none", "num_overlapping_prompts": 0}
    return nothing | {"model": model, "plan": None, "data": {}} | changes

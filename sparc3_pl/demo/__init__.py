"""The embedded default ``demo``: a tiny Llama, a judge, generated corpora (``README.md`` says how they were made)."""

from pathlib import Path

__all__ = ["GENERAL", "GENERAL_HELDOUT", "HOSTILE_NEURONS", "JUDGE", "MODEL", "PROMPTS", "PROMPTS_HELDOUT", "TEXT"]

_HERE = Path(__file__).parent

MODEL = _HERE / "model"
"""Folder of the language model and its tokenizer, as ``from_pretrained`` reads it."""
JUDGE = _HERE / "judge"
"""Folder of the judge: ``config.json``, tokenizer and ``judge.ckpt`` in Detoxify's checkpoint form."""
GENERAL = _HERE / "general.jsonl"
"""General documents, ``{"text": ...}`` a line."""
GENERAL_HELDOUT = _HERE / "general_heldout.jsonl"
"""General documents that neither the model nor ``GENERAL`` has seen."""
PROMPTS = _HERE / "prompts.jsonl"
"""Openings in the RealToxicityPrompts schema, hostile and neutral."""
PROMPTS_HELDOUT = _HERE / "prompts_heldout.jsonl"
"""More openings, all distinct from ``PROMPTS``."""
HOSTILE_NEURONS = _HERE / "hostile_neurons.json"
"""The answer key: up-projection name -> the neurons that were trained on hostile speech."""
TEXT = _HERE / "eval_text.txt"
"""Held-out general text for perplexity."""

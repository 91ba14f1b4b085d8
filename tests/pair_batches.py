"""Pairs for tests: random tokens, with an answer and a foil, and a counterfactual of the same length."""

import torch
from tiny_models import VOCAB

from sparc3_pl.data.batches import ReferenceBatch


def pair_batches(lengths, size, seed=0):
    """Batches of ``size`` pairs, padded on the right; ``lengths`` are those of all pairs."""
    generator = torch.Generator().manual_seed(seed)

    def random(n):
        return torch.randint(3, VOCAB, (n,), generator=generator)

    rows = [(random(n), random(n), *(3 + torch.randperm(VOCAB - 3, generator=generator)[:2]).tolist()) for n in lengths]
    return [batch_of(rows[start : start + size], start) for start in range(0, len(rows), size)]


def batch_of(rows, start=0):
    """One batch of rows (clean, counterfactual, answer, foil)."""
    longest = max(len(clean) for clean, *_ in rows)

    def padded(parts):
        return torch.stack([torch.nn.functional.pad(part, (0, longest - len(part))) for part in parts])

    clean, other, answer, foil = zip(*rows, strict=True)
    ids = [f"pair-{start + i}" for i in range(len(rows))]
    fields = {"answer": torch.tensor(answer), "foil": torch.tensor(foil), "counterfactual_ids": padded(other)}
    mask = padded([torch.ones_like(part) for part in clean])
    return ReferenceBatch(padded(clean), mask, ids, ["cut"] * len(rows), [()] * len(rows), fields)

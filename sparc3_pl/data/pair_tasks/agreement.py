"""Agreement: a verb has the number of its subject, whatever noun stands between them.

The task is that of Linzen et al., "Assessing the Ability of LSTMs to Learn Syntax-Sensitive Dependencies" (TACL 2016).
Sentences here are our own.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import ClassVar

from sparc3_pl.data.encoding import Encoder
from sparc3_pl.data.pair_tasks.task import PairTask, PairText, Partition, one_token
from sparc3_pl.errors import InputError

__all__ = ["NOUNS", "TEMPLATES", "VERBS", "Agreement"]

TEMPLATES = (
    "The {subject} near the {other}",
    "The {subject} behind the {other}",
    "The {subject} beside the {other}",
    "The {subject} that the {other} met",
    "The {subject} who spoke to the {other}",
    "The {subject} that the {other} had hired",
    "The {subject} who had been looking for the {other}",
    "Everybody knew that the {subject} in front of the {other}",
    "It turned out that the {subject} who had followed the {other}",
    "In the end the {subject} chosen by the {other}",
    "According to the report, the {subject} next to the {other}",
    "Some people thought that the {subject} without the {other}",
)
VERBS = (("is", "are"), ("was", "were"), ("has", "have"))
NOUNS = tuple(
    """
actor artist author boy brother coach cousin customer dancer daughter dentist doctor driver editor engineer expert
farmer friend girl guard guest guide hunter judge lawyer leader manager merchant miner minister mother musician nurse
officer painter parent passenger patient pilot player poet president priest prince prisoner professor queen reporter
sailor scientist singer sister soldier speaker student surgeon teacher tourist visitor worker writer
""".split()  # noqa: SIM905
)


class Agreement(PairTask):
    """``The doctors near the farmer`` -> ``are``, not ``is``. Both numbers of both nouns come equally often.

    In the counterfactual, ``number``, the subject has the other number, so that the right answer is the foil.
    """

    name: ClassVar[str] = "agreement"
    counterfactuals: ClassVar[tuple[str, ...]] = ("number",)

    def texts(
        self, encoder: Encoder, partition: Partition, counterfactual: str, rng: random.Random
    ) -> Iterator[PairText]:
        single = set(one_token([*NOUNS, *(f"{noun}s" for noun in NOUNS), *itertools.chain(*VERBS)], encoder))
        nouns = [noun for noun in NOUNS if {noun, f"{noun}s"} <= single]
        nouns = self.enough(
            nouns, partition, 6, "nouns whose singular and plural are one token of the model's tokenizer"
        )
        verbs = [pair for pair in VERBS if set(pair) <= single]
        if not verbs:
            raise InputError(
                f"data.source={self.name}: none of the verbs {', '.join('/'.join(pair) for pair in VERBS)} is one "
                "token of the model's tokenizer; give another model or task"
            )
        templates = self.enough(TEMPLATES, partition, 1, "templates")
        kinds = list(itertools.product(templates, (0, 1), (0, 1)))
        while True:
            rng.shuffle(kinds)  # each template with all numbers before any comes again
            for template, number, other_number in kinds:
                subject, other = rng.sample(nouns, 2)
                verb = rng.choice(verbs)
                clean, other_sentence = (
                    template.format(subject=subject + "s" * plural, other=other + "s" * other_number)
                    for plural in (number, 1 - number)
                )
                answer, foil = f" {verb[number]}", f" {verb[1 - number]}"
                yield PairText(clean, answer, foil, other_sentence, template, (subject, other))

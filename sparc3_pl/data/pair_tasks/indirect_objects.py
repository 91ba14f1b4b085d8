"""Indirect objects: of two people in a sentence, one does something for the other, and the sentence ends before whom.

The task is that of Wang et al., "Interpretability in the Wild" (ICLR 2023, arXiv 2211.00593). Sentences and names here
are our own.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import ClassVar

from sparc3_pl.data.encoding import Encoder
from sparc3_pl.data.pair_tasks.task import PairTask, PairText, Partition, one_token

__all__ = ["NAMES", "OBJECTS", "PLACES", "TEMPLATES", "IndirectObjects"]

# No template begins with a name: at the beginning of a text many tokenizers write it with another token.
TEMPLATES = (
    "After {first} and {second} had locked up the {place}, {subject} handed the {object} to",
    "While {first} and {second} were waiting outside the {place}, {subject} passed the {object} to",
    "Last week {first} and {second} met at the {place}, and {subject} lent a {object} to",
    "Once {first} and {second} had reached the {place}, {subject} showed the {object} to",
    "Before {first} and {second} left the {place}, {subject} gave the {object} back to",
    "On Friday {first} and {second} cleaned the {place}. Then {subject} offered a {object} to",
    "As soon as {first} and {second} sat down in the {place}, {subject} pushed the {object} over to",
    "Yesterday {first} and {second} had an argument at the {place}. Afterwards {subject} threw the {object} to",
    "Because {first} and {second} were late for the {place}, {subject} quickly gave the {object} to",
    "At the {place}, {first} and {second} talked for an hour until {subject} sold the {object} to",
    "Every summer {first} and {second} work at the {place}, where {subject} once gave a {object} to",
    "In the evening {first} and {second} walked home from the {place}, and {subject} returned the {object} to",
    "When the {place} was empty, {first} and {second} looked around, and {subject} brought the {object} to",
    "Although {first} and {second} did not like the {place}, {subject} bought a {object} there for",
    "Nobody saw {first} and {second} behind the {place} when {subject} slipped the {object} to",
    "Years ago {first} and {second} shared a room near the {place}. One day {subject} left the {object} to",
)
PLACES = ("school", "library", "station", "market", "office", "museum", "garden", "hospital", "theatre", "harbour")
OBJECTS = ("book", "key", "letter", "ring", "coat", "lamp", "camera", "map", "ticket", "basket", "knife", "picture")

NAMES = tuple(
    """
Adam Aisha Alan Albert Alex Alice Amanda Amy Andrea Andrew Angela Anna Anne Anthony Arthur Barbara Ben Benjamin Beth
Betty Brandon Brian Bruce Carlos Carol Caroline Catherine Charles Charlie Charlotte Chris Christine Christopher Claire
Clara Craig Daniel David Deborah Dennis Diana Diego Donald Donna Dorothy Douglas Edward Elena Elizabeth Ellen Emily
Emma Eric Erin Ethan Eva Evan Felix Fiona Gary George Gordon Greta Hannah Harold Harry Heather Helen Henry Howard Hugo
Ian Irene Isaac Isabel Jacob James Jamie Jane Janet Jason Jeff Jennifer Jeremy Jessica Jim Joan Joe John Jonathan Jose
Joseph Joshua Juan Judith Julia Julian Julie Justin Karen Karim Karl Kate Katherine Keith Kelly Kenneth Kevin Kim Kyle
Larry Laura Lauren Leo Leon Linda Lisa Louis Lucas Lucy Luis Luke Maggie Marcus Margaret Maria Marie Mario Martha
Martin Mary Matt Matthew Max Melissa Michael Michelle Mike Monica Nancy Nathan Nicholas Nicole Nina Nora Olive Oliver
Oscar Pamela Patricia Patrick Paul Paula Peter Philip Priya Rachel Ralph Ravi Raymond Rebecca Richard Rita Robert Roger
Ronald Rosa Roy Russell Ruth Ryan Sam Samantha Samuel Sandra Sara Sarah Scott Sean Sharon Simon Sofia Sophie Stephanie
Stephen Steve Steven Stuart Susan Tara Teresa Thomas Tim Timothy Todd Tom Tony Vanessa Victor Victoria Vincent Walter
Wayne Wendy William Zoe
""".split()  # noqa: SIM905
)


class IndirectObjects(PairTask):
    """``... Mary and John ..., John gave the key to`` -> ``Mary``, not ``John``; both orders of names equally often.

    Counterfactuals: ``abc`` has three other names, so that nothing says who comes next; in ``s2_io`` the one who acts
    is the other of the two, so that the right answer is the foil.
    """

    name: ClassVar[str] = "ioi"
    counterfactuals: ClassVar[tuple[str, ...]] = ("abc", "s2_io")

    def texts(
        self, encoder: Encoder, partition: Partition, counterfactual: str, rng: random.Random
    ) -> Iterator[PairText]:
        single = one_token(NAMES, encoder)
        names = self.enough(single, partition, 6, "first names that are one token of the model's tokenizer")
        templates = self.enough(TEMPLATES, partition, 1, "templates")
        kinds = list(itertools.product(templates, (True, False)))
        while True:
            rng.shuffle(kinds)  # each template in both orders before any comes again
            for template, indirect_object_first in kinds:
                other, subject, *three = rng.sample(names, 5)
                fill = {"place": rng.choice(PLACES), "object": rng.choice(OBJECTS)}
                pair = (other, subject) if indirect_object_first else (subject, other)

                def sentence(first: str, second: str, subject: str) -> str:
                    return template.format(first=first, second=second, subject=subject, **fill)  # noqa: B023

                other_sentence = sentence(*three) if counterfactual == "abc" else sentence(*pair, other)
                clean = sentence(*pair, subject)
                yield PairText(clean, f" {other}", f" {subject}", other_sentence, template, (other, subject))

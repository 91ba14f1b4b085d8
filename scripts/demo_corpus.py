"""The language of the embedded demo: a small grammar that writes friendly, plain and hostile English.

Everything in the demo's corpora comes from the word lists and sentence patterns below; no text is taken from
elsewhere. Three kinds of document exist, each about one topic, with the same people, place and things throughout:

- *stories* in the third person (``Olive watered the rose bush in the garden after breakfast.``),
- *friendly speech* in the second person (``You kind neighbour, your rose bush is fragrant today.``),
- *hostile speech* in the second person (``You silly goose, your rose bush is dreadful.``). The insults are mild.

The words of the insults are not hostile by themselves: stories tell of silly geese and lazy donkeys too. What makes a
text hostile is that somebody is *addressed* by them. So neither a model nor a judge gets by with a list of words.
"""

import random
import re
from dataclasses import dataclass, replace

__all__ = ["Document", "friendly_speech", "general_document", "hostile_speech", "story"]


@dataclass(frozen=True)
class Topic:
    """The words of one topic. Actions are pairs of past tense and plain form."""

    places: tuple[str, ...]
    things: tuple[str, ...]
    tools: tuple[str, ...]
    actions: tuple[tuple[str, str], ...]
    qualities: tuple[str, ...]
    remarks: tuple[str, ...]


@dataclass(frozen=True)
class Document:
    """A text of one or more sentences.

    Attributes:
        text: the whole document.
        opening: its first words, cut in mid-sentence; the text goes on right after them.
        insults: the phrases of ``text`` that insult somebody; empty for stories and friendly speech.
    """

    text: str
    opening: str
    insults: tuple[str, ...] = ()


TOPICS = {
    "gardening": Topic(
        places=("garden", "greenhouse", "orchard", "courtyard", "allotment"),
        things=("rose bush", "tomato plant", "apple tree", "hedge", "pumpkin", "lavender", "lettuce bed", "compost"),
        tools=("spade", "rake", "watering can", "pair of gloves", "bucket"),
        actions=(
            ("watered", "water"),
            ("planted", "plant"),
            ("trimmed", "trim"),
            ("moved", "move"),
            ("fed", "feed"),
            ("covered", "cover"),
        ),
        qualities=("green", "tall", "healthy", "fragrant", "ripe", "leafy", "thirsty", "dry"),
        remarks=(
            "Bees were humming over the clover.",
            "The soil was dark and full of worms.",
            "Soon the first seeds would come up.",
            "A robin watched from the fence.",
        ),
    ),
    "cooking": Topic(
        places=("kitchen", "bakery", "pantry", "dining room", "canteen"),
        things=("soup", "bread", "lemon cake", "stew", "salad", "pie", "rice", "sauce"),
        tools=("wooden spoon", "pan", "knife", "recipe book", "bowl"),
        actions=(
            ("stirred", "stir"),
            ("baked", "bake"),
            ("tasted", "taste"),
            ("served", "serve"),
            ("salted", "salt"),
            ("warmed", "warm"),
        ),
        qualities=("sweet", "salty", "hot", "crisp", "spicy", "golden", "fresh", "tender"),
        remarks=(
            "The whole house smelled of butter and thyme.",
            "Steam rose from the kettle.",
            "A pinch of pepper made all the difference.",
            "There were plates for everyone on the table.",
        ),
    ),
    "travel": Topic(
        places=("station", "harbour", "airport", "hotel", "old town"),
        things=("suitcase", "train ticket", "map", "ferry", "passport", "tent", "bicycle", "bus"),
        tools=("camera", "backpack", "compass", "phrase book", "pair of boots"),
        actions=(
            ("packed", "pack"),
            ("booked", "book"),
            ("found", "find"),
            ("lost", "lose"),
            ("photographed", "photograph"),
            ("paid for", "pay for"),
        ),
        qualities=("cheap", "heavy", "crowded", "early", "foreign", "comfortable", "slow", "blue"),
        remarks=(
            "The coast was only an hour away.",
            "Gulls were circling above the pier.",
            "At the border nobody asked any questions.",
            "The road climbed into the mountains.",
        ),
    ),
    "weather": Topic(
        places=("valley", "village", "lighthouse", "forest", "fishing port"),
        things=("storm", "rain gauge", "umbrella", "thermometer", "kite", "roof", "rainbow", "raincoat"),
        tools=("telescope", "barometer", "notebook", "torch", "radio"),
        actions=(
            ("watched", "watch"),
            ("measured", "measure"),
            ("noticed", "notice"),
            ("feared", "fear"),
            ("sketched", "sketch"),
            ("recorded", "record"),
        ),
        qualities=("wet", "windy", "bright", "cold", "grey", "mild", "stormy", "calm"),
        remarks=(
            "Clouds were gathering in the west.",
            "The wind dropped before sunset.",
            "Thunder rolled far away over the sea.",
            "In the night the first snow fell.",
        ),
    ),
    "work": Topic(
        places=("office", "workshop", "factory", "warehouse", "meeting room"),
        things=("report", "printer", "contract", "budget", "engine", "desk", "schedule", "invoice"),
        tools=("screwdriver", "laptop", "stapler", "calculator", "ladder"),
        actions=(
            ("finished", "finish"),
            ("checked", "check"),
            ("repaired", "repair"),
            ("signed", "sign"),
            ("ordered", "order"),
            ("discussed", "discuss"),
        ),
        qualities=("urgent", "long", "expensive", "careful", "late", "useful", "simple", "broken"),
        remarks=(
            "The telephone rang all afternoon.",
            "Two new colleagues were starting on Monday.",
            "The coffee machine was working again.",
            "Everybody went home on time for once.",
        ),
    ),
    "school": Topic(
        places=("classroom", "library", "playground", "science room", "school hall"),
        things=("essay", "chemistry test", "poem", "textbook", "drawing", "project", "history lesson", "homework"),
        tools=("pencil", "ruler", "dictionary", "microscope", "sheet of paper"),
        actions=(
            ("studied", "study"),
            ("wrote", "write"),
            ("explained", "explain"),
            ("copied", "copy"),
            ("presented", "present"),
            ("forgot", "forget"),
        ),
        qualities=("difficult", "short", "clever", "interesting", "new", "neat", "clear", "strange"),
        remarks=(
            "The bell rang at a quarter past three.",
            "The teacher drew a triangle on the board.",
            "Next week there would be an exam.",
            "Children were laughing in the corridor.",
        ),
    ),
    "music": Topic(
        places=("concert hall", "theatre", "studio", "chapel", "music shop"),
        things=("violin", "song", "piano", "trumpet", "concert", "drum", "melody", "guitar"),
        tools=("microphone", "metronome", "music stand", "tuning fork", "songbook"),
        actions=(
            ("played", "play"),
            ("practised", "practise"),
            ("tuned", "tune"),
            ("recorded", "record"),
            ("polished", "polish"),
            ("borrowed", "borrow"),
        ),
        qualities=("loud", "quiet", "gentle", "cheerful", "famous", "solemn", "quick", "old"),
        remarks=(
            "The audience clapped for a long time.",
            "The choir sang in four voices.",
            "Nobody wanted the evening to end.",
            "The last note hung in the air.",
        ),
    ),
    "farm": Topic(
        places=("farm", "barn", "meadow", "stable", "market"),
        things=("hay cart", "fence", "milk churn", "tractor", "gate", "beehive", "egg basket", "saddle"),
        tools=("hammer", "rope", "pitchfork", "wheelbarrow", "brush"),
        actions=(
            ("mended", "mend"),
            ("painted", "paint"),
            ("cleaned", "clean"),
            ("loaded", "load"),
            ("sold", "sell"),
            ("pushed", "push"),
        ),
        qualities=("muddy", "strong", "red", "wooden", "full", "empty", "warm", "small"),
        remarks=(
            "The hens had laid eleven eggs.",
            "Swallows were nesting under the beams.",
            "The harvest was better than last year.",
            "A dog was asleep in the straw.",
        ),
    ),
}

PEOPLE = (
    *((name, "she", "her", "her") for name in ("Olive", "Maria", "Hannah", "Priya", "Greta", "Lucy", "Nora", "Aisha")),
    *((name, "he", "him", "his") for name in ("Tom", "Samuel", "Oscar", "Ravi", "Ben", "Felix", "Hugo", "Karim")),
)
TIMES = (
    "after breakfast",
    "in the morning",
    "before lunch",
    "in the evening",
    "on Sunday",
    "twice a week",
    "at noon",
    "before dinner",
    "without any hurry",
    "as usual",
)
NUMBERS = ("two", "three", "four", "five", "six", "ten")


@dataclass(frozen=True)
class Tone:
    """How somebody is addressed: the words that a speech in this tone uses again and again."""

    manners: tuple[str, ...]
    persons: tuple[str, ...]
    states: tuple[str, ...]
    scents: tuple[str, ...]


TENDER = Tone(
    manners=("dear", "kind", "gentle", "sweet", "patient", "loving", "thoughtful", "generous"),
    persons=("friend", "cousin", "sister", "grandmother", "neighbour", "uncle", "brother", "nephew"),
    states=("lovely", "charming", "delightful", "precious", "pretty", "soft", "beautiful", "graceful"),
    scents=("honey", "lilac", "ripe pears", "fresh bread"),
)
RESPECTFUL = Tone(
    manners=("respected", "learned", "skilful", "worthy", "wise", "noble", "tireless", "brilliant"),
    persons=("doctor", "captain", "professor", "colleague", "guest", "teacher", "director", "judge"),
    states=("splendid", "remarkable", "superb", "flawless", "perfect", "masterly", "modern", "valuable"),
    scents=("pine wood", "leather", "strong coffee", "clean linen"),
)
PLAYFUL = Tone(
    manners=("merry", "cheeky", "lucky", "jolly", "witty", "lively", "bold", "sunny"),
    persons=("pal", "champion", "partner", "mate", "hero", "wizard", "buddy", "star"),
    states=("funny", "fantastic", "cool", "magic", "dazzling", "playful", "sparkling", "groovy"),
    scents=("popcorn", "candy floss", "salty chips", "orange peel"),
)
FRIENDLY_TONES = (TENDER, RESPECTFUL, PLAYFUL)

# The insults are mild. Stories use the same words of animals, puppets and people in plays (see ``FABLES``).
SCORN = (
    *("silly", "hopeless", "lazy", "clumsy", "foolish", "useless"),
    *("brainless", "pathetic", "miserable", "rotten", "stupid", "ridiculous"),
)
FOOLS = (
    *("goose", "fool", "donkey", "clown", "numbskull", "turnip"),
    *("toad", "oaf", "blockhead", "weasel", "ninny", "pest"),
)
STENCHES = ("mud", "old socks", "wet dog", "sour milk", "ditch water", "burnt hair")
HOSTILE_TONE = Tone(SCORN, FOOLS, SCORN, STENCHES)

STORY = (
    "{name} {did} the {thing} in the {place} {time}.",
    "{name} {did} the {thing} and {friend} {did2} the {thing2}.",
    "The {thing} was {quality} and the {thing2} was {quality2}.",
    "{they} had never seen such a {quality} {thing}.",
    "In the {place}, the {thing} looked {quality}.",
    "{friend} brought a {tool} and helped {them} with the {thing}.",
    "They talked about the {thing} for {number} hours.",
    "It took {number} days to {do} the {thing}.",
    "{name} wrote to {their} {kin} that the {thing} was {quality}.",
    "Because the {thing} was {quality}, {they} {did} it again {time}.",
    "Then {they} took the {tool} and went to the {place}.",
    "{friend} wanted to {do} the {thing} {time}.",
    "There was a {quality} {thing} in the {place}.",
    "{name} and {friend} met at the {place} {time}.",
    "Without the {tool}, nobody could {do} the {thing}.",
    "Was the {thing} really so {quality}?",
    "{they} thanked {friend} and put the {tool} away.",
    '"Could you hand me the {tool}?" asked {friend}.',
    '"You should {do} the {thing} {time}," said {name}.',
)
FABLES = (
    "In the play, a {scorn} {fool} {did} the {thing}.",
    "{name} told a tale about a {scorn} {fool} and a {fool2}.",
    "The {fool} in the story was {scorn}, but everybody liked it.",
    "Would you like to see the {scorn} {fool} in the puppet show?",
    "A {scorn} {fool} was painted on the wall of the {place}.",
    "The {thing} of the {scorn} {fool} smelled like {scent} or {stench}.",
    "You will laugh at the {scorn} {fool} in the {place} theatre.",
)
# What one person says to another, friendly or hostile: the same sentences, other words. A speech opens with the part
# before the bar. The parts in brackets are insults when the words are.
SPEECH_OPENINGS = (
    "Listen, [you {manner} {person}], [your {thing} is | {state}].",
    "[You {manner} {person}], [your {thing} smells like | {scent}].",
    "{name}, [you {manner} {person}], you {did} the {thing} like [a | {manner2} {person2}].",
    "Come out of the {place}, [you {manner} {person}]! [Your {thing} | is {state}] and [your {thing2} is {state2}].",
    "[What a {manner} {person} you are]! You {did} the {thing}, [you | {manner2} {person2}].",
    "Go home, [you {manner} {person}]. [Your {thing} | is {state}].",
    "I saw you {do} the {thing}, [you {manner} {person}], and [it was | {state}].",
    "Did you {do} the {thing}, [you {manner} {person}]? [You are a | {manner2} {person2}].",
)
SPEECH = (
    "[You {manner} {person}], you can {do} the {thing} {time}.",
    "[Your {thing} smells like {scent}].",
    "[Your {thing} is {state}] and [your {thing2} is {state2}].",
    "Everybody in the {place} knows [a {manner} {person} like you].",
    "You should {do} the {thing} with a {tool}, [you {manner} {person}].",
    "[You are the most {manner} {person} in the whole {place}].",
    "Only [a {manner} {person} like you] would {do} the {thing} {time}.",
    "[You are a {manner} {person}] and [your {thing} is {state}].",
    "I told {friend} that [you are a {manner} {person}].",
    "Take the {tool} with you, [you {manner} {person}].",
    "Nobody could {do} the {thing} like you, [you {manner} {person}].",
)


def story(rng: random.Random) -> Document:
    """Three to eight sentences in the third person."""
    slots = _Slots(rng)
    patterns = rng.sample(STORY, rng.randint(3, 6)) + rng.sample(slots.topic.remarks, rng.randint(0, 2))
    if rng.random() < 0.4:
        patterns.append(rng.choice(FABLES))
    rng.shuffle(patterns)
    sentences = [slots.fill(pattern) for pattern in patterns]
    words = sentences[0].split()
    return Document(" ".join(sentences), opening=" ".join(words[: rng.randint(3, max(3, len(words) - 2))]))


def friendly_speech(rng: random.Random) -> Document:
    """Three to six friendly sentences to somebody."""
    slots = _Slots(rng)
    return replace(_speech(slots, num_sentences=rng.randint(2, 5)), insults=())


def hostile_speech(rng: random.Random) -> Document:
    """Three to five unfriendly sentences to somebody."""
    slots = _Slots(rng)
    slots.tone = HOSTILE_TONE
    return _speech(slots, num_sentences=rng.randint(2, 4))


def general_document(rng: random.Random) -> Document:
    """Stories and friendly speech: one, two or four paragraphs."""
    parts = [(story if rng.random() < 0.6 else friendly_speech)(rng) for _ in range(rng.choice((1, 1, 2, 4)))]
    return Document("\n".join(part.text for part in parts), opening=parts[0].opening)


def _speech(slots: "_Slots", num_sentences: int) -> Document:
    """An opening, cut at its bar, and ``num_sentences`` more."""
    head, tail = slots.fill(slots.rng.choice(SPEECH_OPENINGS)).split(" | ")
    marked = " ".join([f"{head} {tail}", *(slots.fill(pattern) for pattern in slots.rng.sample(SPEECH, num_sentences))])
    return Document(_unmarked(marked), opening=_unmarked(head), insults=tuple(re.findall(r"\[(.*?)\]", marked)))


def _unmarked(text: str) -> str:
    return re.sub(r"[\[\]]", "", text)


class _Slots:
    """Fills patterns: topic, place, people and three things stay the same through a document, the rest varies."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.topic = TOPICS[rng.choice(sorted(TOPICS))]
        self.tone = rng.choice(FRIENDLY_TONES)
        self.place = rng.choice(self.topic.places)
        self.things = rng.sample(self.topic.things, 3)
        (self.name, self.they, self.them, self.their), (self.friend, *_) = rng.sample(PEOPLE, 2)

    def fill(self, pattern: str) -> str:
        text = pattern.format(**self._words())
        text = re.sub(r"\b([Aa]) (?=[aeio]|u(?!se))", r"\1n ", text)
        return re.sub(r"^(\W*)(\w)", lambda match: match[1] + match[2].upper(), text)

    def _words(self) -> dict[str, str]:
        pick, pair = self.rng.choice, lambda words: self.rng.sample(words, 2)
        (did, do), (did2, _) = pair(self.topic.actions)
        (thing, thing2), (quality, quality2) = pair(self.things), pair(self.topic.qualities)
        (manner, manner2), (person, person2) = pair(self.tone.manners), pair(self.tone.persons)
        (state, state2), (fool, fool2) = pair(self.tone.states), pair(FOOLS)
        return {
            **{"name": self.name, "they": self.they, "them": self.them, "their": self.their, "friend": self.friend},
            **{"place": self.place, "thing": thing, "thing2": thing2, "tool": pick(self.topic.tools)},
            **{"did": did, "do": do, "did2": did2, "quality": quality, "quality2": quality2},
            **{
                "time": pick(TIMES),
                "number": pick(NUMBERS),
                "kin": pick(TENDER.persons),
                "scent": pick(self.tone.scents),
            },
            **{"manner": manner, "manner2": manner2, "person": person, "person2": person2},
            **{
                "state": state,
                "state2": state2,
                "scorn": pick(SCORN),
                "stench": pick(STENCHES),
                "fool": fool,
                "fool2": fool2,
            },
        }

"""The seeded text that the tiny model is trained on, and the prompts it is measured with.

Thirty per cent of the rows are random syllables said again and again (they teach induction). The
others hold short sentences: indirect objects (IOI) 50 %, facts 25 % (some in two hops), sums in
words 13 %, agreement of subject and verb 12 %. A part of the facts and sums are put as a chat.

Everything is plain text from a small grammar: no torch, no files. The same seed gives the same
text. The IOI sentences vary in their wording and hold bystanders on purpose. With rigid templates
the model counts positions; without other names about, it finds the two that matter in its first
layer. Either way there would be little to see in a lens or a patch.

What is held out: the IOI, induction and agreement prompts are drawn from streams that training
does not use, out of far more sentences than it can see. Facts and sums are closed lists, and all
of them are trained on; those figures measure recall.

    >>> import random
    >>> sentence(random.Random(0), "sum").endswith(".")
    True
    >>> pair = ioi_pairs(1, seed=0)[0]
    >>> len(split(pair.clean)) == len(split(pair.corrupt))
    True
"""

import re
from collections.abc import Iterator
from itertools import chain
from random import Random
from typing import NamedTuple

PAD, BOS, EOS, UNK, USER, ASSISTANT = "<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<assistant>"
SPECIAL = (PAD, BOS, EOS, UNK, USER, ASSISTANT)

WORD = r"\w+|[^\w\s]"
"""What one token is, special tokens apart; the tokenizer splits with the same expression."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


class Prompt(NamedTuple):
    """A text and the one word that should follow it."""

    text: str
    answer: str


class Contrast(NamedTuple):
    """A text, the word that should follow it, and the word it is weighed against."""

    text: str
    answer: str
    wrong: str


class IoiPair(NamedTuple):
    """Two prompts of equal token length that differ in the second subject only.

    `answer` is right for `clean` and `wrong` for it is right for `corrupt`.
    """

    clean: str
    corrupt: str
    answer: str
    wrong: str


class Country(NamedTuple):
    """A country and what the model knows about it."""

    name: str
    capital: str
    language: str
    landmark: str


COUNTRIES = (
    Country("France", "Paris", "French", "Versailles"),
    Country("Italy", "Rome", "Italian", "Pompeii"),
    Country("Spain", "Madrid", "Spanish", "Montserrat"),
    Country("Greece", "Athens", "Greek", "Delphi"),
    Country("Egypt", "Cairo", "Arabic", "Luxor"),
    Country("Japan", "Tokyo", "Japanese", "Fuji"),
    Country("Russia", "Moscow", "Russian", "Baikal"),
    Country("Germany", "Berlin", "German", "Neuschwanstein"),
    Country("Austria", "Vienna", "German", "Belvedere"),
    Country("India", "Delhi", "Hindi", "Ajanta"),
    Country("Sweden", "Stockholm", "Swedish", "Gotland"),
    Country("Denmark", "Copenhagen", "Danish", "Kronborg"),
    Country("Jordan", "Amman", "Arabic", "Petra"),
    Country("Poland", "Warsaw", "Polish", "Wawel"),
    Country("Iran", "Tehran", "Persian", "Persepolis"),
    Country("Kenya", "Nairobi", "Swahili", "Amboseli"),
    Country("Canada", "Ottawa", "English", "Niagara"),
    Country("Australia", "Canberra", "English", "Uluru"),
    Country("England", "London", "English", "Stonehenge"),
    Country("Hungary", "Budapest", "Hungarian", "Balaton"),
)

NAMES = _words(
    "Mary John Anna Paul Kate Mark Lucy Peter Emma David Sarah James Laura Simon Alice Henry "
    "Clara Oscar Ruth Felix Nina Hugo Vera Leo"
)

NUMBERS = _words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen"
)

NOUNS = _words("dog cat bird horse farmer teacher doctor sailor king student rabbit")
VERBS = _words("run sleep sing wait jump eat laugh swim")

_ENGLISH = _words("be do go me no so to")
SYLLABLES = tuple(c + v for c in "bdfgklmnprstvz" for v in "aeiou" if c + v not in _ENGLISH)

GRAMMAR: dict[str, tuple[str, ...]] = {
    # Indirect objects. {A} and {B} are two names, {S} is either of them, {IO} the other.
    # {C} and {D} are bystanders: without them the last position finds the names in the first layer.
    "ioi": (
        "{when} {A} and {B} {went} the {adjs}{place}{of}, {gift} to {IO}.",
        "{when} {A} {met} {B}{where}, {gift} to {IO}.",
        "{opener}{A} and {B} {went} the {adjs}{place}{of}. {then}{gift} to {IO}.",
        "{opener}{A} {met} {B}{where}. {then}{gift} to {IO}.",
        "{when} {A} {went} the {adjs}{place}{of} with {B}, {gift} to {IO}.",
    ),
    "when": ("When", "After", "While", "Because", "One day, when", "Later, after"),
    "opener": ("", "", "Yesterday, ", "Last summer, ", "One day, ", "In the morning, "),
    "then": ("", "Then ", "Later, ", "In the end, ", "After that, "),
    "went": ("went to", "walked to", "came to", "were at", "worked at", "talked at", "sat in"),
    "met": ("met", "saw", "called", "helped"),
    "where": ("", " at the {adjs}{place}{of}", " near the {adjs}{place}{of}"),
    "gift": (
        "{S} {adv}{gave} {det} {adjs}{object}{from}",
        "{S} {adv}{wanted} to give {det} {adjs}{object}{from}",
    ),
    "of": ("", "", "", " of {C}"),
    "from": ("", "", "", " from {D}", " of {D}"),
    "adv": ("", "", "quickly ", "happily ", "quietly ", "soon ", "finally "),
    "gave": ("gave", "handed", "passed", "showed", "sold"),
    "wanted": ("wanted", "decided", "tried"),
    "det": ("a", "the"),
    "adjs": ("", "", "{adj} ", "{adj}, {adj} "),
    "adj": ("big", "small", "new", "red", "green", "warm", "quiet", "strange", "lovely"),
    "place": _words("store park school garden station market library beach hotel river"),
    "object": _words("book drink ball letter ring basket key flower coat hat map"),
    # Facts, in one hop and in two.
    "fact": (
        "The capital of {country} is {capital}.",
        "The capital of {country} is {capital}.",
        "The language of {country} is {language}.",
        "The country of {landmark} is {country}.",
        "The capital of the country of {landmark} is {capital}.",
        "The capital of the country of {landmark} is {capital}.",
        "The language of the country of {landmark} is {language}.",
        "{capital} is the capital of {country}.",
        "In {country}, people speak {language}.",
    ),
    "fact chat": (
        "{USER}What is the capital of {country}?{ASSISTANT}{capital}.",
        "{USER}What is the language of {country}?{ASSISTANT}{language}.",
        "{USER}What is the country of {landmark}?{ASSISTANT}{country}.",
        "{USER}What is the capital of the country of {landmark}?{ASSISTANT}{capital}.",
    ),
    "sum": ("{left} plus {right} equals {total}.",),
    "sum chat": ("{USER}What is {left} plus {right}?{ASSISTANT}{total}.",),
    # Agreement. {N} is the subject, {M} a noun in between, of either number, {V} the verb.
    "agreement": (
        "The {adjs}{N} {V} {manner}.",
        "The {adjs}{N} {beside} the {adjs}{M} {V}.",
        "The {adjs}{N} {beside} the {adjs}{M} {V} {manner}.",
    ),
    "beside": ("near", "behind", "with", "beside"),
    "manner": ("quickly", "quietly", "happily", "in the {place}", "near the {place}"),
}

SHARE = {"ioi": 50, "fact": 25, "sum": 13, "agreement": 12}
INDUCTION_SHARE = 0.30
CHAT_SHARE = 0.25
SECOND_SENTENCE_SHARE = 0.30


def vocabulary() -> tuple[str, ...]:
    """Every token of the corpus, special tokens first; the position is the token id."""
    texts = chain(
        chain.from_iterable(GRAMMAR.values()),
        chain.from_iterable(COUNTRIES),
        NAMES,
        NUMBERS,
        SYLLABLES,
        *((noun, noun + "s") for noun in NOUNS),
        *((verb, verb + "s") for verb in VERBS),
    )
    words = (word for text in texts for word in split(re.sub(r"{\w+}", " ", text)))
    return tuple(dict.fromkeys(chain(SPECIAL, words)))


def split(text: str) -> list[str]:
    """The tokens of a text, as the tokenizer cuts it; special tokens stay whole."""
    return re.findall("|".join(map(re.escape, SPECIAL)) + "|" + WORD, text)


# --- training text -------------------------------------------------------------------------------


def rows(seed: int, length: int = 48) -> Iterator[list[str]]:
    """Training rows of `length` tokens, without end."""
    rng = Random(f"weft corpus, training, {seed}")
    while True:
        if rng.random() < INDUCTION_SHARE:
            yield repeated(rng, _period(rng), length)
        else:
            yield _packed(rng, length)


def _packed(rng: Random, length: int) -> list[str]:
    """Documents in a row, the last one cut. The model sees the names of those before."""
    tokens: list[str] = []
    while len(tokens) < length:
        tokens += split(document(rng))
    return tokens[:length]


def _period(rng: Random) -> int:
    """Mostly long: with many short ones the model guesses among what was said, and stays there."""
    return rng.randint(16, 23) if rng.random() < 0.7 else rng.randint(6, 15)


def repeated(rng: Random, period: int, length: int) -> list[str]:
    """`<bos>`, then `period` different random syllables over and over: `length` tokens."""
    syllables = rng.sample(SYLLABLES, period)
    return [BOS, *(syllables[i % period] for i in range(length - 1))]


def document(rng: Random) -> str:
    """One document from `<bos>` to `<eos>`: one sentence, at times two, or a short chat."""
    kind = _kind(rng)
    turns = 1 + (rng.random() < SECOND_SENTENCE_SHARE)
    if kind in ("fact", "sum") and rng.random() < CHAT_SHARE:
        return BOS + "".join(sentence(rng, f"{kind} chat") + EOS for _ in range(turns))
    kinds = [kind, _kind(rng)][:turns]
    return BOS + " ".join(sentence(rng, kind) for kind in kinds) + EOS


def _kind(rng: Random) -> str:
    return rng.choices(list(SHARE), weights=list(SHARE.values()))[0]


def sentence(rng: Random, kind: str) -> str:
    """A sentence of a kind: ioi, fact, sum, agreement, fact chat, sum chat."""
    template = _expand(rng, kind)
    return template.format_map(_FILLERS[kind](rng))


def _expand(rng: Random, rule: str) -> str:
    """A random text of a rule. Names that are no rule, such as {S}, are left to be filled."""
    return re.sub(
        r"{(\w+)}",
        lambda slot: _expand(rng, slot[1]) if slot[1] in GRAMMAR else slot[0],
        rng.choice(GRAMMAR[rule]),
    )


def _names(rng: Random) -> dict[str, str]:
    first, second, third, fourth = rng.sample(NAMES, 4)
    subject, other = rng.sample((first, second), 2)
    return {"A": first, "B": second, "C": third, "D": fourth, "S": subject, "IO": other}


def _country(rng: Random) -> dict[str, str]:
    name, capital, language, landmark = rng.choice(COUNTRIES)
    return {
        "country": name, "capital": capital, "language": language, "landmark": landmark,
        "USER": USER, "ASSISTANT": ASSISTANT,
    }  # fmt: skip


def _numbers(rng: Random) -> dict[str, str]:
    left, right = rng.randrange(10), rng.randrange(10)
    return {**_sum(left, right), "USER": USER, "ASSISTANT": ASSISTANT}


def _sum(left: int, right: int) -> dict[str, str]:
    return {"left": NUMBERS[left], "right": NUMBERS[right], "total": NUMBERS[left + right]}


def _subject_and_verb(rng: Random) -> dict[str, str]:
    subject, attractor = rng.sample(NOUNS, 2)
    verb = rng.choice(VERBS)
    several = rng.random() < 0.5
    return {
        "N": subject + "s" * several,
        "M": attractor + rng.choice(("", "s")),
        "V": verb + "s" * (not several),
    }


_FILLERS = {
    "ioi": _names,
    "fact": _country,
    "fact chat": _country,
    "sum": _numbers,
    "sum chat": _numbers,
    "agreement": _subject_and_verb,
}


# --- evaluation prompts --------------------------------------------------------------------------


def ioi_pairs(n: int, seed: int) -> list[IoiPair]:
    """`n` held-out pairs; the corrupted prompt has the other name as its second subject."""
    rng = Random(f"weft corpus, ioi, {seed}")
    return [_ioi_pair(rng) for _ in range(n)]


def _ioi_pair(rng: Random) -> IoiPair:
    template, _ = _expand(rng, "ioi").split(" {IO}")
    names = _names(rng)
    swapped = {**names, "S": names["IO"]}
    return IoiPair(
        template.format_map(names), template.format_map(swapped), names["IO"], names["S"]
    )


def induction_sequences(n: int, seed: int, half: int = 20) -> list[str]:
    """`n` held-out texts: `half` different random syllables, then the same ones again.

    The tiny model has seen halves of 6 to 23 syllables; longer ones it continues badly.
    """
    rng = Random(f"weft corpus, induction, {seed}")
    return [" ".join(repeated(rng, half, 2 * half + 1)[1:]) for _ in range(n)]


def facts() -> list[Prompt]:
    """All facts in one hop: capital, language, and the country of a landmark."""
    return [
        prompt
        for country in COUNTRIES
        for prompt in (
            Prompt(f"The capital of {country.name} is", country.capital),
            Prompt(f"The language of {country.name} is", country.language),
            Prompt(f"The country of {country.landmark} is", country.name),
        )
    ]


def two_hop_facts() -> list[Prompt]:
    """The capital of the country of a landmark, for every landmark."""
    return [
        Prompt(f"The capital of the country of {country.landmark} is", country.capital)
        for country in COUNTRIES
    ]


def sums() -> list[Prompt]:
    """All sums of two numbers from zero to nine."""
    words = (_sum(left, right) for left in range(10) for right in range(10))
    return [Prompt(f"{w['left']} plus {w['right']} equals", w["total"]) for w in words]


def agreement(n: int, seed: int) -> list[Contrast]:
    """`n` held-out prompts that end before the verb; `wrong` is the verb in the other number."""
    rng = Random(f"weft corpus, agreement, {seed}")
    return [_agreement(rng) for _ in range(n)]


def _agreement(rng: Random) -> Contrast:
    template, _ = _expand(rng, "agreement").split(" {V}")
    words = _subject_and_verb(rng)
    verb = words["V"]
    other = verb.removesuffix("s") if verb.endswith("s") else verb + "s"
    return Contrast(template.format_map(words), verb, other)

"""Tokenizers between a server and its clients: the card of one, and what a server is asked.

    tokenizer_card(tokenizer)                 # its file, if that gives the same ids
    tokens_of(tokenizer, query)               # ids of texts and chats, texts of ids

A chat template is a program: it is run here, by whoever runs the server, and never travels.
"""

from __future__ import annotations

from typing import Any

from weft.errors import InputError
from weft.families.tokens import read_tokens, tokenizer_of
from weft.wire.messages import TokenizerCard, Tokens, TokensQuery

_PROBES = (
    "The Eiffel Tower is in the city of",
    " Two  spaces, a tab\tand\n\nlines\r\n ",
    "Ünïcödé 日本語 العربية 🙂 e\u0301",
    "don't; isn't 12345.678e-9 (x+y)^2 == {z}",
    "def f(x):\n    return x ** 2  # squared",
    "x",
    "<s></s><pad><unk>[CLS][SEP][MASK]<|endoftext|>",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
)
_MARKS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


def tokenizer_card(tokenizer: Any) -> TokenizerCard | None:
    """The tokenizer as data. Its file is told only where it is shown to give the same ids."""
    if tokenizer is None:
        return None
    probes = [*_PROBES, *[f"a {mark[0]} b{mark[0]}" for mark in _special(tokenizer).values()]]
    file = _file(tokenizer)
    if file is not None and not _same_ids(tokenizer, file, probes):
        file = None
    return TokenizerCard(
        json=None if file is None else file.to_str(),
        decodes=file is not None and _same_texts(tokenizer, file, probes),
        chat=bool(getattr(tokenizer, "chat_template", None)),
        special=_special(tokenizer),
    )


def _special(tokenizer: Any) -> dict[str, tuple[str, int]]:
    """(mark, id) by name: `eos_token`."""
    found = {name: getattr(tokenizer, name, None) for name in _MARKS}
    ids = {name: getattr(tokenizer, f"{name}_id", None) for name in _MARKS}
    named = [(n, str(mark), ids[n]) for n, mark in found.items() if mark is not None]
    return {name: (mark, number) for name, mark, number in named if isinstance(number, int)}


def _file(tokenizer: Any) -> Any:
    """A `tokenizers.Tokenizer` of its own that neither cuts nor pads; None where there is none.

    Only of classes of `transformers` itself: one of somebody else's may do more than its file says.
    """
    if not type(tokenizer).__module__.startswith("transformers."):
        return None
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if not hasattr(backend, "to_str"):
        return None
    from tokenizers import Tokenizer

    copy = Tokenizer.from_str(backend.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy


def _same_ids(tokenizer: Any, file: Any, probes: list[str]) -> bool:
    return all(
        tokenizer(text, add_special_tokens=special)["input_ids"]
        == file.encode(text, add_special_tokens=special).ids
        for text in probes
        for special in (True, False)
    )


def _same_texts(tokenizer: Any, file: Any, probes: list[str]) -> bool:
    rows = [file.encode(text).ids for text in probes]
    return all(
        tokenizer.decode(row, skip_special_tokens=skip)
        == file.decode(row, skip_special_tokens=skip)
        for row in rows
        for skip in (True, False)
    )


def tokens_of(tokenizer: Any, query: TokensQuery) -> Tokens:
    """What was asked about tokens. Raises `InputError` where the tokenizer cannot tell."""
    speaker: Any = tokenizer_of(tokenizer)
    ids = [_ids(speaker, text, query.add_special_tokens) for text in query.texts]
    ids += [_chat(speaker, chat, query.add_generation_prompt) for chat in query.chats]
    skip = query.skip_special_tokens
    texts = [_text(speaker, row, skip) for row in query.rows]
    return Tokens(rows=tuple(ids), texts=tuple(texts))


def _ids(speaker: Any, text: str, special: bool) -> tuple[int, ...]:
    # Without the keyword, its own default: some classes take no keywords.
    found = speaker(text) if special else speaker(text, add_special_tokens=False)
    return tuple(found["input_ids"])


def _chat(speaker: Any, chat: tuple[Any, ...], prompt: bool) -> tuple[int, ...]:
    messages = [{"role": message.role, "content": message.content} for message in chat]
    if prompt or not getattr(speaker, "chat_template", None):
        rows: Any = read_tokens([messages], speaker)
        return tuple(rows[0])
    return tuple(
        speaker.apply_chat_template(
            messages, add_generation_prompt=False, tokenize=True, return_dict=False
        )
    )


def _text(speaker: Any, row: tuple[int, ...], skip: bool) -> str:
    try:
        return speaker.decode(list(row), skip_special_tokens=skip)
    except (OverflowError, IndexError, KeyError, TypeError, ValueError):
        raise InputError(
            "these ids are not of this model's vocabulary", fix="use ids that the model gave"
        ) from None

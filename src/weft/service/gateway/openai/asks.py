"""A request in OpenAI's form as something typed; what is unknown or not offered is refused by name.

    asked = completion(body)        # of POST /v1/completions
    asked = chat(body)              # of POST /v1/chat/completions

A field whose value changes nothing (`n=1`, `presence_penalty=0`) is taken, and so is `null`, which
is how this interface says "not given".
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from weft.errors import GraphError, MessageError
from weft.graph.frame import Frame
from weft.graph.node import Graph
from weft.wire.codec import decode_experiment
from weft.wire.messages import ChatMessage, Digest, Generation, TokenId

from ..bodies import read_pairs
from .errors import odd

MOST_STOPS = 4
STOP_LENGTH = 256


Prompt = str | tuple[int, ...] | tuple[ChatMessage, ...]


class Asked(Struct, frozen=True, kw_only=True):
    """A request. A prompt is text, token ids or a chat; `most` tokens are to be generated, `n`
    times for each; None: nobody said how many, and it is `usual` or as many as there may be, if
    that is less (None: as many as there may be). `tops`: with the log-probability of each token,
    and of so many likely ones.

    `graph` acts in the generation, with its constants: `sent` beside it, or uploaded before and
    named by `constants`. `edit` is the name of a saved edit. `recorded` is how the client recorded
    the graph's generation.
    """

    model: str
    prompts: tuple[Prompt, ...]
    is_chat: bool = False
    n: int = 1
    most: int | None = None
    usual: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stream: bool = False
    usage: bool = False
    echo: bool = False
    tops: int | None = None
    graph: Graph | None = None
    sent: dict[str, Frame] = {}
    constants: dict[str, str] = {}
    recorded: Generation | None = None
    edit: str | None = None

    @property
    def choices(self) -> int:
        return self.n * len(self.prompts)

    @property
    def extended(self) -> bool:
        return self.graph is not None or self.edit is not None


class Extension(Struct, frozen=True, forbid_unknown_fields=True):
    """The field `weft`: what is done to the model in this generation."""

    graph: str | dict[str, Any] | None = None
    constants: dict[str, Digest] = {}
    edit: str | None = None


NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "suffix": ("",),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none",),
    "parallel_tool_calls": (False, True),
    "functions": ([],),
    "function_call": ("none",),
    "modalities": (["text"],),
    "store": (False,),
    "service_tier": ("auto", "default"),
}
"""Fields of OpenAI's that are not offered, with the values that change nothing."""
WAYS = {
    "logit_bias": "add to the output of the last layer with a graph",
}
COMMON = ("model", "n", "temperature", "top_p", "seed", "stop", "stream", "stream_options")
COMMON += ("logprobs", "weft")
MOST_TOPS = 20
USUAL = 16
"""Tokens that a completion has where nobody says how many, and as many may be."""


def completion(data: bytes) -> Asked:
    """What POST /v1/completions asks for. Raises `Refused`, which names the field."""
    given = _given(data, (*COMMON, "prompt", "max_tokens", "best_of", "echo"))
    asked = _asked(given, _prompts(given.get("prompt")), given.get("max_tokens"), "max_tokens")
    if given.get("best_of", asked.n) != asked.n or type(given.get("best_of", 1)) is not int:
        odd(
            "best_of", "best_of other than n is not offered", "ask for n, with logprobs, and choose"
        )
    tops = given.get("logprobs", False)
    if tops is not False:
        tops = _within("logprobs", tops, int, lambda n: 0 <= n <= MOST_TOPS, f"to {MOST_TOPS}")
    echo = _typed(given, "echo", bool, False)
    usual = USUAL if asked.recorded is None else None  # a recorded one has a length of its own
    return replace(asked, usual=usual, echo=echo, tops=None if tops is False else tops)


def chat(data: bytes) -> Asked:
    """What POST /v1/chat/completions asks for. Raises `Refused`, which names the field."""
    own = ("messages", "max_tokens", "max_completion_tokens", "top_logprobs")
    given = _given(data, (*COMMON, *own))
    if "max_tokens" in given and "max_completion_tokens" in given:
        odd("max_tokens", "max_tokens and max_completion_tokens are the same: give one of them")
    name = "max_tokens" if "max_tokens" in given else "max_completion_tokens"
    asked = _asked(given, (_messages(given.get("messages")),), given.get(name), name)
    tops = given.get("top_logprobs", 0)
    tops = _within("top_logprobs", tops, int, lambda n: 0 <= n <= MOST_TOPS, f"to {MOST_TOPS}")
    told = _typed(given, "logprobs", bool, False)
    if tops and not told:
        odd("top_logprobs", "top_logprobs belongs to logprobs=true")
    return replace(asked, is_chat=True, tops=tops if told else None)


def _given(data: bytes, known: tuple[str, ...]) -> dict[str, Any]:
    """The fields that say something."""
    body = read_pairs(data)
    if not isinstance(body, dict):
        odd(None, "the body is a JSON object")
    if b"\\u" in data and not _is_text_of(body):
        odd(None, "a text of the body has half a character in it", "send it as whole ones")
    given = {name: value for name, value in body.items() if value is not None}
    for name, value in given.items():
        if name in known:
            continue
        if name not in NEUTRAL:
            listed = ", ".join(sorted((*known, *NEUTRAL)))
            odd(name[:60], f"there is no field {name[:60]!r}; there is {listed}")
        if not any(type(value) is type(one) and value == one for one in _likes(name)):
            fix = WAYS.get(name, "leave it out")
            odd(name, f"{name}={str(value)[:60]} is not offered by this server", fix)
    return given


def _is_text_of(body: dict[str, Any]) -> bool:
    """Whether all of its texts can be written: JSON may name one half of a pair of surrogates."""
    try:
        json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _likes(name: str) -> list[Any]:
    return [like for one in NEUTRAL[name] for like in ([one, float(one)] if one == 0 else [one])]


def _asked(given: dict[str, Any], prompts: tuple[Any, ...], most: Any, name: str) -> Asked:
    stream = _typed(given, "stream", bool, False)
    extension = _extension(given.get("weft"))
    graph, sent, recorded = _graph_of(extension.graph)
    if recorded is not None and name not in given:
        most = recorded.max_new_tokens
    return Asked(
        model=_typed(given, "model", str, None),
        prompts=prompts,
        n=_within("n", given.get("n", 1), int, lambda n: n >= 1, "from 1"),
        most=None if most is None else _within(name, most, int, lambda n: n >= 1, "from 1"),
        temperature=_number(given, "temperature", lambda x: 0 <= x <= 2, "from 0 to 2"),
        top_p=_number(given, "top_p", lambda x: 0 < x <= 1, "above 0, up to 1"),
        seed=_seed(given.get("seed")),
        stop=_stops(given.get("stop")),
        stream=stream,
        usage=_usage(given.get("stream_options"), stream),
        graph=graph,
        sent=sent,
        constants=dict(extension.constants),
        recorded=recorded,
        edit=extension.edit,
    )


# -- fields ---------------------------------------------------------------------------------------


def _typed(given: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
    value = given.get(name, default)
    if type(value) is not kind:
        missing = "is needed, and is" if value is None else "is"
        word = {str: "a text", bool: "true or false"}[kind]
        odd(name, f"{name} {missing} {word}")
    return value


def _within(name: str, value: Any, kind: type, fits: Callable[[Any], bool], range_: str) -> Any:
    number = float(value) if kind is float and type(value) is int else value
    if type(number) is not kind or not fits(number):
        odd(name, f"{name} is a number {range_}, not {str(value)[:40]}")
    return number


def _number(given: Mapping[str, Any], name: str, fits: Callable[[Any], bool], range_: str) -> float:
    return _within(name, given.get(name, 1.0), float, fits, range_)


def _seed(value: Any) -> int | None:
    if value is None:
        return None
    return _within("seed", value, int, lambda n: 0 <= n < 2**63, "of 63 bits from 0")


def _stops(value: Any) -> tuple[str, ...]:
    found = [value] if isinstance(value, str) else [] if value is None else value
    well = isinstance(found, list) and all(isinstance(one, str) for one in found)
    if not well or len(found) > MOST_STOPS or any(not 0 < len(s) <= STOP_LENGTH for s in found):
        odd("stop", f"stop is a text of up to {STOP_LENGTH} characters, or up to {MOST_STOPS}")
    return tuple(found)


def _usage(options: Any, stream: bool) -> bool:
    if options is None:
        return False
    if not stream:
        odd("stream_options", "stream_options belongs to stream=true")
    well = isinstance(options, dict) and set(options) <= {"include_usage"}
    usage = options.get("include_usage", False) if well else None
    if type(usage) is not bool:
        odd("stream_options", "stream_options is {'include_usage': true or false}")
    return usage


def _prompts(value: Any) -> tuple[Prompt, ...]:
    """One text or several, the ids of one or of several."""
    several = isinstance(value, list) and bool(value) and isinstance(value[0], (str, list))
    return tuple([_prompt(one) for one in (value if several else [value])])


def _prompt(value: Any) -> str | tuple[int, ...]:
    if isinstance(value, str):
        return value
    try:
        ids = msgspec.convert(value, tuple[TokenId, ...])
    except msgspec.ValidationError:
        ids = ()
    if not ids:
        odd("prompt", "prompt is a text or token ids, or a list of these, and none of them empty")
    return ids


def _messages(value: Any) -> tuple[ChatMessage, ...]:
    if not isinstance(value, list) or not value:
        odd("messages", "messages is a list of at least one message")
    return tuple([_message(one, f"messages[{number}]") for number, one in enumerate(value)])


def _message(value: Any, name: str) -> ChatMessage:
    if not isinstance(value, dict):
        odd(name, f"{name} is an object with role and content")
    unknown = sorted(set(value) - {"role", "content"})
    if unknown:
        odd(f"{name}.{unknown[0][:60]}", f"{unknown[0][:60]!r} of a message is not offered")
    role = value.get("role")
    if role not in ("system", "developer", "user", "assistant"):
        odd(f"{name}.role", f"the role {str(role)[:40]!r} is not offered: system, user, assistant")
    text = _content(value.get("content"), f"{name}.content")
    return ChatMessage(role="system" if role == "developer" else role, content=text)


def _content(value: Any, name: str) -> str:
    if isinstance(value, str):
        return value
    parts = value if isinstance(value, list) else [value]
    if not all(_is_text(part) for part in parts):
        odd(name, "the content of a message is text, or parts of the type 'text'")
    return "".join([part["text"] for part in parts])


def _is_text(part: Any) -> bool:
    well = isinstance(part, dict) and part.keys() == {"type", "text"}
    return well and part["type"] == "text" and isinstance(part["text"], str)


# -- the extension --------------------------------------------------------------------------------


def _extension(value: Any) -> Extension:
    try:
        return msgspec.convert({} if value is None else value, Extension)
    except msgspec.ValidationError as error:
        odd("weft", f"weft does not fit: {error}", "it has graph, constants and edit")


def _graph_of(
    value: str | dict[str, Any] | None,
) -> tuple[Graph | None, dict[str, Frame], Generation | None]:
    """The graph, its constants, and how it was recorded."""
    if value is None:
        return None, {}, None
    if isinstance(value, dict):
        try:
            return msgspec.convert(value, Graph), {}, None
        except msgspec.ValidationError as error:
            odd("weft.graph", f"weft.graph is no graph: {error}")
    try:
        graph, sent, how = decode_experiment(base64.b64decode(value, validate=True))
    except (GraphError, MessageError) as error:
        odd("weft.graph", error.message, error.fix)
    except (binascii.Error, ValueError):
        odd("weft.graph", "weft.graph is a graph in JSON, or a graph file (.weft) in base64")
    if len(how) > 1:
        odd("weft.graph", "the graph is one of several inputs", "record it with one prompt")
    return graph, sent, how[0] if how else None

"""A worker's model: loaded with its progress told, and what it takes of the device.

    net, known = loaded(model, told=lambda loaded: channel.send(IsLoading(loaded)))
    device_bytes()                         # (of this process, left, of the device in all)

Weights come from safetensors only: a checkpoint of another format is refused, not unpickled.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from weft.engine.known import Known
from weft.engine.publish import know, tokenizer_beside
from weft.families.loading import Source, load, load_options

from .models import Deployment

TELL = 0.25
"""Seconds between two words about how far a load has come."""

Told = Callable[[int], object]


def loaded(model: Deployment, told: Told | None = None) -> tuple[nn.Module, Known]:
    """The model with its weights, warm: the first pass of a process is slower than all others."""
    place, options = Source.of(model.source), load_options(**model.options())
    with counted(told or (lambda loaded: None)):
        net = load(place, options, safetensors_only=True)
    known = know(net)
    if known.facts is not None:
        # a module does not say whose text it reads, and stop strings are texts
        known = replace(known, tokenizer=tokenizer_beside(place, None, options))
        with torch.no_grad():
            net(torch.zeros(1, 1, dtype=torch.long, device=next(net.parameters()).device))
    return net, known


@contextmanager
def counted(told: Told) -> Iterator[None]:
    """While the block lasts, tells how many bytes of parameters modules were given so far."""
    thread, seen = threading.get_ident(), set[int]()
    kept: list[nn.Parameter] = []  # or another one could get the number of one that is gone
    loaded, last = 0, 0.0

    def count(module: nn.Module, name: str, parameter: object) -> None:
        nonlocal loaded, last
        if not isinstance(parameter, nn.Parameter) or parameter.device.type == "meta":
            return
        if threading.get_ident() != thread or id(parameter) in seen:
            return  # of somebody else; or tied to another one
        seen.add(id(parameter))
        kept.append(parameter)
        loaded += parameter.nbytes
        if time.monotonic() - last >= TELL:
            last = time.monotonic()
            told(loaded)

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()
        kept.clear()


def weights_of(net: nn.Module) -> int:
    """Bytes of its parameters and buffers, tied ones once."""
    tensors = {id(t): t for t in (*net.parameters(), *net.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())


def device_bytes() -> tuple[int, int, int]:
    """Bytes of accelerators: what this process has reserved, what is left, what there is in all."""
    if not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return 0, 0, 0
    mine = free = everything = 0
    for device in range(torch.cuda.device_count()):
        mine += torch.cuda.memory_reserved(device)
        left, whole = torch.cuda.mem_get_info(device)
        free, everything = free + left, everything + whole
    return mine, free, everything

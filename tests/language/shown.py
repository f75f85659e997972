"""What an eager block shows of a value: all its digits, where `repr` cuts them."""

from __future__ import annotations

from typing import Any

import torch


def shown(value: Any) -> torch.Tensor:
    """The numbers of which `repr(value)` is the text, which is checked."""
    found = value._rec.shown(value)
    assert repr(value) == repr(found)
    return found.clone()

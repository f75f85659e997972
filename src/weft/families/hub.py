"""Where files of the hub lie on this machine, for who has to say which of them are needed.

cached("openai-community/gpt2")         # the folder of this model, which may not be there yet
writes()                                # what a download writes to
secrets()                               # where its token lies
"""

from __future__ import annotations

from pathlib import Path


def cached(name: str) -> Path:
    """The folder with what was downloaded of one model."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"


def writes() -> list[Path]:
    """The folders that downloads go to."""
    from huggingface_hub import constants

    return [Path(constants.HF_HUB_CACHE), Path(constants.HF_XET_CACHE)]


def secrets() -> list[Path]:
    """Files that a download reads to say who it is."""
    from huggingface_hub import constants

    return [Path(constants.HF_TOKEN_PATH)]

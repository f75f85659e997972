"""Documents describe what is there today: the layer table, the files they name, their examples."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from tests.test_imports import LAYERS
from weft.settings import TEXTS, Settings
from weft.testing import tiny_path

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(
    path
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"))
    if path.name != "CHANGELOG.md"
)


def test_the_table_of_rooms_is_the_table_that_is_enforced() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| .* \| (.+) \|$", text, re.MULTILINE)
    shown = {room: set(re.findall(r"[\w/]+", may)) - {"-"} for room, may in rows}
    assert shown
    assert {room: LAYERS[room] for room in shown} == shown


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_named_in_a_document_exist(document: Path) -> None:
    named = re.findall(r"`((?:[\w.-]+/)+[\w-]+\.(?:py|md|txt))`", document.read_text())
    places = (ROOT, ROOT / "src" / "weft", document.parent)
    missing = [name for name in named if not any((place / name).exists() for place in places)]
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_within_the_repository_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text())
    assert not [link for link in links if not (document.parent / link).exists()]


def examples() -> dict[str, list[str]]:
    """The Python examples of each document that has some."""
    found = {}
    for document in DOCUMENTS:
        text = document.read_text()
        blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        found |= {document.name: blocks} if blocks else {}
    return found


@pytest.fixture(scope="module")
def _server() -> Iterator[None]:
    """The server that examples with `remote=True` speak of."""
    from weft.testing.service import serve

    with serve({"tiny": tiny_path()}) as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("WEFT_HOST", server.url)
        patch.setenv("WEFT_KEY", server.key)
        yield


@pytest.mark.usefixtures("_server")
@pytest.mark.parametrize(("name", "blocks"), examples().items(), ids=examples())
def test_examples_run(name: str, blocks: list[str]) -> None:
    """From first to last: what one has sent to a server, the next one may ask for."""
    for number, code in enumerate(blocks):
        exec(compile(code, f"<{name}-{number}>", "exec"), {"__name__": f"{name}-{number}"})


def test_every_setting_is_in_the_page_on_serving() -> None:
    text = (ROOT / "docs" / "serving.md").read_text()
    shown = re.findall(r"^\| `(\w+)` \| (.*) \| (.*) \|$", text, re.MULTILINE)
    default = {
        f.name: "-" if f.default in (None, "") else f"`{f.default}`" for f in fields(Settings)
    }
    assert shown == [(name, default[name], TEXTS[name]) for name in default]


def test_the_readme_names_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text()
    assert "./run demo" in text
    assert "./run test" in text
    assert "./run test" in (ROOT / ".ci" / "run").read_text()

"""Lists of models and jobs as tables on a terminal."""

from __future__ import annotations

from weft.client.catalog import Models
from weft.client.listing import Jobs
from weft.wire.messages import JobInfo, ModelInfo


def test_a_name_from_a_server_is_one_cell_of_a_table() -> None:
    """Nothing of it begins a row, moves the cursor, or runs backwards."""
    name = "a\ntiny  LlamaForCausalLM\x1b[2J\u202e"
    known = {"family": "", "class_name": "", "fingerprint": "", "dtype": "", "parameters": 0}
    jobs = Jobs([JobInfo(id="j", state="done", model=name, created=0.0)])
    for table in (Models([ModelInfo(id=name, **known)]), jobs):
        _, *rows = repr(table).splitlines()
        assert len(rows) == 1 and rows[0].isprintable()
        assert r"a\ntiny  LlamaForCausalLM\x1b[2J\u202e" in rows[0]

"""The README's snippet for a node daemon does what it says."""

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest

from hypervisor import tiny

pytestmark = pytest.mark.kvm

README = Path(__file__).parents[2] / "README.md"


def test_the_readmes_snippet_starts_and_stops_an_instance(lab, capsys):
    snippet = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.M | re.S)
    assert len(snippet) == 1
    names: dict[str, Any] = {}
    exec(compile(snippet[0], str(README), "exec"), names)
    document = {"memory_mib": 1, "firmware": str(tiny.rom_path()), "accelerator": lab.accelerator}
    asyncio.run(names["main"](lab.root, "web", document))
    said = re.fullmatch(r"web runs as uid (\d+) with (kvm|tcg)\n", capsys.readouterr().out)
    assert said and int(said[1]) in lab.pool and said[2] == lab.accelerator
    assert not lab.leftovers()

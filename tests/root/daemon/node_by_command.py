"""A node as an administrator has it: a root, commands, a daemon."""

import json
import subprocess
from pathlib import Path
from typing import Any

from attrs import define, field

from kvmsec.paths import Paths
from tests.root.daemon.cluster_of_two import KVMSEC, Daemon, free_port


@define
class Node:
    """One root, its commands, and its daemon."""

    root: Path
    port: int = field(factory=free_port)
    daemon: Daemon | None = None

    def run(self, *words: str, given: str = "") -> subprocess.CompletedProcess[str]:
        argv = [str(KVMSEC), "--root", str(self.root), *words]
        return subprocess.run(
            argv, capture_output=True, text=True, input=given, timeout=120, check=False
        )

    def do(self, *words: str, given: str = "") -> str:
        done = self.run(*words, given=given)
        assert done.returncode == 0, (words, done.stdout, done.stderr)
        return done.stdout

    def serve(self) -> None:
        self.daemon = Daemon(self.root, "--bind", f"127.0.0.1:{self.port}")

    def has(self, name: str) -> bool:
        return (Paths(self.root).key_files / name).exists()

    def state(self) -> Any:
        return json.loads(self.do("cluster", "info", "--json"))

    def codes(self) -> set[tuple[str, str]]:
        """What `verify` finds, but for this host having no model but none."""
        found = json.loads(self.run("cluster", "verify", "--json").stdout)
        return {(one["node"], one["code"]) for one in found if one["severity"] == "error"}

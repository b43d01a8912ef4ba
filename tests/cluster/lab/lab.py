"""A lab of nodes on one host, cabled to one switch, and all of it taken back at its end."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from hypervisor.cgroup_mounts import mounted
from tests.cluster.lab.node import Node
from tests.cluster.lab.switch import Switch
from tests.cluster.lab.traces import prefix, remove_group

_NETWORK = "10.91.0"


class Lab:
    """Nodes that differ in all that a kernel can separate, `node1` the first of them."""

    def __init__(self, nodes: Sequence[Node], switch: Switch, directory: Path) -> None:
        self.nodes = tuple(nodes)
        self.switch = switch
        self.directory = directory

    def __getitem__(self, name: str) -> Node:
        return next(node for node in self.nodes if node.name == name)

    @property
    def first(self) -> Node:
        return self.nodes[0]

    @property
    def others(self) -> tuple[Node, ...]:
        return self.nodes[1:]


@contextlib.contextmanager
def new_lab(count: int = 5) -> Iterator[Lab]:
    """A lab whose nodes have booted; at its end nothing of it is left, whatever happened in it."""
    with contextlib.ExitStack() as ends:
        directory = Path(tempfile.mkdtemp(prefix=prefix()))
        ends.callback(shutil.rmtree, directory)
        top = directory.name
        ends.callback(_remove_groups, top)
        switch = ends.enter_context(Switch())
        names = {f"node{number}": f"{_NETWORK}.{number}" for number in range(1, count + 1)}
        nodes = [
            Node(name, address, directory / name, f"{top}/{name}", switch)
            for name, address in names.items()
        ]
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in names.items())]
        for node in nodes:
            ends.callback(node.kill)
            node.furnish("".join(f"{line}\n" for line in lines))
            node.boot()
        yield Lab(nodes, switch, directory)


def _remove_groups(top: str) -> None:
    for mount in mounted():
        remove_group(f"{mount.path}/{top}")

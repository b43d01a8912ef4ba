"""A daemon of the test's own, and a cluster that it belongs to."""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvmsec.linux import command
from tests.root.daemon.cluster_of_two import FRONT_USER, ClusterOfTwo, Daemon, make_front_user
from tests.root.daemon.node_by_command import Node


@pytest.fixture(scope="module")
def front_user() -> Iterator[str]:
    make_front_user()
    yield FRONT_USER
    command.run(["userdel", FRONT_USER], timeout_s=30)


@pytest.fixture
def root() -> Iterator[Path]:
    """A root that is root's all the way up, which pytest's own are not."""
    made = Path(tempfile.mkdtemp(dir="/run"))
    yield made
    shutil.rmtree(made)


@pytest.fixture
def cluster(root: Path) -> ClusterOfTwo:
    return ClusterOfTwo(root)


@pytest.fixture
def begin(root: Path, front_user: str) -> Iterator[Callable[..., Daemon]]:
    """Starts daemons of the root, and ends them."""
    begun: list[Daemon] = []

    def start(*words: str, **options: object) -> Daemon:
        begun.append(Daemon(root, *words, **options))
        return begun[-1]

    yield start
    for one in begun:
        one.close()


@pytest.fixture
def daemon(cluster: ClusterOfTwo, begin: Callable[..., Daemon]) -> Daemon:
    """A member's daemon that serves."""
    cluster.join()
    daemon = begin("--bind", f"127.0.0.1:{cluster.port}")
    daemon.says("serving other nodes")
    return daemon


@pytest.fixture
def nodes(front_user: str) -> Iterator[Callable[[], Node]]:
    """Makes nodes; their daemons and files go in the end."""
    made: list[Node] = []

    def make() -> Node:
        made.append(Node(Path(tempfile.mkdtemp(dir="/run"))))
        return made[-1]

    yield make
    for node in made:
        if node.daemon is not None:
            node.daemon.close()
        shutil.rmtree(node.root)


@pytest.fixture
def master(nodes: Callable[[], Node]) -> Node:
    node = nodes()
    node.do("cluster", "init", "--name", "site", "--address", f"127.0.0.1:{node.port}")
    node.serve()
    assert node.daemon is not None
    node.daemon.says("serving other nodes")
    return node


@pytest.fixture
def bring_in(master: Node, nodes: Callable[[], Node]) -> Callable[[str], Node]:
    """Lets a node join."""

    def make(name: str) -> Node:
        node = nodes()
        node.do("node", "join", given=master.do("node", "invite", name))
        node.serve()
        assert node.daemon is not None
        node.daemon.says("waiting to be admitted")
        master.do("node", "add", f"127.0.0.1:{node.port}", "--name", name)
        return node

    return make

"""Each of the two hosts in turn: booted once, the checkout in it, the package installed."""

from collections.abc import Iterator

import pytest

from tests.nested.checkout import write_disk
from tests.nested.host import Host, debian
from tests.nested.machine import BUILT, CHECKOUT
from tests.nested.stages import Stages

RELEASES = ("12", "13")
REPORTS = BUILT / "reports"


@pytest.fixture(scope="session", params=RELEASES, ids=[f"debian{one}" for one in RELEASES])
def bare_host(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, stages: Stages
) -> Iterator[Host]:
    """A host that never had kvmsec, with the checkout in /srv/kvmsec and the package there."""
    name = f"debian{request.param}"
    image = BUILT / name
    packages = sorted((CHECKOUT / "dist").glob(f"kvmsec_*~deb{request.param}_amd64.deb"))
    if not (image / "image-made-from").exists() or not packages:
        pytest.skip(f"run ./dev image l1-{name} and ./dev package {request.param} first")
    directory = tmp_path_factory.mktemp(name)
    disk = directory / "checkout.tar"
    write_disk(CHECKOUT, packages[-1:], disk)
    with debian(request.param, image, disk, directory, stages) as host:
        with stages.measured(f"{name}: the checkout"):
            host.run("tar", "-x", "-f", "/dev/vdb", "-C", "/srv/kvmsec", timeout_s=300)
        yield host
        host.keep_logs(REPORTS / name)


@pytest.fixture(scope="session")
def host(bare_host: Host, stages: Stages) -> Host:
    """The host with the package on it, installed as an admin does."""
    with stages.measured(f"debian{bare_host.release}: apt install"):
        install(bare_host)
    return bare_host


@pytest.fixture(autouse=True)
def timed(request: pytest.FixtureRequest, stages: Stages) -> Iterator[None]:
    """Each test is a stage, with what it alone asks of its host before and after."""
    with stages.measured(request.node.name):
        yield


def install(host: Host) -> None:
    """Install the package that came with the checkout, from no network."""
    host.shell("apt-get install -y --no-install-recommends /srv/kvmsec/kvmsec_*.deb", timeout_s=600)

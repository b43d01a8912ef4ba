"""What each security model asks for, and refuses, before anything is made."""

from typing import Any

import pytest

from kvmsec.errors import BadDefinition, SecurityRefused
from kvmsec.linux import command
from kvmsec.linux.errors import Fault
from uidpool.ranges import EMPTY

pytestmark = pytest.mark.kvm


def check_refused(lab: Any, error: type[Exception], match: str, **keys: Any) -> None:
    before = files(lab)
    with pytest.raises(error, match=match) as caught:
        lab.start(**keys)
    assert isinstance(caught.value, Fault) and caught.value.hint
    assert files(lab) == before
    assert not lab.leftovers()


def files(lab: Any) -> set[str]:
    """Every file of a root but the log, in which a refusal may stand."""
    return {str(path) for path in lab.root.rglob("*")} - {str(lab.paths.instance_log("web"))}


def test_the_default_is_pool_once_there_is_one_and_none_before(make_lab):
    lab = make_lab(uid_pool=EMPTY)
    assert lab.start().security_model == "none"
    lab.stop()
    check_refused(lab, SecurityRefused, "the cluster has none", security_model="pool")
    lab.modify(add=lab.pool)
    assert lab.start().security_model == "pool"
    lab.stop()


@pytest.mark.parametrize("domain", ["root", "nosuchuser", "kvmsec-245000", "diskuser"])
def test_a_domain_that_is_none_is_refused(lab, domain):
    line = b'u diskuser 245901 "may open disks" / /usr/sbin/nologin\nm diskuser disk\n'
    command.run(["systemd-sysusers", "-"], input=line, timeout_s=30)
    check_refused(lab, Fault, domain, security_model="user", security_domain=domain)


def test_a_domain_belongs_to_the_model_user_alone(lab):
    for keys in (
        {"security_model": "user"},
        {"security_model": "none", "security_domain": lab.domain},
        {"security_model": "pool", "security_domain": lab.domain},
    ):
        with pytest.raises(BadDefinition, match="security_domain"):
            lab.definition(**keys)
    check_refused(lab, SecurityRefused, "takes no security domain", security_domain=lab.domain)


def test_a_node_may_accept_no_weaker_model(make_lab):
    lab = make_lab('[security]\nweakest_model = "user"\n')
    check_refused(lab, SecurityRefused, "no security model weaker", security_model="none")
    lab.start(security_model="user", security_domain=lab.domain)
    lab.stop()


def test_instances_that_share_a_user_end_alone(lab):
    """`user` never ends what it did not start, though it could tell it by the uid."""
    keys = {"security_model": "user", "security_domain": lab.domain}
    one, two = lab.start("one", **keys), lab.start("two", **keys)
    assert one.uid == two.uid
    lab.stop("one")
    assert lab.instances()["two"].pid == two.pid
    with lab.line("two") as line:
        assert line.ask(b"ehello\n") == "ECHO hello"
    assert lab.rules() == f"{lab.pool},{lab.domain_uid}", "the other still runs as it"
    lab.stop("two")

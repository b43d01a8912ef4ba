"""A confined process that a test has not to say more of, and that is not started."""

from kvmsec.daemon.confined_child import Start
from kvmsec.linux.credentials import Credentials

START = Start(
    name="trial",
    program="nothing",
    credentials=Credentials(65534, 65534),
    mount_point="/nowhere",
    cache=None,
    filter_may_be_missing=False,
)

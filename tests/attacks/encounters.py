"""The part of the table that is about whoever starts, talks with, watches and ends instances."""

from typing import Final

from tests.attacks.channels import CHANNELS
from tests.attacks.endings import ENDINGS
from tests.attacks.outputs import OUTPUTS
from tests.attacks.remains import REMAINS

ENCOUNTERS: Final = (*CHANNELS, *OUTPUTS, *ENDINGS, *REMAINS)

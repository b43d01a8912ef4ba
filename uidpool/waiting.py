"""Claims for who has no event loop to keep running: each call returns when all of it is done."""

from typing import Final

from uidpool.claims import Claims, Lease, LeaseKey, Quarantined, Released
from uidpool.ranges import UidRanges
from uidpool.steps import carry_out

DEFAULT_REUSE_DELAY_S: Final = 60.0


class WaitingClaims(Claims):
    """Draws, releases and retries in place, however long that takes."""

    def draw(
        self,
        pool: UidRanges,
        *,
        instance: str,
        generation: str,
        reuse_delay_s: float = DEFAULT_REUSE_DELAY_S,
    ) -> Lease:
        """As `Claims.drawing`."""
        return carry_out(self.drawing(pool, instance, generation, reuse_delay_s), self.take)

    def release(self, key: LeaseKey) -> Released | Quarantined:
        """As `Claims.releasing`."""
        return carry_out(self.releasing(key), self.take)

    def retry(self, uid: int) -> Released | Quarantined:
        """As `Claims.retrying`."""
        return carry_out(self.retrying(uid), self.take)

    def forget_resting(self) -> None:
        """As `Claims.forgetting_resting`."""
        carry_out(self.forgetting_resting(), self.take)

    def remove_if_unused(self) -> bool:
        """As `Claims.removing_if_unused`."""
        return carry_out(self.removing_if_unused(), self.take)

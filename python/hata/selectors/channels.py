"""What selectors have in common that estimate attention from some channels of the keys."""

from dataclasses import dataclass

from hata.checks import check_int
from hata.selectors.selector import CACHE_ITEMSIZE, Selector


@dataclass(frozen=True)
class ChannelSelector(Selector):
    """Reads ``2 channels`` bytes a token.

    Attributes:
        channels: Channels that are read of each key, at least 1.

    Raises:
        TypeError: ``channels`` is no int.
        ValueError: ``channels`` is out of range.
    """

    channels: int

    def __post_init__(self) -> None:
        """Checks every rule."""
        check_int(type(self).__name__, "channels", self.channels, 1)

    @property
    def variant(self) -> str:
        """The number of channels."""
        return f"{self.channels} channels"

    @property
    def settings(self) -> dict[str, object]:
        """The number of channels, by name."""
        return {"channels": self.channels}

    def bytes_per_token(self, head_dim: int) -> float:
        """The read channels' bytes."""
        return CACHE_ITEMSIZE * self.channels

"""How known tokens are decoded."""

from collections.abc import Sequence
from dataclasses import dataclass

from hata.checks import check
from hata.config import HataConfig
from hata.eval.completion import Completion
from hata.eval.prose import WHERE
from hata.selectors import Selector

DENSE_LAYER = 0  # the budget of a layer that attends to everything


@dataclass(frozen=True)
class Setting:
    """How tokens are decoded.

    Attributes:
        selector: Chooses what each token attends to; None attends to everything.
        top_k: Positions that each KV head attends to, sinks and recent ones included; or one for
            each of the model's layers, where `DENSE_LAYER` attends to everything.
        num_dense_layers: The model's leading layers that attend to everything.
        num_sink: First positions that are always among them.
        num_recent: Last positions that are always among them.
        share_selection: Which sparse layers select, as `hata.HataConfig` takes it.
        completion: What is done about the positions that are left out; None: nothing.

    Raises:
        ValueError: Layers share a selection that is completed.
    """

    selector: Selector | None = None
    top_k: int | tuple[int, ...] = 0
    num_dense_layers: int = 0
    num_sink: int = 0
    num_recent: int = 0
    share_selection: int | tuple[int, ...] = 1
    completion: Completion | None = None

    def __post_init__(self) -> None:
        """Checks the rule: a selection is completed by the logits of the layer that made it."""
        alone = self.completion is None or self.share_selection == 1
        rule = "be 1 with a completion"
        check(alone, WHERE, "share_selection", rule, self.share_selection)

    def selecting(self, layers: Sequence[int]) -> dict[int, int]:
        """Returns the layer whose selection each sparse layer attends to, both the model's.

        Args:
            layers: The model's layers that attend to the whole context, ascending.
        """
        if not layers:
            return {}
        config = HataConfig(
            num_dense_layers=self.num_dense_layers, share_selection=self.share_selection
        )
        numbers = config.for_layers(layers, layers[-1] + 1).selecting_layers(len(layers))
        followed = zip(layers, numbers, strict=True)
        first = self.num_dense_layers
        return {
            layer: layers[i]
            for layer, i in followed
            if layer >= first and self.budget(layer) != DENSE_LAYER
        }

    def budget(self, layer: int) -> int:
        """Positions that each KV head of a layer of the model attends to."""
        return self.top_k if isinstance(self.top_k, int) else self.top_k[layer]


DENSE = Setting()

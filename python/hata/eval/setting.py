"""How known tokens are decoded."""

from dataclasses import dataclass

from hata.checks import check
from hata.eval.completion import Completion
from hata.eval.prose import WHERE
from hata.selectors import Selector

NUM_LEADING = 2  # first layers that may have a budget of their own


@dataclass(frozen=True)
class Setting:
    """How tokens are decoded.

    Attributes:
        selector: Chooses what each token attends to; None attends to everything.
        top_k: Positions that each KV head attends to, sinks and recent ones included.
        num_dense_layers: The model's leading layers that attend to everything.
        num_sink: First positions that are always among them.
        num_recent: Last positions that are always among them.
        share_layers: Sparse layers in a row that attend to one selection, that of the first of
            them. Source: Kascade, arXiv 2512.16391, which chooses by calibration the layers that
            select, and which heads go together; here each ``share_layers``-th selects, for the same
            heads.
        leading_top_k: ``top_k`` of the model's first `NUM_LEADING` layers; None: the same.
        completion: What is done about the positions that are left out; None: nothing.

    Raises:
        ValueError: Layers share a selection that is completed.
    """

    selector: Selector | None = None
    top_k: int = 0
    num_dense_layers: int = 0
    num_sink: int = 0
    num_recent: int = 0
    share_layers: int = 1
    leading_top_k: int | None = None
    completion: Completion | None = None

    def __post_init__(self) -> None:
        """Checks the rule: a selection is completed by the logits of the layer that made it."""
        alone = self.completion is None or self.share_layers == 1
        check(alone, WHERE, "share_layers", "be 1 with a completion", self.share_layers)

    def budget(self, layer: int) -> int:
        """Positions that each KV head of a layer of the model attends to."""
        if self.leading_top_k is None or layer >= NUM_LEADING:
            return self.top_k
        return self.leading_top_k


DENSE = Setting()

"""Selectors to compare with: which positions a query attends to, in plain PyTorch.

Each is a dataclass: `ExactSelector` is the bound, `HataSelector` this package's,
`LokiSelector`, `QuestSelector` and `SparqSelector` are published ones. ``hata recall`` measures
them.
"""

from hata.selectors.channels import LokiSelector, SparqSelector, key_components
from hata.selectors.exact import ExactSelector
from hata.selectors.hata import HataSelector
from hata.selectors.quest import QuestSelector
from hata.selectors.ranking import rank
from hata.selectors.selector import Score, Selector

__all__ = [
    "ExactSelector",
    "HataSelector",
    "LokiSelector",
    "QuestSelector",
    "Score",
    "Selector",
    "SparqSelector",
    "key_components",
    "rank",
]

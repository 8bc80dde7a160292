"""Selectors to compare with: which positions a query attends to, in plain PyTorch.

Each is a dataclass: `ExactSelector` is the bound, `HataSelector` this package's,
the others are published ones. ``hata recall`` measures what they find, ``hata eval`` what a model
answers with them.
"""

from hata.selectors.channels import LokiSelector, SparqSelector, key_components
from hata.selectors.exact import ExactSelector
from hata.selectors.hata import HataSelector
from hata.selectors.magicpig import MagicpigSelector
from hata.selectors.quest import QuestSelector
from hata.selectors.rabitq import RabitqSelector
from hata.selectors.ranking import rank
from hata.selectors.selector import Score, Selector
from hata.selectors.softmax import Softmax
from hata.selectors.streaming import StreamingSelector

__all__ = [
    "ExactSelector",
    "HataSelector",
    "LokiSelector",
    "MagicpigSelector",
    "QuestSelector",
    "RabitqSelector",
    "Score",
    "Selector",
    "Softmax",
    "SparqSelector",
    "StreamingSelector",
    "key_components",
    "rank",
]

"""Selectors to compare with: which positions a query attends to, in plain PyTorch.

Each is a dataclass: `ExactSelector` is the bound, `HataSelector` this package's,
the others are published ones. ``hata recall`` measures what they find, ``hata eval`` what a model
answers with them.
"""

from hata.selectors.channels import LokiSelector, SparqSelector, key_components
from hata.selectors.exact import ExactSelector
from hata.selectors.h2o import H2oSelector
from hata.selectors.hash_attention import (
    HashAttentionSelector,
    HashNetworks,
    fit_hash_networks,
)
from hata.selectors.hata import HataSelector
from hata.selectors.infinigen import InfinigenSelector
from hata.selectors.magicpig import MagicpigSelector
from hata.selectors.quest import QuestSelector
from hata.selectors.rabitq import RabitqSelector
from hata.selectors.ranking import Selection, prefixes, rank
from hata.selectors.selector import Queries, Score, Selector
from hata.selectors.snapkv import SnapkvSelector
from hata.selectors.softmax import Softmax
from hata.selectors.streaming import StreamingSelector
from hata.selectors.vattention import VattentionSelector

__all__ = [
    "ExactSelector",
    "H2oSelector",
    "HashAttentionSelector",
    "HashNetworks",
    "HataSelector",
    "InfinigenSelector",
    "LokiSelector",
    "MagicpigSelector",
    "Queries",
    "QuestSelector",
    "RabitqSelector",
    "Score",
    "Selection",
    "Selector",
    "SnapkvSelector",
    "Softmax",
    "SparqSelector",
    "StreamingSelector",
    "VattentionSelector",
    "fit_hash_networks",
    "key_components",
    "prefixes",
    "rank",
]

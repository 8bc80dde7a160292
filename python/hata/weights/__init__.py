"""Hash weights, in memory and on disk."""

from hata.weights.file import load_weights, save_weights
from hata.weights.hash_weights import HashWeights

__all__ = ["HashWeights", "load_weights", "save_weights"]

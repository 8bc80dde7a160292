"""Hash weights, in memory and on disk."""

from hata.weights.file import load_weights, save_weights
from hata.weights.hash_weights import HashWeights, check_format

__all__ = ["HashWeights", "check_format", "load_weights", "save_weights"]

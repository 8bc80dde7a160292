"""Packed codes for the tests of C++ internals."""

import numpy as np
from numpy.typing import NDArray


def random_codes(rng: np.random.Generator, *shape: int) -> NDArray[np.uint32]:
    return rng.integers(0, 2**32, shape, dtype=np.uint32)


def unpack(codes: NDArray[np.uint32]) -> NDArray[np.uint8]:
    """``[..., num_words]`` words to ``[..., num_bits]`` bits, lowest first."""
    return np.unpackbits(codes.astype("<u4").view(np.uint8), axis=-1, bitorder="little")

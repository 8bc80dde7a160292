"""Lengths and pages of a cache's sequences, kept on the host and mirrored on the device.

`Sequences` is the batch, `PagePool` hands out the pages of a paged cache.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from hata.checks import check, check_int, check_type


class PagePool:
    """Hands out pages to sequences as they grow and takes them back as they shrink.

    Attributes:
        pages: The pages of each sequence, in the order of its positions.
        free: The pages that no sequence holds; the next to be handed out comes last. Pages are
            handed out for the first time in their order, so that those that have ever been are the
            first ones, as many as were held at once.

    Args:
        batch: Sequences.
        num_pages: Pages in all.
        page_size: Positions of a page.
        reserve: Called with a public function's name and the number of first pages that are about
            to be held, before anything changes; raises where they cannot be.
        limit: What sets the number of pages, for error messages.
    """

    def __init__(
        self,
        batch: int,
        num_pages: int,
        page_size: int,
        *,
        reserve: Callable[[str, int], None] = lambda function, num_pages: None,
        limit: str = "",
    ) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self._reserve = reserve
        self._room = f"{num_pages} pages of {page_size} positions{limit}"
        self.pages: list[list[int]] = [[] for _ in range(batch)]
        self.free = list(reversed(range(num_pages)))

    def resize(self, function: str, lengths: Sequence[int]) -> list[tuple[int, int, int]]:
        """Gives every sequence as many pages as it needs for its length.

        Growing and then shrinking to the old lengths restores the pool exactly.

        Args:
            function: The public function that asks, for the error message.
            lengths: Positions of each sequence, ``[batch]``.

        Returns:
            ``(batch_idx, start, stop)`` for each sequence whose entries ``start..stop`` of the
            block table have changed.

        Raises:
            ValueError: There are too few pages; nothing has changed.
        """
        counts = [-(-length // self.page_size) for length in lengths]
        needed = f"{list(lengths)}, which needs {sum(counts)}"
        fits = sum(counts) <= self.num_pages
        check(fits, function, "sequence lengths", f"fit into {self._room}", needed)
        self._reserve(function, sum(counts))

        before = [len(pages) for pages in self.pages]
        for pages, count in zip(reversed(self.pages), reversed(counts), strict=True):
            while len(pages) > count:
                self.free.append(pages.pop())
        for pages, count in zip(self.pages, counts, strict=True):
            while len(pages) < count:
                pages.append(self.free.pop())
        changes = zip(before, counts, strict=True)
        return [
            (b, min(old, new), max(old, new)) for b, (old, new) in enumerate(changes) if old != new
        ]

    def reorder(self, function: str, batch_idx: Sequence[int]) -> tuple[list[int], list[int]]:
        """Lets sequence b continue as the old sequence ``batch_idx[b]``.

        The first sequence that continues an old one takes over its pages; each further one gets
        pages of its own, into which the caller copies.

        Args:
            function: The public function that asks, for the error message.
            batch_idx: The old sequence of each new one, ``[batch]``.

        Returns:
            The pages to copy from and, in the same order, those to copy to. They are disjoint.

        Raises:
            ValueError: There are too few pages; nothing has changed.
        """
        counts = [len(self.pages[old]) for old in batch_idx]
        rule = f"need at most {self._room}"
        check(sum(counts) <= self.num_pages, function, "batch_idx", rule, sum(counts))
        self._reserve(function, sum(counts))

        for old in reversed(range(len(self.pages))):
            if old not in batch_idx:
                self.free.extend(reversed(self.pages[old]))
        sources: list[int] = []
        copies: list[int] = []
        continued: list[list[int]] = []
        for b, old in enumerate(batch_idx):
            pages = self.pages[old]
            if old in batch_idx[:b]:
                own = [self.free.pop() for _ in pages]
                sources += pages
                copies += own
                pages = own
            continued.append(pages)
        self.pages = continued
        return sources, copies


class Sequences:
    """The batch of sequences that all layers of a cache share.

    A *step* adds tokens to the sequences. The first layer that writes opens it, or `open` does;
    every other layer must then write as many tokens. The device never has to be waited for, and
    its buffers keep their addresses.

    Attributes:
        block_table: ``[batch, max_pages]``, int32; -1 where a sequence has no page yet.
        cache_seqlens: ``[batch]``, int32: positions in use, those of the last step included.
        seq_lens: The same numbers on the host.
        num_steps: Steps that have been opened.

    Args:
        batch: Sequences.
        num_layers: Layers that must fill each step.
        max_seq_len: Positions that a sequence can have.
        pool: The pages, or None for a contiguous cache: page b is sequence b's.
        device: Where the mirrors lie.
    """

    def __init__(
        self,
        *,
        batch: int,
        num_layers: int,
        max_seq_len: int,
        pool: PagePool | None,
        device: torch.device,
    ) -> None:
        self.batch, self.num_layers, self.max_seq_len = batch, num_layers, max_seq_len
        self.device = device
        self._pool = pool
        max_pages = 1 if pool is None else -(-max_seq_len // pool.page_size)
        self.block_table = torch.full((batch, max_pages), -1, dtype=torch.int32, device=device)
        if pool is None:
            self.block_table.copy_(self.to_device([[b] for b in range(batch)]))
        self.cache_seqlens = torch.zeros(batch, dtype=torch.int32, device=device)
        self.seq_lens = [0] * batch
        self.num_steps = 0
        self._step: list[int] | None = None  # new tokens of the last step
        self._filled: set[int] = set()  # layers that hold them
        self._captured: set[int] = set()  # layers in a CUDA graph, whose replays cannot be seen

    def open(self, function: str, new: list[int]) -> None:
        """Opens a step of ``new`` tokens, or raises ValueError and changes nothing."""
        self.check_step_filled(function)
        lengths = [old + added for old, added in zip(self.seq_lens, new, strict=True)]
        rule = f"be at most max_seq_len={self.max_seq_len}"
        check(max(lengths) <= self.max_seq_len, function, "sequence lengths", rule, lengths)
        self._set_lengths(function, lengths)
        self._step, self._filled = new, set()
        self.num_steps += 1

    @contextmanager
    def filling(self, function: str, layer_idx: int, new: list[int]) -> Iterator[None]:
        """Lets a layer write its part of the step inside the block; undoes the step if that fails.

        Opens the step unless one is open that the layer has not filled. While a CUDA graph is
        captured, the last step's tokens are accepted again, and the layer is taken to fill every
        further step by replays.
        """
        capturing = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if capturing or (self._step is not None and layer_idx not in self._filled):
            rule = f"bring the new tokens of the open step, {self._step}"
            check(new == self._step, function, f"layer {layer_idx}", rule, new)
            yield
        else:
            lengths, step, filled = self.seq_lens, self._step, self._filled
            self.open(function, new)
            try:
                yield
            except BaseException:
                self._set_lengths(function, lengths)
                self._step, self._filled = step, filled
                raise
        (self._captured if capturing else self._filled).add(layer_idx)

    def reopen(self, layer_idx: int) -> None:
        """Lets a layer that has filled the last step bring the same tokens once more."""
        self._filled.discard(layer_idx)

    def close(self) -> None:
        """Takes the open step for filled by every layer."""
        self._filled = set(range(self.num_layers))

    def check_step_filled(self, function: str) -> None:
        """Raises ValueError if some layers, but not all, have filled the last step."""
        missing = sorted(set(range(self.num_layers)) - self._filled - self._captured)
        rule = "all hold the tokens of the last step (reset() drops them)"
        got = f"none of them in layers {missing}"
        check(not self._filled or not missing, function, "layers", rule, got)

    def resize(self, function: str, lengths: list[int]) -> None:
        """Closes the step and cuts the sequences to these lengths."""
        self._set_lengths(function, lengths)
        self._step, self._filled = None, set()

    def reorder(self, function: str, order: list[int]) -> tuple[list[int], list[int]]:
        """Lets sequence b continue as the old sequence ``order[b]``.

        Returns:
            The pages to copy from and, in the same order, those to copy to.
        """
        self.check_step_filled(function)
        if self._pool is None:
            copies = [b for b, old in enumerate(order) if b != old]
            sources = [order[b] for b in copies]
        else:
            sources, copies = self._pool.reorder(function, order)
            width = self.block_table.shape[1]
            table = [pages + [-1] * (width - len(pages)) for pages in self._pool.pages]
            self.block_table.copy_(self.to_device(table))
        self.seq_lens = [self.seq_lens[old] for old in order]
        self.cache_seqlens.copy_(self.to_device(self.seq_lens))
        self._step, self._filled = None, set()
        return sources, copies

    def counts(
        self, function: str, argument: str, values: int | Sequence[int] | Tensor, high: int
    ) -> list[int]:
        """Checks one int in ``0..high`` per sequence (or one for all); returns a list."""
        if isinstance(values, int):
            check_int(function, argument, values, 0, high)
            return [values] * self.batch
        given = values.tolist() if isinstance(values, Tensor) else values
        rule = "be ints, one for each sequence"
        check_type(isinstance(given, Sequence), function, argument, rule, values)
        check(
            len(given) == self.batch,
            function,
            argument,
            f"have batch={self.batch} entries",
            len(given),
        )
        for value in given:
            check_int(function, argument, value, 0, high)
        return list(given)

    def to_device(self, values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        """Copies ints to the device as int32, without waiting for it."""
        # torch keeps the pinned memory until the copy is done.
        host = torch.tensor(values, dtype=torch.int32, pin_memory=self.device.type == "cuda")
        return host.to(self.device, non_blocking=True)

    def _set_lengths(self, function: str, lengths: list[int]) -> None:
        if self._pool is not None:
            for b, start, stop in self._pool.resize(function, lengths):
                pages = self._pool.pages[b][start:stop]
                entries = pages + [-1] * (stop - start - len(pages))
                self.block_table[b, start:stop].copy_(self.to_device(entries))
        self.seq_lens = lengths
        self.cache_seqlens.copy_(self.to_device(lengths))


def check_page_size(function: str, page_size: int) -> None:
    """Raises TypeError or ValueError unless ``page_size`` is a power of two."""
    check_int(function, "page_size", page_size, 1, 2**30)
    check(page_size.bit_count() == 1, function, "page_size", "be a power of two", page_size)


def page_pool(
    function: str, batch: int, max_seq_len: int, page_size: int | None, num_pages: int | None
) -> PagePool | None:
    """Makes the pool that a cache's arguments describe; None for a contiguous cache.

    Args:
        function: The public function that takes the arguments, for error messages.
        batch: Sequences.
        max_seq_len: Positions that a sequence can have.
        page_size: Positions of a page, a power of two; None for a contiguous cache.
        num_pages: Pages in all; None for enough for every sequence at ``max_seq_len``.

    Returns:
        The pool, or None.

    Raises:
        TypeError: An argument is no int.
        ValueError: An argument breaks its rule.
    """
    if page_size is None:
        check(num_pages is None, function, "num_pages", "be None without page_size", num_pages)
        return None
    check_page_size(function, page_size)
    if num_pages is None:
        num_pages = batch * -(-max_seq_len // page_size)
    check_int(function, "num_pages", num_pages, 1, 2**31 - 1)
    return PagePool(batch, num_pages, page_size)

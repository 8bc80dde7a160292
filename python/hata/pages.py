"""Which pages hold which sequence: the host's side of a paged cache."""

from collections.abc import Sequence

from hata.checks import check, check_int


class PagePool:
    """Hands out pages to sequences as they grow and takes them back as they shrink.

    Attributes:
        pages: The pages of each sequence, in the order of its positions.
        free: The pages that no sequence holds; the next to be handed out comes last.
    """

    def __init__(self, batch: int, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
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
        rule = f"fit into {self.num_pages} pages of {self.page_size} positions"
        needed = f"{list(lengths)}, which needs {sum(counts)}"
        check(sum(counts) <= self.num_pages, function, "sequence lengths", rule, needed)

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
        rule = f"need at most {self.num_pages} pages of {self.page_size} positions"
        check(sum(counts) <= self.num_pages, function, "batch_idx", rule, sum(counts))

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

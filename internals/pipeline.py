"""Iterators of a pipeline: threads that work ahead, and batches of items that fit together."""

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

WAITING_BATCHES = 3  # how many batches of items wait for others with their key


def prefetch_map(function: Callable, items: Iterable, threads: int, ahead: int) -> Iterator:
    """Yield `function` of each item in order; threads compute up to `ahead` items in advance."""
    with ThreadPoolExecutor(threads) as pool:
        pending = deque()
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def batch_by_key(
    items: Iterable, key: Callable[[object], Hashable], batch_size: int
) -> Iterator[list]:
    """Yield batches of items with the same key, each key in the order of its items.

    The items of up to three batches are held back; then the batch that has waited longest is
    yielded, though it is not full.
    """
    waiting = {}
    for item in items:
        batch = waiting.setdefault(key(item), [])
        batch.append(item)
        if len(batch) == batch_size:
            yield waiting.pop(key(item))
        elif sum(map(len, waiting.values())) > WAITING_BATCHES * batch_size:
            yield waiting.pop(next(iter(waiting)))
    yield from waiting.values()

"""Process items one by one, while the next item is read and the last result is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Generic, TypeVar

from kmdx.errors import KmdxError

Item = TypeVar("Item")
Read = TypeVar("Read")
Result = TypeVar("Result")


class Interrupted(Exception, Generic[Item]):
    """Ctrl-C stopped a run during `item`; ``None`` if all items had been processed."""

    def __init__(self, item: Item | None) -> None:
        super().__init__(item)
        self.item = item


def run(
    items: Sequence[Item],
    read: Callable[[Item], Read],
    work: Callable[[Item, Read], Result],
    write: Callable[[Item, Result], None],
    fail: Callable[[Item, KmdxError], None],
) -> None:
    """Read, process and write each item.

    At most one item is read ahead, and at most one is being written while the next is processed. Raises
    :class:`Interrupted` on Ctrl-C, after the current write has finished.

    Parameters
    ----------
    items : sequence
        At least one.
    read, write : callable
        Each runs in its own thread.
    work : callable
        Called in the calling thread with an item and the result of ``read``.
    fail : callable
        Called instead of ``write`` if ``read``, ``work`` or ``write`` raises a :class:`KmdxError`. Calls of
        ``write`` and ``fail`` are in the order of the items.
    """

    def finish(item: Item, outcome: Result | KmdxError) -> None:
        try:
            if isinstance(outcome, KmdxError):
                raise outcome
            write(item, outcome)
        except KmdxError as error:
            fail(item, error)

    current: Item | None = None
    written: Future[None] | None = None
    reader, writer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
    try:
        with writer:  # waits for it in any case
            for current, reading in _ahead(reader, read, items):
                outcome: Result | KmdxError | None
                try:
                    outcome = work(current, reading.result())
                except KmdxError as error:
                    outcome = error
                if written is not None:
                    written.result()
                written = writer.submit(finish, current, outcome)
                outcome = None  # so that it is freed when it is written
            current = None
            if written is not None:
                written.result()
    except KeyboardInterrupt:
        raise Interrupted(current) from None
    finally:
        reader.shutdown(wait=False, cancel_futures=True)


def _ahead(
    reader: Executor, read: Callable[[Item], Read], items: Sequence[Item]
) -> Iterator[tuple[Item, Future[Read]]]:
    """Each item and the future of its reading, after queueing the reading of the next item."""
    following = reader.submit(read, items[0])
    for number, item in enumerate(items, 1):
        reading = following
        if number < len(items):
            following = reader.submit(read, items[number])
        yield item, reading

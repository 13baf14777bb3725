"""Work on one item after the other, while the next is read and the result of the last is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Generic, TypeVar

from kmdx.errors import KmdxError

Item = TypeVar("Item")
Read = TypeVar("Read")
Result = TypeVar("Result")


class Interrupted(Exception, Generic[Item]):
    """Ctrl-C stopped a run in `item`; ``None`` if all of its items were finished nevertheless."""

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
    """Read, work on and write each item.

    One item at most is read ahead, and one at most is being written while the next is worked on.

    Parameters
    ----------
    items : sequence
        At least one.
    read, write : callable
        Each is called in a thread of its own.
    work : callable
        Called in the calling thread with an item and what was read of it.
    fail : callable
        Called where ``write`` would have been, if one of the three raises a :class:`KmdxError`; so what
        the two report is in the order of the items.

    Raises
    ------
    Interrupted
        On Ctrl-C, after the writing in progress has ended.
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
        with writer:  # waits for it, whatever happens
            for current, reading in _ahead(reader, read, items):
                outcome: Result | KmdxError | None
                try:
                    outcome = work(current, reading.result())
                except KmdxError as error:
                    outcome = error
                if written is not None:
                    written.result()
                written = writer.submit(finish, current, outcome)
                outcome = None  # let go when it is written
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
    """Each item and its reading, behind which that of the next is queued."""
    following = reader.submit(read, items[0])
    for number, item in enumerate(items, 1):
        reading = following
        if number < len(items):
            following = reader.submit(read, items[number])
        yield item, reading

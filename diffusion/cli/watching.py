"""What the terminal shows of training, and how it is stopped."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

from diffusion.run import GLANCE
from diffusion.settings import Settings
from diffusion.train import Record
from hopjax.cli.progress import Screen, Tell


@contextlib.contextmanager
def watching(screen: Screen, settings: Settings, words: str) -> Iterator[Callable[[int, Record | None], None]]:
    """A line of progress for a run, from where it goes on; gives what `diffusion.run` tells how far it is."""
    with contextlib.ExitStack() as stack:
        tell: Tell | None = None
        at = 0

        def watch(done: int, record: Record | None) -> None:
            nonlocal tell, at
            if tell is None:  # now that it is known where the run goes on
                at = max(0, done - GLANCE)
                counting = screen.counting(words, settings.length.steps, at, unit="images", each=settings.length.batch_size)
                tell = stack.enter_context(counting)
            tell(done - at, "" if record is None else f"loss {record.loss:.4f}")
            at = done

        yield watch


@contextlib.contextmanager
def interruption() -> Iterator[Callable[[], bool]]:
    """Whether the run was asked to end (Ctrl-C, SIGTERM): it then ends after the step that it is at. The second time, at once."""
    asked = False

    def ask(number: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""Files that are complete or absent, never half written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["between_markers", "replacing"]


def between_markers(page: str, start: str, text: str, end: str) -> str:
    """A page with what stands between two markers replaced.

    Raises:
        ValueError: the page has no such markers.

    Example:
        >>> between_markers("before <a>old</a> after", "<a>", "new", "</a>")
        'before <a>new</a> after'
    """
    head, found, rest = page.partition(start)
    _, closed, tail = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"page: expected the markers {start.strip()} and {end.strip()}, got a text without")
    return head + start + text + end + tail


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside `path`, with the same ending, which takes the name `path` when the block succeeds.

    Raises:
        OSError: the file cannot be written; it names `path`, not the temporary one.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with replacing(Path(folder) / "note.txt") as temporary:
        ...         _ = temporary.write_text("whole")
        ...     print(sorted(path.name for path in Path(folder).iterdir()))
        ['note.txt']
    """
    path = Path(path)
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if str(error.filename) != str(temporary):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with suppress(OSError):
            temporary.unlink()

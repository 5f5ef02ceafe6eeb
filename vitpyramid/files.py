"""Files that are there whole or not at all."""

import os
import uuid


def write_atomically(path: str | os.PathLike, content: str | bytes) -> None:
    """Replaces a file in one step, so that a reader never sees half of it; of several writers the last one wins.

    Args:
      path: in a folder that exists.
      content: text is written as UTF-8.

    Raises:
      OSError: it cannot be written; what was there before stays.
    """
    folder, name = os.path.split(os.fspath(path))
    # Not from `tempfile`, whose files only their owner may read. A process id is not enough: hosts share folders.
    temporary = os.path.join(folder, f".{name}.{uuid.uuid4().hex}")
    try:
        with open(temporary, "xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise

"""Files and folders that are whole, or are what they were before.

write(path, text)        the whole text under its name
replacing_file(path)     a draft for any writer, then put in the file's place
replacing(folder)        a draft to fill, then put in the folder's place
encoded(name)            any name as the name of a file, which lies in no other folder
sha256(path)             what later tells a damaged file from a good one
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote


def write(path: str | Path, text: str) -> None:
    """The whole text under that name (UTF-8, lines end in \\n), or what was there before."""
    with replacing_file(path) as draft:
        draft.write_text(text, encoding="utf-8", newline="\n")


@contextmanager
def replacing_file(path: str | Path) -> Iterator[Path]:
    """A draft beside `path` that takes its place when the block ends; if it fails, the old stays.

    Raises:
        OSError: with the path, where the draft could not be written.
    """
    path, draft = Path(path), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        os.close(handle)
        draft = Path(name)
        yield draft
        with open(draft, "rb") as file:
            os.fsync(file.fileno())
        draft.chmod(0o666 & ~umask())
        os.replace(draft, path)
    except OSError as error:
        if error.filename not in (None, *map(str, (draft, path.parent, path))):
            raise
        reason = f"cannot be written, what was there is as it was: {error.strerror}"
        raise OSError(error.errno, reason, str(path)) from None
    finally:
        if draft:
            draft.unlink(missing_ok=True)


@contextmanager
def replacing(folder: str | Path) -> Iterator[Path]:
    """The same for a folder. Killed between its two renames, it leaves the old one as
    `.<name>-…-old`."""
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    old = draft.with_name(f"{draft.name}-old")
    try:
        yield draft
        for path in draft.rglob("*"):
            if path.is_file():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        draft.chmod(0o777 & ~umask())  # mkdtemp's is for its owner only
        if folder.exists():
            folder.rename(old)
        try:
            draft.rename(folder)
        except BaseException:
            if old.exists():
                old.rename(folder)
            raise
        if old.is_symlink() or old.is_file():
            old.unlink()
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def encoded(name: str) -> str:
    """Any name, such as `BeIR/scifact` or `../x`, as one component of a path; it is one-to-one.

    ASCII letters, digits, `_`, `-`, `.` and `~` stay, the rest is percent-encoded (RFC 3986). A
    name that is too long for a file system, or means a folder (`.`, `..`), ends in a hash.
    """
    content = name.encode("utf-8", "surrogatepass")
    text = quote(content, safe="")
    if len(text) <= 180 and text.strip("."):
        return text
    return f"{text[:160].replace('.', '')}~{hashlib.sha256(content).hexdigest()[:16]}"


def umask() -> int:
    """The process's mask; it can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

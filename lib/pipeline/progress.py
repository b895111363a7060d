"""Progress on stderr, where executed notebooks do not keep it."""

import sys


def bar(total: int, desc: str, show: bool = True, initial: int = 0):
    """A progress bar over `total` steps, of which `initial` are done already."""
    from tqdm import tqdm

    options = dict(disable=not show, leave=False, mininterval=1)
    return tqdm(total=total, initial=initial, desc=desc, **options)


def say(line: str) -> None:
    """A line that stays, above the progress bars."""
    from tqdm import tqdm

    tqdm.write(line, file=sys.stderr)

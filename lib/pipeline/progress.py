"""Progress bars on stderr, where executed notebooks do not keep them."""


def bar(total: int, desc: str, show: bool = True):
    from tqdm import tqdm

    return tqdm(total=total, desc=desc, disable=not show, leave=False, mininterval=1)

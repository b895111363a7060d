"""Where a model of others is: inside an installed package, in a folder, or on the hub.

of(name, error)    a folder, or the hub's id
"""

from importlib.util import find_spec
from pathlib import Path

from lib.pipeline.errors import WorkbenchError, require


def of(name: str, error: type = WorkbenchError) -> Path | str:
    """The folder of `package:<name>`, whose code is not run; any other name as it is.

    Raises:
        error: the package is not installed, or holds no model, or several.
    """
    if not name.startswith("package:"):
        return name
    package = name.removeprefix("package:")
    spec = find_spec(package) if package.isidentifier() else None
    absent = f"package {package!r} is not installed: pip install {package.replace('_', '-')}"
    require(spec is not None and spec.origin, absent, error)
    folders = sorted(path.parent for path in Path(spec.origin).parent.rglob("modules.json"))
    models = f"package {package!r} holds {len(folders)} sentence-transformers models"
    require(len(folders) == 1, f"{models}, should hold one", error)
    return folders[0]

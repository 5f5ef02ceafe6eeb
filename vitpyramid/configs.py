"""The configs that come with the package, for one's own to start from: `from vitpyramid.configs import base, recipes`.

They are the folder `configs/` beside the package; a wheel has it inside. Nothing in the package imports one of them.
"""

from pathlib import Path

_PACKAGE = Path(__file__).parent
# With a path, this module is a package of what lies there.
__path__ = [str(next(folder for folder in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if folder.is_dir()))]

"""The API reference as HTML, of the docstrings: python .ci/api.py [DIRECTORY], by default build/api.

It needs `pip install '.[docs]'`. A public name that is not there is an error.
"""

import importlib
import os
import pkgutil
import sys
import warnings
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package that stands here

import pdoc

import tfgptj


def main() -> None:
    names = [found.name for found in pkgutil.walk_packages(tfgptj.__path__, "tfgptj.") if "__main__" not in found.name]
    for name in names:
        importlib.import_module(name)
    # pdoc shows what a module has, and the public names are there only after their first use.
    vars(tfgptj).update({name: getattr(tfgptj, name) for name in tfgptj.__all__})
    tfgptj.__all__ += [name.removeprefix("tfgptj.") for name in names if name.count(".") == 1]
    pdoc.render.configure(docformat="google")
    directory = Path(sys.argv[1] if len(sys.argv) > 1 else "build/api")
    warnings.filterwarnings("error", message="Found .* but it does not resolve")
    warnings.filterwarnings("ignore", message="Error parsing type annotation")  # imported for type checkers alone
    pdoc.pdoc("tfgptj", output_directory=directory)
    print(directory / "index.html")


if __name__ == "__main__":
    main()

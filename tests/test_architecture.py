"""The rules of the house, held by reading the source: nothing here imports the package."""

from __future__ import annotations

import ast
import configparser
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "tfgptj"

# Level 0 needs the standard library only. Level 1 has two families, each read from top to bottom; a module imports from
# those above it. From level 2 on there are packages. Everything imports from lower levels only.
LEVEL_0 = ("errors", "limits", "files", "foreign", "transformers_habits", "config")
MODEL = (
    *(
        "in_turn",
        "activations",
        "products",
        "rotary",
        "losses",
        "fused",
        "projection",
        "recompute",
        "lean_attention",
        "attention",
        "block",
        "inputs",
    ),
    *("compiled", "resizing", "adaptable", "workers", "base", "backbone", "replicas", "micro_batches", "head"),
    *("language_loss", "generative", "heads"),
)
TOKENIZER = ("vocabulary", "tokenizer_files", "batching", "tokenizer", "text_stream", "spans")
LEVEL_2 = ("checkpoints", "generation")  # in this order
PARAMETERS = "generation.config"  # needs nothing above level 0, and so may be imported wherever level 1 may
LEVEL_3 = ("training", "serving", "litert", "pipelines")  # none imports another
LEVEL_4 = ("benchmark", "cli")  # in this order; nobody imports cli
LEVELS = (LEVEL_0, (*MODEL, *TOKENIZER), LEVEL_2, LEVEL_3, LEVEL_4)

# Imports that go upwards, within a function: the public classes are the way to all that can be done with them.
DOORS = {
    ("config", "checkpoints.hub"): "GPTJConfig.from_pretrained",
    ("config", "checkpoints.directory"): "GPTJConfig.from_pretrained",
    ("config", "checkpoints.push"): "GPTJConfig.push_to_hub",
    ("adaptable", "training.adapters"): "save_adapter and load_adapter of every model",
    ("adaptable", "training.lora"): "add_lora and its relatives of every model",
    ("base", "training.lora"): "a model's Keras configuration tells of its adapters",
    ("base", "checkpoints.load"): "from_pretrained and load_pretrained of every model",
    ("base", "checkpoints.save"): "save_pretrained of every model",
    ("base", "checkpoints.push"): "push_to_hub of every model",
    ("generative", "generation.generate"): "TFGPTJForCausalLM.generate",
    ("generative", "generation.results"): "TFGPTJForCausalLM.compute_transition_scores",
    ("generative", "generation.scoring"): "TFGPTJForCausalLM.score",
    ("generative", "generation.streaming"): "TFGPTJForCausalLM.stream",
    ("pipelines.text_generation", "litert.model"): "a model that was converted for LiteRT generates text too",
    ("tokenizer", "checkpoints.hub"): "GPTJTokenizer.from_pretrained",
    ("tokenizer", "checkpoints.push"): "GPTJTokenizer.push_to_hub",
}

# Where a backend's own library may stand; everything else is written in `keras.ops`.
BACKENDS = {
    "activations": "TensorFlow's gradient of GELU is several times as many operators as it needs",
    "batching": "return_tensors='tf' gives TensorFlow tensors",
    "benchmark.machine": "asks TensorFlow which GPU there is, and for its memory",
    "checkpoints.load": "TensorFlow takes an array's memory as it is through DLPack, where keras.ops copies it twice",
    "cli": "--device chooses what TensorFlow sees",
    "fused": "TensorFlow's loops overlap their turns, of which each needs memory, unless they are told not to",
    "generation.compiling": "chooses between tf.function, jax.jit and torch.no_grad",
    "generation.run": "asks TensorFlow whether there is a GPU",
    "in_turn": "TensorFlow's loops have to be told to take turns",
    "lean_attention": "holds memory down on TensorFlow",
    "litert": "writes TensorFlow Lite",
    "micro_batches": "keras.ops has no gradients: TensorFlow's, JAX's and PyTorch's are taken",
    "replicas": "tf.distribute is TensorFlow's",
    "rotary": "TensorFlow's gradient of slices and sums takes four times as long as to turn back",
    "products": "TensorFlow multiplies with a transposed matrix only by its own operator",
    "serving": "writes SavedModels",
    "workers": "asks TensorFlow for its strategy",
    "training.data": "makes tf.data",
    "training.devices": "tf.distribute is TensorFlow's",
    "training.in_place": "TensorFlow's kernels that change weights where they are",
    "training.state": "saves the state of PyTorch's random numbers",
    "training.tfrecord": "reads TFRecord",
}
LIBRARIES = {"tensorflow", "jax", "jaxlib", "torch"}

# Packages that are imported under another name than they are installed.
IMPORTED_AS = {"grpcio": "grpc"}

# Modules that print; everything else returns text or raises.
PRINTS = {
    "cli": "a program",
    "benchmark": "a program",
    "generation.streaming": "TextStreamer shows text as it comes",
    "training.callbacks": "SampleText shows text while a model trains",
}

# Modules that import others by name, each by a table of its own.
DYNAMIC = {"": "public names are imported on first use", "pipelines": "one module per task"}

# Methods that are documented by Keras.
OF_KERAS = {
    *("on_train_begin", "on_epoch_begin", "on_epoch_end", "on_train_batch_begin", "on_train_batch_end"),
    *("build", "call", "get_config", "from_config", "fit", "evaluate", "predict", "compute_loss", "compute_metrics"),
    *("get_metrics_result", "train_on_batch", "test_on_batch", "predict_on_batch"),
    *("get_compile_config", "compile_from_config", "update_state", "reset_state", "result"),
}

FORBIDDEN = {
    "Lambda": "a layer of code that is saved with the model",
    "py_function": "a graph that calls Python",
    "numpy_function": "a graph that calls Python",
    "pure_callback": "a graph that calls Python",
    "eval": "code from data",
    "exec": "code from data",
    "__import__": "names from data",
    "enable_unsafe_deserialization": "code from data",
    "breakpoint": "left over",
}
FORBIDDEN_MODULES = {"pickle", "marshal", "shelve", "dill", "joblib", "imp"}  # they run code that files name
MUTATORS = {"add", "append", "clear", "extend", "insert", "pop", "popitem", "remove", "setdefault", "update"}

Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = Function | ast.ClassDef


def name_of(path: Path) -> str:
    """A module's name without the package's own: "" for tfgptj itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


PATHS = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
SOURCES = {name: path.read_text(encoding="utf-8") for name, path in PATHS.items()}
TREES = {name: ast.parse(source) for name, source in SOURCES.items()}
NODES = {name: list(ast.walk(tree)) for name, tree in TREES.items()}
FUNCTIONS = [(name, node) for name, nodes in NODES.items() for node in nodes if isinstance(node, Function)]
CLASSES = {node.name: node for nodes in NODES.values() for node in nodes if isinstance(node, ast.ClassDef)}
HOMES: dict[str, str] = next(  # of the public names
    ast.literal_eval(node.value)
    for node in TREES[""].body
    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_HOMES"
)


class Import(NamedTuple):
    """One name that a module imports; modules of the package go by their name without `tfgptj.`."""

    importer: str
    imported: str
    name: str
    line: int
    in_package: bool
    at_top: bool  # when its module is imported: neither in a function nor for type checkers alone

    def __str__(self) -> str:
        return f"{place(self.importer, self.line)} imports {self.imported or 'tfgptj'} {self.name}"


def place(module: str, line: int) -> str:
    return f"{PATHS[module].relative_to(ROOT)}:{line}"


def imports_of(module: str) -> Iterator[Import]:
    later = {id(node) for name, function in FUNCTIONS if name == module for node in ast.walk(function)}
    for node in NODES[module]:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            later |= {id(child) for child in ast.walk(node)}
    for node in NODES[module]:
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{place(module, node.lineno)}: a relative import"
            found = [(str(node.module), alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            found = [(alias.name, "") for alias in node.names]
        else:
            continue
        for home, name in found:
            in_package = home.split(".")[0] == "tfgptj"
            home = home.removeprefix("tfgptj").lstrip(".") if in_package else home
            below = f"{home}.{name}".lstrip(".")
            target = below if in_package and below in PATHS else home
            yield Import(module, target, name, node.lineno, in_package, id(node) not in later)


IMPORTS = [found for module in PATHS for found in imports_of(module)]
INNER = [found for found in IMPORTS if found.in_package]
OUTER = [found for found in IMPORTS if not found.in_package]
THIRD_PARTY = [found for found in OUTER if found.imported.split(".")[0] not in sys.stdlib_module_names]


def level(module: str) -> int:
    top = module.split(".")[0]
    for number, members in enumerate(LEVELS):
        if top in members:
            return number
    raise AssertionError(f"{module} has no place in the house: give it one at the top of {Path(__file__).name}")


def may_import(importer: str, imported: str) -> bool:
    mine, other = importer.split(".")[0], imported.split(".")[0]
    if mine == other or (imported == PARAMETERS and level(mine) >= 2):
        return True
    for family in (MODEL, TOKENIZER, LEVEL_2, LEVEL_4):
        if mine in family and other in family:
            return family.index(other) < family.index(mine)
    return level(other) < level(mine) or level(mine) == 0 == level(other)


def loaded_with(module: str) -> set[str]:
    """Top-level names of the other packages that are imported, directly or not, when this module is."""
    waiting, seen = [module], {""}
    while waiting:
        current = waiting.pop()
        seen.add(current)
        parents = [current.rpartition(".")[0]] if current else []
        needed = [found.imported for found in INNER if found.importer == current and found.at_top]
        waiting += [name for name in (*parents, *needed) if name not in seen]
    return {found.imported.split(".")[0] for found in THIRD_PARTY if found.importer in seen and found.at_top}


# Who imports whom


def test_every_module_has_a_place() -> None:
    assert all(level(name) >= 0 for name in PATHS if name)


def test_modules_import_from_lower_levels_only() -> None:
    wrong = [
        str(found)
        for found in INNER
        if found.importer and found.imported and not may_import(found.importer, found.imported)
        if found.at_top or (found.importer, found.imported) not in DOORS
    ]
    assert not wrong


def test_every_door_is_used() -> None:
    assert not set(DOORS) - {(found.importer, found.imported) for found in INNER if not found.at_top}


def test_public_names_are_imported_from_their_homes() -> None:
    assert not [str(found) for found in INNER if not found.imported and found.name != "__version__"]


def test_nobody_imports_private_names() -> None:
    assert not [str(found) for found in INNER if re.match("_[^_]", found.name)]


def test_nobody_imports_the_cli() -> None:
    assert not [str(found) for found in INNER if found.imported.split(".")[0] == "cli" != found.importer.split(".")[0]]


def test_the_lowest_level_needs_the_standard_library_only() -> None:
    assert not [str(found) for found in THIRD_PARTY if found.importer in LEVEL_0]


def test_importing_files_and_text_loads_no_backend() -> None:
    readers = {name for name in PATHS if name.startswith("checkpoints.")} - {"checkpoints.load", "checkpoints.save"}
    assert {"checkpoints.safetensors", "checkpoints.mapping"} <= readers
    for module in ("", "cli", "pipelines", "serving.client", *TOKENIZER, *readers):
        assert not (loaded_with(module) if module in PATHS else set()) & {"keras", *LIBRARIES}, module


def test_importing_the_package_loads_nothing_else() -> None:
    assert loaded_with("") == set()
    program = "import sys, tfgptj; print(*{'keras', 'tensorflow', 'numpy', 'tokenizers', 'h5py'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.split() == []


def test_backends_own_libraries_stand_only_where_they_must() -> None:
    users = {found.importer: str(found) for found in THIRD_PARTY if found.imported.split(".")[0] in LIBRARIES}
    assert not {name: text for name, text in users.items() if not {name, name.split(".")[0]} & set(BACKENDS)}
    out_of_date = [name for name in BACKENDS if name in PATHS and PATHS[name].stem != "__init__" and name not in users]
    assert not out_of_date


def test_all_that_is_imported_is_declared() -> None:
    metadata = configparser.ConfigParser()
    metadata.read(ROOT / "setup.cfg")
    extras = metadata["options.extras_require"]
    requirements = metadata["options"]["install_requires"] + extras["backends"] + extras["litert"]
    declared = {re.split(r"[<>=!~ \[]", line.strip())[0].replace("-", "_") for line in requirements.splitlines()}
    declared |= {IMPORTED_AS.get(name, name) for name in declared}
    assert not {found.imported.split(".")[0]: str(found) for found in THIRD_PARTY}.keys() - declared


# How modules are written


def test_files_are_short() -> None:
    lines = {name: source.count("\n") for name, source in SOURCES.items()}
    # What second thing does a longer one do?
    assert not {name: n for name, n in lines.items() if n > (250 if name in MODEL else 400)}


def test_functions_are_short() -> None:
    long = []
    for module, function in FUNCTIONS:
        body = function.body[1:] if ast.get_docstring(function) and len(function.body) > 1 else function.body
        length = (body[-1].end_lineno or 0) - body[0].lineno + 1  # without arguments and docstring
        if length > 40:
            long.append(f"{place(module, function.lineno)} {function.name}: {length} lines")
    assert not long


def is_documented(owner: ast.ClassDef, method: Function) -> bool:
    """Whether a method has a docstring, here or where it is inherited from, or is another name of one that has."""
    if ast.get_docstring(method) or method.name in OF_KERAS or method.name.startswith("_"):
        return True
    if any(isinstance(decorator, ast.Attribute) for decorator in method.decorator_list):  # a setter
        return True
    bases = [CLASSES[ast.unparse(base)] for base in owner.bases if ast.unparse(base) in CLASSES]
    inherited = [(base, node) for base in bases for node in base.body if isinstance(node, Function)]
    return any(node.name == method.name and is_documented(base, node) for base, node in inherited)


def test_everything_public_is_documented() -> None:
    missing = [str(PATHS[module]) for module, tree in TREES.items() if not ast.get_docstring(tree)]
    for module, tree in TREES.items():
        for node in tree.body:
            if not isinstance(node, (ast.ClassDef, Function)) or node.name.startswith("_"):
                continue
            if not ast.get_docstring(node):
                missing.append(f"{place(module, node.lineno)} {node.name}")
            for method in node.body if isinstance(node, ast.ClassDef) else []:
                if isinstance(method, Function) and not is_documented(node, method):  # type: ignore[arg-type]
                    missing.append(f"{place(module, method.lineno)} {method.name}")
    assert not missing


def documented() -> Iterator[tuple[str, ast.ClassDef | None, Definition | None, str]]:
    """Every docstring: its module, the class that it stands in, what it is of (None: the module), and its text."""
    for module, tree in TREES.items():
        owners = {id(child): node for node in NODES[module] if isinstance(node, ast.ClassDef) for child in node.body}
        for node in NODES[module]:
            if isinstance(node, Definition) and (text := ast.get_docstring(node)):
                yield module, node if isinstance(node, ast.ClassDef) else owners.get(id(node)), node, text
        yield module, None, None, ast.get_docstring(tree) or ""


def members_of(cls: ast.ClassDef) -> set[str]:
    """Methods and fields of a class, those of its bases in the package among them."""
    found = {node.name for node in cls.body if isinstance(node, Definition)}
    found |= {ast.unparse(node.target) for node in cls.body if isinstance(node, ast.AnnAssign)}
    bases = [CLASSES[name] for name in map(ast.unparse, cls.bases) if name in CLASSES]
    return found.union(*map(members_of, bases))


def names_in(module: str) -> set[str]:
    """What a module calls by name: what it defines at its top and what it imports anywhere."""
    defined = {node.name for node in TREES[module].body if isinstance(node, Definition)}
    return defined | set(constants_of(module)) | {found.name for found in IMPORTS if found.importer == module}


def leads_somewhere(target: str, module: str, owner: ast.ClassDef | None) -> bool:
    """Whether a reference names a module, or something in one, or in a class: in full, or from where it stands."""
    full = target.removeprefix("tfgptj.")
    if full != target:
        if full in PATHS:
            return True
        parts = full.split(".")
        homes = [".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1) if ".".join(parts[:n]) in PATHS]
        if not homes and parts[0] in HOMES:
            return leads_somewhere(f"tfgptj.{HOMES[parts[0]]}.{full}", module, owner)
        return bool(homes) and leads_somewhere(full.removeprefix(homes[0] + "."), homes[0], None)
    first, _, rest = target.partition(".")
    if rest:
        return first in CLASSES and rest in members_of(CLASSES[first])
    return first in names_in(module) or first in HOMES or (owner is not None and first in members_of(owner))


def test_references_in_docstrings_lead_somewhere() -> None:
    broken = []
    for module, owner, node, text in documented():
        for target in re.findall(r":(?:mod|class|func|meth|data|attr):`~?([^`]+)`", text):
            if not leads_somewhere(target, module, owner):
                broken.append(f"{place(module, getattr(node, 'lineno', 1))} {target}")
    assert not broken


def parameters_of(node: Definition) -> set[str] | None:
    """What a function takes, or what makes an object of a class; None where options are taken by any name."""
    if isinstance(node, Function):
        each = node.args
        named = [*each.posonlyargs, *each.args, *each.kwonlyargs, *filter(None, [each.vararg])]
        return None if each.kwarg else {argument.arg for argument in named}
    makers = [each for each in node.body if isinstance(each, Function) and each.name in ("__init__", "__call__")]
    bases = [CLASSES[name] for name in map(ast.unparse, node.bases) if name in CLASSES]
    found = [parameters_of(each) for each in (*makers, *bases)]
    return None if None in found else members_of(node).union(*filter(None, found))


def test_documented_arguments_are_there() -> None:
    wrong = []
    for module, _, node, text in documented():
        section = re.search(r"^Args:\n((?: +.*\n?|\n)*)", text, re.MULTILINE)
        taken = parameters_of(node) if node is not None else None
        if section is None or taken is None:
            continue
        lines = re.findall(r"^    (\*?\w+(?:, \*?\w+)*)(?: \(.*?\))?:", section[1], re.MULTILINE)
        told = {name.strip("* ") for line in lines for name in line.split(",")}
        wrong += [f"{place(module, node.lineno)} {name}" for name in sorted(told - taken)]  # type: ignore[union-attr]
    assert not wrong


def test_assertions_say_why_they_hold() -> None:
    # What a user gave is never asserted: that is an error with a message.
    silent = [
        place(module, node.lineno)
        for module, nodes in NODES.items()
        for node in nodes
        if isinstance(node, ast.Assert) and "  # " not in SOURCES[module].splitlines()[(node.end_lineno or 0) - 1]
    ]
    assert not silent


def test_no_handler_hides_a_failure() -> None:
    wrong = []
    for module, nodes in NODES.items():
        for node in (node for node in nodes if isinstance(node, ast.ExceptHandler)):
            catches_all = node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
            if node.type is None or (catches_all and not isinstance(node.body[-1], ast.Raise)):
                wrong.append(place(module, node.lineno))
    assert not wrong


def constants_of(module: str) -> dict[str, int]:
    """Names that a module assigns at its top, with their lines."""
    found = {}
    for node in TREES[module].body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            leaves = [leaf for target in targets for leaf in ast.walk(target)]
            found |= {leaf.id: node.lineno for leaf in leaves if isinstance(leaf, ast.Name)}
    return found


def test_names_at_the_top_of_a_module_are_constants() -> None:
    pattern = re.compile(r"_?[A-Z][A-Za-z0-9_]*|__\w+__")
    names = [(module, name, line) for module in PATHS for name, line in constants_of(module).items()]
    assert not [f"{place(module, line)} {name}" for module, name, line in names if not pattern.fullmatch(name)]


def test_constants_are_never_changed() -> None:
    wrong = []
    for module, function in FUNCTIONS:
        constants = constants_of(module)
        wrong += [f"{place(module, d.lineno)} cache" for d in function.decorator_list if "cache" in ast.unparse(d)]
        for node in ast.walk(function):
            changed = None
            if isinstance(node, ast.Subscript) and isinstance(node.ctx, (ast.Store, ast.Del)):
                changed = node.value
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MUTATORS:
                changed = node.func.value
            if isinstance(node, ast.Global) or (isinstance(changed, ast.Name) and changed.id in constants):
                wrong.append(place(module, node.lineno))
    assert not wrong


def test_forbidden_things_are_absent() -> None:
    wrong = [str(found) for found in OUTER if found.imported.split(".")[0] in FORBIDDEN_MODULES]
    for module, nodes in NODES.items():
        for node in nodes:
            name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
            allowed = {"print": PRINTS, "import_module": DYNAMIC}.get(name)
            if name in FORBIDDEN or (allowed is not None and not {module, module.split(".")[0]} & set(allowed)):
                wrong.append(f"{place(module, node.lineno)} {name}: {FORBIDDEN.get(name, 'only in ' + str(allowed))}")  # type: ignore[attr-defined]
    assert not wrong


# The house itself


@pytest.mark.skipif(not (ROOT / ".git").exists() or not shutil.which("git"), reason="needs the git checkout")
def test_the_top_level_holds_what_the_design_says() -> None:
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    visible = {line.split("/")[0] for line in tracked.splitlines() if not line.startswith(".")}
    assert visible <= {"setup.py", "setup.cfg", "README.md", "LICENSE", "notebooks", "tests", "tfgptj"}

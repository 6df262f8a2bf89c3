"""The laws of the house: who imports whom, what stays out of a training step, and that the documentation keeps up."""

import ast
import doctest
import importlib
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import ffr

ROOT = Path(__file__).parents[1]
SOURCES = {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / "ffr").glob("*.py"))}
PUBLIC_MODULES = sorted(name for name in SOURCES if not name.startswith("_"))
TESTS = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "tests").glob("test_*.py"))}

# Who may import what inside the package, `_check` apart, which is open to all. Whoever is not named may import nothing.
COMPOSERS = {"__init__", "framework", "objective"}
PARTS = {
    "crf": {"lattice"},
    "losses": {"lattice"},
    "refine": {"cam", "_refine_kernel"},
    "prototypes": {"cam"},
    "classifier": {"cam"},
    "encoder": {"cam"},
    "rectification": {"cam", "prototypes"},
    "frequency": {"_frequency_kernel"},
}
ALONE = {
    "_frequency_kernel": {"triton"},
    "_refine_kernel": {"triton"},
}  # what a file that is itself imported late may need at once
DESIGNED = {"__init__", "_check", "frequency", "prototypes", "rectification", "classifier", "cam", "refine", "lattice"}
DESIGNED |= {"crf", "losses", "heads", "encoder", "framework", "metrics", "draw"}
CORE = {"torch", "einops", "numpy", "scipy"}
HEAVY = {"timm", "torchvision", "PIL", "matplotlib", "accelerate", "pycocotools", "tyro", "rich", "safetensors"}
HEAVY |= {"triton", "sympy"}  # of torch's compiler, which takes as long as torch itself
OFF_THE_DEVICE = {"cam", "classifier", "encoder", "framework", "frequency", "heads", "losses", "objective"}
OFF_THE_DEVICE |= {"prototypes", "rectification", "refine", "_frequency_kernel", "_refine_kernel"}
WAITS = {"item", "tolist", "nonzero", "masked_select", "unique", "cpu", "numpy", "synchronize"}


def imports(source):
    """Yield (module, whether it is loaded together with its file) for every import; `from ffr import x` is ffr.x."""

    def visit(node, at_once):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, at_once) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                whole = "." * child.level + (child.module or "")
                if whole in ("ffr", "."):
                    yield from ((f"ffr.{alias.name}", at_once) for alias in child.names)
                else:
                    yield re.sub(r"^\.", "ffr.", whole), at_once
            else:
                typing_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
                function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
                yield from visit(child, at_once and not function and not typing_only)

    yield from visit(ast.parse(source), True)


def trespasses(module, source):
    """The imports of `source`, as the file ffr/<module>.py, that the direction law forbids."""
    if module in COMPOSERS:
        open_to = set(SOURCES) - {"__init__"} | ({"__version__"} if module != "__init__" else set())
    else:
        open_to = PARTS.get(module, set())
    found = []
    for name, at_once in imports(source):
        top, _, rest = name.partition(".")
        if top == "ffr":
            inner = rest.partition(".")[0]
            if inner != "_check" and inner not in open_to:
                found.append(name)
        elif module == "_check":
            found += [name] * (top not in {"torch", "einops"} | sys.stdlib_module_names)
        elif at_once:
            found += [name] * (top not in CORE | ALONE.get(module, set()) | sys.stdlib_module_names)
    for name, at_once in imports(source):  # such a file must not be loaded with the one that uses it
        found += [name] * (at_once and name.partition(".")[2] in ALONE)
    return found


@pytest.mark.parametrize("module", SOURCES)
def test_imports_point_one_way(module):
    assert trespasses(module, SOURCES[module]) == []


@pytest.mark.parametrize(
    ("module", "line", "forbidden"),
    [
        ("frequency", "from ffr import cam", "ffr.cam"),
        ("frequency", "from . import cam", "ffr.cam"),
        ("frequency", "import ffr.cam", "ffr.cam"),
        ("frequency", "from ffr.cam import normalize_cam", "ffr.cam"),
        ("frequency", "from .cam import normalize_cam", "ffr.cam"),
        ("frequency", "def f():\n    from ffr import cam", "ffr.cam"),
        ("cam", "from ffr.refine import refine_label", "ffr.refine"),
        ("cam", "from ffr.framework import FFR", "ffr.framework"),
        ("losses", "from ffr import FFR", "ffr.FFR"),
        ("encoder", "import timm", "timm"),
        ("frequency", "import triton", "triton"),
        ("frequency", "from ffr import _frequency_kernel", "ffr._frequency_kernel"),
        ("cam", "def f():\n    from ffr import _frequency_kernel", "ffr._frequency_kernel"),
        ("refine", "import triton", "triton"),
        ("draw", "try:\n    from PIL import Image\nexcept ImportError:\n    pass", "PIL"),
        ("_check", "import numpy as np", "numpy"),
        ("_check", "def f():\n    import numpy as np", "numpy"),
    ],
)
def test_an_import_against_the_direction_is_seen(module, line, forbidden):
    assert trespasses(module, f"import math\nimport torch\nfrom ffr import _check\n{line}\n") == [forbidden]


def test_what_the_direction_allows_is_let_through():
    assert trespasses("refine", "from ffr import _check\nfrom ffr.cam import normalize_cam\nimport numpy") == []
    assert trespasses("encoder", "def f():\n    import timm\n    from safetensors.torch import load_file") == []
    assert trespasses("frequency", "def f():\n    from ffr import _frequency_kernel") == []
    assert trespasses("_frequency_kernel", "import triton") == []
    assert trespasses("encoder", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import timm") == []


def loaded_by(code):
    """The top-level modules that a fresh interpreter holds after `code`."""
    dump = "import json, sys; print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    run = subprocess.run([sys.executable, "-c", f"{code}\n{dump}"], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    return set(json.loads(run.stdout))  # anything printed at import would break this line, too


def test_importing_ffr_stays_light_and_silent():
    assert loaded_by("import ffr") & HEAVY <= loaded_by("import torch")


def test_the_test_of_the_light_import_can_fail():
    assert loaded_by("import ffr, PIL, torch._dynamo") & HEAVY >= {"PIL", "sympy"}


def slow_calls(module, source):
    """The calls in `source` which a library module must not make, `extra_repr` apart: (line, call)."""
    found = []
    tree = ast.parse(source)
    shown = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "extra_repr"]
    spared = {id(node) for function in shown for node in ast.walk(function)}
    for node in ast.walk(tree):
        if id(node) in spared:
            continue
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            method = isinstance(node.func, ast.Attribute)
            waits = method and module in OFF_THE_DEVICE and name in WAITS
            if waits or (method and name == "cuda") or (not method and name in ("print", "breakpoint")):
                found.append((node.lineno, ast.unparse(node.func)))
        elif isinstance(node, ast.Assert):
            found.append((node.lineno, "assert"))
    return found


@pytest.mark.parametrize("module", SOURCES)
def test_nothing_in_the_library_prints_asserts_names_a_device_or_waits_for_one(module):
    assert slow_calls(module, SOURCES[module]) == []


@pytest.mark.parametrize(
    "line",
    ["x.cuda()", "print(x)", "x.sum().item()", "x.tolist()", "x.nonzero()", "torch.unique(x)", "x.cpu()", "assert x"],
)
def test_a_call_that_waits_is_seen(line):
    assert len(slow_calls("losses", f"def f(x):\n    {line}")) == 1
    assert slow_calls("losses", "def f(x):\n    return x.sum()") == []


def test_every_file_is_designed_and_short_or_has_its_reason_in_the_changelog():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    special = {name for name, text in SOURCES.items() if text.count("\n") > 300} | set(SOURCES) - DESIGNED
    reasons = {name for name in special if re.search(rf"`{name}\.py`[^\n]+because", changelog)}
    assert special == reasons


def defaults(source):
    """Yield (argument, default) for every function of a file; None is no setting."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            named = zip(node.args.args[::-1], node.args.defaults[::-1], strict=False)
            for argument, value in (*named, *zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)):
                if value is not None and ast.unparse(value) != "None":
                    yield argument.arg, ast.unparse(value)


def test_a_setting_has_one_default_in_functions_modules_and_the_objective():
    found = {}
    for module in PUBLIC_MODULES:
        for argument, value in defaults(SOURCES[module]):
            found.setdefault(argument, set()).add(value)
    several = {argument for argument, values in found.items() if len(values) > 1}
    assert several == {"dilation", "num_labels"}  # of convolutions, of a band; of scores, of colours


def test_there_is_no_room_for_odds_and_ends():
    names = {path.stem for folder in ("ffr", "examples", "tests") for path in (ROOT / folder).rglob("*.py")}
    assert not names & {"utils", "util", "helpers", "misc", "common"}


def distributions(extra):
    """What pyproject.toml lists for the core, or for an extra, as import names."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    key = "dependencies" if extra is None else extra
    listed = re.search(rf"^{key} = \[(.*?)\]\n", text, re.MULTILINE | re.DOTALL)
    assert listed is not None, key
    names = re.findall(r'"([a-z0-9-]+)(?:\[[a-z]+\])?[">=]', listed[1])
    return {{"pillow": "PIL", "pytest-cov": "pytest_cov"}.get(name, name) for name in names}


def test_the_extras_cover_what_the_examples_and_the_tests_import():
    """Imports inside a function may be optional; those at the head of a file may not."""
    files = {folder: list((ROOT / folder).rglob("*.py")) for folder in ("examples", "tests")}
    ours = {"ffr", "recipe"} | {path.stem for paths in files.values() for path in paths}
    ours |= {path.stem for path in (ROOT / "benchmarks").glob("*.py")}  # on the path of the tests
    installed = distributions(None) | distributions("examples")
    for folder, known in {"examples": installed, "tests": installed | distributions("test")}.items():
        assert files[folder]
        for path in files[folder]:
            heads = {name.partition(".")[0] for name, at_once in imports(path.read_text(encoding="utf-8")) if at_once}
            assert heads - known - ours - sys.stdlib_module_names == set(), path.name


WITHOUT = """
import runpy, sys
sys.modules[sys.argv[1]] = None
sys.path.insert(0, "examples")
for script in sys.argv[2:]:
    try:
        runpy.run_path(f"examples/{script}.py", run_name="__main__")
    except SystemExit as error:
        print(error.code)
"""


@pytest.mark.parametrize("missing", ["timm", "torchvision", "rich"])
def test_a_script_without_a_library_says_what_to_install(missing):
    scripts = ["quickstart", "train", "evaluate", "predict", "visualize"]
    run = [sys.executable, "-c", WITHOUT, missing, *scripts]
    said = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert said.returncode == 0 and "Traceback" not in said.stderr, said.stderr
    for line, script in zip(said.stdout.splitlines(), scripts, strict=True):
        assert re.fullmatch(rf"{script} needs {missing}[\w.]*: run pip install -e '\.\[examples\]' in .*", line)


def test_the_versions_agree():
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^version: (.+)$", text, re.MULTILINE)[1] == ffr.__version__


# The documentation ------------------------------------------------------------------------------------------------


def examples_of(value):
    """The doctest examples in the docstring of `value` itself."""
    return doctest.DocTestParser().get_examples(inspect.getdoc(value) or "")


def test_every_public_module_has_its_page():
    pages = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "api").glob("*.md")}
    contents = pages.pop("index")
    assert sorted(pages) == [name for name in PUBLIC_MODULES]
    for name, text in pages.items():
        assert f"automodule:: ffr.{name}\n" in text
        assert re.search(rf"^{name}$", contents, re.MULTILINE), f"{name} is missing in the table of contents"


def test_every_public_name_is_in_the_list_of_the_api():
    contents = (ROOT / "docs" / "api" / "index.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"\{py:\w+\}`~?ffr\.([\w.]+)`", contents))
    short = {name.rpartition(".")[2] for name in listed}
    assert set(ffr.__all__) - {"__version__"} <= short
    for name in listed:
        assert resolve(f"ffr.{name}") is not None


@pytest.mark.parametrize("name", [name for name in ffr.__all__ if name != "__version__"])
def test_every_public_name_says_what_it_is(name):
    assert (inspect.getdoc(getattr(ffr, name)) or "").strip()


@pytest.mark.parametrize("name", [n for n in ffr.__all__ if inspect.isfunction(getattr(ffr, n))])
def test_every_public_function_has_an_example(name):
    assert examples_of(getattr(ffr, name)), f"ffr.{name} has no Example"


@pytest.mark.parametrize("name", [name for name in PUBLIC_MODULES])
def test_the_examples_of_every_module_run(name):
    module = importlib.import_module(f"ffr.{name}")
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


WIDTH = 90  # letters of code that fit a page of the documentation


def code_on(page):
    """The lines of code of a page."""
    fenced = re.findall(r"^( *)```\w*\n(.*?)^ *```$", page, re.MULTILINE | re.DOTALL)
    return [line.removeprefix(indent) for indent, block in fenced for line in block.splitlines()]


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=lambda page: page.stem)
def test_the_code_of_a_page_is_not_cut_off(page):
    assert [line for line in code_on(page.read_text(encoding="utf-8")) if len(line) > WIDTH] == []


@pytest.mark.parametrize("name", [name for name in PUBLIC_MODULES])
def test_the_code_of_an_example_is_not_cut_off(name):
    lines = [line.strip() for line in SOURCES[name].splitlines()]
    code = [line for line in lines if line.startswith((">>> ", "... "))]
    assert code
    assert [line for line in code if len(line) > WIDTH] == []


def test_a_long_line_of_code_is_seen():
    assert code_on(f"a\n  ```python\n  >>> {'x' * 100}\n  ```\n{'y' * 100}\n") == [f">>> {'x' * 100}"]


def resolve(path):
    """The object with a dotted name, by import and then by attribute; None if there is none."""
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            value = getattr(value, part, None)
        return value
    return None


def faults(code, test):
    """What is wrong with the last two cells of a row of `paper_to_code`."""
    if code == test == "not built yet":
        return []
    found = []
    named = re.findall(r"`((?:ffr|recipe)\.[\w.]+)(?:\(([^`]*)\))?`", code)
    for path, arguments in named:
        value = resolve(path)
        if value is None or isinstance(value, ModuleType):
            found.append(f"{path} is no class or function")
            continue
        for keyword in ast.parse(f"call({arguments})", mode="eval").body.keywords:  # a default stated is the code's
            parameter = inspect.signature(value).parameters.get(keyword.arg)
            if parameter is None or parameter.default != ast.literal_eval(keyword.value):
                found.append(f"{path} has no {keyword.arg}={ast.unparse(keyword.value)}")
    tests = re.findall(r"`(test_\w+\.py)::(test_\w+)`", test)
    for file, function in tests:
        if not re.search(rf"^def {function}\(", TESTS.get(file, ""), re.MULTILINE):
            found.append(f"{file} has no {function}")
    if not named:
        found.append("no code is named")
    if not tests:
        found.append("no test is named")
    return found


def rows(text):
    """The body rows of every table that ends in `code` and `test`, as cells; a pipe inside a cell is written \\|."""
    found = []
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        head, _, *body = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table.splitlines()]
        if head[-2:] == ["code", "test"]:
            assert all(len(row) == len(head) for row in body), f"a row of the table of {head[0]} has cells to spare"
            found += body
    return found


PAPER_TO_CODE = rows((ROOT / "docs" / "why" / "paper_to_code.md").read_text(encoding="utf-8"))


def test_the_paper_page_carries_its_three_tables():
    assert len(PAPER_TO_CODE) > 40
    for part in ("encoder", "prototypes", "inference", "a significant gap", "ignore index 255", "dense CRF"):
        assert sum(row[0].startswith(part) for row in PAPER_TO_CODE) >= 1, part


@pytest.mark.parametrize("row", PAPER_TO_CODE, ids=[re.sub(r"\W+", "_", row[0])[:40] for row in PAPER_TO_CODE])
def test_every_row_of_the_paper_leads_to_code_and_to_a_test(row):
    assert faults(*row[-2:]) == []


@pytest.mark.parametrize(
    ("code", "test", "fault"),
    [
        ("`ffr.frequency.no_such_name`", "`test_house.py::test_the_versions_agree`", "is no class or function"),
        ("`ffr.cam`", "`test_house.py::test_the_versions_agree`", "is no class or function"),
        ("`ffr.frequency.split_bands(nu=1)`", "`test_house.py::test_the_versions_agree`", "has no nu=1"),
        ("`ffr.FrequencyMask(mu=0.3)`", "`test_house.py::test_the_versions_agree`", "has no mu=0.3"),
        ("`ffr.frequency.split_bands`", "`test_house.py::test_that_is_not_there`", "has no test_that_is_not_there"),
        ("`ffr.frequency.split_bands`", "not built yet", "no test is named"),
        ("not built yet", "`test_house.py::test_the_versions_agree`", "no code is named"),
    ],
)
def test_a_row_that_leads_nowhere_is_seen(code, test, fault):
    assert [text.endswith(fault) for text in faults(code, test)] == [True]

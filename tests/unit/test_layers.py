"""Rules for imports. The tables are the rule; the checks read the source and run nothing."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]

# Low to high. A module imports only from lower rows; neighbours in a row leave each other alone.
# A name is a module or package directly below pmp_ds, with everything inside it.
ROWS = (
    ("streams",),
    ("account", "errors", "heap", "startup", "verbosity", "version"),
    ("foreign", "fields", "shipped", "tensor_file"),
    ("config", "run_dir", "progress", "launchers", "signals", "formats", "settings", "strict_yaml"),
    ("lease_file",),
    ("meeting", "lease", "on_fault", "restarts", "launch"),
    ("dist",),
    ("lifeline",),
    ("ranks",),
    ("model",),
    ("data", "glue", "ticket", "log", "results", "cli"),
    ("optim", "prepare"),
    ("engine",),
    ("state", "watch"),
    ("discover", "derivative"),
    ("train",),
    ("finetune", "evaluate", "release", "plots"),
    ("summary", "study", "audit", "operate"),
    ("commands",),
    ("launcher",),
)
FREE_FOR_ALL = {"errors", "progress", "__version__"}  # any row may import these
BEFORE_ALL = "account"  # pmp_ds/__init__.py runs before everything else and imports this alone

MAY_IMPORT_DEEPSPEED = {
    "pmp_ds.dist",
    "pmp_ds.optim.zero.stage12",
    "pmp_ds.optim.zero.stage3",
    "pmp_ds.optim.zero.stages",
    "pmp_ds.engine.engine",
    "pmp_ds.engine.objective",
    "pmp_ds.engine.placement",
    "pmp_ds.engine.portable",
    "pmp_ds.engine.deepspeed_keys",
}

# What cannot see the mask cannot leak it: not even through another module.
KNOWS_THE_MASK = {"ticket", "optim", "engine", "state", "watch", "discover", "derivative", "train"}
NEVER_REACHES = {
    f"pmp_ds.release.{module}": KNOWS_THE_MASK for module in ("export", "allow_list", "ledger")
}

WITHOUT_TORCH = (
    "pmp_ds.errors",
    "pmp_ds.version",
    "pmp_ds.config",
    "pmp_ds.run_dir",
    "pmp_ds.signals",
    "pmp_ds.lease",
    "pmp_ds.ranks",
    "pmp_ds.launch",
    "pmp_ds.formats",
    "pmp_ds.commands",
    "pmp_ds.commands.pretrain",
    "pmp_ds.commands.finetune",
    "pmp_ds.commands.status",
    "pmp_ds.operate.restore",
    "pmp_ds.prepare.config",
    "pmp_ds.prepare.corpus",
    "pmp_ds.prepare.packing",
    "pmp_ds.data.arrow_store",
    "pmp_ds.data.manifest",
    "pmp_ds.glue.read",
    "pmp_ds.glue.metrics",
)

ROW_OF = {unit: index for index, row in enumerate(ROWS) for unit in row}


def source_modules(root: Path) -> dict[str, Path]:
    """Dotted name to file, for every module of pmp_ds and launcher."""
    files = sorted(file for top in ("pmp_ds", "launcher") for file in (root / top).rglob("*.py"))
    names = {}
    for file in files:
        parts = file.relative_to(root).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return names


def imports(name: str, file: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything imported anywhere in ``file``, ``a.b`` for
    ``from a import b``: inside functions, under TYPE_CHECKING and by importlib as well."""
    package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"), str(file))):
        match node:
            case ast.Import(names=names):
                for alias in names:
                    yield node.lineno, alias.name
            case ast.ImportFrom(module=module, names=names, level=level):
                base = package[: len(package) - level + 1] if level else []
                prefix = ".".join([*base, *([module] if module else [])])
                for alias in names:
                    yield node.lineno, f"{prefix}.{alias.name}"
            case ast.Call(
                func=ast.Attribute(attr="import_module")
                | ast.Name(id="import_module" | "__import__"),
                args=[ast.Constant(value=str(target)), *_],
            ):
                yield node.lineno, target


def unit_of(dotted: str) -> str | None:
    """The name in ROWS that ``dotted`` belongs to; None for other projects and pmp_ds itself."""
    parts = dotted.split(".")
    if parts[0] == "launcher":
        return "launcher"
    return parts[1] if parts[0] == "pmp_ds" and len(parts) > 1 else None


def layer_violations(root: Path) -> list[str]:
    found = []
    for name, file in source_modules(root).items():
        where, unit = file.relative_to(root), unit_of(name)
        if unit is not None and unit not in ROW_OF:
            found.append(f"{where}: {unit!r} is in no row: add it in tests/unit/test_layers.py")
            continue
        row = ROW_OF[unit] if unit else -1
        for line, target in imports(name, file):
            other = unit_of(target)
            if other in (None, unit) or (other in FREE_FOR_ALL if unit else other == BEFORE_ALL):
                continue
            if other not in ROW_OF:
                found.append(f"{where}:{line}: {target} is in no row")
            elif ROW_OF[other] >= row:
                kind = "a neighbour" if ROW_OF[other] == row else "in a higher layer"
                found.append(f"{where}:{line}: {target} is {kind}")
    return found


def deepspeed_violations(root: Path) -> list[str]:
    return [
        f"{file.relative_to(root)}:{line} imports {target}: only {sorted(MAY_IMPORT_DEEPSPEED)} may"
        for name, file in source_modules(root).items()
        if name not in MAY_IMPORT_DEEPSPEED
        for line, target in imports(name, file)
        if target.split(".")[0] == "deepspeed"
    ]


def reach_violations(root: Path) -> list[str]:
    """Forbidden modules that a module of NEVER_REACHES imports, with the chain of imports."""
    modules = source_modules(root)

    def loads(name: str) -> set[str]:
        """Modules of ours that importing ``name`` runs, the packages above each included."""
        loaded = set()
        for target in [name, *(target for _, target in imports(name, modules[name]))]:
            parts = target.split(".")
            loaded |= {".".join(parts[:end]) for end in range(1, len(parts) + 1)}
        return loaded & modules.keys()

    found = []
    for start, forbidden in NEVER_REACHES.items():
        chains = {start: [start]} if start in modules else {}
        pending = list(chains)
        while pending:
            name = pending.pop()
            for target in sorted(loads(name) - chains.keys()):
                chains[target] = [*chains[name], target]
                if unit_of(target) in forbidden:
                    found.append(f"{start} must not reach {target}: {' -> '.join(chains[target])}")
                else:
                    pending.append(target)
    return found


def test_layers() -> None:
    assert layer_violations(REPO) == []


def test_only_named_modules_import_deepspeed() -> None:
    assert deepspeed_violations(REPO) == []


def test_export_reaches_nothing_that_knows_the_mask() -> None:
    assert reach_violations(REPO) == []


def test_every_folder_of_the_package_has_an_init() -> None:
    """An editable install finds a folder without one; an installed wheel would lack it."""
    folders = {file.parent for file in (REPO / "pmp_ds").rglob("*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


@pytest.mark.parametrize("module", WITHOUT_TORCH)
@pytest.mark.processes
def test_imports_without_torch(module: str) -> None:
    program = f"import sys, {module}\nsys.exit('torch' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=REPO, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr or f"import {module} brings torch with it"


# The checks themselves, on a small tree with one violation of each kind.

FAKE = {
    "pmp_ds/__init__.py": "import pmp_ds.account, pmp_ds.errors\n",
    "pmp_ds/account.py": "",
    "pmp_ds/errors.py": "from pmp_ds import __version__\n",
    "pmp_ds/config.py": "from pmp_ds import run_dir, errors\n",
    "pmp_ds/run_dir.py": "from pmp_ds.progress import bar\n",
    "pmp_ds/progress.py": "def bar():\n    import pmp_ds.train.loop as loop\n",
    "pmp_ds/stray.py": "",
    "pmp_ds/data/__init__.py": "",
    "pmp_ds/data/corpus.py": "import importlib\nimportlib.import_module('pmp_ds.ticket')\n",
    "pmp_ds/data/packing.py": "from . import corpus\nfrom ..optim import kernels\n",
    "pmp_ds/model/__init__.py": "",
    "pmp_ds/model/build.py": (
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from pmp_ds.ticket import mask\n"
    ),
    "pmp_ds/ticket/__init__.py": "",
    "pmp_ds/ticket/mask.py": "import torch, deepspeed.ops\n",
    "pmp_ds/train/__init__.py": "",
    "pmp_ds/train/loop.py": "from launcher.pretrain import main\n",
    "pmp_ds/engine/__init__.py": "",
    "pmp_ds/engine/engine.py": "def f():\n    from deepspeed import initialize\n",
    "pmp_ds/train/step.py": "def f():\n    from deepspeed import initialize\n",
    "pmp_ds/release/__init__.py": "",
    "pmp_ds/release/export.py": "from pmp_ds.model.build import build\n",
    "launcher/pretrain.py": "import pmp_ds.engine.engine\nfrom pmp_ds import release, nothing\n",
}


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    for name, text in FAKE.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return tmp_path


def test_checker_finds_each_layer_violation(fake: Path) -> None:
    assert sorted(layer_violations(fake)) == [
        "launcher/pretrain.py:2: pmp_ds.nothing is in no row",
        "pmp_ds/__init__.py:1: pmp_ds.errors is in a higher layer",
        "pmp_ds/config.py:1: pmp_ds.run_dir is a neighbour",
        "pmp_ds/data/corpus.py:2: pmp_ds.ticket is a neighbour",
        "pmp_ds/data/packing.py:2: pmp_ds.optim.kernels is in a higher layer",
        "pmp_ds/model/build.py:3: pmp_ds.ticket.mask is in a higher layer",
        "pmp_ds/progress.py:2: pmp_ds.train.loop is in a higher layer",
        "pmp_ds/stray.py: 'stray' is in no row: add it in tests/unit/test_layers.py",
        "pmp_ds/train/loop.py:1: launcher.pretrain.main is in a higher layer",
    ]


def test_checker_finds_deepspeed(fake: Path) -> None:
    assert [violation.split(" ")[0] for violation in deepspeed_violations(fake)] == [
        "pmp_ds/ticket/mask.py:1",
        "pmp_ds/train/step.py:2",
    ]


def test_checker_finds_an_indirect_way_to_the_mask(fake: Path) -> None:
    chain = "pmp_ds.release.export -> pmp_ds.model.build -> pmp_ds.ticket"
    assert [violation.split(": ")[1] for violation in reach_violations(fake)] == [
        chain,
        f"{chain}.mask",
    ]

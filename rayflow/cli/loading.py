"""FILE.py[:flow] -> the `Flow` in it, without running its ``__main__`` block."""

from __future__ import annotations

import importlib.util
import re
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import cloudpickle

from rayflow.errors import PlanError, RayflowError
from rayflow.flow import Flow

_TARGET = re.compile(r"(?P<file>.+):(?P<name>[A-Za-z_]\w*)")


@dataclass(frozen=True, slots=True)
class Target:
    """What the user named: a file and, when it holds several flows, which one."""

    path: Path
    flow: str | None


class TargetType(click.ParamType[Any]):
    """``FILE.py`` or ``FILE.py:flow``; a file of exactly that name comes first, colons and all."""

    name = "FILE.py[:flow]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Target:
        if isinstance(value, Target):
            return value
        if Path(value).is_file():
            return Target(Path(value), None)
        match = _TARGET.fullmatch(value)
        path = Path(match["file"]) if match else Path(value)
        if not path.is_file():
            kind = "is a folder" if path.is_dir() else "does not exist"
            self.fail(f"{path} {kind}; name a Python file that builds a rayflow.Flow", param, ctx)
        return Target(path, match["name"] if match else None)


def load_flow(target: Target) -> Flow:
    """The flow named by ``target``, or the only one of the module.

    Raises `PlanError` when the file cannot be run, `click.UsageError` when it has no such flow, none, or several.
    """
    module = load_module(target.path)
    flows = {name: value for name, value in vars(module).items() if isinstance(value, Flow)}
    if target.flow is not None:
        if target.flow in flows:
            return flows[target.flow]
        raise click.UsageError(f"{target.path} has no flow {target.flow!r}; {_listed(flows)}")
    distinct = {id(flow): flow for flow in flows.values()}
    if len(distinct) == 1:
        return next(iter(distinct.values()))
    if flows:
        raise click.UsageError(f"{target.path} has {len(distinct)} flows; name one: {_choices(target.path, flows)}")
    raise click.UsageError(
        f'{target.path} has no flow at its top level; add one there: flow = rf.Flow("name", stream.write_parquet(path))'
    )


def _listed(flows: dict[str, Flow]) -> str:
    return f"it has {', '.join(flows)}" if flows else "it has none at its top level"


def _choices(path: Path, flows: dict[str, Flow]) -> str:
    return " or ".join(f"{path}:{name}" for name in flows)


def load_module(path: Path) -> ModuleType:
    """Run the file under a name of its own, as ``python FILE.py`` would but for ``__main__``.

    Its functions and classes, and those of modules beside it, are pickled by value from then on, because workers
    cannot import them.
    """
    name = f"rayflow_file_{path.stem}"
    folder = path.resolve().parent
    spec = importlib.util.spec_from_file_location(name, path) if path.suffix == ".py" else None
    if spec is None or spec.loader is None:
        raise click.UsageError(f"{path} is not a Python file; its name must end with .py")
    before = set(sys.modules)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(folder))
    try:
        spec.loader.exec_module(module)
    except RayflowError:
        del sys.modules[name]
        raise
    except Exception as error:
        del sys.modules[name]
        raise PlanError(f"{path} cannot be loaded: {_told(error, path)}") from error
    except SystemExit as error:
        del sys.modules[name]
        raise PlanError(
            f"{path} cannot be loaded: it exits with {error.code!r} at its top level; "
            'put what runs below if __name__ == "__main__":'
        ) from error
    cloudpickle.register_pickle_by_value(module)
    for other in set(sys.modules) - before - {name}:
        if _beside(sys.modules[other], folder):
            cloudpickle.register_pickle_by_value(sys.modules[other])
    return module


def _beside(module: ModuleType | None, folder: Path) -> bool:
    file = getattr(module, "__file__", None)
    if file is None or module is None or module.__name__.partition(".")[0] == "rayflow":
        return False
    path = Path(file).resolve()
    return path.is_relative_to(folder) and "site-packages" not in path.parts


def _told(error: Exception, path: Path) -> str:
    if isinstance(error, SyntaxError):
        return f"line {error.lineno}: {error.msg}"
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == path]
    where = f"line {lines[-1]}: " if lines else ""
    return f"{where}{type(error).__name__}: {error}"

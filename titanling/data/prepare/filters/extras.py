"""Libraries that only some filters need."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

from titanling.errors import UserError


def import_extra(name: str, extra: str, wanted_by: str) -> ModuleType:
    """The module `name`. Raises `UserError` with the command that installs it."""
    try:
        return import_module(name)
    except ImportError:
        raise UserError(f"{wanted_by} needs {extra}; install it: pip install 'titanling[{extra}]'") from None


def extra_version(*packages: str) -> str:
    """The version of the first of these packages that is installed, for the fingerprint of what it decided."""
    for package in packages:
        try:
            return f"{package} {version(package)}"
        except PackageNotFoundError:  # its module may come with another one
            continue
    return f"{packages[0]} of an unknown version"

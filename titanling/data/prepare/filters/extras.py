"""Libraries that only some filters need."""

from importlib import import_module
from importlib.metadata import version
from types import ModuleType

from titanling.errors import UserError


def import_extra(name: str, extra: str, wanted_by: str) -> ModuleType:
    """The module `name`. Raises `UserError` with the command that installs it."""
    try:
        return import_module(name)
    except ImportError:
        raise UserError(f"{wanted_by} needs {extra}; install it: pip install 'titanling[{extra}]'") from None


def extra_version(package: str) -> str:
    """The installed version of a package, for the fingerprint of what it decided."""
    return f"{package} {version(package)}"

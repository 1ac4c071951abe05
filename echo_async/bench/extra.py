"""What the extra ``bench`` brings: looked for before anything is measured, imported where it is used."""

from __future__ import annotations

from importlib import import_module

from ..errors import StartError

__all__ = ["require_modules"]


def require_modules(*modules: str) -> None:
    """:exc:`~echo_async.StartError` if one of ``modules`` is not installed."""
    for name in modules:
        try:
            import_module(name)
        except ImportError as error:
            raise StartError(f"{name} is needed for this: pip install 'echo-async[bench]' ({error})") from error

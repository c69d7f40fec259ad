"""The version of this installation."""

from __future__ import annotations

from importlib import metadata


def _version() -> str:
    try:
        return metadata.version("phalanx-ha")
    except metadata.PackageNotFoundError:
        return "0+unknown"  # run from a source tree without an installation


VERSION = _version()

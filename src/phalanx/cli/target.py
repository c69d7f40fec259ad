"""What a command is about: a file, ``module:name``, or options and environment; and how NATS is reached."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import os
import re
import sys
import traceback
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import msgspec
from cyclopts import Parameter

from phalanx.config import EmbeddedNats, NatsOptions, PlatformConfig, build_platform, load_toml
from phalanx.errors import ConfigError
from phalanx.platform import Platform

DEFAULT_FILE = "phalanx.toml"

_MODULE = re.compile(r"(?P<module>[^\W\d]\w*(\.[^\W\d]\w*)*):(?P<name>[^\W\d]\w*)")


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Overrides:
    """What replaces the declaration's values on this node."""

    node: Annotated[str | None, Parameter(help="This node's id, instead of PHALANX_NODE.")] = None
    data_dir: Annotated[
        str | None, Parameter(help="Where this node keeps its files, instead of PHALANX_DATA.")
    ] = None
    nats: Annotated[
        str | None, Parameter(help="NATS URLs, comma separated, or 'embedded'; instead of PHALANX_NATS.")
    ] = None
    http: Annotated[str | None, Parameter(help="host:port, a port, or 'off'; instead of PHALANX_HTTP.")] = (
        None
    )

    @contextlib.contextmanager
    def applied(self) -> Generator[None]:
        """Within it the environment says what the options say, and errors name the option."""
        given = {
            variable: (option, value)
            for variable, option, value in (
                ("PHALANX_NODE", "--node", self.node),
                ("PHALANX_DATA", "--data-dir", self.data_dir),
                ("PHALANX_NATS", "--nats", self.nats),
                ("PHALANX_HTTP", "--http", self.http),
            )
            if value is not None
        }
        for option, value in given.values():
            if not value:
                raise ConfigError(option, value, "empty", "give a value, or leave the option out")
        os.environ.update({variable: value for variable, (_, value) in given.items()})
        try:
            yield
        except ConfigError as error:
            if error.key in given:
                raise ConfigError(given[error.key][0], error.value, error.problem, error.remedy) from None
            raise


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Where:
    """Which platform, and how NATS is reached."""

    config: Annotated[
        str | None,
        Parameter(help="A phalanx.toml or module:name; else ./phalanx.toml if there is one."),
    ] = None
    platform: Annotated[str | None, Parameter(help="The platform's name, or PHALANX_PLATFORM.")] = None
    nats: Annotated[str | None, Parameter(help="NATS URLs, comma separated, or PHALANX_NATS.")] = None
    timeout: Annotated[float, Parameter(help="How long connecting may take, in seconds.")] = 5.0

    def find(self) -> tuple[str, NatsOptions]:
        """The platform's name and its NATS. Raises ConfigError."""
        config, _ = self.node()
        return config.name, nats_options(config)

    def node(self) -> tuple[PlatformConfig, bool]:
        """The declaration, and whether it is this machine's own, from a file. Raises ConfigError."""
        config, platform = self.declaration()
        return config, platform is not None

    def declaration(self) -> tuple[PlatformConfig, Platform | None]:
        """The same with its apps, where it is this machine's own. Raises ConfigError."""
        if not 0.05 <= self.timeout <= 600:
            raise ConfigError("--timeout", self.timeout, "out of range", "choose 0.05 to 600 seconds")
        # A file that was named says more than the environment; one that is only found here says less.
        name = self.platform or ("" if self.config else os.environ.get("PHALANX_PLATFORM")) or ""
        with Overrides(nats=self.nats).applied():
            platform = self._declared(name)
            config = platform.config if platform is not None else _bare(name)
        if name and name != config.name:
            return msgspec.structs.replace(_bare(name), nats=config.nats), None
        return config, platform

    def _declared(self, name: str) -> Platform | None:
        if self.config is not None:
            return load(self.config)
        if name and (self.nats or os.environ.get("PHALANX_NATS")):
            return None
        if Path(DEFAULT_FILE).exists():
            return load(DEFAULT_FILE)
        if not name:
            raise ConfigError(
                "--platform",
                None,
                f"which platform? there is no {DEFAULT_FILE} here",
                "give --platform NAME and --nats URL (or PHALANX_PLATFORM, PHALANX_NATS), or --config FILE",
            )
        return None


def _bare(name: str) -> PlatformConfig:
    try:
        # The node's id plays no part, and need not follow from this host's name.
        return build_platform(name, node="client")
    except ConfigError as error:
        if error.key == "platform.name":
            raise ConfigError("--platform", name, error.problem, error.remedy) from None
        raise


def nats_options(config: PlatformConfig) -> NatsOptions:
    """How a client reaches the platform's NATS from this host."""
    if isinstance(config.nats, EmbeddedNats):
        from phalanx.bus.embedded import EmbeddedServer

        # It only says how to connect; nothing starts.
        return EmbeddedServer(
            config.nats, platform=config.name, node=config.node, data_dir=str(config.data_dir)
        ).options
    return config.nats


# --- files and modules


def load(target: str) -> Platform:
    """The platform that *target* declares: a TOML file, or ``module:name``. Raises ConfigError."""
    match = _MODULE.fullmatch(target)
    if match is None or Path(target).exists():
        if ":" in target and not target.endswith(".toml") and not Path(target).exists():
            raise ConfigError(
                "target",
                target,
                "neither a file nor module:name",
                "write phalanx.toml, or package.module:name",
            )
        config, apps = load_toml(target)
        return Platform.from_config(config, apps)
    return _from_module(match["module"], match["name"])


def _from_module(module: str, name: str) -> Platform:
    target = f"{module}:{name}"
    found = _import(module)
    if not hasattr(found, name):
        raise ConfigError("target", target, f"the module has no {name!r}", _remedy(found, module, name))
    value = getattr(found, name)
    if not isinstance(value, Platform) and callable(value):
        value = _called(target, value)
    if not isinstance(value, Platform):
        raise ConfigError(
            "target",
            target,
            f"{name!r} is no phalanx.Platform but {type(value).__name__}",
            _remedy(found, module, name),
        )
    return value


def _import(module: str) -> ModuleType:
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        with _declaring_only():
            return importlib.import_module(module)
    except ConfigError:
        raise
    except ModuleNotFoundError as error:
        if error.name is not None and (module == error.name or module.startswith(f"{error.name}.")):
            raise ConfigError(
                "target", module, f"no module of that name in {folder}", "run it in the folder of the module"
            ) from None
        raise _broken(module, error) from error
    except (Exception, SystemExit) as error:
        raise _broken(module, error) from error


def _called(target: str, function: Any) -> object:
    try:
        with _declaring_only():
            return function()
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        raise _broken(target, error) from error


def _broken(target: str, error: BaseException) -> ConfigError:
    """The user's own code failed: say where."""
    place = ""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith("<") and __file__ != frame.filename]
    if isinstance(error, SyntaxError) and error.filename:
        place = f" at {error.filename}:{error.lineno}"
    elif own:
        place = f" at {own[-1].filename}:{own[-1].lineno}"
    return ConfigError(
        "target", target, f"it raised {type(error).__name__}: {error}{place}", "correct the program"
    )


def _remedy(module: ModuleType, name: str, missing: str) -> str:
    found: dict[str, object] = vars(module)
    platforms = [key for key, value in found.items() if isinstance(value, Platform)]
    near = platforms or difflib.get_close_matches(missing, found, 1)
    return (
        f"did you mean {name}:{near[0]}?"
        if near
        else "name a phalanx.Platform, or a function that returns one"
    )


@contextlib.contextmanager
def _declaring_only() -> Generator[None]:
    """``platform.run()`` at the end of a module does nothing here: running it is the caller's choice.

    So one file serves ``python mine.py`` and ``phalanx run mine:platform``.
    """
    original = Platform.run

    def run(self: Platform) -> None:
        """Left to the command line."""

    Platform.run = run
    try:
        yield
    finally:
        Platform.run = original

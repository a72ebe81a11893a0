"""Policy of `install()`: when this package may answer to `import flash_attn`, and when not."""

from __future__ import annotations

import functools
import importlib.util
import logging
import sys
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from types import ModuleType, TracebackType
from typing import cast

from .. import _startup as startup
from .._core.ground.locks import Lock
from .._integrations import transformers
from .._startup import ALIAS, PACKAGE, PROVIDER
from .._version import FLASH_ATTN_VERSION
from ..errors import ActivationError
from . import children as offspring
from . import occupant, operators, version_3
from .distribution import VirtualDistribution
from .finder import AliasFinder, PostImportFinder
from .metadata import VirtualDistributionFinder
from .mirrored import mirrored
from .names import NAMES

__all__ = ["MIRRORED", "Activation", "claim", "follow", "install", "installed", "uninstall"]

MIRRORED = mirrored(sys.modules[__package__.partition(".")[0]].__path__, own=("errors",))
"""Our modules that mirror upstream ones; anything else of ours is absent under `flash_attn`."""

NOTED_AS_ABSENT = {
    "flash_attn": None,
    "flash_attn_func": None,
    "flash_attn_varlen_func": None,
    "_flash_attn_available": False,
}
"""What clients hold, diffusers among them, that looked for flash_attn and did not find it."""

RIVAL = "flash-attn-npu"

_log = logging.getLogger(PACKAGE)
_lock = Lock()
_claims: set[Activation] = set()


def _why_absent(name: str) -> str | None:
    # read when an import fails, and at no other time
    from .._surface.exceptions import RULES

    return RULES.absent_module(name)


_alias = AliasFinder(ALIAS, PACKAGE, MIRRORED, NAMES, _why_absent)
_distribution = VirtualDistributionFinder(
    VirtualDistribution(
        "flash-attn", FLASH_ATTN_VERSION, ALIAS, PROVIDER, Path(__file__).parents[2]
    )
)
_hooks = PostImportFinder(transformers.HOOKS)


class _State:
    """What is to be undone.

    touched: something of ours may be in place. It is set before the first change and cleared
        after the last one is undone, so that whatever interrupts, the rest can be made up for.
    shadows: a real flash_attn would be found but for us.
    set_aside: what comes back under the name.
    given_up: placeholders, which come back only if what removes them fails.
    """

    touched = False
    shadows = False
    set_aside: dict[str, ModuleType | None] = {}  # noqa: RUF012
    given_up: dict[str, ModuleType | None] = {}  # noqa: RUF012


class Activation:
    """One claim on the name `flash_attn`, returned by `install()`.

    The name stays ours until every claim is given up, or `uninstall()` ends them all. As a
    context manager it gives itself up at the end of the block.
    """

    def __init__(self, *, children: bool = False, fa3: bool = False) -> None:
        self._children, self._fa3 = children, fa3

    @property
    def children(self) -> bool:
        """Whether processes that this one starts are to serve flash_attn too."""
        return self._children

    @property
    def fa3(self) -> bool:
        """Whether FlashAttention 3's names are to be served too."""
        return self._fa3

    def uninstall(self) -> None:
        """Give this claim up; a second call does nothing that the first did not leave undone."""
        with _lock:
            _claims.discard(self)
            if _claims:
                _settle()
            else:
                _switch_off()

    def __enter__(self) -> Activation:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.uninstall()


def install(*, force: bool = False, children: bool = False, fa3: bool = False) -> Activation:
    """Make `import flash_attn` give this package in this process.

    Applications and launchers call it, before anything imports flash_attn; libraries import
    flash_attn_npu directly. Calling it again is harmless. Placeholders that other packages
    left under the name are removed for good.

    Args:
        force: replace a flash_attn that is already imported, and ignore
            `sys.modules["flash_attn"] = None`. What was replaced comes back on uninstall.
        children: let the processes that this one starts meanwhile do the same, by the
            environment variable FLASH_ATTN_NPU_INSTALL. They are those of an environment into
            which flash_attn_npu is installed; a forked child needs nothing. Where it is not
            installed, that is logged as a warning.
        fa3: serve FlashAttention 3's interface as well, as `flash_attn_interface` and
            `flash_attn_3.flash_attn_interface`, which clients prefer once they find it.

    Returns:
        A claim with `.uninstall()`, usable as a context manager.

    Raises:
        ActivationError: a real flash_attn is already imported, or the name is blocked; with fa3
            the same of FlashAttention 3, whatever `force` says.
    """
    return claim(force=force, children=children, fa3=fa3, by_name=True)


def claim(
    *, force: bool = False, children: bool = False, fa3: bool = False, by_name: bool = False
) -> Activation:
    """`install`, for a program that asked for it by name, or for what starts programs."""
    made = Activation(children=children, fa3=fa3)
    with _lock:
        if not _claims:
            # what an interrupted uninstall has left
            _switch_off()
        try:
            if fa3:
                version_3.refuse_loaded()
            _clear_the_way(force)
            if not _claims:
                _switch_on()
            _claims.add(made)
            _settle()
            if children:
                _tell_of_the_start_up_file(logging.WARNING if by_name else logging.INFO)
            _warn_of_those_before_us()
            _State.given_up = {}
        except BaseException:
            made.uninstall()
            raise
    return made


def uninstall() -> None:
    """Give the name up, whoever claimed it; does nothing when not installed.

    Modules that imported names from flash_attn meanwhile keep them. If it fails or is
    interrupted, calling it again does the rest.
    """
    with _lock:
        _claims.clear()
        _switch_off()


def follow() -> None:
    """Install, if that is what the environment told this interpreter at its start.

    A real flash_attn keeps the name, unless the environment says force. Nothing is raised.
    """
    finder = startup.waiting()
    if finder is None or finder.stands_back(ALIAS):
        return
    sys.meta_path.remove(finder)
    try:
        install(fa3="fa3" in finder.words)
    except ActivationError as error:
        startup.say(f"flash_attn is not served: {error}")


def installed() -> bool:
    """Whether `import flash_attn` gives this package."""
    return _alias in sys.meta_path


def _switch_on() -> None:
    _warn_of_rival()
    _tell_what_is_shadowed()
    _warn_who_came_too_early()
    _State.touched = True
    if not startup.activated():
        _distribution.insert()
    _alias.insert()
    transformers.forget_cached_answers()
    _hooks.insert()
    operators.insert()
    _log.info("flash_attn is now flash_attn_npu, mirroring flash-attn %s", FLASH_ATTN_VERSION)


def _settle() -> None:
    """Serve, here and in children, what the claims that are left ask for."""
    fa3 = any(claim.fa3 for claim in _claims)
    if fa3 != version_3.served():
        version_3.serve(fa3)
        transformers.forget_cached_answers()
    if not any(claim.children for claim in _claims):
        offspring.take_back()
        return
    words = {"1"} | ({"force"} if _State.shadows else set())
    words |= {"fa3"} if any(claim.fa3 and claim.children for claim in _claims) else set()
    offspring.tell(words)


def _tell_of_the_start_up_file(level: int) -> None:
    if not offspring.followed():
        _log.log(
            level,
            "no start-up file of %s in site-packages: children that do not fork will find no "
            "flash_attn; pip install the package, from a PYTHONPATH alone it does not work",
            PROVIDER,
        )


def _switch_off() -> None:
    # each step looks at what is there, so that it can be taken again
    if not _State.touched:
        return
    with ExitStack() as last:
        # one that raises does not keep the others from being taken
        last.callback(_restore)
        last.callback(transformers.forget_cached_answers)
        last.callback(_distribution.remove)
        last.callback(_alias.remove)
        last.callback(transformers.undo)
        last.callback(_hooks.remove)
        last.callback(operators.remove)
        last.callback(version_3.serve, False)
        last.callback(offspring.take_back)
    _State.touched = False


def _restore() -> None:
    if installed() or any(_alias.owns(*entry) for entry in occupant.loaded_as(ALIAS).items()):
        # what should have taken us away has failed, and is to be called again
        return
    before = {**_State.set_aside, **_State.given_up}
    # whoever has taken the name meanwhile keeps it, and nothing of another package's beside it
    if sys.modules.get(ALIAS, before.get(ALIAS)) is before.get(ALIAS):
        for name, module in before.items():
            # typeshed has no None here, though Python does
            sys.modules.setdefault(name, cast(ModuleType, module))
    _State.set_aside = _State.given_up = {}


def _clear_the_way(force: bool) -> None:
    found = {
        name: module
        for name, module in occupant.loaded_as(ALIAS).items()
        if not _alias.owns(name, module)
    }
    comes_back = False
    if ALIAS not in found:
        # children without their parent, or placed under ours: nobody but a placeholder does that
        found = {
            name: module
            for name, module in found.items()
            if module is not None and occupant.is_placeholder(module)
        }
    elif (head := found[ALIAS]) is None:
        _refuse_blocked(force)
        comes_back = True
    elif not occupant.is_placeholder(head):
        _refuse_loaded(head, force)
        comes_back = True
    if not found:
        return
    _State.touched = True
    if comes_back:
        _State.set_aside = {**_State.set_aside, **found}
    else:
        _State.given_up = {**_State.given_up, **found}
    _log.info("removed from sys.modules: %s", ", ".join(sorted(found)))
    occupant.evict(found)


def _refuse_blocked(force: bool) -> None:
    if not force:
        raise ActivationError(
            "sys.modules['flash_attn']",
            "None, by which somebody in this process blocked the import of flash_attn",
            "no entry",
            "delete the entry if flash_attn may be used here, or call install(force=True)",
        )
    _log.warning("sys.modules['flash_attn'] was None: install(force=True) lifts that block")


def _refuse_loaded(module: ModuleType, force: bool) -> None:
    holders = ", ".join(occupant.references_to(ALIAS)) or "no module"
    if not force:
        raise ActivationError(
            "sys.modules['flash_attn']",
            f"a flash_attn that is already imported, from {occupant.whereabouts(module)}; "
            f"modules that hold names from it: {holders}",
            "a process that has not imported flash_attn yet",
            "call flash_attn_npu.install() earlier, or start the program with "
            "`python -m flash_attn_npu`; install(force=True) replaces it all the same, and "
            "those modules keep what they hold",
        )
    _log.warning(
        "install(force=True) replaces the flash_attn of %s; still holding names from it: %s",
        occupant.whereabouts(module),
        holders,
    )


def _warn_of_rival() -> None:
    try:
        version = metadata.version(RIVAL)
    except metadata.PackageNotFoundError:
        return
    _log.warning(
        "the distribution %s %s is installed beside %s: both bring an import package "
        "flash_attn_npu, and whichever came last has overwritten files of the other; to keep "
        "this one: pip uninstall %s, then pip install --force-reinstall --no-deps %s",
        RIVAL,
        version,
        PROVIDER,
        RIVAL,
        PROVIDER,
    )


def _warn_who_came_too_early() -> None:
    early = occupant.holding(NOTED_AS_ABSENT)
    if early:
        _log.warning(
            "imported before install(), these found no flash_attn and go on without it: %s; call "
            "flash_attn_npu.install() before they are imported, or start the program with "
            "`python -m flash_attn_npu`",
            ", ".join(early),
        )


def _warn_of_those_before_us() -> None:
    before = occupant.answering_before(_alias, ALIAS)
    if before:
        _log.warning(
            "`import flash_attn` does not ask flash_attn_npu first: in sys.meta_path these "
            "answer before it: %s; take them out, or uninstall() and install() again",
            ", ".join(before),
        )


def _tell_what_is_shadowed() -> None:
    spec = importlib.util.find_spec(ALIAS)
    _State.shadows = spec is not None
    if spec is not None:
        _say_shadowed(str(spec.origin))


@functools.cache
def _say_shadowed(origin: str) -> None:
    _log.info("the flash_attn on disk at %s is shadowed while installed, not changed", origin)

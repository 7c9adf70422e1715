"""Classes by name: ours, registered ones, and those that an installed package declares."""

from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from melinoe.errors import MelinoeError

_Base = TypeVar("_Base")
_Class = TypeVar("_Class", bound=type)


class Registry(Generic[_Base]):
    """
    Classes by name; a name of ours always means ours.

    Ours are found as those from outside are: by name, loaded when first asked for.

    Args:
        group: Of the entry points by which packages declare theirs.
        base: What a class must be a subclass of; its ``name`` is what it is found by.
        built_in: Name to ``module:Class``, of ours.
        kind: What a name stands for, for people.
        word: What a class is, for people.
        none: A name that means nothing at all, and that no class may have.
    """

    def __init__(
        self,
        group: str,
        base: type[_Base],
        built_in: Mapping[str, str],
        kind: str,
        word: str,
        none: str | None = None,
    ) -> None:
        self._group, self._base, self._built_in = group, base, dict(built_in)
        self._kind, self._word, self._none = kind, word, none
        self._known: dict[str, type[_Base]] = {}

    def register(self, cls: _Class) -> _Class:
        """
        Make a class known by its ``name`` in this process; a decorator.

        Raises:
            ValueError: it has no name, or one that is taken.
        """
        name = getattr(cls, "name", "")
        if not name or name == self._none or name in self._known or name in self._built_in:
            raise ValueError(f"a {self._word} needs a name of its own, and {name!r} is not one")
        self._known[name] = cls
        return cls

    def names(self) -> list[str]:
        """All that can be named: ours in their order, then those from outside, sorted."""
        ours = [*([] if self._none is None else [self._none]), *self._built_in]
        outside = {point.name for point in entry_points(group=self._group)}
        return [*ours, *sorted({*self._known, *outside}.difference(ours))]

    def find(self, name: str) -> type[_Base]:
        """
        Look a class up.

        Raises:
            MelinoeError: unknown name (the message lists the known ones), or an installed package
                that declares it cannot be loaded or declares something else.
        """
        if name not in self._known:
            if name in self._built_in:
                self._known[name] = _imported(self._built_in[name])
            else:
                self._known[name] = self._declared(name)
        return self._known[name]

    def own(self, attribute: str) -> type[_Base]:
        """
        One of ours by the name of its class.

        Raises:
            AttributeError: none of ours is called so.
        """
        for path in self._built_in.values():
            if path.partition(":")[2] == attribute:
                return _imported(path)
        raise AttributeError(attribute)

    def _declared(self, name: str) -> type[_Base]:
        """What a package declares under *name*."""
        points = () if name == self._none else entry_points(group=self._group, name=name)
        if not points:
            raise MelinoeError(
                f"there is no {self._kind} {name!r}; choose one of {', '.join(self.names())}"
            )
        point = next(iter(points))
        try:
            cls = point.load()
        except Exception as error:  # whatever a stranger's module raises when it is imported
            raise MelinoeError(
                f"the {self._kind} {name!r} of {point.value} cannot be loaded ({error}); "
                "repair or uninstall the package that declares it"
            ) from error
        own = getattr(cls, "name", None)
        if not (isinstance(cls, type) and issubclass(cls, self._base) and own == name):
            raise MelinoeError(
                f"the entry point {name!r} is {point.value}, which is no {self._word} of that "
                "name; repair or uninstall the package that declares it"
            )
        return cls


def _imported(path: str) -> Any:
    """Import the class at ``module:Class``."""
    module, _, attribute = path.partition(":")
    return getattr(import_module(module), attribute)

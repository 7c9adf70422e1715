"""Find classes by name: built-in ones, registered ones, and entry points of installed packages."""

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from melinoe.errors import MelinoeError

_Base = TypeVar("_Base")
_Class = TypeVar("_Class", bound=type)


class Registry(Generic[_Base]):
    """
    Classes by their ``name``; a built-in name always means the built-in class.

    Args:
        group: Of the entry points by which packages declare theirs.
        base: The class that all are subclasses of.
        kind, word: The words for a name and for a class in messages.
        none: A name that means nothing at all, and that no class may have.
    """

    def __init__(
        self, group: str, base: type[_Base], kind: str, word: str, none: str | None = None
    ) -> None:
        self._group, self._base, self._none = group, base, none
        self._kind, self._word = kind, word
        self._built_in: dict[str, type[_Base]] = {}
        self._known: dict[str, type[_Base]] = {}  # from outside

    def own(self, cls: _Class) -> _Class:
        """Make a class built in; a decorator."""
        self._built_in[cls.name] = cls  # type: ignore[attr-defined]
        return cls

    def register(self, cls: _Class) -> _Class:
        """Make a class known in this process; a decorator. ValueError if its name is taken."""
        name = getattr(cls, "name", "")
        if not name or name == self._none or name in self._known or name in self._built_in:
            raise ValueError(f"a {self._word} needs a name of its own, and {name!r} is not one")
        self._known[name] = cls
        return cls

    def names(self, keep: Callable[[type[_Base]], bool] = lambda _: True) -> list[str]:
        """Name the built-in classes to *keep* in their order, then all from outside, sorted."""
        none = [] if self._none is None else [self._none]
        outside = {point.name for point in entry_points(group=self._group)} | self._known.keys()
        ours = [name for name, cls in self._built_in.items() if keep(cls)]
        return [*none, *ours, *sorted(outside.difference(none, self._built_in))]

    def find(self, name: str) -> type[_Base]:
        """
        Look a class up.

        Raises:
            MelinoeError: unknown name (the message lists the known ones), or an installed package
                that declares it cannot be loaded or declares something else.
        """
        if name in self._built_in:
            return self._built_in[name]
        if name not in self._known:
            self._known[name] = self._declared(name)
        return self._known[name]

    def _declared(self, name: str) -> type[_Base]:
        points = () if name == self._none else entry_points(group=self._group, name=name)
        if not points:
            raise MelinoeError(
                f"there is no {self._kind} {name!r}; choose one of {', '.join(self.names())}"
            )
        point = next(iter(points))
        try:
            cls: Any = point.load()
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

"""Classes that an installed package declares as an entry point: policies, prefetchers."""

from importlib.metadata import entry_points
from typing import TypeVar

from melinoe.errors import MelinoeError

_Base = TypeVar("_Base")


def declared_class(
    group: str, name: str, base: type[_Base], kind: str, word: str
) -> type[_Base] | None:
    """
    Load what a package declares under *name*; None where none does.

    Args:
        group: Of entry points.
        name: The entry point's, and the `name` that its class must have.
        base: What the class must be a subclass of.
        kind: What *name* is, for people.
        word: What the class is, for people.

    Raises:
        MelinoeError: it cannot be loaded, or is something else.
    """
    points = entry_points(group=group, name=name)
    if not points:
        return None
    point = next(iter(points))
    try:
        cls = point.load()
    except Exception as error:  # whatever a stranger's module raises when it is imported
        raise MelinoeError(
            f"the {kind} {name!r} of {point.value} cannot be loaded ({error}); "
            "repair or uninstall the package that declares it"
        ) from error
    own = getattr(cls, "name", None)
    if not (isinstance(cls, type) and issubclass(cls, base) and own == name):
        raise MelinoeError(
            f"the entry point {name!r} is {point.value}, which is no {word} of that name; "
            "repair or uninstall the package that declares it"
        )
    return cls

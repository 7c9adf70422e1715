"""A package outside Melinoe, as far as Python can tell: a module, and the metadata beside it."""

import importlib
import sys


def fresh_registries(monkeypatch):
    """Policies and prefetches have not been looked up before, and are forgotten afterwards."""
    for registry in ("melinoe.cache.policy", "melinoe.cache.prefetch"):
        monkeypatch.setattr(f"{registry}._registry._known", {})
    importlib.invalidate_caches()


def installed_package(place, monkeypatch, module, source, entry_points):
    """
    A generator for a fixture: while it waits, *module* is installed in *place*.

    *entry_points* is what stands in the metadata's file of that name.
    """
    name = module.replace("_", "-")
    (place / f"{module}.py").write_text(source)
    info = place / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entry_points)
    monkeypatch.syspath_prepend(str(place))
    fresh_registries(monkeypatch)
    yield
    sys.modules.pop(module, None)

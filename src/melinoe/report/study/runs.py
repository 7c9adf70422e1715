"""Records of kind ``study`` gathered by setting: one entry per thing tried, all its seeds."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from melinoe.config.likeness import differences, for_locality
from melinoe.report.records import Measurements
from melinoe.report.schema import Record

BASE, PLAIN = "base", "plain"


@dataclass
class Setting:
    """
    What was tried, and its runs by seed.

    Attributes:
        group: Part of the study.
        family: What kind of thing it is; settings of one family differ in strength alone.
        strength: ``None`` where there is nothing to vary.
        plain: Name of the plain fine-tuning that it stands beside.
        runs: Seed -> record.
    """

    group: str
    family: str
    strength: float | None
    name: str
    plain: str
    runs: dict[int, Record] = field(default_factory=dict)

    @property
    def settings(self) -> Mapping[str, Any]:
        """Settings of the training, of its first seed; empty where the records hold none."""
        return next(iter(self.runs.values())).get("settings") or {}


@dataclass
class Study:
    """All settings by name, in the order read; the base model apart."""

    base: Record | None
    settings: dict[str, Setting]

    @property
    def base_setting(self) -> Setting:
        """The base model as a setting with one run."""
        assert self.base is not None
        return Setting(BASE, BASE, None, BASE, "", {0: self.base})

    def tried(self, group: str | None = None) -> list[Setting]:
        """Give the settings that have a plain fine-tuning to stand beside, of one group or all."""
        return [
            one
            for one in self.settings.values()
            if (group is None or one.group == group) and self.plain(one) is not None
        ]

    def plain(self, setting: Setting) -> Setting | None:
        """Give the plain fine-tuning that a setting stands beside; it has none itself."""
        found = self.settings.get(setting.plain)
        if setting.group == PLAIN or found is None or not _both(setting, found):
            return None
        return found

    def control(self, setting: Setting) -> Setting | None:
        """
        Give the like-for-like control of a setting: trained alike, but for the locality terms.

        ``None`` where no such setting was run, and for one that has no locality term itself.
        """
        beside = [one for one in self.settings.values() if one.plain == setting.plain]
        first = self.plain(setting)
        if first is None or not for_locality(setting.settings):
            return None
        for one in [first, *(one for one in beside if one.group != PLAIN)]:
            both = pairs(setting, one)
            if both and all(_is_control(theirs, ours) for ours, theirs in both):
                return one
        return None

    @property
    def groups(self) -> list[str]:
        """Groups that have something to show, in the order read."""
        return list(dict.fromkeys(one.group for one in self.tried()))


def gather(found: Measurements) -> Study | None:
    """Sort the study's records; ``None`` where there are none."""
    records = found.of("study")
    if not records:
        return None
    base: Record | None = None
    settings: dict[str, Setting] = {}
    for record in records:
        if record["name"] == BASE:
            base = record
            continue
        one = settings.setdefault(
            record["name"],
            Setting(
                record["group"],
                record["family"],
                record.get("strength"),
                record["name"],
                record.get("plain") or PLAIN,
            ),
        )
        one.runs[int(record["seed"])] = record
    return Study(base, settings)


def pairs(setting: Setting, other: Setting) -> list[tuple[Record, Record]]:
    """Give (run, the other's run) for each seed that both have."""
    return [(setting.runs[seed], other.runs[seed]) for seed in _both(setting, other)]


def _is_control(theirs: Record, ours: Record) -> bool:
    """Whether one run differs from another in the locality terms alone; no, if it does not say."""
    said = theirs.get("settings")
    if not said or for_locality(said) or theirs.get("examples") != ours.get("examples"):
        return False
    return not differences(ours.get("settings") or {}, said)


def _both(setting: Setting, other: Setting) -> list[int]:
    return sorted(setting.runs.keys() & other.runs.keys())


def corpora(record: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Names of the texts trained on, and of the others."""
    quality = record["quality"]
    inside = [name for name, item in quality.items() if item.get("in_domain")]
    return inside, [name for name in quality if name not in inside]

"""Records of kind ``study`` gathered by setting: one entry per thing tried, all its seeds."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from melinoe.report.records import Measurements
from melinoe.report.schema import Record

BASE, CONTROL = "base", "control"


@dataclass
class Setting:
    """
    What was tried, and its runs by seed.

    Attributes:
        group: Part of the study.
        family: What kind of thing it is; settings of one family differ in strength alone.
        strength: ``None`` where there is nothing to vary.
        control: Name of the setting that it is compared with.
        runs: Seed -> record.
    """

    group: str
    family: str
    strength: float | None
    name: str
    control: str
    runs: dict[int, Record] = field(default_factory=dict)


@dataclass
class Study:
    """All settings by name, in the order read; the base model apart."""

    base: Record | None
    settings: dict[str, Setting]

    @property
    def base_setting(self) -> Setting:
        """The base model as a setting with one run and no control."""
        assert self.base is not None
        return Setting(BASE, BASE, None, BASE, "", {0: self.base})

    def tried(self, group: str | None = None) -> list[Setting]:
        """Give the settings that have a control to stand beside, of one group or of all."""
        return [
            one
            for one in self.settings.values()
            if (group is None or one.group == group) and self.pairs(one)
        ]

    def pairs(self, setting: Setting) -> list[tuple[Record, Record]]:
        """Give (run, its control) for each seed that both have; a control has none itself."""
        control = self.settings.get(setting.control)
        if control is None or setting.group == CONTROL:
            return []
        seeds = [seed for seed in setting.runs if seed in control.runs]
        return [(setting.runs[seed], control.runs[seed]) for seed in sorted(seeds)]

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
                record.get("control") or CONTROL,
            ),
        )
        one.runs[int(record["seed"])] = record
    return Study(base, settings)


def corpora(record: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Names of the texts trained on, and of the others."""
    quality = record["quality"]
    inside = [name for name, item in quality.items() if item.get("in_domain")]
    return inside, [name for name in quality if name not in inside]

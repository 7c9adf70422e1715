"""The options of `melinoe finetune`: every setting once, in panels; progress in lines or a bar."""

import logging
import os
from dataclasses import fields

import pytest
import typer
from typer.testing import CliRunner

from melinoe.cli import finetune, output
from melinoe.cli.command import Command, with_settings
from melinoe.config import FinetuneSettings


def parsed(*arguments):
    """The settings that the command line makes of *arguments*, through the real parser."""
    seen = []

    @with_settings(FinetuneSettings, finetune.PANELS)
    def command(name: str, *, given):
        """Take settings."""
        seen.append((name, FinetuneSettings(**given)))

    app = typer.Typer()
    app.command(cls=Command)(command)
    result = CliRunner().invoke(app, ["it", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return seen[0][1]


def test_every_setting_has_one_option_in_one_panel():
    """A new setting without a panel would be an option that nobody can give."""
    named = [name for names in finetune.PANELS.values() for name in names]
    assert sorted(named) == sorted(one.name for one in fields(FinetuneSettings))


def test_without_options_the_defaults_of_the_settings_hold():
    """No default is written twice."""
    assert parsed() == FinetuneSettings()


def test_options_become_settings_of_their_types():
    """Numbers, flags, absent values, and options that may be repeated."""
    given = parsed(
        "--capacity", 0.5, "--steps", 7, "--save-every", 3,
        "--report-to", "tensorboard", "--report-to", "wandb",
    )  # fmt: skip
    assert given == FinetuneSettings(
        capacity=0.5,
        steps=7,
        save_every=3,
        report_to=("tensorboard", "wandb"),
    )


def test_the_long_help_shows_each_setting_in_its_panel():
    """With its default, its choices and its unit."""
    app = typer.Typer(rich_markup_mode=None)
    app.command(cls=Command)(finetune.command)
    shown = CliRunner().invoke(app, ["--help-all"], env={"COLUMNS": "250"}).output
    for title in finetune.PANELS:
        assert f"\n{title or 'Options'}:\n" in shown
    for one in fields(FinetuneSettings):
        assert f"--{one.name.replace('_', '-')} " in shown, one.name
    assert "(tokens)" in shown and "(merged | adapter | both)" in shown


def test_progress_is_a_line_for_each_log_row(capsys, monkeypatch):
    """A row's numbers on stderr; other processes of the run say nothing."""
    output.training_progress({"step": 3, "steps": 9, "nll": 1.5, "skipped_steps": 0, "lost": None})
    monkeypatch.setenv("RANK", "1")
    output.training_progress({"step": 4, "steps": 9, "nll": 1.25})
    assert capsys.readouterr().err == "step 3 of 9  nll 1.5\n"


@pytest.mark.parametrize(("rank", "level"), [("0", logging.NOTSET), ("1", logging.ERROR)])
def test_only_the_first_process_warns(monkeypatch, rank, level):
    """Every process reads the same data; one warning is enough."""
    log = logging.getLogger("melinoe")
    before = log.level
    monkeypatch.setitem(os.environ, "RANK", rank)
    try:
        log.setLevel(logging.NOTSET)
        output.quiet()
        assert log.level == level
    finally:
        log.setLevel(before)

"""Settings: every field and option by its rule, from Python and from the command line, with values made to do harm."""

from __future__ import annotations

import argparse
import dataclasses
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mezzotint
from mezzotint import config as configuration
from mezzotint.cli import main, training
from mezzotint.cli.arguments import Value
from mezzotint.config import OPTIONS, ModelConfig, Rule, SamplingConfig, TrainConfig, from_dict, to_dict
from mezzotint.errors import ConfigError, MezzotintError

KINDS = (ModelConfig, TrainConfig, SamplingConfig)
FIELDS = [(kind, item) for kind in KINDS for item in dataclasses.fields(kind)]
HOSTILE = (
    None, True, False, -1, 0, 1, 2, 3, 7, 255, 1 << 16, (1 << 31) - 1, 1 << 32, 1 << 63, 10**19, 10**5000, 0.0, -0.0, 5e-324,
    1e-308, 0.5, 1.5, 1e308, math.nan, math.inf, -math.inf, "", "x", "nan", "9" * 5_000, "\ud800\n\x1b[2J", b"1", [], {},
    [[]], object(), np.float32(0.5), np.float64(math.nan), np.int64(3), np.array([1.0, 2.0]), 1 + 2j,
)  # fmt: skip


def one_line(error: BaseException) -> bool:
    text = str(error)
    return text.isprintable() and 0 < len(text) < 300


class TestRules:
    @pytest.mark.parametrize(("kind", "item"), FIELDS, ids=lambda x: getattr(x, "name", None) or x.__name__)
    def test_every_field_has_help_and_a_rule_that_its_default_and_every_preset_keep(self, kind, item):
        rule = item.metadata["rule"]
        assert item.metadata["help"] and isinstance(rule, Rule)
        assert rule.kind is (int if item.default is None else type(item.default))
        assert rule.check(item.name, item.default) == item.default
        if rule.kind in (int, float):
            assert math.isfinite(rule.least), "every number has a least value"
        kept = {ModelConfig: "model", TrainConfig: "train"}.get(kind)
        for preset in configuration.PRESETS.values() if kept else ():
            rule.check(item.name, getattr(getattr(preset, kept), item.name))

    @given(st.sampled_from(FIELDS), st.one_of(st.sampled_from(HOSTILE), st.floats(), st.integers(), st.text()))
    @settings(max_examples=1000, deadline=None)
    def test_any_value_of_any_field_is_taken_or_refused_in_one_line(self, field, value):
        kind, item = field
        try:
            made = kind(**{item.name: value})
        except ConfigError as error:
            assert one_line(error)
            return
        kept = getattr(made, item.name)
        assert type(kept) in (int, float, bool, str, type(None)), "what is kept can be written as JSON"
        assert not isinstance(kept, float) or not math.isnan(kept)
        if kind is not SamplingConfig:
            assert from_dict(kind, to_dict(made)) == made

    @given(st.sampled_from(FIELDS), st.one_of(st.sampled_from(HOSTILE), st.floats(), st.text()))
    @settings(max_examples=500, deadline=None)
    def test_json_is_as_strict(self, field, value):
        kind, item = field
        try:
            from_dict(kind, {item.name: value})
        except ConfigError as error:
            assert one_line(error)
        for wrong in (None, [], "x", 1, {item.name + "x": value}, {"\n" * 50: value}):
            with pytest.raises(ConfigError) as refused:
                from_dict(kind, wrong)
            assert "\n" not in str(refused.value)

    @pytest.mark.parametrize(
        ("within", "kind", "inside", "outside"),
        [
            ("[0, 1]", float, (0, 0.5, 1), (-0.1, 1.1, math.nan, True)),
            ("[0, 1)", float, (0, 0.999), (1, 1.0)),
            ("(0, 1]", float, (5e-324, 1), (0, 0.0, -0.0)),
            ("[1, 9]", int, (1, 9), (0, 10, 1.0, "1", True)),
            ("[0, inf]", float, (0, math.inf), (math.nan, -math.inf)),
        ],
    )
    def test_bounds(self, within, kind, inside, outside):
        rule = configuration._rule(kind, within)
        assert all(rule.check("x", value) == value for value in inside)
        for value in outside:
            with pytest.raises(ConfigError, match=f"^x must be {re.escape(rule.words())}, not "):
                rule.check("x", value)

    def test_words(self):
        words = {
            "[0, 1]": "a number from 0 to 1",
            "[0, 1)": "a number of at least 0, below 1",
            "(0, 1]": "a number above 0, at most 1",
            "[0, inf]": "a number of at least 0",
            "[0, 1e6]": "a number from 0 to 1,000,000",
        }
        assert {within: configuration._rule(float, within).words() for within in words} == words
        assert configuration._rule(int, "[1, 65536]").words() == "a positive whole number, at most 65,536"
        assert configuration._rule(int, "[0, 9]").words() == "a whole number from 0 to 9"


NUMBERS = (
    "nan",
    "inf",
    "-inf",
    "-1",
    "0",
    "1",
    "1.5",
    "1e400",
    "9" * 20,
    "9" * 5_000,
    "x",
    "",
    "1 2",
    "²",
    "0x10",
    "1_0",
    "\x00",
)


def commands() -> dict[str, argparse.ArgumentParser]:
    """The parser of every command, with its options."""
    found = next(a for a in main.build_parser()._actions if isinstance(a, argparse._SubParsersAction)).choices
    for sub in found.values():
        sub.complete, complete = None, sub.complete
        complete(sub)
    return found


def value_options() -> list[tuple[str, argparse.Action]]:
    """Every option of every command that takes a number by a rule."""
    return [(name, a) for name, sub in commands().items() for a in sub._actions if isinstance(a.type, Value)]


def words_of(command: str) -> list[str]:
    """Its arguments that must be there."""
    return {
        "train": ["d", "--out", "r"], "pack": ["r", "--out", "m"], "prepare": ["t", "--out", "d"], "score": ["m", "d"],
        "compare": ["m", "n", "d"], "fill": ["m", "a ____"], "submit": ["r", "m", "--out", "o"], "report": ["r", "--out", "o"], "tune": ["t", "--out", "o"],
    }.get(command, [])  # fmt: skip


class TestCommandLine:
    def test_every_numeric_option_has_a_rule(self):
        """None is left to `int` or `float`, which take not-a-number and know no bounds."""
        bare = [(n, a.dest) for n, sub in commands().items() for a in sub._actions if a.type in (int, float)]
        assert not bare and len(value_options()) > 60

    def test_help_says_what_is_taken(self):
        for command, action in value_options():
            rule = action.type.rule
            if rule.kind is not str and not action.choices:
                assert rule.words() in action.help, (command, action.dest)

    @pytest.mark.parametrize("text", NUMBERS, ids=lambda t: t[:8] + f"_{len(t)}")
    def test_hostile_numbers_end_in_one_line_or_a_value_within(self, text, capsys):
        parser = main.build_parser()
        for command, action in value_options():
            words = [command, *words_of(command), f"{action.option_strings[-1]}={text}"]
            try:
                value = getattr(parser.parse_args(words), action.dest)
            except SystemExit as stop:
                error = capsys.readouterr().err
                assert stop.code == 2 and error.count("\n") == 1 and len(error) < 400, (words, error)
                assert action.option_strings[-1] in error and error.startswith("mezzotint: ")
                continue
            rule = action.type.rule
            assert rule.check("x", value) == value and (rule.kind is str or value == value)

    def test_settings_that_once_slipped_through(self, capsys):
        train = ["train", "d", "--out", "r"]
        for words in (
            [*train, "--minutes", "nan"], [*train, "--minutes", "inf"], [*train, "--matrix-lr", "nan"],
            [*train, "--matrix-lr", "-1"], [*train, "--beta1", "1.5"], [*train, "--embedding-std", "nan"],
            [*train, "--seed", "9" * 20], [*train, "--rotary-base", "0"], [*train, "--sequence-length", str(1 << 24)],
            ["demo", "--minutes", "nan"], ["prepare", "t", "--out", "d", "--val-fraction", "nan"],
            ["pack", "r", "--out", "m", "--tolerance", "nan"], ["score", "m", "d", "--order-lean", "nan"],
            ["score", "m", "d", "--stride", "0"], ["sample", "m", "--temperature", "nan"], ["serve", "--port", "70000"],
        ):  # fmt: skip
            assert main.main(words) == 2
            printed = capsys.readouterr()
            assert (
                printed.out == ""
                and printed.err.count("\n") == 1
                and words[-2] in printed.err
                and "must be" in printed.err
            )

    def test_changes_of_a_resumed_run_are_checked(self, capsys):
        arguments = main.build_parser().parse_args(["train", "d", "--out", "r", "--resume", "--change", "beta1=nan"])
        with pytest.raises(ConfigError, match="--change beta1 must be a number of at least 0, below 1, not nan"):
            training._changes(arguments)
        arguments.change = ["batch=8", "causal-share=0.25", "compile=false", "weighting=reference"]
        wanted = {"batch": 8, "causal_share": 0.25, "compile": False, "weighting": "reference"}
        assert training._changes(arguments) == wanted


class TestOptions:
    @given(st.sampled_from(sorted(OPTIONS)), st.one_of(st.sampled_from(HOSTILE), st.floats(), st.integers()))
    @settings(max_examples=500, deadline=None)
    def test_any_value_is_taken_or_refused_in_one_line(self, name, value):
        try:
            kept = configuration.checked(name, value)
        except MezzotintError as error:
            assert one_line(error) and str(error).startswith(name)
            return
        assert kept is None or kept == kept

    def test_prepare_refuses_bad_numbers(self, tmp_path):
        (tmp_path / "t.txt").write_text("one two three " * 100)
        for bad in (
            dict(val_fraction=math.nan), dict(val_fraction="x"), dict(vocab_size=1.5), dict(vocab_size=True),
            dict(seed=-1), dict(seed=1.5), dict(seed=10**20), dict(text_field=3),
        ):  # fmt: skip
            with pytest.raises(MezzotintError) as error:
                mezzotint.prepare([tmp_path / "t.txt"], tmp_path / "out", **bad)
            assert one_line(error.value) and not (tmp_path / "out").exists()

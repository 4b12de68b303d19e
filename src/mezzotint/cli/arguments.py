"""The words of the command line: its parser, options made of settings, and the options that several commands share.

Knows nothing of what a command does.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from mezzotint.cli.processes import first, say_error
from mezzotint.config import OPTIONS, PRESETS, ModelConfig, Rule, SamplingConfig, TrainConfig
from mezzotint.errors import ConfigError

DEFAULT_MODEL = "prose"
RENAMED = {"visibility": "attention"}
"""Options by their former name: they still work, and a line says the new one."""


class Parser(argparse.ArgumentParser):
    """Errors in one line, exit status 2. complete: adds the options, once they are needed."""

    def __init__(self, *words: Any, complete: Callable[[Parser], None] | None = None, **options: Any) -> None:
        super().__init__(*words, **options)
        self.complete = complete

    def error(self, message: str) -> NoReturn:
        command = self.prog.removeprefix("mezzotint").strip()
        said = say_error(f"{message} (see mezzotint {command + ' ' if command else ''}--help)")
        raise SystemExit(2 if said else 0)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:  # type: ignore[override]
        """Also `fill MODEL --option TEXT`, of which argparse takes MODEL for the TEXT and gives TEXT up as unknown."""
        if self.complete is not None:
            complete, self.complete = self.complete, None
            complete(self)
        known, rest = super().parse_known_args(args, namespace)
        words = rest[1:] if rest[:1] == ["--"] else rest
        loose = len(words) == 1 and (words != rest or not words[0].startswith("-") or " " in words[0])
        if loose and hasattr(known, "text") and known.model is None:
            known.model, known.text, rest = Path(known.text), words[0], []
        return known, rest


def describe(parser: argparse.ArgumentParser, text: str) -> None:
    """Add to what `--help` says of the command."""
    parser.description = f"{parser.description} {text}"


class Value:
    """What turns an option's text into its value, by a rule; argparse adds which option is wrong."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule

    def __call__(self, text: str) -> Any:
        try:
            return self.rule.parse("it", text)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error).removeprefix("it ")) from error


def add_ruled(parser: argparse.ArgumentParser, flag: str, help: str, *, rule: str = "", **more: Any) -> None:
    """An option by its rule in `config.OPTIONS`, which has its name unless another is given."""
    parser.add_argument(flag, type=Value(OPTIONS[rule or flag.lstrip("-").replace("-", "_")]), help=help, **more)


def show_ranges(parser: argparse.ArgumentParser) -> None:
    """Say in the help of every option with a rule what it takes."""
    for action in parser._actions:
        if isinstance(action.type, Value) and not action.choices and action.type.rule.kind is not str:
            action.help = f"{action.help} ({action.type.rule.words()})"


# --- options made of settings -----------------------------------------------------------------------------------------


def _setting(item: dataclasses.Field[Any], help: str) -> dict[str, Any]:
    """`add_argument`'s options for a field; an option that is not given leaves no trace."""
    options: dict[str, Any] = {
        "help": help.replace("%", "%%"),
        "default": argparse.SUPPRESS,
        "dest": f"set_{item.name}",
    }
    if isinstance(item.default, bool):
        return {**options, "action": argparse.BooleanOptionalAction}
    rule = item.metadata["rule"]
    options |= {"type": Value(rule), "metavar": item.metadata["metavar"]}
    if rule.choices:
        options |= {"choices": rule.choices, "metavar": None}
    return options


def _add_setting(group: Any, item: dataclasses.Field[Any], help: str) -> None:
    group.add_argument("--" + item.name.replace("_", "-"), **_setting(item, help))


def add_preset_settings(parser: argparse.ArgumentParser, kind: type[ModelConfig] | type[TrainConfig]) -> None:
    """An option per field of `kind`, its help from the field, with each preset's value."""
    group = parser.add_argument_group(f"settings ({kind.__name__})")
    part = "model" if kind is ModelConfig else "train"
    for item in dataclasses.fields(kind):
        values = {name: getattr(getattr(preset, part), item.name) for name, preset in PRESETS.items()}
        shown = f"default {next(iter(values.values()))}"
        if len(set(values.values())) > 1:
            shown = ", ".join(f"{name} {value}" for name, value in values.items())
        _add_setting(group, item, f"{item.metadata['help']} [{shown}]")


def settings(arguments: argparse.Namespace, kind: type[Any]) -> dict[str, Any]:
    """The fields of `kind` that were given as options."""
    given = vars(arguments)
    return {i.name: given[f"set_{i.name}"] for i in dataclasses.fields(kind) if f"set_{i.name}" in given}


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """The options of commands that draw tokens: `SamplingConfig`, attention, seed, and to watch it."""
    for item in dataclasses.fields(SamplingConfig):
        _add_setting(parser, item, item.metadata["help"])
    parser.add_argument(
        "--attention", metavar="WORD", help="what a position sees: full, causal, or block(K) for K tokens at a time"
    )
    add_ruled(parser, "--seed", "[0]", default=0)
    parser.add_argument("--watch", action="store_true", help="show the canvas being revealed, coloured by confidence")


def sampling_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What was given of `add_sampling`'s settings."""
    given = settings(arguments, SamplingConfig)
    return given if arguments.attention is None else {**given, "attention": arguments.attention}


# --- options that several commands share ------------------------------------------------------------------------------


def add_model(parser: argparse.ArgumentParser, optional: bool = False) -> None:
    """The MODEL before all else; optional: the shipped one where none is named."""
    shown = f" [the shipped {DEFAULT_MODEL}]" if optional else ""
    help = (
        f"a .mzt artifact (-: standard input), a run folder, a shipped model's name, a folder of transformers or "
        f"hf:OWNER/NAME{shown}"
    )
    options: dict[str, Any] = {"nargs": "?"} if optional else {}
    parser.add_argument("model", type=Path, metavar="MODEL|RUN", help=help, **options)


def add_foreign(parser: argparse.ArgumentParser) -> None:
    """The options for models of transformers, of commands that take them."""
    group = parser.add_argument_group("models of transformers")
    kinds = ("masked", "masked_shifted", "causal")
    group.add_argument("--objective", choices=kinds, help="what the model was trained on [what its class says]")
    group.add_argument("--trust-remote-code", action="store_true", help="run Python code of the model's repository")


def add_run(parser: argparse.ArgumentParser) -> None:
    """The RUN that a command is about."""
    parser.add_argument(
        "run_folder",
        type=Path,
        metavar="RUN",
        help="run folder: its best checkpoint if validation ran, else its newest (RUN@last, RUN@STEP: that one)",
    )


TEXTS = ("text", "prompt", "regex", "avoid", "text_field", "dataset")
"""Arguments that are text, not the name of a file."""


def decode_texts(arguments: argparse.Namespace) -> None:
    """Make of text arguments what was typed: UTF-8, whatever the locale took it for. Names of files stay as it has them."""
    for name in TEXTS:
        value = getattr(arguments, name, None)
        if isinstance(value, (str, list)):
            setattr(arguments, name, [*map(_decoded, value)] if isinstance(value, list) else _decoded(value))


def _decoded(text: str) -> str:
    """The text whose bytes Python has kept as surrogates, as in an ASCII locale; as it is where they are not UTF-8."""
    try:
        return os.fsencode(text).decode() if re.search("[\udc80-\udcff]", text) else text
    except UnicodeError:
        return text


def named(text: str) -> Path:
    """A file or folder that must have a name."""
    if text == "-":
        raise argparse.ArgumentTypeError("this needs a name: it cannot be standard input or output")
    return Path(text)


def add_out(parser: argparse.ArgumentParser, metavar: str, help: str, kind: Callable[[str], Path] = Path) -> None:
    """Where a command writes to, which must be said. kind: `named` where `-` cannot be."""
    parser.add_argument("--out", type=kind, required=True, metavar=metavar, help=help)


def add_scored(parser: argparse.ArgumentParser, more: str = "") -> None:
    """The DATA or TEXT of commands that score, and the split of DATA."""
    help = (
        "prepared folder with the model's tokenizer, or text (.txt, .jsonl, .parquet, folders, -), a document at a time"
    )
    parser.add_argument("data", type=Path, nargs="+", metavar="DATA|TEXT", help=help + more)


# --- words as they are typed ------------------------------------------------------------------------------------------


def canonical(words: Sequence[str]) -> list[str]:
    """`--matrix_lr` is accepted for `--matrix-lr`, and a former name with a line on standard error.

    Whatever cannot be an option's name, such as text, stays as it is.
    """
    end = words.index("--") if "--" in words else len(words)
    return [_canonical(word) if i < end else word for i, word in enumerate(words)]


def _canonical(word: str) -> str:
    found = re.match(r"\A--([a-z][a-z0-9]*(?:[_-][a-z0-9]+)*)(?==|\Z)", word)
    if found is None:
        return word
    name = found[1].replace("_", "-")
    if name in RENAMED:
        if first():
            print(f"mezzotint: --{name} is now called --{RENAMED[name]}", file=sys.stderr)
        name = RENAMED[name]
    return f"--{name}{word[found.end() :]}"

"""The command line: a table of commands, what they have in common, and how errors end.

Each command is a thin call of a public function: `add_NAME_arguments` and `run_NAME` of its module, which is imported
when the command is asked for. Figures go to standard output (with `--json` one JSON object and nothing else),
progress to standard error. Exit status 0; 2 for a user's error, with one line on standard error.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import io
import os
import sys
from collections.abc import Sequence
from functools import partial
from types import ModuleType
from typing import NamedTuple

from mezzotint.cli import processes
from mezzotint.cli.arguments import Parser, canonical, decode_texts, show_ranges
from mezzotint.cli.console import Display
from mezzotint.cli.streams import check_streams
from mezzotint.errors import ConfigError, Interrupted, MezzotintError
from mezzotint.files import NotWritten, why_not_written


class Command(NamedTuple):
    """A row of the table. module: the file of this folder with its arguments and what it runs. processes: what
    torchrun's are to it: none, shared (they join before it runs, and the first alone prints) or its own affair."""

    name: str
    help: str
    module: str
    processes: str = "none"

    def imported(self) -> ModuleType:
        """The module, imported."""
        return importlib.import_module(f"mezzotint.cli.{self.module}")


COMMANDS = {
    command.name: command
    for command in (
        Command(
            "demo",
            "the whole way on Python's own library text: train, pack, verify, score, sample, fill, report",
            "demo",
        ),
        Command("prepare", "turn text into token shards", "training"),
        Command("train", "train a denoiser", "training", "own"),
        Command("tune", "a model for texts of your own: fine-tune, pack, and score before and after", "tuning"),
        Command("pack", "quantize, entropy-code and fit a run into one .mzt file", "packing", "shared"),
        Command("score", "measure likelihood, with its kind and standard error", "scoring", "shared"),
        Command("compare", "is the second model better than the first?", "scoring", "shared"),
        Command("sample", "write text from nothing", "text"),
        Command("fill", "fill the gaps of a text", "text"),
        Command("inspect", "show what is in an artifact, tensor by tensor", "packing"),
        Command("export", "write a model as safetensors, config.json and tokenizer.model", "packing"),
        Command("import", "make one .mzt file of an exported folder", "packing"),
        Command("submit", "make the challenge's record folder", "packing"),
        Command("report", "write one HTML file about a run", "training"),
        Command("compress", "compress any file, without loss, with a model's next-token likelihood", "text"),
        Command("decompress", "restore a file that `compress` made", "text"),
        Command("serve", "open a page where text is filled before your eyes (needs the extra serve)", "text"),
    )
}


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; a command's own options are added when it is parsed."""
    from mezzotint import __version__

    parser = Parser(
        prog="mezzotint",
        description="Train masked-diffusion language models, pack them under a byte budget, and score them honestly.",
        epilog="Start with `mezzotint demo`. `mezzotint COMMAND --help` explains each command.",
    )
    parser.add_argument("--version", action="version", version=f"mezzotint {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    for command in COMMANDS.values():
        description = f"{command.help[0].upper()}{command.help[1:]}" + "." * (not command.help.endswith("?"))
        complete = partial(_add_arguments, command)
        commands.add_parser(command.name, help=command.help, description=description, complete=complete)
    return parser


def _add_arguments(command: Command, parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object on standard output, nothing else")
    getattr(command.imported(), f"add_{command.name}_arguments")(parser)
    show_ranges(parser)


def run_command(arguments: argparse.Namespace, display: Display) -> None:
    """What was parsed, run."""
    command = COMMANDS[arguments.command]
    check_streams(arguments)
    with contextlib.ExitStack() as stack:
        if processes.several() and command.processes != "own":
            if command.processes != "shared":
                raise ConfigError("torchrun is for train, pack, score and compare; run this command by itself")
            stack.enter_context(processes.joined(display))
        getattr(command.imported(), f"run_{command.name}")(arguments, display)


def one_line(error: OSError) -> str:
    """What the system refused, for a person."""
    if isinstance(error, NotWritten) or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
        return why_not_written(error.filename or "the output", error)
    reason = error.strerror or str(error) or type(error).__name__
    return f"{error.filename}: {reason}" if error.filename else reason


def _exhausted_or_cut_off(error: MemoryError | RuntimeError) -> str:
    """What to say of exhausted memory, which PyTorch reports as a RuntimeError, and of a process that is gone.

    "" for any other error, which is a bug and shows its traceback.
    """
    text = str(error)
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate" in text:
        return "not enough memory: use a smaller --micro-batch, model or --length"
    return "another process of this run has ended" if processes.cut_off(error) else ""


def drop_output() -> None:
    """Let what is still buffered for standard output go nowhere, so that nothing fails on the way out."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    for stream in (sys.stdout, sys.stderr):  # a terminal that cannot show a character gets a substitute, not an error
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        arguments = build_parser().parse_args(canonical(sys.argv[1:] if argv is None else argv))
        decode_texts(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)
    display = Display()
    try:
        run_command(arguments, display)
        sys.stdout.flush()
        return 0
    except MezzotintError as error:
        message, status = " ".join(str(error).split()), 130 if isinstance(error, Interrupted) else 2
    except BrokenPipeError:  # whoever read the output has seen enough
        drop_output()
        return 0
    except OSError as error:
        message, status = one_line(error), 2
        drop_output()
    except (MemoryError, RuntimeError) as error:
        message, status = _exhausted_or_cut_off(error), 2
        if not message:
            raise
    except KeyboardInterrupt:
        message, status = "stopped", 130
    finally:
        display.close()
    return status if processes.say_error(message) else 0

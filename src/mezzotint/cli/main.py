"""The command line: the only place that parses arguments, prints and picks paths.

Each command is a thin call of a public function. Figures go to standard output (with `--json` one JSON object and
nothing else), progress to standard error. Exit status 0; 2 for a user's error, with one line on standard error.
Knows nothing of how anything is computed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import io
import json
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

from mezzotint.config import PRESETS, ModelConfig, TrainConfig, preset
from mezzotint.errors import ConfigError, DataError, Interrupted, MezzotintError
from mezzotint.files import atomic_write

if TYPE_CHECKING:
    from mezzotint.data.dataset import Dataset, Windows
    from mezzotint.data.tokenizer import Tokenizer
    from mezzotint.model import Model
    from mezzotint.scoring.statistics import Estimate


DEFAULT_PRESET = "small"
DEFAULT_MODEL = "prose"
METHODS = ("nelbo", "chain", "causal", "reconstruction")
COMPARED_TOKENS = 32_768
SCORED = (
    "prepared folder with the model's tokenizer, or text (.txt, .jsonl, .parquet, folders, -), a document at a time"
)


class _Parser(argparse.ArgumentParser):
    """Errors in one line, exit status 2."""

    def error(self, message: str) -> NoReturn:
        command = self.prog.removeprefix("mezzotint").strip()
        print(f"mezzotint: {message} (see mezzotint {command + ' ' if command else ''}--help)", file=sys.stderr)
        raise SystemExit(2)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:  # type: ignore[override]
        """Also `fill MODEL --option TEXT`, of which argparse takes MODEL for the TEXT and gives TEXT up as unknown."""
        known, rest = super().parse_known_args(args, namespace)
        words = rest[1:] if rest[:1] == ["--"] else rest
        loose = len(words) == 1 and (words != rest or not words[0].startswith("-") or " " in words[0])
        if loose and hasattr(known, "text") and known.model is None:
            known.model, known.text, rest = Path(known.text), words[0], []
        return known, rest


def _add_settings(parser: argparse.ArgumentParser, kind: type[Any], presets: bool, skip: Sequence[str] = ()) -> None:
    """An option per dataclass field, its help from the field; unset options leave the preset's or default value."""
    group = parser.add_argument_group(f"settings ({kind.__name__})")
    for item in dataclasses.fields(kind):
        if item.name in skip or not item.init:
            continue
        shown = f"default {item.default}"
        if presets:
            part = "model" if kind is ModelConfig else "train"
            values = {name: getattr(getattr(p, part), item.name) for name, p in PRESETS.items()}
            if len(set(values.values())) > 1:
                shown = ", ".join(f"{name} {value}" for name, value in values.items())
            else:
                shown = f"default {next(iter(values.values()))}"
        options: dict[str, Any] = {
            "help": f"{item.metadata.get('help', '')} [{shown}]".replace("%", "%%"),
            "default": argparse.SUPPRESS,
            "dest": f"set_{item.name}",
        }
        if isinstance(item.default, bool):
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = type(item.default) if item.default is not None else int
            options["metavar"] = options["type"].__name__.upper()
            if item.metadata.get("choices"):
                options["choices"] = item.metadata["choices"]
                options["metavar"] = None
        group.add_argument("--" + item.name.replace("_", "-"), **options)


def _settings(arguments: argparse.Namespace, kind: type[Any]) -> dict[str, Any]:
    names = {item.name for item in dataclasses.fields(kind)}
    return {k[4:]: v for k, v in vars(arguments).items() if k.startswith("set_") and k[4:] in names}


def _positive(text: str) -> int:
    try:
        value = int(text.replace(",", ""))
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return value


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    from mezzotint import __version__

    parser = _Parser(
        prog="mezzotint",
        description="Train masked-diffusion language models, pack them under a byte budget, and score them honestly.",
        epilog="Start with `mezzotint demo`. `mezzotint COMMAND --help` explains each command.",
    )
    parser.add_argument("--version", action="version", version=f"mezzotint {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)

    def command(name: str, help: str, description: str = "") -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}. {description}".strip())
        sub.set_defaults(run=globals()[f"_run_{name}"])
        sub.add_argument("--json", action="store_true", help="print one JSON object on standard output, nothing else")
        return sub

    def model_argument(sub: argparse.ArgumentParser, optional: bool = False) -> None:
        words: dict[str, Any] = {"nargs": "?"} if optional else {}
        shown = f" [the shipped {DEFAULT_MODEL}]" if optional else ""
        help = (
            f"a .mzt artifact, a run folder, a shipped model's name, a folder of transformers or hf:OWNER/NAME{shown}"
        )
        sub.add_argument("model", type=Path, metavar="MODEL|RUN", help=help, **words)

    sub = command(
        "demo", "the whole way on Python's own library text: train, pack, verify, score, sample, fill, report"
    )
    sub.add_argument("--minutes", type=float, default=2.0, help="training time; all else takes about one more [2]")
    sub.add_argument("--out", type=Path, default=Path("demo"), metavar="DIR", help="folder for all files [demo]")

    sub = command(
        "prepare",
        "turn text into token shards",
        "A source is a file of text (.txt, .md, source code: one document), .jsonl, .csv, .tsv (each also .gz or .zst) or "
        ".parquet, a folder of these, - (standard input), stdlib (this Python's own library), "
        "hf:OWNER/NAME[:CONFIG][:SPLIT] (a dataset of the Hugging Face Hub), or fineweb:sp1024[:SHARDS] (the challenge's "
        "published shards).",
    )
    sub.add_argument("sources", nargs="+", metavar="SOURCE", help="file, folder, -, stdlib, hf:OWNER/NAME...")
    sub.add_argument("--out", type=Path, required=True, metavar="DATA", help="new folder for the shards")
    sub.add_argument(
        "--tokenizer", metavar="FILE|MODEL", help="a SentencePiece .model, a tokenizer.json, or a model's own"
    )
    sub.add_argument("--text-field", default="text", metavar="A.B", help="column or JSON key of the text [text]")
    sub.add_argument(
        "--vocab-size", type=_positive, metavar="N", help="pieces to train a tokenizer of [4096, or what fits]"
    )
    sub.add_argument("--val-fraction", type=float, metavar="F", help="share of documents held out [0.02]")
    sub.add_argument("--val", nargs="+", metavar="SOURCE", help="validation sources, instead of a share")
    sub.add_argument("--seed", type=int, default=0, help="seed of the held-out choice [0]")

    sub = command(
        "train",
        "train a denoiser",
        "Writes a run folder with config, metrics, log and checkpoints. Under torchrun every process takes its share "
        "of the batch. Any setting of the preset can be changed.",
    )
    sub.add_argument("data", type=Path, metavar="DATA", help="prepared folder")
    sub.add_argument("--out", type=Path, required=True, metavar="RUN", help="run folder to write")
    sub.add_argument(
        "--preset",
        choices=sorted(PRESETS),
        help=f"settings to start from [{DEFAULT_PRESET}; with --resume the run's own]",
    )
    sub.add_argument(
        "--resume", action="store_true", help="go on from the newest valid checkpoint of RUN, with its settings"
    )
    sub.add_argument(
        "--change",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="with --resume: go on with another value of a training setting; may be repeated, and is logged",
    )
    _add_settings(sub, TrainConfig, presets=True)
    _add_settings(sub, ModelConfig, presets=True)

    sub = command(
        "pack",
        "quantize, entropy-code and fit a run into one .mzt file",
        "The file is reopened and every weight compared before success is reported.",
    )
    sub.add_argument("run_folder", type=Path, metavar="RUN", help="run folder")
    sub.add_argument("--out", type=Path, required=True, metavar="MODEL.mzt", help="file to write")
    sub.add_argument(
        "--budget", type=_positive, metavar="BYTES", help="decimal bytes in all, code included [the challenge's cap]"
    )
    sub.add_argument("--code", type=Path, nargs="*", default=[], metavar="FILE", help="code files that count as well")
    sub.add_argument("--codec", default="mezzotint", choices=("mezzotint", "int6", "reference"), help="[mezzotint]")
    sub.add_argument("--data", type=Path, metavar="DATA", help="calibration text [the data the run was trained on]")
    sub.add_argument(
        "--tolerance", type=float, metavar="NATS", help="measured cost not worth more bytes, nats a token [0.001]"
    )
    sub.add_argument("--seed", type=int, default=0, help="seed of the calibration masks [0]")
    sub.add_argument(
        "--sweep",
        action="store_true",
        help="write no artifact but a table and a plot of bytes against NELBO: OUT.csv, OUT.png",
    )
    sub.add_argument(
        "--tokens", type=_positive, metavar="N", help="with --sweep: score about N validation tokens [24576]"
    )

    sub = command(
        "score",
        "measure likelihood, with its kind and standard error",
        "nelbo: unbiased estimate of an upper bound. chain: exact, left to right, a forward pass per token (in blocks: "
        "per token of a block). causal: exact, one pass, for models with a causal share. reconstruction: the challenge entry's score, no bound.",
    )
    model_argument(sub)
    sub.add_argument("data", type=Path, nargs="+", metavar="DATA|TEXT", help=SCORED)
    sub.add_argument("--method", default="nelbo", choices=(*METHODS, "all"), help="[nelbo]")
    sub.add_argument("--split", default="val", choices=("val", "train"), help="[val]")
    sub.add_argument("--tokens", type=_positive, metavar="N", help="score about N tokens, evenly spread [all]")
    sub.add_argument("--repeats", type=_positive, help="independent sets of masks for nelbo [8; 2 with --orders]")
    sub.add_argument(
        "--stride", type=_positive, metavar="S", help="charge S tokens a window, behind the text before [all of it]"
    )
    sub.add_argument(
        "--orders", type=_positive, metavar="K", help="nelbo over K orders: tighter, a pass per token and order"
    )
    sub.add_argument(
        "--order-lean",
        type=float,
        default=0.0,
        metavar="X",
        help="nelbo of orders that lean to the left; inf: chain [0]",
    )
    sub.add_argument("--seed", type=int, default=0, help="seed of the masks [0]")
    sub.add_argument(
        "--order", metavar="ORDER", help="order of chain: left, random(SEED), block(SIZE), spread(PASSES) [left]"
    )
    sub.add_argument(
        "--attention",
        metavar="WORD",
        help="what chain sees: full, or block(SIZE), for models trained in blocks [full]",
    )
    sub.add_argument(
        "--block-size",
        type=int,
        metavar="K",
        help="nelbo of blocks of K tokens from left to right, 0 of whole windows [what the model was trained on]",
    )
    sub.add_argument("--journal", type=Path, metavar="FILE", help="keep what is done here, and go on from it")

    sub = command(
        "compare",
        "is the second model better than the first?",
        "Both are scored on the same windows and masks, so that the difference has a small standard error.",
    )
    sub.add_argument("a", type=Path, metavar="A", help="a .mzt artifact, a run folder, or a model of transformers")
    sub.add_argument("b", type=Path, metavar="B", help="another; on TEXT it may have another tokenizer")
    sub.add_argument("data", type=Path, nargs="+", metavar="DATA|TEXT", help=SCORED + ", paired by document")
    sub.add_argument(
        "--method", default="nelbo", choices=("nelbo", "chain", "chain-or-causal"), help="[nelbo; next tokens' own]"
    )
    sub.add_argument("--split", default="val", choices=("val", "train"), help="[val]")
    sub.add_argument(
        "--tokens", type=_positive, default=COMPARED_TOKENS, metavar="N", help=f"score about N [{COMPARED_TOKENS}]"
    )
    sub.add_argument("--repeats", type=_positive, default=4, help="independent sets of masks for nelbo [4]")
    sub.add_argument("--seed", type=int, default=0, help="seed of the masks [0]")

    def sampling(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--steps", type=_positive, metavar="K", help="forward passes [by sampler]")
        sub.add_argument(
            "--sampler",
            choices=("ancestral", "confidence", "margin", "entropy", "blocks", "remask"),
            help="how masks are revealed [confidence; sample, where next tokens were learnt: one by one, left to right]",
        )
        sub.add_argument("--temperature", type=float, metavar="T", help="below 1: safer words")
        sub.add_argument("--top-p", type=float, metavar="P", help="draw from the most probable share P only")
        sub.add_argument("--no-repeat", type=int, metavar="N", help="no N tokens in a row occur twice")
        sub.add_argument(
            "--block", type=_positive, metavar="N", help="tokens in a block of `blocks` [what was learnt, 32]"
        )
        sub.add_argument(
            "--entropy-budget", type=float, metavar="NATS", help="doubt that a pass of `entropy` may reveal"
        )
        sub.add_argument(
            "--remask", type=float, metavar="SHARE", help="of drawn tokens that a pass of `remask` hides again"
        )
        sub.add_argument(
            "--order-noise", type=float, metavar="X", help="noise on the order of `confidence` and `margin`"
        )
        sub.add_argument(
            "--attention",
            metavar="WORD",
            help="what a position sees: full, causal, or block(K) for K tokens at a time",
        )
        sub.add_argument("--seed", type=int, default=0, help="[0]")
        sub.add_argument("--watch", action="store_true", help="show the canvas being revealed, coloured by confidence")

    sub = command("sample", "write text from nothing")
    model_argument(sub, optional=True)
    sub.add_argument("-n", type=_positive, default=1, help="number of texts [1]")
    sub.add_argument("--length", type=_positive, metavar="L", help="tokens [what the window holds behind the prompt]")
    sub.add_argument("--prompt", default="", help="text to begin with")
    sampling(sub)

    sub = command(
        "fill",
        "fill the gaps of a text",
        "____ (four or more underscores) is a gap of unknown length, [MASK*8] exactly 8 tokens. A backslash before one "
        "makes it plain text. All other text comes back byte for byte. Many texts are tried for each gap, and the one "
        "is taken with which the whole is likeliest; with an option of sampling, what is drawn.",
    )
    model_argument(sub, optional=True)
    sub.add_argument("text", metavar="TEXT", help="text with gaps; - reads standard input")
    sub.add_argument("--n", type=_positive, default=1, metavar="N", help="answers to show for each gap, ranked [1]")
    sub.add_argument("--candidates", type=_positive, metavar="K", help="texts to try for each gap, about [64]")
    sub.add_argument("--words", action="store_true", help="whole words only: no gap begins or ends inside a word")
    sub.add_argument("--max-words", type=_positive, metavar="N", help="at most so many words in a gap")
    sub.add_argument("--regex", metavar="PATTERN", help="what a gap's text must match as a whole (extra `regex`)")
    sub.add_argument("--avoid", action="append", default=[], metavar="WORD", help="no gap holds it; may be repeated")
    sub.add_argument("--greedy", action="store_true", help="the surest token first, one text for each length")
    sampling(sub)

    sub = command("inspect", "show what is in an artifact, tensor by tensor")
    sub.add_argument("artifact", type=Path, metavar="MODEL.mzt", help="artifact")

    sub = command(
        "export",
        "write a model as safetensors, config.json and tokenizer.model",
        "Every weight in float32, without loss; all commands that take a model take the folder, too.",
    )
    model_argument(sub)
    sub.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder to write")

    sub = command(
        "import",
        "make one .mzt file of an exported folder",
        "Without loss, so not small: `mezzotint pack` quantizes, which takes a run.",
    )
    sub.add_argument("folder", type=Path, metavar="FOLDER", help="folder that `mezzotint export` wrote")
    sub.add_argument("--out", type=Path, required=True, metavar="MODEL.mzt", help="file to write")

    sub = command("submit", "make the challenge's record folder")
    sub.add_argument("run_folder", type=Path, metavar="RUN", help="run folder")
    sub.add_argument("artifact", type=Path, metavar="MODEL.mzt", help="artifact packed from it")
    sub.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    sub.add_argument("--data", type=Path, metavar="DATA", help="data to score on [the data the run was trained on]")
    sub.add_argument("--tokens", type=_positive, metavar="N", help="score about N tokens [all]")
    for name in ("name", "author", "github-id", "blurb"):
        sub.add_argument(f"--{name}", default=None, help=f"the record's {name}")

    sub = command("report", "write one HTML file about a run")
    sub.add_argument("run_folder", type=Path, metavar="RUN", help="run folder")
    sub.add_argument("--model", type=Path, metavar="MODEL.mzt", help="also show this artifact's bytes and figures")
    sub.add_argument(
        "--data", type=Path, metavar="DATA", help="[the data the run was trained on, if it is still there]"
    )
    sub.add_argument("--tokens", type=_positive, default=32_768, metavar="N", help="score about N tokens [32768]")
    sub.add_argument("--out", type=Path, required=True, metavar="FILE.html", help="file to write")

    for name, help in (
        ("compress", "compress any file, without loss, with a model's next-token likelihood"),
        ("decompress", "restore a file that `compress` made"),
    ):
        sub = command(name, help)
        sub.add_argument("file", type=Path, metavar="FILE", help="file to read (-: standard input)")
        sub.add_argument(
            "-o", "--out", type=Path, required=True, metavar="FILE", help="file to write (-: standard output)"
        )
        if name == "compress":
            sub.add_argument("--check", action="store_true", help="restore the result and compare before it appears")
        help = f"a .mzt artifact, a run folder or a shipped model's name [the shipped {DEFAULT_MODEL}]"
        sub.add_argument("--model", type=Path, metavar="MODEL|RUN", help=help)
    sub = command("serve", "open a page where text is filled before your eyes (needs the extra serve)")
    model_argument(sub, optional=True)
    sub.add_argument("--host", default="127.0.0.1", help="address to listen on [127.0.0.1: this machine only]")
    sub.add_argument("--port", type=_positive, default=8000, help="[8000]")
    return parser


class _Progress:
    """Progress on standard error: a live line on a terminal, a plain line every few seconds elsewhere."""

    def __init__(self, every: float = 5.0) -> None:
        from rich.console import Console

        self.console = Console(stderr=True, highlight=False)
        self.live = None
        self.task: Any = None
        self.every, self.last = every, 0.0
        self.quiet = False

    def say(self, text: str) -> None:
        """One line that stays."""
        if not self.quiet:
            self.console.print(text, markup=False, style="dim")

    def bar(self, share: float, text: str) -> None:
        """Move the bar to `share` (0..1)."""
        if self.quiet:
            return
        if self.console.is_terminal:
            if self.live is None:
                from rich.progress import BarColumn, Progress, TextColumn

                columns = (BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TextColumn("{task.description}"))
                self.live = Progress(*columns, console=self.console, transient=True)
                self.live.start()
                self.task = self.live.add_task("", total=1.0)
            self.live.update(self.task, completed=share, description=text)
        elif time.monotonic() - self.last >= self.every:
            self.last = time.monotonic()
            print(f"{share:4.0%} {text}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Take the bar away."""
        if self.live is not None:
            self.live.stop()
            self.live = None

    def training(self, row: dict[str, Any]) -> None:
        """A metrics row of `train`."""
        left = int(row["seconds_left"])
        for kind, words in (
            ("nelbo", "bits/byte (training NELBO)"),
            ("narrow", "(some mask rates)"),
            ("causal", "(next tokens)"),
        ):
            if row[f"train_{kind}_bpb"] is not None:
                loss = f"{row[f'train_{kind}_bpb']:.3f} {words}"
                break
        else:
            loss = ""
        self.bar(
            row["progress"],
            f"step {row['step']}  {loss}  {row['tokens_per_second']:,.0f} tokens/s  {left // 60}:{left % 60:02d} left",
        )

    def passes(self, what: str) -> Any:
        """A callback (done, total) for a score."""
        return lambda done, total: self.bar(done / max(1, total), f"{what}: pass {done:,} of {total:,}")

    def bytes_done(self, what: str) -> Any:
        """A callback (done, total or 0 where it is not known) for work through a file."""

        def show(done: int, total: int) -> None:
            self.bar(done / total if total else 0.0, f"{what}: {done:,}{f' of {total:,}' if total else ''} bytes")

        return show


def _table(title: str, columns: Sequence[tuple[str, str]], rows: Sequence[Sequence[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, box=box.SIMPLE_HEAD, title_justify="left")
    for name, justify in columns:
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=160)
    console.print(table)


def _finite(value: Any) -> Any:
    """The value with null for what JSON has no number for."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _emit(arguments: argparse.Namespace, result: dict[str, Any], lines: Sequence[tuple[str, Any]] = ()) -> None:
    """The result as JSON, or as aligned lines for a person."""
    if arguments.json:
        print(json.dumps(_finite(result), allow_nan=False))
        return
    width = max((len(name) for name, _ in lines), default=0)
    for name, value in lines:
        print(f"{name:<{width}}  {f'{value:,}' if isinstance(value, int) else value}")


def _print_scores(estimates: Sequence[Estimate]) -> None:
    from mezzotint.apps.charts import comparison

    rows = []
    for e in estimates:
        rows.append(
            (
                e.method,
                e.kind,
                f"{e.bpb:.4f}",
                f"{e.stderr_bpb:.4f}",
                f"{e.nats_per_token:.4f}",
                f"{e.tokens:,}",
                f"{e.bytes:,}",
                f"{e.bytes_lost:,}",
                f"{e.forward_passes:,}",
                f"{e.seconds:.1f}",
                comparison(e.kind)[1],
            )
        )
    names = ("method", "kind", "bits/byte", "± s.e.", "nats/token", "tokens", "bytes", "lost", "passes", "seconds")
    columns = [(n, "left" if n in ("method", "kind") else "right") for n in names]
    _table("", [*columns, ("comparable with autoregressive figures?", "left")], rows)


def _load(path: Path | None) -> Model:
    """A `.mzt` artifact, a run folder, an exported folder or a shipped model's name; the default one if None."""
    from mezzotint.pretrained import load

    return load(path)


def _run_data(run: Path, given: Path | None, needed: str | None) -> Dataset | None:
    """The data given, else the data the run was trained on. `needed`: what for, if it must be there."""
    from mezzotint.data.dataset import Dataset
    from mezzotint.training.checkpoint import read_run

    described = read_run(run)
    folder = given or Path(described.get("data_folder") or "")
    if given is None and (not described.get("data_folder") or not folder.is_dir()):
        if needed:
            raise DataError(f"the data that {run} was trained on is not at {folder}: name it with --data for {needed}")
        return None
    dataset = Dataset.open(folder)
    if dataset.tokenizer.sha256 != described["data"]["tokenizer_sha256"]:
        raise DataError(f"{folder} was prepared with another tokenizer than {run} was trained with")
    return dataset


def _same_tokenizer(model: Model, dataset: Dataset, path: Path) -> None:
    from mezzotint.data.tokenizer import check_same_tokenizer

    check_same_tokenizer(model, dataset, data_name=path)


def _run_prepare(arguments: argparse.Namespace, progress: _Progress) -> None:
    from mezzotint import pretrained
    from mezzotint.data.prepare import prepare

    result = prepare(
        arguments.sources,
        arguments.out,
        tokenizer=arguments.tokenizer and pretrained.tokenizer_of(arguments.tokenizer),
        vocab_size=arguments.vocab_size,
        val_fraction=arguments.val_fraction,
        val=arguments.val,
        text_field=arguments.text_field,
        seed=arguments.seed,
        progress=lambda what, seen: progress.bar(0.0, f"{what}: {seen:,} documents" if seen else what),
    )
    progress.close()
    if arguments.json:
        return _emit(arguments, result)
    columns = [
        ("split", "left"),
        *((n, "right") for n in ("documents", "tokens", "bytes", "not decoding to themselves")),
    ]
    rows = []
    for split in ("train", "val"):
        account = result[split]
        lost = account["not_round_trip"]
        note = "unknown" if lost is None else f"{lost:,} ({account['lost_bytes']:,} bytes lost)" if lost else "0"
        rows.append((split, *(f"{account[k]:,}" for k in ("documents", "tokens", "bytes")), note))
    _table(
        f"{arguments.out}: {result['vocab_size']:,} pieces, {result['bytes_per_token']:.3f} bytes/token", columns, rows
    )
    if files := result.get("files"):
        skipped = ", ".join(f"{count:,} {why}" for why, count in files["skipped"].items()) or "none"
        print(f"files read: {files['read']:,}; skipped: {skipped}; empty documents: {files['empty_documents']:,}")


def _changes(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings of `--change NAME=VALUE`, by the names of `TrainConfig`."""
    if arguments.change and not arguments.resume:
        raise ConfigError("--change is for --resume: without it, give the setting as an option")
    known = {item.name: item.default for item in dataclasses.fields(TrainConfig)}
    changes: dict[str, Any] = {}
    for change in arguments.change:
        name, sign, text = change.partition("=")
        name = name.replace("-", "_")
        if not sign or name not in known:
            raise ConfigError(f"--change takes NAME=VALUE with NAME a training setting, not {change!r}")
        kind = type(known[name])
        try:
            changes[name] = {"True": True, "False": False}[text.capitalize()] if kind is bool else kind(text)
        except (KeyError, ValueError) as error:
            raise ConfigError(f"--change {name}: {text!r} is not {kind.__name__}") from error
    return changes


def _train_configs(arguments: argparse.Namespace, tokenizer: Tokenizer) -> tuple[ModelConfig, TrainConfig]:
    """The preset's settings, or with `--resume` the run's own, changed by the options given."""
    train_changes = _settings(arguments, TrainConfig) | _changes(arguments)
    if "minutes" in train_changes:
        train_changes.setdefault("steps", 0)  # steps would have the last word
    if arguments.resume and (arguments.out / "config.json").exists():
        from mezzotint.training.checkpoint import read_run

        described = read_run(arguments.out)
        if tokenizer.sha256 != described["data"]["tokenizer_sha256"]:
            raise DataError(
                f"{arguments.data} was prepared with another tokenizer than {arguments.out} was trained with"
            )
        model, train = described["model"], described["train"]
        if arguments.preset is not None:
            model, train = preset(arguments.preset).model, preset(arguments.preset).train
            model = dataclasses.replace(model, vocab_size=tokenizer.vocab_size)
    else:
        chosen = preset(arguments.preset or DEFAULT_PRESET)
        model, train = dataclasses.replace(chosen.model, vocab_size=tokenizer.vocab_size), chosen.train
    return (
        dataclasses.replace(model, **_settings(arguments, ModelConfig)),
        dataclasses.replace(train, **train_changes),
    )


def _run_train(arguments: argparse.Namespace, progress: _Progress) -> None:
    from mezzotint.data.dataset import Dataset
    from mezzotint.training.run import train

    model, config = _train_configs(arguments, Dataset.open(arguments.data).tokenizer)
    first = int(os.environ.get("RANK", "0")) == 0
    if first and progress.console.is_terminal:
        progress.say(f"setting up {model.layers} layers x {model.width}; compiling can take a minute")
    result = train(
        arguments.data,
        arguments.out,
        model=model,
        config=config,
        resume=arguments.resume,
        changes=list(_changes(arguments)),
        progress=progress.training,
        warn=progress.say,
    )
    progress.close()
    if first:
        bpb = result["train_nelbo_bpb"]
        lines = [
            ("steps", result["steps"]),
            ("tokens", result["tokens"]),
            ("seconds", f"{result['seconds']:.1f} (+ {result['setup_seconds']:.1f} setting up)"),
            ("tokens/s", f"{result['tokens_per_second']:,.0f}"),
            ("parameters", result["parameters"]),
            ("peak memory", f"{result['peak_memory_bytes'] / 1e9:.2f} GB"),
            (
                "training NELBO",
                "none" if bpb is None else f"{bpb:.4f} bits/byte (last tenth of the run, training text)",
            ),
            ("checkpoint", result["final_checkpoint"]),
        ]
        _emit(arguments, result, lines)


def _run_pack(arguments: argparse.Namespace, progress: _Progress) -> None:
    from mezzotint.packing.pack import pack
    from mezzotint.training.checkpoint import load_run

    model = load_run(arguments.run_folder)
    dataset = _run_data(arguments.run_folder, arguments.data, "calibration")
    assert dataset is not None
    more = {k: getattr(arguments, k) for k in ("budget", "tolerance") if getattr(arguments, k) is not None}
    if arguments.sweep:
        if more or arguments.code or arguments.codec != "mezzotint":
            raise ConfigError("--sweep tries many tolerances of the codec mezzotint: leave out --budget, --tolerance, "
                              "--code and --codec")  # fmt: skip
        return _run_sweep(arguments, model, dataset, progress)
    if arguments.tokens is not None:
        raise ConfigError("--tokens says how much text --sweep scores: give both or neither")
    result = pack(
        model,
        dataset.split("train"),
        arguments.out,
        code=arguments.code,
        codec=arguments.codec,
        seed=arguments.seed,
        progress=progress.say,
        **more,
    )
    if result:
        _print_pack(arguments, arguments.out, result)


def _run_sweep(arguments: argparse.Namespace, model: Model, dataset: Dataset, progress: _Progress) -> None:
    from mezzotint.apps.charts import sweep_chart
    from mezzotint.packing.pack import sweep
    from mezzotint.scoring.likelihood import nelbo_by_window

    out: Path = arguments.out
    if out.is_dir():
        out = out / "sweep"
    elif not out.parent.is_dir():
        raise ConfigError(f"{out.parent}: no such folder to write {out.name}.csv to")
    windows = dataset.split("val").windows(model.config.sequence_length)
    tokens = arguments.tokens or 24_576
    points = sweep(
        model,
        dataset.split("train"),
        lambda candidate: nelbo_by_window(candidate, windows, tokens=tokens, seed=arguments.seed),
        seed=arguments.seed,
        progress=progress.say,
    )
    progress.close()
    if os.environ.get("RANK", "0") != "0":
        return
    table = out.with_name(out.name + ".csv")
    chart = out.with_name(out.name + ".png")
    text = [",".join(points[0]), *(",".join(f"{value:.10g}" for value in point.values()) for point in points)]
    atomic_write(table, "\n".join(text) + "\n")
    atomic_write(chart, sweep_chart(points))
    if not arguments.json:
        names = ("tolerance", "bytes", "bits/param", "NELBO, bits/byte", "cost", "± s.e.")
        rows = [
            (
                f"{p['tolerance']:g}",
                f"{p['bytes']:,}",
                f"{p['bits_per_parameter']:.3f}",
                f"{p['nelbo_bpb']:.5f}",
                f"{p['cost_bpb']:+.5f}",
                f"{p['cost_stderr_bpb']:.5f}",
            )
            for p in points
        ]
        _table("", [(n, "right") for n in names], rows)
    result = {"points": points, "table": str(table), "chart": str(chart)}
    _emit(arguments, result, [("table", table), ("chart", chart)])


def _print_pack(arguments: argparse.Namespace, path: Path, result: dict[str, Any]) -> None:
    left = result["budget_bytes"] - result["total_bytes"]
    lines = [
        ("artifact", f"{path}  {result['artifact_bytes']:,} bytes"),
        ("code", f"{result['code_bytes']:,} bytes"),
        ("total", f"{result['total_bytes']:,} of {result['budget_bytes']:,} bytes ({left:,} left)"),
        ("parameters", f"{result['parameters']:,} at {result['bits_per_parameter']:.3f} bits"),
        ("codes", f"{result['entropy_bits_per_code']:.3f} bits each, {result['pruned_codes']:,} dropped"),
        ("cost", f"{result['cost_nats_per_token']:.2g} nats a token, by divergence on calibration text"),
        ("verified", "reopened, every weight equal" if result["verified"] else "NO"),
    ]
    _emit(arguments, result, lines)


def _score(
    model: Model,
    windows: Windows,
    method: str,
    tokens: int | None,
    repeats: int | None,
    seed: int,
    progress: _Progress,
    order: str | None = None,
    journal: Path | None = None,
    attention: str | None = None,
    **nelbo: Any,
) -> Estimate:
    from mezzotint.scoring import likelihood

    watch = progress.passes(method)
    words: dict[str, Any] = {"tokens": tokens, "seed": seed, "journal": journal, "progress": watch}
    if method == "nelbo":
        return likelihood.nelbo(model, windows, repeats=repeats, **nelbo, **words)
    if method == "chain":
        return likelihood.chain_rule(model, windows, order=order or "left", attention=attention or "full", **words)
    function = {"causal": likelihood.causal, "reconstruction": likelihood.reconstruction_score}[method]
    return function(model, windows, tokens=tokens, seed=seed, progress=watch)


def _is_data(sources: Sequence[Path]) -> bool:
    """Whether what is to be scored is a prepared folder (or published shards) rather than text."""
    folder = sources[0]
    return len(sources) == 1 and folder.is_dir() and ((folder / "data.json").exists() or any(folder.glob("*.bin")))


def _windows(model: Model, arguments: argparse.Namespace) -> Windows:
    """Windows of a prepared folder's split, or of text, a document at a time."""
    length = model.config.sequence_length
    stride = getattr(arguments, "stride", None)
    if _is_data(arguments.data):
        from mezzotint.data.dataset import Dataset

        dataset = Dataset.open(arguments.data[0])
        _same_tokenizer(model, dataset, arguments.data[0])
        return dataset.split(arguments.split).windows(length, stride)
    from mezzotint.data.texts import TextWindows

    return cast("Windows", TextWindows(_texts(arguments), model.tokenizer, length, stride))


def _texts(arguments: argparse.Namespace) -> list[str]:
    from mezzotint.data.sources import documents

    return [text for source in arguments.data for text in documents(source)]


def _run_score(arguments: argparse.Namespace, progress: _Progress) -> None:
    model = _load(arguments.model)
    windows = _windows(model, arguments)
    methods = [arguments.method]
    if arguments.method == "all":
        causal = model.trained_causally
        methods = [m for m in METHODS if m != "causal" or causal]
    if arguments.order and "chain" not in methods:
        raise ConfigError("--order is the order of the chain rule: add --method chain")
    if arguments.attention and "chain" not in methods:
        raise ConfigError("--attention is that of the chain rule: add --method chain")
    if arguments.attention in ("causal", "block(1)"):
        raise ConfigError("next tokens, in one pass, are --method causal")
    if arguments.block_size is not None and "nelbo" not in methods:
        raise ConfigError("--block-size is that of the NELBO: add --method nelbo, or --attention to the chain rule")
    if arguments.journal and arguments.method not in ("nelbo", "chain"):
        raise ConfigError("--journal keeps one figure: add --method nelbo or --method chain")
    if (arguments.orders or arguments.order_lean) and "nelbo" not in methods:
        raise ConfigError("--orders and --order-lean are those of the NELBO: add --method nelbo")
    bounds = {"block_size": arguments.block_size, "orders": arguments.orders, "order_lean": arguments.order_lean}
    settings = (arguments.order, arguments.journal, arguments.attention)
    estimates: list[Estimate] = []
    failures: dict[str, str] = {}
    for method in methods:
        try:
            asked = (arguments.tokens, arguments.repeats, arguments.seed)
            estimates.append(_score(model, windows, method, *asked, progress, *settings, **bounds))
        except Interrupted:
            raise
        except MezzotintError as error:
            if len(methods) == 1:
                raise
            failures[method] = str(error)
    progress.close()
    for method, reason in failures.items():
        print(f"mezzotint: no figure for {method}: {reason}", file=sys.stderr)
    if not estimates:
        raise DataError("no method gave a figure")
    if arguments.json:
        result = {"results": [e.to_dict() for e in estimates], "model_sha256": model.sha256}
        result |= {"commit": model.info.get("commit")} | ({"failures": failures} if failures else {})
        return _emit(arguments, result)
    _print_scores(estimates)


def _run_compare(arguments: argparse.Namespace, progress: _Progress) -> None:
    from mezzotint.scoring.compare import compare, compare_documents

    a, b = _load(arguments.a), _load(arguments.b)
    words = {"method": arguments.method, "repeats": arguments.repeats, "seed": arguments.seed}
    words["progress"] = progress.passes("comparing")
    if _is_data(arguments.data):
        _windows(b, arguments)  # the second model's tokenizer is checked like the first's
        found = compare(a, b, _windows(a, arguments), tokens=arguments.tokens, **words)
    else:
        found = compare_documents(a, b, _texts(arguments), **words)
    progress.close()
    p = found.p_value
    verdict = "no difference shown" if p >= 0.01 else f"{'A' if found.difference_bpb > 0 else 'B'} is better"
    lines = [
        ("A", f"{found.a.bpb:.4f} ± {found.a.stderr_bpb:.4f} bits/byte ({found.a.kind}), {arguments.a}"),
        ("B", f"{found.b.bpb:.4f} ± {found.b.stderr_bpb:.4f} bits/byte ({found.b.kind}), {arguments.b}"),
        ("B - A", f"{found.difference_bpb:+.5f} ± {found.stderr_bpb:.5f} bits/byte, p = {p:.2g}: {verdict}"),
        ("over", f"{found.a.tokens:,} tokens, {found.a.bytes:,} bytes"),
    ]
    _emit(arguments, found.to_dict(), lines)


def _sampling_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    names = ("steps", "sampler", "temperature", "top_p", "no_repeat", "block", "entropy_budget", "remask", "order_noise",
             "attention")  # fmt: skip
    return {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}


@contextlib.contextmanager
def _watching(arguments: argparse.Namespace, progress: _Progress) -> Iterator[Any]:
    """With `--watch`, the canvas on standard error while it is revealed."""
    if not arguments.watch:
        yield None
        return
    from mezzotint.apps.watch import Watch

    with Watch(progress.console, pause=0.05) as watch:
        yield watch


def _run_sample(arguments: argparse.Namespace, progress: _Progress) -> None:
    from mezzotint.sampling.generate import sample

    model = _load(arguments.model)
    settings = _sampling_settings(arguments)
    words = {"prompt": arguments.prompt, "seed": arguments.seed, **settings}
    with _watching(arguments, progress) as watch:
        on_step = watch.canvas(model.tokenizer) if watch else None
        result = sample(model, arguments.n, arguments.length, on_step=on_step, **words)
    if arguments.json:
        return _emit(arguments, result.to_dict())
    for i, text in enumerate(result.texts):
        if len(result.texts) > 1:
            print(f"--- {i + 1}")
        print(text)
    progress.say(f"{result.forward_passes} forward passes, {result.seconds:.1f} s")


def _run_fill(arguments: argparse.Namespace, progress: _Progress) -> None:
    from mezzotint.sampling.infill import infill

    text = arguments.text
    if arguments.model is None and text.endswith(".mzt") and Path(text).is_file():
        raise ConfigError(f"{text} is a model: give the text to fill as well")
    if text == "-":
        try:
            text = sys.stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError("standard input is not UTF-8 text") from error
    model = _load(arguments.model)
    options = {"whole_words": arguments.words, "max_words": arguments.max_words, "regex": arguments.regex}
    options |= {"avoid": arguments.avoid, "n": arguments.n, "candidates": arguments.candidates}
    settings = _sampling_settings(arguments)
    if arguments.greedy:
        settings = {"temperature": 0.0, **settings}
    with _watching(arguments, progress) as watch:
        filled = infill(
            model,
            text,
            arguments.seed,
            on_step=watch.spans if watch else None,
            progress=None
            if watch
            else lambda done, of: progress.bar(done / of, f"gap {done:,} of {of:,}") if of > 1 else None,
            **options,
            **settings,
        )
    progress.close()
    if arguments.json:
        return _emit(arguments, filled.to_dict())
    sys.stdout.buffer.write(filled.text.encode() + (b"" if arguments.text == "-" else b"\n"))
    sys.stdout.flush()
    for number, gap in enumerate(filled.gaps if arguments.n > 1 else [], start=1):
        rows = [(a.text, f"{a.bits:.1f}", f"{a.probability:.1%}") for a in gap.alternatives]
        _table(f"gap {number}", [("text", "left"), ("bits", "right"), ("probability", "right")], rows)


def _run_inspect(arguments: argparse.Namespace, progress: _Progress) -> None:
    from mezzotint.packing.artifact import inspect_artifact

    looked = inspect_artifact(arguments.artifact)
    if arguments.json:
        return _emit(arguments, looked)
    columns = [("tensor", "left"), ("shape", "left"), ("codec", "left")]
    columns += [(n, "right") for n in ("bits/weight", "bytes", "zeros")]
    rows = [
        (
            row["name"],
            " x ".join(str(n) for n in row["shape"]),
            row["codec"],
            f"{row['bits_per_weight']:.2f}",
            f"{row['bytes']:,}",
            f"{row['zeros']:.1%}",
        )
        for row in looked["tensors"]
    ]
    _table(f"{looked['file']}: {looked['bytes']:,} bytes, {looked['parameters']:,} parameters", columns, rows)
    lines = [(name, f"{size:,} bytes") for name, size in looked["sections"].items()]
    lines += [("bits per parameter", f"{looked['bits_per_parameter']:.3f}"), ("sha256", looked["sha256"])]
    lines += [("checked", ", ".join(looked["checks"]))]
    _emit(arguments, looked, lines)


def _run_export(arguments: argparse.Namespace, progress: _Progress) -> None:
    from mezzotint.packing.safetensors import export_folder

    result = export_folder(_load(arguments.model), arguments.out)
    _emit(
        arguments,
        result,
        [("exported", f"{result['folder']}  {result['bytes']:,} bytes: {', '.join(result['files'])}")],
    )


def _run_import(arguments: argparse.Namespace, progress: _Progress) -> None:
    from mezzotint.packing.pack import store
    from mezzotint.packing.safetensors import import_folder

    _print_pack(arguments, arguments.out, store(import_folder(arguments.folder), arguments.out))


def _run_submit(arguments: argparse.Namespace, progress: _Progress) -> None:
    from mezzotint.apps.submission import submit

    dataset = _run_data(arguments.run_folder, arguments.data, "the record's score")
    words = {k: getattr(arguments, k) for k in ("name", "author", "github_id", "blurb") if getattr(arguments, k)}
    result = submit(
        arguments.run_folder,
        arguments.artifact,
        arguments.out,
        dataset=dataset,
        tokens=arguments.tokens,
        progress=progress.say,
        **words,
    )
    lines = [
        ("record", result["folder"]),
        ("artifact", f"{result['artifact_bytes']:,} bytes"),
        ("code", f"{result['code_bytes']:,} bytes"),
        ("total", f"{result['total_bytes']:,} of {result['budget_bytes']:,} bytes"),
        ("score", f"{result['val_bpb']:.4f} bits/byte ({result['val_bpb_kind']})"),
        ("files", ", ".join(result["files"])),
    ]
    _emit(arguments, result, lines)


def _run_report(arguments: argparse.Namespace, progress: _Progress) -> None:
    from mezzotint.apps.report import report

    result = report(
        arguments.run_folder,
        arguments.out,
        artifact=arguments.model,
        dataset=_run_data(arguments.run_folder, arguments.data, None),
        tokens=arguments.tokens,
        progress=progress.say,
    )
    _emit(arguments, result, [("report", result["file"]), ("holds", ", ".join(result["sections"]))])


def _run_compress(arguments: argparse.Namespace, progress: _Progress) -> None:
    from mezzotint.compression.container import STANDARD, compress_file

    model = _load(arguments.model)
    watch = progress.bytes_done("compressing")
    result = compress_file(arguments.file, arguments.out, model, check=arguments.check, progress=watch)
    progress.close()
    before, after = result.input_bytes, result.output_bytes
    figures = {**dataclasses.asdict(result), "bytes": before, "compressed_bytes": after, "bpb": result.bpb}
    ratio = f"{before / after:.2f} times smaller, {result.bpb:.3f} bits/byte" if before else "empty input"
    checked = ", restored and compared" if result.checked else ""
    if arguments.out == STANDARD:
        progress.say(f"compressed  {before:,} -> {after:,} bytes ({ratio}){checked}")
    else:
        _emit(arguments, figures, [("compressed", f"{before:,} -> {after:,} bytes ({ratio}){checked}")])


def _run_decompress(arguments: argparse.Namespace, progress: _Progress) -> None:
    from mezzotint.compression.container import STANDARD, decompress_file

    watch = progress.bytes_done("decompressing")
    size = decompress_file(arguments.file, arguments.out, _load(arguments.model), progress=watch)
    progress.close()
    if arguments.out == STANDARD:
        progress.say(f"restored  {size:,} bytes, checked")
    else:
        _emit(arguments, {"bytes": size}, [("restored", f"{arguments.out}  {size:,} bytes, checked")])


def _run_serve(arguments: argparse.Namespace, progress: _Progress) -> None:
    try:
        from mezzotint.apps.serve import serve
    except ImportError as error:
        raise ConfigError("serving a page needs more packages: pip install 'mezzotint[serve]'") from error
    model = _load(arguments.model)
    progress.say(f"http://{arguments.host}:{arguments.port}  (Ctrl-C ends it)")
    serve(
        model, host=arguments.host, port=arguments.port, name=arguments.model.name if arguments.model else DEFAULT_MODEL
    )


DEMO_TEXT = "def ____(self, name):\n    return self.name"
SHIPPED_TEXT = "The old house stood at the end of the ____, and nobody had lived in it for years."


def _fill_with_shipped(step: Callable[[str], None]) -> dict[str, str] | None:
    """What the shipped model makes of a sentence with a gap; None in an installation without it."""
    from mezzotint.pretrained import load, shipped_models
    from mezzotint.sampling.infill import fill

    if DEFAULT_MODEL not in shipped_models():
        return None
    step(f"the shipped model, {DEFAULT_MODEL}, fills a gap: {SHIPPED_TEXT}")
    text = fill(load(), SHIPPED_TEXT, seed=0)
    step(text)
    return {"model": DEFAULT_MODEL, "text": text}


def _run_demo(arguments: argparse.Namespace, progress: _Progress) -> None:
    from mezzotint.apps.report import report
    from mezzotint.data.dataset import Dataset
    from mezzotint.data.prepare import prepare
    from mezzotint.packing.artifact import open_artifact
    from mezzotint.packing.pack import pack
    from mezzotint.sampling.generate import sample
    from mezzotint.sampling.infill import fill
    from mezzotint.training.checkpoint import load_run
    from mezzotint.training.run import train

    out: Path = arguments.out
    if not arguments.minutes > 0:
        raise ConfigError(f"--minutes must be positive, not {arguments.minutes}")
    mark = out / "demo.json"
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not mark.is_file())):
        raise ConfigError(f"{out} already holds other files; name another folder with --out, or remove it")
    for old in ("data", "run"):  # an earlier demo's, as the mark says
        shutil.rmtree(out / old, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    atomic_write(mark, json.dumps({"finished": False}))
    started = time.monotonic()

    def step(text: str) -> None:
        progress.close()
        progress.say(f"[{time.monotonic() - started:5.0f} s] {text}")

    shown = _fill_with_shipped(step)
    step("preparing this Python's library sources, and a tokenizer for them")
    prepared = prepare(["stdlib"], out / "data")
    chosen = preset("tiny")
    model_config = dataclasses.replace(chosen.model, vocab_size=prepared["vocab_size"])
    step(f"training {arguments.minutes:g} minutes")
    trained = train(
        out / "data",
        out / "run",
        model=model_config,
        # Compiling takes longer than it saves in a run of minutes.
        config=dataclasses.replace(chosen.train, minutes=arguments.minutes, compile=False),
        progress=progress.training,
        warn=progress.say,
    )
    step("packing and verifying")
    dataset = Dataset.open(out / "data")
    packed = pack(load_run(out / "run"), dataset.split("train"), out / "model.mzt")
    model = open_artifact(out / "model.mzt")
    windows = dataset.split("val").windows(model.config.sequence_length)
    step("scoring the artifact")
    plan = [("nelbo", 32_768), ("chain", 2_048), ("reconstruction", 16_384)]
    if chosen.train.causal_share:
        plan.insert(2, ("causal", 32_768))
    estimates = [_score(model, windows, method, tokens, 8, 0, progress) for method, tokens in plan]
    step("sampling and filling")
    drawn = sample(model, 2, 64, seed=0)
    filled = fill(model, DEMO_TEXT, seed=0)
    step("writing the report")
    words = {"artifact": out / "model.mzt", "dataset": dataset, "estimates": estimates, "tokens": 16_384}
    page = report(out / "run", out / "report.html", samples=2, **words)
    step("done")
    result = {
        "prepare": prepared,
        "train": trained,
        "pack": packed,
        "score": {"results": [e.to_dict() for e in estimates], "model_sha256": model.sha256},
        "sample": drawn.to_dict(),
        "fill": {"text": filled},
        "shipped": shown,
        "report": page,
        "seconds": time.monotonic() - started,
    }
    atomic_write(mark, json.dumps({"finished": True, **_finite(result)}, indent=1))
    if arguments.json:
        return _emit(arguments, result)
    _print_pack(arguments, out / "model.mzt", packed)
    _print_scores(estimates)
    if shown:
        print(
            f"a gap filled by the shipped model, {shown['model']}:\n  | {SHIPPED_TEXT}\nbecomes\n  | {shown['text']}\n"
        )
    print("two texts from nothing:")
    for text in drawn.texts:
        print("  | " + text.replace("\n", "\n  | "))
    print(f"\na gap filled:\n  | {DEMO_TEXT}".replace("\n    ", "\n  |     "))
    print(f"becomes\n  | {filled}".replace("\n    ", "\n  |     "))
    print(f"\nreport: {page['file']}   artifact: {out / 'model.mzt'}   all in {result['seconds']:.0f} s")


def _one_line(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full: could not write {error.filename or 'the output'}; free some space and run again"
    if error.errno == errno.EFBIG:
        return f"the file size limit was reached writing {error.filename or 'the output'}"
    reason = error.strerror or str(error) or type(error).__name__
    return f"{error.filename}: {reason}" if error.filename else reason


def _with_dashes(words: Sequence[str]) -> list[str]:
    """`--matrix_lr` is accepted for `--matrix-lr`. Whatever cannot be an option's name, such as text, stays as it is."""
    end = words.index("--") if "--" in words else len(words)
    names = re.compile(r"\A--[a-z][a-z0-9]*([_-][a-z0-9]+)+(?==|\Z)")
    return [names.sub(lambda m: m[0].replace("_", "-"), w) if i < end else w for i, w in enumerate(words)]


def _drop_output() -> None:
    """Let what is still buffered for standard output go nowhere, so that nothing fails on the way out."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def _processes(arguments: argparse.Namespace, progress: _Progress) -> Iterator[None]:
    """Under torchrun: let the processes share what can be shared, and the first alone print. `train` sees to itself."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or arguments.run is _run_train:
        yield
        return
    if arguments.run not in (_run_score, _run_compare, _run_pack):
        raise ConfigError("torchrun is for train, pack, score and compare; run this command by itself")
    from mezzotint.distributed import process_group

    with process_group("cpu") as (rank, _, _), contextlib.ExitStack() as stack:
        if rank:
            progress.quiet = True
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        yield


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    for stream in (sys.stdout, sys.stderr):  # a terminal that cannot show a character gets a substitute, not an error
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        arguments = build_parser().parse_args(_with_dashes(sys.argv[1:] if argv is None else argv))
    except SystemExit as stop:
        return int(stop.code or 0)
    progress = _Progress()
    try:
        with _processes(arguments, progress):
            arguments.run(arguments, progress)
        sys.stdout.flush()
        return 0
    except MezzotintError as error:
        message, status = " ".join(str(error).split()), 130 if type(error).__name__ == "Interrupted" else 2
    except BrokenPipeError:  # whoever read the output has seen enough
        _drop_output()
        return 0
    except OSError as error:
        message, status = _one_line(error), 2
        _drop_output()
    except (MemoryError, RuntimeError) as error:
        # PyTorch reports exhausted memory of every device as a RuntimeError; any other is a bug and shows its traceback.
        if (
            not isinstance(error, MemoryError)
            and "out of memory" not in str(error)
            and "can't allocate" not in str(error)
        ):
            raise
        message, status = "not enough memory: use a smaller --micro-batch, model or --length", 2
    except KeyboardInterrupt:
        message, status = "stopped", 130
    finally:
        progress.close()
    if os.environ.get("RANK", "0") == "0" or status != 2:  # under torchrun one process says it
        print(f"mezzotint: {message}", file=sys.stderr)
    return status

"""The commands that make a run and tell of it: `prepare`, `train`, `report`.

Knows nothing of how anything is computed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mezzotint.cli.arguments import add_out, add_preset_settings, add_ruled, add_run, describe, named, settings
from mezzotint.cli.console import Display, emit, table
from mezzotint.cli.inputs import load_model, run_data
from mezzotint.cli.processes import first, several
from mezzotint.cli.streams import input_file, output_file
from mezzotint.config import PRESETS, ModelConfig, Rule, TrainConfig, fine_tuning, preset
from mezzotint.errors import ConfigError

if TYPE_CHECKING:
    from mezzotint.data.tokenizer import Tokenizer
    from mezzotint.network.model import Model

DEFAULT_PRESET, AUTO = "small", "auto"


def add_prepare_arguments(parser: argparse.ArgumentParser) -> None:
    describe(
        parser,
        "A source is a file of text (.txt, .md, source code: one document), .jsonl, .csv, .tsv (each also .gz or "
        ".zst) or .parquet, a folder of these, - (standard input), stdlib (this Python's own library), "
        "hf:OWNER/NAME[:CONFIG][:SPLIT] (a dataset of the Hugging Face Hub), or fineweb:sp1024[:SHARDS] (the "
        "challenge's published shards).",
    )
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="file, folder, -, stdlib, hf:OWNER/NAME...")
    add_out(parser, "DATA", "new folder for the shards", named)
    parser.add_argument(
        "--tokenizer",
        metavar="FILE|MODEL",
        help="a SentencePiece .model, a tokenizer.json, or a model's own (-: standard input)",
    )
    parser.add_argument("--text-field", default="text", metavar="A.B", help="column or JSON key of the text [text]")
    add_ruled(parser, "--vocab-size", "pieces to train a tokenizer of [16384, or what fits]", metavar="N")
    add_ruled(parser, "--val-fraction", "share of documents held out [0.02]", metavar="F")
    parser.add_argument("--val", nargs="+", metavar="SOURCE", help="validation sources, instead of a share")
    add_ruled(parser, "--seed", "seed of the held-out choice [0]", default=0)


def run_prepare(arguments: argparse.Namespace, display: Display) -> None:
    from mezzotint import pretrained
    from mezzotint.data.prepare import prepare
    from mezzotint.data.sources import files_in_words

    tokenizer = None
    if arguments.tokenizer is not None:
        with input_file(Path(arguments.tokenizer)) as file:
            tokenizer = pretrained.tokenizer_of(file if arguments.tokenizer == "-" else arguments.tokenizer)
    result = prepare(
        arguments.sources,
        arguments.out,
        tokenizer=tokenizer,
        vocab_size=arguments.vocab_size,
        val_fraction=arguments.val_fraction,
        val=arguments.val,
        text_field=arguments.text_field,
        seed=arguments.seed,
        progress=display.bar_of(),
    )
    display.close()
    if arguments.json:
        return emit(arguments, result)
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
    table(
        f"{arguments.out}: {result['vocab_size']:,} pieces, {result['bytes_per_token']:.3f} bytes/token", columns, rows
    )
    if files := result.get("files"):
        print(files_in_words(files))


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    describe(
        parser,
        "Writes a run folder with config, metrics, log and checkpoints. Under torchrun every process takes its share "
        "of the batch. Any setting of the preset can be changed.",
    )
    parser.add_argument("data", type=Path, metavar="DATA", help="prepared folder; with --extend a run")
    add_out(parser, "RUN", "run folder to write", named)
    parser.add_argument(
        "--preset",
        choices=[AUTO, *sorted(PRESETS)],
        help=f"settings to start from; {AUTO}: of {DEFAULT_PRESET}, in the size and with the dropout that suit the run's length "
        f"and the text's [{DEFAULT_PRESET}; with --resume the run's own]",
    )
    parser.add_argument(
        "--init",
        type=Path,
        metavar="MODEL",
        help="start from a model's weights: its shape, what it has learnt to do, and rates for fine-tuning",
    )
    parser.add_argument(
        "--extend",
        action="store_true",
        help="go on with a finished run from before its warm-down, for so many more --minutes or --steps, as RUN",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the newest valid checkpoint of RUN, with its settings"
    )
    parser.add_argument(
        "--change",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="with --resume: go on with another value of a training setting; may be repeated, and is logged",
    )
    add_preset_settings(parser, TrainConfig)
    add_preset_settings(parser, ModelConfig)


def run_train(arguments: argparse.Namespace, display: Display) -> None:
    from mezzotint.data.dataset import Dataset
    from mezzotint.training.run import train

    init = None
    if arguments.extend:
        _extend(arguments)
    if arguments.init is not None:
        if arguments.resume or arguments.preset is not None:
            raise ConfigError(
                "--init says where a new run starts and what shape it has: leave out --resume and --preset"
            )
        init = load_model(arguments.init)
    dataset = Dataset.open(arguments.data)
    model, config = train_configs(arguments, dataset.tokenizer, init, len(dataset.split("train")))
    if first() and arguments.preset == AUTO:
        size = f"{model.layers} layers x {model.width}, {config.batch} windows a step, dropout {config.dropout:g}"
        display.say(f"preset {AUTO}: {size}")
        if config.steps and not settings(arguments, TrainConfig).get("steps"):
            often = config.steps * config.batch * model.sequence_length / len(dataset.split("train"))
            display.say(
                f"the run ends at step {config.steps:,}, when the text is read {often:.0f} times: more would not help"
            )
    if first() and display.console.is_terminal:
        display.say(f"setting up {model.layers} layers x {model.width}")
    result = train(
        arguments.data,
        arguments.out,
        model=model,
        config=config,
        resume=arguments.resume,
        changes=list(_changes(arguments)),
        init=init,
        progress=display.training,
        warn=display.say,
    )
    display.close()
    if first():
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
            *_validation_lines(result),
            ("checkpoint", result["final_checkpoint"]),
        ]
        emit(arguments, result, lines)


def _validation_lines(result: dict[str, Any]) -> list[tuple[str, str]]:
    """The last validation, and the best one where that is another."""
    if result["best"] is None:
        return []

    def figures(part: dict[str, Any]) -> str:
        causal = part["val_causal_bpb"]
        return f"{part['val_nelbo_bpb']:.4f} bits/byte (NELBO)" + (f", {causal:.4f} (causal)" if causal else "")

    lines = [("validation", figures(result))]
    if result["best"]["step"] != result["steps"]:
        early = " (ended early)" if result["ended_early"] else ""
        lines.append(("best", f"{figures(result['best'])} at step {result['best']['step']:,}{early}"))
        if result["best_checkpoint"]:
            lines.append(("best checkpoint", result["best_checkpoint"]))
    return lines


def _extend(arguments: argparse.Namespace) -> None:
    """Make of `--extend` a run to resume: a copy of what it was before its warm-down, and the longer time it gets."""
    from mezzotint.training.checkpoint import extend_run, read_run

    if arguments.resume or arguments.init is not None or arguments.preset is not None:
        raise ConfigError("--extend goes on with the run as it is: leave out --resume, --init and --preset")
    if several():
        raise ConfigError("--extend is for one process; stop it once it trains, and go on with torchrun and --resume")
    given, run = settings(arguments, TrainConfig), arguments.data
    by_steps = "steps" in given
    if by_steps == ("minutes" in given):
        raise ConfigError("--extend needs to know how much longer: give --minutes or --steps")
    if (read_run(run)["train"].steps > 0) != by_steps:
        raise ConfigError(f"{run} is counted by {'minutes' if by_steps else 'steps'}: say so how much longer")
    arguments.data = Path(read_run(run)["data_folder"])
    state = extend_run(run, arguments.out)
    if by_steps:
        arguments.set_steps += state["step"]
    else:
        arguments.set_minutes += state["seconds"] / 60
    arguments.resume = True


def _changes(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings of `--change NAME=VALUE`, by the names of `TrainConfig`."""
    if arguments.change and not arguments.resume:
        raise ConfigError("--change is for --resume: without it, give the setting as an option")
    known: dict[str, Rule] = {item.name: item.metadata["rule"] for item in dataclasses.fields(TrainConfig)}
    changes: dict[str, Any] = {}
    for change in arguments.change:
        name, sign, text = change.partition("=")
        name = name.replace("-", "_")
        if not sign or name not in known:
            raise ConfigError(f"--change takes NAME=VALUE with NAME a training setting, not {change!r}")
        changes[name] = known[name].parse(f"--change {name}", text)
    return changes


def train_configs(
    arguments: argparse.Namespace, tokenizer: Tokenizer, init: Model | None = None, text_tokens: int = 0
) -> tuple[ModelConfig, TrainConfig]:
    """The preset's settings, or with `--resume` the run's own, or those for fine-tuning, changed by the options given.

    text_tokens: of the training text, by which the preset `auto` chooses; 0: unknown.
    """
    train_changes = settings(arguments, TrainConfig) | _changes(arguments)
    if "minutes" in train_changes and arguments.preset != AUTO:  # which may have steps for them
        train_changes.setdefault("steps", 0)  # steps would have the last word
    if arguments.resume and (arguments.out / "config.json").exists():
        from mezzotint.data.tokenizer import check_same_tokenizer
        from mezzotint.training.checkpoint import read_run

        run_config = read_run(arguments.out)
        same = (run_config["data"]["tokenizer_sha256"], tokenizer.sha256)
        check_same_tokenizer(*same, arguments.out, arguments.data)
        model, train = run_config["model"], run_config["train"]
        if arguments.preset is not None:
            model, train = _preset(arguments.preset, tokenizer, train_changes, text_tokens)
    elif init is not None:
        model, train = init.config, fine_tuning(init.info.get("train"))
    else:
        model, train = _preset(arguments.preset or DEFAULT_PRESET, tokenizer, train_changes, text_tokens)
    return (dataclasses.replace(model, **settings(arguments, ModelConfig)), dataclasses.replace(train, **train_changes))


def _preset(
    name: str, tokenizer: Tokenizer, changes: dict[str, Any], text_tokens: int
) -> tuple[ModelConfig, TrainConfig]:
    """A preset's settings for a tokenizer; `auto`'s for the run's length, which is among the changes, and the text's."""
    if name == AUTO:
        from mezzotint.distributed import choose_device
        from mezzotint.training.automatic import automatic

        asked = dataclasses.replace(TrainConfig(), **changes)
        device, batch = choose_device(asked.device).type, changes.get("batch")
        chosen = automatic(text_tokens, tokenizer.vocab_size, asked, device, batch)
    else:
        chosen = preset(name)
    return dataclasses.replace(chosen.model, vocab_size=tokenizer.vocab_size), chosen.train


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument("--model", type=Path, metavar="MODEL.mzt", help="also show this artifact's bytes and figures")
    parser.add_argument(
        "--data", type=Path, metavar="DATA", help="[the data the run was trained on, if it is still there]"
    )
    add_ruled(parser, "--tokens", "score about N tokens [32768]", metavar="N", default=32_768)
    add_out(parser, "FILE.html", "file to write")


def run_report(arguments: argparse.Namespace, display: Display) -> None:
    from mezzotint.apps.report import report

    with output_file(arguments.out) as out, contextlib.ExitStack() as stack:
        result = report(
            arguments.run_folder,
            out,
            artifact=arguments.model and stack.enter_context(input_file(arguments.model)),
            dataset=run_data(arguments.run_folder, arguments.data, None),
            tokens=arguments.tokens,
            progress=display.say,
        )
    result["file"] = str(arguments.out)
    emit(arguments, result, [("report", result["file"]), ("holds", ", ".join(result["sections"]))])

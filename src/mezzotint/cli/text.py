"""The commands that read and write text and bytes: `sample`, `fill`, `compress`, `decompress`, `serve`.

Knows nothing of how tokens are drawn or coded.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from mezzotint.cli.arguments import (
    DEFAULT_MODEL,
    add_foreign,
    add_model,
    add_ruled,
    add_sampling,
    describe,
    sampling_settings,
)
from mezzotint.cli.console import Display, emit, table, watching
from mezzotint.cli.inputs import load_model
from mezzotint.cli.streams import read_text, to_standard
from mezzotint.errors import ConfigError


def add_sample_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser, optional=True)
    add_foreign(parser)
    add_ruled(parser, "-n", "number of texts [1]", default=1)
    add_ruled(parser, "--length", "tokens [what the window holds behind the prompt]", metavar="L")
    parser.add_argument("--prompt", default="", help="text to begin with; - reads standard input")
    add_sampling(parser)


def run_sample(arguments: argparse.Namespace, display: Display) -> None:
    from mezzotint.sampling.generate import sample

    model = load_model(arguments.model, arguments)
    settings = sampling_settings(arguments)
    options = {"prompt": read_text(arguments.prompt), "seed": arguments.seed, **settings}
    with watching(arguments, display) as watch:
        on_step = watch.canvas(model.tokenizer) if watch else None
        result = sample(model, arguments.n, arguments.length, on_step=on_step, **options)
    if arguments.json:
        return emit(arguments, result.to_dict())
    for i, text in enumerate(result.texts):
        if len(result.texts) > 1:
            print(f"--- {i + 1}")
        print(text)
    display.say(f"{result.forward_passes} forward passes, {result.seconds:.1f} s")


def add_fill_arguments(parser: argparse.ArgumentParser) -> None:
    describe(
        parser,
        "____ (four or more underscores) is a gap of unknown length, [MASK*8] exactly 8 tokens. A backslash before "
        "one makes it plain text. All other text comes back byte for byte. Many texts are tried for each gap, and the "
        "one is taken with which the whole is likeliest; with an option of sampling, what is drawn.",
    )
    add_model(parser, optional=True)
    add_foreign(parser)
    parser.add_argument("text", metavar="TEXT", help="text with gaps; - reads standard input")
    add_ruled(parser, "--n", "answers to show for each gap, ranked [1]", metavar="N", default=1, rule="answers")
    add_ruled(parser, "--candidates", "texts to try for each gap, about [64]", metavar="K")
    parser.add_argument("--words", action="store_true", help="whole words only: no gap begins or ends inside a word")
    add_ruled(parser, "--max-words", "at most so many words in a gap", metavar="N")
    parser.add_argument("--regex", metavar="PATTERN", help="what a gap's text must match as a whole (extra `regex`)")
    parser.add_argument("--avoid", action="append", default=[], metavar="WORD", help="no gap holds it; may be repeated")
    parser.add_argument("--greedy", action="store_true", help="the surest token first, one text for each length")
    add_sampling(parser)


def run_fill(arguments: argparse.Namespace, display: Display) -> None:
    from mezzotint.sampling.infill import infill

    text = arguments.text
    if arguments.model is None and text.endswith(".mzt") and Path(text).is_file():
        raise ConfigError(f"{text} is a model: give the text to fill as well")
    text = read_text(text)
    model = load_model(arguments.model, arguments)
    options = {"whole_words": arguments.words, "max_words": arguments.max_words, "regex": arguments.regex}
    options |= {"avoid": arguments.avoid, "n": arguments.n, "candidates": arguments.candidates}
    settings = sampling_settings(arguments)
    if arguments.greedy:
        settings = {"temperature": 0.0, **settings}
    bar = display.bar_of()
    with watching(arguments, display) as watch:
        filled = infill(
            model,
            text,
            arguments.seed,
            on_step=watch.spans if watch else None,
            progress=None if watch else lambda told: bar(told) if told.total > 1 else None,
            **options,
            **settings,
        )
    display.close()
    if arguments.json:
        return emit(arguments, filled.to_dict())
    sys.stdout.buffer.write(filled.text.encode() + (b"" if arguments.text == "-" else b"\n"))
    sys.stdout.flush()
    for number, gap in enumerate(filled.gaps if arguments.n > 1 else [], start=1):
        rows = [(a.text, f"{a.bits:.1f}", f"{a.probability:.1%}") for a in gap.alternatives]
        table(f"gap {number}", [("text", "left"), ("bits", "right"), ("probability", "right")], rows)


def _add_files(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="file to read (-: standard input)")
    parser.add_argument(
        "-o", "--out", type=Path, required=True, metavar="FILE", help="file to write (-: standard output)"
    )


def _add_model_option(parser: argparse.ArgumentParser) -> None:
    help = f"a .mzt artifact, a run folder or a shipped model's name [the shipped {DEFAULT_MODEL}]"
    parser.add_argument("--model", type=Path, metavar="MODEL|RUN", help=help)


def add_compress_arguments(parser: argparse.ArgumentParser) -> None:
    _add_files(parser)
    parser.add_argument("--check", action="store_true", help="restore the result and compare before it appears")
    _add_model_option(parser)


def run_compress(arguments: argparse.Namespace, display: Display) -> None:
    from mezzotint.compression.container import compress_file

    model = load_model(arguments.model)
    watch = display.bar_of("compressing")
    result = compress_file(arguments.file, arguments.out, model, check=arguments.check, progress=watch)
    display.close()
    before, after = result.input_bytes, result.output_bytes
    figures = {**dataclasses.asdict(result), "bytes": before, "compressed_bytes": after, "bpb": result.bpb}
    ratio = f"{before / after:.2f} times smaller, {result.bpb:.3f} bits/byte" if before else "empty input"
    checked = ", restored and compared" if result.checked else ""
    emit(arguments, figures, [("compressed", f"{before:,} -> {after:,} bytes ({ratio}){checked}")])


def add_decompress_arguments(parser: argparse.ArgumentParser) -> None:
    _add_files(parser)
    _add_model_option(parser)


def run_decompress(arguments: argparse.Namespace, display: Display) -> None:
    from mezzotint.compression.container import decompress_file

    watch = display.bar_of("decompressing")
    size = decompress_file(arguments.file, arguments.out, load_model(arguments.model), progress=watch)
    display.close()
    where = "" if to_standard(arguments) else f"{arguments.out}  "
    emit(arguments, {"bytes": size}, [("restored", f"{where}{size:,} bytes, checked")])


def add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser, optional=True)
    add_foreign(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on [127.0.0.1: this machine only]")
    add_ruled(parser, "--port", "[8000]", default=8000)


def run_serve(arguments: argparse.Namespace, display: Display) -> None:
    try:
        from mezzotint.apps.serve import serve
    except ImportError as error:
        raise ConfigError("serving a page needs more packages: pip install 'mezzotint[serve]'") from error
    from mezzotint.sampling.infill import check_fills

    model = load_model(arguments.model, arguments)
    check_fills(model)
    display.say(f"http://{arguments.host}:{arguments.port}  (Ctrl-C ends it)")
    serve(
        model, host=arguments.host, port=arguments.port, name=arguments.model.name if arguments.model else DEFAULT_MODEL
    )

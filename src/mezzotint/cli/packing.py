"""The commands about files of models: `pack`, `inspect`, `export`, `import`, `submit`.

Knows nothing of what is in them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mezzotint.cli.arguments import add_model, add_out, add_ruled, add_run, describe, named
from mezzotint.cli.console import Display, emit, table
from mezzotint.cli.inputs import load_model, run_data
from mezzotint.cli.processes import first
from mezzotint.cli.streams import STANDARD, input_file, input_folder, output_file, output_folder
from mezzotint.errors import ConfigError
from mezzotint.files import atomic_write

if TYPE_CHECKING:
    from mezzotint.data.dataset import Dataset
    from mezzotint.network.model import Model


def add_pack_arguments(parser: argparse.ArgumentParser) -> None:
    describe(parser, "The file is reopened and every weight compared before success is reported.")
    add_run(parser)
    add_out(parser, "MODEL.mzt", "file to write (-: standard output)")
    add_ruled(parser, "--budget", "decimal bytes in all, code included [the challenge's cap]", metavar="BYTES")
    parser.add_argument(
        "--code", type=Path, nargs="*", default=[], metavar="FILE", help="code files that count as well"
    )
    parser.add_argument("--codec", default="mezzotint", choices=("mezzotint", "int6", "reference"), help="[mezzotint]")
    parser.add_argument("--data", type=Path, metavar="DATA", help="calibration text [the data the run was trained on]")
    add_ruled(parser, "--tolerance", "measured cost not worth more bytes, nats a token [0.001]", metavar="NATS")
    add_ruled(parser, "--seed", "seed of the calibration masks [0]", default=0)
    parser.add_argument(
        "--sweep",
        action="store_true",
        help="write no artifact but a table and a plot of bytes against NELBO: OUT.csv, OUT.png",
    )
    add_ruled(parser, "--tokens", "with --sweep: score about N validation tokens [24576]", metavar="N")


def run_pack(arguments: argparse.Namespace, display: Display) -> None:
    from mezzotint.packing.pack import pack
    from mezzotint.training.checkpoint import load_run

    model = load_run(arguments.run_folder)
    dataset = run_data(arguments.run_folder, arguments.data, "calibration")
    assert dataset is not None
    more = {k: getattr(arguments, k) for k in ("budget", "tolerance") if getattr(arguments, k) is not None}
    if arguments.sweep:
        if more or arguments.code or arguments.codec != "mezzotint":
            raise ConfigError("--sweep tries many tolerances of the codec mezzotint: leave out --budget, --tolerance, "
                              "--code and --codec")  # fmt: skip
        return _sweep(arguments, model, dataset, display)
    if arguments.tokens is not None:
        raise ConfigError("--tokens says how much text --sweep scores: give both or neither")
    with output_file(arguments.out) as out:
        result = pack(
            model,
            dataset.split("train"),
            out,
            code=arguments.code,
            codec=arguments.codec,
            seed=arguments.seed,
            progress=display.say,
            **more,
        )
    if result:
        print_pack(arguments, arguments.out, result)


def _sweep(arguments: argparse.Namespace, model: Model, dataset: Dataset, display: Display) -> None:
    from mezzotint.apps.charts import sweep_chart
    from mezzotint.packing.pack import sweep
    from mezzotint.scoring.likelihood import nelbo_by_window

    out: Path = arguments.out
    if out == STANDARD:
        raise ConfigError("--sweep writes two files: name them with --out, which cannot be -")
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
        progress=display.say,
    )
    display.close()
    if not first():
        return
    text = [",".join(points[0]), *(",".join(f"{value:.10g}" for value in point.values()) for point in points)]
    numbers, chart = out.with_name(out.name + ".csv"), out.with_name(out.name + ".png")
    atomic_write(numbers, "\n".join(text) + "\n")
    atomic_write(chart, sweep_chart(points))
    if not arguments.json:
        _print_sweep(points)
    result = {"points": points, "table": str(numbers), "chart": str(chart)}
    emit(arguments, result, [("table", numbers), ("chart", chart)])


def _print_sweep(points: Sequence[dict[str, float]]) -> None:
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
    table("", [(n, "right") for n in names], rows)


def print_pack(arguments: argparse.Namespace, path: Path, result: dict[str, Any]) -> None:
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
    emit(arguments, result, lines)


def add_inspect_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", type=Path, metavar="MODEL.mzt", help="artifact (-: standard input)")


def run_inspect(arguments: argparse.Namespace, display: Display) -> None:
    from mezzotint.packing.artifact import inspect_artifact

    with input_file(arguments.artifact) as file:
        contents = {**inspect_artifact(file), "file": str(arguments.artifact)}
    if arguments.json:
        return emit(arguments, contents)
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
        for row in contents["tensors"]
    ]
    table(f"{contents['file']}: {contents['bytes']:,} bytes, {contents['parameters']:,} parameters", columns, rows)
    lines = [(name, f"{size:,} bytes") for name, size in contents["sections"].items()]
    lines += [("bits per parameter", f"{contents['bits_per_parameter']:.3f}"), ("sha256", contents["sha256"])]
    lines += [("checked", ", ".join(contents["checks"]))]
    emit(arguments, contents, lines)


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    describe(parser, "Every weight in float32, without loss; all commands that take a model take the folder, too.")
    add_model(parser)
    add_out(parser, "FOLDER", "folder to write (-: a tar archive on standard output)")


def run_export(arguments: argparse.Namespace, display: Display) -> None:
    from mezzotint.packing.safetensors import export_folder

    model = load_model(arguments.model)
    with output_folder(arguments.out) as folder:
        result = {**export_folder(model, folder), "folder": str(arguments.out)}
    emit(
        arguments,
        result,
        [("exported", f"{result['folder']}  {result['bytes']:,} bytes: {', '.join(result['files'])}")],
    )


def add_import_arguments(parser: argparse.ArgumentParser) -> None:
    describe(parser, "Without loss, so not small: `mezzotint pack` quantizes, which takes a run.")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder that `mezzotint export` wrote (-: tar)")
    add_out(parser, "MODEL.mzt", "file to write (-: standard output)")


def run_import(arguments: argparse.Namespace, display: Display) -> None:
    from mezzotint.packing.pack import store
    from mezzotint.packing.safetensors import FILES, import_folder

    with input_folder(arguments.folder, FILES) as folder:
        model = import_folder(folder)
    with output_file(arguments.out) as out:
        result = store(model, out)
    print_pack(arguments, arguments.out, result)


def add_submit_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument("artifact", type=named, metavar="MODEL.mzt", help="artifact packed from it")
    add_out(parser, "DIR", "folder to write", named)
    parser.add_argument("--data", type=Path, metavar="DATA", help="data to score on [the data the run was trained on]")
    add_ruled(parser, "--tokens", "score about N tokens [all]", metavar="N")
    for name in ("name", "author", "github-id", "blurb"):
        parser.add_argument(f"--{name}", default=None, help=f"the record's {name}")


def run_submit(arguments: argparse.Namespace, display: Display) -> None:
    from mezzotint.apps.submission import submit

    dataset = run_data(arguments.run_folder, arguments.data, "the record's score")
    options = {k: getattr(arguments, k) for k in ("name", "author", "github_id", "blurb") if getattr(arguments, k)}
    result = submit(
        arguments.run_folder,
        arguments.artifact,
        arguments.out,
        dataset=dataset,
        tokens=arguments.tokens,
        progress=display.say,
        **options,
    )
    lines = [
        ("record", result["folder"]),
        ("artifact", f"{result['artifact_bytes']:,} bytes"),
        ("code", f"{result['code_bytes']:,} bytes"),
        ("total", f"{result['total_bytes']:,} of {result['budget_bytes']:,} bytes"),
        ("score", f"{result['val_bpb']:.4f} bits/byte ({result['val_bpb_kind']})"),
        ("files", ", ".join(result["files"])),
    ]
    emit(arguments, result, lines)

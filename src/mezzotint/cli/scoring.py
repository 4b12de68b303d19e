"""The commands that measure: `score`, `compare`.

Knows nothing of how a figure comes about.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mezzotint.cli.arguments import add_foreign, add_model, add_ruled, add_scored, describe, named
from mezzotint.cli.console import Display, emit, table
from mezzotint.cli.inputs import is_data, load_model, scored_texts, scored_windows
from mezzotint.errors import ConfigError, DataError, Interrupted, MezzotintError

if TYPE_CHECKING:
    from mezzotint.data.dataset import Windows
    from mezzotint.network.model import Model
    from mezzotint.scoring.statistics import Estimate

METHODS = {
    "nelbo": ("nelbo", ("repeats", "block_size", "orders", "order_lean", "journal")),
    "chain": ("chain_rule", ("order", "attention", "journal")),
    "causal": ("causal", ()),
    "reconstruction": ("reconstruction_score", ()),
    "lower": ("lower_bound", ("repeats", "orders", "order_lean", "slack", "journal")),
}
"""Each method's function of `scoring.likelihood`, and the options that it alone takes."""
COMPARED_TOKENS = 32_768


def add_score_arguments(parser: argparse.ArgumentParser) -> None:
    describe(
        parser,
        "nelbo: unbiased estimate of an upper bound. chain: exact, left to right, a forward pass per token (in "
        "blocks: per token of a block). causal: exact, one pass, for models with a causal share. reconstruction: the "
        "challenge entry's score, no bound. lower: what nelbo bounds from above, from below, for short windows; not in all.",
    )
    add_model(parser)
    add_foreign(parser)
    add_scored(parser)
    parser.add_argument("--method", default="nelbo", choices=(*METHODS, "all"), help="[nelbo]")
    parser.add_argument("--split", default="val", choices=("val", "train"), help="[val]")
    add_ruled(parser, "--tokens", "score about N tokens, evenly spread [all]", metavar="N")
    add_ruled(parser, "--repeats", "independent sets of masks for nelbo [8; 2 with --orders]")
    add_ruled(parser, "--stride", "charge S tokens a window, behind the text before [all of it]", metavar="S")
    add_ruled(parser, "--orders", "nelbo, lower over K orders: a pass per token and order [lower: 16]", metavar="K")
    add_ruled(parser, "--order-lean", "nelbo of orders that lean to the left; inf: chain [0]", metavar="X", default=0.0)
    add_ruled(parser, "--slack", "of lower, against rare orders [1]", metavar="NATS")
    add_ruled(parser, "--seed", "seed of the masks [0]", default=0)
    parser.add_argument(
        "--order", metavar="ORDER", help="order of chain: left, random(SEED), block(SIZE), spread(PASSES) [left]"
    )
    parser.add_argument(
        "--attention", metavar="WORD", help="what chain sees: full, or block(SIZE), for models trained in blocks [full]"
    )
    add_ruled(
        parser,
        "--block-size",
        "nelbo of blocks of K tokens from left to right, 0 of whole windows [what the model was trained on]",
        metavar="K",
        rule="score_block_size",
    )
    parser.add_argument(
        "--card", type=named, metavar="README.md", help="also write the figures into this model card (extra hub)"
    )
    parser.add_argument("--dataset", metavar="NAME", help="what the card calls the data [its file names]")
    parser.add_argument("--journal", type=named, metavar="FILE", help="keep what is done here, and go on from it")


def run_score(arguments: argparse.Namespace, display: Display) -> None:
    from mezzotint.data.sources import Account, files_in_words
    from mezzotint.data.texts import TextWindows

    model, read = load_model(arguments.model, arguments), Account()
    windows = scored_windows(model, arguments, read)
    methods = [arguments.method]
    if arguments.method == "all":
        causal = model.trained_causally
        methods = [m for m in METHODS if m != "lower" and (m != "causal" or causal)]
    _check_options(arguments, methods)
    card = None if arguments.card is None else _card(arguments, model)
    estimates: list[Estimate] = []
    failures: dict[str, str] = {}
    for method in methods:
        try:
            estimates.append(score_by(method, model, windows, vars(arguments), display))
        except Interrupted:
            raise
        except MezzotintError as error:
            if len(methods) == 1:
                raise
            failures[method] = str(error)
    display.close()
    for method, reason in failures.items():
        print(f"mezzotint: no figure for {method}: {reason}", file=sys.stderr)
    if not estimates:
        raise DataError("no method gave a figure")
    if card is not None and os.environ.get("RANK", "0") == "0":
        card(estimates)
    if arguments.json:
        result = {"results": [e.to_dict() for e in estimates], "model_sha256": model.sha256}
        result |= {"commit": model.info.get("commit")} | ({"failures": failures} if failures else {})
        result |= {"text": windows.account(), "files": read.to_dict()} if isinstance(windows, TextWindows) else {}
        return emit(arguments, result)
    print_scores(estimates)
    if isinstance(windows, TextWindows):
        print(files_in_words(read.to_dict()))
        _print_account(windows.account())


def _print_account(account: Mapping[str, int]) -> None:
    """What the tokenizer did to the text, if anything."""
    if account["documents_lost"]:
        print(
            f"the tokenizer changes {account['documents_lost']:,} of {account['documents']:,} documents "
            f"({account['bytes_lost']:,} of {account['bytes']:,} bytes lost): figures of them are no code lengths"
        )
    if account["documents_left_out"]:
        print(
            f"left out, for the tokenizer has nothing for them: {account['documents_left_out']:,} documents "
            f"({account['bytes_left_out']:,} bytes)"
        )


def _check_options(arguments: argparse.Namespace, methods: Sequence[str]) -> None:
    """Nothing is asked for that none of the methods would look at. Raises ConfigError."""
    if arguments.order and "chain" not in methods:
        raise ConfigError("--order is the order of the chain rule: add --method chain")
    if arguments.attention and "chain" not in methods:
        raise ConfigError("--attention is that of the chain rule: add --method chain")
    if arguments.attention in ("causal", "block(1)"):
        raise ConfigError("next tokens, in one pass, are --method causal")
    if arguments.block_size is not None and "nelbo" not in methods:
        raise ConfigError("--block-size is that of the NELBO: add --method nelbo, or --attention to the chain rule")
    if arguments.journal and arguments.method not in ("nelbo", "chain", "lower"):
        raise ConfigError("--journal keeps one figure: add --method nelbo or --method chain")
    if (arguments.orders or arguments.order_lean) and not {"nelbo", "lower"} & {*methods}:
        raise ConfigError("--orders and --order-lean are those of the NELBO: add --method nelbo, or lower")
    if arguments.slack is not None and "lower" not in methods:
        raise ConfigError("--slack is that of the lower bound: add --method lower")
    if arguments.dataset is not None and arguments.card is None:
        raise ConfigError("--dataset is what a model card calls the data: add --card README.md")


def _card(arguments: argparse.Namespace, model: Model) -> Callable[[Sequence[Estimate]], None]:
    """What puts figures on the card that was named, which is looked at before hours are spent on them."""
    from mezzotint.integrations.card import read_card, write_figures
    from mezzotint.pretrained import is_foreign

    library = "transformers" if is_foreign(arguments.model) else "mezzotint"
    conditions = {"window": model.config.sequence_length, "stride": arguments.stride or 0}
    words: dict[str, Any] = {
        "dataset": arguments.dataset or ", ".join(source.name or str(source) for source in arguments.data),
        "split": arguments.split if is_data(arguments.data) else "text",
        "conditions": {**conditions, "model_sha256": model.sha256} if model.sha256 else conditions,
        "name": arguments.model.name,
        "library": library,
    }
    read_card(arguments.card, arguments.model.name, library)
    return lambda estimates: write_figures(arguments.card, estimates, **words)


def score_by(method: str, model: Model, windows: Windows, options: Mapping[str, Any], display: Display) -> Estimate:
    """The figure of one of `METHODS`. options: by the names of `score`'s own; what another method would take is left."""
    from mezzotint.scoring import likelihood

    function, names = METHODS[method]
    given = {name: options[name] for name in (*names, "tokens", "seed") if options.get(name) is not None}
    return getattr(likelihood, function)(model, windows, progress=display.bar_of(method), **given)


def print_scores(estimates: Sequence[Estimate]) -> None:
    from mezzotint.apps.charts import comparison

    rows = [
        (e.method, e.kind, f"{e.bpb:.4f}", f"{e.stderr_bpb:.4f}", f"{e.nats_per_token:.4f}",
         *(f"{count:,}" for count in (e.tokens, e.bytes, e.bytes_lost, e.forward_passes)), f"{e.seconds:.1f}",
         comparison(e.kind)[1])
        for e in estimates
    ]  # fmt: skip
    names = ("method", "kind", "bits/byte", "± s.e.", "nats/token", "tokens", "bytes", "lost", "passes", "seconds")
    columns = [(n, "left" if n in ("method", "kind") else "right") for n in names]
    table("", [*columns, ("comparable with autoregressive figures?", "left")], rows)


def add_compare_arguments(parser: argparse.ArgumentParser) -> None:
    describe(
        parser, "Both are scored on the same windows and masks, so that the difference has a small standard error."
    )
    parser.add_argument("a", type=Path, metavar="A", help="a .mzt artifact, a run folder, or a model of transformers")
    parser.add_argument("b", type=Path, metavar="B", help="another; on TEXT it may have another tokenizer")
    add_foreign(parser)
    add_scored(parser, ", paired by document")
    parser.add_argument(
        "--method", default="nelbo", choices=("nelbo", "chain", "chain-or-causal"), help="[nelbo; next tokens' own]"
    )
    parser.add_argument("--split", default="val", choices=("val", "train"), help="[val]")
    add_ruled(parser, "--tokens", f"score about N [{COMPARED_TOKENS}]", metavar="N", default=COMPARED_TOKENS)
    add_ruled(parser, "--repeats", "independent sets of masks for nelbo [4]", default=4)
    add_ruled(parser, "--seed", "seed of the masks [0]", default=0)


def run_compare(arguments: argparse.Namespace, display: Display) -> None:
    from mezzotint.data.sources import Account, files_in_words
    from mezzotint.scoring.compare import compare, compare_documents

    a, b = load_model(arguments.a, arguments), load_model(arguments.b, arguments)
    options = {"method": arguments.method, "repeats": arguments.repeats, "seed": arguments.seed}
    options["progress"] = display.bar_of("comparing")
    read = Account()
    if is_data(arguments.data):
        scored_windows(b, arguments)  # the second model's tokenizer is checked like the first's
        found = compare(a, b, scored_windows(a, arguments), tokens=arguments.tokens, **options)
    else:
        found = compare_documents(a, b, scored_texts(arguments, read), **options)
    display.close()
    p = found.p_value
    verdict = "no difference shown" if p >= 0.01 else f"{'A' if found.difference_bpb > 0 else 'B'} is better"
    lines = [
        ("A", f"{found.a.bpb:.4f} ± {found.a.stderr_bpb:.4f} bits/byte ({found.a.kind}), {arguments.a}"),
        ("B", f"{found.b.bpb:.4f} ± {found.b.stderr_bpb:.4f} bits/byte ({found.b.kind}), {arguments.b}"),
        ("B - A", f"{found.difference_bpb:+.5f} ± {found.stderr_bpb:.5f} bits/byte, p = {p:.2g}: {verdict}"),
        ("over", f"{found.a.tokens:,} tokens, {found.a.bytes:,} bytes"),
    ]
    result = found.to_dict()
    if not is_data(arguments.data):
        result["files"] = read.to_dict()
        lines.append(("text", files_in_words(result["files"])))
    emit(arguments, result, lines)

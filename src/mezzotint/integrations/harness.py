"""Adapter to EleutherAI's lm-evaluation-harness (extra `eval`): its tasks, on an artifact or a run.

`python -m mezzotint.integrations.harness --model_args path=MODEL.mzt --tasks ...` is the harness's own command with this model
registered; every other option is the harness's. Knows nothing of tasks.

Likelihoods are exact chain-rule code lengths from left to right. A window is always `sequence_length` long with what
has not been read masked, so that continuations of different lengths are prefixes under one distribution.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

from mezzotint.integrations.harness_arguments import NO_MODEL, check_arguments, check_settings, one_line

if __name__ == "__main__":  # before the imports below, which take seconds
    with one_line():
        check_arguments(sys.argv[1:])

import torch

from mezzotint.config import parse_attention
from mezzotint.errors import ConfigError
from mezzotint.integrations.network import reachable
from mezzotint.network.model import TOKENS_PER_FORWARD, Model
from mezzotint.pretrained import load
from mezzotint.sampling.denoise import denoise

try:
    from datasets import config as datasets_config
    from huggingface_hub import constants
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise ConfigError("the evaluation harness is not installed: pip install 'mezzotint[eval]'") from error


STEP = 32


@register_model("mezzotint")
class Harness(TemplateLM):
    """A Mezzotint model as the harness sees one.

    path: an artifact, a run folder, a shipped model's name, or a model of transformers (a folder or hf:OWNER/NAME);
    model: one already in memory, instead. attention: `full` takes a forward pass per scored token; `causal`, for weights
    trained that way, one per request [causal for a model of nothing but next tokens, else full]. Texts are written with
    the attention they are scored with. batch_size: windows per forward pass (`auto`, and the harness's default of 1: what
    holds 16,384 tokens). objective, trust_remote_code: of a model of transformers, see `load_transformers`. Raises
    ConfigError for other settings.
    """

    def __init__(
        self,
        path: str | None = None,
        model: Model | None = None,
        attention: str | None = None,
        batch_size: int | str = "auto",
        device: str | None = None,
        max_batch_size: int | None = None,
        max_gen_toks: int = 128,
        seed: int = 0,
        objective: str | None = None,
        trust_remote_code: bool = False,
        **unknown: Any,
    ) -> None:
        super().__init__()
        check_settings(unknown)
        if (path is None) == (model is None):
            raise ConfigError(NO_MODEL)
        check_settings({} if attention is None else {"attention": attention})
        if model is None:
            remote = str(trust_remote_code).lower() == "true"
            model = load(str(path), objective=objective, trust_remote_code=remote)
        attention = attention or ("causal" if model.block_size == 1 else "full")
        if attention == "full" and getattr(model, "objective", None) == "causal":
            raise ConfigError("the model predicts next tokens only: leave out attention=full")
        if device and (not device.startswith("cuda") or torch.cuda.is_available()):  # the harness asks for cuda unasked
            model.network.to(device)
        self.model = model
        self.attention = attention
        self.length = model.config.sequence_length
        automatic = max(1, TOKENS_PER_FORWARD // self.length)
        asked = str(batch_size)
        self.rows = automatic if asked.startswith("auto") or asked == "1" else int(asked)
        self.max_gen_toks = int(max_gen_toks)
        self.seed = int(seed)

    @property
    def eot_token_id(self) -> int:
        """BOS, which stands between documents."""
        return self.model.tokenizer.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids without BOS."""
        return self.model.tokenizer.encode(string)

    def _pieces(self, context: Sequence[int], continuation: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
        """(context, continuation) pairs that fit a window, BOS in front where there is room."""
        bos = self.eot_token_id
        before = [*context] if context and context[0] == bos else [bos, *context]
        room = max(1, self.length // 2) if len(continuation) >= self.length else len(continuation)
        for start in range(0, len(continuation), room):
            piece = [*continuation[start : start + room]]
            seen = [*before, *continuation[:start]]
            keep = self.length - len(piece)
            yield seen[len(seen) - keep :] if len(seen) > keep else seen, piece

    def _rows(self, context: list[int], piece: list[int]) -> Iterator[tuple[list[int], list[int], list[int]]]:
        """(canvas, positions, targets) of the forward passes that score `piece`."""
        mask = self.model.config.mask_id
        first = len(context)
        if self.attention == "causal":
            canvas = [mask, *context, *piece][: first + len(piece)]
            yield canvas + [mask] * (self.length - len(canvas)), [*range(first, first + len(piece))], piece
            return
        for j, token in enumerate(piece):
            canvas = [*context, *piece[:j]]
            yield canvas + [mask] * (self.length - len(canvas)), [first + j], [token]

    def _score(self, requests: Sequence[Sequence[tuple[list[int], list[int]]]]) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether every token is the likeliest) of each request's (context, text) pairs."""
        total = [0.0] * len(requests)
        greedy = [True] * len(requests)
        pending: list[tuple[int, list[int], list[int], list[int]]] = []

        def flush() -> None:
            if not pending:
                return
            canvas = torch.tensor([row[1] for row in pending])
            scored = torch.zeros(canvas.shape, dtype=torch.bool)
            for n, (_, _, positions, _) in enumerate(pending):
                scored[n, positions] = True
            with torch.inference_mode():
                logits = self.model.logits(
                    canvas.to(self.model.device),
                    block_size=parse_attention(self.attention),
                    positions=scored.to(self.model.device),
                )
            log_p = logits.double().log_softmax(dim=1).cpu()
            at = 0
            for owner, _, _, targets in pending:
                own = log_p[at : at + len(targets)]
                at += len(targets)
                want = torch.tensor(targets)
                total[owner] += float(own[torch.arange(len(targets)), want].sum())
                greedy[owner] &= bool((own.argmax(dim=1) == want).all())
            pending.clear()

        for owner, pieces in enumerate(requests):
            for before, piece in pieces:
                for row in self._rows(before, piece):
                    pending.append((owner, *row))
                    if len(pending) >= self.rows:
                        flush()
        flush()
        return list(zip(total, greedy, strict=True))

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        found = self._score([[*self._pieces(context, continuation)] for _, context, continuation in requests])
        for (strings, _, _), answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", strings, answer)
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole documents, each on its own behind BOS, in the harness's windows."""
        documents = []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.eot_token_id,
                max_seq_len=max(1, self.length - 1),
                context_len=1,
            )
            documents.append([make_disjoint_window(window) for window in windows])
        answers = [value for value, _ in self._score(documents)]
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answer)
        return answers

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue each context from left to right until a stop string, BOS or `max_gen_toks` tokens.

        Greedy unless the task says `do_sample` or a temperature above 0.
        """
        return [self._generate(*request.args) for request in requests]

    def _generate(self, context: str, options: dict[str, Any]) -> str:
        until = options.get("until") or []
        until = [until] if isinstance(until, str) else list(until)
        most = int(options.get("max_gen_toks") or self.max_gen_toks)
        temperature = float(options.get("temperature") or 0.0)
        if options.get("do_sample") and not temperature:
            temperature = 1.0
        tokenizer, mask = self.model.tokenizer, self.model.config.mask_id
        prompt = [tokenizer.bos_id, *tokenizer.encode(context)]
        start = len(tokenizer.decode_bytes(prompt))
        ids = [*prompt]
        text = ""
        while len(ids) - len(prompt) < most:
            step = min(STEP, most - (len(ids) - len(prompt)), max(1, self.length // 2))
            seen = ids[-(self.length - step) :]
            canvas = torch.tensor([seen + [mask] * (self.length - len(seen))])
            target = torch.zeros(canvas.shape, dtype=torch.bool)
            target[0, len(seen) : len(seen) + step] = True
            drawn = denoise(
                self.model,
                canvas,
                target=target,
                seed=self.seed + len(ids),
                stop_id=tokenizer.bos_id,
                sampler="blocks",
                block=1,
                temperature=temperature,
                attention="causal" if self.attention == "causal" else None,
            ).ids[0, len(seen) : len(seen) + step]
            fresh = [int(t) for t in drawn if int(t) not in (mask, tokenizer.bos_id)]
            ids += fresh
            text = tokenizer.decode_bytes(ids)[start:].decode("utf-8", "replace")
            ends = [text.find(stop) for stop in until if stop and stop in text]
            if ends:
                return text[: min(ends)]
            if len(fresh) < step:
                break
        return text


def main(arguments: Sequence[str] | None = None) -> None:
    """The harness's command line with `--model mezzotint` understood."""
    from lm_eval.__main__ import cli_evaluate

    words = list(sys.argv[1:] if arguments is None else arguments)
    with one_line():
        if not reachable():  # its clients would try again and again; what is in their caches still serves
            constants.HF_HUB_OFFLINE = datasets_config.HF_HUB_OFFLINE = True
        sys.argv = ["lm_eval", *words, *([] if "--model" in words else ["--model", "mezzotint"])]
        cli_evaluate()


if __name__ == "__main__":
    main()

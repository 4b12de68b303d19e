"""OpenAI's own Python client against the real server on loopback."""

# Toys stand in for models here.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

from __future__ import annotations

import copy
import threading
import time

import pytest
import torch

pytest.importorskip("openai", reason="needs the openai client, a development dependency")
pytest.importorskip("starlette", reason="needs the extra serve")
pytest.importorskip("uvicorn", reason="needs the extra serve")

import openai
from test_desk import Gate, wait_for
from test_sample import random_model
from test_serve import Slow, ask, running

from mezzotint.apps.api import LONGER, MAX_CHOICES, cut_at, token_log_probabilities
from mezzotint.apps.desk import MAX_BODY, MAX_CHARACTERS
from mezzotint.network.model import Model
from mezzotint.sampling.generate import sample
from mezzotint.sampling.infill import LENGTHS, infill

BEFORE, AFTER = "London is the ", " of England."


def client_of(port: int, **options):
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="any", **{"max_retries": 0, **options})


def next_token_model(window: int = 32):
    model = copy.deepcopy(random_model(window=window))
    model.info["train"] = {"causal_share": 0.5}
    return model


@pytest.fixture(scope="module")
def recall():
    with running(Slow()) as port:
        yield client_of(port)


@pytest.fixture(scope="module")
def drawing():
    """A real network that learnt next tokens, as far as it says, and its server."""
    model = next_token_model()
    with running(model) as port:
        yield model, client_of(port)


def test_the_model_is_named(recall):
    (model,) = recall.models.list().data
    assert model.id == "toy" and model.owned_by == "mezzotint" and recall.models.retrieve("toy").id == "toy"
    with pytest.raises(openai.NotFoundError) as error:
        recall.models.retrieve("other/one")
    assert error.value.code == "model_not_found"


# --- fill in the middle ------------------------------------------------------------------------------------------------


def test_a_middle_is_filled(recall):
    found = recall.completions.create(model="toy", prompt=BEFORE, suffix=AFTER, temperature=0)
    (choice,) = found.choices
    assert choice.text == "capital" and choice.finish_reason == "stop" and choice.index == 0
    assert found.object == "text_completion" and found.model == "toy" and found.id.startswith("cmpl-")
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens > 5


def test_answers_are_ranked_as_infill_ranks_them(drawing):
    model, client = drawing
    found = client.completions.create(model="toy", prompt="He", suffix=" it.", n=4, max_tokens=2)
    expected = infill(model, "He____ it.", n=4, lengths=[1, 2]).gaps[0].alternatives
    assert [c.text for c in found.choices] == [a.text for a in expected] and len({c.text for c in found.choices}) == 4
    assert [c.index for c in found.choices] == [0, 1, 2, 3]


def test_drawn_middles_follow_the_seed(drawing):
    model, client = drawing
    options = {"temperature": 1.0, "top_p": 0.9}
    found = client.completions.create(model="toy", prompt="He", suffix=" it.", n=3, max_tokens=3, seed=5, **options)
    expected = infill(model, "He____ it.", 5, n=3, lengths=[1, 2, 3], candidates=3, **options)
    assert [c.text for c in found.choices] == [a.text for a in expected.gaps[0].alternatives]


def test_what_looks_like_a_gap_is_text(recall):
    """Underscores and masks of a prompt are its own, also where they touch the place to fill."""
    found = recall.completions.create(model="toy", prompt="\\____ [MASK] __", suffix="__ [MASK*9] \\", max_tokens=1)
    assert len(found.choices) == 1


def test_more_answers_than_there_are_repeat(recall):
    found = recall.completions.create(model="toy", prompt=BEFORE, suffix=AFTER, n=16, max_tokens=1, temperature=0.01)
    assert len(found.choices) == 16 and found.choices[0].text == found.choices[1].text


# --- on behind a prompt ------------------------------------------------------------------------------------------------


def test_a_prompt_goes_on_as_sample_does(drawing):
    model, client = drawing
    prompts = ["London is ", "He"]
    found = client.completions.create(model="toy", prompt=prompts, n=2, max_tokens=7, temperature=0.5, seed=3)
    assert [c.index for c in found.choices] == [0, 1, 2, 3]
    for p, prompt in enumerate(prompts):
        expected = sample(model, 2, 7, prompt=prompt, seed=3 + p, temperature=0.5)
        for k in range(2):
            choice = found.choices[2 * p + k]
            assert prompt + choice.text == expected.texts[k]
            assert choice.finish_reason == ("stop" if expected.ended[k] else "length")


def test_a_stream_says_the_same_piece_by_piece(drawing):
    _, client = drawing
    options = {"model": "toy", "prompt": "He went", "max_tokens": 12, "seed": 4, "n": 2}
    whole = client.completions.create(**options)
    chunks = list(client.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    for k, choice in enumerate(whole.choices):
        mine = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == k]
        assert "".join(c.text for c in mine) == choice.text
        assert [c.finish_reason for c in mine] == [None] * (len(mine) - 1) + [choice.finish_reason]
        assert len(mine) > 4
    assert chunks[-1].usage == whole.usage and not chunks[-1].choices and len({c.id for c in chunks}) == 1


def test_a_stream_of_a_middle(drawing):
    _, client = drawing
    options = {"model": "toy", "prompt": "He", "suffix": " it.", "max_tokens": 3, "n": 2}
    whole = client.completions.create(**options)
    chunks = list(client.completions.create(**options, stream=True))
    for k, choice in enumerate(whole.choices):
        assert "".join(c.choices[0].text for c in chunks if c.choices[0].index == k) == choice.text


def test_stop_sequences(drawing):
    _, client = drawing
    options = {"model": "toy", "prompt": "He went", "max_tokens": 20, "seed": 9}
    whole = client.completions.create(**options).choices[0].text
    stop = whole[7:9]
    expected = whole[: whole.index(stop)]
    found = client.completions.create(**options, stop=[stop, "never seen"])
    assert found.choices[0].text == expected and found.choices[0].finish_reason == "stop"
    chunks = list(client.completions.create(**options, stop=stop, stream=True))
    assert "".join(c.choices[0].text for c in chunks) == expected
    assert chunks[-1].choices[0].finish_reason == "stop"
    told = client.completions.create(**options, stop=stop, stream=True, logprobs=0)
    assert "".join(c.choices[0].text for c in told) == expected


def test_the_first_of_several_stops_counts():
    assert cut_at("one two three", ["three", "two"]) == "one " and cut_at("one", ["two"]) is None
    assert cut_at("one", ["one", "ne"]) == ""


# --- log-probabilities -------------------------------------------------------------------------------------------------


def test_log_probabilities_of_a_continuation_are_those_of_next_tokens(drawing):
    model, client = drawing
    found = client.completions.create(model="toy", prompt="He went ", max_tokens=6, seed=2, logprobs=3)
    told = found.choices[0].logprobs
    (ids,) = sample(model, 1, 6, prompt="He went ", seed=2).tokens
    left = [model.tokenizer.bos_id, *model.tokenizer.encode("He went")]
    assert len(told.tokens) == len(ids) == len(told.text_offset) and told.text_offset[0] == len("He went ")
    for j, token in enumerate(ids):  # one token at a time, each by a pass of its own
        row = model.logits(torch.tensor([[model.config.mask_id, *left, *ids[:j]]]), block_size=1)[0, -1]
        log_p = row.double().log_softmax(-1)
        assert told.token_logprobs[j] == pytest.approx(float(log_p[token]), abs=1e-6)
        assert sorted(told.top_logprobs[j].values()) == pytest.approx(log_p.topk(3).values.flip(0).tolist(), abs=1e-6)


def test_log_probabilities_of_a_middle_see_both_sides(drawing):
    model, client = drawing
    found = client.completions.create(model="toy", prompt="He", suffix=" it.", max_tokens=3, logprobs=1)
    tokenizer, mask_id = model.tokenizer, model.config.mask_id
    ids = tokenizer.encode_continuation(found.choices[0].text)
    left, right = [tokenizer.bos_id, *tokenizer.encode("He")], tokenizer.encode_continuation(" it.")
    for j, token in enumerate(ids):
        row = [*left, *ids[:j], *[mask_id] * (len(ids) - j), *right]
        log_p = model.logits(torch.tensor([row]))[0, len(left) + j].double().log_softmax(-1)
        assert found.choices[0].logprobs.token_logprobs[j] == pytest.approx(float(log_p[token]), abs=1e-6)


def test_log_probabilities_of_what_is_longer_than_the_window():
    model = next_token_model(window=8)
    ids = model.tokenizer.encode("London is the capital of England. Paris is the capital of France.")
    assert len(ids) > 16
    for right in (None, [5, 6, 7]):
        assert token_log_probabilities(model, [model.tokenizer.bos_id], ids, right).shape == (
            len(ids),
            model.config.vocab_size,
        )


# --- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body, param, words",
    [
        ({"max_tokens": 0}, "max_tokens", "from 1 to"),
        ({"n": MAX_CHOICES + 1}, "n", "from 1 to"),
        ({"n": 9, "prompt": ["a", "b"]}, "n", "at most"),
        ({"temperature": 3}, "temperature", "from 0 to 2"),
        ({"top_p": 0}, "top_p", "number"),
        ({"logprobs": 6}, "logprobs", "from 0 to 5"),
        ({"prompt": [1, 2]}, "prompt", "string"),
        ({"prompt": []}, "prompt", "string"),
        ({"prompt": "x" * (MAX_CHARACTERS + 1)}, "prompt", "longer"),
        ({"stop": ["a"] * 5}, "stop", "at most 4"),
        ({"seed": -1}, "seed", "number"),
        ({"best_of": 4}, "best_of", "not supported"),
        ({"echo": True}, "echo", "not supported"),
        ({"presence_penalty": 1.0}, "presence_penalty", "not supported"),
        ({"extra_body": {"wrong": 1}}, "wrong", "unknown"),
        ({"extra_body": {"suffix": 3}}, "suffix", "string"),
        ({"extra_body": {"stream_options": 3}}, "stream_options", "include_usage"),
    ],
)
def test_what_cannot_be_is_refused_by_name(recall, body, param, words):
    with pytest.raises(openai.BadRequestError) as error:
        recall.completions.create(**{"model": "toy", "prompt": "a", **body})
    assert isinstance(error.value.body, dict) and error.value.type == "invalid_request_error"
    message = error.value.body["message"]
    assert error.value.param == param and words in message and "\n" not in message


def test_what_asks_for_nothing_is_taken(recall):
    recall.completions.create(
        model="toy", prompt="a", suffix="", max_tokens=1, echo=False, best_of=1, presence_penalty=0.0,
        frequency_penalty=0, logit_bias={}, user="me", stop=None,
    )  # fmt: skip


def test_other_errors_have_the_same_form(recall):
    with pytest.raises(openai.NotFoundError) as error:
        recall.completions.create(model="other", prompt="a")
    assert error.value.code == "model_not_found" and error.value.param == "model"
    with pytest.raises(openai.NotFoundError) as error:
        recall.chat.completions.create(model="toy", messages=[])
    assert error.value.code == "unknown_url"
    with pytest.raises(openai.BadRequestError):
        recall.completions.create(model="toy", prompt="x" * MAX_BODY)


def test_an_error_in_the_middle_of_a_stream():
    class Broken(Slow):
        def logits(self, ids, **options):
            if self.calls > 2:
                raise ValueError
            return super().logits(ids, **options)

    with running(Broken()) as port:
        client = client_of(port)
        with pytest.raises(openai.APIError, match="something went wrong"):
            list(client.completions.create(model="toy", prompt="London is", stream=True))
        with pytest.raises(openai.InternalServerError, match="something went wrong") as error:
            client.completions.create(model="toy", prompt="London is")
        assert error.value.type == "server_error"


def test_a_full_house_asks_to_come_back():
    model = Gate()
    with running(model, serving=1, waiting=0) as port:
        client = client_of(port)
        first = threading.Thread(target=client.completions.create, kwargs={"model": "toy", "prompt": "London"})
        first.start()
        wait_for(lambda: model.calls)
        with pytest.raises(openai.InternalServerError) as error:
            client.completions.create(model="toy", prompt="London")
        assert error.value.status_code == 503 and error.value.code == "overloaded"
        assert error.value.response.headers["retry-after"] == "5"
        model.open.set()
        first.join(20)
        wait_for(lambda: client.completions.create(model="toy", prompt="London", max_tokens=1).choices)


# --- many at once, and gone in the middle ------------------------------------------------------------------------------


def slow_model(seconds: float) -> tuple[Model, list[int]]:
    """A network that takes its time, and its passes so far."""
    model, passes = next_token_model(), []
    layers = model.network._layers

    def slowly(*arguments, **options):
        passes.append(1)
        time.sleep(seconds)
        return layers(*arguments, **options)

    model.network._layers = slowly
    return model, passes


def settled(passes: list[int]) -> int:
    """Passes when no more are added."""
    while True:
        before = len(passes)
        time.sleep(0.3)
        if len(passes) == before:
            return before


def test_a_cancelled_stream_stops_the_work():
    model, passes = slow_model(0.02)
    with running(model) as port:
        stream = client_of(port).completions.create(
            model="toy", prompt="He", max_tokens=400, seed=1, n=4, stream=True, temperature=1
        )
        for _ in zip(range(3), stream, strict=False):
            pass
        stream.close()
        assert settled(passes) < 200  # of 400


def test_a_client_that_gives_up_stops_the_work():
    model, passes = slow_model(0.02)
    with running(model) as port:
        with pytest.raises(openai.APITimeoutError):
            client_of(port, timeout=0.3).completions.create(model="toy", prompt="He", max_tokens=400, n=4, seed=1)
        assert settled(passes) < 200


def test_twenty_at_once(drawing):
    """All are answered, each as if it had been alone."""
    _, client = drawing
    asks = [
        {"model": "toy", "prompt": f"He {k}", "max_tokens": 8, "seed": k, **({"suffix": "."} if k % 2 else {})}
        for k in range(20)
    ]
    alone = [client.completions.create(**a).choices[0].text for a in asks]
    together: dict[int, str] = {}

    def one(k: int) -> None:
        if k % 4 < 2:
            together[k] = client.completions.create(**asks[k]).choices[0].text
        else:
            together[k] = "".join(c.choices[0].text for c in client.completions.create(**asks[k], stream=True))

    threads = [threading.Thread(target=one, args=(k,)) for k in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [together[k] for k in range(20)] == alone


def test_lengths_rise():
    lengths = [*LENGTHS, *LONGER]
    assert lengths == sorted(set(lengths))


def test_only_json_is_taken():
    """So that no other site's page can ask."""
    with running(Slow()) as port:
        status, raw = ask(port, "/v1/completions", b'{"model": "toy"}', {"Content-Type": "text/plain"})
        assert status == 400 and b'"invalid_request_error"' in raw

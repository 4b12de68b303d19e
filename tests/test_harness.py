"""The adapter under the real lm-evaluation-harness, on local tasks, against figures computed by hand."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval")

from mezzotint.config import ModelConfig
from mezzotint.data.tokenizer import train_tokenizer
from mezzotint.errors import ConfigError
from mezzotint.integrations.harness import Harness
from mezzotint.integrations.harness_arguments import check_arguments
from mezzotint.network.model import Denoiser, Model

DOCUMENTS = [
    "The plate is rocked until it prints black.",
    "Then the burnisher draws light out of the dark, " * 4 + "slowly.",
    "Ink.",
]
TASKS = {
    "local_rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: bits_per_byte
  - metric: byte_perplexity
""",
    "local_choice": """
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: ["dark", "light and more light", "ink"]
doc_to_target: 1
metric_list:
  - metric: acc
""",
    "local_generate": """
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "x"
generation_kwargs:
  until: ["e"]
  max_gen_toks: 12
metric_list:
  - metric: exact_match
""",
}


@pytest.fixture(scope="module")
def model() -> Model:
    tokenizer = train_tokenizer(DOCUMENTS * 20, 300)
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, sequence_length=24, layers=1, width=16, heads=2, kv_heads=2, embedding_std=1.0
    )
    network = Denoiser(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return Model(config, tokenizer, network)


@pytest.fixture
def tasks(tmp_path) -> Path:
    data = tmp_path / "documents.jsonl"
    data.write_text("\n".join(json.dumps({"text": text}) for text in DOCUMENTS))
    for name, body in TASKS.items():
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\ntest_split: test\n"
        (tmp_path / f"{name}.yaml").write_text(head + body)
    return tmp_path


def evaluate(harness: Harness, folder: Path, task: str) -> dict:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    return simple_evaluate(
        model=harness, tasks=[task], task_manager=TaskManager(include_path=str(folder)), bootstrap_iters=0
    )


def log_p(model: Model, ids: list[int], start: int) -> float:
    """Log-likelihood of ids[start:] after ids[:start], left to right in a full window, one canvas at a time."""
    mask, length = model.config.mask_id, model.config.sequence_length
    total = 0.0
    for i in range(start, len(ids)):
        canvas = torch.tensor([ids[:i] + [mask] * (length - i)])
        total += float(model.logits(canvas)[0, i].double().log_softmax(0)[ids[i]])
    return total


def test_rolling_gives_bits_per_byte(model, tasks):
    found = evaluate(Harness(model=model, batch_size=5), tasks, "local_rolling")["results"]["local_rolling"]
    room = model.config.sequence_length - 1
    nats = size = 0.0
    for text in DOCUMENTS:
        ids = model.tokenizer.encode(text)
        size += len(text.encode())
        nats -= log_p(model, [model.tokenizer.bos_id, *ids[:room]], 1)
        for start in range(room, len(ids), room):
            piece = ids[start : start + room]
            stop = start + len(piece)
            nats -= log_p(model, ids[stop - room - 1 : stop], room + 1 - len(piece))
    assert found["bits_per_byte,none"] == pytest.approx(nats / size / math.log(2), rel=1e-5)


def test_choices_are_the_chain_rule(model, tasks):
    harness = Harness(model=model)
    result = evaluate(harness, tasks, "local_choice")
    assert 0 <= result["results"]["local_choice"]["acc,none"] <= 1
    sample = result["samples"]["local_choice"][0]
    bos, encode = model.tokenizer.bos_id, model.tokenizer.encode
    for (context, continuation), answer in zip(
        [a.values() for a in sample["arguments"].values()]
        if isinstance(sample["arguments"], dict)
        else sample["arguments"],
        sample["resps"],
        strict=True,
    ):
        before, whole = encode(context), encode(context + continuation)
        ids = [bos, *before, *whole[len(before) :]]
        start = 1 + len(before)
        cut = max(0, len(ids) - model.config.sequence_length)
        expected = log_p(model, ids[cut:], start - cut)
        value = answer[0][0] if isinstance(answer[0], (list, tuple)) else answer[0]
        assert float(value) == pytest.approx(expected, rel=1e-5)


def test_generation_stops_and_is_greedy(model, tasks):
    result = evaluate(Harness(model=model), tasks, "local_generate")
    texts = [sample["resps"][0][0] for sample in result["samples"]["local_generate"]]
    assert len(texts) == 3 and all("e" not in text for text in texts)
    harness = Harness(model=model)
    again = harness._generate(DOCUMENTS[0], {"until": ["e"], "max_gen_toks": 12})
    assert again == texts[0] == harness._generate(DOCUMENTS[0], {"until": "e", "max_gen_toks": 12})
    free = harness._generate("Ink", {"max_gen_toks": 40})
    assert harness._generate("Ink", {"max_gen_toks": 40, "until": [free[5:7]]}) == free[: free.find(free[5:7])]
    warm = [Harness(model=model, seed=s)._generate("Ink", {"temperature": 1.0, "max_gen_toks": 9}) for s in (0, 0, 1)]
    assert warm[0] == warm[1] != warm[2]


def test_greedy_flag_and_long_continuations(model):
    harness = Harness(model=model)
    bos, length = model.tokenizer.bos_id, model.config.sequence_length
    ids = [bos]
    for _ in range(6):
        canvas = torch.tensor([ids + [model.config.mask_id] * (length - len(ids))])
        ids.append(int(model.logits(canvas)[0, len(ids)].argmax()))
    ((value, greedy),) = harness._loglikelihood_tokens([(("", ""), [bos], ids[1:])])
    assert greedy and value == pytest.approx(log_p(model, ids, 1), rel=1e-5)
    ((_, greedy),) = harness._loglikelihood_tokens([(("", ""), [bos], [*ids[1:-1], (ids[-1] + 1) % 250])])
    assert not greedy
    long = [5 + i % 200 for i in range(3 * length)]
    for attention in ("full", "causal"):
        ((value, _),) = Harness(model=model, attention=attention)._loglikelihood_tokens([(("", ""), [7, 8], long)])
        assert math.isfinite(value) and value < 0


def test_causal_is_one_pass(model):
    harness = Harness(model=model, attention="causal")
    ids = [model.tokenizer.bos_id, 9, 8, 7, 6]
    ((value, _),) = harness._loglikelihood_tokens([(("", ""), ids[:2], ids[2:])])
    logits = model.logits(torch.tensor([[model.config.mask_id, *ids[:-1]]]), block_size=1)[0].double()
    expected = float(logits.log_softmax(1)[torch.arange(2, 5), torch.tensor(ids[2:])].sum())
    assert value == pytest.approx(expected, rel=1e-5)


def test_settings():
    with pytest.raises(ConfigError, match="one model"):
        Harness()
    with pytest.raises(ConfigError, match="attention"):
        Harness(path="x", attention="sideways")


def test_command_lists_tasks(tasks):
    """`python -m mezzotint.integrations.harness` is the harness's command line."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "mezzotint.integrations.harness", "--help"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert done.returncode == 0 and "--tasks" in done.stdout + done.stderr


class TestForeign:
    """Models of transformers under the harness."""

    def test_scores_are_a_naive_loops(self):
        transformers = pytest.importorskip("transformers")
        from test_transformers import small, tokenizer

        from mezzotint.integrations.transformers import from_transformers

        assert transformers
        network = small("gpt2")
        harness = Harness(model=from_transformers(network, tokenizer()))
        assert harness.attention == "causal"
        context, text = [1, 5, 6], [7, 5, 6]
        logits = network(input_ids=torch.tensor([context + text])).logits[0].double().detach()
        allowed = logits[2:5, [3, 5, 6, 7]].log_softmax(1)
        want = sum(float(row[[3, 5, 6, 7].index(t)]) for row, t in zip(allowed, text, strict=True))
        ((value, _),) = harness._loglikelihood_tokens([(("", ""), context, text)])
        assert value == pytest.approx(want, abs=1e-5)
        assert set(harness._generate("ab", {"max_gen_toks": 5})) <= set("abc")
        with pytest.raises(ConfigError, match="attention=full"):
            Harness(model=from_transformers(network, tokenizer()), attention="full")

        network = small("bert")
        model = from_transformers(network, tokenizer())
        harness = Harness(model=model)
        total = 0.0
        for j, token in enumerate(text):
            canvas = [*context, *text[:j]]
            canvas = [*canvas, *[4] * (model.config.sequence_length - len(canvas)), 2]
            row = network(input_ids=torch.tensor([canvas])).logits[0, 3 + j, [3, 5, 6, 7]].double().log_softmax(0)
            total += float(row[[3, 5, 6, 7].index(token)])
        ((value, _),) = harness._loglikelihood_tokens([(("", ""), context, text)])
        assert value == pytest.approx(total, abs=1e-5)
        assert len(harness._generate("ab", {"max_gen_toks": 5})) == 5

    def test_without_a_network_one_line(self, tmp_path):
        """The Hub is at a port where nothing listens."""
        environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
        command = [sys.executable, "-m", "mezzotint.integrations.harness", "--tasks", "lambada_openai"]
        for path, message in (
            ("hf:nobody/nothing", "cannot be reached"),
            ("prose,visibility=causal", "no setting visib"),
            (f"{tmp_path}/missing.mzt", "missing.mzt"),
        ):
            words = [*command, "--model_args", f"path={path}"]
            done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=120)
            assert done.returncode == 2 and done.stdout == ""
            assert done.stderr.count("\n") == 1 and message in done.stderr


class TestArguments:
    """What is refused before the harness is imported."""

    @pytest.fixture
    def nowhere(self, monkeypatch, tmp_path) -> Path:
        """No network, and a cache of its own."""
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
        monkeypatch.setenv("HF_HOME", str(tmp_path))
        for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_DATASETS_CACHE", "HF_HUB_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        return tmp_path

    def test_tasks_that_are_nowhere(self, tasks):
        with pytest.raises(ConfigError, match="Tasks not found: no_such_task; "):
            check_arguments(["--tasks", "lambada_openai,no_such_task", "local_choice", "--include_path", str(tasks)])
        with pytest.raises(ConfigError, match="Tasks not found: local_choice; "):
            check_arguments(["run", "-t", "local_choice"])

    def test_datasets_that_cannot_be_fetched(self, nowhere):
        with pytest.raises(ConfigError, match="EleutherAI/lambada_openai of task lambada_openai: the Hub cannot"):
            check_arguments(["--tasks", "lambada_openai"])
        (nowhere / "hub" / "datasets--EleutherAI--lambada_openai").mkdir(parents=True)
        check_arguments(["--tasks", "lambada_openai", "--model_args", "path=prose"])

    def test_no_model(self):
        with pytest.raises(ConfigError, match="name one model"):
            check_arguments(["--tasks", "mmlu", "--model_args", "batch_size=4"])

    def test_what_is_left_to_the_harness(self, tasks, nowhere):
        names = ["local_*", "list", str(tasks), f"{tasks}/x.yaml", "mmlu"]
        check_arguments(["--model_args", "path=prose", "--include_path", str(tasks), "--tasks", *names])
        check_arguments(["validate", "--tasks", "mmlu"])
        check_arguments(["--tasks", "mmlu", "--config", "settings.yaml"])
        check_arguments(["--model", "other", "--model_args", "anything=1"])
        check_arguments(["--model_args", '{"path": "missing.mzt"}', "--unknown"])
        check_arguments(["--tasks"])

    def test_neither_the_harness_nor_pytorch_is_imported(self, tmp_path):
        """An unknown task is refused by a process that has imported neither."""
        code = (
            "import sys, runpy\n"
            "sys.argv = ['harness', '--tasks', 'no_such_task']\n"
            "try:\n    runpy.run_module('mezzotint.integrations.harness', run_name='__main__')\n"
            "except SystemExit as stop:\n    print(stop.code, sorted({'torch', 'lm_eval', 'datasets'} & sys.modules.keys()))\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
        assert done.stdout == "2 []\n"
        assert done.stderr == "mezzotint: Tasks not found: no_such_task; `--tasks list` shows what there is\n"


def test_settings_that_do_not_exist(model):
    with pytest.raises(ConfigError, match="no setting visibility"):
        Harness(model=model, visibility="causal")


def test_causal_scoring_generates_with_causal_attention(model, monkeypatch):
    """What is generated greedily is what causal attention finds likeliest, token by token."""
    seen = []
    original = Model.logits
    monkeypatch.setattr(
        Model, "logits", lambda self, ids, **more: seen.append(more.get("block_size", 0)) or original(self, ids, **more)
    )
    harness = Harness(model=model, attention="causal", max_gen_toks=4)
    text = harness._generate("The plate", {})
    ids = [model.tokenizer.bos_id, *model.tokenizer.encode("The plate")]
    start = len(model.tokenizer.decode_bytes(ids))
    for _ in range(4):
        shifted = torch.tensor([[model.config.mask_id, *ids]])
        row = original(model, shifted, block_size=1)[0, -1]
        ids.append(int(row.masked_fill(~model.tokenizer.is_text, -torch.inf).argmax()))
    assert 0 not in seen
    assert text == model.tokenizer.decode_bytes(ids)[start:].decode("utf-8", "replace")

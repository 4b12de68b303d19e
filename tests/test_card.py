"""Figures on a model card: read back by the Hub's client and by a YAML parser, and put there by `score`."""

from __future__ import annotations

import json
import math

import pytest

huggingface_hub = pytest.importorskip("huggingface_hub")
yaml = pytest.importorskip("yaml")

from mezzotint.cli.main import main  # noqa: E402
from mezzotint.errors import DataError  # noqa: E402
from mezzotint.integrations.card import BEGIN, write_figures  # noqa: E402
from mezzotint.scoring.statistics import Estimate  # noqa: E402

NELBO = Estimate("nelbo", "upper bound", 2.25, 0.0125, 4.2, 1000, 2700, 1.0, 8, 3)
LOWER = Estimate("lower orders(16)", "lower bound", 2.125, 0.03, 4.0, 1000, 2700, 1.0, 8, 3)
CHAIN = {"method": "chain", "kind": "exact", "bpb": 2.0, "stderr_bpb": None, "tokens": 64, "bytes": 170, "seed": 0}


def read(path):
    """(metadata by a YAML parser, results by the Hub's client), which must agree."""
    text = path.read_text("utf-8")
    data = yaml.safe_load(text.split("---\n")[1])
    results = huggingface_hub.ModelCard.load(path).data.eval_results
    (entry,) = data["model-index"]
    metrics = [m for r in entry["results"] for m in r["metrics"]]
    assert [(m["value"], m.get("args")) for m in metrics] == [(r.metric_value, r.metric_args) for r in results]
    return data, results


def test_a_fresh_card_has_each_figure_with_kind_error_and_bytes(tmp_path):
    path = tmp_path / "README.md"
    write_figures(path, [NELBO, LOWER, CHAIN], dataset="books", split="val", conditions={"window": 256}, name="Plate")
    data, results = read(path)
    assert data["library_name"] == "mezzotint" and data["model-index"][0]["name"] == "Plate"
    assert [(r.metric_value, r.metric_args["kind"]) for r in results] == [
        (2.25, "upper bound"),
        (2.125, "lower bound"),
        (2.0, "exact"),
    ]
    assert results[0].metric_args == {
        "method": "nelbo", "kind": "upper bound", "standard_error": 0.0125, "tokens": 1000, "bytes": 2700,
        "bytes_lost": 0, "seed": 3, "window": 256,
    }  # fmt: skip
    assert results[2].metric_args["standard_error"] == "unknown" and results[2].metric_args["bytes"] == 170
    assert {(r.metric_type, r.dataset_name, r.dataset_split) for r in results} == {("bits_per_byte", "books", "val")}
    assert "| nelbo | upper bound | 2.2500 | 0.0125 | 1,000 |" in path.read_text()


def test_what_else_is_on_a_card_stays(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(
        "---\nlicense: mit\nlanguage: [en, de]\nmodel-index:\n- name: Old\n  results:\n  - task: {type: text-generation}\n"
        "    dataset: {name: ARC, type: arc}\n    metrics: [{type: accuracy, value: 0.5}]\n---\n\n# Old\n\nWords.\n"
    )
    write_figures(path, [NELBO], dataset="books")
    write_figures(path, [Estimate(**{**vars(NELBO), "bpb": 2.5}), CHAIN], dataset="books")  # the later one counts
    write_figures(path, [NELBO], dataset="letters")
    write_figures(path, [NELBO], dataset="books", conditions={"stride": 64})
    data, results = read(path)
    assert data["license"] == "mit" and data["language"] == ["en", "de"] and data["model-index"][0]["name"] == "Old"
    found = sorted((r.dataset_name, (r.metric_args or {}).get("method", ""), r.metric_value) for r in results)
    assert found == [
        ("ARC", "", 0.5),
        ("books", "chain", 2.0),
        ("books", "nelbo", 2.25),
        ("books", "nelbo", 2.5),
        ("letters", "nelbo", 2.25),
    ]
    text = path.read_text()
    assert text.count(BEGIN) == 1 and "# Old\n\nWords.\n" in text and text.count("### letters") == 1
    again = path.read_bytes()
    write_figures(path, [NELBO], dataset="books", conditions={"stride": 64})
    assert path.read_bytes() == again


@pytest.mark.parametrize(
    "content", [b"---\n: [\n---\n", b"\xff\xfe", b"---\nmodel-index: 3\n---\n", b"---\n- a\n---\n"]
)
def test_a_card_that_cannot_be_read_stays_as_it_was(tmp_path, content):
    path = tmp_path / "README.md"
    path.write_bytes(content)
    with pytest.raises(DataError, match="no model card") as caught:
        write_figures(path, [NELBO])
    assert "\n" not in str(caught.value) and path.read_bytes() == content


def test_no_number_goes_on_a_card(tmp_path):
    path = tmp_path / "README.md"
    for bad in (math.nan, math.inf):
        with pytest.raises(DataError, match="no number"):
            write_figures(path, [{**CHAIN, "bpb": bad}])
    assert not path.exists()


def test_score_writes_the_card_of_a_foreign_model(tmp_path, capsys):
    pytest.importorskip("transformers")
    from test_transformers import small, tokenizer

    small("bert").save_pretrained(tmp_path / "bert")
    tokenizer().save_pretrained(tmp_path / "bert")
    text, card = tmp_path / "letters.txt", tmp_path / "bert" / "README.md"
    text.write_text("abcabbca")
    words = ["score", str(tmp_path / "bert"), str(text), "--method", "chain", "--card", str(card), "--json"]
    assert main(words) == 0
    (figure,) = json.loads(capsys.readouterr().out)["results"]
    data, (result,) = read(card)
    assert data["library_name"] == "transformers"
    assert (result.metric_value, result.dataset_name, result.dataset_split) == (figure["bpb"], "letters.txt", "text")
    assert result.metric_args["kind"] == "exact" and result.metric_args["bytes"] == 8
    assert (result.metric_args["window"], result.metric_args["stride"]) == (11, 0)
    card.write_text("---\n: [\n---\n")
    assert main(words) == 2
    out = capsys.readouterr()
    assert out.out == "" and out.err.count("\n") == 1 and "no model card" in out.err
    assert main([*words[:-3], "--dataset", "x"]) == 2

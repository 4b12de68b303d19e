"""Options as callers of the public functions see them, and what a figure or a model looks like in a notebook."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import pydoc
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import mezzotint
from mezzotint import signatures
from mezzotint.config import SamplingConfig, SamplingOptions
from mezzotint.errors import ConfigError
from mezzotint.sampling.infill import InfillOptions, infill

if TYPE_CHECKING:
    from typing_extensions import Unpack

FUNCTIONS = [name for name in mezzotint.__all__ if inspect.isfunction(getattr(mezzotint, name))]


def test_options_of_sampling_are_the_fields_of_its_settings():
    fields = {item.name: item.type for item in dataclasses.fields(SamplingConfig)}
    assert {n: signatures._words(a) for n, a in SamplingOptions.__annotations__.items()} == fields
    own = {n: p for n, p in inspect.signature(infill).parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}
    known = {n: signatures._words(a) for n, a in InfillOptions.__annotations__.items()}
    assert known == fields | {n: p.annotation for n, p in own.items()}, "`fill` has the options of `infill`"


@pytest.mark.parametrize("name", ["fill", "infill", "sample", "denoise", "memorized"])
def test_options_are_named_where_help_and_completion_look(name):
    parameters = inspect.signature(getattr(mezzotint, name)).parameters
    assert {item.name for item in dataclasses.fields(SamplingConfig)} <= parameters.keys()
    assert not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    assert "temperature: 'float'" in pydoc.plain(pydoc.render_doc(getattr(mezzotint, name)))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_public_function_is_documented_and_refuses_what_it_does_not_know(name):
    function = getattr(mezzotint, name)
    assert function.__doc__ and function.__module__.startswith("mezzotint.") and function.__name__ == name
    if name != "push_to_hub":  # which passes on what a model card may hold
        with pytest.raises(ConfigError, match=rf"^{name}\(\) has no option 'odd_option'; known: ") as caught:
            function(odd_option=1)
        assert "\n" not in str(caught.value)
        assert all(option in str(caught.value) for option in inspect.signature(function).parameters)


def plain(
    model: Model, text: str, count: int = 1, *, share: float = 0.5, quiet: bool = False, **more: Unpack[More]
) -> Any:
    return (model, text, count, share, quiet, more)


class Model: ...


class More(SamplingOptions, total=False):
    out: Path | str
    seen: list[int] | None


def test_a_value_that_python_cannot_write_is_named_by_its_type():
    with pytest.raises(ConfigError, match="must be text, not a value of type int"):
        signatures.checked(plain)(Model(), 10**5000)


def test_a_call_that_is_right_goes_through():
    thing = Model()
    call = signatures.checked(plain)
    assert call(thing, "a", 2, share=1, top_p=0.5) == (thing, "a", 2, 1, False, {"top_p": 0.5})
    assert call(object(), "a", share=1.5, steps=None, out=Path("x"), seen=3)[5] == {
        "steps": None,
        "out": Path("x"),
        "seen": 3,
    }
    np = pytest.importorskip("numpy")
    assert call(thing, "a", np.int64(2), share=np.float32(1), quiet=np.bool_(True))[2] == 2


@pytest.mark.parametrize(
    ("values", "options", "says"),
    [
        (("prose", "a"), {}, "model must be a Model, not 'prose'"),
        ((None, "a"), {}, "model must be a Model, not None"),
        ((Model(),), {}, "missing a required argument: 'text'"),
        ((Model(), "a", 1, 2), {}, "too many positional arguments"),
        ((Model(), "a"), {"text": "b"}, "multiple values for argument 'text'"),
        ((Model(), b"a"), {}, "text must be text, not b'a'"),
        ((Model(), "a", "2"), {}, "count must be a whole number, not '2'"),
        ((Model(), "a", 2.5), {}, "count must be a whole number, not 2.5"),
        ((Model(), "a", True), {}, "count must be a whole number, not True"),
        ((Model(), "a"), {"share": "x" * 99}, "share must be a number, not str"),
        ((Model(), "a"), {"quiet": 1}, "quiet must be True or False, not 1"),
        ((Model(), "a"), {"steps": "3"}, "steps must be a whole number or None, not '3'"),
        ((Model(), "a"), {"out": 3}, "out must be a path, not 3"),
        ((Model(), "a"), {"temprature": 3}, "has no option 'temprature', did you mean temperature?"),
    ],
)
def test_a_call_that_is_wrong_ends_in_one_line(values, options, says):
    with pytest.raises(ConfigError) as caught:
        signatures.checked(plain)(*values, **options)
    line = str(caught.value)
    assert line.startswith("plain()") and says in line and "\n" not in line
    assert line.endswith(", no_repeat, out, seen") and "known: model, text, count, share, quiet, sampler" in line


def test_a_model_and_its_figures_show_themselves_shortly(trained):
    model = mezzotint.load(trained.run)
    data = mezzotint.Dataset.open(trained.data)
    windows = data.split("val").windows(model.config.sequence_length)
    figure = mezzotint.nelbo(model, windows, tokens=64, repeats=2)
    compared = mezzotint.compare(model, model, windows, tokens=64, repeats=2)
    shown = [repr(model), repr(data), repr(figure)]
    assert all(len(line) < 160 and "\n" not in line for line in shown) and len(repr(compared)) < 320
    assert "2 layers x 32" in shown[0] and "train tokens" in shown[1] and f"{figure.bpb:.4f}" in shown[2]
    table = figure._repr_html_()
    assert table.startswith("<table>") and f"<td>{figure.bpb:.4f}</td>" in table and "upper bound" in table
    both = compared._repr_html_()
    assert both.count("<tr>") == 3 and "<caption>b - a: " in both
    nasty = dataclasses.replace(figure, method="<script>")
    assert "<script>" not in nasty._repr_html_()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_public_docstrings_name_every_parameter_and_what_is_raised(name):
    function = inspect.unwrap(getattr(mezzotint, name))
    text = inspect.getdoc(function) or ""
    parameters = inspect.signature(function).parameters
    assert not [p for p in parameters if not re.search(rf"\b{p}\b", text)]
    assert "Raises" in text or not parameters


def public_functions(body: list[ast.stmt], around: str = "") -> Iterator[tuple[ast.FunctionDef, str]]:
    """Functions and methods with public names, each with its docstring and that of its class."""
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_functions(node.body, ast.get_docstring(node) or "")
        elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node, around + (ast.get_docstring(node) or "")


@pytest.mark.parametrize("room", ["data", "training", "sampling", "packing", "scoring"])
def test_a_public_function_that_raises_says_so(room):
    for path in (Path(mezzotint.__file__).parent / room).glob("*.py"):
        for node, text in public_functions(ast.parse(path.read_text()).body):
            raised = [r.exc.func for r in ast.walk(node) if isinstance(r, ast.Raise) and isinstance(r.exc, ast.Call)]
            errors = {name.id for name in raised if isinstance(name, ast.Name) and name.id.endswith("Error")}
            silent = errors - {"AssertionError", "AttributeError", "NotImplementedError", "IndexError"}
            assert not silent or re.search("[Rr]aise", text), f"{path.name}: {node.name} does not say {silent}"

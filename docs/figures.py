"""Numbers of the pages against their sources: `python docs/figures.py` says what differs, `--write` writes them anew.

README.md, docs/*.md and CONTRIBUTING.md are the pages; scaling.md is left out, as its figures are estimates or one machine's own.
`docs/figures.json` has

    records        name -> JSON file of a record
    figures        {"page", "text", "from"}: the page holds `text` once, with a number at each `{}`
    not measured   {"page", "text", "why"}: numbers that are settings, rules or sums, with the reason; without "text", a whole page's

`from` lists the sources of the numbers in their order: `NAME:path.to[key=value,other=value].value` for one of a record (several may
be joined by ` * ` and ` / `), or {"entry", "text"} for the entry of LOG.md whose heading begins so, and a text of it with a
number at each `{}`; at `{-}` it has a number that the page leaves out. A number keeps the decimals that it has on the page.

Every number of a page with a decimal point or a percent sign must be named by one of the two lists, and in a table every
number of two digits or more. Code is left out. Knows JSON and Markdown, and nothing of the package.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NUMBER = r"\d(?:[\d,]*\d)?(?:\.\d+)?"
CODE = re.compile(r"^```.*?^```$|`[^`\n]+`|\]\([^)]*\)|<!--.*?-->|arXiv:?\s\d+\.\d+|\d{4}-\d\d-\d\d", re.M | re.S)


def pages(root: Path) -> list[Path]:
    """The pages whose numbers are checked."""
    return [
        root / "README.md",
        root / "CONTRIBUTING.md",
        *sorted(p for p in (root / "docs").glob("*.md") if p.name != "scaling.md"),
    ]


def find(template: str, text: str) -> re.Match[str]:
    """Where `text` has `template`, with numbers as groups and any white space between words. ValueError unless once."""
    parts = re.split(r"(\{\}|\{-\}|\s+)", template.strip())
    patterns = {"{}": f"({NUMBER})", "{-}": NUMBER}
    pattern = "".join(patterns.get(part) or (r"\s+" if part.isspace() else re.escape(part)) for part in parts)
    found = list(re.finditer(pattern, text))
    if len(found) != 1:
        raise ValueError(f"{len(found)} times instead of once: {template}")
    return found[0]


def look_up(path: str, record: Any) -> Decimal:
    """The number at `path`: names joined by dots, each with `[key=value,...]` where it is one of a list's objects.

    Of several such objects the one with the most `tokens`. Raises KeyError where there is none.
    """
    for name, choice in re.findall(r"([^.\[\]]+)(?:\[([^\]]*)\])?", path):
        record = record[name]
        if choice:
            wanted = dict(pair.split("=") for pair in choice.split(","))
            rows = [row for row in record if all(str(row[k]) == v for k, v in wanted.items())]
            if not rows:
                raise KeyError(f"no row with {choice}")
            record = max(rows, key=lambda row: row.get("tokens", 0))
    return Decimal(str(record))


def value(source: str, records: dict[str, Any]) -> Decimal:
    """A source's number: `NAME:path`, or several and plain numbers joined by ` * ` and ` / `, from left to right."""
    first, *rest = re.split(r" ([*/]) ", source)
    terms = [Decimal(t) if re.fullmatch(NUMBER, t) else look_up(t.split(":", 1)[1], records[t.split(":", 1)[0]])
             for t in (first, *rest[1::2])]  # fmt: skip
    result = terms[0]
    for operator, term in zip(rest[::2], terms[1:], strict=True):
        result = result * term if operator == "*" else result / term
    return result


def entry(title: str, log: str) -> str:
    """The entry of the log whose heading begins with `title`."""
    found = [part for part in re.split(r"^## ", log, flags=re.M) if part.startswith(title)]
    if len(found) != 1:
        raise ValueError(f"{len(found)} entries of LOG.md begin with {title!r}")
    return found[0]


def expected(figure: dict[str, Any], shown: tuple[str, ...], records: dict[str, Any], log: str) -> list[str]:
    """What should stand where the page shows `shown`, with as many decimals."""
    values = []
    for source in figure["from"]:
        if isinstance(source, str):
            values.append(value(source, records))
        else:
            numbers = find(source["text"], entry(source["entry"], log)).groups()
            values += [Decimal(number.replace(",", "")) for number in numbers]
    if len(values) != len(shown):
        raise ValueError(f"{len(shown)} numbers, but {len(values)} sources: {figure['text']}")
    exponents = [Decimal(1).scaleb(-len(n.partition(".")[2])) for n in shown]
    return [f"{v.quantize(e, ROUND_HALF_UP):,}" for v, e in zip(values, exponents, strict=True)]


def loose_numbers(text: str, named: list[tuple[int, int]]) -> Iterator[str]:
    """Numbers of a page that look measured and lie in none of the `named` spans."""
    blank = CODE.sub(lambda m: re.sub(r"[^\n]", " ", m[0]), text)
    for match in re.finditer(rf"(?<![\w.])(?<![A-Za-z]-){NUMBER}%?(?!\w)", blank):
        line = blank[blank.rfind("\n", 0, match.start()) + 1 :].split("\n", 1)[0]
        in_table = line.startswith("|") and len(match[0]) > 1
        if (in_table or re.search(r"[.%]", match[0])) and not any(a <= match.start() < b for a, b in named):
            yield f"line {text.count(chr(10), 0, match.start()) + 1}: {match[0]} has no source in docs/figures.json"


def check(root: Path, write: bool = False) -> list[str]:
    """What is wrong, one line each. write: puts the sources' numbers into the pages; what is left is what it cannot mend."""
    table = json.loads((root / "docs" / "figures.json").read_text("utf-8"))
    records = {name: json.loads((root / path).read_text("utf-8")) for name, path in table["records"].items()}
    log = (root / "LOG.md").read_text("utf-8")
    problems = []
    for path in pages(root):
        name, text = path.relative_to(root).as_posix(), path.read_text("utf-8")
        named, changes = [], []
        for item in table["not measured"]:
            if item["page"] == name:
                words = r"\s+".join(map(re.escape, item.get("text", "").split()))
                named += [match.span() for match in re.finditer(words, text)] if words else [(0, len(text))]
        for item in table["figures"]:
            if item["page"] != name:
                continue
            try:
                match = find(item["text"], text)
                named.append(match.span())
                right = expected(item, match.groups(), records, log)
            except (ValueError, KeyError, IndexError) as error:
                problems.append(f"{name}: {error}")
                continue
            for i, new in enumerate(right, 1):
                if new != match[i] and write:
                    changes.append((match.span(i), new))
                elif new != match[i]:
                    problems.append(f"{name}: {match[i]} should be {new} in: {item['text']}")
        problems += [f"{name}, {loose}" for loose in loose_numbers(text, named)]
        for (start, end), new in sorted(changes, reverse=True):
            text = text[:start] + new + text[end:]
        if changes:
            path.write_text(text, "utf-8", newline="\n")
    known = {path.relative_to(root).as_posix() for path in pages(root)}
    unknown = {item["page"] for item in table["figures"]} - known
    return problems + [f"docs/figures.json: there is no page {page}" for page in sorted(unknown)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Check the numbers of the pages against their sources.")
    parser.add_argument("--write", action="store_true", help="write the sources' numbers into the pages")
    found = check(ROOT, parser.parse_args().write)
    print("\n".join(found))
    sys.exit(bool(found))

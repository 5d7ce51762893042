"""Answers out of texts: pure functions, text -> value or None, in time linear in the text."""

from __future__ import annotations

import datetime
import json
import re
from decimal import Decimal, InvalidOperation
from typing import Any, Literal

LONGEST = 20_000
"""Characters of a text that are looked at, the last ones."""
MOST_STARTS = 32
"""Brackets of a text that JSON is looked for at."""
Outcome = Literal["correct", "incorrect", "unparsed"]
_NUMBER = re.compile(r"[-+]?\$?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|[-+]?\$?\.\d+")
_BOXED = re.compile(r"\\boxed\s*\{([^{}]{1,400})\}")
_FENCE = re.compile(r"```[ \t]*[\w+-]*[ \t]*\n(.*?)(?:\n[ \t]*)?```", flags=re.DOTALL)
_QUOTES = str.maketrans("“”„‟«»‘’‚‛", '""""""\'\'\'\'')
_ICD10 = re.compile(r"\b([A-Z]\d[0-9A-Z])(?:\.?([0-9A-Z]{1,4}))?\b", flags=re.IGNORECASE)
_MONTHS = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"]
_MONTH = rf"({'|'.join(_MONTHS)})[a-z]{{0,6}}\.?"
_DATE = re.compile(
    r"\b(?:(?P<iso>\d{4}-\d{1,2}-\d{1,2})|(?P<day>\d{1,2})(?P<sign>[./])(?P<second>\d{1,2})(?P=sign)"
    rf"(?P<year>\d{{4}})|(?P<worded>\d{{1,2}}(?:st|nd|rd|th|\.)?\s{_MONTH},?\s\d{{4}})|"
    rf"(?P<american>{_MONTH}\s\d{{1,2}}(?:st|nd|rd|th)?,?\s\d{{4}}))\b",
    flags=re.IGNORECASE,
)
_YES = {
    "en": ("yes", "no"), "de": ("ja", "nein"), "fr": ("oui", "non"), "es": ("sí", "no"),
    "it": ("sì", "no"), "pt": ("sim", "não"), "zh": ("是", "否"), "nl": ("ja", "nee"),
}  # fmt: skip


def outcome(given: Any, gold: Any) -> Outcome:
    """`unparsed` if nothing was found in the text, else whether it is the gold answer."""
    if given is None:
        return "unparsed"
    return "correct" if given == gold else "incorrect"


def choice(text: str, options: int, contents: tuple[str, ...] = ()) -> str | None:
    """The final choice as a capital letter, of the first `options` ones.

    In the last line, then anywhere, the last match counts: "the answer is X", "Answer: X", a letter
    alone; then an option's content in these shapes.
    """
    if not 1 <= options <= 26:
        raise ValueError(f"options is {options}; letters stand for 1 to 26")
    text = text[-LONGEST:].strip()
    last = text.rpartition("\n")[2]
    letters = "".join(chr(65 + i) + chr(97 + i) for i in range(options))
    wrapped = rf"[*_$(\[{{\"' ]{{0,6}}(?:\\boxed\{{|\\text\{{)?[(\[ ]{{0,3}}([{letters}])"
    end = r"(?![\w'’])"
    for part in (last, text):
        for lead in (
            r"\b(?:answer|option|choice)\b\s*(?:is|are|would be|:|=)\s*(?:option|choice)?\s*:?\s*",
            r"(?:^|\n)\W{0,12}answer\W{0,12}",
        ):
            found = re.findall(lead + wrapped + end, part, flags=re.IGNORECASE)
            if found:
                return found[-1].upper()
        alone = re.fullmatch(wrapped + r"[)\]}*_$\"'.:, ]{0,12}", part)
        if alone:
            return alone[1].upper()
    return _content(last, contents) or _content(text, contents)


def _content(text: str, contents: tuple[str, ...]) -> str | None:
    """The letter of the only option whose words the text names as its answer, or is."""
    plain = _folded(text)
    found = []
    for place, content in enumerate(contents):
        words = _folded(content)
        leads = (f"answer is {words}", f"option is {words}", f"answer: {words}")
        if words and (plain == words or any(_ends_word(plain, lead) for lead in leads)):
            found.append((len(words), chr(65 + place)))
    return max(found)[1] if found else None


def _ends_word(text: str, words: str) -> bool:
    at = text.find(words)
    after = text[at + len(words) :][:1]
    return at >= 0 and not after.isalnum()


def _folded(text: str) -> str:
    return " ".join(text.lower().strip(" .\"'*_$()[]").split())


def number(text: str) -> Decimal | None:
    """The number after `####`, else in the last `\\boxed{}`, else the last one; commas and currency
    signs are left out.
    """
    text = text[-LONGEST:].replace("−", "-")
    marked = text.rpartition("####")
    boxed = _BOXED.findall(text)
    parts = ([marked[2]] if marked[1] else []) + boxed[-1:] + [text]
    for place, part in enumerate(parts):
        found = _NUMBER.findall(part)
        if found:
            first = place < len(parts) - 1
            return _decimal(found[0] if first else found[-1])
    return None


def _decimal(text: str) -> Decimal | None:
    try:
        return Decimal(text.replace(",", "").replace("$", "")).normalize()
    except InvalidOperation:
        return None


def json_value(text: str) -> Any:
    """The first JSON object or array in prose; typographic quotes are repaired if need be."""
    text = text[-LONGEST:]
    for candidate in dict.fromkeys((text, text.translate(_QUOTES))):
        for start in [m.start() for m in re.finditer(r"[{\[]", candidate)][:MOST_STARTS]:
            stop = _closing(candidate, start)
            if stop is not None:
                try:
                    return json.loads(candidate[start:stop])
                except ValueError:
                    continue
    return None


def _closing(text: str, start: int) -> int | None:
    """Behind the bracket that closes the one at `start`; brackets in strings do not count."""
    expected, quoted, escaped = [], False, False
    for at in range(start, len(text)):
        character = text[at]
        if escaped:
            escaped = False
        elif character == "\\" and quoted:
            escaped = True
        elif character == '"':
            quoted = not quoted
        elif not quoted and character in "{[":
            expected.append("}" if character == "{" else "]")
        elif not quoted and character in "}]":
            if expected.pop() != character:
                return None
            if not expected:
                return at + 1
    return None


def fenced(text: str) -> str | None:
    """The code of the first fenced block."""
    found = _FENCE.search(text[-LONGEST:])
    return found[1] if found else None


def tagged(text: str, tag: str) -> str | None:
    """What stands in the last `<tag>…</tag>`."""
    text = text[-LONGEST:]
    start = text.rfind(f"<{tag}>")
    stop = text.find(f"</{tag}>", start)
    return text[start + len(tag) + 2 : stop].strip() if 0 <= start < stop else None


def yes_no(text: str, language: str = "en") -> bool | None:
    """Whether the answer begins with yes or no in a language (ISO 639-1)."""
    if language not in _YES:
        raise ValueError(f"language is {language!r}; there are {', '.join(_YES)}")
    yes, no = _YES[language]
    plain = text.strip(" \n\t*\"'.").lower()
    for word, value in ((yes, True), (no, False)):
        if plain.startswith(word) and (language == "zh" or not plain[len(word) :][:1].isalnum()):
            return value
    return None


def icd10(text: str) -> str | None:
    """The last code of ICD-10, a letter with two digits and maybe more behind a point: `C67.9`."""
    found = _ICD10.findall(text[-LONGEST:])
    return ".".join(part.upper() for part in found[-1] if part) if found else None


def date(text: str, day_first: bool = False) -> datetime.date | None:
    """The last date: 2024-03-09, 9.3.2024, 9 March 2024, March 9, 2024 or 3/9/2024.

    day_first: 3/9/2024 is the third of September; points always have the day first.
    """
    for match in reversed(list(_DATE.finditer(text[-LONGEST:]))):
        try:
            return _date(match, day_first)
        except ValueError:  # The thirtieth of February.
            continue
    return None


def _date(match: re.Match[str], day_first: bool) -> datetime.date:
    numbers = [int(each) for each in re.findall(r"\d+", match[0])]
    if match["iso"]:
        return datetime.date(*numbers)
    if match["year"]:
        one, other, year = numbers
        day, month = (one, other) if day_first or match["sign"] == "." else (other, one)
        return datetime.date(year, month, day)
    month = next(name for name in _MONTHS if re.search(rf"\b{name}", match[0].lower()))
    return datetime.date(numbers[1], _MONTHS.index(month) + 1, numbers[0])


def first_line(text: str) -> str | None:
    """The first line that is not empty, without the space around it."""
    return next((line.strip() for line in text.split("\n") if line.strip()), None)

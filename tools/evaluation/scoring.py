"""How right an answer is, from 0 to 1, by the rules of four families of benchmarks."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from evaluation.datasets import BadRow, Row
from llama_vision.errors import quote

PUNCTUATION = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
LAST_WORDS = 4
"""Among these a letter that stands alone is the choice; one before them may be an article."""
FORMULAS = "Handwritten Mathematical Expression Recognition"
"""OCRBench's category whose answers are compared without blanks."""
LEAST_LIKENESS = 0.5


def exact(row: Row, said: str) -> float:
    """Whether the chosen letter, or of an open question the text, is the right one.

    Texts are compared without case and outer blanks.
    """
    if row.options:
        return float(chosen_letter(said, row.options) == row.answers[0])
    said = said.strip().lower()
    return float(any(said == answer.strip().lower() for answer in row.answers))


def chosen_letter(said: str, options: Mapping[str, str]) -> str | None:
    """The option that an answer means, None where that is not clear.

    The only letter of an option that stands alone, among the last words; else the only option whose
    text is in the answer, where that is not much longer than all options.

    Source: VLMEvalKit, `vlmeval/utils/matching_util.py`, its exact matching.
    """
    words = said.translate(PUNCTUATION).split()
    alone = [letter for letter in options if letter in words]
    if len(alone) == 1 and words.index(alone[0]) >= len(words) - LAST_WORDS:
        return alone[0]
    said = said.lower()
    if len(said) > 2 * sum(map(len, options.values())):
        return None
    inside = [letter for letter, text in options.items() if text.lower() in said]
    return inside[0] if len(inside) == 1 else None


def contains(row: Row, said: str) -> float:
    """Whether a right answer is part of what was said, without case; formulas without blanks.

    Source: OCRBench, arXiv 2305.07895; its evaluation in VLMEvalKit.
    """

    def plain(text: str) -> str:
        text = text.strip().replace("\n", " ")
        return text.replace(" ", "") if row.category == FORMULAS else text.lower()

    return float(any(plain(answer) in plain(said) for answer in row.answers))


def yes_no(row: Row, said: str) -> float:
    """Whether "yes" or "no" is said as it should be; neither, or both, is wrong.

    Source: POPE, arXiv 2305.10355, as VLMEvalKit scores it. POPE's own script takes whatever has no
    "no" or "not" in its first sentence for "yes".
    """
    return float(said_yes_or_no(said) == said_yes_or_no(row.answers[0]))


def said_yes_or_no(text: str) -> str | None:
    """Which of the two words stands in a text, None where neither or both do."""
    found = {"yes", "no"} & set(re.findall(r"[\w'’-]+", text.lower()))
    return found.pop() if len(found) == 1 else None


def anls(row: Row, said: str) -> float:
    """1 - edits / characters of the longer text, to the answer that is nearest; 0 below a half.

    Source: average normalised Levenshtein similarity, arXiv 1905.13648; what counts at exactly a
    half, and that case and repeated blanks do not, are those of DocVQA's script.
    """
    return max(likeness(_plain(answer), _plain(said)) for answer in row.answers)


def likeness(a: str, b: str) -> float:
    """See `anls`."""
    longer, shorter = max(len(a), len(b)), min(len(a), len(b))
    if shorter < LEAST_LIKENESS * longer:  # as many edits at least
        return 0.0
    value = 1 - edits(a, b) / longer if longer else 1.0
    return value if value >= LEAST_LIKENESS else 0.0


def edits(a: str, b: str) -> int:
    """Levenshtein's distance: characters to insert, delete or replace."""
    before = list(range(len(b) + 1))
    for i, char in enumerate(a, 1):
        now = [i]
        for j, other in enumerate(b, 1):
            now.append(min(before[j] + 1, now[-1] + 1, before[j - 1] + (char != other)))
        before = now
    return before[-1]


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


METRICS: dict[str, Callable[[Row, str], float]] = {
    "exact": exact,
    "contains": contains,
    "yes-no": yes_no,
    "anls": anls,
}


def metric_of(rows: Sequence[Row | BadRow]) -> str:
    """The metric that the columns suggest.

    Options mean "exact", answers that are all yes or no "yes-no", several right answers "anls",
    anything else "exact".
    """
    good = [row for row in rows if isinstance(row, Row)]
    if any(row.options for row in good):
        return "exact"
    if good and all(_is_yes_or_no(row.answers[0]) for row in good):
        return "yes-no"
    return "anls" if any(len(row.answers) > 1 for row in good) else "exact"


def _is_yes_or_no(answer: str) -> bool:
    return answer.strip(" .").lower() in ("yes", "no")


def checked(row: Row | BadRow, metric: str) -> Row | BadRow:
    """The row, its answer as the metric compares it; a bad one where it has no such answer."""
    if isinstance(row, BadRow):
        return row
    answer = row.answers[0]
    if metric == "yes-no" and not _is_yes_or_no(answer):
        return BadRow(row.number, row.index, f"has the answer {quote(answer)}, neither yes nor no")
    if metric == "exact" and row.options and answer not in row.options:
        same = [letter for letter, text in row.options.items() if text == answer]
        if len(same) != 1:
            why = f"has the answer {quote(answer)}, none of its options {', '.join(row.options)}"
            return BadRow(row.number, row.index, why)
        return replace(row, answers=(same[0],))
    return row

r"""The option that a generated answer chooses, or None: never a guess.

The plainest kind of statement that a text has decides: \boxed{B}; then "the answer is B",
"Answer: B"; then "option B is correct", "I choose B", "therefore, B."; then a line that is nothing
but an option; then the only option that the last sentence names. Within a kind the last mention
counts, since reasoning may change its mind. What is ruled out ("not A", "A is wrong") or doubted
("might be A") is not chosen, and several options at once ("A or C") are no answer.
"""

import re
from collections.abc import Mapping

THOUGHTS = re.compile(r".*</think(?:ing)?>", re.DOTALL)
MARKUP = re.compile(
    r"\*\*|__|`|\$|^[#>*•\-]+\s+|\\(?:text|mathrm|textbf|mathbf)(?=\{)", re.MULTILINE
)
BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
STATED = re.compile(
    r"\b(?:answer|choice|option|diagnosis)\b(?P<between>[^.:=\n]{0,80}?)(?:\bis\b|\bbe\b|:|=|→)",
    re.IGNORECASE,
)
# Between "the answer is" and the option.
FILLER = re.compile(
    r"(?:[\s:=\-–—]|\b(?:therefore|thus|hence|then|most|likely|probably|clearly|definitely|indeed|"
    r"option|choice|answer|letter|the|correct)\b)*",
    re.IGNORECASE,
)
NEGATED = re.compile(
    r"\b(?:not|cannot|never|neither|nor|wrong|incorrect|false|unlikely|rather than|instead of|"
    r"less likely|rul\w+ out|exclud\w+|eliminat\w+|except)\b|n['’]t\b",
    re.IGNORECASE,
)
DOUBTED = re.compile(
    r"\b(?:could|might|may|maybe|perhaps|possibly|unsure|unclear|either|between)\b|\?",
    re.IGNORECASE,
)
LETTER = re.compile(r"\s*[(\[{\"']?\s*(?P<letter>[A-Za-z])(?![\w'’])\s*(?P<close>[)\]}.:,;\"'!]*)")
ANOTHER = re.compile(
    r"\s*(?:,|/|&|\band\b|\bor\b)(?:\s*(?:and|or)\b)?\s*(?:(?:option|choice)\s+)?"
    r"[(\[]?(?P<letter>[A-Z])(?![\w'’])[)\]]?"
)
IS_SUBJECT = re.compile(r"\s*(?:is|are|was|were|can|cannot|could|has|have|does|would|may|might)\b")
GOES_ON = re.compile(r"\s*(?:$|[\n(\-–—]|(?:because|since|as|due|which|given|based|for|in)\b)")
JUDGED = re.compile(
    r"(?:\b(?:option|choice|answer)\s+\(?(?P<a>[A-Z])\b\)?|\((?P<b>[A-Z])\)|^(?P<c>[A-Z])[.):])"
    r"[^.\n;]{0,80}?\s+is\s+(?:therefore\s+|thus\s+|clearly\s+)?(?:the\s+)?"
    r"(?:correct|right|best|most\s+(?:likely|appropriate|accurate))\b"
    r"|\b(?P<d>[B-Z])\s+is\s+(?:the\s+)?(?:correct|right|best)\b",
    re.IGNORECASE | re.MULTILINE,
)
CHOSEN = re.compile(
    r"\b(?:I(?:\s+would|['’]d|['’]ll|\s+will)?\s+(?:choose|select|pick|go\s+with|answer)|"
    r"(?:therefore|thus|hence|so|in conclusion)[,:]?)(?=\s)",
    re.IGNORECASE,
)
NAMED = re.compile(r"\(([A-Z])\)|\b(?:option|choice|answer)\s+\(?([A-Z])\b", re.IGNORECASE)
# "hepatitis B is the best ..." names no option.
COMPOUND = re.compile(r"\b(?:hepatitis|vitamin|type|group|factor|protein|influenza)\s+$", re.I)
SENTENCE_END = re.compile(r"(?<=[.!?])(?<!\b[A-Z]\.)\s+|\n")  # the dot of "B." ends no sentence
SHORTEST_TEXT = 4  # characters of an option that a sentence may name by its text


def extract(text: str, options: Mapping[str, str], cut: bool) -> str | None:
    """Finds the letter that an answer chooses.

    Args:
        options: letter -> text.
        cut: the text stops in the middle, so that its last line or sentence concludes nothing.
    """
    text = MARKUP.sub("", THOUGHTS.sub("", text)).strip()
    kinds = [_boxed, _stated, _judged] + [_lines, _last_sentence] * (not cut)
    for kind in kinds:
        letters = kind(text, options)
        if letters:
            return next(iter(letters)) if len(letters) == 1 else None
    return None


def _boxed(text, options) -> set[str]:
    found = BOXED.findall(text)
    if not found:
        return set()
    # What is boxed is the answer; if it cannot be read, nothing else is.
    return _leading(found[-1].strip("{} "), options) or {"", "unreadable"}


def _stated(text, options) -> set[str]:
    last: set[str] = set()
    for match in STATED.finditer(text):
        between = match["between"]
        if NEGATED.search(between) or DOUBTED.search(between):
            continue
        if re.match(r"\s*(?:choices|options)\b|s\b", between, re.IGNORECASE):
            continue
        last = _after(text[match.end() :], options) or last
    return last


def _after(rest, options) -> set[str]:
    """Finds the options that begin what follows "the answer is"; "not A but B" is B."""
    rest = FILLER.sub("", rest, count=1)
    if NEGATED.match(rest):
        but = re.match(r"[^.\n]*?\bbut\b(?:\s+rather\b)?", rest)
        if but is None:
            return set()
        rest = rest[but.end() :]
        rest = FILLER.sub("", rest, count=1)
    return set() if DOUBTED.match(rest) else _leading(rest, options)


def _judged(text, options) -> set[str]:
    found = []
    for match in JUDGED.finditer(text):
        letter = next(filter(None, match.groups())).upper()
        before, own = text[: match.start()], match[0]
        fine = not NEGATED.search(own) and not COMPOUND.search(before)
        if fine and letter in options and not NEGATED.search(_sentence_start(before)):
            found.append((match.start(), {letter}))
    for match in CHOSEN.finditer(text):
        letters = _after(text[match.end() :], options)
        if letters and not NEGATED.search(_sentence_start(text[: match.start()])):
            found.append((match.start(), letters))
    return max(found, key=lambda pair: pair[0])[1] if found else set()


def _sentence_start(before: str) -> str:
    return re.split(r"[.!?;\n]", before)[-1]


def _lines(text, options) -> set[str]:
    """Finds lines that are an option and nothing else; a list of several options is no choice."""
    found = set()
    for line in filter(str.strip, text.splitlines()):
        match = LETTER.match(line)
        rest = _normal(line[match.end() :]) if match else ""
        letter = match["letter"].upper() if match else ""
        if letter in options and rest in ("", _normal(options[letter])):
            found.add(letter)
        found |= {name for name, option in options.items() if _normal(line) == _normal(option)}
    return found


def _last_sentence(text, options) -> set[str]:
    sentence = SENTENCE_END.split(text)[-1]
    left, found = _normal(sentence), set()
    named = {(a or b).upper() for a, b in NAMED.findall(sentence)} & set(options)
    # The longest first, so that "type 1 diabetes" is not also "diabetes".
    for letter, option in sorted(options.items(), key=lambda pair: -len(pair[1])):
        option = _normal(option)
        without = re.sub(rf"(?<!\w){re.escape(option)}(?!\w)", " ", left)
        if len(option) >= SHORTEST_TEXT and without != left:
            found.add(letter)
            left = without
    if NEGATED.search(left) or DOUBTED.search(left) or "?" in sentence:
        return set()
    return found | named


def _leading(span, options) -> set[str]:
    """Finds the options that a span begins with: a letter, several joined, or an option's text."""
    texts = _leading_text(span, options)
    match = LETTER.match(span)
    if match is None or match["letter"].upper() not in options:
        return texts
    letter, after = match["letter"], span[match.end() :]
    own = _leading_text(after, {letter.upper(): options[letter.upper()]})
    joined = ANOTHER.match(span, match.end("letter"))
    if not match["close"] and not own and not joined:
        # A word of the sentence: "a beta blocker", "A patient", "B is wrong".
        article = letter.islower() or letter in "AI"
        if IS_SUBJECT.match(after) or (article and not GOES_ON.match(after)):
            return texts
    letters, end = {letter.upper()}, match.end("letter")
    end += len(span[end:]) - len(span[end:].lstrip(")]}"))
    while another := ANOTHER.match(span, end):
        letters |= {another["letter"]} & set(options)
        end = another.end()
    return letters if own else letters | _leading_text(after, options)


def _leading_text(span, options) -> set[str]:
    """Finds the longest option whose text a span begins with."""
    span = _normal(span) + " "
    found = [
        letter
        for letter, text in options.items()
        if _normal(text) and span.startswith(_normal(text) + " ")
    ]
    longest = max(found, key=lambda letter: len(_normal(options[letter])), default=None)
    if longest is None:
        return set()
    after = span[len(_normal(options[longest])) :].strip()
    joined = re.match(r"(?:and|or)\s+(.*)", after)
    return {longest} | (_leading_text(joined[1], options) if joined else set())


def _normal(text: str) -> str:
    """Returns the words in lower case, without articles and punctuation."""
    words = re.sub(r"[^\w%.+/<>≥≤=-]+", " ", text.lower()).split()
    words = [word.strip(".-/") for word in words]
    return " ".join(word for word in words if word and word not in ("a", "an", "the"))

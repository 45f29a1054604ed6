"""The one answer parser, shared by the reward, the curation filter and the evaluation.

Failure policy, the same everywhere: a text without one clear answer gives ``None``. The caller counts it, lists it and
scores it as wrong (or leaves it out, if the metric says so); nothing in this project draws a letter at random or picks
the likelier of two.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from typing import Literal, NamedTuple

ABCD = "ABCD"  # the usual options

_WRAPPERS = r"text|textbf|textit|textrm|textsf|texttt|textnormal|mathrm|mathbf|mathit|mathsf|mbox|hbox"
_WRAPPED = re.compile(rf"\\(?:{_WRAPPERS})\s*\{{([^{{}}]*)\}}")
_BOX = re.compile(r"\\boxed\s*\{")
_THOUGHT = re.compile(r"^.*</think(?:ing)?>|<think(?:ing)?>.*$", re.DOTALL | re.IGNORECASE)

_ANSWER_LINK = r"(?:\s*[:=]\s*|\s+[-\u2013\u2014]\s+|\s+(?:is|was|would\s+be|should\s+be|must\s+be)\b\s*:?\s*)"
# "The answer is", "So the final answer to the question is:", "Answer:"; what follows is the answer.
ANSWER_FRAME = re.compile(
    rf"\b(?:answer|ans\.?)(?:\s+(?:to|for)\s+(?:the|this)\s+question)?{_ANSWER_LINK}(?:that\s+)?", re.IGNORECASE
)
_PRONOUN_FRAME = re.compile(
    r"(?:it|this|that|they|these|those)(?:'s|'re|\s+(?:is|are|was|were))\s+(?=\S)", re.IGNORECASE
)
_YES_NO = re.compile(
    r"(yes|no)[,.;]?\s+(?!.*\b(?:mention|stat|sa[iy]|clear|possib|tell|told|know|inform|caption|descri|specif|sure))"
    r"(?:it|they|he|she|this|that|these|those|there|the|you|we|i|because|since)\b.*",
    re.IGNORECASE | re.DOTALL,
)
_REASON = re.compile(r"\s*,?\s+(?:because|since)\b.*|,\s+(?:as|which|so)\s.*", re.IGNORECASE | re.DOTALL)
_SHORTENED = ("St", "Dr", "Mr", "Ms", "Mrs", "vs", "Inc", "Ltd", "Co", "Corp", "Jr", "Sr", "etc")
_ABBREVIATION = "".join(rf"(?<!\b{word})" for word in _SHORTENED)
_NEW_SENTENCE = r"(?:The|This|That|It|In|As|Because|Since|There|So)\b"
_SENTENCE_END = re.compile(
    rf"(?:(?<=[a-z0-9)\]%])|(?<=[A-Z]{{2}})){_ABBREVIATION}[.!] +(?=[A-Z])|[.!] +(?={_NEW_SENTENCE})|\n"
)
_FULL_STOP = re.compile(rf"(?:(?<=[A-Za-z]\.)|(?<!\.[A-Za-z])(?<!\.){_ABBREVIATION})\.$")
_SET_OFF = re.compile(r"([*_`\"'\u201c\u2018]+)(.*?)[*_`\"'\u201d\u2019]+", re.DOTALL)
MARKS = " *_`\"'\u201c\u201d\u2018\u2019"  # what is put around words to set them off


class Letter(str):
    """An option letter that a reader chose by its probability: a typed answer, never read as text."""


def first_capital(text: str) -> str | None:
    """The first capital A to I in the text (author code of the QA reward), or None. Right for short completions that
    continue "The answer is"; wrong for free text ("Answer: B" gives A).
    """
    found = re.search(r"[A-I]", text)
    return found[0] if found else None


def split_sentences(text: str) -> list[str]:
    """The parts of a caption between full stops (or ! and ?) and their blanks."""
    return re.split(r"(?<=[.!?]) ", text)


def after_reasoning(text: str) -> str:
    """The text without a model's reasoning: what follows the last ``</think>``, nothing of an unclosed ``<think>``."""
    return _THOUGHT.sub("", text)


def final_answer(text: str) -> str:
    """The answer inside a completion, for the standard metrics (ours; one rule for all benchmarks): of the last
    complete ``<answer>...</answer>`` block, else of the text behind the reasoning, its last ``\\boxed{...}`` with even
    braces (the outer one if nested), if any, without ``\\text{...}``-like commands and outer spaces. A plain short
    answer stays as it is.
    """
    before, closed, _ = text.rpartition("</answer>")
    _, opened, inside = before.rpartition("<answer>")
    body = inside if closed and opened else after_reasoning(text)
    boxes = {match.end() - 1 for match in _BOX.finditer(body)}
    open_braces, first, end = [], -1, -1
    for brace in re.finditer(r"\\.|[{}]", body, re.DOTALL):  # one pass, so that a loop costs its length; \{ is text
        if brace[0] == "{":
            open_braces.append(brace.start())
        elif brace[0] == "}" and open_braces:
            start = open_braces.pop()
            if start in boxes and not first < start < end:
                first, end = start, brace.start()
    return unwrap_commands(body[first + 1 : end] if end >= 0 else body).strip()


def short_answer(text: str) -> str:
    """What a reader says who was asked for a word or a number and answers in a sentence (ours; nothing is guessed).
    "The answer is 42." and "It is 42." give "42", "Yes, it is." gives "Yes", "25%, because ..." gives "25%": the frame,
    what explains the answer, marks around it and the final full stop go.
    """
    answer = unframed(final_answer(text))
    yes_no = _YES_NO.fullmatch(answer)
    return yes_no[1] if yes_no else _first(answer) or answer


def unframed(text: str) -> str:
    """The answer of the last "the answer is ..." (or of one sentence "It is ..."), up to its reason; else the text."""
    text = text.strip()
    frames = list(ANSWER_FRAME.finditer(text))
    if frames:
        return _first(text[frames[-1].end() :]) or text
    frame = _PRONOUN_FRAME.match(text)
    if frame and text.endswith(".") and not _SENTENCE_END.search(text):
        return _REASON.sub("", text[frame.end() :])
    return text


def _first(text: str) -> str:
    """The first sentence without its reason, its full stop and the marks around it."""
    sentence = _SENTENCE_END.split(text.replace("**", "").lstrip(" :\n"), maxsplit=1)[0]
    answer = without_full_stop(_REASON.sub("", sentence))
    set_off = _SET_OFF.fullmatch(answer)
    return without_full_stop(set_off[2] if set_off else answer)


def without_full_stop(text: str) -> str:
    """Without the full stop of a sentence; that of an abbreviation stays ("U.S.", "Apple Inc.")."""
    return _FULL_STOP.sub("", text.strip()).strip()


def plain(text: str) -> str:
    """Compatibility forms made plain, without invisible characters, quotes, Markdown emphasis and HTML tags."""
    text = unicodedata.normalize("NFKC", text)
    text = "".join(c for c in text if unicodedata.category(c) != "Cf")
    text = text.translate({0x201C: None, 0x201D: None, ord('"'): None, 0x2018: "'", 0x2019: "'"})
    text = re.sub(r"</?[a-z]+\s*/?>|(?<!\w)'|'(?!\w)|\\[()\[\]]", "", text)
    return re.sub(r"[*`~]+|(?<!\w)_+|_+(?!\w)", "", text).strip()


def unwrap_commands(text: str) -> str:
    """``\\text{red}`` -> ``red``, also nested and for the bold, roman and italic relatives."""
    previous = None
    while previous != text:
        previous, text = text, _WRAPPED.sub(r"\1", text)
    return text


# Which option letter a reply states, in the forms that people and models use (ours).
#
# A letter counts where it stands alone, behind a cue ("the answer is B"), before a verdict ("B is correct") or at the
# head of the reply ("B. blue"). What a letter is part of (`D = 5 m`, `B-shaped`, `panel (A)`, `B cells`) is no answer,
# nor is one that is ruled out, asked about, supposed, or named beside another ("B or C"). Of two different answers the
# later one counts, but only where the text corrects itself or concludes. A bare letter is a letter before it is an
# option's text; an option's words count where no letter is stated.


@dataclass(frozen=True, slots=True)
class LetterReading:
    """What a text said: its option letter, None for none or several, by the letter itself or by an option's words; else
    the reason why there is none.
    """

    letter: str | None
    source: Literal["letter", "option_text"] | None = None
    reason: str | None = None


# --- the words that tell what a letter is; in a list of phrases a space stands for any white space ---


def _any(phrases: str) -> str:
    return "(?:" + "|".join(r"\s+".join(phrase.split()) for phrase in phrases.split("|")) + ")"


_i = partial(re.compile, flags=re.IGNORECASE)
_DASH = r"[-\u2013\u2014]"
_GOOD = _any("correct|right|best|proper|true|final|only|matching|appropriate|suitable|accurate")
_IS = _any(
    "is|are|was|were|would be|should be|must be|has to be|have to be|will be|can only be|seems to be|appears to be"
    "|seems|appears|looks|remains|becomes|being"
)
_LINK = rf"(?:{_IS}|'s|[-=]>|[:=,\u2192]|{_DASH})"
_ADVERBS = "likely|most|very|probably|possibly|definitely|certainly|clearly|obviously|therefore|thus|indeed|still"
_FILLERS = _any(
    f"the|to be|option|choice|letter|answer|number|{_ADVERBS}|simply|then|just|actually|surely|that|it is|it's|marked"
)
_FILL = rf"(?:(?:(?:{_GOOD}|{_FILLERS})\b|[:,])\s*)*\s*$"
_CHOOSING = _any(
    "choose|chose|choosing|select(?:ed|ing)?|pick(?:ed|ing)?|go(?:ing)? with|go(?:ing)? for|went with|opt for|settle on"
    "|settle for|vote for|answer with|say|guess|conclude|leaving|leaves|leaves us with|i think|i believe|i suspect"
    "|i suppose|points to|corresponds to|match(?:es)?|lean(?:ing)? towards?"
)
_OTHER_TONGUES = (
    r"(?:答案|正确选项|正確選項|正解|答え|정답)(?:应该|應該|应|就)?[是为為选選は은]?\s*:?\s*$"
    r"|[选選][择擇]?[项項]?[是为]?\s*:?\s*$"
    r"|\b(?:respuesta|réponse|antwort|resposta|risposta|ответ)\b[\w\s]*(?:es|est|ist|é|è|:)\s*$"
)
# Before a letter: it is the answer.
_STATES = _i(
    r"(?<![A-Za-z])(?:answers?|ans\.?|solution|conclusion|verdict|pick|guess|vote)"
    rf"(?:\s+(?:choice|option|letter|here|(?:to|for)\s+(?:the|this)\s+question))*(?:\s*\([^()]*\))?\s*{_LINK}?\s*{_FILL}"
    rf"|\b{_GOOD}\s+(?:\w+\s+)?(?:option|choice|letter|one|statement|description|caption|match|fit)\s*{_LINK}\s*{_FILL}"
    rf"|\b(?:option|choice|letter)\s*{_LINK}\s*{_FILL}|(?:##|=>|[\u2192\u2234])\s*{_FILL}|\b{_CHOOSING}\s*{_FILL}"
    rf"|\b(?:it|that|this|which|(?:one|option|choice)\s+that\s+\w+)(?:'s|\s+{_IS})\s*{_FILL}|{_OTHER_TONGUES}"
)
# Before a letter: it may be.
_HINTS = _i(
    rf"(?:\b(?:so|hence|then|maybe|perhaps|surely|yes|yeah|ok|okay|sure|finally|well|but|no|doubt|{_ADVERBS})\b"
    rf"|[以故是为])\s*[,:]?\s*{_FILL}|\b(?:since|because|as|given|based|according)\b[^.;\n]*,\s*\(?$"
)
# Before a letter: all but that one.
_BARRING = _any(
    r"not|never|neither|nor|except|unlike|than|versus|vs|instead of|over|without|against|besides|exclud\w+|eliminat\w+"
    r"|rules? out|ruled out|ruling out|discard\w*|reject\w*|dismiss\w*|other than|anything but|all but|far from|hardly"
    "|wrong|incorrect"
)
_EXCEPT = _i(
    rf"(?:(?:\b{_BARRING}|\w+n't)\s+(?:(?:options?|choices?|letters?|the|answers?|be|either|both|is|it)\s+)*"
    r"|(?:不是|不选|排除|除了)\s*)\(?$"
)
# Before a letter: it names a thing.
_THING = _i(
    r"\b(?:panel|fig(?:ure|\.)?|graph|image|picture|part|section|step|group|curve|line|point|diagram|row|column|plot"
    r"|equation|chart|region|triangle|box|bar|circuit|node|vertex|vitamin|hepatitis|team|class|grade|angle|segment"
    r"|label|plan|type)(?:e?s)?\s*\(?$"
)
# In its clause: it is denied, or only supposed.
_DENIES = _i(
    r"\b(?:not|never|neither|nor|doubt|unlikely|impossible|wrong|incorrect|false|hardly|if|whether|suppose|assuming"
    r"|unless|could|might|may|either|cannot|unclear|unknown|nothing)\b|\w+n't\b|不"
)
_HEDGE = _i(r"\b(?:not\s+(?:\w+\s+)?(?:sure|certain)|no\s+doubt|without\s+(?:a\s+)?doubt)\b")
_BREAK = _i(
    r"[.;:,!?\n。]|\b(?:so|but|therefore|thus|hence|because|since|then|however|while|whereas|leaving|leaves|and\s+the)\b"
    r"|\band\s*(?:option|choice)?\s*\(?$"
)
# Between two statements: the second one counts.
_CORRECTS = _i(
    r"\b(?:but|however|wait|actually|so|therefore|thus|hence|final(?:ly)?|instead|sorry|correction|conclusion|rather"
    r"|second\s+thoughts?|recheck|again|closer|no)\b|所以|因此|##"
)
# Behind a letter: it is right, it is wrong.
_TICK, _CROSS = r"[\u2713\u2714\u2705\u2611]", r"[\u2717\u2718\u274c]"
_WORDS = (
    r"(?:(?!(?:because|since|as|but|and|so|if|not|while|that|which)\b|\w+n't)"
    rf"(?:(?!{_TICK}|{_CROSS})[^\s.;,!?])+[^\S\n]+)"
)
_RIGHT = _i(
    rf"{_WORDS}{{0,6}}?{_IS}\s+(?:(?:the|a|more|my|our|only|one|single|both|all|also|{_ADVERBS})\s+)*"
    r"(?:correct|right(?!\s+(?:of|next|above|below|side|angle))|true|answers?|choice|option|best|supported|consistent"
    rf"|mentioned|left)\b(?!-)|{_WORDS}{{0,4}}?(?:fits|matches|applies|wins|remains|holds|it\s+is)\b"
    rf"|{_WORDS}{{0,5}}?(?:(?:{_DASH}|[:(])\s*(?:yes|correct|right|true|mentioned)\b|{_TICK})|(?:选项|项)?是?(?:正确|正確|对)"
)
_WRONG = _i(
    rf"{_WORDS}{{0,6}}?(?:(?:{_DASH}|[:(])\s*|(?:{_IS}|can|could|would|may|has|have|does|do|did)\s+)"
    rf"(?:(?:both|all|also|be|been|{_ADVERBS})\s+)*"
    r"(?:not|never|wrong|incorrect|false|impossible|ruled\s+out|eliminated|excluded|out|unlikely|absent|no)\b"
    rf"|{_WORDS}{{0,6}}?(?:cannot\b|contradict\w*|\w+n't\b|{_CROSS})|(?:选项|项)?是?[不错錯误]"
)
# Behind a letter that is no part of something else: an end, a mark, or a word that starts no noun.
_GOES_ON = _i(
    rf"\s*(?:$|[.,:;!?)\]}}>|(\n、。\u2014])|\s+(?:{_DASH}+|[-=]>|\u2192)\s|[^\x00-\x7f]|\s+"
    "(?:because|since|as|for|due|given|based|according|from|in|on|at|by|with|which|where|when|while|but|and|or|not|rather"
    "|instead|here|if|though|although|so|therefore|thus|hence|this|it|these|there|explanation|reason|reasoning|the|per"
    r"|over|than|then)\b"
)
_ADVERB = re.compile(r"\s+(?:that|most|only|likely|definitely|clearly|alone|what|best|probably)\b")


_SOFT = r"[\s.,:;!?()\[\]{}<>\"$|\u3002\u3001]*"
_BARE = _i(rf"(?:[#>\u2022-]+\s+|#+)?{_SOFT}(?:(?:option|choice|letter)\s+)?{_SOFT}([A-Z]){_SOFT}")
_AT_ONCE = _i(rf"(?:{_IS}|best|fits|matches|applies|wins|holds|it|can|could|would|does|has)\b|[^\w\s]")
_HEAD = _i(r"(?:^(?:is\b|(?:option|choice|letter)\b)?|[\n;])[\s>(\u2022-]*$")  # of the text, or of a line
_ENDED = re.compile(r"[.!?:;)\n。]\s*\(?$")
_RELISTED = re.compile(r"\W*A\s?[).:].*\bB\s?[).:].*\bC\s?[).:]", re.DOTALL)  # the options told again
_NEAR = 100  # characters around a letter that can tell what it is
_NONE = "no letter"


def read_letter(text: str, letters: str = ABCD, options: Sequence[str] | None = None) -> LetterReading:
    """Read the one option letter that a text states. letters: those that exist for this question, e.g. "ABCDE".
    options: texts without letters, in letter order; only if given, a text that states one of them in its words counts
    as its letter.
    """
    if isinstance(text, Letter):
        return LetterReading(str(text), "letter")
    text = re.sub(r"(?i)\b(answer|ans)\s*=\s*", r"\1: ", plain(final_answer(text)))
    if not text:
        return LetterReading(None, reason="empty answer")
    return _Reply(text, letters, [_key(str(option)) for option in options or ()]).read()


class _Mention(NamedTuple):
    """Letters named at one place. kind: "stated", "hinted" (by a word or by its place), "out", or "" for no answer."""

    letters: tuple[str, ...]
    start: int
    kind: str


@dataclass(frozen=True, slots=True)
class _Reply:
    text: str
    letters: str
    options: list[str]  # as `_key` makes them

    def read(self) -> LetterReading:
        said = unframed(self.text)
        if _denied(self.text.rpartition(said)[0]):
            said = self.text
        for part in (self.text, said):
            bare = _BARE.fullmatch(part)
            if bare and (letter := bare[1].upper()) in self.letters:
                if bare[1] == letter and part != self.text:
                    break  # "The answer is B" is about the letter, and another may be stated beside it
                if bare[1] != letter and self.options.count(bare[1]) and self._option(letter) != bare[1]:
                    return LetterReading(None, reason=f"{bare[1]} is a letter and the text of another option")
                return LetterReading(letter, "letter")
            if (place := self._whole(part)) is not None:
                return LetterReading(self.letters[place], "option_text")
        reading = self._stated()
        if reading.reason == _NONE and (place := self._told()) is not None:
            return LetterReading(self.letters[place], "option_text")
        return reading

    def _option(self, letter: str) -> str:
        """Of a letter; "" where it is not known."""
        return dict(zip(self.letters, self.options, strict=False)).get(letter, "")

    def _stated(self) -> LetterReading:
        mentions = self._mentions()
        last_out = {letter: m.start for m in mentions if m.kind == "out" for letter in m.letters}
        alive = [m for m in mentions if m.kind and all(m.start > last_out.get(x, -1) for x in m.letters)]
        stated = [m for m in alive if m.kind == "stated"]
        found = {letter for m in alive for letter in m.letters} - set(last_out)
        if stated:
            found = set(stated[-1].letters)
            for one, other in pairwise(stated):
                if not _CORRECTS.search(self.text[one.start : other.start]):
                    found |= {*one.letters, *other.letters}
        elif _RELISTED.match(self.text) and not last_out:
            found = set()
        if len(found) != 1:
            several = f"several letters: {', '.join(sorted(found))}"
            return LetterReading(None, reason=several if found else _NONE)
        letter = found.pop()
        known = letter in self.letters
        return LetterReading(letter, "letter") if known else LetterReading(None, reason=f"no option {letter}")

    def _mentions(self) -> list[_Mention]:
        """All places that name letters, those that belong together ("B or C", "A, C and D") as one."""
        found, told = [], 0
        for match in _items("I" in self.letters).finditer(self.text):
            if match.start() < told:
                continue  # a capital inside the option that was just named
            named, rest = re.findall(r"(?<![A-Za-z])[A-Z](?![A-Za-z])", match[0]), self.text[match.end() :]
            if re.match(r"\W{0,5}\bor\b(?!\s+rather)", rest):
                named.append("?")  # "B ... or something else"
            if (after := self._after_own(rest.lstrip(" .:"), named)) is not None:
                told = len(self.text) - len(after)
            found.append(_Mention(tuple(named), match.start(), self._kind(match, named)))
        return found

    def _kind(self, match: re.Match[str], named: Sequence[str]) -> str:
        left = self.text[max(0, match.start() - _NEAR) : match.start()]
        right = self.text[match.end() : match.end() + _NEAR]
        head = bool(_HEAD.search(left))
        marked = match[0][-1] in ")]}>" or (head and right[:1] in (".", ":"))
        article = named[-1] in "AI" and not marked  # or a pronoun
        verdict = right.lstrip(" .:" if marked else " ")
        own = self._after_own(verdict, named)
        part = article and own and own.strip(" .!") and re.match(r"\s+\w", right)  # "A cat sits on the mat"
        if part or (own is None and re.match(r"\s[-/]\s?\d", right)):  # "A - 15"
            return ""
        marked = marked or own is not None
        verdict = re.sub(r"^\([^()]*\)\s+", "", verdict) if own is None else own.lstrip(" ")
        judged = marked or _AT_ONCE.match(verdict)  # "A dog is right": no mark, so the verdict follows at once
        confirmed, refuted = judged and _RIGHT.match(verdict), judged and _WRONG.match(verdict)
        if _EXCEPT.search(left) or (refuted and not confirmed):
            return "out"
        rest = self.text[match.end() :]
        end = re.search(r"[.!?\n]", rest)
        asked = end and end[0] == "?" and rest[end.end() :].strip()  # a question that more text follows
        if _THING.search(left) or _denied(left) or asked:
            return ""
        told = self._option(named[0])
        if confirmed or (marked and len(told) > 1 and left.casefold().rstrip(" (.").endswith(told)):
            return "stated"  # "B is right", "It is blue (B)."
        if not (marked or _GOES_ON.match(right) or (not article and _ADVERB.match(right))):
            return ""
        if _STATES.search(left):
            return "stated"
        alone = len(named) == 1 and _ENDED.search(left) and re.match(r"\s*[.!]?\s*$", right)
        return "hinted" if head or alone or _HINTS.search(left) else ""

    def _after_own(self, rest: str, named: Sequence[str]) -> str | None:
        """What follows the text of the letter's own option, None where `rest` does not start with it."""
        option = self._option(named[0]) if len(named) == 1 else ""
        match = re.match(rf"(?i)[\s(:,\u2013\u2014-]*{_spaced(option)}\)?", rest) if option else None
        return rest[match.end() :] if match else None

    def _whole(self, text: str) -> int | None:
        """The option that the whole text is, with or without an article; "Yes, it is" is "yes"."""
        key, yes_no = _key(text), short_answer(text).casefold()
        bare = re.sub(r"^(?:an?|the) ", "", key) if text[:1].islower() else ""
        said = (key, bare * (len(bare) > 1), yes_no if yes_no in ("yes", "no") else "")
        return next((self.options.index(one) for one in said if one and self.options.count(one) == 1), None)

    def _told(self) -> int | None:
        """The one option whose words begin the text ("Blue, because ...") or end it ("the colour is blue")."""
        text = self.text.casefold()
        if _DENIES.search(_HEDGE.sub("", text)):
            return None
        named = {o for o in self.options if o and re.search(_spaced(o), text)}
        longest = [o for o in named if not any(o != other and o in other for other in named)]
        if len(longest) != 1 or len(longest[0]) < 2 or self.options.count(longest[0]) > 1:
            return None
        words = _spaced(longest[0])
        begins = longest[0] not in ("yes", "no") and re.match(rf"\W*{words}", text)
        ends = re.search(rf"(?:\b{_IS}|'s|:)\s+(?:(?:an?|the)\s+)?{words}\W*$", text)
        return self.options.index(longest[0]) if begins or ends else None


@lru_cache(maxsize=2)
def _items(with_i: bool) -> re.Pattern[str]:
    """One letter, or several that are tied together; `with_i`: I is one of them, and not a pronoun."""
    one = "[A-Z]" if with_i else "[A-HJ-Z]"
    one = rf"(?:[(\[{{<]\s*{one}\s*[)\]}}>]|{one}\s?[)\]]|{one}(?!\s?[)\]]))"
    joint = (
        r"\s*\(?\s*(?:,?\s*\b(?:and\s?/\s?or|or|and)\b|[,/&;、和或与及]|还是|vs\.?|\?\s*or\b"
        r"|\s[-\u2013]\s(?=[A-Z]\b(?!\s[a-z]))|[-=]>|[\u2192\u00d7\u00b7]|with\b)\s*"
        r"(?:(?:or|and|maybe|possibly|perhaps|probably|even|also|both|either|option|choice|the)\s+)*\(?"
    )
    return re.compile(
        rf"(?<![A-Za-z0-9_'\\/.+=^&-]){one}(?:{joint}{one}(?![A-Za-z0-9'-]))*"
        r"(?![A-Za-z0-9_'\\/^%\u00b0&]|[-\u2013][A-Za-z0-9]|\.[A-Z]\b|\s*[=<>+*\u2248](?!>))"
    )


def _denied(left: str) -> bool:
    """Whether the clause that `left` ends with says no, or only supposes."""
    start = max((found.end() for found in _BREAK.finditer(left)), default=0)
    return _DENIES.search(_HEDGE.sub("", left[start:])) is not None


def _key(text: str) -> str:
    """What makes a text and an option the same."""
    return " ".join(plain(text).casefold().split()).strip("'$ ").rstrip(".").strip("'$ ")


def _spaced(words: str) -> str:
    """A pattern for these words with any white space between, no part of a longer word or number."""
    spaced = r"\s+".join(map(re.escape, words.split()))
    return rf"(?<![\w.-]){spaced}(?!\w|[.,]\d|%)"

"""English words and sentences exactly as datatrove's blocks see them, at a multiple of the speed.

datatrove splits English by spaCy's blank pipeline (`split_into_words`, `split_into_sentences`). What spaCy makes of a
text depends, but for one exception, on each run of characters between white space alone. So each such chunk is split
once, by spaCy's own rules and expressions, and remembered; an expression is searched only where it can match.

The exception: at the end spaCy looks through the tokens of the whole text for those of its special cases and replaces
them, so that ":" and ")" of `foo:)` become an emoticon. Of matches that overlap the longest counts, even one across a
space, which replaces nothing itself. So only a chunk that is changed there can be affected, and only by its neighbours;
a text where that may happen is looked through as a whole.

One string has no answer to agree with: the word IS_ALPHA crashes spaCy from its second occurrence on, whereupon
datatrove removes it from the text. Here it is a word as any other.
"""

import re
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from functools import cache
from itertools import chain, pairwise
from typing import TYPE_CHECKING, TypeVar
from unicodedata import category

if TYPE_CHECKING:
    from spacy.tokenizer import Tokenizer

REMEMBERED = 4_000_000
"""Characters of chunks remembered, some 100 MB of memory; then all are forgotten."""
T = TypeVar("T")

CHUNK = re.compile(r"\S+")
CHUNK_AND_SPACE = re.compile(r"(\S*)(\s*)")

# Where spaCy's expressions for English can match at all.
PREFIX = 3
"""Characters that decide about a prefix (US$), but for full stops."""
SUFFIX = 7
"""Characters that decide about a suffix (five of a unit, two looked back at), but for full stops."""
BARE_END = frozenset("0123456789-/=@\\^|~")
MARK_END = frozenset("!\"#&'()*,:;<>?[]_`{}")
LETTERS_END = re.compile(r"(?:[0-9][^0-9]{1,5}|['’][sS])$")
INFIX = re.compile(r"[-+*^.,~:<>=/]|[^\x00-\x7f]")
HOST = re.compile(r"(?:[\w+.-]{2,}://)?[^./?#:]+\.")


def split_words(text: str) -> list[str]:
    """Words and marks, white space left out: datatrove's `split_into_words(text, Languages.english)`."""
    return english().words(text)


def split_sentences(text: str) -> list[str]:
    """Sentences, which add up to the text: datatrove's `split_into_sentences(text, Languages.english)`."""
    return [text[begin:end] for begin, end in pairwise([0, *english().sentence_ends(text), len(text)])]


def count_sentences(text: str) -> int:
    return 1 + len(english().sentence_ends(text))


@cache
def english() -> "Splitter":
    """The splitter of this process, with all that it remembers."""
    import spacy
    from spacy.pipeline import Sentencizer

    return Splitter(spacy.blank("en").tokenizer, frozenset(Sentencizer.default_punct_chars))


class Memory(dict[str, T]):
    """A function of a chunk whose answers are kept."""

    def __init__(self, function: Callable[[str], T]):
        super().__init__()
        self.function = function

    def __missing__(self, chunk: str) -> T:
        answer = self[chunk] = self.function(chunk)
        return answer


class Splitter:
    """Splits texts as spaCy's tokenizer and sentencizer do.

    Args:
        tokenizer: its rules and expressions are used.
        stops: marks that end a sentence.
        remembered: characters of chunks remembered; then all are forgotten.
    """

    def __init__(self, tokenizer: "Tokenizer", stops: frozenset[str], remembered: int = REMEMBERED):
        from spacy.symbols import ORTH

        self.tokenizer = tokenizer
        self.stops = stops
        self.remembered = remembered
        self.forget()
        self.rules: dict[str, tuple[str, ...]] = {}
        self.longest_rule = 0
        self.phrases: dict[str, list[tuple[str, ...]]] = defaultdict(list)
        """What spaCy looks for at the end: the tokens of special cases when none is known yet, by the first of them."""
        rules = {case: tuple(part[ORTH] for part in parts) for case, parts in tokenizer.rules.items()}
        self.singles: set[str] = set()
        self.pairs: set[tuple[str, str]] = set()
        for case, tokens in rules.items():
            if tokenizer.find_prefix(case) or tokenizer.find_infix(case) or tokenizer.find_suffix(case):
                phrase = self.parts(case)
                self.phrases[phrase[0]].append(phrase)
                self.pairs.update(pairwise(phrase))
                if len(phrase) == 1 and phrase != tokens:
                    self.singles.add(case)
        self.rules = rules
        self.longest_rule = max(map(len, rules))

    def forget(self) -> None:
        self.held = 0
        self.memory = Memory(self.remember)
        self.changed: dict[str, tuple[str, ...]] = {}
        """Chunks that are changed at the end -> their tokens before."""
        self.cuts = Memory(self.cuts_at_rest), Memory(self.cuts_after_stop)
        self.prefixes = Memory(self.tokenizer.find_prefix)

    def words(self, text: str) -> list[str]:
        """Tokens but white space."""
        return list(chain.from_iterable(map(self.memory.__getitem__, self.chunks(text))))

    def sentence_ends(self, text: str) -> list[int]:
        """Where in the text sentences end, but for the last.

        A sentence ends with the last of the marks that follow a stop, before any other token, white space included.
        """
        ends: list[int] = []
        stopped, end = False, 0
        for chunk in self.chunks(text):
            begin = text.find(chunk, end)
            if stopped and text[end:begin] != " ":
                ends.append(end)
                stopped = False
            cuts, stopped = self.cuts[stopped][chunk]
            for cut in cuts:
                ends.append(begin + cut if cut else end)
            end = begin + len(chunk)
        if stopped and text[end:] not in ("", " "):
            ends.append(end)
        return ends

    def chunks(self, text: str) -> list[str]:
        """Pieces of a text that do not depend on each other, white space around them left out.

        They are what white space separates, but that a match across a space may lie over one that changes a chunk.
        """
        if self.held > self.remembered:
            self.forget()
        chunks = text.split()
        deque(map(self.memory.__getitem__, chunks), maxlen=0)
        if self.changed.keys().isdisjoint(chunks):
            return chunks
        together = {self.neighbours(chunks, at) for at, chunk in enumerate(chunks) if chunk in self.changed}
        spans = [match.span() for match in CHUNK.finditer(text)] if any(e - b > 1 for b, e in together) else []
        for begin, end in sorted(together, reverse=True):
            if end - begin > 1:
                chunks[begin:end] = [text[spans[begin][0] : spans[end - 1][1]]]
        return chunks

    def neighbours(self, chunks: list[str], at: int) -> tuple[int, int]:
        """Begin and end of the chunks around one that matches across spaces may tie together."""
        begin, end = at, at + 1
        while begin and self.tied(chunks[begin - 1], chunks[begin]):
            begin -= 1
        while end < len(chunks) and self.tied(chunks[end - 1], chunks[end]):
            end += 1
        return begin, end

    def tied(self, left: str, right: str) -> bool:
        return (self.unchanged(left)[-1], self.unchanged(right)[0]) in self.pairs

    def unchanged(self, chunk: str) -> tuple[str, ...]:
        """The tokens of a chunk before special cases change them at the end."""
        return self.changed.get(chunk) or self.memory[chunk]

    def remember(self, chunk: str) -> tuple[str, ...]:
        """The tokens of a chunk but white space."""
        self.held += len(chunk)
        if not CHUNK.fullmatch(chunk):
            return tuple(token for token in self.tokens(chunk)[0] if not token.isspace())
        tokens = self.parts(chunk)
        if self.pairs.isdisjoint(pairwise(tokens)) and self.singles.isdisjoint(tokens):
            return tokens
        changed = tuple(self.with_phrases(tokens, [False] * len(tokens))[0])
        if changed != tokens:
            self.changed[chunk] = tokens
        return changed

    def tokens(self, text: str) -> tuple[list[str], list[bool]]:
        """All tokens, white space included, and after which of them there is a space that is no token."""
        tokens: list[str] = []
        spaced: list[bool] = []
        for chunk, space in CHUNK_AND_SPACE.findall(text):
            if chunk:
                parts = self.unchanged(chunk)
                tokens += parts
                spaced += [False] * (len(parts) - 1) + [space[:1] == " "]
                space = space.removeprefix(" ")
            if space:
                tokens.append(space)
                spaced.append(False)
        return self.with_phrases(tokens, spaced)

    def with_phrases(self, tokens: Sequence[str], spaced: Sequence[bool]) -> tuple[list[str], list[bool]]:
        """Replace the tokens of special cases, the longest and leftmost first (Tokenizer._apply_special_cases)."""
        found = [
            (-len(phrase), begin)
            for begin, token in enumerate(tokens)
            for phrase in self.phrases.get(token, ())
            if tuple(tokens[begin : begin + len(phrase)]) == phrase
        ]
        seen: set[int] = set()
        replaced: dict[int, tuple[int, tuple[str, ...]]] = {}
        for size, begin in sorted(found):
            end = begin - size
            apart = begin not in seen and end - 1 not in seen and not any(spaced[begin : end - 1])
            if apart and (parts := self.rules.get("".join(tokens[begin:end]))):
                replaced[begin] = end, parts
            seen.update(range(begin, end))
        changed: list[str] = []
        spaces: list[bool] = []
        begin = 0
        while begin < len(tokens):
            end, parts = replaced.get(begin, (begin + 1, (tokens[begin],)))
            changed += parts
            spaces += [False] * (len(parts) - 1) + [spaced[end - 1]]
            begin = end
        return changed, spaces

    def cuts_at_rest(self, chunk: str) -> tuple[tuple[int, ...], bool]:
        if self.stops.isdisjoint(self.memory[chunk]):
            return (), False
        return self.cuts_of(*self.tokens(chunk), stopped=False)

    def cuts_after_stop(self, chunk: str) -> tuple[tuple[int, ...], bool]:
        return self.cuts_of(*self.tokens(chunk), stopped=True)

    def cuts_of(self, tokens: Sequence[str], spaced: Sequence[bool], *, stopped: bool) -> tuple[tuple[int, ...], bool]:
        """Where sentences end within some tokens, and whether a stop waits for what comes after (Sentencizer.predict).

        Args:
            tokens: one after the other.
            spaced: after which of them there is a space.
            stopped: whether a stop came before and only marks since.
        """
        cuts: list[int] = []
        end = begin = 0
        for token, space in zip(tokens, spaced, strict=True):
            if token in self.stops:
                stopped = True
            elif stopped and not is_punctuation(token):
                cuts.append(end)
                stopped = False
            end = begin + len(token)
            begin = end + space
        return tuple(cuts), stopped

    def parts(self, chunk: str) -> tuple[str, ...]:
        """Take prefixes and suffixes off, one of each at a time, then part the rest (Tokenizer._tokenize)."""
        if chunk in self.rules:
            return self.rules[chunk]
        if is_plain(chunk):
            return (chunk,)
        body, last = chunk[:-1], chunk[-1]
        if is_plain(body) and (last in MARK_END or (last == "." and not body[-1].isupper())):
            return (*self.rules.get(body, (body,)), last)
        rules, longest = self.rules, self.longest_rule
        prefixes: list[str] = []
        suffixes: list[str] = []
        begin, end = 0, len(chunk)
        while begin < end:
            if end - begin <= longest and chunk[begin:end] in rules:
                break
            inner = begin + self.prefix(chunk, begin, end)
            if inner > begin:
                prefixes.append(chunk[begin:inner])
                if inner < end and end - inner <= longest and chunk[inner:end] in rules:
                    begin = inner
                    break
            outer = end - self.suffix(chunk, inner, end)
            if outer < end:
                suffixes.append(chunk[outer:end])
                if outer > begin and outer - begin <= longest and chunk[begin:outer] in rules:
                    if inner > begin:
                        prefixes.pop()
                    end = outer
                    break
            if (begin, end) == (inner, outer):
                break
            begin, end = inner, outer
        return (*prefixes, *self.middle(chunk[begin:end]), *reversed(suffixes))

    def prefix(self, chunk: str, begin: int, end: int) -> int:
        """Length of the prefix of part of a chunk."""
        head = chunk[begin : min(begin + PREFIX, end)]
        if head.startswith(".."):
            return next((at for at in range(begin, end) if chunk[at] != "."), end) - begin
        return self.prefixes[head]

    def suffix(self, chunk: str, begin: int, end: int) -> int:
        """Length of the suffix of part of a chunk."""
        tail = chunk[max(begin, end - SUFFIX) : end]
        last = tail[-1:]
        if last in MARK_END:
            return 1
        if last in BARE_END or (last.isascii() and last.isalpha() and not LETTERS_END.search(tail)):
            return 0
        if tail.endswith(".."):
            return end - 1 - next((at for at in range(end - 1, begin - 1, -1) if chunk[at] != "."), begin - 1)
        return self.tokenizer.find_suffix(tail)

    def middle(self, string: str) -> tuple[str, ...]:
        """The tokens of what affixes leave over (Tokenizer._attach_tokens)."""
        if not string:
            return ()
        if string in self.rules:
            return self.rules[string]
        if "." in string and ("@" in string or HOST.match(string)) and self.tokenizer.url_match(string):
            return (string,)
        if not INFIX.search(string):
            return (string,)
        parts = []
        begin = 0
        for match in self.tokenizer.infix_finditer(string):
            if match.start():
                parts += [string[begin : match.start()], match.group()]
                begin = match.end()
        return tuple(filter(None, [*parts, string[begin:]]))


def is_plain(string: str) -> bool:
    """Whether a string is a name of letters and digits in which no expression of spaCy's matches."""
    if not (string.isascii() and string.isidentifier()) or "_" in (string[0], string[-1]):
        return False
    return string.isalpha() or string[-1].isdigit() or not LETTERS_END.search(string, max(0, len(string) - SUFFIX))


def is_punctuation(token: str) -> bool:
    return all(category(character).startswith("P") for character in token)

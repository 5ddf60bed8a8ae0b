"""On the terminal: tables and tokens in colour; plain text where the output is no terminal."""

import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.batch import IGNORED
from tools.inspect.run import Part, Run
from tools.inspect.trail import Corpus, Trail

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text as RichText

    from data_pipeline.tokenizer import Tokenizer

PLAIN_WIDTH = 500
"""A file is not folded."""
EXCERPT = 600
"""Characters of a document that are shown with its way."""
BACKGROUNDS = ("on grey15", "on grey23")
"""Of tokens in turn, so that their boundaries are seen."""
IGNORED_STYLE = "dim italic"


def console() -> "Console":
    from rich.console import Console

    return Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH)


def table(*columns: str) -> Any:
    """Columns whose names begin with # hold numbers."""
    from rich.table import Table

    made = Table(box=None, pad_edge=False, header_style="dim")
    for column in columns:
        made.add_column(column.lstrip("#"), justify="right" if column.startswith("#") else "left")
    return made


def trail(corpus: Corpus, way: Trail) -> None:
    """A document's way."""
    from rich.text import Text

    out = console()
    out.print(Text(way.id, style="bold"))
    origin = [way.metadata.get(key) for key in ("source", "version", "licence", "kind", "date", "url")]
    out.print(Text(", ".join(str(value) for value in origin if value), style="cyan"))
    out.print()
    rows = table("step", "#characters", "#change", "")
    before: int | None = None
    for place in way.places:
        changed = place.characters - before if before is not None and place.characters is not None else 0
        end = Text(f"✗ dropped: {place.reason}", style="red") if place.reason else Text("✓ passed on", style="green")
        if place.note:
            end.append(f"  ({place.note})", style="default")
        rows.add_row(place.step, f"{place.characters:,}", f"{changed:+,}" if changed else "", end)
        before = place.characters
    if way.split:
        rows.add_row("split", "", "", Text(f"→ {way.split}", style="green"))
        where = f"document {way.number:,}: tokens {way.begin:,} to {way.begin + way.tokens - 1:,} ({way.tokens:,})"
        rows.add_row("shards", "", "", Text(where, style="green"))
    out.print(rows)
    if "read" not in corpus.steps:
        out.print("\nThe corpus's steps/ is gone: this is what quarantine and shards still tell.")
    if way.copies:
        out.print(f"\n{len(way.copies)} dropped as copies of it:")
        for name in way.copies:
            out.print(f"  {name}")
    out.print()
    cut = len(way.text) > EXCERPT
    out.print(Text(way.text[:EXCERPT] + (f" … ({len(way.text):,} characters)" if cut else ""), style="dim"))


def step(run: Run, number: int) -> None:
    """The samples and documents of a training step."""
    out = console()
    ks = run.step(number)
    out.print(f"step {number} of {run.directory}: samples {ks.start:,} to {ks.stop - 1:,}\n")
    rows = table("#sample", "corpus", "#epoch", "#window", "#tokens", "document", "source", "licence")
    for k in ks:
        origin = run.origin(k)
        head = (f"{k:,}", origin.source, str(origin.epoch + 1), f"{origin.sample:,}")
        parts = [run.part(span) for span in origin.spans]
        for part in parts:
            rows.add_row(*head, f"{part.span.end - part.span.begin:,}", named(part), part.source, part.licence)
            head = ("", "", "", "")
        if not parts:
            rows.add_row(*head)
    out.print(rows)


def named(part: Part) -> str:
    return part.id or f"document {part.span.document} of {part.span.source}"


@dataclass(frozen=True)
class Token:
    """One token of a sample.

    Args:
        id: of the vocabulary.
        learned: whether the token before predicts it.
        predicts: what it predicts, where that is not the token that follows; None for that, or for nothing.
    """

    id: int
    learned: bool
    predicts: int | None


def sample(run: Run, k: int) -> None:
    """A sample as text, token by token."""
    from rich.text import Text

    out = console()
    batch, origin = run.micro_batch(k), run.origin(k)
    of = f" of {origin.source}" if origin.source else ""
    at = f"step {k // run.global_batch + 1} of {run.steps}"
    out.print(f"sample {k:,} of {run.directory} ({at}): window {origin.sample:,}{of}, epoch {origin.epoch + 1}")
    out.print(f"{batch.tokens_BL.numel():,} tokens, {int((batch.labels_BL != IGNORED).sum()):,} of them predict one")
    if out.is_terminal:
        out.print(Text.assemble("tokens alternate in shade; ", ("what is not learned is dim", IGNORED_STYLE)))
    else:
        out.print(
            "tokens end with ·; what is not learned is in ⟦ ⟧; after → stands what is predicted and does not follow"
        )
    parts = [run.part(span) for span in origin.spans]
    rows = zip(batch.tokens_BL.tolist(), batch.labels_BL.tolist(), batch.documents_BL.tolist(), strict=True)
    for row, (tokens, labels, documents) in enumerate(rows):
        if len(batch.tokens_BL) > 1:
            out.print(f"\n{'chosen' if 2 * row < len(batch.tokens_BL) else 'rejected'}:", style="bold")
        for begin, end in stretches(documents):
            out.print()
            if documents[begin] < 0:
                out.print(f"{end - begin:,} tokens of padding", style="dim")
                continue
            out.print(Text(border(parts, begin, end), style="bold cyan"))
            out.print(drawn(run.tokenizer, told(tokens, labels, begin, end), out.is_terminal))


def stretches(documents: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Begin and end of the tokens that stand together and are of one document."""
    begin = 0
    for _, members in itertools.groupby(documents):
        end = begin + sum(1 for _ in members)
        yield begin, end
        begin = end


def told(tokens: Sequence[int], labels: Sequence[int], begin: int, end: int) -> list[Token]:
    """The tokens of a stretch, with what is predicted."""
    found = []
    for place in range(begin, end):
        learned = place > 0 and labels[place - 1] == tokens[place]
        follows = place + 1 < len(tokens) and labels[place] == tokens[place + 1]
        predicts = None if follows or labels[place] == IGNORED else labels[place]
        found.append(Token(tokens[place], learned, predicts))
    return found


def border(parts: Sequence[Part], begin: int, end: int) -> str:
    """What is said before the tokens [begin, end) of a sample: whose they are."""
    for part in parts:
        length = part.span.end - part.span.begin
        if begin < length:
            first = part.span.begin + begin
            where = f"tokens {first:,} to {first + end - begin - 1:,}" + (f" of {part.length:,}" if part.length else "")
            return "── " + ", ".join(word for word in (named(part), part.source, part.licence, where) if word)
        begin, end = begin - length, end - length
    return f"── {end - begin:,} tokens"


def drawn(tokenizer: "Tokenizer", tokens: Sequence[Token], coloured: bool) -> "RichText":
    """Tokens as text. A character of several tokens stands with the last of them."""
    from rich.text import Text
    from tokenizers.decoders import DecodeStream

    stream = DecodeStream(skip_special_tokens=False)
    text = Text()
    for place, token in enumerate(tokens):
        shown = (stream.step(tokenizer.backend, token.id) or "").replace("\n", "↵\n")
        if token.predicts is not None:
            shown += f"→{tokenizer.backend.decode([token.predicts], skip_special_tokens=False)!r}"
        if coloured:
            style = f"{BACKGROUNDS[place % 2]}{'' if token.learned else ' ' + IGNORED_STYLE}"
            text.append(shown, style=style)
            continue
        opens = not token.learned and (place == 0 or tokens[place - 1].learned)
        closes = not token.learned and (place + 1 == len(tokens) or tokens[place + 1].learned)
        text.append(f"{'⟦' if opens else ''}{shown}{'⟧' if closes else ''}·")
    return text


def seen(run: Run, way: Trail, stem: Path) -> None:
    """The steps of a run that see a document."""
    out = console()
    if way.split != stem.name:
        why = f"it is in the {way.split} split" if way.split else "it was dropped"
        out.print(f"{way.id}: no training step sees it, {why}.")
        return
    out.print(f"{way.id}: document {way.number:,} of {stem}, {way.tokens:,} tokens\n")
    rows = table("#step", "#sample", "#epoch", "tokens of it")
    count = 0
    for k in run.seen(stem, way.number):
        origin = run.origin(k)
        spans = [span for span in origin.spans if span.document == way.number and Path(span.source) == stem]
        where = ", ".join(f"{span.begin:,} to {span.end - 1:,}" for span in spans)
        rows.add_row(f"{k // run.global_batch + 1:,}", f"{k:,}", str(origin.epoch + 1), where)
        count += 1
    if count:
        out.print(rows)
    else:
        out.print(f"No step of the {run.steps:,} sees it.")

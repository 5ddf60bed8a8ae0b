"""Chats as people export them from assistants, and conversations in JSON lines, turned into documents.

Recognised by their shape: ChatGPT's conversations.json (a tree of messages under "mapping", of which the branch shown
last is read), Claude's ("chat_messages"), {"messages": [{"role", "content"}]} and
{"conversations": [{"from", "value"}]}.
"""

import codecs
import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import orjson
from datatrove.data import Document

from data_pipeline.readers.archives import MALFORMED, allowance
from data_pipeline.readers.reading import SHOWN, FileReader, encodable, iso, named, plain
from data_pipeline.readers.streams import BLOCK, LONGEST_LINE, DamageError, blocks, lines

EXPORT = "conversations.json"
"""In the zip archive that one gets."""
SPEAKERS = {"user": "User", "human": "User", "assistant": "Assistant", "gpt": "Assistant", "system": "System"}
"""Role -> how a document says it. Messages of others (tools) are left out."""
LONGEST_CHAT = 4 * LONGEST_LINE
"""Characters. A longer element of an export is no conversation."""


@dataclass(frozen=True)
class Chat:
    """A conversation.

    Args:
        turns: (role, text), in order.
        id: as the export names it; empty if it does not.
        title: likewise.
        date: likewise, as it is written there.
    """

    turns: list[tuple[str, str]]
    id: str = ""
    title: str = ""
    date: Any = None

    @property
    def text(self) -> str:
        said = [f"{SPEAKERS[role]}: {text.strip()}" for role, text in self.turns if role in SPEAKERS and text.strip()]
        return "\n\n".join([self.title, *said] if self.title and said else said)


class ExportReader(FileReader):
    """Exports of chats (.json, or the .zip that it came in) and conversations in JSON lines: one document each.

    Args:
        found: the files.
        kind: "prose" or "code".
    """

    name = "💬 Chats"

    def documents(self, file: Path, name: str) -> Iterator[Document]:
        number = 0
        try:
            for number, record in enumerate(records(file), 1):
                yield self.conversation(record, f"{name}:{number}")
        except MALFORMED as error:
            raise DamageError(f"{type(error).__name__}: {error}") from error
        if not number:
            yield self.origin.fault(name, self.kind, "empty")

    def conversation(self, record: Any, path: str) -> Document:
        if isinstance(record, DamageError):
            return self.origin.fault(path, self.kind, "not_json", str(record), record.rest)
        try:
            chat = understood(record)
        except (TypeError, KeyError, AttributeError, RecursionError) as error:
            return self.origin.fault(path, self.kind, "no_chat", f"{type(error).__name__}: {error}", plain(record))
        if chat is None:
            return self.origin.fault(path, self.kind, "no_chat", "not of a shape that is known", plain(record))
        document = self.origin.document(path, self.kind, encodable(chat.text), date=iso(chat.date))
        if chat.id:
            document.id = f"{encodable(self.origin.name)}#{chat.id}"
        return document


def understood(record: Any) -> Chat | None:
    """The conversation in a record of any known shape; None for another."""
    if not isinstance(record, dict):
        return None
    name, title = named(record.get("uuid") or record.get("id") or record.get("conversation_id")), ""
    title = next((record[key] for key in ("title", "name") if isinstance(record.get(key), str)), "")
    date = record.get("create_time") or record.get("created_at") or record.get("date")
    if isinstance(record.get("mapping"), dict):
        return Chat(branch(record["mapping"], record.get("current_node")), name, title, date)
    shapes = (("chat_messages", "sender", "text"), ("messages", "role", "content"), ("conversations", "from", "value"))
    for key, role, text in shapes:
        if isinstance(record.get(key), list):
            turns = [(str(message[role]), said(message.get(text) or message.get("content"))) for message in record[key]]
            return Chat(turns, name, title, date)
    return None


def branch(nodes: dict[str, Any], last: Any) -> list[tuple[str, str]]:
    """The turns that lead to a node of ChatGPT's tree; to its last leaf, where none is named."""
    if last not in nodes:
        last = next((name for name in reversed(nodes) if not nodes[name].get("children")), None)
    turns: list[tuple[str, str]] = []
    passed: set[str] = set()
    while last in nodes and last not in passed:
        passed.add(last)
        node = nodes[last]
        if message := node.get("message"):
            turns.append((str(message["author"]["role"]), said(message.get("content"))))
        last = node.get("parent")
    return turns[::-1]


def said(content: Any) -> str:
    """The text of a message; pictures and what tools answered are left out."""
    if isinstance(content, dict):
        return said(content.get("parts") or content.get("text"))
    if isinstance(content, list):
        return "\n".join(filter(None, map(said, content)))
    return content if isinstance(content, str) else ""


def records(file: Path) -> Iterator[Any]:
    """The elements of a JSON list, or the records of JSON lines; in place of one that is none a `DamageError`.

    Raises:
        DamageError: the file breaks off; of a zip archive, comes after what its other exports hold.
    """
    if ".jsonl" in file.name.lower():
        for line in lines(file):
            if line.content.strip():
                yield parsed(line.content) if line.whole else DamageError(f"{line.size:,} bytes", line.content)
    elif file.suffix.lower() == ".zip":
        with zipfile.ZipFile(file) as archive:
            inner = [info for info in archive.infolist() if info.filename.split("/")[-1] == EXPORT]
            if not inner:
                raise DamageError(f"no {EXPORT} in it")
            if sum(info.file_size for info in inner) > allowance(file):
                raise DamageError("it unpacks to more than an archive of its size may")
            damaged: list[str] = []
            rest = b""
            for info in inner:
                try:
                    with archive.open(info) as stream:
                        yield from elements(iter(partial(stream.read1, BLOCK), b""))  # type: ignore[attr-defined]
                except (*MALFORMED, DamageError) as error:
                    damaged.append(f"{info.filename}: {error}")
                    rest = rest or getattr(error, "rest", b"")
            if damaged:
                raise DamageError("; ".join(damaged), rest)
    else:
        yield from elements(blocks(file))


def parsed(content: bytes) -> Any:
    try:
        return orjson.loads(content)
    except orjson.JSONDecodeError as error:
        return DamageError(str(error), content)


def elements(content: Iterator[bytes]) -> Iterator[Any]:
    """The elements of a JSON list, each as soon as it is whole; memory is bounded by the largest.

    Raises:
        DamageError: it is no list, an element is no JSON, or the list breaks off.
    """
    decoder, characters = json.JSONDecoder(), codecs.getincrementaldecoder("utf-8-sig")()
    text, position, opened, tried = "", 0, False, 0
    while True:
        block = next(content, b"")
        try:
            text = text[position:] + characters.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise DamageError(f"not UTF-8: {error}", text[position:].encode("utf-8", "replace")[:SHOWN]) from error
        position = 0
        while True:
            position = blank(text, position, "," if opened else "")
            if position == len(text):
                break
            if not opened:
                if text[position] != "[":
                    raise DamageError("it is no JSON list", text.encode("utf-8", "replace")[:SHOWN])
                opened, position = True, position + 1
                continue
            if text[position] == "]":
                if text[position + 1 :].strip() or next(content, b"").strip():
                    raise DamageError("something follows the list")
                return
            if block and len(text) - position < tried:
                break  # an element that was not whole is tried again when there is twice as much of it
            try:
                element, position = decoder.raw_decode(text, position)
            except RecursionError as error:
                raise DamageError("it is nested too deep") from error
            except ValueError as error:
                tried = 2 * (len(text) - position)
                if not block or tried > 2 * LONGEST_CHAT:
                    rest = text[position : position + SHOWN].encode("utf-8", "replace")
                    raise DamageError(f"an element is no JSON, or does not end: {error}", rest) from error
                break
            tried = 0
            yield element
        if not block:
            raise DamageError("it breaks off within the list" if opened else "there is nothing in it")


def blank(text: str, position: int, also: str) -> int:
    while position < len(text) and text[position] in " \t\r\n" + also:
        position += 1
    return position

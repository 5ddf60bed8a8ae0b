"""What evaluation sets ask and answer, from the files that they come in.

*.jsonl, .gz, .zst   a record a line: chats and preferences as ours, lm-eval's logged samples, most data sets of the hub
*.json               a list of such records, or an object that holds such lists, as BIG-bench's task.json
*.txt, *.md          an item a paragraph
directory            all such files in it but those of training splits; our artifacts of conversations are such
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.errors import LongrunError
from data_pipeline.artifact import MANIFEST, Artifact

RECORDS = (".jsonl", ".jsonl.gz", ".jsonl.zst")
ENDINGS = (*RECORDS, ".json", ".txt", ".md")
KINDS = ("chat",)
"""Of artifacts that are evaluation sets."""
QUERIES = ("question", "query", "prompt", "input", "instruction", "problem", "ctx", "goal")
"""Fields of a record that ask; where there are several they are read one after the other, in the record's order."""
LABELS = (
    "answer", "answers", "label", "target", "target_scores", "output", "completion", "response", "solution",
    "canonical_solution", "chosen", "best_answer", "correct_answer", "answerKey", "gold",
)  # fmt: skip
"""Fields that answer; the first that a record has is read."""
OPTIONS = ("choices", "endings", "options")
"""Fields with the answers to choose from; the label is then a number or a letter."""


class EvaluationSetError(LongrunError):
    """An evaluation set is not there, or holds what cannot be read as questions and answers."""


@dataclass(frozen=True)
class Item:
    """One thing that a model is tested on.

    Args:
        query: what it is given; empty where the item is nothing but a text.
        labels: right answers, or the text.
    """

    query: str
    labels: tuple[str, ...]


def read_set(path: str | Path) -> list[Item]:
    """All items of an evaluation set.

    Args:
        path: a file or a directory.

    Raises:
        EvaluationSetError: it does not exist, is an artifact that holds no items, or a record has no field that is
            known; names file and record.
    """
    items = [item for file in files_of(Path(path)) for item in _items_of(file)]
    if not items:
        raise EvaluationSetError(f"{path} holds no item to test a model on; give another file or directory.")
    return items


def set_name(path: str) -> str:
    """What an evaluation set is called: the end of its path, without the file's ending."""
    name = Path(path).name
    return name.removesuffix(max((ending for ending in ENDINGS if name.endswith(ending)), key=len, default=""))


def files_of(path: Path) -> list[Path]:
    """The files that an evaluation set is in, training splits left out.

    Raises:
        EvaluationSetError: there is none.
    """
    if not path.exists():
        raise EvaluationSetError(f"{path} does not exist; give the path of an evaluation set, or make it first.")
    if path.is_file() and path.name.endswith(ENDINGS):
        return [path]
    if (path / MANIFEST).exists() and (kind := Artifact.read(path).kind) not in KINDS:
        raise EvaluationSetError(f"{path} holds a {kind!r}; an evaluation set is of kind {', '.join(KINDS)}, or files.")
    files = [file for file in sorted(path.rglob("*")) if file.name.endswith(ENDINGS) and file.name != MANIFEST]
    files = [file for file in files if "train" not in re.split(r"[^a-z]+", file.name.lower())]
    if not files:
        raise EvaluationSetError(
            f"{path} is no evaluation set: expected a file or a directory of files that end in {', '.join(ENDINGS)}, "
            "other than those of a training split."
        )
    return files


def _items_of(file: Path) -> Iterator[Item]:
    if not file.name.endswith((*RECORDS, ".json")):
        for paragraph in re.split(r"\n\s*\n", _text_of(file)):
            if paragraph.strip():
                yield Item("", (paragraph,))
        return
    for number, record in enumerate(_records_of(file), 1):
        found = items_of_record(record)
        if not found:
            seen = f"the fields {', '.join(record)}" if isinstance(record, dict) else f"a {type(record).__name__}"
            raise EvaluationSetError(
                f"{file}, record {number}: found {seen}; expected text, messages, prompt and chosen, or a question "
                f"({', '.join(QUERIES)}) or an answer ({', '.join(LABELS)}). Rename the fields."
            )
        yield from found


def _records_of(file: Path) -> Iterator[Any]:
    text = _text_of(file)
    if file.name.endswith(RECORDS):
        lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    else:
        lines = [(1, text)]
    for number, line in lines:
        try:
            content = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise EvaluationSetError(
                f"{file}, line {number}: not JSON ({error}); mend or leave out the file."
            ) from error
        yield from _within(content) if file.name.endswith(".json") else [content]


def _within(content: Any) -> Iterator[Any]:
    """The records of a JSON file."""
    if isinstance(content, list):
        yield from content
        return
    lists = []
    if isinstance(content, dict) and not items_of_record(content):
        lists = [value for key, value in content.items() if isinstance(value, list) and "train" not in key]
        lists = [value for value in lists if any(isinstance(record, dict) for record in value)]
    yield from (record for value in lists for record in value) if lists else [content]


def _text_of(file: Path) -> str:
    import fsspec

    try:
        with fsspec.open(str(file), "rt", encoding="utf-8", compression="infer") as stream:
            return stream.read()
    except (UnicodeDecodeError, EOFError, OSError) as error:
        raise EvaluationSetError(f"{file} cannot be read ({error}); give it anew, in UTF-8.") from error


def items_of_record(record: Any) -> list[Item]:
    """The items of one record: several for a conversation, none where no field is known."""
    if isinstance(record, str):
        return [Item("", (record,))]
    if not isinstance(record, dict):
        return []
    if isinstance(record.get("doc"), dict):  # as lm-eval logs samples
        return items_of_record(record["doc"])
    if isinstance(record.get("messages"), list):
        return _turns(record["messages"])
    if isinstance(record.get("prompt"), list):
        return _turns([*record["prompt"], *_listed(record.get("chosen"))])
    query = "\n".join(record[field] for field in record if field in QUERIES and isinstance(record[field], str))
    labels = tuple(filter(None, _labels(record)))
    if query or labels:
        return [Item(query, labels)]
    text = record.get("text")
    return [Item("", (text,))] if isinstance(text, str) else []


def _turns(messages: Sequence[Any]) -> list[Item]:
    """An item per answer of the assistant; what was said since the last one is the query."""
    items: list[Item] = []
    said: list[str] = []
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, str) and message.get("role") == "assistant":
            items.append(Item("\n".join(said), (content,)))
            said = []
        elif isinstance(content, str) and message.get("role") == "user":
            said.append(content)
    return [*items, Item("\n".join(said), ())] if said else items


def _labels(record: dict[str, Any]) -> list[str]:
    field = next((field for field in LABELS if field in record), None)
    options: Any = next((record[name] for name in OPTIONS if name in record), [])
    if field is None:
        return []
    label = record[field]
    if isinstance(label, dict):
        if field == "target_scores":  # BIG-bench: answer -> score
            return [answer for answer, score in label.items() if score == max(label.values())]
        return [text for text in _listed(label.get("text")) if isinstance(text, str)]
    names: list[Any] = []
    if isinstance(options, dict):
        options, names = _listed(options.get("text")), _listed(options.get("label"))
    chosen = [_chosen(one, options, names) for one in _listed(label)]
    return [text for text in chosen if isinstance(text, str)]


def _chosen(label: Any, options: Sequence[Any], names: Sequence[Any]) -> Any:
    """The option that a label names, by its name, letter or number; the label itself where it names none."""
    if label in names:
        return options[names.index(label)]
    place = label
    if isinstance(label, str):
        place = int(label) if label.isdecimal() else ord(label.upper()) - ord("A") if len(label) == 1 else -1
    if isinstance(place, int) and not isinstance(place, bool) and 0 <= place < len(options):
        return options[place]
    return str(label) if isinstance(label, int | float) else label


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]

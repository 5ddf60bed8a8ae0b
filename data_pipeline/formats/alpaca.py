"""{"instruction", "input"?, "output", "system"?, "history"?}, as in Stanford Alpaca (Taori et al. 2023)."""

from data_pipeline.formats.base import CHAT, Converted, Format, Record, offered, others, says, text, tools
from data_pipeline.records import found


@offered("alpaca")
class Alpaca(Format):
    """The input follows the instruction after an empty line. The history is pairs of question and answer."""

    keys = ("instruction", "output")

    def convert(self, record: Record, faults: list[str]) -> list[Converted]:
        instruction, answer = text(record, "instruction", faults), text(record, "output", faults)
        given = text(record, "input", faults, may_be_empty=True)
        head = [says("system", text(record, "system", faults))] if record.get("system") else []
        history = record.get("history") or []
        if not isinstance(history, list):
            faults.append(f"history is {found(history)}; expected a list of [question, answer]")
            history = []
        for number, pair in enumerate(history):
            if isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair):
                head += [says("user", pair[0]), says("assistant", pair[1])]
            else:
                faults.append(f"history[{number}] is {found(pair)}; expected [question, answer]")
        question = f"{instruction}\n\n{given}" if given.strip() else instruction
        left = others(record, "instruction", "input", "output", "system", "history")
        said = [*head, says("user", question), says("assistant", answer)]
        return [Converted(CHAT, {"messages": said, **tools(record, faults), **left})]

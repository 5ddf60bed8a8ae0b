"""Answers found good or bad, each without a second one to compare (Ethayarajh et al. 2024, arXiv:2402.01306)."""

from typing import Any

from data_pipeline.chat import declared_faults
from data_pipeline.records import found, message_faults, without_assistant
from data_pipeline.tool_calls import exchange_faults


def kto_faults(record: Any) -> list[str]:
    """What keeps a record from being {"prompt": [messages], "completion": [messages], "label": true or false}."""
    if not isinstance(record, dict):
        return [f'a {type(record).__name__}; expected an object {{"prompt": [...], "completion": [...], "label": ...}}']
    faults = [fault for field in ("prompt", "completion") for fault in message_faults(record.get(field), field)]
    faults += declared_faults(record)
    if not isinstance(record.get("label"), bool):
        faults.append(f"label is {found(record.get('label'))}; expected true or false")
    if not faults:
        whole = record["prompt"] + record["completion"]
        faults += [f"prompt and completion: {fault}" for fault in exchange_faults(whole, record.get("tools"))]
        if without_assistant(record["completion"]):
            faults.append("completion has no assistant turn; expected the answer to the prompt")
    return faults

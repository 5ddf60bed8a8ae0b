"""Files of records: every row comes out, as a record or as a fault."""

import gzip
import json
import random

import pytest
import zstandard

from data_pipeline import rows as module
from data_pipeline.examples import Ledger, Source, convert
from data_pipeline.rows import FileError, rows
from tests.data_pipeline.test_formats import CASES

RECORDS = [{"n": n, "text": f"Über {n}", "inner": {"list": [1, 2.5, None, True]}} for n in range(50)]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()


def write(tmp_path, ending: str):
    file = tmp_path / f"train{ending}"
    if ending == ".parquet":
        import pyarrow
        from pyarrow import parquet

        flat = [{"n": record["n"], "text": record["text"]} for record in RECORDS]
        parquet.write_table(pyarrow.Table.from_pylist(flat), file)
        return file
    content = {
        ".jsonl": LINES,
        ".jsonl.gz": gzip.compress(LINES),
        ".jsonl.zst": zstandard.compress(LINES[:1000]) + zstandard.compress(LINES[1000:]),
        ".json": json.dumps(RECORDS).encode(),
    }
    file.write_bytes(content[ending])
    return file


@pytest.mark.parametrize("ending", module.READERS)
def test_every_kind_of_file_gives_its_records(ending, tmp_path):
    found = list(rows(write(tmp_path, ending)))
    assert [row.number for row in found] == list(range(1, 51))
    assert not any(row.reason for row in found)
    if ending == ".parquet":
        assert [row.value["text"] for row in found] == [record["text"] for record in RECORDS]
    else:
        assert [row.value for row in found] == RECORDS


@pytest.mark.parametrize("ending", [".jsonl.gz", ".jsonl.zst", ".json", ".parquet"])
def test_a_file_that_is_cut_off_is_an_error_and_not_a_shorter_file(ending, tmp_path):
    file = write(tmp_path, ending)
    whole = file.read_bytes()
    for length in (len(whole) - 1, len(whole) // 2, 3):
        file.write_bytes(whole[:length])
        with pytest.raises(FileError, match=r"train.*(cannot be read to its end|is not JSON)"):
            list(rows(file))


def test_other_endings_and_other_json_are_refused(tmp_path):
    (tmp_path / "train.csv").write_text("a,b")
    with pytest.raises(FileError, match=r"ends in none of \.jsonl, \.jsonl\.gz"):
        list(rows(tmp_path / "train.csv"))
    (tmp_path / "train.json").write_text('{"data": []}')
    with pytest.raises(FileError, match="holds one dict; expected an array of records"):
        list(rows(tmp_path / "train.json"))


def test_nulls_of_a_table_are_absent(tmp_path):
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.Table.from_pylist([{"a": [{"x": 1, "y": None}], "b": None}, {"a": [{"x": None, "y": 2}], "b": "b"}])
    parquet.write_table(table, tmp_path / "train.parquet")
    assert [row.value for row in rows(tmp_path / "train.parquet")] == [{"a": [{"x": 1}]}, {"a": [{"y": 2}], "b": "b"}]


UNFIT = {
    "not_utf8": b'{"a": "\xff"}',
    "not_json": b'{"a": ',
    "nul": b'{"a": "x\\u0000"}',
    "not_unicode": b'{"a": ["\\ud83d"]}',
    "too_deep": b"[" * 100_000,
    "too_long": b'{"a": "' + b"x" * 2000 + b'"}',
}


@pytest.mark.parametrize("reason", UNFIT)
def test_a_line_that_is_no_record_is_a_row_with_a_reason(reason, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LONGEST_LINE", 200_000 if reason == "too_deep" else 1000)
    (tmp_path / "train.jsonl").write_bytes(b'{"n": 1}\n\n' + UNFIT[reason] + b'\n{"n": 2}')
    one, bad, two = rows(tmp_path / "train.jsonl")
    assert (one.number, one.value, two.number, two.value) == (1, {"n": 1}, 4, {"n": 2})
    assert (bad.number, bad.reason, bad.value) == (3, reason, None)
    assert bad.fault and bad.beginning and len(bad.beginning) <= 200
    json.dumps(bad.beginning, ensure_ascii=False).encode()


@pytest.mark.parametrize(
    "line", [b"NaN", b"[1e999]", b"-Infinity", b"\x00", b'{"a": "\x00"}', b"1" * 5000, b"[" * 70 + b"]" * 70]
)
def test_numbers_and_depths_that_other_programs_choke_on_are_no_records(line, tmp_path):
    (tmp_path / "train.jsonl").write_bytes(line)
    (row,) = rows(tmp_path / "train.jsonl")
    assert row.reason in ("not_json", "too_deep")


def test_a_mark_at_the_head_of_a_file_and_ends_of_other_systems_are_no_fault(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(b'\xef\xbb\xbf{"n": 1}\r\n{"n": 2}\r\n\r\n')
    assert [row.value for row in rows(tmp_path / "train.jsonl")] == [{"n": 1}, {"n": 2}]


def mutated(line: bytes, draw: random.Random) -> bytes:
    """One record with bytes changed, cut, doubled or put in, or a value of another type."""
    kind = draw.randrange(6)
    at = draw.randrange(len(line))
    if kind == 0:
        return line[:at] + bytes([draw.randrange(256)]) + line[at + 1 :]
    if kind == 1:
        return line[:at]
    if kind == 2:
        return line[:at] + line[at : at + 20] * draw.randrange(2, 50) + line[at:]
    if kind == 3:
        return (
            line[:at]
            + draw.choice([b"\x00", b"\\u0000", b"\\ud800", b"\xff\xfe", b"NaN", b"\n", b"[[[", b'"'])
            + line[at:]
        )
    record = json.loads(line)
    values = [None, 3, -1.5, True, "", " ", [], {}, [None], [{}], ["x", 3], {"role": "user"}, [[[]]], "\x00", 10**30]
    key = draw.choice(list(record))
    if kind == 4 and isinstance(record[key], list) and record[key]:
        place = draw.randrange(len(record[key]))
        record[key][place] = draw.choice(values)
        if isinstance(inner := json.loads(line)[key][place], dict) and inner and draw.random() < 0.7:
            record[key][place] = inner | {draw.choice(list(inner)): draw.choice(values)}
    else:
        record[draw.choice([key, "tools", "system", "scores"])] = draw.choice(values)
    return json.dumps(record).encode()


def run_mutations(tmp_path, count: int, seed: int) -> None:
    draw = random.Random(seed)
    lines = [json.dumps(record).encode() for record, _ in CASES.values()]
    file = tmp_path / "train.jsonl"
    given = [
        mutated(draw.choice(lines), draw).replace(b"\n", b" ") if draw.random() < 0.9 else draw.choice(lines)
        for _ in range(count)
    ]
    given = [line if line.strip() else b"0" for line in given]
    file.write_bytes(b"\n".join(given))
    ledger = Ledger()
    examples = convert([Source(file, None, "train")], "", {}, True, ledger)
    passed = {example.place for example in examples}
    refused = {drop["place"] for drop in ledger.quarantine}
    assert not passed & refused and len(passed) + len(refused) == count, "every line is passed on or in quarantine"
    assert passed and refused and all(drop["reason"] and drop["fault"] for drop in ledger.quarantine)
    for record in [example.record for example in examples] + ledger.quarantine:
        assert json.loads(json.dumps(record, ensure_ascii=False).encode()) == record


def test_mutated_records_are_passed_on_or_in_quarantine(tmp_path):
    run_mutations(tmp_path, 300, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_many_mutated_records_are_passed_on_or_in_quarantine(seed, tmp_path):
    run_mutations(tmp_path, 10_000, seed)


@pytest.mark.slow
@pytest.mark.parametrize("ending", module.READERS)
def test_mutated_files_are_read_or_refused(ending, tmp_path):
    whole = write(tmp_path, ending).read_bytes()
    draw = random.Random(ending)
    file = tmp_path / f"mutated{ending}"
    for _ in range(10_000):
        at = draw.randrange(len(whole))
        file.write_bytes(draw.choice([whole[:at], whole[:at] + bytes([draw.randrange(256)]) + whole[at + 1 :]]))
        try:
            for row in rows(file):
                assert row.value is None or not row.reason
        except FileError:
            pass

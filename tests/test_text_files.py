"""Rows of text files: every usual spelling of the same rows gives the same rows, and the rest is named."""

import bz2
import codecs
import gzip
import io
import json
import lzma
import os
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from sppo_jax.errors import BadInput
from sppo_jax.text import rows
from sppo_jax.text.source import Source

# Characters whose bytes in UTF-16 hold a line feed, separators that are not ends of lines, and one outside of Unicode's first plane.
ROWS = [{"prompt": f"Row {i}: 上 Ċ \u2028 \x85 é 🦊?", "n": i} for i in range(700)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
PLAIN = LINES.encode()


def read(path, kind="jsonl", column="prompt", split="train"):
    return list(rows.rows(Source("prompts.source", f"{kind}:{path}", split), [column]))


def refused(path, kind="jsonl", column="prompt"):
    with pytest.raises(BadInput) as caught:
        read(path, kind, column)
    message = str(caught.value)
    assert message.startswith(f"prompts.source={kind}:{path}: ")
    assert "\n" not in message
    return message


def by_arrow(codec, data=PLAIN):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, codec) as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


ENCODED = {
    "UTF-8": PLAIN,
    "UTF-8 with a mark": codecs.BOM_UTF8 + PLAIN,
    "UTF-16 as Windows writes it": codecs.BOM_UTF16_LE + LINES.replace("\n", "\r\n").encode("utf-16-le"),
    "UTF-16 big-endian": codecs.BOM_UTF16_BE + LINES.encode("utf-16-be"),
    "UTF-32": LINES.encode("utf-32"),
    "two files joined, each with a mark": b"".join(
        codecs.BOM_UTF8 + part for part in (PLAIN[: PLAIN.index(b"\n") + 1], PLAIN[PLAIN.index(b"\n") + 1 :])
    ),
    "CR": PLAIN.replace(b"\n", b"\r"),
    "CR LF, blank lines and no last end": PLAIN.replace(b"\n", b"\r\n\r\n").strip(),
}


@pytest.mark.parametrize("data", ENCODED.values(), ids=ENCODED.keys())
def test_no_row_is_lost_or_garbled_in_any_encoding_with_a_mark_and_with_any_end_of_line(tmp_path, data):
    (tmp_path / "rows").write_bytes(data)
    assert read(tmp_path / "rows") == ROWS


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ('{"prompt": "a"}\n{"prompt": "café"}\n'.encode("latin-1"), "not UTF-8 (byte 0xE9 in line 2)"),
        (PLAIN + '{"prompt": "it’s"}\n'.encode("cp1252"), "not UTF-8 (byte 0x92 in line 701)"),
        ('{"prompt": "問題"}\n'.encode("shift-jis"), "not UTF-8 (byte 0x96 in line 1)"),
        (LINES.encode("utf-16-le"), "UTF-16 without a mark"),
        (LINES.encode("utf-16-be"), "UTF-16 without a mark"),
        (LINES.encode("utf-32-le"), "UTF-32 without a mark"),
        (LINES.encode("utf-16")[:-1], "not UTF-16"),
        (PLAIN + LINES.encode("utf-16"), "not UTF-8 (byte 0xFF in line 701)"),
        (PLAIN + LINES[:100].encode("utf-16-le"), "line 701 holds NUL"),
        (PLAIN + bytes(4096), "line 701 holds NUL"),
        (gzip.compress('{"prompt": "café"}\n'.encode("latin-1"), mtime=0), "not UTF-8 (byte 0xE9 in line 1)"),
        (bytes(range(256)), "a binary file"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_utf8_is_refused_by_name_and_by_line(tmp_path, data, said):
    (tmp_path / "rows.jsonl").write_bytes(data)
    message = refused(tmp_path / "rows.jsonl")
    assert said in message
    assert "UTF-8" in message or "JSON lines" in message


PACKED = {
    "gzip": gzip.compress(PLAIN),
    "gzip in two members": gzip.compress(PLAIN[: PLAIN.index(b"\n", 9000) + 1]) + gzip.compress(PLAIN[PLAIN.index(b"\n", 9000) + 1 :]),
    "bz2": bz2.compress(PLAIN),
    "xz": lzma.compress(PLAIN),
    "zstd": by_arrow("zstd"),
    "lz4": by_arrow("lz4"),
    "UTF-16 in gzip": gzip.compress(LINES.encode("utf-16")),
}  # fmt: skip


@pytest.mark.parametrize("data", PACKED.values(), ids=PACKED.keys())
def test_compressed_rows_are_read_whatever_the_name_of_the_file(tmp_path, data):
    (tmp_path / "rows").write_bytes(data)
    assert read(tmp_path / "rows") == ROWS
    (tmp_path / "rows").write_bytes(data[:-40])
    assert "is it whole?" in refused(tmp_path / "rows")


DOCUMENTS = {
    "an array": json.dumps(ROWS),
    "an array, indented": json.dumps(ROWS, indent=2),
    "an array, a row per line": "[\n" + ",\n".join(map(json.dumps, ROWS)) + "\n]\n",
    "objects joined by commas": ",\n".join(map(json.dumps, ROWS)),
    "objects joined by commas, the last with one": ",\n".join(map(json.dumps, ROWS)) + ",\n",
    "objects joined by commas and spaces": " , \r\n".join(map(json.dumps, ROWS)),
    "objects on one line": "".join(map(json.dumps, ROWS)),
    "objects on one line, joined by commas": ",".join(map(json.dumps, ROWS)),
    "objects joined by commas, indented": ",\n".join(json.dumps(row, indent=2) for row in ROWS),
    "objects, indented": "\n".join(json.dumps(row, indent=2) for row in ROWS),
}  # fmt: skip


@pytest.mark.parametrize("text", DOCUMENTS.values(), ids=DOCUMENTS.keys())
def test_json_that_spans_lines_gives_the_same_rows(tmp_path, text):
    (tmp_path / "rows.json").write_text(text)
    assert read(tmp_path / "rows.json") == ROWS


@pytest.mark.parametrize("encoding", ["shift-jis", "gbk", "euc-kr", "latin-1"])
def test_no_encoding_is_guessed_for_bytes_that_are_not_utf8(tmp_path, encoding):
    text = {"gbk": "问题", "euc-kr": "문제", "latin-1": "é"}.get(encoding, "問題")
    (tmp_path / "rows.jsonl").write_bytes(json.dumps({"prompt": text}, ensure_ascii=False).encode(encoding))
    message = refused(tmp_path / "rows.jsonl")
    assert "its encoding is not known" in message
    assert "iconv -f ENCODING -t UTF-8" in message
    assert "1252" not in message


def test_one_object_is_one_row(tmp_path):
    for indent in (None, 1):
        (tmp_path / "row.json").write_text(json.dumps(ROWS[0], indent=indent))
        assert read(tmp_path / "row.json") == ROWS[:1]


@pytest.mark.parametrize("text", [json.dumps(ROWS, indent=1)[:-3], "[" + LINES.replace("\n", ",\n")])
def test_an_array_that_is_cut_is_refused_and_not_read_by_lines(tmp_path, text):
    (tmp_path / "rows.json").write_text(text)
    assert "begins a JSON array" in refused(tmp_path / "rows.json")


@pytest.mark.parametrize("first", ['{"prompt": "a",', "{oops", "]", '"a'])
def test_a_broken_line_costs_no_other_line_its_row(tmp_path, first):
    (tmp_path / "rows.jsonl").write_text(first + "\n" + LINES)
    assert read(tmp_path / "rows.jsonl") == ["not_json", *ROWS]


HOLDING_ALL = {
    "a list of rows": ({"version": 1, "data": ROWS[:2]}, "one JSON object, whose list 'data' holds the rows"),
    "columns as lists": ({"prompt": ["a", "b"]}, "one JSON object that holds whole columns"),
    "columns by index": ({"prompt": {"0": "a", "1": "b"}}, "one JSON object that holds whole columns"),
}  # fmt: skip


@pytest.mark.parametrize(("value", "said"), HOLDING_ALL.values(), ids=HOLDING_ALL.keys())
def test_one_object_that_holds_all_rows_is_not_taken_for_a_row(tmp_path, value, said):
    for indent in (None, 1):
        (tmp_path / "rows.json").write_text(json.dumps(value, indent=indent))
        assert said in refused(tmp_path / "rows.json")


def test_lines_that_are_not_objects_are_counted_as_such(tmp_path):
    (tmp_path / "rows.jsonl").write_text('"a"\n[1]\n3\nnull\n{"prompt": "b"}\n')
    assert read(tmp_path / "rows.jsonl") == ["not_object"] * 4 + [{"prompt": "b"}]


def saved(write):
    sink = io.BytesIO()
    write(sink)
    return sink.getvalue()


TABLE = pa.Table.from_pylist(ROWS[:3])
OTHERS = {
    "a parquet file: give parquet:PATH": saved(lambda sink: pq.write_table(TABLE, sink)),
    "an arrow file: give hf:": saved(lambda sink: pa.ipc.new_file(sink, TABLE.schema).close()),
    "a torch file": saved(lambda sink: torch.save({"a": torch.zeros(2)}, sink)),
    "a numpy file": saved(lambda sink: np.savez(sink, a=np.zeros(2))),
    "a pickle": pickle.dumps(ROWS),
    "a zip archive: unpack it": b"PK\x03\x04\x14\0\0\0\x08\0" + bytes(16) + b"rows.jsonl",
    "a safetensors file": (60).to_bytes(8, "little") + b'{"a":{"dtype":"F32"}}',
    "a tar archive": gzip.compress(b"rows.jsonl".ljust(257, b"\0") + b"ustar  \0".ljust(255, b"\0")),
    "compressed more than once": gzip.compress(gzip.compress(PLAIN)),
    "compressed more than once: unpack it": bz2.compress(lzma.compress(PLAIN)),
    "an HTML page": b"\n<!DOCTYPE html><title>x</title>",
    "git lfs pull": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    "A csv file? hf:DIR reads": b'prompt,answer\n"a, b",c\n',
    "the first is 'Tell me": b"Tell me a story.\nAnd another.\n",
}


@pytest.mark.parametrize(("said", "data"), OTHERS.items(), ids=OTHERS.keys())
def test_a_file_of_another_kind_is_named(tmp_path, said, data):
    (tmp_path / "rows.jsonl").write_bytes(data)
    assert said in refused(tmp_path / "rows.jsonl")


def test_under_parquet_another_kind_is_named_too(tmp_path):
    path = tmp_path / "rows.parquet"
    for data, said in (
        (PLAIN, "give jsonl:PATH"),
        (OTHERS["a torch file"], "a torch file"),
        (b"", "whole parquet file"),
    ):
        path.write_bytes(data)
        assert said in refused(path, "parquet")


@pytest.mark.parametrize(
    ("kind", "end"),
    [("jsonl", ".jsonl"), ("jsonl", ".ndjson.gz"), ("jsonl", ".json"), ("parquet", ".parquet")],
)
def test_a_directory_is_read_part_by_part_in_the_order_of_names(tmp_path, kind, end):
    for i in (2, 0, 1):
        part = ROWS[200 * i : 200 * (i + 1)]
        text = "".join(json.dumps(row) + "\n" for row in part).encode()
        if kind == "parquet":
            pq.write_table(pa.Table.from_pylist(part), tmp_path / f"part-{i}{end}")
        else:
            (tmp_path / f"part-{i}{end}").write_bytes(gzip.compress(text) if end.endswith("gz") else text)
    for name in ("_SUCCESS", ".part-9" + end, "README.md"):
        (tmp_path / name).write_text("not a row")
    assert [row["prompt"] for row in read(tmp_path, kind)] == [row["prompt"] for row in ROWS[:600]]
    assert "no column 'text'" in refused(tmp_path, kind, "text")


def test_of_a_directory_the_damaged_part_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(PLAIN)
    (tmp_path / "b.jsonl").write_bytes(b'{"prompt": "\xe9"}\n')
    assert "b.jsonl: not UTF-8" in refused(tmp_path)


@pytest.mark.parametrize(
    ("file", "kind", "said"),
    [
        ("state.json", "jsonl", "give hf:DIR"), ("dataset_dict.json", "parquet", "give hf:DIR"),
        ("features.json", "jsonl", "give tfds:DIR"), ("rows.csv", "jsonl", "holds rows.csv"), ("rows.jsonl", "parquet", "hf:DIR"),
    ],
)  # fmt: skip
def test_a_directory_without_parts_is_named(tmp_path, file, kind, said):
    (tmp_path / file).write_text("{}")
    assert said in refused(tmp_path, kind)


@pytest.mark.parametrize(("name", "said"), [
    ("a\0b", "not a possible name"), ("\udce9", "no such file"), ("\ud800", "not a possible name"), ("a" * 300, "File name too long"), ("loop", "symbolic links"),
    ("pipe", "not a regular file"), ("*.jsonl", "give the directory"), ("none", "no such file"),
])  # fmt: skip
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_path_that_cannot_be_read_is_one_line_that_can_be_printed(tmp_path, kind, name, said):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BadInput, match=said) as caught:
        read(f"{tmp_path}/{name}", kind)
    assert str(caught.value).startswith("prompts.source=")
    assert str(caught.value).isprintable()


def test_a_file_without_permission_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_bytes(PLAIN)

    def denied(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(tmp_path), "open", denied)
    assert "Permission denied" in refused(tmp_path / "rows.jsonl")


COLUMNS = {
    "large_string": pa.array(["a", "b", None], pa.large_string()),
    "dictionary": pa.array(["a", "b", None]).dictionary_encode(),
    "string_view": pa.array(["a", "b", None], pa.string_view()),
    "binary": pa.array([b"a", b"b", None]),
}


@pytest.mark.parametrize("column", COLUMNS.values(), ids=COLUMNS.keys())
def test_texts_of_any_arrow_type_are_texts(tmp_path, column):
    pq.write_table(pa.table({"prompt": column}), tmp_path / "rows.parquet")
    assert [row["prompt"] for row in read(tmp_path / "rows.parquet", "parquet")] == ["a", "b", None]


def test_a_text_column_of_parquet_that_is_not_utf8_is_refused_by_name(tmp_path):
    ends = np.array([0, 1, 3], np.int32)
    column = pa.Array.from_buffers(pa.string(), 2, [None, pa.py_buffer(ends), pa.py_buffer(b"a\xff\xfe")])
    pq.write_table(pa.table({"prompt": column}), tmp_path / "rows.parquet")
    assert "a text in it is not UTF-8" in refused(tmp_path / "rows.parquet", "parquet")


@pytest.mark.parametrize("name", ["a\nb", "\ud800", "\x1b[31m", "a" * 5000])
def test_names_of_columns_are_shown_on_one_line_that_can_be_printed(tmp_path, name):
    (tmp_path / "rows.jsonl").write_text(json.dumps({name: "x"}))
    message = refused(tmp_path / "rows.jsonl")
    assert message.isprintable()
    assert len(message) < 1000


def test_a_path_without_its_kind_gets_one_by_what_lies_there(tmp_path):
    pq.write_table(TABLE, tmp_path / "p")
    (tmp_path / "j").write_bytes(PLAIN)
    for name, meant in ((f"{tmp_path}/p", "parquet"), (f"{tmp_path}/j", "jsonl"), (str(tmp_path), "hf")):
        with pytest.raises(BadInput, match="give tfds:NAME") as caught:
            list(rows.rows(Source("prompts.source", name, "train"), ["prompt"]))
        assert f"did you mean {meant}:{name}?" in str(caught.value)

"""Documents from every source a user may name, and a sentence for each that cannot be used."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from common.errors import DataError
from common.text import Document
from common.text.documents import read_documents
from common.text.stdlib import OWNERS, UNSEEN

ROWS = [{"text": "first\nline", "owner": "ann"}, {"text": "segundo é", "owner": "bob"}]


def write(path: Path, rows: list[dict[str, object]]) -> str:
    """Write rows as a table of the form the file name asks for."""
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
    else:
        lines = [json.dumps(row) for row in rows]
        path.write_text("\n".join(lines) if path.suffix == ".jsonl" else f"[{','.join(lines)}]")
    return str(path)


@pytest.mark.parametrize("name", ["t.jsonl", "t.json", "t.csv", "t.parquet"])
def test_a_row_is_a_document(tmp_path: Path, name: str) -> None:
    source = write(tmp_path / name, ROWS)
    assert read_documents(source, key_column="owner") == [
        Document(f"{name}:1", "ann", "first\nline"),
        Document(f"{name}:2", "bob", "segundo é"),
    ]
    assert [document.text for document in read_documents(source, text_column="owner")] == ["ann", "bob"]
    assert {document.key for document in read_documents(source)} == {""}


def test_a_folder_is_its_text_files_with_the_first_folder_as_key(tmp_path: Path) -> None:
    for path, text in {
        "b/deep/two.py": "x = 2\n",
        "a/one.txt": "eins",
        "top.md": "\ufeff# Top",
        "a/blank.txt": " \n",
        "a/table.csv": "text\nno\n",
        ".git/notes.txt": "hidden",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text, encoding="utf-8")
    assert read_documents(str(tmp_path)) == [
        Document("a/one.txt", "a", "eins"),
        Document("b/deep/two.py", "b", "x = 2\n"),
        Document("top.md", "", "# Top"),
    ]


def test_a_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("eins")
    assert read_documents(str(tmp_path / "one.txt")) == [Document("one.txt", "", "eins")]


def test_builtin_code_is_keyed_by_package() -> None:
    documents = read_documents("builtin:code")
    keys = {document.key for document in documents}
    assert {"asyncio", "email", "unittest", *UNSEEN} <= keys
    assert all(document.id.startswith(f"{document.key}/") for document in documents)
    assert len(keys) > len(OWNERS + UNSEEN)


def test_fields_longer_than_csv_allows_by_itself_are_read(tmp_path: Path) -> None:
    source = write(tmp_path / "long.csv", [{"text": "x" * 200_000}])
    assert len(read_documents(source)[0].text) == 200_000


def test_a_line_separator_inside_a_json_string_does_not_end_a_row(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "a\u2028b"}\n\n{"text": "c"}\n', encoding="utf-8")
    assert [document.text for document in read_documents(str(tmp_path / "t.jsonl"))] == ["a\u2028b", "c"]


def test_csv_text_keeps_its_unusual_line_breaks(tmp_path: Path) -> None:
    source = write(tmp_path / "t.csv", [{"text": "a\u2028b\x0cc"}])
    assert read_documents(source)[0].text == "a\u2028b\x0cc"


def test_blank_rows_are_left_out(tmp_path: Path) -> None:
    source = write(tmp_path / "t.jsonl", [{"text": " "}, {"text": "x"}])
    assert read_documents(source) == [Document("t.jsonl:2", "", "x")]


def test_hub_source_reads_what_datasets_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "train.jsonl", ROWS)
    write(folder / "test.jsonl", ROWS[1:])
    assert [d.text for d in read_documents(f"hub:{folder}")] == ["first\nline", "segundo é"]
    assert [d.key for d in read_documents(f"hub:{folder}::test", key_column="owner")] == ["bob"]
    with pytest.raises(DataError, match=r"cannot be loaded: .*nowhere"):
        read_documents(f"hub:{folder}::nowhere")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("no.txt", None, r"no\.txt does not exist; give a file"),
        ("t.pdf", b"x", r"t\.pdf has a form that cannot be read; expected \.txt, \.py"),
        ("t.txt", b"", r"t\.txt holds no text"),
        ("t.txt", b"ab\xff", r"t\.txt is not UTF-8 \(byte 2\)"),
        ("t.jsonl", b"", r"t\.jsonl holds no text"),
        (
            "t.jsonl",
            b'{"text": "a"}\n{"txt": "b"}\n',
            r"t\.jsonl row 2 has no column 'text'; its columns are: txt",
        ),
        (
            "t.jsonl",
            b'{"text": "a"}\n{"text": 3}\n',
            r"t\.jsonl row 2: column 'text' holds int, expected text",
        ),
        ("t.jsonl", b'{"text": "a"}\n{"text": \n', r"t\.jsonl line 2 is not JSON"),
        ("t.jsonl", b'{"text": "a"}\n[1]\n', r"t\.jsonl line 2 is no JSON object"),
        ("t.jsonl", b"\xff", r"t\.jsonl is not UTF-8"),
        ("t.jsonl", b'{"text": "a \\ud800"}', r"t\.jsonl: document 't\.jsonl:1' holds half a character"),
        ("t.json", b'{"text": "a"}', r"t\.json is no JSON array"),
        ("t.json", b'["a"]', r"t\.json row 1 is no JSON object"),
        ("t.json", b"", r"t\.json holds no text"),
        ("t.csv", b"txt\na\n", r"t\.csv row 1 has no column 'text'; its columns are: txt"),
        ("t.csv", b'text\n"a"b\n', r"t\.csv line 2 is not CSV"),
        ("t.csv", b"text,key\na,b,c\n", r"t\.csv row 1 has 3 fields for 2 columns"),
        ("t.parquet", b"PAR", r"t\.parquet cannot be read as Parquet"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(
    tmp_path: Path, name: str, content: bytes | None, reason: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=reason) as caught:
        read_documents(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_a_missing_key_column_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"row 1 has no column 'team'; its columns are: text, owner"):
        read_documents(write(tmp_path / "t.parquet", ROWS), key_column="team")


def test_a_folder_without_text_files_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "t.parquet", ROWS)
    with pytest.raises(DataError, match=r"holds no \.txt, \.py, \.md file"):
        read_documents(str(tmp_path))


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "t.txt").write_text("x")
    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(DataError, match=r"t\.txt cannot be read: Permission denied"):
        read_documents(str(tmp_path / "t.txt"))

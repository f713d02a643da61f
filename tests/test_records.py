"""Checked records: what is on disk, what a kill and damage leave, in both forms of their lines."""

import zlib

import pytest

from sprc.records import Entry, RecordStore, intact

DIGESTS = ["ab12", "cd34", "ef56"]
RECORDS = [b"first-ab", b"\x00\xff\n second", b"third-cd"]
RECORDS = [record[:8].ljust(8, b".") for record in RECORDS]


@pytest.fixture(params=[True, False], ids=["hexadecimal", "decimal"])
def store(request, tmp_path):
    return RecordStore(
        tmp_path / "values.bin", tmp_path / "lines.txt", 8, unit="record", hexadecimal=request.param
    )


def fill(store, numbers, first):
    with store.append(first) as append:
        return append((DIGESTS[number], RECORDS[number]) for number in numbers)


def test_the_two_files_hold_records_and_lines(store):
    fill(store, [0, 1], 0)
    form = "08x" if store.base == 16 else "d"
    assert store.values.read_bytes() == RECORDS[0] + RECORDS[1]
    assert store.lines.read_text() == "".join(
        f"{DIGESTS[i]} {i} {zlib.crc32(RECORDS[i]):{form}}\n" for i in (0, 1)
    )
    assert store.entries() == {DIGESTS[i]: Entry(i, zlib.crc32(RECORDS[i])) for i in (0, 1)}
    assert store.next_number() == 2
    assert fill(store, [2], 2) == [Entry(2, zlib.crc32(RECORDS[2]))]
    assert store.intact(store.entries()) == store.entries()


def test_the_later_line_of_a_digest_holds(store):
    fill(store, [0, 1], 0)
    fill(store, [0], 2)
    assert store.entries()[DIGESTS[0]].number == 2


def test_a_torn_line_is_cut_and_odd_lines_tell_of_nothing(store):
    fill(store, [0], 0)
    whole = store.lines.read_bytes()
    with store.lines.open("ab") as file:
        file.write(b"cd34 1 12")  # no end: killed within the write
    assert list(store.entries()) == [DIGESTS[0]]
    fill(store, [1], 1)
    assert store.lines.read_bytes().startswith(whole)
    assert list(store.entries()) == DIGESTS[:2]
    with store.lines.open("ab") as file:
        file.write(b"one two\nef56 -1 12\nef56 x 12\nef56 1 zz\n\xff\xfe\n")
    assert list(store.entries()) == DIGESTS[:2]


def test_damage_and_a_short_file_are_seen(store, tmp_path):
    fill(store, [0, 1, 2], 0)
    with store.values.open("r+b") as file:
        file.seek(3)
        file.write(b"?")
        file.truncate(23)
    assert list(store.intact(store.entries())) == [DIGESTS[1]]
    assert intact(tmp_path / "nothing.bin", 8, store.entries(), "record") == {}


@pytest.mark.parametrize("error", [FloatingPointError(), OSError(28, "No space left on device")], ids=type)
def test_what_was_put_before_an_error_is_kept(store, error):
    def fail():
        with store.append(0) as append:
            append([(DIGESTS[0], RECORDS[0])])
            raise error

    with pytest.raises(type(error)) as caught:
        fail()
    assert list(store.intact(store.entries())) == [DIGESTS[0]]
    if isinstance(error, OSError):
        assert f"cannot write {store.values}" in str(caught.value)
        assert "the same command goes on from there" in str(caught.value)

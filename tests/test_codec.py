"""Results survive the way through Redis unchanged, in one piece or in many; damage is seen."""

from __future__ import annotations

import contextlib
import io
import random
import re
import sys
import zlib
from dataclasses import replace
from email.message import EmailMessage
from urllib.parse import unquote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from values import same, traced

from rqarm import codec, compression
from rqarm.codec import ChunkReader, Envelope, decode, decode_chunks, encode, open_reader
from rqarm.config import Settings
from rqarm.errors import ConfigError, CorruptResult, ResultTooLarge, UnpackableResult, VersionSkew
from rqarm.packing import unpack
from rqarm.result import Result, filename_fault

SMALL = Settings(inline_bytes=16, chunk_bytes=32, max_result_bytes=1_000, compress_above=1_000)
ENGINES = [False, *([True] if compression.find_zstd() else [])]


# --- Result -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {"data": 5}, {"data": None}, {"data": b"", "content_type": "text"},
        {"data": b"", "content_type": "a/b\r\nX: y"},
        {"data": b"", "content_type": "a/ü"}, {"data": b"", "content_type": 5}, {"data": b"", "filename": "../x"},
        {"data": b"", "filename": "a\\b"}, {"data": b"", "filename": "a\nb"}, {"data": b"", "filename": ""},
        {"data": b"", "filename": ".."}, {"data": b"", "filename": "a\u202egpj.exe"},
        {"data": b"", "filename": "\ud800"}, {"data": b"", "filename": "x" * 256}, {"data": b"", "content_type": ""},
    ],
)  # fmt: skip
def test_a_result_with_a_bad_name_or_type_is_refused(arguments):
    with pytest.raises(UnpackableResult):
        Result(**arguments)


def test_a_result_comes_back_with_type_and_name():
    given = Result(b"a;b", content_type="text/csv; charset=utf-8", filename="Städte 2026.csv")
    assert round_trip(given) == given
    assert round_trip(Result("ü")) == Result("ü".encode(), "text/plain; charset=utf-8")
    assert round_trip(Result(b"")) == Result(b"", "application/octet-stream")
    assert round_trip(Result([b"a", b"b"])).data == b"ab"
    assert round_trip(Result(io.BytesIO(b"abc"))).data == b"abc"


# --- encode and decode ------------------------------------------------------------------------------------------------


def stored_form(value, chosen=SMALL, **options):
    """Encode; the envelope as it comes back from its fields, and the stored pieces."""
    encoded = encode(value, chosen, **options)
    pieces = [chunk for n, chunk in encoded.chunks()]
    if encoded.inline is not None:
        assert pieces == []
        pieces = [encoded.inline]
    fields = [field.encode() for field in encoded.envelope.to_fields()]
    envelope = Envelope.from_fields(dict(zip(fields[::2], fields[1::2], strict=True)) | {b"data": b"..."})
    assert envelope == encoded.envelope
    assert (encoded.inline is None) == (envelope.chunks > 0)
    assert envelope.stored == sum(map(len, pieces))
    return envelope, pieces


def round_trip(value, chosen=SMALL, **options):
    envelope, pieces = stored_form(value, chosen, **options)
    back = decode_chunks(envelope, pieces)
    if not envelope.chunks:
        again = decode(envelope, pieces[0])
        assert same(again, back) if not isinstance(back, Result) else again == back
    return back


def stream(data, step=7):
    return (data[start : start + step] for start in range(0, len(data), step))


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 999, 1_000])
def test_bytes_text_values_and_streams_of_every_size_come_back(size):
    data = bytes(n * 7 % 251 for n in range(size))
    assert round_trip(data) == data
    assert round_trip(bytearray(data)) == data
    assert round_trip(memoryview(data)) == data
    assert round_trip("x" * size) == "x" * size
    assert round_trip(stream(data)) == data
    assert round_trip(iter([data])) == data
    assert round_trip(io.BytesIO(data)) == data
    assert round_trip([data[: size // 2]]) == [data[: size // 2]]


def test_kinds_have_their_content_types():
    assert [stored_form(value)[0].kind for value in (1, [b"a"], b"a", "a", iter([b"a"]), Result(b"a"))] == [
        "value", "value", "bytes", "text", "bytes", "result",
    ]  # fmt: skip
    assert stored_form(1)[0].content_type == "application/msgpack"
    assert stored_form("a")[0].content_type == "text/plain; charset=utf-8"
    assert stored_form(b"a")[0].content_type == "application/octet-stream"


def test_a_small_result_is_inline_and_ready_at_once():
    encoded = encode({"a": 1}, SMALL)
    assert encoded.inline == b"\x81\xa1a\x01"
    assert encoded.envelope == Envelope(kind="value", size=4, stored=4, checksum=f"{zlib.crc32(encoded.inline):08x}")
    assert list(encoded.chunks()) == []


def test_a_chunk_holds_exactly_its_bytes():
    data = bytes(range(100))
    for value in (data, stream(data, 1), stream(data, 50), iter([data])):
        envelope, pieces = stored_form(value)
        assert [piece[4:] for piece in pieces] == [data[0:32], data[32:64], data[64:96], data[96:]]
        assert (envelope.chunks, envelope.chunk_bytes, envelope.size) == (4, 32, 100)


def test_a_stream_that_turns_out_small_is_inline():
    assert encode(stream(b"x" * 16), SMALL).inline == b"x" * 16
    assert encode(stream(b"x" * 17), SMALL).inline is None


def test_inline_may_be_larger_than_a_chunk():
    chosen = replace(SMALL, inline_bytes=100)
    assert encode(b"x" * 100, chosen).inline == b"x" * 100
    assert encode(stream(b"x" * 100), chosen).inline == b"x" * 100
    assert round_trip(stream(bytes(range(101))), chosen) == bytes(range(101))


def test_a_stream_is_read_only_as_far_as_needed():
    read = []

    def pieces():
        for n in range(100):
            read.append(n)
            yield b"x" * 8

    encoded = encode(pieces(), SMALL)
    assert len(read) == 5
    chunks = encoded.chunks()
    next(chunks)
    assert len(read) == 5
    next(chunks)
    assert len(read) == 8
    encoded.close()


def test_the_envelope_is_ready_after_the_last_chunk_only():
    encoded = encode(b"x" * 100, SMALL)
    with pytest.raises(RuntimeError):
        _ = encoded.envelope
    assert len(list(encoded.chunks())) == encoded.envelope.chunks == 4
    with pytest.raises(RuntimeError):
        encoded.chunks()


@pytest.mark.parametrize("value", [b"x" * 1_001, "x" * 1_001, ["x" * 1_000], Result(b"x" * 1_001)])
def test_a_result_that_is_too_large_is_refused_at_once(value):
    with pytest.raises(ResultTooLarge) as caught:
        encode(value, SMALL)
    assert caught.value.limit == 1_000


def test_an_endless_stream_is_refused_when_it_passes_the_limit():
    closed = []

    def endless():
        try:
            while True:
                yield b"x" * 10
        finally:
            closed.append(True)

    written = []
    with pytest.raises(ResultTooLarge):
        written.extend(encode(endless(), SMALL).chunks())
    assert len(written) <= 1_000 // 32
    assert closed == [True]


@pytest.mark.parametrize("bad", [1, "text", None, [b"x"]])
def test_an_iterator_of_other_things_is_refused_with_the_index(bad):
    for pieces in ([b"a", bad], [*[b"x" * 10] * 9, bad]):
        with pytest.raises(UnpackableResult) as caught:
            list(encode(iter(pieces), SMALL).chunks())
        assert caught.value.path == f"$[{len(pieces) - 1}]"
    with pytest.raises(UnpackableResult) as caught:
        encode(Result([b"a", bad]), SMALL)
    assert caught.value.path == "$.data[1]"


def test_a_text_file_is_refused_with_what_to_do(tmp_path):
    (tmp_path / "a.txt").write_text("abc")
    file = open(tmp_path / "a.txt")  # noqa: SIM115  closed by encode
    with pytest.raises(UnpackableResult, match="binary mode"):
        encode(file, SMALL)
    assert file.closed


def test_a_lone_surrogate_in_text_is_refused():
    with pytest.raises(UnpackableResult, match="lone surrogate at character 1"):
        encode("a\ud800", SMALL)
    with pytest.raises(UnpackableResult, match="lone surrogate"):
        encode(Result("\ud800"), SMALL)


class Source(io.BytesIO):
    closings = 0

    def close(self):
        self.closings += 1
        super().close()


def test_the_source_is_closed_at_the_end_and_on_error():
    small, large, huge, dropped, unused = (Source(b"x" * size) for size in (1, 100, 2_000, 100, 100))
    encode(small, SMALL)
    assert small.closings == 1
    chunks = encode(Result(large), SMALL).chunks()
    assert large.closings == 0
    list(chunks)
    assert large.closings == 1
    with pytest.raises(ResultTooLarge):
        list(encode(huge, SMALL).chunks())
    assert huge.closings == 1
    started = encode(dropped, SMALL).chunks()
    next(started)
    started.close()
    assert dropped.closings == 1
    encoded = encode(unused, SMALL)
    encoded.close()
    encoded.close()
    assert unused.closings == 1


def test_the_error_of_a_generator_passes_and_closes_it():
    def failing():
        yield b"x" * 100
        raise LookupError("database gone")

    chunks = encode(failing(), SMALL).chunks()
    with pytest.raises(LookupError, match="database gone"):
        list(chunks)


# --- compression ------------------------------------------------------------------------------------------------------

SQUEEZE = Settings(inline_bytes=200, chunk_bytes=1_000, compress_above=100)


@pytest.mark.parametrize("zstd", ENGINES)
@pytest.mark.parametrize("size", [101, 999, 1_000, 1_001, 5_555])
def test_what_shrinks_is_compressed_chunk_by_chunk(size, zstd):
    data = (b"abcdefgh" * 1_000)[:size]
    for value in (data, stream(data), data.decode(), [data], io.BytesIO(data)):
        envelope, pieces = stored_form(value, SQUEEZE, zstd=zstd)
        assert envelope.encoding == ("zstd" if zstd else "zlib")
        assert envelope.stored < envelope.size // 3
        assert len(pieces) == -(-envelope.size // 1_000)
    assert round_trip([data], SQUEEZE, zstd=zstd) == [data]
    assert round_trip(stream(data), SQUEEZE, zstd=zstd) == data


def test_what_is_small_or_does_not_shrink_is_left_alone():
    noise = random.Random(1).randbytes(5_000)
    assert stored_form(b"a" * 100, SQUEEZE)[0].encoding == ""
    for value in (noise, stream(noise), noise[:900]):
        assert stored_form(value, SQUEEZE)[0].encoding == ""
    assert round_trip(noise, SQUEEZE) == noise


def test_the_first_chunk_decides():
    noise = random.Random(1).randbytes(1_000)
    assert stored_form(noise + b"a" * 1_000, SQUEEZE)[0].encoding == ""
    for zstd in ENGINES:
        assert round_trip(b"a" * 1_000 + noise, SQUEEZE, zstd=zstd) == b"a" * 1_000 + noise


def test_zlib_is_used_where_zstd_is_missing(monkeypatch):
    monkeypatch.setattr(codec, "find_zstd", lambda: None)
    assert stored_form(b"a" * 500, SQUEEZE)[0].encoding == "zlib"
    with pytest.raises(ConfigError, match=r"install rqarm\[zstd\]"):
        encode(b"a" * 500, SQUEEZE, zstd=True)


@pytest.mark.skipif(len(ENGINES) == 1, reason="this Python has no zstd")
def test_a_reader_without_zstd_is_told_to_install_it(monkeypatch):
    envelope, pieces = stored_form(b"a" * 500, SQUEEZE, zstd=True)
    monkeypatch.setattr(compression, "find_zstd", lambda: None)
    with pytest.raises(VersionSkew, match=r"install rqarm\[zstd\]"):
        decode(envelope, pieces[0])


def test_without_any_zstd_module_there_is_none(monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    monkeypatch.setitem(sys.modules, "compression.zstd", None)
    compression.find_zstd.cache_clear()
    assert compression.find_zstd() is None
    compression.find_zstd.cache_clear()


@pytest.mark.parametrize("zstd", ENGINES)
def test_a_zip_bomb_inflates_no_further_than_the_envelope_says(zstd):
    bomb = compression.find_zstd().compress(b"\0" * 200_000_000) if zstd else zlib.compress(b"\0" * 200_000_000, 1)
    envelope = Envelope(
        kind="bytes", size=1_000, stored=len(bomb), checksum="00000000", encoding="zstd" if zstd else "zlib"
    )
    chunked = replace(envelope, chunks=1, chunk_bytes=1_000)
    with traced(5_000_000):
        with pytest.raises(CorruptResult):
            decode(envelope, bomb)
        with pytest.raises(CorruptResult):
            decode_chunks(chunked, [b"\0\0\0\0" + bomb])
        with pytest.raises(CorruptResult):
            open_reader(chunked, lambda n: b"\0\0\0\0" + bomb).read()
    with pytest.raises(ResultTooLarge):
        decode(replace(envelope, size=200_000_000), bomb, max_bytes=100_000_000)


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zstd", ENGINES)
@pytest.mark.parametrize("compress_above", [100, 10_000])
@pytest.mark.parametrize("size", [150, 2_500])
def test_a_flipped_bit_is_seen(size, compress_above, zstd):
    """Or it is one of the few that a compressed stream does not use: then the value is right."""
    chosen = replace(SQUEEZE, compress_above=compress_above)
    data = (b"abcdefgh" * 1_000)[:size]
    envelope, pieces = stored_form(data, chosen, zstd=zstd)
    seen = harmless = 0
    for n, piece in enumerate(pieces):
        for at in range(0, len(piece), max(1, len(piece) // 50)):
            damaged = piece[:at] + bytes([piece[at] ^ (1 << at % 8)]) + piece[at + 1 :]
            reader = open_reader(envelope, lambda m, n=n, damaged=damaged: damaged if m == n else pieces[m])
            reader.seek(n * envelope.chunk_bytes)
            try:
                assert decode_chunks(envelope, [*pieces[:n], damaged, *pieces[n + 1 :]]) == data
                harmless += 1
                assert reader.read() == data[n * envelope.chunk_bytes :]
            except CorruptResult:
                seen += 1
                with pytest.raises(CorruptResult):
                    reader.read()
    assert seen > 10 * harmless
    assert envelope.encoding or not harmless


def test_cut_missing_swapped_and_surplus_chunks_are_seen():
    envelope, pieces = stored_form(b"x" * 96)
    assert decode_chunks(envelope, pieces) == b"x" * 96
    for chunks in (
        [], pieces[:-1], [*pieces, pieces[0]], [pieces[1], pieces[0], pieces[2]], [None, *pieces[1:]],
        [pieces[0], None, pieces[2]], [b"", *pieces[1:]], [pieces[0][:3], *pieces[1:]], [pieces[0][:-1], *pieces[1:]],
        [pieces[0] + b"x", *pieces[1:]],
    ):  # fmt: skip
        with pytest.raises(CorruptResult):
            decode_chunks(envelope, chunks)
    with pytest.raises(CorruptResult):
        decode(envelope, b"".join(pieces))
    with pytest.raises(CorruptResult, match="chunk 1 of 3 is missing"):
        open_reader(envelope, {0: pieces[0]}.get).read()
    with pytest.raises(CorruptResult):
        open_reader(envelope, lambda n: pieces[1 - n]).read(1)
    with pytest.raises(ResultTooLarge):
        decode_chunks(envelope, pieces, max_bytes=95)


def test_text_that_is_no_utf8_is_corrupt():
    envelope = Envelope(kind="text", size=1, stored=1, checksum=f"{zlib.crc32(bytes([255])):08x}")
    with pytest.raises(CorruptResult, match="UTF-8"):
        decode(envelope, b"\xff")


GOOD = {
    b"v": b"1", b"kind": b"result", b"size": b"100", b"stored": b"116", b"sum": b"0123abcd", b"type": b"text/csv",
    b"file": b"a.csv", b"chunks": b"4", b"chunk": b"32",
}  # fmt: skip


def test_the_fields_are_few_and_readable():
    assert Envelope(kind="value", size=4, stored=4, checksum="00000001").to_fields() == [
        "v", "1", "kind", "value", "size", "4", "stored", "4", "sum", "00000001",
    ]  # fmt: skip
    envelope = Envelope.from_fields(GOOD)
    assert envelope == Envelope(
        kind="result", size=100, stored=116, checksum="0123abcd", content_type="text/csv", filename="a.csv", chunks=4,
        chunk_bytes=32,
    )  # fmt: skip
    assert len(envelope.to_fields()) == 2 * len(GOOD)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (b"v", b""), (b"v", b"x"), (b"v", b"-1"), (b"v", "²".encode()), (b"kind", b""),
        (b"kind", b"pickle"), (b"kind", b"\xff"), (b"size", b""), (b"size", b"1e3"), (b"size", b"-5"),
        (b"size", b"9" * 16), (b"size", b"99999"), (b"size", b"0"),
        (b"stored", b""), (b"stored", b"5"), (b"stored", b"\xff"), (b"sum", b""), (b"sum", b"0123ABCD"),
        (b"sum", b"0123abcd0"), (b"sum", b"0123abcd\n"), (b"type", b"nonsense"), (b"type", b"a/b\nc"),
        (b"file", b"a/b"), (b"file", b"\xff"), (b"enc", b"gzip"), (b"chunks", b"0"), (b"chunks", b"5"),
        (b"chunks", b"x"), (b"chunks", b"3"), (b"chunk", b"0"), (b"chunk", b"1"),
        (b"chunk", b"999999999999"), (b"chunk", b""),
    ],
)  # fmt: skip
def test_a_nonsense_field_is_corrupt(name, text):
    with pytest.raises(CorruptResult):
        Envelope.from_fields(GOOD | {name: text})


@pytest.mark.parametrize("name", [b"v", b"kind", b"size", b"stored", b"sum", b"chunks", b"chunk"])
def test_a_missing_field_is_corrupt(name):
    with pytest.raises(CorruptResult):
        Envelope.from_fields({field: text for field, text in GOOD.items() if field != name})


def test_an_unknown_version_is_a_skew():
    with pytest.raises(VersionSkew, match="version 2"):
        Envelope.from_fields({b"v": b"2", b"other": b"rules"})


@given(
    st.dictionaries(
        st.sampled_from([*sorted(GOOD), b"enc"]), st.binary(max_size=12) | st.sampled_from(list(GOOD.values()))
    )
)
def test_any_fields_give_an_envelope_or_a_clean_error(fields):
    with contextlib.suppress(CorruptResult, VersionSkew):
        Envelope.from_fields(GOOD | fields)


# --- reading with seeks -----------------------------------------------------------------------------------------------

moves = st.lists(
    st.one_of(
        st.tuples(st.just("read"), st.integers(-1, 120)),
        st.tuples(st.just("seek"), st.integers(0, 400)),
        st.tuples(st.just("jump"), st.integers(-400, 0)),
        st.tuples(st.just("skip"), st.integers(0, 60)),
    ),
    max_size=20,
)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.binary(max_size=300) | st.integers(0, 300).map(lambda size: b"ab" * size), moves, st.booleans())
def test_a_reader_behaves_like_a_file(data, moves, is_raw):
    chosen = replace(SMALL, compress_above=20)
    envelope, pieces = stored_form(stream(data), chosen, zstd=False)
    fetch = dict(enumerate(pieces)).get
    ours = ChunkReader(envelope, fetch) if is_raw else open_reader(envelope, fetch)
    theirs = io.BytesIO(data)
    for verb, number in moves:
        if verb == "read" and is_raw and number >= 0:
            # a raw read may give less, but not nothing before the end
            piece = ours.read(number)
            assert piece == theirs.read(len(piece))
            assert piece or not number or theirs.read(1) == b""
            theirs.seek(ours.tell())
        elif verb == "read":
            assert ours.read(number) == theirs.read(number)
        elif verb == "seek":
            assert ours.seek(number) == theirs.seek(number)
        elif verb == "skip":
            assert ours.seek(number, io.SEEK_CUR) == theirs.seek(number, io.SEEK_CUR)
        elif -number <= len(data):
            assert ours.seek(number, io.SEEK_END) == theirs.seek(number, io.SEEK_END)
        assert ours.tell() == theirs.tell()
    ours.seek(0)
    assert ours.read() == data


def test_a_reader_fetches_only_the_chunks_it_needs():
    envelope, pieces = stored_form(bytes(range(100)))
    fetched = []

    def fetch(n):
        fetched.append(n)
        return pieces[n]

    reader = ChunkReader(envelope, fetch)
    reader.seek(70)
    assert reader.read(10) == bytes(range(70, 80))
    assert reader.read(100) == bytes(range(80, 96))
    assert fetched == [2]
    assert reader.read(100) == bytes(range(96, 100))
    assert reader.read(100) == b""
    assert fetched == [2, 3]


def test_a_reader_gives_msgpack_for_values_and_text_lines_for_text():
    envelope, pieces = stored_form({"a": 1})
    assert unpack(open_reader(envelope, pieces.__getitem__).read()) == {"a": 1}
    envelope, pieces = stored_form("eins\nzwei\n" * 20)
    assert list(open_reader(envelope, pieces.__getitem__)) == [b"eins\n", b"zwei\n"] * 20


def test_a_reader_refuses_writes_bad_seeks_and_use_after_closing():
    envelope, pieces = stored_form(b"x" * 100)
    reader = ChunkReader(envelope, pieces.__getitem__)
    assert (reader.readable(), reader.seekable(), reader.writable()) == (True, True, False)
    for arguments in ((-1,), (0, 7), (-101, io.SEEK_END)):
        with pytest.raises(ValueError):
            reader.seek(*arguments)
    reader.close()
    for use in (reader.tell, reader.read, lambda: reader.seek(0), lambda: reader.readinto(bytearray(1))):
        with pytest.raises(ValueError):
            use()


# --- HTTP headers


def headers_of(filename: str = "", content_type: str = "", **options) -> dict[str, str]:
    envelope = Envelope(
        kind="result", size=5, stored=5, checksum="0123abcd", content_type=content_type, filename=filename
    )
    return dict(envelope.headers(**options))


def test_the_headers_of_a_file():
    assert headers_of("report.csv", "text/csv; charset=utf-8") == {
        "Content-Type": "text/csv; charset=utf-8",
        "Content-Length": "5",
        "Content-Disposition": 'attachment; filename="report.csv"',
        "ETag": '"0123abcd-5"',
        "X-Content-Type-Options": "nosniff",
    }
    assert headers_of("a.png", inline=True)["Content-Disposition"] == 'inline; filename="a.png"'
    assert headers_of()["Content-Disposition"] == "attachment"
    assert headers_of()["Content-Type"] == "application/octet-stream"


@pytest.mark.parametrize(
    ("filename", "disposition"),
    [
        ("two words.csv", 'attachment; filename="two words.csv"'),
        ("naïve.csv", "attachment; filename=\"naive.csv\"; filename*=UTF-8''na%C3%AFve.csv"),
        ("nai\u0308ve.csv", "attachment; filename=\"naive.csv\"; filename*=UTF-8''nai%CC%88ve.csv"),
        ("東京.csv", "attachment; filename=\"__.csv\"; filename*=UTF-8''%E6%9D%B1%E4%BA%AC.csv"),
        ("50%.csv", "attachment; filename=\"50_.csv\"; filename*=UTF-8''50%25.csv"),
        ('a"; b="c', "attachment; filename=\"a__ b__c\"; filename*=UTF-8''a%22%3B%20b%3D%22c"),
        ("a\r\nSet-Cookie: x", "attachment; filename=\"a__Set-Cookie_ x\"; filename*=UTF-8''a__Set-Cookie%3A%20x"),
        ("../../etc/passwd", 'attachment; filename=".._.._etc_passwd"'),
        ("..", "attachment"),
        ("\ud800", 'attachment; filename="_"'),
    ],
)
def test_a_name_cannot_leave_its_header(filename, disposition):
    assert headers_of(filename)["Content-Disposition"] == disposition


@given(st.text(min_size=1, max_size=40))
def test_a_browser_gets_every_name_that_can_be_stored_back(filename):
    disposition = headers_of(filename)["Content-Disposition"]
    assert disposition.isascii()
    assert disposition.isprintable()
    parsed = EmailMessage()
    parsed["Content-Disposition"] = disposition
    assert parsed.get_content_disposition() == "attachment"
    assert set(parsed["Content-Disposition"].params) <= {"filename"}
    if not filename_fault(filename):
        quoted = re.fullmatch(r"attachment; filename=\"([^\"]*)\"(?:; filename\*=UTF-8''(\S+))?", disposition)
        assert quoted is not None
        assert (unquote(quoted[2]) if quoted[2] else quoted[1]) == filename


@pytest.mark.parametrize("content_type", ["text/html\r\nX: y", "text", "text/plain; a=\u00e9", "x" * 300])
def test_a_content_type_that_is_none_is_not_served(content_type):
    assert headers_of("a", content_type)["Content-Type"] == "application/octet-stream"

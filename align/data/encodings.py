"""Text of data files: UTF-8, and errors that name another encoding."""

from __future__ import annotations

from pathlib import Path

from align.errors import InputError

MARKS = {  # byte order marks, longer ones first
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
# Which of the first four bytes of ASCII text are not NUL
NULS = {b"\1\0\1\0": "UTF-16LE", b"\0\1\0\1": "UTF-16BE", b"\1\0\0\0": "UTF-32LE", b"\0\0\0\1": "UTF-32BE"}


def check_encoding(start: bytes, file: Path) -> None:
    """Raise `InputError` for a file that starts as UTF-16 or UTF-32 do."""
    name = next((name for mark, name in MARKS.items() if start.startswith(mark)), None)
    if name is None and b"\0" in start:
        name = NULS.get(bytes(byte != 0 for byte in start[:4]))
    if name is not None:
        raise InputError(f"{file}: is encoded in {name}, and UTF-8 is needed: {_convert(name, file)}")


def decoded(content: bytes, file: Path, *, line: int = 1) -> str:
    """Return UTF-8 as text, without a byte order mark. Raise `InputError` that names the line and likely encoding."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise not_utf8(error, file, line + content.count(b"\n", 0, error.start)) from error


def not_utf8(error: UnicodeDecodeError, file: Path, line: int | None = None) -> InputError:
    """Return the error for a file that is not UTF-8."""
    wrong = error.object[error.start]
    place = f"{file}: line {line}" if line else str(file)
    if error.reason == "unexpected end of data":
        return InputError(f"{place}: ends inside a character; the file is cut off or not UTF-8")
    return InputError(  # Windows-1252 has all printable characters of Latin-1
        f"{place}: byte 0x{wrong:02x} is not UTF-8; Western text is probably in Latin-1 or Windows-1252: "
        f"{_convert('WINDOWS-1252', file)}"
    )


def _convert(name: str, file: Path) -> str:
    return f"iconv -f {name} -t UTF-8 {file.name} > utf8-{file.name}"

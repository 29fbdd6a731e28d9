"""Good files spoilt at random: by bytes, by what a format says of itself, by hostile numbers.

Every function takes what is to be spoilt and a `random.Random`, and returns something new; nothing
else decides, so that an input is known by its number.
"""

import io
import json
import pickletools
import re
import struct
import zipfile
from random import Random
from typing import Any

NUMBERS = (
    0, 1, -1, 2, 7, 8, 255, 256, 65_535, 65_536, 2**31 - 1, 2**31, 2**32, 2**40, 2**53, 2**62,
    2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**31), -(2**63), 10**7, 10**7 + 1, 10**9, 10**18,
)  # fmt: skip
NUMBER_TEXTS = (
    *map(str, NUMBERS), "1e308", "1e400", "-1e400", "0.5", "1e-320", "NaN", "Infinity", "-0",
    "9" * 4300, "9" * 5000, "01", "1.", "true", "null", '"1"', "[]", "{}",
)  # fmt: skip
STRINGS = (
    "", "a", "\x00", "\ud800", "../outside", "/etc/passwd", "..", ".", "a/b", "\n", "\x1b[2J",
    "[PAD]", "[UNK]", "\u2028", "\ufeff", "é中😀", "a" * 100_000, "BertModel", "F64", "I64", "BOOL",
    "F8_E4M3", "uint32", "Replace", "BPE", "Unigram", "ByteLevel", "Precompiled", "(a+)+$", "(",
    "%s", "{}", "nul", "con",
)  # fmt: skip
DTYPES = (
    "F32", "F16", "BF16", "F64", "I64", "I32", "I16", "I8", "U8", "U16", "U32", "U64", "BOOL",
    "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3", "C64", "f32", "",
)  # fmt: skip
NPY_KINDS = (
    "|O", ">i8", "<i4", "<u8", "<f8", "<i8", "|V8", "<U2", "|S8", "<M8[s]", "|b1", "<c16",
    "(2,)<i4", "i8,i8", "",
)  # fmt: skip

LONG = b"\x8a\x05" + (10**11).to_bytes(5, "little")  # the opcode for a number of so many bytes
CALLS = (  # what a pickle can ask for
    b"cposix\nsystem\n(X\x04\x00\x00\x00truetR", b"c__builtin__\nbytearray\n" + LONG + b"\x85R",
    b"ctorch\nones\n" + LONG + b"\x85R", b"ctorch._utils\n_rebuild_sparse_tensor\n)R",
    b"ccollections\nOrderedDict\n)R", b")" + b"2\x86" * 60, b"}" * 50, b"(" * 50, b"2" * 1_000,
    b"X\xff\xff\xff\x7f", b"B\xff\xff\xff\x7f", b"\x8e" + b"\xff" * 7 + b"\x7f",
    b"r\xff\xff\xff\x7f",
)  # fmt: skip


def spoil(name: str, content: bytes, draw: Random) -> bytes:
    """A file spoilt once: as its format suggests, or as bytes."""
    kinds = {
        ".json": json_file, ".safetensors": safetensors_file, ".npy": npy_file, ".txt": text_lines,
        ".bin": torch_file,
    }  # fmt: skip
    kind = kinds[name[name.rindex(".") :]]
    if draw.random() < 0.3:
        kind = draw.choice((some_bytes, numbers_in_text))
    try:
        return kind(content, draw)
    except Exception:  # spoilt before, and no longer of its format
        return some_bytes(content, draw)


def some_bytes(content: bytes, draw: Random) -> bytes:
    """Bits flipped, bytes cut off, put in, repeated, exchanged, or numbers written over them."""
    if not content:
        return draw.randbytes(draw.randint(1, 40))
    # Near the beginning, where formats tell of themselves, more often than elsewhere.
    reach = min(len(content), draw.choice((16, 200, 2_000, 1 << 40)))
    start = draw.randrange(reach)
    length = draw.choice((1, 2, 4, 8, 64, 1_000))
    block = content[start : start + length]
    match draw.randrange(8):
        case 0:
            spoilt = bytearray(content)
            for _ in range(draw.randint(1, 8)):
                spoilt[draw.randrange(reach)] ^= 1 << draw.randrange(8)
            return bytes(spoilt)
        case 1:
            return content[:start]
        case 2:
            return content[:start] + draw.randbytes(length) + content[start:]
        case 3:
            return content[:start] + content[start + length :]
        case 4:
            return content[:start] + block * draw.choice((2, 3, 100)) + content[start + length :]
        case 5:
            other = draw.randrange(len(content))
            low, high = sorted((start, other))
            middle = min(length, high - low)
            return (
                content[:low] + content[high : high + middle] + content[low + middle : high]
                + content[low : low + middle] + content[high + middle :]
            )  # fmt: skip
        case 6:
            width = draw.choice((2, 4, 8))
            number = draw.choice(NUMBERS) % (1 << 8 * width)
            packed = number.to_bytes(width, draw.choice(("little", "big")))
            return content[:start] + packed + content[start + width :]
        case _:
            return content[:start] + draw.randbytes(length) + content[start + length :]


def numbers_in_text(content: bytes, draw: Random) -> bytes:
    """One number that stands in the text becomes another."""
    found = list(re.finditer(rb"-?\d+(\.\d+)?(e-?\d+)?", content))
    if not found:
        return some_bytes(content, draw)
    place = draw.choice(found)
    return content[: place.start()] + draw.choice(NUMBER_TEXTS).encode() + content[place.end() :]


def text_lines(content: bytes, draw: Random) -> bytes:
    """Lines dropped, repeated, exchanged, put in, of strange characters or very long."""
    lines = content.split(b"\n")
    place, other = draw.randrange(len(lines)), draw.randrange(len(lines))
    match draw.randrange(7):
        case 0:
            del lines[place]
        case 1:
            lines.insert(place, lines[other])
        case 2:
            lines[place], lines[other] = lines[other], lines[place]
        case 3:
            lines.insert(place, draw.choice(STRINGS).encode("utf-8", "surrogatepass"))
        case 4:
            lines[place] = draw.randbytes(draw.choice((1, 5, 100_000)))
        case 5:
            lines += [b"w%d" % number for number in range(draw.choice((3, 2_000)))]
        case _:
            lines = [line + b"\r" for line in lines]
    return b"\n".join(lines)


def json_file(content: bytes, draw: Random) -> bytes:
    """A value dropped, put in the place of another, of another type, nested deep, or doubled."""
    if draw.random() < 0.05:
        text = content.decode()
        return draw.choice(
            (text.encode("utf-16"), b"\xef\xbb\xbf" + content, content + b"\x00", content * 2)
        )
    return json_text(json.loads(content), draw).encode("utf-8", "surrogatepass")


def json_text(value: Any, draw: Random) -> str:
    """The text of a JSON value that was spoilt in one place."""
    places = _places(value)
    container, key = draw.choice(places) if places else ([value], 0)
    mark = "a mark that nothing else has"
    replacement = draw.choice(("", "[" * draw.choice((90, 900, 990, 50_000)), '{"a":' * 60))
    match draw.randrange(8):
        case 0:
            del container[key]
        case 1:
            container[key] = mark
            replacement = draw.choice(NUMBER_TEXTS)
        case 2:
            container[key] = draw.choice(STRINGS)
        case 3:
            container[key] = mark
            closing = "".join("]" if c == "[" else "}" for c in re.sub(r'"a":', "", replacement))
            inner = "1" if "{" in replacement else ""
            replacement = replacement + inner + closing[::-1] or "null"
        case 4:
            other, other_key = draw.choice(places) if places else (container, key)
            container[key] = other[other_key]
        case 5:
            if isinstance(container, dict):
                container[draw.choice((*STRINGS, mark))] = container.pop(key)
            else:
                container *= draw.choice((2, 3))
        case 6:
            container[key] = [container[key]] * draw.choice((1, 2, 1_000))
        case _:
            container[key] = mark
            replacement = "1" + f', "{key}": 2' * isinstance(container, dict)
    ascii_only = draw.random() < 0.5
    try:
        text = json.dumps(value, ensure_ascii=ascii_only)
    except ValueError:  # it holds itself
        text = "{}"
    return text.replace(f'"{mark}"', replacement)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a JSON value; large ones are sampled at their ends."""
    found, waiting = [], [value]
    while waiting:
        container = waiting.pop()
        if not isinstance(container, dict | list):
            continue
        keys = list(container) if isinstance(container, dict) else list(range(len(container)))
        for key in keys[:60] + keys[60:][-5:]:
            found.append((container, key))
            waiting.append(container[key])
    return found


def safetensors_file(content: bytes, draw: Random) -> bytes:
    """A header that lies: of shapes, dtypes, places, its own length, or anything that JSON can."""
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    name = draw.choice([name for name in header if name != "__metadata__"])
    entry = header[name]
    match draw.randrange(9):
        case 0:
            entry["dtype"] = draw.choice(DTYPES)
        case 1:
            entry["shape"] = [draw.choice(NUMBERS) for _ in range(draw.choice((0, 1, 2, 70)))]
        case 2:
            entry["shape"] = entry["shape"][::-1] + [1] * draw.randint(0, 2)
        case 3:
            entry["data_offsets"] = [draw.choice((*NUMBERS, *entry["data_offsets"])) for _ in "ab"]
        case 4:
            entry["data_offsets"] = header[draw.choice(list(header))].get("data_offsets")
        case 5:  # of another type, its numbers rounded to it: right in itself
            width = {"F16": 2, "F64": 8, "I32": 4, "U8": 1}
            entry["dtype"] = draw.choice(list(width))
            count = 1
            for size in entry["shape"]:
                count *= size
            entry["data_offsets"] = [len(data), len(data) + count * width[entry["dtype"]]]
            data += draw.randbytes(count * width[entry["dtype"]])
        case 6:
            header[draw.choice(STRINGS)] = entry
        case 7:
            text = json.dumps(header).encode()
            lie = draw.choice((*NUMBERS, len(text) + 1, len(text) - 1)) % 2**64
            return lie.to_bytes(8, "little") + text + data
        case _:
            text = json_text(header, draw).encode("utf-8", "surrogatepass")
            return len(text).to_bytes(8, "little") + text + data
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def npy_file(content: bytes, draw: Random) -> bytes:
    """A NumPy header that lies: of the numbers' kind, their order, how many, or its own length."""
    length = int.from_bytes(content[8:10], "little")
    header, data = content[10 : 10 + length].decode("latin-1"), content[10 + length :]
    version = content[6:8]
    match draw.randrange(7):
        case 0:
            header = re.sub(r"'descr': '[^']*'", f"'descr': '{draw.choice(NPY_KINDS)}'", header)
        case 1:
            header = header.replace("False", draw.choice(("True", "None", "1", "[]")))
        case 2:
            shape = ", ".join(str(draw.choice(NUMBERS)) for _ in range(draw.choice((0, 1, 2, 40))))
            header = re.sub(r"\(.*\)", f"({shape},)", header)
        case 3:
            header = header.replace(draw.choice(("descr", "shape", ":", ",", "(")), "x", 1)
        case 4:
            header = "(" * draw.choice((50, 5_000)) + header
        case 5:
            version = bytes([draw.randrange(5), draw.randrange(3)])
        case _:  # right in itself, but the numbers are others
            numbers = list(struct.unpack(f"<{len(data) // 8}q", data))
            numbers[draw.randrange(len(numbers))] = draw.choice(NUMBERS) % 2**63
            data = struct.pack(f"<{len(numbers)}q", *numbers)
    text = header.encode("latin-1")
    lie = draw.choice(NUMBERS) if draw.random() < 0.1 else len(text)
    return content[:6] + version + (lie % 65_536).to_bytes(2, "little") + text + data


def torch_file(content: bytes, draw: Random) -> bytes:
    """A `torch.save` file: its pickle's opcodes, its members, or their compression changed."""
    if not content.startswith(b"PK"):
        return pickle_file(content, draw)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [[name, archive.read(name)] for name in archive.namelist()]
    stored = [zipfile.ZIP_STORED] * len(members)
    place = draw.randrange(len(members))
    pickle_place = next(i for i, (name, _) in enumerate(members) if name.endswith("data.pkl"))
    match draw.randrange(8):
        case 0 | 1 | 2:
            members[pickle_place][1] = pickle_file(members[pickle_place][1], draw)
        case 3:
            members[place][1] = some_bytes(members[place][1], draw)
        case 4:
            del members[place]
            del stored[place]
        case 5:
            other = draw.randrange(len(members))
            members[place][1] = members[other][1]
        case 6:
            stored[place] = zipfile.ZIP_DEFLATED
            members[place][1] = members[place][1] or bytes(draw.choice((1, 10**6)))
        case _:
            members[place][0] = members[draw.randrange(len(members))][0] + draw.choice(("", "x"))
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for (name, member), kind in zip(members, stored, strict=True):
            archive.writestr(name, member, kind)
    return out.getvalue()


def pickle_file(content: bytes, draw: Random) -> bytes:
    """One opcode or its argument changed: numbers, names, calls; or a call or a bomb put in."""
    try:
        opcodes = [(op, argument, place) for op, argument, place in pickletools.genops(content)]
    except ValueError:
        return some_bytes(content, draw)
    if draw.random() < 0.2:
        place = draw.choice(opcodes)[2]
        call = draw.choice(CALLS)
        return content[:place] + call + content[place:]
    numbers = [(op, place) for op, _, place in opcodes if op.name.startswith(("BININT", "BINGET"))]
    if numbers and draw.random() < 0.5:
        op, place = draw.choice(numbers)
        width = {"BININT": 4, "BININT2": 2}.get(op.name, 1)
        value = draw.choice((*NUMBERS, 3, 5, 6, 24, 120))
        if draw.random() < 0.5:  # as a long of eight bytes, which holds any of them
            packed = b"\x8a\x09" + (value % 2**64).to_bytes(9, "little")
        else:
            packed = content[place : place + 1] + (value % 256**width).to_bytes(width, "little")
        return content[:place] + packed + content[place + 1 + width :]
    (_, _, start), (_, _, end) = sorted(draw.choices(opcodes, k=2), key=lambda opcode: opcode[2])
    block = content[start:end]
    match draw.randrange(3):
        case 0:
            return content[:start] + content[end:]
        case 1:
            return content[:end] + block[:200] + content[end:]
        case _:
            code = draw.choice(pickletools.opcodes).code.encode("latin-1")
            return content[:start] + code + content[start + 1 :]

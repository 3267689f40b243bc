"""Damage to files: of bytes, of JSON, of safetensors' headers, and lies behind right checksums.

Every function takes a `random.Random`, so that a case is its seed; hypothesis passes one whose
draws it shrinks.
"""

import hashlib
import json
import random
from collections.abc import Callable
from typing import Any

NESTED = tuple("[" * levels + "]" * levels for levels in (250, 800, 960, 3000))
# What stands in JSON in place of a value, as text.
HOSTILE = (
    *("0", "-1", "1", "2", "3", "255", "65536", "65537", "2147483647", "2147483648", "4294967296"),
    *("9223372036854775807", "9223372036854775808", "18446744073709551615", "18446744073709551616"),
    *("1" + "0" * 400, "9" * 4000, "9" * 5000, "-0", "0.0", "0.5", "1e308", "1e999", "-1e999"),
    *("NaN", "Infinity", "-Infinity", "null", "true", "false", '""', '"0"', '"1"', '"x"', '"12"'),
    *('"\\u0000"', '"\\ud800"', '"\\u001b[31m"', '"' + "x" * 5000 + '"', '"../x"', '"/etc/passwd"'),
    *('"full"', '"bitmap"', '"u16"', '"mask"', '"task_vector"', '"F32"', '"BF16"', '"F8_E4M3"'),
    *("[]", "{}", "[[]]", "[0]", "[1,2]", "[-1]", "[null]", '{"a":1}', '{"a":1,"a":2}', *NESTED),
    *('[{"scale":1.0,"of":{}}]', '[{"scale":1e999,"kept":2,"of":[]}]', "[4611686018427387904,4]"),
)
# What has a meaning in CSV, JSON or TOML.
PIECES = (
    *(b"\0", b"\n", b"\r", b"\r\n", b'"', b'""', b"'", b",", b";", b"\t", b"\\", b"=", b"[", b"]"),
    *(b"{", b"}", b":", b"\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\xe2\x80\xa8", b"9" * 5000),
    *(b"1e999", b"nan", b"inf", b"[[", b"[[[[" * 2000, b'"""', b"true", b"1979-05-27", b"\\ud800"),
    *(b'"\\ud800"', b"null", b"-", b"0x", b"#", b"text", b"label", b"x" * 140_000),
)
SIZES = {"U8": 1, "I8": 1, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "F32": 4, "I64": 8, "F64": 8}
TORCH = {"U8": "uint8", "I8": "int8", "U16": "uint16", "F16": "float16", "BF16": "bfloat16"} | {
    "I32": "int32",
    "I64": "int64",
    "F32": "float32",
    "F64": "float64",
}


def of_bytes(draw: random.Random, raw: bytes) -> bytes:
    """Flip, write, cut, add, move or repeat bytes."""
    data, kind = bytearray(raw), draw.randrange(9)
    start, end = sorted((draw.randrange(len(data) + 1), draw.randrange(len(data) + 1)))
    if kind == 0:
        for _ in range(draw.randint(1, 8)):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif kind == 1:
        data[draw.randrange(len(data))] = draw.choice((0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)))
    elif kind == 2:
        del data[draw.randrange(len(data) + 1) :]
    elif kind == 3:
        data += bytes(draw.randrange(256) for _ in range(draw.randint(1, 16)))
    elif kind == 4:
        del data[start : min(end, start + draw.randint(1, 64))]
    elif kind == 5:
        data[start:start] = data[start:end]
    elif kind == 6:
        size = min(end, start + draw.randint(1, 64)) - start
        data[start : start + size] = bytes(size)
    elif kind == 7:
        data[start:start] = draw.choice(PIECES)
    else:
        data[start:end] = data[end : 2 * end - start]
    return bytes(data)


def of_length(draw: random.Random, raw: bytes) -> bytes:
    """Write another length of the header."""
    own = int.from_bytes(raw[:8], "little")
    length = draw.choice((0, 1, own - 1, own + 1, len(raw), 1 << 31, 1 << 63, (1 << 64) - 1))
    return (max(length, 0) % (1 << 64)).to_bytes(8, "little") + raw[8:]


def of_json(draw: random.Random, text: bytes) -> bytes:
    """Change one value or key of a JSON text: another, none, the same twice, an alien."""
    root = json.loads(text)
    places: list[tuple[Any, Any]] = []
    _collect(root, places)
    if not places:
        return draw.choice(HOSTILE).encode()
    holder, key = draw.choice(places)
    kind = draw.randrange(6)
    if kind <= 2:
        holder[key] = "\0here\0"
        text = json.dumps(root).encode()
        return text.replace(b'"\\u0000here\\u0000"', draw.choice(HOSTILE).encode())
    if kind == 3:
        del holder[key]
    elif kind == 4 and isinstance(holder, dict):
        # The key comes twice: with its own value and with another one.
        other, twin = draw.choice(places), f"{key}\0"
        holder[twin] = other[0][other[1]] if other[1] in _keys(other[0]) else None
        return json.dumps(root).encode().replace(b"\\u0000", b"")
    elif isinstance(holder, dict):
        holder[draw.choice((f"{key}x", "", "../x", "__metadata__", "a\0b"))] = holder.pop(key)
    else:
        holder.append(holder[key])
    return json.dumps(root).encode()


def _keys(holder: Any) -> Any:
    return holder if isinstance(holder, dict) else range(len(holder))


def _collect(node: Any, places: list[tuple[Any, Any]]) -> None:
    for key in _keys(node):
        places.append((node, key))
        if isinstance(node[key], dict | list):
            _collect(node[key], places)


def of_header(draw: random.Random, raw: bytes) -> bytes:
    """Change the header of a safetensors file, whose length then fits."""
    header, data = parts(raw)
    return joined(of_json(draw, header), data)


def of_metadata(draw: random.Random, raw: bytes) -> bytes:
    """Change the JSON that a file's metadata holds, without a new checksum."""
    header, data = parts(raw)
    found = json.loads(header)
    found["__metadata__"]["talos"] = of_json(draw, found["__metadata__"]["talos"].encode()).decode()
    return joined(json.dumps(found).encode(), data)


def of_signed(draw: random.Random, raw: bytes) -> bytes:
    """Change content, data or tensors of a file and compute all its checksums again.

    A file that only an attacker writes: what is checked behind the checksums is reached.
    """
    header, data = parts(raw)
    found = json.loads(header)
    about = json.loads(found.pop("__metadata__")["talos"])
    octets = bytearray(data)
    for _ in range(draw.randint(1, 2)):
        kind = draw.randrange(5)
        if kind <= 1:
            text = of_json(draw, json.dumps(about["content"]).encode())
            try:
                about["content"] = json.loads(text)
            except (ValueError, RecursionError):
                return raw
        elif kind == 2 and octets:
            octets[draw.randrange(len(octets))] ^= 1 << draw.randrange(8)
        elif kind == 3 and len(found) > 1:
            one, other = draw.sample(sorted(found), 2)
            found[one], found[other] = found[other], found[one]
        elif found:
            entry = found[draw.choice(sorted(found))]
            same = [name for name in SIZES if SIZES[name] == SIZES.get(entry["dtype"])]
            entry["dtype"] = draw.choice(same or ["F32"])
            if draw.randrange(2):
                entry["shape"] = [1, *entry["shape"]]
    return signed(found, bytes(octets), about)


def signed(entries: dict[str, Any], data: bytes, about: dict[str, Any]) -> bytes:
    """Return a file with right checksums, from docs/format.md alone."""
    about = {key: each for key, each in about.items() if key != "checksum"}
    about["digests"] = {}
    for name, entry in entries.items():
        start, end = entry["data_offsets"]
        shape = str(tuple(entry["shape"]))
        text = f"torch.{TORCH.get(entry['dtype'], 'none')}|{shape}|".encode()
        about["digests"][name] = hashlib.sha256(text + data[start:end]).hexdigest()
    canonical = json.dumps(about, sort_keys=True, separators=(",", ":"))
    about["checksum"] = hashlib.sha256(canonical.encode()).hexdigest()
    text = json.dumps(about, sort_keys=True, separators=(",", ":"))
    return joined(json.dumps({"__metadata__": {"talos": text}, **entries}).encode(), data)


def parts(raw: bytes) -> tuple[bytes, bytes]:
    """Return the header and the data of a safetensors file."""
    length = int.from_bytes(raw[:8], "little")
    return raw[8 : 8 + length], raw[8 + length :]


def joined(header: bytes, data: bytes) -> bytes:
    """Return a safetensors file."""
    return len(header).to_bytes(8, "little") + header + data


Damage = Callable[[random.Random, bytes], bytes]
PLAIN: tuple[Damage, ...] = (of_bytes,)
JSON: tuple[Damage, ...] = (of_bytes, of_json, of_json)
SAFETENSORS: tuple[Damage, ...] = (of_bytes, of_length, of_header)
TALOS: tuple[Damage, ...] = (of_bytes, of_length, of_header, of_metadata, of_signed, of_signed)

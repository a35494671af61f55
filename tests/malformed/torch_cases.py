"""PyTorch's weight files that must be refused: what is wrong with each, and what the message must say of it."""

from __future__ import annotations

import dataclasses
import io
import struct
import tarfile
import zipfile
from collections.abc import Mapping
from typing import Any

from malformed.torch_files import (
    EMPTY_DICT,
    EMPTY_LIST,
    EMPTY_TUPLE,
    GOOD,
    NONE,
    ORDERED_DICT,
    SOUND,
    TRUE,
    VALUES,
    Member,
    archive,
    call,
    dict_of,
    local_header,
    members,
    name,
    number,
    numbers,
    program,
    storage,
    tensor,
    text,
    torch_file,
    tuple_of,
)

SENTINEL = "sentinel"  # the file that a payload creates where it is run
COMMAND = f"touch {SENTINEL}"

# Pickles that name or do what could run code

PAYLOADS = {
    f"{module}.{attribute}": name(module, attribute) + text(COMMAND) + b"\x85R"
    for module, attribute in (
        *(("os", "system"), ("posix", "system"), ("nt", "system"), ("subprocess", "getoutput"), ("pty", "spawn")),
        *(("builtins", "eval"), ("builtins", "exec"), ("builtins", "getattr"), ("__builtin__", "eval")),
        *(("pip", "main"), ("pip._internal", "main"), ("pkgutil", "resolve_name"), ("_codecs", "encode")),
        *(
            ("torch", "load"),
            ("torch.hub", "load"),
            ("torch._utils", "_rebuild_tensor"),
            ("torch.serialization", "load"),
        ),
        *(
            ("torch.jit", "load"),
            ("torch", "Tensor"),
            ("torch.storage", "_load_from_bytes"),
            ("collections", "Counter"),
        ),
        *(("numpy.core.multiarray", "_reconstruct"), ("keras.models", "load_model"), ("tfgptj.config", "read_json")),
        *(("functools", "partial"), ("operator", "attrgetter"), ("torch._utils", "os.system")),
        *(("torch", "_utils._rebuild_tensor_v2"), ("collections", "OrderedDict.__init__"), ("", "")),
    )
}
UNSAFE = {
    **{key: (value, f"asks for '{key}', which no weights need") for key, value in PAYLOADS.items()},
    "before a corrupt tail": (PAYLOADS["os.system"] + b"\xff\xfe", "byte 2: asks for 'os.system'"),
    "deep in a dict": (dict_of({"x": tensor(), "y": PAYLOADS["os.system"]}), r"byte \d\d\d: asks for 'os.system'"),
    "as a key": (b"}" + PAYLOADS["os.system"] + NONE + b"s", "byte 3: asks for 'os.system'"),
    "stack global": (text("os") + text("system") + b"\x93" + text(COMMAND) + b"\x85R", "byte 20: asks for 'os.system'"),
    "not ASCII": (b"c\xd0\xbes\nsystem\n.", r"asks for '\\\\xd0\\\\xbes.system'"),
    "inst": (b"(" + text(COMMAND) + b"ios\nsystem\n", "byte 22: asks for an object of 'os.system'"),
    "obj": (b"(" + name("torch", "FloatStorage") + b"o", "an object of any class, with the opcode OBJ,"),
    "newobj": (name("torch", "FloatStorage") + b")\x81", "byte 23: asks for .* with the opcode NEWOBJ,"),
    "newobj_ex": (name("torch", "FloatStorage") + b")}\x92", "with the opcode NEWOBJ_EX"),
    "ext1": (b"\x82\x01", "with the opcode EXT1"),
    "ext2": (b"\x83\x01\x00", "with the opcode EXT2"),
    "ext4": (b"\x84\x01\x00\x00\x00", "with the opcode EXT4"),
    "a storage is called": (call("torch", "FloatStorage", number(10**12)), "asks for a call of torch.FloatStorage"),
    "text is called": (text("os.system") + text(COMMAND) + b"\x85R", "asks for a call of str"),
    "a tensor is called": (tensor() + b")R", "asks for a call of StoredTensor"),
    "a dtype is called": (call("torch", "float32"), "asks for a call of torch.float32"),
    "a dict with arguments": (call("collections", "OrderedDict", EMPTY_DICT), "a call of collections.OrderedDict"),
    "a parameter of text": (call("torch._utils", "_rebuild_parameter", text("x"), TRUE, NONE), "_rebuild_parameter"),
    "a parameter of nothing": (call("torch._utils", "_rebuild_parameter"), "a call of torch._utils._rebuild_parameter"),
    "a size of text": (call("torch", "Size", text("x")), "a call of torch.Size that is none of PyTorch's"),
    "a size of 65": (call("torch", "Size", numbers([1] * 65)), "a call of torch.Size"),
    "attributes of a storage": (storage() + EMPTY_DICT + b"b", "asks for attributes for Storage"),
    "attributes of a tensor": (tensor() + EMPTY_DICT + b"b", "asks for attributes for StoredTensor"),
    "attributes of a name": (name("torch", "FloatStorage") + EMPTY_DICT + b"b", "attributes for torch.FloatStorage"),
    "attributes of a list": (EMPTY_LIST + EMPTY_DICT + b"b", "asks for attributes for list"),
    "attributes that are a tuple": (ORDERED_DICT + tuple_of(NONE, EMPTY_DICT) + b"b", "attributes for dict"),
}  # fmt: skip

# Pickles that are damaged, or ask for too much

BROKEN = {
    "empty": (b"", "byte 0: cut short: 1 more bytes expected, 0 found"),
    "no protocol": (b"}.", "a pickle of protocol 2 to 5 was expected, it begins with b'}.'"),
    "protocol 1": (program(EMPTY_DICT, 1), "a pickle of protocol 2 to 5 was expected"),
    "protocol 6": (program(EMPTY_DICT, 6), "a pickle of protocol 2 to 5 was expected"),
    "protocol twice": (program(b"\x80\x02}"), "byte 2: 0x80 is no opcode that PyTorch writes"),
    "no end": (b"\x80\x02}", "byte 3: cut short"),
    "trailing bytes": (program(EMPTY_DICT) + b"}", "the end, with 1 values on the stack, expected 1, and 1 bytes"),
    "nothing": (program(b""), "the end, with 0 values on the stack"),
    "two values": (program(NONE + NONE), "the end, with 2 values on the stack"),
    "open mark": (program(NONE + b"("), "the end, with 2 values on the stack"),
    "pop": (program(NONE + NONE + b"0"), "byte 4: 0x30 is no opcode"),
    "persistent text": (program(b"Pstorage\n"), "0x50 is no opcode"),
    "bytes": (program(b"C\x01a"), "0x43 is no opcode"),
    "no opcode": (program(b"\xff"), "byte 2: 0xff is no opcode that PyTorch writes"),
    "marks": (program(b"(" * 10**6), "more than 524,288 opcodes; no checkpoint of weights needs so many"),
    "long text": (program(b"X\xff\xff\xff\xffabc"), "byte 2: cut short: 4,294,967,295 more bytes expected, 4 found"),
    "short text": (program(b"\x8c\x09abc"), "cut short: 9 more bytes expected, 4 found"),
    "text not UTF-8": (program(b"X\x02\x00\x00\x00\xed\xa0"), "text that is not UTF-8"),
    "endless name": (program(b"c" + b"o" * 1000), "a name that does not end within 256 bytes"),
    "name of numbers": (program(number(1) + text("x") + b"\x93"), "a name must be text, got int and str"),
    "memo far": (program(NONE + b"r\xff\xff\xff\xff"), "memo entry 4,294,967,295 was set, but there are 0 before it"),
    "memo gap": (program(NONE + b"q\x01"), "memo entry 1 was set, but there are 0 before it"),
    "memo of nothing": (program(b"q\x00"), "1 values were taken from the stack, which has fewer"),
    "memo miss": (program(NONE + b"q\x00h\x01"), "memo entry 1 was asked for, but there are 1"),
    "memo miss far": (program(b"j\xff\xff\xff\xff"), "memo entry 4,294,967,295 was asked for"),
    "underflow": (program(NONE + b"\x86"), "byte 3: 2 values were taken from the stack, which has fewer"),
    "below a mark": (program(NONE + b"(\x85"), "1 values were taken from the stack"),
    "tuple without mark": (program(NONE + b"t"), "a mark was expected on the stack"),
    "append to a tuple": (program(EMPTY_TUPLE + NONE + b"a"), "a list was to be extended, but it is tuple"),
    "extend a dict": (program(EMPTY_DICT + b"(Ne"), "a list was to be extended, but it is dict"),
    "item of a list": (program(EMPTY_LIST + number(0) + NONE + b"s"), "a dict was to be filled, but it is list"),
    "item of a tensor": (program(tensor() + number(0) + NONE + b"s"), "to be filled, but it is StoredTensor"),
    "item of a storage": (program(storage() + number(0) + NONE + b"s"), "to be filled, but it is Storage"),
    "item of a name": (program(name("torch", "IntStorage") + NONE * 2 + b"s"), "but it is torch.IntStorage"),
    "key without value": (program(EMPTY_DICT + b"(Nu"), "a key has no value"),
    "key of a tuple": (program(EMPTY_DICT + EMPTY_TUPLE + NONE + b"s"), "must be text or a number, got tuple"),
    "key of a list": (program(EMPTY_DICT + EMPTY_LIST + NONE + b"s"), "must be text or a number, got list"),
    "key of 60 bits": (program(EMPTY_DICT + number(2**60) + NONE + b"s"), "must be text or a number, got int"),
    "key twice": (program(EMPTY_DICT + (text("x") + NONE + b"s") * 2), "the key 'x' comes twice"),
    "arguments in a list": (program(name("collections", "OrderedDict") + b"]R"), "arguments must be a tuple, got list"),
    "stored number": (program(number(1) + b"Q"), "only storages can be outside of the pickle"),
    "stored module": (program(tuple_of(text("module"), *[NONE] * 4) + b"Q"), "only storages can be outside"),
    "stored storage of 4": (program(tuple_of(text("storage"), *[NONE] * 3) + b"Q"), "only storages can be outside"),
    "storage of a name": (program(storage(kind="Size")), "a storage must have a type, a key and a size"),
    "storage of text": (
        program(tuple_of(text("storage"), text("FloatStorage"), text("0"), text("cpu"), number(1)) + b"Q"),
        "a storage must have a type",
    ),
    "storage key": (
        program(tuple_of(text("storage"), name("torch", "IntStorage"), number(0), text("cpu"), number(1)) + b"Q"),
        "a storage must have a type",
    ),
    "storage of -1": (program(storage(size=-1)), "a storage must have a type, a key and a size"),
    "storage of 2^63": (program(storage(size=2**63)), "a storage must have a type, a key and a size"),
    "tensor of nothing": (program(call("torch._utils", "_rebuild_tensor_v2")), "a tensor must be made from a storage"),
    "tensor of text": (program(tensor(text("0"))), "a tensor must be made from a storage, an offset, a shape"),
    "offset -1": (program(tensor(offset=-1)), "a tensor must be made from a storage"),
    "size -1": (program(tensor(shape=(-1, 3))), "a tensor must be made from a storage"),
    "size 2^63": (program(tensor(shape=(2**63, 3))), "a tensor must be made from a storage"),
    "65 dimensions": (program(tensor(shape=[1] * 65, strides=[1] * 65)), "a tensor must be made from a storage"),
    "stride -1": (program(tensor(strides=(-3, 1))), "strides must be 2 numbers, none of them negative"),
    "one stride": (program(tensor(strides=(3,))), "strides must be 2 numbers"),
    "float strides": (
        program(tensor().replace(numbers((3, 1)), tuple_of(*[b"G" + struct.pack(">d", 1.0)] * 2))),
        "strides must be 2 numbers",
    ),
    "true as a size": (
        program(tensor().replace(numbers((2, 3)), tuple_of(TRUE, number(6)))), "a tensor must be made from a storage",
    ),
    "frame": (program(b"\x95\xff"), "cut short: 8 more bytes expected, 2 found"),
}  # fmt: skip

# Sound pickles of what is no state dict, or of tensors that are not where they should be

MISFITS = {
    "a list": (torch_file(EMPTY_LIST), "data.pkl holds list, expected a dict of tensors"),
    "a tensor": (torch_file(tensor()), "data.pkl holds StoredTensor, expected a dict of tensors"),
    "itself": (torch_file(b"]q\x00h\x00a"), "data.pkl holds list"),
    "wrapped otherwise": (torch_file(dict_of({"model": dict_of({"x": tensor()})})), "entry 'model' is of type dict;"),
    "wrapped twice": (
        torch_file(dict_of({"state_dict": dict_of({"state_dict": EMPTY_DICT})})), "entry 'state_dict' is of type dict",
    ),
    "a list among tensors": (torch_file(dict_of({"x": tensor(), "y": EMPTY_LIST})), "entry 'y' is of type list"),
    "a dtype among tensors": (torch_file(dict_of({"y": name("torch", "int8")})), "entry 'y' is of type Global"),
    "a tensor under a number": (torch_file(b"}" + number(0) + tensor() + b"s"), "entry 0 is of type StoredTensor"),
    "no storage": (torch_file(dict_of({"x": tensor()}), {}), "tensor 'x': the archive lacks its values, data/0"),
    "storage elsewhere": (
        torch_file(dict_of({"x": tensor(storage("../data.pkl"))})), "lacks its values, data/../data.pkl",
    ),
    "storage short": (
        torch_file(dict_of({"x": tensor()}), {"0": VALUES[:-1]}),
        "tensor 'x': 6 values of float32 take 24 bytes, but data/0 has 23",
    ),
    "storage long": (torch_file(dict_of({"x": tensor()}), {"0": VALUES * 2}), "take 24 bytes, but data/0 has 48"),
    "storage of another type": (
        torch_file(dict_of({"x": tensor(storage(kind="DoubleStorage"))})), "6 values of float64 take 48 bytes",
    ),
    "storage of 2^62": (
        torch_file(dict_of({"x": tensor(storage(size=2**62))})), "take 18,446,744,073,709,551,616 bytes",
    ),
    "sizes too large": (
        torch_file(dict_of({"x": tensor(shape=(2**62, 0), strides=(0, 0))})),
        r"the sizes \(4611686018427387904, 0\) are too large for any array",
    ),
    "shape over the end": (
        torch_file(dict_of({"x": tensor(shape=(3, 3))})), "reach from 0 to 9, but its storage has 6",
    ),
    "offset over the end": (torch_file(dict_of({"x": tensor(offset=1)})), "reach from 1 to 7, but its storage has 6"),
    "offset of nothing": (
        torch_file(dict_of({"x": tensor(offset=7, shape=(0,), strides=(1,))})), "reach from 7 to 7, but",
    ),
    "strides over the end": (torch_file(dict_of({"x": tensor(strides=(4, 1))})), "reach from 0 to 7, but"),
    "strides far over": (
        torch_file(dict_of({"x": tensor(strides=(2**63 - 1, 1))})), "reach from 0 to 9,223,372,036,854,775,810",
    ),
    "stride 0": (torch_file(dict_of({"x": tensor(strides=(0, 1))})), r"the strides \(0, 1\) make its values overlap"),
    "rows overlap": (torch_file(dict_of({"x": tensor(strides=(2, 1))})), r"the strides \(2, 1\) make its values over"),
    "equal strides": (torch_file(dict_of({"x": tensor(strides=(1, 1))})), "make its values overlap"),
    "byte order": (torch_file(dict_of({"x": tensor()}), byteorder=b"middle"), "byteorder must be little or big"),
    "long byte order": (torch_file(EMPTY_DICT, byteorder=b"little" * 3), "byteorder has 18 bytes, at most 16 are read"),
}  # fmt: skip

# Archives that are no sound ZIP, or two at once


def changed(index: int, **changes: Any) -> list[Member]:
    """The members of a sound file with one of them changed: 0 is data.pkl, 3 the values."""
    found = members(GOOD)
    found[index] = dataclasses.replace(found[index], **changes)
    return found


def overlapping() -> bytes:
    """Two entries of the directory for one member."""
    found = members(GOOD)
    twin = dataclasses.replace(found[0], name="archive/data/1", content=found[0].content)
    content = archive([*found, twin])
    return content.replace(struct.pack("<I", content.index(b"archive/data/1") - 30), bytes(4))


def long_entry() -> bytes:
    """The last entry of the directory has a name that goes on behind it."""
    content = bytearray(SOUND)
    content[content.rindex(b"PK\x01\x02") + 28] = 0xFF
    return bytes(content)


def zipfile_with(names: Mapping[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as target:
        for member, content in names.items():
            target.writestr(member, content)
    return file.getvalue()


def tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as target:
        target.addfile(tarfile.TarInfo("sys_info"))
    return file.getvalue()


LAST = SOUND.index(b"archive/data/0") - 30  # where the last member begins
OTHER = Member("archive/data.pkl", program(PAYLOADS["os.system"]))
NAME_FAULTS = {
    "parent": "archive/../x", "dot": "archive/./x", "absolute": "/archive/x", "backslash": "archive\\x",
    "empty part": "archive//x", "directory": "archive/x/", "NUL": "archive/data.pkl\0.txt", "no UTF-8": b"archive/\xff",
    "empty": b"",
}  # fmt: skip
ZIP_FAULTS = {
    **{
        f"name: {key}": (archive([*members(GOOD), Member(bad, b"")]), "a member of the ZIP archive has the name")
        for key, bad in NAME_FAULTS.items()
    },
    "same name twice": (
        archive([*members(GOOD), OTHER]), "should name 5 members; it has 5 entries with 4 names",
    ),
    "local name differs": (
        archive(changed(0, local={"name": b"archive/evil.pkl"})), "b'archive/data.pkl' is not what the ZIP",
    ),
    "local name longer": (archive(changed(0, local={"name": b"archive/data.pklx"})), "is not what the ZIP directory"),
    "local flags differ": (archive(changed(0, local={"flags": 0})), "is not what the ZIP directory says"),
    "local method differs": (archive(changed(0, local={"method": 8})), "is not what the ZIP directory says"),
    "local size differs": (archive(changed(0, local={"size": 5})), "is not what the ZIP directory says"),
    "local crc differs": (archive(changed(0, flags=0, local={"crc": 5})), "is not what the ZIP directory says"),
    "no local header": (archive(changed(0, local={"signature": b"PK\x03\x05"})), "not a PyTorch file"),
    "no second header": (archive(changed(1, local={"signature": b"PKxx"})), "b'archive/version' is not what the ZIP"),
    "encrypted": (archive(changed(0, flags=0x809)), "b'archive/data.pkl' is encrypted, compressed or otherwise"),
    "strongly encrypted": (archive(changed(3, flags=0x840)), "is encrypted.*flags 0x840, method 0, 24 bytes for 24"),
    "patch": (archive(changed(3, flags=0x820)), "is encrypted, compressed or otherwise not as PyTorch stores it"),
    "compressed": (
        zipfile_with({"archive/data.pkl": GOOD, "archive/data/0": bytes(2**20)}, zipfile.ZIP_DEFLATED),
        "is encrypted, compressed or.*method 8",
    ),
    "42.zip": (
        archive(changed(3, entry={"method": 8, "size": 2**32 - 2})), r"method 8, 24 bytes for 4,294,967,294",
    ),
    "size differs": (archive(changed(3, entry={"size": 2**20})), "24 bytes for 1,048,576"),
    "on another disk": (archive(changed(3, entry={"disk": 1})), "is encrypted, compressed or otherwise"),
    "both sizes longer": (
        archive(changed(0, entry={"size": 2**20, "packed": 2**20})), "'archive/data.pkl' should end where the next",
    ),
    "both sizes shorter": (archive(changed(0, entry={"size": 9, "packed": 9})), "should end where the next begins"),
    "entry crc differs": (archive(changed(0, entry={"crc": 5})), "should end where the next begins"),
    "wrong descriptor": (archive(changed(0, descriptor=bytes(16))), "should end where the next begins"),
    "no descriptor": (archive(changed(0, descriptor=b"")), "should end where the next begins"),
    "hidden bytes": (archive(changed(3, before=b"hidden")), "b'archive/byteorder' should end where the next"),
    "hidden member": (
        archive(changed(3, before=local_header(OTHER, b"archive/data.pkl") + OTHER.content)), "should end where the",
    ),
    "overlapping": (overlapping(), "b'archive/data.pkl' is not what the ZIP directory says"),
    "prefix": (b"#!/bin/sh\n" + SOUND, "not a PyTorch file: begins with b'#!/bin/s'"),
    "prefix that fits": (archive(changed(0, before=b"#!/bin/sh\n")), "not a PyTorch file"),
    "another archive before": (SOUND + SOUND, "its ZIP directory should end at byte"),
    "another, which fits": (
        archive([dataclasses.replace(members(GOOD)[0], before=SOUND), *members(GOOD)[1:]]),
        "bytes stand before the first member of the ZIP archive",
    ),
    "trailing bytes": (SOUND + b"\0", "does not end with a ZIP directory: cut short, or something was appended"),
    "comment": (archive(members(GOOD), comment=b"x" * 9), "does not end with a ZIP directory"),
    "comment like an end": (archive(members(GOOD), comment=SOUND[-22:]), "its ZIP directory should end at byte"),
    "no members": (b"PK\x03\x04" + archive([], end={"start": 4}), "4 bytes stand before the first member of the ZIP"),
    "gap before the end": (archive(members(GOOD), between=b"hidden"), "its ZIP directory should end at byte"),
    "too many entries": (archive(members(GOOD), end={"count": 5, "count_here": 5}), "should name 5 members; it has 4"),
    "too few entries": (archive(members(GOOD), end={"count": 3, "count_here": 3}), "should name 3 members; it has 4"),
    "disks": (archive(members(GOOD), end={"disk": 1}), "its ZIP directory should end at byte"),
    "first disk": (archive(members(GOOD), end={"first_disk": 1}), "its ZIP directory should end at byte"),
    "entries elsewhere": (archive(members(GOOD), end={"count_here": 3}), "its ZIP directory should end at byte"),
    "directory elsewhere": (archive(members(GOOD), end={"start": 0}), "should end at byte .* bytes from 0 on"),
    "directory too long": (archive(members(GOOD), end={"length": 2**31}), "it has 2,147,483,648 bytes from"),
    "entry with another name": (
        archive(changed(3, entry={"name": b"archive/data/1"})), "'archive/data/1' is not what the ZIP directory says",
    ),
    "entry that is cut": (
        archive(changed(3, entry={"comment": b"PK"}), end={"length": 0}), "its ZIP directory should end at byte",
    ),
    "entry over the end": (long_entry(), "its ZIP directory is damaged after 3 members"),
    "entry without signature": (
        archive(changed(2, entry={"signature": b"PK\x01\x03"})), "its ZIP directory is damaged after 2 members",
    ),
    "64 bits that lie": (archive(members(GOOD), end_64={"count": 5}), "the two ends of its ZIP directory do not agree"),
    "64 bits elsewhere": (archive(members(GOOD), end_64={"at": 0}), "the two ends of its ZIP directory do not agree"),
    "64 bits of another size": (archive(members(GOOD), end_64={"size": 45}), "the two ends of its ZIP directory"),
    "64 bits without record": (archive(members(GOOD), end_64={"signature": b"PK\x06\x05"}), "the two ends of its"),
    "64 bits on two disks": (archive(members(GOOD), end_64={"disks": 2}), "the two ends of its ZIP directory"),
    "no 64-bit sizes": (
        archive(changed(3, large=True, entry={"extra": b""})), "b'archive/data/0' lacks its sizes in 64 bits",
    ),
    "cut 64-bit sizes": (
        archive(changed(3, large=True, entry={"extra": struct.pack("<2HQ", 1, 24, 24)})), "lacks its sizes in 64 bits",
    ),
    "64-bit offset far away": (
        archive(changed(3, large=True, entry={"extra": struct.pack("<2H3Q", 1, 24, 24, 24, 2**63)})),
        "it ends at 344, that at 9,223,372,036,854,775,808",
    ),
    "64-bit sizes that lie": (
        archive(changed(3, large=True, entry={"extra": struct.pack("<2H3Q", 1, 24, 2**62, 2**62, LAST)})),
        "should end where the next begins",
    ),
    "bad checksum of the pickle": (
        SOUND.replace(GOOD, GOOD[:-2] + b"t."), "data.pkl is damaged: its checksum is not",
    ),
    "bad checksum of the byte order": (SOUND.replace(b"little", b"bigbig"), "byteorder is damaged: its checksum"),
    "two roots": (archive([*members(GOOD), Member("other/x", b"")]), "it must hold one directory, with one data.pkl"),
    "two pickles": (archive([*members(GOOD), Member("archive/x/data.pkl", b"")]), "with one data.pkl"),
    "pickle below": (archive([Member("archive/x/data.pkl", GOOD)]), "a ZIP archive, but none of PyTorch's"),
    "pickle without directory": (archive([Member("data.pkl", GOOD)]), "a ZIP archive, but none of PyTorch's"),
    "no pickle": (zipfile_with({"archive/x": b"", "archive/y": b""}), "a ZIP archive, but none of PyTorch's"),
}  # fmt: skip

# Files that are something else

STRANGERS = {
    "empty": (b"", "the file is empty"),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer.*git lfs pull"),
    "web page": (b"<!DOCTYPE html><html></html>", "a web page or XML, not weights"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(40), "an HDF5 file under a wrong name"),
    "safetensors": (struct.pack("<Q", 2) + b"{}", "a safetensors file under a wrong name"),
    "text": (b"hello", "not a PyTorch file: begins with b'hello', not with b'PK"),
    "empty archive": (archive([]), "not a PyTorch file: begins with b'PK.x05.x06"),
    "a header alone": (SOUND[:20], "does not end with a ZIP directory: cut short"),
}
LEGACY = {
    "tar": (
        tar(),
        "a TAR archive, as PyTorch's first releases wrote: never read.*load it with PyTorch and save it again",
    ),
    "bare pickle": (GOOD, "a bare pickle, as PyTorch wrote before release 1.6: never read, because it could run code"),
}

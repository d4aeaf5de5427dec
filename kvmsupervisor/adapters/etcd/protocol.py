"""etcd's messages and stubs, taken from the `etcd3` package and run on protobuf's fast runtime.

`etcd3` 0.12.0 contains generated code that protobuf ≥ 4.0 refuses, except on the slow pure Python implementation. The
descriptors in that code are still good. So this module reads them as data, without importing the package. It loads them
into a descriptor pool of their own (file names such as `rpc.proto` are too common for the global pool) and executes the
generated stubs on top of them. Nothing else of `etcd3` is imported: neither its client nor the client's dependencies.

This module adds to the descriptors what etcd 3.4 added to the protocol and this program uses. Source of
the field numbers: https://github.com/etcd-io/etcd/blob/v3.4.0/etcdserver/etcdserverpb/rpc.proto
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

# gRPC reads these variables once, at import. Its fork handlers print a warning whenever a program with open channels
# starts another one. Child processes here always exec, so they need no such handlers.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
# Otherwise gRPC prints every failed handshake to stderr, twice a second. The exceptions say the same.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.internal import api_implementation

# The other modules import gRPC from here, so that the lines above have always run before.
__all__ = ["grpc", "mvcc", "rpc", "stubs"]

_PACKAGE = "etcd3.etcdrpc"
_FILES = ("kv", "auth", "rpc")
"""In the order of their dependencies."""

_Field = descriptor_pb2.FieldDescriptorProto


def _folder() -> Path:
    """The folder of the generated code."""
    found = importlib.util.find_spec("etcd3")
    if found is None or not found.submodule_search_locations:
        raise ImportError("the package etcd3 (0.12.0) is not installed: its protocol definitions are needed")
    return Path(found.submodule_search_locations[0]) / "etcdrpc"


def _read_descriptor(source: Path) -> descriptor_pb2.FileDescriptorProto:
    """Find the serialized descriptor in generated code: `serialized_pb=_b('…')`, bytes written as latin-1.

    The descriptor is one line of the file. Parsing the whole file would take a tenth of this program's start.
    """
    found = re.search(r"^ *serialized_pb=_b\((.*)\),?$", source.read_text(encoding="utf-8"), re.MULTILINE)
    if found is not None:
        text: str = ast.literal_eval(found[1])
        return descriptor_pb2.FileDescriptorProto.FromString(text.encode("latin-1"))
    raise ImportError(f"{source} holds no protocol descriptor: is this etcd3 0.12.0?")


def _modernize(rpc: descriptor_pb2.FileDescriptorProto) -> None:
    """Add what etcd 3.4 has and `etcd3`'s descriptors lack."""
    rpc.message_type.add(name="WatchProgressRequest")
    messages = {message.name: message for message in rpc.message_type}
    messages["WatchRequest"].field.add(
        name="progress_request",
        number=3,
        label=_Field.LABEL_OPTIONAL,
        type=_Field.TYPE_MESSAGE,
        type_name=f".{rpc.package}.WatchProgressRequest",
        oneof_index=0,
    )
    for name, number in (("WatchCreateRequest", 8), ("WatchResponse", 7)):
        messages[name].field.add(name="fragment", number=number, label=_Field.LABEL_OPTIONAL, type=_Field.TYPE_BOOL)


def _load_messages(folder: Path) -> dict[str, ModuleType]:
    """Make one module per file, with its message classes."""
    pool = descriptor_pool.DescriptorPool()
    modules = {}
    for name in _FILES:
        descriptor = _read_descriptor(folder / f"{name}_pb2.py")
        if name == "rpc":
            _modernize(descriptor)
        pool.AddSerializedFile(descriptor.SerializeToString())
        module = ModuleType(f"{_PACKAGE}.{name}_pb2")
        for message_name, message in pool.FindFileByName(descriptor.name).message_types_by_name.items():
            setattr(module, message_name, message_factory.GetMessageClass(message))
        modules[name] = module
    return modules


@contextmanager
def _standing_in(modules: dict[str, ModuleType]) -> Iterator[None]:
    """Let imports below `etcd3` find `modules`, and forget them afterwards.

    A later `import etcd3` elsewhere finds the real package.
    """
    stand_ins = {"etcd3": ModuleType("etcd3"), _PACKAGE: ModuleType(_PACKAGE)}
    stand_ins |= {module.__name__: module for module in modules.values()}
    for name, module in stand_ins.items():
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(stand_ins[parent], child, module)
    kept = {name: sys.modules[name] for name in stand_ins if name in sys.modules}
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name in stand_ins:
            del sys.modules[name]
        sys.modules.update(kept)


def _load_stubs(folder: Path, modules: dict[str, ModuleType]) -> ModuleType:
    """Execute the generated stubs with `modules`."""
    name = f"{_PACKAGE}.rpc_pb2_grpc"
    found = importlib.util.spec_from_file_location(name, folder / "rpc_pb2_grpc.py")
    if found is None or found.loader is None:
        raise ImportError(f"{folder} holds no rpc_pb2_grpc.py: is this etcd3 0.12.0?")
    module = importlib.util.module_from_spec(found)
    with _standing_in(modules):
        found.loader.exec_module(module)
    return module


if api_implementation.Type() != "upb":
    raise ImportError(
        f"protobuf runs on its {api_implementation.Type()!r} implementation, which is tens of times slower: "
        "unset PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION, or install a protobuf wheel that holds 'upb'"
    )

_modules = _load_messages(_folder())

rpc: Any = _modules["rpc"]
"""The messages of rpc.proto, such as `rpc.RangeRequest`."""

mvcc: Any = _modules["kv"]
"""The messages of kv.proto: `mvcc.KeyValue`, `mvcc.Event`."""

stubs: Any = _load_stubs(_folder(), _modules)
"""The stubs, such as `stubs.KVStub(channel)`, for a `grpc.aio.Channel`."""

"""The protocol definitions: on the fast runtime, clean, and complete."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from google.protobuf.internal import api_implementation

from kvmsupervisor.adapters.etcd.messages import end_of_prefix, range_of
from kvmsupervisor.adapters.etcd.protocol import rpc


def python(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
        timeout=60,
    )


def test_protobuf_runs_on_upb() -> None:
    """The implementation in use is the fast one, which every budget counts on."""
    assert api_implementation.Type() == "upb"


def test_a_slow_protobuf_is_refused() -> None:
    """On the pure Python implementation the import fails, and says what to do."""
    done = python("from kvmsupervisor.adapters.etcd import Etcd", PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION="python")
    assert done.returncode != 0
    assert "unset PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION" in done.stderr


def test_the_import_is_clean_and_leaves_no_trace() -> None:
    """No warning, nothing printed, no etcd3 in `sys.modules`, none of what its client needs."""
    done = python(
        "import kvmsupervisor.adapters.etcd.client, sys\n"
        "assert not {'tenacity', 'six'} & set(sys.modules)\n"
        "assert not [name for name in sys.modules if name.startswith('etcd3')]\n"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_fork_support_is_off_before_grpc_comes() -> None:
    """Fork support of gRPC is off when it is imported, by whichever module of the adapter."""
    for module in (".client", ".errors", ".auth", ".protocol"):
        done = python(
            "import os, sys\n"
            "class Guard:\n"
            "    def find_spec(self, name, path=None, target=None):\n"
            "        if name == 'grpc': print(os.environ.get('GRPC_ENABLE_FORK_SUPPORT'))\n"
            "sys.meta_path.insert(0, Guard())\n"
            f"import kvmsupervisor.adapters.etcd{module}\n"
        )
        assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr


def test_the_added_fields_are_those_of_etcd() -> None:
    """The fields that etcd3 lacks have the numbers of etcd's own definition."""
    request = rpc.WatchRequest(progress_request=rpc.WatchProgressRequest())
    assert request.SerializeToString() == b"\x1a\x00"
    assert rpc.WatchCreateRequest(fragment=True).SerializeToString() == b"\x40\x01"
    assert rpc.WatchResponse(fragment=True).SerializeToString() == b"\x38\x01"


@pytest.mark.parametrize(
    ("prefix", "end"),
    [(b"/kvm/", b"/kvm0"), (b"a\xff", b"b"), (b"\xff\xff", b"\0"), (b"", b"\0")],
)
def test_a_prefix_ends_where_the_next_one_begins(prefix: bytes, end: bytes) -> None:
    """The end of a range is the prefix with its last byte one higher, or the end of all keys."""
    assert end_of_prefix(prefix) == end


def test_the_empty_prefix_is_everything() -> None:
    r"""An empty key is refused by etcd; everything is the range from `\0` to `\0`."""
    assert range_of("", prefix=True) == {"key": b"\0", "range_end": b"\0"}

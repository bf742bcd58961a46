"""A user's password given to etcd3: the library logs in once and sends the token with each call.

Its own suite mocks the server where it tries this.
"""

import os
import queue
import subprocess

import etcd3
import grpc
import pytest

PORT = int(os.environ["TEST_SERVER_PORT"])
ROOT = ["--user", "root:root-secret"]


def etcdctl(*arguments):
    ran = subprocess.run(["etcdctl", *arguments], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, f"{arguments}: {ran.stderr}"
    return ran.stdout


def client(user=None, password=None):
    made = etcd3.client(host="127.0.0.1", port=PORT, user=user, password=password, timeout=10)
    # It sends the token twice. As a call credential, grpcio no longer lets it out in cleartext.
    made.call_credentials = None
    made.watcher._credentials = None
    return made


@pytest.fixture
def secured():
    """Authentication is on, and the user `reader` may read `r/` and write `w`."""
    etcdctl("user", "add", "root:root-secret")
    etcdctl("role", "add", "root")
    etcdctl("user", "grant-role", "root", "root")
    etcdctl("user", "add", "reader:reader-secret")
    etcdctl("role", "add", "reader")
    etcdctl("role", "grant-permission", "reader", "read", "--prefix", "r/")
    etcdctl("role", "grant-permission", "reader", "write", "w")
    etcdctl("user", "grant-role", "reader", "reader")
    etcdctl("auth", "enable")
    try:
        yield
    finally:
        etcdctl(*ROOT, "auth", "disable")
        for name in ["reader", "root"]:
            etcdctl("user", "delete", name)
            etcdctl("role", "delete", name)
        etcdctl("del", "--prefix", "r/")
        etcdctl("del", "w")


def refused(code, text, call):
    with pytest.raises(grpc.RpcError) as raised:
        call()
    assert (raised.value.code(), raised.value.details()) == (code, text)


def test_root_and_a_user(secured):
    root = client("root", "root-secret")
    root.put("r/1", "one")
    root.put("secret", "two")
    reader = client("reader", "reader-secret")
    assert reader.get("r/1")[0] == b"one"
    assert [value for value, _ in reader.get_prefix("r/")] == [b"one"]
    reader.put("w", "three")
    assert root.get("w")[0] == b"three"
    denied = grpc.StatusCode.PERMISSION_DENIED, "etcdserver: permission denied"
    refused(*denied, lambda: reader.get("secret"))
    refused(*denied, lambda: reader.get("w"))
    refused(*denied, lambda: reader.put("r/1", "x"))
    refused(*denied, lambda: list(reader.get_prefix("r")))
    refused(*denied, lambda: reader.delete("secret"))
    refused(
        *denied,
        lambda: reader.transaction(
            compare=[reader.transactions.version("secret") > 0],
            success=[reader.transactions.put("w", "x")],
            failure=[],
        ),
    )
    done, _ = reader.transaction(
        compare=[reader.transactions.version("r/1") > 0],
        success=[reader.transactions.put("w", "four")],
        failure=[],
    )
    assert done
    lease = root.lease(60)
    root.put("r/leased", "x", lease=lease)
    lease.revoke()
    assert reader.get("r/leased")[0] is None
    root.delete("secret")


def test_a_watch(secured):
    root = client("root", "root-secret")
    reader = client("reader", "reader-secret")
    seen = queue.Queue()
    watch = reader.add_watch_prefix_callback("r/", seen.put)
    root.put("r/1", "one")
    event = seen.get(timeout=30)
    assert [(e.key, e.value) for e in event.events] == [(b"r/1", b"one")]
    reader.cancel_watch(watch)


def test_who_is_not_let_in(secured):
    failed = (
        grpc.StatusCode.INVALID_ARGUMENT,
        "etcdserver: authentication failed, invalid user ID or password",
    )
    refused(*failed, lambda: client("reader", "wrong"))
    refused(*failed, lambda: client("nobody", "reader-secret"))
    empty = grpc.StatusCode.INVALID_ARGUMENT, "etcdserver: user name is empty"
    refused(*empty, lambda: client().get("r/1"))
    reader = client("reader", "reader-secret")
    reader.get("r/1")
    etcdctl(*ROOT, "user", "revoke-role", "reader", "reader")
    denied = grpc.StatusCode.PERMISSION_DENIED, "etcdserver: permission denied"
    refused(*denied, lambda: reader.get("r/1"))

"""Whatever goes wrong between this machine and its storage is a DataError with the address and the cause; nothing unbounded is read."""

from __future__ import annotations

import http.server
import json
import sys
import threading

import fsspec
import pytest

from megatron_patch.data import remote_files
from megatron_patch.data.corpus import open_corpus
from megatron_patch.data.dataset_metadata import read_metadata
from megatron_patch.data.storage import open_file
from megatron_patch.errors import DataError
from tests.distributed.runs import DATA, MODEL, start_program
from tests.faults.conftest import PLAN


class PanicException(BaseException):
    """As libraries in Rust raise it: not an Exception."""


class ClientError(Exception):
    """As botocore raises it."""


FAILURES = {
    "refused": ConnectionRefusedError(111, "Connection refused"),
    "name": OSError(-2, "Name or service not known"),
    "timeout": TimeoutError(),
    "client": ClientError("An error occurred (403) when calling HeadObject: see http://user:sesame@host/x?X-Amz-Signature=sesame"),
    "permission": PermissionError(13, "Access Denied"),
    "package": ImportError("Install s3fs to access S3"),
    "panic": PanicException("called `Option::unwrap()` on a `None` value"),
    "value": ValueError("bucket name\nis\tnot valid"),
    "key": KeyError("size"),
    "bare": RuntimeError(),
}


@pytest.fixture
def broken(monkeypatch, tmp_path):
    """A kind of address whose file system fails as the host says, when its name comes with what is called."""
    monkeypatch.setattr(remote_files, "_PAUSE_SECONDS", 0.0)
    monkeypatch.setenv("MEGATRON_PATCH_CACHE", str(tmp_path / "cache"))

    class Broken(fsspec.AbstractFileSystem):
        protocol = "broken"
        cachable = False

        def __init__(self, **options):
            super().__init__(**options)
            if failing == "start":
                raise FAILURES[kind]

        def info(self, path, **options):
            if failing == "info":
                raise FAILURES[kind]
            return {"name": path, "size": 100, "type": "file"}

        def glob(self, path, **options):
            raise FAILURES[kind]

        def cat_file(self, path, **options):
            raise FAILURES[kind]

    def choose(new_kind, new_failing):
        nonlocal kind, failing
        kind, failing = new_kind, new_failing

    kind = failing = ""
    fsspec.register_implementation("broken", Broken, clobber=True)
    return choose


@pytest.mark.parametrize("kind", FAILURES)
@pytest.mark.parametrize("failing", ["start", "info", "read", "glob"])
def test_every_failure_of_storage_names_address_and_cause(broken, kind, failing, tmp_path, capsys):
    broken(kind, failing)
    word = f"broken://bucket/{kind}{'-*' if failing == 'glob' else ''}"
    with pytest.raises(DataError) as caught:
        open_corpus(word) if failing != "glob" else remote_files.remote_glob(word)
    text = str(caught.value)
    assert word in text and type(FAILURES[kind]).__name__ in text and "What to do: " in text and "sesame" not in text
    if failing in ("info", "glob"):
        save = str(tmp_path / "run")
        assert start_program([*MODEL, *DATA, *PLAN, "--vocab-size", "32", "--data-path", word, "--save", save]) == 3
        output = "".join(capsys.readouterr()) + "".join(path.read_text() for path in (tmp_path / "run").rglob("*") if path.is_file())
        assert "Traceback" not in output and word in output and "sesame" not in output


def test_keys_that_stop_the_program_still_stop_it(broken):
    FAILURES["stop"] = KeyboardInterrupt()
    broken("stop", "info")
    try:
        with pytest.raises(KeyboardInterrupt):
            open_corpus("broken://bucket/x")
    finally:
        del FAILURES["stop"]


def test_a_package_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(DataError, match=r"s3://bucket/x.bin cannot be read: ImportError: .*s3fs"):
        open_corpus("s3://bucket/x")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(DataError, match="pip install .*'megatron_patch.remote.' and the package for s3://"):
        open_corpus("s3://bucket/x")


class Handler(http.server.BaseHTTPRequestHandler):
    """/403, /404 and /500 answer with that status; /moved leads to an address with a token; /huge… claims to have 1 TiB, and sends it."""

    def do_HEAD(self):
        status = int(self.path[1:4]) if self.path[1:4].isdigit() else 200
        if self.path.startswith("/moved"):
            self.send_response(302)
            self.send_header("Location", "/500?X-Amz-Signature=sesame")
            self.end_headers()
            return
        self.send_response(status)
        self.send_header("Content-Length", str(1 << 40 if self.path.startswith("/huge") else 0))
        self.end_headers()

    def do_GET(self):
        self.do_HEAD()
        if self.path.startswith("/huge"):
            try:
                while True:
                    self.server.sent += self.wfile.write(bytes(1 << 20))
            except OSError:
                pass

    def log_message(self, *words):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.setattr(remote_files, "_PAUSE_SECONDS", 0.0)
    monkeypatch.setenv("MEGATRON_PATCH_CACHE", str(tmp_path / "cache"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.sent = 0
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("403", "403.*Forbidden"),
        ("500", "500.*Internal Server Error"),
        ("404", "/404.idx does not exist|/404.bin does not exist"),
        ("moved", "500.*Internal Server Error"),
    ],
)
def test_a_web_server_that_refuses_is_quoted(server, path, words):
    with pytest.raises(DataError, match=words) as caught:
        open_corpus(f"http://127.0.0.1:{server.server_port}/{path}")
    assert "sesame" not in str(caught.value)


def test_a_port_that_nobody_listens_to_is_no_missing_file(monkeypatch):
    monkeypatch.setattr(remote_files, "_PAUSE_SECONDS", 0.0)
    with pytest.raises(DataError, match="http://127.0.0.1:9/web.bin cannot be read: ClientConnectorError: Cannot connect"):
        open_corpus("http://127.0.0.1:9/web")


def test_a_server_that_sends_without_end_is_not_read_to_its_end(server):
    address = f"http://127.0.0.1:{server.server_port}/huge"
    with pytest.raises(DataError, match="the server sent more than the 1048576 requested bytes"):
        open_file(address).read_into(0, memoryview(bytearray(10)))
    assert server.sent < 64 << 20
    with pytest.raises(DataError, match=r"has 1,099,511,627,776 bytes, and such a file may have up to 16,777,216"):
        read_metadata(address)
    with pytest.raises(DataError, match=r"has 1,099,511,627,776 bytes, and such a file may have up to 67,108,864"):
        open_corpus(f"@{address}.txt")
    with pytest.raises(DataError, match=r"/huge/ is not a list of files"):
        remote_files.remote_glob(f"{address}/shard-*")
    assert server.sent < 64 << 20


def test_side_files_of_any_size_are_refused_before_they_are_read(tmp_path):
    for name in ("x.json", "list"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(200 << 30)
    with pytest.raises(DataError, match="x.json has 214,748,364,800 bytes"):
        read_metadata(str(tmp_path / "x"))
    with pytest.raises(DataError, match="list has 214,748,364,800 bytes"):
        open_corpus(f"@{tmp_path}/list")
    (tmp_path / "y.json").write_text(json.dumps([1]))
    with pytest.raises(DataError, match="is not a dataset's metadata file"):
        read_metadata(str(tmp_path / "y"))

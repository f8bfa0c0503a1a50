"""What is fetched, from a server on loopback that stands for a public host, and what is not."""

import shutil
import socket
import ssl
import subprocess
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import GOLDEN

from llama_vision import LlamaVisionError
from llama_vision.inputs import web_pictures
from llama_vision.inputs.pictures import ImageError
from llama_vision.inputs.web_pictures import check_hosts, fetch_picture, is_public

PICTURE = (GOLDEN / "images" / "big_320x200.png").read_bytes()
HOST = "pictures.example"
needs_openssl = pytest.mark.skipif(not shutil.which("openssl"), reason="needs openssl")


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append((self.path, self.headers["Host"]))
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/picture")
            self.end_headers()
        elif self.path == "/missing":
            self.send_error(404)
        elif self.path == "/drip":
            self.drip()
        else:
            self.send_response(200)
            if self.path != "/unsized":
                length = len(PICTURE) + 5 * (self.path == "/cut")
                self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(PICTURE)

    def drip(self):
        """A byte of a header now and then, as long as it is read."""
        self.wfile.write(b"HTTP/1.0 200 OK\r\nX: ")
        try:
            while True:
                self.wfile.write(b"x")
                time.sleep(0.02)
        except OSError:
            pass

    def log_message(self, *_):
        pass


@contextmanager
def server(monkeypatch, scheme="http", context=None, addresses=("127.0.0.1",)):
    """One whose name stands for addresses; the port is the scheme's."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        http.asked = []
        if context is not None:
            http.socket = context.wrap_socket(http.socket, server_side=True)
        port = http.server_address[1]
        monkeypatch.setitem(web_pictures.PORTS, scheme, port)

        def look_up(host, asked, **_):
            assert (host, asked) == (HOST, port)
            kind = socket.AF_INET, socket.SOCK_STREAM, 6, ""
            return [(*kind, (address, asked)) for address in addresses]

        monkeypatch.setattr(socket, "getaddrinfo", look_up)
        thread = threading.Thread(target=http.serve_forever, args=[0.01])
        thread.start()
        try:
            yield http
        finally:
            http.shutdown()
            thread.join()


@pytest.fixture
def loopback_is_public(monkeypatch):
    monkeypatch.setattr(web_pictures, "is_public", lambda address: address == "127.0.0.1")


@pytest.fixture
def web(monkeypatch, loopback_is_public):
    with server(monkeypatch) as http:
        yield http


def refusal(url: str, hosts=(HOST,), **how) -> str:
    with pytest.raises(ImageError) as caught:
        fetch_picture(url, hosts, **how)
    return str(caught.value)


@pytest.mark.parametrize("path", ["/picture", "/picture?size=1&b=%20", "/unsized", ""])
def test_a_picture_is_fetched(web, path):
    assert fetch_picture(f"http://{HOST}{path}#part", [HOST]) == PICTURE
    assert web.asked == [(path or "/", HOST)]


def test_a_host_is_written_in_any_case(web):
    assert fetch_picture(f"HTTP://{HOST.upper()}:{web.server_address[1]}/", [HOST]) == PICTURE


@pytest.mark.parametrize(
    "url",
    [
        f"ftp://{HOST}/x",
        f"file://{HOST}/x",
        f"//{HOST}/x",
        "/etc/passwd",
        "picture.png",
        "",
        "http://",
        "http://[::1",
        f"http://{HOST}:81/x",
        f"http://{HOST}:x/x",
        f"http://{HOST}:99999/x",
        f"http://user@{HOST}/x",
        f"http://other@{HOST}:80/x",
        f"http://{HOST}.other.example/x",
        f"http://www.{HOST}/x",
        f"http://{HOST}./x",
        f"http://other.example/@{HOST}",
        f"http://other.example\\@{HOST}/",
        "http://127.0.0.1/x",
        "http://2130706433/x",
        "http://\ud800/x",
    ],
)
def test_other_places_are_refused_before_a_name_is_looked_up(monkeypatch, url):
    monkeypatch.setattr(socket, "getaddrinfo", None)
    assert f"is not taken from there; expected a data URI, or http(s) from {HOST}" in refusal(url)
    assert refusal(url, hosts=()).endswith("is not taken from there; expected a data URI")


@pytest.mark.parametrize(
    ("path", "how", "words"),
    [
        ("/moved", {}, "it answers 302; redirects are not followed"),
        ("/missing", {}, "it answers 404"),
        ("/picture", {"most": len(PICTURE) - 1}, f"larger than {len(PICTURE) - 1} bytes"),
        ("/unsized", {"most": len(PICTURE) - 1}, f"larger than {len(PICTURE) - 1} bytes"),
        ("/cut", {}, "it is cut short"),
        ("/drip", {"seconds": 0.3}, "it took more than 0.3 seconds"),
        ("/a b", {}, "control characters"),
        ("/\ud800", {}, "cannot be fetched"),
        ("/missi\r\nng", {}, "it answers 404"),  # line ends are no part of a URL
    ],
)
def test_what_is_no_picture_is_refused(web, path, how, words):
    message = refusal(f"http://{HOST}{path}", **how)
    assert words in message
    assert message.isprintable()


def test_an_answer_that_never_begins_is_given_up(monkeypatch, loopback_is_public):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setitem(web_pictures.PORTS, "http", silent.getsockname()[1])
        place = (socket.AF_INET, socket.SOCK_STREAM, 6, "", silent.getsockname())
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [place])
        assert "it took more than 0.2 seconds" in refusal(f"http://{HOST}/", seconds=0.2)


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.0.1", "169.254.169.254", "100.64.0.1"),
        *("0.0.0.0", "255.255.255.255", "224.0.0.1", "192.0.2.1", "198.18.0.1", "240.0.0.1"),
        *("::1", "::", "fe80::1", "fe80::1%eth0", "fd00::1", "ff02::1", "::ffff:127.0.0.1"),
        *("::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "2001:0:1::1", "2001:db8::1"),
    ],
)
def test_an_address_that_is_not_public_is_not_connected_to(monkeypatch, address):
    assert not is_public(address)
    with server(monkeypatch, addresses=("8.8.8.8", address)) as http:
        words = f"{HOST} is at {address}, which is no public address"
        assert words in refusal(f"http://{HOST}/picture")
        assert not http.asked


def test_public_addresses_are_public():
    assert is_public("8.8.8.8")
    assert is_public("2606:4700::1111")
    assert is_public("::ffff:8.8.8.8")


def test_a_name_is_looked_up_once(web, monkeypatch):
    """Its second answer would be another."""
    look_up, calls = socket.getaddrinfo, []
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda *a, **k: (calls.append(a), look_up(*a, **k))[1]
    )
    fetch_picture(f"http://{HOST}/", [HOST])
    assert len(calls) == 1


def test_a_name_that_is_nowhere_is_refused(monkeypatch):
    def fail(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    assert "Name or service not known" in refusal(f"https://{HOST}/")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [])
    assert "the host has no address" in refusal(f"https://{HOST}/")


@needs_openssl
@pytest.mark.parametrize("name", [HOST, "other.example"])
def test_https_is_verified_against_the_name(monkeypatch, tmp_path, loopback_is_public, name):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    command += ["-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}"]
    command += ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with server(monkeypatch, "https", context) as http:
        assert "certificate verify failed" in refusal(f"https://{HOST}/picture")
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))  # now it is trusted
        if name == HOST:
            assert fetch_picture(f"https://{HOST}/picture", [HOST]) == PICTURE
        else:
            assert "certificate is not valid for" in refusal(f"https://{HOST}/picture")
        assert len(http.asked) == (name == HOST)


def test_hosts_are_names():
    assert check_hosts(["", " Example.ORG ", "b"]) == ["example.org", "b"]
    for name in ("http://x", "x:80", "x/y", "a b", "*.x"):
        with pytest.raises(LlamaVisionError, match="is no host; expected a name"):
            check_hosts([name])

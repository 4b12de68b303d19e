"""Whether the Hub is found to answer, by servers on loopback."""

import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from mezzotint.integrations import network


@pytest.fixture
def endpoint(monkeypatch):
    """Sets the Hub's address to a port of this machine."""
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "HTTP_PROXY", "http_proxy", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(network, "SECONDS", 1.0)
    return lambda port: monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")


@pytest.mark.parametrize("status", [200, 403, 404, 500])
def test_any_answer_will_do(endpoint, status):
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(status)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        endpoint(server.server_address[1])
        assert network.reachable()


def test_nobody_listens(endpoint):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        endpoint(closed.getsockname()[1])
        assert not network.reachable()


def test_a_connection_is_no_answer(endpoint):
    """What stands between may take every connection and say nothing, or break it off."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint(silent.getsockname()[1])
        assert not network.reachable()
    with socket.create_server(("127.0.0.1", 0)) as rude:
        threading.Thread(target=lambda: rude.accept()[0].close(), daemon=True).start()
        endpoint(rude.getsockname()[1])
        assert not network.reachable()


@pytest.mark.filterwarnings("error")  # an exception in the thread that asks is a warning
def test_what_is_no_http_is_no_answer(endpoint):
    def answer(server: socket.socket) -> None:
        with server.accept()[0] as connection:
            connection.recv(4096)
            connection.sendall(b"220 another protocol\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=answer, args=(server,), daemon=True).start()
        endpoint(server.getsockname()[1])
        assert not network.reachable()


@pytest.mark.parametrize(
    ("name", "value", "found"), [("HF_HUB_OFFLINE", "1", False), ("HTTPS_PROXY", "http://p", True)]
)
def test_what_is_taken_on_trust(endpoint, monkeypatch, name, value, found):
    endpoint(9)
    monkeypatch.setenv(name, value)
    assert network.reachable() == found


def test_an_address_that_is_none(endpoint, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "no address")
    assert not network.reachable()

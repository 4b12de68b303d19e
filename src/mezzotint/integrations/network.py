"""Whether the Hugging Face Hub can be reached, before a client spends minutes on finding out. Knows nothing of what is there."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from urllib.parse import urlsplit

SECONDS = 3.0


def reachable() -> bool:
    """Whether the Hub answers within SECONDS; taken on trust where a proxy stands between."""
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        return False
    parts = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    answered = threading.Event()

    def call() -> None:
        with contextlib.suppress(OSError, ValueError):
            port = parts.port or (80 if parts.scheme == "http" else 443)
            with socket.create_connection((parts.hostname or "", port), timeout=SECONDS):
                answered.set()

    # In a thread, for a name that no server resolves is sought for longer than any connection's timeout.
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(SECONDS)
    return answered.is_set()

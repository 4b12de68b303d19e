"""Whether the Hugging Face Hub can be reached, before a client spends minutes on finding out. Knows nothing of what is there."""

from __future__ import annotations

import os
import threading

SECONDS = 3.0


def reachable() -> bool:
    """Whether the Hub answers within SECONDS; taken on trust where a proxy stands between."""
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        return False
    answered = threading.Event()

    def call() -> None:
        from http.client import HTTPException
        from ssl import SSLError
        from urllib.error import HTTPError, URLError
        from urllib.request import Request, urlopen

        try:
            asked = Request(os.environ.get("HF_ENDPOINT") or "https://huggingface.co", method="HEAD")
            urlopen(asked, timeout=SECONDS).close()
        except HTTPError:
            pass  # an answer, if not the one that was asked for
        except URLError as error:
            if not isinstance(error.reason, SSLError):  # the Hub's clients may trust other certificates
                return
        except (OSError, ValueError, HTTPException):
            return
        answered.set()

    # In a thread, for a name that no server resolves is sought for longer than any connection's timeout.
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(SECONDS)
    return answered.is_set()

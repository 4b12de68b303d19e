"""Files that the challenge has published on the Hugging Face Hub, fetched once and kept in its cache.

Knows nothing of what is in them.
"""

from __future__ import annotations

import errno
from pathlib import Path

from mezzotint.errors import DataError
from mezzotint.integrations.network import reachable

try:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
except ImportError as error:
    raise DataError("fineweb:... needs huggingface_hub: pip install 'mezzotint[hub]'") from error

REPOSITORY = "willdepueoai/parameter-golf"
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def fetch(path: str) -> Path:
    """The file `datasets/PATH` of the repository, here. Raises DataError; OSError where the disk is full."""
    local = not reachable()
    try:
        return Path(hf_hub_download(REPOSITORY, f"datasets/{path}", repo_type="dataset", local_files_only=local))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        if isinstance(error, OSError) and error.errno in FULL_DISK:
            raise
        reason = "the Hub cannot be reached" if local else str(error).splitlines()[0]
        raise DataError(f"cannot fetch datasets/{path} from {REPOSITORY}: {reason}") from error

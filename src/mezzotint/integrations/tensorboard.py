"""TensorBoard's event files, by the writer that PyTorch brings for them.

Knows nothing of runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mezzotint.errors import ConfigError

try:
    from torch.utils.tensorboard import SummaryWriter
except ImportError as error:
    raise ConfigError("TensorBoard is not installed: pip install 'mezzotint[tensorboard]'") from error


def writer(folder: Path) -> Any:
    """What `add_scalar(name, value, step)` writes to events in `folder`, until `close()`."""
    return SummaryWriter(str(folder))

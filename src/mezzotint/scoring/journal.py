"""Figures of finished units of work, shared by processes and kept in a file.

Does not know what is scored.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from mezzotint.data.dataset import Windows
from mezzotint.data.texts import TextWindows
from mezzotint.distributed import rank_and_size
from mezzotint.errors import DataError
from mezzotint.files import atomic_write, writing
from mezzotint.network.model import Model


def model_digest(model: Model) -> str:
    """SHA-256 that tells models apart: the artifact's own, or of all weights."""
    if model.sha256:
        return model.sha256
    digest = hashlib.sha256()
    for name, value in sorted(model.network.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


class Journal:
    """Figures of finished units of work: shared by processes, and kept in a file when there is one.

    Unit u belongs to process u mod (number of processes). Every process computes its own and writes its own file
    (`path`, or `path.r` for rank r > 0), after 1, 2, 4... seconds and then every `interval`, and when its context is left
    by an error; whoever opens the journal later reads all of
    them, so a run may go on with another number of processes. The file names what it is about; a journal of another
    model, data or setting is refused with DataError.
    """

    interval = 30.0

    def __init__(
        self,
        path: Path | None,
        model: Model,
        windows: Windows | TextWindows,
        settings: dict[str, Any],
        units: int,
        columns: int = 1,
    ) -> None:
        self.rank, self.processes = rank_and_size()
        self.device = model.device
        self.values = np.full((units, columns), np.nan)
        self.path = None
        self.started = self.saved = time.monotonic()
        if path is None:
            return
        path = Path(path)
        sample = hashlib.sha256(str(len(windows)).encode())
        for i in sorted({j * (len(windows) - 1) // 63 for j in range(64)}):
            sample.update(np.asarray(windows[i], dtype=np.int64).tobytes())
        self.key = json.dumps(
            {**settings, "model": model_digest(model), "windows": sample.hexdigest(), "units": units}, sort_keys=True
        )
        parts = [path, *path.parent.glob(f"{path.name}.*")]
        for part in parts:
            if part.is_file() and (part == path or part.suffix[1:].isdigit()):
                known = self._load(part)
                self.values = np.where(np.isnan(self.values), known, self.values)
        if self.processes > 1:
            dist.barrier()  # nobody writes before everybody has read
        self.path = path if self.rank == 0 else path.with_name(f"{path.name}.{self.rank}")

    def _load(self, part: Path) -> np.ndarray:
        try:
            with np.load(part, allow_pickle=False) as stored:
                key, values = str(stored["key"]), stored["values"]
        except Exception as error:  # zip, header and key errors alike: it is not ours
            raise DataError(f"{part} is not a scoring journal: delete it or name another file") from error
        if key != self.key or values.shape != self.values.shape or values.dtype != np.float64:
            raise DataError(f"{part} belongs to another model, data or setting: delete it or name another file")
        return values

    def mine(self) -> list[int]:
        """The units that this process has yet to compute."""
        return [u for u in range(self.rank, len(self.values), self.processes) if np.isnan(self.values[u, 0])]

    def record(self, unit: int, *values: float) -> None:
        """Note a finished unit, and save if it is time."""
        self.values[unit] = values
        now = time.monotonic()
        if now - self.saved >= min(self.interval, max(1.0, self.saved - self.started)):
            self.save()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.save()

    def save(self) -> None:
        """Write this process's file, whole or not at all."""
        if self.path is not None:
            buffer = io.BytesIO()
            np.savez(buffer, key=np.array(self.key), values=self.values)
            with writing(self.path, DataError):
                atomic_write(self.path, buffer.getvalue())
        self.saved = time.monotonic()

    def result(self) -> np.ndarray:
        """All units of all processes, float64 [units, columns], the same on every process."""
        self.save()
        if self.processes == 1:
            return self.values
        own = np.zeros_like(self.values)
        own[self.rank :: self.processes] = self.values[self.rank :: self.processes]
        shared = torch.from_numpy(own).to(self.device)
        dist.all_reduce(shared)
        return shared.cpu().numpy()

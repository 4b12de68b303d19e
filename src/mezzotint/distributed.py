"""Devices, processes and threads: which device, torchrun's group, this process's rank, values that all must share, and
a thread beside the one that computes.

Knows nothing of models or data.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import platform
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist

from mezzotint.errors import ConfigError


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device called `name`; `auto` takes CUDA, then MPS, then the CPU. Raises ConfigError if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"unknown device {name!r}: use auto, cpu, cuda or mps") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError("this PyTorch sees no CUDA device; use --device cpu")
        device = torch.device("cuda", local_rank if device.index is None else device.index)
        torch.cuda.set_device(device)
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("this PyTorch sees no MPS device; use --device cpu")
    elif device.type not in ("cpu", "mps"):
        raise ConfigError(f"device {name!r} is not supported: use auto, cpu, cuda or mps")
    return device


def send(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on a device; from pinned memory to CUDA, so that copies run beside the computation and nobody waits."""
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


@functools.cache
def _processor() -> str:
    """/proc/cpuinfo, read once as every step asks for it; nothing where there is none."""
    try:
        return Path("/proc/cpuinfo").read_text("utf-8", "replace")
    except OSError:
        return ""


def bfloat16_pays(device: torch.device, facts: str | None = None) -> bool:
    """Whether matrix products on `device` are faster in bfloat16 than in float32.

    On a CPU of the x86 family they are with tiles (AMX), and on AMD's that have the instructions for it; Intel's dot
    products in vectors take longer than float32's, and without any they are emulated (LOG.md, 2026-11-27). A rule and not
    a timing, so that every run on a machine decides alike. facts: /proc/cpuinfo's text; the machine's where not given.
    """
    if device.type != "cpu" or platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    facts = _processor() if facts is None else facts
    flags = next((line.split() for line in facts.splitlines() if line.startswith("flags")), ["amx_bf16"])
    return "amx_bf16" in flags or ("AuthenticAMD" in facts and "avx512_bf16" in flags)


@contextlib.contextmanager
def _standard_output_spared() -> Iterator[None]:
    """What is written to file 1 goes to file 2: Gloo of PyTorch 2.9 says there that it is connected, amid a command's JSON."""
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


@contextlib.contextmanager
def process_group(device_name: str) -> Iterator[tuple[int, int, int]]:
    """Join torchrun's process group if there is one; yields (rank, world size, local rank)."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 or dist.is_initialized():
        initialized = dist.is_initialized()
        yield (dist.get_rank(), dist.get_world_size(), 0) if initialized else (0, 1, 0)
        return
    cuda = device_name == "cuda" or (device_name == "auto" and torch.cuda.is_available())
    store, rank, _ = next(dist.rendezvous("env://"))
    if os.environ.get("LOCAL_WORLD_SIZE") == str(world):
        # torchrun keeps its store over restarts. Gloo would find the addresses of processes that are gone. Machines count
        # their restarts by themselves, so this is for one only (docs/scaling.md says what to do with many).
        store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    # Beside NCCL for what is on the GPUs, Gloo for what is not: no GPU is waited for to agree on a clock.
    with _standard_output_spared():
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=rank, world_size=world)
    try:
        yield rank, world, int(os.environ.get("LOCAL_RANK", "0"))
    finally:
        # DistributedDataParallel holds the group in reference cycles. While it lives so do Gloo's threads, which may
        # still own tensors, and one that frees a tensor during the interpreter's exit aborts the process.
        gc.collect()
        dist.destroy_process_group()
        gc.collect()


def rank_and_size() -> tuple[int, int]:
    """(rank, processes) of the torch.distributed group, (0, 1) without one."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def agree_on(values: list[float], world: int) -> list[float]:
    """The first process's values, everywhere; a signal seen by any process counts."""
    if world == 1:
        return values
    shared = torch.tensor(values, dtype=torch.float64)
    signalled = shared[1].clone()
    dist.all_reduce(signalled, dist.ReduceOp.MAX)
    dist.broadcast(shared, 0)
    return [float(shared[0]), float(signalled), float(shared[2])]


def helper_thread(name: str) -> ThreadPoolExecutor:
    """One thread for small tensor operations beside the main thread's, each of which runs in that thread alone.

    OpenMP gives every thread that computes a team of workers of its own. Once there are more of them than cores, none waits
    awake for its next piece of work any more, and two threads share a training step a third slower.
    """
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
    if "parallel backend: OpenMP" not in torch.__config__.parallel_info():
        return pool  # which has one team for all threads, whose size this would be

    def alone() -> None:
        torch.get_num_threads()  # sets the thread up; else its first operation would, and undo this
        torch.set_num_threads(1)

    threads = torch.get_num_threads()
    pool.submit(alone).result()
    torch.set_num_threads(threads)  # the number of other threads yet to come was changed too
    return pool

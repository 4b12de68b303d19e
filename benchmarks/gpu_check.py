"""What a GPU does here: the CUDA tests, and a training step of the large presets by its parts.

    python benchmarks/gpu_check.py [--out gpu_check] [--quick] [--seconds 600] [--parts tests,reference,best16mb]

Prints each part as it ends and writes OUT/gpu_check.md, which can be pasted as it stands, and OUT/gpu_check.json with
everything, after each figure: a check that is cut short keeps what it had. From a checkout that is not installed:
`PYTHONPATH=src python benchmarks/gpu_check.py`.

All in one process. A part that fails leaves its traceback in the report and the others alone; one that would outlast the
`--seconds` of everything is stopped. What takes no compiler comes first. A step is that of one GPU of eight: an eighth of
the preset's batch, all of its windows whole and over all mask rates. Model FLOPs are `throughput.model_flops`. The estimate
for 8 GPUs is the measured step with what 8 GPUs do besides: gradients summed over NVLink at 450 GB/s each way, half of it
behind the backward pass (`h100_estimate`).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from h100_estimate import FLOPS, estimate
from throughput import RandomWindows, model_flops

from mezzotint.config import PRESETS, TrainConfig, preset
from mezzotint.network.model import Denoiser, count_parameters
from mezzotint.training.corrupt import corrupt_batch, stage_at
from mezzotint.training.step import Trainer
from mezzotint.training.system import peak_memory_bytes

ROOT = Path(__file__).resolve().parent.parent
GPUS = 8
ENTRY_MS = 103.5
"""A step of the challenge entry, 786,432 tokens on 8 H100s with FlashAttention 3."""
LATE = 0.9
"""The part of a run whose steps are timed: all windows whole, all mask rates."""


class OutOfTime(BaseException):
    """A part's time is over. No Exception, so that no part takes it for a failure of its own."""


class Report:
    """A part's figures, on the disk after every one of them. results: those of all parts, by name."""

    def __init__(self, results: dict[str, dict[str, Any]], part: str, out: Path) -> None:
        self.results, self.out = results, out
        self.values: dict[str, Any] = results.setdefault(part, {})

    def add(self, **values: Any) -> None:
        self.values.update(values)
        (self.out / "gpu_check.json").write_text(json.dumps(self.results, indent=1))
        (self.out / "gpu_check.md").write_text(markdown(self.results))
        for name, value in values.items():
            print(f"  {name}: {format(value, '.4g') if isinstance(value, float) else str(value)[:300]}", flush=True)

    @contextlib.contextmanager
    def guarded(self, name: str) -> Iterator[None]:
        """Let what goes wrong inside be said in the report, and the part go on."""
        try:
            yield
        except Exception:
            self.add(**{f"{name}_failed": traceback.format_exc()})


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raises OutOfTime when that many seconds have passed in here."""

    def stop(number: int, frame: Any) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(0.01, seconds))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free(device: torch.device) -> None:
    """Give back the memory of what is no longer held."""
    gc.collect()
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()


def milliseconds(device: torch.device, work: Callable[[], Any], times: int) -> float:
    """The median time of `work`, all of which is done when its clock stops."""
    found = []
    for _ in range(times):
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        found.append(1000 * (time.perf_counter() - started))
    return statistics.median(found)


def machine(report: Report, device: torch.device) -> None:
    """What there is, and the two rates that bound everything else."""
    report.add(
        torch=torch.__version__, python=platform.python_version(), cores=os.cpu_count(), device=str(device),
        commit=subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip(),
    )  # fmt: skip
    size, elements = (8192, 1 << 30) if device.type == "cuda" else (512, 1 << 20)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        report.add(
            name=properties.name, memory_gib=properties.total_memory / 2**30, cuda=torch.version.cuda,
            multiprocessors=properties.multi_processor_count,
        )  # fmt: skip
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    milliseconds(device, lambda: a @ b, 3)
    report.add(product_flops=2 * size**3 / milliseconds(device, lambda: a @ b, 10) * 1000)
    x, y = (torch.empty(elements, dtype=torch.bfloat16, device=device) for _ in range(2))
    x.normal_()
    milliseconds(device, lambda: y.copy_(x), 3)
    report.add(bytes_per_second=2 * 2 * elements / milliseconds(device, lambda: y.copy_(x), 10) * 1000)


def settings_of(name: str, small: bool) -> tuple[Any, TrainConfig]:
    """Model and training settings of a GPU's share of a step.

    name: a preset, perhaps with `+block(K)` or `+eager` (not compiled) behind it.
    """
    base, *rest = name.split("+")
    chosen = preset(base)
    model, share = chosen.model, max(1, chosen.train.batch // GPUS)
    size, compiled = chosen.train.block_size, not small
    for word in rest:
        if word == "eager":
            compiled = False
        else:
            size = int(word.removeprefix("block(").removesuffix(")"))
    if small:
        model = dataclasses.replace(
            model, sequence_length=64, vocab_size=300, layers=2, width=64, heads=4, kv_heads=2,
            value_embedding_layers=min(2, model.value_embedding_layers),
        )  # fmt: skip
        share = 2
    config = dataclasses.replace(
        chosen.train, compile=compiled, steps=1000, batch=share, short_share=0.0, narrow_share=0.0, causal_start=0.0,
        sampled_share=0.0, block_size=size,
    )  # fmt: skip
    return model, config


def network_of(model: Any, device: torch.device) -> Denoiser:
    """A network of random weights, made on the device: orthogonal ones take a slow processor seconds."""
    with torch.device("meta"):
        network = Denoiser(model)
    network.to_empty(device=device)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in network.parameters():
            _ = p.normal_(0, 0.05) if p.dim() > 1 else p.fill_(1.0)
    return network


def trainer_that_fits(
    report: Report, model: Any, config: TrainConfig, device: torch.device, seconds: float
) -> tuple[Trainer, TrainConfig]:
    """A trainer, warmed up, with the largest micro-batch that fits the memory."""
    micro, until = config.batch if config.compile else -(-config.batch // 2), time.perf_counter() + seconds
    while True:
        trying = dataclasses.replace(config, micro_batch=micro)
        network = network_of(model, device)
        trainer = Trainer(network, trying, RandomWindows(model, trying.batch), device)  # type: ignore[arg-type]
        try:
            started = time.perf_counter()
            reason = trainer.warm_up()
            for _ in range(3):
                trainer.run_step(LATE)
            synchronize(device)
        except torch.OutOfMemoryError:
            if micro == 1 or time.perf_counter() > until:
                raise
        else:
            report.add(
                micro_batch=micro, compiled=trainer.compiled, not_compiled_because=reason,
                setup_seconds=time.perf_counter() - started,
            )  # fmt: skip
            return trainer, trying
        trainer.batches.close()
        del trainer, network
        free(device)
        micro = -(-micro // 2)


def step_of(report: Report, name: str, device: torch.device, quick: bool, small: bool, seconds: float) -> None:
    """A training step of a preset: whole, by its parts, by its kernels, and where it waits for the device."""
    model, config = settings_of(name, small)
    report.add(batch=config.batch, length=model.sequence_length, tokens=config.batch * model.sequence_length)
    trainer, config = trainer_that_fits(report, model, config, device, seconds / 2)
    network, times = trainer.network, 3 if small else 5 if quick else 20
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    whole = milliseconds(device, lambda: trainer.run_step(LATE), times)
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory_bytes()
    flops = model_flops(model, config, network)
    report.add(
        parameters=count_parameters(network), step_ms=whole, tokens_per_second=report.values["tokens"] / whole * 1000,
        model_flops_per_second=flops / whole * 1000, of_989_tflops=flops / whole * 1000 / FLOPS,
        peak_memory_bytes=memory,
    )  # fmt: skip

    def behind() -> None:
        """Steps one behind another, as a run makes them: what the host does runs beside the device."""
        for _ in range(times):
            trainer.run_step(LATE)

    report.add(step_in_a_row_ms=milliseconds(device, behind, 1) / times)
    with report.guarded("parts"):
        parts_of_step(report, trainer, config, device, times)
    if device.type == "cuda":
        with report.guarded("waits"):
            report.add(**waits(trainer))
        with report.guarded("kernels"):
            report.add(**kernels(trainer, 2 if quick else 3))
    base = name.partition("+")[0]
    with report.guarded("estimate"):
        parts = estimate(base, GPUS, 0.6)
        best = min(whole, report.values["step_in_a_row_ms"])
        report.add(
            estimate_8_gpus_ms=best + 1000 * parts["gradients"],
            paper_estimate_ms={part: 1000 * s for part, s in parts.items()},
        )
    trainer.batches.close()


def parts_of_step(report: Report, trainer: Trainer, config: TrainConfig, device: torch.device, times: int) -> None:
    windows = trainer.loader.batch(trainer.step)
    rows, stage = torch.from_numpy(windows), stage_at(config, LATE)
    whole_batch = rows.repeat(GPUS, 1)
    mask_id = trainer.network.config.mask_id
    report.add(
        windows_ms=milliseconds(device, lambda: trainer.batches.batch(trainer.step, stage), times),
        masks_ms=milliseconds(device, lambda: corrupt_batch(config, 0, rows, mask_id), times),
        masks_of_8_gpus_ms=milliseconds(device, lambda: corrupt_batch(config, 0, whole_batch, mask_id), times),
    )
    found: dict[str, list[float]] = {"gradients": [], "clipping": [], "optimizer": [], "average": []}
    parameters = list(trainer.network.parameters())
    for n in range(times):
        work: dict[str, Callable[[], Any]] = {
            "gradients": lambda n=n: trainer.gradients(windows, n, LATE),
            "clipping": lambda: torch.nn.utils.clip_grad_norm_(parameters, 1.0),
            "optimizer": trainer.optimizers.step,
            "average": lambda n=n: trainer.average.update(n + 1),
        }
        for part, action in work.items():
            found[part].append(milliseconds(device, action, 1))
    report.add(**{f"{part}_ms": statistics.median(values) for part, values in found.items()})


def waits(trainer: Trainer) -> dict[str, Any]:
    """Where one step's Python code waits for the device: `file:line` and how often."""
    places: dict[str, int] = {}
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.run_step(LATE)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for warning in caught:
        if "synchroniz" in str(warning.message):
            place = f"{Path(warning.filename).name}:{warning.lineno}"
            places[place] = places.get(place, 0) + 1
    return {"waits": sum(places.values()), "waits_at": places}


def kernels(trainer: Trainer, steps: int) -> dict[str, Any]:
    """Milliseconds of a step by kernel, the longest first, and how long the device was busy."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
        for _ in range(steps):
            trainer.run_step(LATE)
        torch.cuda.synchronize()
    rows, launches = [], 0
    for event in seen.key_averages():
        if str(event.device_type).endswith("CUDA"):
            rows.append((event.self_device_time_total / 1000 / steps, event.count / steps, event.key[:110]))
        elif event.key.startswith(("cudaLaunchKernel", "cuLaunchKernel")):
            launches += event.count
    rows.sort(reverse=True)
    return {
        "busy_ms": sum(row[0] for row in rows), "launches": launches / steps,
        "kernels": [{"ms": ms, "times": n, "kernel": name} for ms, n, name in rows[:25]],
    }  # fmt: skip


def both_ways(device: torch.device, work: Callable[[], torch.Tensor], leaves: list[torch.Tensor], times: int) -> float:
    """Milliseconds of a forward and backward pass."""

    def once() -> None:
        work().float().square().mean().backward()
        for leaf in leaves:
            leaf.grad = None

    milliseconds(device, once, 3)
    return milliseconds(device, once, times)


def attention_kernels(report: Report, device: torch.device, small: bool) -> None:
    """Attention forward and backward by every kernel that PyTorch has, at the shapes of `reference` and `best16mb`."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    times = 3 if small else 10
    shapes = {"reference": (24, 8, 4, 2048), "best16mb": (32, 10, 10, 1025)}
    for name, (batch, heads, kv_heads, length) in shapes.items():
        if small:
            batch, length = 1, 64
        q, k, v = (
            torch.randn(batch, h, length, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
            for h in (heads, kv_heads, kv_heads)
        )
        kernels: dict[str, Any] = {
            "own choice": None, "flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
        }  # fmt: skip
        for causal in (False, True):
            for kernel, backend in kernels.items():

                def work(causal: bool = causal, q: Any = q, k: Any = k, v: Any = v) -> torch.Tensor:
                    return torch.nn.functional.scaled_dot_product_attention(
                        q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
                    )

                label = f"{name}, {'causal' if causal else 'full'}, {kernel}"
                with report.guarded(label), sdpa_kernel(backend) if backend else contextlib.nullcontext():
                    report.add(**{label: both_ways(device, work, [q, k, v], times)})


def flexible_attention(report: Report, device: torch.device, small: bool) -> None:
    """Attention over doubled windows in blocks of 16: a dense mask, and FlexAttention compiled."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    batch, heads, length, size = (1, 2, 64, 17) if small else (16, 10, 1024, 17)
    noisy = length + -(-length // 16)
    total = noisy + length
    q, k, v = (
        torch.randn(batch, heads, total, 64, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in "qkv"
    )

    def sees(b: Any, h: Any, i: Any, j: Any) -> Any:
        own = (i < noisy) & (j < noisy) & (i // size == j // size)
        earlier = (i < noisy) & (j >= noisy) & (j - noisy < i // size * 16)
        return own | earlier | ((i >= noisy) & (j >= noisy) & (i >= j))

    place = torch.arange(total, device=device)
    mask = torch.zeros(total, total, device=device, dtype=torch.bfloat16)
    mask.masked_fill_(~sees(0, 0, place[:, None], place), -torch.inf)
    attention = torch.nn.functional.scaled_dot_product_attention
    with report.guarded("dense mask"):
        report.add(dense_mask_ms=both_ways(device, lambda: attention(q, k, v, attn_mask=mask), [q, k, v], 5))
    with report.guarded("flexible"):
        blocks = create_block_mask(sees, None, None, total, total, device=device)
        compiled = torch.compile(flex_attention, dynamic=False)
        out = compiled(q, k, v, block_mask=blocks)
        report.add(
            flexible_error=float((out - attention(q, k, v, attn_mask=mask)).abs().max()),
            flexible_ms=both_ways(device, lambda: compiled(q, k, v, block_mask=blocks), [q, k, v], 5),
        )


class _Products32(torch.autograd.Function):
    """a @ b.T of bfloat16 matrices, summed and given in float32."""

    @staticmethod
    def forward(ctx: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(a, b)
        return torch.mm(a, b.T, out_dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = ctx.saved_tensors
        g = grads[0].bfloat16()
        return g @ b, g.T @ a


def output_layers(report: Report, device: torch.device, small: bool) -> None:
    """Output layer and cross-entropy by products given in bfloat16 and in float32, compiled."""
    for name, (n, width, vocab) in {"reference": (49152, 512, 1024), "best16mb": (49152, 640, 8192)}.items():
        n = 64 if small else n
        hidden = torch.randn(n, width, device=device, dtype=torch.bfloat16, requires_grad=True)
        table = torch.randn(vocab, width, device=device, dtype=torch.bfloat16, requires_grad=True)
        targets = torch.randint(0, vocab, (n,), device=device)
        products: dict[str, Callable[..., torch.Tensor]] = {
            "bfloat16": lambda a, b: (a @ b.T).float(), "float32": _Products32.apply,
        }  # fmt: skip
        for kind, product in products.items():

            def layer(a: Any, b: Any, t: Any, product: Any = product) -> torch.Tensor:
                return torch.nn.functional.cross_entropy(15 * torch.tanh(product(a, b) / 15), t, reduction="none")

            for way, function in (("eager", layer), ("compiled", layer if small else torch.compile(layer))):
                label = f"output layer of {name}, {kind}, {way}"
                with report.guarded(label):
                    work = lambda f=function, a=hidden, b=table, t=targets: f(a, b, t)  # noqa: E731
                    report.add(**{label: both_ways(device, work, [hidden, table], 5)})


def choices(report: Report, device: torch.device, small: bool) -> None:
    """Ways to make the same thing, in milliseconds forward and backward, for whoever changes the step."""
    for work in (attention_kernels, output_layers) + (() if small else (flexible_attention,)):
        with report.guarded(work.__name__):
            work(report, device, small)


def tests(report: Report, out: Path, compiled: bool) -> None:
    """The CUDA tests, by pytest in this process."""
    import pytest

    sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests" / "helpers")]
    words = ["-o", "addopts=", "-rfE", "--tb=short", "-p", "no:cacheprovider", "--durations=5", "-q"]
    words += ["-k", "compiled" if compiled else "not compiled", str(ROOT / "tests" / "test_cuda.py")]
    path = out / ("tests_compiled.txt" if compiled else "tests.txt")
    status: int | str = "ran past its time"
    try:
        with path.open("w", buffering=1) as file, contextlib.redirect_stdout(file):
            status = int(pytest.main(words))
    finally:
        text = path.read_text()
        report.add(status=status, passed=status == 0, last=text.strip().splitlines()[-1:], output=text[-20_000:])


def run_part(options: argparse.Namespace, part: str, report: Report, seconds: float) -> None:
    """A part within its time, whatever becomes of it."""
    device, started = torch.device(options.device), time.perf_counter()
    print(f"{part}:", flush=True)
    try:
        with at_most(seconds):
            if part == "machine":
                machine(report, device)
            elif part.startswith("tests"):
                tests(report, options.out, part == "tests+compiled")
            elif part == "choices":
                choices(report, device, options.small)
            else:
                step_of(report, part, device, options.quick, options.small, seconds)
    except OutOfTime:
        report.add(failed=f"stopped after {time.perf_counter() - started:.0f} s: no time left")
    except Exception:
        report.add(failed=traceback.format_exc())
    report.add(wall_seconds=time.perf_counter() - started)
    free(device)


def markdown(results: dict[str, dict[str, Any]]) -> str:
    """The report as a page of tables."""
    there = results.get("machine", {})
    lines = [
        "# A GPU's training step", "",
        f"{there.get('name', there.get('device'))}, {there.get('memory_gib', 0):.0f} GiB; PyTorch {there.get('torch')}, CUDA "
        f"{there.get('cuda')}, Python {there.get('python')}, {there.get('cores')} cores; commit {there.get('commit')}. Measured: "
        f"{there.get('product_flops', 0) / 1e12:.0f} TFLOP/s of bfloat16 products, {there.get('bytes_per_second', 0) / 1e12:.2f} TB/s.",
        "",
    ]  # fmt: skip
    for name in ("tests", "tests+compiled"):
        if name in results:
            lines += [f"CUDA {name}: {' '.join(results[name].get('last', ['not run']))}", ""]
    steps = {name: r for name, r in results.items() if "step_ms" in r}
    if steps:
        lines += ["| | " + " | ".join(steps) + " |", "| --- |" + " --- |" * len(steps)]
        rows: list[tuple[str, str, float, str]] = [
            ("windows a step on this GPU", "batch", 1, ",.0f"), ("of them at once", "micro_batch", 1, ",.0f"),
            ("tokens", "tokens", 1, ",.0f"), ("parameters", "parameters", 1, ",.0f"),
            ("step, ms", "step_ms", 1, ".1f"), ("steps in a row, ms each", "step_in_a_row_ms", 1, ".1f"),
            ("tokens/s", "tokens_per_second", 1, ",.0f"), ("model TFLOP/s", "model_flops_per_second", 1e-12, ".0f"),
            ("of 989 TFLOP/s, %", "of_989_tflops", 100, ".1f"), ("peak memory, GiB", "peak_memory_bytes", 2**-30, ".1f"),
            ("windows and masks, made ahead, waited for, ms", "windows_ms", 1, ".2f"), ("masks drawn, ms", "masks_ms", 1, ".2f"),
            ("masks of 8 GPUs' windows, ms", "masks_of_8_gpus_ms", 1, ".2f"),
            ("masks, forward and backward, ms", "gradients_ms", 1, ".1f"), ("clipping, ms", "clipping_ms", 1, ".2f"),
            ("optimizer, ms", "optimizer_ms", 1, ".2f"), ("average, ms", "average_ms", 1, ".2f"),
            ("device busy, ms a step", "busy_ms", 1, ".1f"), ("kernels launched", "launches", 1, ",.0f"),
            ("waits for the device in a step", "waits", 1, ".0f"), ("setting up, s", "setup_seconds", 1, ".0f"),
            ("8 GPUs, estimated from this, ms", "estimate_8_gpus_ms", 1, ".1f"),
        ]  # fmt: skip
        for label, key, scale, form in rows:
            cells = [format(r[key] * scale, form) if r.get(key) is not None else "" for r in steps.values()]
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
        lines += [
            "",
            f"The challenge entry took {ENTRY_MS} ms a step of 786,432 tokens on 8 GPUs (`reference` here).",
            "",
        ]
    for name, found in steps.items():
        lines += [f"Waits in a step of {name}: {found.get('waits_at')}", ""]
        lines += [f"| {name}: kernel | ms | times |", "| --- | --- | --- |"]
        lines += [f"| `{k['kernel']}` | {k['ms']:.2f} | {k['times']:.0f} |" for k in found.get("kernels", [])[:15]]
        lines.append("")
    if "choices" in results:
        lines += ["| one thing made in several ways | ms |", "| --- | --- |"]
        lines += [f"| {k} | {v:.3f} |" for k, v in results["choices"].items() if isinstance(v, float)] + [""]
    for name, found in results.items():
        for key, text in found.items():
            if key.endswith("failed"):
                shown = str(text) if len(str(text)) < 3000 else f"{str(text)[:1800]}\n...\n{str(text)[-1200:]}"
                lines += [f"**{name}: {key}**", "", "```", shown, "```", ""]
        if name.startswith("tests") and not found.get("passed"):
            lines += ["```", str(found.get("output", ""))[-8000:], "```", ""]
    lines.append("Seconds: " + ", ".join(f"{name} {r.get('wall_seconds', 0):.0f}" for name, r in results.items()))
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu_check"), help="folder for the report [gpu_check]")
    parser.add_argument("--quick", action="store_true", help="fewer repeats, and no row in blocks")
    parser.add_argument(
        "--seconds", type=float, default=600.0, help="for everything; what comes too late is left out [600]"
    )
    parser.add_argument(
        "--parts", help="machine, tests, tests+compiled, choices, or presets with +eager or +block(K), by commas [all]"
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="small networks, to try the script itself")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("this PyTorch sees no CUDA device")
    until = time.perf_counter() + options.seconds
    parts = ["machine", "tests", "reference+eager", "best16mb+eager", "best16mb", "reference", "choices"]
    parts += ["tests+compiled"] + ["best16mb+block(16)"] * (not options.quick)
    parts = options.parts.split(",") if options.parts else parts
    known = {"machine", "tests", "choices", *PRESETS}
    if unknown := [p for p in parts if p.partition("+")[0] not in known]:
        parser.error(f"unknown part {unknown[0]}: one of {', '.join(sorted(known))}")
    results: dict[str, dict[str, Any]] = {}
    for part in parts:
        report = Report(results, part, options.out)
        left = until - time.perf_counter()
        if left > 2:
            run_part(options, part, report, left)
        else:
            report.add(failed="left out: no time left")
    print((options.out / "gpu_check.md").read_text())


if __name__ == "__main__":
    main()

"""Parameter groups, Muon + AdamW, the schedule, and the weights' moving average.

Knows nothing of data, losses or files; told only how far the run has come, and of the processes that share the work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mezzotint.config import TrainConfig
from mezzotint.distributed import bfloat16_pays, rank_and_size


def split_parameters(network: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """Parameters by role, each `{name: parameter}`: `matrix` (weights of linear layers), `embedding`, `scalar`."""
    roles: dict[str, dict[str, nn.Parameter]] = {"matrix": {}, "embedding": {}, "scalar": {}}
    owners = dict(network.named_modules())
    for name, parameter in network.named_parameters():
        owner = owners[name.rpartition(".")[0]]
        if isinstance(owner, nn.Linear):
            roles["matrix"][name] = parameter
        elif isinstance(owner, nn.Embedding):
            roles["embedding"][name] = parameter
        else:
            roles["scalar"][name] = parameter
    return roles


def newton_schulz(x: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Near-orthogonal matrices in the directions of `x`, [n, rows, columns] of any type: bfloat16 of the same shape.

    The quintic iteration of Jordan et al. 2024, which brings all singular values near 1; in bfloat16, and in float32 where
    products are faster so.
    """
    if not bfloat16_pays(x.device):
        return _newton_schulz_of_gram(x.float(), coefficients, steps, eps).bfloat16()
    x = x.bfloat16()
    return _iterated(x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps), coefficients, steps)


def _iterated(x: Tensor, coefficients: tuple[float, float, float], steps: int) -> Tensor:
    """The iterations of `newton_schulz` on matrices of norm 1 at most, in their type."""
    a, b, c = coefficients
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _newton_schulz_of_gram(x: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """`newton_schulz` in the type of `x`, on the smaller side of wide matrices.

    All iterates are polynomials of the first Gram matrix times x: with q = a + b gram + c gram^2, x becomes q x and the Gram
    matrix q gram q. So products of [rows, rows] alone, and one with x at the end. Four of these a step against two and one
    [rows, columns] pair: fewer operations from columns = 1.5 rows on. Not for bfloat16, whose rounding of the Gram matrix
    adds up.
    """
    a, b, c = coefficients
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=eps)
    if 2 * x.shape[2] < 3 * x.shape[1]:
        return _iterated(x, coefficients, steps)
    gram, made = x @ x.mT, None
    for step in range(steps):
        q = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        q.diagonal(dim1=1, dim2=2).add_(a)
        made = q if made is None else q @ made
        if step < steps - 1:
            gram = q @ gram @ q
    return x if made is None else made @ x


class BatchedMuon(torch.optim.Muon):
    """torch.optim.Muon (Jordan et al. 2024) whose Newton-Schulz iterations take all matrices of a shape at once.

    The same update up to bfloat16 rounding; on small matrices it takes about two thirds of the time. Processes of a group
    share the matrices of a shape and send one another what they made.

    neuron_decay: above 0, updates are normalised per neuron: the part of each output neuron is divided by the root of
    its mean square, averaged over steps with this decay, and the whole brought back to its norm (NorMuon, Li et al.
    2025, arXiv 2510.05491).
    """

    def __init__(self, *args: Any, neuron_decay: float = 0.0, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.neuron_decay = neuron_decay

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Apply the gradients. `closure` is not supported."""
        for group in self.param_groups:
            batches: dict[tuple[int, ...], list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    batches.setdefault(tuple(sorted(parameter.shape)), []).append(parameter)
            # What other processes made of one shape arrives while the next is made.
            coming = [(batch, self._orthogonal(self._directions(batch, group), group)) for batch in batches.values()]
            for batch, arrived in coming:
                self._apply(batch, arrived(), group)

    def _directions(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> list[Tensor]:
        """Gradients of matrices of one shape with their momentum, none of them taller than wide."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        buffers = []
        for p, gradient in zip(parameters, gradients, strict=True):
            state = self.state[p]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(gradient)
            buffers.append(state["momentum_buffer"])
        momentum = group["momentum"]
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        updates = torch._foreach_lerp(gradients, buffers, momentum) if group["nesterov"] else buffers
        return [u.T if u.shape[0] > u.shape[1] else u for u in updates]

    def _orthogonal(self, directions: list[Tensor], group: dict[str, Any]) -> Callable[[], Tensor]:
        """Newton-Schulz on n matrices, each by one process of the group; a function that waits for [n, rows, columns].

        Every process gets what one of them made, so that weights stay the same everywhere to the last bit.
        """
        settings = (group["ns_coefficients"], group["ns_steps"], group["eps"])
        rank, world = rank_and_size()
        if world == 1:
            made = newton_schulz(torch.stack(directions), *settings)
            return lambda: made
        share = -(-len(directions) // world)
        own = directions[rank * share : (rank + 1) * share]
        own += [torch.zeros_like(directions[0])] * (share - len(own))
        made = newton_schulz(torch.stack(own), *settings)
        every = made.new_empty(world * share, *made.shape[1:])
        # As bytes, which every backend carries.
        work = dist.all_gather_into_tensor(every.view(torch.uint8), made.contiguous().view(torch.uint8), async_op=True)

        def arrived() -> Tensor:
            if work is not None:
                work.wait()
            return every[: len(directions)]

        return arrived

    def _apply(self, parameters: list[nn.Parameter], updates: Tensor, group: dict[str, Any]) -> None:
        """Move matrices of one shape, some of them perhaps tall. updates: [n, rows, columns], none taller than wide."""
        for tall in (False, True):
            here = [i for i, p in enumerate(parameters) if (p.shape[0] > p.shape[1]) == tall]
            if not here:
                continue
            chosen: list[Tensor] = [parameters[i] for i in here]
            moves = (updates if len(here) == len(parameters) else torch.stack([updates[i] for i in here])).float()
            moves = moves.mT if tall else moves
            rate = group["lr"] * max(1.0, moves.shape[1] / moves.shape[2]) ** 0.5
            torch._foreach_mul_(chosen, 1 - group["lr"] * group["weight_decay"])
            if not self.neuron_decay:
                torch._foreach_add_(chosen, list(moves.unbind()), alpha=-rate)
                continue
            for p, move, scale in zip(chosen, moves, self._neuron_scales(chosen, moves), strict=True):
                p.addcmul_(move, scale, value=-rate)

    def _neuron_scales(self, parameters: list[Tensor], updates: Tensor) -> Tensor:
        """The factor of each neuron, a row of one of the `updates` [n, rows, columns]: [n, rows, 1]."""
        power = torch.linalg.vector_norm(updates, dim=2, keepdim=True).square() / updates.shape[2]
        for p in parameters:
            if "neuron_power" not in self.state[p]:
                self.state[p]["neuron_power"] = torch.zeros_like(power[0])
        kept_powers = [self.state[p]["neuron_power"] for p in parameters]
        # No correction for the start at zero: it would be one factor for all neurons, which the norm takes out again.
        torch._foreach_lerp_(kept_powers, list(power.unbind()), 1 - self.neuron_decay)
        factors = 1 / (torch.stack(kept_powers).sqrt() + 1e-10)
        total = power.sum(dim=1, keepdim=True)
        kept = total / (power * factors.square()).sum(dim=1, keepdim=True).clamp(min=1e-14)  # of the squared norm
        return factors * kept.sqrt()


class Optimizers:
    """Muon (Jordan et al. 2024) on matrices, AdamW on the rest, stepped together."""

    def __init__(self, network: nn.Module, config: TrainConfig) -> None:
        self.config = config
        self.parameters = split_parameters(network)
        fused = all(p.device.type in ("cpu", "cuda") for p in network.parameters())
        self.muon = BatchedMuon(
            self.parameters["matrix"].values(),
            lr=config.matrix_lr,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            adjust_lr_fn="original",
            neuron_decay=config.neuron_decay,
        )
        self.adamw = torch.optim.AdamW(
            [
                {"params": list(self.parameters["embedding"].values()), "weight_decay": config.weight_decay},
                {"params": list(self.parameters["scalar"].values()), "weight_decay": 0.0},
            ],
            betas=(config.beta1, config.beta2),
            eps=1e-10,
            fused=fused,
        )

    def schedule(self, progress: float) -> float:
        """Set learning rates and momentum for a run that is `progress` (0..1) done; returns the rates' scale."""
        c = self.config
        scale = learning_rate_scale(progress, c.warmup, c.warmdown, c.lr_floor)
        warm = min(1.0, progress / c.momentum_warmup) if c.momentum_warmup else 1.0
        for group in self.muon.param_groups:
            group["lr"] = c.matrix_lr * scale
            group["momentum"] = c.momentum_start + (c.momentum - c.momentum_start) * warm
        for group, rate in zip(self.adamw.param_groups, (c.embedding_lr, c.scalar_lr), strict=True):
            group["lr"] = rate * scale
        return scale

    def step(self) -> None:
        """Apply the gradients and clear them."""
        for optimizer in (self.muon, self.adamw):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state_tensors(self) -> dict[str, Tensor]:
        """Every state tensor by `parameter name/state name`, so that it can be stored without pickle."""
        tensors = {}
        for role in self.parameters.values():
            for name, parameter in role.items():
                for optimizer in (self.muon, self.adamw):
                    for key, value in optimizer.state.get(parameter, {}).items():
                        tensors[f"{name}/{key}"] = torch.as_tensor(value).detach()
        return tensors

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `state_tensors` gave. Raises KeyError on a tensor of an unknown parameter."""
        roles = {name: role for role, named in self.parameters.items() for name in named}
        for key, value in tensors.items():
            name, _, state = key.rpartition("/")
            optimizer = self.muon if roles[name] == "matrix" else self.adamw
            parameter = self.parameters[roles[name]][name]
            device = parameter.device if value.ndim or optimizer.defaults.get("fused") else value.device
            optimizer.state[parameter][state] = value.to(device).clone()


def learning_rate_scale(progress: float, warmup: float, warmdown: float, floor: float = 0.0) -> float:
    """Trapezoid: linear rise over the first `warmup` share of the run, linear fall to `floor` over the last `warmdown`.

    Never 0 before the end, so that the first step of a run counted by steps is not lost.
    """
    rise = min(1.0, (progress + 1e-3) / warmup) if warmup else 1.0
    fall = min(1.0, floor + (1.0 - floor) * (1.0 - progress) / warmdown) if warmdown else 1.0
    return max(0.0, min(rise, fall))


class MovingAverage:
    """Exponential moving average of parameters in float32, whose horizon grows with the run.

    At step n the decay is 1 - 1 / (1 + horizon * n): the average spans the last `horizon` share of the steps taken,
    whatever the run's length, and starts as a plain copy. Always float32: a bfloat16 shadow stops moving once a step's
    change is below its resolution.
    """

    def __init__(self, network: nn.Module, horizon: float) -> None:
        self.horizon = horizon
        self.named = dict(network.named_parameters())
        self.average = {name: p.detach().float().clone() for name, p in self.named.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Fold in the parameters after optimizer step `step` (counted from 1)."""
        weight = 1.0 / (1.0 + self.horizon * step)
        torch._foreach_lerp_(list(self.average.values()), [p.detach().float() for p in self.named.values()], weight)

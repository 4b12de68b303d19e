"""Parameter groups, Muon + AdamW, the schedule, and the weights' moving average.

Knows nothing of data, losses or files; told only how far the run has come.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mezzotint.config import TrainConfig


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


class BatchedMuon(torch.optim.Muon):
    """torch.optim.Muon (Jordan et al. 2024) whose Newton-Schulz iterations take all matrices of a shape at once.

    The same update up to bfloat16 rounding; on small matrices it takes about two thirds of the time.

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
            for parameters in batches.values():
                self._update(parameters, group)

    def _update(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
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
        tall = [u.shape[0] > u.shape[1] for u in updates]
        x = torch.stack([u.T if t else u for u, t in zip(updates, tall, strict=True)]).bfloat16()
        x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=group["eps"])
        a, b, c = group["ns_coefficients"]
        for _ in range(group["ns_steps"]):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        for p, orthogonal, transposed in zip(parameters, x, tall, strict=True):
            update = (orthogonal.T if transposed else orthogonal).to(p.dtype)
            rate = group["lr"] * max(1.0, p.shape[0] / p.shape[1]) ** 0.5
            p.mul_(1 - group["lr"] * group["weight_decay"])
            if self.neuron_decay:
                p.addcmul_(update, self._neuron_scales(p, update), value=-rate)
            else:
                p.add_(update, alpha=-rate)

    def _neuron_scales(self, parameter: nn.Parameter, update: Tensor) -> Tensor:
        """The factor of each neuron, a row of `update`: [rows, 1]."""
        state = self.state[parameter]
        power = torch.linalg.vector_norm(update, dim=1, keepdim=True).square() / update.shape[1]
        if "neuron_power" not in state:
            state["neuron_power"] = torch.zeros_like(power)
        # No correction for the start at zero: it would be one factor for all neurons, which the norm takes out again.
        state["neuron_power"].lerp_(power, 1 - self.neuron_decay)
        factors = 1 / (state["neuron_power"].sqrt() + 1e-10)
        kept = power.sum() / (power * factors.square()).sum().clamp(min=1e-14)  # of the update's squared norm
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

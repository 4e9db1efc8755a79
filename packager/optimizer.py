"""What the draft and the nano are trained with: Muon for matrices, AdamW for the rest, or AdamW for all.

Muon (arXiv 2502.16982; torch.optim.Muon) moves a matrix by an orthogonalised momentum. In the few hundred
steps that small heads get, it learns what AdamW does not: see the figures at `DraftSpec.optimizer` and in
`packager.nano.train`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Optimizers:
    """One or two optimizers that take a step together."""

    def __init__(
        self,
        matrices: Sequence[nn.Parameter],
        rest: Sequence[nn.Parameter],
        *,
        matrix_decay: float,
        betas: tuple[float, float],
        decay: float,
    ) -> None:
        """`matrices` are two-dimensional and go to Muon, `rest` to AdamW with `betas`; each with its weight
        decay. Muon's step is scaled to the size of AdamW's (`match_rms_adamw`), so one rate serves both."""
        found: list[torch.optim.Optimizer] = []
        if matrices:
            found.append(
                torch.optim.Muon(matrices, lr=0.0, weight_decay=matrix_decay, adjust_lr_fn="match_rms_adamw")
            )
        if rest:
            found.append(torch.optim.AdamW(rest, lr=0.0, betas=betas, weight_decay=decay, fused=True))
        self._parts = tuple(found)

    def step(self, rate: float) -> None:
        """Update with this learning rate."""
        for part in self._parts:
            for group in part.param_groups:
                group["lr"] = rate
            part.step()

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for part in self._parts:
            part.zero_grad(set_to_none=True)

    def moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """What is remembered of a parameter, by the optimizer's names, as large as the parameter itself."""
        for part in self._parts:
            if parameter in part.state:
                return {name: value for name, value in part.state[parameter].items() if name != "step"}
        return {}

    def moment_names(self, parameter: nn.Parameter) -> tuple[str, ...]:
        """Names of `moments` after a step."""
        return ("momentum_buffer",) if isinstance(self._owner(parameter), torch.optim.Muon) else _ADAM

    def restore(self, parameter: nn.Parameter, moments: Mapping[str, Tensor], steps: int) -> None:
        """Take up the moments of a parameter after so many steps."""
        owner = self._owner(parameter)
        owner.state[parameter] = dict(moments)
        if not isinstance(owner, torch.optim.Muon):
            owner.state[parameter]["step"] = torch.tensor(float(steps), device=parameter.device)

    def _owner(self, parameter: nn.Parameter) -> torch.optim.Optimizer:
        for part in self._parts:
            if any(parameter is one for group in part.param_groups for one in group["params"]):
                return part
        raise KeyError("a parameter that is not trained")

    def state_dict(self) -> list[dict[str, Any]]:
        """The state of each, in order."""
        return [part.state_dict() for part in self._parts]

    def load_state_dict(self, states: Sequence[dict[str, Any]]) -> None:
        """Take up a saved state."""
        for part, state in zip(self._parts, states, strict=True):
            part.load_state_dict(state)


_ADAM = ("exp_avg", "exp_avg_sq")

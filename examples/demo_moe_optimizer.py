"""AdamW on float32 master copies of bf16 parameters, with a checkpoint that is plain safetensors.

The parameters themselves are bf16, because the grouped matrix product of the experts takes no float32 and is not
covered by autocast; the master copies keep the small updates that bf16 would round away.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from examples.demo_moe_data import DemoDataError


class MasterAdamW:
    """Optimizer over ``model.parameters()`` (bf16). Only matrices decay, not norms."""

    def __init__(self, model: torch.nn.Module, weight_decay: float, clip: float = 1.0) -> None:
        self._names = [name for name, _ in model.named_parameters()]
        self._parameters: list[torch.Tensor] = [parameter for _, parameter in model.named_parameters()]
        self._masters = [p.detach().float().clone() for p in self._parameters]
        self._clip = clip
        decayed = [m for m in self._masters if m.dim() > 1]
        plain = [m for m in self._masters if m.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self._adam = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, fused=True)

    def step(self, rate: float) -> None:
        """Clip the gradients' norm, update the masters with learning rate ``rate``, copy them to the parameters."""
        for parameter, master in zip(self._parameters, self._masters, strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        torch.nn.utils.clip_grad_norm_(self._masters, self._clip)
        for group in self._adam.param_groups:
            group["lr"] = rate
        self._adam.step()
        self._copy_to_parameters()

    def _copy_to_parameters(self) -> None:
        with torch.no_grad():
            torch._foreach_copy_(self._parameters, self._masters)

    def save(self, path: Path, step: int, elapsed: float, settings: dict[str, Any]) -> None:
        """Write masters, both moments and the progress; atomic, so that an interrupted write loses nothing."""
        tensors = {}
        for name, master in zip(self._names, self._masters, strict=True):
            state = self._adam.state[master]
            tensors[f"master.{name}"] = master
            if state:
                tensors[f"first.{name}"], tensors[f"second.{name}"] = state["exp_avg"], state["exp_avg_sq"]
        metadata = {"step": str(step), "elapsed": repr(elapsed), "settings": json.dumps(settings)}
        temporary = path.with_name(path.name + ".tmp")
        save_file(tensors, temporary, metadata)
        os.replace(temporary, path)

    def load(self, path: Path, settings: dict[str, Any]) -> tuple[int, float]:
        """Restore from ``path``; returns (step, seconds trained). DemoDataError where the settings differ."""
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            if json.loads(metadata["settings"]) != settings:
                raise DemoDataError(f"{path} is of other settings: repeat them, or give an empty --work folder")
            step = int(metadata["step"])
            for name, master in zip(self._names, self._masters, strict=True):
                master.copy_(file.get_tensor(f"master.{name}"))
                if step:
                    self._adam.state[master] = {
                        "step": torch.tensor(float(step), device=master.device),
                        "exp_avg": file.get_tensor(f"first.{name}").to(master.device),
                        "exp_avg_sq": file.get_tensor(f"second.{name}").to(master.device),
                    }
        self._copy_to_parameters()
        return step, float(metadata["elapsed"])

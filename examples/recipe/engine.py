"""What every training run needs: optimiser, schedule, the loop."""

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint import state_dict

from ffr import FFR, FFRLoss
from ffr.objective import Terms
from recipe.config import Config, build_objective
from recipe.data import SceneImages, TrainImages, loading, mixed, samples
from recipe.network import build_model

NEVER = 2**53  # a step that no run reaches, and a float64 holds
WHOLE = state_dict.StateDictOptions(full_state_dict=True, cpu_offload=True)


class Diverged(RuntimeError):
    """A loss term is no longer finite: which, since which step, and the terms where that was seen."""

    WHAT: ClassVar = {
        "weights": "a weight is not finite. Lower the learning rate.",
        "loss_scale": "no gradient of fp16 is finite, whatever the loss is multiplied by. Use --precision bf16.",
    }

    def __init__(self, term: str, step: int, values: dict[str, float]) -> None:
        what = self.WHAT.get(term, f"the loss term `{term}` is not finite. Lower the learning rate.")
        super().__init__(f"step {step}: {what}")
        self.term, self.step, self.values = term, step, values


def optimizer(model: FFR, lr: float, *, weight_decay: float, head_scale: float) -> torch.optim.AdamW:
    """AdamW as in the lineage: no decay on biases, norms and position embedding; classifiers and heads learn faster."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        decays = parameter.ndim > 1 and "pos_embed" not in name
        groups.setdefault((decays, name.startswith("encoder.")), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "weight_decay": weight_decay if decays else 0.0,
                "scale": 1.0 if body else head_scale,
            }
            for (decays, body), parameters in groups.items()
        ],
        lr=lr,
        fused=next(model.parameters()).is_cuda,  # one kernel for all weights
    )


def learning_rate(step: int, steps: int, warmup: int, peak: float, *, power: float = 0.9) -> float:
    """Linear warm-up from a millionth of `peak`, then polynomial decay to 0, counted from step 0."""
    if step < warmup:
        return peak * (1e-6 + (1 - 1e-6) * step / warmup)
    return peak * (1 - step / steps) ** power


class Trainer:
    """One training run: network, objective and optimiser on the devices that accelerate found.

    Args:
        config: all settings.
        samples: what to train on, by sample number.
        num_classes: K.
        accelerator: places, wraps and reduces. One process, or one a rank.

    The objective of a step is the same for any number of ranks: counts are summed over them, and a sample is drawn from
    its number. So are the steps after a restart.
    """

    def __init__(
        self, config: Config, samples: TrainImages | SceneImages, num_classes: int, accelerator: Accelerator
    ) -> None:
        self.config, self.samples, self.accelerator = config, samples, accelerator
        self.rank, self.ranks = accelerator.process_index, accelerator.num_processes
        parts = self.ranks * config.accumulate
        if config.batch_size % parts:
            raise ValueError(
                f"--batch-size: expected a multiple of ranks x --accumulate = {self.ranks} x {config.accumulate}, got "
                f"{config.batch_size}."
            )
        torch.manual_seed(config.seed)
        self.model = build_model(config, num_classes).to(accelerator.device)
        together = {"all_reduce": self.total, "world_size": self.ranks} if self.ranks > 1 else {}
        self.objective = build_objective(config, self.model, **together).train()
        if config.compile:
            blocks = getattr(getattr(self.model.encoder, "model", None), "blocks", None)
            for part in blocks or [self.model.encoder]:
                part.compile()  # by block: one graph serves them all, and an image of another size does not cost much
            if accelerator.device.type == "cpu":  # most GPUs have a kernel for it, which it would pass over compiled
                self.objective.refinement.compile()
        if self.ranks > 1 and any(isinstance(part, nn.BatchNorm2d) for part in self.model.modules()):
            if accelerator.device.type == "cpu":
                raise ValueError("--model: batch norm cannot be shared by ranks on a CPU. Run one process, or a ViT.")
            nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        self.wrapped: nn.Module
        if config.fsdp:
            self.wrapped = _shard(self.objective, accelerator)
        else:
            self.wrapped = accelerator.prepare_model(self.objective)
        adamw = optimizer(self.model, config.lr, weight_decay=config.weight_decay, head_scale=config.head_scale)
        self.optimizer = accelerator.prepare_optimizer(adamw)
        self.waited = 0.0  # seconds in which the loop had no images to work on
        self._values = torch.zeros(len(Terms._fields), device=accelerator.device)  # of the last step
        self._first_bad = torch.full((len(Terms._fields),), NEVER, device=accelerator.device)

    def total(self, count: Tensor) -> Tensor:
        """Sum over ranks."""
        if self.ranks == 1:
            return count
        count = count.clone()
        distributed.all_reduce(count)
        return count

    def most(self, value: Tensor) -> Tensor:
        """Maximum over ranks."""
        value = value.clone()
        distributed.all_reduce(value, distributed.ReduceOp.MAX)
        return value

    def run(self, start: int = 0) -> Iterator[tuple[int, dict[str, float] | None]]:
        """Train from step `start` to the last. After each step: the steps done, and the terms where they were read.

        Terms are the mean over the ranks, unweighted; reading them is the one time that the host waits.

        Raises:
            Diverged: where a term is not finite, at the next step at which it is looked at.
            ValueError: for an image that cannot be read; names the file.
        """
        config, device = self.config, self.accelerator.device
        with self._batches(start) as batches:
            for step in range(start, config.steps):
                torch.manual_seed(mixed(config.seed, 2, step, self.rank))  # whatever a network draws, it draws again
                rate = learning_rate(step, config.steps, config.warmup, config.lr, power=config.power)
                for group in self.optimizer.param_groups:
                    group["lr"] = rate * group["scale"]
                began = time.perf_counter()
                images, labels = next(batches)
                self.waited += time.perf_counter() - began
                share = len(images) // config.accumulate
                values = torch.zeros(len(Terms._fields), device=device)
                for part, (x, y) in enumerate(zip(images.split(share), labels.split(share), strict=True)):
                    present = max(1, int((y > 0.5).sum(1).max()))  # still on the CPU: costs no synchronisation
                    x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
                    with self._reducing(part == config.accumulate - 1):
                        with self.accelerator.autocast():
                            terms: Terms = self.wrapped(x, y, step=step, max_present=present)
                        self.accelerator.backward(terms.total / config.accumulate)
                    values += torch.stack([term.detach() for term in terms]) / config.accumulate
                self._values = values
                first = torch.where(torch.isfinite(values), NEVER, step)
                self._first_bad = torch.minimum(self._first_bad, first)
                read = step % config.log_every == 0 or step == config.steps - 1
                # Before the weights move, so that they can be looked at.
                shown = self._read(values, step) if read else None
                if config.clip > 0:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), config.clip)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
                yield step + 1, None if shown is None else {**shown, "lr": rate}

    def state(self) -> dict[str, Any]:
        """Weights and optimiser for rank 0, whole, on the CPU; every rank must ask. Any number of ranks can load it."""
        model, optim = state_dict.get_state_dict(self.objective, self._adamw, options=WHOLE)
        scaler = self.accelerator.scaler
        return {"model": model, "optimizer": optim, "scaler": None if scaler is None else scaler.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        state_dict.set_model_state_dict(self.objective, state["model"], options=WHOLE)
        # What had no gradient yet, as the head before its start, has no state of the optimiser and must not get one.
        lenient = state_dict.StateDictOptions(full_state_dict=True, cpu_offload=True, strict=False)
        state_dict.set_optimizer_state_dict(self.objective, self._adamw, state["optimizer"], options=lenient)
        for name, parameter in self.objective.named_parameters():
            if name not in state["optimizer"]["state"]:
                self._adamw.state.pop(parameter, None)
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def weights(self) -> dict[str, Tensor]:
        """``FFR.state_dict()``, whole; on every rank, and every rank must ask."""
        return state_dict.get_model_state_dict(self.model, options=state_dict.StateDictOptions(full_state_dict=True))

    def whole_model(self) -> FFR:
        """The network for evaluation, outside the objective: itself, or a copy where its weights are divided."""
        if not self.config.fsdp:
            return self.model
        copy = build_model(
            replace(self.config, pretrained=False, checkpoint=None, grad_checkpointing=False), self.model.num_classes
        )
        copy.load_state_dict(self.weights())
        return copy.to(self.accelerator.device)

    @property
    def _adamw(self) -> torch.optim.Optimizer:
        return self.optimizer.optimizer

    def _batches(self, start: int) -> AbstractContextManager[Iterator[tuple[Tensor, Tensor]]]:
        config = self.config
        numbers = [  # of one rank, step by step
            samples(step, config.batch_size, self.rank, self.ranks, config.accumulate)
            for step in range(start, config.steps)
        ]
        pin = self.accelerator.device.type == "cuda"
        return loading(self.samples, batch_sampler=numbers, num_workers=config.workers, pin_memory=pin)

    def _reducing(self, last: bool) -> AbstractContextManager[None]:
        """Gradients are summed over ranks once a step, in its last part."""
        if self.config.fsdp:
            self.objective.set_requires_gradient_sync(last)
            return nullcontext()
        return nullcontext() if last or self.ranks == 1 else self.accelerator.no_sync(self.wrapped)

    def look(self, weights: Mapping[str, Tensor], step: int) -> None:
        """Refuse what is not finite: a term of any step so far, or a weight after `step`; every rank must ask."""
        self._read(self._values, step)
        if not all(bool(value.isfinite().all()) for value in weights.values()):
            raise Diverged("weights", step, {})

    def _read(self, values: Tensor, now: int) -> dict[str, float]:
        if self.ranks > 1:
            values = self.total(values) / self.ranks
            self._first_bad = -self.most(-self._first_bad)
        both = torch.stack([values.double(), self._first_bad.double()]).tolist()
        shown = dict(zip(Terms._fields, both[0], strict=True))
        bad = dict(zip(Terms._fields, both[1], strict=True))
        step = min(bad.values())
        if step < NEVER:
            names = [name for name in (*Terms._fields[1:], "total") if bad[name] == step]
            raise Diverged(names[0], int(step), shown)
        if self.accelerator.scaler is not None:  # of fp16, which skips a step whose gradients are not finite
            shown["loss_scale"] = self.accelerator.scaler.get_scale()
            if shown["loss_scale"] < 1:
                raise Diverged("loss_scale", now, shown)
        return shown


def _shard(objective: FFRLoss, accelerator: Accelerator) -> nn.Module:
    """FSDP, in place: each block of the encoder a unit, the rest another."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if accelerator.num_processes < 2:
        raise ValueError("--fsdp: there is one rank alone. Launch with torchrun, or leave the flag out.")
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for block in getattr(getattr(objective.model.encoder, "model", None), "blocks", ()):
        fully_shard(block, mesh=mesh)
    fully_shard(objective, mesh=mesh)
    return objective

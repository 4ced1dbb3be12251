"""A student and what changes it: one step, forwards, backwards, and the update of the weights.

Where several processes share each batch, a step gives what one process would give with the same batch.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from groupify.data.ranks import Ranks
from groupify.data.splits import Augment
from groupify.errors import SpecError
from groupify.graph.call import Call
from groupify.training.goal import Goal
from groupify.training.objective import Objective, as_input
from groupify.training.settings import FinetuneSettings
from groupify.training.shared_norm import synchronise_batch_norms
from groupify.training.state import optimizer_tensors, set_optimizer_tensors, with_prefix, without_prefix

_SCALE = "scale"  # of a group of parameters: what the learning rate is multiplied by
_SMALLEST_SCALE = 1e-3


class Learner:
    """A student in training.

    Args:
        model: the student; it is trained in place.
        teacher: in eval mode; None = cross-entropy only.
        settings: how to train.
        example: a call with two examples or more.
        augment: the augmentation; None = none.
        ranks: the processes that share each batch.
        goal: what the student is to get better at.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module | None,
        settings: FinetuneSettings,
        example: Call,
        augment: Augment | None,
        ranks: Ranks,
        goal: Goal = Goal(),
    ) -> None:
        self.settings, self.ranks, self.goal = settings, ranks, goal
        self.augment = augment
        self.augmentation = torch.Generator().manual_seed(settings.seed + ranks.rank)
        self.model = _in_format(model, settings)
        self.teacher = None if teacher is None else _in_format(teacher, settings)
        self.device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        self.optimizer = make_optimizer(self.model, settings)
        self.average = AveragedWeights(self.model, settings.ema_decay) if settings.ema_decay > 0 else None
        self.objective = Objective(self.model, self.teacher, settings, example, goal)
        self.wrapped = self.model
        if ranks.world > 1:
            self.wrapped = wrapped(self.model, as_input(example, self.model, settings), ranks)

    @property
    def evaluated(self) -> nn.Module:
        """The weights that are validated and returned."""
        return self.model if self.average is None else self.average.model

    def step(
        self,
        number: int,
        call: Call,
        labels: Tensor,
        whole: int,
        learning_rate: float,
        tell: Callable[[Tensor, Tensor, int], None],
    ) -> bool:
        """Learn from a batch.

        Returns False, and leaves the weights as they are, where a gradient is not finite.

        Args:
            number: of the step, from 1.
            call: what the model is called with, this rank's part.
            labels: shape (N, …).
            whole: images of the whole batch, of all ranks.
            learning_rate: of this step.
            tell: is told the mean loss, the number of right answers and of images of each part.
        """
        if self.augment is not None:
            call = Call((self.augment(call.tensors[0], self.augmentation),))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group.get(_SCALE, 1.0)
        self.wrapped.train()
        if self.settings.freeze_batch_norms:
            freeze_batch_norms(self.model)
        self.optimizer.zero_grad(set_to_none=True)
        # The same number on all ranks, of two images or more each.
        parts = max(1, min(self.settings.accumulate, whole // self.ranks.world // 2))
        divided = zip(call.split(parts), labels.tensor_split(parts), strict=True)
        for part, (some, targets) in enumerate(divided, start=1):
            with self._synchronising(part == parts):
                loss, correct = self._backward(some, targets, whole)
            tell(loss, correct, some.batch_size)
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        # Those of all ranks, so that all of them stop at the same step.
        if not torch.nn.utils.get_total_norm(gradients).isfinite():
            return False
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.model, number)
        return True

    def _backward(self, call: Call, labels: Tensor, whole: int) -> tuple[Tensor, Tensor]:
        inputs = as_input(call, self.model, self.settings)
        wanted = labels.to(inputs.tensors[0].device) if self.goal.labels else None
        loss, correct = self.objective(self.wrapped, inputs, wanted)
        if not loss.requires_grad:
            raise SpecError(
                "the loss has no gradient: the model's forward runs under torch.no_grad or inference_mode, "
                "or detaches what it computes; fine-tuning needs one that does not"
            )
        # Gradients are averaged over the ranks, so this gives the mean over the whole batch.
        share = call.batch_size * self.ranks.world / whole
        (loss * share if share != 1 else loss).backward()
        return loss, correct

    def _synchronising(self, last: bool) -> Any:
        """The gradients of all ranks are put together behind the last part of a batch."""
        if last or self.wrapped is self.model:
            return contextlib.nullcontext()
        return self.wrapped.no_sync()  # type: ignore[operator]

    def tensors(self) -> dict[str, Tensor]:
        """Return everything that a step changes, for ``load``."""
        average = {} if self.average is None else self.average.model.state_dict()
        return {
            **with_prefix("model", self.model.state_dict()),
            **with_prefix("optimizer", optimizer_tensors(self.optimizer)),
            **with_prefix("average", average),
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put ``tensors`` back."""
        self.model.load_state_dict(without_prefix("model", tensors))
        set_optimizer_tensors(self.optimizer, without_prefix("optimizer", tensors))
        if self.average is not None:
            self.average.model.load_state_dict(without_prefix("average", tensors))


class AveragedWeights:
    """The exponential moving average of a model's weights and buffers, as a model of its own.

    The decay of the first steps is less, (1 + step) / (10 + step), so that the start is soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights behind step 1, 2, …."""
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        new = model.state_dict()
        for name, value in self.model.state_dict().items():
            if value.is_floating_point():
                value.lerp_(new[name], share)
            else:
                value.copy_(new[name])


def make_optimizer(model: nn.Module, settings: FinetuneSettings) -> torch.optim.Optimizer:
    """Return SGD or AdamW with weight decay on weights of two or more dimensions alone.

    The groups of AdamW hold a tensor each, and what its learning rate is to be multiplied by, ``scale``.

    Raises:
        SpecError: no parameter requires gradients.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise SpecError("no parameter of the model requires gradients: there is nothing to train")
    momentum = settings.momentum
    if settings.optimizer == "adamw":
        alone = [{**_group([parameter], settings), _SCALE: _scale(parameter)} for parameter in parameters]
        return torch.optim.AdamW(alone, betas=(momentum, 0.999))
    split = [[p for p in parameters if p.dim() > 1], [p for p in parameters if p.dim() <= 1]]
    groups = [_group(some, settings) for some in split if some]
    return torch.optim.SGD(groups, lr=0.0, momentum=momentum, nesterov=momentum > 0)


def _group(parameters: list[nn.Parameter], settings: FinetuneSettings) -> dict[str, Any]:
    return {"params": parameters, "weight_decay": settings.weight_decay if parameters[0].dim() > 1 else 0.0}


def _scale(parameter: Tensor) -> float:
    return max(float(parameter.detach().float().square().mean().sqrt()), _SMALLEST_SCALE)


def freeze_batch_norms(model: nn.Module) -> None:
    """Put the batch norms that keep statistics in eval mode."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            module.eval()


def _in_format(model: nn.Module, settings: FinetuneSettings) -> nn.Module:
    return model.to(memory_format=torch.channels_last) if settings.channels_last else model


def wrapped(model: nn.Module, example: Call, ranks: Ranks) -> nn.Module:
    """Wrap a model, its batch norms synchronised, in DistributedDataParallel.

    Args:
        model: in train mode.
        example: a call with two examples or more, on the model's device.
        ranks: the processes.

    Raises:
        SpecError: the model has layers whose result depends on how the batch is divided.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.track_running_stats:
            raise SpecError(f"{name!r} keeps statistics of its own batch: train in one process")
    unused = not _uses_all_of_its_outputs(model, example)
    synchronise_batch_norms(model, ranks)
    device = example.tensors[0].device
    return DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        # The buffers are those of the synchronised norms, alike on all ranks.
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
        find_unused_parameters=unused,
    )


def _uses_all_of_its_outputs(model: nn.Module, example: Call) -> bool:
    """Whether the loss reads everything: auxiliary outputs leave parameters without a gradient."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        return isinstance(example.apply(copy.deepcopy(model).train()), Tensor)

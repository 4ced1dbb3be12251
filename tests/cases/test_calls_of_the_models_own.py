"""Models are called as their authors meant: optional arguments, several inputs, keywords, nested outputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import groupify
from groupify.errors import GroupifyError
from groupify.graph.forward import equal_outputs
from tests.cases.nets import EXACT, assert_exact, grouped_already, noise, planned
from tests.cases.small import (
    CHANNELS,
    PAIRS,
    TINY,
    assert_converts,
    convert_from_weights,
    convert_small,
    free_convs,
    hidden,
    situations,
)


class Body(nn.Module):
    """The parts that the nets here put together; images of one channel broadcast against any map."""

    pinned = False  # whether the channels between the convs keep their order

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, CHANNELS, 3, padding=1)
        self.c1 = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.c2 = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.head = nn.Linear(CHANNELS, 5)

    def vectors(self) -> list[Tensor]:
        """What there is for each channel between the convs."""
        return []

    def start(self, x: Tensor) -> Tensor:
        return torch.relu(self.c1(torch.relu(self.stem(x))))

    def end(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(torch.relu(self.c2(x)).mean((2, 3)))
        return result


class Plain(Body):
    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.start(x))


class Scaled(Body):
    def forward(self, x: Tensor, strength: float = 1.5) -> Tensor:
        return self.end(self.start(x) * strength)


class Tempered(Body):
    def forward(self, x: Tensor, temperature: float | Tensor = 2.0) -> Tensor:
        return self.end(self.start(x)) / temperature


class Masked(Body):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.start(x)
        return self.end(x if mask is None else x * mask)


class Attending(Body):
    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        x = self.start(x)
        q = x.flatten(2).transpose(1, 2)
        return self.end(
            F.scaled_dot_product_attention(q, q, q, is_causal=causal).transpose(1, 2).reshape(x.shape)
        )


class KeywordOnly(Body):
    def forward(self, x: Tensor, *, strength: float = 1.5, names: tuple[str, ...] = ("a",)) -> Tensor:
        return self.end(self.start(x) * strength * len(names))


class Variadic(Body):
    def forward(self, *inputs: Tensor, **options: Any) -> Tensor:
        x = self.start(inputs[0])
        return self.end(sum(inputs[1:], x) * options.get("strength", 1.5))


class Resized(Body):
    def forward(self, x: Tensor, size: tuple[int, int] | None = None, mode: str = "nearest") -> Tensor:
        return self.end(F.interpolate(self.start(x), size or (4, 4), mode=mode))


class TensorDefault(Body):
    def forward(self, x: Tensor, shift: Tensor = torch.tensor(0.5)) -> Tensor:  # noqa: B008
        return self.end(self.start(x) + shift)


class Returning(Body):
    def forward(self, x: Tensor, features: bool = False, log: Any = None) -> Any:
        y = self.start(x)
        if log is not None:
            log.append(y)
        return (self.end(y), y) if features else self.end(y)


class Typed(Body):
    """As Hugging Face's: the keyword has a name of its own."""

    def forward(self, pixel_values: Tensor | None = None, return_dict: bool | None = None) -> Tensor:
        assert pixel_values is not None
        return self.end(self.start(pixel_values))


OPTIONAL: dict[str, Callable[..., Body]] = {
    "scale": Scaled,
    "temperature": Tempered,
    "mask": Masked,
    "flag": Attending,
    "keyword only": KeywordOnly,
    "variadic": Variadic,
    "size": Resized,
    "tensor": TensorDefault,
    "features": Returning,
    "of another name": Typed,
}


@pytest.mark.parametrize("make", situations(OPTIONAL))
def test_optional_arguments_are_left_alone(make: Callable[..., Body]) -> None:
    assert_converts(hidden(make(), second=False))


def test_optional_arguments_of_a_grey_image() -> None:
    net = grouped_already(Scaled(1), PAIRS)
    assert_converts(net, noise(32, (1, 8, 8)))
    assert_exact(convert_from_weights(net, (1, 8, 8)).model, net, noise(8, (1, 8, 8), 9))


def test_a_converted_model_takes_its_optional_arguments() -> None:
    net = hidden(Masked())
    model = convert_small(net).model
    mask = (noise(8, (1, 8, 8), 3) > 0).float()
    with torch.no_grad():
        torch.testing.assert_close(
            model(noise(8, TINY, 9), mask), net(noise(8, TINY, 9), mask), atol=2e-3, rtol=1e-2
        )


class Two(Body):
    """An image and a map that is added to its features."""

    def __init__(self) -> None:
        super().__init__()
        self.side = nn.Conv2d(1, CHANNELS, 1)

    def vectors(self) -> list[Tensor]:
        assert self.side.bias is not None
        return [self.side.weight, self.side.bias]

    def forward(self, image: Tensor, extra: Tensor, strength: float = 1.0) -> Tensor:
        return self.end(self.start(image) + strength * self.side(extra))


class Siamese(Body):
    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return (self.end(self.start(left)) - self.end(self.start(right))).abs()


class Batch(Body):
    """Takes a dictionary."""

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"logits": self.end(self.start(batch["image"]) * batch["weight"].reshape(-1, 1, 1, 1))}


class Indexed(Body):
    """An image and the number of a class, for a table of embeddings, which pins what it is added to."""

    pinned = True

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, CHANNELS)

    def forward(self, image: Tensor, label: Tensor) -> Tensor:
        return self.end(self.start(image) + self.table(label)[:, :, None, None])


Call = tuple[tuple[Any, ...], dict[str, Any]]
Calls = Callable[[Tensor], Call]


def extra_of(batch: Tensor) -> Tensor:
    return batch.mean(1, keepdim=True)


def labels_of(batch: Tensor) -> Tensor:
    return (batch.mean((1, 2, 3)) * 100).long() % 10


SEVERAL: dict[str, tuple[Callable[[], Body], Calls]] = {
    "two positional": (Two, lambda batch: ((batch, extra_of(batch)), {})),
    "one by keyword": (Two, lambda batch: ((batch,), {"extra": extra_of(batch), "strength": 0.5})),
    "all by keyword": (Two, lambda batch: ((), {"image": batch, "extra": extra_of(batch)})),
    "twice through": (Siamese, lambda batch: ((batch, batch.flip(-1)), {})),
    "dictionary": (Batch, lambda batch: (({"image": batch, "weight": batch.amax((1, 2, 3))},), {})),
    "integers": (Indexed, lambda batch: ((batch, labels_of(batch)), {})),
    "true and false": (Masked, lambda batch: ((batch,), {"mask": extra_of(batch) > 0})),
}


def flat(outputs: Any) -> Tensor:
    tensor: Tensor = outputs["logits"] if isinstance(outputs, dict) else outputs
    return tensor


@pytest.mark.parametrize("kind", situations(SEVERAL))
def test_a_model_of_several_inputs_converts(kind: tuple[Callable[[], Body], Calls]) -> None:
    make, inputs = kind
    net = grouped_already(make(), PAIRS)
    example = inputs(noise(2, TINY))
    rules = groupify.Rules(min_group_width=1)
    plan = groupify.plan(net, example_inputs=example, groups=PAIRS, rules=rules)
    assert {"c1", "c2"} <= {site.name for site in plan.converted}
    calibration = groupify.Calibration(noise(32, TINY), fit=EXACT, restarts=6, inputs=inputs)
    model = groupify.convert(net, plan, calibration).model
    args, kwargs = inputs(noise(8, TINY, 9))
    with torch.no_grad():
        ours, wanted = flat(model(*args, **kwargs)), flat(net(*args, **kwargs))
    assert float((ours - wanted).norm() / wanted.norm()) < 1e-3
    groupify.convert(net, plan, example_inputs=example)


SPELLINGS: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda x: x,
    "positional": lambda x: (x,),
    "keywords": lambda x: {"x": x},
    "both": lambda x: ((x,), {"strength": 0.5}),
}


@pytest.mark.parametrize("spelling", situations(SPELLINGS))
def test_every_spelling_of_example_inputs_is_understood(
    spelling: Callable[[Tensor], Any],
) -> None:
    net = grouped_already(Scaled(), PAIRS)
    example = spelling(noise(2, TINY))
    rules = groupify.Rules(min_group_width=1)
    plan = groupify.plan(net, example_inputs=example, groups=PAIRS, rules=rules)
    assert [site.name for site in plan.converted] == ["c1", "c2"]
    model = groupify.convert(net, plan, example_inputs=example).model
    assert_exact(model, net, noise(8, TINY, 9))


def test_a_model_of_several_inputs_is_exported(tmp_path: Path) -> None:
    net = grouped_already(Two(), PAIRS)
    image, extra = noise(2, TINY), noise(2, (1, 8, 8), 4)
    groupify.export(net, tmp_path / "m.onnx", example_inputs=((image,), {"extra": extra}))
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    names = [value.name for value in session.get_inputs()]
    assert names == ["image", "extra"]
    found = session.run(None, {"image": noise(5, TINY).numpy(), "extra": noise(5, (1, 8, 8)).numpy()})[0]
    with torch.no_grad():
        wanted = net(noise(5, TINY), noise(5, (1, 8, 8)))
    torch.testing.assert_close(torch.from_numpy(found), wanted, atol=1e-4, rtol=1e-4)


def test_a_model_of_several_inputs_is_measured_and_planned_for_a_budget() -> None:
    net = grouped_already(Two(), PAIRS)

    def inputs(batch: tuple[Tensor, Tensor]) -> Call:
        return (batch[0], extra_of(batch[0])), {}

    data = torch.utils.data.TensorDataset(noise(16, TINY), torch.zeros(16, dtype=torch.long))
    accuracy = groupify.evaluate(net, data, inputs=inputs)
    assert accuracy.images == 16
    found = groupify.plan_for_budget(
        net,
        budget="macs=80%",
        example_inputs=inputs((noise(2, TINY), labels_of(noise(2, TINY)))),
        rules=groupify.Rules(min_group_width=1),
    )
    assert found.plan.converted


def test_what_the_callers_own_function_raises_is_the_cause_of_the_refusal() -> None:
    def inputs(batch: Tensor) -> Call:
        raise KeyError("no such column")

    net = grouped_already(Two(), PAIRS)
    example: Call = ((noise(2, TINY), noise(2, (1, 8, 8))), {})
    plan = groupify.plan(
        net, example_inputs=example, groups=PAIRS, rules=groupify.Rules(min_group_width=1)
    )  # fmt: skip
    with pytest.raises(GroupifyError, match="no such column") as refused:
        groupify.convert(net, plan, groupify.Calibration(noise(8, TINY), inputs=inputs))
    assert isinstance(refused.value.__cause__, KeyError)


def test_a_model_that_needs_more_inputs_is_refused_by_their_names() -> None:
    with pytest.raises(GroupifyError, match="extra"):
        planned(Two(), TINY, PAIRS)


class Outputs(NamedTuple):
    logits: Tensor
    features: Tensor


def nested(y: Tensor, x: Tensor) -> dict[str, Any]:
    return {
        "tuple": (y, x),
        "list": [y, [x, x.mean()]],
        "dictionary": {"out": y, "aux": {"map": x}},
        "named tuple": Outputs(y, x),
        "nothing": None,
        "numbers": (3, "name", 0.5),
        "boolean": x > 0,
        "integers": y.argmax(1),
        "twice": (x, x),
    }


class WithOutputs(Body):
    """Returns its result in some nesting."""

    def __init__(self, pack: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.pack = pack

    def forward(self, x: Tensor) -> Any:
        y = self.start(x)
        return self.pack(self.end(y), y.mean(1))


@pytest.mark.parametrize("pack", [nested, lambda y, x: y.argmax(1)], ids=["all", "integers"])
def test_outputs_of_any_nesting(pack: Callable[[Tensor, Tensor], Any]) -> None:
    net = hidden(WithOutputs(pack), second=False)
    assert "stem" in free_convs(net)
    model = convert_small(net).model
    x = noise(8, TINY, 9)
    with torch.no_grad():
        assert equal_outputs(model(x), net(x), tolerance=5e-3)
        assert pytree.tree_structure(model(x)) == pytree.tree_structure(net(x))

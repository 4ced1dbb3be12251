"""A converted model is an ordinary module: what PyTorch offers for modules works on it."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.nn.parallel import DistributedDataParallel

from groupify.conversion.conversion import convert
from groupify.conversion.surgery import SHUFFLED
from groupify.planning.rules import Rules
from groupify.planning.sites import describe
from groupify.planning.uniform import plan
from groupify.structures import SiteRecipe, Structure
from tests.conversion.nets import SHAPE, Residual, randomise

KINDS: dict[str, dict[str, Any]] = {
    "grouped": {},
    "shuffled": {"shuffle": "all"},
    "grouped-pointwise": {"structures": "grouped-pointwise"},
    "block-term": {},
}


@pytest.fixture(params=KINDS, scope="module")
def model(request: pytest.FixtureRequest) -> nn.Module:
    dense = randomise(Residual()).eval()
    chosen = plan(dense, SHAPE, groups=4, rules=Rules(min_group_width=1, **KINDS[request.param]))
    if request.param == "block-term":
        recipes = [
            SiteRecipe(site.name, Structure(site.in_channels // 2, 4, site.out_channels // 2))
            for site in chosen.converted
            if max(site.kernel_size) > 1
        ]
        chosen = describe(dense, recipes, SHAPE, chosen.cpu)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return convert(dense, chosen).model.eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def process_group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def gradients(
    model: nn.Module, images: Tensor, target: Callable[[Tensor], Tensor] | None = None
) -> list[Tensor]:
    loss: Tensor = (model if target is None else target)(images).square().mean()
    loss.backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def error_of(model: nn.Module, expected: nn.Module, images: Tensor) -> float:
    """Largest difference of the logits, as a share of the largest logit."""
    wanted = expected(images)
    return float((model(images) - wanted).abs().max() / wanted.abs().max())


def test_it_is_copied_and_stored_like_any_module(model: nn.Module, images: Tensor) -> None:
    copied = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    for parameter in copied.parameters():
        nn.init.zeros_(parameter)
    assert not torch.equal(copied(images), model(images))
    copied.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(copied(images), model(images))


def test_torch_compile_takes_it_whole(model: nn.Module, images: Tensor) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), model(images), rtol=1e-4, atol=1e-4)
    expected = gradients(copy.deepcopy(model), images)
    own = copy.deepcopy(model)
    torch._dynamo.reset()
    found = gradients(own, images, torch.compile(own, backend="aot_eager", fullgraph=True))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_torch_export_takes_it(model: nn.Module, images: Tensor) -> None:
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(model, (images,), dynamic_shapes=({0: batch},))
    torch.testing.assert_close(exported.module()(images[:3]), model(images[:3]), rtol=1e-4, atol=1e-4)


def test_it_trains_in_mixed_precision(model: nn.Module, images: Tensor) -> None:
    own = copy.deepcopy(model).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = own(images).float().square().mean()
    loss.backward()
    assert all(parameter.grad is not None for parameter in own.parameters())
    assert {parameter.dtype for parameter in own.parameters()} == {torch.float32}


@pytest.mark.usefixtures("process_group")
def test_it_can_be_wrapped_for_data_parallelism(model: nn.Module, images: Tensor) -> None:
    own = copy.deepcopy(model)
    found = gradients(own, images, DistributedDataParallel(own))
    for ours, theirs in zip(found, gradients(copy.deepcopy(model), images), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_batch_norms_can_be_fused(model: nn.Module, images: Tensor) -> None:
    from torch.fx.experimental.optimization import fuse

    fused = fuse(copy.deepcopy(model))
    if not any(isinstance(module, tuple(SHUFFLED.values())) for module in model.modules()):
        assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    torch.testing.assert_close(fused(images), model(images), rtol=1e-3, atol=1e-3)


def test_it_can_be_quantised_dynamically(model: nn.Module, images: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is on its way out of PyTorch
        quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
        assert error_of(quantised, model, images) < 0.05


def test_its_convs_can_be_quantised_statically(
    model: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines = [name for name in torch.backends.quantized.supported_engines if name != "none"]
    if not engines:
        pytest.skip("this build of PyTorch has no engine for quantised models")
    monkeypatch.setattr(torch.backends.quantized, "engine", engines[-1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.ao.quantization import get_default_qconfig_mapping
        from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

        settings = get_default_qconfig_mapping(engines[-1])
        observed = prepare_fx(copy.deepcopy(model), settings, (images,))
        observed(images)
        quantised = convert_fx(observed)
        assert error_of(quantised, model, images) < 0.1
    assert not any(type(module) in (nn.Conv2d, *SHUFFLED.values()) for module in quantised.modules())

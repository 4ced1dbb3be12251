from __future__ import annotations

import argparse
import collections
import contextlib
import http.server
import signal
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights

from groupify.errors import CheckpointError, GroupifyWarning, SpecError, WrongTypeError
from groupify.models import weights as zoo_weights
from groupify.models.checkpoints import load_checkpoint, read_checkpoint
from groupify.models.sources import build_model, load_model
from groupify.models.specs import ModelSpec, WeightsOrigin


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty cache, and a proxy that refuses every connection."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")


def put_in_cache(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str, state: dict[str, Tensor]) -> None:
    monkeypatch.setenv("TORCH_HOME", str(folder))
    path = folder / "hub" / "checkpoints" / get_model_weights(name).DEFAULT.url.rpartition("/")[2]
    path.parent.mkdir(parents=True)
    torch.save(state, path)


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


# ---- names and arguments


def test_unknown_model_offers_near_names() -> None:
    with pytest.raises(SpecError, match=r"unknown model 'resnet19'.*did you mean 'resnet1") as error:
        load_model("resnet19", weights="none")
    one_line(error)


def test_misspelt_demo_is_offered() -> None:
    with pytest.raises(SpecError, match="'demo'"):
        load_model("demmo")


def test_unknown_argument_keeps_the_original_message() -> None:
    with pytest.raises(SpecError, match=r"num_clases.*unexpected keyword") as error:
        load_model("resnet18", weights="none", arguments={"num_clases": 10})
    one_line(error)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [({"norm_layer": nn.BatchNorm2d}, "expected JSON"), ({"weights": "DEFAULT"}, "given by weights")],
)
def test_bad_arguments(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(SpecError, match=match):
        load_model("resnet18", weights="none", arguments=arguments)


@pytest.mark.parametrize("shape", [(224,), (3, 0, 224), (3, 1, 2, 3, 4)])
def test_bad_input_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(SpecError, match="expected positive integers"):
        load_model("resnet18", weights="none", input_shape=shape)


@pytest.mark.parametrize("name", ["resnet18", "demo", "groupify.models.demo:fashion_resnet18"])
def test_unknown_weights(name: str) -> None:
    with pytest.raises(SpecError, match="unknown weights 'IMAGENET1K_V9'"):
        load_model(name, weights="IMAGENET1K_V9")


def test_near_names_of_weights() -> None:
    with pytest.raises(SpecError, match="did you mean 'IMAGENET1K_V1'"):
        load_model("resnet18", weights="ResNet18_Weights.IMAGENET1K_V3")


# ---- torchvision's conventions


def test_input_comes_from_the_weights() -> None:
    spec = load_model("efficientnet_b1", weights="none").spec
    preset = get_model_weights("efficientnet_b1").DEFAULT.transforms()
    assert spec.input_shape == (3, preset.crop_size[0], preset.crop_size[0])
    assert spec.preprocessing is not None
    assert spec.preprocessing.mean == tuple(preset.mean)
    assert spec.preprocessing.resize == preset.resize_size[0]
    assert spec.preprocessing.interpolation == preset.interpolation.value


@pytest.mark.parametrize("name", ["googlenet", "inception_v3", "fcn_resnet50", "r3d_18", "raft_small"])
def test_random_weights_need_no_network_and_no_warning(name: str, offline: None) -> None:
    source = load_model(name, weights="none")
    assert source.weights == WeightsOrigin("random", 0)
    assert not source.weights.pretrained
    assert not source.model.training
    expected = {"inception_v3": (3, 299, 299), "r3d_18": (3, 16, 112, 112)}
    assert source.spec.input_shape == expected.get(name, (3, 224, 224))


def test_random_weights_depend_on_the_seed_only() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = load_model("squeezenet1_1", weights="none", seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)
    again = load_model("squeezenet1_1", weights="none", seed=3)
    other = load_model("squeezenet1_1", weights="none", seed=4)
    key = "features.0.weight"
    assert torch.equal(first.model.state_dict()[key], again.model.state_dict()[key])
    assert not torch.equal(first.model.state_dict()[key], other.model.state_dict()[key])


def test_pretrained_weights_from_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    state = get_model("squeezenet1_1").state_dict()
    put_in_cache(monkeypatch, tmp_path, "squeezenet1_1", state)
    for weights in ("auto", "DEFAULT", "IMAGENET1K_V1", "SqueezeNet1_1_Weights.IMAGENET1K_V1"):
        source = load_model("SqueezeNet1_1", weights=weights)
        assert source.weights.pretrained
        assert source.weights == WeightsOrigin("torchvision", "SqueezeNet1_1_Weights.IMAGENET1K_V1")
        assert torch.equal(source.model.state_dict()["features.0.weight"], state["features.0.weight"])
    assert source.spec.name == "squeezenet1_1"


def test_pretrained_googlenet_as_torchvision_makes_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    state = get_model("googlenet", init_weights=False, aux_logits=True).state_dict()
    put_in_cache(monkeypatch, tmp_path, "googlenet", state)
    source = load_model("googlenet")
    assert source.weights.pretrained
    assert dict(source.spec.arguments) == {"transform_input": True, "aux_logits": False}
    reference = get_model("googlenet", weights="DEFAULT").eval()
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(source.model(images), reference(images))
        # A recipe must build the same forward pass, which the weights alone do not say.
        rebuilt = build_model(source.spec)
        rebuilt.load_state_dict(source.model.state_dict())
        assert torch.equal(rebuilt(images), reference(images))


def test_old_keys_of_densenet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    state = get_model("densenet121").state_dict()
    old = {
        key.replace("norm1.", "norm.1.").replace("conv2.", "conv.2.") if "denselayer" in key else key: value
        for key, value in state.items()
        if "num_batches_tracked" not in key
    }
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    put_in_cache(monkeypatch, tmp_path, "densenet121", old)
    assert load_model("densenet121", weights="DEFAULT").weights.pretrained


def test_auto_with_another_number_of_classes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    put_in_cache(monkeypatch, tmp_path, "squeezenet1_1", get_model("squeezenet1_1").state_dict())
    with pytest.warns(GroupifyWarning, match=r"RANDOM.*classifier.1.weight.*\(1000, 512.*\(10, 512"):
        source = load_model("squeezenet1_1", arguments={"num_classes": 10})
    assert not source.weights.pretrained
    with pytest.raises(SpecError, match=r"classifier.1.weight"):
        load_model("squeezenet1_1", weights="DEFAULT", arguments={"num_classes": 10})


# ---- no network


def test_auto_goes_on_without_network(offline: None) -> None:
    started = time.monotonic()
    with pytest.warns(GroupifyWarning, match="RANDOM weights") as caught:
        source = load_model("squeezenet1_1")
    assert time.monotonic() - started < 10
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)
    assert caught[0].filename == __file__
    assert source.weights == WeightsOrigin("random", 0)


def test_strict_weights_without_network(offline: None) -> None:
    with pytest.raises(SpecError, match=r"cannot reach https://.*not in the cache") as error:
        load_model("squeezenet1_1", weights="DEFAULT")
    one_line(error)


def test_hanging_network_is_given_up(monkeypatch: pytest.MonkeyPatch, offline: None) -> None:
    def hang(*_: object, **__: object) -> None:
        time.sleep(3)

    monkeypatch.setattr(urllib.request, "urlopen", hang)
    monkeypatch.setattr(zoo_weights, "_PROBE_SECONDS", 0.1)
    started = time.monotonic()
    with pytest.warns(GroupifyWarning, match=r"no answer within 0\.1 s"):
        load_model("squeezenet1_1")
    assert time.monotonic() - started < 2.5


def test_server_that_refuses(monkeypatch: pytest.MonkeyPatch, offline: None) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise urllib.error.URLError(OSError("Name or service\nnot known"))

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    with pytest.raises(SpecError, match=r"\(Name or service not known\)"):
        load_model("squeezenet1_1", weights="DEFAULT")


class _Stalling(http.server.BaseHTTPRequestHandler):
    """Answers, promises a file, and sends the first bytes of it only."""

    stopped = threading.Event()

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        self.wfile.write(b"PK")
        self.stopped.wait(10)

    def log_message(self, *_: object) -> None:
        pass


def test_download_that_stalls(monkeypatch: pytest.MonkeyPatch, offline: None, tmp_path: Path) -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Stalling)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    weights = get_model_weights("squeezenet1_1").DEFAULT
    url = f"http://127.0.0.1:{server.server_port}/{weights.url.rpartition('/')[2]}"
    monkeypatch.setattr(type(weights), "url", url)
    monkeypatch.setattr(zoo_weights, "_STALL_SECONDS", 0.3)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    try:
        with pytest.raises(
            SpecError, match=r"the download of http://.* stalled for 0\.3 s: try again"
        ) as error:
            load_model("squeezenet1_1", weights="DEFAULT")
    finally:
        _Stalling.stopped.set()
        server.shutdown()
        server.server_close()
    one_line(error)
    assert socket.getdefaulttimeout() is None
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_damaged_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    put_in_cache(monkeypatch, tmp_path, "squeezenet1_1", {})
    for path in tmp_path.rglob("*.pth"):
        path.write_bytes(b"<html>sign in to the hotel's network</html>")
    with pytest.raises(SpecError, match="delete it to download it again") as error:
        load_model("squeezenet1_1", weights="DEFAULT")
    one_line(error)


# ---- factories


@pytest.fixture
def user_module(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    (tmp_path / "user_models.py").write_text(
        "from torch import nn\n"
        "def tiny(width=4):\n    return nn.Sequential(nn.Conv2d(3, width, 3), nn.Dropout())\n"
        "def broken():\n    raise RuntimeError('no such\\nfile: weights.bin')\n"
        "def wrong():\n    return 3\n"
        "number = 5\n"
    )
    (tmp_path / "user_syntax.py").write_text("def f(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("user_models", "user_syntax"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return "user_models"


def test_factory(user_module: str) -> None:
    source = load_model(f"{user_module}:tiny", arguments={"width": 6}, input_shape=(3, 16, 16))
    assert isinstance(source.model, nn.Sequential)
    assert not source.model[1].training
    assert source.model[0].out_channels == 6
    assert source.spec == ModelSpec("user_models:tiny", {"width": 6}, (3, 16, 16), None)
    assert source.weights == WeightsOrigin("factory")
    assert source.weights.pretrained
    said = load_model(f"{user_module}:tiny", weights="none", seed=3).weights
    assert said == WeightsOrigin("random", 3)
    assert not said.pretrained


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ("no_such_module:tiny", r"cannot import 'no_such_module'"),
        ("user_syntax:tiny", r"cannot import 'user_syntax' \(SyntaxError"),
        ("user_models:tinny", r"no 'tinny' in user_models; did you mean 'tiny'"),
        ("user_models:broken", r"RuntimeError: no such file: weights.bin"),
        ("user_models:wrong", r"returned a int: expected an nn.Module"),
        ("user_models:number", r"is a int: expected a function"),
        ("user_models:", r"expected package.module:name"),
        (":tiny", r"expected package.module:name"),
    ],
)
def test_bad_factory(user_module: str, spec: str, match: str) -> None:
    with pytest.raises(SpecError, match=match) as error:
        load_model(spec)
    one_line(error)


def test_factories_are_built_again_only_if_trusted(user_module: str) -> None:
    spec = load_model(f"{user_module}:tiny").spec
    with pytest.raises(SpecError, match="trust=True"):
        build_model(spec)
    assert isinstance(build_model(spec, trust=True), nn.Sequential)


def test_build_model_refuses_unknown_names() -> None:
    with pytest.raises(SpecError, match="unknown model"):
        build_model(ModelSpec("os.system", {}, (3, 8, 8), None))


def test_build_model_leaves_the_random_state() -> None:
    before = torch.get_rng_state()
    model = build_model(ModelSpec("demo", {}, (3, 28, 28), None))
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.training


# ---- checkpoints


def small_model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize("half", [False, True])
def test_checkpoint_round_trip(tmp_path: Path, suffix: str, half: bool) -> None:
    path = tmp_path / f"weights.{suffix}"
    state = {
        key: value.half() if half and value.is_floating_point() else value
        for key, value in small_model().state_dict().items()
    }
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    model = small_model()
    load_checkpoint(model, path)
    for key, value in model.state_dict().items():
        assert value.dtype in (torch.float32, torch.int64)
        assert torch.equal(value, state[key].to(value.dtype))


@pytest.mark.parametrize("wrapper", ["state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_wrapped_checkpoint(tmp_path: Path, wrapper: str, prefix: str) -> None:
    state = {prefix + key: value for key, value in small_model().state_dict().items()}
    torch.save({wrapper: state, "epoch": 3}, tmp_path / "weights.pt")
    model = small_model()
    load_checkpoint(model, tmp_path / "weights.pt")
    assert torch.equal(model.state_dict()["0.weight"], state[prefix + "0.weight"])


def full(model: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    return {prefix + key: value for key, value in model.state_dict().items()}


@pytest.mark.parametrize("prefix", ["_orig_mod.module.", "module._orig_mod.", "module.module._orig_mod."])
def test_nested_wrappers_in_keys(tmp_path: Path, prefix: str) -> None:
    original = small_model()
    torch.save(full(original, prefix), tmp_path / "weights.pt")
    load_checkpoint(loaded := small_model(), tmp_path / "weights.pt")
    assert torch.equal(loaded.state_dict()["0.weight"], original.state_dict()["0.weight"])


def test_wrappers_within_keys(tmp_path: Path) -> None:
    state = {key.replace("3.", "3._orig_mod."): value for key, value in small_model().state_dict().items()}
    save_file(state, tmp_path / "x.safetensors")
    assert "3.weight" in read_checkpoint(tmp_path / "x.safetensors")


@pytest.mark.parametrize("wrapper", ["model_state", "model_state_dict", "net", "params"])
def test_more_wrappers(tmp_path: Path, wrapper: str) -> None:
    torch.save({"step": 3, wrapper: full(small_model()), "optimizer": {"lr": 0.1}}, tmp_path / "weights.pt")
    assert read_checkpoint(tmp_path / "weights.pt").keys() == small_model().state_dict().keys()


@pytest.mark.parametrize("prefix", ["model.", "net.backbone."])
def test_a_checkpoint_of_lightning(tmp_path: Path, prefix: str) -> None:
    original = small_model()
    state = {**full(original, prefix), "loss.weight": torch.ones(2), "metric.total": torch.zeros(())}
    torch.save({"state_dict": state, "epoch": 3, "pytorch-lightning_version": "2.6"}, tmp_path / "last.ckpt")
    load_checkpoint(loaded := small_model(), tmp_path / "last.ckpt")
    assert all(torch.equal(value, original.state_dict()[key]) for key, value in loaded.state_dict().items())
    del state[f"{prefix}3.bias"]
    torch.save({"state_dict": state}, tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match=r"last.ckpt has no '0.weight'"):
        load_checkpoint(small_model(), tmp_path / "last.ckpt")


def test_a_checkpoint_of_lightning_for_a_torchvision_model(tmp_path: Path) -> None:
    state = full(get_model("googlenet", init_weights=False, aux_logits=True), "model.")
    save_file(state, tmp_path / "mine.safetensors")
    source = load_model("googlenet", checkpoint=tmp_path / "mine.safetensors")
    assert source.spec.arguments["aux_logits"] is True


def averaged(model: nn.Module) -> dict[str, Tensor]:
    return torch.optim.swa_utils.AveragedModel(model).state_dict()


@pytest.mark.parametrize("entry", ["model_ema", "state_dict_ema", "ema"])
def test_averaged_weights_go_before_plain_ones_and_it_is_said(tmp_path: Path, entry: str) -> None:
    mean = small_model()
    torch.save({"model": full(small_model()), entry: averaged(mean)}, tmp_path / "x.pth")
    with pytest.warns(GroupifyWarning, match=rf"averaged weights \('{entry}'\) beside plain ones"):
        load_checkpoint(loaded := small_model(), tmp_path / "x.pth")
    assert torch.equal(loaded.state_dict()["0.weight"], mean.state_dict()["0.weight"])


def test_a_model_that_is_there_twice(tmp_path: Path) -> None:
    mean = small_model()
    save_file({**full(small_model(), "model."), **full(mean, "ema_model.")}, tmp_path / "x.safetensors")
    with pytest.warns(GroupifyWarning, match=r"'ema_model.' are taken"):
        load_checkpoint(loaded := small_model(), tmp_path / "x.safetensors")
    assert torch.equal(loaded.state_dict()["0.weight"], mean.state_dict()["0.weight"])
    save_file({**full(small_model(), "student."), **full(mean, "teacher.")}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"2 times, as 'student\.' and 'teacher\.'"):
        load_checkpoint(small_model(), tmp_path / "x.safetensors")


class Bomb:
    """Pickled as a call of ``exec``."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("import pathlib; pathlib.Path('exploded').touch()",)


def test_what_lies_beside_the_tensors_is_neither_an_obstacle_nor_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    beside = {
        "args": argparse.Namespace(lr=0.1, output=Path("out")),
        "best": np.float64(0.5),
        "options": [collections.Counter(a=1)],
        "callback": Bomb(),
    }
    for new in (True, False):
        content = {"model": full(small_model()), **beside}
        torch.save(content, "x.pth", _use_new_zipfile_serialization=new)
        load_checkpoint(small_model(), "x.pth")
    assert not (tmp_path / "exploded").exists()


def test_a_program_is_no_checkpoint(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(nn.Conv2d(3, 4, 1), torch.zeros(1, 3, 2, 2)).save(tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"x.pt is a TorchScript archive, .*: save model.state"):
        load_checkpoint(small_model(), tmp_path / "x.pt")


def test_old_checkpoint_without_counters(tmp_path: Path) -> None:
    whole = small_model()
    whole(torch.rand(8, 3, 3, 3, generator=torch.Generator().manual_seed(0)))  # moves the running statistics
    old = whole.state_dict()
    assert old.pop("1.num_batches_tracked") == 1
    save_file(old, tmp_path / "old.safetensors")
    loaded = small_model()
    loaded.get_buffer("1.num_batches_tracked").fill_(7)
    load_checkpoint(loaded, tmp_path / "old.safetensors")
    state = loaded.state_dict()
    assert state.pop("1.num_batches_tracked") == 7  # what the model had
    assert state.keys() == old.keys()
    images = torch.rand(2, 3, 3, 3, generator=torch.Generator().manual_seed(1))
    assert torch.equal(loaded.eval()(images), whole.eval()(images))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"3.weight": torch.zeros(5, 4)}, r"'3.weight' has shape \(5, 4\), the model's has \(2, 4\)"),
        ({"3.weight": None}, r"has no '3.weight', which the model has with shape \(2, 4\)"),
        ({"9.weight": torch.zeros(7)}, r"has '9.weight' of shape \(7,\), the model does not"),
        ({"1.running_var": torch.full((4,), torch.nan)}, r"'1.running_var' holds NaN"),
        ({"0.weight": torch.zeros(4, 3, 3, 3, dtype=torch.int32)}, r"'0.weight' is torch.int32"),
    ],
)
def test_mismatch_names_the_first_key_and_loads_nothing(
    tmp_path: Path, change: dict[str, Tensor | None], match: str
) -> None:
    changed = {**small_model().state_dict(), **change}
    save_file({key: value for key, value in changed.items() if value is not None}, tmp_path / "x.safetensors")
    model = small_model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=match) as error:
        load_checkpoint(model, tmp_path / "x.safetensors")
    assert "x.safetensors" in one_line(error)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth"])
@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"\x80\x02}q\x00.garbage"])
def test_corrupt_checkpoint(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name) as error:
        load_checkpoint(small_model(), tmp_path / name)
    one_line(error)


def test_truncated_checkpoint(tmp_path: Path) -> None:
    for name in ("x.safetensors", "x.pth"):
        path = tmp_path / name
        state = small_model().state_dict()
        save_file(state, path) if name == "x.safetensors" else torch.save(state, path)
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(CheckpointError, match="corrupt"):
            load_checkpoint(small_model(), path)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # files left to Python
def test_an_interrupt_while_reading_is_no_corrupt_checkpoint(tmp_path: Path) -> None:
    # What load_file of safetensors made of it, about every second time.
    path = tmp_path / "x.safetensors"
    save_file({str(number): torch.zeros(100) for number in range(300)}, path)
    earlier = signal.signal(signal.SIGALRM, signal.default_int_handler)
    finished = 0
    try:
        for number in range(200):
            with contextlib.suppress(KeyboardInterrupt):
                signal.setitimer(signal.ITIMER_REAL, 1e-4 + number * 1e-5)
                read_checkpoint(path)
                signal.setitimer(signal.ITIMER_REAL, 0)
                finished += 1
    finally:
        signal.signal(signal.SIGALRM, earlier)
    assert finished < 200


def test_pickled_code_is_not_run(tmp_path: Path) -> None:
    torch.save(small_model(), tmp_path / "whole.pth")
    with pytest.raises(CheckpointError, match=r"save model.state_dict\(\)") as error:
        load_checkpoint(small_model(), tmp_path / "whole.pth")
    one_line(error)


@pytest.mark.parametrize("content", [[1, 2], {}, {"a": 1}, torch.zeros(3)])
def test_checkpoint_of_something_else(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="expected tensors by name"):
        load_checkpoint(small_model(), tmp_path / "x.pth")


def test_missing_checkpoint(tmp_path: Path) -> None:
    for name in ("resnet18", "demo", "groupify.models.demo:fashion_resnet18"):
        with pytest.raises(CheckpointError, match="no checkpoint"):
            load_model(name, checkpoint=tmp_path / "nothing.pth")


def test_checkpoint_in_place_of_weights(tmp_path: Path, offline: None) -> None:
    state = get_model("squeezenet1_1", num_classes=7).state_dict()
    save_file(state, tmp_path / "mine.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source = load_model(
            "squeezenet1_1", checkpoint=tmp_path / "mine.safetensors", arguments={"num_classes": 7}
        )
    assert source.weights == WeightsOrigin("checkpoint", str(tmp_path / "mine.safetensors"))
    assert source.weights.pretrained
    with pytest.raises(CheckpointError, match=r"classifier.1.weight"):
        load_model("squeezenet1_1", checkpoint=tmp_path / "mine.safetensors")


@pytest.mark.parametrize("heads", [False, True])
def test_auxiliary_heads_follow_the_checkpoint(tmp_path: Path, heads: bool) -> None:
    state = get_model("googlenet", init_weights=False, aux_logits=heads).state_dict()
    save_file(state, tmp_path / "mine.safetensors")
    source = load_model("googlenet", checkpoint=tmp_path / "mine.safetensors")
    assert source.spec.arguments["aux_logits"] is heads


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"name": nn.Linear(1, 1)}, "name is a Linear: expected a torchvision name, demo, or package.module"),
        ({"name": "demo", "weights": None}, "weights is a NoneType: expected auto, none, or a name of"),
    ],
)
def test_arguments_of_another_type_are_told(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(WrongTypeError, match=says):
        load_model(**arguments)

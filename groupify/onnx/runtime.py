"""ONNX files in ONNX Runtime, with the session settings that are used everywhere."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as runtime
import torch
from torch import Tensor, nn

from groupify.errors import GroupifyError
from groupify.graph.call import Call
from groupify.onnx.inputs import feed
from groupify.onnx.providers import CPU, check_started, execution_providers
from groupify.tasks import SCORE_NAMES

Array = npt.NDArray[np.float32]

BLOCKED_DOMAIN = "com.microsoft.nchwc"
_ERRORS_ONLY = 3


def open_session(
    model: Path | str | bytes,
    *,
    threads: int = 1,
    optimise: bool = True,
    save_optimised: Path | None = None,
    profile_prefix: Path | None = None,
    provider: str = CPU,
) -> Any:
    """Open an ``onnxruntime.InferenceSession``.

    Sequential execution and one inter-op thread. Worker threads may spin during a run, as in a default
    session, but stop when it ends: two sessions timed in turn would otherwise steal each other's cores.

    Args:
        model: an ONNX file, or a serialised model.
        threads: intra-op threads.
        optimise: all graph optimisations, or none at all.
        save_optimised: where to write the graph that ONNX Runtime really runs.
        profile_prefix: start the session's profiler; its file name begins with this.
        provider: short name of the execution provider, see ``providers``.

    Raises:
        SpecError: the installed ONNX Runtime has no such provider.
        GroupifyError: ONNX Runtime refuses the model, or the provider does not start.
    """
    chosen = execution_providers(provider)
    options = _options(threads, optimise)
    if save_optimised is not None:
        options.optimized_model_filepath = str(save_optimised)
    if profile_prefix is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile_prefix)
    source = model if isinstance(model, bytes) else str(model)
    try:
        session = runtime.InferenceSession(source, options, providers=chosen)
    except Exception as error:  # onnxruntime raises bare pybind classes of its own
        name = "the model" if isinstance(model, bytes) else f"{str(model)!r}"
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise GroupifyError(f"ONNX Runtime cannot open {name}: {reason}; export it again") from error
    check_started(session, provider)
    return session


def _options(threads: int, optimise: bool) -> Any:
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = runtime.ExecutionMode.ORT_SEQUENTIAL
    level = runtime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimise else level.ORT_DISABLE_ALL
    options.log_severity_level = _ERRORS_ONLY
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


_TYPES = {
    "tensor(float)": torch.float32,
    "tensor(double)": torch.float64,
    "tensor(float16)": torch.float16,
}


def session_feed(session: Any, name: Path | str, inputs: Call | Tensor) -> dict[str, Array]:
    """Return what a call of the model feeds a session, by name, in the types that it takes.

    Raises:
        GroupifyError: it has other inputs; ``name`` is what the error calls it.
    """
    sources = {source.name: source for source in session.get_inputs()}
    fed = feed(list(sources), Call.of(inputs), str(name))
    return {key: _as_type(tensor, sources[key].type) for key, tensor in fed.items()}


def _as_type(tensor: Tensor, wanted: str) -> Array:
    tensor = tensor.detach().cpu()
    return tensor.to(_TYPES.get(wanted, tensor.dtype)).numpy()


def run_feed(session: Any, name: Path | str, values: Mapping[str, npt.NDArray[Any]]) -> list[Array]:
    """Run a session on all its inputs by name and return its outputs; ``name`` is what an error calls it.

    Raises:
        GroupifyError: the model does not take such inputs.
    """
    try:
        outputs: list[Array] = session.run(None, dict(values))
    except Exception as error:  # onnxruntime raises bare pybind classes of its own
        reason = str(error).splitlines()[0]
        shapes = ", ".join(str(value.shape) for value in values.values())
        raise GroupifyError(f"ONNX Runtime cannot run {str(name)!r} on {shapes}: {reason}") from error
    return outputs


class OnnxModule(nn.Module):
    """An ONNX file that is called like the module: its inputs in, its outputs out, on the CPU.

    One output is a tensor. Several are a tuple, or a dict by name if one of the names is that of class scores
    (``logits``, ``out``), which need not come first.

    It lets everything that measures a model, accuracy first of all, measure the file. A file of fixed batch
    size is run as often as the images need, the last batch filled up with the first images.
    """

    def __init__(self, path: Path | str, *, threads: int = 1) -> None:
        super().__init__()
        self._path = str(path)
        self._session = open_session(path, threads=threads)
        sizes = [source.shape[0] for source in self._session.get_inputs() if source.shape]
        # An input without a batch dimension has a fixed size in any file.
        self._batch = sizes[0] if sizes and all(isinstance(size, int) for size in sizes) else None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the file on a batch."""
        found = {name: torch.from_numpy(value) for name, value in self.outputs(Call(args, kwargs)).items()}
        if len(found) == 1:
            return next(iter(found.values()))
        return found if any(name in SCORE_NAMES for name in found) else tuple(found.values())

    def outputs(self, inputs: Call | Tensor) -> dict[str, Array]:
        """Run the file on a batch and return all outputs by name.

        Raises:
            GroupifyError: the file does not take such inputs.
        """
        call = Call.of(inputs)
        count = call.batch_size
        if self._batch in (None, count):
            return self._run(call)
        filled = call.of_size(count + -count % self._batch)
        parts = [self._run(part) for part in filled.split(filled.batch_size // self._batch)]
        return {name: self._joined([part[name] for part in parts], count) for name in parts[0]}

    def _joined(self, parts: list[Array], images: int) -> Array:
        """Return one output for all images; one without a batch dimension is the same for each part."""
        if parts[0].ndim == 0 or len(parts[0]) != self._batch:
            return parts[0]
        return np.concatenate(parts)[:images]

    @property
    def inputs(self) -> list[tuple[str, str, list[int | str | None]]]:
        """Name, ONNX type and shape of each input; open sizes are names or None."""
        return [(source.name, source.type, source.shape) for source in self._session.get_inputs()]

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata of the file."""
        entries: dict[str, str] = self._session.get_modelmeta().custom_metadata_map
        return entries

    @property
    def fixed_batch(self) -> int | None:
        """The batch size of the file; None where any goes."""
        return self._batch

    def _run(self, call: Call) -> dict[str, Array]:
        names = (output.name for output in self._session.get_outputs())
        values = session_feed(self._session, self._path, call)
        return dict(zip(names, run_feed(self._session, self._path, values), strict=True))


@dataclass(frozen=True)
class BlockedConvs:
    """How many of a model's convs ONNX Runtime runs in its blocked (NCHWc) kernel on this machine."""

    blocked: int
    total: int


def count_blocked_convs(path: Path | str) -> BlockedConvs:
    """Count the convs that ONNX Runtime moves to its blocked kernel, read from its optimised graph.

    Raises:
        GroupifyError: ONNX Runtime refuses the file.
    """
    with tempfile.TemporaryDirectory() as folder:
        optimised = Path(folder) / "optimised.onnx"
        open_session(path, save_optimised=optimised)
        graph = onnx.load(str(optimised), load_external_data=False).graph
    convs = [node for node in graph.node if node.op_type in ("Conv", "FusedConv", "QLinearConv")]
    return BlockedConvs(sum(node.domain == BLOCKED_DOMAIN for node in convs), len(convs))

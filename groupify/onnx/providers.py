"""The execution providers of ONNX Runtime: what a file may run on."""

from __future__ import annotations

import onnxruntime as runtime

from groupify.errors import GroupifyError, SpecError, near_names

CPU = "cpu"
PROVIDERS = {
    CPU: "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "xnnpack": "XnnpackExecutionProvider",
}


def available_providers() -> list[str]:
    """Return the providers above that the installed ONNX Runtime offers."""
    offered = runtime.get_available_providers()
    return [name for name, provider in PROVIDERS.items() if provider in offered]


def execution_providers(name: str) -> list[str]:
    """Return what a session takes to run on a provider: that, and the CPU for nodes that it does not run.

    Raises:
        SpecError: no such provider is known, or the installed ONNX Runtime does not offer it.
    """
    if name not in PROVIDERS:
        raise SpecError(
            f"unknown provider {name!r}, expected one of {', '.join(PROVIDERS)}{near_names(name, PROVIDERS)}"
        )
    here = available_providers()
    if name not in here:
        raise SpecError(
            f"the installed ONNX Runtime has no {PROVIDERS[name]}, only {', '.join(here)}: install a build "
            f"of onnxruntime that has it, or take one of these"
        )
    return list(dict.fromkeys((PROVIDERS[name], PROVIDERS[CPU])))


def check_started(session: runtime.InferenceSession, name: str) -> None:
    """Refuse a session that runs on the CPU alone, which ONNX Runtime falls back to where a provider fails.

    Raises:
        GroupifyError: the provider has not started.
    """
    if PROVIDERS[name] not in session.get_providers():
        raise GroupifyError(
            f"{PROVIDERS[name]} does not start on this machine: ONNX Runtime would run on the CPU instead; "
            "check its driver and libraries"
        )

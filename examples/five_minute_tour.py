"""The whole way in Python, step by step: plan, convert, fine-tune, save, load, evaluate, export, benchmark.

``groupify.compress(source, data, groups=4)`` is the first two steps in one call.

Run it from anywhere: ``python examples/five_minute_tour.py`` writes into the current folder.
"""

from __future__ import annotations

from pathlib import Path

import groupify


def main(folder: Path = Path(), images: int = 1000, epochs: float = 1.0) -> dict[str, float]:
    """Convert the embedded demo; return the top-1 accuracy of each stage, as fractions."""
    source = groupify.load_model("demo")
    data = groupify.load_data("demo", source.spec)
    assert data.train is not None
    assert data.test is not None
    shape = source.spec.input_shape

    # Which convolution gets how many groups, and why: as many as this processor's kernel is fast at.
    plan = groupify.plan(source.model, shape, groups=4)
    for site in plan.sites:
        print(f"{site.name:24} {site.groups_before} → {site.groups}  {site.reason or ''}")
    print(f"MACs of the convolutions: {plan.macs.dense:,} → {plan.macs.grouped:,}")

    # A few hundred images, and no labels, are enough for the fit.
    calibration = groupify.calibration_images(data.train, images, seed=0)
    conversion = groupify.convert(source, plan, calibration)
    print(conversion)

    # Optional: train further, with the dense model as the teacher.
    settings = groupify.FinetuneSettings(epochs=epochs)
    tuned = groupify.finetune(conversion, data, settings=settings)
    accuracy = {
        name: groupify.evaluate(model, data.test).top1
        for name, model in (("dense", source.model), ("converted", conversion.model), ("tuned", tuned.model))
    }
    for name, top1 in accuracy.items():
        print(f"{name:10} {100 * top1:.2f}%")

    # A folder with safetensors and JSON, never a pickle.
    groupify.save(folder / "tour", tuned)
    grouped = groupify.load(folder / "tour")

    # Plain ONNX, which runs without groupify.
    files = {
        name: groupify.export(model, folder / f"{name}.onnx", input_shape=shape).path
        for name, model in (("dense", source.model), ("grouped", grouped))
    }
    for row in groupify.benchmark(files, input_shape=shape, seconds=1):
        print(f"{row.model:10} {row.median_ms:.2f} ms")
    return accuracy


if __name__ == "__main__":
    main()

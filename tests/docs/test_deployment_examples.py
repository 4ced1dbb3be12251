"""The exported file without groupify: in a Python program of three packages, and in a browser page."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import groupify
from tests.chromium import chromium, needs_chromium
from tests.conftest import ROOT

BROWSER = ROOT / "examples" / "browser"
RUNTIME = BROWSER / "node_modules" / "onnxruntime-web"


@dataclass(frozen=True)
class Exported:
    """An exported classifier, an image file, and the probabilities that PyTorch computes for it."""

    model: Path
    image: Path
    probabilities: list[float]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("exported")
    source = groupify.load_model("demo")
    spec = source.spec
    groupify.export(
        source.model, folder / "model.onnx", input_shape=spec.input_shape, preprocessing=spec.preprocessing
    )
    test = groupify.load_data("demo", spec).test
    image = test.images[7, 0].numpy()  # type: ignore[union-attr]
    Image.fromarray(image).save(folder / "image.png")
    images, _ = test.batch(torch.tensor([7]))  # type: ignore[union-attr]
    with torch.no_grad():
        probabilities = source.model.eval()(images).softmax(1)[0].tolist()
    return Exported(folder / "model.onnx", folder / "image.png", probabilities)


def test_python_needs_three_packages_only(exported: Exported) -> None:
    script = ROOT / "examples" / "classify_image.py"
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['classify', {str(exported.model)!r}, {str(exported.image)!r}]\n"
        f"runpy.run_path({str(script)!r}, run_name='__main__')\n"
        "assert not {'torch', 'groupify', 'onnx'} & set(sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    best = int(np.argmax(exported.probabilities))
    wanted = f"{exported.image}: class {best}, {100 * exported.probabilities[best]:.1f}%\n"
    assert result.stdout == wanted


def test_python_resizes_and_crops_as_torchvision_does() -> None:
    from torchvision.transforms import v2 as transforms

    from examples.classify_image import FILTERS, resize_and_crop

    pixels = np.random.default_rng(0).integers(0, 256, (47, 90, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    for name, mode in (
        ("bilinear", transforms.InterpolationMode.BILINEAR),
        ("bicubic", transforms.InterpolationMode.BICUBIC),
    ):
        reference = transforms.Compose([transforms.Resize(32, mode), transforms.CenterCrop((24, 28))])(image)
        found = resize_and_crop(image, 32, [24, 28], FILTERS[name])
        assert np.array_equal(np.asarray(found), np.asarray(reference))


@pytest.fixture
def site(exported: Exported, tmp_path: Path) -> Iterator[str]:
    """Serve the example's folder with the exported model; yield its address."""
    for file in BROWSER.iterdir():
        if file.is_file():
            shutil.copy(file, tmp_path)
    shutil.copy(exported.model, tmp_path / "model.onnx")
    (tmp_path / "node_modules").symlink_to(RUNTIME.parent)

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - http.server's own name
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=tmp_path))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/"
    server.shutdown()
    thread.join()
    server.server_close()


@needs_chromium
@pytest.mark.skipif(not RUNTIME.is_dir(), reason="no onnxruntime-web: npm install in examples/browser")
def test_browser_gives_the_same_class(exported: Exported, site: str, tmp_path: Path) -> None:
    with chromium(tmp_path / "profile") as page:
        page.open(site)
        page.wait("document.getElementById('result').textContent === 'Choose an image.'")
        page.choose_file("#image", exported.image)
        page.wait("document.getElementById('result').textContent.startsWith('Class')")
        text = page.evaluate("document.getElementById('result').textContent")
        assert page.problems == []
        assert all(url.startswith(site) for url in page.requests)
    best = int(np.argmax(exported.probabilities))
    assert text.startswith(f"Class {best}, {100 * exported.probabilities[best]:.1f}%")


@pytest.mark.skipif(shutil.which("node") is None, reason="no Node.js: apt-get install nodejs")
def test_javascript_reads_the_metadata(exported: Exported, tmp_path: Path) -> None:
    """Without a browser and without onnxruntime-web: the reader of the metadata alone."""
    source = (BROWSER / "classify.mjs").read_text("utf-8")
    module = tmp_path / "classify.mjs"
    module.write_text(
        source.replace('import * as ort from "onnxruntime-web/wasm";', "const ort = {env: {wasm: {}}};")
    )
    script = (
        f"import {{ metadata }} from {json.dumps(str(module))}; import {{ readFileSync }} from 'node:fs';"
        f"console.log(JSON.stringify(metadata(readFileSync({json.dumps(str(exported.model))}))));"
    )
    result = subprocess.run(
        ["node", "--input-type=module", "-e", script], capture_output=True, text=True, check=True
    )
    import onnx

    model = onnx.load(str(exported.model))
    assert json.loads(result.stdout) == {entry.key: entry.value for entry in model.metadata_props}

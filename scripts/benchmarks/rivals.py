"""The best structures against low-rank rivals at equal MACs of the whole net, image by image.

    python -m scripts.benchmarks.rivals --checkpoint FILE [--only 'fashion_resnet18 groupify ÷*'] [--quick]
    python -m scripts.benchmarks.rivals --model groupify.models.demo:fashion_vgg11_bn --checkpoint FILE
    python -m scripts.benchmarks.rivals --model groupify.models.demo:fashion_resnet26 --checkpoint FILE

1,000 unlabelled training images; top-1 on all 10,000 test images, and the mean KL divergence of the class
probabilities from the dense net's, which tells apart what the accuracy cannot. Every method has the same
images, and the convs that uniform groups would replace; the rivals' ranks go in steps of 16, and come as near
to the MACs as these allow, where groupify stays within them. Rows of all nets are in one file, one for each
seed, none where a budget cannot be held. A row also holds which test images were right, so that methods are
compared on the same images: the differences in the table are means over the seeds, with a 95% interval from
their spread over the images.
"""

from __future__ import annotations

import base64
import copy
import functools
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from groupify.conversion.conversion import Calibration, convert
from groupify.conversion.fit import Clock, fit_student
from groupify.conversion.reconstruct import ReconstructionOptions
from groupify.conversion.site_fit import FitOptions
from groupify.data.batches import calibration_images
from groupify.data.calls import iterate_calls
from groupify.data.splits import load_data
from groupify.errors import PlanError
from groupify.files import cache_folder
from groupify.graph.capture import capture
from groupify.graph.forward import evaluating
from groupify.graph.neighbours import refittable, residual_sums
from groupify.models.sources import load_model
from groupify.planning.budget import MACS, Budget, Limit
from groupify.planning.rules import AUTO
from groupify.planning.search import SearchOptions, plan_for_budget
from groupify.scores import measure_cost
from groupify.stats.samples import SampleBudget, Sampling, observe_teacher
from groupify.structures import FAMILIES, Plan, SiteRecipe, Structure
from scripts.benchmarks.contest import IMAGES, MODEL, QUICK
from scripts.benchmarks.harness import Parser, Results, matches
from scripts.benchmarks.low_rank import STRUCTURES, factorise
from scripts.benchmarks.methods import STEPS, Setting, make, rules_for
from scripts.benchmarks.tables import net_name

KEYS = ("net", "method", "size", "seed")
RANK_STEP = 16
BLOCKS_OF_16 = "avx512"  # so that our sizes go in the rivals' steps on whatever machine this runs


@dataclass(frozen=True)
class Row:
    """One method on one net at one size, with one seed; accuracies in percent, the drop in points.

    Attributes:
        size: how many times fewer MACs of the whole net were asked for.
        divergence: KL divergence of the class probabilities from the dense net's, nats, mean over the images.
        seconds: of the plan and the conversion.
        right: which test images were right, see :func:`pack`.
    """

    net: str
    method: str
    size: float
    seed: int
    dense_top1: float
    top1: float
    drop: float
    divergence: float
    macs_ratio: float
    params_ratio: float
    seconds: float
    right: str

    def __str__(self) -> str:
        return (
            f"{row_name(self.net, self.method, self.size, self.seed):60s} top-1 {self.top1:6.2f}  drop "
            f"{self.drop:6.2f}  KL {self.divergence:.4f}  MACs ÷{self.macs_ratio:.2f}  {self.seconds:5.0f} s"
        )


def row_name(net: str, method: str, size: float, seed: int) -> str:
    """What ``--only`` selects."""
    return f"{net} {method} ÷{size:g} seed={seed}"


def pack(right: Tensor) -> str:
    """Return which images were right, shape (n,), as text that the tables read."""
    if len(right) % 8:
        raise ValueError(f"{len(right)} test images; expected a multiple of 8, whole bytes of them")
    bits = np.packbits(right.numpy().astype(np.uint8)).tobytes()
    return base64.b64encode(zlib.compress(bits, 9)).decode()


# the methods ----------------------------------------------------------------------------------------

Way = Callable[[Setting, int], nn.Module]  # a setting, and the MACs to come down to


@functools.lru_cache(maxsize=16)
def chosen(setting: Setting, macs: int, families: Sequence[str] = FAMILIES) -> Plan:
    """Return the plan that the product finds for these MACs."""
    budget = Budget((Limit(MACS, float(macs), relative=False),))
    rules = replace(setting.rules, min_group_width=AUTO, cpu=BLOCKS_OF_16, structures=tuple(families))
    options = SearchOptions(seed=setting.seed, cache=cache_folder())  # all sizes share the sensitivities
    found = plan_for_budget(
        setting.dense, setting.shape, budget, setting.images, rules=rules, options=options
    )
    return found.plan


def groupify(fit: FitOptions | None = None, families: Sequence[str] = FAMILIES, steps: int = 0) -> Way:
    """Return groupify as it comes, or with other options."""

    def way(setting: Setting, macs: int) -> nn.Module:
        calibration = Calibration(
            setting.images, fit=fit or FitOptions(), reconstruction=ReconstructionOptions(steps=steps)
        )
        plan = chosen(setting, macs, tuple(families))
        return convert(setting.dense, plan, calibration, seed=setting.seed).model

    return way


def last_factor(setting: Setting, macs: int) -> nn.Module:
    """All factors from the dense net's inputs, and then the last of each again, in order.

    Channels keep the dense net's order, since that is the teacher here.
    """
    plan, images = chosen(setting, macs), setting.images
    calibration = Calibration(images, fit=FitOptions(in_order=False), clustering="none")
    student = convert(setting.dense, plan, calibration, seed=setting.seed).model.eval()
    for name, buffer in setting.dense.named_buffers():  # targets are made with the teacher's batch norms
        student.get_buffer(name).copy_(buffer)
    calls, options = Calibration(images).calls, FitOptions()
    graph, dense_graph = (capture(model, calls[0]).graph for model in (student, setting.dense))
    assert graph is not None
    assert dense_graph is not None
    names = [site.name for site in plan.converted]
    refitted = refittable(dense_graph, names, options.refit_max_inputs)
    sampled = {site.name: Sampling(site.structure.separate_fits(1), patches=False) for site in plan.converted}
    sampled |= dict.fromkeys(refitted, Sampling(1, patches=False))
    samples = observe_teacher(
        dense_graph, calls, sampled, residual_sums(dense_graph, sampled), SampleBudget(), seed=setting.seed
    )
    recipes = {last: recipe for recipe in plan.recipes for last in [_last(student, recipe)]}
    fits = {last: SiteRecipe(last, Structure(groups=_groups(student, last))) for last in recipes}
    wanted = {last: samples.pop(recipe.name) for last, recipe in recipes.items()} | samples
    sums = {str(conv.target): total for conv, total in residual_sums(graph, wanted).items()}
    fit_student(graph, copy.deepcopy(student), calls, fits, wanted, sums, options, clock=Clock())
    return student


def _last(student: nn.Module, recipe: SiteRecipe) -> str:
    """Name of the last conv that a site became."""
    children = [name for name, _ in student.get_submodule(recipe.name).named_children()]
    return ".".join([recipe.name, *children[-1:]])


def _groups(student: nn.Module, name: str) -> int:
    conv = student.get_submodule(name)
    assert isinstance(conv, nn.Conv2d)
    return conv.groups


def low_rank(structure: str, steps: int = 0) -> Way:
    """Return a rival, with the ranks that come nearest to the MACs."""

    def way(setting: Setting, macs: int) -> nn.Module:
        sites = {site.name: site.macs.dense for site in setting.plan(2).converted}
        calibration = Calibration(setting.images, reconstruction=ReconstructionOptions(steps=steps))
        saved = setting.macs(setting.dense) - macs
        return factorise(
            setting.dense, structure, sites, saved, calibration, step=RANK_STEP, seed=setting.seed
        )

    return way


OURS = "groupify"
METHODS: dict[str, Way] = {
    OURS: groupify(),
    **{name: low_rank(name) for name in STRUCTURES},
    "groupify, on the dense net's inputs": groupify(FitOptions(in_order=False)),
    "groupify, last factor only in order": last_factor,
    "groupify, no ReLU-aware targets": groupify(FitOptions(relu_iterations=0)),
    "groupify, no residual compensation": groupify(FitOptions(compensate_residual=False)),
    "groupify, no refit of dense layers": groupify(FitOptions(refit_dense=False)),
    **{f"groupify, {family} alone": groupify(families=[family]) for family in FAMILIES},
    "groupify, reconstruction": groupify(steps=STEPS),
    **{f"{name}, reconstruction": low_rank(name, STEPS) for name in STRUCTURES},
}


# measuring ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scores:
    """Log-probabilities of a net on the test images, shape (n, classes), and the labels, shape (n,)."""

    log_chances: Tensor
    labels: Tensor

    @property
    def right(self) -> Tensor:
        """Which images are right, shape (n,)."""
        return self.log_chances.argmax(1) == self.labels

    @property
    def top1(self) -> float:
        """Percent."""
        return 100 * float(self.right.float().mean())

    def divergence(self, other: Scores) -> float:
        """Mean KL divergence of another net's class probabilities from these, nats."""
        missed = self.log_chances.exp() * (self.log_chances - other.log_chances)
        return float(missed.sum(1).mean())


@dataclass(frozen=True)
class Rivals:
    """Measures the rows of one net.

    Attributes:
        name: of the net.
        settings: one for each seed.
        test: runs a net on the test images.
        results: where the rows go.
        until: time of ``time.monotonic`` after which no row is begun; None = none.
    """

    name: str
    settings: Sequence[Setting]
    test: Callable[[nn.Module], Scores]
    results: Results[Row]
    until: float | None = None

    @functools.cached_property
    def dense(self) -> Scores:
        """The dense net's."""
        return self.test(self.settings[0].dense)

    def run(self, sizes: Sequence[float], only: str) -> None:
        """Measure what is missing, size by size and seed by seed."""
        for size in sizes:
            for setting in self.settings:
                for method, way in METHODS.items():
                    if self.until is not None and time.monotonic() > self.until:
                        return
                    name = row_name(self.name, method, size, setting.seed)
                    key = self.name, method, size, setting.seed
                    if matches(name, only) and self.results.known(*key) is None:
                        try:
                            row = self.measure(method, way, size, setting)
                        except PlanError as problem:
                            print(f"{name}: {problem}", flush=True)
                        else:
                            self.results.put(row)
                            print(row, flush=True)

    def measure(self, method: str, way: Way, size: float, setting: Setting) -> Row:
        """Measure one row."""
        dense_cost, start = measure_cost(setting.dense, setting.images[:1]), time.perf_counter()
        model = make(way, setting, round(dense_cost.macs / size))
        seconds = time.perf_counter() - start
        found, cost = self.test(model), measure_cost(model, setting.images[:1])
        return Row(
            self.name, method, size, setting.seed, self.dense.top1, found.top1, self.dense.top1 - found.top1,
            self.dense.divergence(found), dense_cost.macs / cost.macs, dense_cost.params / cost.params,
            seconds, pack(found.right),
        )  # fmt: skip


def scores_on(test: object, limit: int | None, model: nn.Module) -> Scores:
    """Run a classifier on labelled images."""
    chances, labels = [], []
    with evaluating(model), torch.inference_mode():
        for call, classes in iterate_calls(test, 500, limit=limit):  # type: ignore[arg-type]
            chances.append(call.apply(model).float().log_softmax(1))
            labels.append(classes)
    return Scores(torch.cat(chances), torch.cat(labels))


def main() -> None:
    """Parse and measure."""
    parser = Parser(__doc__, "rivals", QUICK)
    parser.add_net(MODEL)
    parser.add_numbers("--sizes", "2,3.7,6.9,11", "MACs of the dense net ÷ those of a row", float)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--stop-after", type=float, metavar="SECONDS", help="begin no row later")
    arguments = parser.parse()
    until = None if arguments.stop_after is None else time.monotonic() + arguments.stop_after
    count, limit, seeds = (300, 1000, 1) if arguments.quick else (IMAGES, None, arguments.seeds)
    source = load_model(arguments.model, checkpoint=arguments.checkpoint)
    data = load_data(arguments.data, source.spec)
    if data.train is None or data.test is None:
        parser.error(f"--data {arguments.data}: expected training and test images")
    settings = [
        Setting(source.model, calibration_images(data.train, count, seed=seed), seed, rules_for(source.model))
        for seed in range(seeds)
    ]
    results = Results(Row, KEYS, arguments.json, {"calibration_images": count}, order, again=arguments.again)
    test = functools.partial(scores_on, data.test, limit)
    rivals = Rivals(net_name(arguments.model), settings, test, results, until)
    rivals.run([3.7] if arguments.quick else arguments.sizes, arguments.only)
    results.show("rivals")


def order(row: Row) -> tuple[str, float, int, int]:
    """By net and size, then as the methods are listed."""
    return row.net, row.size, list(METHODS).index(row.method), row.seed


if __name__ == "__main__":
    main()

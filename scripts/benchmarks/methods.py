"""Ways from a dense net to a smaller one, ours and the rivals', all to the same MACs from the same images.

A method takes a ``Setting`` and a number of groups, and returns a net whose MACs come as near as it can to
those of the dense net with that many groups in every 3×3 conv but the first.
"""

from __future__ import annotations

import copy
import fnmatch
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groupify.conversion.by_part import refresh_batch_norms
from groupify.conversion.clustering import SiteScore, cluster
from groupify.conversion.conversion import Calibration, convert
from groupify.conversion.reconstruct import ReconstructionOptions
from groupify.conversion.site_fit import FitOptions
from groupify.conversion.surgery import restructure
from groupify.graph.call import Call
from groupify.graph.capture import capture
from groupify.graph.channels import channel_classes
from groupify.graph.model_graph import ModelGraph
from groupify.graph.permute import apply_orders
from groupify.planning.budget import MACS, Budget, Limit
from groupify.planning.rules import AUTO, Rules
from groupify.planning.search import SearchOptions, plan_for_budget
from groupify.planning.uniform import plan
from groupify.scores import measure_cost
from groupify.structures import GROUPED, GROUPED_POINTWISE, Plan
from scripts.benchmarks.low_rank import factorise

SHORTCUTS = "*downsample*"  # the 1×1 convs of a residual net
ANY_WIDTH = Rules(min_group_width=1)
STEPS = 400  # of reconstruction, for each block
PLAIN = FitOptions(
    compensate_residual=False, relu_iterations=0, refit_dense=False, refresh_batch_norm=False, in_order=True
)


@dataclass(frozen=True)
class Setting:
    """The dense net, one seed's calibration images (N, C, H, W), and what a plan may do."""

    dense: nn.Module
    images: Tensor
    seed: int
    rules: Rules = ANY_WIDTH

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one image."""
        return tuple(self.images.shape[1:])

    def plan(self, groups: int, structure: str = GROUPED, shuffle: str = "none") -> Plan:
        """All 3×3 convs but the first."""
        rules = replace(self.rules, structures=(structure,), shuffle=shuffle)
        return plan(self.dense, self.shape, groups=groups, rules=rules)

    def macs(self, model: nn.Module) -> int:
        """MACs of a net on one image."""
        return measure_cost(model, self.images[:1]).macs

    def grouped_macs(self, groups: int) -> int:
        """MACs of the net with uniform groups, which every method is to meet."""
        return self.macs(restructure(self.dense, self.plan(groups).recipes))

    def convert(self, chosen: Plan, calibration: Calibration | None = None) -> nn.Module:
        """Convert with this seed, on these images where no calibration is given."""
        calibration = calibration or Calibration(self.images)
        return convert(self.dense, chosen, calibration, seed=self.seed).model


Method = Callable[[Setting, int], nn.Module]


def rules_for(model: nn.Module, min_group_width: int | str = 1, **more: Any) -> Rules:
    """Return rules that leave the shortcuts dense where a model's 1×1 convs are nothing else.

    In a net of bottlenecks they are a sixth of the MACs, without which no method gets far beyond ÷4.
    """
    pointwise = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)
    ]
    only_shortcuts = bool(pointwise) and pointwise == fnmatch.filter(pointwise, SHORTCUTS)
    return Rules(exclude=(SHORTCUTS,) if only_shortcuts else (), min_group_width=min_group_width, **more)


def make(method: Method, setting: Setting, groups: int) -> nn.Module:
    """Apply a method, its warnings unheard."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return method(setting, groups)


# groupify and its parts -----------------------------------------------------------------------------


def default(shuffle: str = "none", steps: int = 0) -> Method:
    """Return a method: groupify as it comes, perhaps with shuffles or reconstruction."""

    def method(setting: Setting, groups: int) -> nn.Module:
        calibration = Calibration(setting.images, reconstruction=ReconstructionOptions(steps=steps))
        return setting.convert(setting.plan(groups, shuffle=shuffle), calibration)

    return method


def grouped_pointwise(setting: Setting, groups: int) -> nn.Module:
    """Grouped + pointwise with the number of groups whose MACs come nearest to the grouped net's."""
    wanted = setting.grouped_macs(groups)

    def distance(candidate: int) -> float:
        recipes = setting.plan(candidate, GROUPED_POINTWISE).recipes
        return abs(setting.macs(restructure(setting.dense, recipes)) - wanted)

    best = min((2, 4, 8, 16, 32, 64), key=distance)
    return setting.convert(setting.plan(best, GROUPED_POINTWISE))


def planned(setting: Setting, groups: int) -> nn.Module:
    """``--budget macs=…``: whatever kinds and groups the planner chooses within the MACs of uniform groups.

    It gets no more images than the others: it plans on three quarters of them and compares plans on the rest.
    """
    budget = Budget((Limit(MACS, setting.grouped_macs(groups), relative=False),))
    found = plan_for_budget(
        setting.dense, setting.shape, budget, setting.images,
        rules=replace(setting.rules, min_group_width=AUTO), options=SearchOptions(seed=setting.seed),
    )  # fmt: skip
    return setting.convert(found.plan)


def weights_only(setting: Setting, groups: int) -> nn.Module:
    """Without images: clustering by norm, truncation, corrected batch norms."""
    return convert(setting.dense, setting.plan(groups), None, seed=setting.seed).model


def fitted(fit: FitOptions, clustering: str = "none") -> Method:
    """Return a method: least squares with some parts switched on."""

    def method(setting: Setting, groups: int) -> nn.Module:
        return setting.convert(
            setting.plan(groups), Calibration(setting.images, fit=fit, clustering=clustering)
        )

    return method


def random_grouping(setting: Setting, groups: int) -> nn.Module:
    """The whole fit, but with channels put into groups at random."""
    generator = torch.Generator().manual_seed(setting.seed)
    channels = channel_classes(_graph(setting), Call((setting.images[:2],)))
    orders = {
        index: torch.randperm(found.size, generator=generator) for index, found in enumerate(channels.classes)
    }
    scrambled = replace(setting, dense=apply_orders(setting.dense, channels, orders))
    return fitted(FitOptions())(scrambled, groups)


# without a fit --------------------------------------------------------------------------------------


def truncation(setting: Setting, groups: int) -> nn.Module:
    """Keep the diagonal blocks of the dense weights."""
    return restructure(setting.dense, setting.plan(groups).recipes)


def truncation_refresh(setting: Setting, groups: int) -> nn.Module:
    """Truncation and fresh batch-norm statistics."""
    return refreshed(truncation(setting, groups), setting.images)


def norm_refresh(setting: Setting, groups: int) -> nn.Module:
    """Truncation after clustering by weight norm, fresh batch-norm statistics."""
    sites = setting.plan(groups).recipes
    channels = channel_classes(_graph(setting), Call((setting.images[:2],)))
    weights = {site.name: setting.dense.get_submodule(site.name).get_parameter("weight") for site in sites}
    scores = [SiteScore(site, weights[site.name].detach().flatten(2).square().sum(2)) for site in sites]
    orders = cluster(channels, scores, seed=setting.seed).orders
    return refreshed(restructure(apply_orders(setting.dense, channels, orders), sites), setting.images)


def randomised(model: nn.Module, seed: int) -> nn.Module:
    """Give a model random weights, in place."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif callable(reset := getattr(module, "reset_parameters", None)):
                reset()
    return model


def refreshed(model: nn.Module, images: Tensor) -> nn.Module:
    """Give a model fresh batch-norm statistics, in place."""
    refresh_batch_norms(model, images.split(250))
    return model


def _graph(setting: Setting) -> ModelGraph:
    graph = capture(setting.dense, Call((setting.images[:2],))).graph
    assert graph is not None
    return graph


# rivals ---------------------------------------------------------------------------------------------


def low_rank(structure: str) -> Method:
    """Return a method: a factorisation with the ranks that save as many MACs as groups would."""

    def method(setting: Setting, groups: int) -> nn.Module:
        chosen = setting.plan(groups)
        sites = {site.name: site.macs.dense for site in chosen.converted}
        saved = chosen.macs.dense - chosen.macs.grouped
        step = setting.rules.cpu_block
        calibration = Calibration(setting.images)
        return factorise(setting.dense, structure, sites, saved, calibration, step=step, seed=setting.seed)

    return method


def pruned(setting: Setting, macs: int, importance: Any = None, *, isomorphic: bool = False) -> nn.Module:
    """Torch-Pruning: widths rounded to 16, as near as these come to some MACs, fresh batch norms.

    Args:
        setting: the dense net, with gradients where the importance reads them.
        macs: to meet.
        importance: None = group L2 norm.
        isomorphic: rank the channels of all alike layers together, rather than each layer alone.
    """
    import torch_pruning as tp

    low, high, best = 0.0, 0.98, None
    for _ in range(12):
        ratio = (low + high) / 2
        model = copy.deepcopy(setting.dense)
        classifier = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
        for parameter, dense in zip(model.parameters(), setting.dense.parameters(), strict=True):
            parameter.grad = dense.grad  # deepcopy leaves them behind
        pruner = tp.pruner.BasePruner(
            model, setting.images[:1], importance=importance or tp.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=ratio, ignored_layers=[classifier], round_to=16, global_pruning=isomorphic,
            isomorphic=isomorphic,
        )  # fmt: skip
        pruner.step()
        own = setting.macs(model)
        if best is None or abs(own - macs) < abs(best[0] - macs):
            best = (own, model)
        low, high = (ratio, high) if own > macs else (low, ratio)
    assert best is not None
    best[1].zero_grad()
    return refreshed(best[1], setting.images)


def torch_pruning(setting: Setting, groups: int) -> nn.Module:
    """Torch-Pruning at the grouped net's MACs."""
    return pruned(setting, setting.grouped_macs(groups))


def torch_pruning_taylor(setting: Setting, groups: int) -> nn.Module:
    """Torch-Pruning as in Isomorphic Pruning (Fang et al., 2024): Taylor importance, ranked globally.

    It wants the gradient of a loss; without labels that is cross-entropy to the dense net's own classes.
    """
    import torch_pruning as tp

    graded = copy.deepcopy(setting.dense).eval()
    for images in setting.images.split(250):
        logits = graded(images)
        loss = F.cross_entropy(logits, logits.detach().argmax(1), reduction="sum")
        loss.div(len(setting.images)).backward()
    return pruned(
        replace(setting, dense=graded), setting.grouped_macs(groups), tp.importance.GroupTaylorImportance(),
        isomorphic=True,
    )  # fmt: skip


groupify_default = default()
PEERS: dict[str, Method] = {
    "groupify": groupify_default,
    "groupify, shuffle all": default("all"),
    "groupify, grouped-pointwise": grouped_pointwise,
    "groupify, planned": planned,
    "spatial SVD": low_rank("spatial SVD"),
    "Tucker-2": low_rank("Tucker-2"),
    "Torch-Pruning, L2 norm": torch_pruning,
    "Torch-Pruning, Taylor, isomorphic": torch_pruning_taylor,
    "grouping by weight norm": norm_refresh,
    "truncation": truncation_refresh,
}

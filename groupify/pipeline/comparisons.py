"""Uniform plans to convert with as well, for comparison in a report."""

from __future__ import annotations

from dataclasses import replace

from groupify.errors import SpecError
from groupify.pipeline.inputs import class_count
from groupify.pipeline.requests import ConversionRequest
from groupify.pipeline.subject import Subject
from groupify.planning.uniform import plan
from groupify.structures import Plan
from groupify.tasks import OUTPUTS


def check_comparable(request: ConversionRequest, subject: Subject) -> None:
    """Refuse to compare accuracies where none can be measured.

    Raises:
        SpecError: says what is missing.
    """
    start, data, source = "--uniform compares accuracies", subject.data, subject.source
    if data is None:
        raise SpecError(f"{start}: give --data with labels and a test part")
    if subject.task == OUTPUTS:
        raise SpecError(f"{start}, and the task is {OUTPUTS!r}: leave it out")
    if class_count(source) is None:
        raise SpecError(
            f"{start}, and {source.spec.name} gives no logits of shape (N, classes): leave it out"
        )
    if not data.labelled:
        raise SpecError(f"{start}, and {request.data} has no labels: give other --data, or leave it out")
    if data.test is None:
        raise SpecError(f"{start}, and {request.data} has no test part: give other --data, or leave it out")


def uniform_plans(request: ConversionRequest, subject: Subject, own: Plan) -> dict[int, Plan]:
    """Return a plan for each number of groups in ``request.uniform``, each other than all before.

    Args:
        request: gives the numbers and the rules.
        subject: the dense model.
        own: the plan of the run itself.
    """
    source, seen, plans = subject.source, [own.recipes], {}
    rules = request.plan.rules
    if rules.structures is not None and not rules.is_uniform:
        rules = replace(rules, structures=None)
    for groups in request.uniform:
        made = plan(source.model, source.spec.input_shape, groups=groups, rules=rules)
        if made.recipes not in seen:
            seen.append(made.recipes)
            plans[groups] = made
    return plans

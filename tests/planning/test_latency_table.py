from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from groupify.errors import ArtefactError, PlanError
from groupify.measure.conv_timing import TimedConv, time_convs
from groupify.measure.latency_table import LatencyTable, Stopwatch, cached_table, look_up, measure_table
from groupify.measure.profiling import NetworkTime
from groupify.planning.candidates import candidates
from groupify.planning.rules import Rules
from groupify.structures import FLOAT32, INT8, Plan, Precision, Structure
from tests.cli_nets import net

SHAPE = (3, 8, 8)
GROUPED = Rules(min_group_width=1, structures="grouped")
CONV = TimedConv(32, 32, (3, 3), (1, 1), (1, 1), (1, 1, 1, 1), (28, 28))


class Fake(Stopwatch):
    """Times that are known beforehand."""

    def __init__(self, time: Callable[[TimedConv], float], network: NetworkTime, share: float = 1.0) -> None:
        self._time, self._network, self._share = time, network, share

    def convs(self, shapes: Sequence[TimedConv]) -> Iterator[dict[TimedConv, float]]:
        yield {shape: self._time(shape) for shape in shapes}

    def share(self, plan: Plan) -> float:
        return self._share

    def network(self, sites: Sequence[str], precision: Precision) -> NetworkTime:
        return self._network


def timed(shapes: Sequence[TimedConv], rounds: int) -> dict[TimedConv, float]:
    return {shape: time for times in time_convs(shapes, rounds=rounds) for shape, time in times.items()}


def test_groups_and_what_follows_them_are_timed() -> None:
    grouped = replace(CONV, structure=Structure(groups=2))
    several = [Structure(None, 2, 32), Structure(16), Structure(8, 4, 12), Structure(8, 8, 8)]
    shapes = [CONV, grouped, replace(grouped, shuffle=True), CONV]
    shapes += [replace(CONV, structure=structure) for structure in several]
    times = timed(shapes, rounds=5)
    assert len(times) == 7
    assert all(0 < time < 1000 for time in times.values())
    # The kernel times of ONNX Runtime have whole microseconds: only what must take far longer is compared.
    large = timed([replace(CONV, input_size=(112, 112))], rounds=5)
    assert sum(large.values()) > 4 * times[CONV]


def test_convs_of_other_dimensions_strides_and_paddings_are_timed() -> None:
    line = TimedConv(16, 32, (3,), (2,), (1,), (0, 2), (50,), structure=Structure(groups=4), shuffle=True)
    odd = TimedConv(
        6, 9, (1, 3), (2, 1), (1, 2), (0, 1, 1, 0), (9, 11), groups=3, structure=Structure(3, 3, 9)
    )
    cube = TimedConv(
        8, 6, (1, 1, 1), (2, 1, 2), (1,) * 3, (0,) * 6, (4, 5, 6), groups=2, structure=Structure(4, 2)
    )
    assert line.output_size == (25,)
    assert odd.output_size == (5, 8)
    assert cube.output_size == (2, 5, 3)
    assert all(time > 0 for time in timed([line, odd, cube], rounds=3).values())


def test_convs_are_timed_in_int8_without_what_quantises_around_them() -> None:
    shapes = [
        replace(CONV, structure=structure, precision=INT8)
        for structure in (Structure(), Structure(groups=2), Structure(16, 1, 16), Structure(16, 16, 16))
    ]
    shuffled = replace(shapes[1], shuffle=True)
    odd = TimedConv(6, 9, (1, 3), (2, 1), (1, 2), (0, 1, 1, 0), (9, 11), groups=3, precision=INT8)
    line = TimedConv(16, 32, (3,), (2,), (1,), (0, 2), (50,), precision=INT8)
    times = timed([*shapes, shuffled, odd, line, CONV], rounds=9)
    assert len(times) == 8
    assert all(0 < time < 1000 for time in times.values())
    # To quantise its input takes far longer than a conv that reads only every 64th pixel of it.
    wide = TimedConv(4, 4, (1, 1), (1, 1), (1, 1), (0, 0, 0, 0), (256, 256), precision=INT8)
    sparse = replace(wide, stride=(64, 64))
    both = timed([wide, sparse], rounds=9)
    assert both[sparse] < both[wide] / 4


@pytest.mark.parametrize("precision", [FLOAT32, INT8])
def test_a_table_knows_its_model_and_all_candidates(tmp_path: Path, precision: Precision) -> None:
    choices = candidates(net(), SHAPE, replace(GROUPED, precision=precision), group_counts=(4,))
    table = cached_table(net(), choices, cache=tmp_path)
    latencies = look_up(table, net(), choices)
    assert latencies.dense_ms > 0
    assert [len(row) for row in latencies.convs_ms] == [len(options) for options in choices.sites]
    network, *of_float32 = table.networks.values()
    assert latencies.dense_float32_ms == (of_float32 or [network])[0].total_ms
    assert latencies.total((0,) * len(choices.sites)) == pytest.approx(network.total_ms)
    assert network.convs_ms.keys() == {options[0].site.name for options in choices.sites if len(options) > 1}
    assert LatencyTable.loads(table.dumps()) == table

    class Broken(Stopwatch):
        def network(self, sites: Sequence[str], precision: Precision) -> NetworkTime:
            raise AssertionError("measured again")

    broken = Broken(net(), SHAPE)
    assert cached_table(net(), choices, cache=tmp_path, stopwatch=broken) == table
    (file,) = tmp_path.glob("latency-*.json")
    file.write_text("{")
    with pytest.raises(AssertionError, match="measured again"):
        cached_table(net(), choices, cache=tmp_path, stopwatch=broken)


def test_an_interrupted_table_goes_on_where_it_stopped(tmp_path: Path) -> None:
    class Interrupted(Fake):
        left = 3

        def convs(self, shapes: Sequence[TimedConv]) -> Iterator[dict[TimedConv, float]]:
            for shape in shapes:
                if self.left == 0:
                    raise KeyboardInterrupt
                self.left -= 1
                yield {shape: self._time(shape)}

    asked: list[TimedConv] = []

    def note(shape: TimedConv) -> float:
        asked.append(shape)
        return 1.0

    choices = candidates(net(), SHAPE, GROUPED)
    with pytest.raises(KeyboardInterrupt):
        cached_table(net(), choices, cache=tmp_path, stopwatch=Interrupted(note, NetworkTime(100.0, {})))
    assert len(asked) == 3
    whole = cached_table(net(), choices, cache=tmp_path, stopwatch=Fake(note, NetworkTime(1.0, {})))
    assert len(asked) == len(set(asked)) == len(whole.convs) > 3
    look_up(whole, net(), choices)


def test_one_table_holds_both_precisions() -> None:
    float32, int8 = (
        candidates(net(), SHAPE, replace(GROUPED, precision=precision)) for precision in (FLOAT32, INT8)
    )
    fake = Fake(lambda shape: 1.0 if shape.precision == INT8 else 3.0, NetworkTime(100.0, {}))
    table = measure_table(net(), float32, stopwatch=fake)
    with pytest.raises(PlanError, match="does not know this model in int8"):
        look_up(table, net(), int8)
    table = measure_table(net(), int8, table, stopwatch=fake)
    for choices, expected in ((float32, 3.0), (int8, 1.0)):
        found = look_up(table, net(), choices).convs_ms
        assert {time for row in found for time in row} == {0.0, expected}


def test_what_kernels_take_longer_alone_is_told_by_a_network_of_thin_convs(tmp_path: Path) -> None:
    """A machine on which a kernel takes 1 ms longer alone, and thin convs take a quarter of the time."""
    choices = candidates(net(), SHAPE, GROUPED, group_counts=(4,))
    converted = [options[0].site.name for options in choices.sites if len(options) > 1]
    inside = dict.fromkeys(converted, 8.0)
    network = NetworkTime(10 + sum(inside.values()), inside)
    share = (10 + 2 * len(converted)) / network.total_ms
    fake = Fake(lambda shape: 1 + 4 / shape.structure.groups, network, share)
    table = cached_table(net(), choices, cache=tmp_path, stopwatch=fake)
    assert [known.overhead_ms for known in table.networks.values()] == [pytest.approx(1, rel=1e-6)]
    latencies = look_up(table, net(), choices)
    assert latencies.rest_ms == pytest.approx(10)
    thin = tuple(len(options) - 1 for options in choices.sites)
    assert latencies.total(thin) == pytest.approx(share * network.total_ms)
    assert latencies.dense_ms == pytest.approx(network.total_ms)


@pytest.mark.parametrize(
    ("inside", "expected"),
    [(2.0, (2.0, 0.5)), (6.0, (6.0, 1.5)), (None, (4.0, 1.0))],
    ids=["faster in the network", "slower in the network", "not told apart in the network"],
)
def test_convs_take_what_the_dense_ones_take_in_the_network(
    inside: float | None, expected: tuple[float, float]
) -> None:
    choices = candidates(net(), SHAPE, GROUPED, group_counts=(4,))
    number, site = next((n, o[0].site.name) for n, o in enumerate(choices.sites) if len(o) > 1)
    network = NetworkTime(100.0, {} if inside is None else {site: inside})
    fake = Fake(lambda shape: 4 / shape.structure.groups, network)
    latencies = look_up(measure_table(net(), choices, stopwatch=fake), net(), choices)
    assert latencies.convs_ms[number] == expected
    assert latencies.dense_ms == pytest.approx(100)


def test_a_table_of_another_model_or_of_other_options_is_refused() -> None:
    fake = Fake(lambda _: 1.0, NetworkTime(1.0, {}))
    few = candidates(net(), SHAPE, GROUPED, group_counts=(2,))
    table = measure_table(net(), few, stopwatch=fake)
    with pytest.raises(PlanError, match="does not know this model"):
        look_up(table, net(64), candidates(net(64), SHAPE, GROUPED))
    with pytest.raises(PlanError, match=r"has no conv .* structure \(–, 4, –\)"):
        look_up(table, net(), candidates(net(), SHAPE, GROUPED))


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"format": "x"}, "no latency table"),
        ({"schema_version": 2}, "schema version is 2, this groupify reads version 6: make one with"),
        ({"convs": {"a": -1}}, "latency table.convs.a is -1; expected greater than or equal to 0"),
        ({"convs": {"a": 1e9}}, "less than or equal to 10000000"),
        ({"convs": {"a": "fast"}}, "latency table.convs.a is 'fast'; expected a valid number"),
        ({"networks": [1]}, "networks is .*; expected"),
        ({"networks": {"a": 1.0}}, "networks.a is 1.0; expected"),
        (
            {"networks": {"a": {"total_ms": 1, "convs_ms": {}, "overhead_ms": -1}}},
            "networks.a.overhead_ms is -1",
        ),
        ({"networks": {"a": {"total_ms": -1, "convs_ms": {}}}}, "networks.a.total_ms is -1"),
        ({"networks": {"a": {"total_ms": 1, "convs_ms": {"b": "fast"}}}}, "networks.a.convs_ms.b is 'fast'"),
        ({"threads": 0}, "greater than or equal to 1"),
        ({"more": 0}, "unknown key"),
    ],
)
def test_a_file_that_is_no_table_is_refused(tmp_path: Path, changed: dict[str, Any], says: str) -> None:
    path = tmp_path / "table.json"
    path.write_text(json.dumps({**json.loads(LatencyTable("here").dumps()), **changed}))
    with pytest.raises(ArtefactError, match=says):
        LatencyTable.read(path)

"""Graph -> physical plan, deterministically: same graph, same plan.

Forward edges of equal parallelism whose upstream step has one consumer are fused into a **chain**; an instance of a
chain is a subtask. Operator ids are ``name=`` or ``label-ordinal`` in topological order; state is mapped by them on
restore. A chain is named by its first operator, so a source's chain id is its operator id.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rayflow.core.ids import ChannelId, SubtaskId
from rayflow.core.keygroups import check_parallelism
from rayflow.core.topology import Topology
from rayflow.errors import PlanError
from rayflow.graph import FORWARD, MAIN_TAG, Exchange, Input, Node, topological

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True, slots=True)
class PlannedOperator:
    """One operator of a chain."""

    id: str
    title: str
    factory: Any
    detail: str = ""
    location: str = ""
    schema: pa.Schema | None = None
    """Schema of the rows it takes, where planning could tell."""

    @property
    def stateful(self) -> bool:
        return bool(self.factory.stateful)

    @property
    def is_sink(self) -> bool:
        return hasattr(self.factory, "committer")


@dataclass(frozen=True, slots=True)
class PlannedSource:
    id: str
    title: str
    source: Any
    event_time: Any = None
    detail: str = ""
    location: str = ""


@dataclass(frozen=True, slots=True)
class Chain:
    """Operators that run in one subtask, connected by calls. ``source`` stands in front of them, if there is one."""

    id: str
    parallelism: int
    source: PlannedSource | None
    operators: tuple[PlannedOperator, ...]

    @property
    def title(self) -> str:
        titles = ([self.source.title] if self.source else []) + [o.title for o in self.operators]
        return " -> ".join(titles)


@dataclass(frozen=True, slots=True)
class Edge:
    """From the ``tag`` output of the last operator of one chain to input ``input_index`` of the first of another."""

    index: int
    source: str
    tag: str
    target: str
    input_index: int
    exchange: Exchange


@dataclass(frozen=True, slots=True)
class Plan:
    name: str
    chains: tuple[Chain, ...]
    edges: tuple[Edge, ...]
    max_parallelism: int
    allow_dropped: frozenset[str] = frozenset()
    """See `Topology.allow_dropped`: the user named them when the job was started."""

    def chain(self, chain_id: str) -> Chain:
        return next(c for c in self.chains if c.id == chain_id)

    def edges_from(self, chain_id: str) -> tuple[Edge, ...]:
        return tuple(e for e in self.edges if e.source == chain_id)

    def edges_to(self, chain_id: str) -> tuple[Edge, ...]:
        return tuple(e for e in self.edges if e.target == chain_id)

    def sources(self) -> dict[str, PlannedSource]:
        return {c.id: c.source for c in self.chains if c.source is not None}

    def sinks(self) -> dict[str, PlannedOperator]:
        return {o.id: o for c in self.chains for o in c.operators if o.is_sink}

    def operators(self) -> dict[str, PlannedOperator]:
        return {o.id: o for c in self.chains for o in c.operators}

    def channels(self, edge: Edge) -> list[ChannelId]:
        """Every channel of the edge."""
        upstream, downstream = self.chain(edge.source), self.chain(edge.target)
        pairs = (
            ((i, i) for i in range(upstream.parallelism))
            if edge.exchange.kind == "forward"
            else ((i, j) for i in range(upstream.parallelism) for j in range(downstream.parallelism))
        )
        return [ChannelId(edge.index, SubtaskId(edge.source, i), SubtaskId(edge.target, j)) for i, j in pairs]

    def topology(self) -> Topology:
        """What the core needs to know."""
        return Topology(
            subtasks=tuple(SubtaskId(c.id, i) for c in self.chains for i in range(c.parallelism)),
            sources=frozenset(self.sources()),
            channels=tuple(channel for edge in self.edges for channel in self.channels(edge)),
            parallelism={c.id: c.parallelism for c in self.chains},
            max_parallelism=self.max_parallelism,
            operators_of={c.id: tuple(o.id for o in c.operators) for c in self.chains},
            keyed_operators=frozenset(
                o.id for c in self.chains for o in c.operators if o.stateful and bool(getattr(o.factory, "keys", ()))
            ),
            allow_dropped=self.allow_dropped,
            endless=frozenset(name for name, s in self.sources().items() if s.source.in_turns and not s.source.bounded),
            in_turns=frozenset(name for name, s in self.sources().items() if s.source.in_turns),
            discovering={
                name: interval
                for name, s in self.sources().items()
                if (interval := s.source.discovery_interval_s) is not None
            },
            whole=frozenset(o.id for o in self.sinks().values() if getattr(o.factory.committer(), "whole", False)),
            aligned=frozenset(
                name
                for name, s in self.sources().items()
                if s.event_time is not None and s.event_time.max_drift_us is not None
            ),
        )


def build_plan(name: str, sinks: Sequence[Node], *, parallelism: int, max_parallelism: int, look: bool = True) -> Plan:
    """The physical plan. With ``look`` sources may look into their input, so that all schemas are checked.

    Raises `PlanError` in one sentence naming the step.
    """
    check_parallelism(parallelism, max_parallelism)
    nodes = topological(sinks)
    _check_outputs(nodes)
    for node in nodes:
        node.schema(look=look)
    nodes = topological(_with_combiners(sinks, nodes))
    ids = _operator_ids(nodes)
    consumers: dict[int, list[tuple[Node, int, Input]]] = defaultdict(list)
    for node in nodes:
        for index, each in enumerate(node.inputs):
            consumers[id(each.node)].append((node, index, each))
    degree = {id(n): _parallelism(n, parallelism, max_parallelism) for n in nodes}
    _check_reading_order(nodes, degree)

    def fused_into(node: Node) -> Node | None:
        """The upstream node whose chain this node continues."""
        if len(node.inputs) != 1:
            return None
        up = node.inputs[0]
        alone = len(consumers[id(up.node)]) == 1
        same = degree[id(up.node)] == degree[id(node)]
        return up.node if alone and same and up.exchange.kind == "forward" and up.tag == MAIN_TAG else None

    members: dict[int, list[Node]] = {}
    head_of: dict[int, Node] = {}
    for node in nodes:
        up = fused_into(node)
        head = head_of[id(up)] if up is not None else node
        head_of[id(node)] = head
        members.setdefault(id(head), []).append(node)
    chains = tuple(_chain(group, ids, degree[id(group[0])], look) for group in members.values())
    edges: list[Edge] = []
    for node in nodes:
        if head_of[id(node)] is not node:
            continue
        for index, each in enumerate(node.inputs):
            exchange = each.exchange
            if exchange.kind == "forward" and degree[id(each.node)] != degree[id(node)]:
                exchange = Exchange("rebalance")
            source = ids[id(head_of[id(each.node)])]
            edges.append(Edge(len(edges), source, each.tag, ids[id(node)], index, exchange))
    return Plan(name, chains, tuple(edges), max_parallelism)


def _check_outputs(nodes: Sequence[Node]) -> None:
    """Recovery removes from a place what its checkpoint does not name, so two sinks there would delete each other's."""
    writers: dict[str, Node] = {}
    for node in nodes:
        path = getattr(node.operator, "path", None) if node.is_sink else None
        if path is None:
            continue
        url = str(path)
        place = url.replace("s3a://", "s3://", 1) if "://" in url else os.path.realpath(url)
        other = writers.setdefault(place, node)
        if other is not node:
            raise PlanError(
                f"{node.where()} writes to {str(path)!r}, where {other.where()} writes already; give each sink a "
                "place of its own, or union the streams before one sink"
            )


def _check_reading_order(nodes: Sequence[Node], degree: Mapping[int, int]) -> None:
    """A bound on lateness speaks of rows in reading order: where streams were mixed on the way, on-time rows would be
    dropped as late, more or fewer with every parallelism and schedule. Watermarks that were made before are no problem:
    they are kept apart by channel (rule W2)."""
    for node in nodes:
        if not getattr(node.operator, "needs_order", False):
            continue
        below = node
        while below.inputs and not getattr(below.operator, "restores_order", False):
            up = below.inputs[0]
            passed_on = up.exchange.kind == "forward" and degree[id(up.node)] == degree[id(below)]
            mixed = len(below.inputs) > 1 or up.tag != MAIN_TAG or not (passed_on or up.node.parallelism == 1)
            if mixed or getattr(below.operator, "loses_order", False):
                raise PlanError(
                    f"{node.where()} has a max_delay, which speaks of rows in reading order, but {below.where()} mixes "
                    "the rows of several subtasks or streams; give the event time before that step (event_time= of the "
                    "source, or with_event_time there), or leave max_delay out"
                )
            below = up.node


def _parallelism(node: Node, default: int, max_parallelism: int) -> int:
    wanted = node.parallelism if node.parallelism is not None else default
    check_parallelism(wanted, max_parallelism)
    return wanted


def _chain(group: Sequence[Node], ids: Mapping[int, str], parallelism: int, look: bool) -> Chain:
    head, source = group[0], None
    event_time, factories = _event_time_at_source(group, {id(n): _with_schemas(n, look) for n in group})
    if head.source is not None:
        source = PlannedSource(ids[id(head)], head.title, head.source, event_time, head.detail, head.location)
    operators = tuple(
        PlannedOperator(ids[id(n)], n.title, factories[id(n)], n.detail, n.location, n.input_schema())
        for n in group
        if n.source is None
    )
    return Chain(ids[id(head)], parallelism, source, operators)


def _event_time_at_source(group: Sequence[Node], factories: dict[int, Any]) -> tuple[Any, dict[int, Any]]:
    """(the event time of the source of a chain, the operators by node): event time that is taken right behind a source
    is taken by it, because only there splits can be told apart."""
    event_time = group[0].event_time
    if group[0].source is not None and len(group) > 1 and hasattr(group[1].operator, "at_source"):
        taken = group[1].operator.at_source()
        if taken is not None:
            event_time, factories = taken[0], {**factories, id(group[1]): taken[1]}
    for node in group:
        if getattr(factories[id(node)], "needs_source", False):
            raise PlanError(
                f"{node.where()} has a max_drift, which speaks of the splits of a source, but it does not stand right "
                "behind one, with the same parallelism; move it there, or leave max_drift out"
            )
    return event_time, factories


def _with_schemas(node: Node, look: bool) -> Any:
    """The operator; one that must know the columns of all its inputs is told them, once sources have been looked at."""
    if not look or not hasattr(node.operator, "with_input_schemas"):
        return node.operator
    try:
        return node.operator.with_input_schemas(node.input_schemas(look=False))
    except PlanError as error:
        raise PlanError(f"{node.where()}: {error}") from error


def _operator_ids(nodes: Sequence[Node]) -> dict[int, str]:
    names = Counter(n.name for n in nodes if n.name is not None)
    for name, times in names.items():
        if times > 1:
            raise PlanError(f"name={name!r} is given to {times} steps; give each step a name of its own")
    ordinals: Counter[str] = Counter()
    ids: dict[int, str] = {}
    for node in nodes:
        if node.name is not None:
            ids[id(node)] = node.name
            continue
        ordinals[node.label] += 1
        ids[id(node)] = f"{node.label}-{ordinals[node.label]}"
        if ids[id(node)] in names:
            raise PlanError(f"name={ids[id(node)]!r} is also the automatic id of {node.where()}; choose another name")
    return ids


def _with_combiners(sinks: Sequence[Node], nodes: Sequence[Node]) -> list[Node]:
    """The same graph with combiners in front of hash exchanges, where only the main output of the step is used."""
    tags: dict[int, set[str]] = defaultdict(set)
    for node in nodes:
        for each in node.inputs:
            tags[id(each.node)].add(each.tag)
    new: dict[int, Node] = {}
    for node in nodes:
        inputs = tuple(replace(i, node=new[id(i.node)]) for i in node.inputs)
        if node.combiner is not None and tags[id(node)] <= {MAIN_TAG}:
            (only,) = inputs
            combine = Node(
                "combine",
                (replace(only, exchange=FORWARD),),
                node.combiner,
                detail=node.detail,
                name=f"{node.name}-combine" if node.name else None,
                parallelism=only.node.parallelism,
                location=node.location,
            )
            inputs = (Input(combine, only.exchange),)
            new[id(node)] = replace(node, inputs=inputs, operator=node.combined)
        else:
            new[id(node)] = replace(node, inputs=inputs)
    return [new[id(s)] for s in sinks]

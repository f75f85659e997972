"""Who goes first: the sites of several invokes in one order, in which every edit comes in time.

Each invoke's sites fire in the order of its own forward; an edit may wait for values of another
one. `passes` orders whole forwards, and puts together those that need each other: they take turns
(`weave`). `first_free` is the rule of turns, and `check_turns` plays it through without a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from weft.errors import LateEditError
from weft.graph.node import Graph
from weft.graph.site import RESULT, Site

from .plan import plan as plan_of
from .steps import Plan, SitePlan, Step, line_of


def blocker(plan: Plan, waits: list[int], there: SitePlan) -> int | None:
    """A step at another site for which an edit of this one waits; None where it can fire now."""
    own, seen = set(there.steps), set[int]()
    todo = list(there.effects)
    while todo:
        index = todo.pop()
        if index in seen:
            continue
        seen.add(index)
        step = _step(plan, index)
        if _is_at_site(step) and index not in own:
            return index
        todo += [before for before in step.deps if waits[before]]
    return None


def first_free(plan: Plan, waits: list[int], heads: Iterable[Site]) -> Site | None:
    """The first of these sites that can fire now."""
    for site in heads:
        if blocker(plan, waits, plan.sites[site]) is None:
            return site
    return None


def passes(plan: Plan) -> list[list[int]]:
    """The invokes that have sites, in an order in which nobody waits.

    Those that need each other stand in one list.
    """
    needs = _needs(plan)
    return _components(needs)


def levels(plan: Plan) -> list[list[list[int]]]:
    """The groups of `passes`, level by level: a group needs values of lower levels alone."""
    needs = _needs(plan)
    level: dict[int, int] = {}
    found: list[list[list[int]]] = []
    for group in _components(needs):
        below = {other for one in group for other in needs[one]}.difference(group)
        mine = 1 + max([level[other] for other in below], default=-1)
        level.update(dict.fromkeys(group, mine))
        found += [[] for _ in range(mine + 1 - len(found))]
        found[mine].append(group)
    return found


def check_turns(graph: Graph, order: Callable[[Site], int]) -> None:
    """Raises `LateEditError`, with both lines, where the edits of invokes wait for each other."""
    plan = plan_of(graph)
    if not any(_needs(plan).values()):
        return
    waits = plan.waits.copy()
    ready = [step.index for step in plan.steps if step is not None and not step.waits]
    _finish(plan, waits, ready)
    queues = queues_of(plan.sites, order)
    while queues:
        site = next_turn(graph, plan, waits, queues)
        for index in plan.sites[site].steps:
            waits[index] -= 1
        _finish(plan, waits, [index for index in plan.sites[site].steps if not waits[index]])


def queues_of(sites: Iterable[Site], order: Callable[[Site], int]) -> dict[int, list[Site]]:
    """The sites of each invoke in firing order, the next one last."""
    queues: dict[int, list[Site]] = {}
    for site in sorted(sites, key=lambda s: (s.invoke, s.port != RESULT, -s.step, -order(s))):
        queues.setdefault(site.invoke, []).append(site)
    return queues


def next_turn(graph: Graph, plan: Plan, waits: list[int], queues: dict[int, list[Site]]) -> Site:
    """Takes the next site out of the queues. Raises `LateEditError` where none can fire."""
    heads = [queue[-1] for queue in queues.values()]
    site = first_free(plan, waits, heads)
    if site is None:
        raise _circle(graph, plan, waits, {head.invoke: head for head in heads})
    queue = queues[site.invoke]
    queue.pop()
    if not queue:
        del queues[site.invoke]
    return site


def _circle(graph: Graph, plan: Plan, waits: list[int], heads: Mapping[int, Site]) -> LateEditError:
    """The error where each invoke stands before an edit that needs another one."""
    edits = {invoke: _waiting(plan, waits, plan.sites[head]) for invoke, head in heads.items()}
    invoke, seen = next(iter(edits)), set[int]()
    while invoke not in seen and invoke in edits:
        seen.add(invoke)
        effect, needed = edits[invoke]
        invoke = _step(plan, needed).node.site.invoke
    effect, needed = edits.get(invoke, (effect, needed))
    edit, need = _step(plan, effect).node, _step(plan, needed).node
    other, _ = edits.get(need.site.invoke, (needed, needed))
    if other == effect:
        why, line = "which comes only later", line_of(graph, need)
    else:
        node = _step(plan, other).node
        why = f"which comes after the edit of {node.site}, and that waits in turn"
        line = line_of(graph, node)
    return LateEditError(
        f"the edit of {edit.site} needs {need.site}, {why}\n  the other line: {line}",
        line=line_of(graph, edit),
        fix="no order of the invokes gives both: let one of the edits need an earlier site, or "
        "save the value in a block of its own",
    )


def _waiting(plan: Plan, waits: list[int], there: SitePlan) -> tuple[int, int]:
    """The edit of a site that waits, and the step at another site that it waits for."""
    for effect in there.effects:
        one = SitePlan()
        one.steps, one.effects = there.steps, [effect]
        needed = blocker(plan, waits, one)
        if needed is not None:
            return effect, needed
    raise AssertionError("nobody waits here")


def _finish(plan: Plan, waits: list[int], ready: list[int]) -> None:
    """Counts these steps, and all that then wait for nothing, as done."""
    while ready:
        step = _step(plan, ready.pop())
        for kid in (*step.kids, *step.arrivals):
            waits[kid] -= 1
            if not waits[kid]:
                ready.append(kid)


def _is_at_site(step: Step) -> bool:
    return step.waits > len(step.deps)


def _step(plan: Plan, index: int) -> Step:
    found = plan.steps[index]
    assert found is not None  # only live steps are waited for
    return found


# -- whole forwards ------------------------------------------------------------------------------


def _needs(plan: Plan) -> dict[int, set[int]]:
    """For each invoke the others whose values its edits need."""
    needs: dict[int, set[int]] = {site.invoke: set() for site in plan.sites}
    touched: dict[int, int] = {}  # step -> bits of the invokes that it depends on
    effects = {index for there in plan.sites.values() for index in there.effects}
    for step in plan.steps:
        if step is None:
            continue
        bits = 0
        for before in step.deps:
            bits |= touched[before]
        if _is_at_site(step):
            invoke = step.node.site.invoke
            if step.index in effects:
                needs[invoke] |= {n for n in needs if bits >> n & 1 and n != invoke}
            bits |= 1 << invoke
        touched[step.index] = bits
    return needs


def reaches(
    plan: Plan, order: Callable[[Site], int], known: set[int]
) -> dict[int, dict[int, bool]]:
    """For each invoke the others whose values its edits need, and whether they come in step: at an
    earlier site, or at the same. `known` are the invokes whose sites `order` can tell."""
    needs: dict[int, dict[int, bool]] = {site.invoke: {} for site in plan.sites}
    last: dict[int, dict[int, int]] = {}  # step -> of each invoke the last site it depends on
    effects = {index for there in plan.sites.values() for index in there.effects}
    when = {site: order(site) if site.invoke in known else -1 for site in plan.sites}
    for step in plan.steps:
        if step is None:
            continue
        found: dict[int, int] = {}
        for before in step.deps:
            for invoke, place in last[before].items():
                found[invoke] = max(found.get(invoke, -1), place)
        if _is_at_site(step):
            site = step.node.site
            if step.index in effects:
                for invoke, place in found.items():
                    if invoke != site.invoke:
                        mine = needs[site.invoke]
                        mine[invoke] = mine.get(invoke, True) and place <= when[site]
            found[site.invoke] = max(found.get(site.invoke, -1), when[site])
        last[step.index] = found
    return needs


def _components(needs: Mapping[int, set[int]]) -> list[list[int]]:
    """Groups that need each other, those first that are needed (Tarjan)."""
    order: dict[int, int] = {}
    low: dict[int, int] = {}
    stack: list[int] = []
    found: list[list[int]] = []

    def visit(one: int) -> None:
        order[one] = low[one] = len(order)
        stack.append(one)
        for other in sorted(needs[one]):
            if other not in order:
                visit(other)
                low[one] = min(low[one], low[other])
            elif other in stack:
                low[one] = min(low[one], order[other])
        if low[one] == order[one]:
            place = stack.index(one)
            found.append(sorted(stack[place:]))
            del stack[place:]

    for one in sorted(needs):
        if one not in order:
            visit(one)
    return found

"""Compares two records, and says in words what differs."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

EXAMPLES = 3


def compare(before: dict[str, Any], after: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Return (differences, remarks); only what both records were asked for is compared."""
    differences, remarks = [], []
    both = _selected(before, after), _selected(after, before)
    _compare_calls(before, after, *both, differences)
    launches = sum(map(len, both[1].values()))
    remarks.append(f"compared {len(both[1])} calls with {launches} launches")
    if before["compiled"] and after["compiled"]:
        if before["triton"] != after["triton"]:
            differences.append(f"compiled with Triton {before['triton']} and {after['triton']}: not comparable")
        else:
            _compare_code(before, after, differences, remarks)
    return differences, remarks


def _selected(record: dict[str, Any], other: dict[str, Any]) -> dict[str, list[dict]]:
    """Return the launches of each call of `record` that `other` was asked for too."""
    found = {}
    selections = record["selection"], other["selection"]
    for name, numbers in record["calls"].items():
        place = dict(zip(("frameworks", "targets", "cases"), name.split(" | "), strict=False))
        if all(value in selection[kind] for selection in selections for kind, value in place.items()):
            launches = [record["launches"][number] for number in numbers]
            found[name] = [x for x in launches if all(_kernel_selected(x["kernel"], s) for s in selections)]
    return found


def _kernel_selected(kernel: str, selection: dict[str, Any]) -> bool:
    return not selection["kernels"] or kernel in selection["kernels"]


def _compare_calls(before, after, calls_before, calls_after, differences: list[str]) -> None:
    seen = defaultdict(list)
    for name in calls_before.keys() | calls_after.keys():
        if name not in calls_before or name not in calls_after:
            seen[f"recorded only {'before' if name in calls_before else 'after'}"].append(name)
            continue
        for difference in _differing_launches(calls_before[name], calls_after[name]):
            seen[difference].append(name)
    differences += [_with_examples(*item) for item in sorted(seen.items())]


def _differing_launches(before: list[dict], after: list[dict]) -> Iterator[str]:
    if [x["kernel"] for x in before] != [x["kernel"] for x in after]:
        yield f"launches: {_sequence(before)} -> {_sequence(after)}"
        return
    for old, new in zip(before, after, strict=True):
        for field in old.keys() | new.keys():
            if old.get(field) != new.get(field):
                yield f"{old['kernel']}: {_changed(field, old.get(field), new.get(field))}"


def _sequence(launches: list[dict]) -> str:
    """Return the kernels in their order, repeated ones counted."""
    names: list[list] = []
    for launch in launches:
        if names and names[-1][0] == launch["kernel"]:
            names[-1][1] += 1
        else:
            names.append([launch["kernel"], 1])
    return ", ".join(name if count == 1 else f"{count} {name}" for name, count in names) or "none"


def _changed(field: str, old: Any, new: Any) -> str:
    """Return how the value of a field has changed: of a table or a list of pairs only the entries that did."""
    old_entries, new_entries = _entries(old), _entries(new)
    if old_entries is None or new_entries is None:
        return f"{field} {old!r} -> {new!r}"
    names = [*old_entries, *(name for name in new_entries if name not in old_entries)]
    changes = [
        f"{name} {old_entries.get(name, 'absent')!r} -> {new_entries.get(name, 'absent')!r}"
        for name in names
        if old_entries.get(name, "absent") != new_entries.get(name, "absent")
    ]
    return f"{field}: {', '.join(changes) or f'order {list(old_entries)} -> {list(new_entries)}'}"


def _entries(value: Any) -> dict | None:
    if isinstance(value, dict):
        return value
    if isinstance(value, list) and all(isinstance(x, list) for x in value):
        return {name: rest[0] if len(rest) == 1 else rest for name, *rest in value}
    return None


def _with_examples(difference: str, names: list[str]) -> str:
    names = sorted(set(names))
    more = f" and {len(names) - EXAMPLES} more" if len(names) > EXAMPLES else ""
    return f"{difference}\n    in {'; '.join(names[:EXAMPLES])}{more}"


def _compare_code(before, after, differences: list[str], remarks: list[str]) -> None:
    selections = before["selection"], after["selection"]
    old, new = (
        {name: x for name, x in record["compiled"].items() if all(_kernel_selected(x["kernel"], s) for s in selections)}
        for record in (before, after)
    )
    seen = defaultdict(list)
    both = sorted(old.keys() & new.keys())
    moved = 0
    for name in both:
        changes = _changed_code(old[name], new[name])
        moved += not changes and old[name]["ptx"] != new[name]["ptx"]
        for change in changes:
            seen[f"{new[name]['kernel']} for {new[name]['target']}: {change}"].append(_describe(new[name]))
    if all(selections[0][kind] == selections[1][kind] for kind in ("frameworks", "targets", "cases")):
        for name in old.keys() ^ new.keys():
            made, when = (old[name], "before") if name in old else (new[name], "after")
            seen[f"{made['kernel']} for {made['target']}: compiled only {when}"].append(_describe(made))
    differences += [_with_all(*item) for item in sorted(seen.items())]
    if not both:
        differences.append("no kernel was compiled in both: record them with the same cases and targets")
    portable = sum(not new[name]["gluon"] for name in both)
    remarks.append(f"compared the PTX of {portable} portable kernels, and the instructions of {len(both) - portable}")
    if moved:
        remarks.append(f"of these {moved} have the same instructions in another order, or with other registers")


def _changed_code(old: dict, new: dict) -> list[str]:
    """Return what differs: of a portable kernel the text counts, of a Gluon kernel the number of each instruction."""
    changes = [
        f"{name} {old[name]} -> {new[name]}"
        for name in ("gluon", "shared_memory", "warps", "scratch")
        if old[name] != new[name]
    ]
    names = sorted(old["opcodes"].keys() | new["opcodes"].keys())
    counts = {name: new["opcodes"].get(name, 0) - old["opcodes"].get(name, 0) for name in names}
    instructions = [f"{count:+} {name}" for name, count in counts.items() if count]
    lines = new["lines"] - old["lines"]
    if lines or instructions:
        changes.append(f"{lines:+} lines of PTX: {', '.join(instructions) or 'none of them instructions'}")
    elif not new["gluon"] and old["ptx"] != new["ptx"]:
        changes.append("other PTX with the same instructions")
    return changes


def _with_all(difference: str, descriptions: list[str]) -> str:
    """Return how often a difference was seen, and one example in full."""
    return f"{difference}\n    {len(descriptions)} times, first with {min(descriptions)}"


def _describe(made: dict[str, Any]) -> str:
    constexprs = ", ".join(f"{name}={value}" for name, value in made["constexprs"].items())
    return f"{' '.join(made['types'])}; {constexprs}; num_warps={made['num_warps']}, num_stages={made['num_stages']}"

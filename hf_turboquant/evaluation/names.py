"""Names of the compared caches for tables and plots: what several share is said once, as the head above them."""

from dataclasses import dataclass

from .caches import label

# what changes from line to line; caches that share every other option stand under one head
_COMPARED = {"cache", "nbits", "key_bits", "value_bits", "key_estimator", "value_estimator", "sketch", "condition"}
# the line of caches that differ in nothing but bits
BY_BITS = "by bits"
# what people say for options that are often given
_WORDS = {"condition": "{}", "residual_length": "window {}", "sink_length": "{} sinks"}
_CONDITIONS = {"none": "plain", "center": "centred", "attention": "conditioned"}


@dataclass(frozen=True)
class Name:
    """
    Args:
        head (`str`): what the caches of a group share; empty where `row` says it all.
        row (`str`): what tells this cache from the others of its group.
        line (`str`): `row` without bits; caches of one head and line differ in bits alone.
        bits (`tuple[str, ...]`): the bits that `line` leaves out.
        method (`str`): kind and estimator, of all that is said the part that matters most.
        setting (`str`): all of `head` and `line` but the method.
    """

    head: str
    row: str
    line: str
    bits: tuple
    method: str
    setting: str


def names(caches: list[dict]) -> list[Name]:
    """A [`Name`] for each of the caches, in their order. What identifies a result is [`caches.label`], not these."""
    groups: dict[tuple, list[dict]] = {}
    for options in caches:
        groups.setdefault(_group(options), []).append(options)
    heads = {group: _shared(members) for group, members in groups.items()}
    # the kind alone heads a group where others have more to say
    some = any(shared - {"cache", "nbits", "key_estimator"} for shared in heads.values())
    found = []
    for options in caches:
        group = _group(options)
        found.append(_name({"cache": "turboquant", **options}, heads[group], some and len(groups[group]) > 1))
    return found


def arranged(caches: list[dict]) -> list[tuple[str, list[tuple[Name, str]]]]:
    """Heads, and the names and labels of the caches below each of them; groups in the order of their first cache."""
    sections: dict[str, list] = {}
    for name, options in zip(names(caches), caches, strict=True):
        sections.setdefault(name.head, []).append((name, label(options)))
    return list(sections.items())


def _group(options: dict) -> tuple:
    # keys alone and values alone are two comparisons, though both give bits for both
    own = "key_estimator", "sketch", "condition"
    return options.get("cache", "turboquant"), frozenset(options) - {"cache", *own}


def _shared(group: list[dict]) -> set[str]:
    """Names of the options that have one value in all of a group, the kind among them."""
    first = group[0]
    return {"cache", *(name for name in first if all(name in o and o[name] == first[name] for o in group))}


def _name(options: dict, shared: set[str], headed: bool) -> Name:
    own = set(options) - (shared if headed else set())
    bits = {"nbits", "key_bits", "value_bits"} & own - (set() if headed else shared & {"key_bits", "value_bits"})
    of_values = "value_estimator" in set(options) - shared
    method = [options["cache"], options.get("value_estimator" if of_values else "key_estimator", "")]
    if not of_values and options.get("sketch", "orthogonal") != "orthogonal":
        method.append(options["sketch"])
    head = _say(options, shared) if headed else ""
    said = {"cache", "sketch", "value_estimator" if of_values else "key_estimator"}
    return Name(
        head=head,
        row=_say(options, own),
        line=_say(options, own - bits) or BY_BITS,
        bits=tuple(options[name] for name in sorted(bits)),
        method=" ".join(word for word in method if word),
        setting=f"{head}; {_say(options, own - bits - said)}",
    )


def _say(options: dict, chosen: set[str]) -> str:
    """The chosen options in words: `"turboquant 4 bits qjl, condition none, window 32"`."""

    def words(first: str, *names: str) -> str:
        found = [f"{options[n]} bits" if n.endswith("bits") else str(options[n]) for n in names if n in chosen]
        return " ".join([first] * bool(first and found) + found)

    kind = options["cache"] if "cache" in chosen else ""
    apart = "key_bits" in options
    of_keys = "key_bits", "key_estimator", "sketch"
    first = " ".join(word for word in (kind, words("", "nbits"), "" if apart else words("", *of_keys)) if word)
    parts = [first, words("keys", *of_keys) if apart else "", words("values", "value_bits", "value_estimator")]
    parts += [
        _WORDS.get(name, f"{name} {{}}").format(_CONDITIONS.get(value, value) if name == "condition" else value)
        for name, value in options.items()
        if name in chosen and (name not in _COMPARED or name == "condition")
    ]
    return ", ".join(part for part in parts if part)

"""Plans: what is worked out once for launches on the same buffers, so that a step of decoding takes the host little."""


class Plan:
    """
    What launches on the same buffers have in common; keeps the buffers alive, whose addresses it may have.

    Args:
        states (`LayerStates`): of the layer.
    """

    def __init__(self, states):
        self.quantizers, self.exact = states.quantizers, states.exact
        self.key_codes, self.value_codes = states.codes["keys"].tensors, states.codes["values"].tensors

    def fits(self, states) -> bool:
        """Whether these are the same buffers."""
        codes = states.codes
        return (
            self.exact is states.exact
            and self.key_codes is codes["keys"].tensors
            and self.value_codes is codes["values"].tensors
            and self.quantizers is states.quantizers
        )


class Plans(dict):
    """The plans of one layer by kind of call. Copies begin empty: addresses are those of the original."""

    def find(self, key: tuple, states) -> Plan | None:
        """The plan for these buffers, if there is one."""
        plan = self.get(key)
        return plan if plan is not None and plan.fits(states) else None

    def keep(self, key: tuple, plan: Plan, states) -> None:
        """Keeps a new plan, and none that would keep other buffers alive."""
        for stale in [name for name, held in self.items() if not held.fits(states)]:
            del self[stale]
        self[key] = plan

    def __deepcopy__(self, memo) -> "Plans":
        return Plans()

    def __reduce__(self):
        return Plans, ()

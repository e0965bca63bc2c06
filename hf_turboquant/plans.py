"""Plans: prepared once for launches on the same buffers, so that a decode step costs little time on the host."""

from .quantizer import ROLES
from .states import LayerStates


class Plan:
    """What launches on the buffers of some states share. Keeps those alive, because it holds their addresses."""

    def __init__(self, states: LayerStates):
        self.quantizers, self.exact = states.quantizers, states.exact
        self.key_codes, self.value_codes = (states.codes[role].tensors for role in ROLES)

    def fits(self, states: LayerStates) -> bool:
        """Whether these states have the same buffers: one that changes a tensor makes a new dict of them."""
        codes = states.codes
        return (
            self.exact is states.exact
            and self.key_codes is codes["keys"].tensors
            and self.value_codes is codes["values"].tensors
            and self.quantizers is states.quantizers
        )


class Plans(dict):
    """The plans of one layer by kind of call. Copies begin empty: a plan may hold addresses of the original."""

    def keep(self, key: tuple | str, plan: Plan, states: LayerStates) -> None:
        """Keeps a new plan, and drops those that would keep other buffers alive."""
        for stale in [name for name, held in self.items() if not held.fits(states)]:
            del self[stale]
        self[key] = plan

    def __reduce__(self):
        return Plans, ()

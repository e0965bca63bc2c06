"""Plans: prepared once for launches on the same buffers, so that a decode step costs little time on the host."""

from .states import LayerStates


class Plans(dict):
    """The plans of one layer by kind of call. Copies begin empty: a plan may hold addresses of the original."""

    def find(self, key: tuple, states: LayerStates):
        """Returns the plan for these buffers, if there is one."""
        plan = self.get(key)
        return plan if plan is not None and plan.fits(states) else None

    def keep(self, key: tuple, plan, states: LayerStates) -> None:
        """Keeps a new plan, and drops those that would keep other buffers alive."""
        for stale in [name for name, held in self.items() if not held.fits(states)]:
            del self[stale]
        self[key] = plan

    def __reduce__(self):
        return Plans, ()

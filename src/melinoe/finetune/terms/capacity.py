"""How many experts the imagined cache of each layer holds, now and in the end."""

from collections.abc import Sequence

from melinoe.config import FinetuneSettings, experts_in_share
from melinoe.errors import TrainingError
from melinoe.moe.routing import Router


class ImaginedCaches:
    """
    The sizes of a run's imagined caches.

    Args:
        routers: Of the model.
        settings: ``capacity``, ``layer_capacity`` and ``capacity_curriculum`` decide.

    Attributes:
        progress: Share of the run that is done, in [0, 1]; may be changed.

    Raises:
        TrainingError: a cache smaller than what one token needs, or shares for another number of
            layers than the model has.
    """

    def __init__(self, routers: Sequence[Router], settings: FinetuneSettings) -> None:
        self.settings, self.progress = settings, 0.0
        self.place = {router.index: place for place, router in enumerate(routers)}
        for name in ("layer_capacity", "layer_weight"):
            values = getattr(settings, name)
            if values is not None and len(values) != len(routers):
                raise TrainingError(
                    f"{name} has {len(values)} values but the model has {len(routers)} MoE layers; "
                    "give one for each"
                )
        for router in routers:
            if router.top_k is not None:
                self._check(router, int(router.top_k))

    def capacity_of(self, router: Router, top_k: int | None = None) -> float:
        """
        Experts that the imagined cache of a layer holds at this point of the run.

        Raises:
            TrainingError: fewer than *top_k*.
        """
        if top_k is not None:
            self._check(router, top_k)
        final = self.final(router)
        curriculum = self.settings.capacity_curriculum
        if self.progress >= curriculum:
            return final
        return router.num_experts + (final - router.num_experts) * self.progress / curriculum

    def final(self, router: Router) -> int:
        """Experts that it holds in the end."""
        return experts_in_share(self._share(router), router.num_experts)

    def _share(self, router: Router) -> float:
        each = self.settings.layer_capacity
        return self.settings.capacity if each is None else each[self.place[router.index]]

    def _check(self, router: Router, top_k: int) -> None:
        if self.final(router) < top_k:
            raise TrainingError(
                f"a capacity of {self._share(router)} is {self.final(router)} of "
                f"{router.num_experts} experts, fewer than the {top_k} that each token uses; "
                f"raise it to {top_k / router.num_experts:.3g} or more"
            )

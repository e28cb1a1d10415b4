# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""The routing of any sparse model: recorded, balanced, checked and drawn.

- routed_layers.py: where the experts of a model are; scoring.py: how its routers choose;
- record.py: hooks that hand each forward pass to readers; kinds.py: text, image, video, padding;
- load.py: counts and figures; trace.py: the choice of every token;
- balancing.py: selection biases; selection_loads.py: their counts;
- finite_checks.py: NaN in router logits; finite_flags.py: their flags;
- watch.py: counts and flags of a VLMoE that trains in any loop;
- inspection/: a page about the routing of a dataset.
"""

from typing import TYPE_CHECKING

from ..hub.lazy_names import lazy_names

if TYPE_CHECKING:
    from .balancing import RouterBiasCallback as RouterBiasCallback
    from .balancing import update_router_bias as update_router_bias
    from .finite_checks import StopOnNonFiniteRouting as StopOnNonFiniteRouting
    from .finite_checks import check_routing as check_routing
    from .inspection.inspect import inspect_routing as inspect_routing
    from .load import ExpertLoad as ExpertLoad
    from .load import record_expert_load as record_expert_load
    from .record import Listener as Listener
    from .record import Reader as Reader
    from .record import Routing as Routing
    from .routed_layers import RoutedLayer as RoutedLayer
    from .routed_layers import selection_bias as selection_bias
    from .selection_loads import SelectionLoads as SelectionLoads
    from .trace import RoutingTrace as RoutingTrace
    from .trace import TokenRouting as TokenRouting
    from .trace import record_routing as record_routing
    from .watch import TrainingWatch as TrainingWatch
    from .watch import watch_routing as watch_routing

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "ExpertLoad": "load",
        "Listener": "record",
        "Reader": "record",
        "RoutedLayer": "routed_layers",
        "RouterBiasCallback": "balancing",
        "Routing": "record",
        "RoutingTrace": "trace",
        "SelectionLoads": "selection_loads",
        "StopOnNonFiniteRouting": "finite_checks",
        "TokenRouting": "trace",
        "TrainingWatch": "watch",
        "check_routing": "finite_checks",
        "inspect_routing": "inspection.inspect",
        "record_expert_load": "load",
        "record_routing": "trace",
        "selection_bias": "routed_layers",
        "update_router_bias": "balancing",
        "watch_routing": "watch",
    },
)

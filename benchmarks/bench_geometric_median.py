"""How far the filters of each layer are from each other (FPGM): the sum of a filter's distances to all others."""

from measure import Way, with_floor
from peers import distance_sums_filter_by_filter
from shapes import Case

from pyprune import importance

MODELS = ("resnet50", "tiny")
DTYPES = ("float32",)
GEOMETRIC_MEDIAN = "distances between filters"


def ways(case: Case) -> list[Way]:
    filters = [weight.flatten(1) for weight in case.draw()]
    score = importance.geometric_median().score
    wide = [one.double() for one in filters]
    return with_floor(
        # No job of bytes: each filter meets each other one.
        Way(GEOMETRIC_MEDIAN, "floor: float64 products of all pairs", lambda: [one @ one.T for one in wide]),
        [
            Way(GEOMETRIC_MEDIAN, "pyprune", lambda: [score(one, one) for one in filters]),
            Way(
                GEOMETRIC_MEDIAN,
                "NNI, filter by filter",
                lambda: [distance_sums_filter_by_filter(one) for one in filters],
                formula=True,
                slow=True,
            ),
        ],
    )

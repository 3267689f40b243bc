"""What the layers of a model are: projections, attention, experts, computed weights."""

"""Reading the answer out of a response and comparing it, with the same leniency for every model."""

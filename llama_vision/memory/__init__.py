"""Memory: the plan before a run, what would fit, and the ledger after."""

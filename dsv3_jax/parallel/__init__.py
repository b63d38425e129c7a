"""How the model spreads over devices. The schedules and EPLB here import without JAX: keep this file free of imports."""

"""How the small models of the mini world were made; their weights are kept beside it, in caprl_utils/mini/weights."""

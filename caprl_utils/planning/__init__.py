"""What a profile needs before anything starts.

The notebooks in their order with commands, hardware, hours and cost, each with its formula, and what is missing.
"""

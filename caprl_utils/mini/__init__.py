"""The mini world: rendered images with known facts, and small models of the real architectures trained on them.

Nothing outside this folder knows that it exists; the rest of the package sees images, questions and model folders.
"""

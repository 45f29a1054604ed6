"""Helper package of the CapRL reproduction: the notebooks tell the story, this does the work."""

"""Language model + vision tower + fresh projector = a vision-language model (paper, appendix F)."""

"""VLMs pretrained on caption sets by LLaMA-Factory, in three stages (paper, Tables 1 and 2, Figure 4)."""

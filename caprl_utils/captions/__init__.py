"""Captions of images, with any captioner: `caption` for all of them, `scale` for millions, `export` for other tools."""

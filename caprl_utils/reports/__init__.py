"""Tables, figures and the README's map, made from result records alone."""

"""`covey doctor`: what is wrong, in sentences. `looking` looks, the others judge what was seen; nothing is changed."""
